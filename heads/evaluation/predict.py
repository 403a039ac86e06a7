"""Classify image files with a head and its encoder; predictions equal those on a store of the same images."""

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.base import SampleIndex
from featcache.datasets.files import files_below
from featcache.datasets.formats.tables import FORMATS
from featcache.datasets.sources.image_folder import EXTENSIONS
from featcache.encoders import Encoder, load_encoder
from featcache.encoders.base import PROJECTED, Batch, whole_encoder
from featcache.encoders.taps import encode_outputs, find_tap, taps_of
from featcache.encoding.chunks import normalise, stored_identity
from featcache.encoding.outputs import unit_tokens
from featcache.encoding.pipeline import batches_of, default_ahead, default_workers, prepared_batches
from featcache.errors import DatasetError, EncoderError, FeatcacheError, HeadError, MismatchError
from featcache.prompts.text_files import read_lines
from featcache.store import content_key
from featcache.store.protocol import FeatureTable
from heads.fitted.base import LogitHead, as_head, softmax
from heads.fitted.multilabel import MultiLabelHead
from heads.fitted.provenance import check_encoder
from heads.rows.samples import feature_blocks

Classes = tuple[NDArray[np.int64], NDArray[np.float64]]
MISSING = "no such file; expected a file, a folder, a pattern, @FILE (one path per line), or a store (NAME/SPLIT)"
LISTS = (".txt", ".lst", ".list", *FORMATS)


@dataclass(frozen=True)
class Prediction:
    """Predicted classes (k,) of the image at a path, most probable first; empty with an `error` if it is unreadable."""

    image: str
    classes: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    error: str = ""


def predict_images(
    head: object,
    images: Iterable[str | Path],
    encoder: Encoder | None = None,
    *,
    top: int = 5,
    batch_size: int = 64,
    workers: int | None = None,
) -> Iterator[Prediction]:
    """Classify image files, in order; an unreadable file is reported and does not stop the others.

    Parameters
    ----------
    head : fitted head
    images : paths (`find_images` expands folders and patterns)
    encoder : that of the features that the head was fitted on; None loads the one in the head's provenance
    top : number of classes per image
    batch_size : images per forward pass
    workers : threads that read and decode; None for one per core

    Yields
    ------
    A `Prediction` for each image. Probabilities are the softmax of the head's logits, including its temperature. A
    multi-label head gives the classes that reach their thresholds (perhaps none), each with its own probability.

    Raises
    ------
    HeadError
        If `top` or `batch_size` is not positive, or the head's provenance has no encoder.
    MismatchError
        If the encoder is not the head's.
    """
    if batch_size < 1:
        raise HeadError(f"batch_size = {batch_size}; expected at least 1")
    fitted = _checked(head, top)
    model = encoder_of(fitted) if encoder is None else whole_encoder(encoder, "encoder:")
    check_head_encoder(fitted, model)
    paths = [str(path) for path in images]
    zeros = np.zeros(len(paths), np.int64)  # labels are not used
    dataset = files_below("predict", "all", SampleIndex(paths, zeros, zeros, zeros, ("image",)), Path())
    batches = batches_of(range(len(dataset.index)), batch_size)
    for batch in prepared_batches(dataset, model, batches, workers or default_workers(), default_ahead(model)):
        found = _of_batch(fitted, model, [item.image for item in batch if item.image is not None], top)
        for item in batch:
            path = paths[item.row]
            if item.image is not None:
                yield Prediction(path, *next(found))
            else:
                yield _unread(path, item.error if Path(path).exists() else MISSING)


def predict_rows(head: object, store: FeatureTable, *, top: int = 5) -> Iterator[Prediction]:
    """Classify the rows of a store, in order, whatever its class list; `image` is the sample id.

    Predictions and errors are those of `predict_images`; images that were unreadable when encoded are reported.
    """
    fitted = _checked(head, top)
    fitted.check_tokens(store)
    check_encoder(fitted.name, fitted.provenance, fitted.dim, store)
    blocks = feature_blocks(store, tokens=fitted.takes_tokens)
    found = (pair for features in blocks for pair in _classes(fitted, fitted.logits(features), top))
    for name, valid in zip(store.ids, store.valid.tolist(), strict=True):
        yield Prediction(name, *next(found)) if valid else _unread(name, "could not be read when it was encoded")


def _checked(head: object, top: int) -> LogitHead:
    if top < 1:
        raise HeadError(f"top = {top}; expected at least 1")
    return as_head(head)


def _of_batch(head: LogitHead, encoder: Encoder, images: Sequence[Batch], top: int) -> Iterator[Classes]:
    """Classes and probabilities of prepared images, whose features are rounded to float16 as in a store."""
    if not images:
        return iter(())
    tap = tap_of(head, encoder)
    values = encode_outputs(encoder, images, [tap] if tap else [])[tap or PROJECTED]
    unit, _ = normalise(values) if values.ndim == 2 else unit_tokens(values)
    return _classes(head, head.logits(unit.astype(np.float16).astype(np.float32)), top)


def _classes(head: LogitHead, logits: NDArray[np.floating], top: int) -> Iterator[Classes]:
    """Classes and probabilities of each row of logits."""
    if isinstance(head, MultiLabelHead):
        return applying_classes(head, logits, top)
    return zip(*top_classes(logits, top), strict=True)


def _unread(image: str, error: str) -> Prediction:
    return Prediction(image, np.zeros(0, np.int64), np.zeros(0), error)


