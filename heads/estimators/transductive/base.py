"""Base of transductive heads, which are fitted on the rows to predict, a zero-shot head, and optional labelled rows."""

from abc import abstractmethod
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax

from heads.estimators.base import NonlinearClassifier
from heads.estimators.text_prior import Texts, samples_of, text_head, text_identity
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Provenance, encoder_record, split_id
from heads.fitted.transductive import PROTOCOL, TransductiveHead
from heads.rows.arrays import to_numpy
from heads.rows.lengths import unit_rows
from heads.rows.samples import (
    Features,
    Float,
    Ints,
    Rows,
    Samples,
    Selection,
    gathered,
    is_store,
    overflow,
    require_finite,
)
from heads.rows.selection import selection_samples

LabelledRows = tuple[Float, Ints]
"""Unit rows (M, D) and their class indices (M,)."""


class TransductiveClassifier(NonlinearClassifier):
    """Base: a subclass refines the zero-shot log-probabilities of the rows given to `fit`.

    The fitted head predicts these rows only, and refuses others. Results rows have ``protocol: transductive``, since
    these figures cannot be compared with those of a classifier that takes one image at a time.
    """

    takes_texts: ClassVar[bool] = True
    transductive: ClassVar[bool] = True

    head_: TransductiveHead

    def fit(self, X: Rows, y: ArrayLike | None = None, *, texts: Texts, labelled: Selection | None = None) -> Self:
        """Adapt to rows.

        Parameters
        ----------
        X : image store, or array-like (N, D), with the rows to predict
        y : ignored, as are the labels of a store
        texts : text store, or a zero-shot head (any linear head)
        labelled : store, or ``(X, y)``, with a few other rows that have labels

        Raises
        ------
        HeadError
            For parameters or labels out of range, or NaN or infinite features (naming rows).
        MismatchError
            If rows, texts and labelled rows differ in encoder, width or class list.
        """
        self._check_parameters()
        text = text_head(texts)
        samples = samples_of(X, None if is_store(X) else np.zeros(len(to_numpy(X)), np.int64), text)
        self._set_classes(samples)
        features, _ = gathered(samples)
        require_finite(samples, np.square(features, dtype=np.float64).sum(axis=0))
        scores = self._scores(features, text)
        if not np.isfinite(scores).all():
            raise overflow("zero-shot logits overflow", features)
        base = log_softmax(scores, axis=1)
        others = None if labelled is None else selection_samples(labelled, samples)
        known = None
        if others is not None:
            rows, labels = gathered(others)
            known = unit_rows(rows).astype(np.float64), np.asarray(labels, np.int64)
        table = self._adapt(unit_rows(features).astype(np.float64), base, known)
        self.provenance_ = self._adapted(samples, others, text)
        self.head_ = TransductiveHead(features, table.astype(np.float32), self.classnames_, self.name, self.provenance_)
        return self

    def _scores(self, features: Features, text: LinearHead) -> Float:
        """Zero-shot logits (N, C) to start from."""
        return text.logits(features).astype(np.float64)

    @abstractmethod
    def _adapt(self, X: Float, base: Float, labelled: LabelledRows | None) -> Float:
        """Refined log-probabilities (N, C) of unit rows X (N, D) with zero-shot log-probabilities `base` (N, C)."""

    def _adapted(self, samples: Samples, others: Samples | None, text: LinearHead) -> Provenance:
        """The provenance record; the rows are listed as adapted to, not fitted on, since their labels were not used."""
        params = {**self.get_params(deep=False), "protocol": PROTOCOL}
        store, identity = samples.store, text_identity(text, self.classnames_)
        if store is not None:
            params["adapted_to"] = split_id(store)
            identity |= {"encoder_key": store.encoder_key, "encoder": encoder_record(store)}
        return self._provenance(params, others, None, text, **identity)
