"""From glyph masks to training images: weight, shape, resolution, colour, blur and noise, a batch at a time."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32
LOW_SIZES = (8, 10, 12, 14, 16)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass
class Look:
    """How each of B glyphs is drawn; one entry per image."""

    dilate: Ints  # rounds of 3x3 dilation at 64 px, 0..3
    outline: npt.NDArray[np.bool_]
    scale: Floats  # (B, 2) x and y; 1 keeps the bank's 44 of 64 px
    angle: Floats  # radians, counter-clockwise
    shear: Floats  # x per y, positive leans right
    shift: Floats  # (B, 2) fraction of the half width
    wobble: Floats  # amplitude of the elastic field, fraction of the half width
    size: Ints  # pixels a side before upsampling; 32 is full resolution
    gain: Floats  # the mask's peak after stretching; 0 leaves it as it fell
    gamma: Floats
    ink: Floats  # (B, 3) colour of the strokes, 0..1
    paper: Floats  # (B, 3)
    slope: Floats  # (B, 2) brightness gradient of the picture
    blur: Floats  # sigma in pixels at 32 px; 0 is none
    noise: Floats  # standard deviation of additive noise


def sample_look(count: int, rng: np.random.Generator) -> Look:
    """Draw ``count`` looks. About two in five are low resolution, three in five are light on dark."""

    def flag(p: float) -> npt.NDArray[np.bool_]:
        return rng.random(count) < p

    turned = np.where(flag(0.12), rng.choice((-1, 1), count) * rng.uniform(0.3, 0.7, count), rng.normal(0, 0.09, count))
    coarse = flag(0.42)
    # Small pictures are cropped tight, and what is left of them does not survive blur and heavy noise as well.
    overall = np.where(coarse, rng.uniform(0.95, 1.45, count), rng.uniform(0.75, 1.4, count))
    aspect = np.exp(rng.normal(0, 0.14, count))
    ink, paper = sample_colours(count, rng)
    return Look(
        dilate=rng.choice(4, count, p=(0.4, 0.25, 0.2, 0.15)),
        outline=flag(0.08),
        scale=np.stack([overall * aspect, overall / aspect], 1).clip(0.55, 1.45),
        angle=turned,
        shear=np.where(flag(0.6), rng.normal(0, 0.2, count), 0).clip(-0.5, 0.5),
        shift=rng.normal(0, 0.07, (count, 2)).clip(-0.15, 0.15),
        wobble=np.where(flag(0.6), rng.uniform(0.02, 0.11, count), 0),
        size=np.where(coarse, rng.choice(LOW_SIZES, count, p=(0.45, 0.2, 0.15, 0.1, 0.1)), IMAGE_SIZE),
        gain=np.where(flag(0.6), rng.uniform(0.75, 1.1, count), 0),
        gamma=np.exp(rng.normal(0, 0.25, count)),
        ink=ink,
        paper=paper,
        slope=np.where(flag(0.25)[:, None], rng.normal(0, 0.12, (count, 2)), 0),
        blur=np.where(flag(0.25) & ~coarse, rng.uniform(0.5, 2.0, count), 0),
        noise=np.where(flag(0.3), rng.uniform(0.01, np.where(coarse, 0.12, 0.25), count), 0),
    )


def sample_colours(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Ink and paper, each ``(count, 3)``: mostly greys of good contrast, one in five with coloured ink."""
    light = rng.random(count) < 0.6
    plain = rng.random(count) < 0.5
    low = np.where(plain, 0, rng.uniform(0, 0.35, count))
    high = np.where(plain, 1, np.clip(low + rng.uniform(0.35, 0.9, count), 0, 1))
    ink = np.repeat(np.where(light, high, low)[:, None], 3, 1)
    paper = np.repeat(np.where(light, low, high)[:, None], 3, 1)
    coloured = np.flatnonzero(rng.random(count) < 0.2)
    hues = np.array([[1, 0, 0], [0, 0.8, 0], [0.1, 0.2, 1], [1, 0.9, 0]])[rng.integers(4, size=len(coloured))]
    ink[coloured] = np.clip(hues + rng.normal(0, 0.06, hues.shape), 0, 1)
    # Yellow ink needs dark paper and blue ink light paper to be read.
    bright = ink[coloured] @ np.array([0.3, 0.59, 0.11])
    dark, pale = rng.uniform(0, 0.15, len(coloured)), rng.uniform(0.8, 1, len(coloured))
    paper[coloured] = np.where(bright > 0.4, dark, pale)[:, None]
    return ink, paper


