"""Fits from large stores go through the moments beside them: equal to 1e-12, and the second one reads fewer rows."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache.encoding.images import EncodeOptions, encode_dataset
from featcache.progress import Silent
from featcache.store import ImageStore, list_stores
from featcache.store.upkeep.deletion import delete, find_garbage
from heads import HEADS, Ridge, few_shot, resident
from heads.estimators.base import LinearClassifier
from heads.estimators.kept_moments import moments_path, worth_keeping

DAY = 86_400.0
FITS: dict[str, Callable[[], Any]] = {
    "ridge": Ridge,
    "ridge without intercept": lambda: Ridge(fit_intercept=False),
    "ridge by folds": lambda: Ridge(cv=3),
    "discriminant": HEADS["discriminant"],
    "nearest mean": HEADS["nearest_mean"],
}


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """900 rows of 16 features, two of them unreadable."""
    labels = np.random.default_rng(0).integers(0, 3, 900).tolist()
    dataset = NumpyDataset(900, broken=(3, 77), labels=labels)
    options = EncodeOptions(max_bad=2, chunk_rows=128)
    return encode_dataset(dataset, NumpyEncoder(), root=tmp_path, options=options, progress=Silent()).store


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts passes over a store's features."""
    passes: list[int] = []
    blocks = ImageStore.blocks

    def counted(self: ImageStore, *args: Any, **options: Any) -> Iterator[Any]:
        passes.append(1)
        return blocks(self, *args, **options)

    monkeypatch.setattr(ImageStore, "blocks", counted)
    return passes


@pytest.mark.parametrize("name", FITS)
def test_fits_equal_those_of_the_arrays(store: ImageStore, name: str) -> None:
    X, y = store.numpy(np.float64)
    plain = FITS[name]().fit(X, y, classnames=store.classnames)
    for _ in range(2):  # without a file, and from it
        head: LinearClassifier = FITS[name]().fit(store)
        scale = np.abs(plain.coef_).max()
        np.testing.assert_allclose(head.coef_, plain.coef_, rtol=0, atol=1e-12 * max(scale, 1.0))
        np.testing.assert_allclose(head.intercept_, plain.intercept_, rtol=0, atol=1e-12 * max(scale, 1.0))
        assert head.temperature_ == pytest.approx(plain.temperature_, rel=1e-6)


@pytest.mark.parametrize(("name", "saved"), [("ridge", 1), ("ridge by folds", 1), ("discriminant", 1)])
def test_the_second_fit_makes_one_pass_less(
    store: ImageStore, name: str, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = reads(monkeypatch)
    FITS[name]().fit(store)
    first = len(passes)
    FITS[name]().fit(store)
    assert len(passes) - first == first - saved


def test_one_file_serves_ridge_and_discriminants(store: ImageStore) -> None:
    Ridge().fit(store)
    path = moments_path(store)
    assert path is not None
    assert path.exists()
    written = path.stat().st_mtime_ns
    HEADS["discriminant"]().fit(store)
    assert [file.stat().st_mtime_ns for file in path.parent.iterdir()] == [written]


def test_other_rows_weights_and_groups_do_not_use_kept_moments(store: ImageStore) -> None:
    Ridge().fit(store)
    X, y = store.numpy(np.float64)
    few = few_shot(store, 20, seed=0)
    assert not worth_keeping(few)
    assert not worth_keeping(resident(store, "cpu"))
    X_few, y_few = store.gather(few.rows).astype(np.float64), store.labels[few.rows]
    plain = Ridge().fit(X_few, y_few, classnames=store.classnames)
    np.testing.assert_allclose(Ridge().fit(few).coef_, plain.coef_, atol=1e-10)
    weights = np.random.default_rng(1).uniform(0.5, 2, len(y))
    weighted = Ridge().fit(X, y, sample_weight=weights, classnames=store.classnames)
    np.testing.assert_allclose(Ridge().fit(store, sample_weight=weights).coef_, weighted.coef_, atol=1e-10)
    groups = np.arange(len(y)) // 3
    grouped = Ridge(cv=4).fit(X, y, groups=groups, classnames=store.classnames)
    np.testing.assert_allclose(Ridge(cv=4).fit(store, groups=groups).cv_errors_, grouped.cv_errors_, rtol=1e-10)
    own = np.arange(len(y)) % 7
    by_row = Ridge(cv=own).fit(X, y, classnames=store.classnames)
    np.testing.assert_allclose(Ridge(cv=own).fit(store).cv_errors_, by_row.cv_errors_, rtol=1e-10)


def test_moments_of_small_stores_are_not_kept(tmp_path: Path) -> None:
    small = encode_dataset(NumpyDataset(60), NumpyEncoder(), root=tmp_path, progress=Silent()).store
    Ridge().fit(small)
    assert not (tmp_path / "moments").exists()


def test_list_and_gc_include_moments(store: ImageStore, tmp_path: Path) -> None:
    Ridge().fit(store)
    path = moments_path(store)
    assert path is not None
    assert [entry.finished for entry in list_stores(tmp_path)] == [True]
    for file in tmp_path.rglob("*"):
        os.utime(file, (time.time() - 8 * DAY,) * 2)
    assert find_garbage(tmp_path, 7 * DAY) == []
    [named] = find_garbage(tmp_path, 7 * DAY, [store.path])
    delete(named)
    assert path.exists()
    assert find_garbage(tmp_path, 9 * DAY) == []
    [orphan] = find_garbage(tmp_path, 7 * DAY)
    assert orphan.why == "moments of a store that is gone"
    delete(orphan)
    assert not path.parent.exists()
