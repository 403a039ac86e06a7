"""`Problem`: the checked input of every implementation of `linear_nll`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from heads.kernels.calibration_bins import CALIBRATION_BINS
from heads.kernels.tally import RowStats, Tally
from heads.rows.arrays import to_numpy

Values: TypeAlias = ArrayLike | torch.Tensor
"""A tensor, or any array-like."""

Tensors = tuple[torch.Tensor, ...]


class NLLOptions(TypedDict, total=False):
    """Keywords of `heads.kernels.linear_nll`; all are optional.

    Attributes
    ----------
    bias : (C,), (H, C) or a list of H entries (C,) or None
        Added to the logits; -inf masks a class. Default: none.
    logit_scale : float or H of them
        Factor on the products, already exponentiated. Default: 1.
    class_subset : (S,) indices
        Classes to keep, in this order: the softmax is over them alone, and the result's classes are positions in this
        list.
    alphas : K numbers
        The result has K heads, ``(1 - a) * logits of head 0 + a * logits of head 1``, from exactly two heads; all K
        together cost two products.
    ensemble : {"logits", "probabilities"}
        The H heads (of T templates, say) become one: the mean of their logits, or of their softmax probabilities.
    n_bins : calibration bins; default `CALIBRATION_BINS`
    per_sample : also keep NLL and rank of each row, (H, N)
    confusion : also count (label, predicted class) pairs, (H, C, C)
    """

    bias: Values | Sequence[Values | None] | None
    logit_scale: float | Sequence[float] | None
    class_subset: Values | None
    alphas: Sequence[float] | None
    ensemble: Literal["logits", "probabilities"] | None
    n_bins: int
    per_sample: bool
    confusion: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows and heads on one device.

    Attributes
    ----------
    features : (N, D) floating
    weights : H tensors (C, D) floating; heads of one array are views of it
    labels : (N,) int64 in [0, C)
    biases : H tensors (C,) float32 (float64 if `dtype` is), or None for a head without bias
    scales : H numbers, already exponentiated; ``logits = scale * features @ weights.T + bias``
    alphas : K coefficients of the two heads, or None
    mean_probabilities : whether the H heads form one, with the mean of their probabilities
    n_bins, per_sample, confusion : as in `NLLOptions`
    """

    features: torch.Tensor
    weights: Tensors
    labels: torch.Tensor
    biases: tuple[torch.Tensor | None, ...]
    scales: tuple[float, ...]
    alphas: tuple[float, ...] | None = None
    mean_probabilities: bool = False
    n_bins: int = CALIBRATION_BINS
    per_sample: bool = False
    confusion: bool = False

    @property
    def n_classes(self) -> int:
        """C."""
        return self.weights[0].shape[0]

    @property
    def n_heads(self) -> int:
        """Heads of the result: K interpolations, one ensemble, or H."""
        if self.alphas is not None:
            return len(self.alphas)
        return 1 if self.mean_probabilities else len(self.weights)

    @property
    def dtype(self) -> torch.dtype:
        """Type of everything after the product: float32, or float64 if an input is."""
        kinds = {self.features.dtype, *(w.dtype for w in self.weights)}
        return torch.float64 if torch.float64 in kinds else torch.float32

    def rows(self, start: int, stop: int) -> Self:
        """The same heads on some of the rows."""
        return replace(self, features=self.features[start:stop], labels=self.labels[start:stop])

    def tally(self, rows: RowStats) -> Tally:
        """The tally of the statistics (H, N) of these rows."""
        return Tally.of_rows(rows, self.labels, self.n_classes, n_bins=self.n_bins, per_sample=self.per_sample)

    def refuse_nan(self, nll: NDArray[np.float64]) -> None:
        """Raise HeadError if the NLL sum (H,) of a head is NaN, naming rows of features that are not finite."""
        if not np.isnan(nll).any():
            return
        bad = (~torch.isfinite(self.features).all(dim=1)).nonzero()[:10, 0].tolist()
        where = f"features hold NaN or infinity in rows {bad}" if bad else "all features are finite"
        raise HeadError(
            f"logits of heads {np.flatnonzero(np.isnan(nll))[:10].tolist()} are NaN, +inf or all masked; {where}; "
            "check features, weights, biases and logit scales"
        )


