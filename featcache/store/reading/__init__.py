"""Opened stores: arrays read with their checksums, images and their parts, texts, tokens."""
