"""The symmetric contrastive loss of CLIP for fine-tuning on captions that repeat.

For unit image features v and text features t of N pairs and ``l_ij = s v_i.t_j``, plain InfoNCE is

``L = 1/2 mean_i [ -log softmax_j(l_ij)_i - log softmax_j(l_ji)_i ]``

Captions made from class names repeat, and plain InfoNCE then counts a text as wrong that is word for word right: five
pairs with one caption hold the loss above ln 5 = 1.609. Here all pairs with one caption are positives, and no positive
competes with another: with P_i the pairs that share the caption of i,

``L_i = mean_{j in P_i} log(1 + sum_{k not in P_i} exp(l_ik - l_ij))``

which is plain InfoNCE where no caption repeats, and whose floor is 0. (Spreading the target evenly over the positives,
as UniCL does, would change nothing here: equal captions have equal features, so its loss *is* that of plain targets,
false negatives included.)

Papers: Radford et al., CLIP (arXiv 2103.00020); Goyal et al., FLYP (arXiv 2212.00638); Khosla et al., Supervised
contrastive learning (arXiv 2004.11362).
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ft.distributed import gather
from ft.errors import TrainingError

__all__ = ["caption_ids", "contrastive"]


def caption_ids(captions: Sequence[str]) -> torch.Tensor:
    """An int64 (N,) for N captions, equal for equal ones, in every process (63 bits of blake2b).

    Examples
    --------
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
    image_features, text_features : (N, D)
        Features of N pairs; normalised here.
    logit_scale : float or scalar tensor
        s, already exponentiated.
    captions : (N,) int64, optional
        Equal for equal captions (`caption_ids`, or class labels where a class has one caption). None reproduces plain
        targets (pair i is right, all others are wrong), the original's false negatives included.

    Raises
    ------
    TrainingError
        Shapes that do not fit.

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
    images, texts = (gather(_unit(features)) for features in (image_features, text_features))
    logits = logit_scale * images @ texts.T
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


def _unit(features: torch.Tensor) -> torch.Tensor:
    wide = features.float() if features.itemsize < 4 else features
    normalised: torch.Tensor = wide / wide.norm(dim=-1, keepdim=True)
    return normalised
