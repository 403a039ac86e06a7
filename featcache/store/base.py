"""What every kind of opened store shares: its manifest, its arrays, its readers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featcache.errors import StoreCorruptError
from featcache.store.layout import ArraySpec
from featcache.store.manifest import Manifest, parse_json
from featcache.store.object_reader import ObjectReader
from featcache.store.places import File, StorePath, files, read_or_none
from featcache.store.readers import Array, MappedReader, Reader, ZarrReader
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
            check_sizes(path, spec, found)

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


def check_sizes(path: StorePath, spec: ArraySpec, found: Mapping[str, File]) -> None:
    """StoreCorruptError where a chunk file of an array is missing among those found, or of the wrong size."""
    for chunk in range(spec.n_chunks):
        file = found.get(spec.chunk_name(chunk))
        if file is None or file.nbytes != spec.chunk_nbytes:
            what = "is missing" if file is None else f"has {file.nbytes:,} bytes, expected {spec.chunk_nbytes:,}"
            raise StoreCorruptError(
                f"{spec.chunk_path(path, chunk)}: chunk file {what}; run the command that made {path} again: it redoes "
                "damaged chunks and keeps the others"
            )
