"""Taps with tokens: their names, pooling, and a reader that pools.

A tap may have P tokens per image, (N, P, D): the patch tokens of a vision transformer, or the H x W positions of a
convolutional feature map. Its name gives the layer, and the pooling if there is any::

    patch             patch tokens after the last norm           patch:mean, patch:max, patch:gem, patch:cls
    tokens            the same, after class and register tokens
    layer:-2          patch tokens of the second last layer      layer:-2:mean, ..., layer:-2:cls
    layer:-2:tokens   the same, after class and register tokens
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError
from featcache.store.layout import Array
from featcache.store.protocol import Encoded
from featcache.store.reading.readers import Reader, Rows

Float32 = npt.NDArray[np.float32]

POOLS = ("mean", "cls", "max", "gem")
"""Mean, class token, maximum, and generalised mean with exponent 3 (Radenovic et al. 2018) of values above 1e-6."""
GEM_POWER, GEM_LEAST = 3.0, 1e-6
TOKENS = "tokens"
NAME = re.compile(r"[a-z][a-z0-9_]{0,47}(?::-?[0-9]{1,4})?(?::[a-z][a-z0-9_]{0,47})?")
"""Valid names of taps."""
BLOCK_NBYTES = 1 << 26
"""Maximum size in bytes of a block of tokens."""


def tap_name(name: str) -> str:
    """Canonical name of a tap: ``layer:-2:patch`` is ``layer:-2``.

    >>> tap_name("layer:-2:patch"), tap_name("patch"), tap_name("layer:3:cls")
    ('layer:-2', 'patch', 'layer:3:cls')
    """
    return name.removesuffix(":patch")


def has_tokens(name: str) -> bool:
    """Whether the tap with this name has tokens.

    >>> [has_tokens(name) for name in ("patch", "tokens", "layer:3", "layer:3:tokens", "patch:mean", "pre_projection")]
    [True, True, True, True, False, False]
    """
    return re.fullmatch(r"patch|tokens|layer:-?[0-9]+(:tokens)?", tap_name(name)) is not None


def pooled_name(name: str, how: str) -> str:
    """Name of the tap with the pooled tokens of another.

    >>> pooled_name("patch", "mean"), pooled_name("tokens", "cls"), pooled_name("layer:-2:tokens", "max")
    ('patch:mean', 'patch:cls', 'layer:-2:max')
    """
    return f"{'patch' if name == TOKENS else name.removesuffix(f':{TOKENS}')}:{how}"


def sources_of(name: str) -> tuple[Sequence[str], str]:
    """The taps that a pooled tap can be computed from, smallest first, and the pooling; empty if it is not pooled.

    >>> sources_of("layer:-2:mean"), sources_of("patch:cls"), sources_of("layer:-2")
    ((('layer:-2', 'layer:-2:tokens'), 'mean'), (('tokens',), 'cls'), ((), ''))
    """
    base, _, how = name.rpartition(":")
    if not base or how not in POOLS:
        return (), ""
    every = TOKENS if base == "patch" else f"{base}:{TOKENS}"
    return ((every,) if how == "cls" else (base, every)), how


ROWS_STORED = "float16, L2-normalised in float32"
TOKENS_STORED = "float16, tokens of a root mean square length of 1 in float32"
"""How features without and with tokens are stored; part of the encoder's identity."""


def tokens_remedy(tokens: int, dim: int) -> str:
    """End of an error message about features with tokens that are not supported: what to do."""
    return (
        f"{tokens} tokens of width {dim} per image; pool them: --pool mean (in Python: store.pooled('mean')), or "
        f"#patch:mean in its reference; pools are {', '.join(POOLS)}"
    )


def check_pool(how: str, prefix: int = 1, what: str = "features") -> str:
    """FeatcacheError if `how` is not in `POOLS`, or if it is ``cls`` and there is no class token."""
    if how not in POOLS:
        raise FeatcacheError(f"pool {how!r}: expected one of {', '.join(POOLS)}")
    if how == "cls" and not prefix:
        raise FeatcacheError(
            f"{what}: its tokens do not include a class token; store them with --tap tokens or --tap layer:K:tokens, "
            "or use another pooling"
        )
    return how


