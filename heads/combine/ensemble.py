"""Weighted sums of linear heads: several models, prompts or probes as one head, with weights in closed form.

Logits of one model add up as its weights do (`blend`); logits of several models add up on their features side by side
(`ensemble`, for `heads.join`). Either way the result is an ordinary `LinearHead`: evaluation, interpolation, files and
predictions need nothing new. If a member had no training row of a class, its logits of that class are filled in from
the other members (`heads.fitted.missing_classes`).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from featcache import __version__
from featcache.errors import HeadError, MismatchError
from featcache.store.protocol import Block, FeatureSource
from heads.evaluation.seen import refuse_seen
from heads.fitted.base import Fitted, LogitHead
from heads.fitted.linear import LinearHead, as_linear, check_same_classes
from heads.fitted.missing_classes import ABSENT, absences, known_by_others
from heads.fitted.provenance import ROLES, Provenance, merged
from heads.rows.joint import joint_key
from heads.rows.samples import Float, Float32, Ints, Mask, is_store
from heads.rows.selection import RowSampler
from heads.solvers.temperature import fit_temperature


def blend(
    heads: Sequence[LogitHead | Fitted], weights: Sequence[float] | None = None, *, name: str = "blend"
) -> LinearHead:
    """One head whose logits are ``sum_m w_m logits_m`` of M linear heads on the same features.

    Parameters
    ----------
    heads : M fitted linear heads of one encoder and class list
    weights : (M,); None is 1/M each

    Raises
    ------
    MismatchError
        If class lists, widths, encoders or text towers differ.
    HeadError
        For weights that do not fit.

    Examples
    --------
    >>> names = ("cat", "dog")
    >>> a, b = LinearHead(np.eye(2), np.zeros(2), names), LinearHead(3 * np.eye(2), np.ones(2), names)
    >>> blend([a, b]).weights.tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    members = [as_linear(head) for head in heads]
    shares = _shares(weights, members)
    return _blended(members, shares, name, shares)


def _blended(members: Sequence[LinearHead], shares: Float, name: str, votes: Float | None) -> LinearHead:
    keys = {key: _one(members, key) for key in ("encoder_key", "text_digest")}
    if len({head.dim for head in members}) != 1:
        raise MismatchError(f"heads of {[head.dim for head in members]} features; blend heads of one encoder")
    return _made([head.weights for head in members], members, shares, name, keys, votes)


def ensemble(
    heads: Sequence[LogitHead | Fitted], weights: Sequence[float] | None = None, *, name: str = "ensemble"
) -> LinearHead:
    """One head whose logits are ``sum_m w_m logits_m`` of M linear heads, each on the features of its own encoder.

    It takes the features of `heads.join` of stores in the same order.

    Parameters
    ----------
    heads : M fitted linear heads of one class list: all zero-shot (bound to text towers), or all fitted on images
    weights : (M,); None is 1/M each

    Raises
    ------
    MismatchError
        If class lists differ.
    HeadError
        For weights that do not fit, or members of which only some are bound to an image encoder.
    """
    members = [as_linear(head) for head in heads]
    shares = _shares(weights, members)
    return _side_by_side(members, shares, name, shares)


def _side_by_side(members: Sequence[LinearHead], shares: Float, name: str, votes: Float | None) -> LinearHead:
    encoders = [head.provenance.encoder_key for head in members]
    if None in encoders and any(encoders):
        raise HeadError(
            f"only some of {', '.join(head.name for head in members)} were fitted on images; an ensemble is bound to "
            "the encoders of all members, or to their text towers: make all zero-shot, or fit all"
        )
    towers = [head.provenance.text_digest for head in members]
    keys = {"encoder_key": joint_key(encoders), "text_digest": joint_key(towers)}
    ends = np.cumsum([0, *(head.dim for head in members)])
    wide = [np.zeros((len(head.weights), ends[-1]), np.float32) for head in members]
    for weights, head, start in zip(wide, members, ends[:-1], strict=True):
        weights[:, start : start + head.dim] = head.weights
    return _made(wide, members, shares, name, keys, votes)


def stack(
    heads: Sequence[LogitHead | Fitted], selection: FeatureSource | Sequence[FeatureSource], *, name: str | None = None
) -> LinearHead:
    """The `blend` or `ensemble` with weights in closed form and a temperature, both from a selection split.

    The weights are ``argmin_{w >= 0} || Y - sum_m w_m L_m ||^2`` over rows, with L_m the logits (N, C) of head m and Y
    the one-hot labels, both minus their mean over classes (which a softmax ignores): non-negative least squares from
    M x M moments, in one pass over the split (stacked regression, Breiman 1996). The temperature is that of maximum
    likelihood. Classes without a training row in any head are left out, with their rows.

    Parameters
    ----------
    heads : M fitted linear heads, none of them fitted on the selection split
    selection : a store for heads of one encoder, or a list of M stores of the same samples, one per head

    Raises
    ------
    HeadError
        If a head was fitted on the selection split, or no head gets a positive weight.
    """
    members = [as_linear(head) for head in heads]
    if is_store(selection):
        stores, combine = [selection] * len(members), _blended
    else:
        stores, combine = list(selection), _side_by_side
    if len(stores) != len(members):
        raise HeadError(f"{len(members)} heads and {len(stores)} stores; give one store, or one per head")
    _shares(None, members)
    for head, store in zip(members, stores, strict=True):
        head.check(store)
        if head.provenance.was_fitted_on(store):
            raise HeadError(f"{head.name} was fitted on {store.name}/{store.split}; stack on a split that fitted none")
        refuse_seen(head, store, ROLES[:1])
    gram, target, kept = _moments(members, stores)
    weights, _ = nnls(gram, target)
    if not weights.any():
        raise HeadError(
            f"no head tells the classes of {stores[0].name}/{stores[0].split} apart; check labels and order"
        )
    logits = np.einsum("m,mnc->nc", weights, kept[0])
    stacked = combine(members, weights, name or "stack", None).with_temperature(fit_temperature(logits, kept[1]))
    record = stacked.provenance.chosen(stores[0], metric="squared error", candidates=len(members))
    return stacked.with_provenance(record)


