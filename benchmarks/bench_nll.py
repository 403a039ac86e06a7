"""NLL, ranks, recall, calibration and Brier score of linear heads: `heads.kernels` against what people write in torch.

All run in turn in one process, on unit rows at logit scale 100:

- product: the bare matrix product, one head after another into one array (N, C) that exists already; numpy's BLAS and
  torch's, and the faster of them is what the bars mean;
- eager: torch with all logits (N, C) of a head: product, cross_entropy, rank of the label, softmax, largest
  probability, Brier score and the counts of them, which is what `linear_nll` gives; and for scale "eager, loss and
  argmax": product, cross_entropy and argmax alone;
- compile: the same function under torch.compile, where a C++ compiler is;
- chunked: our plain torch implementation, block by block.

"fit" is cross entropy with its gradient by the weights, ours, eager torch's, and torch's own
``torch.nn.functional.linear_cross_entropy`` in blocks, where torch has it (2.13 and later).
Apple's cut-cross-entropy and Liger's fused linear cross entropy need a GPU, and give the loss alone. Peak memory is the
rise of a fresh process's high-water mark over its inputs.

    python -m benchmarks.bench_nll --out benchmarks/results/nll.json
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.common import Work, at_most, benchmark_parser, interleaved, median, ratio, report
from heads.kernels import linear_cross_entropy, linear_nll

SIZES = {"N": 50_000, "D": 512, "C": 1000}
TINY = {"N": 300, "D": 24, "C": 70}
HEADS = (1, 16)
N_ALPHAS = 21
SCALE = 100.0
BARS = {"product": 1.3, "eager": 0.75, "alphas": 6.0, "MiB": 64.0, "fit": 1.05}


class Inputs:
    """Unit rows, heads and labels, and output arrays of the bare product."""

    def __init__(self, sizes: dict[str, int], n_heads: int, dtype: torch.dtype = torch.float32) -> None:
        draw = np.random.default_rng(0)
        n, dim, n_classes = (sizes[key] for key in ("N", "D", "C"))
        X = draw.standard_normal((n, dim), np.float32)
        W = draw.standard_normal((n_heads, n_classes, dim), np.float32)
        X /= np.linalg.norm(X, axis=-1, keepdims=True)
        W /= np.linalg.norm(W, axis=-1, keepdims=True)
        self.y = torch.from_numpy(draw.integers(0, n_classes, n))
        self.X, self.W = torch.from_numpy(X).to(dtype), torch.from_numpy(W).to(dtype)


def eager_counts(X: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The metrics of `linear_nll` for one head, in torch with all logits."""
    z = SCALE * (X @ w.T).float()
    loss = torch.nn.functional.cross_entropy(z, y, reduction="sum")
    target = z.gather(1, y[:, None])
    rank = (z > target).sum(1) + ((z == target) & (torch.arange(z.shape[1]) < y[:, None])).sum(1)
    p = z.softmax(1)
    own, confidence = p.gather(1, y[:, None])[:, 0], p.amax(1)
    brier = (p.square().sum(1) - 2 * own + 1).sum()
    capped = -torch.log(own + 1e-8).sum()
    hit = (rank == 0).to(torch.int64)
    hits = torch.zeros(z.shape[1], dtype=torch.int64).scatter_add_(0, y, hit)
    bins = (torch.ceil(confidence * 15).long() - 1).clamp(0, 14)
    gaps = torch.zeros(15).scatter_add_(0, bins, hit - confidence)
    return loss, capped, brier, (rank < 5).sum(), hits, gaps