def pose(
    features: Values, weights: Values | Sequence[Values], labels: Values, **options: Unpack[NLLOptions]
) -> Problem:
    """The `Problem` for the arguments of `linear_nll`, which documents them and what is refused."""
    known = NLLOptions.__annotations__
    if unknown := sorted(options.keys() - known.keys()):
        raise TypeError(f"unexpected keyword arguments {unknown}; expected {', '.join(known)}")
    X = _floating(features, "features")
    if X.ndim != 2 or not len(X):
        raise HeadError(f"features are {tuple(X.shape)}, expected (N, D) with at least one row")
    heads = _heads(weights, X)
    biases = _biases(options.get("bias"), heads)
    targets, subset = _labels(labels, X), options.get("class_subset")
    if subset is not None:
        index = torch.as_tensor(class_positions(subset, heads[0].shape[0]), device=X.device)
        heads = tuple(w[index] for w in heads)
        biases = tuple(None if b is None else b[index] for b in biases)
        targets = _positions(targets, index)
    else:
        low, high = (int(v) for v in torch.aminmax(targets))
        if low < 0 or high >= heads[0].shape[0]:
            expected = f"expected [0, {heads[0].shape[0] - 1}]; drop rows without a label"
            raise HeadError(f"labels lie in [{low}, {high}], {expected}")
    problem = Problem(
        X,
        heads,
        targets,
        biases,
        scales=_scales(options.get("logit_scale"), len(heads)),
        n_bins=options.get("n_bins", CALIBRATION_BINS),
        per_sample=options.get("per_sample", False),
        confusion=options.get("confusion", False),
    )
    if problem.n_bins < 1:
        raise HeadError(f"expected at least 1 calibration bin, got {problem.n_bins}")
    alphas, ensemble = options.get("alphas"), options.get("ensemble")
    if ensemble is not None:
        return _ensemble(problem, ensemble, alphas)
    return problem if alphas is None else replace(problem, alphas=_alphas(alphas, problem))


def _floating(value: object, what: str) -> torch.Tensor:
    """A detached floating-point tensor of any array-like, without a copy where torch can share the memory."""
    tensor = _tensor(value)
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise HeadError(f"{what} are {tensor.dtype}, expected float16, bfloat16, float32 or float64")
    return tensor


