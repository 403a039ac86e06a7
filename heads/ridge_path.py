"""What a fitted ridge gives beside its head: every alpha, and some of the target columns, without a pass over rows."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Self

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.base import LinearClassifier
from heads.linear import LinearHead
from heads.logits import positions_of
from heads.solvers.eigh_path import Spectrum

__all__ = ["RidgePath"]


class RidgePath(LinearClassifier):
    """Base of `Ridge`, which fits and sets `spectrum_`, `alphas_` (A,) and the chosen `alpha_`."""

    alpha_: float
    alphas_: NDArray[np.float64]
    spectrum_: Spectrum

    def path(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (A, C, D) and intercepts (A, C) of every alpha of `alphas_`: scores, before any temperature."""
        if not hasattr(self, "spectrum_"):
            raise HeadError("this Ridge is not fitted yet; call fit first")
        return self.spectrum_.path(self.alphas_)

    def path_heads(self) -> list[LinearHead]:
        """Every alpha, ascending, as logits for `heads.evaluate`, which takes them at once.

        Accuracies are each alpha's own. All scores are divided by the chosen alpha's `temperature_`, which is not
        the best one for the NLL of the others: a temperature each would take the held-out scores of every alpha.
        """
        params, heads = self.linear().provenance["params"], []
        for alpha in np.union1d(self.alphas_, [self.alpha_]).tolist():
            own, name = {**params, "alpha": alpha}, f"alpha={alpha:.6g}"
            heads.append(self._on_path(*self.spectrum_.solve(alpha), self.temperature_, name, params=own))
        return heads

    def restrict(self, class_subset: Sequence[int], alpha: float | None = None) -> Self:
        """A fitted copy with some target columns only, in the order given; no pass over the rows.

        Rows of the other classes stay in the fit, as rows of none of these. The temperature stays.

        Parameters
        ----------
        class_subset
            Class indices, at least two, none twice.
        alpha
            Another penalty than `alpha_`.

        Raises
        ------
        HeadError
            Before fit, for indices outside [0, C), or repeated ones.
        """
        index = positions_of(class_subset, self.linear())
        found = copy(self)
        found.alpha_ = self.alpha_ if alpha is None else float(alpha)
        found.spectrum_ = self.spectrum_.columns(index)
        found.coef_, found.intercept_ = found.spectrum_.solve(found.alpha_)
        found.classes_, found.classnames_ = self.classes_[index], tuple(self.classnames_[i] for i in index.tolist())
        params = {**self.provenance_["params"], "alpha": found.alpha_, "of_classes": len(self.classnames_)}
        found.provenance_ = {**self.provenance_, "params": params, "classnames": list(found.classnames_)}
        return found
