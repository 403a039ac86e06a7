"""Every head in float64 numpy, from its published formula: what `heads` computes is compared with these."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Labels = NDArray[np.int64]


def softmax(logits: Float) -> Float:
    """Probabilities (N, C)."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def unit(rows: Float) -> Float:
    """Rows divided by their norm; zero rows stay zero."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled = rows / np.where(largest > 0, largest, 1)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled / np.where(lengths > 0, lengths, 1)


def ridge(X: Float, Y: Float, alpha: float, weights: Float | None = None) -> tuple[Float, Float]:
    """Weights (C, D) and intercepts (C,) by numpy's least squares, with additional rows for the penalty."""
    w = np.ones(len(X)) if weights is None else weights
    w = w / w.max()
    alpha = alpha if weights is None else alpha / weights.max()
    mean_x, mean_y = w @ X / w.sum(), w @ Y / w.sum()
    root = np.sqrt(w)[:, None]
    scale = np.abs(X).max() or 1.0  # so that neither block is lost beside the other
    rows = np.concatenate([root * (X - mean_x) / scale, np.sqrt(alpha) / scale * np.eye(X.shape[1])])
    targets = np.concatenate([root * (Y - mean_y), np.zeros((X.shape[1], Y.shape[1]))])
    found = np.linalg.lstsq(rows, targets, rcond=None)[0].T / scale
    return found, mean_y - found @ mean_x


def class_means(X: Float, y: Labels, classes: int) -> Float:
    """Means (C, D) of the rows of each class; NaN where there are none."""
    return np.stack([X[y == c].mean(axis=0) if (y == c).any() else np.full(X.shape[1], np.nan) for c in range(classes)])


def covariance(X: Float, y: Labels, means: Float, shrinkage: float) -> Float:
    """Shrunk covariance (D, D) within classes; if there is none, the variance of all rows, or 1."""
    dim = X.shape[1]
    within = (X - means[y]).T @ (X - means[y]) / len(X)
    power = np.trace(X.T @ X) / len(X)
    if np.trace(within) > 1e-12 * power:
        return np.asarray((1 - shrinkage) * within + shrinkage * np.trace(within) / dim * np.eye(dim))
    total = np.trace((X - X.mean(axis=0)).T @ (X - X.mean(axis=0))) / len(X)
    return (total / dim if total > 1e-12 * power else 1.0) * np.eye(dim)


def nearest_mean(X: Float, y: Labels, classes: int, normalize: bool = True) -> Callable[[Float], Float]:
    """Scores: cosine to the class mean times the row's length, or less half the squared distance."""
    means = class_means(X, y, classes)
    if normalize:
        return lambda Z: Z @ unit(means).T
    return lambda Z: -((Z[:, None] - means) ** 2).sum(axis=2) / 2


def discriminant(X: Float, y: Labels, classes: int, shrinkage: float | None = None) -> Callable[[Float], Float]:
    """Scores of Gaussian classes with one shrunk covariance, and the training frequencies."""
    n, dim = X.shape
    means, s = class_means(X, y, classes), dim / (n - 1 + dim) if shrinkage is None else shrinkage
    precision = np.linalg.pinv(covariance(X, y, means, s), rcond=1e-14, hermitian=True)
    logs = np.log(np.bincount(y, minlength=classes) / n)
    centre = X.mean(axis=0)

    def scores(Z: Float) -> Float:
        away = (Z - centre)[:, None] - (means - centre)
        return np.asarray(logs - np.einsum("ncd,de,nce->nc", away, precision, away) / 2)

    return scores


def gda(X: Float, y: Labels, text: Float, alpha: float) -> Callable[[Float], Float]:
    """Zero-shot logits plus alpha times the discriminant of Wang et al. 2024, as published."""
    n, dim = X.shape
    present = np.bincount(y, minlength=len(text)) > 0
    means = class_means(X, y, len(text))
    # D ((N - 1) S' + trace(S') I)^-1 with S' the scatter over N - 1, as a shrunk covariance over N
    s = dim / (n - 1 + dim)
    precision = np.linalg.pinv(covariance(X, y, means, s), hermitian=True) * dim * (n - 1) / (n * (n - 1 + dim))
    weights = means @ precision
    bias = np.log(1 / present.sum()) - (means * weights).sum(axis=1) / 2
    weights[~present], bias[~present] = weights[present].mean(axis=0), bias[present].mean()
    if np.isinf(alpha):
        return lambda Z: Z @ weights.T + bias
    return lambda Z: Z @ text.T + alpha * (Z @ weights.T + bias)


