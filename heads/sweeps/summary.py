"""Results of a sweep: means and spreads over seeds, and the settings picked on the selection split."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from heads.evaluation.metrics import LOWER_IS_BETTER, Row, metric_of
from heads.report.charts import Curve
from heads.report.rows import datasets_of
from heads.report.tables import aligned_lines, in_blocks

PLACE = ("data", "model", "head", "setting", "shots")
"""Keys of results rows that tell settings apart; fields of `Summary`."""
SPLITS = ("splits", "training_rows")


@dataclass(frozen=True)
class Summary:
    """One setting on one data set: mean and standard deviation (over seeds, ddof 1; None for one seed) by row key."""

    data: str
    model: str | None
    head: str
    setting: Mapping[str, object]
    shots: int | None
    seeds: int
    mean: Mapping[str, float]
    spread: Mapping[str, float | None]
    splits: Mapping[str, object] = field(default_factory=dict)
    """`SPLITS` of the results rows, where they have them."""


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Rows of one setting, over their seeds, in order of appearance; means are over the seeds that have a value.

    >>> base = {"data": "d", "model": None, "head": "ridge", "setting": {}, "shots": 4}
    >>> (found,) = summarise([{**base, "seed": 0, "t:top1": 0.5}, {**base, "seed": 1, "t:top1": 0.7}])
    >>> found.seeds, round(found.mean["t:top1"], 3), round(found.spread["t:top1"], 3)
    (2, 0.6, 0.141)
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in PLACE], sort_keys=True), []).append(row)
    return [_summary(group) for group in groups.values()]


def _summary(rows: Sequence[Row]) -> Summary:
    first = rows[0]
    keys = dict.fromkeys(key for row in rows for key in row if ":" in key)
    known = {key: [row[key] for row in rows if _numeric(row.get(key)) and math.isfinite(row[key])] for key in keys}
    values = {key: np.array(found) for key, found in known.items() if found}
    mean = {key: float(found.mean()) for key, found in values.items()}
    spread = {key: float(found.std(ddof=1)) if len(found) > 1 else None for key, found in values.items()}
    splits = {key: first[key] for key in SPLITS if key in first}
    place = {key: first[key] for key in PLACE}
    return Summary(**place, seeds=len(rows), mean=mean, spread=spread, splits=splits)


def picks(summaries: Iterable[Summary], metric: str) -> list[Summary]:
    """For each head, data set, model and number of shots, the setting with the best mean on the selection split.

    Ties go to the earlier one. Heads without a value there (no selection split) keep every setting.
    """
    best: dict[tuple[object, ...], Summary] = {}
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    for number, found in enumerate(summaries):
        value = found.mean.get(f"select:{metric}")
        place = (found.data, found.model, found.head, found.shots, None if value is not None else number)
        if place not in best or (value is not None and sign * value > sign * best[place].mean[f"select:{metric}"]):
            best[place] = found
    return list(best.values())


def best_of(summaries: Sequence[Summary], metric: str) -> Summary:
    """The summary with the best mean on the selection split; without one, on the first test set. Ties: the earlier."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

    def value(found: Summary) -> float:
        keys = [key for key in found.mean if key.endswith(f":{metric}")]
        key = next((key for key in keys if key.startswith("select:")), keys[0] if keys else None)
        return -np.inf if key is None else sign * found.mean[key]

    return max(summaries, key=value)


def sweep_table(summaries: Sequence[Summary], metrics: Sequence[str] = ("top1", "nll"), *, width: int = 110) -> str:
    """A table per metric: a line per setting, a column per test set, mean ± standard deviation over seeds.

    Columns that say the same of all settings are left out; test sets beyond `width` go into further blocks.
    """
    columns = {
        "head": [found.head for found in summaries],
        "data": [_place(found) for found in summaries],
        "setting": [", ".join(f"{k}={v}" for k, v in found.setting.items()) or "–" for found in summaries],
        "shots": ["all" if found.shots is None else str(found.shots) for found in summaries],
    }
    said = [[name, *texts] for name, texts in columns.items() if name == "head" or len(set(texts)) > 1]
    left = aligned_lines([*zip(*said, strict=True)])
    parts = []
    for metric in metrics:
        shown = metric_of(metric)
        datasets = [name for name in datasets_of([found.mean for found in summaries], metric) if name != "select"]
        parts.append(f"{shown.title}, {shown.unit}")
        cells = [
            [name, *(_cell(found, f"{name}:{metric}", shown.factor, shown.digits) for found in summaries)]
            for name in datasets
        ]
        parts.append(in_blocks(left, cells, width))
    return "\n\n".join(parts)


