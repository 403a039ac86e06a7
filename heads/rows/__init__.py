"""Rows: arrays, tensors, stores and streams in; blocks of (features, labels) out."""
