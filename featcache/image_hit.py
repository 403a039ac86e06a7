"""What is left to do where a store is finished already: changed sources, changed labels, another text tower."""

import numpy as np

from featcache.content import changed_rows
from featcache.errors import ContentChangedError, LabelsChangedError
from featcache.image_job import ImageJob
from featcache.store import ImageStore
from featcache.store.names import add_name

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
