"""Dry runs of encoding: what would be read, computed and written."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from featcache.datasets.base import PlainDataset
from featcache.encoders import Encoder
from featcache.encoders.base import whole_encoder
from featcache.encoders.taps import find_tap
from featcache.encoding.images import ImageJob
from featcache.encoding.options import EncodeOptions
from featcache.encoding.pace import BatchSize
from featcache.encoding.pipeline import batches_of, default_ahead, default_workers, prepared_batches
from featcache.store import resolve_root
from featcache.store.key import Json
from featcache.store.manifest import read_header
from featcache.store.places import StorePath
from featcache.store.reading.parts import Part
from featcache.store.reading.readers import Rows

MEASURED = 2
"""Batches that are encoded to measure the speed; only the last is timed."""


@dataclass(frozen=True)
class EncodePlan:
    """The work of `featcache.encode_dataset`."""

    store: StorePath
    """Place of the store, which need not exist."""
    name: str
    split: str
    rows: int
    rows_to_encode: int
    """Images that the store or a part lacks, rows that would be copied from other stores included."""
    bytes_to_read: int
    """Size of their files; 0 if the source does not know."""
    bytes_to_write: int
    """Size of their features, for all outputs."""
    seconds: float
    """Estimate by the measured speed of one batch; 0 if nothing is to be encoded."""

    def to_dict(self) -> Json:
        """JSON-able form."""
        return asdict(self) | {"store": str(self.store)}


def plan_encoding(
    dataset: PlainDataset, encoder: Encoder, *, root: str | Path | None = None, options: EncodeOptions | None = None
) -> EncodePlan:
    """Plan a run of `featcache.encode_dataset`: rows, bytes, and the time, estimated by encoding two batches."""
    options = options or EncodeOptions()
    if dataset.index.content is not None:
        dataset.index.content.digest()  # without a root, so that no cache is written
    job = ImageJob(dataset, whole_encoder(encoder, "encoder:"), resolve_root(root), options, None)
    missing = _missing_rows(job)
    rows = np.unique(np.concatenate(list(missing.values())))
    taps = {part: find_tap(encoder, part.tap) for part in missing}
    written = sum(2 * len(own) * taps[part].dim * (taps[part].tokens or 1) for part, own in missing.items())
    seconds = _seconds_a_row(dataset, encoder, options, rows) * len(rows) * (1 + options.views) if len(rows) else 0.0
    sizes = np.maximum(dataset.index.sizes[rows], 0)
    counts = (len(dataset.index), len(rows), int(sizes.sum()), written)
    return EncodePlan(job.path, dataset.name, dataset.split, *counts, seconds)


def _missing_rows(job: ImageJob) -> Mapping[Part, Rows]:
    """The rows that each output lacks. Writers are opened only on existing stores, where they write nothing."""
    missing = dict.fromkeys((Part(), *job.parts), np.arange(job.n_rows))
    begun = [part for part in missing if read_header(job.path / part.name) is not None]
    if Part() not in begun:
        return missing
    store = job.writer()
    for part in begun:
        writer = job.part_writer(part, store) if part != Part() else store
        done = [row for marker in writer.markers() for row in writer.rows_spec.rows_of(marker.chunk)]
        missing[part] = np.setdiff1d(missing[part], np.array(done, dtype=np.int64))
    return missing


def _seconds_a_row(dataset: PlainDataset, encoder: Encoder, options: EncodeOptions, rows: Rows) -> float:
    """Seconds to read, decode and encode one image, in the last of a few batches."""
    given = BatchSize(options.batch_size, encoder.device, len(rows)).now
    size = min(given, max(1, len(rows) // MEASURED))
    first = range(int(rows[0]), min(int(rows[0]) + MEASURED * size, len(dataset.index)))
    batches = prepared_batches(
        dataset, encoder, batches_of(first, size), options.workers or default_workers(), default_ahead(encoder)
    )
    began, seconds = time.perf_counter(), 0.0
    for batch in batches:
        images = [item.image for item in batch if item.image is not None]
        if images:
            encoder.encode_images(images)
        seconds = (time.perf_counter() - began) / len(batch)
        began = time.perf_counter()
    return seconds
