"""Feature stores in zarr v3: chunked, addressed by content, verified by checksums.

`StoreWriter` writes them, `open_store` and `find_store` read them, `verify` checks them. Start with `layout` for the
files of a store, and with `writer` for how a store is written and how a killed run resumes.
"""

from featcache.store.catalogue import list_stores
from featcache.store.finding import (
    find_path,
    find_store,
    open_bank_store,
    open_image_store,
    open_prior_store,
    open_store,
    open_text_store,
)
from featcache.store.key import content_key, resolve_root
from featcache.store.manifest import BadRow, Manifest, Marker, read_manifest
from featcache.store.reading.images import ImageStore
from featcache.store.reading.texts import BankStore, PriorStore, TextStore
from featcache.store.upkeep.verification import check_deep, repair, verify
from featcache.store.writer import StoreWriter

__all__ = [
    "BadRow",
    "BankStore",
    "ImageStore",
    "Manifest",
    "Marker",
    "PriorStore",
    "StoreWriter",
    "TextStore",
    "check_deep",
    "content_key",
    "find_path",
    "find_store",
    "list_stores",
    "open_bank_store",
    "open_image_store",
    "open_prior_store",
    "open_store",
    "open_text_store",
    "read_manifest",
    "repair",
    "resolve_root",
    "verify",
]
