"""NLL, ranks and calibration of many heads over features, without an array of logits: the choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from featcache.errors import FeatcacheError, HeadError
from heads.kernels.problem import Problem, pose
from heads.kernels.tally import Tally

IMPLS: dict[str, str] = {
    "reference": "heads.kernels.reference",
    "chunked": "heads.kernels.chunked",
    "cpu": "heads.kernels.cpu",
    "cuda": "heads.kernels.cuda",
    "triton": "heads.kernels.triton",
}
"""Module of each implementation by its name; imported when used."""


AUTO: dict[str, tuple[str, ...]] = {"cpu": ("cpu",)}
"""What ``impl="auto"`` tries for features on a device, in order, before the chunked one, which runs anywhere.

"cuda" and "triton" are asked for by name until a GPU has run and measured them.
"""


class Implementation(Protocol):
    """What a module of `IMPLS` has."""

    def require(self, problem: Problem) -> None:
        """Raise MissingExtraError without the library, or HeadError if this problem is not for it."""

    def run(self, problem: Problem) -> Tally:
        """Counts and sums; a head with a logit that is NaN or +inf has a NaN in its NLL sum."""


def linear_nll(
    features: Any,
    weights: Any,
    labels: Any,
    *,
    bias: Any = None,
    logit_scale: float | Sequence[float] | None = None,
    class_subset: Any = None,
    alphas: Sequence[float] | None = None,
    ensemble: str | None = None,
    impl: str = "auto",
    per_sample: bool = False,
    confusion: bool = False,
    n_bins: int = 15,
) -> Tally:
    """NLL, ranks, recall, calibration and Brier score of H linear heads over N rows.

    Head h has logits ``logit_scale[h] * features @ weights[h].T + bias[h]``, an (N, C) array that only the reference
    ever holds. Products run in the inputs' precision (mixed inputs in the wider one) with sums, and everything after
    the product, in float32 at least.

    Parameters
    ----------
    features : (N, D)
        Array or torch tensor, float16, bfloat16, float32 or float64; its device is where the work is done.
    weights : (C, D), (H, C, D) or a list of H heads (C, D)
        One row a class. A list need not lie in one array.
    labels : (N,)
        Class indices; with `class_subset`, of the full class list.
    bias : (C,), (H, C) or a list of H entries (C,) or None
        -inf masks a class out.
    logit_scale : float or H of them
        Already exponentiated; None is 1.
    class_subset : (S,) indices
        Classes to keep, in this order: the softmax runs over them alone, and classes of the result are positions here.
    alphas : K numbers
        The result has K heads, ``(1 - a) * logits of head 0 + a * logits of head 1`` of exactly two heads, at the
        price of two products.
    ensemble : {"logits", "probabilities"}
        The H heads (of T templates, say) become one: the mean of their logits, or of their softmax probabilities.
    impl : str
        A key of `IMPLS`, or "auto", which takes the fastest that is known where the features are (`AUTO`).
    per_sample : bool
        Also keep NLL and rank of each row, (H, N).
    confusion : bool
        Also count (label, predicted class) pairs, (H, C, C).
    n_bins : int
        Calibration bins of equal width, each closed on the right.

    Returns
    -------
    Tally
        Sums and counts on the host. Those of several blocks of rows add up: ``tally_a + tally_b``.

    Raises
    ------
    HeadError
        For shapes, dtypes or labels that do not fit, a label outside `class_subset`, no head or row, and logits that
        are NaN or +inf.
    MissingExtraError
        If `impl` names an implementation whose library is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> X, heads = np.eye(3), np.stack([np.eye(3), np.zeros((3, 3))])
    >>> tally = linear_nll(X, heads, [0, 1, 2], logit_scale=100.0)
    >>> [(row["top1"], round(row["nll"], 4)) for row in tally.results()]  # the constant head ties, and is not right
    [(1.0, 0.0), (0.3333333333333333, 1.0986)]
    """
    problem = pose(
        features,
        weights,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        class_subset=class_subset,
        alphas=alphas,
        ensemble=ensemble,
        n_bins=n_bins,
        per_sample=per_sample,
        confusion=confusion,
    )
    tally = _implementation(impl, problem).run(problem)
    problem.refuse_unordered(tally.nll)
    return tally


def available(problem: Problem) -> list[str]:
    """Names of the implementations that can solve a problem, the reference first."""
    return [name for name in IMPLS if _why_not(name, problem) is None]


def _implementation(impl: str, problem: Problem) -> Implementation:
    """The module asked for, or the first of `AUTO` that can run."""
    if impl != "auto":
        if impl not in IMPLS:
            raise HeadError(f"unknown implementation {impl!r}; expected auto or one of {', '.join(IMPLS)}")
        reason = _why_not(impl, problem)
        if reason is not None:
            raise reason
        return _module(impl)
    for name in AUTO.get(problem.features.device.type, ()):
        if _why_not(name, problem) is None:
            return _module(name)
    return _module("chunked")


def _why_not(name: str, problem: Problem) -> FeatcacheError | None:
    """What keeps an implementation from this problem, or None."""
    try:
        _module(name).require(problem)
    except FeatcacheError as reason:
        return reason
    return None


def _module(name: str) -> Implementation:
    return cast(Implementation, import_module(IMPLS[name]))
