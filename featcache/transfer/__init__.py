"""Transfer: export of stores to other formats, and import of features computed by other programs."""
