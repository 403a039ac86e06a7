"""Making a store from features computed by another program.

The encoder's identity is the name and digest given by the user. Stores with the same identity are compatible: a head
fitted on an imported train split can be evaluated on an imported test split. There are no sample files to identify the
data set, so its half of the key is a hash of the features, name and split.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.datasets import SampleIndex, dataset_key, labels_digest, metadata_digest
from featcache.datasets.base import check_targets, warn_empty_classes
from featcache.datasets.files import file_index
from featcache.datasets.labels import MAX_CLASSES
from featcache.encoding.changes import label_difference
from featcache.encoding.chunks import normalise
from featcache.encoding.outputs import Work
from featcache.encoding.pipeline import worked_batches
from featcache.encoding.store_job import Contents, Layout, MadeChunk, StoreJob
from featcache.errors import DatasetError, FeatcacheWarning, LabelsChangedError
from featcache.progress import counted, first_few
from featcache.store import ImageStore, StoreWriter, resolve_root
from featcache.store.columns import SAMPLES, samples_bytes
from featcache.store.key import Json, checksum, content_key
from featcache.store.layout import Array, image_arrays, label_arrays
from featcache.store.places import StorePath
from featcache.store.reading.parts import Part
from featcache.store.writer import Values
from featcache.transfer.formats import Foreign

OPTIONAL = ("text_digests", "logit_scale")
"""Fields of a store's info that the user may give."""


@dataclass(frozen=True)
class Source:
    """Origin of imported features.

    Parameters
    ----------
    encoder_name : name of the model
    digest : identifies its weights among others with that name: a checksum of the checkpoint, a commit, a date
    text_digest : that of the matching text tower, for zero-shot heads (``featcache info`` of a text store shows it);
        not needed if the texts are imported with the same name and digest
    logit_scale : exponentiated factor on cosine similarities
    """

    encoder_name: str
    digest: str | None = None
    text_digest: str | None = None
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        if self.logit_scale is not None and not 0 < self.logit_scale < np.inf:
            raise DatasetError(f"logit scale {self.logit_scale}: expected a positive number, such as 100 for CLIP")

    @property
    def identity(self) -> Json:
        """Encoder identity of these features, to which the width is added."""
        return {"imported": self.encoder_name, "digest": self.digest, "stored": "float16, L2-normalised in float32"}

    @property
    def tower(self) -> str:
        """Digest of the matching text tower: as given, else derived from name and digest."""
        return self.text_digest or content_key({"imported": self.encoder_name, "digest": self.digest})

    @property
    def given(self) -> set[str]:
        """The fields of `OPTIONAL` that the user gave."""
        return {key for key, value in zip(OPTIONAL, (self.text_digest, self.logit_scale), strict=True) if value}


def import_features(
    found: Foreign,
    source: Source,
    *,
    name: str,
    split: str = "train",
    classnames: Sequence[str] | None = None,
    root: str | StorePath | None = None,
    update_labels: bool = False,
) -> ImageStore:
    """Make a store from features, unless it exists: unit rows in float16, their original lengths in ``norm``.

    Parameters
    ----------
    found : features (N, D) of any float type, normalised or not; labels (N,), integers from 0 or class names. For
        multi-label data, labels (N, L): 1 if the class applies, 0 if not, -1 or NaN if unknown.
    name, split : name of the store; part of its key
    classnames : C names; default: those in `found`, else the labels, sorted, or ``class 0``, ``class 1``, ...
    update_labels : whether to replace labels, class names, text digest and logit scale of an existing store

    Raises
    ------
    DatasetError
        No labels, shapes other than (N, D) and (N,), NaN or infinite features, labels out of range.
    LabelsChangedError
        The store exists with different labels, and `update_labels` is False; nothing is written.
    """
    features, index = _checked(found, classnames)
    job = _ImportJob(features, index, source, name, split, resolve_root(root))
    store = job.finished()
    if store is None:
        return job.run()
    changed = [key for key in OPTIONAL if key in source.given and job.info[key] != store.info[key]]
    difference = label_difference(store, index) or ", ".join(
        f"its {key} was {store.info[key]}, now {job.info[key]}" for key in changed
    )
    if not difference:
        return store
    if not update_labels:
        raise LabelsChangedError(
            f"{store.reference} already holds these features, and {difference}; nothing was written. Run again with "
            "--update-labels to replace them, or with another --name or --split to keep both"
        )
    # Keep stored values that are not given this time.
    job.info |= {key: store.info[key] for key in set(OPTIONAL) - source.given if store.info[key]}
    job.writer().reopen()
    return job.run()


