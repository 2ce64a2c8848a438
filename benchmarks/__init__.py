"""Measurements, each run from the repository: ``python -m benchmarks.NAME``."""
