"""What a sweep runs: heads and their settings, data, models, shots, seeds; from flags or from one TOML file.

The file says what the flags say::

    select_metric = "top1"
    shots = [1, 2, 4, "all"]
    allow_fewer = true              # classes with fewer rows give what they have
    seeds = [0, 1, 2]
    models = ["tiny"]               # appended to references without a model: digits/train@tiny

    [[data]]
    train = "digits/train"
    select = "digits/val"
    on = ["digits/test", "digits-noisy/test"]
    texts = ["texts/digits"]

    [[head]]
    name = "logistic"
    set = { fit_intercept = true }  # one value for all fits
    grid = { C = [0.1, 1.0], prior = ["zero", "texts"] }    # a fit for every value (of every combination)
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from featcache.errors import HeadError
from featcache.parameters import Count, Range, check_record, check_regular
from heads.estimators.catalogue import head_class, make_head, takes_prior

if TYPE_CHECKING:
    from heads.evaluation.seen import Seen
    from heads.fitted.provenance import Json

PAPERS: dict[str, str] = {
    "flyp": "FLYP's L-BFGS probe takes the C that is best on the test split it reports",
    "lp++": "LP++'s published numbers take hyper-parameters by the test split",
    "regft": "RegFT takes the interpolation coefficient that is best on the evaluated split",
    "tip-adapter": "Tip-Adapter searches alpha and beta on the test split",
}
"""Papers whose protocol chooses on the reported split, and what that leaks. `SweepPlan.paper` reintroduces it."""

PRIORS = ("zero", "texts")
"""What weights may shrink towards in a sweep: zero (the default), or the zero-shot head of the text stores."""


@dataclass(frozen=True)
class HeadGrid:
    """One head with the parameters of every fit, and the values to try of others; `prior` is one of `PRIORS`."""

    name: str
    fixed: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, Sequence[object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.grid.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise HeadError(f"grid of {self.name}.{name} is {values!r}, expected a list of values, one per fit")
        for setting in self.settings():
            make_head(self.name, split_setting(self.name, setting)[0])

    def settings(self) -> Iterator[dict[str, object]]:
        """Every combination of the grid's values, with the fixed parameters."""
        for values in itertools.product(*self.grid.values()):
            yield {**self.fixed, **dict(zip(self.grid, values, strict=True))}


