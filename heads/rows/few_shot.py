"""k-shot samples with fixed seeds: rows drawn per class without replacement, as a store that heads fit from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from featcache.errors import HeadError
from featcache.store.protocol import Block, Derived, FeatureTable, of_origin
from featcache.store.reading.tokens import block_rows, feature_shape
from heads.rows.arrays import to_numpy
from heads.rows.samples import Array, Ints


def draw_shots(
    labels: ArrayLike, shots: int, seed: int = 0, *, n_classes: int | None = None, allow_fewer: bool = False
) -> Ints:
    """Rows (k C,) of `shots` samples of every class, without replacement, class after class.

    Each class is shuffled by its own generator, seeded by (seed, class), and the first `shots` are taken. So the draw
    of a class does not depend on the other classes, and draws of one seed are nested: those of 4 shots are among those
    of 8.

    HeadError if classes have fewer rows than `shots` (naming some), or `shots` is below 1.

    Parameters
    ----------
    labels
        (N,) class indices; negative ones (invalid rows) are never drawn. Or targets (N, L) of multi-label rows: of each
        class, `shots` rows that it applies to, so that it may have more; rows are ascending, each once.
    shots : rows per class, k
    seed : equal seeds draw equal rows, on every machine
    n_classes : C; None is the largest label plus one
    allow_fewer : take all rows of classes with fewer; classes without rows stay out

    >>> labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    >>> two = draw_shots(labels, 2, seed=3)
    >>> labels[two].tolist(), set(draw_shots(labels, 1, seed=3)) <= set(two)
    ([0, 0, 1, 1], True)
    """
    classes = to_numpy(labels)
    if classes.ndim not in (1, 2) or classes.dtype.kind not in "iu":
        raise HeadError(f"labels are {classes.shape} {classes.dtype}, expected class indices (N,) or targets (N, L)")
    if shots < 1 or seed < 0:
        raise HeadError(f"shots {shots} and seed {seed}; expected at least 1 shot and a seed from 0")
    if classes.ndim == 2:
        members = [np.flatnonzero(column == 1) for column in classes.T]
    else:
        n_classes = int(classes.max(initial=-1)) + 1 if n_classes is None else n_classes
        ends = np.bincount(classes[classes >= 0], minlength=n_classes).cumsum()
        order = np.argsort(classes, kind="stable")[(classes < 0).sum() :]
        members = np.split(order, ends[:-1]) if len(ends) else []
    counts = np.array([len(rows) for rows in members], np.int64)
    few = np.flatnonzero(counts < shots)
    if len(few) and not allow_fewer:
        shown = ", ".join(f"class {c} has {counts[c]}" for c in few[:5].tolist())
        raise HeadError(
            f"{len(few)} of {len(counts)} classes have fewer than {shots} rows ({shown}); ask for fewer shots, or pass "
            "allow_fewer=True to take all rows of these"
        )
    drawn = [rows[np.random.default_rng([seed, c]).permutation(len(rows))[:shots]] for c, rows in enumerate(members)]
    rows = np.concatenate([np.zeros(0, np.int64), *drawn]).astype(np.int64)
    return np.unique(rows) if classes.ndim == 2 else rows


@dataclass(frozen=True)
class FewShotStore(Derived):
    """Some rows of an image store, as a store.

    It keeps the store's identity (name, split, keys): a head fitted on a few rows of a split was fitted on that split.
    Provenance adds `sample`.

    Attributes
    ----------
    store : the image store
    rows : (n,) its rows, all valid
    sample : how they were drawn: shots and seed; also their number, `rows`, where classes had fewer than the shots
    grouped_by : metadata column whose values must not be split between fitting and evaluation; see `grouped`
    """

    store: FeatureTable
    rows: Ints
    sample: Mapping[str, object] | None = None
    grouped_by: str | None = None

    view_id = of_origin("view_id")
    visual_projection = of_origin("visual_projection")
    tokens = of_origin("tokens")

    @property
    def origin(self) -> FeatureTable:
        """The image store."""
        return self.store

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Ints:
        """Labels (n,)."""
        return self.store.labels[self.rows]

    @property
    def targets(self) -> NDArray[np.int8] | None:
        """Targets (n, L) of multi-label data, else None."""
        targets = self.store.targets
        return None if targets is None else targets[self.rows]

    @property
    def ids(self) -> list[str]:
        """The n sample ids."""
        ids = self.store.ids
        return [ids[row] for row in self.rows.tolist()] if ids else []

    @property
    def row_hashes(self) -> NDArray[np.uint64] | None:
        """Content hashes (n,), or None if the store has none."""
        hashes = self.store.row_hashes
        return None if hashes is None else hashes[self.rows]

    @property
    def metadata(self) -> dict[str, Array]:
        """Group columns (n,)."""
        return {column: values[self.rows] for column, values in self.store.metadata.items()}

    @property
    def groups(self) -> Ints | None:
        """Group of each row (n,), or None."""
        if self.grouped_by is None:
            return None
        return np.unique(self.metadata[self.grouped_by].astype(str), return_inverse=True)[1]

    def blocks(self, rows: int = 65_536, dtype: DTypeLike = np.float32) -> Iterator[Block]:
        """Features (n, D) and labels (n,), or targets (n, L), block by block."""
        rows = block_rows((len(self.rows), *feature_shape(self)), rows)
        truth = self.labels if self.targets is None else self.targets
        for start in range(0, len(self.rows), rows):
            part = slice(start, start + rows)
            yield self.store.gather(self.rows[part]).astype(dtype, copy=False), truth[part]

    def numpy(self, dtype: DTypeLike = np.float32) -> Block:
        """Features (n, D) and labels (n,), or targets (n, L), in memory."""
        truth = self.labels if self.targets is None else self.targets
        return self.gather(np.arange(len(self.rows))).astype(dtype, copy=False), truth

    def gather(self, rows: NDArray[np.integer]) -> Array:
        """Features of some of these rows, in the order given."""
        return self.store.gather(self.rows[rows])


def few_shot(store: FeatureTable, shots: int, seed: int = 0, *, allow_fewer: bool = False) -> FewShotStore:
    """A store of `shots` rows of every class of an image store; see `draw_shots`.

    Raises
    ------
    HeadError
        As `draw_shots`; if no row is left; for stacked views, since shots are images.
    """
    if store.groups is not None:
        raise HeadError(f"{store.name!r}: rows are views, and shots are images; draw from the store itself")
    truth = store.labels if store.targets is None else store.targets
    rows = draw_shots(truth, shots, seed, n_classes=len(store.classnames), allow_fewer=allow_fewer)
    if not len(rows):
        raise HeadError(f"{store.name!r} has no valid row to draw from")
    fewer = {"rows": len(rows)} if len(rows) < shots * len(store.classnames) else {}
    return FewShotStore(store, rows, {"shots": int(shots), "seed": int(seed), **fewer})


def grouped(store: FeatureTable, column: str) -> FewShotStore:
    """A store whose rows belong together if a metadata column has equal values: images of a patient, frames of a video.

    Heads that hold out training rows hold out whole groups, or refuse to choose without a selection split. If one row
    of a group is trained on, `heads.evaluate`, `heads.choose` and selection splits count the whole group as seen.

    Raises
    ------
    HeadError
        If the store lacks the column, or its rows are views.

    Examples
    --------
    >>> from heads import ResidentStore
    >>> patients = {"patient": np.array(["p2", "p1", "p2"])}
    >>> grouped(ResidentStore(np.eye(3), np.array([0, 1, 1]), ("cat", "dog"), metadata=patients), "patient").groups
    array([1, 0, 1])
    """
    if column not in store.metadata:
        known = f"it has {', '.join(store.metadata)}" if store.metadata else "it has none"
        raise HeadError(f"{store.name}/{store.split} has no metadata column {column!r}; {known}")
    if store.groups is not None:
        raise HeadError(f"{store.name!r}: rows are views, which are grouped by image; group the store itself")
    return FewShotStore(store, np.flatnonzero(store.valid), store.sample, column)
