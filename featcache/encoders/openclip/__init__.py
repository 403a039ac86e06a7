"""The door to open_clip: the only package that imports it, or torchvision."""

from featcache.encoders.openclip.encoder import OpenClipEncoder
from featcache.encoders.openclip.loading import TINY, check_arguments, load, load_tiny, openai_file_digests

__all__ = [
    "TINY",
    "OpenClipEncoder",
    "check_arguments",
    "load",
    "load_tiny",
    "openai_file_digests",
]
