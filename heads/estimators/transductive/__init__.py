"""Transductive heads: they adapt to the rows to predict, and predict only those."""
