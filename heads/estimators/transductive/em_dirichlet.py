"""EM-Dirichlet (Martin et al. 2024): a Dirichlet per class over the zero-shot probabilities of the rows."""

from __future__ import annotations

from featcache.errors import HeadError
from featcache.parameters import Count, NotNegative
from heads.estimators.transductive.base import Float, LabelledRows, TransductiveClassifier
from heads.solvers.transductive import dirichlet_assignments


class EMDirichlet(TransductiveClassifier):
    """Expectation-maximisation of Dirichlet distributions of zero-shot probability vectors, with class shares.

    Written for batches in which few of the classes occur: a large `balance` empties classes with few rows. Memory and
    time grow with the square of the number of classes.

    Parameters
    ----------
    balance : weight of the logarithms of class shares; None: C / 5 rounded down, as published
    rounds : of the expectation-maximisation

    Attributes
    ----------
    classes_, classnames_, n_features_in_, provenance_, head_

    Notes
    -----
    Labelled rows are not used.

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

    def __init__(self, balance: NotNegative | None = None, rounds: Count = 10) -> None:
        self.balance = balance
        self.rounds = rounds

    def _check_parameters(self) -> None:
        if self.rounds < 1 or not (self.balance is None or self.balance >= 0):
            raise HeadError(
                f"got rounds={self.rounds} and balance={self.balance!r}; expected rounds from 1, and a balance from 0"
            )

    def _adapt(self, X: Float, base: Float, labelled: LabelledRows | None) -> Float:
        if labelled is not None:
            raise HeadError(f"{self.name} takes no labelled rows; leave them out, or take transclip")
        balance = base.shape[1] // 5 if self.balance is None else float(self.balance)
        return dirichlet_assignments(base, balance=balance, rounds=int(self.rounds))