@dataclass(frozen=True)
class Splits:
    """References of the stores of one data set: where to fit, where to choose, where to report."""

    train: str | None
    on: tuple[str, ...]
    select: str | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One fit; `shots` None takes all rows."""

    head: str
    setting: dict[str, object]
    splits: Splits
    shots: int | None
    seed: int


@dataclass(frozen=True)
class SweepPlan:
    """A whole sweep.

    HeadError for an empty plan, unknown heads, parameters, priors or papers, alphas or a prior of texts without texts.

    Attributes
    ----------
    heads, data : what to fit, and on what
    models : names of models; each data set is swept under each. None takes references as they are.
    shots : rows per class, None for all; each number of shots is drawn once per seed
    alphas
        Interpolation coefficients between the zero-shot head (0) and every fitted linear head (1), the best of which
        on the selection split, or by folds of the train rows where there is none, is reported too; empty for none.
    metric : what picks compare on the selection split; None for top1, or the mAP of multi-label heads
    select_shots
        Rows per class of the selection split for fits of few shots: the smaller of this and the shots, drawn with the
        same seed (CoOp's protocol has 4). None takes the whole split.
    paper : key of `PAPERS`: choose on the first reported split, as that paper does, and say so in every row
    allow_fewer
        Take all rows of classes with fewer rows than the shots, as CoOp does, instead of an error. Results then say
        how many rows were used.
    seen
        What is done with rows of a test or selection split that a head was fitted (or chosen) on: "refuse", "exclude"
        or "allow", as in `heads.evaluate`.
    """

    heads: tuple[HeadGrid, ...]
    data: tuple[Splits, ...]
    models: tuple[str | None, ...] = (None,)
    shots: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    alphas: tuple[float, ...] = ()
    metric: str | None = None
    paper: str | None = None
    select_shots: int | None = None
    allow_fewer: bool = False
    seen: Seen = "refuse"

    @property
    def multilabel(self) -> bool:
        """Whether the heads are multi-label."""
        return any(head_class(head.name).multilabel for head in self.heads)

    @property
    def picked_by(self) -> str:
        """The metric that picks compare."""
        from heads.evaluation.metrics import selection_metric  # loads torch, which `sweep --help` does without

        return selection_metric(self.metric, multilabel=self.multilabel)

    def __post_init__(self) -> None:
        for name in ("heads", "data", "models", "shots", "seeds"):
            if not vars(self)[name]:
                raise HeadError(f"a sweep without {name}; give at least one")
        if len({head_class(head.name).multilabel for head in self.heads}) > 1:
            raise HeadError("a sweep of multi-label and single-label heads, which no store fits; sweep them separately")
        _ = self.picked_by  # an unknown metric is an error
        if self.paper is not None and self.paper not in PAPERS:
            raise HeadError(f"unknown paper {self.paper!r}; expected one of {', '.join(PAPERS)}")
        if any(shots is not None and shots < 1 for shots in (*self.shots, self.select_shots)):
            raise HeadError(f"shots {self.shots}, select_shots {self.select_shots}; expected numbers from 1, or 'all'")
        for splits in self.data:
            self._check(splits)

    def _check(self, splits: Splits) -> None:
        if not splits.on:
            named = f"{splits.train}: " if splits.train else ""
            raise HeadError(f"{named}nothing to report on; name at least one test store with --on")
        if self.alphas and not splits.texts:
            raise HeadError("alphas interpolate with the zero-shot head; name a text store")
        for head in self.heads:
            kind = head_class(head.name)
            if (kind.fits_on == "texts" or kind.takes_texts) and not splits.texts:
                raise HeadError(f"{head.name} needs a text store; name one")
            if not splits.texts and any(split_setting(head.name, setting)[1] for setting in head.settings()):
                raise HeadError(f"{head.name} shrinks towards the zero-shot head (prior = 'texts'); name a text store")
            if kind.fits_on == "images" and splits.train is None:
                raise HeadError(f"{head.name} fits from labelled rows; name a train store")

    def jobs(self, splits: Splits) -> Iterator[Job]:
        """Every fit on one data set; heads of texts alone, and fits of all rows, once instead of once per seed."""
        for head in self.heads:
            for setting in head.settings():
                if head_class(head.name).fits_on == "texts":
                    yield Job(head.name, setting, splits, None, self.seeds[0])
                    continue
                for shots in self.shots:
                    for seed in self.seeds if shots is not None else self.seeds[:1]:
                        yield Job(head.name, setting, splits, shots, seed)


def split_setting(name: str, setting: Mapping[str, object]) -> tuple[dict[str, object], bool]:
    """The head's own parameters of a setting, and whether its weights shrink towards the zero-shot head.

    HeadError for a prior that is none of `PRIORS`, or of a head that takes none.

    >>> split_setting("ridge", {"alphas": [1.0], "prior": "texts"})
    ({'alphas': [1.0]}, True)
    """
    parameters = dict(setting)
    prior = parameters.pop("prior", PRIORS[0])
    if "prior" in setting and not takes_prior(name):
        raise HeadError(f"{name} takes no prior; leave {name}.prior out")
    if prior not in PRIORS:
        raise HeadError(f"{name}.prior is {prior!r}, expected one of {', '.join(map(repr, PRIORS))}")
    return parameters, prior == "texts"


def read_plan(path: str | Path) -> SweepPlan:
    """The plan in a TOML file; see the module for its form.

    HeadError for a file that cannot be read, or unknown keys, naming them.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            record = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HeadError(f"{path}: cannot be read as a sweep ({error}); it is a TOML file") from error
    try:
        _checked(record, _PLAN, str(path))
        plan: Json = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
        heads = tuple(_head(entry, path) for entry in plan.pop("head", ()))
        data = tuple(_splits(entry, path) for entry in plan.pop("data", ()))
        plan["shots"] = tuple(None if shots == "all" else shots for shots in plan.get("shots", ("all",)))
        plan["alphas"] = tuple(map(float, plan.get("alphas", ())))
        return SweepPlan(heads, data, metric=plan.pop("select_metric", None), **plan)
    except HeadError:
        raise
    except ValueError as error:
        raise HeadError(str(error)) from error


_PLAN: dict[str, object] = {
    "head": list[dict[str, Any]],
    "data": list[dict[str, Any]],
    "models": list[str],
    "shots": list[Count | Literal["all"]],
    "seeds": list[Annotated[int, Range(0)]],
    "alphas": list[float],
    "select_metric": str,
    "select_shots": Count,
    "paper": str,
    "allow_fewer": bool,
    "seen": Literal["refuse", "exclude", "allow"],
}
_HEAD: dict[str, object] = {"name": str, "set": dict[str, Any], "grid": dict[str, Any]}
_DATA: dict[str, object] = {"train": str, "select": str, "on": str | list[str], "texts": str | list[str]}
"""Keys of the file and of its tables, and their kinds."""


def _head(entry: Json, path: str | Path) -> HeadGrid:
    _checked(entry, _HEAD, f"{path}: [[head]]")
    return HeadGrid(entry.get("name", ""), entry.get("set", {}), entry.get("grid", {}))


def _splits(entry: Json, path: str | Path) -> Splits:
    _checked(entry, _DATA, f"{path}: [[data]]")
    on, texts = ((names,) if isinstance(names := entry.get(key, ()), str) else tuple(names) for key in ("on", "texts"))
    return Splits(entry.get("train"), on, entry.get("select"), texts)


def _checked(record: Json, kinds: Mapping[str, object], where: str) -> None:
    if unknown := sorted(set(record) - set(kinds)):
        raise HeadError(f"{where}: unknown key {', '.join(map(repr, unknown))}; expected some of {sorted(kinds)}")
    check_record(record, kinds, where)
