"""Data set x encoder -> image store.

A finished store with the same keys is a hit and no image is opened. Otherwise the chunks without a marker are encoded,
whole chunk by whole chunk (see `image_job`).

What is left to do where a store is finished already: changed sources, changed labels, another text tower.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.encoders import Encoder, load_encoder
from featcache.encoders.base import whole_encoder
from featcache.encoding.changes import changed_rows
from featcache.encoding.job import ImageJob
from featcache.encoding.options import EncodeOptions
from featcache.errors import ContentChangedError, LabelsChangedError
from featcache.progress import Progress, Silent
from featcache.store import ImageStore, open_image_store, resolve_root
from featcache.store.catalogue import add_name
from featcache.store.places import StorePath

KEPT = ("name", "split", "encoder_name", "logit_scale", "logit_bias", "decoding")


def encode_changed(job: ImageJob, store: ImageStore) -> int:
    """Encode chunks again whose source files changed with the same ids and sizes; returns the number of rows.

    Raises
    ------
    ContentChangedError
        Files changed, and the job's options do not say to refresh.
    """
    content = store.manifest.arrays["content"]
    changed = changed_rows(job.dataset, job.path, content, range(content.n_chunks))
    if not changed:
        return 0
    if not job.options.refresh:
        named = ", ".join(job.index.ids[row] for row in changed[:3])
        raise ContentChangedError(
            f"{job.what}: {len(changed):,} source file(s) changed since they were encoded ({named}"
            f"{', ...' if len(changed) > 3 else ''}), ids and sizes being the same; run again with --refresh to "
            "encode their chunks anew"
        )
    writer = job.writer()
    writer.reopen()
    for chunk in {row // content.chunk_rows for row in changed}:
        writer.drop(chunk)
    return job.run()[1]


def relabel(job: ImageJob, store: ImageStore) -> bool:
    """Write labels, class names and columns that differ from the stored ones; features are never touched.

    Raises
    ------
    LabelsChangedError
        They differ, and the job's options do not say to update them.
    """
    difference = _difference(job, store)
    if difference and not job.options.update_labels:
        raise LabelsChangedError(_refusal(job, store, difference))
    add_name(store, job.encoder.name)
    if difference or not _is_paired(job, store):
        writer = job.writer()
        writer.reopen()
        job.finalise(writer, 0, {name: store.info[name] for name in KEPT if name in store.info})
    return bool(difference)


def _refusal(job: ImageJob, store: ImageStore, difference: str) -> str:
    columns = sorted({*store.metadata, *job.index.metadata})
    replaced = f"labels, class names and columns {', '.join(columns)}" if columns else "labels and class names"
    return (
        f"{job.what}: {difference}. {store.reference} holds the features of these images, which need no encoding: run "
        f"again with --update-labels to replace its {replaced} by those of {job.dataset.name}/{job.dataset.split}, or "
        "with another --root to keep both labelings side by side"
    )


def _is_paired(job: ImageJob, store: ImageStore) -> bool:
    """Whether the store knows this model's text tower; another model may share the image tower alone."""
    known = list(store.text_digests)
    job.text_digests = known + [digest for digest in job.text_digests if digest not in known]
    return job.text_digests == known


def _difference(job: ImageJob, store: ImageStore) -> str:
    """What differs from the store, in words; nothing where nothing does."""
    if store.labels_digest != job.labels_digest:
        if store.classnames != job.index.classnames:
            return f"the class names differ from those of {store.reference}"
        rows = np.flatnonzero((store.labels != job.index.labels) & store.valid)
        named = f" (first: {job.index.ids[rows[0]]})" if len(rows) else ""
        return f"{len(rows):,} of {len(job.index):,} labels differ from those of {store.reference}{named}"
    if store.metadata_digest != job.metadata_digest:
        old, new = sorted(store.metadata) or "none", sorted(job.index.metadata) or "none"
        return f"the metadata columns differ from those of {store.reference} (there {old}, now {new})"
    return ""


@dataclass(frozen=True)
class EncodeResult:
    """What an encode run did: `hit` means that no image was opened; `copied_rows` came from other stores."""

    store: ImageStore
    hit: bool
    encoded_rows: int
    relabelled: bool
    seconds: float
    copied_rows: int = 0


def encode(
    data: str | Dataset,
    split: str = "train",
    model: str | Encoder = "tiny",
    pretrained: str | None = None,
    *,
    root: str | StorePath | None = None,
    labels: str = "names",
    device: str | None = None,
    precision: str = "fp32",
    preprocess: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ImageStore:
    """Encode a split of a data set, or find it in the cache.

    Parameters
    ----------
    data : str or Dataset
        ``digits``, ``imagefolder:DIR``, ``list:FILE``, ``arrays:DIR``; see `featcache.datasets`.
    split : str
        Name of the split (ignored where `data` is a Dataset).
    model : str or Encoder
        ``tiny``, an open_clip architecture, ``local-dir:FOLDER``; see `featcache.encoders`.
    pretrained : str, optional
        open_clip tag or checkpoint file.
    root : str, Path or ObjectPath, optional
        Folder or ``s3://bucket/prefix`` of all stores, default ``$FEATCACHE_ROOT``, else ``./cache``.
    labels : {"names", "int"}
        What the labels of a list file are.
    device, precision, preprocess
        See `featcache.encoders.load_encoder`; they do nothing where `model` is an Encoder.
    **options
        Fields of `EncodeOptions`.

    Returns
    -------
    ImageStore
        Features (N, D) with sample i in row i.

    Raises
    ------
    FeatcacheError
        DatasetError, ImageReadError, EncoderError, LabelsChangedError, ContentChangedError, StoreWriteError, or
        ShardDoneError where only a part was asked for.
    """
    dataset = open_dataset(data, split, labels=labels) if isinstance(data, str) else data
    if isinstance(model, str):
        model = load_encoder(model, pretrained, device=device, precision=precision, preprocess=preprocess)
    return encode_dataset(dataset, model, root=root, options=EncodeOptions(**options), progress=progress).store


def encode_dataset(
    dataset: Dataset,
    encoder: Encoder,
    *,
    root: str | StorePath | None = None,
    options: EncodeOptions | None = None,
    progress: Progress | None = None,
) -> EncodeResult:
    """`encode` for an opened data set and a loaded encoder, with an account of what was done."""
    encoder = whole_encoder(encoder, "encoder:")
    job = ImageJob(dataset, encoder, resolve_root(root), options or EncodeOptions(), progress or Silent())
    began = time.perf_counter()
    store = job.finished_store()
    hit, relabelled = store is not None, False
    if store is None:
        store, encoded = job.run()
    else:
        encoded = encode_changed(job, store)
        relabelled = relabel(job, store)
        if options and options.parts and job.outputs().unfinished():
            encoded += job.run()[1]
        store = open_image_store(job.path)
    seconds = time.perf_counter() - began
    return EncodeResult(store, hit and not encoded + job.copied, encoded, relabelled, seconds, job.copied)
