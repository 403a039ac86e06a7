"""Ridge and logistic regression on features that are resident on a GPU, against the general solvers on the host.

Needs torch, numpy and pytest alone.
"""

import gpu_cases
import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CLASSES, ALPHAS = 20, np.logspace(-3, 3, 25)


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (20_000,), generator=random)
    means = torch.randn(CLASSES, 64, generator=random)
    noise = torch.randn(len(y), 64, generator=random) * torch.linspace(0, 1.5, 64).neg().exp()
    common = torch.randn(64, generator=random)
    X = torch.nn.functional.normalize(0.4 * means[y] + noise + 2 * common, dim=1).half()
    return X.cuda(), y.cuda()


def test_ridge_is_that_of_arrays(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    from heads.solvers.ridge.leave_one_out import leave_one_out_errors
    from heads.solvers.ridge.moments import Moments
    from heads.solvers.ridge.spectrum import decompose

    X, y = rows
    arrays = X.cpu().numpy(), y.cpu().numpy()
    found, truth, again = (Moments.from_blocks([b], dim=64, n_targets=CLASSES) for b in (rows, arrays, rows))
    np.testing.assert_allclose(found.xtx, truth.xtx, rtol=1e-11)
    np.testing.assert_allclose(found.class_sums, truth.class_sums, rtol=1e-10, atol=1e-9)
    assert np.array_equal(again.class_sums, found.class_sums)  # to the bit
    spectrum = decompose(found)
    errors = leave_one_out_errors(spectrum, lambda: [rows], ALPHAS)
    direct = leave_one_out_errors(spectrum, lambda: [arrays], ALPHAS, dtype=torch.float64)
    np.testing.assert_allclose(errors, direct, rtol=1e-7)


@pytest.mark.parametrize("allowed", [False, True])
def test_logistic_value_and_gradient_whatever_tf32(rows: tuple[torch.Tensor, torch.Tensor], allowed: bool) -> None:
    from heads.solvers.logistic.objective import Objective
    from heads.solvers.logistic.rows import DeviceRows, RowSource

    X, y = rows
    theta = 30 * torch.randn(CLASSES, 65, generator=torch.Generator().manual_seed(1)).cuda()
    device = DeviceRows(X, y, CLASSES)
    mean = torch.from_numpy(device.mean).cuda()
    want, slope = Objective(RowSource.in_memory(X.double() - mean, y), CLASSES).value_and_gradient(theta.double())
    with gpu_cases.tf32(allowed):
        source = device.source(np.arange(CLASSES), CLASSES, None)
        got, found = Objective(source, CLASSES).value_and_gradient(theta)
    assert got == pytest.approx(want, rel=1e-6)
    assert float((found - slope).norm() / slope.norm()) < 1e-5


def test_a_logistic_path_reaches_the_optima_found_on_the_host(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    from heads.solvers.logistic.path import PathSolver
    from heads.solvers.logistic.rows import DeviceRows, Rows

    X, y = rows
    Cs = [1e-3, 1.0, 1e3]
    host = Rows(X.cpu().double().numpy(), y.cpu().numpy(), CLASSES)
    for found, exact in zip(
        PathSolver(DeviceRows(X, y, CLASSES), tol=1e-7).path(Cs), PathSolver(host, tol=1e-10).path(Cs), strict=True
    ):
        assert found.converged
        assert found.objective == pytest.approx(exact.objective, rel=1e-5)
        assert np.abs(found.weights - exact.weights).max() < 0.02 * np.abs(exact.weights).max()


def test_memory_is_a_piece_and_the_blocks(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Logits of all rows would be 1.6 GB; a piece is 256 MiB, and there are a few of its size."""
    from heads.solvers.logistic.objective import Objective
    from heads.solvers.logistic.rows import DeviceRows

    X = rows[0].repeat(20, 1)
    y = torch.arange(len(X), device="cuda") % 1000
    objective = Objective(DeviceRows(X, y, 1000).source(np.arange(1000), 1000, None), 1000)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    objective.value_and_gradient(objective.zeros())
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30
