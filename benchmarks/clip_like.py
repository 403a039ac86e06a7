"""Rows with the anisotropy of CLIP features, drawn with NumPy alone."""

import numpy as np
from numpy.typing import NDArray


def draw(n: int, dim: int, n_classes: int, seed: int = 0) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Float16 unit rows around a common direction, class means and noise with an exponential spectrum."""
    rng = np.random.default_rng(seed)
    scale = np.exp(-np.linspace(0.0, 3.0, dim)).astype(np.float32)
    labels = rng.integers(0, n_classes, n)
    means = 0.8 * rng.standard_normal((n_classes, dim), dtype=np.float32) * scale
    rows = rng.standard_normal((n, dim), dtype=np.float32) * scale + means[labels]
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    rows = _unit(rows @ rotation)
    common = _unit(rng.standard_normal((1, dim), dtype=np.float32))
    return _unit(rows + 1.4 * common).astype(np.float16), labels


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
