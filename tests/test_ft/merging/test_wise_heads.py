"""The head of a merged model against plain numpy, plain and by Fisher information."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from featcache.errors import MismatchError
from ft.merging.wise import HEAD_BIAS, HEAD_WEIGHT, head_part, merged_head, tower_part
from heads import LinearHead

NAMES = ("ant", "bee", "cat")


def head(seed: int) -> LinearHead:
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(3, 5)), rng.normal(size=3), NAMES)


def information(seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {HEAD_WEIGHT: torch.from_numpy(rng.random((3, 5))), HEAD_BIAS: torch.from_numpy(rng.random(3))}


def constant(value: float) -> LinearHead:
    return LinearHead(np.full((3, 5), value), np.full(3, value), NAMES)


def test_the_published_value() -> None:
    half, two = ({name: torch.full_like(f, v) for name, f in information(0).items()} for v in (0.5, 2.0))
    for fishers, value in (((half, two), 2.263157894736842), ((), 1.6)):
        for found in merged_head(constant(1.0), [constant(3.0)], 0.3, fishers).values():
            np.testing.assert_allclose(found, value, rtol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_fisher_weights_each_element_with_a_floor(alpha: float) -> None:
    first, tuned, fishers = head(0), [head(1), head(2)], (information(3), information(4))
    found = merged_head(first, tuned, alpha, fishers, floor=0.3)
    for name, key, value in zip(("weights", "bias"), found, found.values(), strict=True):
        theta0, *others = (getattr(one, name).astype(np.float64) for one in (first, *tuned))
        theta1 = (others[0] + others[1]) / 2
        f0, f1 = (np.maximum(fisher[key].numpy(), 0.3) for fisher in fishers)
        wanted = ((1 - alpha) * f0 * theta0 + alpha * f1 * theta1) / ((1 - alpha) * f0 + alpha * f1)
        np.testing.assert_allclose(value, wanted, rtol=1e-14)


@pytest.mark.parametrize("alpha", [-0.5, 0.25, 1.5])
def test_without_fisher_heads_are_interpolated_plainly(alpha: float) -> None:
    first, tuned = head(0), [head(1), head(2), head(3)]
    without: tuple[Mapping[str, Any], ...] = ({}, {})
    for fishers in ((), without):
        weights, bias = merged_head(first, tuned, alpha, fishers).values()
        for found, name in ((weights, "weights"), (bias, "bias")):
            values = [getattr(one, name).astype(np.float64) for one in (first, *tuned)]
            np.testing.assert_allclose(found, (1 - alpha) * values[0] + alpha * np.mean(values[1:], axis=0), rtol=1e-13)


def test_a_fisher_of_one_head_alone_or_of_other_classes_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"Fisher of theta1 lacks head\.bias, head\.weight"):
        merged_head(head(0), [head(1)], 0.5, (information(0), {}))
    short = {name: value[:2] for name, value in information(0).items()}
    with pytest.raises(MismatchError, match=r"head\.bias \(3,\) against \(2,\)"):
        merged_head(head(0), [head(1)], 0.5, (short, short))


def test_a_fisher_file_holds_tower_and_head() -> None:
    state = {"visual.proj": torch.ones(1)} | information(0)
    assert head_part(state).keys() == information(0).keys()
    assert tower_part(state).keys() == {"visual.proj"}
