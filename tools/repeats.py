"""Finds duplicated code of six or more lines, up to renaming: ``python -m tools.repeats [N]``.

Blank lines, comments, docstrings and imports do not count, and lower-case names may differ. Prints the N (default: 20)
longest pairs, longest first.
"""

import ast
import builtins
import io
import keyword
import sys
import tokenize
from collections import defaultdict
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST = 6
KEPT = {*keyword.kwlist, *dir(builtins)}
"""Lower-case names that must be equal, such as those of built-in types."""
Place = tuple[str, int]


def normal_lines(path: Path) -> list[tuple[int, str]]:
    """Line number and text of each line of code, with names replaced by ``_``."""
    text = path.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Expr | ast.Import | ast.ImportFrom):
            continue
        is_doc = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_doc or not isinstance(node, ast.Expr):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    words: dict[int, list[str]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            is_name = token.type == tokenize.NAME and token.string.islower() and token.string not in KEPT
            words[token.start[0]].append("_" if is_name else token.string)
    return [
        (line, " ".join(found))
        for line, found in sorted(words.items())
        if line not in left_out and any(found) and len(set(found) - {"_", ",", "."}) > 1
    ]


def repeats(files: list[Path]) -> list[tuple[int, Place, Place]]:
    """Number of shared lines and the start of both places; longest first, none inside another."""
    lines = {str(path.relative_to(ROOT)): normal_lines(path) for path in files}
    windows: dict[tuple[str, ...], list[Place]] = defaultdict(list)
    for name, found in lines.items():
        for start in range(len(found) - LEAST + 1):
            windows[tuple(text for _, text in found[start : start + LEAST])].append((name, start))
    pairs = {pair for places in windows.values() for pair in combinations(places, 2)}
    result = []
    for a, b in pairs:
        if ((a[0], a[1] - 1), (b[0], b[1] - 1)) in pairs or (a[0] == b[0] and b[1] - a[1] < LEAST):
            continue  # part of a longer pair, or overlapping itself
        length = LEAST
        while ((a[0], a[1] + length - LEAST + 1), (b[0], b[1] + length - LEAST + 1)) in pairs:
            length += 1
        result.append((length, (a[0], lines[a[0]][a[1]][0]), (b[0], lines[b[0]][b[1]][0])))
    return sorted(result, key=lambda pair: (-pair[0], pair[1:]))


if __name__ == "__main__":
    packages = ("featcache", "heads", "ft")
    found = repeats([path for package in packages for path in sorted((ROOT / package).rglob("*.py"))])
    for length, *places in found[: int(sys.argv[1]) if len(sys.argv) > 1 else 20]:
        print(f"{length:4} lines  " + "  ".join(f"{name}:{line}" for name, line in places))
    print(f"{len(found)} pairs")
