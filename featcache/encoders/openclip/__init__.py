"""The door to open_clip: the only package that imports it, or torchvision."""

from featcache.encoders.openclip.encoder import OpenClipEncoder
from featcache.encoders.openclip.loading import TINY, load, load_tiny, openai_file_digests

__all__ = [
    "TINY",
    "OpenClipEncoder",
    "load",
    "load_tiny",
    "openai_file_digests",
]
