"""What checking chunks on first read costs: fits from a store that is checked, against ``verify="never"``.

``python -m benchmarks.bench_verify [--tiny] [--out FILE]``

A store of 1 GiB of float16 features lies in the page cache. Each fit opens it anew, as a new process would: nothing is
known to be sound. The two take turns, in a new order each round; a cost is the median over rounds of the ratio in the
same round, less one. The kept moments are removed before every fit but those of "ridge, kept moments", whose first pass
reads no features. Bar: checking takes at most 10% of a fit.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.bench_store import Timer, ratio_per_round, timed
from benchmarks.common import report
from featcache import open_store
from featcache.store import ImageStore, checks
from featcache.store.places import local
from featcache.transfer.foreign import Foreign
from featcache.transfer.import_features import Source, import_features
from heads import NearestMean, Ridge
from heads.estimators.kept_moments import moments_path

NEVER, READ = "never", "read"


def write(root: Path, n_rows: int, dim: int, n_classes: int) -> Path:
    """A store of unit rows around one centre per class."""
    chance = np.random.default_rng(0)
    labels = chance.integers(0, n_classes, n_rows)
    centres = chance.standard_normal((n_classes, dim), dtype=np.float32)
    features = chance.standard_normal((n_rows, dim), dtype=np.float32)
    for start in range(0, n_rows, 65_536):
        features[start : start + 65_536] += centres[labels[start : start + 65_536]]
    names = [f"class {number}" for number in range(n_classes)]
    store = import_features(Foreign(features, labels, None, names), Source("gaussian"), name="random", root=root)
    return Path(str(store.path))


def contest(path: Path) -> dict[str, dict[str, Timer]]:
    """Fits, and one pass over the rows, with and without checks."""

    def opened(verify: str) -> ImageStore:
        checks.forget()
        store = open_store(path, verify=verify)
        assert isinstance(store, ImageStore)
        return store

    def rows(verify: str) -> None:
        for _ in opened(verify).blocks(dtype=np.float16):
            pass

    fits = {
        "ridge": lambda verify: Ridge().fit(opened(verify)),
        "ridge, kept moments": lambda verify: Ridge().fit(opened(verify)),
        "nearest mean": lambda verify: NearestMean().fit(opened(verify)),
        "one pass over the rows": rows,
    }
    return {
        name: {verify: lambda fit=fit, verify=verify: fit(verify) for verify in (NEVER, READ)}
        for name, fit in fits.items()
    }


def remove_moments(path: Path) -> None:
    store = open_store(path)
    assert isinstance(store, ImageStore)
    kept = moments_path(store)
    assert kept is not None
    kept.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256 * 4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a few rows and rounds, for the tests")
    parser.add_argument("--out", help="JSON file for the record")
    args = parser.parse_args(argv)
    n_rows, dim, n_classes, rounds = args.rows, args.dim, args.classes, args.rounds
    if args.tiny:
        n_rows, dim, n_classes, rounds = 4096, 32, 4, 2
    random.seed(0)
    local.synced = False  # the store is thrown away
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), n_rows, dim, n_classes)
        for group, timers in contest(path).items():
            forget = None if group.endswith("kept moments") else lambda _: remove_moments(path)
            found = timed(timers, rounds, before=forget)
            seconds |= {f"{group}/{name}": values for name, values in found.items()}
    groups = list(dict.fromkeys(name.partition("/")[0] for name in seconds))
    costs = {group: ratio_per_round(seconds, f"{group}/{READ}", f"{group}/{NEVER}") - 1 for group in groups}
    report(
        "Checking chunks on first read",
        {"rows": n_rows, "dim": dim, "dtype": "float16", "classes": n_classes, "rounds": rounds},
        seconds,
        bars=[
            {"name": f"{group}: share added by checking, at most", "value": cost, "bar": 0.1, "met": cost <= 0.1}
            for group, cost in costs.items()
            if group != "one pass over the rows"
        ],
        extra={"one pass over the rows: share added": costs["one pass over the rows"]},
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
