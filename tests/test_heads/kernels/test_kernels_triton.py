"""The Triton kernel without a GPU: its logic in Triton's interpreter, its shape as compiled for a Hopper GPU."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_cases
import pytest
import torch

from featcache.errors import HeadError, MissingExtraError
from heads.kernels import available, linear_nll
from heads.kernels.triton import require

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
SCRIPT = Path(__file__).parents[2] / "triton_on_host.py"
HOPPER_SHARED = 227 * 1024


def on_host(what: str) -> Any:
    done = subprocess.run([sys.executable, str(SCRIPT), what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def interpreted() -> dict[str, str]:
    return on_host("interpret")


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict[str, int]]:
    return on_host("compile")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", gpu_cases.CASES)
def test_row_values_are_those_of_float64(interpreted: dict[str, str], name: str, dtype: torch.dtype) -> None:
    wrong = interpreted[f"{name}, {dtype}"]
    assert not wrong, wrong


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32", "fp32"])
def test_it_compiles_for_hopper(compiled: dict[str, dict[str, int]], kind: str) -> None:
    """On the tensor cores, with a copy pipeline, inside shared memory and without spilling."""
    made = compiled[kind]
    assert (made["wgmma"] > 0) == (kind != "fp32")  # IEEE float32 has no tensor core
    assert made["asynchronous copies"] > 0
    assert made["shared"] <= HOPPER_SHARED
    assert made["stack"] == 0


def test_what_it_does_not_take() -> None:
    problem = gpu_cases.posed(gpu_cases.CASES["ties"], torch.float32)
    with pytest.raises(HeadError, match="Ampere"):
        require(problem)
    assert "triton" not in available(problem)


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "heads.kernels.triton", None)
    with pytest.raises(MissingExtraError, match="pip install triton"):
        linear_nll(torch.eye(2), torch.eye(2), [0, 1], impl="triton")
