"""Opened stores: the features of a data set's split, and the text embeddings of a class list."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import MismatchError
from featcache.store.manifest import BadRow, read_manifest
from featcache.store.opened import Store
from featcache.store.places import StorePath, location
from featcache.store.reader import Array, Rows
from featcache.store.samples import METADATA, read_columns, read_ids


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
    def reference(self) -> str:
        """The short name that `find_store` takes: ``digits/test@tiny``."""
        return f"{self.name}/{self.split}@{self.encoder_name}"

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
    def metadata_digest(self) -> str:
        """Digest of the metadata columns; stores of the first version had none."""
        from featcache.datasets.metadata import metadata_digest

        return str(self.info.get("metadata_digest") or metadata_digest({}))

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

    @cached_property
    def metadata(self) -> dict[str, npt.NDArray[Any]]:
        """Columns that came with the samples (region, year, ...), each (N,) int64 or object holding str; often none."""
        return read_columns(self.path) if METADATA in self.manifest.files else {}

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

    def tap(self, name: str) -> "ImageStore":
        """Another output of the encoder for the same images, such as ``pre_projection``; see `featcache.store.parts`.

        It has a width and an encoder_key of its own: a head that is fitted on a tap fits that tap only.
        """
        from featcache.store.parts import Part, open_part

        return open_part(self, Part(name))

    def view(self, view: int, augmentation: str | None = None, seed: int | None = None) -> "ImageStore":
        """One augmented view of every image; augmentation and seed may be left out where there is one kind of views."""
        from featcache.store.parts import Part, open_part, the_augmentation

        return open_part(self, Part(None, *the_augmentation(self, augmentation, seed), view))

    def views(self, augmentation: str | None = None, seed: int | None = None, tap: str | None = None) -> Any:
        """All views of one kind as one store of K N rows, with `groups`; see `featcache.store.view_stack`."""
        from featcache.store.view_stack import stack_views

        return stack_views(self, augmentation, seed, tap)


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
