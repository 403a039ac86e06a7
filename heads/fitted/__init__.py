"""Fitted heads: features in, logits out; their files and their provenance."""
