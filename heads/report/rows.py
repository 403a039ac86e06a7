"""Access to results rows: one dict per head, with keys ``"<data set>:<metric>"``; interpolations have `alpha`."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.errors import HeadError
from heads.evaluation.metrics import Metric, Row, metric_of

Point: TypeAlias = tuple[float, float]

MEAN = "shifted mean"
"""Title of the column with the mean over the shifted data sets."""


def datasets_of(rows: Sequence[Mapping[str, object]], metric: str = "top1") -> list[str]:
    """Data sets for which the rows have this metric, in order of appearance.

    >>> datasets_of([{"head": "ridge", "digits:top1": 0.9, "digits:nll": 0.3, "digits-noisy:top1": 0.7}])
    ['digits', 'digits-noisy']
    """
    keys = (key for row in rows for key in row if key.endswith(f":{metric}"))
    return list(dict.fromkeys(key.removesuffix(f":{metric}") for key in keys))


def main_metrics(rows: Sequence[Row]) -> tuple[str, ...]:
    """Metrics of short tables: accuracy and NLL, or those of multi-label heads.

    >>> main_metrics([{"digits:top1": 0.9}]), main_metrics([{"voc:map_macro": 0.9}])
    (('top1', 'nll'), ('map_macro', 'auroc_macro', 'f1_macro', 'f1_micro'))
    """
    if any(key.endswith(":map_macro") for row in rows for key in row):
        return "map_macro", "auroc_macro", "f1_macro", "f1_micro"
    return "top1", "nll"


def choose_datasets(
    rows: Sequence[Row], datasets: Sequence[str] | None, reference: str | None, metric: str = "top1"
) -> tuple[str, list[str]]:
    """The in-distribution data set (default: the first), and the shifted ones (default: all others with the metric).

    HeadError if the rows lack the metric for one of them.
    """
    known = datasets_of(rows, metric)
    if not known:
        held = sorted({key.rpartition(":")[2] for row in rows for key in row if ":" in key})
        hint = f"expected one of {', '.join(held)}" if held else "evaluate a head first"
        raise HeadError(f"{len(rows)} rows without a key '<data set>:{metric}'; {hint}")
    chosen = list(dict.fromkeys(datasets or known))
    first = reference or chosen[0]
    if unknown := [name for name in dict.fromkeys([first, *chosen]) if name not in known]:
        raise HeadError(f"no {metric} on {', '.join(map(repr, unknown))}; the rows hold {', '.join(known)}")
    return first, [name for name in chosen if name != first]


def value_of(row: Row, dataset: str, metric: str) -> float | None:
    """A head's value on a data set; None if it was not evaluated or is not finite."""
    value = row.get(f"{dataset}:{metric}")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def mean_of(row: Row, datasets: Sequence[str], metric: str) -> float | None:
    """Unweighted mean over data sets; None if one is missing, since means over different sets are not comparable.

    Data sets that the head was fitted on (``shifted_left_out``) are left out.
    """
    datasets = [name for name in datasets if name not in row.get("shifted_left_out", ())]
    values = [value for name in datasets if (value := value_of(row, name, metric)) is not None]
    return sum(values) / len(values) if values and len(values) == len(datasets) else None


def shifts_of(rows: Sequence[Row], first: str, others: Sequence[str], metric: str = "top1") -> list[str]:
    """The shifted data sets among `others`: those on which some head was evaluated that was also evaluated on `first`.

    >>> shifts_of([{"a:top1": 0.9, "b:top1": 0.7}, {"c:top1": 0.8}], "a", ["b", "c"])
    ['b']
    """
    both = [row for row in rows if value_of(row, first, metric) is not None]
    return [name for name in others if any(value_of(row, name, metric) is not None for row in both)]


def point_of(row: Row, first: str, shifted: Sequence[str], metric: str) -> Point | None:
    """A head's value in-distribution and its mean over the shifted data sets; None if one is missing."""
    x, y = value_of(row, first, metric), mean_of(row, shifted, metric)
    return None if x is None or y is None else (x, y)


def curve_of(path: Sequence[Row], dataset: str, metric: str, factor: float = 1.0) -> npt.NDArray[np.float64]:
    """Alpha and value times `factor`, (A, 2), of the rows that were evaluated on the data set."""
    pairs = [(alpha_of(row) or 0.0, value_of(row, dataset, metric)) for row in path]
    return np.array([(alpha, value * factor) for alpha, value in pairs if value is not None])


def format_value(value: float | None, metric: Metric) -> str:
    """A value in the metric's unit, or a dash.

    >>> format_value(-1e-4, metric_of("top1"))  # no -0.0
    '0.0'
    """
    return "–" if value is None else f"{value * metric.factor:z.{metric.digits}f}"


