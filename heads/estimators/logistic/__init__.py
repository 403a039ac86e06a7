"""Logistic regression, with an exact path over C or trained by AdamW."""
