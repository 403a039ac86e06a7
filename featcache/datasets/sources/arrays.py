"""``arrays:DIR``: images and labels in two numpy files per split.

``{split}_images.npy``: (N, H, W, 3), or grey (N, H, W) or (N, H, W, 1), which become three equal channels. uint8, or
float with values 0-255 (not 0-1, not standardised). Floats are never rounded to uint8, and a slight bicubic overshoot
of 0-255 is kept. The file is memory-mapped.

``{split}_labels.npy``: (N,) integers; for multi-label data (N, L), 1 where a class applies, 0 where not, -1 where
unknown.

Class order. The labels are class indices; the class names are the lines of ``DIR/classes.txt``, else "0", "1", ... up
to the largest label. Sample ids are split and row, ``test/0000041``. Many arrays share these, so a digest of the images
is part of the data set's key (`featcache.datasets.content`).

``prepared=central-crop`` marks images that are already cropped, as in Lipsum-FT's ``*_x224`` folders. They are encoded
under ``--preprocess central-crop`` without another crop, so that heads of that encoder apply to their features.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Annotated

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.datasets.base import Opened, Picture, SampleIndex
from featcache.datasets.content import Content
from featcache.datasets.files import file_index, local_path, size_and_stamp
from featcache.datasets.labels import MAX_CLASSES
from featcache.datasets.options import SourceOptions, default_name
from featcache.errors import DatasetError, ImageReadError
from featcache.parameters import OneOf, check_regular
from featcache.prompts.text_files import listed_names
from featcache.store.layout import Array

SAMPLED = 64
"""Images, evenly spread, whose range of values is checked."""
OVERSHOOT = 128.0
"""Largest bicubic overshoot of 0-255; standardised or 16-bit values are much further off."""


@dataclass(frozen=True)
class ArrayDataset(Opened):
    """A data set whose samples are rows of one array.

    Parameters
    ----------
    images : (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8 or float
    """

    images: Array

    def read(self, row: int) -> bytes:
        """The row's values as bytes, in C order."""
        return bytes(self.images[row].tobytes())

    @cached_property
    def decoding(self) -> str:
        """Equal for arrays of equal dtype, shape and preparation."""
        return _decoding(self.images, self.prepared)

    def decode(self, content: bytes | memoryview, row: int) -> Picture:
        """(H, W, 3) uint8, or float32 if the file holds floats; ImageReadError if a value is not finite."""
        height, width, *channels = self.images.shape[1:]
        image = np.frombuffer(content, self.images.dtype).reshape(height, width, *(channels or [1]))
        if channels != [3]:
            image = np.repeat(image, 3, axis=2)
        if image.dtype == np.uint8:
            return image
        if not np.isfinite(image).all():
            raise ImageReadError(f"{self.index.ids[row]}: values that are not finite; restore the row")
        return image.astype(np.float32)


@dataclass(frozen=True)
class ArraysOptions(SourceOptions):
    """Options of ``arrays:``.

    Parameters
    ----------
    prepared : preparation that published arrays have gone through, which is not repeated
    """

    prepared: Annotated[str, OneOf("central-crop")] | None = None


def open_arrays(
    argument: str, split: str, options: ArraysOptions, *, labels: str = "names", name: str | None = None
) -> ArrayDataset:
    """Open one split of a folder of numpy files; the default name is that of the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/test_images.npy", np.full((2, 4, 4, 3), 200, np.uint8))
    ...     np.save(f"{folder}/test_labels.npy", np.array([1, 0]))
    ...     data = open_arrays(folder, "test", ArraysOptions(), name="plain")
    >>> data.index.ids, data.index.classnames, data.decode(data.read(0), 0).shape
    (['test/0000000', 'test/0000001'], ('0', '1'), (4, 4, 3))
    """
    prepared = options.prepared
    base = local_path("arrays", argument)
    path = base / f"{split}_images.npy"
    facts = size_and_stamp(path)
    images = load_array(path)
    _check_images(images, path)
    if prepared is not None:
        _check_prepared(images, path, prepared)
    targets = _labels(base / f"{split}_labels.npy", len(images))
    index = array_index(path, facts, images, targets, _classnames(base, targets), prefix=split, prepared=prepared)
    return ArrayDataset(name or default_name(base.name), split, index, images, prepared=prepared)


def array_index(
    path: Path,
    facts: tuple[int, int],
    images: Array,
    targets: npt.NDArray[np.integer],
    classnames: Sequence[str],
    *,
    prefix: str,
    prepared: str | None = None,
) -> SampleIndex:
    """The index of the rows of an array, with their content as part of the key.

    Parameters
    ----------
    facts : size in bytes and mtime in ns of the file, before it was opened
    targets : (N,) class indices, or (N, C) multi-label targets
    prefix : start of the ids, before the row
    prepared : as in `ArrayDataset`
    """
    ids = [f"{prefix}/{row:07d}" for row in range(len(images))]
    files = np.tile([images.itemsize * int(np.prod(images.shape[1:])), facts[1]], (len(images), 1))
    content = Content(path, _decoding(images, prepared), lambda: _hashes(images), file=facts)
    return file_index(ids, files, targets, classnames, content=content)


def _decoding(images: Array, prepared: str | None) -> str:
    whole = f"array {images.dtype.str} {images.shape[1:]}"
    return whole if prepared is None else f"{whole} after {prepared}"


def _hashes(images: Array) -> bytes:
    return b"".join(xxhash.xxh3_128_digest(np.ascontiguousarray(row).data) for row in images)


def load_array(path: Path) -> Array:
    """A numpy file, memory-mapped; DatasetError if it is missing or not one array."""
    try:
        check_regular(path)
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        held = ", ".join(sorted(p.name for p in path.parent.glob("*.npy"))[:10]) or "no .npy file"
        raise DatasetError(f"{path}: no such file; {path.parent} holds {held}: check the folder and split") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, SyntaxError, TokenError) as error:  # damaged headers
        raise DatasetError(f"{path}: not a numpy array file ({error}); write it with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise DatasetError(f"{path}: an archive of several arrays; expected one array, written with numpy.save")
    return array


def _check_images(images: Array, path: Path) -> None:
    got = f"{path}: got {images.dtype} {images.shape}"
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DatasetError(f"{got}; expected uint8 or float with values 0-255: convert the array")
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise DatasetError(f"{got}, channels first; expected (N, H, W, 3): save images.transpose(0, 2, 3, 1)")
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))):
        raise DatasetError(f"{got}; expected (N, H, W, 3), or grey (N, H, W) or (N, H, W, 1)")
    if 0 in images.shape:
        raise DatasetError(f"{got}: no image; expected at least one")
    if images.dtype.kind == "f":
        _check_range(images, path)


