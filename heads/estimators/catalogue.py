"""The table of heads and their parameters; looking up a name imports no head."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from featcache.errors import HeadError
from featcache.parameters import Parameter, Plugins
from featcache.parameters import parameters_of as declared_by

if TYPE_CHECKING:
    from heads.estimators.base import HeadClassifier

HEADS: Plugins[type[HeadClassifier]] = Plugins(
    {
        "zero_shot": "heads.estimators.zero_shot:ZeroShot",
        "ridge": "heads.estimators.ridge.classifier:Ridge",
        "logistic": "heads.estimators.logistic.classifier:Logistic",
        "nearest_mean": "heads.estimators.discriminant:NearestMean",
        "discriminant": "heads.estimators.discriminant:LinearDiscriminant",
        "gda": "heads.estimators.few_shot.gda:GDA",
        "knn": "heads.estimators.knn:KNN",
        "tip_adapter": "heads.estimators.few_shot.tip_adapter:TipAdapter",
        "tip_adapter_f": "heads.estimators.few_shot.tip_adapter:TipAdapterF",
        "adamw": "heads.estimators.logistic.adamw:AdamW",
        "sgd": "heads.estimators.logistic.sgd:SGD",
        "cosine": "heads.estimators.logistic.cosine:Cosine",
        "attentive": "heads.estimators.dense.attentive:Attentive",
        "multilabel_zero_shot": "heads.estimators.multilabel.zero_shot:MultiLabelZeroShot",
        "multilabel_logistic": "heads.estimators.multilabel.logistic:MultiLabelLogistic",
        "multilabel_ridge": "heads.estimators.multilabel.ridge:MultiLabelRidge",
        "clap": "heads.estimators.few_shot.prototypes:CLAP",
        "taskres": "heads.estimators.few_shot.prototypes:TaskRes",
        "prolip": "heads.estimators.few_shot.prolip:ProLIP",
        "lp_plus_plus": "heads.estimators.few_shot.lp_plus_plus:LPPlusPlus",
        "transclip": "heads.estimators.transductive.transclip:TransCLIP",
        "em_dirichlet": "heads.estimators.transductive.em_dirichlet:EMDirichlet",
        "label_propagation": "heads.estimators.transductive.label_propagation:LabelPropagation",
    }
)
"""Every head by the name that the command line uses."""


def head_class(name: str) -> type[HeadClassifier]:
    """The class of a head; HeadError for a name that is not in `HEADS`."""
    if name not in HEADS:
        near = difflib.get_close_matches(name, HEADS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise HeadError(f"unknown head {name!r}; expected one of {', '.join(sorted(HEADS))}{hint}")
    return HEADS[name]


def parameters_of(name: str) -> dict[str, Parameter]:
    """A head's parameters by name, without `prior`, which is itself a head."""
    found = declared_by(head_class(name))
    return {name: found[name] for name in sorted(found) if name != "prior"}


def takes_prior(name: str) -> bool:
    """Whether a head can shrink its weights towards those of another head."""
    return "prior" in declared_by(head_class(name))


def takes_selection(name: str) -> bool:
    """Whether a head chooses hyper-parameters and so takes a selection split."""
    return "selection" in inspect.signature(head_class(name).fit).parameters


def make_head(name: str, parameters: Mapping[str, object], prior: object = None) -> HeadClassifier:
    """An unfitted head; HeadError for unknown parameters or invalid values."""
    declared = parameters_of(name)
    if unknown := sorted(parameters.keys() - declared.keys()):
        known = ", ".join(declared) or "none"
        raise HeadError(f"{name} has no parameter {', '.join(map(repr, unknown))}; it has {known}")
    if prior is not None and not takes_prior(name):
        raise HeadError(f"{name} takes no prior; leave the prior out, or fit a head that takes one")
    made = head_class(name)(**parameters, **({} if prior is None else {"prior": prior}))
    made._check_parameters()
    return made
