"""Combining fitted heads: interpolation, ensembles, calibration."""