def knn(X: Float, y: Labels, classes: int, k: int, temperature: float) -> Callable[[Float], Float]:
    """Log vote shares of the k nearest rows by cosine, with the floor of 1e-8."""

    def scores(Z: Float) -> Float:
        cosines = unit(Z) @ unit(X).T
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(cosines, nearest, axis=1)
        votes = np.exp((found - found[:, :1]) / temperature)
        shares = np.stack([(votes * (y[nearest] == c)).sum(axis=1) for c in range(classes)], axis=1)
        return np.asarray(np.log(shares / shares.sum(axis=1, keepdims=True) + 1e-8))

    return scores


def tip_adapter(X: Float, y: Labels, text: Float, alpha: float, beta: float) -> Callable[[Float], Float]:
    """Zero-shot logits plus votes of the rows by their cosine."""

    def scores(Z: Float) -> Float:
        votes = np.exp(-beta * (1 - unit(Z) @ unit(X).T)) @ np.eye(len(text))[y]
        return Z @ text.T + alpha * votes

    return scores


def adamw(value: list[Float], slopes: Callable[[list[Float]], list[Float]], rates: Float, **options: float) -> None:
    """Update values in place: AdamW (Loshchilov and Hutter 2019) with a rate per step, the gradient clipped."""
    decay, eps, clip = options.get("decay", 0.01), options.get("eps", 1e-8), options.get("clip", np.inf)
    first, second = ([np.zeros_like(v) for v in value] for _ in range(2))
    for step, rate in enumerate(rates.tolist(), start=1):
        found = slopes(value)
        norm = np.sqrt(sum(float((g**2).sum()) for g in found))
        found = [g * min(1.0, clip / (norm + 1e-6)) for g in found]
        for v, g, m, s in zip(value, found, first, second, strict=True):
            v *= 1 - rate * decay
            m += 0.1 * (g - m)
            s += 0.001 * (g**2 - s)
            v -= rate * (m / (1 - 0.9**step)) / (np.sqrt(s / (1 - 0.999**step)) + eps)


def linear_probe(X: Float, y: Labels, classes: int, rates: Float, decay: float) -> tuple[Float, Float]:
    """Weights and bias of the cross entropy by AdamW on all rows at once, from zeros."""
    value = [np.zeros((classes, X.shape[1])), np.zeros(classes)]

    def slopes(value: list[Float]) -> list[Float]:
        away = (softmax(X @ value[0].T + value[1]) - np.eye(classes)[y]) / len(X)
        return [away.T @ X, away.sum(axis=0)]

    adamw(value, slopes, rates, decay=decay, clip=1.0)
    return value[0], value[1]


def sgd_probe(X: Float, y: Labels, classes: int, rates: Float, momentum: float) -> tuple[Float, Float]:
    """Weights and bias of the cross entropy by SGD with momentum on all rows at once, from zeros."""
    rows = np.concatenate([X, np.ones((len(X), 1))], axis=1)
    value, velocity = np.zeros((classes, rows.shape[1])), np.zeros((classes, rows.shape[1]))
    for rate in rates.tolist():
        velocity = momentum * velocity + (softmax(rows @ value.T) - np.eye(classes)[y]).T @ rows / len(X)
        value -= rate * velocity
    return value[:, :-1], value[:, -1]


def cosine_probe(X: Float, y: Labels, classes: int, rates: Float) -> Float:
    """Weights ``s w / |w|`` of the cross entropy by AdamW on all rows at once, from class means and s = 10."""
    means = np.stack([X[y == c].mean(axis=0) if (y == c).any() else X.mean(axis=0) for c in range(classes)])
    value = [means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), np.log([10.0])]

    def slopes(value: list[Float]) -> list[Float]:
        lengths, scale = np.maximum(np.linalg.norm(value[0], axis=1, keepdims=True), 1e-12), np.exp(value[1][0])
        directions = value[0] / lengths
        away = (softmax(scale * X @ directions.T) - np.eye(classes)[y]).T @ X / len(X)
        along = (away * directions).sum(axis=1, keepdims=True)
        return [scale / lengths * (away - along * directions), scale * along.sum(axis=0)]

    adamw(value, slopes, rates, decay=0.0)
    lengths = np.maximum(np.linalg.norm(value[0], axis=1, keepdims=True), 1e-12)
    return np.asarray(np.exp(value[1][0]) * value[0] / lengths)


