"""Few-shot heads: a zero-shot head plus a few labelled rows."""
