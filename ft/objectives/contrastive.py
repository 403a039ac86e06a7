"""The symmetric contrastive loss of CLIP, for fine-tuning on captions that repeat.

For unit image features v and text features t of N pairs and ``l_ij = s v_i.t_j``, plain InfoNCE is

``L = 1/2 mean_i [ -log softmax_j(l_ij)_i - log softmax_j(l_ji)_i ]``

Captions made from class names repeat, and plain InfoNCE then treats identical captions as negatives: five pairs with
one caption keep the loss above ln 5 = 1.609. Here all pairs with the same caption are positives, and positives do not
compete with each other. With P_i the pairs that share the caption of i,

``L_i = mean_{j in P_i} log(1 + sum_{k not in P_i} exp(l_ik - l_ij))``

which equals plain InfoNCE if no caption repeats, and has a minimum of 0. (Spreading the target evenly over the
positives, as in UniCL, would not help: equal captions have equal features, so the loss would equal that of plain
targets, false negatives included.)

Papers: Radford et al., CLIP (arXiv 2103.00020); Goyal et al., FLYP (arXiv 2212.00638); Khosla et al., Supervised
contrastive learning (arXiv 2004.11362).
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from featcache.encoders.openclip import OpenClipEncoder
from featcache.errors import TrainingError
from ft.distributed import gather
from ft.objectives.base import TrainingBatch
from ft.objectives.captions import Captions
from ft.regularizers.base import unit, wide

TEXT_BATCH = 256


def caption_ids(captions: Sequence[str]) -> torch.Tensor:
    """Int64 ids (N,) of N captions, the same for equal captions in all processes (63 bits of blake2b).

    >>> ids = caption_ids(["a cat", "a dog", "a cat"])
    >>> (ids[0] == ids[2]).item(), (ids[0] == ids[1]).item()
    (True, False)
    """
    digests = [hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.int64)


def contrastive(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    captions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric contrastive loss in nats, over the batches of all processes.

    Parameters
    ----------
    image_features, text_features : (N, D), features of N pairs; normalised by the function
    logit_scale : s, exponentiated
    captions : (N,) int64, optional
        Equal for equal captions (`caption_ids`, or class labels if each class has one caption). None gives plain
        InfoNCE, with false negatives as in the original.

    Raises
    ------
    TrainingError
        The shapes do not match.

    Examples
    --------
    >>> v, t = torch.eye(2)[[0, 0]], torch.eye(2)[[0, 0]]  # two images of one caption
    >>> round(contrastive(v, t, 100.0).item(), 4), contrastive(v, t, 100.0, torch.tensor([7, 7])).item()
    (0.6931, 0.0)
    """
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise TrainingError(
            f"image features {tuple(image_features.shape)}, text features {tuple(text_features.shape)}: "
            "expected two of (N, D)"
        )
    if captions is not None and captions.shape != image_features.shape[:1]:
        raise TrainingError(f"captions {tuple(captions.shape)} for {len(image_features)} pairs: expected (N,)")
    return _loss(pair_logits(image_features, text_features, logit_scale), captions)


def pair_logits(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """Logits (N, N) of the pairs of all processes, images in rows and texts in columns."""
    images, texts = (gather(unit(wide(features))) for features in (image_features, text_features))
    return logit_scale * images @ texts.T


def _loss(logits: torch.Tensor, captions: torch.Tensor | None) -> torch.Tensor:
    """`contrastive` from the logits of all processes and the captions of this one."""
    if captions is None:
        targets = torch.arange(len(logits), device=logits.device)
        return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
    ids = gather(captions.to(logits.device))
    same = ids[:, None] == ids[None, :]
    return 0.5 * (_positives_apart(logits, same) + _positives_apart(logits.T, same))


def _positives_apart(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the mean over positives j of ``log(1 + sum_negatives exp(l_k - l_j))``."""
    negatives = logits.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    losses = F.softplus(negatives - logits, threshold=40.0).masked_fill(~same, 0.0)
    return (losses.sum(dim=1) / same.sum(dim=1)).mean()


class TextTower(Protocol):
    """The part of `ft.training.model.Trainable` that the contrastive loss uses."""

    @property
    def encoder(self) -> OpenClipEncoder:
        """Gives tokenizer, device and logit bias."""

    @property
    def logit_scale(self) -> torch.Tensor:
        """Scalar, exponentiated."""

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features (M, D) float32, not normalised, of token ids (M, L)."""


class OverPairs:
    """`contrastive` between image features and those of randomly drawn captions (FLYP, arXiv 2212.00638).

    A caption that occurs more than once in a batch is encoded once; if the text tower is not trained, all captions are
    encoded once for the whole run.

    Parameters
    ----------
    trained : whether the text tower is trained
    sentences : captions of each of C classes
    labels : (N,) int64, labels of the whole data set
    false_negatives : treat equal captions of other pairs as negatives, as plain InfoNCE does
    evaluated : prompts of the evaluated classifier, for each of C classes; default: `sentences`
    """

    separable = False

    def __init__(
        self,
        model: TextTower,
        trained: bool,
        sentences: Sequence[Sequence[str]],
        labels: npt.NDArray[np.int64],
        seed: int,
        false_negatives: bool,
        evaluated: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self._captions = Captions(sentences, seed)
        self._evaluated = self._captions if evaluated is None else Captions(evaluated, seed)
        self._model, self._labels, self._false_negatives = model, labels, false_negatives
        self._tokens = model.encoder.tokenize(self._captions.texts)
        self._prompts = model.encoder.tokenize(self._evaluated.texts)
        self._fixed = None if trained else self._all_features(self._tokens)

    def __call__(self, features: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective`."""
        logits = self.logits(features, batch)
        return _loss(logits, None if self._false_negatives else self._drawn(batch)), logits

    def logits(self, features: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """Logits of the pairs of the batch."""
        different, places = torch.unique(self._drawn(batch), return_inverse=True)
        texts = self._features(different) if self._fixed is None else self._fixed[different.to(self._fixed.device)]
        return pair_logits(features, texts[places.to(texts.device)], self._model.logit_scale)

    def _drawn(self, batch: TrainingBatch) -> torch.Tensor:
        return self._captions.draw(self._labels[batch.rows], batch.rows, batch.epoch)

    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The zero-shot head of the current model: the normalised mean of each class's prompts."""
        known = self._fixed if self._evaluated is self._captions else None
        texts = unit((self._all_features(self._prompts) if known is None else known).double())
        means = torch.stack([texts[torch.from_numpy(places)].mean(dim=0) for places in self._evaluated.of_class])
        weights = (self._model.logit_scale.detach() * unit(means)).float()
        return weights, torch.full_like(weights[:, 0], self._model.encoder.logit_bias or 0.0)

    def _features(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._model.text_features(self._tokens[numbers].to(self._model.encoder.device))

    @torch.no_grad()
    def _all_features(self, tokens: torch.Tensor) -> torch.Tensor:
        device = self._model.encoder.device
        return torch.cat([self._model.text_features(part.to(device)) for part in torch.split(tokens, TEXT_BATCH)])