def _tensor(value: object) -> torch.Tensor:
    """A tensor that shares memory with an array, even a read-only map or a broadcast: nothing is written to it."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    array = to_numpy(value)
    if not array.flags.writeable:
        array = np.asarray(_Writeable(array))  # torch warns about views of read-only memory
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise HeadError(f"got an array of {array.dtype}, expected numbers") from error


class _Writeable:
    """An array whose memory is declared writeable."""

    def __init__(self, array: NDArray[np.generic]) -> None:
        self.array = array  # keeps the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _heads(weights: Values | Sequence[Values], X: torch.Tensor) -> Tensors:
    """H matrices (C, D) on the device of the features."""
    if not isinstance(weights, list | tuple):
        whole = _floating(weights, "weights")
        if whole.ndim not in (2, 3):
            raise HeadError(f"weights are {tuple(whole.shape)}, expected (C, D), (H, C, D) or a list of (C, D)")
        weights = [whole] if whole.ndim == 2 else list(whole)
    heads = tuple(_floating(w, "weights").to(X.device) for w in weights)
    if not heads:
        raise HeadError("got no head; give weights (C, D), (H, C, D) or a list of (C, D)")
    shapes = {tuple(w.shape) for w in heads}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 2 or shape[0] < 2 or shape[1] != X.shape[1]:
        raise HeadError(
            f"weights are {sorted(shapes)}, expected (C, {X.shape[1]}) with one C of at least 2 for all heads"
        )
    return heads


def _biases(bias: Values | Sequence[Values | None] | None, heads: Tensors) -> tuple[torch.Tensor | None, ...]:
    """One bias (C,) or None per head."""
    if bias is None:
        return (None,) * len(heads)
    if not isinstance(bias, list | tuple):
        whole = _floating(bias, "bias")
        bias = [whole] * len(heads) if whole.ndim == 1 else list(whole)
    wide = torch.float64 if any(w.dtype == torch.float64 for w in heads) else torch.float32
    biases = tuple(None if b is None else _floating(b, "bias").to(heads[0].device, wide) for b in bias)
    expected = (heads[0].shape[0],)
    if len(biases) != len(heads) or any(b is not None and tuple(b.shape) != expected for b in biases):
        got = [None if b is None else tuple(b.shape) for b in biases]
        raise HeadError(f"biases are {got}, expected {expected} for each of {len(heads)} heads")
    return biases


def _scales(logit_scale: float | Sequence[float] | None, n_heads: int) -> tuple[float, ...]:
    values = np.atleast_1d(np.asarray(1.0 if logit_scale is None else logit_scale, np.float64))
    if values.ndim != 1 or len(values) not in (1, n_heads) or not np.isfinite(values).all():
        raise HeadError(f"logit_scale is {logit_scale!r}, expected one finite number, or one for each of {n_heads}")
    return tuple(float(v) for v in np.broadcast_to(values, n_heads))


def _alphas(alphas: Sequence[float], problem: Problem) -> tuple[float, ...]:
    values, n_heads = tuple(float(a) for a in alphas), len(problem.weights)
    if n_heads != 2 or not values or not np.isfinite(values).all():
        raise HeadError(f"got {len(values)} alphas for {n_heads} heads; expected finite alphas, and exactly two heads")
    if any(b is not None and not bool(b.isfinite().all()) for b in problem.biases):
        raise HeadError("infinite biases have no interpolation (0 * inf); mask classes with class_subset")
    return values


def _ensemble(problem: Problem, ensemble: str, alphas: Sequence[float] | None) -> Problem:
    """One head from many: a mean of logits is a linear head with mean weights; a mean of probabilities is not."""
    if ensemble not in ("logits", "probabilities") or alphas is not None:
        raise HeadError(f"got ensemble={ensemble!r}; expected 'logits' or 'probabilities', and no alphas with it")
    if ensemble == "probabilities":
        return replace(problem, mean_probabilities=True)
    share = 1.0 / len(problem.weights)
    kind = problem.weights[0].dtype
    mean = torch.zeros_like(problem.weights[0], dtype=torch.float64)
    for weights, scale in zip(problem.weights, problem.scales, strict=True):
        mean.add_(weights, alpha=scale * share)
    given = [b.double() for b in problem.biases if b is not None]
    bias = (torch.stack(given).sum(0) * share).to(problem.dtype) if given else None
    return replace(problem, weights=(mean.to(kind),), biases=(bias,), scales=(1.0,))


def _labels(labels: Values, X: torch.Tensor) -> torch.Tensor:
    tensor = _tensor(labels)
    numbers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not numbers or tuple(tensor.shape) != (len(X),):
        raise HeadError(f"labels are {tuple(tensor.shape)} {tensor.dtype}, expected ({len(X)},) class indices")
    return tensor.to(X.device, torch.int64)


def class_positions(class_subset: Values, n_classes: int, whose: str = "the heads have") -> NDArray[np.int64]:
    """Indices (S,) of the classes to keep; HeadError for fewer than two, repeated ones, or any outside [0, C)."""
    index = np.asarray(class_subset.cpu() if isinstance(class_subset, torch.Tensor) else class_subset)
    if index.ndim != 1 or index.dtype.kind not in "iu" or index.size < 2 or len(np.unique(index)) != index.size:
        raise HeadError(f"class_subset must be at least two different class indices, got {class_subset!r}")
    if index.min() < 0 or index.max() >= n_classes:
        raise HeadError(
            f"class_subset ranges from {index.min()} to {index.max()}, but {whose} classes 0 to {n_classes - 1}"
        )
    return index.astype(np.int64)


def _positions(labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Index of each label in the subset."""
    size = int(index.max()) + 1
    lookup = torch.full((size + 1,), -1, dtype=torch.int64, device=labels.device)
    lookup[index] = torch.arange(len(index), device=labels.device)
    found = lookup[torch.where((labels < 0) | (labels >= size), size, labels)]
    if bool((found < 0).any()):
        outside = torch.unique(labels[found < 0])[:10].tolist()
        raise HeadError(f"labels {outside} lie outside class_subset; add these classes, or drop their rows")
    return found
