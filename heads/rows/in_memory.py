"""Features that are not on disk: in memory, on a CPU or a GPU, or streamed from a function.

A resident store keeps the identity of the store it was read from (keys, labels, class list, metadata), so that every
check still holds. Linear heads are evaluated where its features are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from featcache.errors import HeadError
from featcache.store.protocol import Block, FeatureSource, FeatureTable, SourceDefaults, TableDefaults, VisualProjection
from heads.rows.arrays import to_numpy
from heads.rows.hashes import content_hashes
from heads.rows.samples import Array, Ints, is_multilabel, refuse_tokens

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class ResidentStore(TableDefaults):
    """Features and labels in memory, as a store.

    Parameters
    ----------
    features : (N, D) tensor on any device; an array becomes one on the CPU
    labels : (N,) class indices
    name, split : as they appear in results rows
    encoder_key, text_digests, encoder_name, dataset_key, labels_digest
        Identity of encoder, text towers, samples and labels. Without an encoder key, heads that were fitted on a store
        refuse it. Without `dataset_key` and `row_hashes`, rows are identified by their features.
    metadata : group columns (N,)
    provenance : how the features were made
    row_hashes : (N,) uint64, equal for rows of equal content
    visual_projection : for the tap ``pre_projection``, the projection that follows it in the model

    Examples
    --------
    >>> store = ResidentStore(torch.eye(3), np.arange(3), ("ant", "bee", "cow"), name="tiny-set")
    >>> [(x.shape, y.tolist()) for x, y in store.tensor_blocks(2)]
    [(torch.Size([2, 3]), [0, 1]), (torch.Size([1, 3]), [2])]
    """

    features: torch.Tensor
    labels: Ints
    classnames: tuple[str, ...]
    name: str = "arrays"
    split: str = "all"
    encoder_key: str | None = None
    text_digests: tuple[str, ...] = ()
    encoder_name: str | None = "arrays"
    dataset_key: str | None = None
    labels_digest: str | None = None
    logit_scale: float | None = None
    logit_bias: float | None = None
    ids: Sequence[str] = field(default=(), repr=False)
    metadata: Mapping[str, Array] = field(default_factory=dict, repr=False)
    provenance: Mapping[str, object] = field(default_factory=dict, repr=False)
    row_hashes: NDArray[np.uint64] | None = field(default=None, repr=False)
    visual_projection: VisualProjection | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        features = (
            self.features if isinstance(self.features, torch.Tensor) else torch.as_tensor(to_numpy(self.features))
        )
        labels = to_numpy(self.labels)
        if features.ndim != 2 or labels.shape != (len(features),) or labels.dtype.kind not in "iu":
            raise HeadError(
                f"features are {tuple(features.shape)} and labels {labels.dtype} {labels.shape}; "
                "expected (N, D) and (N,) class indices"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classnames):
            raise HeadError(
                f"labels are in [{labels.min()}, {labels.max()}], expected [0, {len(self.classnames) - 1}]; "
                "leave out rows without a label"
            )
        object.__setattr__(self, "features", features.detach())
        object.__setattr__(self, "labels", labels.astype(np.int64))
        object.__setattr__(self, "classnames", tuple(map(str, self.classnames)))
        if self.dataset_key is None and self.row_hashes is None:
            object.__setattr__(self, "row_hashes", _hashes(features.detach()))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dim(self) -> int:
        """D, the feature width."""
        return int(self.features.shape[1])

    @property
    def text_digest(self) -> str | None:
        """The first of `text_digests`."""
        return self.text_digests[0] if self.text_digests else None

    def blocks(self, rows: int = 65_536, dtype: DTypeLike = np.float32) -> Iterator[Block]:
        """Features (n, D) on the host and labels (n,), block by block, as every image store gives them."""
        for part, labels in self.tensor_blocks(rows):
            yield to_numpy(part).astype(dtype, copy=False), labels

    def tensor_blocks(self, rows: int = 65_536) -> Iterator[tuple[torch.Tensor, Ints]]:
        """Features (n, D) on their device, as views, and labels (n,)."""
        for start in range(0, len(self), rows):
            yield self.features[start : start + rows], self.labels[start : start + rows]

    def numpy(self, dtype: DTypeLike = np.float32) -> Block:
        """Features (N, D) and labels (N,) as arrays on the host."""
        return to_numpy(self.features).astype(dtype), self.labels

    def gather(self, rows: NDArray[np.integer]) -> Array:
        """Features of the given rows, in that order, on the host."""
        return to_numpy(self.features[torch.as_tensor(rows, device=self.features.device)])


def _hashes(features: torch.Tensor) -> NDArray[np.uint64]:
    """Hash (N,) of the values of each row, a block on the host at a time."""
    parts = [content_hashes(to_numpy(block)) for block in features.split(65_536)]  # type: ignore[no-untyped-call]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def resident(store: FeatureTable, device: str | None = None, dtype: str = "float16") -> ResidentStore:
    """Read an image store's valid rows into the memory of a device.

    Parameters
    ----------
    store : image store
    device : such as "cuda"; default: cuda if available, else cpu
    dtype : {"float16", "bfloat16", "float32"}; of the features in memory; a store holds float16

    Raises
    ------
    HeadError
        For an unknown dtype, a device that cannot be used, or a store without a valid row.
    """
    if dtype not in DTYPES:
        raise HeadError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    refuse_tokens(store, "only single vectors are held in memory")
    if is_multilabel(store):
        raise HeadError(f"{store.name!r} is multi-label, which is not supported in memory; pass the store itself")
    place = _checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    keep = np.flatnonzero(store.valid)
    if not len(keep):
        raise HeadError(f"{store.name!r} has no valid row")
    features = torch.empty((len(keep), store.dim), dtype=DTYPES[dtype], device=place)
    labels, done = np.empty(len(keep), np.int64), 0
    for block, found in store.blocks():
        features[done : done + len(found)] = torch.from_numpy(np.ascontiguousarray(block)).to(place)
        labels[done : done + len(found)] = found
        done += len(found)
    ids, hashes = store.ids, store.row_hashes
    return ResidentStore(
        features,
        labels,
        store.classnames,
        name=store.name,
        split=store.split,
        encoder_key=store.encoder_key,
        text_digests=store.text_digests,
        encoder_name=store.encoder_name,
        dataset_key=store.dataset_key,
        labels_digest=store.labels_digest,
        logit_scale=store.logit_scale,
        logit_bias=store.logit_bias,
        provenance=store.provenance,
        visual_projection=store.visual_projection,
        ids=[ids[row] for row in keep.tolist()] if ids else [],
        metadata={column: values[keep] for column, values in store.metadata.items()},
        row_hashes=None if hashes is None else hashes[keep],
    )


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # the device "meta" holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises any, with long messages
        reason = str(error).partition("\n")[0]
        raise HeadError(f"device {name!r} cannot be used: {reason}; expected e.g. cuda, cuda:1 or cpu") from error
    return device


@dataclass(frozen=True, eq=False)
class RowStream(SourceDefaults):
    """Labelled rows from a function, which need not fit in memory; every head fits on it as on an image store.

    Parameters
    ----------
    source
        Function without arguments that returns, at every call, all blocks ``(X (n, D), y (n,) class indices)``: a
        generator function, not a generator, which is empty after its first pass. Blocks may share one buffer.
    name, split, encoder_key, encoder_name, text_digests
        Identity, for provenance and for checks of priors and selection splits; optional.
    row_hashes
        Those of the stores that the rows come from (``store.row_hashes``), in any order; without them only the name of
        the stream says what a head was fitted on.

    Examples
    --------
    >>> from heads import Ridge
    >>> def blocks():
    ...     rng = np.random.default_rng(0)
    ...     for _ in range(3):
    ...         y = rng.integers(0, 2, 100)
    ...         yield np.eye(2)[y] + 0.1 * rng.normal(size=(100, 2)), y
    >>> Ridge().fit(RowStream(blocks, dim=2, classnames=("cat", "dog"))).predict([[1.0, 0.0]]).tolist()
    [0]
    """

    source: Callable[[], Iterable[tuple[Array, Array]]]
    dim: int
    classnames: tuple[str, ...]
    name: str = "stream"
    split: str = "train"
    encoder_key: str | None = None
    encoder_name: str | None = None
    text_digests: tuple[str, ...] = ()
    dataset_key: str | None = None
    labels_digest: str | None = None
    provenance: Mapping[str, object] = field(default_factory=dict, repr=False)
    row_hashes: NDArray[np.uint64] | None = field(default=None, repr=False)

    def blocks(self) -> Iterator[Block]:
        """The blocks, from the first.

        Raises
        ------
        HeadError
            For a block of another width, or labels that are not class indices.
        """
        if not callable(self.source):
            raise HeadError(f"source must be a function that gives blocks, got {type(self.source).__name__}")
        for X, y in self.source():
            features, found = to_numpy(X), to_numpy(y)
            if found.dtype.kind == "f" and not np.array_equal(found, np.floor(found)):
                raise HeadError("labels are not whole numbers, expected class indices; give one index per row")
            labels = found.astype(np.int64, copy=False)
            if features.shape != (len(labels), self.dim):
                raise HeadError(f"a block has features {features.shape}, expected ({len(labels)}, {self.dim})")
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classnames):
                raise HeadError(f"labels are in [{labels.min()}, {labels.max()}], expected class indices")
            yield features, labels


_SOURCES: tuple[type[FeatureSource], ...] = (ResidentStore, RowStream)
_TABLES: tuple[type[FeatureTable], ...] = (ResidentStore,)
