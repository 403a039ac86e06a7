"""Details of one head on each store: calibration, results by class, and the most frequent confusions."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from featcache.datasets import Dataset, open_datasets
from featcache.datasets.decode import to_rgb
from featcache.errors import FeatcacheError
from featcache.progress import format_bytes
from featcache.store import ImageStore
from featcache.store.protocol import Derived, FeatureTable
from heads.evaluation.evaluate import subsets_of
from heads.evaluation.passes import ClassSubset, jobs_for, valid_rows
from heads.evaluation.projections import Projection
from heads.fitted.base import LogitHead
from heads.kernels.calibration_bins import CALIBRATION_BINS
from heads.kernels.tally import RowStats, Tally, stats_of_arrays
from heads.rows.samples import to_numpy

Subset: TypeAlias = Sequence[int] | Projection | None

BLOCK_ROWS = 4096
PIXELS = 64
MOST_CONFUSIONS, MOST_PICTURES = 12, 3
CHANGED = "the images have changed since they were encoded"
LOCAL = ("arrays", "collection", "coop", "digits", "imagefolder", "imagenet", "list", "table", "tfds", "torchvision")
"""Sources whose images are read again for thumbnails: those that never reach for the network."""


@dataclass(frozen=True)
class Reliability:
    """Calibration of a head: (mean confidence, accuracy, rows) of each bin, its calibration error, and its NLL."""

    bins: tuple[tuple[float, float, int], ...]
    ece: float
    nll: float


@dataclass(frozen=True)
class Confusion:
    """Rows of one class that were predicted as another; `pictures` are data URLs of some of them."""

    dataset: str
    label: str
    predicted: str
    rows: int
    of: int
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detail:
    """Details of a head on one store.

    Attributes
    ----------
    head, dataset : names
    classnames : C
    class_rows, class_hits : (C,) rows of each class, and correctly predicted ones
    confusions : the most frequent confusions of two classes
    reliability, calibrated : before and after a temperature fitted on a selection split; None without one
    no_pictures : why the confusions have no pictures
    """

    head: str
    dataset: str
    classnames: tuple[str, ...]
    class_rows: NDArray[np.int64]
    class_hits: NDArray[np.int64]
    confusions: tuple[Confusion, ...]
    reliability: Reliability
    calibrated: Reliability | None = None
    no_pictures: str = ""


@dataclass
class _Seen:
    """Labels, predicted classes and statistics of the rows so far."""

    labels: list[NDArray[np.integer]] = field(default_factory=list)
    predicted: list[NDArray[np.integer]] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)


def head_details(
    head: LogitHead,
    stores: Sequence[FeatureTable],
    names: Sequence[str],
    *,
    class_subset: ClassSubset = None,
    calibrated: LogitHead | None = None,
) -> list[Detail]:
    """One more pass over each store, for one head.

    Parameters
    ----------
    head : fitted head
    stores : image stores
    names : names of the stores in results rows
    class_subset : as in `heads.evaluate`
    calibrated : the head with another temperature, for the second reliability diagram
    """
    subsets = subsets_of(stores, names, class_subset)
    return [
        _detail(head, store, name, subset, calibrated)
        for store, name, subset in zip(stores, names, subsets, strict=True)
    ]


def store_facts(stores: Sequence[FeatureTable], names: Sequence[str]) -> dict[str, str]:
    """Rows, width, bytes, keys and date of each store."""
    facts = {}
    for store, name in zip(stores, names, strict=True):
        written = store.provenance.get("written")
        parts = [
            f"{len(store):,} rows x {store.dim}, {format_bytes(2 * len(store) * store.dim)} of float16",
            f"{len(store.classnames):,} classes",
            f"encoded by {store.encoder_name} ({store.encoder_key})",
            f"data {store.dataset_key}",
            f"labels {store.labels_digest}",
            *([f"written {written}"] if isinstance(written, str) else []),
        ]
        facts[f"{name} ({store.split})"] = "; ".join(parts)
    return facts


def _detail(head: LogitHead, store: FeatureTable, name: str, subset: Subset, calibrated: LogitHead | None) -> Detail:
    seen = _seen(head, store, subset)
    tally = Tally.joined(seen.tallies)
    labels, predicted = np.concatenate(seen.labels), np.concatenate(seen.predicted)
    classnames = jobs_for([head], store, subset)[0].head.classnames
    pairs, why = _pairs(labels, predicted, store)
    confusions = tuple(
        Confusion(name, classnames[label], classnames[guess], n, int(tally.class_rows[label]), pictures)
        for label, guess, n, pictures in pairs
    )
    after = None if calibrated is None else _reliability(Tally.joined(_seen(calibrated, store, subset).tallies))
    return Detail(
        head.name, name, classnames, tally.class_rows, tally.class_hits[0], confusions, _reliability(tally), after, why
    )


def _seen(head: LogitHead, store: FeatureTable, subset: Subset) -> _Seen:
    (job,) = jobs_for([head], store, subset)
    seen = _Seen()
    for features, found in store.blocks(BLOCK_ROWS):
        labels = np.array(job.positions(to_numpy(found), store))  # blocks reuse their buffer
        stats = stats_of_arrays(job.head.logits(to_numpy(features)), labels, predicted=True)
        guesses = stats.predicted
        seen.labels.append(labels)
        seen.predicted.append(np.zeros(0, np.int64) if guesses is None else guesses.cpu().numpy())
        rows = RowStats.stack([stats._replace(predicted=None)])
        seen.tallies.append(Tally.of_rows(rows, labels, len(job.head.classnames)))
    return seen


def _reliability(tally: Tally) -> Reliability:
    rows, hits, confidence = tally.bin_rows[0], tally.bin_hits[0], tally.bin_confidence[0]
    bins = tuple(
        (float(confidence[b] / rows[b]), float(hits[b] / rows[b]), int(rows[b]))
        for b in range(CALIBRATION_BINS)
        if rows[b]
    )
    (result,) = tally.results()
    return Reliability(bins, result["ece"], result["nll"])


def _pairs(
    labels: NDArray[np.integer], predicted: NDArray[np.integer], store: FeatureTable
) -> tuple[list[tuple[int, int, int, tuple[str, ...]]], str]:
    """Label, predicted class, rows and pictures of the most frequent confusions; why pictures are missing."""
    wrong = np.flatnonzero(labels != predicted)
    if not len(wrong):
        return [], ""
    places = np.stack([labels[wrong], predicted[wrong]], 1)
    pairs, counts = np.unique(places, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    dataset, why = _source_of(store)
    rows = valid_rows(store)[wrong]
    found = []
    for place in order:
        label, guess = (int(c) for c in pairs[place])
        of_pair = rows[(places == pairs[place]).all(1)][:MOST_PICTURES]
        pictures = () if dataset is None else tuple(_pictures(dataset, store, of_pair.tolist()))
        found.append((label, guess, int(counts[place]), pictures))
    if dataset is not None and not any(pictures for *_, pictures in found):
        why = CHANGED
    return found, why


def _source_of(store: FeatureTable) -> tuple[Dataset | None, str]:
    """The data set that a store was encoded from, or why it is not available."""
    opened = store.provenance.get("data")
    if not isinstance(opened, dict) or not isinstance(opened.get("spec"), str):
        return None, "the store does not say where its images are"
    spec, name = opened["spec"], opened.get("name")
    if spec.partition(":")[0] not in LOCAL or "://" in spec:
        return None, f"images of {spec.partition(':')[0]} sources are not read again"
    try:
        with contextlib.chdir(str(opened.get("folder") or ".")):
            found = open_datasets(spec, store.split, labels=str(opened.get("labels") or "names"), name=name)
    except (FeatcacheError, OSError, ValueError):
        return None, "the images are no longer where they were encoded from"
    for dataset in found:
        if list(dataset.index.ids) == list(store.ids):
            return dataset, ""
    return None, CHANGED


def _pictures(dataset: Dataset, store: FeatureTable, rows: Sequence[int]) -> Iterator[str]:
    """Data URLs of some samples, at most `PIXELS` wide and high; of those whose content is what was encoded."""
    base = store.origin if isinstance(store, Derived) else store
    for row in rows:
        try:
            content = dataset.read(row)
            if isinstance(base, ImageStore) and _content(base, row) != xxhash.xxh3_128_digest(content):
                continue
            picture = to_rgb(dataset.decode(content, row))
        except (FeatcacheError, OSError, ValueError):
            continue
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.clip(picture, 0, 255).astype("u1"))
        image = image.convert("RGB")
        image.thumbnail((PIXELS, PIXELS))
        file, kind = io.BytesIO(), "PNG" if max(image.size) <= PIXELS // 2 else "JPEG"
        image.save(file, kind, **({} if kind == "PNG" else {"quality": 75}))
        yield f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _content(store: ImageStore, row: int) -> bytes:
    """Digest of a sample's content when it was encoded."""
    digest: bytes = store.reader("content").gather(np.array([row]))[0].tobytes()
    return digest
