"""The agreement check runs, and fails where ridge is wrong."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import check_ridge
from heads import Ridge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chance = np.random.default_rng(0)
    for name in check_ridge.DATA:
        labels = np.arange(60) % 4
        features = chance.standard_normal((60, 12)) + 2 * np.eye(12)[labels]
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        np.savez(tmp_path / f"{name}.npz", train_features=features.astype(np.float16), train_labels=labels)
    return tmp_path


def test_ridge_agrees_with_scikit_learn(folder: Path) -> None:
    assert check_ridge.main([str(folder), "--out", str(folder / "record.json")]) == 0
    assert (folder / "record.json").exists()


def test_a_wrong_ridge_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Ridge.path
    monkeypatch.setattr(Ridge, "path", lambda self: (path(self)[0] * 1.001, path(self)[1]))
    assert check_ridge.main([str(folder)]) == 1
