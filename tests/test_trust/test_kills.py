"""SIGKILL and SIGTERM at the write points of every writing verb: no wrong byte (see `kills`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import TrainingError
from featcache.store.places.local import owner
from ft.training.output import open_folder

HERE = Path(__file__)
QUICK = ("rename", "rm", "convert", "finetune")


def outcome(folder: Path, *words: object) -> dict[str, Any]:
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE.parents[2])))
    command = [sys.executable, str(HERE.parents[1] / "kills.py"), str(folder), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_some_kills_leave_no_wrong_byte(tmp_path: Path) -> None:
    found = outcome(tmp_path, "trials", 8, 4, 0, *QUICK)
    assert found["broken"] == []
    assert sum(found["SIGKILL"].values()) >= 8
    assert sum(found["SIGTERM"].values()) >= 4


def test_a_run_killed_while_writing_its_options_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / f"options.json.{owner()}-0123abcd.partial").write_text("{")
    open_folder(tmp_path)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(TrainingError, match="not the folder of a run"):
        open_folder(tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_finetune_ended_at_each_write_point_ends_with_the_same_bytes(tmp_path: Path, number: str) -> None:
    found = outcome(tmp_path, "points", number, 1, "finetune")
    assert found["broken"] == []
    assert found[number]["finetune"] >= 50


@pytest.mark.nightly
def test_300_kills_and_100_terminations_leave_no_wrong_byte(tmp_path: Path) -> None:
    found = outcome(tmp_path, "trials", 300, 100, 1)
    assert found["broken"] == []
    assert sum(found["SIGKILL"].values()) >= 300
    assert sum(found["SIGTERM"].values()) >= 100
    assert min(found["SIGKILL"].values()) > 0
    assert min(found["SIGTERM"].values()) > 0
