"""``cifar:10.1:DIR`` and ``cifar:10.2:DIR``: the two new test sets of CIFAR-10, as published.

========== ============================================================================== ===========================
CIFAR-10.1 ``cifar10.1_v6_data.npy`` and ``cifar10.1_v6_labels.npy`` (Recht et al., 2018)  split ``test``
CIFAR-10.2 ``cifar102_test.npy``, ``cifar102_train.npy`` (Lu et al., 2020): pickled dicts  splits ``test``, ``train``
           of ``images`` and ``labels``, read without unpickling
========== ============================================================================== ===========================

DIR has these files, or a folder ``CIFAR-10.1`` or ``CIFAR-10.2`` with them. ``,version=v4`` selects that version of
CIFAR-10.1. The classes are CIFAR-10's; a digest of the images is part of the key, as for ``arrays:``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from featcache.datasets.files import local_path, size_and_stamp
from featcache.datasets.formats.pickled_arrays import read_pickled
from featcache.datasets.options import SourceOptions
from featcache.datasets.sources.arrays import ArrayDataset, array_index, load_array
from featcache.errors import DatasetError
from featcache.parameters import OneOf
from featcache.prompts.class_lists import load_classnames
from featcache.store.layout import Array

NAMES = {"10.1": "CIFAR101", "10.2": "CIFAR102"}
"""Version -> default name, as in WiSE-FT's results."""
SIDE = 32


@dataclass(frozen=True)
class CifarOptions(SourceOptions):
    """Options of ``cifar:``.

    Parameters
    ----------
    version : version of CIFAR-10.1 (default: v6)
    """

    version: Annotated[str, OneOf("v4", "v6")] | None = None


def open_cifar(argument: str, split: str, options: CifarOptions, *, name: str | None = None) -> ArrayDataset:
    """Open one split of CIFAR-10.1 or CIFAR-10.2; the default name is one of `NAMES`."""
    kind, colon, place = argument.partition(":")
    if kind not in NAMES or not colon:
        raise DatasetError(f"cifar:{argument}: expected cifar:10.1:DIR or cifar:10.2:DIR")
    if options.version and kind != "10.1":
        raise DatasetError(f"cifar:{argument}: only CIFAR-10.1 has versions; leave version= out")
    base = local_path("cifar", place)
    folder = next((inner for inner in (base / f"CIFAR-{kind}", base) if inner.is_dir()), base)
    if split not in (("test",) if kind == "10.1" else ("test", "train")):
        raise DatasetError(f"{folder}: CIFAR-{kind} has no split {split!r}; expected test")
    version = options.version or "v6"
    path = folder / (f"cifar10.1_{version}_data.npy" if kind == "10.1" else f"cifar102_{split}.npy")
    facts = size_and_stamp(path)
    images, targets = _of_101(path) if kind == "10.1" else _of_102(path)
    if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8 or targets.shape != (len(images),):
        raise DatasetError(f"{path}: got {images.dtype} {images.shape}, {targets.shape} labels; restore the files")
    if targets.dtype.kind not in "iu":
        raise DatasetError(f"{path}: got labels of type {targets.dtype}; expected whole numbers: restore the files")
    numbers, names = np.asarray(targets).astype(np.int64), load_classnames("cifar10")
    index = array_index(path, facts, images, numbers, names, prefix=f"cifar{kind}/{split}")
    return ArrayDataset(name or NAMES[kind], split, index, images)


def _of_101(path: Path) -> tuple[Array, Array]:
    return load_array(path), load_array(path.with_name(path.name.replace("_data", "_labels")))


def _of_102(path: Path) -> tuple[Array, Array]:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; check the folder and split")
    found = read_pickled(path)
    if not isinstance(found, dict) or not {"images", "labels"} <= found.keys():
        raise DatasetError(f"{path}: expected a dict of images and labels; restore the file")
    return np.asarray(found["images"]), np.asarray(found["labels"])
