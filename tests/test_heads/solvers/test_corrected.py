"""Leave-one-out errors from bfloat16 products: right to 1e-5, or left to float32."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV

from heads.solvers.ridge import corrected
from heads.solvers.ridge.forms import Coupled, Direct
from heads.solvers.ridge.leave_one_out import leave_one_out_errors
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import Spectrum, decompose

ALPHAS = np.logspace(-3, 3, 7)
Rows = tuple[NDArray[np.float16], NDArray[np.int64]]


def drawn(n: int, dim: int = 64, classes: int = 8, decay: float = 2.0, spread: float = 0.0) -> Rows:
    """Float16 rows around class means; column scales fall by exp(-decay), row scales vary by exp(spread)."""
    rng = np.random.default_rng(0)
    scale = np.exp(-np.linspace(0.0, decay, dim))
    labels = rng.integers(0, classes, n)
    rows = (rng.standard_normal((n, dim)) + 0.8 * rng.standard_normal((classes, dim))[labels]) * scale
    rows = rows @ np.linalg.qr(rng.standard_normal((dim, dim)))[0] * np.exp(spread * rng.standard_normal((n, 1)))
    return (0.5 + rows).astype(np.float16), labels


def spectrum_of(rows: Rows) -> Spectrum:
    X, y = rows
    return decompose(Moments.from_blocks([rows], dim=X.shape[1], n_targets=int(y.max()) + 1))


def form_of(rows: Rows, alphas: NDArray[np.float64]) -> Coupled:
    return Coupled.of(spectrum_of(rows), alphas, torch.float32, torch.device("cpu"))


def corrected_errors(rows: Rows, alphas: NDArray[np.float64] = ALPHAS) -> NDArray[np.float64] | None:
    return corrected.mean_errors(spectrum_of(rows), [rows], alphas)


@pytest.mark.parametrize("rows", [drawn(6_000), drawn(6_000, decay=0.0), drawn(4_000, dim=24, classes=3)])
def test_errors_are_those_of_scikit_learn(rows: Rows) -> None:
    X, y = rows
    found = corrected_errors(rows)
    assert found is not None
    theirs = RidgeCV(ALPHAS, store_cv_results=True).fit(X.astype(np.float64), np.eye(y.max() + 1)[y])
    truth = theirs.cv_results_.sum(axis=1).mean(axis=0)
    np.testing.assert_allclose(found, truth, rtol=1e-5)
    assert found.argmin() == truth.argmin()


def test_plain_bfloat16_products_would_be_worse() -> None:
    rows = drawn(6_000)
    coarse = corrected.Coarse.of(spectrum_of(rows), ALPHAS)
    assert coarse is not None
    e, h = coarse.rows(torch.from_numpy(rows[0]), torch.from_numpy(rows[1]))
    plain = (e / (1.0 - h).square()).double().mean(dim=0).numpy()
    exact = leave_one_out_errors(spectrum_of(rows), lambda: [rows], ALPHAS, dtype=torch.float64)
    found = corrected_errors(rows)
    assert found is not None
    assert np.abs(found / exact - 1).max() < 0.1 * np.abs(plain / exact - 1).max()


def test_columns_without_information_are_left_out() -> None:
    """Repeated and constant columns give eigenvalues of zero, all of them the same."""
    X, y = drawn(6_000, dim=32)
    rows = np.hstack([X, X, np.full((len(X), 8), 0.25, np.float16)]), y
    coarse = corrected.Coarse.of(spectrum_of(rows), ALPHAS)
    assert coarse is not None
    assert len(coarse.leverage_factor) == 32
    truth = leave_one_out_errors(spectrum_of(rows), lambda: [rows], ALPHAS, dtype=torch.float64)
    found = corrected_errors(rows)
    assert found is not None
    np.testing.assert_allclose(found, truth, rtol=1e-5)


def test_near_pairs_are_the_nearest_of_all() -> None:
    s = np.sort(np.random.default_rng(0).random(40))
    first, second, rest = corrected._near_pairs(s, 0.1)
    distances = sorted((s[e] - s[d]) / (s[d] + 0.1) for d in range(40) for e in range(d + 1, 40))
    np.testing.assert_allclose((s[second] - s[first]) / (s[first] + 0.1), distances[:2])
    assert rest == distances[2]


@pytest.mark.parametrize("gap", [0.0, 1e-7])
def test_residuals_of_a_near_pair_are_not_lost_in_rounding(gap: float) -> None:
    """Of eigenvalues closer than bfloat16 can tell apart: each row is right to a few percent."""
    rows = drawn(6_000)
    spectrum = spectrum_of(rows)
    spectrum.eigenvalues[1:8:2] = spectrum.eigenvalues[0:8:2] * (1 + gap)
    coarse = corrected.Coarse.of(spectrum, ALPHAS)
    assert coarse is not None
    X, y = torch.from_numpy(rows[0][:500]), torch.from_numpy(rows[1][:500])
    (e, h), (exact_e, exact_h) = coarse.rows(X, y), Direct.of(spectrum, ALPHAS).rows(X, y)
    assert (e - exact_e).square().mean().sqrt() < 0.05 * exact_e.mean()
    assert (h - exact_h).square().mean().sqrt() < 0.01 * exact_h.mean()


def test_too_many_equal_eigenvalues_are_left_to_float32() -> None:
    rows = drawn(6_000)
    spectrum = spectrum_of(rows)
    spectrum.eigenvalues[:32] = spectrum.eigenvalues[0]
    assert corrected.mean_errors(spectrum, [rows], ALPHAS) is None


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(drawn(1_000), id="leverages are not small"),
        pytest.param(drawn(6_000, spread=1.5), id="few rows hold most of the sum of squares"),
        pytest.param(drawn(6_000, decay=8.0), id="weak directions drown in the strong ones"),
    ],
)
def test_float32_does_what_bfloat16_cannot(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    assert corrected_errors(rows) is None
    monkeypatch.setattr(corrected, "has_bfloat16", lambda: True)
    monkeypatch.setattr("heads.solvers.ridge.leave_one_out._SMALL_WORK", 0)
    spectrum = spectrum_of(rows)
    found = leave_one_out_errors(spectrum, lambda: [rows], ALPHAS)
    np.testing.assert_allclose(
        found, leave_one_out_errors(spectrum, lambda: [rows], ALPHAS, dtype=torch.float64), rtol=1e-5
    )


def test_bfloat16_is_chosen_automatically_if_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn(6_000)
    monkeypatch.setattr("heads.solvers.ridge.leave_one_out._SMALL_WORK", 0)
    asked: list[bool] = []
    whole = corrected.mean_errors

    def counted(*arguments: Any) -> Any:
        asked.append(True)
        return whole(*arguments)

    monkeypatch.setattr(corrected, "mean_errors", counted)
    for native, times in ((False, 0), (True, 1)):
        monkeypatch.setattr(corrected, "has_bfloat16", lambda native=native: native)
        leave_one_out_errors(spectrum_of(rows), lambda: [rows], ALPHAS)
        assert len(asked) == times


def test_many_alphas_share_columns() -> None:
    """A hundred alphas cost little more than twenty: the products go through some twenty columns."""
    rows, many = drawn(6_000), np.logspace(-3, 3, 100)
    spectrum = spectrum_of(rows)
    assert form_of(rows, many).shrink.factors[0].shape[1] < 30
    truth = leave_one_out_errors(spectrum, lambda: [rows], many, dtype=torch.float64)
    np.testing.assert_allclose(
        leave_one_out_errors(spectrum, lambda: [rows], many, dtype=torch.float32), truth, rtol=1e-6
    )
    found = corrected_errors(rows, many)
    assert found is not None
    np.testing.assert_allclose(found, truth, rtol=1e-5)
