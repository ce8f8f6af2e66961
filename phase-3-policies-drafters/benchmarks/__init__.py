"""What bench.py measures, one file per section; runs.py is what they share, pictures.py draws."""
