"""Shared by the sources that read image files: data sets of files, and their indexes."""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.datasets.base import IMAGE_FILE, Opened, SampleIndex
from featcache.datasets.content import Content
from featcache.datasets.decode import decode_image
from featcache.errors import DatasetError

MAX_BYTES = 1 << 30
"""Largest image file that is read."""


@dataclass(frozen=True)
class ImageFiles(Opened):
    """A data set whose samples are image files.

    Parameters
    ----------
    content : reads the file of a row, wherever it is; OSError if it cannot
    """

    decoding: ClassVar[str] = IMAGE_FILE
    content: Callable[[int], bytes]

    def read(self, row: int) -> bytes:
        """The file; OSError if it cannot be read."""
        return self.content(row)

    def decode(self, content: bytes | memoryview, row: int) -> Image.Image:
        """The image in its own mode; ImageReadError (a ValueError) names a damaged sample."""
        return decode_image(content, self.index.ids[row])


def files_below(name: str, split: str, index: SampleIndex, root: Path) -> ImageFiles:
    """The data set of files on disk, whose ids are their paths below a folder, or absolute."""
    return ImageFiles(name, split, index, lambda row: read_regular(os.path.join(root, index.ids[row])))


def local_path(source: str, argument: str) -> Path:
    """The absolute path after a source's colon; DatasetError without one."""
    if not argument or "\0" in argument:
        raise DatasetError(f"{source}:{argument}: expected a path after the colon")
    return Path(argument).expanduser().absolute()


def read_regular(path: str, most: int = MAX_BYTES, what: str = "an image file") -> bytes:
    """The content of a regular file of up to `most` bytes; OSError, which names `what` as expected, for any other.

    A pipe or a device is refused without waiting for it.
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
    files: npt.ArrayLike,
    labels: npt.ArrayLike,
    classnames: Sequence[str],
    metadata: Mapping[str, Any] | None = None,
    content: Content | None = None,
) -> SampleIndex:
    """The index of N files.

    Parameters
    ----------
    files : (N, 2) bytes and mtime in ns, as from `size_and_stamp`
    labels : (N,) integers, or targets (N, C) of multi-label data
    """
    sizes, stamps = np.array(files, np.int64).reshape(-1, 2).T.copy()
    truth, targets = np.asarray(labels), None
    if truth.ndim == 2:
        truth, targets = np.full(len(truth), -1), truth.astype(np.int8)
    return SampleIndex(ids, sizes, stamps, truth.astype(np.int64), tuple(classnames), metadata or {}, content, targets)


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
