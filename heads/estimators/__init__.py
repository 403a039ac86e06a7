"""Estimators: training rows in, fitted heads and their hyper-parameter paths out."""
