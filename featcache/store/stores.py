"""Opened stores: the features of a data set's split, and the text embeddings of a class list."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import MismatchError, StoreCorruptError
from featcache.store.layout import ArraySpec
from featcache.store.manifest import BadRow, Manifest, parse_json, read_manifest
from featcache.store.object_reader import ObjectReader
from featcache.store.places import File, StorePath, files, location, read_or_none
from featcache.store.reader import Array, MappedReader, Reader, Rows, ZarrReader
from featcache.store.samples import read_ids
from featcache.store.writer import PROVENANCE



def _fast_reader(store: StorePath, spec: ArraySpec) -> Reader:
    return MappedReader(store, spec) if isinstance(store, Path) else ObjectReader(store, spec)


READERS: dict[str, Callable[[StorePath, ArraySpec], Reader]] = {"mapped": _fast_reader, "zarr": ZarrReader.open}


class Store:
    """What both kinds of store share. Use `open_store`.

    Parameters
    ----------
    path : StorePath
        The store's folder, or its prefix in an object store.
    manifest : Manifest
    reader : {"mapped", "zarr"}
        How rows are read; the results are equal.
    """

    kind = ""

    def __init__(self, path: StorePath, manifest: Manifest, reader: str = "mapped") -> None:
        self.path, self.manifest = path, manifest
        self._reader_name = reader
        self._readers: dict[str, Reader] = {}
        found = files(path)
        for spec in manifest.all_arrays.values():
            _check_sizes(path, spec, found)

    @property
    def info(self) -> dict[str, Any]:
        """What the manifest says besides the arrays."""
        return self.manifest.info

    @property
    def name(self) -> str:
        """Short name, used in results rows."""
        return str(self.info["name"])

    @property
    def encoder_name(self) -> str:
        """The model, as people call it."""
        return str(self.info["encoder_name"])

    @property
    def classnames(self) -> tuple[str, ...]:
        """The C class names, in label order."""
        return tuple(self.info["classnames"])

    @property
    def text_digests(self) -> tuple[str, ...]:
        """Digests of the text towers that belong to these features: one a model that was encoded with (or none)."""
        return tuple(self.info["text_digests"])

    @property
    def text_digest(self) -> str | None:
        """The first of `text_digests`, None where the model has no text side."""
        return self.text_digests[0] if self.text_digests else None

    @property
    def logit_scale(self) -> float | None:
        """The model's factor on cosine similarities, exponentiated."""
        return None if self.info["logit_scale"] is None else float(self.info["logit_scale"])

    @property
    def logit_bias(self) -> float | None:
        """The model's bias on scaled similarities (SigLIP), None where it has none."""
        return None if self.info["logit_bias"] is None else float(self.info["logit_bias"])

    @property
    def dim(self) -> int:
        """D, the feature width."""
        return int(self.info["dim"])

    @property
    def provenance(self) -> dict[str, Any]:
        """How and when the store was made; recorded, never keyed."""
        try:
            return dict(parse_json(read_or_none(self.path / PROVENANCE) or b"{}"))
        except ValueError:
            return {}

    def reader(self, name: str) -> Reader:
        """Reader of one array, opened once."""
        if name not in self._readers:
            self._readers[name] = READERS[self._reader_name](self.path, self.manifest.all_arrays[name])
        return self._readers[name]

    def array(self, name: str) -> Array:
        """One whole array in memory, in the stored dtype."""
        return self.reader(name).read(0, self.manifest.all_arrays[name].shape[0])


def _check_sizes(path: StorePath, spec: ArraySpec, found: Mapping[str, File]) -> None:
    for chunk in range(spec.n_chunks):
        file = found.get(spec.chunk_name(chunk))
        if file is None or file.nbytes != spec.chunk_nbytes:
            what = "is missing" if file is None else f"has {file.nbytes:,} bytes, expected {spec.chunk_nbytes:,}"
            raise StoreCorruptError(
                f"{spec.chunk_path(path, chunk)}: chunk file {what}; run the command that made {path} again: it redoes "
                "damaged chunks and keeps the others"
            )


