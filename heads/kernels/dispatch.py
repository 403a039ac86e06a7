"""`linear_nll`: NLL, ranks and calibration of many heads, computed by the fastest implementation available."""

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, Unpack, cast

import torch

from featcache.errors import FeatcacheError, HeadError, MissingExtraError
from heads.kernels.problem import NLLOptions, Problem, Values, pose
from heads.kernels.tally import Tally

IMPLS: dict[str, str] = {
    "reference": "heads.kernels.plain:reference",
    "chunked": "heads.kernels.plain:chunked",
    "cpu": "heads.kernels.cpu",
    "cuda": "heads.kernels.cuda",
    "triton": "heads.kernels.triton",
}
"""Implementations by name: a module, or an object in one, imported when it is used."""

AUTO: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda, half": ("triton", "cuda"), "cuda": ("cuda",)}
"""What ``impl="auto"`` tries for features on a device, in order, before "chunked", which runs anywhere.

"half": features and weights are float16 or bfloat16. Tensor cores then make the products cheap, and everything else is
the bottleneck. Other products, such as those of half-precision features with a head's float32 weights, are best left to
cuBLAS; "chunked" reads and writes its logits a dozen times, "cuda" once. The order on a GPU follows from counts of
instructions and bytes, and has not been measured.
"""

_LIBRARIES = {"cpu": "numba", "triton": "triton"}
"""The package to install where the import of an implementation fails."""


class Implementation(Protocol):
    """What an entry of `IMPLS` provides."""

    def require(self, problem: Problem) -> None:
        """Raise MissingExtraError without the library, HeadError for an unsupported problem."""

    def run(self, problem: Problem) -> Tally:
        """Sums and counts; the NLL sum of a head with a NaN or +inf logit is NaN."""


def linear_nll(
    features: Values,
    weights: Values | Sequence[Values],
    labels: Values,
    *,
    impl: str = "auto",
    **options: Unpack[NLLOptions],
) -> Tally:
    """NLL, ranks, recall, calibration and Brier score of H linear heads over N rows.

    Head h has logits ``logit_scale[h] * features @ weights[h].T + bias[h]``, an (N, C) array that only the reference
    ever holds. Products are in the precision of the inputs (the wider one if they differ); their sums and everything
    after them are at least float32.

    Parameters
    ----------
    features : (N, D)
        Array or torch tensor, float16, bfloat16, float32 or float64; everything runs on its device.
    weights : (C, D), (H, C, D) or a list of H heads (C, D)
        One row per class. The heads of a list need not be contiguous.
    labels : (N,)
        Class indices; with `class_subset`, in the full class list.
    impl : str
        A key of `IMPLS`, or "auto" for the fastest one on the features' device (`AUTO`).
    **options : `bias`, `logit_scale`, `class_subset`, `alphas`, `ensemble`, `n_bins`, `per_sample`, `confusion`: see
        `heads.kernels.NLLOptions`

    Returns
    -------
    Tally
        Sums and counts, on the host. Tallies of several blocks of rows add up: ``tally_a + tally_b``.

    Raises
    ------
    HeadError
        For shapes, dtypes or labels that do not match, labels outside `class_subset`, no heads or rows, and logits
        that are NaN or +inf.
    MissingExtraError
        If the library of `impl` is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> X, heads = np.eye(3), np.stack([np.eye(3), np.zeros((3, 3))])
    >>> tally = linear_nll(X, heads, [0, 1, 2], logit_scale=100.0)
    >>> [(row["top1"], round(row["nll"], 4)) for row in tally.results()]  # ties of the constant head go to class 0
    [(1.0, 0.0), (0.3333333333333333, 1.0986)]
    """
    problem = pose(features, weights, labels, **options)
    tally = _implementation(impl, problem).run(problem)
    problem.refuse_nan(tally.nll)
    return tally


def available(problem: Problem) -> list[str]:
    """Names of the implementations that can solve a problem, the reference first."""
    return [name for name in IMPLS if _why_not(name, problem) is None]


def _implementation(impl: str, problem: Problem) -> Implementation:
    """The requested implementation, or the first of `AUTO` that can run."""
    if impl == "auto":
        kinds = {problem.features.dtype, *(weights.dtype for weights in problem.weights)}
        half = ", half" if kinds <= {torch.float16, torch.bfloat16} else ""
        device = problem.features.device.type
        names = AUTO.get(f"{device}{half}", AUTO.get(device, ()))
        return _load(next((name for name in names if _why_not(name, problem) is None), "chunked"))
    if impl not in IMPLS:
        raise HeadError(f"unknown implementation {impl!r}; expected auto or one of {', '.join(IMPLS)}")
    reason = _why_not(impl, problem)
    if reason is not None:
        raise reason
    return _load(impl)


def _why_not(name: str, problem: Problem) -> FeatcacheError | None:
    """Why an implementation cannot solve this problem, or None if it can."""
    try:
        _load(name).require(problem)
    except FeatcacheError as reason:
        return reason
    except ImportError as error:
        library = _LIBRARIES.get(name, error.name)
        missing = MissingExtraError(f"impl={name!r} needs {library}, which cannot be imported; pip install {library}")
        missing.__cause__ = error
        return missing
    return None


def _load(name: str) -> Implementation:
    module, _, attribute = IMPLS[name].partition(":")
    found: object = import_module(module)
    return cast(Implementation, vars(found)[attribute] if attribute else found)
