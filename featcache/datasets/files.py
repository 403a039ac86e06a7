"""Shared by the sources that read image files: indexes of files, and checks of names and paths."""

import contextlib
import json
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.datasets.base import IMAGE_FILE, SHOWN, SampleIndex, labelling
from featcache.datasets.decode import decode_image
from featcache.errors import DatasetError
from featcache.parameters import check_regular

T = TypeVar("T")

PLACEHOLDER = "{split}"
"""Stands for the split in a file name."""

MAX_BYTES = 1 << 30
"""Largest image file that is read."""

WHOLE = "all"
"""The split that takes all samples, for data without splits."""


class ImageFiles:
    """Base of data sets whose samples are image files, wherever they are read from."""

    decoding: ClassVar[str] = IMAGE_FILE
    index: SampleIndex

    def decode(self, content: bytes | memoryview, row: int) -> Image.Image:
        """The image in its own mode; ImageReadError (a ValueError) names a damaged sample."""
        return decode_image(content, self.index.ids[row])


@dataclass(frozen=True)
class FileDataset(ImageFiles):
    """A data set whose samples are image files on disk.

    Parameters
    ----------
    root : folder that sample ids start from, unless they are absolute
    """

    name: str
    split: str
    index: SampleIndex
    root: Path

    def path(self, row: int) -> str:
        """Path of a sample's file."""
        return os.path.join(self.root, self.index.ids[row])

    def read(self, row: int) -> bytes:
        """The file's content; OSError as in `read_regular`."""
        return read_regular(self.path(row))


def read_regular(path: str, most: int = MAX_BYTES, what: str = "an image file") -> bytes:
    """The content of a regular file of up to `most` bytes; errors name `what` as expected.

    Raises
    ------
    OSError
        The file cannot be read, is larger, or is a pipe or a device (which is not waited for).
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path}: not a regular file; expected {what}")
        if found.st_size > most:
            raise OSError(f"{path}: {found.st_size:,} bytes; expected {what} of up to {most:,}")
        return file.read()


def file_index(
    ids: Sequence[str],
    files: Sequence[tuple[int, int]],
    labels: npt.ArrayLike,
    classnames: Sequence[str],
    where: str,
    metadata: Mapping[str, Any] | None = None,
) -> SampleIndex:
    """The index of some files; warns of classes without a file.

    Parameters
    ----------
    ids : N sample ids
    files : N pairs (bytes, mtime in ns), as from `size_and_stamp`
    labels : (N,) integers, or targets (N, C) of multi-label data
    classnames : C names
    where : name of the data set in the warning
    """
    sizes, stamps = np.array(files, np.int64).reshape(-1, 2).T.copy()
    truth = labelling(labels)
    index = SampleIndex(ids, sizes, stamps, classnames=tuple(classnames), metadata=metadata or {}, **truth)
    warn_empty_classes(index, where, stacklevel=5)
    return index


def local_path(source: str, argument: str) -> Path:
    """The absolute path after a source's colon; DatasetError without one."""
    if not argument or "\0" in argument:
        raise DatasetError(f"{source}:{argument}: expected a path after the colon")
    return Path(argument).expanduser().absolute()


def json_object(file: Path, kind: type[T]) -> dict[str, T]:
    """A file's JSON object, whose values all have type `kind`; DatasetError for anything else."""
    try:
        check_regular(file)
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: cannot be read as JSON ({error}); restore it") from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, kind) for value in found.values()):
        raise DatasetError(f"{file}: expected a JSON object of {kind.__name__}s; restore it")
    return found


def size_and_stamp(file: "os.DirEntry[str] | Path") -> tuple[int, int]:
    """Bytes and mtime in ns; zeros for a file that cannot be reached, which is reported when it is read."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


def sizes_and_stamps(root: Path, paths: Sequence[str], where: object, remedy: str) -> list[tuple[int, int]]:
    """`size_and_stamp` of images below a folder; DatasetError, with `where` and `remedy`, if none of them exists."""
    found = [size_and_stamp(root / path) for path in paths]
    if not any(stamp for _, stamp in found):
        raise DatasetError(f"{where}: none of its {len(paths):,} images exist, such as {root / paths[0]}; {remedy}")
    return found


def check_name(name: str) -> str:
    """A valid data set name for results rows; DatasetError otherwise."""
    if not name or re.search(r"[\s:/\\]", name):
        raise DatasetError(
            f"data set name {name!r}: expected a short name without spaces, ':' or '/', "
            "since results rows use it in keys such as 'digits:top1'; pass another name"
        )
    return name


def check_split(split: str) -> str:
    """A split's name, which becomes part of paths; DatasetError if it could lead elsewhere."""
    if not split or split in (".", "..") or re.search(r"[/\\\0]", split):
        raise DatasetError(f"split {split!r}: expected a plain name such as train, val, test or all")
    return split


def check_path(path: str) -> str:
    """A path in a list or table; ValueError if it could lead out of their folder."""
    if ".." in path.split("/"):
        raise ValueError(f"got {path!r}; '..' is refused: put the list beside or above its images, or use full paths")
    if "\0" in path:
        raise ValueError(f"got {path!r}; a path cannot hold a NUL character")
    return path


def default_name(text: str) -> str:
    """A data set's name from that of a file or folder: ``Real World`` becomes ``Real-World``."""
    return re.sub(r"[\s:/\\]+", "-", text).strip("-") or "data"


def name_of_file(file: str, folder: Path) -> str:
    """A data set's name from a list's or table's file name, or from its folder if the file is named by the split."""
    return default_name(Path(file).stem.replace(PLACEHOLDER, "").strip("-_. ") or folder.name)


def refuse_int_labels(source: str, labels: str) -> None:
    """DatasetError if integer labels are asked for and the source has names only."""
    if labels != "names":
        raise DatasetError(f"labels={labels!r}: {source} names its classes itself; integer labels are for list:FILE")


_LATER: ContextVar[list[str] | None] = ContextVar("_LATER", default=None)
"""Names of opened data sets with empty classes, if the warning is to wait; None: warn at once."""


@contextlib.contextmanager
def empty_classes_later() -> Iterator[list[str]]:
    """Collects the names that `warn_empty_classes` would warn of, because the classes are about to be renamed."""
    where: list[str] = []
    token = _LATER.set(where)
    try:
        yield where
    finally:
        _LATER.reset(token)


def warn_empty_classes(index: SampleIndex, where: str, stacklevel: int = 4) -> None:
    """Warn of classes without a sample; they stay in the class list, which all splits share."""
    later = _LATER.get()
    if index.targets is None:
        counts = np.bincount(index.labels, minlength=len(index.classnames))
    else:
        counts = (index.targets == 1).sum(axis=0)
    empty = [index.classnames[c] for c in np.flatnonzero(counts == 0)]
    if empty and later is not None:
        later.append(where)
    elif empty:
        warnings.warn(
            f"{where}: {len(empty)} of {len(counts)} classes have no image: {', '.join(empty[:SHOWN])}"
            f"{', ...' if len(empty) > SHOWN else ''}; they stay in the class list",
            stacklevel=stacklevel,
        )
