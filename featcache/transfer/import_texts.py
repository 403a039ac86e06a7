"""Making a text store from class vectors computed by another program.

Zero-shot weights may be (C, D), (D, C) as in open_clip, WiSE-FT and Tip-Adapter, or (C, T, D) with one vector per
prompt; and unit vectors, or multiplied by the logit scale.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from featcache.encoding.chunks import normalise
from featcache.encoding.outputs import Work
from featcache.encoding.store_job import Contents, Layout, MadeChunk, StoreJob
from featcache.encoding.texts import CHUNK_NBYTES, class_means
from featcache.errors import DatasetError
from featcache.store import StoreWriter, TextStore, resolve_root
from featcache.store.key import Json, checksum
from featcache.store.layout import Array, text_arrays
from featcache.store.places import StorePath
from featcache.store.reading.parts import Part
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source

EQUAL = 1e-2
"""Relative tolerance for vectors to count as equally long (float16)."""


def import_texts(
    found: Foreign,
    source: Source,
    *,
    name: str,
    classnames: Sequence[str] | None = None,
    root: str | StorePath | None = None,
) -> TextStore:
    """Make a text store from class vectors, unless it exists.

    Parameters
    ----------
    found : its features are the vectors of C classes: (C, D), (D, C), or (C, T, D) with T prompts per class, padded
        with NaN. If the matrix is square, the class vectors are along the axis on which all have the same length.
    source : its `tower` is the store's text tower. Without a logit scale, the common length of the vectors is used as
        such; unit vectors require one.
    name : name of the store in listings
    classnames : C class names; default: those in `found`

    Raises
    ------
    DatasetError
        No class names, a shape that does not match them, NaN or infinite vectors, zero vectors, no logit scale.
    """
    names = tuple(classnames or found.classnames or ())
    if not names:
        raise DatasetError("class vectors without class names; give a file, one name per line, with --classes")
    raw = _by_class(found.features, len(names))
    counts, lengths = _counts(raw), np.linalg.norm(raw, axis=2)
    if not np.nanmin(lengths):
        raise DatasetError("a class vector has length 0; remove its class from the matrix and the class names")
    scale = _scale(lengths, source.logit_scale)
    job = _TextImport(raw / lengths[:, :, None], counts, names, source, scale, name, resolve_root(root))
    return job.result().store


def _by_class(given: Array, n: int) -> npt.NDArray[np.float32]:
    """The vectors as (C, T, D) float32."""
    if given.dtype.kind not in "fiu":
        raise DatasetError(f"class vectors are {given.dtype}; expected real numbers, such as float16 or float32")
    if given.ndim == 2 and n in given.shape:
        if given.shape[0] != n or (given.shape[1] == n and _columns_are_classes(given)):
            given = given.T
        given = given[:, None]
    if given.ndim != 3 or given.shape[0] != n or not given.size:
        raise DatasetError(
            f"class vectors have shape {given.shape}, and there are {n} class names; expected ({n}, D), (D, {n}) or "
            f"({n}, T, D)"
        )
    return np.ascontiguousarray(given, np.float32)


def _columns_are_classes(square: Array) -> bool:
    rows, columns = (_of_one_length(np.linalg.norm(square.astype(np.float64), axis=axis)) for axis in (1, 0))
    if rows == columns:
        raise DatasetError(
            f"class vectors have shape {square.shape}: both rows and columns match the class names; expected vectors "
            "of equal length along one axis: normalise the class vectors"
        )
    return columns


def _of_one_length(lengths: npt.NDArray[np.floating]) -> bool:
    return bool(np.nanmax(lengths) - np.nanmin(lengths) <= EQUAL * np.nanmax(lengths))


def _counts(raw: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Number of prompts per class, before the NaN padding."""
    there = np.isfinite(raw).all(axis=2)
    counts: npt.NDArray[np.int64] = there.sum(axis=1)
    padded = np.isnan(raw).all(axis=2) == ~there
    if not counts.all() or not padded.all() or not (there == (np.arange(raw.shape[1]) < counts[:, None])).all():
        raise DatasetError("class vectors contain NaN or infinite values; expected finite vectors")
    return counts


def _scale(lengths: npt.NDArray[np.float32], given: float | None) -> float:
    common = float(np.nanmedian(lengths))
    if given is not None:
        return given
    if not _of_one_length(lengths) or abs(common - 1) <= EQUAL:
        what = "vectors of length 1" if abs(common - 1) <= EQUAL else "vectors of different lengths"
        raise DatasetError(f"{what}, and no logit scale: give the model's with --logit-scale, such as 100 for CLIP")
    return common


class _TextImport(StoreJob[TextStore]):
    kind, verb = TextStore, "import"

    def __init__(
        self,
        raw: npt.NDArray[np.float32],
        counts: npt.NDArray[np.int64],
        classnames: tuple[str, ...],
        source: Source,
        scale: float,
        name: str,
        root: StorePath,
    ) -> None:
        self.raw: npt.NDArray[np.float32] = normalise(raw.reshape(-1, raw.shape[2]))[0].reshape(raw.shape)
        self.counts = counts
        facts: Json = {"name": name, "classnames": list(classnames), "text_digests": [source.tower]}
        facts |= {"logit_scale": scale, "logit_bias": None}
        self.info: Json = {**facts, "templates": None, "encoder_name": source.encoder_name, "dim": raw.shape[2]}
        identity = {
            "encoder": source.identity | {"dim": raw.shape[2]},
            "dataset": facts | {"vectors": checksum(self.raw.data)},
        }
        rows = max(1, CHUNK_NBYTES // self.raw[0].nbytes)
        super().__init__(root, identity, len(raw), f"texts/{name}", chunk_rows=rows)

    def layout(self, chunk_rows: int) -> Layout:
        return Layout(text_arrays(self.raw.shape, chunk_rows))

    def make(self, works: Iterator[Work]) -> Iterator[MadeChunk]:
        for work in works:
            rows = slice(work.rows.start, work.rows.stop)
            raw = self.raw[rows]
            yield MadeChunk(work, {Part(): {"raw": raw, "cls": class_means(raw), "counts": self.counts[rows]}})

    def contents(self, part: Part, writer: StoreWriter) -> Contents:
        return Contents(self.info, {"imported": True})
