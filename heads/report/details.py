"""Details of a head on each store (calibration, classes, confusions), and where stores and heads come from."""

import base64
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from heads.evaluation.metrics import Row
from heads.evaluation.passes import ClassSubset, Job, jobs_for
from heads.evaluation.projections import Projection
from heads.fitted.base import LogitHead
from heads.kernels.tally import RowStats, Tally, stats_of_arrays
from heads.report.rows import alpha_of, label_of
from heads.rows.arrays import to_numpy

Subset: TypeAlias = Sequence[int] | Projection | None
Integers: TypeAlias = NDArray[np.integer]

BLOCK_ROWS = 4096
PIXELS = 64
MOST_CONFUSIONS, MOST_PICTURES, MOST_FACTS = 12, 3, 30
CHANGED = "the images have changed since they were encoded"
LOCAL = ("arrays", "collection", "coop", "digits", "imagefolder", "imagenet", "list", "table", "tfds", "torchvision")
"""Sources that never use the network; their images are read again for thumbnails."""


@dataclass(frozen=True)
class Reliability:
    """Calibration of a head; `bins` are (mean confidence, accuracy, rows)."""

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
    """Details of a head on one store."""

    head: str
    dataset: str
    classnames: tuple[str, ...]
    class_rows: NDArray[np.int64]  # (C,) rows of each class
    class_hits: NDArray[np.int64]  # (C,) correctly predicted ones
    confusions: tuple[Confusion, ...]  # the most frequent
    reliability: Reliability
    calibrated: Reliability | None = None  # with a temperature fitted on a selection split
    no_pictures: str = ""  # why the confusions have none


def head_details(
    head: LogitHead,
    stores: Sequence[FeatureTable],
    names: Sequence[str],
    *,
    class_subset: ClassSubset = None,
    calibrated: LogitHead | None = None,
) -> list[Detail]:
    """Details of a head, in one more pass over each store; `names` are those of the stores in results rows.

    `calibrated` is the head with another temperature, for the second reliability diagram.
    """
    places = zip(stores, names, subsets_of(stores, names, class_subset), strict=True)
    return [_detail(head, *place, calibrated) for place in places]


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


def provenance_facts(rows: Sequence[Row]) -> dict[str, str]:
    """Model and parameters of the first `MOST_FACTS` heads, and the splits they were fitted and chosen on."""
    facts: dict[str, str] = {}
    for row in rows:
        params = row.get("params") or row.get("setting")
        texts = [str(row.get("encoder") or row.get("model") or "")]
        for key, value in params.items() if isinstance(params, Mapping) else ():
            text = f"{key} {_short(value)}"
            texts += [text if len(text) <= 60 else f"{text[:59]}…"] if value is not None else []
        for key, verb in (("fitted_on", "fitted on"), ("chosen_on", "chosen on")):
            splits = [split for split in row.get(key) or () if isinstance(split, dict)]
            names = [f"{s.get('name')}/{s['split']}" if s.get("split") else f"texts/{s.get('name')}" for s in splits]
            texts += [f"{verb} {' + '.join(names)}"] if names else []
        if any(texts) and (alpha_of(row) is None or row.get("chosen_on")):
            facts.setdefault(label_of(row), "; ".join(filter(None, texts)))
        if len(facts) >= MOST_FACTS:
            break
    return facts


