"""The attentive head: learned queries pool the tokens of an image, followed by a linear classifier."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from featcache.errors import HeadError
from featcache.store.reading.tokens import block_rows
from heads.fitted.base import LogitHead
from heads.fitted.provenance import Provenance
from heads.rows.arrays import to_numpy
from heads.rows.samples import Array, Features, Float32, check_width


def attentive_logits(tokens: Tensor, queries: Tensor, values: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Logits (n, C) of tokens (n, P, D).

    With Q queries ``u`` (Q, D), values ``V`` (Q, E, D), class weights ``W`` (C, Q, E) and bias ``b`` (C,)::

        a[n, q] = softmax over p of (u[q] . x[n, p])
        logits[n, c] = sum over q of W[c, q] . V[q] (sum over p of a[n, q, p] x[n, p]) + b[c]

    Tokens are pooled before the values are applied, which by linearity gives the same result at lower cost.

    >>> one = torch.ones
    >>> attentive_logits(one(1, 4, 2), one(3, 2), one(3, 1, 2), one(5, 3, 1), torch.zeros(5))[0].tolist()
    [6.0, 6.0, 6.0, 6.0, 6.0]
    """
    attention = torch.softmax(tokens @ queries.T, dim=1)
    pooled = attention.transpose(1, 2) @ tokens
    return torch.einsum("nqd,qed->nqe", pooled, values).flatten(1) @ weights.flatten(1).T + bias


@dataclass(frozen=True, eq=False, repr=False)
class AttentiveHead(LogitHead):
    """Head computed by `attentive_logits`; features (n, D) without tokens count as one token each.

    Attributes
    ----------
    queries : (Q, D) float32
    values : (Q, E, D) float32
    weights : (C, Q, E) float32
    bias : (C,) float32
    """

    kind: ClassVar[str] = "attentive"
    settings: ClassVar[Mapping[str, object]] = {}
    tensors: ClassVar[Mapping[str, str]] = {"queries": "fQD", "values": "fQED", "weights": "fCQE", "bias": "fC"}
    takes_tokens: ClassVar[bool] = True

    queries: Float32
    values: Float32
    weights: Float32
    bias: Float32
    classnames: tuple[str, ...]
    name: str = "attentive"
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    classes: Array | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._narrow("queries", "values", "weights", "bias")

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return int(self.queries.shape[1])

    def logits(self, X: ArrayLike) -> Float32:
        """Logits (n, C) float32 of tokens (n, P, D) or features (n, D), computed in blocks of bounded size."""
        tokens = self._features(X)
        parameters = [torch.from_numpy(values) for values in (self.queries, self.values, self.weights, self.bias)]
        out = np.empty((len(tokens), len(self.classnames)), np.float32)
        step = block_rows(tokens.shape, len(tokens)) if len(tokens) else 1
        with torch.inference_mode():
            for start in range(0, len(tokens), step):
                block = torch.from_numpy(np.ascontiguousarray(tokens[start : start + step], np.float32))
                out[start : start + step] = attentive_logits(block, *parameters).numpy()
        return out

    def _features(self, X: ArrayLike) -> Features:
        """Features as tokens (n, P, D), checked."""
        features = to_numpy(X)
        if features.ndim not in (2, 3):
            expected = f"(n, P, {self.dim}) or (n, {self.dim})"
            raise HeadError(f"head {self.name!r} takes features {expected}, got {features.shape}")
        check_width(features, self.dim, self.name)
        return features if features.ndim == 3 else features[:, None]

    def attention(self, X: ArrayLike) -> Float32:
        """Attention weights (n, Q, P) of the queries, which sum to 1 over the P tokens."""
        tokens = torch.from_numpy(np.ascontiguousarray(self._features(X), np.float32))
        found: Float32 = torch.softmax(tokens @ torch.from_numpy(self.queries).T, dim=1).transpose(1, 2).numpy()
        return found

    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        return {"weights": self.weights[index], "bias": self.bias[index]}

    def _cooled(self, temperature: float) -> dict[str, object]:
        return {"weights": self.weights / np.float32(temperature), "bias": self.bias / np.float32(temperature)}
