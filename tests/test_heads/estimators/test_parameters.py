"""The annotations of a constructor are checked alike in Python, by `--set` and in sweeps."""

from typing import Any, get_args

import numpy as np
import pytest
import torch

from featcache.errors import HeadError
from featcache.parameters import Parameter, Range
from heads import KNN, Logistic, Ridge
from heads.estimators.catalogue import HEADS, head_class, make_head, parameters_of


def outside(kind: Any) -> list[float]:
    """Numbers just outside the ranges in an annotation."""
    parts = get_args(kind)
    limits = [part for part in parts if isinstance(part, Range)]
    found = [number for part in parts if not isinstance(part, str | Range) for number in outside(part)]
    for limit in limits:
        whole = parts[0] is int
        if np.isfinite(limit.low):
            found.append(limit.low if limit.open else limit.low - 1 if whole else limit.low - 1e-9)
        if np.isfinite(limit.high):
            found.append(limit.high if limit.below else limit.high + 1 if whole else limit.high * (1 + 1e-9))
    return found


def bounded(head: str) -> list[tuple[Parameter, float]]:
    return [(found, bad) for found in parameters_of(head).values() for bad in outside(found.kind)]


@pytest.mark.parametrize("head", HEADS)
def test_values_outside_a_declared_range_are_refused_with_that_range(head: str) -> None:
    for parameter, bad in bounded(head):
        with pytest.raises(HeadError) as named:
            make_head(head, {parameter.name: bad})
        assert str(named.value) == f"{head}.{parameter.name} is {bad!r}, expected {parameter.expected}"


@pytest.mark.parametrize("head", [name for name in HEADS if head_class(name).fits_on == "images" and bounded(name)])
def test_fit_refuses_invalid_parameters_before_reading_rows(head: str) -> None:
    parameter, bad = bounded(head)[0]
    texts = {"texts": None} if head_class(head).takes_texts else {}
    with pytest.raises(HeadError, match=f"{head}.{parameter.name} is "):
        head_class(head)(**{parameter.name: bad}).fit(None, None, **texts)


@pytest.mark.parametrize("head", HEADS)
def test_the_defaults_are_in_range(head: str) -> None:
    make_head(head, {name: found.default for name, found in parameters_of(head).items()})


def test_arrays_tensors_and_their_scalars_are_taken_as_lists_and_numbers(draw: Any) -> None:
    X, y = draw(60, 8, 3)
    path = Ridge([0.1, 1.0]).fit(X, y)
    for alphas in (np.array([0.1, 1.0]), torch.tensor([0.1, 1.0], dtype=torch.float64), (0.1, 1.0)):
        np.testing.assert_array_equal(Ridge(alphas, fit_intercept=np.bool_(True)).fit(X, y).coef_, path.coef_)
    assert Logistic(np.float32(2.0)).fit(X, y).C_ == 2.0
    assert KNN(np.int64(3)).fit(X, y).n_neighbors_ == 3
