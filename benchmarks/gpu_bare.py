"""All GPU tests and benchmarks that can run with the libraries of this Python, in one record.

``python -m benchmarks.gpu_bare [--out FILE] [--seconds 480] [--device cpu]``

For GPU machines with few libraries and no network; nothing is installed. Each step runs in a separate process with a
share of the time. It is left out, with the reason in the record, if a library or the GPU is missing or the time is used
up; tests that were skipped are named with their reasons. A failed step is recorded with the end of its output. The exit
code is 1 if a step failed, or none ran. ``--device cpu`` runs the benchmarks at tiny sizes on a CPU, only to show that
the command works.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KERNELS = ("torch", "numpy")
PROJECT = (*KERNELS, "zarr", "numcodecs", "sklearn", "scipy", "numba")
ENCODING = (*PROJECT, "open_clip", "torchvision", "PIL")
ENCODE = ("--model", "ViT-L-14", "--precision", "bf16", "--images", "1024", "--batch-size", "256", "--rounds", "3")


@dataclass(frozen=True)
class Step:
    """A command, the libraries it imports, and its time limit in seconds."""

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    seconds: int

    @property
    def missing(self) -> list[str]:
        """The libraries that cannot be imported here."""
        return [name for name in self.needs if find_spec(name) is None]


def steps(device: str) -> list[Step]:
    """Tests first; benchmarks in the order of what would be missed most."""

    def tests(name: str, *needs: str) -> Step:
        return Step(
            f"test_{name}",
            (*KERNELS, "pytest", *needs),
            ("pytest", "-q", "-rs", "-m", "gpu", f"tests/test_gpu/test_{name}.py"),
            90,
        )

    def bench(name: str, needs: tuple[str, ...], seconds: int, *options: str) -> Step:
        small = () if device == "cuda" else ("--tiny", "--rounds", "1")
        return Step(
            f"{name} {' '.join(options)}".strip(),
            needs,
            (f"benchmarks.{name}", "--device", device, *options, *small),
            seconds,
        )

    found = [tests("kernels"), tests("solvers"), tests("estimators", "zarr", "sklearn")] if device == "cuda" else []
    return [
        *found,
        bench("bench_nll_gpu", KERNELS, 150, "--dtype", "bf16"),
        bench("bench_solvers_gpu", KERNELS, 180),
        bench("bench_nll_gpu", KERNELS, 90, "--dtype", "fp32", "--tf32", "--heads", "1"),
        bench("bench_fit_gpu", KERNELS, 60),
        bench("bench_encode", ENCODING, 90, *ENCODE),
        bench("bench_precision", ENCODING, 60),
    ]


def run(found: Sequence[Step], seconds: float, lacking: str = "") -> dict[str, Any]:
    """The record of each step: a benchmark's own, or what a test printed last, or why it did not run.

    `lacking` says why no step can run, if none can.
    """
    end, record = time.monotonic() + seconds, {}
    for step in found:
        left = end - time.monotonic()
        if step.missing:
            record[step.name] = {"left out": f"cannot import {', '.join(step.missing)}"}
        elif lacking:
            record[step.name] = {"left out": lacking}
        elif left < 10:
            record[step.name] = {"left out": f"{seconds:.0f} s are spent; give more with --seconds"}
        else:
            record[step.name] = _one(step, min(left, step.seconds))
        print(f"{step.name}: {_line(record[step.name])}", flush=True)
    return record


def _one(step: Step, seconds: float) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        is_benchmark = step.command[0].startswith("benchmarks.")
        command = [sys.executable, "-m", *step.command, *(("--out", str(out)) if is_benchmark else ())]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
            code, printed = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            printed = b"".join(part for part in (error.stdout, error.stderr) if isinstance(part, bytes)).decode()
            code = None
        found: dict[str, Any] = {"took_s": round(time.monotonic() - start, 1)}
        if out.exists():
            found["record"] = json.loads(out.read_text())
        elif code is None:
            found["failed"] = f"stopped after {seconds:.0f} s: {printed[-1500:]}"
        elif code:
            found["failed"] = f"exit code {code}: {printed[-3000:]}"
        else:
            found["printed"] = printed[-600:]
            found["skipped"] = re.findall(r"^SKIPPED (.*)", printed, re.MULTILINE)
        return found


def _line(found: dict[str, Any]) -> str:
    if "left out" in found:
        return f"left out, {found['left out']}"
    if "failed" in found:
        return f"FAILED after {found['took_s']} s, {found['failed']}"
    record = found.get("record", {})
    bars = record.get("bars", [])
    kept = f", {sum(bar['met'] for bar in bars)} of {len(bars)} bars met" if bars else ""
    reasons = [f"skipped {reason}" for reason in found.get("skipped", [])]
    reasons += [f"left out {name}: {reason}" for name, reason in record.get("left out", {}).items()]
    return "\n  ".join([f"{found['took_s']} s{kept}", *reasons])


def lacking_gpu(device: str) -> str:
    """Why no step can run on the device; empty if they can."""
    if device == "cpu" or find_spec("torch") is None:
        return ""
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device; --device cpu shows that the command works"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=480, help="for all steps together (default: 480)")
    parser.add_argument("--out", default="benchmarks/results/gpu-bare.json", help="JSON file")
    args = parser.parse_args(argv)
    record = run(steps(args.device), args.seconds, lacking_gpu(args.device))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {args.out}")
    return int(any("failed" in found for found in record.values()) or all("left out" in f for f in record.values()))


if __name__ == "__main__":
    sys.exit(main())
