"""Fitting the temperature against a bounded scalar search, and at its ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from featcache.errors import HeadError
from heads import fit_temperature


def nll(scores: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    return float(-log_softmax(scores / temperature, axis=1)[np.arange(len(labels)), labels].mean())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.floats(-3, 3))
def test_no_other_temperature_is_better(seed: int, n_classes: int, log_scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(200, n_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    scores = logits * 10**log_scale
    found = fit_temperature(scores, labels)
    spread = scores.std()
    best = minimize_scalar(
        lambda log_t: nll(scores, labels, spread * np.exp(log_t)), bounds=(-6.8, 6.8), method="bounded"
    )
    assert nll(scores, labels, found) <= best.fun + 1e-7


def test_separable_rows_get_a_finite_temperature() -> None:
    scores = np.eye(4)
    temperature = fit_temperature(scores, np.arange(4))
    assert 0 < temperature < 0.01
    assert nll(scores, np.arange(4), temperature) < 1e-6


def test_scores_that_say_nothing_are_flattened() -> None:
    scores, wrong = np.eye(4), (np.arange(4) + 1) % 4
    assert nll(scores, wrong, fit_temperature(scores, wrong)) == pytest.approx(np.log(4), abs=1e-3)
    assert fit_temperature(np.ones((3, 4)), np.array([0, 1, 2])) == 1.0


def test_no_rows_is_an_error() -> None:
    with pytest.raises(HeadError, match="labelled rows"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, int))
