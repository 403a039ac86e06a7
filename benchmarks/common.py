"""Shared by all benchmarks: machine facts, interleaved timing, a printed table, a JSON record.

Run benchmarks from the root of the repository, as ``python -m benchmarks.bench_ridge --out ridge.json``.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median as median
from typing import Any

Work = Callable[[], object]
_LIBRARIES = ("featcache", "numpy", "scipy", "scikit-learn", "torch", "zarr")


def machine_facts() -> dict[str, Any]:
    """CPU model, cores and memory, BLAS and torch threads, library versions, load and date."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": _threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {name: _version(name) for name in _LIBRARIES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def benchmark_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with ``--rounds``, ``--tiny`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
    parser.add_argument("--tiny", action="store_true", help="a small size for tests, without meaning for speed")
    parser.add_argument("--out", help="JSON file for the record")
    return parser


def at_least(name: str, value: float, bar: float) -> dict[str, Any]:
    """A bar that is met by values of at least `bar`."""
    return {"name": name, "value": value, "bar": bar, "met": value >= bar}


def at_most(name: str, value: float, bar: float) -> dict[str, Any]:
    """A bar that is met by values of at most `bar`."""
    return {"name": name, "value": value, "bar": bar, "met": value <= bar}


class Kept:
    """Results computed once and kept as lines of a file, with which an interrupted run continues."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._found: dict[str, Any] = dict(map(json.loads, lines))

    def __call__(self, key: str, make: Callable[[], Any]) -> Any:
        """The result for a key, computed if it is not kept yet."""
        if key not in self._found:
            began = time.perf_counter()
            line = json.dumps([key, make()], default=str)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._found[key] = json.loads(line)[1]
            print(f"{key}: {time.perf_counter() - began:.1f} s", flush=True)
        return self._found[key]


def clocked(work: Work) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(
    timers: Mapping[str, Work],
    rounds: int,
    warmup: int = 1,
    *,
    shuffled: bool = False,
    before: Callable[[str], object] | None = None,
    seconds_of: Callable[[Work], float] = clocked,
) -> dict[str, list[float]]:
    """Seconds per timer and round; each round runs all timers in turn, so that other load affects them equally.

    `warmup` rounds run first and are not counted. With `shuffled`, each round has a new order. `before` is called with
    the name of each timer, outside the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(-warmup, rounds):
        for name in random.sample(list(timers), len(timers)) if shuffled else timers:
            if before is not None:
                before(name)
            taken = seconds_of(timers[name])
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, minimum, maximum and number of some timings."""
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds), "rounds": len(seconds)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Speed-up of `fast` over `slow`: ratio of medians, and smallest and largest ratio of a round."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"of_medians": median(slow) / median(fast), "min": min(each), "max": max(each)}


def print_facts(facts: Mapping[str, Any]) -> None:
    """One line on the machine, one on the libraries."""
    print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, threads {facts['threads']}, "
        f"load {facts['load_1min']}, {facts['date']}"
    )
    print("python " + facts["python"] + ", " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v))


def report(
    title: str,
    sizes: Mapping[str, Any],
    seconds: Mapping[str, Sequence[float]],
    *,
    bars: Sequence[Mapping[str, Any]] = (),
    extra: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Print a benchmark's table and return its record (written to `out` if given).

    Parameters
    ----------
    title, sizes : what ran, and problem sizes
    seconds : timings from `interleaved`
    bars : from `at_least` and `at_most`, possibly with more fields
    extra : more fields of the record, such as agreement with a reference
    out : JSON file
    """
    facts = machine_facts()
    print(f"\n{title}: " + ", ".join(f"{key}={value}" for key, value in sizes.items()))
    print_facts(facts)
    width = max(map(len, seconds), default=0)
    for name, values in seconds.items():
        print(
            f"  {name:<{width}}  median {median(values):9.4f} s   "
            f"({min(values):.4f} to {max(values):.4f}, {len(values)} rounds)"
        )
    for key, value in (extra or {}).items():
        print(f"  {key}: {value}")
    for bar in bars:
        print(f"  {'met   ' if bar['met'] else 'MISSED'} {bar['name']}: {bar['value']:.3g} (bar {bar['bar']})")
    record = {
        "title": title,
        "sizes": dict(sizes),
        "machine": facts,
        "seconds": {name: {**summary(values), "all": list(values)} for name, values in seconds.items()},
        "bars": [dict(bar) for bar in bars],
        **(extra or {}),
    }
    if out is not None:
        write_json(out, record)
    return record


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; its first `left` columns are aligned to the left, the others to the right."""
    ruler = "|" + ":---|" * left + "---:|" * (len(head) - left)
    return "\n".join([f"| {' | '.join(head)} |", ruler, *(f"| {' | '.join(row)} |" for row in rows)])


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as indented JSON; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    wide = "AVX-512" if "avx512f" in known.get("flags", "") else "no AVX-512"
    family = f"family {known.get('cpu family', '?')} model {known.get('model', '?')}"
    return f"{known.get('model name', platform.machine())} ({family}, {wide})"


def _threads() -> dict[str, int]:
    """Number of threads of each loaded BLAS or OpenMP pool; none without threadpoolctl."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:  # on a bare GPU machine
        return {}
    return {str(pool["prefix"]): int(pool["num_threads"]) for pool in threadpool_info()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
