"""Encoding: a data set, an encoder and options in; a finished store out."""
