"""Devices of ranks, and torch's two settings for TF32."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from featcache.processes import full_float32, local_device, tf32_allowed

CPU: Any = torch.backends.mkldnn
MATMUL: Any = torch.backends.cuda.matmul


@pytest.fixture
def switches() -> Iterator[None]:
    """Torch's switches as they were, after the test."""
    backends: tuple[Any, ...] = (torch.backends, MATMUL, CPU.matmul)
    before = [(backend, backend.fp32_precision) for backend in backends]
    yield
    for backend, precision in before:
        backend.fp32_precision = precision


@pytest.mark.parametrize(
    ("world", "rank", "device", "expected"),
    [
        (None, None, "cuda", "cuda"),
        ("1", "0", "cuda", "cuda"),
        ("4", "3", "cuda", "cuda:3"),
        ("4", "3", "cuda:1", "cuda:1"),
        ("4", "3", "cpu", "cpu"),
    ],
)
def test_cuda_is_the_gpu_of_the_local_rank(
    world: str | None, rank: str | None, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": world, "LOCAL_RANK": rank}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert local_device(device) == expected


@pytest.mark.parametrize(
    ("switch", "allowed"),
    [
        ("torch.set_float32_matmul_precision('highest')", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("torch.backends.fp32_precision = 'tf32'", True),
    ],
)
def test_either_switch_is_read(switch: str, allowed: bool) -> None:
    """In a process of its own: torch remembers which of the two was used."""
    code = f"import torch; {switch}; from featcache.processes import tf32_allowed; print(tf32_allowed())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(allowed), done.stderr


@pytest.mark.usefixtures("switches")
def test_full_float32_restores_the_settings() -> None:
    MATMUL.fp32_precision = "tf32"
    CPU.matmul.fp32_precision = "bf16"
    with full_float32():
        assert not tf32_allowed()
        assert CPU.matmul.fp32_precision == "ieee"
    assert tf32_allowed()
    assert CPU.matmul.fp32_precision == "bf16"


@pytest.mark.usefixtures("switches")
def test_full_float32_restores_the_settings_after_an_error() -> None:
    MATMUL.fp32_precision = "tf32"
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert tf32_allowed()
