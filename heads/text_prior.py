"""What heads share that begin from a zero-shot head and labelled rows: the text head, the rows, and their record."""

from __future__ import annotations

from typing import Any

from featcache.errors import MismatchError
from heads.checks import split_id
from heads.linear import LinearHead
from heads.logits import as_head
from heads.samples import Samples, as_samples
from heads.zero_shot import ZeroShot

__all__ = ["samples_of", "text_head", "text_identity"]


def text_head(texts: Any) -> LinearHead:
    """The linear head of a text store (`ZeroShot` of all its prompts), or the one given."""
    return as_head(ZeroShot().fit(texts) if hasattr(texts, "raw") else texts).linear()


def samples_of(X: Any, y: Any, text: LinearHead) -> Samples:
    """The training rows over the classes of the text head, which must belong to their encoder."""
    samples = as_samples(X, y, classnames=None if y is None else text.classnames)
    if samples.store is not None:
        text.check(samples.store)
    elif samples.dim != text.dim:
        raise MismatchError(f"X has {samples.dim} features, and the texts have {text.dim}; encode both with one model")
    return samples


def text_identity(text: LinearHead, samples: Samples, classnames: tuple[str, ...]) -> dict[str, Any]:
    """Provenance that the text head adds: the head is bound to the text tower, too."""
    record = text.provenance
    ours = [] if samples.store is None else [split_id(samples.store)]
    return {
        "text_digest": record.get("text_digest"),
        "fitted_on": [*ours, *record.get("fitted_on", [])],
        "classnames": list(classnames),
        "base": {"head": record.get("head", text.name), "params": record.get("params", {})},
    }
