"""Data sources, one per file; the table `DATASETS` of featcache.datasets names them."""
