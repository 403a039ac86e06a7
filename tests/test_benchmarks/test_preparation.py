"""Photographs of a folder are prepared once each, and two models judge their features."""

import json
from pathlib import Path

import pytest

from benchmarks.bench_preparation import main, photographs


def test_the_images_of_a_folder_are_compared_without_copies(tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    (tmp_path / "images" / "below").mkdir(parents=True)
    for name, content in zip(("a.jpg", "below/b.JPG", "c.jpeg"), [*photographs(2), photographs(1)[0]], strict=True):
        (tmp_path / "images" / name).write_bytes(content)
    assert main(["--tiny", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["sizes"]["images"] == 2
    (model,) = (key.removeprefix("smallest cosine, ") for key in record if key.startswith("smallest cosine, "))
    assert 0.9 < record[f"smallest cosine, {model}"] <= record[f"median cosine, {model}"] < 1.0 + 1e-12
    assert record[f"equal zero-shot classes, {model}"] in (0.0, 0.5, 1.0)


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no JPEG file"):
        main(["--tiny", "--images", str(tmp_path)])
