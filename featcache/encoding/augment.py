"""Reproducible augmented views of images: same seed, view and sample id, same pixels.

All random numbers of a view come from a counter-based generator (Philox) keyed by a hash of seed, view (the epoch, or
the number of a stored view) and sample id. The view depends on nothing else: not on the number of workers, the order of
the samples, the process, or earlier views. The raw 64-bit stream is used, which NumPy guarantees.

All augmentations are random-resized crops, drawn as torchvision or TensorFlow does, and resized with Pillow's
antialiased bicubic filter. `none`, in `make_view`, is the encoder's own preparation, without augmentation.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from PIL import Image

from featcache.datasets.base import Picture
from featcache.datasets.decode import to_rgb
from featcache.encoders import Encoder
from featcache.encoders.base import Batch
from featcache.encoders.preparation import Box, central_square, cut
from featcache.errors import DatasetError, EncoderError
from featcache.store.key import Json
from featcache.store.reading.parts import Part

SCHEMA = b"featcache view 1\n"


class Crop(NamedTuple):
    """A crop of an image in whole pixels, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class Augmentation:
    """A random-resized crop.

    Parameters
    ----------
    sampler : ``torchvision`` or ``tensorflow``: how crops are drawn, and which one is taken if no attempt fits
    area : least and largest share of the image's area
    aspect : least and largest width / height
    attempts : number of draws
    covered : least share of the image (only ``tensorflow``: its ``min_object_covered`` over the whole image)
    flip : probability of a mirrored view
    clip : clip values to 0-255, and keep 8-bit images in 8 bits; otherwise the result is float32 and may overshoot
    reducing_gap : crops more than twice this factor larger than the result are first shrunk by a whole factor (Pillow's
        ``reducing_gap``), which makes large photographs cheap without a visible difference

    Examples
    --------
    >>> image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    >>> lipsum = AUGMENTATIONS["lipsum"]
    >>> view = lipsum(image, 24, seed=0, view=3, sample_id="n01440764/1.jpg")
    >>> view.shape, view.dtype
    ((24, 24, 3), dtype('float32'))
    >>> bool((view == lipsum(image, 24, seed=0, view=3, sample_id="n01440764/1.jpg")).all())
    True
    """

    sampler: Literal["torchvision", "tensorflow"] = "torchvision"
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    attempts: int = 10
    covered: float = 0.0
    flip: float = 0.5
    clip: bool = True
    reducing_gap: float = 3.0

    def __post_init__(self) -> None:
        for name, (low, high), most in (("area", self.area, 1.0), ("aspect", self.aspect, math.inf)):
            if not 0 < low <= high <= most:
                raise DatasetError(f"augmentation {name} {(low, high)}: expected 0 < low <= high <= {most:g}")
        if self.sampler not in SAMPLERS or self.attempts < 1 or not 0 <= self.flip <= 1 or self.reducing_gap < 1:
            raise DatasetError(
                f"{self}: expected a sampler of {', '.join(SAMPLERS)}, at least one attempt, a flip probability in "
                "[0, 1] and a reducing gap of at least 1"
            )

    @property
    def identity(self) -> Json:
        """Everything besides seed, view, sample id and size that changes a view, JSON-able, for content keys."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"kind": "random resized crop", "filter": "bicubic", **values}

    def crop(self, width: int, height: int, seed: int, view: int, sample_id: str) -> Crop:
        """The crop of a view of an image of `width` x `height` pixels."""
        uniforms = iter(view_uniforms(seed, view, sample_id, 1 + 4 * self.attempts))
        flip = next(uniforms) < self.flip
        return Crop(*SAMPLERS[self.sampler](self, width, height, uniforms), flip)

    def __call__(self, picture: Picture, size: int | tuple[int, int], seed: int, view: int, sample_id: str) -> Batch:
        """The view (H, W, 3): uint8, or float32 with values 0-255 if the image is float32 or `clip` is off.

        The picture is a PIL image, or an array (H, W, 3) of uint8 or of float32 with values 0-255; `size` is the side
        of the square, or (height, width); `view` is the epoch, or the number of a stored view.
        """
        rgb = to_rgb(picture)
        width, height = rgb.size if isinstance(rgb, Image.Image) else (rgb.shape[1], rgb.shape[0])
        crop = self.crop(width, height, seed, view, sample_id)
        out = (size, size) if isinstance(size, int) else (size[1], size[0])
        pixels = self._resized(rgb, crop, out)
        return pixels[:, ::-1].copy() if crop.flip else pixels

    def _resized(self, picture: Picture, crop: Crop, out: tuple[int, int]) -> Batch:
        """The resized crop. It is cut out first, since with Pillow's `box` outside pixels would leak into its edges."""
        piece = cut(picture, crop[:4])
        if self.clip and isinstance(piece, Image.Image):
            return np.asarray(piece.resize(out, Image.Resampling.BICUBIC, reducing_gap=self.reducing_gap))
        values = np.asarray(piece, dtype=np.float32)
        pixels = np.empty((out[1], out[0], 3), dtype=np.float32)
        for channel in range(3):
            image = Image.fromarray(np.ascontiguousarray(values[..., channel]))
            resized = image.resize(out, Image.Resampling.BICUBIC, reducing_gap=self.reducing_gap)
            pixels[..., channel] = np.asarray(resized)
        if self.clip:
            np.clip(pixels, 0, 255, out=pixels)
        return pixels


