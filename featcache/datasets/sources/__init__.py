"""Data sources, one per file, listed in `featcache.datasets.DATASETS`."""
