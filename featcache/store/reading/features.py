"""Labelled features of images: what stores, their taps and views, and stacked views have in common."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError, MissingExtraError, StoreCorruptError
from featcache.store.columns import METADATA, SAMPLES, Columns, ids_from, metadata_digest, metadata_from
from featcache.store.layout import Array
from featcache.store.protocol import TableDefaults
from featcache.store.reading.base import Store
from featcache.store.reading.checks import remedy
from featcache.store.reading.readers import Rows
from featcache.store.reading.tokens import block_rows, tokens_remedy

Labels = npt.NDArray[np.int64]


class ImageFeatures(Store, TableDefaults):
    """Labelled features (N, D) of images under one encoder, float16 and L2-normalised; a `FeatureTable`.

    The features and blocks of a tap with P tokens per image are (N, P, D), see `tokens`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `features`: (N, D) or (N, P, D)."""
        return self.reader("features").spec.shape

    @property
    def tokens(self) -> int | None:
        """P, the number of tokens per image, which have root mean square length 1; None for features (N, D)."""
        return self.shape[1] if len(self.shape) == 3 else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | Rows) -> tuple[Array, Any]:
        """Features (D,) or (P, D) float32 and label of one row; for a slice or an array of rows, (n, D) and (n,).

        Unreadable images have NaN features and label -1. Multi-label rows have targets (L,) instead of a label.
        """
        if isinstance(rows, int | np.integer):
            ((features, label),) = self.__getitems__([int(rows)])
            return features, label
        places = np.arange(len(self))[rows]
        return self.gather(places).astype(np.float32), self.truth[places]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Array, int | Array]]:
        """Several rows at once, with which `torch.utils.data.DataLoader` fetches a batch in one read."""
        size = len(self)
        for row in rows:
            if not -size <= row < size:
                raise IndexError(f"row {row} requested; {self.reference} has rows 0 to {size - 1}")
        places = np.array(rows, np.int64) % max(1, size)
        truth = self.truth[places]
        labels: list[int] | list[Array] = list(truth) if self.multilabel else truth.tolist()
        return list(zip(self.gather(places).astype(np.float32), labels, strict=True))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """`features`, for ``np.asarray(store)`` and functions that take arrays."""
        return np.array(self.features, dtype, copy=copy)

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """All features (N, D) float32 in memory, in the order of `labels`, NaN for unreadable images.

        `numpy` omits unreadable images; `blocks` and `gather` read large stores piece by piece.
        """
        return self.reader("features").read(0, len(self), np.empty(self.shape, np.float32))

    def to_pandas(self, *, features: bool = False) -> Any:
        """A `pandas.DataFrame` of all rows: ``id``, ``label``, ``class``, ``valid`` and the metadata columns.

        For multi-label data, ``label`` and ``class`` are replaced by one column of targets per class, named like it.
        With `features`, these are added as ``f0`` to ``f<D-1>``. MissingExtraError if pandas is not installed.
        """
        from pyarrow import table

        names = np.array([*self.classnames, None], object)  # label -1 gives None
        columns: dict[str, object] = {"id": self.ids}
        if self.targets is None:
            columns |= {"label": self.labels, "class": names[self.labels]}
        else:
            columns |= dict(zip(self.classnames, self.targets.T, strict=True))
        columns |= {"valid": self.valid} | dict(self.metadata)
        if features:
            self.require_rows("to_pandas(features=True)")
            columns |= {f"f{column}": values for column, values in enumerate(self.features.T)}
        try:
            return table(columns).to_pandas()
        except ImportError as error:
            raise MissingExtraError("to_pandas needs pandas, which is not installed: pip install pandas") from error

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
        return self.manifest.encoder_key

    @property
    def dataset_key(self) -> str:
        """Key of the ordered sample ids and sizes."""
        return self.manifest.dataset_key

    @property
    def labels_digest(self) -> str:
        """Digest of labels, or targets, and class names."""
        return str(self.info["labels_digest"])

    @property
    def metadata_digest(self) -> str:
        """Digest of the metadata columns (the one of no columns for stores of the first version)."""
        return str(self.info.get("metadata_digest") or metadata_digest({}))

    @cached_property
    def labels(self) -> Labels:
        """Labels (N,), -1 for unreadable images and for every row of multi-label data.

        StoreCorruptError if they differ from their checksum or are out of range, and likewise for `targets`.
        """
        classes = len(self.classnames)
        return self._within("labels", classes - 1, f"-1 to {classes - 1} for {classes} class names")

    @property
    def multilabel(self) -> bool:
        """Whether rows may have several classes, given by `targets` instead of labels."""
        return "targets" in self.manifest.whole

    @cached_property
    def targets(self) -> npt.NDArray[np.int8] | None:
        """Targets (N, L) int8 of multi-label data: 1 if the class applies, 0 if not, -1 if unknown; else None."""
        return self._within("targets", 1, "-1, 0 and 1") if self.multilabel else None

    def _within(self, name: str, most: int, expected: str) -> Array:
        """An array with values from -1 to `most`."""
        values = self.array(name)
        if values.size and not -1 <= values.min() <= values.max() <= most:
            raise StoreCorruptError(
                f"{self.path}/{name}: {name} {values.min()} to {values.max()}, expected {expected}; {remedy(self.path)}"
            )
        return values

    @property
    def truth(self) -> Array:
        """`targets` (N, L) for multi-label data, else `labels` (N,)."""
        return self.labels if self.targets is None else self.targets

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,), False for unreadable images."""
        return self.array("valid").astype(bool)

    @cached_property
    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """First 64 bits (N,) of the xxh3-128 of each row's content; the same for taps and views of an image.

        The content is the image file, the values of an array's row, or the float32 features of an imported store.
        """
        return np.ascontiguousarray(self.array("content")[:, :8]).view("<u8")[:, 0].astype(np.uint64)

    @cached_property
    def ids(self) -> list[str]:
        """The N sample ids, in row order."""
        return ids_from(self.sidecar(SAMPLES), len(self), self.path / SAMPLES)

    @cached_property
    def metadata(self) -> Columns:
        """Metadata columns of the samples (region, year, ...), each (N,) int64 or str objects; often none."""
        if METADATA not in self.manifest.files:
            return {}
        return metadata_from(self.sidecar(METADATA), self.path / METADATA)

    def blocks(self, rows: int = 65_536, dtype: npt.DTypeLike = np.float32) -> Iterator[tuple[Array, Labels]]:
        """Features (n, D) and labels (n,), or targets (n, L), of the valid rows, block by block.

        The feature buffer is reused: a block is valid until the next is requested.
        """
        rows = block_rows(self.shape, rows)
        truth = self.truth
        buffer = np.empty((rows, *self.shape[1:]), dtype=dtype)
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            block = self.reader("features").read(start, stop, buffer[: stop - start])
            keep = self.valid[start:stop]
            yield (block, truth[start:stop]) if keep.all() else (block[keep], truth[start:stop][keep])

    def numpy(self, dtype: npt.DTypeLike = np.float32) -> tuple[Array, Labels]:
        """Features (N', D) and labels (N',), or targets (N', L), of the N' valid rows, in memory."""
        features = self.reader("features").read(0, len(self), np.empty(self.shape, dtype=dtype))
        return (features, self.truth) if self.valid.all() else (features[self.valid], self.truth[self.valid])

    def gather(self, rows: Rows) -> Array:
        """Features (n, D) float16 of the given rows, valid or not, in that order."""
        return self.reader("features").gather(rows)

    def require_rows(self, what: str) -> None:
        """FeatcacheError, starting with `what`, if the features are tokens (N, P, D)."""
        if self.tokens is not None:
            raise FeatcacheError(f"{what}: {self.reference} has {tokens_remedy(self.tokens, self.dim)}")
