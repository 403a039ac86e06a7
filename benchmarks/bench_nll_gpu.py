"""NLL, ranks, calibration and Brier score of linear heads on a GPU: our kernels against what people write.

All run in turn in one process on unit rows at logit scale 100, timed by CUDA events:

- product: the bare cuBLAS product of all heads into an array that exists already, rounded to the inputs' type;
- eager: torch with all logits of a head; "loss alone" is product and cross_entropy, "all" what `linear_nll` gives;
- compile: "all" under torch.compile;
- torch, cce, liger: fused linear cross entropies of torch (2.13 and later), cut-cross-entropy and Liger: loss alone;
- cuda, triton: ours through the door, heads packed and sums on the host included; "rows" are the kernels alone.

Then 21 interpolations of two heads against our own 21 calls and eager ones, and 21 heads on a training set of
ImageNet's size. Every figure is set against ceilings measured in the same process: a large product, a large copy.

    python -m benchmarks.bench_nll_gpu --out benchmarks/results/nll-gpu.json
    python -m benchmarks.bench_nll_gpu --device cpu --tiny
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch

from benchmarks.common import Work, at_least, at_most, benchmark_parser, median, report
from benchmarks.gpu_common import ceilings, device_facts, peak_mib, turns
from heads.kernels import linear_nll
from heads.kernels.problem import Problem, pose

FULL = {"N": 131_072, "D": 512, "C": 1000}
VALIDATION = 50_000
TINY = {"N": 200, "D": 16, "C": 50}
IMAGENET = 1_281_167
HEADS = (1, 8, 16)
N_ALPHAS = 21
SCALE = 100.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(n: int, dim: int, n_classes: int, n_heads: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Unit rows (N, D), heads (H, C, D) and labels whose weights are near their rows in every head."""
    random = torch.Generator(device).manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=random, device=device), dim=-1)

    W, y = unit(n_heads, n_classes, dim), torch.randint(n_classes, (n,), generator=random, device=device)
    W[1:] = torch.nn.functional.normalize(W[:1] + 0.5 * W[1:], dim=-1)
    X = torch.empty(n, dim, dtype=dtype, device=device)
    for rows in torch.arange(n, device=device).split(2**17):
        X[rows] = torch.nn.functional.normalize(W[0, y[rows]] + 4.0 * unit(len(rows), dim), dim=-1).to(dtype)
    return X, W.to(dtype), y


