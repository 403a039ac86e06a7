"""Solvers for rows on a GPU, run on a CPU, against the general solvers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from featcache.errors import HeadError
from heads.solvers import parallel, primitives
from heads.solvers.logistic.objective import Line, Objective
from heads.solvers.logistic.path import PathSolver
from heads.solvers.logistic.precision import FLOAT16, FLOAT16_HALVES, Precision
from heads.solvers.logistic.preconditioner import ClassBlocks
from heads.solvers.logistic.rows import DeviceRows, RowSource
from heads.solvers.primitives import class_sums, class_sums_by_product
from heads.solvers.ridge import leave_one_out
from heads.solvers.ridge.leave_one_out import leave_one_out_errors, squared_errors
from heads.solvers.ridge.moments import Moments, fold_moments
from heads.solvers.ridge.spectrum import decompose

ALPHAS = np.logspace(-3, 3, 13)


@pytest.fixture
def rows(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    X, y = draw(700, 24, 6)
    return torch.from_numpy(X), torch.from_numpy(y)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes over tensors, class sums and products take the code paths for a GPU, in small pieces."""
    for module in (parallel, primitives, leave_one_out):
        monkeypatch.setattr(module, "on_gpu", lambda column: isinstance(column, torch.Tensor))
    monkeypatch.setattr(parallel, "DEVICE_NUMBERS", 48 * 256)  # several pieces


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_moments_and_leave_one_out_are_those_of_arrays(
    rows: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, weighted: bool
) -> None:
    X, y = rows[0].to(dtype), rows[1]
    weights = torch.rand(len(y), dtype=torch.float64) if weighted else None
    tensors = (X, y, weights)
    arrays = (X.numpy(), y.numpy(), None if weights is None else weights.numpy())
    found, truth = (Moments.from_blocks([block], dim=24, n_targets=6) for block in (tensors, arrays))
    np.testing.assert_allclose(found.xtx, truth.xtx, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.class_sums, truth.class_sums, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.counts, truth.counts, rtol=0 if weights is None else 1e-12)
    for intercept in (True, False):
        spectrum = decompose(found, fit_intercept=intercept)
        errors, direct = (leave_one_out_errors(spectrum, lambda b=b: [b], ALPHAS) for b in (tensors, arrays))  # type: ignore[misc]
        np.testing.assert_allclose(errors, direct, rtol=1e-8)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_moments_and_errors_by_fold_are_those_of_arrays(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    X, y = rows
    fold = np.arange(len(y)) % 3
    both = [(X, y, None, fold), (X.numpy(), y.numpy(), None, fold)]
    found, truth = (fold_moments([block], dim=24, n_targets=6, folds=3) for block in both)
    for part, want in zip(found, truth, strict=True):
        np.testing.assert_allclose(part.xtx, want.xtx, rtol=1e-12)
        np.testing.assert_allclose(part.class_sums, want.class_sums, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(part.counts, want.counts)
    spectra = [decompose(part) for part in found]
    errors, direct = (squared_errors(spectra, lambda b=b: [b], ALPHAS) for b in both)  # type: ignore[misc]
    np.testing.assert_allclose(errors, direct, rtol=1e-8)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_leave_one_out_with_clustered_eigenvalues() -> None:
    rng = np.random.default_rng(0)
    X = torch.from_numpy(np.linalg.qr(rng.normal(size=(300, 40)))[0])
    y = torch.from_numpy(rng.integers(0, 3, 300))
    spectrum = decompose(Moments.from_blocks([(X, y)], dim=40, n_targets=3), fit_intercept=False)
    errors = leave_one_out_errors(spectrum, lambda: [(X, y)], ALPHAS)
    direct = leave_one_out_errors(spectrum, lambda: [(X.numpy(), y.numpy())], ALPHAS)
    np.testing.assert_allclose(errors, direct, rtol=1e-8)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_tensors_that_ridge_refuses(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    X, y = rows
    with pytest.raises(HeadError, match=r"labels lie in \[0, 5\], expected \[0, 4\]"):
        Moments.from_blocks([(X, y)], dim=24, n_targets=5)
    with pytest.raises(HeadError, match=r"features \(700, 24\), expected \(5, 24\)"):
        Moments.from_blocks([(X, y[:5])], dim=24, n_targets=6)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_errors_on_other_rows_and_shrinkage_towards_weights(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    X, y = rows
    base = np.random.default_rng(2).normal(size=(6, 24))
    spectrum = decompose(Moments.from_blocks([(X[:500], y[:500])], dim=24, n_targets=6)).pulled_to(base)
    for part, errors in ((slice(500), leave_one_out_errors), (slice(500, None), squared_errors)):
        x, labels = X[part], y[part]
        want = errors(spectrum, lambda x=x, labels=labels: [(x.numpy(), labels.numpy())], ALPHAS)  # type: ignore[misc]
        found = errors(spectrum, lambda x=x, labels=labels: [(x, labels)], ALPHAS)  # type: ignore[misc]
        np.testing.assert_allclose(found, want, rtol=1e-8)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_class_sums_by_product_are_the_index_add(rows: tuple[torch.Tensor, torch.Tensor], kind: torch.dtype) -> None:
    X, y = rows[0].to(kind), rows[1]
    torch.testing.assert_close(class_sums_by_product(X, y, 9), class_sums(X, y, 9), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_value_and_gradient_equal_those_in_float64(
    rows: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, fit_intercept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-precision features are exact, and so are the two halves of the other factor: errors are those of float32."""
    monkeypatch.setattr("heads.solvers.logistic.objective.PIECE_ROWS", 256)
    X, y = rows[0].to(dtype), rows[1]
    keep = np.arange(len(y)) % 3 > 0
    generator = torch.Generator().manual_seed(0)
    theta = 30 * torch.randn(6, 25, generator=generator)
    offset = torch.randn(6, 25, generator=generator)
    if not fit_intercept:
        theta[:, -1], offset[:, -1] = 0.0, 0.0
    device = DeviceRows(X, y, 6, fit_intercept=fit_intercept)
    wide = RowSource.in_memory(X.double() - torch.from_numpy(device.mean), y, torch.from_numpy(keep).double())
    exact = line(wide, 0.1, fit_intercept=fit_intercept, offset=offset.double())
    f = line(device.source(np.arange(6), 6, keep), 0.1, fit_intercept=fit_intercept, offset=offset)
    step = theta / 7
    steps: list[Any] = [Line.start, Line.probe, Line.value_and_gradient]
    for at_point, argument in zip(steps, (theta, step, torch.tensor(0.5)), strict=True):
        want, slope = at_point(exact, argument.double())
        got, found = at_point(f, argument)
        assert got == pytest.approx(want, rel=1e-5)
        assert float((found - slope).norm() / slope.norm()) < 2e-5
    assert f.value(0.25) == pytest.approx(exact.value(0.25), rel=1e-5)
    assert torch.equal(f.accept(0.5), theta + 0.5 * step)


@pytest.mark.parametrize("precision", [FLOAT16, FLOAT16_HALVES])
def test_rows_of_large_weights_do_not_overflow(rows: tuple[torch.Tensor, torch.Tensor], precision: Precision) -> None:
    """Residuals of weight 5 leave float16's range once they are scaled as those of weight 1 are."""
    X, y = rows
    device = DeviceRows(X, y, 6)
    device.weights = np.where(np.arange(len(y)) % 2 > 0, 5.0, 300.0)
    source = replace(device.source(np.arange(6), 6, None), precision=precision)
    wide = RowSource.in_memory(X.double() - torch.from_numpy(device.mean), y, torch.from_numpy(device.weights))
    theta = torch.randn(6, 25, generator=torch.Generator().manual_seed(0)).half().float()
    want, slope = line(wide, 0.1).start(theta.double())
    got, found = line(source, 0.1).start(theta)
    assert got == pytest.approx(want, rel=1e-3)
    assert float((found - slope).norm() / slope.norm()) < 2e-3


def line(rows: RowSource, strength: float, **options: Any) -> Line:
    f = Objective(rows, 6, **options)
    f.strength = strength
    return Line(f)


def test_both_halves_of_the_weights_matter(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With only one half of the weights, the error of the value is a thousand times as large."""
    X, y = rows
    theta = 100 * torch.randn(6, 25, generator=torch.Generator().manual_seed(0))
    device = DeviceRows(X, y, 6, fit_intercept=False).source(np.arange(6), 6, None)
    assert device.precision == FLOAT16_HALVES
    want, _ = line(RowSource.in_memory(X.double(), y), 0.0).start(theta.double())
    found, _ = line(device, 0.0).start(theta)
    rounded, _ = line(device, 0.0).start(theta.half().float())
    assert abs(found - want) < 1e-3 * abs(rounded - want)
    single, slope = line(replace(device, precision=FLOAT16), 0.0).start(theta)
    assert abs(single - rounded) < 1e-3 * abs(rounded - want)  # one part of float16 rounds the weights, and no more
    assert float((slope - line(device, 0.0).start(theta.half().float())[1]).norm() / slope.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_a_path_reaches_scikit_learn_s_optimum(
    rows: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, fit_intercept: bool
) -> None:
    X, y = rows[0].to(dtype), rows[1]
    Cs = [1e-3, 1.0, 300.0]
    path = list(PathSolver(DeviceRows(X, y, 6, fit_intercept=fit_intercept), tol=1e-7).path(Cs))
    assert torch.equal(X, rows[0].to(dtype))  # never written to
    for fitted in path:
        model = LogisticRegression(C=fitted.C, fit_intercept=fit_intercept, tol=1e-9, max_iter=10_000)
        model.fit(X.double().numpy(), y.numpy())
        best = objective(X, y, fitted.C, model.coef_, model.intercept_)
        assert objective(X, y, fitted.C, fitted.weights, fitted.intercepts) <= best * (1 + 1e-5)
        assert fitted.converged


def objective(X: torch.Tensor, y: torch.Tensor, C: float, weights: Any, intercepts: Any) -> float:
    logits = X.double() @ torch.as_tensor(weights).T + torch.as_tensor(intercepts)
    nll = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    return 0.5 * float((np.asarray(weights) ** 2).sum()) + C * float(nll)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_batched_blocks_are_the_blocks(draw: Any, fit_intercept: bool, weighted: bool) -> None:
    X, y = (torch.from_numpy(a) for a in draw(300, 20, 7))
    X = X.double() - X.double().mean(0)
    weights = torch.rand(300, dtype=torch.float64) if weighted else None
    f = Objective(RowSource.in_memory(X, y, weights), 7, fit_intercept=fit_intercept)
    f.strength = 0.5
    theta = 3 * torch.randn(7, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, three, all_at_once = (ClassBlocks(f, f.sample_logits(theta), batch) for batch in (1, 3, 7))
    torch.testing.assert_close(all_at_once.inverses, one.inverses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(three.inverses, one.inverses, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 4])
def test_blocks_that_need_a_jitter(batch: int) -> None:
    """Two equal columns and hardly any penalty: the first factorisation fails."""
    X = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).repeat(1, 2) * 1e3
    f = Objective(RowSource.in_memory(X, torch.arange(50) % 4), 4)
    f.strength = 1e-20
    blocks = ClassBlocks(f, f.sample_logits(f.zeros()), batch)
    assert blocks.inverses.isfinite().all()
    assert (blocks.inverses.diagonal(dim1=1, dim2=2) > 0).all()


def test_rows_that_are_not_finite_are_named(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    X = rows[0].clone()
    X[41] = torch.nan
    with pytest.raises(HeadError, match="41"):
        DeviceRows(X, rows[1], 6)
