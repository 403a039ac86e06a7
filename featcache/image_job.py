"""Encoding one data set with one encoder: what is done already, what is this process's part, and the finish.

Any number of processes may run the same job at once: ranks of torchrun, jobs of a Slurm array, or strangers. They share
the store and nothing else. Each takes chunks that nobody has claimed, its own part first, and whoever finds every chunk
marked finishes the store.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from featcache.chunk_encoder import ChunkEncoder, stored_identity
from featcache.content import changed_rows
from featcache.datasets import dataset_key, labels_digest, metadata_digest
from featcache.datasets.base import Dataset
from featcache.datasets.metadata import metadata_bytes
from featcache.encode_options import EncodeOptions, Share
from featcache.encoders import Encoder, source_of
from featcache.errors import (
    ImageReadError,
    MismatchError,
    ShardDoneError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
    StoreSchemaError,
)
from featcache.pipeline import default_workers
from featcache.progress import Progress
from featcache.store import BadRow, ImageStore, StoreWriter, content_key, open_image_store
from featcache.store.claims import Claims
from featcache.store.header import begun_chunk_rows
from featcache.store.layout import DEFAULT_CHUNK_ROWS, image_arrays, labels_array
from featcache.store.places import StorePath, remove, stat
from featcache.store.samples import METADATA, SAMPLES, STAMPS, samples_bytes, write_stamps

FINALISE_ATTEMPTS = 3
FINISH = "finish"
POLL_SECONDS = (0.05, 0.4)  # at first, at most


class ImageJob:
    """One data set under one encoder."""

    def __init__(
        self, dataset: Dataset, encoder: Encoder, root: StorePath, options: EncodeOptions, progress: Progress
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
        self.metadata_digest = metadata_digest(self.index.metadata)
        self.share = options.share or Share.from_environment()
        self.text_digests = [] if encoder.text_digest is None else [encoder.text_digest]
        self.what = f"{dataset.name}/{dataset.split} with {encoder.name}"

    def finished_store(self) -> ImageStore | None:
        """The store if it is finished and whole by its file sizes.

        Raises
        ------
        StoreSchemaError
            It belongs to another version of featcache, which this one leaves alone.
        """
        try:
            return open_image_store(self.path)
        except StoreSchemaError:
            raise
        except (StoreNotFoundError, StoreIncompleteError, StoreCorruptError):
            return None

    def writer(self) -> StoreWriter:
        """The writer of the store; one that was begun keeps its chunk size."""
        try:
            return self._writer()
        except MismatchError:
            return self._writer()  # another process began the store just now, with another chunk size

    def _writer(self) -> StoreWriter:
        n_rows = len(self.index)
        chunk_rows = begun_chunk_rows(self.path, min(self.options.chunk_rows or DEFAULT_CHUNK_ROWS, n_rows))
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
        """Encode this process's part of what is not done, then finish the store or wait until another has.

        Returns
        -------
        tuple of ImageStore, int
            The store, and the rows that were encoded here.

        Raises
        ------
        ShardDoneError
            Only a part was asked for; it is done, and the store is not finished yet.
        """
        writer = self.writer()
        if self.finished_store() is None:
            writer.reopen()
        self._drop_changed(writer)
        claims = Claims(self.path)
        try:
            return self._run(writer, claims)
        finally:
            claims.release_all()

    def _run(self, writer: StoreWriter, claims: Claims) -> tuple[ImageStore, int]:
        encoded, failures, pause = 0, 0, POLL_SECONDS[0]
        while failures < FINALISE_ATTEMPTS:
            share = Share() if failures else self.share
            fresh = self._encode_chunks(writer, claims, share)
            encoded += fresh
            missing = writer.pending()
            if not missing and (store := self.finished_store()) is not None:
                return store, encoded
            if not missing and claims.take(FINISH):
                failures += not self._finish(writer, encoded)
                claims.release(FINISH)
            elif share.only:
                raise self._shard_done(len(missing), writer.rows_spec.n_chunks)
            elif not fresh:
                time.sleep(pause)  # others are at the rest; what they leave behind is taken over
                pause = min(2 * pause, POLL_SECONDS[1])
        raise StoreCorruptError(
            f"{self.path}: chunks differ from their markers right after they were written, {FINALISE_ATTEMPTS} "
            "times; is the disk failing, or another process writing other features here?"
        )

    def _shard_done(self, missing: int, chunks: int) -> ShardDoneError:
        part = f"{self.what}: shard {self.share.index}/{self.share.count} is done"
        if not missing:
            return ShardDoneError(f"{part}, and so are all {chunks} chunks; another process finishes the store")
        return ShardDoneError(
            f"{part}; {missing} of {chunks} chunks are done by others or not yet done: whoever finds all of them done "
            "finishes the store, and the same command without --shard does what is left"
        )

    def _drop_changed(self, writer: StoreWriter) -> None:
        """Before resuming: chunks whose source files changed since they were written are not done."""
        if stat(self.path / STAMPS) is None:
            write_stamps(self.path, self.index.stamps)
            return
        done = [marker.chunk for marker in writer.markers()]
        for row in changed_rows(self.dataset, self.path, writer.specs["content"], done):
            writer.drop(row // writer.rows_spec.chunk_rows)

    def _encode_chunks(self, writer: StoreWriter, claims: Claims, share: Share) -> int:
        """Encode the chunks of a share that nobody is at; returns the number of rows."""
        pending = writer.pending()
        taken = self._taken(writer, claims, share.order(pending))
        first = next(taken, None)
        if first is None:
            return 0
        bad = [row for marker in writer.markers() for row in marker.bad]
        missing = sum(len(writer.rows_spec.rows_of(chunk)) for chunk in pending)
        self.progress.start(self.what, len(self.index), len(self.index) - missing)
        rows = 0

        def advance(count: int) -> None:
            self.progress.advance(count)
            claims.renew()

        encoder = ChunkEncoder(self.dataset, self.encoder, self.options, advance)
        for done in encoder.encode(chain([first], taken), writer.rows_spec):
            bad += done.bad
            self._check_bad(bad)
            writer.write_chunk(done.chunk, done.values, done.bad)
            claims.release(done.chunk)
            rows += len(writer.rows_spec.rows_of(done.chunk))
        self.progress.finish()
        return rows

    @staticmethod
    def _taken(writer: StoreWriter, claims: Claims, chunks: Sequence[int]) -> Iterator[int]:
        for chunk in chunks:
            if not claims.take(chunk):
                continue
            if writer.marker(chunk) is None:
                yield chunk
            else:  # another process did it since the list was made
                claims.release(chunk)

    def _check_bad(self, bad: Sequence[BadRow]) -> None:
        if len(bad) <= self.options.max_bad:
            return
        named = "\n".join(f"  {item.sample_id}: {item.error}" for item in bad[:20])
        more = f"\n  ... and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ImageReadError(
            f"{self.what}: {len(bad)} image(s) cannot be read, {self.options.max_bad} allowed:\n{named}{more}\n"
            "mend or remove them, or allow them with --max-bad N (their rows are then marked invalid and left out); "
            "finished chunks are kept"
        )

    def _finish(self, writer: StoreWriter, encoded: int) -> bool:
        """Check every chunk and write the manifest; False where something has to be done again."""
        if writer.drop_damaged():
            return False
        self._check_bad([item for marker in writer.markers() for item in marker.bad])
        try:
            self.finalise(writer, encoded)
        except StoreIncompleteError:
            return False
        return True

    def finalise(self, writer: StoreWriter, encoded: int, kept: Mapping[str, Any] | None = None) -> None:
        """Write labels, columns and the manifest; `kept` is what a store that is only relabelled goes on saying."""
        bad = [item for marker in writer.markers() for item in marker.bad]
        labels = self.index.labels.copy()
        labels[[item.row for item in bad]] = -1
        write_stamps(self.path, self.index.stamps)
        info = {
            "name": self.dataset.name,
            "split": self.dataset.split,
            "classnames": list(self.index.classnames),
            "labels_digest": self.labels_digest,
            "metadata_digest": self.metadata_digest,
            "encoder_name": self.encoder.name,
            "dim": self.encoder.dim,
            "text_digests": self.text_digests,
            "logit_scale": self.encoder.logit_scale,
            "logit_bias": self.encoder.logit_bias,
            "bad": [[item.row, item.sample_id, item.error] for item in bad],
        }
        provenance = self.encoder.provenance | {
            "source": source_of(self.encoder),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows_encoded_last": encoded,
            "batch_size": self.options.batch_size,
            "decode_threads": self.options.workers or default_workers(),
        }
        columns = {METADATA: metadata_bytes(self.index.metadata)} if self.index.metadata else {}
        if not columns:
            remove(self.path / METADATA)
        writer.finalise({"labels": labels}, info | dict(kept or {}), provenance, columns)
