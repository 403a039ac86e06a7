"""Work per call, counted by torch's profiler on a CPU: operations, synchronisations, products, launches."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from heads.solvers.logistic.lbfgs import Minimiser
from heads.solvers.logistic.objective import Objective
from heads.solvers.logistic.rows import DeviceRows
from heads.solvers.ridge.leave_one_out import leave_one_out_errors
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import decompose


class Waits(TorchDispatchMode):
    """Counts the operations whose result, or whose shape, the host waits for on a GPU, and copies to another device."""

    OPERATIONS = frozenset(
        ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "bincount", "equal", "_unique2")
    )

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also count the methods that copy to the host, which do nothing that is dispatched on a CPU."""

        def counting(name: str) -> Callable[[torch.Tensor], Any]:
            method = getattr(torch.Tensor, name)

            def call(tensor: torch.Tensor) -> Any:
                self.called[name] += 1
                return method(tensor)

            return call

        for name in ("tolist", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, counting(name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, indices = func.name().removeprefix("aten::"), args[1] if len(args) > 1 else ()
        by_mask = name.startswith("index.") and any(i is not None and i.dtype == torch.bool for i in indices)
        moves = name == "_to_copy" and (kwargs or {}).get("device", args[0].device) != args[0].device
        if name in self.OPERATIONS or by_mask or moves:
            self.called[name] += 1
        return func(*args, **(kwargs or {}))


def descent(X: torch.Tensor, y: torch.Tensor, iterations: int) -> Minimiser:
    """A minimiser after some iterations from zero on rows of a device, which never builds blocks."""
    n_classes = int(y.max()) + 1
    source = DeviceRows(X, y, n_classes).source(np.arange(n_classes), n_classes, None)
    minimiser = Minimiser(Objective(source, n_classes), tol=1e-14, max_iter=iterations)
    minimiser._build_cost, minimiser._age = math.inf, 0
    minimiser.solve(1e-4)
    return minimiser


def counted(work: Callable[[], object]) -> Counter[str]:
    """Calls of torch's operations by name; `aten::_local_scalar_dense` is a number that the host waits for."""
    work()  # what is prepared once is not counted
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    return Counter(event.name for event in found.events() if event.name.startswith("aten::"))


def test_a_gradient_waits_once_however_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the objective, loss and penalty. Pieces take two products each, whatever the number of classes."""
    found = []
    for rows, classes in ((600, 6), (150, 6), (150, 30)):
        monkeypatch.setattr("heads.solvers.logistic.objective.PIECE_ROWS", rows)
        random = torch.Generator().manual_seed(0)
        X, y = torch.randn(600, 24, generator=random).half(), torch.arange(600) % classes
        f = Objective(DeviceRows(X, y, classes).source(np.arange(classes), classes, None), classes)
        theta = torch.randn(classes, 25, generator=random)
        found.append(counted(lambda f=f, theta=theta: f.value_and_gradient(theta)))  # type: ignore[misc]
    assert [count["aten::_local_scalar_dense"] for count in found] == [1, 1, 1]
    assert [count["aten::mm"] for count in found] == [2, 8, 8]
    assert sum(found[1].values()) == sum(found[2].values())
    assert sum((found[1] - found[0]).values()) <= 3 * 160  # operations of a piece, allocations among them
    assert (found[1] - found[0])["aten::empty"] + (found[1] - found[0])["aten::empty_strided"] <= 3 * 14


def test_an_iteration_of_l_bfgs_waits_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the objective, the curvature of the new pair, and the slope, however many pairs are kept."""
    random, found = torch.Generator().manual_seed(0), []
    X, y = torch.randn(600, 24, generator=random).half(), torch.arange(600) % 6
    plain = descent(X, y, 9)
    monkeypatch.setattr("heads.solvers.logistic.lbfgs.on_gpu", lambda column: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # it times iterations until the first build
    for iterations in (4, 9):
        waits = Waits()
        with monkeypatch.context() as patched, waits:
            waits.watch(patched)
            minimiser = descent(X, y, iterations)
        found.append(waits.called)
    assert minimiser.builds == 0
    assert found[1].total() - found[0].total() == 3 * 5
    torch.testing.assert_close(minimiser.theta, plain.theta, rtol=1e-4, atol=1e-5)


def test_iterations_are_not_timed_where_blocks_are_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing synchronises the device in every iteration until blocks are built."""
    monkeypatch.setattr("heads.solvers.logistic.lbfgs.on_gpu", lambda column: True)
    monkeypatch.setattr("heads.solvers.logistic.preconditioner._MAX_BYTES", 0)
    assert descent(torch.randn(60, 4).half(), torch.arange(60) % 3, 1)._ticks is None


def test_a_ridge_path_of_a_hundred_alphas_takes_as_many_operations_as_one_of_ten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from heads.solvers import parallel, primitives
    from heads.solvers.ridge import leave_one_out

    for module in (parallel, primitives, leave_one_out):
        monkeypatch.setattr(module, "on_gpu", lambda column: isinstance(column, torch.Tensor))
    X, y = torch.randn(700, 24, generator=torch.Generator().manual_seed(0)), torch.arange(700) % 6
    moments = Moments.from_blocks([(X, y)], dim=24, n_targets=6)

    def path(n_alphas: int) -> Counter[str]:
        alphas = np.logspace(-3, 3, n_alphas)
        return counted(lambda: leave_one_out_errors(decompose(moments), lambda: [(X, y)], alphas))

    assert path(10) == path(100)


@pytest.mark.parametrize("options", [{}, {"alphas": np.linspace(0, 1, 21).tolist()}])
def test_heads_and_alphas_are_one_launch(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stub for the Triton kernel, which returns the statistics of a confident and correct head."""
    pytest.importorskip("triton")
    from heads.kernels import triton
    from heads.kernels.problem import pose

    grids: list[tuple[int, int]] = []

    def launch(kernel: Any, device: torch.device, grid: tuple[int, int], arguments: Any, options: Any) -> None:
        grids.append(grid)
        assert options["enable_fp_fusion"]  # as the tests compile it, whatever Triton's default
        for out in arguments[5:10]:
            out.zero_()

    monkeypatch.setattr(triton, "_launch", launch)
    random, counts = torch.Generator().manual_seed(0), []
    for heads in (2,) if options else (1, 16):
        W = torch.randn(heads, 11, 8, generator=random).half()
        problem = pose(torch.randn(300, 8, generator=random).half(), W, torch.arange(300) % 11, **options)
        counts.append(counted(lambda problem=problem: triton.run(problem)))  # type: ignore[misc]
    assert set(grids) == ({(5, 3)} if options else {(3, 1), (3, 16)})
    assert len(grids) == 2 * len(counts)  # the call before counting, and the one counted
    assert len({count["aten::_local_scalar_dense"] for count in counts}) == 1
