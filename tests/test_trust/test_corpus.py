"""Hostile inputs to every entry point: no traceback, one line, within time and memory (see `hostile`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)
ROOT = HERE.parents[2]


def results(folder: Path, every: int, first: int) -> list[dict[str, object]]:
    """Results of `hostile` for every `every`-th case, run in another process."""
    paths = os.pathsep.join(map(str, (HERE.parents[1], ROOT)))
    command = [sys.executable, str(HERE.parents[1] / "hostile.py"), str(folder), str(every), str(first)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(found: list[dict[str, object]], at_least: int) -> None:
    assert len(found) >= at_least
    assert len({row["name"] for row in found}) > 0.9 * len(found)
    broken = [f"{row['name']}: {row['broken']}" for row in found if row["broken"]]
    assert not broken, "\n".join(broken)
    doors = {str(row["name"]).partition(":")[0] for row in found}
    assert len(doors) == 16
    refused = [row for row in found if row["code"]]
    assert len(refused) > len(found) / 2  # they are hostile


def test_a_sample_of_hostile_inputs_is_refused_in_one_line(tmp_path: Path) -> None:
    check(results(tmp_path, 71, 5), 90)


@pytest.mark.nightly
@pytest.mark.parametrize("share", range(8))
def test_all_hostile_inputs_are_refused_in_one_line(tmp_path: Path, share: int) -> None:
    check(results(tmp_path, 8, share), 800)
