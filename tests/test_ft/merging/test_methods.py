"""Each merging method against its formula in numpy, float64, and what they have in common."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from featcache.errors import MismatchError, TrainingError
from ft.merging import INGREDIENTS, MERGES
from ft.merging.interpolate import fisher_soup
from ft.merging.model_stock import model_stock, stock_ratio
from ft.merging.regmean import regmean
from ft.merging.task_arithmetic import task_arithmetic
from ft.merging.ties import ties

State = dict[str, torch.Tensor]
SHAPES = {"visual.w": (3, 4), "visual.b": (4,), "logit_scale": ()}


def model(seed: int) -> State:
    rng = np.random.default_rng(seed)
    state = {key: torch.from_numpy(np.asarray(rng.normal(size=shape))) for key, shape in SHAPES.items()}
    return state | {
        "text.w": torch.arange(4.0),
        "positions": torch.arange(3),
        "bn.num_batches_tracked": torch.tensor(seed),
    }


BASE, ONE, TWO, THREE = (model(seed) for seed in range(4))


def arrays(*states: State) -> list[np.ndarray[Any, Any]]:
    """Every model as one vector."""
    return [np.concatenate([state[key].numpy().ravel() for key in SHAPES]) for state in states]


def grams(states: list[State]) -> list[State]:
    return [{"visual.w@1": state["visual.w"].T @ state["visual.w"] + torch.eye(4)} for state in states]


def fishers(states: list[State]) -> list[State]:
    return [{"visual.w": state["visual.w"].square()} for state in states]


def merged(name: str, states: list[State], base: State, **settings: Any) -> State:
    from ft.merging.merge import needs_of

    found = {"states": states, "base": base, "moments": grams(states), "fishers": fishers(states)}
    return MERGES[name](**{need: found[need] for need in needs_of(name)}, **settings)


@pytest.mark.parametrize("name", list(MERGES))
def test_equal_models_give_that_model_bit_for_bit(name: str) -> None:
    found = merged(name, [ONE, dict(ONE)], dict(ONE))
    assert list(found) == list(ONE)
    assert all(torch.equal(found[key], ONE[key]) and found[key].dtype == ONE[key].dtype for key in ONE)
    assert all(found[key].data_ptr() != ONE[key].data_ptr() for key in ONE)


@pytest.mark.parametrize("name", list(MERGES))
def test_shared_tensors_are_copied_and_counters_are_the_last_models(name: str) -> None:
    found = merged(name, [ONE, TWO], BASE)
    assert torch.equal(found["text.w"], BASE["text.w"])
    assert int(found["bn.num_batches_tracked"]) == 2
    other = TWO | {"positions": torch.arange(1, 4)}
    with pytest.raises(MismatchError, match="integer buffer positions"):
        merged(name, [ONE, other], BASE)
    with pytest.raises(MismatchError, match="different keys"):
        merged(name, [ONE, {key: value for key, value in TWO.items() if key != "visual.b"}], BASE)


@pytest.mark.parametrize("name", list(MERGES))
def test_every_setting_has_a_type_and_a_default(name: str) -> None:
    from featcache.parameters import parameters_of
    from ft.merging.merge import settings_of

    for found in settings_of(name).values():
        assert found.default is None or found.check(found.default) == found.default
    assert "states" in parameters_of(MERGES[name])
    assert not set(settings_of(name)) & set(INGREDIENTS)


@pytest.mark.parametrize("scale", [0.4, 1.0, -0.5])
def test_task_arithmetic(scale: float) -> None:
    base, *models = arrays(BASE, ONE, TWO, THREE)
    expected = base + scale * sum(vector - base for vector in models)
    np.testing.assert_allclose(arrays(task_arithmetic([ONE, TWO, THREE], BASE, scale=scale))[0], expected, rtol=1e-13)


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_ties_merging_follows_its_formula(keep: float) -> None:
    """Element by element in plain Python, over the vector of all parameters."""
    base, *models = arrays(BASE, ONE, TWO, THREE)
    vectors = [vector - base for vector in models]
    n = len(base) + 4  # the shared text.w counts, with entries of zero
    for vector in vectors:
        kept = round(keep * n)
        order = np.argsort(-np.abs(vector))
        vector[order[kept:]] = 0
    expected = base.copy()
    for j in range(len(base)):
        sign = np.sign(sum(vector[j] for vector in vectors))
        agreeing = [vector[j] for vector in vectors if vector[j] != 0 and np.sign(vector[j]) == sign]
        expected[j] += 0.7 * (sum(agreeing) / len(agreeing) if agreeing else 0)
    np.testing.assert_allclose(arrays(ties([ONE, TWO, THREE], BASE, keep=keep, scale=0.7))[0], expected, rtol=1e-12)
    assert set(SHAPES) | {"text.w"} == {key for key, value in BASE.items() if value.is_floating_point()}


def test_ties_of_one_whole_model_is_task_arithmetic() -> None:
    one, two = ties([ONE], BASE, keep=1.0, scale=0.6), task_arithmetic([ONE], BASE, scale=0.6)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_model_stock_of_two_models() -> None:
    found = model_stock([ONE, TWO], BASE)
    for key in ("visual.w", "visual.b"):
        base, one, two = (state[key].numpy() for state in (BASE, ONE, TWO))
        a, b = (one - base).ravel(), (two - base).ravel()
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        assert cosine > 0
        t = 2 * cosine / (1 + cosine)
        np.testing.assert_allclose(found[key].numpy(), t * (one + two) / 2 + (1 - t) * base, rtol=1e-12)


def test_model_stock_of_four_orthogonal_additions() -> None:
    """w_k = w0 + c e_0 + e_k: every cosine is c^2 / (c^2 + 1), so t is known; opposite models give the base."""
    base = {"w": torch.zeros(5, dtype=torch.float64)}
    c, states = 2.0, [{"w": torch.eye(5, dtype=torch.float64)[k]} for k in range(1, 5)]
    for state in states:
        state["w"][0] = c
    cosine = c**2 / (c**2 + 1)
    t = 4 * cosine / (1 + 3 * cosine)
    expected = t * np.array([c, 0.25, 0.25, 0.25, 0.25])
    np.testing.assert_allclose(model_stock(states, base)["w"].numpy(), expected, rtol=1e-12)
    assert stock_ratio([torch.ones(3), -torch.ones(3)]) == 0.0
    assert stock_ratio([torch.ones(3), torch.zeros(3)]) == 0.0
    with pytest.raises(TrainingError, match="at least two"):
        model_stock(states[:1], base)


@pytest.mark.parametrize("axis", [0, 1])
def test_regmean_solves_the_least_squares_problem(axis: int) -> None:
    """min_W sum_k |X_k W - X_k W_k|^2 by numpy's lstsq on the stacked rows."""
    rng = np.random.default_rng(5)
    weights, inputs = rng.normal(size=(3, 6, 4)), [rng.normal(size=(n, 6)) for n in (10, 20, 7)]
    targets = np.concatenate([x @ w for x, w in zip(inputs, weights, strict=True)])
    expected = np.linalg.lstsq(np.concatenate(inputs), targets, rcond=None)[0]
    states = [{"w": torch.from_numpy(w.T.copy() if axis else w), "b": torch.from_numpy(w[0])} for w in weights]
    moments = [{f"w@{axis}": torch.from_numpy(x.T @ x)} for x in inputs]
    found = regmean(states, moments, off_diagonal=1.0)
    solved = found["w"].numpy().T if axis else found["w"].numpy()
    np.testing.assert_allclose(solved, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["b"].numpy(), weights[:, 0].mean(axis=0), rtol=1e-13)  # not a layer
    scaled = [0.9 * x.T @ x + 0.1 * np.diag(np.diag(x.T @ x)) for x in inputs]
    right = sum(g @ w for g, w in zip(scaled, weights, strict=True))
    default = regmean(states, moments)["w"].numpy()
    np.testing.assert_allclose(default.T if axis else default, np.linalg.solve(sum(scaled), right), rtol=1e-10)


