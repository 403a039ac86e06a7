"""open_clip's models; the only package that imports open_clip's models."""

from featcache.encoders.openclip.encoder import OpenClipEncoder
from featcache.encoders.openclip.loading import TINY, check_arguments, load, load_tiny, openai_file_digests

__all__ = ["TINY", "OpenClipEncoder", "check_arguments", "load", "load_tiny", "openai_file_digests"]
