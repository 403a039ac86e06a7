"""TransCLIP (Zanella et al. 2024): a Gaussian mixture fitted to the rows, regularised towards the zero-shot head."""

from __future__ import annotations

from dataclasses import dataclass

from featcache.parameters import Count, NotNegative
from heads.estimators.transductive.base import LabelledRows, TransductiveClassifier
from heads.rows.samples import Float
from heads.search.exact import neighbour_graph
from heads.solvers.transductive import Labelled, gaussian_assignments


@dataclass(eq=False, repr=False)
class TransCLIP(TransductiveClassifier):
    """Gaussian mixture with a shared diagonal covariance, a nearest-neighbour term and a zero-shot term.

    Parameters
    ----------
    n_neighbors : neighbours of each row in the graph
    text_weight : weight of the zero-shot log-probabilities; None for 1, or 0.5 with labelled rows, as published
    gamma
        Weight of labelled rows in means and covariance. The authors choose it from 0.002, 0.01, 0.02 and 0.2 on a
        validation split.

    References
    ----------
    Zanella, Gérin, Ben Ayed 2024, "Boosting Vision-Language Models with Transduction".

    Examples
    --------
    >>> import numpy as np
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.8], [0.95, 0.85], [0.9, 0.91], [0.1, 1.0], [0.0, 1.0]])
    >>> text.logits(X).argmax(axis=1).tolist()
    [0, 0, 1, 1, 1]
    >>> TransCLIP(n_neighbors=1).fit(X, texts=text).predict(X).tolist()
    [0, 0, 0, 1, 1]
    """

    name = "transclip"

    n_neighbors: Count = 3
    text_weight: NotNegative | None = None
    gamma: NotNegative = 0.02

    def _adapt(self, X: Float, base: Float, labelled: LabelledRows | None) -> Float:
        weight = (1.0 if labelled is None else 0.5) if self.text_weight is None else float(self.text_weight)
        k, others = int(self.n_neighbors), None
        if labelled is not None:
            # As published, this also drops the nearest row of each labelled row.
            others = Labelled(*labelled, neighbour_graph(labelled[0], X, k))
        graph = neighbour_graph(X, X, k)
        return gaussian_assignments(X, base, graph, others, weight=weight, gamma=float(self.gamma))
