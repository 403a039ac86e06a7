"""EM-Dirichlet (Martin et al. 2024): a Dirichlet per class over the zero-shot probabilities of the rows."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from featcache.errors import FeatcacheWarning, HeadError
from featcache.parameters import MAX_RATE, Count, NotNegative, Rate
from heads.estimators.logistic.training_rows import machine_memory
from heads.estimators.text_prior import class_directions
from heads.estimators.transductive.base import Float, LabelledRows, TransductiveClassifier
from heads.fitted.linear import LinearHead
from heads.rows.lengths import unit_rows
from heads.solvers.transductive import dirichlet_assignments, matched_classes

MANY = 40
"""Classes among the zero-shot predictions from which a fit warns: ten true ones show up as 20 to 30."""
TABLES = 12
"""Arrays (C, C) of float64 that a round holds at once."""


class EMDirichlet(TransductiveClassifier):
    """Expectation-maximisation of Dirichlet distributions of zero-shot probability vectors, with class shares.

    Written for batches in which few of the classes occur (3 to 10 as published): `balance` empties classes with few
    rows, and where many occur, one class takes nearly all rows. The fit warns of that. Memory and time grow with the
    square of the number of classes.

    Parameters
    ----------
    balance : weight of the logarithms of class shares; None: C / 5 rounded down, as published
    rounds : of the expectation-maximisation; 20 as published
    scale
        Of the cosines with the text vectors, whose softmax are the probability vectors: 30 as published, flatter than
        CLIP's own 100. None takes the logits of the zero-shot head as they are, its scale and bias included.
    match
        Give the clusters that were found the classes to which their zero-shot probabilities fit best together, one
        class each, as the authors do; False leaves cluster c class c, where it began.
    mm_steps
        None: each round finds the Dirichlets of largest likelihood. A number: so many steps of the authors' iteration
        towards them, which is slow to arrive, so that a small number acts as a regularisation. Their code takes up to
        1,000.

    Attributes
    ----------
    classes_, classnames_, n_features_in_, provenance_, head_

    Notes
    -----
    Labelled rows are not used. The fit needs 96 C² bytes of memory; HeadError where the machine has less.

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

    def __init__(
        self,
        balance: NotNegative | None = None,
        rounds: Count = 20,
        scale: Rate | None = 30.0,
        match: bool = True,
        mm_steps: Count | None = None,
    ) -> None:
        self.balance = balance
        self.rounds = rounds
        self.scale = scale
        self.match = match
        self.mm_steps = mm_steps

    def _check_parameters(self) -> None:
        if self.rounds < 1 or not (self.balance is None or self.balance >= 0):
            raise HeadError(
                f"got rounds={self.rounds} and balance={self.balance!r}; expected rounds from 1, and a balance from 0"
            )
        if self.mm_steps is not None and self.mm_steps < 1:
            raise HeadError(f"mm_steps is {self.mm_steps!r}, expected a number from 1, or None for the exact maximum")
        if self.scale is not None and not 0 < self.scale <= MAX_RATE:
            raise HeadError(f"scale is {self.scale!r}, expected a positive number up to {MAX_RATE:g}, or None")

    def _check_memory(self, classes: int) -> None:
        """HeadError where the parameters of all classes, and what their estimation needs beside them, have no room."""
        needed, room = TABLES * 8 * classes**2, machine_memory()
        if needed > room:
            raise HeadError(
                f"{self.name}: {classes:,} classes need about {needed / 1e9:.0f} GB (a Dirichlet for each), "
                f"and this machine has {room / 1e9:.0f} GB; restrict the text head to classes that may occur, or take "
                "transclip"
            )

    def _scores(self, features: NDArray[np.floating], text: LinearHead) -> Float:
        if self.scale is None:
            return super()._scores(features, text)
        directions, _ = class_directions(text)
        return float(self.scale) * (unit_rows(features).astype(np.float64) @ directions.T)

    def _adapt(self, X: Float, base: Float, labelled: LabelledRows | None) -> Float:
        if labelled is not None:
            raise HeadError(f"{self.name} takes no labelled rows; leave them out, or take transclip")
        self._check_memory(base.shape[1])
        if (present := len(np.unique(base.argmax(axis=1)))) > MANY:
            warnings.warn(
                f"{self.name} is for batches of few classes, and the zero-shot head finds {present:,} in these "
                f"{len(base):,} rows, which it will merge; give it batches of about 10 classes, or take transclip",
                FeatcacheWarning,
                stacklevel=3,
            )
        balance = base.shape[1] // 5 if self.balance is None else float(self.balance)
        steps = None if self.mm_steps is None else int(self.mm_steps)
        found = dirichlet_assignments(base, balance=balance, rounds=int(self.rounds), mm_steps=steps)
        return matched_classes(found, base) if self.match else found