def loss_and_argmax(X: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Loss and argmax only."""
    z = SCALE * (X @ w.T).float()
    return torch.nn.functional.cross_entropy(z, y), (z.argmax(1) == y).sum()


def contestants(inputs: Inputs, *, compiled: bool = True) -> dict[str, Work]:
    """The methods to evaluate all heads, by name."""
    X, W, y = inputs.X, inputs.W, inputs.y
    out = torch.empty(len(X), W.shape[1], dtype=X.dtype)

    def each_head(function: Callable[..., object]) -> Work:
        return lambda: [function(X, w, y) for w in W]

    works: dict[str, Work] = {
        "ours": lambda: linear_nll(X, W, y, logit_scale=SCALE),
        "chunked": lambda: linear_nll(X, W, y, logit_scale=SCALE, impl="chunked"),
        "product, torch": each_head(lambda X, w, y: torch.mm(X, w.T, out=out)),
        "eager": each_head(eager_counts),
        "eager, loss and argmax": each_head(loss_and_argmax),
    }
    if X.dtype == torch.float32:
        array, rows = out.numpy(), X.numpy()
        works["product, numpy"] = each_head(lambda X, w, y: np.matmul(rows, w.numpy().T, out=array))
    if compiled:
        works["compile"] = each_head(torch.compile(eager_counts))
    return works


def alpha_contestants(inputs: Inputs) -> dict[str, Work]:
    """A path of interpolations of two heads, and a single head."""
    X, W, y = inputs.X, inputs.W, inputs.y
    alphas = np.linspace(0, 1, N_ALPHAS).tolist()
    between = [(1 - a) * W[0] + a * W[1] for a in alphas]
    return {
        "one head": lambda: linear_nll(X, W[0], y, logit_scale=SCALE),
        f"{N_ALPHAS} alphas": lambda: linear_nll(X, W, y, logit_scale=SCALE, alphas=alphas),
        f"{N_ALPHAS} alphas, one call each": lambda: [linear_nll(X, w, y, logit_scale=SCALE) for w in between],
    }


def fit_contestants(inputs: Inputs) -> dict[str, Work]:
    """Cross entropy of one head and its gradient by the weights."""
    X, W, y = inputs.X, inputs.W[0].clone().requires_grad_(), inputs.y

    def eager() -> None:
        torch.nn.functional.cross_entropy(SCALE * (X @ W.T), y).backward()

    works = {"fit, ours": lambda: linear_cross_entropy(X, W, y, logit_scale=SCALE).backward(), "fit, eager": eager}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        blocks = torch.nn.LinearCrossEntropyOptions()
        torchs = torch.nn.functional.linear_cross_entropy
        works["fit, torch in blocks"] = lambda: torchs(X, SCALE * W, y, options=blocks).backward()
    return works


def can_compile() -> str | None:
    """Why torch.compile does not run here, or None."""
    try:
        torch.compile(loss_and_argmax)(torch.eye(4), torch.eye(4), torch.arange(4))
    except Exception as error:  # whatever the compiler or its toolchain raises
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return None


def peak_mib(work: Work) -> float:
    """Peak increase of resident memory in MiB while `work` runs; Linux only."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name)))

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = field("VmRSS")
    work()
    return (field("VmHWM") - before) / 1024


def memory(sizes: dict[str, int], n_heads: int, threads: int, name: str) -> float:
    """`peak_mib` of one method, in a separate process."""
    arguments = [json.dumps(sizes), str(n_heads), str(threads), name]
    command = [sys.executable, "-m", "benchmarks.bench_nll", "--peak", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout.split()[-1])


def print_peak(sizes: dict[str, int], n_heads: int, threads: int, name: str) -> None:
    """Run by `memory`: compile and start the libraries' threads on few rows, then measure all rows."""
    limit_threads(threads)
    few, inputs = Inputs({**sizes, "N": 300}, n_heads), Inputs(sizes, n_heads)

    def make(given: Inputs) -> dict[str, Work]:
        if "fit" in name:
            return fit_contestants(given)
        return alpha_contestants(given) if "alphas" in name else contestants(given, compiled=name == "compile")

    make(few)[name]()
    print(peak_mib(make(inputs)[name]))


def limit_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    threadpool_limits(threads)


def agreement(inputs: Inputs) -> float:
    """Largest error of our NLL on the first rows, in nats, against float64."""
    kw: dict[str, Any] = {"logit_scale": SCALE, "per_sample": True}
    X, W, y = inputs.X[:500], inputs.W[:2], inputs.y[:500]
    truth = linear_nll(X.double(), W, y, impl="reference", **kw).row_nll
    found = linear_nll(X, W, y, **kw).row_nll
    assert found is not None
    assert truth is not None
    return float(np.abs(found - truth).max())


def judge(name: str, seconds: dict[str, list[float]], bars: list[dict[str, Any]]) -> None:
    """The bars for the times of one set of methods."""
    product = min((v for k, v in seconds.items() if k.startswith("product")), key=median)
    for key, other in (("product", product), ("eager", seconds["eager"])):
        value = median(seconds["ours"]) / median(other)
        bar = BARS[key]
        row = at_most(f"{name}: time over that of {key}", value, bar)
        bars.append(row | {"ratio": ratio(seconds["ours"], other)})


def options_of() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=int, help="N, instead of 50,000")
    parser.add_argument("--heads", type=int, nargs="*", default=HEADS, help="numbers of heads H")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = options_of()
    if options.peak:
        sizes, n_heads, threads, name = options.peak
        return print_peak(json.loads(sizes), int(n_heads), int(threads), name)
    limit_threads(options.threads)
    sizes = dict(TINY if options.tiny else SIZES) | ({"N": options.rows} if options.rows else {})
    refused = "left out" if options.no_compile or options.tiny else can_compile()
    seconds: dict[str, list[float]] = {}
    bars: list[dict[str, Any]] = []
    for n_heads in options.heads:
        inputs = Inputs(sizes, n_heads)
        times = interleaved(contestants(inputs, compiled=refused is None), options.rounds)
        seconds |= {f"H={n_heads}, {key}": value for key, value in times.items()}
        judge(f"H={n_heads}", times, bars)
    half = interleaved(contestants(Inputs(sizes, 1, torch.bfloat16), compiled=False), options.rounds)
    seconds |= {f"bfloat16 H=1, {key}": value for key, value in half.items()}
    pair = Inputs(sizes, 2)
    path = interleaved(alpha_contestants(pair), options.rounds)
    fits = interleaved(fit_contestants(pair), options.rounds)
    seconds |= path | fits
    if (peer := fits.get("fit, torch in blocks")) is not None:
        value = median(fits["fit, ours"]) / median(peer)
        row = at_most("fit: time over that of torch in blocks", value, BARS["fit"])
        bars.append(row | {"ratio": ratio(fits["fit, ours"], peer)})
    value = median(path[f"{N_ALPHAS} alphas"]) / median(path["one head"])
    bars.append(at_most(f"{N_ALPHAS} alphas over one head", value, BARS["alphas"]))
    extra: dict[str, Any] = {"largest error of a row's NLL": agreement(pair), "torch.compile": refused or "runs"}
    extra["cut-cross-entropy, Liger"] = "need a GPU"
    extra["peak MiB over inputs"] = peaks(sizes, options, bars)
    report(
        "NLL of linear heads", {**sizes, "threads": options.threads}, seconds, bars=bars, extra=extra, out=options.out
    )
    return None


def peaks(sizes: dict[str, int], options: argparse.Namespace, bars: list[dict[str, Any]]) -> dict[str, float]:
    """Peak memory of ours, of the path and of eager torch, on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    wanted = [(h, "ours") for h in options.heads] + [(2, f"{N_ALPHAS} alphas"), (1, "chunked"), (1, "eager")]
    wanted += [(1, name) for name in fit_contestants(Inputs({"N": 1, "D": 1, "C": 2}, 1))]
    if options.tiny:
        wanted = wanted[:1]
    found = {f"H={h}, {name}": memory(sizes, h, options.threads, name) for h, name in wanted}
    for key, value in found.items():
        if key.endswith((", ours", " alphas")) and "fit" not in key:
            bars.append(at_most(f"{key}: MiB", value, BARS["MiB"]))
    return found


if __name__ == "__main__":
    main()
