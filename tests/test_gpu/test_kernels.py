"""The kernels on a GPU: numbers against float64, and what no CPU can show: streams, devices, memory, the whole door.

Needs torch, triton, cupy, numpy and pytest alone: ``python -m pytest -m gpu tests/test_gpu``.
"""

from importlib import import_module
from typing import Any

import gpu_cases
import numpy as np
import pytest
import torch

from featcache.errors import HeadError
from heads.kernels import linear_nll
from heads.kernels.cuda import _launcher, pack
from heads.kernels.problem import Problem
from heads.kernels.tally import RowStats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HALVES = [torch.float16, torch.bfloat16]
MIB = 2**20


def values(impl: str, problem: Problem) -> RowStats:
    module = import_module(f"heads.kernels.{impl}")
    module.require(problem)
    if impl == "triton":
        return module.row_values(problem, pack(problem))
    with _launcher(problem.features.device) as launch:
        return module.row_values(problem, pack(problem), launch)


def drawn(n: int, heads: int, classes: int, dtype: torch.dtype, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """Unit rows whose label's weights are near them, so that ranks and confidences are all over the place."""
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(heads, classes, 64, generator=generator), dim=-1)
    y = torch.randint(classes, (n,), generator=generator)
    X = torch.nn.functional.normalize(W[0, y] + 0.2 * torch.randn(n, 64, generator=generator), dim=-1)
    return X.to(device, dtype), W.to(device, dtype), y.to(device)


def wide(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t.cpu().double() if t.is_floating_point() else t.cpu() for t in tensors]


