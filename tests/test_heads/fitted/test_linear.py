"""LinearHead: checks, restriction, temperature, and interpolation between two of them."""

from typing import Any

import numpy as np
import pytest

from featcache.errors import HeadError, MismatchError
from heads import LinearHead, Ridge, ZeroShot, interpolate, subset_by_name

NAMES = ("ant", "bee", "cow")


def head(seed: int = 0, **fields: Any) -> LinearHead:
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(3, 4)), rng.normal(size=3), fields.pop("classnames", NAMES), **fields)


@pytest.mark.parametrize(
    ("weights", "bias", "message"),
    [
        (np.zeros((3, 4)), np.zeros(2), r"\(C, D\), \(C,\) and C names"),
        (np.zeros((2, 4)), np.zeros(2), "3 class names"),
        (np.zeros(3), np.zeros(3), "expected"),
        (np.full((3, 4), np.nan), np.zeros(3), "NaN"),
    ],
)
def test_shapes_must_match(weights: Any, bias: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        LinearHead(weights, bias, NAMES)


def test_restricting_keeps_the_logits_of_the_kept_classes() -> None:
    X = np.random.default_rng(1).normal(size=(5, 4))
    kept = head().restrict([2, 0])
    np.testing.assert_array_equal(kept.logits(X), head().logits(X)[:, [2, 0]])
    assert kept.classnames == ("cow", "ant")


@pytest.mark.parametrize("subset", [[0], [0, 0], [0, 3], [-1, 0], [0.0, 1.0], [[0, 1]]])
def test_bad_subsets_are_refused(subset: Any) -> None:
    with pytest.raises(HeadError, match="class"):
        head().restrict(subset)


def test_temperature_divides_logits() -> None:
    X = np.random.default_rng(1).normal(size=(5, 4))
    np.testing.assert_allclose(head().with_temperature(4.0).logits(X), head().logits(X) / 4.0, rtol=1e-5)
    with pytest.raises(HeadError, match="positive"):
        head().with_temperature(0.0)


def test_a_class_subset_may_be_given_by_name() -> None:
    assert subset_by_name(NAMES, ["cow", "ant"]) == [2, 0]
    with pytest.raises(MismatchError, match=r"missing \['fox'\]"):
        subset_by_name(NAMES, ["fox"])
    with pytest.raises(MismatchError, match=r"ambiguous \['ant'\]"):
        subset_by_name(("ant", "bee", "ant"), ["ant"])


def test_interpolation_is_linear_in_weights_and_logits() -> None:
    one, two, X = head(0), head(1), np.random.default_rng(1).normal(size=(50, 4))
    alphas = [0.0, 0.3, 1.0, 1.5]
    for alpha, between in zip(alphas, interpolate(one, two, alphas), strict=True):
        assert between.alpha == alpha
        np.testing.assert_allclose(
            between.weights, (1 - alpha) * one.weights + alpha * two.weights, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(between.logits(X), (1 - alpha) * one.logits(X) + alpha * two.logits(X), atol=1e-5)
    ends = interpolate(one, two, [0, 1])
    np.testing.assert_array_equal(ends[0].weights, one.weights)
    np.testing.assert_array_equal(ends[1].weights, two.weights)


def test_interpolation_is_bound_to_the_encoder_and_texts_of_its_ends(images: Any, texts: Any) -> None:
    zero_shot, ridge = ZeroShot().fit(texts()), Ridge().fit(images())
    (middle,) = interpolate(zero_shot, ridge, [0.5])
    assert middle.name == "zero_shot+ridge"
    middle.check(images())
    for change in ({"encoder_key": "enc-2"}, {"text_digests": ("text-2",)}):
        with pytest.raises(MismatchError):
            middle.check(images(**change))
    assert [entry["name"] for entry in middle.provenance["fitted_on"]] == ["texts", "animals"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (head(1, classnames=("ant", "cow", "bee")), "class 1: 'bee' against 'cow'; make both"),
        (LinearHead(np.zeros((3, 5)), np.zeros(3), NAMES), "takes 4 features.*takes 5"),
        (head(1, provenance={"encoder_key": "b"}), "belongs to encoder a"),
    ],
)
def test_ends_of_an_interpolation_must_match(other: LinearHead, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        interpolate(head(provenance={"encoder_key": "a"}), other, [0.5])


def test_interpolation_alpha_must_be_finite() -> None:
    with pytest.raises(HeadError, match="finite"):
        interpolate(head(0), head(1), [float("nan")])


def test_weights_of_any_float_type_are_kept_as_float32() -> None:
    for dtype in (np.float64, np.float32, np.float16):
        head = LinearHead(np.eye(2, dtype=dtype), np.zeros(2, dtype), ("cat", "dog"))
        assert {array.dtype.name for array in (head.weights, head.bias, head.logits(np.eye(2)))} == {"float32"}
