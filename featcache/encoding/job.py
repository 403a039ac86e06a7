"""Encoding one data set with one encoder: what is done already, what is this process's part, and the finish.

Any number of processes may run the same job at once: ranks of torchrun, jobs of a Slurm array, or strangers. They share
the store and nothing else. Each takes chunks that nobody has claimed, its own part first, and whoever finds every chunk
marked finishes the store.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from featcache.datasets import dataset_key, labels_digest, metadata_digest
from featcache.datasets.base import Dataset, decoding_of
from featcache.encoders import Encoder
from featcache.encoders.taps import tap_dim
from featcache.encoding.augment import check_views, view_identity
from featcache.encoding.changes import changed_rows
from featcache.encoding.chunks import ChunkEncoder, Work, stored_identity
from featcache.encoding.options import EncodeOptions, Share
from featcache.encoding.outputs import Outputs
from featcache.encoding.pipeline import default_workers
from featcache.encoding.reuse import Donors
from featcache.errors import (
    ImageReadError,
    MismatchError,
    ShardDoneError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
    StoreSchemaError,
)
from featcache.progress import Progress
from featcache.store import BadRow, ImageStore, StoreWriter, content_key, open_image_store
from featcache.store.claims import Claims
from featcache.store.columns import METADATA, SAMPLES, STAMPS, metadata_bytes, samples_bytes, write_stamps
from featcache.store.layout import DEFAULT_CHUNK_ROWS, image_arrays, labels_array
from featcache.store.manifest import begun_chunk_rows
from featcache.store.parts import KIND as PARTS
from featcache.store.parts import Part
from featcache.store.places import StorePath, remove, stat

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
        self.donors = Donors(self.path, decoding_of(dataset) if options.reuse else None)
        self.copied = 0
        check_views(options.views, options.augmentation, encoder)
        for tap in options.taps:
            tap_dim(encoder, tap)

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

    def outputs(self) -> Outputs:
        """The writers of the store and of the taps and views that are asked for."""
        base = self.writer()
        return Outputs(base, {part: self._part_writer(part, base) for part in self.options.parts})

    def _part_writer(self, part: Part, base: StoreWriter) -> StoreWriter:
        identity = {
            "encoder": stored_identity(self.encoder, part.tap),
            "dataset": self.identity["dataset"] | view_identity(part, self.encoder),
        }
        rows, size = base.rows_spec.shape[0], base.rows_spec.chunk_rows
        specs = image_arrays(rows, tap_dim(self.encoder, part.tap), size)
        key = f"{content_key(identity['encoder'])}/{content_key(identity['dataset'])}"
        return StoreWriter(self.path / part.name, PARTS, key, identity, specs, {}, {})

    def run(self) -> tuple[ImageStore, int]:
        """Encode this process's part of what is not done, then finish the store or wait until another has.

        Returns
        -------
        tuple of ImageStore, int
            The store, and the rows that were encoded here; `copied` counts those that came from other stores.

        Raises
        ------
        ShardDoneError
            Only a part was asked for; it is done, and the store is not finished yet.
        """
        outputs = self.outputs()
        if self.finished_store() is None:
            outputs.base.reopen()
        self._drop_changed(outputs.base)
        claims = Claims(self.path)
        try:
            return self._run(outputs, claims)
        finally:
            claims.release_all()

    def _run(self, outputs: Outputs, claims: Claims) -> tuple[ImageStore, int]:
        encoded, failures, pause = 0, 0, POLL_SECONDS[0]
        while failures < FINALISE_ATTEMPTS:
            share = Share() if failures else self.share
            fresh = self._encode_chunks(outputs, claims, share)
            encoded += fresh
            missing = outputs.pending()
            if not missing and (store := self.finished_store()) is not None and not outputs.unfinished():
                return store, encoded - self.copied
            if not missing and claims.take(FINISH):
                failures += not self._finish(outputs, encoded - self.copied)
                claims.release(FINISH)
            elif share.only:
                raise self._shard_done(len(missing), outputs.base.rows_spec.n_chunks)
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

    def _encode_chunks(self, outputs: Outputs, claims: Claims, share: Share) -> int:
        """Encode the chunks of a share that nobody is at; returns the number of rows."""
        pending = outputs.pending()
        taken = self._taken(outputs, claims, share.order(pending))
        first = next(taken, None)
        if first is None:
            return 0
        bad, spec = outputs.bad(), outputs.base.rows_spec
        missing = sum(len(spec.rows_of(chunk)) for chunk in pending)
        self.progress.start(self.what, len(self.index), len(self.index) - missing)
        rows = 0

        def advance(count: int) -> None:
            self.progress.advance(count)
            claims.renew()

        self.donors.prepare()
        encoder = ChunkEncoder(self.dataset, self.encoder, self.options, self.donors, advance)
        for done in encoder.encode(chain([first], taken), spec):
            bad += done.bad if Part() in done.values else []
            self._check_bad(bad)
            outputs.write(done)
            claims.release(done.chunk)
            rows += len(spec.rows_of(done.chunk))
            self.copied += done.copied
        self.progress.finish()
        return rows

    @staticmethod
    def _taken(outputs: Outputs, claims: Claims, chunks: Sequence[int]) -> Iterator[Work]:
        for chunk in chunks:
            if not claims.take(chunk):
                continue
            work = outputs.lacking(chunk)
            if work is not None:
                yield work
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

    def _finish(self, outputs: Outputs, encoded: int) -> bool:
        """Check every chunk and write the manifests; False where something has to be done again."""
        if outputs.drop_damaged():
            return False
        self._check_bad(outputs.bad())
        try:
            outputs.finish_parts({part: self._part_info(part) for part in outputs.parts}, self._provenance(encoded))
            if outputs.lacks_manifest():
                self.finalise(outputs.base, encoded)
        except StoreIncompleteError:
            return False
        for part in outputs.unfinished():
            outputs.parts[part].reopen()  # finished, but of other images: the next round redoes what differs
        return True

    def _part_info(self, part: Part) -> dict[str, Any]:
        """What a tap's or a view's manifest says; a tap is in no space of texts."""
        name = f"{self.encoder.name}#{part.tap}" if part.tap else self.encoder.name
        info: dict[str, Any] = {"name": self.dataset.name, "split": self.dataset.split, "encoder_name": name}
        info |= {"dim": tap_dim(self.encoder, part.tap)}
        return info | ({"text_digests": [], "logit_scale": None, "logit_bias": None} if part.tap else {})

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
            "decoding": decoding_of(self.dataset),
            "bad": [[item.row, item.sample_id, item.error] for item in bad],
        }
        columns = {METADATA: metadata_bytes(self.index.metadata)} if self.index.metadata else {}
        if not columns:
            remove(self.path / METADATA)
        writer.finalise({"labels": labels}, info | dict(kept or {}), self._provenance(encoded), columns)

    def _provenance(self, encoded: int) -> dict[str, Any]:
        return self.encoder.provenance | {
            "source": self.encoder.source,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows_encoded_last": encoded,
            "rows_copied_last": self.copied,
            "batch_size": self.options.batch_size,
            "decode_threads": self.options.workers or default_workers(),
        }
