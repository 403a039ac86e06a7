"""Exact sums of float16 rows: against Python's integers, and what is left to float64."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from heads.solvers import primitives
from heads.solvers.ridge import moments
from heads.solvers.ridge.integer_sums import gram_and_class_sums
from heads.solvers.ridge.moments import Moments

Labels = NDArray[np.int64]


@pytest.fixture(autouse=True)
def on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, and machines without integer matrix units, whose products are exact, but slow."""
    monkeypatch.setattr(moments, "_MANY", 0)
    if not primitives._has_int8():
        monkeypatch.setattr(primitives, "_has_int8", lambda: True)
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())


def drawn(rows: int, dim: int, scale: float, wide: tuple[int, ...] = ()) -> tuple[NDArray[np.float16], Labels]:
    rng = np.random.default_rng(rows)
    X = scale * rng.standard_normal((rows, dim))
    X[:, list(wide)] *= 20
    return X.astype(np.float16), rng.integers(0, 4, rows)


def sums(X: NDArray[np.floating], y: Labels, classes: int = 4) -> tuple[NDArray[np.float64], ...] | None:
    found = gram_and_class_sums(torch.from_numpy(X), torch.from_numpy(y), classes)
    return None if found is None else tuple(part.numpy() for part in found)


@pytest.mark.parametrize("wide", [(), (5,), (0, 5, 31)])
@pytest.mark.parametrize("scale", [1e-6, 0.05, 0.12])
def test_equals_exact_arithmetic_to_half_a_unit_in_the_last_place(scale, wide):
    X, y = drawn(300, 32, scale, wide)
    found = sums(X, y)
    assert found is not None
    gram, by_class = found
    integers = np.ldexp(X.astype(np.float64), 24).astype(np.int64).astype(object)
    exact = integers.T @ integers  # Python's integers
    expected = np.array([[float(Fraction(v, 2**48)) for v in row] for row in exact])
    units = np.spacing(np.abs(expected)) if not wide else 2 * np.spacing(np.abs(expected).max())
    assert (np.abs(gram - expected) <= units).all()
    assert np.array_equal(gram, gram.T)
    assert np.array_equal(by_class, np.stack([X[y == c].astype(np.float64).sum(axis=0) for c in range(4)]))


def test_every_float16_has_its_digits():
    """Each finite float16 below 127 and its negative, smallest and largest included."""
    bits = np.arange(0x57F0 + 1, dtype=np.uint16)
    column = np.concatenate([bits, bits | 0x8000]).view(np.float16)
    for part in np.array_split(column, 4):
        X = np.zeros((len(part), 16), np.float16)
        X[:, 3], X[:, 4] = part, 2.0**-24  # the product with the smallest number adds up v
        found = sums(X, np.zeros(len(part), np.int64), classes=1)
        assert found is not None
        gram, by_class = found
        exact = int(np.ldexp(part.astype(np.float64), 24).sum())
        assert gram[3, 4] == np.ldexp(float(exact), -48)
        assert by_class[0, 3] == np.ldexp(float(exact), -24)
        assert gram[3, 3] == pytest.approx(float((part.astype(np.float64) ** 2).sum()), rel=1e-15)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 128.0])
def test_leaves_numbers_without_four_digits_to_float64(value):
    X, y = drawn(100, 16, 0.05)
    X[7, 2] = value
    assert sums(X, y) is None
    assert np.array_equal(
        Moments.from_blocks([(X, y)], dim=16, n_targets=4).xtx[2, 2], (X[:, 2].astype(np.float64) ** 2).sum(), True
    )


def test_leaves_rows_that_are_large_everywhere_to_float64():
    assert sums(*drawn(100, 16, 1.0)) is None


def test_integer_sums_are_used_only_for_float16():
    X, _ = drawn(100, 16, 0.05)
    assert primitives.integer_sums_pay(torch.from_numpy(X))
    assert not primitives.integer_sums_pay(torch.from_numpy(X).float())


def test_moments_of_float16_rows_are_those_of_the_same_rows_in_float64(monkeypatch):
    X, y = drawn(700, 24, 0.04, wide=(3,))
    found = Moments.from_blocks([(X, y)], dim=24, n_targets=4)
    monkeypatch.setattr(primitives, "_has_int8", lambda: False)
    plain = Moments.from_blocks([(X, y)], dim=24, n_targets=4)
    np.testing.assert_allclose(found.xtx, plain.xtx, rtol=1e-13, atol=1e-13 * plain.xtx.max())
    np.testing.assert_allclose(found.cross, plain.cross, rtol=1e-13, atol=1e-15)
    assert (found.counts.tolist(), found.rows) == (plain.counts.tolist(), plain.rows)


def test_a_pass_takes_integer_products_once_it_is_long(monkeypatch):
    X, y = drawn(300, 16, 0.05)
    taken = []
    pays = moments.integer_sums_pay

    def asked(rows):
        taken.append(len(rows))
        return pays(rows)

    monkeypatch.setattr(moments, "integer_sums_pay", asked)
    monkeypatch.setattr(moments, "_MANY", 150 * 16**2)
    Moments.from_blocks([(X[k : k + 100], y[k : k + 100]) for k in (0, 100, 200)], dim=16, n_targets=4)
    assert sum(taken) == 100  # the last block


def test_rows_that_are_views_of_others_give_the_same_sums():
    X, y = drawn(200, 16, 0.05)
    wider = np.concatenate([X, X], axis=1)
    expected, part, transposed = sums(X, y), sums(wider[:, :16], y), sums(np.asfortranarray(X), y)
    assert expected is not None
    assert part is not None
    assert transposed is not None
    assert np.array_equal(part[0], expected[0])
    assert np.array_equal(transposed[0], expected[0])
