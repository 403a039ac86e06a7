"""Heads for features with tokens (N, P, D)."""
