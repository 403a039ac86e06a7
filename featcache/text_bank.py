"""Random texts x encoder -> text bank: their features, and the second-moment matrix that says all Lipsum needs of them.

The texts are `featcache.random_texts.random_texts`: M sequences of start, `length` ids drawn uniformly, end. A bank is
a store like any other (`BankStore`): its path is the text tower and the texts' token ids, it survives a kill, and
``featcache verify`` checks it. With it are stored ``G = T^T T / M`` (float64, from the stored float32 rows), M, and the
standard error of G as an estimate over all random texts.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from featcache.chunk_encoder import normalise
from featcache.encoders import Encoder
from featcache.errors import EncoderError, PromptError, StoreCorruptError, StoreIncompleteError, StoreNotFoundError
from featcache.progress import Progress, Silent
from featcache.random_texts import random_texts, second_moment
from featcache.store import BankStore, StoreWriter, content_key, open_bank_store, resolve_root
from featcache.store.header import existing_header
from featcache.store.key import checksum
from featcache.store.layout import DEFAULT_CHUNK_ROWS, ArraySpec
from featcache.store.places import StorePath, read

__all__ = ["LENGTH", "BankResult", "embed_random_texts"]

LENGTH = 8
TEXT_BATCH = 256


@dataclass(frozen=True)
class BankResult:
    """What an `embed_random_texts` run did: `hit` means that no text was encoded."""

    store: BankStore
    hit: bool
    encoded_rows: int
    seconds: float


def embed_random_texts(
    m: int,
    encoder: Encoder,
    *,
    length: int = LENGTH,
    seed: int = 0,
    name: str | None = None,
    root: str | StorePath | None = None,
    progress: Progress | None = None,
) -> BankResult:
    """Embed `m` random texts, or find them in the cache.

    Parameters
    ----------
    m : int
        M, number of texts.
    encoder : Encoder
        With CLIP's tokenizer, or one that names its start and end of text.
    length : int
        Random ids of a text (8 in Lipsum-FT, arXiv 2404.00860).
    seed : int
    name : str, optional
        What listings call it, default ``random-M``.
    root : str or Path, optional
        Folder of all stores.

    Raises
    ------
    PromptError
        No texts, or texts longer than the model's context.
    EncoderError
        A model without text side, or whose tokenizer names no start and end of text.
    """
    if not hasattr(encoder, "special_tokens") or encoder.text_identity is None:
        raise EncoderError(f"{encoder.name} has no text side that takes token ids; name a CLIP-style model")
    job = _BankJob(m, length, seed, encoder, name or f"random-{m}", resolve_root(root))
    return job.run(progress or Silent())


class _BankJob:
    def __init__(self, m: int, length: int, seed: int, encoder: Any, name: str, root: StorePath) -> None:
        sot, eot, vocabulary, context = encoder.special_tokens
        if length > context - 2:
            raise PromptError(f"length {length}: {encoder.name} takes texts of {context - 2} ids at most")
        generator = torch.Generator().manual_seed(seed)
        self.ids = random_texts(m, length, sot, eot, generator, vocab_size=vocabulary, context_length=context)
        self.encoder, self.name = encoder, name
        self.drawn = {"random_texts": m, "length": length, "seed": seed}
        self.identity = {
            "encoder": encoder.text_identity,
            "dataset": {**self.drawn, "tokens": checksum(self.ids.numpy().astype("<i8").tobytes())},
        }
        self.key = f"{content_key(self.identity['encoder'])}/{content_key(self.identity['dataset'])}"
        self.path = root / BankStore.kind / self.key

    def run(self, progress: Progress) -> BankResult:
        began = time.perf_counter()
        try:
            return BankResult(open_bank_store(self.path), True, 0, time.perf_counter() - began)
        except (StoreNotFoundError, StoreIncompleteError, StoreCorruptError):
            pass
        writer = self._writer()
        writer.reopen()
        encoded = self._encode(writer, progress)
        if damaged := writer.drop_damaged():
            raise StoreCorruptError(
                f"{self.path}: {len(damaged)} chunk(s) differ from their markers right after they were written; "
                "run the same command again, and check the disk if it persists"
            )
        self._finalise(writer)
        return BankResult(open_bank_store(self.path), False, encoded, time.perf_counter() - began)

    def _writer(self) -> StoreWriter:
        m, dim, nan = len(self.ids), self.encoder.dim, float("nan")
        begun = existing_header(self.path)
        rows = int(begun["chunk_rows"]) if begun else min(DEFAULT_CHUNK_ROWS, m)
        specs = {"features": ArraySpec("features", "<f4", (m, dim), rows, nan)}
        whole = {"moment": ArraySpec("moment", "<f8", (dim, dim), dim, nan)}
        return StoreWriter(self.path, BankStore.kind, self.key, self.identity, specs, whole, {}, verb="text --random")

    def _encode(self, writer: StoreWriter, progress: Progress) -> int:
        pending = writer.pending()
        rows_of = writer.rows_spec.rows_of
        total = sum(len(rows_of(chunk)) for chunk in pending)
        progress.start(f"banks/{self.name} with {self.encoder.name}", len(self.ids), len(self.ids) - total)
        for chunk in pending:
            parts = []
            for ids in torch.split(self.ids[rows_of(chunk).start : rows_of(chunk).stop], TEXT_BATCH):
                parts.append(normalise(self.encoder.encode_tokens(ids))[0])
                progress.advance(len(ids))
            features = np.concatenate(parts)
            if not np.isfinite(features).all():
                raise EncoderError(f"{self.encoder.name} made NaN or infinite text features; use --precision fp32")
            writer.write_chunk(chunk, {"features": features})
        progress.finish()
        return total

    def _finalise(self, writer: StoreWriter) -> None:
        spec = writer.specs["features"]
        chunks = [spec.chunk_array(read(spec.chunk_path(self.path, chunk))) for chunk in range(spec.n_chunks)]
        moment = second_moment(torch.from_numpy(np.concatenate(chunks)[: len(self.ids)]))
        info = {
            "name": self.name,
            "classnames": [],
            "encoder_name": self.encoder.name,
            "dim": self.encoder.dim,
            "text_digests": [self.encoder.text_digest],
            "logit_scale": self.encoder.logit_scale,
            "logit_bias": self.encoder.logit_bias,
            "error": moment.error if len(self.ids) > 1 else None,
            **self.drawn,
        }
        written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        writer.finalise({"moment": moment.matrix.numpy()}, info, self.encoder.provenance | {"written": written})
