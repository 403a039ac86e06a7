"""The door to open_clip: the only package that imports it, or torchvision."""

from featcache.encoders.openclip.encoder import OpenClipEncoder
from featcache.encoders.openclip.loading import (
    TINY,
    imagenet_classnames,
    load,
    load_tiny,
    openai_file_digests,
    openai_imagenet_templates,
)

__all__ = [
    "TINY",
    "OpenClipEncoder",
    "imagenet_classnames",
    "load",
    "load_tiny",
    "openai_file_digests",
    "openai_imagenet_templates",
]
