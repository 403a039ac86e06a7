"""The report as a self-contained HTML page. The only file that imports Jinja2.

External text (names of heads, data sets and classes) is escaped by Jinja2, control characters are replaced, and the
page's content security policy allows only its own script, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featcache import __version__
from featcache.store.places.targets import write_target
from heads.evaluation.metrics import ALL_METRICS, Metric, Row, metric_of
from heads.report.against import Comparison
from heads.report.charts import (
    HEIGHT,
    LEFT,
    WIDTH,
    Chart,
    Curve,
    alpha_charts,
    curve_chart,
    reliability_chart,
    robustness_chart,
)
from heads.report.details import Confusion, Detail
from heads.report.formats import Shown
from heads.report.rows import alpha_of, comparable, datasets_of, format_value, label_of, shifts_of, value_of
from heads.report.tables import CHANGES, columns_of

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
MOST_BYTES = 2_000_000
MOST_CLASSES, MOST_CONFUSIONS, MOST_HEADS, MOST_IN_GROUPS = 40, 12, 1000, 8


@dataclass(frozen=True)
class Background:
    """Optional content of a report besides the rows.

    Attributes
    ----------
    notes : paragraphs of plain text under the title
    details : from `heads.report.details.head_details`
    published : from `heads.report.against.compare_published`
    curves : charts of paths over C, shots or updates
    facts : sections of labelled texts, such as ``{"Cost": {"encoding": "4.1 s"}}``, in order; empty ones are left out
    """

    notes: Sequence[str] = ()
    details: Sequence[Detail] = ()
    published: Sequence[Comparison] = ()
    curves: Sequence[Curve] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A value of a table: text, value to sort by, smaller text, shade in [0, 1], mark of the best, and what hovering
    shows.
    """

    text: str
    value: float | None = None
    interval: str = ""
    shade: float | None = None
    best: bool = False
    tip: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page: column and row headings, and a row of cells for each head or class."""

    title: str
    corner: str
    columns: Sequence[str]
    lines: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Content of the template."""

    title: str
    made: str
    legend: str
    notes: Sequence[str]
    tables: Sequence[Table]
    scatters: Sequence[Chart]
    scatter_note: str
    paths: Sequence[Chart]
    reliability: Sequence[Chart]
    reliability_note: str
    classes: Sequence[Table]
    confusions: Sequence[Confusion]
    confusion_note: str
    groups: Sequence[Table]
    published: Sequence[Comparison]
    facts: Mapping[str, Mapping[str, str]]


def write_page(
    rows: Sequence[Row],
    path: str | Path,
    shown: Shown | None = None,
    *,
    title: str = "Evaluation",
    background: Background | None = None,
) -> Path:
    """Write the page of some results rows, at most 2 MB.

    If not all heads fit, the best by the first metric on the in-distribution data set are shown, with a note.

    Parameters
    ----------
    rows : one per head, as `heads.evaluate` returns them
    path : HTML file; its folder is created
    shown : data sets and metrics
    title : heading
    background : further content

    Raises
    ------
    HeadError
        If the rows lack a data set or metric.
    """
    shown, background = shown or Shown(), background or Background()
    kept, most = list(rows), min(len(rows), MOST_HEADS)
    while True:
        page = _page(_best_rows(kept, most, shown), shown, title, background, hidden=len(kept) - most)
        text = _environment().get_template("page.html").render(page=page, **_constants())
        data = text.encode()
        if len(data) <= MOST_BYTES or most <= 10:
            break
        most = most * 3 // 4
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_target(path, data)
    return path


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )


UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Control characters, bidirectional controls, zero-width characters, and lone surrogates."""


def _plain(value: object) -> object:
    """A value as it is shown: in strings, each character of `UNSEEN` is replaced by U+FFFD."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


@cache
def _constants() -> dict[str, object]:
    from markupsafe import Markup

    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    files: dict[str, object] = {"style": Markup(style), "script": Markup(script)}
    return {**files, "policy": policy, "left": LEFT, "width": WIDTH, "height": HEIGHT, "version": __version__}


