"""Verbs that bring stores to other programs and places, and back."""
