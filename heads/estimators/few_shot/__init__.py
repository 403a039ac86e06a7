"""Heads that add a few labelled rows to a zero-shot head."""
