"""GDA: the paper's formula in float64, its alpha by likelihood, classes without rows."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from featcache.errors import HeadError
from heads import GDA, LinearHead, ZeroShot, fit_temperature
from heads.estimators.few_shot.gda import gda


def papers_scores(train: Any, new: Any) -> Any:
    """``x . w_c + b_c`` of the authors, with ``torch.cov``'s division by N - 1."""
    (X, y), new = train.numpy(np.float64), new.astype(np.float64)
    classes, (n, dim) = int(y.max()) + 1, X.shape
    means = np.stack([X[y == c].mean(axis=0) for c in range(classes)])
    covariance = np.cov((X - means[y]).T)
    weights = means @ (dim * np.linalg.inv((n - 1) * covariance + np.trace(covariance) * np.eye(dim)))
    return new @ weights.T + np.log(1 / classes) - (weights * means).sum(axis=1) / 2


def nll(logits: Any, y: Any) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(y)), y].mean())


def test_a_given_alpha_is_the_papers_formula(images: Any, texts: Any) -> None:
    train, test, text = images(n=60, noise=0.6), images(seed=5, noise=0.6), ZeroShot().fit(texts()).linear()
    scores = papers_scores(train, test.X)
    head = GDA(0.7).fit(train, texts=texts())
    np.testing.assert_allclose(head.scores(test.X), text.logits(test.X) + 0.7 * scores, rtol=1e-5, atol=1e-4)
    assert head.provenance_["params"] == head.provenance_["params"] | {"alpha": 0.7, "selection": "given"}
    assert head.temperature_ == 1.0
    for bad in (-1.0, np.inf, "folds"):
        with pytest.raises(HeadError, match="a number from 0, or 'fitted'"):
            GDA(bad).fit(train, texts=texts())


def test_alpha_and_temperature_are_the_likeliest_on_a_selection_split(images: Any, texts: Any) -> None:
    train, text = images(n=30, noise=0.6), ZeroShot().fit(texts()).linear()
    val = images(n=4000, seed=9, noise=0.6, split="val", dataset_key="data-9")
    scores, base = papers_scores(train, val.X), text.logits(val.X)
    head = GDA().fit(train, texts=texts(), selection=val)

    def loss(log_alpha: float) -> float:
        return nll((base + np.exp(log_alpha) * scores) / head.temperature_, val.y)

    assert minimize_scalar(loss, (-1, 1), tol=1e-10).x == pytest.approx(np.log(head.alpha_), abs=0.02)
    assert head.provenance_["chosen_on"][0]["split"] == "val"
    assert nll(head.scores(val.X) / head.temperature_, val.y) < min(nll(base, val.y), nll(scores, val.y))


def test_without_a_split_folds_choose_and_it_beats_both_parts(images: Any, texts: Any) -> None:
    test, gains = images(n=2000, seed=50, noise=0.5), []
    for seed in range(4):
        rough = texts().raw + 0.4 * np.random.default_rng(seed).normal(size=(5, 1, 12))
        few, prompts = images(n=40, seed=seed, noise=0.5), type(texts())(rough.astype(np.float32))
        head = GDA().fit(few, texts=prompts)
        assert head.provenance_["params"]["selection"] == "folds"
        parts = ZeroShot().fit(prompts).linear().logits(test.X), papers_scores(few, test.X)
        gains.append([head.score(test) - (part.argmax(axis=1) == test.y).mean() for part in parts])
    assert np.mean(gains, axis=0).min() > 0.01


def test_a_class_without_rows_keeps_its_zero_shot_logit(images: Any, texts: Any) -> None:
    train = images(n=100)
    keep = train.y != 2
    train.X, train.y = train.X[keep], train.y[keep]
    test = images(seed=5)
    head = GDA().fit(train, texts=texts())
    assert (head.predict(test)[test.y == 2] == 2).mean() > 0.8
    one_each = images().X[np.unique(images().y, return_index=True)[1]]
    single = GDA().fit(one_each, np.arange(5), texts=texts())
    assert single.provenance_["params"]["selection"] == "none"
    assert single.score(test) > 0.8
    X, text = one_each.astype(np.float64), ZeroShot().fit(texts()).linear()
    added = X @ (single.coef_ - text.weights).T  # of the rows, without the zero-shot head's part
    assert (added + single.intercept_ - text.bias).std(axis=1).mean() == pytest.approx(1.0)


@pytest.mark.parametrize("metric", ["top1", "squared_error"])
def test_alpha_is_the_best_of_its_path_by_another_metric(metric: str) -> None:
    """Every alpha of the path by the formula, each at its best temperature by a scalar search, on the split."""
    rng = np.random.default_rng(4)
    means = rng.normal(size=(4, 6))
    y, v = np.arange(24) % 4, np.arange(80) % 4
    X, V = (means[labels] + 1.5 * rng.normal(size=(len(labels), 6)) for labels in (y, v))
    text = LinearHead(means + rng.normal(size=(4, 6)), np.zeros(4), tuple("abcd"))
    found = GDA(metric=metric).fit(X, y, texts=text, selection=(V, v))
    first = GDA().fit(X, y, texts=text, selection=(V, v)).alpha_
    weights, intercepts = gda(X, y, 4)
    losses = {}
    for alpha in first * np.logspace(-1.5, 1.5, 25):
        scores = V @ (text.weights + alpha * weights).T + alpha * intercepts
        logits = scores / fit_temperature(scores, v)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        nll = -np.log(p[np.arange(80), v]).sum()
        missed = (p.argmax(1) != v).sum() if metric == "top1" else ((p - np.eye(4)[v]) ** 2).sum()
        losses[alpha] = (round(float(missed), 6), nll)
    assert found.alpha_ == pytest.approx(min(losses, key=losses.__getitem__))
    assert found.provenance_.params["metric"] == metric


def test_equal_rows_of_different_classes_leave_the_zero_shot_head() -> None:
    """Their discriminant is rounding, which a standard deviation of one would turn into logits."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        text = LinearHead(rng.normal(size=(6, 2)), np.zeros(6), tuple("abcdef"))
        X, Z = np.repeat(rng.normal(size=(1, 2)), 3, axis=0), rng.normal(size=(5, 2))
        head = GDA().fit(X, [5, 2, 4], texts=text)
        np.testing.assert_allclose(head.predict_proba(Z), text.predict_proba(Z), atol=1e-6)
