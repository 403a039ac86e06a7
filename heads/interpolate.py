"""Interpolation of two linear heads (WiSE-FT for linear classifiers, Wortsman et al. 2022).

Between linear heads weight space and output space are the same: ``logits(a) = (1 - a) logits(0) + a logits(1)``. Heads
emit logits (`LinearHead`), so both ends are on one scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from featcache.errors import HeadError, MismatchError
from heads.absent import absences, known_by_others
from heads.checks import merged
from heads.linear import LinearHead

__all__ = ["interpolate"]


def interpolate(head0: Any, head1: Any, alphas: Iterable[float]) -> list[LinearHead]:
    """Heads with weights ``(1 - a) W0 + a W1`` and bias alike, one for each alpha (0 gives `head0`, 1 `head1`).

    Of a class that one of the two never saw a row of, the other one speaks at every alpha: relative to the classes that
    both know, its logit is there the other's (`heads.absent`).

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
    first, second = head0.linear(), head1.linear()
    _check_pair(first, second)
    first, second = _with_all_classes(first, second)
    return [_between(first, second, float(alpha)) for alpha in alphas]


def _between(first: LinearHead, second: LinearHead, alpha: float) -> LinearHead:
    if not np.isfinite(alpha):
        raise HeadError(f"interpolation alpha must be a finite number, got {alpha!r}")
    name = f"{first.name}+{second.name}"
    a, b = np.float32(1.0 - alpha), np.float32(alpha)
    return LinearHead(
        a * first.weights + b * second.weights,
        a * first.bias + b * second.bias,
        first.classnames,
        name=name,
        provenance={**_joined(first, second), "head": name},
        alpha=alpha,
        parents=(first, second),
        absent=first.absent,
        classes=second.classes if first.classes is None else first.classes,
    )


def _with_all_classes(first: LinearHead, second: LinearHead) -> tuple[LinearHead, LinearHead]:
    """The two heads, each with the classes that it alone never saw as the other knows them."""
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


def _joined(first: LinearHead, second: LinearHead) -> dict[str, Any]:
    """Provenance of both: it is bound to whatever either of them is bound to."""
    one, two = first.provenance, second.provenance
    return {
        "params": {"0": _params(first), "1": _params(second)},
        "encoder_key": one.get("encoder_key") or two.get("encoder_key"),
        "text_digest": one.get("text_digest") or two.get("text_digest"),
        "encoder": one.get("encoder") or two.get("encoder"),
        "classnames": list(first.classnames),
        "fitted_on": merged(one.get("fitted_on", []), two.get("fitted_on", [])),
        "chosen_on": merged(one.get("chosen_on", []), two.get("chosen_on", [])),
        "featcache": one.get("featcache") or two.get("featcache"),
    }


def _params(head: LinearHead) -> dict[str, Any]:
    return {"head": head.name, **head.provenance.get("params", {})}


def _check_pair(first: LinearHead, second: LinearHead) -> None:
    if first.classnames != second.classnames:
        raise MismatchError(
            f"{first.name} has {len(first.classnames)} classes, {second.name} has {len(second.classnames)}, and their "
            "names or order differ; make both from the same class list"
        )
    if first.dim != second.dim:
        raise MismatchError(
            f"{first.name} takes {first.dim} features, {second.name} takes {second.dim}; use heads of one encoder"
        )
    for key, what in (("encoder_key", "encoder"), ("text_digest", "text tower")):
        one, two = first.provenance.get(key), second.provenance.get(key)
        if one is not None and two is not None and one != two:
            raise MismatchError(f"{first.name} belongs to {what} {one}, {second.name} to {two}; use heads of one model")
