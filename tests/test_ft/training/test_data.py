"""Training on subsets of data sets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning import options
from PIL import Image

from featcache import encode
from featcache.datasets import open_dataset
from ft.training.data import few_shots
from ft.training.loop import finetune


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train_images.npy", rng.integers(0, 255, (24, 28, 28, 3), np.uint8))
    np.save(tmp_path / "train_labels.npy", np.arange(24) % 3)
    np.save(tmp_path / "val_images.npy", rng.integers(0, 255, (9, 28, 28, 3), np.uint8))
    np.save(tmp_path / "val_labels.npy", np.arange(9) % 3)
    return tmp_path


def test_few_shots_of_arrays_have_the_content_of_their_rows(folder: Path) -> None:
    """They used to have that of the whole file, and encoding them, as `--head ridge` does, failed."""
    whole = open_dataset(f"arrays:{folder}", "train")
    few = few_shots(whole, 2, 0)
    assert whole.index.content is not None
    assert few.index.content is not None
    hashes = np.frombuffer(whole.index.content.hashes(), np.uint8).reshape(-1, 16)
    assert few.index.content.hashes() == hashes[few.rows].tobytes()
    assert len(encode(few, root=folder / "cache")) == 6


class Held(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """The pictures of a folder's arrays as a torch data set."""

    def __init__(self, folder: Path, split: str) -> None:
        self.images, self.labels = (np.load(folder / f"{split}_{what}.npy") for what in ("images", "labels"))

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[row]), int(self.labels[row])

    def __len__(self) -> int:
        return len(self.labels)


@pytest.mark.parametrize("kind", ["torch", "pair", "splits"])
def test_data_in_memory_train_as_the_files_do(folder: Path, kind: str) -> None:
    held, val = (Held(folder, split) for split in ("train", "val"))
    data = {"torch": held, "pair": (held.images, held.labels), "splits": {"train": held}}[kind]
    settings = {"model": "tiny", "options": options(steps=2, epochs=None, augment="wise_ft"), "device": "cpu"}
    memory = finetune(data, out=folder / "memory", val=val, **settings)
    files = finetune(f"arrays:{folder}", out=folder / "files", val=f"arrays:{folder}:val", **settings)
    assert memory.judged[-1]["accuracy"] == files.judged[-1]["accuracy"]
    assert memory.best.is_dir()
