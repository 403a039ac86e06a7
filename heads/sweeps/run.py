"""Running a sweep: jobs without a row yet are fitted, evaluated and appended."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache import __version__
from featcache.errors import FeatcacheWarning, HeadError
from featcache.parameters import json_value
from featcache.progress import counted
from featcache.store import content_key
from featcache.store.key import checksum
from featcache.store.protocol import FeatureTable, TextSource
from heads.combine.interpolate import interpolate, interpolate_by_folds
from heads.estimators.base import HeadClassifier
from heads.estimators.fit import Material, fit_head, settled
from heads.estimators.zero_shot import ZeroShot
from heads.evaluation.evaluate import choose, evaluate
from heads.evaluation.metrics import Row
from heads.evaluation.seen import unseen
from heads.fitted.base import LogitHead, as_head
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Json, split_id
from heads.report.results import append_rows
from heads.rows.few_shot import FewShotStore, few_shot
from heads.rows.hashes import rows_also_in
from heads.rows.samples import is_store
from heads.sweeps.plan import PAPERS, Job, Splits, SweepPlan, split_setting
from heads.sweeps.summary import Summary

Open = Callable[[str], Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Stores:
    """The opened stores of one data set under one model."""

    train: FeatureTable | None
    select: FeatureTable | None
    on: tuple[FeatureTable, ...]
    texts: tuple[TextSource, ...]

    def identity(self) -> Json:
        """What all jobs on these stores depend on."""
        images = {"train": self.train, "select": self.select}
        record: Json = {what: None if store is None else _image_id(store) for what, store in images.items()}
        record["on"] = [_image_id(store) for store in self.on]
        return record | {"texts": [_text_id(store) for store in self.texts]}


@dataclass(frozen=True)
class PlannedJob:
    """A job with its stores, and the key that identifies its rows."""

    job: Job
    stores: Stores
    key: str
    model: str | None


def _image_id(store: FeatureTable) -> Json:
    """Identity of an image store, row hashes included: files edited in place keep both keys."""
    identity: Json = {**split_id(store), "encoder": store.encoder_key}
    hashes = store.row_hashes
    return identity if hashes is None else identity | {"rows": checksum(np.ascontiguousarray(hashes, "<u8").data)}


def _text_id(store: TextSource) -> Json:
    """What tells embedded prompts apart: `text_key` alone is the same for all prompts under one text tower."""
    prompts = {"classnames": list(store.classnames), "raw": checksum(np.ascontiguousarray(store.raw).data)}
    return {"encoder": store.text_key, "prompts": content_key(prompts)}


def run_sweep(plan: SweepPlan, open_store: Open, results: str | Path, say: Say = lambda line: None) -> list[Row]:
    """Fit and evaluate every job of a plan that has no row in `results`; each row is appended as soon as it is done.

    HeadError, MismatchError as the heads do; rows that were done stay in the file.

    Parameters
    ----------
    plan : SweepPlan
    open_store : store of a reference, ``open_store("digits/train@tiny")``
    results
        File of rows. A job is identified by what it depends on (setting, shots, seed, content keys of its stores), so
        that a sweep that was killed, or has grown, runs what is missing.
    say : called with one line per job

    Returns
    -------
    The rows of all jobs of the plan, old and new, in the plan's order: those of `heads.evaluate`, and ``sweep`` (the
    job's key), ``data``, ``model``, ``setting``, ``shots`` (None for all), ``seed``, ``fit_seconds``, ``train_rows``
    and ``select_rows`` (how many rows the drawn samples have), ``select:<metric>``, and ``leak`` where the plan follows
    a paper that chooses on a reported split.
    """
    done = known_jobs(results)
    rows: list[Row] = []
    total = len(plan.models) * sum(len(list(plan.jobs(splits))) for splits in plan.data)
    for number, planned in enumerate(planned_jobs(plan, open_store), 1):
        job = planned.job
        if planned.key in done:
            say(f"{number}/{total} {_label(job)}: done before")
            rows += done[planned.key]
            continue
        began = time.perf_counter()
        new = [results_row(row, planned) for row in evaluated(job, planned.stores, plan)]
        append_rows(results, new)
        rows += new
        say(f"{number}/{total} {_label(job)}: {time.perf_counter() - began:.1f} s")
    return rows


def planned_jobs(plan: SweepPlan, open_store: Open) -> Iterator[PlannedJob]:
    """The jobs of a plan, in its order, done or not."""
    for splits in plan.data:
        for model in plan.models:
            named = _with_model(splits, model)
            stores = _opened(named, open_store, plan)
            identity = stores.identity()
            for job in plan.jobs(named):
                yield PlannedJob(job, stores, _key(job, identity, plan), model)


def refitted(plan: SweepPlan, open_store: Open, summary: Summary) -> tuple[LogitHead, Stores] | None:
    """The head of a setting's first seed, and the stores it was evaluated on; rows hold no weights."""
    wanted = (summary.data, summary.model, summary.head, dict(summary.setting), summary.shots)
    for planned in planned_jobs(plan, open_store):
        job = planned.job
        place = job.splits.train or job.splits.on[0]
        if (place, planned.model, job.head, dict(job.setting), job.shots) == wanted:
            stores = _drawn(planned.stores, job, plan)
            return as_head(_fitted(job, stores)), stores
    return None


