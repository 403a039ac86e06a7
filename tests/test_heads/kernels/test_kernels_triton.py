"""The Triton kernel without a GPU: its results in Triton's interpreter, and its code as compiled for a Hopper GPU."""

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gpu_cases
import numpy as np
import pytest
import torch

from featcache.errors import HeadError, MissingExtraError
from heads.kernels import available, linear_nll
from heads.kernels.problem import Problem, pose
from heads.kernels.triton import require

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
SCRIPT = Path(__file__).parents[2] / "triton_on_host.py"
HOPPER_SHARED, HOPPER_REGISTERS = 227 * 1024, 65_536


def on_host(what: str) -> Any:
    done = subprocess.run([sys.executable, str(SCRIPT), what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def interpreted() -> dict[str, str]:
    recent = [tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")]
    if recent[0] < (3, 7) and recent[1] >= (2, 4):
        pytest.skip("Triton's interpreter before 3.7 fails with numpy 2.4: int() of an array of size one")
    return on_host("interpret")


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict[str, int]]:
    return on_host("compile")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [*gpu_cases.CASES, *gpu_cases.GRIDS])
def test_row_values_are_those_of_float64(interpreted: dict[str, str], name: str, dtype: torch.dtype) -> None:
    wrong = interpreted[f"{name}, {dtype}"]
    assert not wrong, wrong


def test_softmax_residuals_are_those_of_float64(interpreted: dict[str, str]) -> None:
    """Losses of likely labels to six digits, rows wider than a block, and no writes outside the logits."""
    cases = {name: wrong for name, wrong in interpreted.items() if name.startswith("residual")}
    assert len(cases) == 4
    assert not any(cases.values()), cases


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_rows_without_an_order_have_a_nan(interpreted: dict[str, str], bad: str) -> None:
    """A NaN or +inf logit, or nothing but -inf; the head beside it is not affected."""
    assert not interpreted[f"weights with {bad}"]


@pytest.mark.parametrize("grid", ["", "alphas, "])
@pytest.mark.parametrize("kind", ["bf16", "bf16, no best column", "fp16", "tf32", "fp32"])
def test_triton_kernels_compile_for_hopper(compiled: dict[str, dict[str, int]], kind: str, grid: str) -> None:
    """On tensor cores, fed by block copies, two blocks per multiprocessor, without spilling."""
    made = compiled[grid + kind]
    assert (made["wgmma"] > 0) == (kind != "fp32")  # IEEE float32 has no tensor core
    assert made["block copies"] > 0
    assert 2 * made["shared"] <= HOPPER_SHARED
    assert 2 * made["threads"] * made["registers"] <= HOPPER_REGISTERS
    assert made["stack"] == 0


def test_few_instructions_per_logit(compiled: dict[str, dict[str, int]]) -> None:
    """Next to half-precision products at D = 512, with 2048 multiply-adds per clock, 16 leave time to spare."""
    for kind, most in {"bf16": 14, "fp16": 14, "bf16, no best column": 11, "tf32": 16}.items():
        assert compiled[kind]["per logit"] <= most
    for kind, most in {"bf16": 16, "fp16": 16, "bf16, no best column": 13, "tf32": 16}.items():
        assert compiled[f"alphas, {kind}"]["per logit"] <= most  # and alpha


@pytest.mark.parametrize(("classes", "reads"), [(100, 1), (1000, 1), (21_843, 3)])
def test_softmax_residual_compiled_for_hopper(compiled: dict[str, dict[str, float]], classes: int, reads: int) -> None:
    """Each logit is read once (three times where a row is wider than a block) and written once, from registers."""
    made = compiled[f"residual, {classes} classes"]
    assert reads <= made["reads"] < reads + 0.5  # and labels
    assert 1 <= made["writes"] < 1.1
    assert made["stack"] == 0
    assert 2 * made["threads"] * made["registers"] <= HOPPER_REGISTERS
    assert made["per logit"] <= 16


def test_softmax_residual_takes_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from heads.solvers import primitives, triton_residual

    logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    assert not triton_residual.takes(logits)
    monkeypatch.setattr(primitives, "on_gpu", lambda column: True)
    monkeypatch.setattr(triton_residual, "takes", lambda logits: True)
    monkeypatch.setattr(triton_residual, "softmax_residual", lambda logits, labels: ("kernel", labels))
    assert primitives.softmax_residual(logits, labels)[0] == "kernel"
    monkeypatch.setattr(primitives, "_fused_residual", lambda: None)  # no Triton
    assert primitives.softmax_residual(logits, labels)[0][0].item() == pytest.approx(np.log(4))


def test_triton_refuses_features_on_the_cpu() -> None:
    problem = gpu_cases.posed(gpu_cases.CASES["ties"], torch.float32)
    with pytest.raises(HeadError, match="Ampere"):
        require(problem)
    assert "triton" not in available(problem)


@pytest.mark.parametrize(
    ("options", "reason"), [({"alphas": [2e4]}, "alphas up to 10000"), ({"ensemble": "probabilities"}, "average")]
)
def test_triton_refuses_unsupported_options(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = pose(torch.eye(3), [torch.eye(3)] * 2, [0, 1, 2], **options)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(HeadError, match=reason):
        require(cast(Problem, SimpleNamespace(**vars(problem) | {"features": on_a_gpu, "dtype": torch.float32})))


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "heads.kernels.triton", None)
    with pytest.raises(MissingExtraError, match="pip install triton"):
        linear_nll(torch.eye(2), torch.eye(2), [0, 1], impl="triton")
