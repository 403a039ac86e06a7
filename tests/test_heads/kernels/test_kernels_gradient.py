"""Cross entropy with gradients in blocks: gradcheck, torch's own gradients, and the memory of 21,843 classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.bench_nll import peak_mib
from featcache.errors import HeadError
from heads.kernels import gradient, linear_cross_entropy, linear_nll


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen rows per block, so that a few rows make several blocks."""
    monkeypatch.setattr(gradient, "_CELLS", 1)


def inputs(
    n: int = 37, dim: int = 5, n_classes: int = 7, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(n + n_classes)
    values = {
        "features": torch.randn(n, dim, generator=draw, dtype=torch.float64),
        "weights": torch.randn(n_classes, dim, generator=draw, dtype=torch.float64),
        "bias": torch.randn(n_classes, generator=draw, dtype=torch.float64),
        "logit_scale": torch.tensor(3.0, dtype=torch.float64),
    }
    return {key: value.to(dtype).requires_grad_() for key, value in values.items()}


def eager(values: dict[str, torch.Tensor], labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits = values["logit_scale"] * (values["features"] @ values["weights"].T) + values["bias"]
    return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("n", "n_classes"), [(37, 7), (1, 2), (16, 3)])
def test_gradients_equal_finite_differences(n: int, n_classes: int, reduction: str) -> None:
    values, labels = inputs(n, 4, n_classes), torch.arange(n) % n_classes

    def loss(features: Any, weights: Any, bias: Any, scale: Any) -> torch.Tensor:
        return linear_cross_entropy(features, weights, labels, bias=bias, logit_scale=scale, reduction=reduction)

    assert torch.autograd.gradcheck(loss, tuple(values.values()))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_torchs_and_no_worse_than_eager_ones(dtype: torch.dtype) -> None:
    ours, naive = inputs(dtype=dtype), inputs(dtype=dtype)
    truth = {key: value.detach().double().requires_grad_() for key, value in ours.items()}
    labels = torch.arange(37) % 7
    losses = [linear_cross_entropy(**ours, labels=labels), eager(naive, labels), eager(truth, labels)]
    for loss in losses:
        loss.backward()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    assert abs(losses[0].item() - losses[2].item()) <= abs(losses[1].item() - losses[2].item()) + tolerance
    for key, exact in truth.items():
        found, plain = ours[key].grad, naive[key].grad
        assert found is not None
        assert plain is not None
        assert exact.grad is not None
        assert found.dtype == dtype
        size = exact.grad.abs().max()
        error, naive_error = ((g.double() - exact.grad).abs().max() for g in (found, plain))
        assert error <= naive_error + tolerance * size, key


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    values, labels = inputs(), torch.arange(37) % 7
    frozen = values["features"].detach()
    linear_cross_entropy(frozen, values["weights"], labels).backward()
    assert frozen.grad is None
    assert values["weights"].grad is not None
    assert not linear_cross_entropy(frozen, values["weights"].detach(), labels).requires_grad


def test_the_loss_is_the_nll_of_the_tally() -> None:
    values, labels = inputs(), torch.arange(37) % 7
    loss = linear_cross_entropy(**values, labels=labels)
    tally = linear_nll(values["features"], values["weights"], labels, bias=values["bias"], logit_scale=3.0)
    assert loss.item() == pytest.approx(tally.results()[0]["nll"], rel=1e-12)


def test_invalid_arguments_are_refused() -> None:
    X, W, y = torch.eye(3), torch.eye(3), torch.arange(3)
    with pytest.raises(HeadError, match="'mean', 'sum' or 'none'"):
        linear_cross_entropy(X, W, y, reduction="max")
    with pytest.raises(HeadError, match="expected one number"):
        linear_cross_entropy(X, W, y, logit_scale=torch.ones(2))
    with pytest.raises(HeadError, match="expected \\[0, 2\\]"):
        linear_cross_entropy(X, W, y + 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_a_head_of_21843_classes_is_evaluated_in_little_memory(impl: str) -> None:
    """1,500 rows of logits would be 125 MiB, and several times that in eager torch."""
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((1500, 16), np.float32), rng.standard_normal((21_843, 16), np.float32)
    y = rng.integers(0, 21_843, 1500)
    linear_nll(X[:10], W, y[:10], impl=impl)  # compiles
    assert peak_mib(lambda: linear_nll(X, W, y, impl=impl)) < 64


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
def test_a_head_of_21843_classes_is_fitted_in_little_memory() -> None:
    """1,500 rows of logits would be 125 MiB; their softmax and its gradient as much again."""
    X = torch.randn(1500, 16)
    W = torch.randn(21_843, 16, requires_grad=True)
    y = torch.randint(0, 21_843, (1500,))

    def step() -> None:
        linear_cross_entropy(X, W, y).backward()

    step()
    assert peak_mib(step) < 64
    assert W.grad is not None
