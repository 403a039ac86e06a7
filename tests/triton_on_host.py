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
    from heads.kernels.problem import pose
    from heads.kernels.triton import Shape, row_values

    found = {}
    for name, case in (gpu_cases.CASES | gpu_cases.GRIDS).items():
        for dtype in (torch.float32, torch.float16):  # the interpreter has no bfloat16 products
            problem = gpu_cases.posed(case, dtype)
            try:
                gpu_cases.assert_close(row_values(problem, pack(problem), Shape(*SMALL)), problem)
                found[f"{name}, {dtype}"] = ""
            except Exception:
                found[f"{name}, {dtype}"] = traceback.format_exc()
    for bad in (float("nan"), float("inf"), float("-inf")):
        weights = torch.ones(2, 70, 4)
        weights[1, slice(None) if bad == float("-inf") else 69, 0] = bad
        problem = pose(torch.ones(3, 4), weights, [0, 1, 69], confusion=True)
        rows = row_values(problem, pack(problem), Shape(*SMALL))
        fine = bool(rows.nll[0].isfinite().all() and rows.nll[1].isnan().all())
        found[f"weights with {bad}"] = "" if fine and int(rows.predicted.max()) < 70 else repr(rows)
    return found


def compile_only() -> dict[str, dict[str, Any]]:
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    from heads.kernels.triton import GRIDS, SHAPES

    return {
        "bf16": compiled("bf16", "tf32", SHAPES["half"]),
        "bf16, no best column": compiled("bf16", "tf32", SHAPES["half"], predict=False),
        "fp16": compiled("fp16", "tf32", SHAPES["half"]),
        "tf32": compiled("fp32", "tf32", SHAPES["tf32"]),
        "fp32": compiled("fp32", "ieee", SHAPES["ieee"]),
        "alphas, bf16": compiled("bf16", "tf32", GRIDS["half"], grid=True),
        "alphas, bf16, no best column": compiled("bf16", "tf32", GRIDS["half"], predict=False, grid=True),
        "alphas, fp16": compiled("fp16", "tf32", GRIDS["half"], grid=True),
        "alphas, tf32": compiled("fp32", "tf32", GRIDS["tf32"], grid=True),
        "alphas, fp32": compiled("fp32", "ieee", GRIDS["ieee"], grid=True),
    }


def compiled(kind: str, precision: str, shape: Any, predict: bool = True, grid: bool = False) -> dict[str, Any]:
    """Matrix instructions, shared memory, registers and stack of the kernel for a Hopper GPU at D = 512.

    Instructions are counted in the innermost straight stretch of machine code that takes an exponential of every logit
    of a block: the walk over the classes, with the products' own instructions in it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from heads.kernels.triton import GROUP, nll_alphas, nll_fused

    inputs = {"features": f"*{kind}", "weights": f"*{kind}", "bias": "*fp32", "scale": "*fp32", "labels": "*i64"}
    outputs = {"nll": "*fp32", "rank": "*i32", "confidence": "*fp32", "brier": "*fp32", "predicted": "*i32"}
    scalars = dict.fromkeys(("n", "classes", "stride", "feature_stride"), "i32")
    constants = {"D": 512, "HAS_BIAS": True, "PREDICT": predict, "PRECISION": precision}
    constants |= {"BLOCK_N": shape.rows, "BLOCK_C": shape.classes, "BLOCK_D": shape.features}
    kernel, per_group = nll_fused, 1
    if grid:
        kernel, per_group, constants["GROUP"] = nll_alphas, GROUP, GROUP
        scalars |= {"alphas": "*fp32", "n_alphas": "i32"}
    signature = inputs | outputs | scalars | dict.fromkeys(constants, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place in (*range(10), 12, 13)}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    fields = dict(pair.split(":") for pair in usage.split() if pair.count(":") == 1)
    ptx = made.asm["ptx"]
    return {
        "wgmma": ptx.count("wgmma.mma_async"),
        "block copies": ptx.count("cp.async.bulk.tensor"),
        "shared": made.metadata.shared,
        "registers": int(fields["REG"]),
        "threads": 32 * shape.warps,
        "stack": int(fields["STACK"]),
        "per logit": len(hottest(code)) / (per_group * shape.rows * shape.classes / (32 * shape.warps)),
    }


def hottest(code: str) -> list[str]:
    """The stretch without branches or labels that holds most exponentials, as machine instructions."""
    stretches: list[list[str]] = [[]]
    for line in code.splitlines():
        if line.startswith(".L_"):
            stretches.append([])
        elif line.lstrip().startswith("/*") and not line.lstrip().startswith("/* 0x"):
            stretches[-1].append(line)
            if " BRA " in line:
                stretches.append([])
    return max(stretches, key=lambda lines: sum("MUFU.EX2" in line for line in lines))


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_only}[sys.argv[1]]()))
