"""Threads of BLAS during a fit."""

from threading import Barrier

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits

from heads.solvers.parallel import (
    all_blas_threads,
    denormals_as_zero,
    map_pieces,
    one_blas_thread,
    side_by_side,
)


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_nested_limits_remember_the_threads_allowed_outside() -> None:
    with threadpool_limits(2, "blas"):
        with one_blas_thread(), one_blas_thread() as threads:
            assert threads == 2
            assert blas_threads() == {1}
            with all_blas_threads():
                assert blas_threads() == {2}
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_pieces_run_side_by_side_inside_a_fit_on_one_blas_thread() -> None:
    both = Barrier(2, timeout=10)

    def met_another(x: NDArray[np.float64]) -> int:
        both.wait()  # raises unless another piece runs at the same time
        return len(x)

    with threadpool_limits(2, "blas"), one_blas_thread():
        assert sum(map_pieces([(np.zeros((1000, 2)),)], met_another)) == 1000


def test_denormal_numbers_are_zero_inside_also_in_new_threads() -> None:
    tiny = torch.tensor(1e-40)
    with denormals_as_zero():
        with denormals_as_zero():
            assert list(side_by_side(4, 1, lambda _: float(tiny * 1.0), threads=2)) == [0.0] * 4
        assert float(tiny * 1.0) == 0.0
    assert float(tiny * 1.0) > 0.0
