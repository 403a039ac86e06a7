"""Font files of the listed Debian packages, rendered once into a bank of glyph masks."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFont

FONT_LIST = Path(__file__).with_name("fonts.txt")
BANK_SIZE = 64  # side of a stored glyph mask, pixels
GLYPH_HEIGHT, GLYPH_WIDTH = 44, 50  # the ink's bounding box is scaled to fit these, pixels
STYLES = ("sans", "serif", "mono", "handwritten")
DIGITS = "0123456789"
# O, o, I and l are left out: many fonts draw them exactly as 0 and 1. Of C and c and the like one is enough.
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghijmnqrty"
SYMBOLS = "+=?!&@#%*/$<>"
CHARS = DIGITS + LETTERS + SYMBOLS
SERIF_MARKS = ("Serif", "C059", "P052", "NimbusRoman", "Bookman", "MathTeX")


@dataclass(frozen=True)
class FontFile:
    """One font file with what its package and its name say about it."""

    path: Path
    package: str
    style: str
    held_out: bool

    @property
    def bold(self) -> bool:
        """True for names such as Bold, Heavy, Black, Demi (not Semibold, which at 32 px reads as regular)."""
        words = self.path.stem.replace("SemiBold", "").replace("Semibold", "")
        return any(w in words for w in ("Bold", "Heavy", "Black", "Demi", "Bd"))

    @property
    def thin(self) -> bool:
        """True for names such as Light, Thin, Hairline."""
        return any(w in self.path.stem for w in ("Light", "Thin", "Hairline"))

    @property
    def italic(self) -> bool:
        """True for names such as Italic or Oblique."""
        return any(w in self.path.stem for w in ("Italic", "Oblique", "BdIta", "dkgIt", "dkgBI"))


@dataclass(frozen=True)
class Bank:
    """Glyph masks of every usable font: ``masks (F, C, 64, 64)`` uint8 and ``valid (F, C)``."""

    fonts: tuple[FontFile, ...]
    masks: npt.NDArray[np.uint8]
    valid: npt.NDArray[np.bool_]

    def subset(self, keep: npt.NDArray[np.bool_]) -> Bank:
        """The fonts where ``keep (F,)`` is true."""
        fonts = tuple(f for f, k in zip(self.fonts, keep, strict=True) if k)
        return Bank(fonts, self.masks[keep], self.valid[keep])

    def split(self) -> tuple[Bank, Bank]:
        """Training fonts and held-out fonts; whole packages are held out, so no family is in both."""
        held = np.array([f.held_out for f in self.fonts])
        return self.subset(~held), self.subset(held)


def style_of(stem: str, declared: str) -> str:
    """Style class of a file: the declared one, or for ``auto`` what the file name says.

    >>> style_of("DejaVuSansMono-Bold", "auto"), style_of("FreeSerif", "auto"), style_of("Lato-Thin", "sans")
    ('mono', 'serif', 'sans')
    """
    if declared != "auto":
        return declared
    if stem.startswith("Z003"):
        return "handwritten"
    if "Mono" in stem:
        return "mono"
    return "serif" if any(mark in stem for mark in SERIF_MARKS) else "sans"


def read_font_list(path: Path = FONT_LIST) -> tuple[list[tuple[str, str, bool]], set[str]]:
    """Packages as ``(name, style, held_out)`` and the stems of dropped files."""
    lines = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    packages = [(w[0], w[1], "held-out" in w[2:]) for w in lines if w[0] != "drop"]
    return packages, {w[1] for w in lines if w[0] == "drop"}


def package_files(package: str) -> list[Path] | None:
    """TrueType and OpenType files of a Debian package; None if it is not installed, SystemExit without ``dpkg``."""
    try:
        listing = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit("dpkg is not on this machine: training needs Debian's font packages") from None
    if listing.returncode != 0:
        return None
    files = sorted(Path(p) for p in listing.stdout.split("\n") if p.lower().endswith((".ttf", ".otf")))
    unique = {p.stem: p for p in reversed(files)}  # the same font may come as .otf and .ttf
    return [unique[stem] for stem in sorted(unique)]


def find_fonts() -> list[FontFile]:
    """Font files of the listed packages in a fixed order; SystemExit with ``apt-get`` if some are missing."""
    packages, dropped = read_font_list()
    found = {name: package_files(name) for name, _, _ in packages}
    missing = sorted(name for name, files in found.items() if not files)
    if missing:
        raise SystemExit(
            f"{len(missing)} of {len(packages)} font packages are not installed; run\n"
            f"  sudo apt-get install {' '.join(missing)}"
        )
    return [
        FontFile(file, name, style_of(file.stem, style), held)
        for name, style, held in packages
        for file in found[name] or ()
        if file.stem not in dropped
    ]


def fonts_digest(fonts: tuple[FontFile, ...]) -> str:
    """SHA-256 over names and bytes of the font files, in order."""
    digest = hashlib.sha256()
    for font in fonts:
        digest.update(font.path.name.encode() + b"\0")
        digest.update(hashlib.sha256(font.path.read_bytes()).digest())
    return digest.hexdigest()


def _mask(font: ImageFont.FreeTypeFont, char: str) -> Image.Image | None:
    """Ink of one character cut to its bounding box; None where nothing is drawn."""
    mask = font.getmask(char, mode="L")
    if 0 in mask.size:
        return None
    image = Image.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox()
    return image.crop(box) if box else None


def _fit(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Scale the ink to the glyph box and centre it in the bank's square."""
    scale = min(GLYPH_HEIGHT / image.height, GLYPH_WIDTH / image.width)
    size = (max(2, round(image.width * scale)), max(2, round(image.height * scale)))
    canvas = Image.new("L", (BANK_SIZE, BANK_SIZE), 0)
    resized = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    canvas.paste(resized, ((BANK_SIZE - size[0]) // 2, (BANK_SIZE - size[1]) // 2))
    return np.asarray(canvas, dtype=np.uint8)


def render_font(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Masks ``(C, 64, 64)`` and validity ``(C,)`` of one font; a missing glyph draws as the font's "not defined"."""
    font = ImageFont.truetype(str(path), 88)
    undefined = _mask(font, "\U0010fffe")
    blank = undefined.tobytes() if undefined else b""
    masks = np.zeros((len(CHARS), BANK_SIZE, BANK_SIZE), np.uint8)
    valid = np.zeros(len(CHARS), bool)
    for index, char in enumerate(CHARS):
        image = _mask(font, char)
        if image is not None and image.tobytes() != blank:
            masks[index], valid[index] = _fit(image), True
    return masks, valid


def build_bank(fonts: list[FontFile]) -> Bank:
    """Render every font; drop those whose ten digits are not all there and all different."""
    rendered = [(font, *render_font(font.path)) for font in fonts]
    kept = [r for r in rendered if r[2][:10].all() and len({m.tobytes() for m in r[1][:10]}) == 10]
    return Bank(tuple(r[0] for r in kept), np.stack([r[1] for r in kept]), np.stack([r[2] for r in kept]))


def font_weights(bank: Bank, shares: dict[str, float]) -> npt.NDArray[np.float64]:
    """Sampling weight of each font ``(F,)``: style share, equal among its packages, equal among their files."""
    groups = [(f.style, f.package) for f in bank.fonts]
    weight = [shares[s] / len({g for g in groups if g[0] == s}) / groups.count((s, p)) for s, p in groups]
    return np.asarray(weight, np.float64) / sum(weight)