def test_regmean_averages_in_directions_without_input() -> None:
    """Six inputs of which three vary: the weights of the others are averaged, and nothing becomes NaN."""
    rng = np.random.default_rng(6)
    weights, inputs = rng.normal(size=(2, 6, 2)), rng.normal(size=(2, 30, 6))
    inputs[:, :, 3:] = 0
    states = [{"w": torch.from_numpy(w)} for w in weights]
    moments = [{"w@0": torch.from_numpy(x.T @ x)} for x in inputs]
    found = regmean(states, moments, off_diagonal=1.0)["w"].numpy()
    targets = np.concatenate([x @ w for x, w in zip(inputs, weights, strict=True)])
    expected = np.linalg.lstsq(np.concatenate(inputs), targets, rcond=None)[0]
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-9)
    np.testing.assert_allclose(found[3:], weights.mean(axis=0)[3:], rtol=1e-12)


def test_fisher_soup_of_three_models() -> None:
    states, found = [ONE, TWO, THREE], fishers([ONE, TWO, THREE])
    values = np.stack([state["visual.w"].numpy() for state in states])
    information = np.maximum(np.stack([state["visual.w"].numpy() for state in found]), 1e-3)
    got = fisher_soup(states, found, floor=1e-3)
    np.testing.assert_allclose(
        got["visual.w"].numpy(), (information * values).sum(axis=0) / information.sum(axis=0), rtol=1e-13
    )
    np.testing.assert_allclose(got["visual.b"].numpy(), np.mean([s["visual.b"].numpy() for s in states], axis=0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regmean([ONE, TWO], grams([ONE])), "moments of 1 models for 2"),
        (lambda: regmean([ONE], [{"visual.w@0": torch.eye(4)}]), None),
        (lambda: regmean([ONE, TWO], [{"visual.w@0": torch.eye(4)}] * 2), "of another model's inputs"),
        (lambda: fisher_soup([ONE, TWO], fishers([ONE])), "Fisher information of 1 models for 2"),
        (lambda: ties([], BASE), "no models"),
    ],
)
def test_mismatched_inputs_are_refused(make: Callable[[], State], message: str | None) -> None:
    if message is None:
        assert torch.equal(make()["visual.w"], ONE["visual.w"])  # one model is copied, whatever its moments
        return
    with pytest.raises((MismatchError, TrainingError), match=message):
        make()
