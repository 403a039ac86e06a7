"""How ridge's alpha is chosen: by the squared error, NLL or accuracy of every alpha on held-out rows.

Rows are held out one at a time, by group, by fold, or as a validation split. `held_out_errors` gives the squared errors
of all alphas in one pass. `Choice` adds NLL and accuracy, which need the scores of one alpha after another and so take
a sample of the rows. The algebra of leaving rows out is in `heads.solvers.ridge`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from featcache.errors import HeadError
from heads.estimators.kept_moments import blocks_in_place
from heads.rows.samples import Float, Samples
from heads.rows.selection import RowSampler, thinned
from heads.solvers.edges import warn_at_edge
from heads.solvers.parallel import Blocks
from heads.solvers.primitives import as_tensor
from heads.solvers.ridge.held_out import Elsewhere, HeldOut
from heads.solvers.ridge.leave_one_out import squared_errors
from heads.solvers.ridge.path_scores import PathScores, path_scores
from heads.solvers.ridge.problem import RidgeProblem
from heads.solvers.ridge.spectrum import Spectrum

ALPHAS = tuple(float(10.0 ** (k / 4)) for k in (-20, -18, -16, -14, *range(-12, 13)))
"""Default path: 29 values from 1e-5 to 1e3, four per decade from 1e-3 on, and two below."""

METRICS = ("auto", "nll", "top1", "squared_error")

SAMPLE = {"rows": 2**12, "scores": 2**19}
"""Size of the sample for NLL and accuracy: as many rows as give `scores` scores, and at least `rows`."""


@dataclass(eq=False)
class Choice:
    """Criteria of every alpha, and the best alpha.

    Attributes
    ----------
    alphas : (A,)
    errors : squared errors (A,), from `held_out_errors`
    held : sample of the held-out rows, from `held_out_rows`; empty where no row can be held out
    metric : "nll", "top1" or "squared_error"
    prior : weights (C, D) and intercepts (C,) of logits that are added to the scores, or None
    """

    alphas: Float
    errors: Float
    held: HeldOut
    metric: str
    prior: tuple[Float, Float] | None = None

    @cached_property
    def scores(self) -> PathScores:
        """NLL, accuracy, temperature and weight of the prior of every alpha; computed when first asked for."""
        return path_scores(self.held, self.alphas, self.prior)

    def best(self) -> int:
        """Position of the best alpha; warns if it is at the end of the path.

        Ties go to the lower NLL, then to the smaller alpha. Where no row can be held out, squared errors decide.
        """
        if self.metric == "squared_error":
            losses, best = self.errors, int(np.nanargmin(self.errors))
        else:
            losses = self.scores.nll if self.metric == "nll" else 1 - self.scores.top1
            best = self.scores.best(self.metric, self.errors)
        if len(self.held.labels):
            warn_at_edge("alpha", self.alphas, losses, best)
        return best


def held_out_errors(
    problem: RidgeProblem, spectrum: Spectrum, alphas: Float, validation: Callable[[], Blocks] | None = None
) -> Float:
    """Squared errors (A,), mean over held-out rows and targets.

    HeadError if no error is finite, or for alphas that the moments do not resolve.

    Parameters
    ----------
    problem : the training rows; without a validation split it says how they are held out
    spectrum : decomposition of all training rows
    alphas : (A,)
    validation : gives the blocks of a validation split at every call
    """
    spectrum.check_resolves(alphas)
    errors = problem.errors(spectrum, alphas) if validation is None else squared_errors(spectrum, validation, alphas)
    if not np.isfinite(errors).any():
        raise HeadError(
            "no alpha has a finite error: the selection rows hold NaN, or every row is fitted exactly; "
            "drop bad rows, or use larger alphas"
        )
    return errors / problem.n_targets


def held_out_rows(
    problem: RidgeProblem, spectrum: Spectrum, validation: Samples | None, class_weights: Float | None, **bounds: int
) -> HeldOut:
    """A sample of the validation split, weighted by class, or without one of the training rows as `problem` says.

    `bounds` are those of `heads.rows.selection.RowSampler`.
    """
    if validation is None:
        rows = problem.rows if problem.weights is None else int(np.count_nonzero(problem.weights))
        return problem.held_out(spectrum, RowSampler(rows, problem.n_targets, **bounds))
    X, y = (np.concatenate(column) for column in zip(*thinned(validation, **bounds), strict=True))
    labels = np.asarray(y, np.int64)
    weights = np.ones(len(labels)) if class_weights is None else class_weights[labels]
    return Elsewhere(X, labels, weights, spectrum)


def weighted_blocks(validation: Samples, class_weights: Float | None) -> Blocks:
    """Blocks ``(X, y, weights or None)`` of a validation split, weighted by class."""
    for features, labels in blocks_in_place(validation):
        yield features, labels, None if class_weights is None else class_weights[as_tensor(labels).cpu().numpy()]
