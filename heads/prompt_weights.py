"""Weights for prompt templates without a label: how sure each template is on the images at hand.

After Allingham et al. 2023, "A Simple Zero-shot Prompt Weighting Technique to Improve Prompt Ensembling in Text-Image
Models": a template's score is the mean, over unlabelled images, of its largest logit, with the logits' mean over the
images taken off first, because frequent words score high on every image. (The paper takes off the mean over a sample
of pretraining images as well; here only the images at hand are used.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError, MismatchError
from heads.solvers.parallel import map_pieces

__all__ = ["score_templates", "template_weights"]


def score_templates(texts: Any, images: Any) -> NDArray[np.float64]:
    """Score (T,) of each template of a text store, in logits, from an unlabelled image store.

    ``score_t = s mean_i max_c (x_i - mean(x)) . e[c, t]`` for L2-normalised prompts e and logit scale s. Labels are not
    looked at.

    Raises
    ------
    HeadError
        For a store of prompt files (its prompts are not templates), or without a valid row.
    MismatchError
        If the images belong to another text tower.
    """
    if texts.templates is None:
        raise HeadError(f"text store {texts.name!r} comes from a prompt file; only templates can be weighed")
    if texts.text_digest not in images.text_digests:
        raise MismatchError(
            f"{texts.name!r} has text tower {texts.text_digest}, {images.name!r} belongs to "
            f"{' or '.join(images.text_digests) or None}; run `featcache text` with that model"
        )
    raw = np.asarray(texts.raw, np.float32)  # (C, T, D)
    sums, n = np.zeros(raw.shape[2]), 0
    for features, labels in images.blocks():
        sums += features.sum(axis=0, dtype=np.float64)
        n += len(labels)
    if not n:
        raise HeadError(f"{images.name!r} has no valid row to score templates on")
    mean = (sums / n).astype(np.float32)

    def of_piece(x: NDArray[np.floating], _: Any) -> NDArray[np.float64]:
        centred = x.astype(np.float32) - mean
        return np.array([(centred @ raw[:, t].T).max(axis=1).sum(dtype=np.float64) for t in range(raw.shape[1])])

    total: NDArray[np.float64] = sum(map_pieces(images.blocks(), of_piece), np.zeros(raw.shape[1]))
    return np.asarray(float(texts.logit_scale) * total / n)


def template_weights(texts: Any, images: Any) -> list[float]:
    """Softmax of `score_templates`: weights (T,) for `ZeroShot(template_weights=...)`, summing to one.

    Examples
    --------
    >>> from types import SimpleNamespace as Store
    >>> raw = np.array([[[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [0.8, 0.6]]], np.float32)  # the second blurs classes
    >>> texts = Store(name="t", raw=raw, templates=("a {}", "it"), text_digest="d", logit_scale=10.0)
    >>> X = np.eye(2, dtype=np.float32)
    >>> images = Store(name="i", text_digests=("d",), blocks=lambda: [(X, np.zeros(2, int))])
    >>> [round(w, 2) for w in template_weights(texts, images)]
    [0.98, 0.02]
    """
    scores = score_templates(texts, images)
    shares = np.exp(scores - scores.max())
    return [float(share) for share in shares / shares.sum()]
