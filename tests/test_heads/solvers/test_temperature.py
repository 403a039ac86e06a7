"""Fitted temperatures against a bounded scalar search, at the bounds, and on few rows that are all correct."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from featcache.errors import HeadError
from heads import LinearDiscriminant, NearestMean, Ridge, fit_temperature
from heads.solvers.temperature import fit_mixture


def nll(scores: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    return float(-log_softmax(scores / temperature, axis=1)[np.arange(len(labels)), labels].mean())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.floats(-3, 3))
def test_no_other_temperature_is_better(seed: int, n_classes: int, log_scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(200, n_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    scores = logits * 10**log_scale
    found = fit_temperature(scores, labels, prior_rows=0)
    spread = scores.std()
    best = minimize_scalar(
        lambda log_t: nll(scores, labels, spread * np.exp(log_t)), bounds=(-6.8, 6.8), method="bounded"
    )
    assert nll(scores, labels, found) <= best.fun + 1e-7


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 40), st.sampled_from([0.5, 2.0]))
def test_prior_rows_count_as_rows_whose_second_class_is_right(
    seed: int, n_classes: int, n: int, prior_rows: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, n_classes))
    labels = (2 * scores + rng.gumbel(size=scores.shape)).argmax(axis=1)
    second = np.argsort(scores, axis=1)[:, -2]

    def objective(log_t: float) -> float:
        return n * nll(scores, labels, np.exp(log_t)) + prior_rows * nll(scores, second, np.exp(log_t))

    widest = np.log(1e3)
    grid = np.log(scores.std(axis=1).mean()) + np.linspace(-widest, widest, 141)
    place = int(np.argmin([objective(log_t) for log_t in grid]))
    bounds = (grid[max(place - 1, 0)], grid[min(place + 1, 140)])
    best = minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    found = fit_temperature(scores, labels, prior_rows=prior_rows)
    assert objective(np.log(found)) <= best.fun + 1e-7 * n


@pytest.mark.parametrize("n", [5, 10, 40])
def test_few_rows_that_are_all_right_do_not_make_probabilities_certain(n: int) -> None:
    rng = np.random.default_rng(n)
    scores = np.eye(5)[np.arange(n) % 5] + 0.02 * rng.normal(size=(n, 5))
    labels = np.arange(n) % 5
    p = np.exp(log_softmax(scores / fit_temperature(scores, labels), axis=1))
    assert 1 - p[np.arange(n), labels].mean() == pytest.approx(0.5 / (n + 0.5), rel=0.2)
    assert nll(scores, (labels + 1) % 5, fit_temperature(scores, labels)) < 10


def test_many_rows_outweigh_the_prior() -> None:
    rng = np.random.default_rng(3)
    logits = 3 * rng.normal(size=(20_000, 10))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    with_prior, without = fit_temperature(logits, labels), fit_temperature(logits, labels, prior_rows=0)
    assert with_prior == pytest.approx(without, rel=1e-4)
    assert nll(logits, labels, with_prior) == pytest.approx(nll(logits, labels, without), abs=1e-7)


@pytest.mark.parametrize("head", [Ridge, NearestMean, LinearDiscriminant])
def test_few_shot_heads_that_separate_the_selection_split_keep_a_sane_nll(head: type) -> None:
    rng = np.random.default_rng(0)
    means = np.eye(10, 64)

    def rows(k: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
        y = np.repeat(np.arange(10), k)
        return means[y] + noise * rng.normal(size=(10 * k, 64)), y

    X, y = rows(8, 0.2)
    held_out, (T, t) = rows(1, 0.1), rows(100, 0.2)
    fitted = head().fit(X, y, selection=held_out)
    assert fitted.score(*held_out) == 1.0
    assert 0.9 < fitted.score(T, t) < 1.0
    logits = fitted.linear().logits(T)
    unbounded = fit_temperature(fitted.linear().logits(held_out[0]), held_out[1], prior_rows=0)
    assert nll(logits, t, unbounded) > 1.0  # what the likelihood alone makes of it
    best = nll(logits, t, fit_temperature(logits, t, prior_rows=0))
    assert nll(logits, t, 1.0) < best + 0.15


def test_separable_rows_get_a_finite_temperature_by_likelihood_alone() -> None:
    scores = np.eye(4)
    temperature = fit_temperature(scores, np.arange(4), prior_rows=0)
    assert 0 < temperature < 0.01
    assert nll(scores, np.arange(4), temperature) < 1e-6


def test_uninformative_scores_are_flattened() -> None:
    scores, wrong = np.eye(4), (np.arange(4) + 1) % 4
    assert nll(scores, wrong, fit_temperature(scores, wrong)) == pytest.approx(np.log(4), abs=1e-3)
    assert fit_temperature(np.ones((3, 4)), np.array([0, 1, 2])) == 1.0


def test_no_rows_is_an_error() -> None:
    with pytest.raises(HeadError, match="labelled rows"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(HeadError, match="prior_rows -1"):
        fit_temperature(np.eye(3), np.arange(3), prior_rows=-1)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.eye(3), np.array([0, 1, -1]), r"labels are int64 in \[-1, 1\], expected class indices in \[0, 2\]"),
        (np.eye(3), np.array([1, 2, 3]), r"labels are int64 in \[1, 3\]"),
        (np.eye(3), np.array([0.0, 1.5, 2.0]), "labels are float64"),
        (np.full((3, 3), np.nan), np.arange(3), "scores hold NaN or infinity"),
        (np.where(np.eye(3) > 0, -np.inf, 1.0), np.arange(3), "scores hold NaN or infinity"),
        (np.arange(3.0), np.arange(3), r"got scores \(3,\) and 3 labels"),
    ],
)
def test_labels_and_scores_that_have_no_likelihood_are_refused(
    scores: np.ndarray, labels: np.ndarray, message: str
) -> None:
    """Numpy takes a label of -1 for the last class."""
    with pytest.raises(HeadError, match=message):
        fit_temperature(scores, labels)
    with pytest.raises(HeadError, match=message):
        fit_mixture(np.asarray(scores), np.asarray(scores), labels)


def test_scores_that_differ_by_rounding_say_nothing() -> None:
    """Divided by their own spread they would be logits of size one."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 40)
    scores, base = 0.7 + 1e-16 * rng.integers(-2, 3, (40, 3)), rng.normal(size=(40, 3))
    assert fit_temperature(scores, labels) == 1.0
    assert fit_mixture(base, scores, labels) == (fit_temperature(base, labels), 0.0)
    for equal in (scores, np.zeros((40, 3))):
        temperature, weight = fit_mixture(equal, base, labels)
        assert temperature / weight == pytest.approx(fit_temperature(base, labels))
    head = NearestMean().fit(np.repeat(rng.normal(size=(1, 30)), 9, axis=0), [4, 1, 3, 2, 0, 2, 5, 3, 2])
    Z = rng.normal(size=(5, 30))
    np.testing.assert_allclose(head.frozen().predict_proba(Z), head.predict_proba(Z), atol=1e-3)
