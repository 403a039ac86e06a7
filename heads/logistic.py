"""Multinomial logistic regression: scikit-learn's objective, a warm path over C, a penalty towards zero or a prior."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from heads.base import LinearClassifier
from heads.held_out import selection_samples
from heads.linear import LinearHead
from heads.metrics import row_statistics
from heads.moment_classifier import ABSENT
from heads.samples import Samples, as_samples, require_finite
from heads.solvers.folds import FOLDS, FoldAssigner
from heads.solvers.logistic_path import Fitted, Rows, fit_path

__all__ = ["CS", "Logistic"]

Float = NDArray[np.float64]

CS = tuple(float(10.0 ** (k / 2)) for k in range(-4, 9))
"""Default path: 13 values from 1e-2 to 1e4, two a decade."""

_METRICS = ("nll", "top1")


class Logistic(LinearClassifier):
    """Softmax regression with an L2 penalty, C chosen on rows that did not fit.

    Minimises ``1/2 ||W - W0||² + C sum_i (logsumexp(W x_i + b) - (W x_i + b)[y_i])``, b unpenalised, W0 = 0 or the
    prior's weights. With W0 = 0 and three classes or more this is the objective, and the C, of
    ``sklearn.linear_model.LogisticRegression``. Two classes keep two weight vectors; scikit-learn then fits one vector
    w, and ``LogisticRegression(C=2 * C)`` is the same model: ``w = W[1] - W[0]``.

    Parameters
    ----------
    C
        Inverse penalty, or a path of them to choose from.
    fit_intercept
        Whether to fit an unpenalised intercept (in addition to the prior's).
    prior
        A fitted head on the logit scale (`LinearHead`, or a fitted `ZeroShot`) that weights are pulled to; as C goes
        to 0, W is the prior's. scikit-learn's `clone` keeps a `LinearHead`, but strips an estimator of its fit.
    metric
        What chooses C: "nll" (smallest mean) or "top1" (largest share); the smaller C on ties.
    tol
        Largest distance from the minimum, over the objective, as the solver estimates it.
    max_iter
        Iterations for one C.

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64; sums to zero beyond the prior's
    C_ : float
        The chosen inverse penalty.
    Cs_ : (A,) float64, ascending
    cv_scores_ : (A,) float64
        `metric` on the selection split, or over the held-out rows of 5 folds; empty where there was one C.
    objectives_ : (A,) float64
        Minima, in scikit-learn's scale.
    n_iter_ : (A,) int64
    temperature_ : 1.0; logistic scores are logits
    classes_, classnames_, n_features_in_, provenance_

    Notes
    -----
    Memory: the rows as one float32 matrix, ``4 N D`` bytes, filled block by block, ``8 N C`` bytes of logits, and
    ``4 C (D + 1)²`` bytes of preconditioner where they are at most 1 GiB.

    With an intercept a class without a training row is never predicted (its optimal intercept is minus infinity, here
    -1e4). Without one it is a class like any other: the penalty alone places its weights, at the prior's if nothing
    speaks against them.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> head = Logistic(C=[0.1, 1.0, 10.0]).fit(X, y)
    >>> head.score(X, y) > 0.9, head.coef_.shape
    (True, (3, 3))
    """

    name = "logistic"

    C_: float
    Cs_: Float
    cv_scores_: Float
    objectives_: Float
    n_iter_: NDArray[np.int64]

    def __init__(
        self,
        C: float | Sequence[float] = CS,
        fit_intercept: bool = True,
        prior: Any = None,
        metric: str = "nll",
        tol: float = 1e-8,
        max_iter: int = 1000,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.prior = prior
        self.metric = metric
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any = None, *, selection: Any = None, classnames: Sequence[str] | None = None) -> Self:
        """Fit on arrays, tensors or an image store; the head of the chosen C has seen the training rows alone.

        Parameters
        ----------
        X
            Image store (streamed once), or array-like (N, D).
        y
            Labels (N,), with arrays.
        selection
            Store, or ``(X, y)``, on which C is chosen; None uses 5 folds of the training rows.
        classnames
            With arrays: the C names; y then holds class indices, and classes may lack rows.

        Raises
        ------
        HeadError
            For fewer than two classes with rows, NaN or infinite features (naming rows), labels or parameters out of
            range, a prior of another shape.
        MismatchError
            If the selection store or the prior belongs to another encoder or class list.
        """
        Cs = self._checked()
        samples = as_samples(X, y, classnames=classnames)
        self._set_classes(samples)
        prior = self._prior(samples)
        shift = None if prior is None else (prior.weights.astype(np.float64), prior.bias.astype(np.float64))
        held_out = None if selection is None else selection_samples(selection, samples)
        rows = Rows(*_resident(samples), len(samples.classnames), fit_intercept=bool(self.fit_intercept))

        def path(keep: NDArray[np.bool_] | None = None) -> Iterable[Fitted]:
            return fit_path(rows, Cs, keep=keep, prior=shift, absent=ABSENT, tol=self.tol, max_iter=self.max_iter)

        how = "none" if len(Cs) == 1 else "folds" if held_out is None else "split"
        self._path = list(path())
        self.Cs_, self.cv_scores_ = Cs, np.zeros(0)
        if how == "split" and held_out is not None:
            self.cv_scores_ = self._split_scores(held_out)
        elif how == "folds":
            self.cv_scores_ = self._fold_scores(rows, path)
        self._take(samples, how, held_out, prior)
        return self

    def path(self) -> tuple[Float, Float]:
        """Weights (A, C, D) and intercepts (A, C) of every C of `Cs_`: logits."""
        check_is_fitted(self, "coef_")
        return np.stack([f.weights for f in self._path]), np.stack([f.intercepts for f in self._path])

    def path_heads(self) -> list[LinearHead]:
        """Every C as a `LinearHead`, for `heads.evaluate`, which takes them at once."""
        check_is_fitted(self, "coef_")
        return [
            LinearHead(
                f.weights.astype(np.float32),
                f.intercepts.astype(np.float32),
                self.classnames_,
                name=f"{self.name} C={f.C:.6g}",
                provenance={**self.provenance_, "params": {**self.provenance_["params"], "C": f.C}, "chosen_on": []},
            )
            for f in self._path
        ]

    def _checked(self) -> Float:
        """Parameters in range; Cs ascending."""
        Cs = np.unique(np.atleast_1d(np.asarray(self.C, dtype=np.float64)))
        if not Cs.size or not (np.isfinite(Cs) & (Cs > 0)).all():
            raise HeadError(f"C must be positive finite numbers, got {self.C!r}; try numpy.logspace(-2, 4, 13)")
        if self.metric not in _METRICS:
            raise HeadError(f"metric must be one of {', '.join(_METRICS)}, got {self.metric!r}")
        if not 0.0 < self.tol < 1.0 or self.max_iter < 1:
            raise HeadError(f"expected 0 < tol < 1 and max_iter >= 1, got tol={self.tol} and max_iter={self.max_iter}")
        return Cs

    def _prior(self, samples: Samples) -> LinearHead | None:
        """The prior, if it belongs to these rows."""
        if self.prior is None:
            return None
        if not hasattr(self.prior, "linear"):
            raise HeadError(f"prior must be a fitted linear head, got {type(self.prior).__name__}; fit one, or load it")
        prior: LinearHead = self.prior.linear()
        if samples.store is not None:
            prior.check(samples.store)
        expected = (len(samples.classnames), samples.dim)
        if prior.weights.shape != expected:
            raise HeadError(
                f"prior {prior.name!r} has weights {prior.weights.shape}, the training rows need {expected}; pass "
                "classnames if some classes have no row, or restrict the prior to the classes at hand"
            )
        return prior

    def _split_scores(self, held_out: Samples) -> Float:
        """`metric` of every C on the selection split, in one pass over it."""
        totals, n = np.zeros(len(self._path)), 0
        for features, labels in held_out.blocks():
            wide = features.astype(np.float64)
            totals += [self._total(wide @ f.weights.T + f.intercepts, labels) for f in self._path]
            n += len(labels)
        return totals / max(n, 1)

    def _fold_scores(self, rows: Rows, path: Callable[[NDArray[np.bool_]], Iterable[Fitted]]) -> Float:
        """`metric` of every C over held-out rows; rows whose class the other folds lack do not count."""
        totals, n = np.zeros(len(self.Cs_)), 0
        folds = FoldAssigner(rows.n_classes)(rows.y)
        for fold in range(FOLDS):
            keep = folds != fold
            known = np.unique(rows.y[keep])
            scored = np.flatnonzero(~keep & np.isin(rows.y, known))
            if len(scored) and len(known) > 1:
                totals += [self._total(rows.scores(scored, fitted), rows.y[scored]) for fitted in path(keep)]
                n += len(scored)
        return totals / max(n, 1)

    def _total(self, logits: Float, labels: NDArray[np.integer]) -> float:
        found = row_statistics(logits, labels)
        return float(found.nll.sum()) if self.metric == "nll" else float((found.rank == 0).sum())

    def _take(self, samples: Samples, how: str, held_out: Samples | None, prior: LinearHead | None) -> None:
        """Keep the best point of the path, and say where it comes from."""
        best = 0
        if self.cv_scores_.size:
            if not np.isfinite(self.cv_scores_).all():
                raise HeadError("the selection rows give no finite score: they hold NaN or infinity; drop these rows")
            best = int(self.cv_scores_.argmin() if self.metric == "nll" else self.cv_scores_.argmax())
        slow = [f"{f.C:.3g}" for f in self._path if not f.converged]
        if slow:
            what = f"no convergence to tol={self.tol} in {self.max_iter} iterations at C = {', '.join(slow)}"
            warnings.warn(f"{what}; raise max_iter, or tol", ConvergenceWarning, stacklevel=3)
        chosen = self._path[best]
        self.coef_, self.intercept_, self.C_, self.temperature_ = chosen.weights, chosen.intercepts, chosen.C, 1.0
        self.objectives_ = np.array([f.objective for f in self._path])
        self.n_iter_ = np.array([f.iterations for f in self._path])
        record = None if prior is None else {"head": prior.name, "text_digest": prior.provenance.get("text_digest")}
        params = {"C": self.C_, "fit_intercept": bool(self.fit_intercept), "metric": self.metric, "selection": how}
        chosen_on = held_out.store if how == "split" and held_out is not None else None
        self.provenance_ = self._provenance({**params, "prior": record}, samples.store, chosen_on)


def _resident(samples: Samples) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All rows as one float32 matrix (N, D) and labels (N,), filled block by block."""
    source = samples.store
    capacity = len(samples.source[1]) if source is None else len(source)
    X, y, n = np.empty((capacity, samples.dim), np.float32), np.empty(capacity, np.int64), 0
    with np.errstate(over="ignore"):
        for features, labels in samples.blocks():
            X[n : n + len(labels)], y[n : n + len(labels)] = features, labels
            n += len(labels)
    X, y = X[:n], y[:n]
    require_finite(samples, X.sum(axis=0, dtype=np.float64))
    if len(np.unique(y)) < 2:
        raise HeadError(f"{len(np.unique(y))} class has rows, expected at least 2; add rows of another class")
    return X, y
