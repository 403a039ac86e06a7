"""`heads.calibrate`: the temperature of least NLL on a split, for every kind of head, and refusals on that split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

import heads
from featcache.errors import HeadError, MismatchError
from heads import KNN, LinearDiscriminant, Projection, Ridge, TipAdapter, ZeroShot


@pytest.fixture
def val(images: Any) -> Any:
    return images(n=400, seed=6, noise=0.5, split="val", dataset_key="data-3")


def nll(logits: Any, y: Any) -> float:
    return float(-log_softmax(np.asarray(logits, np.float64), axis=1)[np.arange(len(y)), y].mean())


def best(logits: Any, y: Any) -> float:
    """The temperature of least NLL, half a confusion with the second class counted besides, by a search."""
    wide, share = np.asarray(logits, np.float64), 0.5 / (len(y) + 0.5)

    def loss(log_t: float) -> float:
        p = -log_softmax(wide / np.exp(log_t), axis=1)
        second = np.argsort(wide, axis=1)[:, -2]
        rows = np.arange(len(y))
        return float(((1 - share) * p[rows, y] + share * p[rows, second]).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10}).x))


@pytest.fixture(params=["zero_shot", "ridge", "discriminant", "knn", "tip_adapter", "interpolation"])
def head(request: pytest.FixtureRequest, images: Any, texts: Any) -> Any:
    train, zero = images(), ZeroShot().fit(texts())
    made = {
        "zero_shot": lambda: zero,
        "ridge": lambda: Ridge().fit(train),
        "discriminant": lambda: LinearDiscriminant().fit(train),
        "knn": lambda: KNN(20).fit(train),
        "tip_adapter": lambda: TipAdapter([2.0], [5.0]).fit(train, texts=texts()),
        "interpolation": lambda: heads.interpolate(zero, Ridge().fit(train), [0.4])[0],
    }
    return made[request.param]()


def test_logits_are_divided_by_the_best_temperature(head: Any, images: Any, val: Any, tmp_path: Path) -> None:
    plain = head.frozen() if hasattr(head, "frozen") else head
    found, test = heads.calibrate(head, val), images(seed=3)
    temperature = found.provenance["params"]["temperature_after"]
    assert temperature == pytest.approx(best(plain.logits(val.X), val.y), rel=1e-4)
    np.testing.assert_allclose(found.logits(test.X), plain.logits(test.X) / temperature, rtol=1e-4, atol=1e-5)
    assert nll(found.logits(val.X), val.y) <= nll(plain.logits(val.X), val.y) + 1e-3
    assert type(found) is type(plain)
    loaded = heads.load(found.save(tmp_path / "head.safetensors"))
    np.testing.assert_array_equal(loaded.logits(test.X), found.logits(test.X))
    fewer = plain.restrict([3, 0]).logits(test.X) / temperature
    np.testing.assert_allclose(found.restrict([3, 0]).logits(test.X), fewer, rtol=1e-4, atol=1e-5)
    kept, other = heads.evaluate([found, plain], [images(seed=3, split="test", dataset_key="data-4")])
    assert kept["animals:top1"] == other["animals:top1"]
    assert kept["animals:nll"] == pytest.approx(nll(found.logits(test.X), test.y), rel=1e-4)


def test_the_split_is_recorded_and_not_reported(head: Any, val: Any) -> None:
    found = heads.calibrate(head, val)
    entry = found.provenance["chosen_on"][-1]
    assert (entry["split"], entry["metric"], entry["fitted"]) == ("val", "nll", "temperature")
    with pytest.raises(HeadError, match="was chosen on animals/val"):
        heads.evaluate([found], [val])


def test_arrays_have_the_labels_that_the_head_predicts(images: Any, val: Any) -> None:
    X, index = images().numpy()
    values = np.array([1, 3, 4, 7, 9])
    fitted = Ridge().fit(X, values[index]).linear()
    found = heads.calibrate(fitted, (val.X, values[val.y]))
    assert found.provenance["params"]["temperature_after"] == pytest.approx(best(fitted.logits(val.X), val.y), rel=1e-4)
    assert found.provenance["chosen_on"] == []
    turned, keep = fitted.restrict([4, 1]), np.isin(val.y, [4, 1])  # labels that are not ascending
    few = heads.calibrate(turned, (val.X[keep], values[val.y[keep]]))
    expected = best(turned.logits(val.X[keep]), (val.y[keep] == 1).astype(int))
    assert few.provenance["params"]["temperature_after"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(HeadError, match="not among the 5 classes"):
        heads.calibrate(fitted, (val.X, val.y))


def test_calibrating_twice_changes_nothing(images: Any, val: Any) -> None:
    once = heads.calibrate(Ridge().fit(images()), val)
    twice = heads.calibrate(once, val)
    after = [head.provenance["params"]["temperature_after"] for head in (once, twice)]
    assert after[1] == pytest.approx(after[0], rel=1e-4)


def test_classes_that_the_head_never_saw_do_not_count(images: Any, val: Any) -> None:
    train = images()
    keep = train.y != 2
    head = LinearDiscriminant().fit(train.X[keep], train.y[keep], classnames=train.classnames).linear()
    rest, rows = [0, 1, 3, 4], val.y != 2
    found = heads.calibrate(head, (val.X, val.y))
    labels = np.searchsorted(rest, val.y[rows])
    expected = best(head.logits(val.X[rows])[:, rest], labels)
    assert found.provenance["params"]["temperature_after"] == pytest.approx(expected, rel=1e-4)
    assert (found.logits(val.X)[:, 2] == -1e4).all()
    with pytest.raises(HeadError, match="no row of a class that it knows"):
        heads.calibrate(head, (val.X[~rows], val.y[~rows]))


def test_a_projection_is_cooled_like_its_base(images: Any, val: Any, texts: Any) -> None:
    base = ZeroShot().fit(texts()).linear()
    mapping = Projection(("insect", "mammal"), ((0, 1), (2, 3, 4)))
    found = mapping.of(base)
    np.testing.assert_allclose(found.with_temperature(4.0).logits(val.X), found.logits(val.X) / 4.0, rtol=1e-5)


def test_mismatched_heads_and_stores_are_refused(images: Any, val: Any) -> None:
    train = images()
    head = Ridge().fit(train)
    with pytest.raises(HeadError, match="was fitted on animals/train"):
        heads.calibrate(head, train)
    with pytest.raises(MismatchError, match="was fitted on features of encoder"):
        heads.calibrate(head, images(encoder_key="enc-2", split="val", dataset_key="data-3"))
    with pytest.raises(HeadError, match="is not a classifier"):
        heads.calibrate(heads.RidgeRegression().fit(train, train.y.astype(float)), val)
    dirty = val.X.copy()
    dirty[[3, 8], 1] = np.nan
    with pytest.raises(HeadError, match="3, 8"):
        heads.calibrate(head, (dirty, val.y))
