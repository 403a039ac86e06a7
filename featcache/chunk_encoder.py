"""Rows of a data set to the values of whole chunks: batches that never straddle a chunk, bad rows named.

A chunk is encoded from its first row on, in batches of one size, so that a resumed run makes the same bytes as an
undisturbed one (equal device, threads and batch size assumed). Unreadable images keep their row: NaN features, label
-1, ``valid`` 0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.datasets.base import Dataset
from featcache.encode_options import EncodeOptions
from featcache.encoders import Encoder
from featcache.errors import EncoderError
from featcache.pipeline import Prepared, batches_of, default_ahead, default_workers, prepared_batches
from featcache.store import BadRow
from featcache.store.layout import ArraySpec


def normalise(features: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Unit rows (N, D) and the lengths (N,) that they had, in float32; a row of zeros stays zero."""
    norm = np.sqrt(np.einsum("nd,nd->n", features, features))
    return features / np.maximum(norm, np.finfo(np.float32).tiny)[:, None], norm


def stored_identity(encoder: Encoder) -> dict[str, Any]:
    """The encoder's half of a store's key: `content_key` of it is the store's ``encoder_key``."""
    return encoder.image_identity | {"stored": "float16, L2-normalised in float32"}


@dataclass(frozen=True)
class EncodedChunk:
    """The rows of one chunk, ready to be written."""

    chunk: int
    values: Mapping[str, npt.NDArray[Any]]
    bad: list[BadRow]


class ChunkEncoder:
    """Encodes chunks of one data set with one encoder.

    Parameters
    ----------
    dataset : Dataset
    encoder : Encoder
    options : EncodeOptions
    advance : callable
        Told of the number of rows of every batch that is done.
    """

    def __init__(
        self, dataset: Dataset, encoder: Encoder, options: EncodeOptions, advance: Callable[[int], None]
    ) -> None:
        self._dataset, self._encoder, self._options, self._advance = dataset, encoder, options, advance
        self._ids = dataset.index.ids

    def encode(self, chunks: Iterable[int], spec: ArraySpec) -> Iterator[EncodedChunk]:
        """Encode chunks in the order in which they come; the next ones are fetched ahead of need.

        Parameters
        ----------
        chunks : iterable of int
            Taken one by one, when the first batch of each is about to be read.
        spec : ArraySpec
            Any array of the store: it says which rows a chunk holds.
        """
        size, options = self._options.batch_size, self._options
        rows = (batch for chunk in chunks for batch in batches_of(spec.rows_of(chunk), size))
        ahead = default_ahead(self._encoder) if options.ahead is None else options.ahead
        workers = options.workers or default_workers()
        batches = prepared_batches(self._dataset, self._encoder, rows, workers, ahead)
        for first in batches:
            chunk = first[0].row // spec.chunk_rows
            yield self._chunk(chunk, spec.rows_of(chunk), chain([first], batches))

    def _chunk(self, chunk: int, rows: range, batches: Iterator[list[Prepared]]) -> EncodedChunk:
        features = np.full((len(rows), self._encoder.dim), np.nan, dtype=np.float32)
        content = np.zeros((len(rows), 16), dtype=np.uint8)
        bad = []
        for _ in batches_of(rows, self._options.batch_size):
            batch = next(batches)
            good = [prepared for prepared in batch if prepared.image is not None]
            bad += [BadRow(item.row, self._ids[item.row], item.error) for item in batch if item.image is None]
            if good:
                places = [prepared.row - rows.start for prepared in good]
                features[places] = self._encoder.encode_images([item.image for item in good if item.image is not None])
            for prepared in batch:
                content[prepared.row - rows.start] = np.frombuffer(prepared.content, dtype=np.uint8)
            self._advance(len(batch))
        valid = np.ones(len(rows), dtype=np.uint8)
        valid[[item.row - rows.start for item in bad]] = 0
        self._check_finite(features, valid, rows)
        unit, norm = normalise(features)
        values: dict[str, npt.NDArray[Any]] = {
            "features": unit.astype(np.float16),
            "norm": norm,
            "valid": valid,
            "content": content,
        }
        return EncodedChunk(chunk, values, bad)

    def _check_finite(self, features: npt.NDArray[np.float32], valid: npt.NDArray[np.uint8], rows: range) -> None:
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1) & (valid == 1))
        if len(broken):
            raise EncoderError(
                f"{self._encoder.name} made NaN or infinite features for {len(broken)} image(s), first "
                f"{self._ids[rows.start + int(broken[0])]}; with fp16 that is an overflow: take --precision bf16"
            )
