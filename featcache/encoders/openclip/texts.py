"""Encoding texts with an open_clip tower without unneeded padding.

In a causal tower that pools at the end-of-text token, features do not depend on later tokens. So a batch is cut to its
longest text: prompts have about 10 tokens, the context 77. Texts are sorted by length, so that short ones rarely share
a batch with long ones; equal texts are encoded once. Other towers (SigLIP, CoCa, Hugging Face) get the whole context.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer

from featcache.encoders.base import FloatArray

TEXT_BATCH = 256


def encode_sorted(
    texts: Sequence[str],
    tokenize: Callable[[Sequence[str]], torch.Tensor],
    encode: Callable[[torch.Tensor], FloatArray],
) -> FloatArray:
    """Features (N, D) of N >= 1 texts in their order; encodes distinct texts in batches of similar length."""
    distinct = list(dict.fromkeys(texts))
    ids = torch.cat([tokenize(distinct[start : start + TEXT_BATCH]) for start in range(0, len(distinct), TEXT_BATCH)])
    order = (ids != ids[:, -1:]).sum(dim=1).argsort(stable=True)  # the last id pads, unless the text fills the row
    found = np.concatenate([encode(ids[rows]) for rows in torch.split(order, TEXT_BATCH)])
    features = np.empty_like(found)
    features[order.numpy()] = found
    row = {text: number for number, text in enumerate(distinct)}
    return features[[row[text] for text in texts]]


def needed_length(model: Any, ids: torch.Tensor) -> int:
    """Number of leading tokens in `ids` (B, L) that the features depend on."""
    found = _causal(model)
    if found is None:
        return ids.shape[1]
    _, end = found
    at_end = ids.argmax(dim=1) if end is None else (ids == end).int().argmax(dim=1)  # where open_clip pools
    return int(at_end.max()) + 1


def encode_text(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Features (B, D) of token ids (B, n), n at most the context length and at least `needed_length`."""
    found = _causal(model)
    if found is None:
        return model.encode_text(ids)  # type: ignore[no-any-return]
    tower, n = found[0], ids.shape[1]
    short = copy.copy(tower)  # shares every tensor
    short._parameters = {**tower._parameters, "positional_embedding": tower.positional_embedding[:n]}
    short._buffers = {**tower._buffers, "attn_mask": tower.attn_mask[:n, :n]}
    if tower is not model:
        whole = copy.copy(model)
        whole._modules = {**model._modules, "text": short}
        short = whole
    return short.encode_text(ids)  # type: ignore[no-any-return]


def _causal(model: Any) -> tuple[Any, int | None] | None:
    """The text tower of a causal model that pools at the end of text, and the id of the end token; else None.

    The id is None if open_clip pools at the largest id of the row.
    """
    if isinstance(model, CLIP):
        tower, pool, end = model, model.text_pool_type, getattr(model, "text_eos_id", None)
    elif isinstance(tower := getattr(model, "text", None), TextTransformer) and tower.cls_emb is None:
        pool, end = tower.pool_type, getattr(tower, "eos_id", None)
    else:
        return None
    if tower.attn_mask is None or pool not in ("argmax", "eos"):
        return None
    return tower, None if pool == "argmax" else end
