"""Merging models in weight space: interpolation, soups, Fisher-weighted averages."""