def loss_alone(X: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(SCALE * (X @ w.T).float(), y)


def everything(X: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sums of what a tally holds, from all logits (N, C) of a head, as people write it in float32."""
    z = SCALE * (X @ w.T).float()
    loss, target = torch.nn.functional.cross_entropy(z, y, reduction="sum"), z.gather(1, y[:, None])
    earlier = torch.arange(len(w), device=X.device) < y[:, None]
    rank = (z > target).sum(1) + ((z == target) & earlier).sum(1)
    p = z.softmax(1)
    own, confidence = p.gather(1, y[:, None])[:, 0], p.amax(1)
    brier, hit = (p.square().sum(1) - 2 * own + 1).sum(), rank == 0
    bins = (torch.ceil(confidence * 15).long() - 1).clamp(0, 14)
    gaps = confidence.new_zeros(15).scatter_add_(0, bins, hit.float() - confidence)
    hits = torch.zeros(len(w), dtype=torch.int64, device=X.device).scatter_add_(0, y, hit.long())
    return loss, brier, (rank < 5).sum(), hits, gaps


def peers(inputs: Inputs, left_out: dict[str, str]) -> dict[str, Work]:
    """Everything that is not ours, by name."""
    X, W, y = inputs
    flat = W.reshape(-1, X.shape[1])
    out = torch.empty(len(X), len(flat), dtype=X.dtype, device=X.device)

    def each_head(function: Callable[..., object]) -> Work:
        return lambda: [function(X, w, y) for w in W]

    works: dict[str, Work] = {
        "product": lambda: torch.mm(X, flat.T, out=out),
        "eager, loss alone": each_head(loss_alone),
        "eager, all": each_head(everything),
    }
    if X.is_cuda:
        works["compile, all"] = each_head(torch.compile(everything))
    else:
        left_out["compile"] = "timed on a GPU alone"
    for name, make in {"torch": _torch, "cce": _cut_cross_entropy, "liger": _liger}.items():
        try:
            if not X.is_cuda:
                raise RuntimeError("needs a GPU")
            function = make()
            function(X[:256], W[0], y[:256])
            works[name] = each_head(function)
        except Exception as error:  # whatever a peer raises where it is missing, or cannot take these inputs
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return works


def _torch() -> Callable[..., object]:
    function = torch.nn.functional.linear_cross_entropy  # an AttributeError before torch 2.13
    return lambda X, w, y: function(X * SCALE, w, y)


def _cut_cross_entropy() -> Callable[..., object]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda X, w, y: linear_cross_entropy(X * SCALE, w, y, impl="cce")


def _liger() -> Callable[..., object]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda X, w, y: loss(w, X * SCALE, y)


def ours(problem: Problem, call: Callable[[str], object], left_out: dict[str, str]) -> dict[str, Work]:
    """Our GPU implementations through the door and bare, or the CPU's; a reason in `left_out` for what cannot run."""
    works: dict[str, Work] = {}
    for name in ("cuda", "triton"):
        try:
            module = import_module(f"heads.kernels.{name}")
            module.require(problem)
            call(name)
        except Exception as error:  # a missing library, another device, or a kernel that this GPU cannot build
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            continue
        works[name] = lambda name=name: call(name)  # type: ignore[misc]
        works[f"{name}, rows"] = _bare(module, problem)
    if not works:
        works["auto"] = lambda: call("auto")
    return works


def _bare(module: Any, problem: Problem) -> Work:
    """Row statistics of heads that are packed already."""
    from heads.kernels.cuda import _launcher, pack

    packed = pack(problem)
    if module.__name__.endswith("triton"):
        return lambda: module.row_values(problem, packed)

    def work() -> None:
        with _launcher(problem.features.device) as launch:
            module.row_values(problem, packed, launch)

    return work


class Bench:
    """One run: seconds by name, bars and notes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: dict[str, int], rounds: int) -> None:
        self.device, self.dtype, self.sizes, self.rounds = device, dtype, sizes, rounds
        self.seconds: dict[str, list[float]] = {}
        self.bars: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.notes: dict[str, Any] = {}

    def heads(self, n_heads: int, limits: dict[str, float], rows: int | None = None) -> None:
        """H heads on N rows: all contestants."""
        title, n = f"H={n_heads}" + (f", {rows} rows" if rows else ""), rows or self.sizes["N"]
        inputs = draw(n, self.sizes["D"], self.sizes["C"], n_heads, self.dtype, self.device)
        mine = ours(pose(*inputs), lambda impl: linear_nll(*inputs, logit_scale=SCALE, impl=impl), self.left_out)
        works = {f"{title}, {k}": work for k, work in {**peers(inputs, self.left_out), **mine}.items()}
        found = turns(self.device, works, self.rounds)
        self.seconds |= found
        at = {name.removeprefix(f"{title}, "): median(values) for name, values in found.items()}
        others = {name: t for name, t in at.items() if name not in mine and name != "product"}
        cells = 2 * len(inputs[0]) * inputs[1].numel()
        for name in mine:
            self.notes[f"{title}, {name}: share of the product's ceiling"] = cells / at[name] / limits["FLOP/s"]
            self.notes[f"{title}, {name}: peak MiB beyond inputs"] = peak_mib(self.device, mine[name])
        best = min(mine, key=lambda name: at[name])
        self.notes[f"{title}: seconds over those of {best}"] = {name: t / at[best] for name, t in at.items()}
        if self.device.type == "cuda":
            if n_heads * self.sizes["C"] >= 8000:
                self.bar(f"{title}, {best} over the bare product", at[best] / at["product"], 1.15, below=True)
            self.bar(f"{title}, nearest peer over {best}", min(others.values()) / at[best], 1.0)

    def grid(self) -> None:
        """A path of interpolations of two heads."""
        sizes = self.sizes
        X, W, y = draw(sizes["N"], sizes["D"], sizes["C"], 2, self.dtype, self.device)
        alphas = np.linspace(0, 1, N_ALPHAS).tolist()
        between = [((1 - a) * W[0].float() + a * W[1].float()).to(self.dtype) for a in alphas]
        name = next(iter(ours(pose(X, W, y, alphas=alphas), lambda i: linear_nll(X, W, y, impl=i), {})))
        works: dict[str, Work] = {
            f"{N_ALPHAS} alphas, {name}": lambda: linear_nll(X, W, y, logit_scale=SCALE, alphas=alphas, impl=name),
            f"{N_ALPHAS} calls, {name}": lambda: [linear_nll(X, w, y, logit_scale=SCALE, impl=name) for w in between],
            f"{N_ALPHAS} times eager, all": lambda: [everything(X, w, y) for w in between],
        }
        found = turns(self.device, works, self.rounds)
        self.seconds |= found
        one, many, eager = (median(values) for values in found.values())
        if self.device.type == "cuda":
            self.bar("our own calls over the grid", many / one, 3.0)
            self.bar("eager calls over the grid", eager / one, 8.0)

    def imagenet(self, rows: int) -> None:
        """A resident training set and 21 heads."""
        inputs = draw(rows, self.sizes["D"], self.sizes["C"], N_ALPHAS, self.dtype, self.device)
        call = lambda impl: linear_nll(*inputs, logit_scale=SCALE, impl=impl)  # noqa: E731
        mine = ours(pose(*inputs), call, {})
        found = turns(self.device, {f"{rows} rows, 21 heads, {k}": w for k, w in mine.items()}, self.rounds, warmup=1)
        self.seconds |= found
        if self.device.type == "cuda":
            self.bar("ImageNet-train x 21 heads, s", min(median(v) for v in found.values()), 0.15, below=True)

    def agreement(self) -> None:
        """Largest error of a row's NLL against float64, on few rows."""
        X, W, y = draw(256, self.sizes["D"], self.sizes["C"], 2, self.dtype, self.device)
        wide = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in (X, W, y)]
        truth = linear_nll(*wide, logit_scale=SCALE, impl="reference", per_sample=True)
        for name in ("cuda", "triton") if self.device.type == "cuda" else ("auto",):
            if name not in self.left_out:
                found = linear_nll(X, W, y, logit_scale=SCALE, impl=name, per_sample=True)
                assert found.row_nll is not None
                assert truth.row_nll is not None
                self.notes[f"{name}: largest error of a row's NLL"] = float(np.abs(found.row_nll - truth.row_nll).max())

    def bar(self, name: str, value: float, bar: float, *, below: bool = False) -> None:
        """Note a bar: `value` is to be at least `bar`, or at most."""
        self.bars.append((at_most if below else at_least)(name, value, bar))


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=15)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu, which leaves out what needs a GPU")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tf32", action="store_true", help="let float32 products use TF32")
    parser.add_argument("--heads", type=int, nargs="+", default=HEADS)
    parser.add_argument("--tile-mib", type=float, help="bytes of the cuda implementation's tile, instead of its own")
    options = parser.parse_args()
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    if options.tile_mib:
        import heads.kernels.cuda as kernels

        kernels.TILE_BYTES = int(options.tile_mib * 2**20)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    sizes = TINY if options.tiny else FULL
    limits = ceilings(device, dtype, tiny=options.tiny)
    bench = Bench(device, dtype, sizes, options.rounds)
    for n_heads in options.heads:
        bench.heads(n_heads, limits)
    bench.heads(1, limits, rows=100 if options.tiny else VALIDATION)
    bench.grid()
    bench.imagenet(4 * sizes["N"] if options.tiny else IMAGENET)
    bench.agreement()
    extra = {"gpu": device_facts(device), "ceilings": limits, "left out": bench.left_out, **bench.notes}
    shown = {**sizes, "dtype": options.dtype, "tf32": options.tf32, "tile_mib": options.tile_mib}
    report("NLL of linear heads on a GPU", shown, bench.seconds, bars=bench.bars, extra=extra, out=options.out)


if __name__ == "__main__":
    main()
