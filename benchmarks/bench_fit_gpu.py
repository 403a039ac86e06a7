"""One ridge and one logistic fit on resident rows, against what else fits there: in turn, to a stated objective.

- scikit-learn's Ridge with `array_api_dispatch` on tensors, and cuML's LogisticRegression where it can be imported;
- a plain torch L-BFGS (strong Wolfe line search) on the same objective, its logits whole, to the same gap as ours or
  until 300 iterations.

What cannot run is in the record with the reason. Ratios are peers' seconds over ours, medians.

    python -m benchmarks.bench_fit_gpu --out benchmarks/results/fit-gpu.json
    python -m benchmarks.bench_fit_gpu --device cpu --tiny
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("SCIPY_ARRAY_API", "1")  # scikit-learn asks for it where it is to take tensors

import torch

from benchmarks.bench_solvers_gpu import draw, drawn_geometry
from benchmarks.common import Work, benchmark_parser, median, report
from benchmarks.gpu_common import device_facts, turns
from heads.solvers.logistic.path import PathSolver
from heads.solvers.logistic.rows import DeviceRows
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import decompose

FULL, TINY = {"N": 200_000, "D": 512, "C": 100}, {"N": 400, "D": 16, "C": 5}
ALPHA, PENALTY, TOL, STEPS = 1.0, 10.0, 1e-6, 300

Solution = tuple[torch.Tensor, torch.Tensor]


def objective(X: torch.Tensor, y: torch.Tensor, found: Solution) -> float:
    """``1/2 ||W||² + C sum NLL``, summed in float64."""
    weights, intercepts = (part.to(X.device, torch.float32) for part in found)
    nll = torch.nn.functional.cross_entropy(torch.addmm(intercepts, X, weights.T), y, reduction="none")
    return 0.5 * float(weights.double().square().sum()) + PENALTY * float(nll.double().sum())


def ours(X: torch.Tensor, y: torch.Tensor, n_classes: int) -> Solution:
    """Our path's one point, on float16 rows."""
    fitted = PathSolver(DeviceRows(X, y, n_classes), tol=TOL).fit(PENALTY)
    return torch.from_numpy(fitted.weights), torch.from_numpy(fitted.intercepts)


def plain(X: torch.Tensor, y: torch.Tensor, n_classes: int, enough: float) -> Solution:
    """torch.optim.LBFGS on the whole logits, stopped at the objective given or after `STEPS` iterations."""
    weights = torch.zeros(n_classes, X.shape[1] + 1, device=X.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=20, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        logits = torch.addmm(weights[:, -1], X, weights[:, :-1].T)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        total = (PENALTY * loss + 0.5 * weights[:, :-1].square().sum()) / len(X)
        total.backward()
        return total

    for _ in range(STEPS // 20):
        optimiser.step(closure)
        found = weights.detach()[:, :-1], weights.detach()[:, -1]
        if objective(X, y, found) <= enough:
            break
    return found


def cuml(X: torch.Tensor, y: torch.Tensor) -> Solution:
    """The L-BFGS of cuML."""
    from cuml.linear_model import LogisticRegression  # type: ignore[import-not-found]

    model = LogisticRegression(C=PENALTY, tol=1e-5, max_iter=1000, output_type="numpy").fit(X, y)
    return torch.as_tensor(model.coef_), torch.as_tensor(model.intercept_)


def sklearn_ridge(X: torch.Tensor, targets: torch.Tensor) -> object:
    """scikit-learn's Ridge on tensors, where they are."""
    import sklearn
    from sklearn.linear_model import Ridge

    with sklearn.config_context(array_api_dispatch=True):
        return Ridge(alpha=ALPHA, solver="svd").fit(X, targets).coef_


def our_ridge(X: torch.Tensor, y: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Moments, decomposition, weights (C, D)."""
    found = decompose(Moments.from_blocks([(X, y)], dim=X.shape[1], n_targets=n_classes)).solve(ALPHA)
    return torch.from_numpy(found[0])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything in turn, and the report."""
    device, sizes, left_out = torch.device(options.device), TINY if options.tiny else FULL, dict[str, str]()
    half, y = draw(drawn_geometry(sizes["D"], sizes["C"]), sizes["N"], 1.0, device)
    X, targets = half.float(), torch.nn.functional.one_hot(y, sizes["C"]).float()
    reached = {"logistic, ours": objective(X, y, ours(half, y, sizes["C"]))}
    enough = reached["logistic, ours"] * (1 + 1e-6)
    works: dict[str, Work] = {
        "logistic, ours": lambda: ours(half, y, sizes["C"]),
        "ridge, ours": lambda: our_ridge(half, y, sizes["C"]),
    }
    peers: dict[str, Callable[[], Any]] = {
        "logistic, torch L-BFGS": lambda: plain(X, y, sizes["C"], enough),
        "logistic, cuML": lambda: cuml(X, y),
        "ridge, scikit-learn": lambda: sklearn_ridge(X, targets),
    }
    notes: dict[str, Any] = {}
    for name, work in peers.items():
        try:
            found = work()
        except Exception as error:  # a missing library, or one that cannot take these tensors
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
            continue
        works[name] = work
        if name.startswith("logistic"):
            reached[name] = objective(X, y, found)
        else:
            apart = torch.as_tensor(found).cpu().double() - our_ridge(half, y, sizes["C"]).double()
            notes["ridge, scikit-learn: largest difference of weights"] = float(apart.abs().max())
    seconds = turns(device, works, options.rounds, warmup=1)
    at = {name: median(values) for name, values in seconds.items()}
    ratios = {name: at[name] / at[f"{name.partition(',')[0]}, ours"] for name in peers if name in at}
    extra = {"gpu": device_facts(device), "left out": left_out, "objectives": reached, "over ours": ratios, **notes}
    return report("fits on resident rows", sizes, seconds, bars=[], extra=extra, out=options.out)


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--device", default="cuda")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
