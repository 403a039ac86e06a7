"""What chooses ridge's alpha, its temperature and the weight of a prior, beside refits and scipy's minimiser."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn import linear_model

import heads
from featcache.errors import HeadError
from heads import LinearHead, Ridge, ZeroShot
from heads.solvers.ridge.held_out import one_out
from heads.solvers.temperature import fit_mixture, fit_temperature

ALPHAS = np.logspace(-3, 3, 7)


def nll(logits: Any, y: Any) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(y)), y].mean())


@pytest.mark.parametrize("metric", ["nll", "top1", "squared_error"])
def test_every_metric_on_a_selection_split_and_in_folds(images: Any, metric: str) -> None:
    train, val = images(n=60, noise=0.6), images(n=300, seed=9, noise=0.6, split="val", dataset_key="data-9")
    (X, y), (X_val, y_val) = train.numpy(np.float64), val.numpy(np.float64)
    folds = np.arange(60) % 3

    def best(scores_of: Any, labels: Any) -> float:
        values = []
        for alpha in ALPHAS:
            scores = scores_of(lambda keep, a=alpha: linear_model.Ridge(a).fit(X[keep], np.eye(5)[y][keep]))
            likelihood = nll(scores / fit_temperature(scores, labels), labels)
            error = ((scores - np.eye(5)[labels]) ** 2).mean()
            hits = (scores.argmax(axis=1) == labels).mean()
            values.append({"nll": likelihood, "top1": (-hits, likelihood), "squared_error": error}[metric])
        return float(ALPHAS[min(range(len(ALPHAS)), key=values.__getitem__)])

    def by_folds(fit: Any) -> Any:
        scores = np.empty((60, 5))
        for k in range(3):
            scores[folds == k] = fit(folds != k).predict(X[folds == k])
        return scores

    chosen = Ridge(ALPHAS, metric=metric).fit(train, selection=val)
    assert chosen.alpha_ == best(lambda fit: fit(slice(None)).predict(X_val), y_val)
    assert chosen.provenance_["params"]["metric"] == metric
    assert Ridge(ALPHAS, metric=metric, cv=folds).fit(train).alpha_ == best(by_folds, y)


def test_auto_is_the_squared_error_or_with_a_prior_or_a_split_the_nll(images: Any, texts: Any) -> None:
    train, val = images(n=60, noise=0.6), images(n=60, seed=9, noise=0.6, split="val", dataset_key="data-9")
    fits = (Ridge().fit(train), Ridge().fit(train, selection=val), Ridge(prior=ZeroShot().fit(texts())).fit(train))
    assert [head.provenance_["params"]["metric"] for head in fits] == ["squared_error", "nll", "nll"]
    with pytest.raises(HeadError, match="expected 'auto', 'nll', 'top1' or 'squared_error'"):
        Ridge(metric="accuracy").fit(train)


def test_leave_one_out_with_few_rows_per_class_is_not_too_cautious(draw: Any) -> None:
    """With two rows per class, the temperature from uncorrected leave-one-out doubles the NLL of new rows."""
    X, y = draw(4000, 32, 20, seed=3)
    few = np.concatenate([np.flatnonzero(y == c)[:2] for c in range(20)])
    head = Ridge([0.3]).fit(X[few], y[few])
    rest = np.setdiff1d(np.arange(4000), few)
    scores = head.scores(X[rest])
    ideal = nll(scores / fit_temperature(scores, y[rest]), y[rest])
    assert nll(scores / head.temperature_, y[rest]) < 1.05 * ideal
    spectrum = head.spectrum_
    uncorrected = one_out(spectrum, spectrum, np.full(20, 1e30), [(X[few], y[few])], np.arange).scores(0.3)
    assert nll(scores / fit_temperature(uncorrected, y[few]), y[rest]) > 1.2 * ideal


def test_with_one_row_per_class_logits_have_a_standard_deviation_of_one(draw: Any) -> None:
    X, y = draw(400, 32, 20)
    few = np.unique(y, return_index=True)[1]
    head = Ridge().fit(X[few], y[few])
    assert np.isnan(head.cv_nll_).all()
    assert (head.scores(X[few]) / head.temperature_).std(axis=1).mean() == pytest.approx(1.0)


def test_a_mixture_of_two_scores_is_scipys_optimum() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)), 50 * rng.normal(size=(300, 6)) + 7
    y = (2 * a + 0.03 * b + rng.gumbel(size=a.shape)).argmax(axis=1)
    weights = rng.integers(1, 4, 300)
    temperature, weight = fit_mixture(a, b, y, weights=weights, prior_rows=0)

    def loss(logs: Any) -> float:
        rows = -log_softmax(np.exp(logs[0]) * a + np.exp(logs[1]) * b, axis=1)[np.arange(300), y]
        return float(weights @ rows / weights.sum())

    best = minimize(loss, [0.0, -3.0], tol=1e-12)
    found = np.log([1 / temperature, weight / temperature])
    assert loss(found) == pytest.approx(best.fun, rel=1e-7)
    np.testing.assert_allclose(found, best.x, atol=2e-3)
    assert fit_mixture(a, -b, y)[1] == 0.0  # what harms is left out
    temperature, weight = fit_mixture(rng.normal(size=a.shape), b, y)
    assert nll((a * 0 + weight * b) / temperature, y) == pytest.approx(
        nll(b / fit_temperature(b, y), y), rel=0.02
    )  # and so are scores that say nothing


def test_a_mixture_of_scores_that_both_harm_is_nearly_uniform() -> None:
    scores, labels = np.eye(3), np.array([1, 2, 0])
    temperature, weight = fit_mixture(scores, scores + 0.1 * np.eye(3)[[0, 2, 1]], labels, prior_rows=0)
    logits = (scores + weight * scores) / temperature
    assert np.isfinite(temperature)
    assert nll(logits, labels) == pytest.approx(np.log(3), abs=2e-3)


@pytest.mark.parametrize("seed", range(12))
def test_uninformative_labels_can_be_fitted(seed: int) -> None:
    """A permutation test fits such rows: about one in four has neither scores nor a prior that help."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(8, 6))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    prior = LinearHead(rng.normal(size=(4, 6)), np.zeros(4), tuple("abcd"))
    for head in (Ridge(prior=prior).fit(X, np.arange(8) % 4), heads.GDA().fit(X, np.arange(8) % 4, texts=prior)):
        assert np.isfinite(head.predict_proba(X)).all()


