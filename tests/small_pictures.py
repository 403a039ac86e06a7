"""A handful of pictures in folders, for the command line: quick to encode."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, n: int = 24) -> str:
    """`n` noisy pictures of two classes; returns the source to name."""
    chance = np.random.default_rng(0)
    for number in range(n):
        place = folder / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = chance.integers(0, 128, (32, 32, 3), dtype=np.uint8) + np.uint8(100 * (number % 2))
        Image.fromarray(pixels).save(place / f"{number:02d}.png")
    return f"imagefolder:{folder}"
