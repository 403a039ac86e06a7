"""SIGKILL and SIGTERM at random moments of every writing verb: no wrong byte (see `kills`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__)


def outcome(folder: Path, kills: int, terms: int, seed: int) -> dict[str, Any]:
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE.parents[2])))
    command = [sys.executable, str(HERE.parents[1] / "kills.py"), str(folder), str(kills), str(terms), str(seed)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_some_kills_leave_no_wrong_byte(tmp_path: Path) -> None:
    assert outcome(tmp_path, 6, 3, 0)["broken"] == []


@pytest.mark.nightly
def test_300_kills_and_100_terminations_leave_no_wrong_byte(tmp_path: Path) -> None:
    found = outcome(tmp_path, 300, 100, 1)
    assert found["broken"] == []
    assert sum(found["SIGKILL"].values()) >= 300
    assert sum(found["SIGTERM"].values()) >= 100
    assert sum(count > 0 for count in found["SIGKILL"].values()) == len(found["SIGKILL"])
