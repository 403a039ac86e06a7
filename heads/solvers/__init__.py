"""Solvers: plain linear algebra on arrays and moments; the estimators are built on them."""
