"""Stores in memory: the same results as from a disk, the same checks, and results where the features lie."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featcache
from featcache.errors import HeadError, MismatchError
from heads import KNN, LinearHead, Ridge, ZeroShot, choose, evaluate, interpolate, join
from heads.evaluation.evaluate import judge
from heads.rows.in_memory import ResidentStore, resident


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("root")
    splits = {"train": "val", "test": "test"}  # the smaller ones
    stores = {name: featcache.encode("digits", split, root=root) for name, split in splits.items()}
    text = featcache.embed_text(stores["train"].classnames, ["{}"], root=root)
    return {**stores, "text": text}


def without_identity(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if ":" in key} for row in rows]


def test_results_are_those_of_the_store(digits: dict[str, Any]) -> None:
    zero_shot, ridge = ZeroShot().fit(digits["text"]), Ridge().fit(digits["train"])
    heads = [zero_shot, ridge, KNN(n_neighbors=5).fit(digits["train"]), *interpolate(zero_shot, ridge, [0.2, 0.8])]
    kept = resident(digits["test"], "cpu")
    assert kept.features.dtype == torch.float16
    assert kept.ids == digits["test"].ids
    for found, wanted in zip(
        without_identity(evaluate(heads, [kept])), without_identity(evaluate(heads, [digits["test"]])), strict=True
    ):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_resident_stores_are_checked_like_stored_ones(digits: dict[str, Any], images: Any) -> None:
    kept = resident(digits["test"], "cpu", "float32")
    with pytest.raises(MismatchError, match="encoder"):
        evaluate([Ridge().fit(images(classnames=digits["test"].classnames[:5]))], [kept])
    chosen = Ridge().fit(digits["train"], selection=digits["test"])
    with pytest.raises(HeadError, match="chosen on digits/test"):
        evaluate([chosen], [kept])
    assert Ridge().fit(kept).provenance_["fitted_on"][0]["dataset_key"] == digits["test"].dataset_key


def test_arrays_are_evaluated_without_a_store() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
    head = LinearHead(rng.normal(size=(3, 6)), np.zeros(3), ("a", "b", "c"))
    (row,) = evaluate([head], [ResidentStore(X, y, ("a", "b", "c"), name="mine")])
    assert row["mine:top1"] == pytest.approx((head.logits(X).argmax(1) == y).mean())
    table = judge([head], [ResidentStore(X, y, ("a", "b", "c"))], per_sample=True).samples["arrays"]
    assert len(table.rows) == 40


def test_arrays_of_any_layout_are_a_store() -> None:
    X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    for same in (X.astype(">f4"), X[::-1].copy()[::-1], np.repeat(X, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(ResidentStore(same, np.arange(6) % 2, ("a", "b")).features.numpy(), X)


def test_arrays_are_known_by_the_values_of_their_rows() -> None:
    rng = np.random.default_rng(1)
    X, y, names = rng.normal(size=(60, 6)), np.arange(60) % 3, ("a", "b", "c")
    train, other = (ResidentStore(X[part], y[part], names) for part in (slice(0, 30), slice(30, 60)))
    head = Ridge().fit(train)
    assert "arrays:top1" in evaluate([head], [other])[0]  # of the same default name, but not the same rows
    with pytest.raises(HeadError, match="5 of the 30 rows of arrays/all"):
        evaluate([head], [ResidentStore(X[25:55], y[25:55], names)])
    both = join([train, ResidentStore(2 * X[:30], y[:30], names, encoder_key="another model")])  # of the same images
    assert len(both) == 30
    shared = ResidentStore(X[27:].astype(np.float32), y[27:], names, name="again")
    with pytest.raises(HeadError, match="3 of the 33 rows of again/all"):
        evaluate([head], [shared])
    assert evaluate([head], [shared], seen="exclude")[0]["again:n_excluded"] == 3
    with pytest.raises(HeadError, match=r"got tuple.*heads\.ResidentStore\(X, y, classnames\)"):
        evaluate([head], [(X, y)])  # type: ignore[list-item]


def test_a_path_is_chosen_on_arrays_with_the_labels_that_heads_predict() -> None:
    rng = np.random.default_rng(2)
    y, v = np.array([7, 3, 9])[np.arange(30) % 3], np.array([9, 7, 3, 3])[np.arange(80) % 4]
    means = {7: [1, 0, 0], 3: [0, 1, 0], 9: [0, 0, 1]}
    X, V = (np.array([means[label] for label in labels]) + rng.normal(size=(len(labels), 3)) for labels in (y, v))
    path = Ridge().fit(X, y).path_heads()
    best = choose(path, (V, v), metric="top1")
    assert (best.predict(V) == v).mean() == max((head.predict(V) == v).mean() for head in path)
    assert best.provenance.chosen_on[-1]["metric"] == "top1"


def test_rows_are_gathered_and_converted_to_the_dtype_asked_for() -> None:
    X = np.arange(12.0).reshape(6, 2)
    store = ResidentStore(torch.from_numpy(X), np.zeros(6, int), ("a", "b"))
    np.testing.assert_array_equal(store.gather(np.array([5, 0])), X[[5, 0]])
    np.testing.assert_array_equal(store.numpy(np.float64)[0], X)
    assert [x.dtype for x, _ in store.blocks(4, np.float16)] == [np.float16, np.float16]


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), "expected"),
        (np.zeros(3), np.zeros(3, int), "expected"),
        (np.zeros((3, 2)), np.zeros(3), "class indices"),
        (np.zeros((3, 2)), np.array([0, -1, 1]), r"\[-1, 1\], expected \[0, 1\]"),
    ],
)
def test_rows_and_labels_that_do_not_match_are_refused(X: Any, y: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        ResidentStore(X, y, ("a", "b"))


def test_unreadable_images_are_not_loaded(digits: dict[str, Any], images: Any, tmp_path: Path) -> None:
    store = images(n=10)
    store.valid = np.arange(10) != 3
    blocks = [(store.X[store.valid].astype(np.float32), store.y[store.valid])]
    store.blocks = lambda *_, **__: iter(blocks)
    store.metadata = {"row": np.arange(10)}
    kept = resident(store, "cpu", "float32")
    assert kept.metadata["row"].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(kept.labels, store.y[store.valid])
    store.valid = np.zeros(10, bool)
    with pytest.raises(HeadError, match="no valid row"):
        resident(store, "cpu")
    with pytest.raises(HeadError, match="dtype"):
        resident(store, "cpu", "int8")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_results_on_a_gpu_are_close_to_those_of_the_store(digits: dict[str, Any], dtype: str) -> None:
    zero_shot, ridge = ZeroShot().fit(digits["text"]), Ridge().fit(digits["train"])
    heads = [zero_shot, ridge, *interpolate(zero_shot, ridge, [0.2, 0.8])]
    found = without_identity(evaluate(heads, [resident(digits["test"], "cuda", dtype)]))
    wanted = without_identity(evaluate(heads, [digits["test"]]))
    for row, reference in zip(found, wanted, strict=True):
        assert row["digits:top1"] == pytest.approx(reference["digits:top1"], abs=0.01)
        assert row["digits:nll"] == pytest.approx(reference["digits:nll"], rel=0.05 if dtype == "bfloat16" else 0.01)
