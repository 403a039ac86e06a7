"""The table of poolings runs, and its pictures are what it says they are."""

import json
from pathlib import Path

import numpy as np

from benchmarks import table_pooling


def test_the_class_is_the_colour_of_the_marked_square() -> None:
    images, labels = table_pooling.pictures("marked", 20, 0)
    for image, label in zip(images, labels.tolist(), strict=True):
        white = np.argwhere((image == 255).all(axis=2))
        assert len(white) == 16
        assert (image[tuple(white[0] - 1)] == table_pooling.COLOURS[label]).all()
    assert (table_pooling.pictures("marked", 20, 1)[1] != labels).any()


def test_a_tiny_table_of_poolings_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert table_pooling.main(["--rows", "30", "--epochs", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["tap"]) for row in rows] == [
        (task, tap) for task in table_pooling.TASKS for tap in table_pooling.LAYERS
    ]
    assert all(0 <= row[how] <= 100 for row in rows for how in (*table_pooling.POOLS, "attentive"))
