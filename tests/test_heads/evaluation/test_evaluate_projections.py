"""New classes as the largest logit of some of a head's classes: against the definition, row by row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from featcache.errors import HeadError, MismatchError
from heads import KNN, LinearHead, Projection, Ridge, ZeroShot, evaluate, interpolate, load_projection

GROUPS = ((3, 0), (1,), (4, 2))
NAMES = ("pack", "hive", "herd")


@pytest.fixture
def projection() -> Projection:
    return Projection(NAMES, GROUPS)


def merged(logits: np.ndarray) -> np.ndarray:
    """By the definition, a class and a row at a time."""
    return np.array([[max(row[i] for i in group) for group in GROUPS] for row in logits])


def own_labels(images: Any, **fields: Any) -> Any:
    """A store that is labelled with the new classes."""
    store = images(n=250, noise=0.7, seed=5, split="test", dataset_key="p", **fields)
    place = np.array([[i in group for group in GROUPS].index(True) for i in range(5)])
    store.y, store.classnames = place[store.y], NAMES
    return store


def test_metrics_are_those_of_the_merged_logits(projection: Projection, images: Any, texts: Any) -> None:
    store = own_labels(images)
    zero_shot, ridge = ZeroShot().fit(texts()), Ridge().fit(images())
    heads = [zero_shot, *interpolate(zero_shot, ridge, [0.25, 0.75]), ridge]
    rows = evaluate(heads, [store], class_subset=projection)
    for head, row in zip(heads, rows, strict=True):
        linear = head.linear()
        logits = merged(store.X.astype(np.float64) @ linear.weights.astype(np.float64).T + linear.bias)
        assert row["animals:top1"] == (logits.argmax(1) == store.y).mean()
        wanted = -log_softmax(logits, axis=1)[np.arange(250), store.y].mean()
        assert row["animals:nll"] == pytest.approx(wanted, rel=1e-5)
        assert row.get("alpha") == head.linear().alpha


def test_labels_in_the_heads_own_classes_are_looked_up(projection: Projection, images: Any) -> None:
    full = images(n=250, noise=0.7, seed=5, split="test", dataset_key="p")
    head = Ridge().fit(images())
    (row,), (wanted,) = (evaluate([head], [s], class_subset=projection) for s in (full, own_labels(images)))
    assert row == wanted


def test_a_head_over_the_new_classes_passes_through(projection: Projection, images: Any) -> None:
    store = own_labels(images)
    own = Ridge().fit(store)
    (row, _), (alone,) = (
        evaluate([own, Ridge().fit(images())], [store], class_subset=projection),
        evaluate([own], [store]),
    )
    assert {k: v for k, v in row.items() if k != "head"} == {k: v for k, v in alone.items() if k != "head"}


def test_any_head_can_be_projected(projection: Projection, images: Any) -> None:
    store, head = own_labels(images), KNN(n_neighbors=9).fit(images())
    (row,) = evaluate([head], [store], class_subset={"animals": projection})
    logits = merged(head.frozen().logits(store.X))
    assert row["animals:top1"] == (logits.argmax(1) == store.y).mean()


def test_one_class_in_two_groups_and_one_to_one(images: Any) -> None:
    head = Ridge().fit(images()).linear()
    X = images(n=20).X
    shared = Projection(("a", "b"), ((0, 1), (1, 2))).of(head).logits(X)
    logits = head.logits(X)
    np.testing.assert_allclose(shared, np.stack([logits[:, :2].max(1), logits[:, 1:3].max(1)], 1), rtol=1e-6)
    renamed = Projection(("x", "y"), ((4,), (0,))).of(head)
    assert isinstance(renamed, LinearHead)  # nothing to merge: it stays linear, and fast
    assert renamed.classnames == ("x", "y")
    np.testing.assert_allclose(renamed.logits(X), logits[:, [4, 0]], rtol=1e-6)
    assert Projection(("m", "n", "o"), ((0, 1), (2,), (3,))).of(head).restrict([2, 0]).logits(X) == pytest.approx(
        np.stack([logits[:, 3], logits[:, :2].max(1)], 1)
    )


def test_label_sets_that_differ_are_refused_by_name(projection: Projection, images: Any) -> None:
    head, store = Ridge().fit(images()), own_labels(images)
    store.classnames = ("pack", "hive", "flock")
    with pytest.raises(MismatchError, match=r"only ridge over class_subset has 'herd'; only 'animals' has 'flock'"):
        evaluate([head], [store], class_subset=projection)
    some = Projection(("pack", "hive"), ((3, 0), (1,)))
    with pytest.raises(MismatchError, match=r"rows of classes outside class_subset \(cow, elk\)"):
        evaluate([head], [images(split="test", dataset_key="p")], class_subset=some)
    twice = Projection(("a", "b"), ((0, 1), (1, 2, 3, 4)))
    with pytest.raises(MismatchError, match="'bee' belongs to 'a' and 'b'"):
        evaluate([head], [images(split="test", dataset_key="p")], class_subset=twice)
    with pytest.raises(MismatchError, match=r"1 classes \(b\) map to indices outside the head's 0 to 4"):
        Projection(("a", "b"), ((0,), (5,))).of(head.linear())


@pytest.mark.parametrize(
    ("names", "groups", "message"),
    [
        (("a",), ((0,),), "at least two"),
        (("a", "b"), ((0,),), "2 class names and 1 groups"),
        (("a", "b"), ((0,), (1, 1)), r"'b' maps to \[1, 1\]"),
        (("a", "b"), ((0,), (-1,)), "count from 0"),
        (("a", "b"), ((0,), (1, "x")), "class indices, or names"),
    ],
)
def test_invalid_projections(names: Any, groups: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        Projection(names, groups)


def test_every_class_on_one_column_is_refused(images: Any) -> None:
    with pytest.raises(HeadError, match="every class maps to 'bee'"):
        Projection(("a", "b"), ((1,), (1,))).of(Ridge().fit(images()).linear())

    with pytest.raises(HeadError, match="every class maps to nothing"):
        Projection(("a", "b"), ((), ())).of(Ridge().fit(images()).linear())


def test_a_class_that_covers_none_is_never_predicted(images: Any) -> None:
    head = Ridge().fit(images()).linear()
    projected = Projection(("none", "pair", "one"), ((), (0, 2), (1,))).of(head)
    X = np.random.default_rng(0).normal(size=(50, head.dim))
    full = X @ head.weights.T + head.bias
    wanted = np.stack([np.full(50, -1e4), full[:, [0, 2]].max(axis=1), full[:, 1]], axis=1)
    np.testing.assert_allclose(projected.logits(X), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(projected.restrict([2, 0]).logits(X), wanted[:, [2, 0]], rtol=1e-4, atol=1e-4)


def test_mapping_files(tmp_path: Path, images: Any) -> None:
    head, file = Ridge().fit(images()).linear(), tmp_path / "mapping.json"
    file.write_text(json.dumps({"pack": ["dog", "ant"], "hive": 1, "herd": ["elk", "cow"]}))
    found = load_projection(file)
    assert found.classnames == NAMES
    assert found.indices(head.classnames) == [[3, 0], [1], [4, 2]]
    with pytest.raises(MismatchError, match="missing"):
        found.indices(("dog", "ant", "fox", "elk", "bee"))
    for text, message in (("[1]", "not a mapping"), ("{", "cannot be read"), ('{"a": 1, "a": 2}', "occur twice")):
        file.write_text(text)
        with pytest.raises(HeadError, match=message):
            load_projection(file)
    with pytest.raises(HeadError, match="cannot be read"):
        load_projection(tmp_path / "none.json")
