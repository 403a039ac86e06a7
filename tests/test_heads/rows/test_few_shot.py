"""Few-shot samples: seeds, nesting, classes with too few rows, and a store that heads fit from."""

from typing import Any

import numpy as np
import pytest

import heads
from featcache.errors import HeadError
from heads import LinearDiscriminant, Ridge
from heads.rows.few_shot import draw_shots, few_shot


def test_draws_k_of_every_class_without_replacement() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 500)
    rows = draw_shots(labels, 16, seed=1)
    assert len(set(rows.tolist())) == 7 * 16
    assert labels[rows].tolist() == np.repeat(np.arange(7), 16).tolist()
    assert rows.dtype == np.int64


def test_seeds_are_fixed_different_and_nested() -> None:
    labels = np.arange(400) % 4
    one = draw_shots(labels, 4, seed=0)
    np.testing.assert_array_equal(one, draw_shots(labels, 4, seed=0))
    assert len(set(one.tolist()) & set(draw_shots(labels, 4, seed=1).tolist())) < 8
    assert set(one.tolist()) < set(draw_shots(labels, 8, seed=0).tolist())
    # A value fixed by numpy's promise for PCG64: a change of it changes every published number.
    assert draw_shots(np.arange(20) % 2, 3, seed=7).tolist() == [16, 0, 14, 19, 1, 17]
    other = np.where(labels == 3, 9, labels)  # another class list leaves the other classes' rows as they are
    np.testing.assert_array_equal(draw_shots(other, 4, allow_fewer=True)[:12], one[:12])


def test_every_row_is_drawn_equally_often() -> None:
    hits = np.zeros(20)
    for seed in range(500):
        hits[draw_shots(np.repeat([0, 1], 10), 3, seed=seed)] += 1
    assert hits.sum() == 3000
    assert abs(hits - 150).max() < 5 * np.sqrt(500 * 0.3 * 0.7)


def test_invalid_rows_are_never_drawn() -> None:
    labels = np.array([-1, 0, 1, -1, 0, 1, -1])
    assert sorted(draw_shots(labels, 2)) == [1, 2, 4, 5]


def test_too_few_rows_name_classes() -> None:
    labels = np.array([0, 0, 0, 1, 3, 3])
    with pytest.raises(
        HeadError, match=r"3 of 4 classes have fewer than 3 rows \(class 1 has 1, class 2 has 0, class 3"
    ):
        draw_shots(labels, 3)
    rows = draw_shots(labels, 3, allow_fewer=True)
    assert sorted(rows) == [0, 1, 2, 3, 4, 5]
    assert len(draw_shots(labels, 1, n_classes=9, allow_fewer=True)) == 3
    for wrong in ({"shots": 0}, {"shots": 1, "seed": -1}):
        with pytest.raises(HeadError, match="at least 1 shot"):
            draw_shots(labels, **wrong)
    with pytest.raises(HeadError, match="class indices"):
        draw_shots(np.array([0.5]), 1)


def test_multi_label_rows_are_drawn_by_the_classes_that_apply_to_them() -> None:
    targets = (np.random.default_rng(0).random((80, 4)) < [0.1, 0.3, 0.3, 0.7]).astype(np.int8)
    targets[::9] = -1
    rows = draw_shots(targets, 5, seed=1)
    wanted = set()
    for c in range(4):
        positives = np.flatnonzero(targets[:, c] == 1)
        wanted |= set(positives[np.random.default_rng([1, c]).permutation(len(positives))[:5]].tolist())
    assert rows.tolist() == sorted(wanted)
    assert ((targets[rows] == 1).sum(axis=0) >= 5).all()
    assert set(draw_shots(targets, 2, seed=1).tolist()) < set(rows.tolist())
    few = int((targets[:, 0] == 1).sum()) + 1
    with pytest.raises(HeadError, match=f"1 of 4 classes have fewer than {few} rows .class 0 has {few - 1}"):
        draw_shots(targets, few)
    assert set(np.flatnonzero(targets[:, 0] == 1)) <= set(draw_shots(targets, few, allow_fewer=True))


def test_a_sample_is_a_store(images: Any) -> None:
    store = images(n=300)
    sample = few_shot(store, 4, seed=2)
    X, y = sample.numpy()
    np.testing.assert_array_equal(X, store.X[sample.rows].astype(np.float32))
    np.testing.assert_array_equal(y, np.repeat(np.arange(5), 4))
    blocks = [(x.copy(), labels) for x, labels in sample.blocks(rows=7)]
    assert [len(labels) for _, labels in blocks] == [7, 7, 6]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in blocks]), X)
    assert (len(sample), sample.dim, sample.encoder_key) == (20, 12, "enc-1")
    assert sample.ids == [f"id-{row}" for row in sample.rows]
    np.testing.assert_array_equal(sample.gather(np.array([3, 0])), store.X[sample.rows[[3, 0]]])
    head, arrays = LinearDiscriminant().fit(sample), LinearDiscriminant().fit(X, y, classnames=store.classnames)
    np.testing.assert_allclose(head.coef_, arrays.coef_, rtol=1e-9)
    (entry,) = head.provenance_["fitted_on"]
    assert (entry["name"], entry["split"], entry["sample"]) == ("animals", "train", {"shots": 4, "seed": 2})


def test_a_sample_with_fewer_rows_than_asked_for_says_so(images: Any) -> None:
    store = images(n=30)
    counts = np.bincount(store.y, minlength=5)
    shots = int(counts.min()) + 1
    with pytest.raises(HeadError, match="allow_fewer"):
        few_shot(store, shots)
    sample = few_shot(store, shots, seed=1, allow_fewer=True)
    assert len(sample) == np.minimum(counts, shots).sum()
    assert sample.sample == {"shots": shots, "seed": 1, "rows": len(sample)}


def test_a_head_of_a_sample_was_fitted_on_that_split(images: Any) -> None:
    store = images()
    with pytest.raises(HeadError, match="fitted on animals/train"):
        heads.choose([Ridge().fit(few_shot(store, 4))], store)


def test_a_store_without_valid_rows(images: Any) -> None:
    store = images(n=10)
    store.y = np.full(10, -1)
    with pytest.raises(HeadError, match="no valid row"):
        few_shot(store, 1, allow_fewer=True)
