"""ProLIP (Fahes et al. 2024): trains only the projection of the image tower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from featcache.encoders.taps import PRE_PROJECTION
from featcache.errors import HeadError, MismatchError
from featcache.parameters import Count, Decay, Rate
from featcache.store.protocol import FeatureSource
from heads.estimators.base import NonlinearClassifier
from heads.estimators.few_shot.base import FewShotClassifier, FewShotRows
from heads.estimators.text_prior import Texts, samples_of
from heads.fitted.base import label_values
from heads.fitted.linear import LinearHead
from heads.fitted.projected import ProjectedHead
from heads.fitted.provenance import check_classes
from heads.rows.arrays import to_numpy
from heads.rows.lengths import unit_rows
from heads.rows.samples import Float32, Rows, Samples, as_samples, is_store
from heads.solvers.logistic.precision import cpu_precision
from heads.solvers.parallel import denormals_as_zero, one_torch_thread, side_by_side
from heads.solvers.schedule import cosine

_EPS = 1e-4  # of Adam, as published
_PIECE_ROWS = 1024


@dataclass(eq=False, repr=False)
class ProLIP(FewShotClassifier, NonlinearClassifier):
    """Cross entropy of ``s cos(x W, t_c)`` plus ``penalty ||W - W0||²``, with W started from the model's projection W0.

    x are features before the projection (the tap ``pre_projection``, whose store holds W0), t_c is the text vector of
    class c and s the zero-shot head's scale. Trained by full-batch Adam (eps 1e-4); the learning rate decays from `lr`
    as a cosine. The penalty is summed over the entries of W. There are no settings to choose, so `fit` takes no
    selection split.

    For features that are already projected (stores without a tap), W0 is the identity.

    Parameters
    ----------
    penalty : the paper's lambda; None: one over the mean number of rows per class, the paper's validation-free variant
    lr, epochs : 1e-5 and 300, as published

    Attributes
    ----------
    projection_ : (W, D) float32
    losses_ : (epochs,) float64; before each step, including the penalty
    head_ : ProjectedHead

    Notes
    -----
    The length of x affects neither loss nor gradient. The authors use another augmented view of the rows in each epoch;
    here the rows of all views (``--views``) form one batch.

    On CPUs with bfloat16 multiplication, large problems use it for what changes from the start: on ImageNet with four
    rows per class, test logits differed by at most 0.002 after 60 epochs, and test accuracy was the same.

    References
    ----------
    Fahes et al. 2024, "CLIP's Visual Embedding Projector is a Few-shot Cornucopia" (arXiv 2410.05270).

    Examples
    --------
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9, 0.1], [0.9, 0.8, 0.0], [0.0, 1.0, 0.2], [0.2, 0.8, 0.1]])
    >>> ProLIP().fit(X, [0, 0, 1, 1], texts=text, projection=np.eye(3, 2)).projection_.shape
    (3, 2)
    """

    name = "prolip"
    metric = "nll"

    penalty: Decay | None = None
    lr: Rate = 1e-5
    epochs: Count = 300

    def fit(  # type: ignore[override]  # nothing is chosen
        self, X: Rows, y: ArrayLike | None = None, *, texts: Texts, projection: ArrayLike | None = None
    ) -> Self:
        """Fit like the other few-shot heads (`heads.estimators.few_shot.base`), without choosing any setting.

        Parameters
        ----------
        projection : (W, D), with arrays: W0; None for the identity. A store brings its own.

        Raises
        ------
        HeadError, MismatchError
            As there; for a projection of the wrong shape, a tap store without one, or a loss that is not finite.
        """
        self._given = None if projection is None else np.asarray(to_numpy(projection), np.float32)
        return super().fit(X, y, texts=texts)

    def _samples(self, X: Rows, y: ArrayLike | None, text: LinearHead) -> Samples:
        """The training rows; sets W0, and checks that it maps to the space of these texts."""
        start = self._given
        if is_store(X):
            if start is not None:
                raise HeadError("a store brings its own projection; leave projection out, or give arrays")
            start = _stored_projection(X, text)
        if start is None:
            samples = samples_of(X, y, text)
            start = np.eye(text.dim, dtype=np.float32)
        else:
            samples = as_samples(X, y, classnames=None if y is None else text.classnames)
        if start.shape != (samples.dim, text.dim) or not np.isfinite(start).all():
            raise HeadError(
                f"the projection is {start.shape}, expected finite numbers ({samples.dim}, {text.dim}): from the "
                "features to the texts"
            )
        self._start = start
        return samples

    def _fit(self, rows: FewShotRows) -> None:
        groups = rows.samples.groups
        images = len(rows.labels) if groups is None else len(np.unique(groups))  # which views show
        shots = images / len(np.unique(rows.labels))
        self._strength = 1 / shots if self.penalty is None else float(self.penalty)
        self.progress.start(f"{self.name}, epochs", int(self.epochs) * len(rows.labels), 0)
        weights = torch.from_numpy(self._start).clone()
        with torch.no_grad():
            self.losses_ = np.array(list(self._descend(weights, rows)))
        self.progress.finish()
        self.projection_ = weights.numpy()
        if not (np.isfinite(self.losses_).all() and np.isfinite(self.projection_).all()):
            raise HeadError(f"training diverged at lr={self.lr:g}; take a smaller one")
        record = self._record(rows, self.get_params(deep=False) | {"penalty": self._strength}, "none")
        store = rows.samples.store
        if store is not None and rows.text.provenance.text_digest not in store.text_digests:
            record = record.but(text_digest=None)  # tap features are not in a text space: bind the head to the encoder
        self.provenance_ = record
        self.head_ = ProjectedHead(
            self.projection_, rows.text, self.classnames_, self.name, record, label_values(self.classes_)
        )

    def _descend(self, weights: Tensor, rows: FewShotRows) -> Iterator[float]:
        """Take all steps, in place; returns the loss before each. The gradient is written out."""
        start, passes = weights.clone(), _Passes(rows, weights)
        optimiser = torch.optim.Adam([weights], lr=self.lr, eps=_EPS)
        for epoch in range(int(self.epochs)):
            optimiser.param_groups[0]["lr"] = self.lr * cosine(epoch / self.epochs)
            moved = weights - start
            loss, gradient = passes.loss(moved)
            weights.grad = gradient.add_(moved, alpha=2 * self._strength)
            optimiser.step()
            self.progress.advance(len(rows.labels))
            yield loss + self._strength * float(moved.double().square().sum())


class _Passes:
    """The mean cross entropy and its gradient, with only the changes since the start computed anew.

    These are small, so that the bfloat16 that CPUs multiply fast is accurate enough for them.
    """

    def __init__(self, rows: FewShotRows, start: Tensor) -> None:
        X, self.labels = torch.from_numpy(unit_rows(rows.features)), torch.from_numpy(np.asarray(rows.labels, np.int64))
        texts = torch.from_numpy(rows.text.weights)
        self.projected = X @ start
        self.unit = functional.normalize(self.projected, dim=1)
        self.logits = torch.addmm(torch.from_numpy(rows.text.bias), self.unit, texts.T)
        self.dtype = cpu_precision(X.numel() * len(texts)).dtype
        self.features, self.texts = X.to(self.dtype), texts.to(self.dtype)

    def loss(self, moved: Tensor) -> tuple[float, Tensor]:
        """The loss, and the gradient (W, D), of projections that differ from the start by `moved` (W, D)."""
        change, n = moved.to(self.dtype), len(self.labels)

        def of(piece: slice) -> tuple[float, Tensor]:
            X, labels = self.features[piece], self.labels[piece]
            projected = self.projected[piece] + X @ change
            lengths = projected.norm(dim=1, keepdim=True).clamp_min(1e-12)
            unit = projected / lengths
            logits = self.logits[piece] + (unit - self.unit[piece]).to(self.dtype) @ self.texts.T
            logits -= logits.amax(dim=1, keepdim=True)
            every = torch.arange(len(labels))
            own, terms = logits[every, labels], logits.exp_()
            total = terms.sum(dim=1)
            terms[every, labels] -= total  # before the product: where the label is certain the rest is small
            of_unit = (terms.to(self.dtype) @ self.texts).float() / (n * total)[:, None]
            # Only the component orthogonal to the unit vector turns it.
            of_projected = (of_unit - torch.linalg.vecdot(of_unit, unit)[:, None] * unit) / lengths
            return float((total.log() - own).double().sum()), (X.T @ of_projected.to(self.dtype)).float()

        with one_torch_thread() as threads, denormals_as_zero():
            losses, gradients = zip(*side_by_side(n, _PIECE_ROWS, of, threads), strict=True)
        return sum(losses) / n, torch.stack(gradients).sum(dim=0)


def _stored_projection(store: FeatureSource, text: LinearHead) -> Float32 | None:
    """The projection of a tap, if it maps to the space of these texts; None for features already in that space.

    MismatchError if the texts are another model's, or the tap was written before projections were stored.
    """
    found = store.visual_projection
    if found is None:
        if str(store.encoder_name).endswith(f"#{PRE_PROJECTION}"):
            raise MismatchError(
                f"{store.name!r} holds the tap pre_projection of an earlier version, without the projection; run its "
                "encode command with --tap pre_projection again, which adds it and encodes nothing"
            )
        return None
    digest = text.provenance.text_digest
    if digest is not None and digest not in found.text_digests:
        raise MismatchError(
            f"the texts are of text tower {digest}, but {store.name!r} belongs to "
            f"{' or '.join(found.text_digests) or None} ({store.encoder_name}); run `featcache text` with that model"
        )
    check_classes(text.classnames, store, text.name)
    weights: Float32 = found.weights
    return weights
