"""Training of the embedded ``tiny`` model on rendered glyphs: ``python -m tools.train_tiny --seed 0 --out DIR``."""
