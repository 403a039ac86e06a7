"""Provenance of fitted heads, and the checks that a head and a store match.

A head fitted on images matches stores of their encoder; a zero-shot head matches every image encoder that is paired
with its text tower. For a head fitted on arrays only the shape is checked.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from featcache import __version__
from featcache.errors import MismatchError
from featcache.parameters import check_record
from featcache.store.key import Json as Json
from featcache.store.protocol import Encoded, FeatureSource, FeatureTable, TextSource
from heads.rows.class_lists import class_difference
from heads.rows.hashes import Hashes, are_in, column_of, group_hashes, hash_set
from heads.rows.samples import Mask, is_multilabel, is_table

ROLES = ("fitted_on", "chosen_on")
"""Keys of a `Provenance` that list splits."""

_KINDS: dict[str, object] = {
    "head": str | None,
    "params": Json | None,
    "encoder_key": str | None,
    "text_digest": str | None,
    "encoder": Json | None,
    "classnames": list[str] | None,
    "fitted_on": list[object] | None,
    "chosen_on": list[object] | None,
    "featcache": str | None,
}
"""Types of the known keys of a `Provenance`."""
_EMPTY: dict[str, Callable[[], object]] = {"params": Json, "fitted_on": list, "chosen_on": list}


class SplitRecord(Json):
    """Record of a split (see `split_id`), with the hashes of its rows.

    Attributes
    ----------
    rows
        Ascending hashes of the rows and, if a fit held out groups of a metadata column (``grouped_by``), of the groups.
        None if unknown: for arrays, streams without hashes, and heads of earlier versions.

    >>> SplitRecord({"name": "pets", "split": "train"}, np.array([3, 8], np.uint64))
    {'name': 'pets', 'split': 'train'}
    """

    def __init__(self, record: Json, rows: Hashes | None = None) -> None:
        super().__init__(record)
        self.rows = rows

    def holds(self, store: FeatureTable) -> Mask:
        """Mask (N,) of the valid rows of a store that belong to this split, or to one of its groups."""
        if self.rows is None:
            return np.zeros(len(store), bool)
        found = np.zeros(len(store), bool) if store.row_hashes is None else are_in(store.row_hashes, self.rows)
        column = str(self.get("grouped_by"))
        if "grouped_by" in self and column in store.metadata:
            found |= are_in(group_hashes(column, store.metadata[column]), self.rows)
        return found & store.valid


class Provenance(Json):
    """Record of a fit, as stored in the head's file: a JSON object whose known keys are also attributes.

    Methods return new records. Missing keys (of a head made by hand, or an older file) read as None or empty.

    >>> record = Provenance(head="ridge", params={"alpha": 1.0})
    >>> record.params, record.fitted_on, record["params"]
    ({'alpha': 1.0}, [], {'alpha': 1.0})
    >>> record.with_params(folds=5)
    {'head': 'ridge', 'params': {'alpha': 1.0, 'folds': 5}}
    """

    head: str | None
    """Kind of head."""
    params: Json
    """Hyper-parameters, and how they were chosen."""
    encoder_key: str | None
    """Image encoder that the head belongs to."""
    text_digest: str | None
    """Text tower that the head belongs to."""
    encoder: Json | None
    """Name of the encoder and how to load it; see `encoder_record`."""
    fitted_on: list[Json]
    """Splits that the head, or one of its parents, was fitted on; see `split_id`."""
    chosen_on: list[Json]
    """Splits on which the head, or one of its parents, was chosen."""
    featcache: str | None
    """Version of featcache that wrote the record."""

    @classmethod
    def of_fit(
        cls,
        head: str,
        params: Json,
        classnames: Sequence[str],
        fitted: FeatureSource | None,
        chosen: FeatureSource | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Record of a fit on one source and a choice of hyper-parameters on another; None for arrays.

        `groups` are the groups of the valid rows, if the fit held them out as a whole.
        """
        return cls(
            head=head,
            params=params,
            encoder_key=None if fitted is None else fitted.encoder_key,
            text_digest=None,
            encoder=None if fitted is None else encoder_record(fitted),
            classnames=list(classnames),
            fitted_on=[] if fitted is None else [split_id(fitted, groups)],
            chosen_on=[] if chosen is None else [split_id(chosen)],
            featcache=__version__,
        )

    @classmethod
    def checked(cls, record: object, where: str) -> Self:
        """A record read from a file; ValueError if a known key has the wrong type."""
        known = check_record(record, _KINDS, where)
        for key in ROLES:
            for entry in known.get(key) or ():
                check_record(entry, {"name": str | None, "split": str | None}, f"{where}: {key}")
        encoder = known.get("encoder") or {}
        source = check_record(encoder, {"name": str | None}, f"{where}: encoder").get("source")
        if source is not None:
            text = str | None
            kinds = {"model": str, "pretrained": text, "precision": text, "preprocess": text}
            check_record(source, kinds, f"{where}: encoder", ("model", "pretrained"))
        return cls(known)

    def __getattr__(self, name: str) -> Any:
        if name not in _KINDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.get(name) or _EMPTY.get(name, lambda: None)()

    def but(self, **changes: object) -> Self:
        """The record with some keys replaced."""
        return type(self)(self, **changes)

    def with_params(self, **params: object) -> Self:
        """The record with parameters added or replaced."""
        return self.but(params={**self.params, **params})

    def chosen(self, source: FeatureSource, **how: object) -> Self:
        """The record of a head chosen on one more split."""
        record = split_id(source)
        return self.but(chosen_on=[*self.chosen_on, SplitRecord({**record, **how}, record.rows)])

    def cooled(self, temperature: float) -> Self:
        """The record of the head after dividing its logits by a temperature."""
        return self.with_params(temperature_after=float(temperature) * self.params.get("temperature_after", 1.0))

    def begun_from(self, parent: Self) -> Self:
        """The record with the splits of `parent` added: its `fitted_on` last, its `chosen_on` first."""
        return self.but(
            fitted_on=merged(self.fitted_on, parent.fitted_on), chosen_on=merged(parent.chosen_on, self.chosen_on)
        )

    def was_fitted_on(self, source: FeatureSource) -> bool:
        """Whether the head, or one of its parents, was fitted on this split.

        >>> from heads import RowStream
        >>> stream = RowStream(list, dim=2, classnames=("cat", "dog"), name="rows", split="val")
        >>> texts = {"name": "texts", "split": None, "dataset_key": None}   # of a zero-shot head
        >>> Provenance(fitted_on=[texts]).was_fitted_on(stream)
        False
        >>> Provenance(fitted_on=[texts, split_id(stream)]).was_fitted_on(stream)
        True
        """
        return any(same_split(entry, source) for entry in self.fitted_on)

    def was_chosen_on(self, source: FeatureSource) -> bool:
        """Whether the head, or one of its parents, was chosen on this split."""
        return any(same_split(entry, source) for entry in self.chosen_on)


