"""Weight-space ensembles: WiSE-FT, plain or Fisher-weighted, and soups of several models.

As in the original, all keys are merged, including unused text parameters, logit scale and BatchNorm statistics. Merging
is computed in float64 and rounded once. Tensors that are equal in all models are copied bit for bit: a text tower that
was not trained keeps its digest, so its text stores stay valid for every merged model.

Papers: Wortsman et al., Robust fine-tuning of zero-shot models (arXiv 2109.01903); Wortsman et al., Model soups
(arXiv 2203.05482); Matena and Raffel, Merging models with Fisher-weighted averaging (arXiv 2111.09832).
"""

import math
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from featcache.errors import MismatchError, TrainingError
from featcache.parameters import Positive, Range
from ft.checkpoints.folder import read_state
from ft.checkpoints.state import State, check_shapes, shapes_of
from ft.merging.tensors import check_models, common_dtype, shared

FISHER_FLOOR = 1e-8


def interpolate(
    theta0: State | str | Path,
    theta1: State | str | Path,
    alpha: float,
    fisher0: State | None = None,
    fisher1: State | None = None,
    *,
    floor: float = FISHER_FLOOR,
) -> dict[str, torch.Tensor]:
    """Interpolate two models in weight space.

    ``theta(a) = (1 - a) theta0 + a theta1``, or with Fisher information, elementwise,
    ``theta(a) = ((1 - a) f0 theta0 + a f1 theta1) / ((1 - a) f0 + a f1)`` with ``f = max(F, floor)``, and ``f = 1``
    for keys without Fisher information.

    Parameters
    ----------
    theta0, theta1 : state dicts with the same keys and shapes, or checkpoints (see `read_state`)
        The result has the wider of the two dtypes. Integer buffers must be equal, except BatchNorm's batch counters,
        which are taken from `theta1`.
    alpha
        0 gives `theta0` and 1 gives `theta1`, bit for bit. Any finite number (extrapolation), or [0, 1] with Fisher
        information.
    fisher0, fisher1 : diagonal Fisher information of some or all keys, the same in both
    floor : lower bound on Fisher information

    Raises
    ------
    MismatchError
        Keys, shapes, integer buffers or the keys of the Fisher information differ.
    TrainingError
        `alpha` is not finite or not in its range, or `floor` is not positive.

    Examples
    --------
    >>> one, three = {"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}
    >>> round(interpolate(one, three, 0.3)["w"].item(), 6)
    1.6
    >>> f0, f1 = {"w": torch.tensor(0.5)}, {"w": torch.tensor(2.0)}
    >>> round(interpolate(one, three, 0.3, f0, f1)["w"].item(), 6)
    2.263158
    """
    theta0, theta1 = _state(theta0), _state(theta1)
    check_shapes(shapes_of(theta0), shapes_of(theta1), ("theta0", "theta1"))
    if not np.isscalar(alpha) or isinstance(alpha, str) or not math.isfinite(alpha):
        raise TrainingError(f"alpha {alpha!r}: expected a finite number; ft.wise takes several alphas")
    weights = [1.0 - alpha, alpha]
    fisher0, fisher1 = fisher0 or {}, fisher1 or {}
    fishers = [fisher0, fisher1] if fisher0 or fisher1 else []
    if fishers:
        if not 0 <= alpha <= 1:
            raise TrainingError(f"alpha {alpha!r} with Fisher weights; expected a number in [0, 1]")
        if not (floor > 0 and math.isfinite(floor)):
            raise TrainingError(f"Fisher floor {floor!r}: expected a positive number")
        _check_fishers(theta0, fisher0, fisher1, ("the Fisher of theta0", "the Fisher of theta1"))
    merged = {}
    for key in theta0:
        known = [fisher[key] for fisher in fishers if key in fisher]
        merged[key] = _blend(key, [theta0[key], theta1[key]], weights, known, floor)
    return merged


