"""Zero-shot classification from text embeddings (Radford et al. 2021).

Template weights follow Allingham et al. 2023, "A Simple Zero-shot Prompt Weighting Technique to Improve Prompt
Ensembling in Text-Image Models": the score of a template is its largest logit, averaged over unlabelled images, after
subtracting the mean over images because frequent words score high on every image. (The paper also subtracts the mean
over a sample of pretraining images; here only the given images are used.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from featcache.errors import HeadError, MismatchError
from featcache.store.protocol import FeatureSource, TextSource
from heads.estimators.base import LinearClassifier
from heads.fitted.provenance import Provenance, check_text_tower, encoder_record
from heads.rows.samples import Features, Float, Ints, is_text
from heads.solvers.parallel import map_pieces


@dataclass(eq=False, repr=False)
class ZeroShot(LinearClassifier):
    """Class weights = normalised mean of the normalised prompt embeddings, times the model's logit scale.

    For class c with prompt embeddings e[c, t], each of unit length: ``w_c = m_c / ||m_c||``, m_c the mean over the
    chosen prompts; logits = logit_scale * X @ w + logit_bias, for L2-normalised X. With all templates, w is the `cls`
    array of the store. Several text stores form an ensemble: the weighted mean of their w_c, normalised again.

    Parameters
    ----------
    templates : indices or template strings to use; None uses every prompt
    weights : one non-negative weight per text store; None for equal weights
    template_weights
        One non-negative weight per chosen template, such as those of `heads.template_weights`; None for equal weights.

    Attributes
    ----------
    coef_ : (C, D) float64, logit scale included (its row norms); intercept_ : (C,) the logit bias (0 without one)
    temperature_ : 1.0

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> raw = np.array([[[1.0, 0.0]], [[0.0, 1.0]]], np.float32)
    >>> texts = SimpleNamespace(name="t", raw=raw, counts=np.array([1, 1]), classnames=("cat", "dog"), templates=None,
    ...     dim=2, text_key="k", text_digest="d", logit_scale=100.0, logit_bias=None, encoder_name="tiny",
    ...     provenance={})
    >>> ZeroShot().fit(texts).predict([[0.6, 0.8]]).tolist()
    [1]
    """

    name = "zero_shot"
    centred = False  # other tools read the logit scale from the row norms
    fits_on = "texts"

    templates: Sequence[int | str] | None = None
    weights: Sequence[float] | None = None
    template_weights: Sequence[float] | None = None

    def fit(self, X: TextSource | Sequence[TextSource], y: None = None) -> Self:
        """Build the weights from one text store or a list of them; `y` is ignored.

        Raises
        ------
        HeadError
            For arrays, fewer than two classes, unknown templates, classes without a chosen prompt, or invalid weights.
        MismatchError
            If the stores differ in class names or text tower.
        """
        given = X if isinstance(X, list | tuple) else [X]
        stores = [store for store in given if is_text(store)]
        if not stores or len(stores) != len(given):
            raise HeadError(
                "ZeroShot fits from text stores: open_store(...) of what `featcache text` wrote. Class vectors in "
                "arrays need no fit: LinearHead(weights, bias, classnames), with the logit scale in the weights"
            )
        _check_ensemble(stores)
        first = stores[0]
        if len(first.classnames) < 2:
            raise HeadError(f"text store {first.name!r} has {len(first.classnames)} class, expected at least 2")
        shares = _shares(self.weights, len(stores))
        vectors = [class_vectors(store, self.templates, self.template_weights) for store in stores]
        mixed = sum(w * rows for w, rows in zip(shares, vectors, strict=True))
        self.classnames_ = tuple(first.classnames)
        self.classes_ = np.arange(len(self.classnames_))
        self.n_features_in_ = int(first.dim)
        self.coef_ = _logit_scale(first) * _normalised(np.asarray(mixed))
        self.intercept_ = np.full(len(self.classnames_), float(first.logit_bias or 0.0))
        self.temperature_ = 1.0
        self.provenance_ = self._record(stores, shares)
        return self

    def _record(self, stores: list[TextSource], shares: Float) -> Provenance:
        """Provenance record, with the text tower and the text stores."""
        chosen = self.templates
        params = {
            "templates": None if chosen is None else [t if isinstance(t, str) else int(t) for t in chosen],
            "weights": shares.tolist(),
            "template_weights": None if self.template_weights is None else [float(w) for w in self.template_weights],
            "logit_scale": _logit_scale(stores[0]),
        }
        blank = {"split": None, "dataset_key": None, "labels_digest": None}
        fitted_on = [{"name": store.name, **blank, "text_key": store.text_key} for store in stores]
        text_digest, encoder = stores[0].text_digest, encoder_record(stores[0])
        return self._provenance(params, None, fitted_on=fitted_on, text_digest=text_digest, encoder=encoder)


def class_vectors(
    store: TextSource, templates: Sequence[int | str] | None = None, weights: Sequence[float] | None = None
) -> Float:
    """Unit vector (C, D) of each class: the (weighted) mean of its chosen unit-length prompts, normalised."""
    raw, counts = np.asarray(store.raw), np.asarray(store.counts)
    chosen = np.arange(raw.shape[1]) if templates is None else _template_indices(store, templates)
    shares = np.ones(len(chosen)) if weights is None else _shares(weights, len(chosen), "template")
    present = (chosen[None, :] < counts[:, None]) * shares  # (C, T'); classes may differ in their number of prompts
    empty = [store.classnames[c] for c in np.flatnonzero(~present.any(axis=1))]
    if empty:
        raise HeadError(f"no prompt is left for {len(empty)} classes ({', '.join(empty[:5])}); choose other templates")
    picked = np.where(present[:, :, None] > 0, raw[:, chosen].astype(np.float64), 0.0)
    return _normalised((picked * present[:, :, None]).sum(axis=1) / present.sum(axis=1, keepdims=True))


def _template_indices(store: TextSource, templates: Sequence[int | str]) -> Ints:
    """Positions of templates given as indices or strings."""
    known = list(store.templates or ())
    total = np.asarray(store.raw).shape[1]
    indices: list[int] = []
    for template in templates:
        if isinstance(template, str):
            if template not in known:
                raise HeadError(
                    f"template {template!r} is not among the {len(known)} of {store.name!r}: {known[:3]}..."
                )
            indices.append(known.index(template))
        elif 0 <= int(template) < total:
            indices.append(int(template))
        else:
            raise HeadError(f"template index {template} of {store.name!r} is out of range: it has 0 to {total - 1}")
    if not indices:
        raise HeadError("templates is an empty list; give at least one, or None for all")
    return np.asarray(indices, dtype=np.int64)


def _shares(weights: Sequence[float] | None, n: int, what: str = "text store") -> Float:
    """Checked weights of `n` members, scaled to sum to one."""
    shares = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if shares.shape != (n,) or not (np.isfinite(shares) & (shares >= 0)).all() or not shares.sum():
        raise HeadError(f"weights must be {n} non-negative numbers, one per {what}, got {weights!r}")
    return np.asarray(shares / shares.sum())


def _check_ensemble(stores: list[TextSource]) -> None:
    """Raise unless members have the same classes and text tower, and so the same logit scale and bias."""
    first = stores[0]
    for other in stores[1:]:
        if tuple(other.classnames) != tuple(first.classnames):
            raise MismatchError(
                f"text stores {first.name!r} and {other.name!r} have different class names or order "
                f"({len(first.classnames)} and {len(other.classnames)}); embed the same class list for both"
            )
        if other.text_digest != first.text_digest:
            raise MismatchError(
                f"text stores {first.name!r} and {other.name!r} come from text towers {first.text_digest} and "
                f"{other.text_digest}; embed both with one model"
            )


def _logit_scale(texts: TextSource) -> float:
    """The exponentiated logit scale; HeadError for a store without one."""
    if texts.logit_scale is None:
        raise HeadError(f"text store {texts.name!r} has no logit scale; encode texts with a CLIP-style model")
    return float(texts.logit_scale)


def _normalised(rows: Float) -> Float:
    """Rows of unit length."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise HeadError("the prompts of a class average to zero; choose other templates or weights")
    return np.asarray(rows / norms)


