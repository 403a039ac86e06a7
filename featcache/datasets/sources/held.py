"""Data sets in memory: lists of images, torch data sets, loaded Hugging Face data sets.

``featcache.encode`` takes them in place of ``source:argument``. Sample ids are split and row, and a digest of the
content is part of the key: equal images in equal order find their store again, whatever the object. For the digest,
every image is read once. Image files are identified by path and size instead, as everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike, path
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.datasets.base import Dataset, PlainDataset, check_name, warn_empty_classes, whole_dataset
from featcache.datasets.content import Content
from featcache.datasets.files import ImageFiles, file_index, files_below, size_and_stamp
from featcache.datasets.labels import by_number, classes_of
from featcache.datasets.options import check_split, default_name
from featcache.datasets.pictures import DECODING, PictureDataset, is_tensor, to_content
from featcache.datasets.sources.torchvision import files_of, listed_classes
from featcache.datasets.targets import targets_of_names
from featcache.errors import DatasetError, ImageReadError

Held: TypeAlias = Any
"""A data set in memory; the libraries share no interface beyond ``len`` and indexing."""

EXPECTED = (
    "expected 'source:argument', a list of PIL images or uint8 arrays with labels=, a pair (pictures, labels), a torch "
    "data set of (image, label), or a Hugging Face data set"
)
THREADS = 4
COLUMNS = ("image", "label", "id", "metadata")
HUGGING_FACE = ("datasets.arrow_dataset", "datasets.iterable_dataset")
"""Modules that define Hugging Face data sets, in full: users have modules named `datasets` too."""


def as_dataset(
    data: Held, split: str | None = None, *, labels: object = "names", name: str | None = None, **options: Any
) -> Dataset:
    """A `Dataset` from a data set in memory.

    Parameters
    ----------
    data : Dataset, list, array (N, H, W, 3), torch or Hugging Face data set, or a mapping of splits to these
        Pictures are PIL images, uint8 arrays, tensors (see `featcache.datasets.pictures`) or, in lists, paths.
        A list holds pictures, with `labels`, or pairs of picture and label; or it is a pair ``(pictures, labels)``.
    split : name of the split, and the key of a mapping; default: the data set's own, else ``train``
    labels : sequence of N int or str
        For a list or an array of pictures. For multi-label data, N lists or sets of names, or an array (N, L) of 1
        where a class applies, 0 where not, -1 where unknown.
    name : default: the data set's own name, or the name of its class
    **options
        ``classnames`` (C names, where labels are numbers); ``image``, ``label``, ``id`` and ``metadata``, the columns
        of a Hugging Face data set.

    Raises
    ------
    DatasetError
        `data` is none of these, or its labels are missing or of another kind.

    Examples
    --------
    >>> black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    >>> found = as_dataset([black, white], "test", labels=["night", "day"])
    >>> found.name, found.index.ids, found.index.labels, found.index.classnames
    ('pictures', ['test/0000000', 'test/0000001'], array([1, 0]), ('day', 'night'))
    """
    if isinstance(data, Mapping):
        data, split = _of_split(data, split)
    if is_dataset(data):
        return whole_dataset(data)
    if name:
        check_name(name)  # before the images are read
    columns = {key: options.pop(key) for key in COLUMNS if key in options}
    if any(part.__module__ in HUGGING_FACE for part in type(data).__mro__):
        from featcache.datasets.sources.huggingface import live_huggingface

        _no_labels(labels, "a Hugging Face data set has a column of labels; name it with label=")
        found: Dataset = live_huggingface(data, split, columns, name)
    elif columns:
        raise DatasetError(
            f"{', '.join(columns)}: for Hugging Face data sets, not for {type(data).__name__}; leave out"
        )
    else:
        found = _of_rows(data, labels, check_split(split or "train"), name, options.get("classnames"))
    if isinstance(found, ImageFiles):
        warn_empty_classes(found.index, found.name)
    return found


def _of_rows(data: Held, labels: object, split: str, name: str | None, classnames: Sequence[str] | None) -> Dataset:
    """A list, an array or a torch data set."""
    if isinstance(data, list | tuple | np.ndarray) or is_tensor(data):
        return _of_list(data, labels, split, name or "pictures", classnames)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        stream = " A stream cannot be read twice: make a list of it." if hasattr(data, "__iter__") else ""
        raise DatasetError(f"data is {type(data).__name__}; {EXPECTED}.{stream}")
    _no_labels(labels, "a torch data set returns pairs of image and label")
    return _of_torch(data, split, name or default_name(type(data).__name__.lower()), classnames)


def is_dataset(data: Held) -> TypeGuard[PlainDataset]:
    """Whether an object is a `PlainDataset`."""
    return not isinstance(data, str) and all(hasattr(data, member) for member in ("index", "read", "decode"))


def _of_split(data: Mapping[str, Held], split: str | None) -> tuple[Held, str]:
    if split is None and len(data) > 1:
        split = "train"
    name = next(iter(data), "") if split is None else split
    if name not in data:
        raise DatasetError(f"data has no split {name!r}; expected one of {', '.join(map(str, data)) or '(none)'}")
    return data[name], name


def _no_labels(labels: object, why: str) -> None:
    if not isinstance(labels, str) or labels != "names":
        raise DatasetError(f"labels= is for lists of pictures: {why}; leave labels out")


def _of_list(data: Held, labels: object, split: str, name: str, classnames: Sequence[str] | None) -> Dataset:
    """A list of pictures or paths with labels, or of pairs."""
    if _is_pair(data) and isinstance(labels, str):
        data, labels = data
    pictures: Sequence[object] = data
    if not len(data):
        raise DatasetError("data holds no picture; expected at least one")
    if isinstance(data, list | tuple) and all(isinstance(item, list | tuple) and len(item) == 2 for item in data):
        _no_labels(labels, "this list holds pairs of picture and label")
        pictures, labels = [item[0] for item in data], [item[1] for item in data]
    if isinstance(labels, str) or labels is None:
        raise DatasetError(
            f"{len(pictures):,} pictures without labels; give labels=, one for each, as a name or a number"
        )
    values = list(labels)  # type: ignore[call-overload]
    if len(values) != len(pictures):
        raise DatasetError(f"{len(values):,} labels for {len(pictures):,} pictures; expected one for each")
    if not all(isinstance(item, str | PathLike) for item in pictures):
        return _indexed(name, split, lambda row: (pictures[row], values[row]), len(pictures), classnames)
    files = [Path(str(item)).expanduser().absolute() for item in pictures]
    root = Path(path.commonpath([file.parent for file in files]))
    ids = [file.relative_to(root).as_posix() for file in files]
    targets, classes = _classes(values, ids, classnames)
    return files_below(name, split, file_index(ids, list(map(size_and_stamp, files)), targets, classes), root)


def _is_pair(data: Held) -> bool:
    """Whether a sequence is (pictures, labels) rather than two samples."""
    if not isinstance(data, list | tuple) or len(data) != 2:
        return False
    pictures, labels = data
    if getattr(pictures, "ndim", None) == 4:
        return hasattr(labels, "__len__")
    if not isinstance(pictures, list | tuple) or not hasattr(labels, "__len__") or isinstance(labels, str):
        return False
    if len(pictures) != 2 or len(labels) != 2:
        return True
    first = labels[0]  # the first of two labels, or the picture of a second pair, such as a path
    if isinstance(first, str):
        return not isinstance(pictures[0], str | PathLike)
    return isinstance(first, int | list | set) or getattr(first, "ndim", 2) < 2


def _of_torch(data: Held, split: str, name: str, classnames: Sequence[str] | None) -> Dataset:
    """A map-style torch data set; torchvision's data sets of image files are read as files."""
    is_plain = any(part.__module__.startswith("torchvision.datasets") for part in type(data).__mro__) and not any(
        getattr(data, member, None) for member in ("transform", "target_transform", "transforms")
    )
    if is_plain and classnames is None and isinstance(getattr(data, "root", None), str | PathLike):
        found = files_of(data, Path(data.root).expanduser().absolute(), split, name)
        if found is not None:
            return found
    whole = data
    while whole is not None and not classnames:  # the class names may be those of the data set that this is a part of
        classnames, whole = listed_classes(whole), getattr(whole, "dataset", None)
    lock = Lock()

    def sample(row: int) -> tuple[object, object]:
        with lock:  # a data set may share a file handle or a random generator, as DataLoader's workers never do
            item = data[row]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DatasetError(f"sample {row} is {type(item).__name__}; expected (image, label)")
        return item[0], item[1]

    return _indexed(name, split, sample, len(data), classnames or None)


