"""Byte-pair encoding: learn a small vocabulary and write it as open_clip's ``SimpleTokenizer`` reads it.

Sennrich, Haddow, Birch (2016), "Neural Machine Translation of Rare Words with Subword Units".
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

Merge = tuple[str, str]
# open_clip's splitting rule, on lower-cased text: runs of letters, single digits, runs of anything else.
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
BYTES, SPECIALS = 256, 2


def vocabulary_size(merges: int) -> int:
    """Token ids of the tokenizer: each byte inside and at the end of a word, the merges, start and end of text.

    >>> vocabulary_size(600)
    1114
    """
    return 2 * BYTES + merges + SPECIALS


def _byte_symbols() -> dict[int, str]:
    """CLIP's printable stand-in for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(BYTES) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(BYTES + n) for n, b in enumerate(others)}


def _split(word: str) -> tuple[str, ...]:
    symbols = [_byte_symbols()[b] for b in word.encode()]
    return (*symbols[:-1], symbols[-1] + "</w>")


def _merge_word(word: tuple[str, ...], merge: Merge) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == merge:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def learn(texts: Iterable[str], merges: int) -> list[Merge]:
    """The ``merges`` most frequent pairs, one after another; ties go to the pair that sorts first.

    Stops early where every word of the corpus is one token.

    >>> learn(["three three tree"], 2)
    [('e', 'e</w>'), ('r', 'ee</w>')]
    """
    counts = Counter(word for text in texts for word in WORDS.findall(text.lower()))
    words = [(_split(word), count) for word, count in sorted(counts.items())]
    found: list[Merge] = []
    while len(found) < merges:
        pairs: Counter[Merge] = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        found.append(best)
        words = [(_merge_word(symbols, best), count) for symbols, count in words]
    return found


def write(merges: list[Merge], path: Path) -> None:
    """Write ``path`` (gzip, one merge per line after a header line); the same merges give the same bytes."""
    text = "\n".join(["#version: featcache tiny", *(f"{a} {b}" for a, b in merges)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
