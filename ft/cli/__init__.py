"""The verbs that fine-tune, interpolate and convert models."""
