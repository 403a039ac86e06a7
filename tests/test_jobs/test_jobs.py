"""Fifteen jobs of a new user: README's commands in a clean folder, at most four each, and their results."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from docs_needs import Scratch, class_folders
from docs_pages import JOBS, ROOT, commands
from docs_run import run_block, scratch

import featcache

__all__ = ["scratch"]  # a fixture
DATA = {"pets", "flat", "lists", "npz", "shards", "scans", "python-held", "digits-stores"}
"""Files of a user before the first command; nothing made by featcache except the built-in digits."""


def last_row() -> dict[str, float]:
    row: dict[str, float] = json.loads(Path("results.jsonl").read_text().splitlines()[-1])
    return row


def evaluated(name: str, least: float) -> Callable[[str], None]:
    def check(said: str) -> None:
        assert last_row()[f"{name}:top1"] >= least
        assert f"{name}" in said

    return check


def demo(said: str) -> None:
    assert Path("demo/report.html").is_file()
    assert "ridge" in said


def divided(said: str) -> None:
    assert last_row()["flat:top1"] >= 0.9
    assert Path("report/report.html").is_file()
    assert {entry.rows for entry in featcache.list_stores()} == {4, 16}


def scored(said: str) -> None:
    assert float(said.strip().splitlines()[-1]) == 1


def module(said: str) -> None:
    assert said.strip() == "(8, 5)"


def swept(said: str) -> None:
    rows = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert {row["head"] for row in rows} >= {"zero_shot", "ridge", "logistic"}
    assert Path("report/report.html").is_file()


def predicted(said: str) -> None:
    lines = said.strip().splitlines()
    first = [line.split(",") for line in lines if re.match(r"scans/\d.png,1,", line)]
    assert [(row[0], row[2]) for row in first] == [
        ("scans/0.png", "cat"),
        ("scans/1.png", "dog"),
        ("scans/2.png", "cat"),
    ]


def pipeline(said: str) -> None:
    assert np.mean([float(word) for word in said.strip().strip("[]").split()]) > 0.9


def shared(said: str) -> None:
    assert "pets/train@tiny" in said
    assert Path("pets.parquet").is_file()
    assert not Path("cache").exists()


def read_elsewhere(said: str) -> None:
    store: Any = featcache.open_store("digits/train")
    held: Any = zarr.open_group(store.path)["features"]
    features = held[:]
    np.testing.assert_array_equal(features, store.numpy(np.float16)[0])
    assert store.to_pandas().shape[0] == len(features) == 1000


def resumed(said: str) -> None:
    assert "cache hit, no image opened" in said


CHECKS: list[Callable[[str], None]] = [
    *(demo, evaluated("pets", 0.9), divided, evaluated("pets", 0.9), evaluated("mine", 0.8)),
    *(scored, evaluated("shards", 0.9), module, swept, evaluated("pets", 0.4), predicted),
    *(pipeline, read_elsewhere, shared, resumed),
]


def test_there_are_fifteen_jobs_of_at_most_four_commands() -> None:
    assert [int(title.partition(".")[0]) for title in JOBS] == list(range(1, 16))
    for title, block in JOBS.items():
        assert set(block.needs) <= DATA, title
        if block.language == "console":
            assert 1 <= len(commands(block)) <= 4, title
        else:
            steps = [line for line in block.text.splitlines() if line and not line.startswith(("import ", "from "))]
            assert 1 <= len(steps) <= 4, title


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("title", "check"),
    [
        pytest.param(title, check, marks=[pytest.mark.nightly] if JOBS[title].nightly else [])
        for title, check in zip(JOBS, CHECKS, strict=True)
    ],
)
def test_each_job_of_the_page_gives_the_expected_result(
    title: str, check: Callable[[str], None], scratch: Scratch, capfd: pytest.CaptureFixture[str]
) -> None:
    check(run_block(JOBS[title], scratch, capfd))


@pytest.mark.nightly
def test_an_interrupted_encode_reports_what_is_kept_and_resumes(tmp_path: Path) -> None:
    """After Ctrl-C the chunks in its message exist, and the next run encodes only the others."""
    class_folders(tmp_path / "pets" / "train", each=600)
    command = [
        sys.executable,
        "-m",
        "featcache",
        "encode",
        "imagefolder:pets",
        "--split",
        "train",
        "--chunk-rows",
        "50",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, text=True) as begun:
        while len(list(tmp_path.glob("cache/images/*/*/done/*"))) < 3:
            assert begun.poll() is None
            time.sleep(0.02)
        begun.send_signal(signal.SIGINT)
        said = begun.communicate()[1]
    assert begun.returncode == 130
    kept = 50 * len(list(tmp_path.glob("cache/images/*/*/done/*")))
    assert f"{kept:,} of 1,200 rows" in said
    again = subprocess.run([*command, "--json"], capture_output=True, check=True, cwd=tmp_path, env=environment)
    assert json.loads(again.stdout)[0]["encoded_rows"] == 1200 - kept
