"""Shared by the GPU benchmarks: interleaved timing with CUDA events, measured peak rates, device facts.

On a CPU (``--device cpu``), the same functions use the clock, so that the benchmarks run anywhere.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.common import Work, clocked, interleaved, median


def turns(device: torch.device, works: Mapping[str, Work], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds per work and round; each round runs all works in turn, so that clock rate and heat affect them equally.

    On a GPU, work is timed by CUDA events, which includes host time if the device waits for the host.
    """
    return interleaved(works, rounds, warmup, seconds_of=partial(_seconds, device))


def _seconds(device: torch.device, work: Work) -> float:
    if device.type != "cuda":
        return clocked(work)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1e3


def ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> dict[str, float]:
    """Measured FLOP/s of a large product in `dtype`, and bytes/s (read and written) of a large copy.

    Sizes are small on a CPU, whose memory may be too small otherwise.
    """
    size, length = (8192, 2**30) if device.type == "cuda" and not tiny else (128, 2**16)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    works: dict[str, Work] = {"flop": lambda: torch.mm(a, b, out=out), "bytes": lambda: target.copy_(source)}
    seconds = {name: median(values) for name, values in turns(device, works, 10).items()}
    return {"FLOP/s": 2 * size**3 / seconds["flop"], "bytes/s": 2 * 4 * length / seconds["bytes"]}


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory, multiprocessors, L2 and versions of a GPU; only the type of other devices."""
    if device.type != "cuda":
        return {"device": device.type}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def peak_mib(device: torch.device, work: Work, *, beyond: bool = True) -> float | None:
    """Most MiB that torch held while `work` ran, beyond what it held before (or in all); None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if beyond else 0
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
