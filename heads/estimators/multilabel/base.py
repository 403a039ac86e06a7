"""Base classes of multi-label heads, and the choice of thresholds and hyper-parameters on held-out rows."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from heads.estimators.base import HeadClassifier, RowsClassifier, in_float32
from heads.estimators.logistic.training_rows import machine_memory
from heads.fitted.multilabel import MultiLabelHead
from heads.fitted.provenance import Json, Provenance
from heads.kernels.ranking import SELECTION, best_thresholds
from heads.rows.multilabel import MultiLabelSamples, Targets, TargetsLike, as_multilabel, multilabel_selection
from heads.rows.samples import Features, Float, Float32, Ints, Mask, Rows, Selection, finite_blocks
from heads.rows.selection import SELECTION as SELECTION_ROWS
from heads.solvers.edges import warn_at_edge

THRESHOLDS = ("per_class", "global", "none")
"""How thresholds are set: for the best F1 of each class, for the best micro F1, or at probability 0.5."""

FOLDS = 5
HELD_SCORES = 2**28
"""Largest number of held-out scores in memory, over all settings."""


class MultiLabelClassifier(HeadClassifier):
    """Base of multi-label heads; a subclass fits and sets the attributes below.

    Attributes
    ----------
    coef_ : (L, D) float64
    intercept_ : (L,) float64
    thresholds_ : (L,) float64, logits; a class is predicted from its threshold on
    absent_ : tuple, names of the classes that could not be fitted
    classes_ : (L,) column numbers; classnames_, n_features_in_, provenance_
    """

    multilabel: ClassVar[bool] = True

    coef_: Float
    intercept_: Float
    thresholds_: Float
    absent_: tuple[str, ...]

    def frozen(self) -> MultiLabelHead:
        """The fitted head, for evaluation and files."""
        check_is_fitted(self, "coef_")
        return self._as_head(self.coef_, self.intercept_, self.thresholds_, self.name, self.provenance_)

    def _as_head(
        self, weights: Float, intercepts: Float, thresholds: Float | None, name: str, record: Provenance
    ) -> MultiLabelHead:
        absent = tuple(self.classnames_.index(name) for name in self.absent_)
        identity: Json = {"name": name, "provenance": record, "absent": absent}
        return MultiLabelHead(*in_float32(name, weights, intercepts), self.classnames_, thresholds, **identity)

    def predict(self, X: Rows) -> NDArray[np.int8]:
        """Predictions (N, L): 1 where a class is predicted, else 0."""
        return self.frozen().predict(X)

    def decision_function(self, X: Rows) -> Float32:
        """Logits (N, L)."""
        return np.concatenate(list(self.frozen()._all_logits(X)))

    def score(self, X: Rows, y: TargetsLike | None = None) -> float:
        """Subset accuracy: the share of rows with correct predictions for all classes whose target is known."""
        return self.frozen().score(X, y)

    def _name_absent(self, absent: Mask) -> None:
        """Set `absent_` to the classes that could not be fitted, and warn of them."""
        self.absent_ = tuple(self.classnames_[column] for column in np.flatnonzero(absent))
        if self.absent_:
            shown = ", ".join(self.absent_[:5]) + (", ..." if len(self.absent_) > 5 else "")
            what = (
                f"{len(self.absent_)} of {len(self.classnames_)} classes have no positive or no negative training row"
            )
            warnings.warn(f"{what}: {shown}; their probability is constant", UserWarning, stacklevel=3)

    def __sklearn_tags__(self) -> object:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.multi_label = True
        tags.target_tags.single_output = False
        tags.target_tags.multi_output = True
        return tags


class MultiLabelRowsClassifier(MultiLabelClassifier, RowsClassifier):
    """Base of multi-label heads that fit on rows.

    Each has a parameter `in_memory`: whether to load all rows (True) or to read them again in every pass (False). None
    loads arrays, and stores of up to half of the machine's memory.
    """

    in_memory: bool | None

    def _training_rows(  # type: ignore[override]  # targets instead of labels
        self, X: Rows, y: TargetsLike | None, selection: Selection | None, classnames: Sequence[str] | None
    ) -> tuple[MultiLabelSamples, MultiLabelSamples | None]:
        samples = as_multilabel(X, y, classnames=classnames)
        self._set_classes(samples)
        return samples, None if selection is None else multilabel_selection(selection, samples)

    def _placed(self, samples: MultiLabelSamples) -> MultiLabelSamples:
        """The rows, loaded into memory unless they are to be streamed."""
        known = None if samples.store is None else samples.store.n_rows
        load = known is not None and 2 * samples.dim * known <= machine_memory() // 2
        return samples.in_memory() if (load if self.in_memory is None else self.in_memory) else samples


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out logits (A, N', L) of every setting with their targets (N', L), and choices based on them."""

    logits: Float32
    targets: Targets

    @classmethod
    def on_split(cls, heads: Sequence[tuple[Float, Float]], rows: MultiLabelSamples) -> Self:
        """Logits of (weights, intercepts) on a validation split; HeadError for rows with NaN, or an empty split."""
        parts, targets = [], []
        for features, found in finite_blocks(rows.blocks, SELECTION_ROWS):
            wide = features.astype(np.float32)
            parts.append(np.stack([wide @ w.T.astype(np.float32) + b.astype(np.float32) for w, b in heads]))
            targets.append(found.copy())
        if not sum(map(len, targets)):
            raise HeadError("the selection split has no valid row; choose on another split, or on none")
        return cls(np.concatenate(parts, axis=1), np.concatenate(targets))

    def scores(self, metric: str) -> Float:
        """Score (A,) of each setting, larger is better; NaN if no class has a positive."""
        return np.array([SELECTION[metric](logits, self.targets) for logits in self.logits])

    def thresholds(self, setting: int, threshold: str) -> Float:
        """Thresholds (L,) of one setting; zeros for "none"."""
        if threshold == "none":
            return np.zeros(self.targets.shape[1])
        return best_thresholds(self.logits[setting], self.targets, per_class=threshold == "per_class")


def best_setting(name: str, values: Float, scores: Float) -> int:
    """Position of the best score, on ties the first; warns if it is at the end of the path."""
    if np.isnan(scores).all():
        raise HeadError("no class has a held-out positive to choose by; give a selection split, or one value")
    best = int(np.nanargmax(scores))
    losses = 1.0 - scores if (scores >= 0).all() else -scores
    warn_at_edge(name, values, losses, best)
    return best


def folds_of_rows(n: int, folds: int = FOLDS) -> Ints:
    """Random fold (n,) of each row; folds are equally large, and the same on every machine.

    >>> np.bincount(folds_of_rows(12)).tolist()
    [3, 3, 2, 2, 2]
    """
    return np.random.default_rng(0).permutation(np.arange(n) % folds)


Part = Callable[[], Iterator[tuple[Features, Targets]]]


def rows_where(blocks: Part, keep: Mask) -> Part:
    """Blocks with only the rows of a mask (N,)."""

    def kept() -> Iterator[tuple[Features, Targets]]:
        done = 0
        for features, targets in blocks():
            mine = keep[done : done + len(targets)]
            done += len(targets)
            if mine.any():
                yield features[mine], targets[mine]

    return kept
