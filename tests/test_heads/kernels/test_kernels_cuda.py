"""The CUDA kernel without a GPU: compiled by NVRTC and nvcc where they are, and run on the CPU through a host shim.

The shim (`cuda_on_host.h`) includes the very source that ships and lets a warp's 32 lanes take turns at every shuffle;
products come from torch. What needs a GPU (streams, devices, speed) is in tests/test_gpu.
"""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_cases
import numpy as np
import pytest
import torch

from featcache.errors import HeadError, MissingExtraError
from heads.kernels import available, linear_nll
from heads.kernels.cuda import KERNEL_OPTIONS, _run, kernel_source, pack, require, row_values, tile_shape
from heads.kernels.problem import pose

SHIM = Path(__file__).parent / "cuda_on_host.h"
C_TYPES = {np.uint64: ctypes.c_void_p, np.int32: ctypes.c_int, np.int64: ctypes.c_longlong}
LANES, THREADS = 32, 64


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Launches a kernel on the CPU, as `heads.kernels.cuda` launches it on a GPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("host")
    source, library = folder / "nll.cu", folder / "nll.so"
    source.write_text(kernel_source())
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, f'-DKERNEL_SOURCE="{source}"', "-x", "c++", str(SHIM), "-o", str(library)]
    subprocess.run(command, check=True)
    kernels = ctypes.CDLL(str(library))

    def launch(kernel: str, warps: int, *arguments: np.generic) -> None:
        values = [C_TYPES[type(value)](int(value)) for value in arguments]
        getattr(kernels, f"host_{kernel}")(-(-warps * LANES // THREADS), THREADS, *values)

    return launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*gpu_cases.CASES, *gpu_cases.GRIDS])
def test_row_values_are_those_of_float64(host: Any, name: str, dtype: torch.dtype) -> None:
    problem = gpu_cases.posed((gpu_cases.CASES | gpu_cases.GRIDS)[name], dtype)
    gpu_cases.assert_close(row_values(problem, pack(problem), host), problem)


@pytest.mark.parametrize("tile_bytes", [1, 4 * 128 * 136 + 1, 4 * 400 * 136])
@pytest.mark.parametrize("grid", [False, True])
def test_tiles_of_any_size_give_the_same_bits(host: Any, tile_bytes: int, grid: bool) -> None:
    """Tiles of some rows and some heads; integers, so that products do not depend on their shapes."""
    case = gpu_cases.Case(130, 8, 131, heads=2 if grid else 3, kind="ties", alphas=(0.5, 0.25) if grid else None)
    problem = gpu_cases.posed(case, torch.float32)
    whole = row_values(problem, pack(problem), host)
    tiled = row_values(problem, pack(problem), host, tile_bytes)
    for name in whole._fields:
        assert torch.equal(getattr(whole, name), getattr(tiled, name)), name


def test_a_tally_equals_that_of_the_reference(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, a class subset, heads with and without a bias."""
    monkeypatch.setattr("heads.kernels.cuda.CELLS", 64)
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(90, 12)).astype(np.float32), rng.normal(size=(3, 21, 12)).astype(np.float32)
    subset = [3, 20, 7, 0, 11]
    labels = rng.choice(subset, 90)
    options: dict[str, Any] = {
        "bias": [None, rng.normal(size=21).astype(np.float32), None],
        "logit_scale": [1.0, 2.0, 5.0],
        "class_subset": subset,
        "confusion": True,
        "per_sample": True,
    }
    found = _run(pose(X, W, labels, **options), host, 2**20)
    truth = linear_nll(X.astype(np.float64), W.astype(np.float64), labels, impl="reference", **options)
    for got, want in zip(found.results(), truth.results(), strict=True):
        assert got == pytest.approx(want, abs=2e-6)
    assert found.confusion is not None
    assert found.row_rank is not None
    np.testing.assert_array_equal(found.confusion, truth.confusion)
    np.testing.assert_array_equal(found.row_rank, truth.row_rank)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grid", [False, True])
def test_rows_without_an_order_have_a_nan(host: Any, bad: float, grid: bool) -> None:
    """A NaN or +inf logit, or nothing but -inf."""
    weights = np.ones((2, 70, 4), np.float32)
    weights[:, 69 if bad != -np.inf else slice(None), 0] = bad
    alphas = (0.25, 0.75) if grid else None
    problem = pose(np.ones((3, 4), np.float32), weights, [0, 1, 69], alphas=alphas)
    assert row_values(problem, pack(problem), host).nll.isnan().all()


@pytest.mark.parametrize("grid", [False, True])
def test_a_nan_row_is_named_with_confusion_counts_too(host: Any, grid: bool) -> None:
    """Its best column was outside the table of counts, and a table of 17 GB was allocated."""
    features = np.ones((4, 3), np.float32)
    features[2] = np.nan
    alphas = (0.0, 0.5) if grid else None
    problem = pose(features, np.ones((2, 7, 3), np.float32), [0, 1, 2, 3], alphas=alphas, confusion=True)
    tally = _run(problem, host)
    assert tally.confusion is not None
    assert tally.confusion.shape == (2, 7, 7)
    with pytest.raises(HeadError, match=r"NaN or infinity in rows \[2\]"):
        problem.refuse_nan(tally.nll)


def test_a_masked_label_is_infinitely_unlikely(host: Any) -> None:
    bias = np.zeros(70, np.float32)
    bias[[5, 9]] = -np.inf
    problem = pose(np.ones((1, 4), np.float32), np.ones((70, 4), np.float32), [9], bias=bias)
    found = row_values(problem, pack(problem), host)
    assert float(found.nll) == np.inf
    assert int(found.rank) == 69  # the other masked class ties, and comes first


def test_two_runs_agree_to_the_bit(host: Any) -> None:
    problem = gpu_cases.posed(gpu_cases.CASES["a thousand classes"], torch.float32)
    one, two = (row_values(problem, pack(problem), host) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize(("n", "heads", "stride"), [(1, 1, 8), (50_000, 1, 21_848), (10, 900, 1000), (7, 2, 10**7)])
@pytest.mark.parametrize("together", [False, True])
def test_tiles_cover_without_waste(n: int, heads: int, stride: int, together: bool) -> None:
    rows, columns = tile_shape(n, heads, stride, together=together, tile_bytes=24 * 2**20)
    assert 1 <= rows <= n
    assert columns == heads if together else 1 <= columns <= heads
    assert rows * columns * stride * 4 <= max(24 * 2**20, 4 * 128 * stride)


def test_features_on_a_cpu_are_refused() -> None:
    problem = gpu_cases.posed(gpu_cases.CASES["ties"], torch.float32)
    with pytest.raises(HeadError, match="takes them from a GPU"):
        require(problem)
    assert "cuda" not in available(problem)


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import heads.kernels.cuda as module

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingExtraError, match=r"featcache\[cuda\]"):
        module._cupy()


def test_a_cupy_that_cannot_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `impl="auto"` takes another implementation."""
    import heads.kernels.cuda as module

    def refuses(**_: Any) -> None:
        raise RuntimeError("CuPy failed to load libnvrtc.so.13:\nno such file")

    cuda = SimpleNamespace(Device=lambda i: nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, RawModule=refuses))
    module._module.cache_clear()
    features = SimpleNamespace(device=torch.device("cuda:0"))
    problem: Any = SimpleNamespace(features=features, dtype=torch.float32, mean_probabilities=False)
    with pytest.raises(HeadError, match=r"cannot compile .*libnvrtc.so.13: no such file\); use impl='chunked'"):
        require(problem)