def _place(found: Summary) -> str:
    return found.data if found.model is None or "@" in found.data else f"{found.data}@{found.model}"


def _cell(found: Summary, key: str, factor: float, digits: int) -> str:
    if key not in found.mean:
        return "–"
    spread = found.spread[key]
    text = f"{found.mean[key] * factor:.{digits}f}"
    return text if spread is None else f"{text} ± {spread * factor:.{digits}f}"


def summary_rows(summaries: Iterable[Summary]) -> list[Row]:
    """Summaries as results rows: means over seeds, under a name that says setting, shots and data."""
    found = list(summaries)
    several = len({(one.data, one.model) for one in found}) > 1
    return [
        {
            "head": _label(one, several),
            "encoder": one.model,
            "params": dict(one.setting),
            "shots": one.shots,
            "seeds": one.seeds,
            **one.splits,
            **{key: value for key, value in one.mean.items() if not key.startswith("select:")},
            **{
                f"{key}_spread": value
                for key, value in one.spread.items()
                if value is not None and not key.startswith("select:")
            },
        }
        for one in found
    ]


def _label(found: Summary, with_data: bool) -> str:
    setting = [f"{name}={value}" for name, value in found.setting.items()]
    shots = [] if found.shots is None else [f"{found.shots} shot{'s' * (found.shots > 1)}"]
    return ", ".join([found.head, *setting, *shots, *([_place(found)] if with_data else [])])


def sweep_curves(summaries: Sequence[Summary], metric: str = "top1") -> list[Curve]:
    """A metric against what a sweep varies, a line per head, with its spread over seeds.

    Against the number of shots, and against every numeric parameter with three values or more; a chart per test set.
    """
    axes: list[tuple[str, bool]] = []
    if len({one.shots for one in summaries if one.shots is not None}) > 1:
        axes.append(("shots", True))
    names = dict.fromkeys(name for one in summaries for name, value in one.setting.items() if _numeric(value))
    axes += [(name, False) for name in names if len({str(one.setting.get(name)) for one in summaries}) > 2]
    datasets = [name for name in datasets_of([one.mean for one in summaries], metric) if name != "select"]
    return [
        curve
        for name, is_shots in axes
        for dataset in datasets
        if (curve := _curve(summaries, f"{dataset}:{metric}", name, is_shots)) is not None
    ]


def _numeric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curve(summaries: Sequence[Summary], key: str, name: str, is_shots: bool) -> Curve | None:
    """The chart of one metric on one test set along one parameter; lines agree in everything else."""
    dataset, _, metric = key.rpartition(":")
    shown = metric_of(metric)
    lines: dict[str, list[tuple[float, float, float | None]]] = {}
    several = len({(one.data, one.model) for one in summaries}) > 1
    for one in summaries:
        x = one.shots if is_shots else one.setting.get(name)
        if key not in one.mean or not isinstance(x, int | float):
            continue
        others = {other: value for other, value in one.setting.items() if other != name}
        rest = replace(one, setting=others, shots=None if is_shots else one.shots)
        spread = one.spread[key]
        point = (float(x), one.mean[key] * shown.factor, None if spread is None else spread * shown.factor)
        lines.setdefault(_label(rest, several), []).append(point)
    lines = {label: sorted(line) for label, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    points = {label: [(x, y) for x, y, _ in line] for label, line in lines.items()}
    spreads = {label: [s for *_, s in line] for label, line in lines.items()}
    values = [x for line in points.values() for x, _ in line]
    log = min(values) > 0 and max(values) >= 8 * min(values)
    title = f"{shown.title} on {dataset} by {name}"
    return Curve(title, name, f"{shown.title} ({shown.unit})", points, spreads, log)
