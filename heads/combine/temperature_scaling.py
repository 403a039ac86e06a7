"""`calibrate`: temperature scaling of a fitted head on a selection split."""

import numpy as np

from featcache.errors import HeadError
from heads.evaluation.seen import refuse_seen
from heads.fitted.base import Fitted, LogitHead, as_head
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import ROLES
from heads.rows.samples import Samples, Selection, is_store
from heads.rows.selection import selection_samples, thinned
from heads.solvers.temperature import fit_temperature


def calibrate(head: LogitHead | Fitted, selection: Selection) -> LogitHead:
    """The head with its logits divided by the temperature of maximum likelihood on a selection split.

    Predictions do not change, probabilities become calibrated: CLIP's own logit scale is too sharp or too flat for most
    data sets, and the temperature of a ridge head is that of its training rows. See `heads.fit_temperature`.

    Parameters
    ----------
    head : fitted head, linear or not
    selection
        Store, or ``(X, y)`` with labels as the head predicts them. Rows of classes that the head never saw are left
        out. The split is recorded in ``chosen_on``, so that `heads.evaluate` does not report on it.

    Raises
    ------
    MismatchError
        If the head and the split differ in encoder, text tower or class list.
    HeadError
        If the head was fitted on the split, or no row is left.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> head = LinearHead(30 * np.eye(3), np.zeros(3), ("ant", "bee", "cow"))   # logits three times too large
    >>> X = rng.normal(size=(4000, 3)) / 5
    >>> y = (10 * X + rng.gumbel(size=X.shape)).argmax(axis=1)
    >>> round(calibrate(head, (X, y)).provenance["params"]["temperature_after"], 1)
    3.0
    """
    frozen = as_head(head)
    if frozen.multilabel:
        raise HeadError(f"{frozen.name} is multi-label; calibrate takes heads of one label per row")
    held_out = _rows_of(frozen, selection)
    known = np.ones(len(frozen.classnames), bool)
    if isinstance(frozen, LinearHead):
        known[list(frozen.absent)] = False
    places = np.cumsum(known) - 1
    pairs = []
    for features, labels in thinned(held_out):
        rows = known[labels]
        pairs.append((frozen.logits(features[rows])[:, known], places[labels[rows]]))
    scores, own = (np.concatenate(column) for column in zip(*pairs, strict=True))
    if not len(own):
        raise HeadError(f"{frozen.name}: the selection split has no row of a class that it knows; take another split")
    calibrated = frozen.with_temperature(fit_temperature(scores, own))
    if held_out.store is None:
        return calibrated
    record = calibrated.provenance.chosen(held_out.store, metric="nll", fitted="temperature")
    return calibrated.with_provenance(record)


def _rows_of(head: LogitHead, selection: Selection) -> Samples:
    """The selection rows over the head's classes; a store only if the head belongs to it, and was not fitted on it."""
    if is_store(selection):
        head.check(selection)
        if head.provenance.was_fitted_on(selection):
            raise HeadError(
                f"{head.name} was fitted on {selection.name}/{selection.split}, where it is overconfident; "
                "calibrate on a split that it was not fitted on"
            )
        refuse_seen(head, selection, ROLES[:1])
    classes = np.arange(len(head.classnames)) if head.classes is None else head.classes
    nothing = np.zeros((0, head.dim)), np.zeros(0, np.int64)  # the training rows are not available here
    return selection_samples(selection, Samples(head.dim, classes, head.classnames, nothing))