def trained_keys(X: Float, y: Labels, text: Float, epochs: int, rate: float) -> Float:
    """Tip-Adapter-F's keys, all rows in one batch, no row voting for itself, at alpha 1 and beta 5.5."""
    rows, base, targets = unit(X), X @ text.T, np.eye(len(text))[y]
    value, beta = [rows.copy()], 5.5

    def slopes(value: list[Float]) -> list[Float]:
        votes = np.exp(beta * (rows @ value[0].T - 1)) * (1 - np.eye(len(rows)))
        away = (softmax(base + votes @ targets) - targets) / len(rows)
        return [beta * ((away @ targets.T) * votes).T @ rows]

    rates = rate * (1 + np.cos(np.pi * np.arange(epochs) / epochs)) / 2
    adamw(value, slopes, rates, eps=1e-4)
    return value[0]


def lp_plus_plus(X: Float, y: Labels, text: Float, steps: int) -> tuple[Float, Float]:
    """Weights and bias of LP++ (Huang et al. 2024) after some steps."""
    n, classes = len(X), len(text)
    directions = unit(text)
    cosines, targets = X @ directions.T, np.eye(classes)[y]
    counts = targets.sum(axis=0)
    rate = 4 * n / np.linalg.eigvalsh(X.T @ X)[-1]
    blend_rate = n / (4 * (cosines**2).sum(axis=0).max())
    own = (cosines * targets).sum(axis=0)
    blend = np.full(classes, 250 * (own[counts > 0] / counts[counts > 0]).mean())
    weights, bias = targets.T @ X, np.zeros(classes)
    speed, bias_speed = np.zeros_like(weights), np.zeros(classes)
    for step in range(1, steps + 1):
        away = (softmax(X @ weights.T + bias + blend * cosines) - targets) / n
        speed, bias_speed = 0.9 * speed + away.T @ X, 0.9 * bias_speed + away.sum(axis=0)
        weights, bias = weights - rate * speed, bias - rate * bias_speed
        if step % 10 == 0:
            blend = blend - blend_rate * (away * cosines).sum(axis=0)
    return weights + blend[:, None] * directions, bias


def prototypes(X: Float, y: Labels, text: Float, rates: Float, *, clap: bool) -> Float:
    """Weights (C, D) of CLAP by SGD with momentum, or of TaskRes by Adam; vectors of length 10, all rows in a batch."""
    scale, start, classes = np.linalg.norm(text, axis=1, keepdims=True), 10 * unit(text), len(text)
    own = softmax(X @ text.T)[np.arange(len(y)), y]
    known = np.array([own[y == c].mean() if (y == c).any() else 1.0 for c in range(classes)])[:, None] * clap
    share = 1.0 if clap else 0.5
    value, speed = [start.copy() if clap else np.zeros_like(start)], np.zeros_like(start)

    def vectors(value: list[Float]) -> Float:
        return value[0] if clap else start + share * value[0]

    def slopes(value: list[Float]) -> list[Float]:
        found = vectors(value)
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        away = scale * ((softmax(X @ (scale * found / lengths).T) - np.eye(classes)[y]) / len(X)).T @ X
        across = (away - (away * found).sum(axis=1, keepdims=True) * found / lengths**2) / lengths
        return [share * (across + 2 * known * (found - start) / classes)]

    if clap:
        for rate in rates.tolist():
            speed = 0.9 * speed + slopes(value)[0]
            value[0] -= rate * speed
    else:
        adamw(value, slopes, rates, decay=0.0)
    return np.asarray(scale * unit(vectors(value)))


