"""Label propagation (Zhou et al. 2004) of zero-shot probabilities over a nearest-neighbour graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featcache.parameters import Count, Fraction, NotNegative
from heads.estimators.transductive.base import LabelledRows, TransductiveClassifier
from heads.rows.samples import Float
from heads.search.exact import neighbour_graph
from heads.solvers.transductive import propagated

_TINY = 1e-15  # added to shares before taking logarithms


@dataclass(eq=False, repr=False)
class LabelPropagation(TransductiveClassifier):
    """``(1 - alpha) (I - alpha S)^-1 Y``: S the normalised nearest-neighbour graph, Y the zero-shot probabilities.

    Parameters
    ----------
    n_neighbors : neighbours of each row in the graph
    alpha : weight of the neighbours, in [0, 1); 0 is the zero-shot head
    power : exponent of the cosines that weight the edges

    References
    ----------
    Zhou et al. 2004, "Learning with Local and Global Consistency"; on vision-language models Stojnić, Kalantidis,
    Tolias 2024, "Label Propagation for Zero-shot Classification with Vision-Language Models".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.8], [0.95, 0.85], [0.9, 0.91], [0.1, 1.0], [0.0, 1.0]])
    >>> text.logits(X).argmax(axis=1).tolist()
    [0, 0, 1, 1, 1]
    >>> LabelPropagation(n_neighbors=1).fit(X, texts=text).predict(X).tolist()
    [0, 0, 0, 1, 1]
    """

    name = "label_propagation"

    n_neighbors: Count = 10
    alpha: Fraction = 0.9
    power: NotNegative = 3.0

    def _adapt(self, X: Float, base: Float, labelled: LabelledRows | None) -> Float:
        rows, seeds = X, np.exp(base)
        if labelled is not None:
            rows = np.concatenate([X, labelled[0]])
            seeds = np.concatenate([seeds, np.eye(base.shape[1])[labelled[1]]])
        graph = neighbour_graph(rows, rows, int(self.n_neighbors))
        graph.data = np.maximum(graph.data, 0.0) ** self.power
        found = propagated(seeds, graph, float(self.alpha))[: len(X)]
        return np.asarray(np.log(found + _TINY) - np.log((found + _TINY).sum(axis=1, keepdims=True)))
