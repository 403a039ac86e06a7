"""A fast path skips work whose result is known, and is proven equal to the general path.

Each fast path meets its plain reference: the truth is computed in float64 by the definition, the naive path computes
the same definition in the fast path's own dtype, and the rule is ``error <= error of the naive path + tolerance``.
Shapes are odd on purpose: one row, fewer rows than features, equal eigenvalues, ties, saturated logits, masked classes.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from heads import LinearHead, interpolate
from heads.evaluation.passes import Job, all_logits
from heads.kernels import linear_cross_entropy, linear_nll
from heads.kernels.tally import stats_of_arrays
from heads.solvers.ridge.leave_one_out import leave_one_out_errors, squared_errors
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import Spectrum, decompose

seeds = st.integers(0, 2**32 - 1)
ALPHAS = np.logspace(-3, 3, 9)


def unit_rows(rng: np.random.Generator, n: int, dim: int, decay: float) -> NDArray[np.float16]:
    """Float16 unit rows around a common direction with a spectrum that decays by exp(-2 decay)."""
    rows = rng.normal(size=(n, dim)) * np.exp(-np.linspace(0, decay, dim)) + rng.normal(size=dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def moments_of(X: NDArray[Any], y: NDArray[Any], n_classes: int) -> Moments:
    return Moments.from_blocks([(X, y)], dim=X.shape[1], n_targets=n_classes)


def reference_errors(
    X: NDArray[Any],
    y: NDArray[Any],
    spectrum: Spectrum,
    leave_out: bool,
    dtype: Any = np.float64,
) -> NDArray[np.float64]:
    """Squared errors by the definition: weights, residuals and leverages of every alpha, in one dtype."""
    onehot = np.eye(len(spectrum.mean_y))[y].astype(dtype)
    x, errors = X.astype(dtype), []
    centred = x - spectrum.mean_x.astype(dtype)
    for alpha in ALPHAS:
        weights, intercept = spectrum.solve(alpha)
        residual = onehot - x @ weights.T.astype(dtype) - intercept.astype(dtype)
        inverse = (spectrum.vectors / (spectrum.eigenvalues + alpha)) @ spectrum.vectors.T
        leverage = ((centred @ inverse.astype(dtype)) * centred).sum(1)
        leverage += dtype(1 / spectrum.n if spectrum.fit_intercept else 0)
        factor = 1 - leverage if leave_out else np.ones_like(leverage)
        errors.append(float(((residual / factor[:, None]) ** 2).sum(1, dtype=np.float64).mean()))
    return np.array(errors)


def relative(found: Any, truth: Any) -> float:
    return float(np.max(np.abs(np.asarray(found, np.float64) - truth) / np.maximum(truth, 1e-12)))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(3, 300), st.integers(1, 40), st.integers(2, 9), st.booleans(), st.sampled_from([0.0, 3.0]))
def test_leave_one_out_for_all_alphas(
    seed: int, n: int, dim: int, n_classes: int, fit_intercept: bool, decay: float
) -> None:
    rng = np.random.default_rng(seed)
    X, y = unit_rows(rng, n, dim, decay), rng.integers(0, n_classes, n)
    spectrum = decompose(moments_of(X, y, n_classes), fit_intercept=fit_intercept)
    truth = reference_errors(X, y, spectrum, leave_out=True)
    for dtype, tolerance in ((None, 1e-9), (torch.float64, 1e-7), (torch.float32, 1e-5)):
        found = leave_one_out_errors(spectrum, lambda: [(X, y)], ALPHAS, dtype=dtype)
        naive = reference_errors(X, y, spectrum, True, np.float32) if dtype == torch.float32 else truth
        assert relative(found, truth) <= min(relative(naive, truth), 1e-3) + tolerance


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 60), st.integers(2, 30), st.sampled_from([torch.float32, torch.float64]))
def test_squared_errors_on_other_rows(seed: int, n_other: int, dim: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    X, y = unit_rows(rng, 80 + n_other, dim, 2.0), rng.integers(0, 4, 80 + n_other)
    spectrum = decompose(moments_of(X[:80], y[:80], 4))
    truth = reference_errors(X[80:], y[80:], spectrum, leave_out=False)
    naive = reference_errors(X[80:], y[80:], spectrum, False, np.float32 if dtype == torch.float32 else np.float64)
    found = squared_errors(spectrum, lambda: [(X[80:], y[80:])], ALPHAS, dtype=dtype)
    assert relative(found, truth) <= relative(naive, truth) + (1e-5 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-6, 1e-4, 3e-3, 1e-2])
def test_leave_one_out_with_clustered_eigenvalues(spread: float, dtype: Any) -> None:
    """All eigenvalues within `spread` of each other: where the difference quotient of the fast path cancels."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(600, 24)))[0]
    X = basis * np.sqrt(600 * (1 + spread * np.linspace(0, 1, 24)))
    y = (X[:, :5] + rng.normal(size=(600, 5))).argmax(axis=1)
    spectrum = decompose(moments_of(X, y, 5), fit_intercept=False)
    truth = reference_errors(X, y, spectrum, leave_out=True)
    found = leave_one_out_errors(spectrum, lambda: [(X, y)], ALPHAS, dtype=dtype)
    assert relative(found, truth) <= (1e-5 if dtype == torch.float32 else 1e-9)


