"""Measurements whose results are kept beside them, in `results/*.json`."""
