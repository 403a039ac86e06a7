"""Helpers for heads that start from a zero-shot head or shrink towards a prior."""

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from featcache.errors import HeadError, MismatchError
from featcache.store.protocol import TextSource
from heads.estimators.zero_shot import ZeroShot
from heads.fitted.base import Fitted, LogitHead
from heads.fitted.linear import LinearHead, as_linear
from heads.fitted.missing_classes import without_opinion
from heads.fitted.provenance import Json
from heads.rows.samples import Float, Rows, Samples, as_samples, is_text

Texts: TypeAlias = TextSource | LinearHead | Fitted
"""What few-shot and transductive heads start from: a text store, or any linear head as zero-shot head."""


def text_head(texts: Texts) -> LinearHead:
    """The zero-shot head of a text store (from all its prompts), or the linear head given."""
    return as_linear(ZeroShot().fit(texts) if is_text(texts) else texts)


def class_directions(text: LinearHead) -> tuple[Float, Float]:
    """Unit class vectors (C, D) of a zero-shot head, and their norms (C,), the logit scale.

    HeadError for a class whose weights are all zero.
    """
    weights = text.weights.astype(np.float64)
    lengths = np.linalg.norm(weights, axis=1)
    if not (lengths > 0).all():
        raise HeadError("the text head has a class with zero weights; give one with a text vector for every class")
    return weights / lengths[:, None], lengths


def samples_of(X: Rows, y: ArrayLike | None, text: LinearHead) -> Samples:
    """The training rows with the classes of the text head, which must have the same encoder."""
    samples = as_samples(X, y, classnames=None if y is None else text.classnames)
    if samples.store is not None:
        text.check(samples.store)
    elif samples.dim != text.dim:
        raise MismatchError(f"X has {samples.dim} features, the texts have {text.dim}; encode both with one model")
    return samples


def checked_prior(prior: object, samples: Samples) -> LinearHead | None:
    """The linear head of a prior, checked against the training rows; None for None.

    HeadError for anything but a fitted linear head, or for the wrong shape. MismatchError for a prior of another
    encoder or class list.
    """
    if prior is None:
        return None
    if not isinstance(prior, LogitHead | Fitted):
        raise HeadError(f"prior must be a fitted linear head, got {type(prior).__name__}; fit one, or load it")
    head = as_linear(prior)
    if samples.store is not None:
        head.check(samples.store)
    expected = (len(samples.classnames), samples.dim)
    if head.weights.shape != expected:
        raise HeadError(
            f"prior {head.name!r} has weights {head.weights.shape}, the training rows need {expected}; pass "
            "classnames if some classes have no row, or restrict the prior to the classes at hand"
        )
    return without_opinion(head)


def prior_record(prior: LinearHead | None) -> Json | None:
    """The prior as recorded in the parameters; its splits are added to those of the new head elsewhere."""
    if prior is None:
        return None
    record = prior.provenance
    return {"head": prior.name, "text_digest": record.text_digest, "params": record.params}


def text_identity(text: LinearHead, classnames: tuple[str, ...]) -> Json:
    """Fields that a text head adds to the provenance, which bind the new head to its text tower."""
    record = text.provenance
    return {
        "text_digest": record.text_digest,
        "classnames": list(classnames),
        "base": {"head": record.head or text.name, "params": record.params},
    }
