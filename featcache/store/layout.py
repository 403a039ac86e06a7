"""The files of a store, and the zarr v3 metadata that describes them.

::

    <store>/zarr.json               group; its attributes are the header: keys and chunk size
            features/zarr.json      float16 (N, D), chunks (rows, D), uncompressed little-endian bytes
            features/c/<i>/0        chunk i: rows i*rows ..., padded to the full chunk with the fill value
            (taps with tokens: float16 (N, P, D) in files c/<i>/0/0 of at most `TOKEN_NBYTES`, several per chunk)
            norm, valid, content    the other row arrays, in the same chunks
            labels                  int64 (N,), written when the store is finished; replaceable without encoding
            targets                 int8 (N, L), multi-label data only: 1, 0, or -1 for unknown; labels are all -1
            samples.parquet         ids and sizes; metadata.parquet: columns; stamps.bin: file times (only a cache)
            done/<i>.json           marker of a complete chunk i, with the checksum of each of its files
            manifest.json           written last; readers refuse a store without one
            provenance.json         how and when it was made, without a checksum
            claims/                 which writer is working on which chunk
            names/                  further names of the encoder, one empty file each
            hit                     texts only: when `featcache text` last found them finished
            tap-<name>/, view-.../  taps and views: groups like this one, see `store.reading.parts`

Chunk files are uncompressed and unsharded, so they hold the plain bytes of the array. The fast reader relies on that,
and any zarr library can read them.
"""

import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from featcache.parameters import json_value
from featcache.store.key import Json
from featcache.store.places import StorePath

