"""Heads that adapt to the rows they are asked about, and answer for these rows alone."""