def test_a_correct_prior_is_a_limit(images: Any, texts: Any) -> None:
    """Few rows, much noise, and a prior that knows the classes: the sum is no worse, whatever its bias says."""
    test, bias = images(n=2000, seed=50, noise=0.5), np.array([0.0, 4.0, -4.0, 2.0, -2.0])
    own = ZeroShot().fit(texts()).linear()
    gaps = []
    for seed in range(8):
        prior = LinearHead(own.weights, bias, own.classnames)
        truth = LinearHead(own.weights, bias, own.classnames).logits(test.X)
        rng = np.random.default_rng(seed)
        few = images(n=20, seed=seed, noise=0.5)
        few.y = (prior.logits(few.X) + rng.gumbel(size=(20, 5))).argmax(axis=1)
        labels = (truth + rng.gumbel(size=truth.shape)).argmax(axis=1)
        head = Ridge(ALPHAS, prior=prior).fit(few)
        gaps.append(nll(head.linear().logits(test.X), labels) - nll(truth, labels))
    assert np.mean(gaps) < 0.35
    assert min(gaps) > 0


def test_paths_of_a_prior_have_their_own_weights(images: Any, texts: Any) -> None:
    store, prior = images(n=100, noise=0.6), ZeroShot().fit(texts())
    path = Ridge(ALPHAS, prior=prior).fit(store).path_heads()
    for alpha, member in zip(ALPHAS, path, strict=True):
        alone = Ridge([alpha], prior=prior).fit(store).linear()
        np.testing.assert_allclose(member.weights, alone.weights, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(member.bias, alone.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_on_few_shot_imagenet_a_prior_gains_three_points(clip_folder: Path) -> None:
    with np.load(clip_folder / "imagenet_fewshot.npz") as file:
        names = tuple(f"class {c}" for c in range(1000))
        prior = LinearHead(100 * file["text_weights"], np.zeros(1000), names)
        X, y = file["test_features"], file["test_labels"]
        head = Ridge(prior=prior).fit(file["train_features"], file["train_labels"].astype(np.int64), classnames=names)
    assert head.score(X, y) >= prior.score(X, y) + 0.03
    assert nll(head.linear().logits(X), y) < nll(prior.logits(X), y) - 0.1


def test_choosing_along_a_path_takes_each_alphas_own_temperature(images: Any) -> None:
    train, val = images(n=80, noise=0.6), images(n=3000, seed=9, noise=0.6, split="val", dataset_key="data-9")
    best = heads.choose(Ridge([1e-2, 1e3]).fit(train).path_heads()[-1:], val)
    found = nll(best.logits(val.X), val.y)
    refitted = nll(best.logits(val.X) / fit_temperature(best.logits(val.X), val.y), val.y)
    assert found < refitted + 0.03