def view_uniforms(seed: int, view: int, sample_id: str, n: int) -> list[float]:
    """`n` uniform numbers in [0, 1) for one view of one sample.

    >>> view_uniforms(0, 1, "a.png", 2) == view_uniforms(0, 1, "a.png", 3)[:2]
    True
    """
    digest = xxhash.xxh3_128(SCHEMA)
    digest.update(f"{seed} {view} {sample_id}".encode("utf-8", "surrogateescape"))
    raw = np.random.Philox(key=digest.intdigest()).random_raw(n)
    uniforms: list[float] = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
    return uniforms


def _torchvision(spec: Augmentation, width: int, height: int, uniforms: Iterator[float]) -> Box:
    """Area uniform, aspect log-uniform; else the largest central crop of an allowed aspect."""
    low, high = (math.log(bound) for bound in spec.aspect)
    for _ in range(spec.attempts):
        area = width * height * _between(*spec.area, next(uniforms))
        aspect = math.exp(_between(low, high, next(uniforms)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = next(uniforms), next(uniforms)
        if 0 < w <= width and 0 < h <= height:
            return int(left * (width - w + 1)), int(top * (height - h + 1)), w, h
    w, h = width, height
    if width / height < spec.aspect[0]:
        h = round(width / spec.aspect[0])
    elif width / height > spec.aspect[1]:
        w = round(height * spec.aspect[1])
    return (width - w) // 2, (height - h) // 2, w, h


def _tensorflow(spec: Augmentation, width: int, height: int, uniforms: Iterator[float]) -> Box:
    """Aspect uniform, height uniform among whole numbers; else, or if the crop is the image, the central 7/8."""
    least, most = (share * width * height for share in spec.area)
    for _ in range(spec.attempts):
        aspect = _between(*spec.aspect, next(uniforms))
        low, high = round(math.sqrt(least / aspect)), round(math.sqrt(most / aspect))
        high = min(high, height, int((width + 0.5 - 1e-7) / aspect))
        low = min(low, high)
        h = low + int(next(uniforms) * (high - low + 1))
        h += (round(h * aspect) * h < least) - (round(h * aspect) * h > most)  # rounding may miss a bound by one
        w = round(h * aspect)
        top, left = next(uniforms), next(uniforms)
        fits = 0 < w <= width and 0 < h <= height and least <= w * h <= most
        if fits and w * h >= spec.covered * width * height:
            if (w, h) == (width, height):
                break
            # TensorFlow never draws the last possible position.
            return int(left * max(1, width - w)), int(top * max(1, height - h)), w, h
    return central_square(width, height)


def _between(low: float, high: float, uniform: float) -> float:
    return low + (high - low) * uniform


SAMPLERS = {"torchvision": _torchvision, "tensorflow": _tensorflow}

AUGMENTATIONS: Mapping[str, Augmentation] = {
    "lipsum": Augmentation("tensorflow", covered=0.1, clip=False),  # Lipsum-FT, arXiv 2404.00860
    "wise_ft": Augmentation(area=(0.9, 1.0), flip=0.0),  # WiSE-FT, arXiv 2109.01903
    "regft": Augmentation(area=(0.9, 1.0), flip=0.0),  # RegFT, arXiv 2406.05432, trains as WiSE-FT does
    "plain": Augmentation(),  # torchvision's default, the most common one for fine-tuning
}
"""Augmentations by their names in recipes and on the command line."""


@dataclass(frozen=True)
class View:
    """Turns pictures into augmented input images; pure, so any number of threads may call it.

    Its `identity`, JSON-able, is everything that changes its pixels, and part of the key of stored features.
    """

    identity: Json
    make: Callable[[Picture, int, str], Batch]

    def __call__(self, picture: Picture, epoch: int, sample_id: str) -> Batch:
        """The image (H, W, 3) of a picture in an epoch, or of a numbered view: uint8, or float32 with values 0-255."""
        return self.make(picture, epoch, sample_id)


def make_view(name: str, encoder: Encoder, seed: int) -> View:
    """One of `AUGMENTATIONS` at the image size of an encoder, or ``none``, the encoder's own preparation.

    DatasetError if there is no such augmentation, EncoderError if the encoder's `image_size` is unknown.
    """
    if name == "none":
        return View({"kind": "none"}, lambda picture, epoch, sample_id: encoder.prepare(picture))
    if name not in AUGMENTATIONS:
        raise DatasetError(f"augmentation {name!r}: expected one of none, {', '.join(AUGMENTATIONS)}")
    if encoder.image_size is None:
        raise EncoderError(f"{encoder.name} has no image_size, which augmented views need")
    spec, size = AUGMENTATIONS[name], encoder.image_size
    identity = spec.identity | {"seed": seed, "size": list(size)}
    return View(identity, lambda picture, epoch, sample_id: spec(picture, size, seed, epoch, sample_id))


def view_of(part: Part, encoder: Encoder) -> View:
    """The `View` that makes the images of a part."""
    return make_view(part.augmentation or "none", encoder, part.seed)
