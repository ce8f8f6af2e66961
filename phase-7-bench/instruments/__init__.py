"""Instruments: sweeps, predictions, latency under load, reports."""
