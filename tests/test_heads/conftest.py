"""Fixtures of the heads' tests: stores that need no disk, real features where they are at hand, fitted heads."""

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featcache.store.protocol import TableDefaults
from heads import HEADS, Material, fit_head

CLASSNAMES = ("ant", "bee", "cow", "dog", "elk")
DIM = 12


@dataclass
class FakeImageStore(TableDefaults):
    """What heads read of an image store; blocks reuse one buffer, as the real one does."""

    X: NDArray[Any]
    y: NDArray[np.int64]
    classnames: tuple[str, ...] = CLASSNAMES
    name: str = "animals"
    split: str = "train"
    encoder_key: str = "enc-1"
    encoder_name: str = "tiny"
    text_digests: tuple[str, ...] = ("text-1",)
    dataset_key: str = "data-1"
    labels_digest: str = "labels-1"
    logit_scale: float | None = 20.0
    logit_bias: float | None = None
    block_rows: int = 37
    metadata: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    view_id: str | None = None
    groups: NDArray[np.int64] | None = None

    @property
    def multilabel(self) -> bool:
        return self.y.ndim == 2

    @property
    def targets(self) -> NDArray[np.int8] | None:
        return self.y.astype(np.int8) if self.multilabel else None

    @property
    def dim(self) -> int:
        return self.X.shape[1]

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.y

    @cached_property  # which tests may replace, as `ids`
    def valid(self) -> NDArray[np.bool_]:
        return np.ones(len(self), bool)

    @cached_property
    def row_hashes(self) -> NDArray[np.uint64] | None:
        return None

    @cached_property
    def ids(self) -> list[str]:
        return [f"id-{i}" for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.y)

    def gather(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        return self.X[rows]

    def blocks(
        self, rows: int | None = None, dtype: Any = np.float32
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        rows = rows or self.block_rows
        buffer = np.empty((rows, self.dim), dtype)
        for start in range(0, len(self.y), rows):
            labels = self.y[start : start + rows]
            buffer[: len(labels)] = self.X[start : start + rows]
            yield buffer[: len(labels)], labels

    def numpy(self, dtype: Any = np.float32) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return self.X.astype(dtype), self.y


@dataclass
class FakeTextStore:
    """What heads read of a text store."""

    raw: NDArray[np.float32]
    classnames: tuple[str, ...] = CLASSNAMES
    templates: tuple[str, ...] | None = ("a {}.", "the {}.")
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    name: str = "texts"
    text_key: str = "key-1"
    text_digest: str = "text-1"
    encoder_name: str = "tiny"
    logit_scale: float | None = 20.0
    logit_bias: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts.size:
            self.counts = np.full(len(self.raw), self.raw.shape[1])

    @property
    def dim(self) -> int:
        return self.raw.shape[2]


def unit(rows: NDArray[Any]) -> NDArray[Any]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture(scope="session")
def class_means() -> NDArray[np.float64]:
    return unit(np.random.default_rng(1).normal(size=(len(CLASSNAMES), DIM)))


@pytest.fixture(scope="session")
def images(class_means: NDArray[np.float64]) -> Callable[..., FakeImageStore]:
    """Factory of image stores: noisy class means, float16, unit rows."""

    def make(n: int = 200, seed: int = 0, noise: float = 0.2, **fields: Any) -> FakeImageStore:
        rng = np.random.default_rng(seed)
        y = rng.integers(0, len(CLASSNAMES), n)
        X = unit(class_means[y] + noise * rng.normal(size=(n, DIM))).astype(np.float16)
        return FakeImageStore(X, y, **fields)

    return make


@pytest.fixture(scope="session")
def texts(class_means: NDArray[np.float64]) -> Callable[..., FakeTextStore]:
    """Factory of text stores: two prompts per class near the class means."""

    def make(seed: int = 2, **fields: Any) -> FakeTextStore:
        rng = np.random.default_rng(seed)
        raw = unit(class_means[:, None, :] + 0.1 * rng.normal(size=(len(CLASSNAMES), 2, DIM)))
        return FakeTextStore(raw.astype(np.float32), **fields)

    return make


ONE_LABEL = sorted(name for name in HEADS if not HEADS[name].multilabel and not HEADS[name].transductive)
MULTILABEL = sorted(name for name in HEADS if HEADS[name].multilabel)


@pytest.fixture(scope="session")
def fitted_heads() -> dict[str, Any]:
    """Heads by name, which their contract tests fit once and copy."""
    return {}


@pytest.fixture(params=ONE_LABEL)
def fitted(request: pytest.FixtureRequest, images: Any, texts: Any, fitted_heads: dict[str, Any]) -> Any:
    """Every head of one label per row, fitted on what it says it fits on: a new head inherits the contract tests."""
    if request.param not in fitted_heads:
        fitted_heads[request.param] = fit_head(request.param, Material(images(), [texts()]))
    return deepcopy(fitted_heads[request.param])


@pytest.fixture(scope="session")
def tagged(class_means: NDArray[np.float64]) -> Callable[..., FakeImageStore]:
    """Factory of multi-label stores: each row is near the sum of the means of its classes; a tenth is unknown."""

    def make(n: int = 200, seed: int = 0, noise: float = 0.2, unknown: float = 0.1, **fields: Any) -> FakeImageStore:
        rng = np.random.default_rng(seed)
        Y = (rng.random((n, len(CLASSNAMES))) < 0.4).astype(np.int8)
        X = unit(Y @ class_means + noise * rng.normal(size=(n, DIM))).astype(np.float16)
        Y[rng.random(Y.shape) < unknown] = -1
        return FakeImageStore(X, Y, **fields)

    return make


@pytest.fixture(params=MULTILABEL)
def fitted_multilabel(request: pytest.FixtureRequest, tagged: Any, texts: Any, fitted_heads: dict[str, Any]) -> Any:
    """Every multi-label head: `fitted` for rows with any number of classes."""
    if request.param not in fitted_heads:
        fitted_heads[request.param] = fit_head(request.param, Material(tagged(), [texts()]))
    return deepcopy(fitted_heads[request.param])


def clip_like(n: int, dim: int, n_classes: int, seed: int = 0) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Unit rows with CLIP's anisotropy: a common direction, then a spectrum that decays over three decades."""
    rng = np.random.default_rng(seed)
    scale = np.exp(-np.linspace(0, 3, dim))
    y = rng.integers(0, n_classes, n)
    means = 0.8 * rng.normal(size=(n_classes, dim)) * scale
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    rows = unit((rng.normal(size=(n, dim)) * scale + means[y]) @ rotation)
    return unit(rows + 1.4 * unit(rng.normal(size=dim))).astype(np.float16), y


@pytest.fixture(scope="session")
def draw() -> Callable[..., tuple[NDArray[np.float16], NDArray[np.int64]]]:
    return clip_like


@pytest.fixture(scope="session", params=["anisotropic", "oxford_flowers", "oxford_pets"])
def real_features(request: pytest.FixtureRequest) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """CLIP features (float16) and labels: real ones where the test data is, drawn ones everywhere."""
    if request.param == "anisotropic":
        return clip_like(800, 96, 20)
    with np.load(request.getfixturevalue("clip_folder") / f"{request.param}.npz") as file:
        return file["train_features"], file["train_labels"].astype(np.int64)


@pytest.fixture(scope="session")
def clip_folder() -> Path:
    """The folder of real CLIP features; a skip where it is not at hand."""
    root = Path(os.environ.get("FEATCACHE_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    if not (root / "clip-vit-b32-features").exists():
        pytest.skip(f"no features in {root}; set FEATCACHE_TEST_DATA")
    return root / "clip-vit-b32-features"
