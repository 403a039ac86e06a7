"""Labels that are no class indices: a saved head gives those that its estimator gave."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import heads
from featcache.errors import HeadError
from heads import KNN, LinearDiscriminant, Logistic, NearestMean, Ridge, TipAdapter
from heads.kernels.dispatch import linear_nll

KINDS = {
    "ridge": Ridge,
    "logistic": lambda: Logistic([1.0]),
    "nearest_mean": NearestMean,
    "discriminant": LinearDiscriminant,
    "knn": lambda: KNN([1, 5]),
}
VALUES = {
    "numbers": np.array([1, 3, 4, 7, -2]),
    "names": np.array(["wasp", "ant", "bee", "cow", "dog"]),
    "floats": np.array([0.0, 2.0, 4.0, 5.0, 9.0]),
    "objects": np.array(["wasp", "ant", "bee", "cow", "dog"], dtype=object),
}


@pytest.mark.parametrize("values", sorted(VALUES))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_loaded_head_predicts_the_estimators_labels(images: Any, tmp_path: Path, kind: str, values: str) -> None:
    X, index = images().numpy()
    y, test = VALUES[values][index], images(seed=3)
    fitted = KINDS[kind]().fit(X, y)
    expected, truth = fitted.predict(test.X), VALUES[values][test.y]
    assert set(expected) <= set(VALUES[values].tolist())
    loaded = heads.load(fitted.save(tmp_path / "head.safetensors"))
    for head in (fitted.frozen(), loaded):
        found = head.predict(test.X)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
        assert head.score(test.X, truth) == fitted.score(test.X, truth) > 0.8
    np.testing.assert_array_equal(loaded.predict_index(test.X), loaded.logits(test.X).argmax(axis=1))


@pytest.mark.parametrize("kind", ["gda", "tip_adapter", "tip_adapter_f", "clap", "taskres", "prolip", "lp_plus_plus"])
def test_labels_may_be_the_class_names_of_the_texts(images: Any, texts: Any, tmp_path: Path, kind: str) -> None:
    X, index = images().numpy()
    names, test = np.array(texts().classnames), images(seed=3)
    by_index, by_name = (heads.HEADS[kind]().fit(X, y, texts=texts()) for y in (index, names[index]))
    np.testing.assert_array_equal(by_name.predict_proba(test.X), by_index.predict_proba(test.X))
    loaded = heads.load(by_name.save(tmp_path / "head.safetensors"))
    for head in (by_name, loaded):
        np.testing.assert_array_equal(head.predict(test.X), names[by_index.predict(test.X)])
    assert by_index.predict(test.X).dtype.kind == "i"
    with pytest.raises(HeadError, match="wolf"):
        heads.HEADS[kind]().fit(X, np.where(index == 2, "wolf", names[index]), texts=texts())


@pytest.mark.parametrize("kind", ["knn", "adamw", "sgd", "cosine", "logistic", "ridge"])
def test_arrays_with_negative_strides_are_accepted(images: Any, kind: str) -> None:
    X, y = images().numpy()
    one, two = (heads.HEADS[kind]().fit(*pair) for pair in ((X, y), (X[::-1].copy()[::-1], y[::-1].copy()[::-1])))
    np.testing.assert_array_equal(two.predict_proba(X[::-1])[::-1], one.predict_proba(X[::-1].copy())[::-1])


def test_labels_follow_restriction_interpolation_and_sums(images: Any) -> None:
    X, index = images().numpy()
    y, test = np.array([1, 3, 4, 7, 9])[index], images(seed=3)
    one, two = Ridge().fit(X, y).linear(), NearestMean().fit(X, y).linear()
    keep = np.isin(test.y, [0, 4])
    two_classes = one.restrict([4, 0])
    assert set(two_classes.predict(test.X).tolist()) == {9, 1}
    assert two_classes.score(test.X[keep], np.where(test.y[keep] == 4, 9, 1)) > 0.9
    for head in (*heads.interpolate(one, two, [0.5]), heads.blend([one, two]), one.with_temperature(2.0)):
        assert head.score(test.X, np.array([1, 3, 4, 7, 9])[test.y]) > 0.9
    few = KNN(3).fit(X, y).frozen().restrict([3, 1])
    assert set(few.predict(test.X).tolist()) == {7, 3}


def test_classes_without_a_row_keep_their_place(images: Any) -> None:
    X, index = images().numpy()
    y = np.array([1, 3, 4, 7, 9])[index]
    restricted = Ridge().fit(X, y).restrict([3, 0])
    np.testing.assert_array_equal(restricted.linear().predict(X), restricted.predict(X))


def test_a_store_has_class_indices_whatever_the_labels_were(images: Any, tmp_path: Path) -> None:
    X, index = images().numpy()
    fitted = Ridge().fit(X, np.array([10, 20, 30, 40, 50])[index])
    store = images(seed=3, classnames=("10", "20", "30", "40", "50"))
    loaded = heads.load(fitted.save(tmp_path / "head.safetensors"))
    for head in (fitted, fitted.frozen(), loaded):
        assert head.score(store) == (head.predict(store) == 10 * (store.y + 1)).mean() > 0.9
        (row,) = heads.evaluate([head], [store])
        assert row["animals:top1"] == pytest.approx(head.score(store))


@pytest.mark.parametrize("kind", [Ridge, lambda: KNN(5)])
def test_heads_of_stores_predict_indices_and_save_no_labels(images: Any, tmp_path: Path, kind: Any) -> None:
    store = images(seed=3)
    loaded = heads.load(kind().fit(images()).save(tmp_path / "head.safetensors"))
    with safe_open(str(tmp_path / "head.safetensors"), framework="np") as file:
        assert "classes" not in json.loads(file.metadata()["head"])
    assert loaded.classes is None
    assert loaded.predict(store).dtype == np.int64
    assert loaded.score(store) == (loaded.predict(store) == store.y).mean() == loaded.score(store.X, store.y) > 0.8


@pytest.mark.parametrize("kind", [Ridge, lambda: KNN(5, calibrate=False), TipAdapter])
def test_files_of_earlier_versions_mean_indices(images: Any, texts: Any, tmp_path: Path, kind: Any) -> None:
    more = {"texts": texts()} if kind is TipAdapter else {}
    path = kind().fit(images(), **more).save(tmp_path / "head.safetensors")
    with safe_open(str(path), framework="np") as file:
        metadata = file.metadata()
    record = json.loads(metadata["head"])
    metadata.pop("digest")
    for added in ("classes", "absent", "scale", "floor"):
        record.pop(added, None)
    save_file(load_file(path), tmp_path / "old.safetensors", metadata | {"head": json.dumps(record)})
    old, new, X = heads.load(tmp_path / "old.safetensors"), heads.load(path), images(seed=3).X
    np.testing.assert_array_equal(old.predict(X), new.predict(X))
    np.testing.assert_array_equal(old.logits(X), new.logits(X))
    assert old.classes is None


def test_labels_that_no_file_can_hold_are_refused(images: Any, tmp_path: Path) -> None:
    X, index = images().numpy()
    fitted = Ridge().fit(X, np.array([b"a", b"b", b"c", b"d", b"e"])[index])
    with pytest.raises(HeadError, match="fit on numbers or strings"):
        fitted.save(tmp_path / "head.safetensors")
    with pytest.raises(HeadError, match="one label per class"):
        heads.LinearHead(np.eye(3), np.zeros(3), ("a", "b", "c"), classes=np.array([1, 2]))


def test_accuracy_is_of_labels_as_predict_returns_them_or_refused(images: Any) -> None:
    X, y = images().numpy()
    fitted = Ridge().fit(X, y, classnames=("ant", "bee", "cow", "dog", "wasp"))
    for head in (fitted, fitted.frozen()):
        right = (head.predict(X) == y).mean()
        assert head.score(X, y) == right > 0.8
        with pytest.warns(UserWarning, match="column-vector"):
            assert head.score(X, y[:, None]) == right
        for wrong, message in (
            (y.astype(str), "labels such as '.' are never equal to predictions such as .; give labels as predict"),
            (y[:1], f"X has {len(y)} rows and y has 1 labels"),
            (np.r_[y, y], "must be equal"),
        ):
            with pytest.raises(HeadError, match=message):
                head.score(X, wrong)


@pytest.mark.parametrize("kind", [lambda: KNN(5), heads.AdamW, heads.Cosine])
def test_arrays_of_the_other_byte_order_are_the_same_rows(images: Any, kind: Any) -> None:
    X, y = images().numpy()
    swapped = X.astype(X.dtype.newbyteorder("S")), y.astype(y.dtype.newbyteorder("S"))
    expected = kind().fit(X, y)
    np.testing.assert_array_equal(kind().fit(*swapped).predict_proba(X), expected.predict_proba(swapped[0]))


def test_complex_labels_are_refused() -> None:
    """Cast to whole numbers they would lose their imaginary part."""
    X, W, y = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.array([0, 1, 2j])
    with pytest.raises(HeadError, match=r"labels must be real; pass y.real or y.imag$"):
        heads.Ridge().fit(X, y)
    with pytest.raises(HeadError, match=r"labels are \(3,\) torch.complex128, expected \(3,\) class indices"):
        linear_nll(X, W, y)


@pytest.mark.parametrize(
    ("first", "other", "kinds"),
    [
        ("a", 1, "int, str"),
        ("a", None, "NoneType, str"),
        ("a", np.nan, "float, str"),
        (0, None, "NoneType, int"),
        (0, np.nan, "float, int"),
    ],
)
def test_labels_without_an_order_are_refused_in_one_line(first: object, other: object, kinds: str) -> None:
    with pytest.raises(HeadError, match=rf"labels mix values that have no order \({kinds}\)"):
        Ridge().fit(np.eye(4), np.array([first, other, first, first], object))


def test_masked_entries_are_refused() -> None:
    """Their values mean nothing, and numpy hands them out as if they did."""
    X, y = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])
    holes, unlabelled = np.ma.array(X, mask=np.eye(4) > 0), np.ma.array(y, mask=y > 0)
    head = Ridge([1.0]).fit(np.ma.array(X), np.ma.array(y))  # no entry is masked
    for use in (
        lambda: Ridge().fit(holes, y),
        lambda: Ridge().fit(X, unlabelled),
        lambda: Ridge().fit(X, y, unlabelled),
        lambda: head.predict(holes),
        lambda: head.score(X, unlabelled),
        lambda: head.frozen().logits(holes),
        lambda: linear_nll(holes, X[:2], y),
        lambda: linear_nll(X, X[:2], unlabelled),
        lambda: heads.Metrics(4).update(holes, y),
        lambda: heads.bootstrap(holes),
        lambda: heads.retrieval_ranks(holes, X, y),
    ):
        with pytest.raises(HeadError, match="masked entries, expected none; drop their rows, or fill them"):
            use()


@pytest.mark.parametrize("kind", [Ridge, lambda: KNN(5), heads.AdamW])
def test_numbers_of_more_than_64_bits_are_taken_as_float64(images: Any, kind: Any) -> None:
    X, y = images(n=60).numpy()
    expected = kind().fit(X.astype(np.float64), y)
    np.testing.assert_allclose(kind().fit(X.astype(np.longdouble), y).predict_proba(X), expected.predict_proba(X))
