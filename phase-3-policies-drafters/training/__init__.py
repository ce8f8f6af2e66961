"""Training of Medusa heads and EAGLE layers (train_heads.py), which no run of the engine needs."""
