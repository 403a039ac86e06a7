"""The annotations of a constructor are checked alike in Python, by `--set` and in sweeps."""

import pydoc
import re
from typing import Any, get_args

import numpy as np
import pytest
import torch

from featcache.errors import HeadError
from featcache.parameters import Parameter, Range
from heads import KNN, AdamW, Logistic, Ridge
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


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_says_what_it_allows(head: str) -> None:
    for parameter in parameters_of(head).values():
        assert "a value" not in parameter.expected, parameter.name


CV = "'loo', or a whole number from 2 to 2,147,483,647, or a list of values"
CLASS_WEIGHT = "'balanced', or an object {name: a number from 0}, or a list of numbers from 0, or null"


@pytest.mark.parametrize(
    ("parameter", "values", "expected"),
    [
        ("cv", [1, 2.5, "kfold", [], {"a": 1}], CV),
        ("class_weight", ["even", 2.0, [1.0, -1.0], [np.nan, 1.0], {"cat": -1}, {"cat": "x"}], CLASS_WEIGHT),
    ],
)
def test_folds_and_class_weights_are_refused_before_rows_are_read(parameter: str, values: Any, expected: str) -> None:
    for value in values:
        with pytest.raises(HeadError) as named:
            make_head("ridge", {parameter: value})
        assert str(named.value) == f"ridge.{parameter} is {value!r}, expected {expected}"


def test_folds_and_class_weights_in_every_form(draw: Any) -> None:
    X, y = draw(60, 8, 3)
    folds = np.arange(60) % 3
    splits = [(np.flatnonzero(folds != k), np.flatnonzero(folds == k)) for k in range(3)]
    given = [Ridge(cv=cv).fit(X, y).cv_errors_ for cv in (folds, torch.tensor(folds), folds.tolist(), splits)]
    for found in given[1:]:
        np.testing.assert_array_equal(found, given[0])
    weights = np.array([1.0, 2.0, 0.5], np.float32)
    forms = (weights, torch.tensor(weights), weights.tolist(), dict(enumerate(weights)), {"1": 2, "2": np.float64(0.5)})
    coefs = [Ridge([1.0], class_weight=form).fit(X, y).coef_ for form in forms]
    for coef in coefs[1:]:
        np.testing.assert_array_equal(coef, coefs[0])


def test_help_of_a_head_prints_its_ranges_and_choices() -> None:
    shown = pydoc.render_doc(AdamW, renderer=pydoc.plaintext)
    assert "OneOf('top1', 'nll', 'squared_error')" in shown
    assert "batch_size: typing.Annotated[int, Range(low=1, high=2147483647)] = 128" in shown
    assert not re.search(r"object at 0x|=inf|=-inf", shown)