def prolip(X: Float, y: Labels, text: Float, lr: float, epochs: int, start: Float | None = None) -> Float:
    """Projection (W, D) by Adam, all rows in a batch, with a penalty of one over the mean rows per class."""
    X, start = unit(X), np.eye(X.shape[1]) if start is None else start
    penalty, value = len(np.unique(y)) / len(y), [start.copy()]

    def slopes(value: list[Float]) -> list[Float]:
        projected = X @ value[0]
        lengths = np.linalg.norm(projected, axis=1, keepdims=True)
        lengths[lengths == 0] = 1.0
        away = (softmax(projected / lengths @ text.T) - np.eye(len(text))[y]) @ text / len(X)
        across = (away - (away * projected).sum(axis=1, keepdims=True) * projected / lengths**2) / lengths
        return [X.T @ across + 2 * penalty * (value[0] - start)]

    rates = lr * (1 + np.cos(np.pi * np.arange(epochs) / epochs)) / 2
    adamw(value, slopes, rates, decay=0.0, eps=1e-4)
    return value[0]


def projected(projection: Float, text: Float) -> Callable[[Float], Float]:
    """Logits of the directions of projected rows."""
    return lambda Z: unit(Z @ projection) @ text.T


def near(rows: Float, k: int) -> Float:
    """Cosines (N, N) of each row with its k nearest others."""
    cosines = rows @ rows.T
    order = np.argsort(np.where(np.eye(len(rows)) > 0, np.inf, -cosines), axis=1, kind="stable")[
        :, : min(k, len(rows) - 1)
    ]
    found = np.zeros_like(cosines)
    np.put_along_axis(found, order, np.take_along_axis(cosines, order, axis=1), axis=1)
    return found


def label_propagation(X: Float, text: Float, k: int) -> Float:
    """Log-probabilities of ``(I - 0.9 S)^-1 Y``."""
    graph = np.maximum(near(unit(X), k), 0) ** 3
    graph = graph + graph.T
    roots = np.sqrt(np.maximum(graph.sum(axis=1), 1e-300))
    found = np.linalg.solve(np.eye(len(X)) - 0.9 * graph / roots / roots[:, None], softmax(X @ text.T))
    return np.asarray(np.log(found / found.sum(axis=1, keepdims=True) + 1e-300))


def transclip(X: Float, text: Float, k: int) -> Float:
    """Log-probabilities of TransCLIP without labelled rows (Zanella et al. 2024)."""
    rows, base = unit(X), softmax(X @ text.T)
    (n, dim), z, graph = rows.shape, base.copy(), near(rows, k)
    top = np.argsort(-z, axis=0, kind="stable")[:8]
    means = unit(np.stack([z[t, c] @ rows[t] for c, t in enumerate(top.T)]))
    variance, width = np.full(dim, 1 / dim), min(k, n - 1)
    for turn in range(11):
        density = -0.5 * (((rows[:, None] - means) ** 2) / variance).sum(axis=2)
        for _ in range(5):
            pull = 50 / (2 * width) * (graph + graph.T) @ z if width else 0 * z
            logits = np.log(np.maximum(base, 1e-300)) + (density + pull) / 50
            z = softmax(logits)
        if turn < 10:
            means = unit(z.T @ rows)
            squares = (rows[:, None] - means) ** 2
            variance = np.maximum((z[:, :, None] * squares).sum(axis=(0, 1)) / n, np.finfo(np.float32).eps)
    return np.asarray(logits)


def em_dirichlet(X: Float, text: Float, rounds: int) -> Float:
    """Log-probabilities of EM-Dirichlet (Martin et al. 2024), class shares not weighed; each maximum by L-BFGS."""
    from scipy.optimize import minimize
    from scipy.special import digamma, gammaln

    logs = np.log(softmax(X @ text.T) + 1e-15)
    z = softmax(X @ text.T)
    for _ in range(rounds):
        found = []
        for mean in z.T @ logs / z.sum(axis=0)[:, None]:

            def loss(t: Float, mean: Float = mean) -> tuple[float, Float]:
                a = np.exp(t)
                value = gammaln(a).sum() - gammaln(a.sum()) - (a - 1) @ mean
                return float(value), a * (digamma(a) - digamma(a.sum()) - mean)

            found.append(np.exp(minimize(loss, np.zeros(len(mean)), jac=True, tol=1e-14, method="BFGS").x))
        density = np.array([gammaln(a.sum()) - gammaln(a).sum() + logs @ (a - 1) for a in found]).T
        z = softmax(density)
    return density