def known_jobs(results: str | Path) -> dict[str, list[Row]]:
    """Rows of sweeps in a results file by their job; incomplete lines are skipped."""
    found: dict[str, list[Row]] = {}
    path = Path(results)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json_value(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("sweep"), str):
            found.setdefault(row["sweep"], []).append(row)
    return found


def evaluated(job: Job, stores: Stores, plan: SweepPlan) -> Iterator[Row]:
    """The row of a job, and that of its best interpolation with the zero-shot head."""
    stores = _drawn(stores, job, plan)
    began = time.perf_counter()
    estimator = _fitted(job, stores)
    seconds = time.perf_counter() - began
    heads = [as_head(estimator)]
    if plan.alphas and isinstance(heads[0], LinearHead) and job.head != "zero_shot":
        heads.append(_interpolated(estimator, stores, plan))
    drawn = {"train_rows": stores.train, "select_rows": stores.select}
    counts = {name: len(store) for name, store in drawn.items() if isinstance(store, FewShotStore)}
    rows = evaluate(heads, stores.on, allow_chosen=plan.paper is not None, seen=plan.seen)
    for head, row in zip(heads, rows, strict=True):
        yield row | {"fit_seconds": seconds, **counts, **_selection(head, stores, plan)}


def _fitted(job: Job, stores: Stores) -> HeadClassifier:
    """The head of a job, which may shrink towards the zero-shot head."""
    parameters, to_texts = split_setting(job.head, job.setting)
    material = Material(stores.train, stores.texts, stores.select)
    if to_texts:
        material = replace(material, prior=material.text_head())
    return fit_head(job.head, material, parameters)


def _interpolated(estimator: HeadClassifier, stores: Stores, plan: SweepPlan) -> LogitHead:
    """The best interpolation with the zero-shot head: on the selection split, or by folds of the train rows."""
    zero_shot = ZeroShot().fit(list(stores.texts))
    if stores.select is not None:
        path = interpolate(zero_shot, estimator, plan.alphas)
        return choose(path, stores.select, metric=plan.picked_by, seen=plan.seen)
    if stores.train is None:
        raise HeadError("interpolation by folds fits on labelled rows; name a split to train on, or one to select on")
    return interpolate_by_folds(zero_shot, settled(estimator), stores.train, alphas=plan.alphas, metric=plan.picked_by)


def _drawn(stores: Stores, job: Job, plan: SweepPlan) -> Stores:
    """The stores with the job's samples of the train and selection splits, without rows that the plan leaves out."""
    train, select = stores.train, stores.select
    if job.shots is not None and train is not None:
        if select is not None and plan.select_shots is not None and plan.paper is None:
            select = few_shot(select, min(plan.select_shots, job.shots), job.seed, allow_fewer=plan.allow_fewer)
        train = few_shot(train, job.shots, job.seed, allow_fewer=plan.allow_fewer)
    if plan.seen == "exclude" and train is not None and select is not None:
        select = unseen(select, train)
    return replace(stores, train=train, select=select)