def _short(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    if isinstance(value, Mapping):
        return str(value.get("head", "…"))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _detail(head: LogitHead, store: FeatureTable, name: str, subset: Subset, calibrated: LogitHead | None) -> Detail:
    (job,) = jobs_for([head], store, subset)
    classnames = job.head.classnames
    tally, labels, predicted = _predicted(job, store)
    confusions, why = _confusions(name, classnames, labels, predicted, store)
    before, after = _reliability(tally), None
    if calibrated is not None:
        after = _reliability(_predicted(jobs_for([calibrated], store, subset)[0], store)[0])
    return Detail(head.name, name, classnames, tally.class_rows, tally.class_hits[0], confusions, before, after, why)


def _predicted(job: Job, store: FeatureTable) -> tuple[Tally, Integers, Integers]:
    """Tally, labels (N',) and predicted classes (N',) of the valid rows of a store."""
    tallies, labels, predicted = [], [], []
    for features, found in store.blocks(BLOCK_ROWS):
        labels.append(np.array(job.positions(to_numpy(found), store)))  # blocks reuse their buffer
        logits = job.head.logits(to_numpy(features))
        predicted.append(logits.argmax(axis=1))
        rows = RowStats.stack([stats_of_arrays(logits, labels[-1])])
        tallies.append(Tally.of_rows(rows, labels[-1], len(job.head.classnames)))
    return Tally.joined(tallies), np.concatenate(labels), np.concatenate(predicted)


def _reliability(tally: Tally) -> Reliability:
    rows, hits, confidence = tally.bin_rows[0], tally.bin_hits[0], tally.bin_confidence[0]
    filled = np.flatnonzero(rows)
    bins = zip(confidence[filled] / rows[filled], hits[filled] / rows[filled], rows[filled], strict=True)
    (result,) = tally.results()
    return Reliability(tuple((float(c), float(h), int(n)) for c, h, n in bins), result["ece"], result["nll"])


def _confusions(
    name: str, classnames: Sequence[str], labels: Integers, predicted: Integers, store: FeatureTable
) -> tuple[tuple[Confusion, ...], str]:
    """The most frequent confusions, and why they have no pictures."""
    wrong = np.flatnonzero(labels != predicted)
    if not len(wrong):
        return (), ""
    places = np.stack([labels[wrong], predicted[wrong]], 1)
    pairs, counts = np.unique(places, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    dataset, why = _source_of(store)
    rows = np.flatnonzero(store.valid)[wrong]
    found = []
    for place in order:
        label, guess = (int(c) for c in pairs[place])
        of_pair = rows[(places == pairs[place]).all(1)][:MOST_PICTURES]
        pictures = () if dataset is None else tuple(_pictures(dataset, store, of_pair.tolist()))
        n, of = int(counts[place]), int((labels == label).sum())
        found.append(Confusion(name, classnames[label], classnames[guess], n, of, pictures))
    if dataset is not None and not any(one.pictures for one in found):
        why = CHANGED
    return tuple(found), why


def _source_of(store: FeatureTable) -> tuple[Dataset | None, str]:
    """The data set that a store was encoded from, or why it is not available."""
    opened = store.provenance.get("data")
    if not isinstance(opened, dict) or not isinstance(spec := opened.get("spec"), str):
        return None, "the store does not say where its images are"
    source, labels = spec.partition(":")[0], str(opened.get("labels") or "names")
    if source not in LOCAL or "://" in spec:
        return None, f"images of {source} sources are not read again"
    try:
        with contextlib.chdir(str(opened.get("folder") or ".")):
            found = open_datasets(spec, store.split, labels=labels, name=opened.get("name"))
    except (FeatcacheError, OSError, ValueError):
        return None, "the images are no longer where they were encoded from"
    for dataset in found:
        if list(dataset.index.ids) == list(store.ids):
            return dataset, ""
    return None, CHANGED


def _pictures(dataset: Dataset, store: FeatureTable, rows: Sequence[int]) -> Iterator[str]:
    """Data URLs of samples whose content is still what was encoded, at most `PIXELS` wide and high."""
    base = store.origin if isinstance(store, Derived) else store
    for row in rows:
        try:
            content = dataset.read(row)
            if isinstance(base, ImageStore):
                (digest,) = base.reader("content").gather(np.array([row]))
                if digest.tobytes() != xxhash.xxh3_128_digest(content):
                    continue
            picture = to_rgb(dataset.decode(content, row))
        except (FeatcacheError, OSError, ValueError):
            continue
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.clip(picture, 0, 255).astype("u1"))
        image = image.convert("RGB")
        image.thumbnail((PIXELS, PIXELS))
        file, kind = io.BytesIO(), "PNG" if max(image.size) <= PIXELS // 2 else "JPEG"
        image.save(file, kind, quality=75)  # PNG ignores the quality
        yield f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