def _best_rows(rows: Sequence[Row], most: int, shown: Shown) -> list[Row]:
    """At most `most` rows, the best ones, in the order given."""
    if len(rows) <= most:
        return list(rows)
    first, _ = shown.places(rows, shown.metrics[0])
    sign = 1 if metric_of(shown.metrics[0]).higher_is_better else -1
    values = [value_of(row, first, shown.metrics[0]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (values[i] is None, -sign * (values[i] or 0.0)))
    return [rows[i] for i in sorted(order[:most])]


def _page(rows: Sequence[Row], shown: Shown, title: str, background: Background, hidden: int) -> Page:
    first, shifted = shown.places(rows, shown.metrics[0]) if rows else ("", [])
    metrics = [m for m in shown.present(rows) if m in ALL_METRICS] if rows else []
    named = ", ".join(filter(None, (first, *shifted)))
    legend = f"Evaluated on {named}." if named not in title else ""
    if shifts := shifts_of(rows, first, shifted, shown.metrics[0]):
        legend = f"In-distribution: {first}. Shifted: {', '.join(shifts)}. The shifted mean is unweighted."
    if hidden:
        legend += f" The best {len(rows):,} of {len(rows) + hidden:,} heads by {shown.metrics[0]} on {first} are shown."
    return Page(
        title=title,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        legend=legend,
        notes=[note for note in background.notes if note.strip()],
        tables=[headline(rows, first, shifted, metric) for metric in metrics],
        scatter_note=_scatter_note(rows),
        scatters=_scatters(rows, first, shifts) if "top1" in metrics else [],
        paths=[*alpha_charts(rows, [first, *shifted], metrics), *map(curve_chart, background.curves)],
        reliability=_reliability_charts(background.details),
        reliability_note=_reliability_note(background.details),
        classes=[*class_tables(background.details), *multilabel_tables(rows)],
        confusions=sorted((c for d in background.details for c in d.confusions), key=lambda c: -c.rows)[
            :MOST_CONFUSIONS
        ],
        confusion_note=_confusion_note(background.details),
        groups=group_tables(rows),
        published=background.published,
        facts={name: facts for name, facts in background.facts.items() if facts},
    )


def _scatter_note(rows: Sequence[Row]) -> str:
    marks = (
        " Star: α = 0, diamond: α = 1, thin diamonds between." if any(alpha_of(row) is not None for row in rows) else ""
    )
    return f"Both axes are logit-scaled.{marks} On the dashed line a shift costs nothing."


def _scatters(rows: Sequence[Row], first: str, shifted: Sequence[str]) -> list[Chart]:
    """Against the mean of the shifts, then against each."""
    wanted = [list(shifted)] if len(shifted) > 1 else []
    wanted += [[name] for name in shifted]
    return [chart for names in wanted if (chart := robustness_chart(rows, first, names)) is not None]


def headline(rows: Sequence[Row], first: str, shifted: Sequence[str], metric: str) -> Table:
    """A line per head, a column per data set; shaded from the worst to the best of each column."""
    shown = metric_of(metric)
    known = datasets_of(rows, metric)
    start = first if first in known else known[0]
    columns = columns_of(rows, start, [name for name in shifted if name in known and name != start], metric)
    made = {
        title: _column(
            values,
            shown,
            [_interval(row, title, metric, shown) for row in rows],
            comparable(rows, title) if title not in CHANGES else [],
        )
        for title, values in columns.items()
    }
    labels = [label_of(row) for row in rows]
    lines = []
    for i, row in enumerate(rows):
        chosen = ", chosen" if labels.index(labels[i]) < i and row.get("chosen_on") else ""
        lines.append((labels[i] + chosen, [cells[i] for cells in made.values()]))
    return Table(f"{shown.title}, {shown.unit}", "head", list(made), lines)


def _column(
    values: Sequence[float | None], shown: Metric, intervals: Sequence[str], counted: Sequence[bool]
) -> list[Cell]:
    """Cells of a column; the best of the counted values is marked, if any is counted."""
    mark = any(counted)
    counts = counted if mark else [True] * len(values)
    known = [value for value, one in zip(values, counts, strict=True) if one and value is not None]
    best = (max(known) if shown.higher_is_better else min(known)) if known else 0.0
    span = (max(known) - min(known)) if known else 0.0
    winner = format_value(best, shown)
    cells = []
    for value, interval, one in zip(values, intervals, counts, strict=True):
        text = format_value(value, shown)
        shade = None if value is None or not (mark and one) or not span else 1 - abs(value - best) / span
        cells.append(Cell(text, value, interval, shade, mark and one and len(values) > 1 and text == winner))
    return cells


def _interval(row: Row, dataset: str, metric: str, shown: Metric) -> str:
    spread = row.get(f"{dataset}:{metric}_spread")
    if isinstance(spread, float):
        return f"± {format_value(spread, shown)}"
    ends = row.get(f"{dataset}:{metric}_interval")
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return ""
    return " to ".join(format_value(float(end), shown) for end in ends)


def _reliability_charts(details: Sequence[Detail]) -> list[Chart]:
    charts = []
    for detail in details:
        found = {"before": detail.reliability}
        if detail.calibrated is not None:
            found["after temperature scaling"] = detail.calibrated
        errors = " → ".join(f"{100 * one.ece:.1f}" for one in found.values())
        title = f"{detail.dataset}: ECE {errors} %"
        lines = {f"{when}, NLL {one.nll:.3f}": one.bins for when, one in found.items()}
        charts.append(reliability_chart(title, lines))
    return charts


def _reliability_note(details: Sequence[Detail]) -> str:
    if not details:
        return ""
    scaled = any(detail.calibrated for detail in details)
    tail = "" if scaled else " With a validation split (--calibrate STORE), also after temperature scaling."
    bins = "A point is one of 15 bins; its area grows with its rows. ECE: expected calibration error."
    return f"Head: {details[0].head}. {bins}{tail}"


def class_tables(details: Sequence[Detail]) -> list[Table]:
    """Recall of each class on each data set; where there are many classes, those with the lowest mean."""
    alike: dict[tuple[str, ...], list[Detail]] = {}
    for detail in details:
        alike.setdefault(detail.classnames, []).append(detail)
    return [_class_table(names, group) for names, group in alike.items()]


def _class_table(names: Sequence[str], group: Sequence[Detail]) -> Table:
    """The table of the data sets that have these classes."""
    rows = np.stack([detail.class_rows for detail in group], 1)
    hits = np.stack([detail.class_hits for detail in group], 1)
    present = np.flatnonzero((rows > 0).any(1))
    recall = np.where(rows > 0, hits / np.maximum(rows, 1), np.nan)
    kept, note = present, ""
    if len(present) > MOST_CLASSES:
        means = np.nanmean(recall[present], axis=1)
        kept = present[np.sort(np.argsort(means, kind="stable")[:MOST_CLASSES])]
        note = f"the {len(kept)} of {len(present):,} classes with the lowest mean"
    shown = Metric("Recall", "%", higher_is_better=True)
    lines = []
    for c in kept:
        values = [None if np.isnan(v) else float(v) for v in recall[c]]
        cells = [
            Cell(format_value(v, shown), v, shade=v, tip=f"{n:,} rows") for v, n in zip(values, rows[c], strict=True)
        ]
        lines.append((names[int(c)], cells))
    return Table("Recall by class, %", "class", [detail.dataset for detail in group], lines, note)


def multilabel_tables(rows: Sequence[Row]) -> list[Table]:
    """Average precision, AUROC and F1 of each class, a table per data set and head.

    Of many classes, those with the lowest average precision are shown.
    """
    shown = Metric("", "%", higher_is_better=True)
    tables = []
    for dataset in datasets_of(rows, "class_ap"):
        for row in [row for row in rows if isinstance(row.get(f"{dataset}:class_ap"), dict)][:MOST_IN_GROUPS]:
            columns = [row[f"{dataset}:class_{metric}"] for metric in ("ap", "auroc", "f1")]
            counts = row[f"{dataset}:class_positives"]
            known = [name for name in counts if columns[0].get(name) is not None]
            lowest = sorted(known, key=lambda name: columns[0][name])[:MOST_CLASSES]
            lines = [
                (
                    name,
                    [
                        *(Cell(format_value(v, shown), v, shade=v) for v in (column.get(name) for column in columns)),
                        Cell(f"{counts[name]:,}", float(counts[name])),
                    ],
                )
                for name in (known if len(lowest) == len(known) else lowest)
            ]
            notes = [] if len(lines) == len(known) else [f"the {len(lines)} of {len(known):,} of the lowest precision"]
            left = row.get(f"{dataset}:left_out") or []
            notes += [f"without a positive: {', '.join(left[:MOST_CLASSES])}"] if left else []
            title = f"By class, {label_of(row)} on {dataset}"
            heading = ["average precision, %", "AUROC, %", "F1, %", "positives"]
            tables.append(Table(title, "class", heading, lines, "; ".join(notes)))
    return tables


def _confusion_note(details: Sequence[Detail]) -> str:
    """Why pictures are missing, for the data sets that have none."""
    why: dict[str, list[str]] = {}
    for detail in details:
        if detail.no_pictures:
            why.setdefault(detail.no_pictures, []).append(detail.dataset)
    return "; ".join(f"no pictures of {', '.join(names)}: {reason}" for reason, names in why.items())


def group_tables(rows: Sequence[Row]) -> list[Table]:
    """Accuracy or mAP by group, a table per data set that has any.

    Of many groups the worst are shown, of interpolations the chosen.
    """
    found = [(dataset, metric) for metric in ("top1", "map_macro") for dataset in datasets_of(rows, f"group_{metric}")]
    tables = []
    for dataset, metric in found:
        key, shown = f"{dataset}:group_{metric}", metric_of(metric)
        of = [row for row in rows if isinstance(row.get(key), dict)]
        of = [row for row in of if alpha_of(row) is None or row.get("chosen_on")][:MOST_IN_GROUPS] or of[
            :MOST_IN_GROUPS
        ]
        counts = of[0].get(f"{dataset}:group_rows") or {}
        groups = sorted(of[0][key], key=lambda name: min(_or_one(row[key].get(name)) for row in of))
        kept = groups[:MOST_CLASSES]
        lines = [
            (
                f"{name} ({counts.get(name, 0):,} rows)",
                [Cell(format_value(v, shown), v, shade=v) for v in (row[key].get(name) for row in of)],
            )
            for name in kept
        ]
        note = "" if len(kept) == len(groups) else f"the {len(kept)} worst of {len(groups):,} groups"
        tables.append(Table(f"{shown.title} by group on {dataset}, %", "group", list(map(label_of, of)), lines, note))
    return tables


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value


def provenance_facts(rows: Sequence[Row], most: int = 30) -> dict[str, str]:
    """Provenance of heads: model, parameters, and the splits they were fitted and chosen on."""
    facts: dict[str, str] = {}
    for row in rows:
        parts = [str(row.get("encoder") or row.get("model") or "")]
        parts += _listed(row.get("params") or row.get("setting") or {})
        for key, verb in (("fitted_on", "fitted on"), ("chosen_on", "chosen on")):
            names = [split_text(split) for split in row.get(key) or () if isinstance(split, dict)]
            parts += [f"{verb} {' + '.join(names)}"] if names else []
        if any(parts) and (alpha_of(row) is None or row.get("chosen_on")):
            facts.setdefault(label_of(row), "; ".join(filter(None, parts)))
        if len(facts) >= most:
            break
    return facts


def split_text(split: Mapping[str, object]) -> str:
    """A split of a provenance record as ``name/split``."""
    name, part = split.get("name"), split.get("split")
    return f"{name}/{part}" if part else f"texts/{name}"


def _listed(params: object) -> Iterable[str]:
    if not isinstance(params, Mapping):
        return []
    texts = [f"{key} {_short(value)}" for key, value in params.items() if value is not None]
    return [text if len(text) <= 60 else f"{text[:59]}…" for text in texts]


def _short(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    if isinstance(value, Mapping):
        return str(value.get("head", "…"))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def with_facts(background: Background, **facts: Mapping[str, str]) -> Background:
    """The background with further sections of facts."""
    return replace(background, facts={**background.facts, **facts})