def test_leave_one_out_with_steep_rows_and_exact_fits() -> None:
    """Rows that alone determine a weight, and targets fitted exactly, fall back to float64."""
    rng = np.random.default_rng(0)
    X = np.vstack([unit_rows(rng, 400, 20, 1.0).astype(np.float64), 50 * np.eye(20)[:6]])
    y = rng.integers(0, 3, len(X))
    steep = decompose(moments_of(X, y, 3))
    truth = reference_errors(X, y, steep, leave_out=True)
    assert relative(leave_one_out_errors(steep, lambda: [(X, y)], ALPHAS, dtype=torch.float32), truth) <= 1e-5
    exact = np.eye(4)[y := rng.integers(0, 4, 500)] + 1e-4 * rng.normal(size=(500, 4))
    spectrum = decompose(moments_of(exact, y, 4), fit_intercept=False)
    truth = reference_errors(exact, y, spectrum, leave_out=True)
    assert truth[0] < 1e-6
    assert relative(leave_one_out_errors(spectrum, lambda: [(exact, y)], ALPHAS, dtype=torch.float32), truth) <= 1e-5


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 200), st.integers(1, 20), st.integers(1, 50))
def test_moments_streamed_and_subtracted(seed: int, n: int, dim: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    X, y = unit_rows(rng, n, dim, 1.0), rng.integers(0, 3, n)
    wide, onehot = X.astype(np.float64), np.eye(3)[y]
    blocks = [(X[i : i + cut], y[i : i + cut]) for i in range(0, n, cut)]
    found = Moments.from_blocks(blocks, dim=dim, n_targets=3)
    np.testing.assert_allclose(found.xtx, wide.T @ wide, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.class_sums, onehot.T @ wide, rtol=1e-12, atol=1e-12)
    rest = found - moments_of(X[:cut], y[:cut], 3)
    np.testing.assert_allclose(rest.xtx, wide[cut:].T @ wide[cut:], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(rest.counts, onehot[cut:].sum(0))


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(2, 30), st.sampled_from([1e-3, 1.0, 100.0]), st.booleans(), st.booleans())
def test_row_statistics_equal_float64(
    seed: int, n: int, n_classes: int, scale: float, ties: bool, masked: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = scale * rng.normal(size=(n, n_classes)), rng.integers(0, n_classes, n)
    if ties:
        logits = np.round(logits / scale) * scale
    if masked:
        logits[:, rng.integers(0, n_classes)] = -np.inf
        logits[np.arange(n), labels] = scale
    narrow = logits.astype(np.float32)
    rows = np.arange(n)
    truth = -log_softmax(narrow.astype(np.float64), axis=1)[rows, labels]
    naive = -log_softmax(narrow, axis=1)[rows, labels]
    rows_found = stats_of_arrays(narrow, labels)
    nll, confidence, rank = (part.numpy() for part in (rows_found.nll, rows_found.confidence, rows_found.rank))
    assert np.abs(nll - truth).max() <= np.abs(naive - truth).max() + 1e-6
    assert np.abs(confidence - softmax(narrow.astype(np.float64), axis=1).max(1)).max() <= 1e-5
    order = np.argsort(-narrow, axis=1, kind="stable")
    np.testing.assert_array_equal(rank, (order == labels[:, None]).argmax(axis=1))


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(2, 12), st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=6))
def test_logits_along_an_interpolation(seed: int, n: int, n_classes: int, alphas: list[float]) -> None:
    """Two products for a whole path, against float64 products with each interpolated head's weights."""
    rng = np.random.default_rng(seed)
    names = tuple(map(str, range(n_classes)))
    ends = [LinearHead(100 * rng.normal(size=(n_classes, 8)), rng.normal(size=n_classes), names) for _ in range(2)]
    X = unit_rows(rng, n, 8, 1.0)
    path = interpolate(ends[0], ends[1], alphas)
    jobs = [Job(head, (0, 1), None) for head in path]
    w = [head.weights.astype(np.float64) for head in ends]
    b = [head.bias.astype(np.float64) for head in ends]
    for alpha, head, found in zip(alphas, path, all_logits(jobs, X), strict=True):
        truth = X.astype(np.float64) @ ((1 - alpha) * w[0] + alpha * w[1]).T + (1 - alpha) * b[0] + alpha * b[1]
        naive = head.logits(X)
        assert np.abs(found - truth).max() <= np.abs(naive - truth).max() + 2e-4


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(4, 9), st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=6))
def test_logits_along_an_interpolation_with_missing_classes(
    seed: int, n: int, n_classes: int, alphas: list[float]
) -> None:
    """A class that only one end knows keeps that end's logit relative to the classes that both know."""
    rng = np.random.default_rng(seed)
    names, X = tuple(map(str, range(n_classes))), unit_rows(rng, n, 8, 1.0)
    absent = [rng.random(n_classes) < 0.4 for _ in range(2)]
    for gaps in absent:
        gaps[:2] = False
    ends, plain = [], []
    for gaps in absent:
        weights, bias = 30 * rng.normal(size=(n_classes, 8)), rng.normal(size=n_classes)
        weights[gaps], bias[gaps] = 0.0, -1e4
        ends.append(LinearHead(weights, bias, names, absent=tuple(np.flatnonzero(gaps).tolist())))
        logits = X.astype(np.float64) @ ends[-1].weights.astype(np.float64).T + ends[-1].bias
        plain.append(logits)
    both = ~absent[0] & ~absent[1]
    shift = (plain[0][:, both] - plain[1][:, both]).mean(axis=1, keepdims=True)
    only = absent[0] & ~absent[1], absent[1] & ~absent[0]
    truths = [np.where(only[0], plain[1] + shift, plain[0]), np.where(only[1], plain[0] - shift, plain[1])]
    path = interpolate(ends[0], ends[1], alphas)
    for alpha, head, found in zip(alphas, path, all_logits([Job(h, h.sharing, None) for h in path], X), strict=True):
        truth = (1 - alpha) * truths[0] + alpha * truths[1]
        naive = head.logits(X)
        assert np.abs(naive - truth).max() <= 2e-2  # -10,000 in float32 where neither end knows the class
        assert np.abs(found - truth).max() <= np.abs(naive - truth).max() + 2e-2
        seen = ~(absent[0] & absent[1])
        assert np.abs(naive - truth)[:, seen].max() <= 1e-3
        assert np.abs(found - truth)[:, seen].max() <= np.abs(naive - truth)[:, seen].max() + 1e-3


