"""Classes that a head never saw: the heads that it is combined with speak for it, nothing is left of its -10,000."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import nnls
from scipy.special import log_softmax

import heads
from heads import LinearDiscriminant, LinearHead, Logistic, NearestMean, Ridge, ZeroShot, interpolate
from heads.evaluation.passes import Job, all_logits
from heads.fitted.missing_classes import ABSENT

ALPHAS = [0.0, 0.25, 0.5, 1.0, 1.5]


def without(store: Any, *classes: int) -> Any:
    keep = ~np.isin(store.y, classes)
    store.X, store.y = store.X[keep], store.y[keep]
    return store


def centred(logits: Any, classes: Any) -> Any:
    wide = np.asarray(logits, np.float64)
    return wide - wide[:, classes].mean(axis=1, keepdims=True)


@pytest.fixture(params=[LinearDiscriminant, NearestMean, lambda: Logistic([1.0])], ids=["lda", "mean", "logistic"])
def lacking(request: pytest.FixtureRequest, images: Any) -> LinearHead:
    """A head that never saw class 2."""
    head: LinearHead = request.param().fit(without(images(), 2)).linear()
    return head


def test_a_head_records_missing_classes(lacking: LinearHead, images: Any, tmp_path: Path) -> None:
    test = images(seed=3)
    assert lacking.absent == (2,)
    assert (lacking.logits(test.X)[:, 2] == ABSENT).all()
    assert lacking.restrict([4, 2, 0]).absent == (1,)
    assert lacking.restrict([4, 0]).absent == ()
    assert heads.load(heads.save(lacking, tmp_path / "head.safetensors")).absent == (2,)
    assert (lacking.with_temperature(50.0).logits(test.X)[:, 2] == ABSENT).all()
    assert LinearDiscriminant().fit(images()).linear().absent == ()
    assert Logistic([1.0], fit_intercept=False).fit(without(images(), 2)).linear().absent == ()


def test_all_heads_of_a_path_record_missing_classes(images: Any) -> None:
    assert {head.absent for head in Logistic([0.1, 1.0]).fit(without(images(), 2)).path_heads()} == {(2,)}


@pytest.mark.parametrize("swapped", [False, True])
def test_an_interpolation_fills_in_missing_classes_from_the_other_head(
    lacking: LinearHead, images: Any, texts: Any, swapped: bool
) -> None:
    zero, test = ZeroShot().fit(texts()).linear(), images(seed=3, n=400)
    ends = (zero, lacking) if swapped else (lacking, zero)
    rest, theirs = [0, 1, 3, 4], zero.logits(test.X)
    plain = [head.logits(test.X).astype(np.float64) for head in ends]
    for alpha, head in zip(ALPHAS, interpolate(*ends, ALPHAS), strict=True):
        found = head.logits(test.X)
        expected = (1 - alpha) * plain[0] + alpha * plain[1]
        np.testing.assert_allclose(found[:, rest], expected[:, rest], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(centred(found, rest)[:, 2], centred(theirs, rest)[:, 2], rtol=1e-3, atol=2e-3)
        assert head.absent == ()
    (middle,) = interpolate(*ends, [0.5])
    of_two = test.y == 2
    assert (middle.predict(test.X)[of_two] == 2).mean() > 0.9
    assert (lacking.predict(test.X)[of_two] != 2).all()


def test_the_fast_path_of_an_interpolation_is_its_general_one(lacking: LinearHead, images: Any, texts: Any) -> None:
    test = images(seed=3, n=300, split="test", dataset_key="data-9")
    path = interpolate(lacking, ZeroShot().fit(texts()), ALPHAS)
    jobs = [Job(head, head.sharing, None) for head in path]
    for head, found in zip(path, all_logits(jobs, test.X), strict=True):
        np.testing.assert_allclose(found, head.logits(test.X), atol=1e-3)
    for head, row in zip(path, heads.evaluate(path, [test]), strict=True):
        logits = head.logits(test.X).astype(np.float64)
        nll = -log_softmax(logits, axis=1)[np.arange(300), test.y].mean()
        assert row["animals:nll"] == pytest.approx(nll, rel=1e-4)
        assert row["animals:top1"] == (logits.argmax(axis=1) == test.y).mean()


def test_classes_missing_in_both_ends_are_never_predicted(images: Any) -> None:
    one = LinearDiscriminant().fit(without(images(), 1, 2)).linear()
    two = LinearDiscriminant().fit(without(images(seed=1), 2, 3)).linear()
    test = images(seed=3)
    for head in (*interpolate(one, two, [0.3]), heads.blend([one, two], [0.1, 0.2]), heads.blend([one, one])):
        logits = head.logits(test.X)
        np.testing.assert_allclose(logits[:, 2], ABSENT, rtol=1e-5)
        assert 2 in head.absent
        assert (head.predict(test.X) != 2).all()
    both = interpolate(one, two, [0.3])[0].logits(test.X)
    assert both[:, [0, 1, 3, 4]].min() > -1000


def test_a_blend_averages_the_heads_that_know_a_class(images: Any, texts: Any) -> None:
    lacking = LinearDiscriminant().fit(without(images(), 2)).linear()
    zero, ridge, test = ZeroShot().fit(texts()).linear(), Ridge(alphas=[1.0]).fit(images()).linear(), images(seed=3)
    rest, shares = [0, 1, 3, 4], [0.5, 0.2, 0.3]
    found = heads.blend([lacking, zero, ridge], shares).logits(test.X)
    plain = [centred(head.logits(test.X), rest) for head in (lacking, zero, ridge)]
    plain[0][:, 2] = (0.2 * plain[1][:, 2] + 0.3 * plain[2][:, 2]) / 0.5
    expected = sum(w * one for w, one in zip(shares, plain, strict=True))
    np.testing.assert_allclose(centred(found, rest), expected, rtol=1e-3, atol=2e-3)
    alone = heads.blend([lacking, zero, ridge], [1.0, 0.0, 0.0]).logits(test.X)
    assert (np.abs(alone) < 1000).all()


def test_an_ensemble_of_models_averages_the_heads_that_know_a_class(images: Any) -> None:
    first, second = images(), images(encoder_key="enc-2", encoder_name="other", seed=0)
    second.X = second.X[:, ::-1]
    lacking = LinearDiscriminant().fit(without(images(), 2)).linear()
    whole = LinearDiscriminant().fit(second).linear()
    joint = heads.join([first, second])
    found = heads.ensemble([lacking, whole], [0.4, 0.6]).logits(joint.numpy()[0])
    rest = [0, 1, 3, 4]
    one, two = centred(lacking.logits(first.X), rest), centred(whole.logits(second.X), rest)
    one[:, 2] = two[:, 2]
    np.testing.assert_allclose(centred(found, rest), 0.4 * one + 0.6 * two, rtol=1e-3, atol=2e-3)


def test_a_stack_weighs_a_head_by_the_classes_that_it_knows(images: Any, texts: Any) -> None:
    """Least squares on the logits with class 2 filled in; before, -10,000 there left the head a weight near zero."""
    lacking, zero = LinearDiscriminant().fit(without(images(), 2)).linear(), ZeroShot().fit(texts()).linear()
    val = images(n=300, seed=6, split="val", dataset_key="data-3")
    stacked = heads.stack([lacking, zero], val)
    rest = [0, 1, 3, 4]
    plain = [centred(head.logits(val.X), rest) for head in (lacking, zero)]
    plain[0][:, 2] = plain[1][:, 2]
    plain = [one - one.mean(axis=1, keepdims=True) for one in plain]
    truth = np.eye(5)[val.y] - 0.2
    weights = nnls(np.stack([one.ravel() for one in plain], axis=1), truth.ravel())[0]
    np.testing.assert_allclose(stacked.provenance["params"]["weights"], weights, rtol=1e-4, atol=1e-7)
    assert stacked.score(val) >= max(lacking.score(val), zero.score(val)) - 0.01
    ratio = centred(stacked.logits(val.X), range(5)) / sum(w * one for w, one in zip(weights, plain, strict=True))
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-2)


def test_a_stack_leaves_out_classes_missing_in_every_head(images: Any) -> None:
    val = images(n=300, seed=6, split="val", dataset_key="data-3")
    members = [LinearDiscriminant(shrinkage=s).fit(without(images(), 2)).linear() for s in (0.1, 0.9)]
    known = without(images(n=300, seed=6, split="val", dataset_key="data-3"), 2)
    stacked, fewer = heads.stack(members, val), heads.stack(members, known)
    assert stacked.absent == (2,)
    np.testing.assert_allclose(
        stacked.provenance["params"]["weights"], fewer.provenance["params"]["weights"], rtol=1e-6
    )
    np.testing.assert_allclose(stacked.logits(val.X), fewer.logits(val.X), rtol=1e-5, atol=1e-5)
    assert (stacked.logits(val.X)[:, 2] == ABSENT).all()


def test_a_prior_is_neutral_on_missing_classes(images: Any) -> None:
    train, test = images(n=400), images(seed=3, n=400)
    prior = LinearDiscriminant().fit(without(images(), 2)).linear()
    for head in (Logistic(1.0, prior=prior), Ridge(prior=prior)):
        fitted = head.fit(train)
        assert fitted.linear().absent == ()
        assert (fitted.predict(test)[test.y == 2] == 2).mean() > 0.9
        assert np.abs(fitted.intercept_).max() < 100
