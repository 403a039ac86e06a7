"""Checkpoints: model folders, their parents, and conversion from and to other layouts."""
