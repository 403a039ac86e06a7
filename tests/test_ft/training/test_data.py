"""Subsets of data sets that are trained on."""

from pathlib import Path

import numpy as np
import pytest

from featcache import encode
from featcache.datasets import open_dataset
from ft.training.data import few_shots


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train_images.npy", rng.integers(0, 255, (24, 28, 28, 3), np.uint8))
    np.save(tmp_path / "train_labels.npy", np.arange(24) % 3)
    return tmp_path


def test_few_shots_of_arrays_have_the_content_of_their_rows(folder: Path) -> None:
    """They had that of the whole file: encoding them, as `--head ridge` does, ended in "changed while encoded"."""
    whole = open_dataset(f"arrays:{folder}", "train")
    few = few_shots(whole, 2, 0)
    assert whole.index.content is not None
    assert few.index.content is not None
    hashes = np.frombuffer(whole.index.content.hashes(), np.uint8).reshape(-1, 16)
    assert few.index.content.hashes() == hashes[few.rows].tobytes()
    assert len(encode(few, root=folder / "cache")) == 6
