"""The main benchmarks with few rounds, compared with the ratios committed last.

``python -m benchmarks.quick [NAME ...] [--update]`` (``make bench-quick``), on a quiet machine, in under ten minutes.

Each line shows a ratio to a peer in the same run, its bar, and the ratio in ``benchmarks/results/quick.json``. If a
ratio is more than 15% worse than the latter, the benchmark runs again; if it still is, it is a regression: exit code 1.
``--update`` writes the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np  # noqa: F401  # so that the facts of the machine include the threads of its BLAS

from benchmarks.common import machine_facts, write_json

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "quick.json"
TOLERANCE = 0.15

RUNS: Mapping[str, Sequence[str]] = {
    "store": ("bench_store",),
    "store_write": ("bench_store_write",),
    "moments": ("bench_moments", "--rows", "1000000", "--rounds", "3"),
    "ridge": ("bench_ridge", "--alphas", "20", "--rounds", "3"),
    "ridge_100": ("bench_ridge", "--alphas", "100", "--rounds", "1"),
    "logistic": ("bench_logistic", "--rows", "2000", "--enough", "16", "--work", "{folder}"),
    "one_c": ("bench_one_c", "--rounds", "5"),
    "nll": ("bench_nll", "--heads", "1", "--no-compile", "--rounds", "3"),
    "preparation": ("bench_preparation", "--rounds", "9"),
    "texts": ("bench_texts", "--classes", "2", "--rounds", "3"),
    "precision": ("bench_precision", "--images", "32", "--rounds", "2"),
    "calls": ("bench_calls", "--rounds", "5"),
    "verify": ("bench_verify", "--rounds", "2"),
}
"""Name -> module of this package and its arguments; {folder} is a temporary folder.

Logistic regression has 2,000 rows here, for scikit-learn takes minutes on the 50,000 of its bar.
"""

Ratios = dict[str, dict[str, Any]]


def measured(name: str) -> Ratios:
    """The bars of one benchmark by name, run in a separate process."""
    module, *arguments = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        words = [word.format(folder=folder) for word in arguments]
        command = [sys.executable, "-m", f"benchmarks.{module}", *words, "--out", str(out)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"{module} failed:\n{ran.stderr}")
        bars = json.loads(out.read_text())["bars"]
    names = [bar["name"].removeprefix("at least ") for bar in bars]  # of logistic: the same figure, if it is a bound
    return {name: {key: bar[key] for key in ("value", "bar", "met")} for name, bar in zip(names, bars, strict=True)}


def is_worse(found: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Whether a ratio is worse than the committed one by more than the tolerance.

    Whether higher or lower is better follows from value, bar and whether it was met.

    >>> is_worse({"value": 1.5, "bar": 1.3, "met": False}, {"value": 1.2})  # a time: lower is better
    True
    >>> is_worse({"value": 1.5, "bar": 1.3, "met": True}, {"value": 1.2})  # a speed
    False
    """
    if before is None:
        return False
    higher_is_better = (found["value"] >= found["bar"]) == found["met"]
    lost = before["value"] / found["value"] if higher_is_better else found["value"] / before["value"]
    return bool(lost > 1 + TOLERANCE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--update", action="store_true", help="write the ratios to benchmarks/results/quick.json")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(RUNS)):
        parser.error(f"unknown benchmark {', '.join(unknown)}; expected some of {', '.join(RUNS)}")
    committed = json.loads(RECORD.read_text())["ratios"] if RECORD.exists() else {}
    ratios: dict[str, Ratios] = dict(committed)
    worse, start = [], time.monotonic()
    for name in args.names or RUNS:
        before = committed.get(name, {})
        found = measured(name)
        if not args.update and any(is_worse(bar, before.get(key)) for key, bar in found.items()):
            found = measured(name)
        ratios[name] = found
        for key, bar in found.items():
            known = before.get(key)
            fell = is_worse(bar, known) and not args.update
            worse += [f"{name}: {key}"] if fell else []
            was = f"{known['value']:.3g}" if known else "none"
            verdict = "WORSE" if fell else "met" if bar["met"] else "missed"
            print(f"{verdict:<7}{name + ':':<13}{key:<60}{bar['value']:>9.3g}  bar {bar['bar']:<6g} committed {was}")
    print(f"{time.monotonic() - start:.0f} s; {len(worse)} worse than committed by more than {TOLERANCE:.0%}")
    if args.update:
        write_json(RECORD, {"machine": machine_facts(), "ratios": ratios})
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
