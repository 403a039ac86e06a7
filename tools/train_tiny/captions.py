"""Captions of glyph images, with what each one claims, so that true image-caption pairs are known exactly.

An image has a value for every attribute; a caption asserts some of them. A caption is true of an image when all it
asserts holds there, whichever image it was written for. The contrastive loss takes every true pair as a positive.
"""

import numpy as np
import numpy.typing as npt

from tools.train_tiny.glyphs import CHARS, DIGITS, LETTERS, STYLES

ATTRIBUTES = (
    "char", "case", "style", "weight", "italic", "light", "lowres", "blur", "noise", "rotated", "outline", "colour",
)  # fmt: skip
COLUMN = {name: index for index, name in enumerate(ATTRIBUTES)}
UNASSERTED = -1  # in a caption: says nothing about this attribute
UNCLEAR = -2  # in an image: neither so nor not so; no caption that asserts the attribute is true of it
COLOURS = ("grey", "red", "green", "blue", "yellow")

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYMBOL_WORDS = {
    "+": "plus", "=": "equals", "?": "question mark", "!": "exclamation mark", "&": "ampersand", "@": "at sign",
    "#": "hash", "%": "percent", "*": "asterisk", "/": "slash", "$": "dollar", "<": "less than", ">": "greater than",
}  # fmt: skip
# These letters look alike in both cases once their size is normalised.
CASELESS = frozenset("CcKkPpSsUuVvWwXxZzJjYyMm")

ADJECTIVES: dict[tuple[str, int], tuple[str, ...]] = {
    ("style", 0): ("sans serif", "sans", "plain sans serif"),
    ("style", 1): ("serif", "serifed", "book serif"),
    ("style", 2): ("monospaced", "typewriter", "monospace", "mono"),
    ("style", 3): ("handwritten", "handwritten", "hand drawn", "script", "cursive"),
    ("weight", 1): ("bold", "thick", "heavy", "fat"),
    ("weight", 2): ("thin", "light weight", "fine"),
    ("italic", 1): ("italic", "slanted", "oblique"),
    ("light", 0): ("black on white", "dark on light", "dark", "black"),
    ("light", 1): ("white on black", "light on dark", "inverted", "white"),
    ("lowres", 0): ("high resolution", "sharp"),
    ("lowres", 1): ("low resolution", "low res", "pixelated", "coarse"),
    ("blur", 1): ("blurry", "blurred", "out of focus", "smooth"),
    ("noise", 1): ("noisy", "grainy", "corrupted", "speckled"),
    ("rotated", 1): ("rotated", "tilted", "turned"),
    ("outline", 1): ("outlined", "sketched", "hollow", "line art"),
    ("colour", 1): ("red",),
    ("colour", 2): ("green",),
    ("colour", 3): ("blue",),
    ("colour", 4): ("yellow",),
}
# Words that say nothing we could check: the model learns to look past them.
NEUTRAL = (
    "", "", "", "", "", "small", "large", "big", "little", "nice", "clean", "good", "bad", "weird", "single", "simple",
    "printed", "cropped", "isolated", "centered", "cool", "written", "old", "new", "real",
)  # fmt: skip
FRAMES = (
    "a photo of the {}", "a photo of the {}.", "a photo of a {}.", "a picture of the {}", "an image of the {}",
    "an image of a {}.", "a drawing of the {}", "a sketch of the {}.", "a scan of a {}", "a rendering of the {}",
    "a close-up photo of the {}.", "a photo of one {}.", "a photo of my {}.", "itap of the {}.", "this is the {}",
    "a low contrast photo of the {}.", "a jpeg photo of the {}.", "graffiti of the {}.", "the {}", "the {}.", "a {}",
    "{}", "{}.", "one {}", "there is a {} in the scene.", "a type of {}", "a painting of the {}", "the word for the {}",
)  # fmt: skip
LEAD_FRAMES = (
    "a {} photo of the {}.", "a {} image of the {}", "a {} picture of a {}", "{} photo of the {}.",
    "an {} image of the {}.",
)  # fmt: skip
TAILS = ("", "", "", "", "", "", " on paper", ", a type of character", " in a font", " on a plain background", " alone")
DIGIT_NOUNS = ("number", "number", "digit", "digit", "numeral", "figure", "number:", "digit:", "")


