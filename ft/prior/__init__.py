"""The frozen model that a fine-tuned one is held to, computed or read from a store."""
