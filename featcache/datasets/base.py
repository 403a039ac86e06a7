"""What a labelled image data set is.

A data set is a fixed, ordered list of samples: sample ``i`` is row ``i`` of every store made from it. It knows ids,
sizes and labels without opening an image; reading and decoding are two steps, so that the content hash is taken from
exactly the bytes that were decoded.

Two digests (xxh3-128 in hexadecimal):

``dataset_key``   of the ordered sample ids and sizes: the data set's half of a store's path.
``labels_digest`` of the labels and the class names: editing labels never re-encodes, and never goes unnoticed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.errors import DatasetError

Picture: TypeAlias = Image.Image | npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""A decoded image: PIL (any mode), uint8 (H, W, 3), or float32 (H, W, 3) with values 0-255."""


class Dataset(Protocol):
    """A split of a labelled image data set."""

    @property
    def name(self) -> str:
        """Short name without spaces, used in results rows: ``digits-sketch``."""

    @property
    def split(self) -> str:
        """Name of the split: ``train``, ``val``, ``test``."""

    @property
    def index(self) -> "SampleIndex":
        """Ids, sizes, stamps, labels and class names of all samples, in row order."""

    def read(self, row: int) -> bytes | memoryview:
        """The undecoded content of one sample; raises OSError where it cannot be read."""

    def decode(self, content: bytes | memoryview, row: int) -> Picture:
        """The image in that content; raises OSError or ValueError where it is damaged."""


@dataclass(frozen=True)
class SampleIndex:
    """The samples of a split, known without opening an image.

    Parameters
    ----------
    ids : sequence of N str
        Stable, unique sample ids: they do not depend on where the data set lies.
    sizes : (N,) int64
        Bytes of each sample's undecoded content.
    stamps : (N,) int64
        Modification times in ns (0 where there is no such thing). Never part of a key: a changed
        stamp only says that the content must be hashed again before a cache hit counts.
    labels : (N,) int64
        Class indices into `classnames`.
    classnames : tuple of C str
        A list, never a dict: two ImageNet classes share a name with others.
    """

    ids: Sequence[str]
    sizes: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classnames: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.sizes), len(self.stamps), len(self.labels)}
        if len(lengths) != 1:
            raise DatasetError(
                f"ids, sizes, stamps and labels differ in length: {len(self.ids)}, {len(self.sizes)}, "
                f"{len(self.stamps)}, {len(self.labels)}; give one of each for every sample"
            )

    def __len__(self) -> int:
        return len(self.ids)
