"""Ridge classification and regression."""
