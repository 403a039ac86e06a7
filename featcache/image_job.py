"""Encoding one data set with one encoder: the one loop, chunk by chunk, resumable at any moment.

Batches never straddle a chunk, so a resumed run makes the same bytes as an undisturbed one (equal device, threads and
batch size assumed). Unreadable images keep their row: NaN features, label -1, ``valid`` 0.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.content import changed_rows
from featcache.datasets import dataset_key, labels_digest
from featcache.datasets.base import Dataset
from featcache.encoders import Encoder
from featcache.errors import (
    ContentChangedError,
    EncoderError,
    FeatcacheError,
    ImageReadError,
    LabelsChangedError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
)
from featcache.pipeline import Prepared, batches_of, default_ahead, default_workers, prepared_batches
from featcache.progress import Progress
from featcache.store import BadRow, ImageStore, StoreWriter, content_key, open_image_store
from featcache.store.layout import DEFAULT_CHUNK_ROWS, image_arrays, labels_array
from featcache.store.samples import SAMPLES, STAMPS, samples_bytes, write_stamps
from featcache.store.writer import existing_header

FINALISE_ATTEMPTS = 3


@dataclass(frozen=True)
class EncodeOptions:
    """How to encode; none of it is part of a key.

    Parameters
    ----------
    batch_size : int
        Images a forward pass.
    chunk_rows : int, optional
        Rows of a chunk, default 4096 or N if that is less; a store that was begun keeps its own.
    workers : int, optional
        Threads that read and decode, default one a core.
    ahead : int, optional
        Batches decoded in advance, default 0 on a CPU and 4 on a GPU.
    max_bad : int
        Unreadable images to put up with.
    update_labels : bool
        Where the labels of the source changed: write the new ones (features are kept) instead of raising.
    refresh : bool
        Where source files changed: encode their chunks again instead of raising.
    """

    batch_size: int = 64
    chunk_rows: int | None = None
    workers: int | None = None
    ahead: int | None = None
    max_bad: int = 0
    update_labels: bool = False
    refresh: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("chunk_rows", self.chunk_rows or 1, 1),
            ("workers", self.workers or 1, 1),
            ("max_bad", self.max_bad, 0),
        ):
            if value < least:
                raise FeatcacheError(f"{name} is {value}, expected at least {least}")


def normalise(features: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Unit rows (N, D) and the lengths (N,) that they had, in float32; a row of zeros stays zero."""
    norm = np.sqrt(np.einsum("nd,nd->n", features, features))
    return features / np.maximum(norm, np.finfo(np.float32).tiny)[:, None], norm


def stored_identity(encoder: Encoder) -> dict[str, Any]:
    """The encoder's half of a store's key: `content_key` of it is the store's ``encoder_key``."""
    return encoder.image_identity | {"stored": "float16, L2-normalised in float32"}


