"""Run benchmarks at a tiny size, in the test process, where libraries are already loaded."""

import contextlib
import io
import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock


def run_benchmark(name: str, out: Path, *words: str) -> tuple[dict[str, Any], str]:
    """Run ``python -m benchmarks.NAME WORDS --tiny --out OUT``; returns its record and its output."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, "--tiny", *words, "--out", str(out)]),
        contextlib.redirect_stdout(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of the peers, too
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return json.loads(out.read_text()), said.getvalue()
