"""The verbs that fit, evaluate and compare heads."""
