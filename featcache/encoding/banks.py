"""Text banks: embedded random texts, with which Lipsum-FT (arXiv 2404.00860) compares images.

A text is the start token, `length` uniformly drawn token ids, and the end token. A bank is a store (`BankStore`), keyed
by the text tower and the token ids. It holds the M features T (M, D), ``G = T^T T / M`` (float64, from the stored
float32 rows), and the standard error of G as an estimate over all random texts. Lipsum draws rows from a bank, or uses
G alone; see `ft.regularizers.lipsum`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from featcache.encoders import Encoder
from featcache.encoders.base import whole_encoder
from featcache.encoding.chunks import encoder_info, unit_texts
from featcache.encoding.outputs import Work, stored_rows
from featcache.encoding.store_job import Contents, JobResult, Layout, MadeChunk, StoreJob
from featcache.errors import EncoderError, MismatchError, PromptError
from featcache.progress import Progress
from featcache.store import BankStore, StoreWriter, find_path, open_bank_store, resolve_root
from featcache.store.key import checksum
from featcache.store.layout import ArraySpec
from featcache.store.places import StorePath
from featcache.store.reading.parts import Part


class SecondMoment(NamedTuple):
    """Matrix (D, D) float64, ``T^T T / K``, of the K texts of a bank; see `second_moment` for the error."""

    matrix: torch.Tensor
    size: int
    error: float


def second_moment(texts: torch.Tensor) -> SecondMoment:
    """``T^T T / K`` of K >= 1 text features (K, D), in float64.

    The standard error, as an estimate of the matrix over all random texts, in relative Frobenius norm is
    ``sqrt((mean_k |t_k|^4 - |G|_F^2) / (K - 1)) / |G|_F``: from the summed variance of the entries of the mean of K
    independent ``t t^T``; infinite for a single text.

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
    """Token ids (n, length + 2) int64 of random texts, each ``[sot, length ids, eot]``, with independent uniform ids.

    Parameters
    ----------
    n, length : number of texts (80 in the paper) and of random ids in each (8 in the paper)
    sot, eot : start and end token (49406 and 49407 in CLIP's vocabulary); never drawn in between
    generator : a CPU generator, so that processes with equal seeds draw the same texts
    vocab_size : ids are drawn from 0 .. vocab_size - 1 without `sot` and `eot`; default: up to the larger of these,
        which gives CLIP's 0 .. 49405
    context_length : pad with zeros to (n, context_length), for towers that need it; a causal tower that pools at `eot`
        gives the same features either way

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
    ids += ids >= low  # skip start and end token
    ids += ids >= high
    texts = torch.zeros((n, room), dtype=torch.int64)
    texts[:, 0], texts[:, 1 : length + 1], texts[:, length + 1] = sot, ids, eot
    return texts


LENGTH = 8
TEXT_BATCH = 256


def embed_random_texts(
    m: int,
    encoder: Encoder,
    *,
    length: int = LENGTH,
    seed: int = 0,
    name: str | None = None,
    root: str | StorePath | None = None,
    progress: Progress | None = None,
) -> JobResult[BankStore]:
    """Embed `m` random texts of `length` ids (8 in Lipsum-FT), or find them in the cache.

    `name` is that of the bank in listings, by default ``random-M``. PromptError if there are no texts, or they are
    longer than the model's context; EncoderError if the model has no text side, or its tokenizer no start and end.
    """
    if encoder.text_identity is None or (special := whole_encoder(encoder, "encoder:").special_tokens) is None:
        raise EncoderError(f"{encoder.name} has no text side that takes token ids; use a CLIP-style model")
    if length > special.context - 2:
        raise PromptError(f"length {length}: {encoder.name} takes texts of {special.context - 2} ids at most")
    generator = torch.Generator().manual_seed(seed)
    sizes = {"vocab_size": special.vocabulary, "context_length": special.context}
    ids = random_texts(m, length, special.start, special.end, generator, **sizes)
    drawn = {"random_texts": m, "length": length, "seed": seed}
    return _BankJob(ids, drawn, encoder, name or f"random-{m}", resolve_root(root), progress).result()


class _BankJob(StoreJob[BankStore]):
    kind, verb = BankStore, "text --random"

    def __init__(
        self,
        ids: torch.Tensor,
        drawn: dict[str, int],
        encoder: Encoder,
        name: str,
        root: StorePath,
        progress: Progress | None,
    ) -> None:
        self.ids, self.drawn, self.encoder, self.name = ids, drawn, encoder, name
        tokens = checksum(ids.numpy().astype("<i8").tobytes())
        identity = {"encoder": encoder.text_identity, "dataset": {**drawn, "tokens": tokens}}
        super().__init__(root, identity, len(ids), f"banks/{name} with {encoder.name}", progress=progress)

    def layout(self, chunk_rows: int) -> Layout:
        dim, nan = self.encoder.dim, float("nan")
        rows = {"features": ArraySpec("features", "<f4", (self.n_rows, dim), chunk_rows, nan)}
        return Layout(rows, {"moment": ArraySpec("moment", "<f8", (dim, dim), dim, nan)})

    def make(self, works: Iterator[Work]) -> Iterator[MadeChunk]:
        for work in works:
            parts = []
            for ids in torch.split(self.ids[work.rows.start : work.rows.stop], TEXT_BATCH):
                parts.append(unit_texts(self.encoder.encode_tokens(ids), self.encoder))
                self.advance(len(ids))
            yield MadeChunk(work, {Part(): {"features": np.concatenate(parts)}})

    def contents(self, part: Part, writer: StoreWriter) -> Contents:
        moment = second_moment(torch.from_numpy(stored_rows(writer, "features")))
        info = {
            "name": self.name,
            "classnames": [],
            **encoder_info(self.encoder),
            "error": moment.error if self.n_rows > 1 else None,
            **self.drawn,
        }
        return Contents(info, self.encoder.provenance, {"moment": moment.matrix.numpy()})


def open_bank(reference: str | int, encoder: Encoder, root: str | StorePath | None = None) -> BankStore:
    """Open a bank by its folder, key or ``banks/NAME``, or find or make the one with a number of texts and seed 0.

    MismatchError if it has another text tower than `encoder`, or is not a bank; StoreNotFoundError or StoreCorruptError
    if there is no such store, or it is damaged.
    """
    if isinstance(reference, int) or reference.isdigit():
        path: StorePath = embed_random_texts(int(reference), encoder, root=root).store.path
    else:
        path = find_path(reference, resolve_root(root))
    store = open_bank_store(path)
    if encoder.text_digest not in store.text_digests:
        raise MismatchError(
            f"{reference}: random texts of {store.encoder_name}, with another text tower than {encoder.name}; make a "
            f"bank with `featcache text --random {len(store)} --model ...`"
        )
    return store


def load_bank(reference: str | int, encoder: Encoder, root: str | StorePath | None = None) -> torch.Tensor:
    """Features (K, D) float32 of the texts of a bank, unit rows; see `open_bank`."""
    return torch.from_numpy(open_bank(reference, encoder, root).features)


def load_moment(reference: str | int, encoder: Encoder, root: str | StorePath | None = None) -> SecondMoment:
    """Second-moment matrix (D, D) float64 of a bank, its size and error; see `open_bank`."""
    store = open_bank(reference, encoder, root)
    return SecondMoment(torch.from_numpy(store.moment), len(store), store.error)
