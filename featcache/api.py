"""The public names of `featcache`."""

from featcache import __version__
from featcache.encoders import load_encoder
from featcache.encoding.encode import encode
from featcache.encoding.images import EncodeResult, encode_dataset
from featcache.encoding.options import EncodeOptions
from featcache.encoding.texts import embed_text
from featcache.errors import FeatcacheError
from featcache.store import ImageStore, TextStore, find_store, list_stores, open_store
from featcache.transfer.batches import FeatureBatches, FeatureDataset

__all__ = [
    "EncodeOptions",
    "EncodeResult",
    "FeatcacheError",
    "FeatureBatches",
    "FeatureDataset",
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
