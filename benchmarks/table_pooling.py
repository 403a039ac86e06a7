"""Accuracy of pooled patch tokens if a small part of the image determines the class, and if the whole image does.

``python -m benchmarks.table_pooling --out benchmarks/results/table_pooling.json`` draws pictures, encodes them once
with the tokens of two layers, and fits ridge on the class token and on pooled tokens, and the attentive probe on the
tokens (a few minutes on two cores). In ``marked`` the class is the colour of one of 12 squares, the one with a white
middle; in ``whole`` it is the colour of the background.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import featcache
import heads
from benchmarks.common import machine_facts, write_json
from featcache.store import ImageStore

SIZE, EDGE, SQUARES = 64, 8, 12
COLOURS = np.array([[220, 30, 30], [30, 200, 30], [40, 40, 220], [220, 200, 30], [200, 40, 200]], np.uint8)
LAYERS = ("tokens", "layer:-2:tokens")
POOLS = ("cls", "mean", "gem", "max")
TASKS = ("marked", "whole")


def pictures(task: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 64, 64, 3) uint8 and their classes (n,).

    ``marked``: 12 squares of random colours, one of which has a white middle: the class is its colour. ``whole``: the
    colour of the background, under the same squares.
    """
    chance = np.random.default_rng([seed, TASKS.index(task)])
    found = chance.integers(90, 160, (n, SIZE, SIZE, 3)).astype(np.uint8)
    labels = chance.integers(0, len(COLOURS), n)
    for image, label in zip(found, labels.tolist(), strict=True):
        if task == "whole":
            image[...] = image // 4 + COLOURS[label] // 2
        colours = chance.integers(0, len(COLOURS), SQUARES)
        places = chance.permutation((SIZE // EDGE) ** 2)[:SQUARES]
        if task == "marked":
            colours[0] = label
        for number, (colour, place) in enumerate(zip(colours.tolist(), places.tolist(), strict=True)):
            top, left = EDGE * (place // (SIZE // EDGE)), EDGE * (place % (SIZE // EDGE))
            image[top : top + EDGE, left : left + EDGE] = COLOURS[colour]
            if number == 0:
                image[top + 2 : top + EDGE - 2, left + 2 : left + EDGE - 2] = 255
    return found, labels


def stored(task: str, split: str, n: int, model: str, root: Path) -> ImageStore:
    """The store of one split, with the tokens of every layer."""
    X, y = pictures(task, n, ("train", "test").index(split))
    folder = root / f"{task}-{split}"
    folder.mkdir()
    np.save(folder / f"{split}_images.npy", X)
    np.save(folder / f"{split}_labels.npy", y)
    return featcache.encode(f"arrays:{folder}", split, model, root=root, taps=LAYERS, name="squares")


def rows_of(task: str, n: int, model: str, root: Path, epochs: int) -> list[dict[str, Any]]:
    """Accuracy (%) of every probe on one task."""
    train, test = (stored(task, split, n, model, root) for split in ("train", "test"))
    found = []
    for tap in LAYERS:
        scores = {how: heads.Ridge().fit(train.tap(tap).pooled(how)).score(test.tap(tap).pooled(how)) for how in POOLS}
        probe = heads.Attentive(queries=8, lr=3e-3, epochs=epochs).fit(train.tap(tap))
        scores["attentive"] = probe.score(test.tap(tap))
        found.append({"task": task, "tap": tap} | {name: 100 * score for name, score in scores.items()})
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    columns = [*POOLS, "attentive"]
    lines = [f"| task | tap | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    lines += [
        f"| {row['task']} | `{row['tap']}` | {' | '.join(f'{row[name]:.1f}' for name in columns)} |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000, help="pictures of each split")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        rows = [row for task in TASKS for row in rows_of(task, args.rows, args.model, Path(root), args.epochs)]
    print(markdown(rows))
    if args.out:
        write_json(args.out, {"rows": rows, "pictures": args.rows, "model": args.model} | machine_facts())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
