"""Ridge regression: moments, one eigendecomposition for every alpha, exact leave-one-out."""
