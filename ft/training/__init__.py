"""The training loop: data, model and options in; checkpoints and logs out."""