def _selection(head: LogitHead, stores: Stores, plan: SweepPlan) -> Row:
    """The metric on the selection split, by which picks are made."""
    record: Json = {} if plan.paper is None else {"leak": PAPERS[plan.paper]}
    if trained := _trained_on(stores):
        record["leak"] = "; ".join([*record.values(), f"{', '.join(trained)}: evaluated on its training rows"])
    if stores.select is not None:
        (row,) = evaluate([head], [stores.select], seen="allow")
        record[f"select:{plan.picked_by}"] = row[f"{stores.select.name}:{plan.picked_by}"]
    return record


def results_row(row: Row, planned: PlannedJob) -> Row:
    """The row of a head, with the fields that identify its job."""
    job = planned.job
    place = {"sweep": planned.key, "data": job.splits.train or job.splits.on[0], "model": planned.model}
    return row | place | {"setting": job.setting, "shots": job.shots, "seed": job.seed}


def _key(job: Job, stores: Json, plan: SweepPlan) -> str:
    """Digest of everything that a job's row depends on."""
    record = {
        "head": job.head,
        "setting": job.setting,
        "shots": job.shots,
        "seed": job.seed if job.shots is not None else None,
        "stores": stores,
        "alphas": list(plan.alphas),
        "metric": plan.picked_by,
        "paper": plan.paper,
        "select_shots": None if job.shots is None else plan.select_shots,
        "featcache": __version__,
    }
    if plan.seen != "refuse":
        record["seen"] = plan.seen
    if plan.allow_fewer and job.shots is not None:
        record["allow_fewer"] = True
    return content_key(record)


def _trained_on(stores: Stores) -> list[str]:
    """The test stores that hold the training rows."""
    train = stores.train
    return [] if train is None else [f"{store.name}/{store.split}" for store in stores.on if _is_within(store, train)]


def _is_within(store: FeatureTable, train: FeatureTable) -> bool:
    """Whether all rows are training rows; by the key of the split where rows are not known."""
    found = rows_also_in(store, train)
    if found is None:
        return train.dataset_key is not None and store.dataset_key == train.dataset_key
    return bool(found[store.valid].all())


def _opened(splits: Splits, open_store: Open, plan: SweepPlan) -> Stores:
    """The stores; a plan that follows a paper chooses on the first reported split."""
    on = tuple(open_store(reference) for reference in splits.on)
    select = on[0] if plan.paper is not None else None if splits.select is None else open_store(splits.select)
    train = None if splits.train is None else open_store(splits.train)
    for store in (train, select, *on):
        if store is not None and not is_store(store):
            raise HeadError(f"{store.name}: a store of texts where images are expected; name NAME/SPLIT")
    stores = Stores(train, select, on, tuple(open_store(reference) for reference in splits.texts))
    if trained := _trained_on(stores):
        warnings.warn(
            f"{', '.join(trained)}: --on is --train; figures there are those of training rows, and each row says so "
            "(`leak`); name a test split",
            FeatcacheWarning,
            stacklevel=3,
        )
    return stores


def _with_model(splits: Splits, model: str | None) -> Splits:
    """The references, with ``@model`` where they name none."""
    if model is None:
        return splits

    def named(references: Sequence[str | None]) -> list[Any]:
        return [one if one is None or "@" in one else f"{one}@{model}" for one in references]

    train, select = named([splits.train, splits.select])
    return Splits(train, tuple(named(splits.on)), select, tuple(named(splits.texts)))


def _label(job: Job) -> str:
    setting = ", ".join(f"{name}={value}" for name, value in job.setting.items())
    shots = "all rows" if job.shots is None else f"{counted(job.shots, 'shot')}, seed {job.seed}"
    return f"{job.head}{f' ({setting})' if setting else ''} on {job.splits.train or job.splits.on[0]}, {shots}"
