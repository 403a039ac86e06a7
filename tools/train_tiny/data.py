"""Batches of (image, caption) with the exact matrix of true pairs, and the held-out validation pictures."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tools.train_tiny.augment import IMAGE_SIZE, Look, draw, sample_look
from tools.train_tiny.captions import ATTRIBUTES, COLUMN, UNCLEAR, caption, case_value, true_pairs
from tools.train_tiny.glyphs import CHARS, DIGITS, LETTERS, STYLES, SYMBOLS, Bank, font_weights

STYLE_SHARES = {"handwritten": 0.42, "sans": 0.28, "serif": 0.18, "mono": 0.12}
DIGIT_SHARE, LETTER_SHARE, SYMBOL_SHARE = 0.58, 0.32, 0.10
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """B pictures, their captions, and which captions are true of which pictures ``(B, B)``."""

    images: Tensor
    captions: list[str]
    truth: Tensor
    chars: Tensor  # (B,) index into CHARS


def attributes_of(bank: Bank, fonts: Ints, chars: Ints, look: Look) -> Ints:
    """Attribute values ``(B, A)`` of glyphs ``fonts``, ``chars`` drawn with ``look``."""
    out = np.zeros((len(chars), len(ATTRIBUTES)), np.int64)
    files = [bank.fonts[f] for f in fonts]
    style = np.array([STYLES.index(f.style) for f in files])
    bold, thin, italic = (np.array([getattr(f, n) for f in files]) for n in ("bold", "thin", "italic"))
    out[:, COLUMN["char"]] = chars
    out[:, COLUMN["case"]] = [case_value(CHARS[c], s) for c, s in zip(chars, style, strict=True)]
    # At 12 px and below serifs and widths are gone; handwriting still shows.
    coarse = look.size <= 12
    out[:, COLUMN["style"]] = np.where(coarse & (style != STYLES.index("handwritten")), UNCLEAR, style)
    heavy = bold | (look.dilate >= 2)
    fine = thin & (look.dilate == 0)
    out[:, COLUMN["weight"]] = np.select([heavy, fine, thin | (look.dilate == 1)], [1, 2, UNCLEAR], 0)
    out[:, COLUMN["italic"]] = np.select([italic & (look.shear > -0.1), look.shear > 0.25], [1, 1], 0)
    out[:, COLUMN["lowres"]] = np.select([look.size <= 12, look.size < IMAGE_SIZE], [1, UNCLEAR], 0)
    out[:, COLUMN["blur"]] = np.select([look.blur >= 0.9, look.blur > 0], [1, UNCLEAR], 0)
    out[:, COLUMN["noise"]] = np.select([look.noise >= 0.08, look.noise > 0.03], [1, UNCLEAR], 0)
    out[:, COLUMN["rotated"]] = np.select([np.abs(look.angle) >= 0.3, np.abs(look.angle) > 0.17], [1, UNCLEAR], 0)
    out[:, COLUMN["outline"]] = look.outline
    # Words such as "white" and "dark on light" are for greys.
    spread = look.ink.max(1) - look.ink.min(1)
    out[:, COLUMN["light"]] = np.where(spread > 0.3, UNCLEAR, look.ink.mean(1) > look.paper.mean(1))
    red, green, blue = (look.ink.argmax(1) == c for c in range(3))
    yellow = (spread > 0.3) & (look.ink[:, 0] > 0.6) & (look.ink[:, 1] > 0.6)
    out[:, COLUMN["colour"]] = np.select([spread <= 0.3, yellow, red, green, blue], [0, 4, 1, 2, 3], 0)
    return out


class Source:
    """Endless batches from one generator state: the same seed gives the same batches."""

    def __init__(self, bank: Bank, seed: int) -> None:
        self.bank = bank
        self.rng = np.random.default_rng([seed, 2])
        self.generator = torch.Generator().manual_seed(seed * 1000 + 3)
        shares = [DIGIT_SHARE / len(DIGITS)] * len(DIGITS) + [LETTER_SHARE / len(LETTERS)] * len(LETTERS)
        self.char_p = np.array(shares + [SYMBOL_SHARE / len(SYMBOLS)] * len(SYMBOLS))
        present = {f.style for f in bank.fonts}
        weights = font_weights(bank, {s: p for s, p in STYLE_SHARES.items() if s in present})
        joint = np.cumsum(weights[:, None] * bank.valid, 0)
        self.font_cdf = joint / joint[-1]

    def glyphs(self, chars: Ints) -> Ints:
        """A font for each character, by the balanced weights, among the fonts that have it."""
        draws = self.rng.random(len(chars))
        return np.array([np.searchsorted(self.font_cdf[:, c], u) for c, u in zip(chars, draws, strict=True)])

    def batch(self, count: int, easy: float = 0.0) -> Batch:
        """``count`` pictures with captions; about the share ``easy`` of them upright, sharp and of full contrast."""
        chars = self.rng.choice(len(CHARS), count, p=self.char_p)
        fonts = self.glyphs(chars)
        look = sample_look(count, self.rng)
        look = _mix(look, self.rng.random(count) < easy)
        # Outlining a hairline or a thin low-resolution glyph would leave nothing to see.
        # A bold one made thicker would close its counters.
        bold = np.array([self.bank.fonts[f].bold for f in fonts])
        dilate = np.select([look.outline, bold], [1, np.minimum(look.dilate, 1)], look.dilate)
        look = replace(look, outline=look.outline & (look.size >= 14), dilate=dilate)
        attributes = attributes_of(self.bank, fonts, chars, look)
        written = [caption(row, self.rng) for row in attributes]
        truth = true_pairs(np.stack([a for _, a in written]), attributes)
        images = draw(self.bank.masks[fonts, chars], look, self.generator)
        return Batch(images, [text for text, _ in written], torch.from_numpy(truth), torch.from_numpy(chars))


def _plain(look: Look) -> Look:
    """The same looks without anything that hides the glyph: full resolution, black on white."""
    zeros = np.zeros_like(look.angle)
    ink = np.zeros_like(look.ink)
    return replace(
        look, dilate=np.zeros_like(look.dilate), outline=np.zeros_like(look.outline), angle=zeros, shear=zeros,
        wobble=zeros, size=np.full_like(look.size, IMAGE_SIZE), gain=zeros, gamma=zeros + 1, ink=ink, paper=1 - ink,
        slope=np.zeros_like(look.slope), blur=zeros, noise=zeros, scale=look.scale * 0 + 1.1, shift=look.shift * 0,
    )  # fmt: skip


def _inverted(look: Look) -> Look:
    plain = _plain(look)
    return replace(plain, ink=plain.paper, paper=plain.ink)


def _mix(look: Look, plain: npt.NDArray[np.bool_]) -> Look:
    """Where ``plain (B,)``, an inverted plain look in place of the drawn one."""
    easy = _inverted(look)
    chosen = {}
    for field in fields(Look):
        ours, theirs = getattr(easy, field.name), getattr(look, field.name)
        chosen[field.name] = np.where(plain.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs)
    return Look(**chosen)


def _lowres(look: Look) -> Look:
    base = _inverted(look)
    return replace(base, size=base.size * 0 + 8, gain=base.gain + 1, scale=look.scale)


def _deformed(look: Look) -> Look:
    wobble, angle = look.wobble * 0 + 0.1, look.angle.clip(-0.2, 0.2)
    return replace(_lowres(look), wobble=wobble, angle=angle, shear=look.shear, dilate=look.dilate)


# Validation pictures: held-out fonts under each of these looks.
VALIDATION: dict[str, Callable[[Look], Look]] = {
    "plain": _plain,
    "inverted": _inverted,
    "low resolution": _lowres,
    "low resolution, deformed": _deformed,
    "noisy": lambda look: replace(_plain(look), noise=look.noise * 0 + 0.25),
    "rotated": lambda look: replace(_plain(look), angle=np.sign(look.angle) * 0.5),
    "outline": lambda look: replace(_plain(look), outline=look.outline | True, dilate=look.dilate * 0 + 1),
    "training mix": lambda look: look,
}


def validation_sets(bank: Bank, count: int) -> dict[str, tuple[Tensor, Ints]]:
    """For each look, ``count`` digit pictures from ``bank`` and their labels; the same for every training seed."""
    out = {}
    for index, (name, change) in enumerate(VALIDATION.items()):
        source = Source(bank, 10_000 + index)
        labels = source.rng.integers(10, size=count)
        fonts = source.glyphs(labels)
        look = change(sample_look(count, source.rng))
        out[name] = (draw(bank.masks[fonts, labels], look, source.generator), labels)
    return out