def name_of(char: str, rng: np.random.Generator) -> str:
    """How a caption names a character: "digit three", 'number: "3"', "letter q", "plus sign"."""
    if char in DIGITS:
        word = DIGIT_WORDS[int(char)] if rng.random() < 0.7 else char
        noun = DIGIT_NOUNS[rng.integers(len(DIGIT_NOUNS))]
    elif char in LETTERS:
        word, noun = char, ("letter", "letter", "character", "letter:")[rng.integers(4)]
    else:
        named = SYMBOL_WORDS[char]
        word, noun = (char, "symbol:") if rng.random() < 0.2 else (named, ("symbol", "sign", "")[rng.integers(3)])
    quoted = rng.random()
    word = f'"{word}"' if quoted < 0.2 else f"'{word}'" if quoted < 0.25 else word
    return f"{noun} {word}".strip()


def _case_word(attributes: npt.NDArray[np.int64], rng: np.random.Generator) -> str:
    words = ((), ("uppercase", "capital", "upper case"), ("lowercase", "lower case"))
    choices = words[attributes[COLUMN["case"]]]
    return choices[rng.integers(len(choices))]


def _finish(text: str, tail: str) -> str:
    """Put the tail before the full stop."""
    return text.removesuffix(".") + tail + "." if tail and text.endswith(".") else text + tail


def caption(attributes: npt.NDArray[np.int64], rng: np.random.Generator) -> tuple[str, npt.NDArray[np.int64]]:
    """One caption for an image with these attributes ``(A,)`` and what it asserts ``(A,)``.

    The character is always named; up to two of the other attributes are, of those an adjective exists for.
    """
    asserted = np.full(len(ATTRIBUTES), UNASSERTED, np.int64)
    char = CHARS[attributes[COLUMN["char"]]]
    asserted[COLUMN["char"]] = attributes[COLUMN["char"]]
    known = [(a, int(v)) for a, v in zip(ATTRIBUTES, attributes, strict=True) if (a, int(v)) in ADJECTIVES]
    wanted = min(len(known), int(rng.choice(3, p=(0.4, 0.4, 0.2))))
    words: list[str] = []
    for index in rng.permutation(len(known))[:wanted]:
        attribute, value = known[index]
        choices = ADJECTIVES[attribute, value]
        words.append(choices[rng.integers(len(choices))])
        asserted[COLUMN[attribute]] = value
    if attributes[COLUMN["case"]] > 0 and rng.random() < 0.3:
        words.append(_case_word(attributes, rng))
        asserted[COLUMN["case"]] = attributes[COLUMN["case"]]
    neutral = NEUTRAL[rng.integers(len(NEUTRAL))]
    tail = TAILS[rng.integers(len(TAILS))]
    name = name_of(char, rng)
    if words and asserted[COLUMN["case"]] == UNASSERTED and rng.random() < 0.35:
        lead = LEAD_FRAMES[rng.integers(len(LEAD_FRAMES))]
        return _finish(lead.format(" ".join(words), f"{neutral} {name}".strip()), tail), asserted
    frame = FRAMES[rng.integers(len(FRAMES))]
    return _finish(frame.format(" ".join(w for w in (neutral, *words, name) if w)), tail), asserted


def true_pairs(asserted: npt.NDArray[np.int64], images: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which captions are true of which images: ``(B, A), (B, A) -> (images B, captions B)``.

    >>> images = np.array([[3, 1], [3, 0]]); captions = np.array([[3, -1], [3, 0]])
    >>> true_pairs(captions, images).tolist()
    [[True, False], [True, True]]
    """
    says, has = asserted[None], images[:, None]
    pairs: npt.NDArray[np.bool_] = ((says == UNASSERTED) | (says == has)).all(-1)
    return pairs


def case_value(char: str, style: int) -> int:
    """1 for upper case, 2 for lower, 0 for no case, UNCLEAR where the glyph does not tell."""
    if char not in LETTERS:
        return 0
    # Several handwriting fonts draw capitals for small letters.
    if char in CASELESS or STYLES[style] == "handwritten":
        return UNCLEAR
    return 1 if char.isupper() else 2


def corpus(count: int, seed: int) -> list[str]:
    """``count`` captions of random attributes: the text on which the vocabulary is learned."""
    rng = np.random.default_rng([seed, 1])
    sizes = {"case": 3, "style": 4, "weight": 3, "colour": len(COLOURS)}
    texts = []
    for _ in range(count):
        values = [rng.integers(len(CHARS)), *(rng.integers(sizes.get(a, 2)) for a in ATTRIBUTES[1:])]
        texts.append(caption(np.array(values, np.int64), rng)[0])
    return texts
