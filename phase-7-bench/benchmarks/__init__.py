"""The sections of bench.py, one file each."""
