"""Interpolation of two linear heads (WiSE-FT for linear classifiers, Wortsman et al. 2022).

Between linear heads weight space and output space are the same: ``logits(a) = (1 - a) logits(0) + a logits(1)``. Heads
emit logits (`LinearHead`), so both ends are on one scale. Without a selection split, alpha is chosen by folds of the
training rows (`interpolate_by_folds`).
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from featcache.errors import HeadError, MismatchError
from heads.estimators.base import HeadClassifier, LinearClassifier
from heads.estimators.fit import unfitted
from heads.estimators.text_prior import samples_of
from heads.evaluation.evaluate import best_of
from heads.evaluation.metrics import Metrics, metric_of
from heads.fitted.base import Fitted, LogitHead
from heads.fitted.linear import LinearHead, as_linear, check_same_classes
from heads.fitted.missing_classes import absences, known_by_others
from heads.fitted.provenance import Json, Provenance, merged
from heads.rows.arrays import to_numpy
from heads.rows.device import chosen_rows, device_rows
from heads.rows.samples import Array, Ints, Mask, Rows, Samples, gathered
from heads.rows.weights import group_ids
from heads.solvers.folds import FOLDS, FoldAssigner, group_folds


def interpolate(head0: LogitHead | Fitted, head1: LogitHead | Fitted, alphas: Iterable[float]) -> list[LinearHead]:
    """Heads with weights ``(1 - a) W0 + a W1`` and bias alike, one for each alpha (0 gives `head0`, 1 `head1`).

    For a class that only one of the two has seen, that head's logit, relative to the classes that both know, is used
    at every alpha (`heads.fitted.missing_classes`).

    Raises
    ------
    MismatchError
        If class lists, widths, encoders or text towers differ.
    HeadError
        If an alpha is not finite.

    Examples
    --------
    >>> names = ("cat", "dog")
    >>> a, b = LinearHead(np.eye(2), np.zeros(2), names), LinearHead(3 * np.eye(2), np.ones(2), names)
    >>> [(h.alpha, float(h.weights[0, 0])) for h in interpolate(a, b, [0.0, 0.5])]
    [(0.0, 1.0), (0.5, 2.0)]
    """
    first, second = as_linear(head0), as_linear(head1)
    _check_pair(first, second)
    first, second = _with_all_classes(first, second)
    return [_between(first, second, float(alpha)) for alpha in alphas]


def _between(first: LinearHead, second: LinearHead, alpha: float) -> LinearHead:
    if not np.isfinite(alpha):
        raise HeadError(f"interpolation alpha must be a finite number, got {alpha!r}")
    name, a, b = f"{first.name}+{second.name}", np.float32(1.0 - alpha), np.float32(alpha)
    with np.errstate(over="ignore", invalid="ignore"):  # a head refuses weights that are not finite
        weights, bias = a * first.weights + b * second.weights, a * first.bias + b * second.bias
    return LinearHead(
        weights,
        bias,
        first.classnames,
        name=name,
        provenance=_joined(name, first, second),
        alpha=alpha,
        parents=(first, second),
        absent=first.absent,
        classes=second.classes if first.classes is None else first.classes,
    )


def _with_all_classes(first: LinearHead, second: LinearHead) -> tuple[LinearHead, LinearHead]:
    """The two heads, each with its missing classes filled in from the other."""
    if first.absent == second.absent:
        return first, second
    absent = absences([first, second])
    tables = np.stack([np.column_stack([head.weights, head.bias]).astype(np.float64) for head in (first, second)])
    filled = known_by_others(tables, absent)
    nowhere = tuple(np.flatnonzero(absent.all(axis=0)).tolist())
    one, two = (
        replace(head, weights=table[:, :-1], bias=table[:, -1], absent=nowhere, parents=None)
        for head, table in zip((first, second), filled, strict=True)
    )
    return one, two


def _joined(name: str, first: LinearHead, second: LinearHead) -> Provenance:
    """Provenance of both: bound to the encoder and the text tower of either."""
    one, two = first.provenance, second.provenance
    return Provenance(
        head=name,
        params={"0": {"head": first.name, **one.params}, "1": {"head": second.name, **two.params}},
        encoder_key=one.encoder_key or two.encoder_key,
        text_digest=one.text_digest or two.text_digest,
        encoder=one.encoder or two.encoder,
        classnames=list(first.classnames),
        fitted_on=merged(one.fitted_on, two.fitted_on),
        chosen_on=merged(one.chosen_on, two.chosen_on),
        featcache=one.featcache or two.featcache,
    )


def _check_pair(first: LinearHead, second: LinearHead) -> None:
    check_same_classes(first, second)
    if first.dim != second.dim:
        raise MismatchError(
            f"{first.name} takes {first.dim} features, {second.name} takes {second.dim}; use heads of one encoder"
        )
    ours, theirs = first.provenance, second.provenance
    encoders, towers = (ours.encoder_key, theirs.encoder_key), (ours.text_digest, theirs.text_digest)
    for what, (one, two) in (("encoder", encoders), ("text tower", towers)):
        if one is not None and two is not None and one != two:
            raise MismatchError(f"{first.name} belongs to {what} {one}, {second.name} to {two}; use heads of one model")


ALPHAS = tuple(k / 20 for k in range(21))
"""Default path: 0, 0.05, ..., 1."""

Fit = Callable[..., LinearHead]
Take = Callable[[Mask], tuple[ArrayLike, ArrayLike]]

_BALANCED = 0.5  # WiSE-FT's recommendation where nothing is known
_BLOCK = 8192  # rows whose logits are held at once


def interpolate_by_folds(
    head0: LogitHead | Fitted,
    estimator: LinearClassifier,
    X: Rows,
    y: ArrayLike | None = None,
    *,
    groups: ArrayLike | None = None,
    alphas: Iterable[float] = ALPHAS,
    folds: int = FOLDS,
    metric: str = "top1",
) -> LinearHead:
    """The interpolation of a given head and one fitted on all rows, with the alpha that is best on held-out rows.

    Each fold's rows are scored by ``(1 - alpha) logits0 + alpha logits_k``, logits_k of the estimator fitted on the
    other folds. The metric is that of all held-out rows together; ties go to the lower NLL, then to the smaller alpha.

    Parameters
    ----------
    head0 : fitted linear head that no training row was used for, such as `ZeroShot`; alpha 0
    estimator
        Linear head to fit (a fitted one is fitted again); alpha 1. It repeats its own choices within every fold: give
        it one penalty (`heads.settled` of a fitted head) to save the time of its path.
    X : image store, or array-like (N, D), held in memory
    y : labels (N,), with arrays: class indices of `head0`
    groups : group (N,) of every (valid) row; rows of one group are held out together. Views of a store bring theirs.
    alphas : interpolation coefficients to choose from
    folds : number K of folds, stratified by class; at most the rows of the largest class
    metric : one of `heads.evaluation.metrics.METRICS`

    Returns
    -------
    The head that ``heads.interpolate`` gives at that alpha. ``params`` of its provenance also hold ``selection``
    ("folds"; "given" for one alpha; "paper", the alpha nearest to the 0.5 of WiSE-FT, where no row can be held out
    because no class has two), ``folds``, ``metric``, its ``value`` and the number of ``candidates``.

    Raises
    ------
    HeadError
        For an estimator that is not linear or fits from texts, alphas, folds or a metric that do not fit, groups that
        the estimator cannot keep together.
    MismatchError
        If `head0` and the rows differ in text tower, encoder, width or class list.

    References
    ----------
    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".

    Examples
    --------
    >>> from heads import Ridge
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat([0, 1], 40)
    >>> X = np.eye(2)[y] + 0.8 * rng.normal(size=(80, 2))
    >>> zero_shot = LinearHead(2 * np.eye(2), np.zeros(2), ("cat", "dog"), name="zero_shot")
    >>> head = interpolate_by_folds(zero_shot, Ridge([1.0]), X, y)
    >>> head.name, head.alpha in ALPHAS, head.provenance["params"]["folds"]
    ('zero_shot+ridge', True, 5)
    """
    path = _checked(estimator, alphas, folds, metric)
    first = as_linear(head0)
    samples = samples_of(X, y, first)
    found = _group_ids(estimator, groups, samples)
    fit = partial(_fitted, estimator, first)
    # Before the folds, so that an error numbers rows that are not finite among all rows.
    second = fit(X, y, found if groups is None else to_numpy(groups))
    alpha, how = _choose(fit, first, samples, found, path, folds, metric)
    (head,) = interpolate(first, second, [alpha])
    return head.with_provenance(head.provenance.with_params(**how))


def _checked(estimator: LinearClassifier, alphas: Iterable[float], folds: int, metric: str) -> list[float]:
    """The alphas, ascending."""
    if not isinstance(estimator, LinearClassifier) or estimator.fits_on != "images":
        name = estimator.name if isinstance(estimator, HeadClassifier) else type(estimator).__name__
        raise HeadError(f"{name} is not a linear head fitted on rows; give one, such as heads.Ridge([1.0])")
    metric_of(metric)
    path = sorted({float(alpha) for alpha in alphas})
    if not path or not np.isfinite(path).all() or folds < 2:
        raise HeadError(f"alphas {path} and {folds} folds; expected one finite number or more, and at least two folds")
    return path


def _group_ids(estimator: LinearClassifier, groups: ArrayLike | None, samples: Samples) -> Ints | None:
    """Groups as numbers from 0, given or of the store."""
    given = samples.groups if groups is None else groups
    if given is None:
        return None
    if "groups" not in inspect.signature(estimator.fit).parameters:
        raise HeadError(
            f"{estimator.name} would hold out rows of groups that it fits on; take a head that leaves rows out by "
            "group, such as ridge"
        )
    return group_ids(given, len(samples.labels()))


def _fitted(
    estimator: LinearClassifier, first: LinearHead, X: Rows, y: ArrayLike | None, groups: Array | None
) -> LinearHead:
    """A copy of the estimator, fitted."""
    options: Json = {"texts": first} if estimator.takes_texts else {"classnames": first.classnames}
    if groups is not None:
        options["groups"] = groups
    return unfitted(estimator).fit(X, y, **options).linear()


def _choose(
    fit: Fit, first: LinearHead, samples: Samples, groups: Ints | None, path: Sequence[float], folds: int, metric: str
) -> tuple[float, Json]:
    """The alpha, and the record of how it was chosen."""
    if len(path) == 1:
        return path[0], {"selection": "given"}
    take, labels = _rows(samples)
    if groups is None:  # stratified by class
        fold = FoldAssigner(len(first.classnames), min(folds, int(np.bincount(labels).max())))(labels)
    else:
        fold = group_folds(groups, min(folds, int(groups.max()) + 1))
    judged = [Metrics(len(first.classnames)) for _ in path]
    for k in range(int(fold.max()) + 1):
        keep = fold != k
        known = np.unique(labels[keep])
        scored = ~keep & np.isin(labels, known)  # not the rows whose class the other folds lack
        if scored.any() and len(known) > 1:
            second = fit(*take(keep), None if groups is None else groups[keep])
            _judge(judged, interpolate(first, second, path), *take(scored))
    if not judged[0].n:
        return min(path, key=lambda alpha: abs(alpha - _BALANCED)), {"selection": "paper"}
    results = [metrics.result() for metrics in judged]
    best, entry = best_of([found[metric] for found in results], [found["nll"] for found in results], metric)
    return path[best], {"selection": "folds", "folds": int(fold.max()) + 1, **entry}


def _rows(samples: Samples) -> tuple[Take, Ints]:
    """A function that gives the features and labels of some rows, on their device; and all labels."""
    there = device_rows(samples)
    if there is not None:
        return partial(chosen_rows, there), to_numpy(there[1])
    features, labels = gathered(samples)
    return lambda where: (features[where], labels[where]), labels


def _judge(judged: Sequence[Metrics], heads: Sequence[LinearHead], features: ArrayLike, labels: ArrayLike) -> None:
    """Add rows to the metrics of every interpolation, from two products."""
    features, labels = to_numpy(features), to_numpy(labels)
    for start in range(0, len(labels), _BLOCK):
        prepared = heads[0].prepare(features[start : start + _BLOCK])
        for head, metrics in zip(heads, judged, strict=True):
            metrics.update(head.finish(prepared), labels[start : start + _BLOCK])