@pytest.fixture(params=["cuda", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"cuda": "cupy", "triton": "triton"}[request.param])
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", gpu_cases.CASES)
def test_row_values_are_those_of_float64(impl: str, name: str, dtype: torch.dtype) -> None:
    problem = gpu_cases.posed(gpu_cases.CASES[name], dtype, "cuda")
    gpu_cases.assert_close(values(impl, problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", gpu_cases.GRIDS)
def test_grids_are_those_of_float64(impl: str, name: str, dtype: torch.dtype) -> None:
    problem = gpu_cases.posed(gpu_cases.GRIDS[name], dtype, "cuda")
    gpu_cases.assert_close(values(impl, problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_linear_nll_agrees_with_the_reference(impl: str, dtype: torch.dtype) -> None:
    tensors = drawn(20_000, 3, 1000, dtype)
    options: dict[str, Any] = {"logit_scale": 40.0, "confusion": True}
    found = linear_nll(*tensors, impl=impl, **options)
    truth = linear_nll(*wide(tensors), impl="reference", **options)
    assert 0.2 < truth.results()[0]["top1"] < 0.98
    for got, want in zip(found.results(), truth.results(), strict=True):
        assert got == pytest.approx(want, abs=2e-4)  # a row whose two best logits meet may go either way
        assert got["nll"] == pytest.approx(want["nll"], abs=1e-5)
    assert found.confusion is not None
    assert truth.confusion is not None
    assert np.abs(found.confusion - truth.confusion).sum() <= 2 * 3 * 4


def test_linear_nll_of_a_grid_of_alphas_agrees_with_the_reference(impl: str) -> None:
    tensors = drawn(20_000, 2, 1000, torch.bfloat16)
    options: dict[str, Any] = {"logit_scale": 40.0, "alphas": gpu_cases.GRID}
    found = linear_nll(*tensors, impl=impl, **options)
    truth = linear_nll(*wide(tensors), impl="reference", **options)
    for got, want in zip(found.results(), truth.results(), strict=True):
        assert got["nll"] == pytest.approx(want["nll"], abs=1e-5)
        assert got["top1"] == pytest.approx(want["top1"], abs=2e-4)


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_follows_torch_s_switch(impl: str, allowed: bool) -> None:
    """TF32 keeps 11 bits of an input: the error says whether it was on."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no TF32")
    tensors = drawn(5_000, 1, 1000, torch.float32)
    with gpu_cases.tf32(allowed):
        found = linear_nll(*tensors, logit_scale=40.0, impl=impl, per_sample=True)
    truth = linear_nll(*wide(tensors), logit_scale=40.0, impl="reference", per_sample=True)
    assert found.row_nll is not None
    assert truth.row_nll is not None
    error = float(np.abs(found.row_nll - truth.row_nll).max())
    assert error < 0.1 if allowed else error < 1e-4
    assert not allowed or error > 1e-4


def test_two_runs_agree_to_the_bit(impl: str) -> None:
    tensors = drawn(30_000, 2, 1000, torch.bfloat16)
    one, two = (linear_nll(*tensors, logit_scale=40.0, impl=impl, per_sample=True) for _ in range(2))
    assert one.results() == two.results()
    assert one.row_nll is not None
    np.testing.assert_array_equal(one.row_nll, two.row_nll)


@pytest.mark.parametrize("grid", [False, True])
def test_logits_are_never_held_as_one_array(impl: str, grid: bool) -> None:
    """Sixteen heads on 100,000 rows have 6.4 GB of logits; 512 MiB hold tiles, row statistics and their sums."""
    tensors = drawn(100_000, 2 if grid else 16, 1000, torch.bfloat16)
    alphas = np.linspace(0, 1, 16).tolist() if grid else None
    linear_nll(*tensors, impl=impl, alphas=alphas)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_nll(*tensors, impl=impl, alphas=alphas)
    assert torch.cuda.max_memory_allocated() - before < 512 * MIB


def test_work_waits_for_its_stream(impl: str) -> None:
    """The features are written late, on a stream that is not the default one: a launch elsewhere would see NaN."""
    tensors = drawn(10_000, 2, 100, torch.float16)
    expected = linear_nll(*tensors, impl=impl).results()
    late = torch.full_like(tensors[0], torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        late.copy_(tensors[0])
        assert linear_nll(late, *tensors[1:], impl=impl).results() == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_device_is_that_of_the_features(impl: str) -> None:
    tensors = drawn(5_000, 2, 100, torch.float16)
    expected = linear_nll(*tensors, impl=impl).results()
    assert torch.cuda.current_device() == 0
    other = [t.to("cuda:1") for t in tensors]
    assert linear_nll(*other, impl=impl).results() == expected
    assert torch.cuda.current_device() == 0


def test_rows_with_gaps_and_labels_of_any_stride(impl: str) -> None:
    X, W, y = drawn(1_000, 2, 100, torch.float16)
    spread = torch.zeros(1_000, 80, dtype=X.dtype, device="cuda")
    spread[:, :64] = X
    columns = torch.stack([y, y], 1)
    assert linear_nll(spread[:, :64], W, columns[:, 0], impl=impl).results() == linear_nll(X, W, y, impl=impl).results()


def test_heads_wider_than_a_tile(impl: str) -> None:
    """ImageNet-21k's 21,843 classes: not a multiple of anything."""
    tensors = drawn(300, 2, 21_843, torch.float16)
    found = linear_nll(*tensors, logit_scale=40.0, impl=impl)
    truth = linear_nll(*wide(tensors), logit_scale=40.0, impl="reference")
    for got, want in zip(found.results(), truth.results(), strict=True):
        assert got["nll"] == pytest.approx(want["nll"], abs=2e-5)


def test_features_that_are_not_finite_are_named(impl: str) -> None:
    X, W, y = drawn(100, 2, 100, torch.float32)
    X[17] = torch.nan
    with pytest.raises(HeadError, match="17"):
        linear_nll(X, W, y, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_auto_agrees_with_the_chunked_path(dtype: torch.dtype) -> None:
    tensors = drawn(100, 2, 100, dtype)
    for got, want in zip(linear_nll(*tensors).results(), linear_nll(*tensors, impl="chunked").results(), strict=True):
        assert got == pytest.approx(want, abs=2e-5)