def soup(states: Sequence[State | str | Path], weights: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
    """Average several models in weight space: ``sum_k w_k theta_k / sum_k w_k``.

    Parameters
    ----------
    states : K state dicts with the same keys and shapes, or checkpoints (see `read_state`)
        Integer buffers must be equal, except BatchNorm's batch counters, which come from the last model.
    weights : K relative weights; default: all equal

    Raises
    ------
    MismatchError
        Keys, shapes or integer buffers differ.
    TrainingError
        There are no models, or `weights` are not K finite numbers with a nonzero sum.

    Examples
    --------
    >>> models = [{"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}]
    >>> soup(models)["w"].tolist(), soup(models, [3, 1])["w"].tolist()
    ([0.5, 1.0], [0.25, 1.0])
    """
    models = [_state(state) for state in states]
    check_models(models)
    shares = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    total = math.fsum(shares)
    if len(shares) != len(models) or not math.isfinite(total) or total == 0:
        raise TrainingError(f"weights {shares} for {len(models)} models; expected as many finite numbers, sum not zero")
    shares = [share / total for share in shares]
    return {key: _blend(key, [state[key] for state in models], shares) for key in models[0]}


def _state(model: State | str | Path) -> State:
    """A state dict, read where a checkpoint is named."""
    return read_state(model) if isinstance(model, str | Path) else model


def towards(states: Sequence[State], base: State, *, alpha: Annotated[float, Range()] = 0.5) -> dict[str, torch.Tensor]:
    """Interpolate between a base and the mean of the models (WiSE-FT); see `interpolate` and `soup`.

    >>> towards([{"w": torch.tensor(3.0)}, {"w": torch.tensor(5.0)}], {"w": torch.tensor(0.0)}, alpha=0.25)["w"].item()
    1.0
    """
    return interpolate(base, soup(states), alpha)


def fisher_soup(
    states: Sequence[State], fishers: Sequence[State], *, floor: Positive = FISHER_FLOOR
) -> dict[str, torch.Tensor]:
    """Fisher-weighted average of K models, elementwise: ``sum_k f_k theta_k / sum_k f_k``.

    ``f = max(F, floor)``, and ``f = 1`` for keys without Fisher information. `fishers` hold the diagonal Fisher
    information of some or all keys, the same in each; see `ft.merging.fisher.fisher`. Raises MismatchError if keys,
    shapes or the numbers of models differ.

    >>> models = [{"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}]
    >>> fisher_soup(models, [{"w": torch.tensor(3.0)}, {"w": torch.tensor(1.0)}])["w"].item()
    1.5
    """
    check_models(states)
    if len(fishers) != len(states):
        raise MismatchError(f"Fisher information of {len(fishers)} models for {len(states)}; expected one per model")
    for number, fisher in enumerate(fishers, start=1):
        _check_fishers(states[0], fishers[0], fisher, ("the Fisher of model 1", f"the Fisher of model {number}"))
    even = [1 / len(states)] * len(states)
    return {
        key: _blend(key, [s[key] for s in states], even, [f[key] for f in fishers if key in f], floor)
        for key in states[0]
    }


def _check_fishers(theta: State, fisher0: State, fisher1: State, names: tuple[str, str]) -> None:
    check_shapes(shapes_of(fisher0), shapes_of(fisher1), names)
    known = {key: tuple(theta[key].shape) for key in fisher0 if key in theta}
    check_shapes(known, shapes_of(fisher0), ("the model", "its Fisher"))


def _blend(
    key: str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    fishers: Sequence[torch.Tensor] = (),
    floor: float = FISHER_FLOOR,
) -> torch.Tensor:
    """Weighted mean of one tensor, copied if all models of nonzero weight have the same."""
    dtype = common_dtype(tensors)
    chosen = [tensor.detach().to(dtype) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    if (kept := shared(key, chosen)) is not None:
        return kept
    if not fishers:
        terms = [weight * tensor.detach().double() for tensor, weight in zip(tensors, weights, strict=True)]
        return reduce(torch.add, terms).to(dtype)
    shares = [
        weight * fisher.detach().double().clamp(min=floor) for fisher, weight in zip(fishers, weights, strict=True)
    ]
    products = [share * tensor.detach().double() for tensor, share in zip(tensors, shares, strict=True)]
    return (reduce(torch.add, products) / reduce(torch.add, shares)).to(dtype)
