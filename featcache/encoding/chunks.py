"""Encoding whole chunks of a data set, in batches that never span two chunks.

A chunk is encoded from its first row on, in batches of one size, so that a resumed run makes the same bytes as an
uninterrupted one (given the same device, threads and batch size). Each image is decoded once, and goes through the
model once per view, which gives all taps. Unreadable images keep their row: NaN features, label -1, ``valid`` 0.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from featcache.datasets.base import Dataset
from featcache.encoders import Batch, Encoder
from featcache.encoders.base import PROJECTED
from featcache.encoders.staging import Stage
from featcache.encoders.taps import find_tap
from featcache.encoding.augment import view_of
from featcache.encoding.options import EncodeOptions
from featcache.encoding.outputs import PutFile, TokenRows, Work
from featcache.encoding.pace import BatchSize
from featcache.encoding.pipeline import default_ahead, default_workers, prepared, read_sample, worked_batches
from featcache.encoding.reuse import Donors, Place
from featcache.encoding.store_job import MadeChunk
from featcache.errors import ContentChangedError, EncoderError
from featcache.progress import counted
from featcache.store import BadRow
from featcache.store.key import Json, content_key
from featcache.store.layout import image_arrays
from featcache.store.reading.parts import Part
from featcache.store.reading.tokens import ROWS_STORED, TOKENS_STORED, tap_name
from featcache.store.writer import ChunkValues

if TYPE_CHECKING:
    from featcache.encoders.openclip import OpenClipEncoder

Float = TypeVar("Float", np.float32, np.float64)
_Pass: TypeAlias = "tuple[_Chunk, Sequence[int], Sequence[Part]]"
"""A forward pass over some rows of a chunk, and the parts that it gives."""
SAFE_LENGTHS = (1e-15, 1e18)
"""Lengths whose squares are safely within float32's range."""


def normalise(features: npt.NDArray[Float]) -> tuple[npt.NDArray[Float], npt.NDArray[Float]]:
    """Unit rows (N, D) and the original lengths (N,), in the precision of the features; a row of zeros stays zero.

    Rows whose squares leave float32's range are first divided by their largest value, in float64.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        norm = np.sqrt(np.einsum("nd,nd->n", features, features))
        unit = features / np.maximum(norm, np.finfo(np.float32).tiny)[:, None]
        extreme = np.flatnonzero(~((norm > SAFE_LENGTHS[0]) & (norm < SAFE_LENGTHS[1])))
        peak = np.abs(features[extreme]).max(axis=1, initial=0.0).astype(np.float64)
        use = np.isfinite(peak) & (peak > 0)
        rows, peak = extreme[use], peak[use]
        scaled = features[rows] / peak[:, None]
        lengths = np.sqrt(np.einsum("nd,nd->n", scaled, scaled))
        unit[rows], norm[rows] = scaled / lengths[:, None], lengths * peak
    return unit, norm


def stored_identity(encoder: Encoder, tap: str | None = None) -> Json:
    """The encoder's half of a store's or tap's identity; its `content_key` is the ``encoder_key``."""
    tokens = tap is not None and find_tap(encoder, tap).tokens is not None
    stored = encoder.image_identity | {"stored": TOKENS_STORED if tokens else ROWS_STORED}
    return stored if tap is None else stored | {"stored_tap": tap_name(tap)}


def unit_texts(features: npt.NDArray[np.float32], encoder: Encoder) -> npt.NDArray[np.float32]:
    """Unit rows (N, D) of text features; EncoderError if some are not finite."""
    unit, _ = normalise(features)
    if not np.isfinite(unit).all():
        raise EncoderError(f"{encoder.name} returned NaN or infinite text features; use --precision fp32")
    return unit


def encoder_info(encoder: Encoder) -> Json:
    """The fields of a manifest's `info` that describe the encoder."""
    return {
        "encoder_name": encoder.name,
        "dim": encoder.dim,
        "logit_scale": encoder.logit_scale,
        "logit_bias": encoder.logit_bias,
        "text_digests": [] if encoder.text_digest is None else [encoder.text_digest],
    }


@dataclass(frozen=True)
class _Sample:
    """A sample of a chunk: one image per view, an error, or the place of its row in another store."""

    work: Work
    row: int
    content: bytes
    images: Mapping[Part, Batch] = field(default_factory=dict)
    error: str = ""
    place: Place | None = None


