"""Adapting zero-shot predictions to unlabelled test rows: Gaussians, Dirichlets, label propagation.

Each takes the log-probabilities of a zero-shot head on unlabelled rows, and returns new ones, (N, C).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.special import digamma, gammaln, log_softmax, polygamma

Float = NDArray[np.float64]

_SHARPNESS = 50.0  # TransCLIP's weight of assignments in its objective, and of labelled rows
_CONFIDENT = 8  # number of rows from which the initial mean of a class is computed
_INNER = 5
_CONCENTRATED = 1e6  # largest sum of a Dirichlet's parameters: the likelihood of a single row is unbounded
_SETTLED = 1e-11  # `dirichlet_mm` stops at this squared change, relative to the squared parameters
_LEAST = 1e-8  # smallest of a Dirichlet's parameters
_TINY = 1e-15  # added to probabilities before their logarithm


class Labelled(NamedTuple):
    """Unit rows (M, D), their class indices (M,), and the graph (M, N) of cosines with their nearest neighbours."""

    features: Float
    labels: NDArray[np.int64]
    graph: csr_array


def gaussian_assignments(
    X: Float,
    base: Float,
    graph: csr_array,
    labelled: Labelled | None = None,
    *,
    weight: float = 1.0,
    gamma: float = 0.0,
) -> Float:
    """TransCLIP: log-probabilities (N, C) from Gaussians around adapted means, nearest neighbours and the texts.

    Ten rounds of block-wise maximisation over assignments z, means and one diagonal covariance, as published::

        z_i ~ exp(weight base_i + (log N(x_i; mean_c, S) + 50 / 2k (sum_j (w_ij + w_ji) z_j)) / 50)

    Parameters
    ----------
    X : (N, D) unit rows
    base : (N, C) log-probabilities of the zero-shot head
    graph : (N, N) cosines w of each row with its k nearest neighbours
    labelled : rows whose assignments are fixed
    weight : of the texts; published values are 1 without labelled rows and 0.5 with them
    gamma : weight of labelled rows in means and covariance
    """
    n, dim = X.shape
    z, assigned = np.exp(base), None
    coupling, from_labelled, k = graph + graph.T, np.zeros_like(base), int(np.diff(graph.indptr).max(initial=1))
    if labelled is None:
        means = _confident_means(X, z)
    else:
        assigned = np.eye(base.shape[1])[labelled.labels]
        means = _unit(assigned.T @ labelled.features)
        from_labelled = np.asarray(labelled.graph.T @ assigned)
    variance = np.full(dim, 1.0 / dim)
    share = 0.0 if labelled is None else gamma * _SHARPNESS / len(labelled.labels)
    for rounds in range(11):
        scaled = means / variance
        likelihood = X @ scaled.T - 0.5 * (means * scaled).sum(axis=1) - 0.5 * (X**2 @ (1 / variance))[:, None]
        for _ in range(_INNER):
            pull = _SHARPNESS / (2 * k) * (coupling @ z + from_labelled)
            logits = log_softmax(weight * base + (likelihood + pull) / _SHARPNESS, axis=1)
            z = np.exp(logits)
        if rounds == 10:
            break
        mass, sums, squares = z.sum(axis=0) / n, z.T @ X / n, z.T @ X**2 / n
        if labelled is not None and assigned is not None:
            mass = mass + share * assigned.sum(axis=0)
            sums = sums + share * (assigned.T @ labelled.features)
            squares = squares + share * (assigned.T @ labelled.features**2)
        means = np.where(mass[:, None] > _TINY, _unit(sums / np.maximum(mass, _TINY)[:, None]), means)
        spread = squares - 2 * means * sums + mass[:, None] * means**2
        variance = np.maximum(spread.sum(axis=0) / mass.sum(), np.finfo(np.float32).eps)
    return np.asarray(logits)


def dirichlet_assignments(base: Float, *, balance: float, rounds: int = 20, mm_steps: int | None = None) -> Float:
    """EM-Dirichlet: log-probabilities (N, C) from a Dirichlet per class over the zero-shot probabilities.

    Each round fits the maximum-likelihood Dirichlet of each class, weighted by the assignments, and the class
    proportions pi, and then sets ``z_i ~ exp(log Dir(p_i; alpha_c) + balance (log pi_c + 1))``.

    Parameters
    ----------
    base : (N, C) log-probabilities of the zero-shot head
    balance : weight of the class proportions, which empties small classes
    mm_steps : steps of `dirichlet_mm` per round; None for the exact maximum
    """
    logs = np.log(np.exp(base) + _TINY)
    z, alpha, logits = np.exp(base), np.ones((base.shape[1], base.shape[1])), base
    for _ in range(rounds):
        mass = z.sum(axis=0)
        filled = mass > _TINY
        wanted = (z.T @ logs)[filled] / mass[filled, None]
        if mm_steps is None:
            alpha[filled] = dirichlet_maximum(wanted, alpha[filled])
        else:
            alpha[filled] = dirichlet_mm(wanted, alpha[filled], mm_steps)
        shares = np.log(mass / len(z) + _TINY) + 1.0
        density = gammaln(alpha.sum(axis=1)) - gammaln(alpha).sum(axis=1) + logs @ (alpha - 1.0).T
        logits = log_softmax(density + balance * shares, axis=1)
        z = np.exp(logits)
    return np.asarray(logits)


def matched_classes(logits: Float, base: Float) -> Float:
    """Columns of logits (N, C), reordered so that clusters are matched to classes.

    Clusters with rows are assigned one class each, so that the sum of their mean zero-shot probabilities is largest;
    empty clusters keep their place where it is free.

    >>> logits, base = np.log([[0.9, 0.1], [0.8, 0.2]]), np.log([[0.3, 0.7], [0.4, 0.6]])
    >>> np.exp(matched_classes(logits, base)).round(1).tolist()
    [[0.1, 0.9], [0.2, 0.8]]
    """
    best, every = logits.argmax(axis=1), np.arange(logits.shape[1])
    clusters = np.unique(best)
    means = np.stack([np.exp(base[best == cluster]).mean(axis=0) for cluster in clusters])
    rows, classes = linear_sum_assignment(means, maximize=True)
    source = np.full(len(every), -1)
    source[classes] = clusters[rows]
    free = np.setdiff1d(every, clusters)
    stays = free[source[free] < 0]
    source[stays] = stays
    source[source < 0] = np.setdiff1d(free, stays)
    return np.asarray(logits[:, source])


def dirichlet_maximum(means: Float, start: Float, tol: float = 1e-10, max_iter: int = 500) -> Float:
    """Maximum-likelihood parameters (C, K) of Dirichlets, given means (C, K) of log-probabilities.

    Newton steps (Minka 2000, "Estimating a Dirichlet distribution"), for each row until its own change is below `tol`.
    A coordinate that would become negative is halved, down to 1e-8; the parameters sum to at most a million.

    >>> truth = np.array([[2.0, 5.0, 0.5]])
    >>> means = digamma(truth) - digamma(truth.sum())
    >>> dirichlet_maximum(means, np.ones((1, 3))).round(6).tolist()
    [[2.0, 5.0, 0.5]]
    """
    found, open_rows = start.copy(), np.arange(len(start))
    for _ in range(max_iter):
        alpha = found[open_rows]
        total = alpha.sum(axis=1, keepdims=True)
        gradient = digamma(total) - digamma(alpha) + means[open_rows]
        diagonal, common = -polygamma(1, alpha), polygamma(1, total)
        ratio = (gradient / diagonal).sum(axis=1, keepdims=True) / (
            1 / common + (1 / diagonal).sum(axis=1, keepdims=True)
        )
        moved = alpha - (gradient - ratio) / diagonal
        moved = np.maximum(np.where(moved > 0, moved, alpha / 2), _LEAST)
        moved *= np.minimum(1.0, _CONCENTRATED / moved.sum(axis=1, keepdims=True))
        change = np.abs(moved - alpha).max(axis=1) / alpha.max(axis=1)
        found[open_rows] = moved
        open_rows = open_rows[change >= tol]
        if not len(open_rows):
            break
    return found


def dirichlet_mm(means: Float, start: Float, steps: int) -> Float:
    """Parameters (C, K) of Dirichlets after up to `steps` of EM-Dirichlet's minorise-maximise iteration.

    Each step maximises a lower bound of the likelihood that is tight at the current parameters a: ``lnGamma(sum x)`` is
    replaced by its tangent, and ``lnGamma(x + 1)`` by a parabola of curvature ``c = 2 (psi(a + 1) a - lnGamma(a + 1)) /
    a²``. The maximum is the positive root of ``c x² + (psi(a + 1) - psi(sum a) - means - c a) x - 1``. As in the
    authors' code, every fiftieth step ends the iteration if the squared change is below 1e-11 of the squared
    parameters.

    >>> truth = np.array([[2.0, 5.0, 0.5]])
    >>> means = digamma(truth) - digamma(truth.sum())
    >>> dirichlet_mm(means, np.ones((1, 3)), 10_000).round(3).tolist()
    [[2.0, 5.0, 0.5]]
    """
    alpha = start
    for step in range(steps):
        slope = digamma(alpha + 1.0)
        curvature = np.full_like(alpha, math.pi**2 / 6)  # in the limit of 0
        np.divide(2 * (slope * alpha - gammaln(alpha + 1.0)), alpha**2, out=curvature, where=alpha > _LEAST)
        linear = slope - digamma(alpha.sum(axis=1, keepdims=True)) - means - curvature * alpha
        root = np.sqrt(linear**2 + 4 * curvature)
        # Of the two forms of the root, the one without cancellation.
        moved = np.where(linear > 0, 2 / (linear + root), (root - linear) / (2 * curvature))
        settled = step and step % 50 == 0 and np.square(moved - alpha).sum() < _SETTLED * np.square(alpha).sum()
        alpha = moved
        if settled:
            break
    return alpha


def propagated(seeds: Float, graph: csr_array, alpha: float) -> Float:
    """Label propagation: ``(1 - alpha) (I - alpha S)^-1 Y`` (N, C), S the symmetrically normalised graph.

    Parameters
    ----------
    seeds : Y (N, C)
    graph : (N, N) non-negative edge weights; the two directions of an edge are added
    alpha : in [0, 1)

    >>> graph = csr_array(np.array([[0.0, 1.0], [1.0, 0.0]]))
    >>> propagated(np.eye(2), graph, 0.5).round(4).tolist()
    [[0.6667, 0.3333], [0.3333, 0.6667]]
    """
    both = graph + graph.T
    scale = 1.0 / np.sqrt(np.maximum(np.asarray(both.sum(axis=1)).ravel(), _TINY))
    normal = csr_array(both.multiply(scale[:, None]).multiply(scale[None, :]))
    found = seeds
    # Each iteration reduces the error by a factor of alpha.
    for _ in range(math.ceil(math.log(1e-9) / math.log(alpha)) if alpha > 0 else 0):
        found = alpha * (normal @ found) + (1 - alpha) * seeds
    return found


def _confident_means(X: Float, z: Float) -> Float:
    """Unit means (C, D) of each class's most probable rows, weighted by probability."""
    top = np.argpartition(-z, min(_CONFIDENT, len(z)) - 1, axis=0)[:_CONFIDENT]
    weights = np.zeros_like(z)
    np.put_along_axis(weights, top, np.take_along_axis(z, top, axis=0), axis=0)
    return _unit(weights.T @ X)


def _unit(rows: Float) -> Float:
    """Rows scaled to length 1; zero rows stay zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))