class ImageStore(Store):
    """Image features (N, D) of one split under one encoder: float16, L2-normalised, sample i in row i."""

    kind = "images"

    def __len__(self) -> int:
        return self.manifest.arrays["features"].shape[0]

    def __repr__(self) -> str:
        return f"ImageStore({self.name}/{self.split}: {len(self):,} x {self.dim}, {self.encoder_name}, {self.path})"

    @property
    def split(self) -> str:
        """Name of the split."""
        return str(self.info["split"])

    @property
    def encoder_key(self) -> str:
        """Key of the image encoder's identity."""
        return self.manifest.key.split("/")[0]

    @property
    def dataset_key(self) -> str:
        """Key of the ordered sample ids and sizes."""
        return self.manifest.key.split("/")[1]

    @property
    def labels_digest(self) -> str:
        """Digest of labels and class names."""
        return str(self.info["labels_digest"])

    @property
    def bad(self) -> tuple[BadRow, ...]:
        """The samples that could not be read."""
        return tuple(BadRow(int(row), str(name), str(error)) for row, name, error in self.info["bad"])

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels (N,), -1 where the image could not be read."""
        return self.array("labels")

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,) False where the image could not be read."""
        return self.array("valid").astype(bool)

    @cached_property
    def ids(self) -> list[str]:
        """The N sample ids, in row order."""
        return read_ids(self.path)

    def blocks(
        self, rows: int = 65_536, dtype: npt.DTypeLike = np.float32
    ) -> Iterator[tuple[Array, npt.NDArray[np.int64]]]:
        """Features (n, D) and labels (n,) of the valid rows, block by block.

        The features lie in a buffer that is used again: they are good until the next block.
        """
        rows = min(rows, len(self))
        buffer = np.empty((rows, self.dim), dtype=dtype)
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            block = self.reader("features").read(start, stop, buffer[: stop - start])
            keep = self.valid[start:stop]
            if keep.all():
                yield block, self.labels[start:stop]
            else:
                yield block[keep], self.labels[start:stop][keep]

    def numpy(self, dtype: npt.DTypeLike = np.float32) -> tuple[Array, npt.NDArray[np.int64]]:
        """Features (N', D) and labels (N',) of the N' valid rows, in memory."""
        features = self.reader("features").read(0, len(self), np.empty((len(self), self.dim), dtype=dtype))
        if self.valid.all():
            return features, self.labels
        return features[self.valid], self.labels[self.valid]

    def gather(self, rows: Rows) -> Array:
        """Features (n, D) float16 of the given rows, valid or not, in that order."""
        return self.reader("features").gather(rows)


class TextStore(Store):
    """Text embeddings of class names x prompts, L2-normalised prompt by prompt (Lipsum-FT's `raw`, `cls`, `ctx`)."""

    kind = "texts"

    def __len__(self) -> int:
        return self.manifest.arrays["raw"].shape[0]

    def __repr__(self) -> str:
        prompts = self.manifest.arrays["raw"].shape[1]
        return f"TextStore({self.name}: {len(self):,} classes x {prompts} prompts, {self.encoder_name}, {self.path})"

    @property
    def text_key(self) -> str:
        """Key of the text encoder's identity."""
        return self.manifest.key.split("/")[0]

    @property
    def templates(self) -> tuple[str, ...] | None:
        """The T templates; None where the store was made from a prompt file."""
        return None if self.info["templates"] is None else tuple(self.info["templates"])

    @cached_property
    def raw(self) -> npt.NDArray[np.float32]:
        """(C, T, D): one unit vector a prompt, NaN where a class has fewer than T prompts."""
        return self.array("raw")

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """(C,): prompts of each class."""
        return self.array("counts")

    @cached_property
    def cls(self) -> npt.NDArray[np.float32]:
        """(C, D): normalised mean over the prompts of a class: the zero-shot weights without the logit scale."""
        return self.array("cls")

    @cached_property
    def ctx(self) -> npt.NDArray[np.float32] | None:
        """(T, D): normalised mean over the classes of a template; None where the store comes from a prompt file."""
        return self.array("ctx") if "ctx" in self.manifest.whole else None


KINDS: dict[str, type[Store]] = {"images": ImageStore, "texts": TextStore}


def open_store(path: str | StorePath, reader: str = "mapped") -> Store:
    """Open a finished store.

    Parameters
    ----------
    path : str or Path
        The store's folder.
    reader : {"mapped", "zarr"}
        "mapped" is the fast path for local files; "zarr" goes through zarr-python.

    Raises
    ------
    StoreNotFoundError, StoreIncompleteError, StoreCorruptError
        Nothing there; encoding has not finished; a file is missing or of the wrong size.
    """
    path = location(path)
    manifest = read_manifest(path)
    return KINDS[manifest.kind](path, manifest, reader)


def open_image_store(path: str | StorePath, reader: str = "mapped") -> ImageStore:
    """`open_store` for a store of images; MismatchError where it holds texts."""
    store = open_store(path, reader)
    if not isinstance(store, ImageStore):
        raise MismatchError(f"{path}: a store of texts; expected a store of images, made by `featcache encode`")
    return store


def open_text_store(path: str | StorePath, reader: str = "mapped") -> TextStore:
    """`open_store` for a store of texts; MismatchError where it holds images."""
    store = open_store(path, reader)
    if not isinstance(store, TextStore):
        raise MismatchError(f"{path}: a store of images; expected a store of texts, made by `featcache text`")
    return store
