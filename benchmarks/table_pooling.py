"""What pooling of patch tokens costs where a small part of the image decides the class, and where all of it does.

``python -m benchmarks.table_pooling --out benchmarks/results/table_pooling.json`` draws pictures, encodes them once
with the tokens of two layers, and fits ridge on the class token and on pooled tokens, and the attentive probe on the
tokens (a few minutes on two cores). In ``small`` a 9 x 9 digit lies somewhere in a picture of clutter and tells the
class; in ``whole`` the digit fills the picture.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import featcache
import heads
from benchmarks.common import machine_facts, write_json
from featcache.store import ImageStore

SIZE = 64
LAYERS = ("tokens", "layer:-2:tokens")
POOLS = ("cls", "mean", "gem", "max")
TASKS = ("small", "whole")


def pictures(task: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 64, 64, 3) uint8 and their digits (n,); test and training pictures show other people's digits."""
    chance = np.random.default_rng([seed, TASKS.index(task)])
    scans, digits = load_digits(return_X_y=True)
    half = len(scans) // 2
    rows = chance.integers(0, half, n) + seed * half
    edge = SIZE if task == "whole" else 9
    found = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for number, row in enumerate(rows):
        image = chance.integers(40, 140, (SIZE, SIZE)).astype(np.float32)
        scan = Image.fromarray((scans[row].reshape(8, 8) * 15).astype(np.uint8)).resize((edge, edge))
        top, left = chance.integers(0, SIZE - edge + 1, 2)
        image[top : top + edge, left : left + edge] = np.asarray(scan)
        found[number] = image[..., None].astype(np.uint8)
    return found, digits[rows]


def stored(task: str, split: str, n: int, model: str, root: Path) -> ImageStore:
    """The store of one split, with the tokens of every layer."""
    X, y = pictures(task, n, ("train", "test").index(split))
    folder = root / f"{task}-{split}"
    folder.mkdir()
    np.save(folder / f"{split}_images.npy", X)
    np.save(folder / f"{split}_labels.npy", y)
    return featcache.encode(f"arrays:{folder}", split, model, root=root, taps=LAYERS, name="digits")


def rows_of(task: str, n: int, model: str, root: Path, epochs: int) -> list[dict[str, Any]]:
    """Accuracy (%) of every probe on one task."""
    train, test = (stored(task, split, n, model, root) for split in ("train", "test"))
    found = []
    for tap in LAYERS:
        scores = {how: heads.Ridge().fit(train.tap(tap).pooled(how)).score(test.tap(tap).pooled(how)) for how in POOLS}
        probe = heads.Attentive(lr=[1e-3, 3e-3, 1e-2], epochs=epochs).fit(train.tap(tap))
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
    """Print the table, and write it with the machine's facts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3000, help="pictures of each split")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--epochs", type=int, default=40)
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