def top_classes(logits: NDArray[np.floating], top: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The `top` most probable classes (n, k) and their softmax probabilities (n, k); ties go to the lower index.

    >>> classes, probabilities = top_classes(np.log([[0.2, 0.5, 0.3]]), 2)
    >>> classes.tolist(), probabilities.round(3).tolist()
    ([[1, 2]], [[0.5, 0.3]])
    """
    wide = logits.astype(np.float64)
    order = np.argsort(-wide, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(softmax(wide), order, axis=1)


def applying_classes(head: MultiLabelHead, logits: NDArray[np.floating], top: int) -> Iterator[Classes]:
    """For each row of logits (n, L), at most `top` classes that reach their thresholds, most probable first.

    Yields class indices and their sigmoids.

    >>> head = MultiLabelHead(np.eye(3), np.zeros(3), ("ant", "bee", "cow"), thresholds=np.array([0.0, 0.0, 2.0]))
    >>> [classes.tolist() for classes, _ in applying_classes(head, np.array([[0.5, 1.0, 1.5], [-1.0, -1.0, 0.0]]), 5)]
    [[1, 0], []]
    """
    for row in logits.astype(np.float64):
        order = np.argsort(-row, kind="stable")
        classes = order[row[order] >= head.cuts[order]][:top]
        yield classes, 1.0 / (1.0 + np.exp(-row[classes]))


def encoder_of(
    head: LogitHead,
    model: str | None = None,
    pretrained: str | None = None,
    *,
    device: str | None = None,
    precision: str | None = None,
    preprocess: str | None = None,
) -> Encoder:
    """Load the encoder of a head: the named model, or the one in the head's provenance.

    `precision` and `preprocess` default to those in the provenance. HeadError if no model is named and the provenance
    has none, EncoderError if it cannot be loaded, MismatchError if it is not the head's.
    """
    record: Mapping[str, Any] = head.provenance.encoder or {}
    source: Mapping[str, Any] | None = record.get("source")
    if model is None and source is None:
        named = f" ({record['name']})" if record.get("name") else ""
        towers = (("encoder", head.provenance.encoder_key), ("text tower", head.provenance.text_digest))
        known = " and ".join(f"{what} {digest}" for what, digest in towers if digest is not None)
        origin = f"it belongs to {known}" if known else "it was fitted on bare arrays"
        raise HeadError(
            f"{head.name} has no record of how to load its encoder{named}: {origin}; "
            "pass --model and --pretrained (in Python: encoder=featcache.load_encoder(...))"
        )
    made_with = source or {}
    named, weights = (made_with["model"], made_with["pretrained"]) if model is None else (model, pretrained)
    wanted = precision or (made_with.get("precision") if model is None else None) or "fp32"
    way = preprocess or made_with.get("preprocess")
    try:
        encoder = load_encoder(named, weights, device=device, precision=wanted, preprocess=way)
    except (EncoderError, OSError) as error:
        if model is not None:
            raise
        raise EncoderError(
            f"{head.name} was made with --model {named} --pretrained {weights}, which cannot be loaded ({error}); "
            "pass --model and --pretrained with its present location"
        ) from error
    check_head_encoder(head, encoder)
    return encoder


def check_head_encoder(head: LogitHead, encoder: Encoder) -> None:
    """Raise a MismatchError for an encoder whose key, text tower or width is not the head's."""
    fitted, text = head.provenance.encoder_key, head.provenance.text_digest
    tap = tap_of(head, encoder)
    key, dim = content_key(stored_identity(encoder, tap)), find_tap(encoder, tap).dim
    remedy = "pass --model, --pretrained and --precision of the model that the head was made with"
    wrong = ""
    if fitted not in (None, key):
        wrong = f"{head.name} was fitted on features of encoder {fitted}, {encoder.name} is {key}"
    elif text not in (None, encoder.text_digest):
        wrong = f"{head.name} was made with text tower {text}, that of {encoder.name} is {encoder.text_digest}"
    elif head.dim != dim:
        wrong = f"{head.name} takes {head.dim} features, {encoder.name} makes {dim}"
    if wrong:
        raise MismatchError(f"{wrong}; {remedy}")


def tap_of(head: LogitHead, encoder: Encoder) -> str | None:
    """The tap of an encoder that a head was fitted on, such as ``pre_projection``; None for the features."""
    fitted = head.provenance.encoder_key
    named = str((head.provenance.encoder or {}).get("name") or "").rpartition("#")[2]  # pooled taps are not listed
    for tap in (*taps_of(encoder), named):
        with suppress(FeatcacheError):
            if content_key(stored_identity(encoder, tap)) == fitted:
                return tap
    return None


def find_images(places: Sequence[str]) -> list[str]:
    """Image files of folders (searched recursively), patterns, lists and paths, in order, without duplicates.

    Patterns have ``*``, ``?`` or ``[``; a list is ``@FILE`` with one path per line, relative to the file's folder. A
    path that does not exist is kept, and reported when it is read. DatasetError if no path exists, a place names no
    image, or a list cannot be read.
    """
    found: list[str] = []
    for place in places:
        paths = _at(place)
        if not paths:
            raise DatasetError(f"{place}: no image found; expected files ending in {' '.join(EXTENSIONS)}")
        found += paths
    if found and not any(Path(image).exists() for image in found):
        raise DatasetError(f"{found[0]}: {MISSING}")
    return list(dict.fromkeys(found))


def _at(place: str) -> list[str]:
    path = Path(place).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.rglob("*") if file.name.lower().endswith(EXTENSIONS))
    if place.startswith("@") and not path.exists():
        listing = Path(place[1:]).expanduser()
        if not listing.exists():
            raise DatasetError(f"{place}: no such list file: {listing}")
        return [str(listing.parent / line.strip()) for line in read_lines(listing) if line.strip()]
    if glob.has_magic(place) and not path.exists():
        return sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
    if path.suffix.lower() in LISTS and path.is_file():
        raise DatasetError(f"{place}: a list or table, expected images; write the paths to a file, one per line: @FILE")
    return [str(path)]
