"""Run the Triton kernel without a GPU, in another process: interpreted on a CPU, or only compiled.

    python tests/triton_on_host.py interpret     # a JSON object: case -> "" or what was wrong
    python tests/triton_on_host.py compile       # a JSON object: shape -> what the compiler made of it

Triton decides at import whether it interprets, hence the process.
"""

import json
import os
import re
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
        assert rows.predicted is not None
        fine = bool(rows.nll[0].isfinite().all() and rows.nll[1].isnan().all())
        found[f"weights with {bad}"] = "" if fine and int(rows.predicted.max()) < 70 else repr(rows)
    return found | residuals()


def residuals() -> dict[str, str]:
    """`softmax_residual` of rows in one block and in several, likely labels and unlikely ones, against float64."""
    import torch

    from heads.solvers import triton_residual

    found, random = {}, torch.Generator().manual_seed(0)
    for n, classes, widest in ((1, 2, 64), (37, 100, 128), (9, 128, 128), (5, 300, 64)):
        logits, labels = 6 * torch.randn(n, classes, generator=random), torch.arange(n) * 7 % classes
        logits[::2].scatter_(1, labels[::2, None], 40.0)  # the other classes' share is as small as 1e-15
        logits[1:, 0] = float("-inf")  # a masked class, the label of the first row alone
        wide = logits.double()
        p, own = wide.softmax(1), wide.gather(1, labels[:, None])[:, 0]
        rest = wide.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
        loss, others = torch.nn.functional.softplus(rest - own), torch.sigmoid(rest - own)
        padded = torch.full((n, classes + 3), 7.0)
        padded[:, :classes] = logits
        losses, residual = triton_residual.softmax_residual(padded[:, :classes], labels, widest)
        truth = p.scatter(1, labels[:, None], -others[:, None])
        same = torch.allclose(losses.double(), loss, rtol=3e-6, atol=0) and torch.allclose(
            residual.double(), truth, rtol=2e-5, atol=1e-30
        )
        fine = same and residual.data_ptr() == padded.data_ptr() and bool((padded[:, classes:] == 7.0).all())
        found[f"residual, {n} x {classes} in {widest}"] = "" if fine else repr((losses, loss, residual, truth))
    return found


def compile_only() -> dict[str, dict[str, Any]]:
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")  # by source, options and version of Triton
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
        "residual, 100 classes": compiled_residual(100),
        "residual, 1000 classes": compiled_residual(1000),
        "residual, 21843 classes": compiled_residual(21_843),
    }


def compiled_residual(classes: int) -> dict[str, Any]:
    """Registers, stack, and how often a logit is read and written, of `softmax_residual`'s kernel."""
    from triton.compiler import ASTSource

    from heads.solvers.triton_residual import residual_rows, shape_of

    constants = shape_of(classes)
    pointers = {"logits": "*fp32", "labels": "*i64", "losses": "*fp32"}
    signature = pointers | dict.fromkeys(("n", "classes", "stride"), "i32") | dict.fromkeys(constants, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 5)}
    made, fields, code = built(ASTSource(residual_rows, signature, constants, aligned), {"num_warps": 4})
    words = constants["ROWS"] * constants["BLOCK"] / 128
    return {
        "registers": int(fields["REG"]),
        "threads": 128,
        "stack": int(fields["STACK"]),
        "shared": made.metadata.shared,
        "reads": moved("LDG", code) / words,
        "writes": moved("STG", code) / words,
        "per logit": sum(" BRA" not in line for line in code.splitlines() if line.lstrip().startswith("/*0")) / words,
    }


def moved(instruction: str, code: str) -> int:
    """Words of four bytes that a thread moves by this machine instruction, if every loop is gone through once."""
    widths = re.findall(rf" {instruction}\.E(?:\.[A-Z0-9]*?)*?(\.64|\.128)?(?:\.\w+)* ", code)
    return sum({"": 1, ".64": 2, ".128": 4}[width] for width in widths)


def compiled(kind: str, precision: str, shape: Any, predict: bool = True, grid: bool = False) -> dict[str, Any]:
    """Matrix instructions, shared memory, registers and stack of the kernel for a Hopper GPU at D = 512.

    Instructions are counted in the innermost straight stretch of machine code that takes an exponential of every logit
    of a block: the walk over the classes, with the products' own instructions in it.
    """
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
    made, fields, code = built(source, {"num_warps": shape.warps, "num_stages": shape.stages})
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


def built(source: Any, options: dict[str, int]) -> tuple[Any, dict[str, str], str]:
    """A kernel compiled for a Hopper GPU, the resources that it uses, and its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options | {"enable_fp_fusion": True})
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return made, dict(pair.split(":") for pair in usage.split() if pair.count(":") == 1), code


def hottest(code: str) -> list[str]:
    """The basic block with most exponentials, as machine instructions."""
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
