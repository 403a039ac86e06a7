"""EM-Dirichlet (Martin et al. 2024): one Dirichlet distribution per class over zero-shot probability vectors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from featcache.errors import FeatcacheWarning, HeadError
from featcache.parameters import Count, NotNegative, Rate
from heads.estimators.logistic.training_rows import machine_memory
from heads.estimators.text_prior import class_directions
from heads.estimators.transductive.base import LabelledRows, TransductiveClassifier
from heads.fitted.linear import LinearHead
from heads.rows.lengths import unit_rows
from heads.rows.samples import Features, Float
from heads.solvers.transductive import dirichlet_assignments, matched_classes

MANY = 40
"""Number of predicted classes above which a fit warns; ten true classes give 20 to 30 predicted ones."""
TABLES = 12
"""Float64 arrays (C, C) in memory at a time."""


@dataclass(eq=False, repr=False)
class EMDirichlet(TransductiveClassifier):
    """Expectation-maximisation of a mixture of Dirichlet distributions over zero-shot probability vectors.

    The method is meant for batches with few of the classes (3 to 10 in the paper): `balance` empties classes with few
    rows, and with many classes one of them takes nearly all rows, of which the fit warns. Memory and time grow with the
    square of the number of classes.

    Parameters
    ----------
    balance : weight of the log class shares; None for C / 5 rounded down, as published
    rounds : rounds of expectation-maximisation; 20 as published
    scale
        Scale of the cosines with the text vectors before the softmax: 30 as published, flatter than CLIP's 100. None
        uses the logits of the zero-shot head, with its own scale and bias.
    match
        Whether to assign clusters to classes one-to-one by the best total zero-shot probability, as the authors do;
        False keeps cluster c as class c.
    mm_steps
        Steps of the authors' slowly converging iteration towards the maximum-likelihood Dirichlet distributions in each
        round. Their code takes up to 1,000; a small number regularises, as small batches need. None finds the maximum.

    Notes
    -----
    Labelled rows are not used. The fit needs 96 C² bytes of memory, and raises a HeadError if the machine has less.

    References
    ----------
    Martin et al. 2024, "Transductive Zero-Shot and Few-Shot CLIP".

    Examples
    --------
    >>> import numpy as np
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.8], [0.95, 0.85], [0.9, 0.91], [0.1, 1.0], [0.0, 1.0]])
    >>> text.logits(X).argmax(axis=1).tolist()
    [0, 0, 1, 1, 1]
    >>> EMDirichlet().fit(X, texts=text).predict(X).tolist()
    [0, 0, 0, 1, 1]
    """

    name = "em_dirichlet"

    balance: NotNegative | None = None
    rounds: Count = 20
    scale: Rate | None = 30.0
    match: bool = True
    mm_steps: Count | None = 5

    def _scores(self, features: Features, text: LinearHead) -> Float:
        if self.scale is None:
            return super()._scores(features, text)
        directions, _ = class_directions(text)
        return float(self.scale) * (unit_rows(features).astype(np.float64) @ directions.T)

    def _adapt(self, X: Float, base: Float, labelled: LabelledRows | None) -> Float:
        if labelled is not None:
            raise HeadError(f"{self.name} takes no labelled rows; leave them out, or use transclip")
        needed, room = TABLES * 8 * base.shape[1] ** 2, machine_memory()
        if needed > room:
            raise HeadError(
                f"{self.name}: {base.shape[1]:,} classes need about {needed / 1e9:.0f} GB (a Dirichlet for each), "
                f"and this machine has {room / 1e9:.0f} GB; restrict the text head to classes that may occur, or use "
                "transclip"
            )
        if (present := len(np.unique(base.argmax(axis=1)))) > MANY:
            warnings.warn(
                f"{self.name} is for batches of few classes, but the zero-shot head predicts {present:,} in these "
                f"{len(base):,} rows, which it will merge; use batches of about 10 classes, or transclip",
                FeatcacheWarning,
                stacklevel=3,
            )
        balance = base.shape[1] // 5 if self.balance is None else float(self.balance)
        steps = None if self.mm_steps is None else int(self.mm_steps)
        found = dirichlet_assignments(base, balance=balance, rounds=int(self.rounds), mm_steps=steps)
        return matched_classes(found, base) if self.match else found