def _indexed(
    name: str, split: str, sample: Callable[[int], tuple[object, object]], rows: int, classnames: Sequence[str] | None
) -> PictureDataset:
    """The data set, after reading every picture and label once, for sizes, hashes and classes."""

    def look(row: int) -> tuple[int, bytes, object]:
        picture, label = sample(row)
        try:
            content = to_content(picture)
        except ImageReadError as error:
            raise DatasetError(f"sample {row}: {error}") from error
        return len(content), xxhash.xxh3_128_digest(content), label

    with ThreadPoolExecutor(THREADS) as pool:
        looked = list(pool.map(look, range(rows)))
    ids = [f"{split}/{row:07d}" for row in range(rows)]
    targets, classes = _classes([value for *_, value in looked], ids, classnames)
    content = Content(
        f"{name}/{split}",
        DECODING,
        lambda: b"".join(digest for _, digest, _ in looked),
        "expected the same picture each time that a sample is asked for: leave its random transforms out",
    )
    index = file_index(ids, [(size, 0) for size, *_ in looked], targets, classes, content=content)
    return PictureDataset(name, split, index, lambda row: sample(row)[0])


def _classes(
    labels: Sequence[object], ids: Sequence[str], classnames: Sequence[str] | None
) -> tuple[npt.ArrayLike, Sequence[str]]:
    """Class indices, or multi-label targets (N, L), and class names.

    Labels are numbers (of Python, numpy or torch) or names; for multi-label data lists of names, or rows of numbers.
    """
    if labels and all(isinstance(value, list | tuple | set | frozenset) for value in labels):
        lists = [[str(item) for item in value] for value in labels]  # type: ignore[attr-defined]
        if all(isinstance(item, str) for value in labels for item in value):  # type: ignore[attr-defined]
            return targets_of_names(lists, lambda row: ids[row], classnames)
    rows = [np.asarray(value) for value in labels]
    if rows and all(row.ndim == 1 and row.dtype.kind in "iub" and row.shape == rows[0].shape for row in rows):
        targets = np.stack(rows)
        return targets, classnames or tuple(map(str, range(targets.shape[1])))
    plain = [value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value for value in labels]
    if all(isinstance(value, str) for value in plain):
        return classes_of([str(value) for value in plain], lambda row: ids[row], classnames)
    odd = next((row for row, value in enumerate(plain) if isinstance(value, bool) or not isinstance(value, int)), None)
    if odd is not None:
        raise DatasetError(
            f"sample {ids[odd]} has the label {plain[odd]!r:.60}; expected a class index, or names for all"
        )
    remedy = "correct it, or name more classes with classnames="
    return by_number([int(str(value)) for value in plain], lambda row: ids[row], classnames, remedy)