class _ImportJob(StoreJob[ImageStore]):
    kind, verb = ImageStore, "import"

    def __init__(
        self,
        features: npt.NDArray[np.float32],
        index: SampleIndex,
        source: Source,
        name: str,
        split: str,
        root: StorePath,
    ) -> None:
        self.features, self.index = features, index
        dim, named = features.shape[1], {"name": name, "split": split}
        dataset = {"rows": len(index), "samples": dataset_key(index), "features": checksum(features.data)}
        identity = {"encoder": source.identity | {"dim": dim}, "dataset": dataset | named}
        super().__init__(root, identity, len(index), f"{name}/{split}")
        self.info: Json = {
            **named,
            "classnames": list(index.classnames),
            "labels_digest": labels_digest(index.truth, index.classnames),
            "metadata_digest": metadata_digest({}),
            "encoder_name": source.encoder_name,
            "dim": dim,
            "text_digests": [source.tower],
            "logit_scale": source.logit_scale,
            "logit_bias": None,
            "bad": [],
        }

    def layout(self, chunk_rows: int) -> Layout:
        rows = image_arrays(self.n_rows, self.features.shape[1], chunk_rows)
        sidecar = {SAMPLES: samples_bytes(self.index.ids, self.index.sizes)}
        return Layout(rows, label_arrays(self.index.truth, chunk_rows), sidecar)

    def before(self, writer: StoreWriter) -> None:
        writer.drop_damaged()

    def make(self, works: Iterator[Work]) -> Iterator[MadeChunk]:
        """Hash and cast the next chunk while one is written."""
        chunks = worked_batches(lambda works: [self._made(work) for work in works], ([work] for work in works), 1, 1)
        return chain.from_iterable(chunks)

    def _made(self, work: Work) -> MadeChunk:
        raw = self.features[work.rows.start : work.rows.stop]
        unit, norm = normalise(raw)
        content = np.stack([np.frombuffer(xxhash.xxh3_128_digest(row), np.uint8) for row in raw])
        valid = np.ones(len(raw), np.uint8)
        values: Values = {"features": unit.astype(np.float16), "norm": norm, "valid": valid, "content": content}
        return MadeChunk(work, {Part(): values})

    def contents(self, part: Part, writer: StoreWriter) -> Contents:
        truth: dict[str, Array] = {"labels": self.index.labels}
        truth |= {} if self.index.targets is None else {"targets": self.index.targets}
        return Contents(self.info, {"imported": True}, truth)


def _checked(found: Foreign, classnames: Sequence[str] | None) -> tuple[npt.NDArray[np.float32], SampleIndex]:
    features = _features(found.features)
    named, texts = classnames or found.classnames, found.labels
    if texts is not None and texts.ndim == 1 and (texts.dtype.kind == "U" or all(isinstance(x, str) for x in texts)):
        named = named or sorted(set(texts.tolist()))
        found = replace(found, labels=_numbers(texts, named))
    labels = _labels(found.labels, len(features))
    n_classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    names = named or [f"class {label}" for label in range(n_classes)]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"class names are {str(names)[:80]}; expected a list of texts: give a file with --classes")
    if labels.ndim == 2:
        check_targets(labels, len(features), tuple(names))
    ids = found.ids or [f"row-{row:08d}" for row in range(len(features))]
    index = file_index(ids, np.tile([features[0].nbytes, 0], (len(features), 1)), labels, names)
    if not named:
        warn_empty_classes(index, "the labels")
    return features, index


