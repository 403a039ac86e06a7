"""Fit any head of `HEADS` by name, for the commands `fit` and `sweep`."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from featcache.progress import Progress, Silent
from featcache.store.protocol import FeatureSource, TextSource
from heads.estimators.base import HeadClassifier
from heads.estimators.catalogue import head_class, make_head, takes_prior, takes_selection
from heads.estimators.zero_shot import ZeroShot
from heads.fitted.base import Fitted
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Json

H = TypeVar("H", bound=HeadClassifier)

CHOSEN = {"C": "C_", "alphas": "alpha_", "betas": "beta_", "lr": "lr_", "weight_decay": "weight_decay_"}
"""Parameters that may be lists of values to choose from, and the attribute with the chosen value."""


@dataclass(frozen=True)
class Material:
    """Inputs that heads are fitted from.

    Attributes
    ----------
    train : image store or `FewShotStore`; None if there are only texts
    texts
        Text stores with the same class list and text tower (several form an ensemble), or a fitted linear head, for
        heads that start from one.
    selection : image store on which hyper-parameters are chosen; None for the head's default, such as folds
    prior : fitted linear head that weights shrink towards; None for zero
    progress : receives the progress of slow fits
    """

    train: FeatureSource | None = None
    texts: Sequence[TextSource] | LinearHead = ()
    selection: FeatureSource | None = None
    prior: LinearHead | Fitted | None = None
    progress: Progress = field(default_factory=Silent)

    def text_head(self) -> LinearHead:
        """The zero-shot head of the texts, or the head given instead."""
        return self.texts if isinstance(self.texts, LinearHead) else ZeroShot().fit(list(self.texts)).linear()


def fit_head(name: str, material: Material, parameters: Mapping[str, object] | None = None) -> HeadClassifier:
    """Fit one head.

    Parameters
    ----------
    name : key of `HEADS`
    material : inputs; those that the head does not take are ignored
    parameters : constructor parameters

    Raises
    ------
    HeadError
        If texts or labelled rows are missing that the head needs, or for an unknown parameter.

    Examples
    --------
    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> texts = SimpleNamespace(name="t", raw=np.eye(2, dtype=np.float32)[:, None], counts=np.array([1, 1]), dim=2,
    ...     classnames=("cat", "dog"), templates=None, text_key="k", text_digest="d", logit_scale=100.0,
    ...     logit_bias=None, encoder_name="tiny", provenance={})
    >>> fit_head("zero_shot", Material(texts=[texts])).predict([[0.6, 0.8]]).tolist()
    [1]
    """
    kind, texts = head_class(name), material.texts
    head = make_head(name, parameters or {}, material.prior if takes_prior(name) else None)
    head.progress = material.progress
    if (kind.fits_on == "texts" or kind.takes_texts) and not texts:
        raise HeadError(f"{name} needs a text store; name one that `featcache text` wrote (texts/NAME)")
    options: Json = {}
    if material.selection is not None and takes_selection(name):
        options["selection"] = material.selection
    if kind.fits_on == "texts":
        if isinstance(texts, LinearHead):
            raise HeadError(
                f"{name} is made from a text store, got the head {texts.name}; name a text store (texts/NAME)"
            )
        X: object = list(texts)
    else:
        X = material.train
        if X is None:
            raise HeadError(f"{name} fits from labelled rows; name an image store that `featcache encode` wrote")
        options |= {"texts": material.text_head()} if kind.takes_texts else {}
        options |= _groups(kind, material)
    return head.fit(X, **options)


def _groups(kind: type[HeadClassifier], material: Material) -> Json:
    """Groups of rows, such as views of one image, that are held out together; see `featcache.store.reading.images`."""
    groups = None if material.train is None else material.train.groups
    if groups is None:
        return {}
    if "groups" in inspect.signature(kind.fit).parameters:
        return {"groups": groups}
    if material.selection is None and takes_selection(kind.name):
        raise HeadError(
            f"{kind.name} would hold out rows of groups (views of an image, or --group) that it also fits on; give a "
            "selection split, or use a head that holds out whole groups, such as ridge"
        )
    return {}


def unfitted(head: H) -> H:
    """An unfitted copy with the same parameters; unlike scikit-learn's `clone`, it keeps the prior fitted."""
    return type(head)(**head.get_params(deep=False))


def settled(head: H) -> H:
    """An unfitted copy of a fitted head, with the chosen penalty (and other values of `CHOSEN`) as its parameter.

    Other choices, such as the number of LP++ steps, are made again.

    Examples
    --------
    >>> import numpy as np
    >>> from heads import Ridge
    >>> ridge = Ridge([0.1, 1.0, 10.0]).fit(np.eye(4)[[0, 1, 0, 1]], [0, 1, 0, 1])
    >>> settled(ridge).get_params()["alphas"] == [ridge.alpha_]
    True
    """
    check_is_fitted(head)
    copy, fitted = unfitted(head), vars(head)
    for name in CHOSEN.keys() & head.get_params(deep=False):
        if CHOSEN[name] in fitted:
            copy.set_params(**{name: [fitted[CHOSEN[name]]]})
    return copy