def _moments(members: Sequence[LinearHead], stores: Sequence[FeatureSource]) -> tuple[Float, Float, tuple[Float, Ints]]:
    """A square root R (M, M) of the logits' moments, the matching right-hand side, a sample of logits and labels."""
    m, absent = len(members), absences(members)
    known = np.asarray(~absent.all(axis=0))
    gram, cross = np.zeros((m, m)), np.zeros(m)
    rows = stores[0].n_rows  # None for a stream, which is counted
    bound = sum(len(labels) for _, labels in stores[0].blocks()) if rows is None else rows
    keep, kept = RowSampler(bound, int(known.sum())), []
    for parts in zip(*(_pieces(store) for store in stores), strict=True):
        ours = known[parts[0][1]]
        labels = (np.cumsum(known) - 1)[parts[0][1][ours]]
        logits = _centred([head.logits(x[ours]) for head, (x, _) in zip(members, parts, strict=True)], absent)
        gram += np.einsum("anc,bnc->ab", logits, logits, optimize=True)
        cross += logits[:, np.arange(len(labels)), labels].sum(axis=1)
        some = keep(len(labels))
        kept.append((logits[:, some], np.asarray(labels[some], np.int64)))
    values, vectors = np.linalg.eigh(gram)
    sound = values > values.max(initial=0.0) * 1e-12
    root = np.sqrt(values[sound])
    factor, right = root[:, None] * vectors[:, sound].T, (vectors[:, sound].T @ cross) / root
    return factor, right, (np.concatenate([one for one, _ in kept], axis=1), np.concatenate([y for _, y in kept]))


def _centred(logits: Sequence[Float32], absent: Mask) -> Float:
    """Logits (M, n, C') of each head over the classes that any head knows, less their mean over these."""
    found = np.stack([one.astype(np.float64) for one in logits])
    if absent.any():
        filled = known_by_others(found.transpose(0, 2, 1), absent)
        found = filled.transpose(0, 2, 1)[:, :, ~absent.all(axis=0)]
    found -= found.mean(axis=2, keepdims=True)
    return found


def _pieces(store: FeatureSource, rows: int = 2048) -> Iterator[Block]:
    """Blocks small enough that logits of many heads fit."""
    for features, labels in store.blocks():
        for start in range(0, len(labels), rows):
            yield features[start : start + rows], labels[start : start + rows]


def _shares(weights: Sequence[float] | None, members: Sequence[LinearHead]) -> Float:
    if not members:
        raise HeadError("got no heads; give at least one")
    shares = np.full(len(members), 1.0 / len(members)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(members),) or not np.isfinite(shares).all():
        raise HeadError(f"weights must be {len(members)} finite numbers, one per head, got {weights!r}")
    for other in members[1:]:
        check_same_classes(members[0], other)
    return shares


def _one(members: Sequence[LinearHead], key: str) -> str | None:
    """The encoder or text tower that members are bound to; MismatchError if there are several."""
    found = list(dict.fromkeys(str(head.provenance[key]) for head in members if head.provenance.get(key)))
    if len(found) > 1:
        raise MismatchError(f"heads belong to {key} {' and '.join(found)}; `heads.ensemble` takes heads of many models")
    return found[0] if found else None


def _made(
    weights: Sequence[Float32],
    members: Sequence[LinearHead],
    shares: Float,
    name: str,
    keys: Mapping[str, str | None],
    votes: Float | None,
) -> LinearHead:
    """The weighted sum of members with `weights` (C, D) on the same features; see `known_by_others` for `votes`."""
    pairs = zip(weights, members, strict=True)
    tables = [np.column_stack([rows, head.bias]).astype(np.float64) for rows, head in pairs]
    absent = absences(members)
    filled = known_by_others(np.stack(tables), absent, votes) if absent.any() else tables
    total = np.asarray(sum(w * table for w, table in zip(shares, filled, strict=True)))
    nowhere = np.flatnonzero(absent.all(axis=0))
    total[nowhere, :-1], total[nowhere, -1] = 0.0, ABSENT
    records = [head.provenance for head in members]
    known = [record.encoder for record in records if record.encoder]
    provenance = Provenance(
        head=name,
        params={
            "weights": shares.tolist(),
            "members": [{"head": head.name, **head.provenance.params} for head in members],
        },
        encoder=known[0] if known and all(encoder == known[0] for encoder in known) else None,
        classnames=list(members[0].classnames),
        fitted_on=merged(*(record.fitted_on for record in records)),
        chosen_on=merged(*(record.chosen_on for record in records)),
        featcache=__version__,
        **keys,
    )
    with np.errstate(over="ignore"):  # a head refuses weights that are not finite
        narrow = total.astype(np.float32)
    return LinearHead(
        narrow[:, :-1],
        narrow[:, -1],
        members[0].classnames,
        name=name,
        provenance=provenance,
        absent=tuple(nowhere.tolist()),
        classes=next((head.classes for head in members if head.classes is not None), None),
    )