class ImageJob:
    """One data set under one encoder."""

    def __init__(
        self, dataset: Dataset, encoder: Encoder, root: Path, options: EncodeOptions, progress: Progress
    ) -> None:
        self.dataset, self.encoder, self.options, self.progress = dataset, encoder, options, progress
        self.index = dataset.index
        self.identity = {
            "encoder": stored_identity(encoder),
            "dataset": {"rows": len(self.index), "samples": dataset_key(self.index)},
        }
        self.key = f"{content_key(self.identity['encoder'])}/{content_key(self.identity['dataset'])}"
        self.path = root / ImageStore.kind / self.key
        self.labels_digest = labels_digest(self.index.labels, self.index.classnames)
        self.text_digests = [] if encoder.text_digest is None else [encoder.text_digest]
        self.what = f"{dataset.name}/{dataset.split} with {encoder.name}"

    def finished_store(self) -> ImageStore | None:
        """The store if it is finished and whole by its file sizes."""
        try:
            return open_image_store(self.path)
        except (StoreNotFoundError, StoreIncompleteError, StoreCorruptError):
            return None

    def writer(self) -> StoreWriter:
        """The writer of the store; one that was begun keeps its chunk size."""
        n_rows = len(self.index)
        begun = existing_header(self.path)
        default = self.options.chunk_rows or DEFAULT_CHUNK_ROWS
        chunk_rows = int(begun["chunk_rows"]) if begun else min(default, n_rows)
        return StoreWriter(
            self.path,
            ImageStore.kind,
            self.key,
            self.identity,
            image_arrays(n_rows, self.encoder.dim, chunk_rows),
            {"labels": labels_array(n_rows, chunk_rows)},
            {SAMPLES: samples_bytes(self.index.ids, self.index.sizes)},
        )

    def run(self) -> tuple[ImageStore, int]:
        """Encode every chunk that is not done, then finalise."""
        writer = self.writer()
        writer.reopen()
        self._drop_changed(writer)
        encoded = 0
        for _ in range(FINALISE_ATTEMPTS):
            encoded += self._encode_chunks(writer, writer.pending())
            if not writer.drop_damaged():
                break
        else:
            raise StoreCorruptError(
                f"{self.path}: chunks differ from their markers right after they were written, {FINALISE_ATTEMPTS} "
                "times in a row; is the disk failing, or another process writing other features here?"
            )
        self._finalise(writer, encoded)
        return open_image_store(self.path), encoded

    def _drop_changed(self, writer: StoreWriter) -> None:
        """Before resuming: chunks whose source files changed since they were written are not done."""
        if not (self.path / STAMPS).exists():
            write_stamps(self.path, self.index.stamps)
            return
        done = [marker.chunk for marker in writer.markers()]
        for chunk in {
            row // writer.rows_spec.chunk_rows
            for row in changed_rows(self.dataset, self.path, writer.specs["content"], done)
        }:
            writer.drop(chunk)

    def encode_changed(self, store: ImageStore) -> int:
        """On a hit: refuse, or encode again, chunks whose source files changed with the same ids and sizes."""
        content = store.manifest.arrays["content"]
        changed = changed_rows(self.dataset, self.path, content, range(content.n_chunks))
        if not changed:
            return 0
        if not self.options.refresh:
            named = ", ".join(self.index.ids[row] for row in changed[:3])
            raise ContentChangedError(
                f"{self.what}: {len(changed):,} source file(s) changed since they were encoded ({named}"
                f"{', ...' if len(changed) > 3 else ''}), ids and sizes being the same; run again with --refresh to "
                "encode their chunks anew"
            )
        writer = self.writer()
        writer.reopen()
        for chunk in {row // content.chunk_rows for row in changed}:
            writer.drop(chunk)
        return self.run()[1]

    def relabel(self, store: ImageStore) -> bool:
        """On a hit: refuse, or write, labels that differ from the stored ones. Features are never touched."""
        changed = store.labels_digest != self.labels_digest
        if changed and not self.options.update_labels:
            raise LabelsChangedError(f"{self.what}: {self._label_difference(store)}")
        if changed or not self._is_paired(store):
            kept = ("name", "split", "encoder_name", "logit_scale", "logit_bias")
            writer = self.writer()
            writer.reopen()
            self._finalise(writer, 0, {name: store.info[name] for name in kept})
        return changed

    def _is_paired(self, store: ImageStore) -> bool:
        """Whether the store knows this model's text tower; another model may share the image tower alone."""
        known = list(store.text_digests)
        self.text_digests = known + [digest for digest in self.text_digests if digest not in known]
        return self.text_digests == known

    def _label_difference(self, store: ImageStore) -> str:
        remedy = "features need no encoding; run again with --update-labels to take the new labels over"
        if store.classnames != self.index.classnames:
            return f"the class names differ from those of {store.path}; {remedy}"
        rows = np.flatnonzero((store.labels != self.index.labels) & store.valid)
        named = f" (first: {self.index.ids[rows[0]]})" if len(rows) else ""
        return f"{len(rows):,} of {len(self.index):,} labels differ from those of {store.path}{named}; {remedy}"

    def _encode_chunks(self, writer: StoreWriter, chunks: Sequence[int]) -> int:
        if not chunks:
            return 0
        bad = [row for marker in writer.markers() for row in marker.bad]
        rows_of = writer.rows_spec.rows_of
        total = sum(len(rows_of(chunk)) for chunk in chunks)
        self.progress.start(self.what, len(self.index), len(self.index) - total)
        batches = self._prepared(writer, chunks)
        for chunk in chunks:
            values, found = self._encode_chunk(rows_of(chunk), batches)
            bad += found
            if len(bad) > self.options.max_bad:
                raise self._too_many_bad(bad)
            writer.write_chunk(chunk, values, found)
        self.progress.finish()
        return total

    def _prepared(self, writer: StoreWriter, chunks: Sequence[int]) -> Iterator[list[Prepared]]:
        size = self.options.batch_size
        batches = (batch for chunk in chunks for batch in batches_of(writer.rows_spec.rows_of(chunk), size))
        ahead = default_ahead(self.encoder) if self.options.ahead is None else self.options.ahead
        return prepared_batches(self.dataset, self.encoder, batches, self.options.workers or default_workers(), ahead)

    def _encode_chunk(
        self, rows: range, batches: Iterator[list[Prepared]]
    ) -> tuple[dict[str, npt.NDArray[Any]], list[BadRow]]:
        features = np.full((len(rows), self.encoder.dim), np.nan, dtype=np.float32)
        content = np.zeros((len(rows), 16), dtype=np.uint8)
        bad = []
        for _ in batches_of(rows, self.options.batch_size):
            batch = next(batches)
            good = [prepared for prepared in batch if prepared.image is not None]
            bad += [BadRow(item.row, self.index.ids[item.row], item.error) for item in batch if item.image is None]
            if good:
                places = [prepared.row - rows.start for prepared in good]
                features[places] = self.encoder.encode_images([item.image for item in good if item.image is not None])
            for prepared in batch:
                content[prepared.row - rows.start] = np.frombuffer(prepared.content, dtype=np.uint8)
            self.progress.advance(len(batch))
        valid = np.ones(len(rows), dtype=np.uint8)
        valid[[item.row - rows.start for item in bad]] = 0
        self._check_finite(features, valid, rows)
        unit, norm = normalise(features)
        return {"features": unit.astype(np.float16), "norm": norm, "valid": valid, "content": content}, bad

    def _check_finite(self, features: npt.NDArray[np.float32], valid: npt.NDArray[np.uint8], rows: range) -> None:
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1) & (valid == 1))
        if len(broken):
            raise EncoderError(
                f"{self.encoder.name} made NaN or infinite features for {len(broken)} image(s), first "
                f"{self.index.ids[rows.start + int(broken[0])]}; with fp16 that is an overflow: take --precision bf16"
            )

    def _too_many_bad(self, bad: Sequence[BadRow]) -> ImageReadError:
        named = "\n".join(f"  {item.sample_id}: {item.error}" for item in bad[:20])
        more = f"\n  ... and {len(bad) - 20} more" if len(bad) > 20 else ""
        return ImageReadError(
            f"{self.what}: {len(bad)} image(s) cannot be read, {self.options.max_bad} allowed:\n{named}{more}\n"
            "mend or remove them, or allow them with --max-bad N (their rows are then marked invalid and left out); "
            "finished chunks are kept"
        )

    def _finalise(self, writer: StoreWriter, encoded: int, kept: Mapping[str, Any] | None = None) -> None:
        markers = writer.markers()
        bad = [item for marker in markers for item in marker.bad]
        labels = self.index.labels.copy()
        labels[[item.row for item in bad]] = -1
        write_stamps(self.path, self.index.stamps)
        info = {
            "name": self.dataset.name,
            "split": self.dataset.split,
            "classnames": list(self.index.classnames),
            "labels_digest": self.labels_digest,
            "encoder_name": self.encoder.name,
            "dim": self.encoder.dim,
            "text_digests": self.text_digests,
            "logit_scale": self.encoder.logit_scale,
            "logit_bias": self.encoder.logit_bias,
            "bad": [[item.row, item.sample_id, item.error] for item in bad],
        }
        provenance = self.encoder.provenance | {
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows_encoded_last": encoded,
            "batch_size": self.options.batch_size,
            "decode_threads": self.options.workers or default_workers(),
        }
        writer.finalise({"labels": labels}, info | dict(kept or {}), provenance)
