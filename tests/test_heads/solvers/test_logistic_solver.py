"""Parts of the logistic solver against autograd: gradients, kept logits, preconditioner, streamed rows."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from logistic_reference import objective

from heads.solvers.logistic import lbfgs
from heads.solvers.logistic.lbfgs import Minimiser
from heads.solvers.logistic.objective import Line, Logits, Objective
from heads.solvers.logistic.path import PathSolver
from heads.solvers.logistic.precision import BFLOAT16, FLOAT16, FLOAT16_HALVES, FLOAT32, Precision, cheaper_on
from heads.solvers.logistic.preconditioner import ClassBlocks
from heads.solvers.logistic.rows import Block, DeviceRows, Rows, RowSource, StreamedRows
from heads.solvers.parallel import side_by_side


def problem(draw: Any, n: int = 50) -> tuple[Line, torch.Tensor]:
    X, y = draw(n, 7, 4)
    offset = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    theta = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows = torch.from_numpy(X.astype(np.float64))
    f = Objective(RowSource.in_memory(rows, torch.from_numpy(y), weights), 4, offset=offset)
    f.strength = 0.3
    return Line(f), theta


def penalised(f: Objective, theta: torch.Tensor, strength: float = 0.3) -> torch.Tensor:
    return nll_of(f, theta) + 0.5 * strength * theta[:, :-1].square().sum()


def nll_of(f: Objective, theta: torch.Tensor) -> torch.Tensor:
    X, y, weights = f.rows.sample
    assert f.offset is not None
    assert weights is not None
    whole = theta + f.offset
    nll = torch.nn.functional.cross_entropy(X @ whole[:, :-1].T + whole[:, -1], y, reduction="none")
    return (weights * nll).sum()


def test_gradient_is_autograds(draw: Any) -> None:
    line, theta = problem(draw)
    value, gradient = line.start(theta)
    point = theta.clone().requires_grad_()
    expected = penalised(line.objective, point)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-13)
    torch.testing.assert_close(gradient, point.grad, rtol=1e-12, atol=1e-12)


def test_methods_accept_known_logits(draw: Any) -> None:
    """Value and gradient with and without logits, against autograd; logits save products."""
    line, theta = problem(draw)
    f = line.objective
    logits = torch.empty(50, 4, dtype=torch.float64)
    for _ in f._pieces(f.product(theta, out=logits)):
        pass
    torch.testing.assert_close(logits, f.sample_logits(theta))
    value, gradient = f.value_and_gradient(theta)
    expected, slope = torch.autograd.functional.vjp(lambda point: penalised(f, point), theta)
    assert value == pytest.approx(float(expected), rel=1e-13)
    torch.testing.assert_close(gradient, slope)
    known: dict[int, Logits | None] = {0: None, 1: lambda piece: logits[piece.rows].clone()}
    for saved, of in known.items():
        f.products = 0
        assert f.value(theta, of) == pytest.approx(value, rel=1e-13)
        assert f.products == 1 - saved
        torch.testing.assert_close(f.value_and_gradient(theta, of)[1], gradient)
        assert f.products == 3 - 2 * saved


def test_along_a_direction_value_and_gradient_are_those_of_the_point(draw: Any) -> None:
    """Kept logits give what a fresh evaluation gives, over several accepted steps."""
    line, theta = problem(draw)
    fresh, _ = problem(draw)
    line.start(theta)
    for step in (0.25, 1.0, 0.5):
        direction = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        at_one = line.probe(direction)
        expected = fresh.start(theta + direction)
        assert at_one[0] == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(at_one[1], expected[1])
        expected = fresh.start(theta + step * direction)
        assert line.value(step) == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(line.value_and_gradient(step)[1], expected[1])
        theta = line.accept(step)
        if step == 0.5:
            torch.testing.assert_close(line.sample_logits(), fresh.sample_logits())


def test_blocks_are_the_inverses_of_the_hessians_diagonal_blocks(draw: Any) -> None:
    line, theta = problem(draw, n=14)  # up to 2 D rows count exactly
    f = line.objective
    line.start(theta)
    hessian = torch.autograd.functional.hessian(lambda point: nll_of(f, point), theta)
    blocks = ClassBlocks(f, line.sample_logits())
    for c in range(4):
        block = hessian[c, :, c, :] + 0.3 * torch.diag(torch.tensor([1.0] * 7 + [0.0], dtype=torch.float64))
        torch.testing.assert_close(blocks.inverses[c] @ block, torch.eye(8, dtype=torch.float64), atol=1e-6, rtol=0)


def test_blocks_reach_the_same_optimum_in_fewer_iterations(draw: Any) -> None:
    X, y = draw(400, 24, 6)
    rows = RowSource.in_memory(torch.from_numpy(X - X.mean(axis=0)).double(), torch.from_numpy(y))
    found = []
    for cost in (0.0, float("inf")):
        minimiser = Minimiser(Objective(rows, 6), tol=1e-10)
        minimiser._build_cost = cost or 3.0
        found.append(minimiser.solve(1e-3))
        assert (minimiser.builds > 0) == (cost == 0.0)
    assert found[0].value == pytest.approx(found[1].value, rel=1e-9)
    assert found[0].iterations < found[1].iterations


def test_pieces_side_by_side_equal_one_thread(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line, theta = problem(draw)
    whole = line.start(theta)
    monkeypatch.setattr("heads.solvers.logistic.objective.PIECE_ROWS", 7)
    line.objective.threads = 3
    pieces = line.start(theta)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-13)
    torch.testing.assert_close(pieces[1], whole[1])
    assert list(side_by_side(5, 2, lambda s: s.start, threads=2)) == [0, 2, 4]


def test_reaches_the_optimum_on_clip_features(real_features: Any) -> None:
    X, y = real_features
    X, y = X[::4], np.unique(y[::4], return_inverse=True)[1]
    n_classes, Cs = int(y.max()) + 1, [1.0, 316.0]
    exact = list(PathSolver(Rows(X.astype(np.float64), y, n_classes), tol=1e-13).path(Cs))
    for best, found in zip(exact, PathSolver(Rows(X.astype(np.float32), y, n_classes), tol=1e-7).path(Cs), strict=True):
        lowest = objective(X, y, best.C, best.weights, best.intercepts)
        assert -1e-9 <= objective(X, y, best.C, found.weights, found.intercepts) / lowest - 1.0 <= 1e-6


def streamed(X: Any, y: Any, n_classes: int, fit_intercept: bool = True, rows: int = 64) -> StreamedRows:
    buffer = np.empty((rows, X.shape[1]), X.dtype)

    def blocks() -> Any:
        for first in range(0, len(y), rows):
            part = X[first : first + rows]
            buffer[: len(part)] = part
            yield buffer[: len(part)], y[first : first + rows]

    return StreamedRows(blocks, X.shape[1], n_classes, fit_intercept=fit_intercept, dtype=torch.float64)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("with_prior", [True, False])
def test_rows_in_passes_reach_the_optimum_of_resident_rows(draw: Any, fit_intercept: bool, with_prior: bool) -> None:
    X, y = draw(500, 24, 6)
    rng, keep = np.random.default_rng(0), np.arange(500) % 5 != 0
    prior = (rng.normal(size=(6, 24)), rng.normal(size=6)) if with_prior else None
    whole = PathSolver(Rows(X.astype(float), y, 6, fit_intercept=fit_intercept), keep=keep, prior=prior, tol=1e-12)
    passes = PathSolver(streamed(X, y, 6, fit_intercept), keep=keep, prior=prior, tol=1e-12)
    for C in (0.1, 10.0, 1000.0):
        a, b = whole.fit(C), passes.fit(C)
        assert b.objective == pytest.approx(a.objective, rel=1e-10)
        np.testing.assert_allclose(b.weights, a.weights, atol=1e-3 * np.abs(a.weights).max())
    held = ~keep
    for rows in (whole.rows, passes.rows):
        centred = np.concatenate([x for x, _ in rows.centred(held)])
        np.testing.assert_allclose(centred, X[held].astype(float) - rows.mean, atol=1e-12)
        assert np.concatenate([labels for _, labels in rows.centred(held)]).tolist() == y[held].tolist()


def test_passes_value_and_gradient_are_those_of_resident_rows(draw: Any) -> None:
    X, y = draw(300, 7, 4)
    both = Rows(X.astype(float), y, 4), streamed(X, y, 4)
    f, g = (Line(Objective(rows.source(np.arange(4), 4, None), 4)) for rows in both)
    theta, direction = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps: list[Any] = [Line.start, Line.probe, Line.value_and_gradient]
    for step, argument in zip(steps, (theta, direction, 0.4), strict=True):
        a, b = step(f, argument), step(g, argument)
        assert b[0] == pytest.approx(a[0], rel=1e-12)
        torch.testing.assert_close(b[1], a[1])
    assert g.value(0.7) == pytest.approx(f.value(0.7), rel=1e-12)
    torch.testing.assert_close(g.accept(0.4), f.accept(0.4))
    torch.testing.assert_close(g.sample_logits(), f.sample_logits())  # few rows: the sample is all of them


def test_logits_over_the_limit_are_not_kept(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = draw(400, 24, 6)
    kept = PathSolver(Rows(X.astype(float), y, 6), tol=1e-12).fit(10.0)
    monkeypatch.setattr("heads.solvers.logistic.rows.LOGIT_BYTES", 1000)
    monkeypatch.setattr("heads.solvers.logistic.rows.SAMPLE_ROWS", 100)  # the preconditioner sees a quarter of the rows
    solver = PathSolver(Rows(X.astype(float), y, 6), tol=1e-12)
    assert not solver.minimiser.objective.rows.keep_logits
    assert len(solver.minimiser.objective.rows.sample.X) == 100
    assert solver.fit(10.0).objective == pytest.approx(kept.objective, rel=1e-10)


def test_preconditioners_of_sampled_rows_save_passes(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = draw(3000, 24, 6)
    monkeypatch.setattr("heads.solvers.logistic.rows.SAMPLE_ROWS", 600)
    products = []
    for cost in (float("inf"), 3.0):
        solver = PathSolver(streamed(X, y, 6, rows=1000), tol=1e-9)
        solver.minimiser._build_cost = cost
        solver.fit(1000.0)
        products.append(solver.minimiser.objective.products)
    assert products[1] < 0.7 * products[0]


def test_a_path_starts_from_the_nearest_solved_C(draw: Any) -> None:
    X, y = draw(300, 16, 5)
    solver = PathSolver(Rows(X.astype(float), y, 5), tol=1e-10)
    first, _, again = solver.fit(1.0), solver.fit(1000.0), solver.fit(1.001)
    assert again.iterations < first.iterations
    assert again.objective == pytest.approx(PathSolver(Rows(X.astype(float), y, 5), tol=1e-10).fit(1.001).objective)


def test_a_path_extrapolates_over_log_C_and_saves_products(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer products than from the nearest optimum, and the same minima."""
    X, y = draw(600, 32, 6)
    Cs, products = np.logspace(-1, 3, 9), []
    for extrapolating in (True, False):
        if not extrapolating:
            monkeypatch.setattr(
                PathSolver, "_start", lambda self, C: self.solved[min(self.solved, key=lambda c: abs(np.log(c / C)))]
            )
        solver = PathSolver(Rows(X.astype(float), y, 6), tol=1e-8)
        found = list(solver.path(Cs))
        products.append(solver.minimiser.objective.products)
        for fitted in (found[0], found[-1]):
            exact = PathSolver(Rows(X.astype(float), y, 6), tol=1e-12).fit(fitted.C)
            assert fitted.objective == pytest.approx(exact.objective, rel=1e-7)
    assert products[0] < 0.95 * products[1], products