def check_encoder(head: str, provenance: Provenance, dim: int, store: Encoded) -> None:
    """Refuse a store of another encoder, another text tower or another width.

    MismatchError with both identities and what to do.
    """
    fitted, text = provenance.encoder_key, provenance.text_digest
    if fitted is not None and fitted != store.encoder_key:
        raise MismatchError(
            f"{head} was fitted on features of encoder {fitted}, but {store.name!r} holds features of "
            f"{store.encoder_key} ({store.encoder_name}); fit the head on a store of that encoder, or encode "
            f"{store.name!r} with the head's"
        )
    if text is not None:
        check_text_tower(head, text, store)
    if dim != store.dim:
        raise MismatchError(
            f"{head} takes {dim} features, but {store.name!r} holds {store.dim}; use the store of the same encoder"
        )


def check_text_tower(name: str, text_digest: str | None, store: Encoded) -> None:
    """Refuse a store that does not belong to a text tower, that of a head or of a text store; MismatchError."""
    if text_digest not in store.text_digests:
        raise MismatchError(
            f"{name} belongs to text tower {text_digest}, but {store.name!r} to text tower "
            f"{' or '.join(store.text_digests) or None} ({store.encoder_name}); run `featcache text` with that model, "
            "and use its store"
        )


def check_labelling(head: str, store: Encoded, *, multilabel: bool) -> None:
    """Refuse a multi-label store for a single-label head, and vice versa. MismatchError saying which is which."""
    theirs = is_multilabel(store)
    if theirs == multilabel:
        return
    takes, has, remedy = (
        ("takes one label per row", "is multi-label", "fit a multilabel head (such as multilabel_logistic)")
        if theirs
        else ("is multi-label", "has one label per row", "fit a head of one label per row (such as logistic)")
    )
    raise MismatchError(f"{head} {takes}, but {store.name!r} {has}; {remedy} for this store")


