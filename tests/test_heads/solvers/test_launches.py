"""Work per call, counted by torch's profiler on a CPU: operations, synchronisations, products, launches."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from heads.solvers.logistic.objective import Objective
from heads.solvers.logistic.rows import DeviceRows
from heads.solvers.ridge.leave_one_out import leave_one_out_errors
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import decompose


def counted(work: Callable[[], object]) -> Counter[str]:
    """Calls of torch's operations by name; `aten::_local_scalar_dense` is a number that the host waits for."""
    work()  # what is prepared once is not counted
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    return Counter(event.name for event in found.events() if event.name.startswith("aten::"))


def test_a_gradient_waits_twice_however_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the loss and once for the penalty. Pieces take two products each, whatever the number of classes."""
    found = []
    for rows, classes in ((600, 6), (150, 6), (150, 30)):
        monkeypatch.setattr("heads.solvers.logistic.objective.PIECE_ROWS", rows)
        random = torch.Generator().manual_seed(0)
        X, y = torch.randn(600, 24, generator=random).half(), torch.arange(600) % classes
        f = Objective(DeviceRows(X, y, classes).source(np.arange(classes), classes, None), classes)
        theta = torch.randn(classes, 25, generator=random)
        found.append(counted(lambda f=f, theta=theta: f.value_and_gradient(theta)))  # type: ignore[misc]
    assert [count["aten::_local_scalar_dense"] for count in found] == [2, 2, 2]
    assert [count["aten::mm"] for count in found] == [2, 8, 8]
    assert sum(found[1].values()) == sum(found[2].values())
    assert sum((found[1] - found[0]).values()) <= 3 * 160  # operations of a piece, allocations among them
    assert (found[1] - found[0])["aten::empty"] + (found[1] - found[0])["aten::empty_strided"] <= 3 * 14


def test_a_ridge_path_asks_as_much_for_a_hundred_alphas_as_for_ten(monkeypatch: pytest.MonkeyPatch) -> None:
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