def _check_prepared(images: Array, path: Path, prepared: str) -> None:
    if images.shape[1] != images.shape[2]:
        raise DatasetError(
            f"{path}: images of {images.shape[1]} x {images.shape[2]} were not prepared by {prepared}, which makes "
            "squares; leave prepared= out"
        )


def _check_range(images: Array, path: Path) -> None:
    rows = np.linspace(0, len(images) - 1, min(SAMPLED, len(images))).astype(np.int64)
    values = np.asarray(images[rows], np.float64)
    values = values[np.isfinite(values)]  # a damaged row is reported when it is decoded
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    got = f"{path}: values of {len(rows)} images range from {low:.4g} to {high:.4g}"
    if low >= 0 and 0 < high <= 1:
        raise DatasetError(f"{got}; expected 0-255: multiply by 255")
    if low < 0 and high <= 16:
        raise DatasetError(f"{got}, which looks standardised; expected 0-255: undo mean and standard deviation")
    if low < -OVERSHOOT or high > 255 + OVERSHOOT:
        raise DatasetError(f"{got}; expected 0-255: rescale the array")


def _labels(path: Path, samples: int) -> npt.NDArray[np.integer]:
    labels = load_array(path)
    several = labels.ndim == 2 and labels.shape[1] > 1
    if labels.dtype.kind not in "iub" or not (labels.ndim == 1 or several):
        raise DatasetError(f"{path}: got {labels.dtype} {labels.shape}; expected integers of shape (N,), or (N, L)")
    if len(labels) != samples:
        raise DatasetError(f"{path}: got {len(labels):,} labels for {samples:,} images; expected one per row")
    return np.asarray(labels).astype(np.int64)


def _classnames(base: Path, labels: npt.NDArray[np.integer]) -> tuple[str, ...]:
    if names := listed_names(base, unique=False):
        return tuple(names)
    count = labels.shape[1] if labels.ndim == 2 else max(int(labels.max()), 0) + 1
    if count > MAX_CLASSES:
        raise DatasetError(
            f"{base}: largest label {count - 1:,}; expected classes 0 to C-1: check the labels, or write classes.txt"
        )
    return tuple(map(str, range(count)))
