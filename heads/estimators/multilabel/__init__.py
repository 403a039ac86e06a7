"""Multi-label heads: one-vs-rest logistic regression, ridge, and zero-shot with thresholds."""
