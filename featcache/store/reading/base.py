"""Base class of opened stores."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from featcache.errors import StoreCorruptError
from featcache.store.key import Json, checksum
from featcache.store.layout import PROVENANCE, Array, ArraySpec
from featcache.store.manifest import Manifest, parse_provenance
from featcache.store.places import StorePath, files, read_or_none
from featcache.store.reading.checks import check_verify, remedy
from featcache.store.reading.readers import MappedReader, ObjectReader, Reader, ZarrReader

READERS: dict[str, Callable[..., Reader]] = {
    "mapped": lambda folder, *array: (MappedReader if isinstance(folder, Path) else ObjectReader)(folder, *array),
    "zarr": ZarrReader,
}


class Store:
    """A finished store, opened by `open_store`.

    StoreCorruptError if a chunk file is missing or has the wrong size; on reading, unless `verify` is ``"never"``, also
    if a file differs from its checksum, with which it is compared when it is first read.
    """

    kind: ClassVar[str]
    made_by: ClassVar[str]
    """The command that makes such stores."""

    def __init__(self, path: StorePath, manifest: Manifest, reader: str = "mapped", verify: str = "read") -> None:
        check_verify(verify)
        self.path, self.manifest = path, manifest
        self.folder = path  # of the arrays; taps and views have their own, inside the store's
        self.reader_name, self.verify = reader, verify
        self._readers: dict[str, Reader] = {}
        check_sizes(path, manifest.all_arrays.values())

    def __len__(self) -> int:
        return self.manifest.n_rows

    @property
    def info(self) -> Json:
        """The manifest's description of the contents, see `Manifest.info`."""
        return self.manifest.info

    @property
    def name(self) -> str:
        """Short name, used in results rows."""
        return str(self.info["name"])

    @property
    def encoder_name(self) -> str:
        """Name of the model."""
        return str(self.info["encoder_name"])

    @property
    def classnames(self) -> tuple[str, ...]:
        """The C class names, in label order."""
        return tuple(self.info["classnames"])

    @property
    def text_digests(self) -> tuple[str, ...]:
        """Digests of the text towers that match the features; empty if the model has no text tower."""
        return tuple(self.info["text_digests"])

    @property
    def text_digest(self) -> str | None:
        """The first of `text_digests`."""
        return self.text_digests[0] if self.text_digests else None

    @property
    def logit_scale(self) -> float | None:
        """The model's factor on cosine similarities, exponentiated."""
        return None if self.info["logit_scale"] is None else float(self.info["logit_scale"])

    @property
    def logit_bias(self) -> float | None:
        """The model's bias on scaled similarities (SigLIP), None for other models."""
        return None if self.info["logit_bias"] is None else float(self.info["logit_bias"])

    @property
    def dim(self) -> int:
        """D, the feature width."""
        return int(self.info["dim"])

    @property
    def provenance(self) -> Json:
        """Record of how and when the store was made, not part of any key; StoreCorruptError if it is damaged."""
        return read_provenance(self.path, self.manifest)

    def reader(self, name: str) -> Reader:
        """Reader of one array; opened on first use."""
        if name not in self._readers:
            checksums = () if self.verify == "never" else self.manifest.checksums[name]
            self._readers[name] = READERS[self.reader_name](self.folder, self.manifest.all_arrays[name], checksums)
        return self._readers[name]

    def array(self, name: str) -> Array:
        """One whole array in memory, in the stored dtype."""
        reader = self.reader(name)
        return reader.read(0, reader.spec.shape[0])

    def sidecar(self, name: str) -> bytes:
        """The content of a sidecar file, checked like the arrays."""
        return self._checked(self.path / name, self.manifest.files[name])

    def _checked(self, path: StorePath, expected: str) -> bytes:
        """The content of a file, compared with its checksum."""
        content = read_or_none(path)
        if content is None or (self.verify != "never" and checksum(content) != expected):
            what = "is missing" if content is None else "differs from its checksum"
            raise StoreCorruptError(f"{path}: {what}; {remedy(self.path)}")
        return content


def read_provenance(store: StorePath, manifest: Manifest) -> Json:
    """Provenance of a store; StoreCorruptError if it is missing or damaged."""
    path = store / PROVENANCE
    try:
        return parse_provenance(read_or_none(path), manifest.key, sealed=PROVENANCE in manifest.sealed)
    except ValueError as error:
        raise StoreCorruptError(
            f"{path}: {error}; run `featcache verify {store} --deep --repair`, which replaces it "
            "by a note: the features do not depend on it"
        ) from error


def check_sizes(folder: StorePath, specs: Iterable[ArraySpec]) -> None:
    """StoreCorruptError if a chunk file is missing or has the wrong size."""
    found = files(folder)
    for spec in specs:
        for chunk in range(spec.n_chunks):
            file = found.get(spec.chunk_name(chunk))
            if problem := spec.chunk_problem(None if file is None else file.nbytes):
                raise StoreCorruptError(
                    f"{spec.chunk_path(folder, chunk)}: chunk file {problem}; run the command that made {folder} "
                    "again: it redoes damaged chunks and keeps the others"
                )
