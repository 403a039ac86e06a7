"""Missing classes (without a training row), and how they are filled in when heads are combined.

A head alone must not predict a missing class: its logit is -10,000. In a sum of heads this value would outweigh the
heads that know the class. So the missing logit is first filled in from these heads, shifted so that the means over the
classes that both know agree. Weights and biases are filled in the same way, so the sum stays linear.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from heads.fitted.linear import LinearHead
from heads.rows.samples import Float, Mask

ABSENT = -1e4
"""Logit of a missing class, which makes its probability zero in any precision."""


def absences(heads: Sequence[LinearHead]) -> Mask:
    """Mask (M, C) of the missing classes of M heads."""
    found = np.zeros((len(heads), len(heads[0].classnames)), bool)
    for row, head in zip(found, heads, strict=True):
        row[list(head.absent)] = True
    return found


def known_by_others(tables: Float, absent: Mask, votes: Sequence[float] | Float | None = None) -> Float:
    """Tables of M heads, with the missing classes of each filled in from the heads that know them.

    With K_j the classes that head j knows, ``T_m[c]`` becomes the mean over the heads j that know c of
    ``T_j[c] + mean_{k in K_m and K_j} (T_m[k] - T_j[k])``: a constant added to a row of logits does not change its
    softmax. Classes that no head knows are left as they are.

    Parameters
    ----------
    tables : (M, C, ...) logits, or weights and biases
    absent : (M, C)
    votes : (M,) weights of the mean; None, or no positive weight among the heads that know a class, weighs them equally

    >>> logits = np.array([[5.0, 6.0, -1e4], [0.0, 1.0, 2.0]])   # the first head never saw class 2
    >>> known_by_others(logits, np.array([[False, False, True], [False] * 3])).tolist()
    [[5.0, 6.0, 7.0], [0.0, 1.0, 2.0]]
    """
    gaps = absent & ~absent.all(axis=0)
    if not gaps.any():
        return tables
    heard = np.ones(len(tables)) if votes is None else np.maximum(np.asarray(votes, np.float64), 0.0)
    weights = np.where(absent, 0.0, heard[:, None])
    unheard = weights.sum(axis=0) == 0
    weights[:, unheard] = ~absent[:, unheard]
    filled = tables.copy()
    for m in np.flatnonzero(gaps.any(axis=1)):
        filled[m, gaps[m]] = 0.0
        for j in range(len(tables)):
            new = gaps[m] & (weights[j] > 0)
            both = ~absent[m] & ~absent[j]
            if new.any():
                shift = (tables[m, both] - tables[j, both]).mean(axis=0) if both.any() else 0.0
                shares = weights[j, new] / weights[:, new].sum(axis=0)
                filled[m, new] += shares.reshape(-1, *[1] * (tables.ndim - 2)) * (tables[j, new] + shift)
    return filled


def without_opinion(head: LinearHead) -> LinearHead:
    """The head as a prior: missing classes get the mean weights and bias of the other classes.

    >>> head = LinearHead(np.eye(3), np.array([0.0, 1.0, ABSENT]), ("ant", "bee", "cow"), absent=(2,))
    >>> prior = without_opinion(head)
    >>> prior.weights[2].tolist(), float(prior.bias[2])
    ([0.5, 0.5, 0.0], 0.5)
    """
    if not head.absent:
        return head
    known = ~absences([head])[0]
    weights, bias = head.weights.copy(), head.bias.copy()
    weights[~known], bias[~known] = weights[known].mean(axis=0), bias[known].mean()
    return replace(head, weights=weights, bias=bias, absent=(), parents=None)
