"""The contrastive loss of a run: between images and the captions of their classes (FLYP, arXiv 2212.00638)."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ft.captions import Captions
from ft.data import TrainingBatch
from ft.objectives.contrastive import contrastive
from ft.regularizers.base import unit
from ft.trainable import Trainable

__all__ = ["OverPairs"]

TEXT_BATCH = 256


class OverPairs:
    """`contrastive` between image features and those of drawn captions.

    A caption that occurs more than once in a batch is encoded once, and all of them once for the whole run where the
    text tower is not trained.

    Parameters
    ----------
    model : Trainable
    captions : Captions
    labels : (N,) int64 array
        Of the whole data set.
    false_negatives : bool
        Count equal captions of other pairs as wrong, as plain InfoNCE does.
    """

    separable: ClassVar[bool] = False

    def __init__(
        self, model: Trainable, captions: Captions, labels: npt.NDArray[np.int64], false_negatives: bool
    ) -> None:
        self._model, self._captions, self._labels, self._false_negatives = model, captions, labels, false_negatives
        self._tokens = model.encoder.tokenize(captions.texts)
        trained = any(model.get_parameter(name).requires_grad for name in model.layers("text"))
        self._fixed = None if trained else self._all_features()

    def __call__(self, features: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Objective`; there are no logits."""
        drawn = self._captions.draw(self._labels[batch.rows], batch.rows, batch.epoch)
        different, places = torch.unique(drawn, return_inverse=True)
        texts = self._features(different) if self._fixed is None else self._fixed[different.to(self._fixed.device)]
        same = None if self._false_negatives else drawn
        return contrastive(features, texts[places.to(texts.device)], self._model.logit_scale, same), None

    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The zero-shot head of the model as it is now: the normalised mean of the captions of each class."""
        texts = unit((self._all_features() if self._fixed is None else self._fixed).double())
        means = torch.stack([texts[torch.from_numpy(places)].mean(dim=0) for places in self._captions.of_class])
        weights = (self._model.logit_scale.detach() * unit(means)).float()
        bias = getattr(self._model.encoder, "logit_bias", None)
        return weights, torch.full_like(weights[:, 0], bias or 0.0)

    def _features(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._model.text_features(self._tokens[numbers].to(self._model.encoder.device))

    @torch.no_grad()
    def _all_features(self) -> torch.Tensor:
        return torch.cat([self._features(part) for part in torch.split(torch.arange(len(self._tokens)), TEXT_BATCH)])
