"""Folder formats of other programs, one module each; see `featcache.transfer.formats`."""