@settings(max_examples=25, deadline=None)
@given(
    seeds,
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([2, 3, 63, 64, 65, 130, 1100]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.sampled_from(["random", "zero rows", "twin classes", "last class"]),
    st.sampled_from(["chunked", "cpu"]),
)
def test_kernels_of_many_heads(
    seed: int, n: int, dim: int, n_classes: int, scale: float, oddity: str, impl: str
) -> None:
    """NLL, Brier score and rank of every row, and of every interpolation, against logits in float64 and in float32."""
    rng = np.random.default_rng(seed)
    X, y = unit_rows(rng, n, dim, 1.0).astype(np.float32), rng.integers(0, n_classes, n)
    W = np.stack([unit_rows(rng, n_classes, dim, 1.0).astype(np.float32) for _ in range(2)])
    if oddity == "zero rows":
        X[rng.random(n) < 0.5] = 0
    elif oddity == "twin classes":
        W[:, rng.integers(0, n_classes)] = W[:, rng.integers(0, n_classes)]
    elif oddity == "last class":
        y[:] = n_classes - 1
    for alphas, n_heads in ((None, 2), ([0.0, 0.3, 1.0, 1.4], 4)):
        kw: Any = {"logit_scale": [scale, scale / 2], "alphas": alphas, "per_sample": True}
        truth: Any = linear_nll(X.astype(np.float64), W, y, impl="reference", **kw)
        naive: Any = linear_nll(X, W, y, impl="reference", **kw)
        found: Any = linear_nll(X, W, y, impl=impl, **kw)
        assert found.row_nll.shape == (n_heads, n)
        error, bound = (np.abs(t.row_nll - truth.row_nll).max() for t in (found, naive))
        assert error <= bound + 2e-6 * max(scale, 1.0)
        error, bound = (np.abs(t.brier - truth.brier).max() / n for t in (found, naive))
        assert error <= bound + 2e-6 * max(scale, 1.0)
        np.testing.assert_array_equal(found.class_rows, truth.class_rows)
        if oddity == "zero rows":  # all classes tie there: the rank is the class
            constant = ~X.any(axis=1)
            np.testing.assert_array_equal(found.row_rank[:, constant], np.tile(y[constant], (n_heads, 1)))


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 90), st.integers(1, 12), st.sampled_from([2, 5, 64, 129]), st.booleans())
def test_gradients_in_blocks(seed: int, n: int, dim: int, n_classes: int, wide: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    kind = torch.float64 if wide else torch.float32
    X, W = torch.randn(n, dim, generator=draw, dtype=kind), torch.randn(n_classes, dim, generator=draw, dtype=kind)
    labels = torch.randint(0, n_classes, (n,), generator=draw)
    gradients = []
    for to, loss_of in (
        (torch.float64, lambda x, w: torch.nn.functional.cross_entropy(10 * x @ w.T, labels)),
        (kind, lambda x, w: torch.nn.functional.cross_entropy(10 * x @ w.T, labels)),
        (kind, lambda x, w: linear_cross_entropy(x, w, labels, logit_scale=10.0)),
    ):
        leaves = [t.to(to, copy=True).requires_grad_() for t in (X, W)]
        loss_of(*leaves).backward()
        gradients.append([leaf.grad.double() for leaf in leaves if leaf.grad is not None])
    for truth, naive, found in zip(*gradients, strict=True):
        tolerance = (1e-12 if wide else 5e-6) * max(float(truth.abs().max()), 1e-3)
        assert float((found - truth).abs().max()) <= float((naive - truth).abs().max()) + tolerance
