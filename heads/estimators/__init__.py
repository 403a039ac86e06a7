"""Estimators: they fit heads to training rows and choose hyper-parameters."""
