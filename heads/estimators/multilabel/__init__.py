"""Heads of multi-label rows: one-vs-rest logistic regression, ridge, zero-shot with thresholds."""
