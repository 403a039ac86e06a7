"""Folders of features as other programs lay them out: one module each, named in `featcache.transfer.formats`."""
