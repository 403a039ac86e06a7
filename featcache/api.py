"""The public names of `featcache`."""

from featcache.embed_text import embed_text
from featcache.encode import EncodeOptions, EncodeResult, encode, encode_dataset
from featcache.encoders import load_encoder
from featcache.errors import FeatcacheError
from featcache.store import ImageStore, TextStore, find_store, list_stores, open_store
from featcache.version import __version__

__all__ = [
    "EncodeOptions",
    "EncodeResult",
    "FeatcacheError",
    "ImageStore",
    "TextStore",
    "__version__",
    "embed_text",
    "encode",
    "encode_dataset",
    "find_store",
    "list_stores",
    "load_encoder",
    "open_store",
]