def _numbers(texts: Array, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Class index (N,) of each label; DatasetError if a label is unknown or the name of several classes."""
    uses, place = Counter(map(str, names)), {str(name): number for number, name in enumerate(names)}
    used = sorted(set(map(str, texts)))
    if twice := [repr(text) for text in used if uses[text] > 1]:
        raise DatasetError(
            f"labels {first_few(twice)} are names of several classes each; use class indices as labels, or unique names"
        )
    if unknown := [repr(text) for text in used if text not in place]:
        raise DatasetError(
            f"labels {first_few(unknown)} are not among the {len(place)} class names; add them to the class list, or "
            "omit it"
        )
    return np.array([place[text] for text in texts.tolist()], np.int64)


def _features(given: Array) -> npt.NDArray[np.float32]:
    """The features in float32; DatasetError names the first row that float32 cannot represent."""
    if given.dtype.kind not in "fiub":
        raise DatasetError(f"features are {given.dtype}; expected real numbers, such as float16 or float32")
    if given.ndim != 2 or not given.size:
        raise DatasetError(f"features have shape {given.shape}; expected (N, D), one row per sample")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(given, dtype=np.float32)
    broken = np.flatnonzero(~np.isfinite(given).all(axis=1))
    if len(broken):
        raise DatasetError(
            f"NaN or infinite features in {counted(len(broken), 'row')}, first row {broken[0]}; remove them"
        )
    peaks = np.maximum(given.max(axis=1), -given.min(axis=1).astype(np.float64))  # np.abs would copy all features
    limits = np.finfo(np.float32)
    long = np.flatnonzero(peaks > limits.max / np.sqrt(given.shape[1]))  # few rows, whose lengths are computed
    lengths = np.linalg.norm(given[long].astype(np.float64), axis=1)
    short = np.flatnonzero((peaks > 0) & (peaks < limits.tiny)) if given.dtype.itemsize > 4 else long[:0]
    wrong = np.concatenate([long[lengths > limits.max], short])
    if len(wrong):
        raise DatasetError(
            f"row {wrong.min()}: its values, at most {peaks[wrong.min()]:.3g}, are outside the range of float32 "
            f"({limits.tiny:.3g} to {limits.max:.3g} for the length of a row); scale the features"
        )
    if len(zero := np.flatnonzero(peaks == 0)):
        what = f"{len(zero):,} rows of zeros, first row {zero[0]}, cannot be normalised and stay zero"
        warnings.warn(f"{what}; remove them if their images could not be read", FeatcacheWarning, stacklevel=2)
    return features


def _labels(labels: Array | None, n: int) -> Array:
    if labels is None:
        raise DatasetError(
            "no labels found with the features; give their file with --labels, or import class vectors as a text "
            "store with --texts"
        )
    if labels.ndim == 2 and len(labels) == n and labels.shape[1] > 1 and labels.dtype.kind in "iufb":
        return np.where(np.isnan(labels), -1, labels)  # targets; see `check_targets`
    if labels.shape != (n,) or labels.dtype.kind not in "iufb" or not np.array_equal(labels, np.rint(labels)):
        raise DatasetError(
            f"labels are {labels.dtype} {labels.shape}; expected {n:,} integers, one per row of the features, or "
            f"({n:,}, L) for multi-label data"
        )
    odd = np.flatnonzero((labels < 0) | (labels >= MAX_CLASSES))  # before the cast, which would wrap
    if len(odd):
        raise DatasetError(
            f"{len(odd):,} labels are out of range, first {labels[odd[0]]} in row {odd[0]}; expected class indices, "
            f"0 to {MAX_CLASSES - 1:,}"
        )
    return labels.astype(np.int64)