Array: TypeAlias = npt.NDArray[Any]
P = TypeVar("P", bound=StorePath)
SCHEMA = 1
DEFAULT_CHUNK_ROWS = 4096
MANIFEST = "manifest.json"
MARKERS = "done"
HEADER = "zarr.json"
PROVENANCE = "provenance.json"
HIT = "hit"
DTYPES = ("<f2", "<f4", "<f8", "<i8", "<i4", "<u2", "|u1", "|i1")
NAME_LETTERS = frozenset(string.ascii_letters + string.digits + "._-")
MAX_SIZE = 1 << 48
TOKEN_NBYTES = 1 << 24
"""Maximum size of a token file; a chunk of 4,096 images (1.2 GB with 196 tokens of width 768) is split into several."""
TOKEN_FILES = 16_384
"""Maximum number of token files per array, so that they can be mapped as one; larger arrays get larger files."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store."""

    name: str
    dtype: str
    """Little-endian numpy dtype, such as ``<f2``."""
    shape: tuple[int, ...]
    """Full shape; the first axis counts rows."""
    chunk_rows: int
    """Rows per chunk; the other axes are not split."""
    fill: float | int
    """What zarr returns for a missing chunk file: NaN or -1, so that gaps are visible."""

    @property
    def n_chunks(self) -> int:
        """Number of chunk files."""
        return -(-self.shape[0] // self.chunk_rows)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of every chunk, including the last."""
        return (self.chunk_rows, *self.shape[1:])

    @property
    def chunk_nbytes(self) -> int:
        """Size of every chunk file in bytes."""
        return int(np.prod(self.chunk_shape)) * np.dtype(self.dtype).itemsize

    def chunk_name(self, chunk: int) -> str:
        """Name of a chunk file in the store (zarr's default chunk key encoding)."""
        return "/".join((self.name, "c", str(chunk), *("0" for _ in self.shape[1:])))

    def chunk_path(self, store: P, chunk: int) -> P:
        """Path of a chunk file."""
        return cast(P, store / self.chunk_name(chunk))

    def chunk_problem(self, nbytes: int | None) -> str:
        """What is wrong with a chunk file of this size (None if missing); empty if nothing is."""
        if nbytes == self.chunk_nbytes:
            return ""
        return "is missing" if nbytes is None else f"has {nbytes:,} bytes, expected {self.chunk_nbytes:,}"

    def rows_of(self, chunk: int) -> range:
        """The rows of a chunk."""
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.shape[0]))

    def files_of(self, rows: range) -> range:
        """The chunk files that hold a range of rows, which must start at the beginning of a file."""
        return range(rows.start // self.chunk_rows, -(-rows.stop // self.chunk_rows))

    def chunk_array(self, content: bytes) -> Array:
        """Inverse of `chunk_bytes`, padding included: (chunk_rows, ...)."""
        return np.frombuffer(content, dtype=self.dtype).reshape(self.chunk_shape)

    def chunk_bytes(self, values: Array) -> memoryview:
        """Content of a chunk file: `values` (n, ...) padded to the full chunk, little-endian, C order."""
        chunk = np.ascontiguousarray(values, dtype=np.dtype(self.dtype))
        if len(values) < self.chunk_rows:
            padded = np.full(self.chunk_shape, self.fill, dtype=np.dtype(self.dtype))
            padded[: len(values)] = chunk
            chunk = padded
        return chunk.reshape(-1).view(np.uint8).data

    def to_json(self) -> Json:
        """The manifest's description of the array."""
        fill = "NaN" if np.isnan(self.fill) else self.fill
        return {"dtype": self.dtype, "shape": list(self.shape), "chunk_rows": self.chunk_rows, "fill": fill}

    @classmethod
    def from_json(cls, name: str, spec: Json) -> "ArraySpec":
        """Inverse of `to_json`; ValueError or TypeError if it does not describe an array."""
        fill = float("nan") if spec["fill"] == "NaN" else spec["fill"]
        sizes = (*spec["shape"], spec["chunk_rows"])
        if len(sizes) < 2 or any(type(size) is not int or not 0 < size < MAX_SIZE for size in sizes):
            raise ValueError(f"array {name}: shape {spec['shape']} in chunks of {spec['chunk_rows']} rows")
        if spec["dtype"] not in DTYPES or isinstance(fill, bool) or not isinstance(fill, int | float):
            raise ValueError(f"array {name}: dtype {spec['dtype']}, fill {fill!r}")
        if not name or name.startswith(".") or not set(name) <= NAME_LETTERS:
            raise ValueError(f"array name {name!r}")
        return cls(name, spec["dtype"], tuple(spec["shape"]), spec["chunk_rows"], fill)


def image_arrays(n_rows: int, dim: int, chunk_rows: int, tokens: int | None = None) -> dict[str, ArraySpec]:
    """The row arrays of an image store of N rows and width D.

    ``features`` are L2-normalised, ``norm`` is their original length in float32, ``valid`` is 0 for unreadable images,
    and ``content`` is the xxh3-128 of the undecoded bytes. With P tokens per image, ``features`` are (N, P, D), scaled
    so that the root mean square length of an image's tokens is 1; ``norm`` is the original root mean square length.
    """
    nan = float("nan")
    shape: tuple[int, ...] = (n_rows, dim)
    rows = chunk_rows
    if tokens is not None:
        shape, rows = (n_rows, tokens, dim), token_rows(n_rows, tokens * dim, chunk_rows)
    specs = (
        ArraySpec("features", "<f2", shape, rows, nan),
        ArraySpec("norm", "<f4", (n_rows,), chunk_rows, nan),
        ArraySpec("valid", "|u1", (n_rows,), chunk_rows, 0),
        ArraySpec("content", "|u1", (n_rows, 16), chunk_rows, 0),
    )
    return {spec.name: spec for spec in specs}


def token_rows(n_rows: int, width: int, chunk_rows: int) -> int:
    """Rows per token file, for rows of `width` float16 numbers; divides a chunk's rows if there are several chunks.

    >>> token_rows(50_000, 196 * 768, 4096), token_rows(1797, 196 * 768, 1797), token_rows(8, 4, 8)
    (32, 55, 8)
    """
    most = max(1, max(TOKEN_NBYTES, 2 * width * n_rows // TOKEN_FILES) // (2 * width))
    if n_rows <= chunk_rows:
        return min(most, n_rows)
    return next(rows for rows in range(min(most, chunk_rows), 0, -1) if chunk_rows % rows == 0)


def label_arrays(truth: Array, chunk_rows: int) -> dict[str, ArraySpec]:
    """The whole arrays of an image store: labels, -1 for unreadable images, and targets if `truth` is (N, L), not (N,).

    Targets are 1 if the class applies, 0 if not, -1 if unknown.
    """
    arrays = {"labels": ArraySpec("labels", "<i8", (len(truth),), chunk_rows, -1)}
    if truth.ndim == 2:
        arrays["targets"] = ArraySpec("targets", "|i1", truth.shape, chunk_rows, -1)
    return arrays


def text_arrays(shape: tuple[int, ...], chunk_rows: int) -> dict[str, ArraySpec]:
    """The row arrays of a text store of C classes x T prompts x width D; see `featcache.store.reading.texts`."""
    nan = float("nan")
    specs = (
        ArraySpec("raw", "<f4", shape, chunk_rows, nan),
        ArraySpec("cls", "<f4", (shape[0], shape[2]), chunk_rows, nan),
        ArraySpec("counts", "<i8", shape[:1], chunk_rows, -1),
    )
    return {spec.name: spec for spec in specs}


DIMENSIONS = {
    "features": ("row", "feature"),
    "norm": ("row",),
    "valid": ("row",),
    "content": ("row", "byte"),
    "labels": ("row",),
    "targets": ("row", "class"),
    "raw": ("class", "prompt", "feature"),
    "cls": ("class", "feature"),
    "ctx": ("prompt", "feature"),
    "counts": ("class",),
    "moment": ("feature", "other_feature"),
}
"""Axis names by array; with them, xarray opens a store as a data set."""


def dimension_names(spec: ArraySpec) -> tuple[str, ...] | None:
    """Axis names of an array; None if it has none.

    >>> dimension_names(image_arrays(9, 4, 9)["features"]), dimension_names(image_arrays(9, 4, 9, 2)["features"])
    (('row', 'feature'), ('row', 'token', 'feature'))
    """
    if spec.name == "features" and len(spec.shape) == 3:
        return ("row", "token", "feature")
    names = DIMENSIONS.get(spec.name, ())
    return names if len(names) == len(spec.shape) else None


def zarr_metadata(specs: Iterable[ArraySpec], attributes: Mapping[str, object]) -> dict[str, bytes]:
    """The zarr.json files of a group with these arrays, written by zarr itself: path in the store -> content."""
    import zarr
    from zarr.codecs import BytesCodec
    from zarr.storage import MemoryStore

    files: Json = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=dict(attributes))
    for spec in specs:
        group.create_array(
            spec.name,
            shape=spec.shape,
            chunks=spec.chunk_shape,
            dtype=spec.dtype,
            fill_value=spec.fill,
            filters=None,
            compressors=None,
            serializer=BytesCodec(endian="little"),
            config={"write_empty_chunks": True},
            dimension_names=dimension_names(spec),
        )
    found: dict[str, bytes] = {name: content.to_bytes() for name, content in files.items()}
    # The group's file also holds those of the arrays, so that readers need a single request.
    header = json.loads(found[HEADER])
    arrays = {name.removesuffix(f"/{HEADER}"): json.loads(text) for name, text in found.items() if name != HEADER}
    header["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
    return found | {HEADER: json.dumps(header, indent=2).encode()}


EMPTY_FIELDS = ("attributes", "storage_transformers", "dimension_names", "consolidated_metadata")
"""Fields of zarr.json that some versions of zarr write even if empty, and others omit."""
LATER_FIELDS = ("dimension_names", "consolidated_metadata")
"""Fields that stores of earlier featcache versions lack."""


def same_metadata(content: bytes, expected: bytes) -> bool:
    """Whether two zarr.json files are equivalent, whatever version of zarr wrote them.

    Missing axis names and missing consolidated metadata (stores of earlier featcache versions) are accepted.

    >>> same_metadata(b'{"shape": [48], "attributes": {}}', b'{"shape":[48]}')
    True
    >>> same_metadata(b'{"shape": [40], "attributes": {}}', b'{"shape":[48]}')
    False
    """
    try:
        found, wanted = json_value(content), json_value(expected)
    except ValueError:
        return False
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return False
    wanted = {name: value for name, value in wanted.items() if name not in LATER_FIELDS or found.get(name)}
    return _filled(found) == _filled(wanted)


def _filled(metadata: Json) -> Json:
    """Metadata without empty optional fields, also within consolidated metadata."""
    held = {name: value for name, value in metadata.items() if value or name not in EMPTY_FIELDS}
    inner = held.get("consolidated_metadata")
    if isinstance(inner, dict) and isinstance(arrays := inner.get("metadata"), dict):
        filled = {name: _filled(array) if isinstance(array, dict) else array for name, array in arrays.items()}
        held["consolidated_metadata"] = inner | {"metadata": filled}
    return held
