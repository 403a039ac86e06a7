"""Multinomial logistic regression: objective, preconditioner, L-BFGS and the path over C."""
