"""Sets of nearby video frames: ImageNet-Vid-Robust and YTBB-Robust."""
