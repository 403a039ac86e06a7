"""Multi-label zero-shot classification, with thresholds chosen on a validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np

from featcache.errors import HeadError
from featcache.parameters import OneOf
from featcache.store.protocol import TextSource
from heads.estimators.multilabel.base import THRESHOLDS, HeldOut, MultiLabelClassifier
from heads.estimators.zero_shot import ZeroShot
from heads.fitted.provenance import check_classes, check_encoder
from heads.rows.multilabel import as_multilabel
from heads.rows.samples import Selection, is_store


@dataclass(eq=False, repr=False)
class MultiLabelZeroShot(MultiLabelClassifier):
    """Logits of `ZeroShot`, ``logit_scale * cosine + logit_bias``, with one sigmoid per class instead of a softmax.

    Ranking needs no labels, but decisions do: only for models with a logit bias (SigLIP) is the sigmoid of the logit a
    probability of a match, and even then 0.5 is not a calibrated threshold on other data. So thresholds are chosen on a
    selection split, which makes the head a frozen zero-shot model with supervised thresholds.

    Parameters
    ----------
    templates, weights : as in `ZeroShot`
    threshold
        Logit from which a class is predicted: "per_class" maximises the F1 of each class on the selection split;
        "global" is one threshold that maximises the micro F1; "none" is 0, as without a selection split.

    Attributes
    ----------
    coef_, intercept_, thresholds_ : (L, D), (L,), (L,) float64
    """

    name = "multilabel_zero_shot"
    fits_on = "texts"

    templates: Sequence[int | str] | None = None
    weights: Sequence[float] | None = None
    threshold: Annotated[str, OneOf(*THRESHOLDS)] = "per_class"

    def fit(
        self, X: TextSource | Sequence[TextSource], y: object = None, *, selection: Selection | None = None
    ) -> Self:
        """Build weights from text stores, and choose thresholds on a selection split.

        Parameters
        ----------
        X : text store, or several with the same class list and text tower
        selection : multi-label store, or ``(X, Y)``, on which thresholds are chosen; None leaves them at logit 0

        Raises
        ------
        HeadError, MismatchError
            As `ZeroShot.fit`; also if the selection split has one label per row, another model or another class list.
        """
        self._check_parameters()
        texts = ZeroShot(self.templates, self.weights).fit(X)
        self.classes_, self.classnames_, self.n_features_in_ = texts.classes_, texts.classnames_, texts.n_features_in_
        self.coef_, self.intercept_, self.absent_ = texts.coef_, texts.intercept_, ()
        self.thresholds_ = np.zeros(len(self.intercept_))
        record = texts.provenance_.but(head=self.name).with_params(threshold="none")
        if selection is not None and self.threshold != "none":
            if is_store(selection):
                rows = as_multilabel(selection)
                check_encoder(self.name, record, self.n_features_in_, selection)
                check_classes(self.classnames_, selection, self.name)
            else:
                rows = as_multilabel(*selection, classnames=self.classnames_)
            if rows.dim != self.n_features_in_:
                raise HeadError(f"the selection split has {rows.dim} features, the texts {self.n_features_in_}")
            held = HeldOut.on_split([(self.coef_, self.intercept_)], rows)
            self.thresholds_ = held.thresholds(0, self.threshold)
            record = record.with_params(threshold=self.threshold)
            record = record if rows.store is None else record.chosen(rows.store, fitted="thresholds")
        self.provenance_ = record
        return self
