"""Random texts, and what a bank of their features says about all of them.

Lipsum-FT (arXiv 2404.00860) compares images with texts of random tokens; see `ft.regularizers.lipsum`.
"""

from typing import NamedTuple

import torch

from featcache.errors import PromptError

__all__ = ["SecondMoment", "random_texts", "second_moment"]


class SecondMoment(NamedTuple):
    """Second-moment matrix of a text bank, with its size and error."""

    matrix: torch.Tensor
    """(D, D) float64, ``T^T T / K``."""
    size: int
    """K, the number of texts."""
    error: float
    """Standard error in relative Frobenius norm, as an estimate of the matrix over all random texts."""


def second_moment(texts: torch.Tensor) -> SecondMoment:
    """``T^T T / K`` of K text features (K, D), in float64.

    The error is ``sqrt((mean_k |t_k|^4 - |G|_F^2) / (K - 1)) / |G|_F``: the summed variance of the entries of the mean
    of K independent ``t t^T``, relative to its norm; infinite for a single text.

    Raises
    ------
    PromptError
        No texts, or not a matrix.

    Examples
    --------
    >>> moment = second_moment(torch.eye(2))
    >>> moment.matrix.tolist(), moment.size, moment.error
    ([[0.5, 0.0], [0.0, 0.5]], 2, 1.0)
    """
    if texts.ndim != 2 or not len(texts):
        raise PromptError(f"texts of shape {tuple(texts.shape)}: expected (K, D) with K >= 1")
    rows = texts.detach().double()
    matrix = rows.T @ rows / len(rows)
    norm = matrix.square().sum()
    spread = (rows.square().sum(-1).square().mean() - norm).clamp(min=0)
    error = (spread / (len(rows) - 1)).sqrt() / norm.sqrt() if len(rows) > 1 else torch.tensor(torch.inf)
    return SecondMoment(matrix, len(rows), float(error))


def random_texts(
    n: int,
    length: int,
    sot: int,
    eot: int,
    generator: torch.Generator | None = None,
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
) -> torch.Tensor:
    """Token ids of random texts, each ``[sot, length ids, eot]``, the ids independent and uniform.

    Parameters
    ----------
    n, length : int
        Number of texts (80 in the paper) and of random ids in each (8 in the paper).
    sot, eot : int
        Start and end of text (49406 and 49407 in CLIP's vocabulary); never drawn in between.
    generator : torch.Generator, optional
        A CPU generator; seeded alike, it draws alike on every process.
    vocab_size : int, optional
        Ids are drawn from 0 .. vocab_size - 1 without the two; default: up to the larger of the two, which gives
        CLIP's 0 .. 49405.
    context_length : int, optional
        Pad with zeros up to this length, for towers that take no shorter text; a causal tower that pools at `eot`
        gives the same feature either way.

    Returns
    -------
    (n, length + 2) int64, or (n, context_length).

    Raises
    ------
    PromptError
        Nothing to draw from, or no room for the texts.

    Examples
    --------
    >>> random_texts(2, 3, 5, 6, torch.Generator().manual_seed(0))
    tensor([[5, 4, 4, 3, 6],
            [5, 0, 3, 4, 6]])
    """
    low, high = sorted((sot, eot))
    size = high + 1 if vocab_size is None else vocab_size
    room = length + 2 if context_length is None else context_length
    if n < 1 or length < 0 or low < 0 or low == high or size <= high or size < 3:
        raise PromptError(
            f"{n} texts of {length} ids from a vocabulary of {size} with start {sot} and end {eot}: expected at least "
            "one text, two different marks inside the vocabulary, and an id beside them"
        )
    if room < length + 2:
        raise PromptError(f"context length {room} has no room for {length} ids, start and end; use {room - 2} ids")
    ids = torch.randint(0, size - 2, (n, length), generator=generator)
    ids += ids >= low  # skip the two marks wherever they stand
    ids += ids >= high
    texts = torch.zeros((n, room), dtype=torch.int64)
    texts[:, 0], texts[:, 1 : length + 1], texts[:, length + 1] = sot, ids, eot
    return texts
