"""What logistic heads of one label and of several share: a path of fits over C."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from heads.estimators.standardise import Standardising
from heads.rows.samples import Float
from heads.solvers.logistic.one_vs_rest import FittedClasses
from heads.solvers.logistic.path import Fitted

Fit = TypeVar("Fit", bound=Fitted | FittedClasses)


class PathOfC(Standardising):
    """Base of heads with a path of fits, which have `C`, `weights`, `intercepts` and `converged`."""

    tol: float
    max_iter: int
    _path: Sequence[Fitted | FittedClasses]

    def path(self) -> tuple[Float, Float]:
        """Weights (A, C, D) and intercepts (A, C) of the logits, for every C of `Cs_`."""
        check_is_fitted(self, "Cs_")
        return np.stack([f.weights for f in self._path]), np.stack([f.intercepts for f in self._path])

    def _unscaled(self, fitted: Fit) -> Fit:
        """The fit for unstandardised features."""
        weights, intercepts = self._folded(fitted.weights, fitted.intercepts)
        return replace(fitted, weights=weights, intercepts=intercepts)

    def _warn_of_slow(self, fits: Sequence[Fitted | FittedClasses]) -> None:
        slow = [f"{f.C:.3g}" for f in fits if not np.all(f.converged)]
        if slow:
            what = f"no convergence to tol={self.tol} in {self.max_iter} iterations at C = {', '.join(slow)}"
            warnings.warn(f"{what}; raise max_iter, or tol", ConvergenceWarning, stacklevel=3)
