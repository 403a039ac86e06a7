"""Which head belongs to which store: refusals with their remedies.

A fitted head belongs to the image encoder whose features it saw; a zero-shot head belongs to every image encoder that
is paired with its text tower. A head fitted on bare arrays carries no identity and is checked by shape alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from featcache.errors import MismatchError
from featcache.store.protocol import Encoded, FeatureSource, TextSource


def check_encoder(provenance: dict[str, Any], dim: int, store: Encoded) -> None:
    """Refuse a store of another encoder, another text tower or another width.

    Raises
    ------
    MismatchError
        With both identities and what to do.
    """
    head, name = provenance.get("head", "head"), store.name
    fitted, found = provenance.get("encoder_key"), store.encoder_key
    if fitted is not None and fitted != found:
        raise MismatchError(
            f"{head} was fitted on features of encoder {fitted}, but {name!r} holds features of {found} "
            f"({store.encoder_name}); fit the head on a store of that encoder, or encode {name!r} with the head's"
        )
    text, paired = provenance.get("text_digest"), store.text_digests
    if text is not None and text not in paired:
        raise MismatchError(
            f"{head} was made with text tower {text}, but {name!r} belongs to text tower {' or '.join(paired) or None} "
            f"({store.encoder_name}); run `featcache text` with that model and make the head from its store"
        )
    if dim != store.dim:
        raise MismatchError(
            f"{head} takes {dim} features, but {name!r} holds {store.dim}; use the store of the same encoder"
        )


def check_classes(classnames: Sequence[str], store: Encoded, head: str = "head") -> None:
    """Refuse a store whose class list differs, in names or in order.

    Raises
    ------
    MismatchError
        With the first difference; where the store's classes are a subset, naming `class_subset`.
    """
    theirs = tuple(store.classnames)
    if tuple(classnames) == theirs:
        return
    if len(theirs) < len(classnames) and set(theirs) <= set(classnames):
        remedy = "pass class_subset=heads.subset_by_name(head.classnames, store.classnames) to keep only its classes"
    else:
        remedy = "encode the data with the head's class list, or fit the head on this one"
    ours, others = set(classnames), set(theirs)
    lacking, unknown = [repr(c) for c in classnames if c not in others], [repr(c) for c in theirs if c not in ours]
    named = "".join(
        f"; only {who} has {', '.join(some[:5])}{', ...' if len(some) > 5 else ''}"
        for who, some in ((head, lacking), (repr(store.name), unknown))
        if some
    )
    at = next((i for i, (a, b) in enumerate(zip(classnames, theirs, strict=False)) if a != b), None)
    where = "" if at is None else f"; the first difference is class {at}: {classnames[at]!r} against {theirs[at]!r}"
    raise MismatchError(
        f"{head} has {len(classnames)} classes and {store.name!r} has {len(theirs)}, and they differ{where}{named}; "
        f"{remedy}"
    )


def subset_by_name(classnames: Sequence[str], subset: Sequence[str]) -> list[int]:
    """Index in `classnames` of each name of `subset`, in the subset's order.

    Raises
    ------
    MismatchError
        For a name that is missing, or that occurs twice (ImageNet has two "missile", two "sunglasses"): give
        indices.

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
            f"cannot place class names by name: missing {missing[:10]}, ambiguous {twice[:10]}; "
            "give class indices instead"
        )
    return [places[name][0] for name in subset]


def encoder_record(store: FeatureSource | TextSource | None) -> dict[str, Any] | None:
    """Name of a store's encoder and, where the store knows, how to load it again; None for arrays."""
    if store is None:
        return None
    return {"name": store.encoder_name, "source": store.provenance.get("source")}


def split_id(store: FeatureSource) -> dict[str, Any]:
    """The identity of a labelled split, as recorded in provenance; of a few-shot sample also how it was drawn."""
    identity: dict[str, Any] = {
        "name": store.name,
        "split": store.split,
        "dataset_key": store.dataset_key,
        "labels_digest": store.labels_digest,
    }
    if store.view_id is not None:  # augmented views of the split's samples: the same split, but other rows
        identity["view"] = store.view_id
    return identity if store.sample is None else {**identity, "sample": dict(store.sample)}


def same_split(entry: Mapping[str, Any], store: FeatureSource) -> bool:
    """Whether a record of `split_id` means this store's split, whatever became of its labels."""
    identity = split_id(store)
    return all(entry.get(key) == identity[key] for key in ("name", "split", "dataset_key"))


def was_fitted_on(provenance: Mapping[str, Any], store: FeatureSource) -> bool:
    """Whether a head with this record, or one that it was made from, was fitted on this store's split.

    Examples
    --------
    >>> from heads import RowStream
    >>> stream = RowStream(list, dim=2, classnames=("cat", "dog"), name="rows", split="val")
    >>> texts = {"name": "texts", "split": None, "dataset_key": None}   # what a zero-shot head is made of
    >>> was_fitted_on({"fitted_on": [texts]}, stream), was_fitted_on({"fitted_on": [split_id(stream)]}, stream)
    (False, True)
    """
    return any(same_split(entry, store) for entry in provenance.get("fitted_on", []))


def merged(*lists: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of all lists, each once, in order.

    Examples
    --------
    >>> merged([{"name": "a"}], [{"name": "b"}, {"name": "a"}])
    [{'name': 'a'}, {'name': 'b'}]
    """
    found: list[dict[str, Any]] = []
    for entry in (dict(entry) for entries in lists for entry in entries):
        if entry not in found:
            found.append(entry)
    return found


def with_splits_of(record: Mapping[str, Any], parent: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance that adds what the head it begins from was fitted on, last, and chosen on, first."""
    return {
        **record,
        "fitted_on": merged(record["fitted_on"], parent.get("fitted_on", [])),
        "chosen_on": merged(parent.get("chosen_on", []), record["chosen_on"]),
    }