def score_templates(texts: TextSource, images: FeatureSource) -> Float:
    """Score (T,) of each template of a text store, in logits, from an unlabelled image store.

    ``score_t = s mean_i max_c (x_i - mean(x)) . e[c, t]`` for L2-normalised prompts e and logit scale s. Labels are not
    used.

    Raises
    ------
    HeadError
        For a store of prompt files (its prompts are not templates), or without a valid row.
    MismatchError
        If the images belong to another text tower.
    """
    if texts.templates is None:
        raise HeadError(f"text store {texts.name!r} comes from a prompt file; only templates can be weighted")
    check_text_tower(repr(texts.name), texts.text_digest, images)
    raw = np.asarray(texts.raw, np.float32)  # (C, T, D)
    sums, n = np.zeros(raw.shape[2]), 0
    for features, labels in images.blocks():
        sums += features.sum(axis=0, dtype=np.float64)
        n += len(labels)
    if not n:
        raise HeadError(f"{images.name!r} has no valid row to score templates on")
    mean = (sums / n).astype(np.float32)

    def of_piece(x: Features, _: object) -> Float:
        centred = x.astype(np.float32) - mean
        return np.array([(centred @ raw[:, t].T).max(axis=1).sum(dtype=np.float64) for t in range(raw.shape[1])])

    total: Float = sum(map_pieces(images.blocks(), of_piece), np.zeros(raw.shape[1]))
    return np.asarray(_logit_scale(texts) * total / n)


def template_weights(texts: TextSource, images: FeatureSource) -> list[float]:
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
