"""``digits`` and ``digits:DOMAIN``: handwritten digits and shifted domains of them, without a download.

The images are the 1,797 handwritten digits that ship with scikit-learn (8 x 8, values 0-16, from the UCI collection
"Optical Recognition of Handwritten Digits", Alpaydin and Kaynak 1998), here with values 0-255 and R = G = B, float32.

Splits. ``train`` 1,000, ``val`` 297 and ``test`` 500 images, disjoint and stratified. Within a class the images are
ordered by the xxh3-64 hash of their id, so the splits depend on no random generator.

Domains. Each has *the same* images in a split, with one distribution shift:

======== ================================================================================================
clean    as they are, 8 x 8 (the default; the data set is then called ``digits``)
sketch   40 x 40 (one original pixel of black around), magnitude of the gradient: bright outlines on black
inverted 255 - x: black on white
noisy    plus Gaussian noise of standard deviation 64, clipped to 0-255
rotated  40 x 40 likewise, rotated by 15 to 35 degrees; the sample determines angle and direction
lowres   means of 2 x 2 pixels, so 4 x 4, shown as 8 x 8
======== ================================================================================================

The ids include a version, ``digits-v1/rotated/0042``. Any change to a split or shift needs a new version, since
a store's key depends on the ids alone. Interpolated and noisy values are rounded to whole numbers, which hides last-bit
differences between machines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import xxhash
from scipy import ndimage

from featcache.datasets.base import Opened, Picture, SampleIndex
from featcache.errors import DatasetError

Image = npt.NDArray[np.float64]
Shift = Callable[[Image, int], Image]

VERSION = "digits-v1"
CLASSNAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = {"train": 1000, "val": 297, "test": 500}
SOURCE_DIGEST = "7def82e9250cac7f"
ENLARGED = 40
NOISE = 64.0


@dataclass(frozen=True)
class DigitsDataset(Opened):
    """One split of the digits in one domain; images are generated when they are read.

    Parameters
    ----------
    originals : (N,) indices into scikit-learn's 1,797 images
    """

    domain: str
    originals: npt.NDArray[np.int64]

    def read(self, row: int) -> bytes:
        """The image as little-endian float32 (H, W, 3)."""
        original = int(self.originals[row])
        picture = DOMAINS[self.domain](_source()[0][original] * (255 / 16), original)
        return np.repeat(picture[..., None], 3, axis=2).astype("<f4").tobytes()

    @property
    def decoding(self) -> str:
        """Equal for domains of equal size."""
        return f"array <f4 {_side(self.domain)}"

    def decode(self, content: bytes | memoryview, row: int) -> Picture:
        """(H, W, 3) float32 with values 0-255."""
        side = _side(self.domain)
        return np.frombuffer(content, "<f4").reshape(side, side, 3).astype(np.float32, copy=False)


def open_digits(domain: str, split: str, *, name: str | None = None) -> DigitsDataset:
    """Open one split of the digits; the default name is ``digits``, with ``-<domain>`` unless that is the clean one.

    >>> data = open_digits("rotated", "test")
    >>> data.decode(data.read(0), 0).shape, data.index.ids[0]
    ((40, 40, 3), 'digits-v1/rotated/0001')
    """
    domain = domain or "clean"
    if domain not in DOMAINS:
        raise DatasetError(f"digits:{domain}: unknown domain; expected one of {', '.join(DOMAINS)}")
    if split not in SPLITS:
        sizes = ", ".join(f"{name} ({n:,})" for name, n in SPLITS.items())
        raise DatasetError(f"digits has no split {split!r}; expected one of {sizes}")
    originals = _splits()[split]
    size = _side(domain) ** 2 * 3 * 4
    index = SampleIndex(
        [f"{VERSION}/{domain}/{original:04d}" for original in originals],
        np.full(len(originals), size, np.int64),
        np.zeros(len(originals), np.int64),
        _source()[1][originals],
        CLASSNAMES,
    )
    default = "digits" if domain == "clean" else f"digits-{domain}"
    return DigitsDataset(name or default, split, index, domain, originals)


@cache
def _source() -> tuple[Image, npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # takes a second to import

    data = load_digits()
    images, targets = data.images.astype(np.float64), data.target.astype(np.int64)
    digest = xxhash.xxh3_64_hexdigest(images.astype(np.uint8).tobytes() + targets.astype(np.uint8).tobytes())
    if digest != SOURCE_DIGEST:
        raise DatasetError(
            f"scikit-learn's digits have the digest {digest}, expected {SOURCE_DIGEST}: this version ships other "
            "images; install scikit-learn 1.6 to 1.9"
        )
    return images, targets


def _hash(original: int, purpose: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{VERSION}/{purpose}/{original:04d}".encode())


@cache
def _splits() -> dict[str, npt.NDArray[np.int64]]:
    """Originals of each split, in ascending order.

    Within a class, images are ranked by hash, and an image gets the position (rank + 1/2) / (size of its class). All
    images are sorted by position and cut at the sizes of the splits, so that each split is stratified.
    """
    _, targets = _source()
    position = np.empty(len(targets))
    for c in range(len(CLASSNAMES)):
        members = sorted(np.flatnonzero(targets == c), key=lambda i: _hash(int(i), "split"))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((targets, position))
    cuts = np.cumsum(list(SPLITS.values()))[:-1]
    return {name: np.sort(part) for name, part in zip(SPLITS, np.split(order, cuts), strict=True)}


def _side(domain: str) -> int:
    return ENLARGED if domain in ("sketch", "rotated") else 8


def _enlarge(image: Image) -> Image:
    """(40, 40): four times as large, with a margin, since strokes touch the frame."""
    return np.asarray(ndimage.zoom(np.pad(image, 1), 4, order=1, mode="grid-constant", grid_mode=True))


def _whole(image: Image) -> Image:
    """Whole numbers 0-255."""
    return np.asarray(np.clip(np.rint(image), 0, 255))


def _sketch(image: Image, original: int) -> Image:
    large = _enlarge(image)
    edges = np.hypot(ndimage.sobel(large, axis=0, mode="constant"), ndimage.sobel(large, axis=1, mode="constant"))
    return _whole(edges * (1.5 * 255 / edges.max()))  # the strongest third saturates


def _noisy(image: Image, original: int) -> Image:
    # RandomState, not default_rng: NumPy guarantees its stream.
    noise = np.random.RandomState(_hash(original, "noise") % 2**32).standard_normal(image.shape)
    return _whole(image + NOISE * noise)


def _rotated(image: Image, original: int) -> Image:
    draw = _hash(original, "angle")
    degrees = (15 + 20 * ((draw >> 1) % 1000) / 999) * (1 if draw & 1 else -1)
    turned = ndimage.rotate(_enlarge(image), degrees, reshape=False, order=1, mode="constant")
    return _whole(np.asarray(turned))


def _lowres(image: Image, original: int) -> Image:
    small = (image[0::2, 0::2] + image[1::2, 0::2] + image[0::2, 1::2] + image[1::2, 1::2]) / 4
    return small.repeat(2, axis=0).repeat(2, axis=1)


DOMAINS: dict[str, Shift] = {
    "clean": lambda image, original: image,
    "sketch": _sketch,
    "inverted": lambda image, original: 255 - image,
    "noisy": _noisy,
    "rotated": _rotated,
    "lowres": _lowres,
}
"""Name -> shift of an image (8, 8) with values 0-255, given its index among the originals."""