def test_starting_from_the_optima_of_a_subset_of_the_rows_saves_products(draw: Any) -> None:
    X, y = draw(1000, 32, 6)
    rows, Cs, products = Rows(X.astype(float), y, 6), np.logspace(-1, 3, 9), []
    part = PathSolver(rows, keep=np.arange(1000) % 5 > 0, tol=1e-4)
    assert len(list(part.path(Cs))) == 9
    for near in ({}, part.solved):
        solver = PathSolver(rows, tol=1e-6)
        solver.begin_near(near)
        for fitted in solver.path(Cs):
            exact = PathSolver(rows, tol=1e-12).fit(fitted.C)
            assert fitted.objective == pytest.approx(exact.objective, rel=1e-5)
        products.append(solver.minimiser.objective.products)
    assert products[1] < 0.95 * products[0], products


def test_optima_of_a_part_that_lacks_a_class_are_not_used_as_start(draw: Any) -> None:
    X, y = draw(300, 16, 5)
    rows = Rows(X.astype(float), y, 5)
    part, whole = PathSolver(rows, keep=y > 0), PathSolver(rows, tol=1e-10)
    part.fit(1.0)
    whole.begin_near(part.solved)
    assert whole.fit(1.0).objective == PathSolver(rows, tol=1e-10).fit(1.0).objective