def interval_text(row: Row, dataset: str, metric: str) -> str:
    """Spread of a value over seeds, or its confidence interval, without the unit; empty if the row has neither."""
    spread, shown = row.get(f"{dataset}:{metric}_spread"), metric_of(metric)
    if isinstance(spread, float):
        return f"± {format_value(spread, shown)}"
    ends = row.get(f"{dataset}:{metric}_interval")
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return ""
    return " to ".join(format_value(float(end), shown) for end in ends)


def choice_text(entry: Row) -> str:
    """The value of the chosen head on the selection split, in the unit of the metric, and the number of ties.

    >>> choice_text({"metric": "top1", "value": 1.0, "candidates": 11, "tied": 3})
    'top1 100.0 % there, best of 11; 3 tied, and the lowest NLL decided'
    >>> choice_text({"metric": "nll", "value": 0.25, "candidates": 2})
    'nll 0.250 nats there, best of 2'
    """
    metric = metric_of(entry["metric"])
    unit = f" {metric.unit}" if metric.unit in ("%", "nats") else ""
    tied = f"; {entry['tied']} tied, and the lowest NLL decided" if entry.get("tied", 1) > 1 else ""
    return f"{entry['metric']} {format_value(entry['value'], metric)}{unit} there, best of {entry['candidates']}{tied}"


def name_of(row: Row) -> str:
    """Name of the head of a row; for WiSE-FT's files, which name no heads, that of the experiment or model."""
    name = row.get("head") or row.get("name") or row.get("exp_name")
    if name or not is_wise_ft(row):
        return str(name or "head")
    model = f" {row['model']}" if row.get("model") else ""
    return f"WiSE-FT{model}, {'linear classifier' if row.get('freeze_encoder') else 'end to end'}"


def is_wise_ft(row: Row) -> bool:
    """Whether WiSE-FT's code wrote the row, which then contains its arguments."""
    return "eval_datasets" in row or "results_db" in row


def alpha_of(row: Row) -> float | None:
    """The interpolation coefficient of a row; None for a head that is not an interpolation."""
    alpha = row.get("alpha")
    return alpha if isinstance(alpha, float) else None


def label_of(row: Row) -> str:
    """Name of a head, with its protocol if it is not inductive, and its interpolation coefficient.

    >>> label_of({"head": "zero_shot+ridge", "alpha": 0.5}), label_of({"head": "transclip", "protocol": "transductive"})
    ('zero_shot+ridge α=0.5', 'transclip (transductive)')
    """
    alpha, protocol = alpha_of(row), row.get("protocol")
    name = name_of(row) if protocol is None else f"{name_of(row)} ({protocol})"
    return name if alpha is None else f"{name} α={alpha:g}"


def comparable(rows: Sequence[Row], title: str = "") -> list[bool]:
    """Which rows may be the best of a column: inductive heads, if there are any, that were not fitted on that data set.

    No row may be the best mean over the shifted data sets if the means leave out different ones.

    >>> comparable([{"head": "zero_shot"}, {"head": "transclip", "protocol": "transductive"}])
    [True, False]
    """
    left = [frozenset(row.get("shifted_left_out", ())) for row in rows]
    if title == MEAN and len(set(left)) > 1:
        return [False] * len(rows)
    left = [names.union(row.get("training_rows", ())) for names, row in zip(left, rows, strict=True)]
    inductive = [row.get("protocol") is None for row in rows]
    counted = inductive if any(inductive) else [True] * len(rows)
    return [counts and title not in names for counts, names in zip(counted, left, strict=True)]


def paths_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Interpolation rows by name, each path in ascending alpha; the first of repeated rows is used."""
    paths: dict[str, dict[float, Row]] = {}
    for row in rows:
        if (alpha := alpha_of(row)) is not None:
            paths.setdefault(name_of(row), {}).setdefault(alpha, row)
    return {name: [path[alpha] for alpha in sorted(path)] for name, path in paths.items()}


def log_line(row: Row) -> str:
    """Metrics of a row in the format of the last line of Lipsum-FT's log, which has the capped NLL (`nll_capped`).

    >>> log_line({"head": "zero_shot", "Real:top1": 0.8246, "Real:nll": 0.7306, "Real:nll_capped": 0.7305})
    'Real/acc 8.246e-01, Real/nll 7.305e-01'
    """
    return ", ".join(
        f"{name}/{shown} {row[f'{name}:{metric}']:.3e}"
        for name in datasets_of([row])
        for shown, metric in (("acc", "top1"), ("nll", "nll_capped"))
    )
