"""Runs the Triton kernel without a GPU, in a process of its own: interpreted (on a CPU), or compiled only.

    python tests/triton_on_host.py interpret     # a JSON object: case -> "" or what was wrong
    python tests/triton_on_host.py compile       # a JSON object: shape -> what the compiler made of it

Triton decides at import whether it interprets, hence the process.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SMALL = (16, 32, 16, 4, 1)  # rows, classes, features, warps, stages


def interpret() -> dict[str, str]:
    os.environ["TRITON_INTERPRET"] = "1"
    import gpu_cases
    import torch

    from heads.kernels.cuda import pack
    from heads.kernels.triton import Shape, row_values

    found = {}
    for name, case in gpu_cases.CASES.items():
        for dtype in (torch.float32, torch.float16):  # the interpreter has no bfloat16 products
            problem = gpu_cases.posed(case, dtype)
            try:
                gpu_cases.assert_close(row_values(problem, pack(problem), Shape(*SMALL)), problem)
                found[f"{name}, {dtype}"] = ""
            except Exception:
                found[f"{name}, {dtype}"] = traceback.format_exc()
    return found


def compile_only() -> dict[str, dict[str, Any]]:
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    from heads.kernels.triton import HALF, SINGLE

    return {
        "bf16": compiled("bf16", "tf32", HALF),
        "fp16": compiled("fp16", "tf32", HALF),
        "tf32": compiled("fp32", "tf32", SINGLE),
        "fp32": compiled("fp32", "ieee", SINGLE),
    }


def compiled(kind: str, precision: str, shape: Any) -> dict[str, Any]:
    """Matrix instructions, shared memory, registers and stack of the kernel for a Hopper GPU at D = 512."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from heads.kernels.triton import nll_fused

    inputs = {"features": f"*{kind}", "weights": f"*{kind}", "bias": "*fp32", "scale": "*fp32", "labels": "*i64"}
    outputs = {"nll": "*fp32", "rank": "*i32", "confidence": "*fp32", "brier": "*fp32", "predicted": "*i32"}
    scalars = dict.fromkeys(("n", "classes", "stride", "feature_stride"), "i32")
    constants = {"D": 512, "HAS_BIAS": True, "PREDICT": True, "PRECISION": precision}
    constants |= {"BLOCK_N": shape.rows, "BLOCK_C": shape.classes, "BLOCK_D": shape.features}
    signature = inputs | outputs | scalars | dict.fromkeys(constants, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place in (*range(10), 12, 13)}
    source = ASTSource(nll_fused, signature, constants, aligned)
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(pair.split(":") for pair in usage.split() if pair.count(":") == 1)
    ptx = kernel.asm["ptx"]
    return {
        "wgmma": ptx.count("wgmma.mma_async"),
        "asynchronous copies": ptx.count("cp.async"),
        "shared": kernel.metadata.shared,
        "registers": int(fields["REG"]),
        "stack": int(fields["STACK"]),
    }


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_only}[sys.argv[1]]()))
