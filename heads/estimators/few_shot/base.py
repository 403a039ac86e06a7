"""Base of the few-shot heads: `fit`, folds, and the choice of settings on them."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from heads.estimators.base import HeadClassifier
from heads.estimators.text_prior import Texts, samples_of, text_head, text_identity
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Json, Provenance
from heads.rows.samples import Features, Ints, Mask, Rows, Samples, Selection, gathered, require_finite
from heads.rows.selection import selection_samples
from heads.solvers.folds import FOLDS, FoldAssigner


@dataclass(frozen=True)
class FewShotRows:
    """The zero-shot head, the training rows (M, D) and labels (M,) in memory, and the selection split, if any."""

    text: LinearHead
    samples: Samples
    features: Features
    labels: Ints
    validation: Samples | None


class FewShotClassifier(HeadClassifier):
    """Base of few-shot heads: subclasses fit to `FewShotRows`."""

    takes_texts: ClassVar[bool] = True

    metric: str

    def fit(self, X: Rows, y: ArrayLike | None = None, *, texts: Texts, selection: Selection | None = None) -> Self:
        """Fit on arrays, tensors or an image store, in memory.

        Parameters
        ----------
        X : image store, or array-like (N, D)
        y : labels (N,), with arrays: class indices of the zero-shot head
        texts : text store, or any linear head as zero-shot head
        selection : store, or ``(X, y)``, on which settings are chosen; None cross-validates on the training rows

        Raises
        ------
        HeadError
            For parameters or labels out of range, or NaN or infinite features.
        MismatchError
            If the rows, the texts and the selection split differ in encoder, width or class list.
        """
        self._check_parameters()
        text = text_head(texts)
        samples = self._samples(X, y, text)
        self._set_classes(samples)
        features, labels = gathered(samples)
        require_finite(samples, np.square(features, dtype=np.float64).sum(axis=0))
        validation = None if selection is None else selection_samples(selection, samples)
        self._fit(FewShotRows(text, samples, features, labels, validation))
        return self

    def _samples(self, X: Rows, y: ArrayLike | None, text: LinearHead) -> Samples:
        """The training rows over the classes of the text head; MismatchError if they do not belong together."""
        return samples_of(X, y, text)

    @abstractmethod
    def _fit(self, rows: FewShotRows) -> None:
        """Set the fitted attributes, `provenance_` included."""

    def _record(self, rows: FewShotRows, settings: Json, how: str, *, of_path: bool = False) -> Provenance:
        """Provenance of settings chosen `how`; heads of the path were not chosen on a split."""
        params = {**settings, "metric": self.metric, "selection": how}
        chosen = rows.validation if how == "split" and not of_path else None
        identity = text_identity(rows.text, self.classnames_)
        return self._provenance(params, rows.samples, chosen, rows.text, **identity)


def validation_folds(labels: Ints, n_classes: int) -> tuple[Ints, Mask] | None:
    """Fold of each row, and whether its class has rows in other folds; None if no class has two rows.

    Folds are stratified: at most 5, and as many as the largest class has rows.

    >>> folds, scored = validation_folds(np.array([0, 0, 1]), 2)
    >>> folds.tolist(), scored.tolist()
    ([0, 1, 0], [True, True, False])
    """
    counts = np.bincount(labels, minlength=n_classes)
    if counts.max() < 2:
        return None
    return FoldAssigner(n_classes, min(FOLDS, int(counts.max())))(labels), counts[labels] > 1


def held_out_masks(labels: Ints, n_classes: int) -> list[tuple[Mask, Mask]]:
    """Masks (N,) of the rows to fit on and the rows to score, for each of the `validation_folds`; empty without any."""
    found = validation_folds(labels, n_classes)
    if found is None:
        return []
    folds, scored = found
    return [(folds != k, (folds == k) & scored) for k in range(int(folds.max()) + 1)]
