"""Ridge regression on numeric targets, with the path, leave-one-out, folds and groups of ridge classification."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from featcache import __version__
from featcache.errors import HeadError, MismatchError
from featcache.parameters import check_record
from heads.estimators.ridge.choice import ALPHAS, held_out_errors
from heads.fitted.file_format import Tensors, check_tensors, read_head, write_head
from heads.fitted.provenance import Provenance, check_encoder, encoder_record, split_id
from heads.rows.arrays import to_numpy
from heads.rows.samples import (
    Array,
    Features,
    Float,
    Rows,
    check_width,
    feature_blocks,
    finite_blocks,
    is_store,
    raise_not_finite,
)
from heads.rows.selection import SELECTION
from heads.rows.weights import checked_weights, group_ids
from heads.solvers.folds import HeldOut, folds_of
from heads.solvers.parallel import Block, Blocks
from heads.solvers.ridge.problem import RidgeProblem
from heads.solvers.ridge.spectrum import check_alphas

_KIND = "ridge_regression"


@dataclass(eq=False, repr=False)
class RidgeRegression(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Least squares to numeric targets (N,) or (N, K) with an L2 penalty: ages, counts, embeddings of another model.

    Minimises ``||Y - X Wᵀ - b||² + alpha ||W||²``, as ``sklearn.linear_model.Ridge(alpha)``, with the alpha of
    ``RidgeCV(alphas)``.

    Parameters
    ----------
    alphas : path of positive penalties
    fit_intercept : whether to fit an unpenalised intercept
    cv : as in `Ridge`, but folds are not stratified

    Attributes
    ----------
    coef_ : (K, D) float64, or (D,) for targets (N,)
    intercept_ : (K,) float64, or a number
    alpha_ : float
    alphas_ : (A,) float64
    cv_errors_ : (A,) float64; squared error, mean over held-out rows and targets
    n_features_in_, spectrum_
    provenance_ : dict
        Parameters, encoder, and the splits used to fit and to choose alpha. `predict` refuses stores of other encoders.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(100, 3))
    >>> model = RidgeRegression().fit(X, X @ [1.0, -2.0, 0.5] + 3.0)
    >>> model.score(X, X @ [1.0, -2.0, 0.5] + 3.0) > 0.999, model.coef_.shape
    (True, (3,))
    """

    alphas: Sequence[float] = ALPHAS
    fit_intercept: bool = True
    cv: HeldOut = "loo"

    def fit(
        self,
        X: Rows,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        groups: ArrayLike | None = None,
        selection: tuple[Rows, ArrayLike] | None = None,
    ) -> Self:
        """Fit on arrays, tensors or an image store, with one target per valid row.

        Parameters
        ----------
        X : image store (streamed; its labels are not used), or array-like (N, D)
        y : targets (N,) or (N, K), numbers
        sample_weight : weights (N,), as in scikit-learn
        groups : group (N,) of every row; the rows of a group are held out together
        selection : ``(X, y)`` on which alpha is chosen; None uses `cv`

        Raises
        ------
        HeadError
            For NaN or infinity (naming rows), shapes that do not match, or alphas <= 0.
        MismatchError
            If the selection split has another number of features or targets, or another encoder.
        """
        self.alphas_ = check_alphas(self.alphas)
        rows = _Rows.of(X, y)
        ids = group_ids(groups, len(rows.targets))
        weights = None if sample_weight is None else checked_weights(sample_weight, len(rows.targets))
        if weights is not None and not weights.any():
            raise HeadError("every row has a weight of zero; give at least one row a positive weight")
        no_classes = np.zeros(len(rows.targets), np.int64)
        problem = RidgeProblem(
            source=rows.blocks,
            dim=rows.dim,
            n_targets=rows.targets.shape[1],
            rows=len(rows.targets),
            fit_intercept=bool(self.fit_intercept),
            weights=weights,
            groups=ids,
            folds=folds_of(self.cv, no_classes, 1, ids) if selection is None else None,
        )
        if not np.isfinite(problem.diagonal()).all():
            raise_not_finite(rows.features())
        self.n_features_in_ = rows.dim
        self.provenance_ = _record(X, None if selection is None else selection[0], groups)
        self.spectrum_ = problem.spectrum()
        validation = None if selection is None else _validation_blocks(problem, *selection)
        self.cv_errors_ = held_out_errors(problem, self.spectrum_, self.alphas_, validation)
        self.alpha_ = float(self.alphas_[np.nanargmin(self.cv_errors_)])
        coef, intercepts = self.spectrum_.solve(self.alpha_)
        self.coef_: Float = coef[0] if rows.single else coef
        self.intercept_: Float | float = float(intercepts[0]) if rows.single else intercepts
        self.provenance_ = self.provenance_.with_params(alpha=self.alpha_, fit_intercept=bool(self.fit_intercept))
        return self

    def path(self) -> tuple[Float, Float]:
        """Weights (A, K, D) and intercepts (A, K) of every alpha of `alphas_`."""
        check_is_fitted(self, "coef_")
        if not hasattr(self, "spectrum_"):
            raise HeadError("a model loaded from a file has the chosen alpha only; fit it again for the path")
        return self.spectrum_.path(self.alphas_)

    def predict(self, X: Rows) -> Float:
        """Predicted targets, (N,) or (N, K) as in `fit`; X is a store or array-like."""
        check_is_fitted(self, "coef_")
        if is_store(X):
            check_encoder(_KIND, self.provenance_, self.n_features_in_, X)
        parts = []
        for (features,) in finite_blocks(lambda: ((x,) for x in feature_blocks(X))):
            check_width(features, self.n_features_in_, type(self).__name__)
            parts.append(features.astype(np.float64) @ self.coef_.T + self.intercept_)
        return np.concatenate(parts)

    def score(self, X: Rows, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """R² of the predictions, as `sklearn.metrics.r2_score`; X is a store or array-like, y may be a tensor."""
        weights = None if sample_weight is None else to_numpy(sample_weight)
        return float(super().score(X, to_numpy(y), weights))

    def save(self, path: str | Path) -> Path:
        """Write the model of the chosen alpha to a safetensors file, which `load` reads."""
        check_is_fitted(self, "coef_")
        tensors = {"weights": np.ascontiguousarray(self.coef_), "intercepts": np.atleast_1d(self.intercept_)}
        tensors |= {"alphas": self.alphas_, "cv_errors": self.cv_errors_}
        return write_head(path, tensors, {"kind": _KIND, "alpha": self.alpha_, "provenance": self.provenance_})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A fitted model, with its provenance, from a file that `save` wrote.

        Raises
        ------
        HeadError
            If the file is missing, or was not written by `save`.
        """
        tensors, record = read_head(path)
        if record["kind"] != _KIND:
            raise HeadError(f"{path}: a classification head, not a regression; read it with heads.load")
        try:
            check_record(record, {"alpha": float}, str(path), ("alpha", "provenance"))
            provenance = Provenance.checked(record["provenance"], str(path))
            params = check_record(provenance.params, {"fit_intercept": bool}, f"{path}: params", ("fit_intercept",))
            check_tensors(tensors, _shapes(tensors), {}, str(path))
        except ValueError as error:
            raise HeadError(f"{error}; fit the regression again") from error
        model = cls(tensors["alphas"].tolist(), params["fit_intercept"])
        model.coef_, model.alpha_ = tensors["weights"], record["alpha"]
        intercepts = tensors["intercepts"]
        model.intercept_ = intercepts if model.coef_.ndim == 2 else float(intercepts[0])
        model.alphas_, model.cv_errors_ = tensors["alphas"], tensors["cv_errors"]
        model.n_features_in_, model.provenance_ = model.coef_.shape[-1], provenance
        return model


def _shapes(tensors: Tensors) -> Mapping[str, str]:
    """Type and shape of the tensors in a file, for K targets or for one."""
    single = "weights" in tensors and tensors["weights"].ndim == 1
    weights = {"weights": "fD", "intercepts": "f1"} if single else {"weights": "fKD", "intercepts": "fK"}
    return {**weights, "alphas": "fA", "cv_errors": "fA"}


class _Rows(NamedTuple):
    """Rows and their numeric targets; `single` if the user gave these as a vector."""

    targets: Float  # (N, K)
    single: bool
    features: Callable[[], Iterator[Features]]  # yields blocks (n, D) at every call
    dim: int

    @classmethod
    def of(cls, X: Rows, y: ArrayLike | None) -> _Rows:
        """Checked rows of a store or an array-like."""
        targets = _checked_targets(y)
        wide, single = targets.astype(np.float64).reshape(len(targets), -1), targets.ndim == 1
        if is_store(X):
            return cls(wide, single, lambda: feature_blocks(X), int(X.dim))
        (features,) = feature_blocks(X)
        if len(features) != len(targets):
            raise HeadError(f"X has {len(features)} rows and y has {len(targets)} targets; they must be equal")
        return cls(wide, single, lambda: iter([features]), features.shape[1])

    def blocks(self) -> Iterator[Block]:
        """Blocks ``(X, y)``; a HeadError if there are more or fewer rows than targets."""
        done = 0
        for features in self.features():
            targets = self.targets[done : done + len(features)]
            done += len(features)
            if len(targets) == len(features):
                yield features, targets
        if done != len(self.targets):
            raise HeadError(f"X has {done} valid rows and y has {len(self.targets)} targets; they must be equal")


def _checked_targets(y: ArrayLike | None) -> Array:
    """Finite real targets (N,) or (N, K)."""
    if y is None:
        raise HeadError("regression requires y to be passed, but the target y is None; pass numbers (N,) or (N, K)")
    targets = to_numpy(y)
    if targets.dtype.kind == "c":
        raise HeadError("Complex data not supported: targets must be real; pass y.real or y.imag")
    if targets.dtype.kind not in "biuf" or targets.ndim not in (1, 2):
        try:
            targets = targets.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise HeadError(f"targets must be numbers (N,) or (N, K), got dtype {targets.dtype}") from error
    if not np.isfinite(targets).all():
        bad = np.flatnonzero(~np.isfinite(targets.reshape(len(targets), -1)).all(axis=1))[:10].tolist()
        raise HeadError(f"targets hold NaN or infinity, for instance in rows {bad}; drop these rows")
    return targets


def _validation_blocks(problem: RidgeProblem, X: Rows, y: ArrayLike) -> Callable[[], Blocks]:
    """Blocks of a validation split, which must have the training rows' features and targets, and be finite."""
    rows = _Rows.of(X, y)
    n_targets = rows.targets.shape[1]
    if (rows.dim, n_targets) != (problem.dim, problem.n_targets):
        raise MismatchError(
            f"the selection split has {rows.dim} features and {n_targets} targets, training has {problem.dim} and "
            f"{problem.n_targets}; give rows of the same encoder and the same targets"
        )
    if not len(rows.targets):
        raise HeadError("the selection split has no row; choose on another split, or on none")
    return lambda: finite_blocks(rows.blocks, SELECTION)


def _record(X: Rows, chosen: Rows | None, groups: ArrayLike | None) -> Provenance:
    """Provenance record of the training rows (with groups) and the selection split; their encoders must agree."""
    fitted = X if is_store(X) else None
    record = Provenance(
        head=_KIND,
        encoder_key=None if fitted is None else fitted.encoder_key,
        encoder=None if fitted is None else encoder_record(fitted),
        fitted_on=[] if fitted is None else [split_id(fitted, groups)],
        chosen_on=[split_id(chosen)] if is_store(chosen) else [],
        featcache=__version__,
    )
    if fitted is not None and is_store(chosen):
        check_encoder(_KIND, record, int(fitted.dim), chosen)
    return record