def _thicken(x: Tensor, look: Look) -> Tensor:
    rounds = torch.from_numpy(look.dilate)
    for step in range(1, int(rounds.max()) + 1):
        chosen = torch.nonzero(rounds >= step)[:, 0]
        x = x.index_copy(0, chosen, F.max_pool2d(x[chosen], 3, 1, 1))
    chosen = torch.from_numpy(np.flatnonzero(look.outline))
    if len(chosen):
        drawn = x[chosen]
        x = x.index_copy(0, chosen, F.max_pool2d(drawn, 3, 1, 1) + F.max_pool2d(-drawn, 3, 1, 1))
    return x


def _warp(x: Tensor, look: Look, generator: torch.Generator) -> Tensor:
    """Affine and elastic resampling ``(B, 1, 64, 64)``; the grid maps output to input, so it holds the inverse."""
    cos, sin = np.cos(look.angle), np.sin(look.angle)
    forward = np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)], 1)  # y points down
    lean = np.tile(np.eye(2), (len(cos), 1, 1))
    lean[:, 0, 1] = -look.shear
    inverse = np.linalg.inv(forward @ lean @ (look.scale[:, :, None] * np.eye(2)))
    theta = np.concatenate([inverse, -(inverse @ look.shift[:, :, None])], 2)
    grid = F.affine_grid(torch.from_numpy(theta).float(), list(x.shape), align_corners=False)
    amplitude = torch.from_numpy(look.wobble).float()[:, None, None, None]
    coarse = torch.randn((len(x), 2, 5, 5), generator=generator) * amplitude
    field = F.interpolate(coarse, size=x.shape[-2:], mode="bicubic", align_corners=False)
    return F.grid_sample(x, grid + field.permute(0, 2, 3, 1), align_corners=False)


def resample(x: Tensor, size: int) -> Tensor:
    """Average down to ``size`` pixels and bring it back to 32 bicubically, as a small picture would be."""
    small = F.adaptive_avg_pool2d(x, size)
    if size == IMAGE_SIZE:
        return small
    return F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)


def _stretch(x: Tensor, look: Look) -> Tensor:
    peak = x.amax((2, 3), keepdim=True).clamp_min(0.05)
    gain = torch.from_numpy(look.gain).float()[:, None, None, None]
    gamma = torch.from_numpy(look.gamma).float()[:, None, None, None]
    x = torch.where(gain > 0, x * gain / peak, x)
    return torch.where(x > 0, x.clamp_min(1e-6) ** gamma, x)  # bicubic undershoot stays as it is


def _blur(x: Tensor, sigma: Floats) -> Tensor:
    chosen = torch.from_numpy(np.flatnonzero(sigma))
    if not len(chosen):
        return x
    offsets = torch.arange(-4, 5).float()
    kernel = torch.exp(-(offsets**2) / (2 * torch.from_numpy(sigma).float()[chosen, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = F.pad(x[chosen].reshape(1, -1, IMAGE_SIZE, IMAGE_SIZE), (4, 4, 4, 4), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return x.index_copy(0, chosen, flat.reshape(len(chosen), 3, IMAGE_SIZE, IMAGE_SIZE))


def draw(glyphs: npt.NDArray[np.uint8], look: Look, generator: torch.Generator) -> Tensor:
    """Images ``(B, 3, 32, 32)`` float32, about 0..1, of glyph masks ``(B, 64, 64)`` uint8.

    Values may leave 0..1 a little, as they do after bicubic interpolation of real pictures.
    """
    x = torch.from_numpy(glyphs).float()[:, None] / 255
    x = _warp(_thicken(x, look), look, generator)
    sizes = torch.from_numpy(look.size)
    mask = torch.empty(len(x), 1, IMAGE_SIZE, IMAGE_SIZE)
    for size in sorted(set(look.size.tolist())):
        chosen = sizes == size
        mask[chosen] = resample(x[chosen], size)
    mask = _stretch(mask, look)
    ink, paper = (torch.from_numpy(c).float()[:, :, None, None] for c in (look.ink, look.paper))
    ramp = torch.linspace(-1, 1, IMAGE_SIZE)
    slope = torch.from_numpy(look.slope).float()[:, :, None, None]
    shade = slope[:, :1] * ramp[None, None, None, :] + slope[:, 1:] * ramp[None, None, :, None]
    image = _blur(paper + (ink - paper) * mask + shade, look.blur)
    sigma = torch.from_numpy(look.noise).float()[:, None, None, None]
    return (image + torch.randn(image.shape, generator=generator) * sigma).clamp(-0.1, 1.1)
