"""Encoding a data set into an image store.

A finished store with the same key is a cache hit, and no image is opened. Otherwise the chunks without a marker are
encoded, one whole chunk at a time; see `featcache.encoding.store_job` for how processes share them.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from featcache.datasets import dataset_key, labels_digest, metadata_digest
from featcache.datasets.base import Dataset, PlainDataset, WrappedDataset
from featcache.datasets.content import content_digest
from featcache.encoders import Encoder, encoder_for
from featcache.encoders.base import whole_encoder
from featcache.encoders.preparation import decoded_for
from featcache.encoders.taps import PRE_PROJECTION, find_tap
from featcache.encoding.augment import AUGMENTATIONS, view_of
from featcache.encoding.changes import changed_rows, known_identity, label_difference, same_labels, spot_rows
from featcache.encoding.chunks import ChunkEncoder, encoder_info, stored_identity
from featcache.encoding.options import EncodeOptions, Share
from featcache.encoding.outputs import Work, stored_chunk, stored_rows
from featcache.encoding.pace import BatchSize, measured_chunk_rows
from featcache.encoding.pipeline import default_workers, prepared, read_sample
from featcache.encoding.reuse import Donors
from featcache.encoding.store_job import Contents, JobResult, Layout, MadeChunk, StoreJob
from featcache.errors import ContentChangedError, FeatcacheError, ImageReadError, LabelsChangedError
from featcache.progress import Progress, counted
from featcache.store import BadRow, ImageStore, StoreWriter, resolve_root
from featcache.store.catalogue import add_name
from featcache.store.columns import METADATA, SAMPLES, STAMPS, metadata_bytes, samples_bytes, write_stamps
from featcache.store.key import Json, store_key
from featcache.store.layout import Array, image_arrays, label_arrays
from featcache.store.places import StorePath, remove, stat
from featcache.store.reading.parts import KIND as PARTS
from featcache.store.reading.parts import PROJECTION, Part, projection_bytes

KEPT = ("name", "split", "encoder_name", "logit_scale", "logit_bias", "decoding")


@dataclass(frozen=True)
class EncodeResult(JobResult[ImageStore]):
    """The store, and what the run did: with `hit`, no image was opened; `copied_rows` came from other stores."""

    relabelled: bool = False
    copied_rows: int = 0
    batches: str = ""
    """The batch sizes that were measured and the one chosen; empty if none was."""


def encode_dataset(
    dataset: PlainDataset,
    encoder: Encoder,
    *,
    root: str | StorePath | None = None,
    options: EncodeOptions | None = None,
    progress: Progress | None = None,
) -> EncodeResult:
    """`encode` for an opened data set and a loaded encoder; the result also reports what was done."""
    options = options or EncodeOptions()
    job = ImageJob(dataset, whole_encoder(encoder, "encoder:"), resolve_root(root), options, progress)
    began = time.perf_counter()
    store, relabelled = job.finished(), False
    found = store is not None
    if store is None:
        store = job.run()
    else:
        job.encode_changed(store)
        relabelled = job.relabel(store)
        if options.parts:
            job.run()
        store = job.open()
    job.sweep()
    seconds = time.perf_counter() - began
    hit = found and not job.encoded + job.copied
    return EncodeResult(store, hit, job.encoded, seconds, relabelled, job.copied, job.batch_size.told)


class ImageJob(StoreJob[ImageStore]):
    """One data set under one encoder."""

    kind = ImageStore

    def __init__(
        self,
        dataset: PlainDataset,
        encoder: Encoder,
        root: StorePath,
        options: EncodeOptions,
        progress: Progress | None,
    ) -> None:
        whole = dataset if isinstance(dataset, Dataset) else WrappedDataset(dataset)
        self.encoder, self.options = encoder_for(whole, encoder), options
        self.dataset = decoded_for(whole, self.encoder)
        self.index, self.root = dataset.index, root
        self.names: Json = {"name": dataset.name, "split": dataset.split}
        self.decoding, self.opened_as = whole.decoding, whole.opened_as
        identity = {
            "encoder": stored_identity(encoder),
            "dataset": {"rows": len(self.index), "samples": dataset_key(self.index, root)},
        }
        super().__init__(
            root,
            known_identity(identity, self.index, self.names, root, update_labels=options.update_labels),
            len(self.index),
            f"{dataset.name}/{dataset.split} with {encoder.name}",
            progress=progress,
            chunk_rows=options.chunk_rows,
            share=options.share or Share.from_environment(),
            parts=options.parts,
        )
        self.labels_digest = labels_digest(self.index.truth, self.index.classnames)
        self.metadata_digest = metadata_digest(self.index.metadata)
        self.text_digests = [] if encoder.text_digest is None else [encoder.text_digest]
        self.kept: Json = {}
        self.batch_size = BatchSize(options.batch_size, encoder.device, 0 if options.compiled else self.n_rows)
        self._writers: dict[Part, StoreWriter] = {}
        self.donors = Donors(self.path, self.decoding if options.reuse else None)
        if options.views and options.augmentation not in AUGMENTATIONS:
            raise FeatcacheError(f"--augmentation {options.augmentation}: expected one of {', '.join(AUGMENTATIONS)}")
        for part in options.parts:  # what the encoder cannot do is an error before the first image
            find_tap(encoder, part.tap)
            view_of(part, encoder)

    # What the store holds

    def layout(self, chunk_rows: int) -> Layout:
        """See `StoreJob.layout`."""
        rows = image_arrays(self.n_rows, self.encoder.dim, chunk_rows)
        labels = label_arrays(self.index.truth, chunk_rows)
        return Layout(rows, labels, {SAMPLES: samples_bytes(self.index.ids, self.index.sizes)})

    def new_chunk_rows(self) -> int:
        """See `StoreJob.new_chunk_rows`: about a minute's work."""
        few = (prepared(read_sample(self.dataset, row), self.encoder.prepare) for row in range(4))
        return measured_chunk_rows(self.n_rows, few, self.encoder, 1 + self.options.views)

    def part_writer(self, part: Part, store: StoreWriter) -> StoreWriter:
        """See `StoreJob.part_writer`."""
        identity = {"encoder": stored_identity(self.encoder, part.tap), "dataset": self.identity["dataset"]}
        if part.augmentation is not None:
            view = view_of(part, self.encoder).identity | {"number": part.view}
            identity["dataset"] = identity["dataset"] | {"view": view}
        tap = find_tap(self.encoder, part.tap)
        specs = image_arrays(self.n_rows, tap.dim, store.rows_spec.chunk_rows, tap.tokens)
        matrix = self.encoder.visual_projection if part.tap == PRE_PROJECTION else None
        beside = {} if matrix is None else {PROJECTION: projection_bytes(matrix)}
        writer = StoreWriter(self.path / part.name, PARTS, store_key(identity), identity, specs, {}, beside)
        self._writers[part] = writer
        return writer

    def contents(self, part: Part, writer: StoreWriter) -> Contents:
        """See `StoreJob.contents`; taps are not in the text embedding space."""
        provenance = self.encoder.provenance | {
            "source": self.encoder.source,
            "data": self.opened_as,
            "rows_encoded_last": self.encoded,
            "rows_copied_last": self.copied,
            "batch_size": self.batch_size.now,
            "compiled": self.options.compiled,
            "decode_threads": self.options.workers or default_workers(),
        }
        if part != Part():
            name = f"{self.encoder.name}#{part.tap}" if part.tap else self.encoder.name
            tap = find_tap(self.encoder, part.tap)
            info = self.names | {"encoder_name": name, "dim": tap.dim}
            info |= {} if tap.tokens is None else {"prefix_tokens": tap.prefix}
            no_texts: Json = {"text_digests": [], "logit_scale": None, "logit_bias": None}
            return Contents(info | (no_texts if part.tap else {}), provenance)
        bad = [item for marker in writer.markers() for item in marker.bad]
        truth: dict[str, Array] = {"labels": self.index.labels.copy()}
        if self.index.targets is not None:
            truth["targets"] = self.index.targets.copy()
        for values in truth.values():
            values[[item.row for item in bad]] = -1
        info = self.names | {
            "classnames": list(self.index.classnames),
            "labels_digest": self.labels_digest,
            "metadata_digest": self.metadata_digest,
            **encoder_info(self.encoder),
            "text_digests": self.text_digests,
            "decoding": self.decoding,
            "bad": [[item.row, item.sample_id, item.error] for item in bad],
        }
        columns = {METADATA: metadata_bytes(self.index.metadata)} if self.index.metadata else {}
        return Contents(info | self.kept, provenance, truth, columns)

    def finalise(self, part: Part, writer: StoreWriter) -> None:
        """See `StoreJob.finalise`; also records the files' modification times.

        ContentChangedError if a file whose content is part of the key was replaced while it was encoded.
        """
        if part == Part():
            if (content := self.index.content) is not None:
                hashes = stored_rows(writer, "content").tobytes()
                if content_digest(content.decoding, hashes) != content.digest(self.root):
                    raise ContentChangedError(
                        f"{self.what}: {content.where} changed while it was encoded; {content.remedy}"
                    )
            write_stamps(self.path, self.index.stamps)
            if not self.index.metadata:
                remove(self.path / METADATA)
        super().finalise(part, writer)

    # Encoding

    def before(self, writer: StoreWriter) -> None:
        """Drop the chunks whose source files changed since they were written."""
        size = writer.rows_spec.chunk_rows
        done = [writer.rows_spec.rows_of(marker.chunk) for marker in writer.markers()]
        if not done and stat(self.path / STAMPS) is None:
            write_stamps(self.path, self.index.stamps)
            return

        def content(rows: range) -> Array:
            return stored_chunk(writer, "content", rows.start // size)

        for row in changed_rows(self.dataset, self.path, done, content):
            writer.drop(row // size)

    def make(self, works: Iterator[Work]) -> Iterator[MadeChunk]:
        """See `StoreJob.make`."""
        self.donors.prepare()
        inputs = (self.dataset, self.encoder, self.options, self.batch_size)
        return ChunkEncoder(*inputs, self.donors, self.advance, self._put).encode(works)

    def _put(self, part: Part, file: int, values: Array) -> Future[str]:
        """Write a file of tokens in the writer thread."""
        writer = self._writers[part]
        return self.behind.call(writer.put_chunk, writer.specs["features"], file, values)

    def check_bad(self, bad: Sequence[BadRow]) -> None:
        """ImageReadError if more images are unreadable than the options allow."""
        if len(bad) <= self.options.max_bad:
            return
        named = "\n".join(f"  {item.sample_id}: {item.error}" for item in bad[:20])
        more = f"\n  ... and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ImageReadError(
            f"{self.what}: {counted(len(bad), 'image')} unreadable, {self.options.max_bad} allowed:\n{named}{more}\n"
            "repair or remove them, or allow them with --max-bad N (their rows are then marked invalid and left out); "
            "finished chunks are kept"
        )

    # Updating a finished store: changed sources, changed labels, another text tower

    def encode_changed(self, store: ImageStore) -> None:
        """Encode chunks again whose source files changed with the same ids and sizes.

        ContentChangedError if `refresh` is off, or the store has another name and so may hold another data set; the
        message never suggests replacing another data set's features.
        """
        if self.index.content is not None:  # part of the key
            return
        content = store.reader("content")
        chunks = map(content.spec.rows_of, range(content.spec.n_chunks))

        def read(rows: range) -> Array:
            return content.read(rows.start, rows.stop)

        changed = changed_rows(self.dataset, self.path, chunks, read, spot_rows(self.dataset, store))
        if not changed:
            return
        named = ", ".join(self.index.ids[row] for row in changed[:3]) + (", ..." if len(changed) > 3 else "")
        stored = f"{store.name}/{store.split}"
        if (store.name, store.split) != (self.dataset.name, self.dataset.split):
            raise ContentChangedError(
                f"{self.what}: {stored} is stored with the same ids and sizes, and {len(changed):,} of its files "
                f"differ ({named}); run with another --root, which keeps both"
            )
        if not self.options.refresh:
            raise ContentChangedError(
                f"{self.what}: {counted(len(changed), 'source file')} changed since encoding ({named}), with the same "
                "ids and sizes; if they were edited, run again with --refresh to replace their chunks; if this is "
                f"another data set than the stored {stored}, run with another --root, which keeps both"
            )
        self._keep(store)
        writer = self.writer()
        writer.reopen()
        for chunk in {row // content.spec.chunk_rows for row in changed}:
            writer.drop(chunk)
        self.run()

    def relabel(self, store: ImageStore) -> bool:
        """Update labels, class names and metadata columns that differ from the stored ones; features are kept.

        LabelsChangedError if they differ and `update_labels` is off.
        """
        difference = self._keep(store)
        add_name(store, self.encoder.name)
        if difference or self.text_digests != list(store.text_digests):
            writer = self.writer()
            writer.reopen()
            self.finalise(Part(), writer)
        return bool(difference)

    def _keep(self, store: ImageStore) -> str:
        """Keep a store's names and text towers in what is written next; returns how the labels differ, if they do.

        LabelsChangedError if they differ and `update_labels` is off.
        """
        index, difference = self.index, ""
        if not same_labels(store, index):
            difference = label_difference(store, index)
        elif store.metadata_digest != self.metadata_digest:
            old, new = sorted(store.metadata) or "none", sorted(index.metadata) or "none"
            difference = f"the metadata columns differ (stored {old}, now {new})"
        if difference and not self.options.update_labels:
            columns = sorted({*store.metadata, *index.metadata})
            what = f"labels, class names and columns {', '.join(columns)}" if columns else "labels and class names"
            raise LabelsChangedError(
                f"{self.what}: {difference}. {store.reference} holds the features of these images, which need no "
                f"encoding: run again with --update-labels to replace its {what} by those of "
                f"{self.dataset.name}/{self.dataset.split} (`wise`: with --overwrite), or encode them under another "
                "--name to keep both labelings side by side"
            )
        known = list(store.text_digests)  # another model may share only the image tower
        self.text_digests = known + [digest for digest in self.text_digests if digest not in known]
        self.kept = {name: store.info[name] for name in KEPT if name in store.info}
        return difference