def _nvrtc() -> ctypes.CDLL | None:
    """The run-time compiler of torch's CUDA builds, or of the system."""
    for path in Path(torch.__file__).parents[1].glob("nvidia/*/lib/libnvrtc.so.*"):
        return ctypes.CDLL(str(path))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvrtc_compiles_the_source(architecture: str) -> None:
    nvrtc = _nvrtc()
    if nvrtc is None:
        pytest.skip("no NVRTC")
    program = ctypes.c_void_p()
    source = kernel_source().encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"nll.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in KERNEL_OPTIONS)]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    assert not log.value.strip(), log.value.decode()  # no warning either
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    assert b"nll_heads" in cubin.raw
    assert b"nll_alphas" in cubin.raw


def test_nvcc_finds_enough_registers(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = tmp_path / "nll.cu"
    source.write_text(kernel_source())
    command = [
        nvcc,
        "-arch=sm_90",
        *KERNEL_OPTIONS,
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        str(tmp_path / "out"),
        str(source),
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2, report


@pytest.mark.parametrize("recent", [True, False])
def test_launches_go_to_torch_s_stream_and_device(recent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls to a stub of CuPy: source, device, stream and size of the grid."""
    import heads.kernels.cuda as module

    seen: list[Any] = []

    class Scope:
        def __init__(self, *what: Any) -> None:
            self.what = what

        def __enter__(self) -> None:
            seen.append(("enter", *self.what))

        def __exit__(self, *_: object) -> None:
            seen.append(("exit", *self.what))

    class RawModule:
        def __init__(self, code: str, options: tuple[str, ...]) -> None:
            assert code == kernel_source()
            assert options == KERNEL_OPTIONS
            assert "-ftz=true" in options  # which CuPy adds anyway; here, the tests compile with it, too

        def get_function(self, name: str) -> Any:
            return lambda grid, block, arguments: seen.append((name, grid, block, len(arguments)))

    class Stream:
        pass

    if recent:
        Stream.from_external = lambda stream: Scope("stream", *stream.__cuda_stream__())
    cuda = SimpleNamespace(
        Device=lambda i: Scope("device", i), Stream=Stream, ExternalStream=lambda a, i: Scope("old", a)
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, RawModule=RawModule))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    module._module.cache_clear()
    with module._launcher(torch.device("cuda:3")) as launch:
        del seen[: seen.index(("enter", "device", 3), 1)]  # what compiling entered
        launch("nll_heads", 9, np.int32(1))
    module._module.cache_clear()
    stream = ("stream", 0, 77) if recent else ("old", 77)
    assert seen == [
        ("enter", "device", 3),
        ("enter", *stream),
        ("nll_heads", (2,), (256,), 1),
        ("exit", *stream),
        ("exit", "device", 3),
    ]


def test_narrow_features_meet_wide_weights(host: Any) -> None:
    """Products are in the wider type, in which the features are exact and the weights are not rounded."""
    problem = gpu_cases.posed(gpu_cases.CASES["one class over a tile"], torch.float32)
    mixed = pose(problem.features.half(), list(problem.weights), problem.labels, bias=list(problem.biases))
    gpu_cases.assert_close(row_values(mixed, pack(mixed), host), mixed)