def check_classes(classnames: Sequence[str], store: Encoded, head: str = "head") -> None:
    """Refuse a store whose class list differs in names or order.

    MismatchError with the first difference; suggests `class_subset` if the store's classes are a subset.
    """
    theirs = tuple(store.classnames)
    if tuple(classnames) == theirs:
        return
    if len(theirs) < len(classnames) and set(theirs) <= set(classnames):
        remedy = (
            f"keep only its classes with --class-subset {store.name}=NAME, a named subset or a file of class names (in "
            "Python, class_subset=heads.subset_by_name(head.classnames, store.classnames))"
        )
    else:
        remedy = (
            "encode the data with the head's class list (SOURCE,classes=LIST --update-labels keeps the features), or "
            "fit the head on this one"
        )
    raise MismatchError(f"{class_difference(classnames, theirs, head, repr(store.name))}; {remedy}")


def subset_by_name(classnames: Sequence[str], subset: Sequence[str]) -> list[int]:
    """Index in `classnames` of each name of `subset`, in the subset's order.

    Raises
    ------
    MismatchError
        For a name that is missing or occurs twice (ImageNet has two "missile", two "sunglasses"): use indices.

    Examples
    --------
    >>> subset_by_name(["cat", "dog", "emu"], ["emu", "cat"])
    [2, 0]
    """
    places: dict[str, list[int]] = {}
    for index, name in enumerate(classnames):
        places.setdefault(name, []).append(index)
    missing = [name for name in subset if name not in places]
    twice = [name for name in subset if len(places.get(name, ())) > 1]
    if missing or twice:
        raise MismatchError(
            f"cannot look up classes by name: missing {missing[:10]}, ambiguous {twice[:10]}; "
            "give class indices instead"
        )
    return [places[name][0] for name in subset]


def encoder_record(store: FeatureSource | TextSource) -> Json:
    """Name of a store's encoder and, if known, how to load it."""
    return {"name": store.encoder_name, "source": store.provenance.get("source")}


def split_id(store: FeatureSource, groups: ArrayLike | None = None) -> SplitRecord:
    """Identity of a labelled split as recorded in provenance; for a few-shot sample, also how it was drawn.

    If `groups` of the valid rows are a metadata column of the store, its name and its hashes are recorded, too.
    """
    identity = Json(name=store.name, split=store.split)
    identity |= {"dataset_key": store.dataset_key, "labels_digest": store.labels_digest}
    if store.view_id is not None:  # augmented views of the split's samples: the same split, but other rows
        identity["view"] = store.view_id
    if store.sample is not None:
        identity["sample"] = dict(store.sample)
    rows, column = hash_set(store), column_of(store, groups)
    if column is not None and is_table(store):
        identity["grouped_by"] = column
        known = group_hashes(column, store.metadata[column])
        rows = np.unique(known if rows is None else np.concatenate([rows, known]))
    return SplitRecord(identity, rows)


def rows_of(entry: Json) -> Hashes | None:
    """Hashes of the rows of a recorded split; None if unknown."""
    return entry.rows if isinstance(entry, SplitRecord) else None


def same_split(entry: Json, store: FeatureSource) -> bool:
    """Whether a record of `split_id` refers to this store's split, even if it was relabelled or renamed since.

    Without a data set key, names are compared, and row hashes if known: one split must contain all rows of the other.
    """
    if store.dataset_key is not None and entry.get("dataset_key") is not None:
        return bool(entry["dataset_key"] == store.dataset_key)
    known = store.name, store.split, store.dataset_key
    if known != (entry.get("name"), entry.get("split"), entry.get("dataset_key")):
        return False
    theirs, ours = rows_of(entry), hash_set(store)
    if theirs is None or ours is None:
        return True
    return len(np.intersect1d(theirs, ours, assume_unique=True)) == min(len(theirs), len(ours))


def merged(*lists: Iterable[Json]) -> list[Json]:
    """The entries of all lists in order, without duplicates.

    >>> merged([{"name": "a"}], [{"name": "b"}, {"name": "a"}])
    [{'name': 'a'}, {'name': 'b'}]
    """
    found: list[Json] = []
    for entry in chain(*lists):
        rows = rows_of(entry)
        if entry not in found:
            found.append(SplitRecord(entry, rows))
            continue
        place = found.index(entry)
        others = rows_of(found[place])
        if rows is not None and others is not None and rows is not others:
            rows = np.union1d(rows, others)
        found[place] = SplitRecord(entry, others if rows is None else rows)
    return found