def test_the_start_lies_on_the_line_through_two_optima(draw: Any) -> None:
    X, y = draw(300, 16, 5)
    solver = PathSolver(Rows(X.astype(float), y, 5), tol=1e-10)
    solver.fit(1.0)
    one = solver._start(100.0)
    solver.fit(100.0)
    hundred = solver._start(100.0)
    for C, place in {1.0: 0.0, 10.0: 0.5, 1000.0: 1.5, 1e9: 2.0, 0.1: -0.5}.items():
        torch.testing.assert_close(solver._start(C), one + place * (hundred - one))


def test_a_single_float16_product_leads_and_exact_ones_finish(draw: Any) -> None:
    """The same optimum at every C with fewer exact passes; only exact passes if the last C needed few iterations."""
    X, y = draw(600, 32, 6)
    halves, labels, Cs = torch.from_numpy(X).half(), torch.from_numpy(y), [10.0, 1000.0]
    exact = list(PathSolver(Rows(halves.numpy().astype(float), y, 6), tol=1e-12).path(Cs))
    passes = []
    for cheaper in (None, FLOAT16):
        rows = DeviceRows(halves, labels, 6)
        assert rows.cheaper is None  # on a CPU
        rows.cheaper = cheaper
        solver = PathSolver(rows, tol=1e-7)
        f, used = solver.minimiser.objective, list[Precision]()
        read = f.rows.read

        def recorded(precision: Precision, used: list[Precision] = used, read: Any = read) -> Any:
            used.append(precision)
            return read(precision)

        f.rows = replace(f.rows, read=recorded)
        for best in exact:
            found = solver.fit(best.C)
            assert found.converged
            lowest = objective(halves.numpy(), y, best.C, best.weights, best.intercepts)
            assert -1e-9 <= objective(halves.numpy(), y, best.C, found.weights, found.intercepts) / lowest - 1 <= 1e-6
        passes.append(Counter(used))
    assert set(passes[0]) == {FLOAT16_HALVES}
    assert set(passes[1]) == {FLOAT16_HALVES, FLOAT16}
    assert passes[1][FLOAT16_HALVES] < passes[0][FLOAT16_HALVES], passes
    before = passes[1][FLOAT16]
    solver.minimiser._took = 5
    solver.fit(1e-3)
    assert used.count(FLOAT16) == before


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.float16, (7, 0), FLOAT16),
        (torch.float16, (6, 1), None),
        (torch.bfloat16, (9, 0), BFLOAT16),
        (torch.bfloat16, (7, 5), None),
        (torch.float32, (9, 0), None),
    ],
)
def test_tensor_cores_decide_whether_a_gpu_begins_with_cheap_products(
    dtype: torch.dtype, capability: tuple[int, int], expected: Precision | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cheaper_on(torch.device("cuda"), dtype) == expected
    assert cheaper_on(torch.device("cpu"), dtype) is None


def test_cheap_products_far_from_the_optimum_end_at_the_same_optimum(
    draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = draw(600, 32, 6)
    Cs = [0.1, 10.0, 1000.0]
    exact = list(PathSolver(Rows(X.astype(np.float64), y, 6), tol=1e-12).path(Cs))
    monkeypatch.setattr("heads.solvers.logistic.precision.LOW_WORK", 0)
    monkeypatch.setattr("heads.solvers.logistic.precision.has_bfloat16", lambda: True)
    solver = PathSolver(Rows(X.astype(np.float32), y, 6), tol=1e-7)
    f = solver.minimiser.objective
    used: list[Precision] = []
    read = f.rows.read

    def recorded(precision: Precision) -> Any:
        used.append(precision)
        return read(precision)

    f.rows = replace(f.rows, read=recorded)
    for best in exact:
        found = solver.fit(best.C)
        assert f.precision == FLOAT32
        lowest = objective(X, y, best.C, best.weights, best.intercepts)
        assert -1e-9 <= objective(X, y, best.C, found.weights, found.intercepts) / lowest - 1.0 <= 1e-6
    assert {FLOAT32, BFLOAT16} == set(used)
    wide = PathSolver(Rows(X.astype(np.float64), y, 6)).minimiser.objective
    assert wide.rows.cheaper is None  # float64 is asked for when float32 is not enough


def test_cheap_products_are_near_the_exact_ones(draw: Any) -> None:
    X, y = draw(300, 16, 4)
    rows, labels = torch.from_numpy(X.astype(np.float32)), torch.from_numpy(y)
    source = RowSource.in_memory(rows, labels)
    source = replace(source, read=lambda precision: iter([Block(rows.to(precision.dtype), labels)]))
    low, full = Line(Objective(source, 4)), Line(Objective(source, 4))
    theta, direction = torch.randn(2, 4, 17, generator=torch.Generator().manual_seed(0))
    for line in (low, full):
        line.objective.strength = 0.1
        line.start(theta)
    low.objective.precision = BFLOAT16
    (value, gradient), (expected, exact) = low.probe(direction), full.probe(direction)
    assert value != expected
    assert value == pytest.approx(expected, rel=1e-2)
    assert float((gradient - exact).norm() / exact.norm()) < 2e-2
    low.objective.precision = FLOAT32
    low.start(theta)
    torch.testing.assert_close(low.probe(direction)[1], exact)


def test_the_caller_s_tf32_switch_does_not_reach_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients with ten bits would stop far from the optimum."""
    matmul, seen = torch.backends.cuda.matmul, []
    solve = Minimiser.solve

    def watched(self: Minimiser, penalty: Any, tol: float | None = None) -> Any:
        seen.append(matmul.fp32_precision)
        return solve(self, penalty, tol)

    monkeypatch.setattr(Minimiser, "solve", watched)
    X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        PathSolver(Rows(X, np.arange(30) % 3, 3)).fit(1.0)
        assert (seen, matmul.fp32_precision) == (["ieee"], "tf32")
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(("build", "cost"), [(1.0, 8.0), (70.0, 64.0)])
def test_on_a_gpu_the_cost_of_a_build_is_timed(
    build: float, cost: float, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that takes as long as 70 iterations counts as 64. The test moves a fake clock."""
    now = [0.0]
    probe = Line.probe

    def slow_probe(self: Line, direction: torch.Tensor) -> Any:
        now[0] += 1.0
        return probe(self, direction)

    class SlowBlocks(ClassBlocks):
        def __init__(self, *args: Any) -> None:
            now[0] += build
            super().__init__(*args)

    monkeypatch.setattr(Line, "probe", slow_probe)
    monkeypatch.setattr(lbfgs, "ClassBlocks", SlowBlocks)
    monkeypatch.setattr(lbfgs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    line, _ = problem(draw)
    minimiser = Minimiser(line.objective, tol=1e-12)
    minimiser._ticks, minimiser._build_cost = [], 3.0
    minimiser.solve(1e-3)
    assert minimiser.builds
    assert minimiser._build_cost == cost
    assert minimiser._ticks is None


@pytest.mark.parametrize("C", [0.01, 1.0])
def test_a_far_weaker_penalty_does_not_end_where_it_began(C: float) -> None:
    """With the preconditioner of C = 1e-6 every gap looks small: the fit of C = 0.01 stopped where it started."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 4000)
    X = rng.normal(size=(10, 32))[y] + rng.normal(size=(4000, 32))
    rows = Rows((X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), y, 10)
    solver = PathSolver(rows, tol=1e-4)
    *_, found = solver.path([1e-6, C])
    assert solver.minimiser.builds
    assert found.objective == pytest.approx(PathSolver(rows).fit(C).objective, rel=1e-3)