def pool(tokens: Array, how: str, prefix: int = 0) -> Float32:
    """Pooled tokens (n, D) float32, not normalised, of tokens (n, P, D), by one of `POOLS`.

    The first `prefix` tokens are class and register tokens: ``cls`` takes the first of them, the others skip them.

    >>> pool(np.array([[[9.0], [1.0], [2.0]]]), "mean", 1), pool(np.array([[[9.0], [1.0], [2.0]]]), "cls", 1)
    (array([[1.5]], dtype=float32), array([[9.]], dtype=float32))
    """
    check_pool(how, prefix)
    wide = tokens.astype(np.float32, copy=False)
    if how == "cls":
        return wide[:, 0]
    patches = wide[:, prefix:]
    if how == "mean":
        return np.asarray(patches.mean(axis=1, dtype=np.float32))
    if how == "max":
        return np.asarray(patches.max(axis=1))
    powers = np.maximum(patches, np.float32(GEM_LEAST)) ** np.float32(GEM_POWER)
    return np.asarray(powers.mean(axis=1, dtype=np.float32) ** np.float32(1 / GEM_POWER))


def block_rows(shape: Sequence[int], rows: int, itemsize: int = 4) -> int:
    """Rows per block of features (N, ...): at most `rows`, and fewer for tokens, to respect `BLOCK_NBYTES`.

    >>> block_rows((50_000, 512), 65_536), block_rows((50_000, 196, 768), 65_536)
    (50000, 111)
    """
    rows = max(1, min(rows, shape[0]))
    if len(shape) < 3:
        return rows
    return max(1, min(rows, BLOCK_NBYTES // (int(np.prod(shape[1:])) * itemsize)))


def feature_shape(store: Encoded) -> tuple[int, ...]:
    """Shape of one image's features: (D,), or (P, D) with tokens."""
    return (store.dim,) if store.tokens is None else (store.tokens, store.dim)


class PooledReader(Reader):
    """Pooled tokens as unit rows (N, D) float16, computed at the first read and kept in memory."""

    def __init__(self, tokens: Reader, how: str, prefix: int) -> None:
        self._tokens, self._how, self._prefix = tokens, how, prefix
        self.spec = replace(tokens.spec, shape=(tokens.spec.shape[0], tokens.spec.shape[2]))

    @cached_property
    def pooled(self) -> tuple[Array, Float32]:
        """All unit rows, and their lengths (N,) before normalisation."""
        shape = self._tokens.spec.shape
        step = block_rows(shape, shape[0])
        rows, lengths = np.empty(self.spec.shape, np.float16), np.empty(shape[0], np.float32)
        buffer = np.empty((step, *shape[1:]), np.float32)
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            block = pool(self._tokens.read(start, stop, buffer[: stop - start]), self._how, self._prefix)
            lengths[start:stop] = size = np.sqrt(np.einsum("nd,nd->n", block, block))
            rows[start:stop] = block / np.where(size == 0, 1, size)[:, None]
        return rows, lengths

    def _read(self, start: int, stop: int, out: Array) -> None:
        out[...] = self.pooled[0][start:stop]

    def _gather(self, rows: Rows) -> Array:
        return self.pooled[0][rows]


class PooledNorms(Reader):
    """Lengths (N,) of pooled tokens before normalisation: of the pooled stored tokens, times the tokens' norm."""

    def __init__(self, pooled: PooledReader, norms: Reader) -> None:
        self._pooled, self._norms, self.spec = pooled, norms, norms.spec

    def _read(self, start: int, stop: int, out: Array) -> None:
        out[...] = self._norms.read(start, stop) * self._pooled.pooled[1][start:stop]

    def _gather(self, rows: Rows) -> Array:
        return self._norms.gather(rows) * self._pooled.pooled[1][rows]
