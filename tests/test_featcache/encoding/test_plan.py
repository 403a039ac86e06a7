"""``encode --dry-run``: the exact remaining work, and nothing written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.cli.main import main

N, D = 297, 128  # of digits/val under `tiny`


def planned(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> Any:
    before = contents(root)
    assert main(["encode", "digits", "--split", "val", "--root", str(root), "--dry-run", "--json", *words]) == 0
    assert contents(root) == before
    return json.loads(capsys.readouterr().out)[0]


def contents(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def test_rows_and_bytes_of_a_new_a_begun_and_a_finished_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "stores"
    first = planned(capsys, root)
    assert (first["rows"], first["rows_to_encode"], first["bytes_to_write"]) == (N, N, N * D * 2)
    assert first["bytes_to_read"] == int(featcache.datasets.open_dataset("digits", "val").index.sizes.sum())
    assert first["seconds"] > 0
    words = ["encode", "digits", "--split", "val", "--root", str(root), "--chunk-rows", "100", "--quiet"]
    assert main([*words, "--shard", "0/3"]) == 0
    assert "shard 0/3 is done" in capsys.readouterr().out
    begun = planned(capsys, root)
    assert begun["rows_to_encode"] == N - 100
    assert begun["store"] == first["store"]
    assert main(words) == 0
    capsys.readouterr()
    done = planned(capsys, root)
    assert (done["rows_to_encode"], done["bytes_to_read"], done["bytes_to_write"], done["seconds"]) == (0, 0, 0, 0)
    tapped = planned(capsys, root, "--tap", "pre_projection", "--views", "2")
    assert (tapped["rows_to_encode"], tapped["bytes_to_write"]) == (N, N * 2 * (128 + 2 * (D + 128)))


def test_the_printed_plan_lists_what_would_be_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "digits", "--split", "val", "--root", str(tmp_path / "stores"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "digits/val@tiny: 297 rows, 297 to encode; would read " in said
    assert not (tmp_path / "stores").exists()


def test_planning_caches_no_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, root = tmp_path / "arrays", tmp_path / "stores"
    folder.mkdir()
    np.save(folder / "train_images.npy", np.zeros((4, 8, 8, 3), np.uint8))
    np.save(folder / "train_labels.npy", np.arange(4) % 2)
    code = main(["encode", f"arrays:{folder}", "--root", str(root), "--dry-run", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert json.loads(captured.out)[0]["rows_to_encode"] == 4
    assert not root.exists()
