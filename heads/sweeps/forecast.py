"""Forecast of a sweep: what it would read, fit and write, without writing anything."""

import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from featcache.errors import HeadError
from featcache.store.protocol import FeatureTable
from featcache.store.reading.tokens import feature_shape
from heads.fitted.provenance import Json
from heads.rows.few_shot import FewShotStore, draw_shots
from heads.rows.samples import Ints
from heads.sweeps.plan import SweepPlan
from heads.sweeps.run import Open, PlannedJob, Stores, evaluated, known_jobs, planned_jobs, results_row

MEASURED_ROWS = 256, 512
"""Approximate rows per store in the two measured fits of a head."""
HALF = 2
"""Bytes per stored number."""


@dataclass(frozen=True)
class SweepForecast:
    """What `heads.sweeps.run.run_sweep` would do.

    Parameters
    ----------
    fits : jobs of the plan
    done : jobs whose rows are already in the results file
    to_fit : jobs to do, by head
    bytes_to_read : features of all stores that are needed; each store counts once
    rows_to_write, bytes_to_write : of the results file
    seconds : estimated from two fits of each head on a few rows; None if a head cannot be fitted on so few
    """

    fits: int
    done: int
    to_fit: dict[str, int]
    bytes_to_read: int
    rows_to_write: int
    bytes_to_write: int
    seconds: float | None


def forecast_sweep(plan: SweepPlan, open_store: Open, results: str | Path) -> SweepForecast:
    """Forecast `heads.sweeps.run.run_sweep`: fits, bytes, and seconds, estimated from small fits.

    The time of a fit is modelled as a constant plus a multiple of the number of rows.

    HeadError, MismatchError as `heads.sweeps.run.run_sweep` before its first fit.
    """
    jobs = list(planned_jobs(plan, open_store))
    known = known_jobs(results)
    left = [job for job in jobs if job.key not in known]
    counts = Counter(planned.job.head for planned in left)
    costs = {head: _cost(next(one for one in left if one.job.head == head), plan) for head in counts}
    per_job = [(planned, cost) for planned in left if (cost := costs[planned.job.head]) is not None]
    seconds = sum(cost.constant + cost.per_row * _rows_of(planned) for planned, cost in per_job)
    return SweepForecast(
        fits=len(jobs),
        done=len(jobs) - len(left),
        to_fit=dict(counts),
        bytes_to_read=_bytes_of(planned.stores for planned in left),
        rows_to_write=len(left) - len(per_job) + sum(cost.rows for _, cost in per_job),
        bytes_to_write=sum(cost.written for _, cost in per_job),
        seconds=seconds if len(per_job) == len(left) else None,
    )


class _Cost(NamedTuple):
    """Seconds of a fit and its evaluation, constant and per row; rows and bytes that it writes."""

    constant: float
    per_row: float
    rows: int
    written: int


def _cost(planned: PlannedJob, plan: SweepPlan) -> _Cost | None:
    """Estimated from a warm-up fit and two timed fits of different sizes."""
    found, rows = [], list[Json]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the small sample may lack classes
        for size in (MEASURED_ROWS[0], *MEASURED_ROWS):
            small = replace(planned, stores=_sample(planned.stores, size, plan))
            job = replace(planned.job, shots=None)
            began = time.perf_counter()
            try:
                rows = [results_row(row, planned) for row in evaluated(job, small.stores, plan)]
            except HeadError:
                return None
            found.append((sum(map(len, _images(small.stores))), time.perf_counter() - began))
    (few, short), (many, long) = found[1:]
    per_row = max(long - short, 0.0) / (many - few) if many > few else 0.0
    written = sum(len(json.dumps(row)) + 1 for row in rows)
    return _Cost(max(short - per_row * few, 0.0), per_row, len(rows), written)


def _sample(stores: Stores, size: int, plan: SweepPlan) -> Stores:
    train, select = (None if store is None else _some(store, size) for store in (stores.train, stores.select))
    on = tuple(_some(store, size) for store in stores.on)
    return replace(stores, train=train, select=on[0] if plan.paper is not None else select, on=on)


def _some(store: FeatureTable, size: int) -> FeatureTable:
    """About `size` valid rows of a store: equally many of every class, or evenly spaced rows of multi-label stores."""
    if store.groups is not None:  # stacked views stay together
        return store
    rows: Ints
    if store.multilabel:
        valid = np.flatnonzero(store.valid)
        rows = valid[:: max(1, len(valid) // size)]
    else:
        rows = draw_shots(
            store.labels, max(2, size // len(store.classnames)), n_classes=len(store.classnames), allow_fewer=True
        )
    return FewShotStore(store, rows)


def _images(stores: Stores) -> Sequence[FeatureTable]:
    """The image stores that a fit reads and is evaluated on."""
    return [store for store in (stores.train, stores.select, *stores.on) if store is not None]


def _rows_of(planned: PlannedJob) -> int:
    """Rows that a job reads."""
    stores, shots = planned.stores, planned.job.shots
    train = 0 if stores.train is None else len(stores.train)
    drawn = train if shots is None or stores.train is None else min(train, shots * len(stores.train.classnames))
    return sum(map(len, _images(stores))) - train + drawn


def _bytes_of(found: Iterable[Stores]) -> int:
    """Bytes of the features of stores, each counted once."""
    images = {(one.encoder_key, one.dataset_key): one for stores in found for one in _images(stores)}
    return sum(HALF * len(one) * int(np.prod(feature_shape(one))) for one in images.values())
