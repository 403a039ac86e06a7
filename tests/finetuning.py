"""Small fine-tuning runs on random pictures, and their output."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from featcache.datasets.base import Dataset, SampleIndex, whole_dataset
from ft.distributed import Place
from ft.training.data import training_batches
from ft.training.loop import FinetuneResult, finetune
from ft.training.options import FinetuneOptions
from ft.training.setup import Run, prepare

N, BATCH = 24, 8
HERE = Place(0, 1, "cpu")


class Pictures:
    """N random pictures of 32 x 32 in three classes, two of which share a name."""

    name, split = "pictures", "train"

    def __init__(self, n: int = N, seed: int = 0, split: str = "train") -> None:
        self.split = split
        draws = np.random.default_rng(seed)
        self.pixels = draws.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(n) % 3
        zero = np.zeros(n, np.int64)
        ids = [f"{split}-{row}" for row in range(n)]
        self.index = SampleIndex(ids, zero + 3072, zero, labels, ("cat", "crane", "crane"))
        self.broken = -1

    def read(self, row: int) -> bytes:
        return self.pixels[row].tobytes()

    def decode(self, content: bytes, row: int) -> np.ndarray:
        if row == self.broken:
            raise ValueError("truncated")
        return np.frombuffer(content, np.uint8).reshape(32, 32, 3)


def options(**changes: Any) -> FinetuneOptions:
    start: dict[str, Any] = {"steps": 3, "batch_size": BATCH, "lr": 1e-3, "augment": "none", "workers": 1}
    return FinetuneOptions(**(start | changes))


def train(out: Path, model: str, dataset: Dataset | None = None, **changes: Any) -> FinetuneResult:
    return finetune(dataset or Pictures(), model, out=out, options=options(**changes), overwrite=True, device="cpu")


def start(model: str, dataset: Dataset | None = None, **changes: Any) -> Run:
    return prepare(whole_dataset(dataset or Pictures()), None, model, None, options(**changes), HERE, None)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def batch_of(run: Run, step: int = 0) -> Any:
    """The batch of one step, without the loop."""
    return next(training_batches(run.dataset, run.view, run.order, range(step, step + 1), "cpu", 1, 0))
