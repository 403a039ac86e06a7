"""Cost of checking chunks on first read: the share of a fit that is spent on hashing.

``python -m benchmarks.bench_verify [--tiny] [--seconds S] [--out FILE]``

A store of 1 GiB of float16 features is in the page cache. Each fit opens it like a new process, with no chunk checked
yet. The fits take turns, in a new order each round, until time is up. The checks are timed within the fit, and the cost
is the median over rounds of their time relative to the rest of the fit. This is an upper bound of the slow-down against
``verify="never"``, since hashing also warms the CPU cache for the fit. (Fits timed with and without checks vary more
between rounds than the checks take.) Cached moments are removed before every fit except "ridge, kept moments", whose
first pass reads no features. Bar: checking takes at most 10% of a fit.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.common import Work, at_most, clocked, median, report
from featcache import open_store
from featcache.store import ImageStore
from featcache.store.places import local
from featcache.store.places.local import Buffer
from featcache.store.reading import checks
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source, import_features
from heads import NearestMean, Ridge
from heads.estimators.kept_moments import moments_path, store_moments
from heads.solvers.folds import FOLDS

KEPT, PASS = "ridge, kept moments", "one pass over the rows"
BLOCK = 1 << 16


def write(root: Path, n_rows: int, dim: int, n_classes: int) -> Path:
    """A store of unit rows around one centre per class."""
    chance = np.random.default_rng(0)
    labels = chance.integers(0, n_classes, n_rows)
    centres = chance.standard_normal((n_classes, dim), dtype=np.float32)
    noise = chance.standard_normal((min(n_rows, BLOCK), dim), dtype=np.float32)
    features = np.empty((n_rows, dim), np.float32)
    for start in range(0, n_rows, BLOCK):  # the same noise around other centres
        part = labels[start : start + BLOCK]
        np.add(centres[part], noise[: len(part)], out=features[start : start + BLOCK])
    names = [f"class {number}" for number in range(n_classes)]
    store = import_features(Foreign(features, labels, None, names), Source("gaussian"), name="random", root=root)
    return Path(str(store.path))


def contest(path: Path) -> dict[str, Work]:
    """Fits on a freshly opened store, and one pass over its rows."""

    def opened() -> ImageStore:
        checks.forget()
        store = open_store(path)
        assert isinstance(store, ImageStore)
        return store

    def rows() -> None:
        for _ in opened().blocks(dtype=np.float16):
            pass

    return {
        "ridge": lambda: Ridge().fit(opened()),
        KEPT: lambda: Ridge().fit(opened()),
        "nearest mean": lambda: NearestMean().fit(opened()),
        PASS: rows,
    }


@contextmanager
def checks_timed() -> Iterator[list[float]]:
    """Seconds of every check inside the block."""
    plain, spent = checks.ChunkChecks.check_all, list[float]()

    def timed(held: checks.ChunkChecks, chunks: Iterable[int], content: Callable[[int], Buffer]) -> None:
        spent.append(clocked(lambda: plain(held, chunks, content)))

    with mock.patch.object(checks.ChunkChecks, "check_all", timed):
        yield spent


def race(path: Path, limit: float, most: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each fit and of its checks, by round; as many rounds as the time allows, at least one."""
    timers = contest(path)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    checking: dict[str, list[float]] = {name: [] for name in timers}
    until = time.perf_counter() + limit
    with checks_timed() as spent:
        for turn in range(most):
            for name in random.sample(list(timers), len(timers)):
                if turn and time.perf_counter() + min(seconds[name]) > until:
                    continue
                prepare_moments(path, keep=name == KEPT)
                spent.clear()
                seconds[name].append(clocked(timers[name]))
                checking[name].append(sum(spent))
    return seconds, checking


def prepare_moments(path: Path, keep: bool) -> None:
    """Compute the moments that are kept beside a store, or remove them."""
    store = open_store(path)
    assert isinstance(store, ImageStore)
    kept = moments_path(store)
    assert kept is not None
    if not keep:
        kept.unlink(missing_ok=True)
    elif not kept.exists():
        store_moments(store, FOLDS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256 * 4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7, help="at most so many")
    parser.add_argument("--seconds", type=float, default=40.0, help="for all rounds but the first (default: 40)")
    parser.add_argument("--tiny", action="store_true", help="a few rows and rounds, for the tests")
    parser.add_argument("--out", help="JSON file for the record")
    args = parser.parse_args(argv)
    n_rows, dim, n_classes, rounds = args.rows, args.dim, args.classes, args.rounds
    if args.tiny:
        n_rows, dim, n_classes, rounds = 4096, 32, 4, 2
    random.seed(0)
    local.synced = False  # the store is thrown away
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), n_rows, dim, n_classes)
        seconds, checking = race(path, args.seconds, rounds)
    costs = {
        name: median(own / (whole - own) for own, whole in zip(checking[name], seconds[name], strict=True))
        for name in seconds
    }
    report(
        "Checking chunks on first read",
        {"rows": n_rows, "dim": dim, "dtype": "float16", "classes": n_classes},
        seconds | {f"{name}, its checks": values for name, values in checking.items()},
        bars=[
            at_most(f"{name}: share added by checking, at most", cost, 0.1)
            for name, cost in costs.items()
            if name != PASS
        ],
        extra={f"{PASS}: share added": costs[PASS]},
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
