"""Losses and penalties that the solver takes: binary cross entropy and a penalty per class, against scikit-learn."""

from typing import Any

import numpy as np
import pytest
import torch
from logistic_reference import reference
from scipy.optimize import minimize

from heads.solvers.logistic.lbfgs import Minimiser
from heads.solvers.logistic.losses import BinaryCrossEntropy, Loss, Multinomial
from heads.solvers.logistic.objective import Objective
from heads.solvers.logistic.rows import RowSource

LOSSES: dict[str, Loss] = {"multinomial": Multinomial(), "binary": BinaryCrossEntropy()}


def multi_label(draw: Any, n: int = 300, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and three labels that do not exclude each other."""
    X, y = draw(n, dim, 4)
    targets = np.stack([y == 0, y < 2, y % 2 == 1], axis=1)
    return torch.from_numpy(X).double(), torch.from_numpy(targets).double()


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_residual_and_curvature_are_autograds(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 4, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 3, 1, 1, 2])
    targets = labels if loss == "multinomial" else torch.nn.functional.one_hot(labels, 4).double()

    def total(z: torch.Tensor) -> torch.Tensor:
        if loss == "multinomial":
            return torch.nn.functional.cross_entropy(z, targets, reduction="sum")
        return (torch.log1p(torch.exp(z)) - targets * z).sum()

    value, residual = LOSSES[loss].value_and_residual(logits.clone(), targets)
    point = logits.clone().requires_grad_()
    total(point).backward()
    assert float(value.sum()) == pytest.approx(float(total(logits)), rel=1e-12)
    torch.testing.assert_close(residual, point.grad)
    hessian = torch.autograd.functional.hessian(total, logits)
    torch.testing.assert_close(LOSSES[loss].curvature(logits), torch.einsum("icic->ic", hessian))


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_binary_cross_entropy_is_one_logistic_regression_per_label(
    draw: Any, fit_intercept: bool, blocks: bool
) -> None:
    X, targets = multi_label(draw)
    rows, C = RowSource.in_memory(X, targets), 30.0
    minimiser = Minimiser(Objective(rows, 3, BinaryCrossEntropy(), fit_intercept=fit_intercept), tol=1e-13)
    minimiser._build_cost = 3.0 if blocks else float("inf")
    optimum = minimiser.solve(1.0 / C)
    assert optimum.converged
    assert (minimiser.builds > 0) == blocks
    for k in range(3):
        model = reference(X.numpy(), targets[:, k].numpy(), C, fit_intercept)
        np.testing.assert_allclose(optimum.theta[k, :-1], model.coef_[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(optimum.theta[k, -1], model.intercept_[0] if fit_intercept else 0.0, atol=1e-4)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_strength_per_class_is_scipys_optimum(draw: Any, loss: str) -> None:
    X, targets = multi_label(draw, n=120, dim=5)
    y = targets[:, :2].sum(dim=1).long() if loss == "multinomial" else targets
    strengths = torch.tensor([[0.02], [0.5], [4.0]], dtype=torch.float64)
    f = Objective(RowSource.in_memory(X, y), 3, LOSSES[loss])
    found = Minimiser(f, tol=1e-13).solve(strengths)

    def value(flat: Any) -> tuple[float, Any]:
        theta = torch.from_numpy(flat).reshape(3, 6).requires_grad_()
        logits = X @ theta[:, :-1].T + theta[:, -1]
        if loss == "multinomial":
            nll = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        else:
            nll = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        total = nll + 0.5 * (strengths * theta[:, :-1].square()).sum()
        total.backward()
        assert theta.grad is not None
        return float(total.detach()), theta.grad.numpy().ravel()

    best = minimize(
        value, np.zeros(18), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    )
    assert found.value == pytest.approx(best.fun, rel=1e-9)
    np.testing.assert_allclose(found.theta[:, :-1], best.x.reshape(3, 6)[:, :-1], atol=1e-3)