class ChunkEncoder:
    """Encodes chunks of one data set with one encoder.

    Rows of known content are copied from `donors`. `advance` is called with the number of rows of every finished batch,
    and `put` writes a file of tokens. `batch_size` may change while batch sizes are measured.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        options: EncodeOptions,
        batch_size: BatchSize,
        donors: Donors,
        advance: Callable[[int], None],
        put: PutFile,
    ) -> None:
        self._dataset, self._what = dataset, f"{dataset.name}/{dataset.split}"
        self._encoder, self._options, self._advance = encoder, options, advance
        self._donors, self._put = donors, put
        self._ids = dataset.index.ids
        self._view = cache(lambda view: view_of(view, encoder))
        self._batch_size = batch_size
        self._stage: Stage[_Pass] = Stage(encoder, batch_size.now, compiled=options.compiled)

    def encode(self, works: Iterable[Work]) -> Iterator[MadeChunk]:
        """Encode chunks in order; a `Work` is taken from `works` only when its first batch is about to be read.

        ContentChangedError if a part is added, and an image is no longer the one that the store was made from.
        """
        options = self._options
        tasks = ([(work, row) for row in batch] for work in works for batch in self._batches(work.rows))
        ahead = default_ahead(self._encoder) if options.ahead is None else options.ahead
        workers = options.workers or default_workers()
        batches = worked_batches(lambda batch: [self._sample(*task) for task in batch], tasks, workers, ahead)
        begun: deque[_Chunk] = deque()  # the next chunk begins before the last results of this one arrive
        for batch in batches:
            work = batch[0].work
            if not begun or begun[-1].work is not work:
                begun.append(_Chunk(work, self._encoder, self._tokens(work)))
            chunk = begun[-1]
            chunk.add(batch)
            while len(chunk.waiting) >= self._batch_size.now or (chunk.waiting and chunk.is_read):
                self._forward(chunk)
            self._advance(len(batch))
            yield from self._whole(begun)
        self._fetch(0)
        yield from self._whole(begun)

    def _batches(self, rows: range) -> Iterator[range]:
        """The rows of a chunk in batches of the current size."""
        while rows:
            size = self._batch_size.now
            yield rows[:size]
            rows = rows[size:]

    def _whole(self, begun: deque[_Chunk]) -> Iterator[MadeChunk]:
        """Yield the complete chunks, in order; write complete token files of all."""
        for chunk in begun:
            chunk.flush()
        while begun and begun[0].is_whole:
            yield self._encoded(begun.popleft())

    def _tokens(self, work: Work) -> dict[Part, TokenRows]:
        """The parts of a chunk that have tokens."""
        found = {}
        for part in work.parts:
            tap = find_tap(self._encoder, part.tap)
            if tap.tokens is not None:
                specs = image_arrays(len(self._ids), tap.dim, work.chunk_rows, tap.tokens)
                found[part] = TokenRows(part, specs["features"], work.rows, self._put, self._donors)
        return found

    def _sample(self, work: Work, row: int) -> _Sample:
        """Read one sample and make its views; called in worker threads."""
        if row in work.bad and work.content is not None:
            return _Sample(work, row, work.content[row - work.rows.start].tobytes(), error=work.bad[row])
        place: Place | None = None

        def known(content: bytes) -> bool:
            nonlocal place
            place = self._donors.find(content, self._ids[row], work.parts)
            return place is not None

        sample = read_sample(self._dataset, row, known)
        if sample.image is None:
            return _Sample(work, row, sample.content, error=sample.error, place=place)
        views = sorted({part.whole_view for part in work.parts}, key=str)
        made = prepared(sample, lambda picture: {v: self._view(v)(picture, v.view, self._ids[row]) for v in views})
        return _Sample(work, row, sample.content, made.image or {}, made.error)

    def _forward(self, chunk: _Chunk) -> None:
        """Begin one forward pass per view over the next waiting images."""
        size, began = self._batch_size.now, time.perf_counter()
        batch, chunk.waiting = chunk.waiting[:size], chunk.waiting[size:]
        rows = [sample.row for sample in batch]
        for view in dict.fromkeys(part.whole_view for part in chunk.work.parts):
            parts = [part for part in chunk.work.parts if part.whole_view == view]
            taps = [part.tap for part in parts if part.tap]
            chunk.under_way.append(rows[0])
            self._stage.put((chunk, rows, parts), [sample.images[view] for sample in batch], taps)
            self._fetch()
        self._batch_size.took(len(batch), time.perf_counter() - began)

    def _fetch(self, late: int | None = None) -> None:
        """Collect the features of earlier passes."""
        for (chunk, rows, parts), found in self._stage.results(late):
            chunk.under_way.popleft()
            for part in parts:
                values = found[part.tap or PROJECTED]
                if part in chunk.tokens:
                    self._check_finite(values, rows)
                    chunk.tokens[part].add(rows, values)
                else:
                    chunk.made[part][np.asarray(rows) - chunk.rows.start] = values

    def _encoded(self, chunk: _Chunk) -> MadeChunk:
        bad = [BadRow(row, self._ids[row], error) for row, error in chunk.errors.items()]
        valid = np.ones(len(chunk.rows), dtype=np.uint8)
        valid[[item.row - chunk.rows.start for item in bad]] = 0
        copied = np.array([sample.row - chunk.rows.start for sample in chunk.known], dtype=np.int64)
        fresh = valid.copy()
        fresh[copied] = 0
        rest = {"valid": valid, "content": chunk.content}
        values: dict[Part, ChunkValues] = {
            part: {"features": tokens.written, "norm": tokens.norm, **rest} for part, tokens in chunk.tokens.items()
        }
        for part, features in chunk.made.items():
            rows = np.flatnonzero(fresh)
            self._check_finite(features[rows], (rows + chunk.rows.start).tolist())
            unit, norm = normalise(features)
            stored = unit.astype(np.float16)
            if len(copied):
                places = [sample.place for sample in chunk.known if sample.place is not None]
                stored[copied], norm[copied] = self._donors.values(part, places)
            values[part] = {"features": stored, "norm": norm, **rest}
        self._check_same(chunk)
        return MadeChunk(chunk.work, values, bad, len(copied))

    def _check_same(self, chunk: _Chunk) -> None:
        """ContentChangedError if an added part found other images than the store was made from."""
        known = chunk.work.content
        if known is None:
            return
        differs = (chunk.content != known[: len(chunk.content)]).any(axis=1)
        rows = {chunk.rows.start + int(row) for row in np.flatnonzero(differs)}
        rows |= set(chunk.errors) - set(chunk.work.bad)
        if rows:
            raise ContentChangedError(
                f"{self._what}: {counted(len(rows), 'image')} changed since the store was made, first "
                f"{self._ids[min(rows)]}; taps and views must be of the same images: restore them, or "
                "encode them with another --root"
            )

    def _check_finite(self, features: npt.NDArray[np.float32], rows: Sequence[int]) -> None:
        broken = np.flatnonzero(~np.isfinite(features).all(axis=tuple(range(1, features.ndim))))
        if len(broken):
            raise EncoderError(
                f"{self._encoder.name} returned NaN or infinite features for {counted(len(broken), 'image')}, first "
                f"{self._ids[rows[int(broken[0])]]}; with fp16 that is an overflow: take --precision bf16"
            )


class _Chunk:
    """A chunk being encoded."""

    def __init__(self, work: Work, encoder: Encoder, tokens: Mapping[Part, TokenRows]) -> None:
        self.work, self.rows, self.tokens = work, work.rows, tokens
        rows = work.rows
        self.content = np.zeros((len(rows), 16), dtype=np.uint8)
        self.made = {
            part: np.full((len(rows), find_tap(encoder, part.tap).dim), np.nan, dtype=np.float32)
            for part in work.parts
            if part not in tokens
        }
        self.waiting: list[_Sample] = []
        self.under_way: deque[int] = deque()
        """First rows of the passes whose features have not arrived."""
        self.known: list[_Sample] = []
        self.errors: dict[int, str] = {}
        self._seen = 0

    @property
    def is_read(self) -> bool:
        """Whether all rows have been read."""
        return self._seen == len(self.rows)

    @property
    def is_whole(self) -> bool:
        """Whether all features have arrived."""
        return self.is_read and not self.waiting and not self.under_way

    def add(self, batch: Sequence[_Sample]) -> None:
        """Add samples, in row order."""
        for sample in batch:
            self.content[sample.row - self.rows.start] = np.frombuffer(sample.content, dtype=np.uint8)
            if sample.error:
                self.errors[sample.row] = sample.error
            elif sample.place is not None:
                self.known.append(sample)
            else:
                self.waiting.append(sample)
        self._seen += len(batch)

    def flush(self) -> None:
        """Write the complete token files: those before the first row whose features are missing."""
        if self.tokens:
            waiting = [*self.under_way, *(sample.row for sample in self.waiting)]
            before = waiting[0] if waiting else self.rows.start + self._seen
            known = {sample.row: sample.place for sample in self.known if sample.place is not None}
            for tokens in self.tokens.values():
                tokens.flush(before, known)


def as_stored(encoder: OpenClipEncoder) -> OpenClipEncoder:
    """The model in float32, the default of ``featcache encode``, so that its stores are found."""
    stored = copy.copy(encoder)
    stored.precision = "fp32"
    return stored


def encoder_key(encoder: OpenClipEncoder) -> str:
    """Key of the stores that ``featcache encode`` makes with this model; fitted heads refer to it."""
    return content_key(stored_identity(as_stored(encoder)))
