"""Other layouts of CLIP checkpoints, to and from open_clip's state dicts."""
