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
from heads.kernels.calibration_bins import CALIBRATION_BINS
from heads.report import charts
from heads.report.against import Comparison
from heads.report.details import Detail
from heads.report.formats import Shown
from heads.report.rows import alpha_of, comparable, datasets_of, format_value, interval_text, label_of, shifts_of
from heads.report.tables import CHANGES, columns_of

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"
MOST_BYTES = 2_000_000
MOST_CLASSES, MOST_CONFUSIONS, MOST_HEADS, MOST_IN_GROUPS = 40, 12, 1000, 8
PERCENT = Metric("", "%", higher_is_better=True)


@dataclass(frozen=True)
class Background:
    """Content of a report besides the rows."""

    notes: Sequence[str] = ()  # paragraphs of plain text under the title
    details: Sequence[Detail] = ()
    published: Sequence[Comparison] = ()
    curves: Sequence[charts.Curve] = ()  # paths over C, shots or updates
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # such as {"Cost": {"encoding": "4.1 s"}}


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `value` sorts the column, `interval` is shown smaller, `shade` is in [0, 1]."""

    text: str
    value: float | None = None
    interval: str = ""
    shade: float | None = None
    best: bool = False
    tip: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page, with a line of cells for each head, class or group; `corner` says which."""

    title: str
    corner: str
    columns: Sequence[str]
    lines: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""


def write_page(
    rows: Sequence[Row],
    path: str | Path,
    shown: Shown | None = None,
    *,
    title: str = "Evaluation",
    background: Background | None = None,
) -> Path:
    """Write results rows as an HTML page of at most 2 MB; HeadError if they lack a data set or metric of `shown`.

    If not all heads fit, those with the best value of the first metric on the in-distribution data set are shown.
    """
    shown, background = shown or Shown(), background or Background()
    most = min(len(rows), MOST_HEADS)
    while True:
        page = _page(_best_rows(rows, most, shown), shown, title, background, hidden=len(rows) - most)
        data = _template().render(page=page).encode()
        if len(data) <= MOST_BYTES or most <= 10:
            break
        most = most * 3 // 4
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_target(path, data)
    return path


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    files = {"style": Markup(style), "script": Markup(script), "policy": policy}
    sizes = {"left": charts.LEFT, "width": charts.WIDTH, "height": charts.HEIGHT}
    jinja = Environment(
        trim_blocks=True, lstrip_blocks=True, autoescape=True, finalize=_plain, undefined=StrictUndefined
    )
    jinja.loader, jinja.finalize = FileSystemLoader(TEMPLATES), _plain
    return jinja.get_template("page.html", globals={**files, **sizes, "version": __version__})


UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Control characters, bidirectional controls, zero-width characters, and lone surrogates."""


def _plain(value: object) -> object:
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _best_rows(rows: Sequence[Row], most: int, shown: Shown) -> Sequence[Row]:
    """At most `most` rows, the best ones, in the order given."""
    if len(rows) <= most:
        return rows
    metric = shown.metrics[0]
    first, _ = shown.places(rows, metric)
    sign = -1 if metric_of(metric).higher_is_better else 1
    values = columns_of(rows, first, [], metric)[first]
    order = sorted(range(len(rows)), key=lambda i: (values[i] is None, sign * (values[i] or 0.0)))
    return [rows[i] for i in sorted(order[:most])]


def _page(rows: Sequence[Row], shown: Shown, title: str, background: Background, hidden: int) -> dict[str, object]:
    """Content of the template; `hidden` heads are left out of the rows."""
    first, shifted = shown.places(rows, shown.metrics[0]) if rows else ("", [])
    metrics = [m for m in shown.present(rows) if m in ALL_METRICS] if rows else []
    named = ", ".join(filter(None, (first, *shifted)))
    legend = f"Evaluated on {named}." if named not in title else ""
    if shifts := shifts_of(rows, first, shifted, shown.metrics[0]):
        legend = f"In-distribution: {first}. Shifted: {', '.join(shifts)}. The shifted mean is unweighted."
    if hidden:
        legend += f" The best {len(rows):,} of {len(rows) + hidden:,} heads by {shown.metrics[0]} on {first} are shown."
    # A chart against the mean over the shifted data sets, then one against each.
    over = [*([shifts] if len(shifts) > 1 else []), *([name] for name in shifts)] if "top1" in metrics else []
    interpolated = any(alpha_of(row) is not None for row in rows)
    marks = " Star: α = 0, diamond: α = 1, thin diamonds between." if interpolated else ""
    details = background.details
    confusions = sorted((c for detail in details for c in detail.confusions), key=lambda c: -c.rows)
    return {
        "title": title,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "legend": legend,
        "notes": [note for note in background.notes if note.strip()],
        "tables": [headline(rows, first, shifted, metric) for metric in metrics],
        "scatters": [chart for names in over if (chart := charts.robustness_chart(rows, first, names)) is not None],
        "scatter_note": f"Both axes are logit-scaled.{marks} The dashed line is equal accuracy on both.",
        "paths": [*charts.alpha_charts(rows, [first, *shifted], metrics), *map(charts.curve_chart, background.curves)],
        "reliability": list(map(_reliability_chart, details)),
        "reliability_note": _reliability_note(details) if details else "",
        "classes": [*class_tables(details), *multilabel_tables(rows)],
        "confusions": confusions[:MOST_CONFUSIONS],
        "confusion_note": _confusion_note(details),
        "groups": group_tables(rows),
        "published": background.published,
        "facts": {name: facts for name, facts in background.facts.items() if facts},
    }


def headline(rows: Sequence[Row], first: str, shifted: Sequence[str], metric: str) -> Table:
    """A line per head, a column per data set, each shaded from its worst value to its best."""
    shown = metric_of(metric)
    known = datasets_of(rows, metric)
    start = first if first in known else known[0]
    columns = columns_of(rows, start, [name for name in shifted if name in known and name != start], metric)
    cells = []
    for title, values in columns.items():
        intervals = [interval_text(row, title, metric) for row in rows]
        counted = [False] * len(rows) if title in CHANGES else comparable(rows, title)
        cells.append(_column(values, shown, intervals, counted))
    lines = []
    labels = [label_of(row) for row in rows]
    for i, (row, *line) in enumerate(zip(rows, *cells, strict=True)):
        chosen = ", chosen" if labels.index(labels[i]) < i and row.get("chosen_on") else ""
        lines.append((labels[i] + chosen, line))
    return Table(f"{shown.title}, {shown.unit}", "head", list(columns), lines)


def _column(
    values: Sequence[float | None], shown: Metric, intervals: Sequence[str], counted: Sequence[bool]
) -> list[Cell]:
    """Cells of a column; those that count are shaded, and the best of them is marked."""
    known = [value for value, counts in zip(values, counted, strict=True) if counts and value is not None]
    best = (max(known) if shown.higher_is_better else min(known)) if known else None
    span = max(known) - min(known) if known else 0.0
    cells = []
    for value, interval, counts in zip(values, intervals, counted, strict=True):
        text = format_value(value, shown)
        if not counts or value is None or best is None:
            cells.append(Cell(text, value, interval))
            continue
        shade = 1 - abs(value - best) / span if span else None
        cells.append(Cell(text, value, interval, shade, len(values) > 1 and text == format_value(best, shown)))
    return cells


def _reliability_chart(detail: Detail) -> charts.Chart:
    found = {detail.head: detail.reliability}
    if detail.calibrated is not None:
        found = {"before": detail.reliability, "after temperature scaling": detail.calibrated}
    errors = " → ".join(f"{100 * one.ece:.1f}" for one in found.values())
    lines = {f"{when}, NLL {one.nll:.3f}": one.bins for when, one in found.items()}
    return charts.reliability_chart(f"{detail.dataset}: ECE {errors} %", lines)


def _reliability_note(details: Sequence[Detail]) -> str:
    scaled = any(detail.calibrated for detail in details)
    tail = "" if scaled else " With a validation split (--calibrate STORE), also after temperature scaling."
    bins = f"A point is one of {CALIBRATION_BINS} bins; its area grows with its rows."
    return f"Head: {details[0].head}. {bins} ECE: expected calibration error.{tail}"


def class_tables(details: Sequence[Detail]) -> list[Table]:
    """Recall by class, a table for the data sets with the same classes; of many classes those with the lowest mean."""
    alike: dict[tuple[str, ...], list[Detail]] = {}
    for detail in details:
        alike.setdefault(detail.classnames, []).append(detail)
    return [_class_table(names, group) for names, group in alike.items()]


def _class_table(names: Sequence[str], group: Sequence[Detail]) -> Table:
    rows = np.stack([detail.class_rows for detail in group], 1)
    hits = np.stack([detail.class_hits for detail in group], 1)
    present = np.flatnonzero((rows > 0).any(1))
    recall = np.where(rows > 0, hits / np.maximum(rows, 1), np.nan)
    kept, note = present, ""
    if len(present) > MOST_CLASSES:
        means = np.nanmean(recall[present], axis=1)
        kept = present[np.sort(np.argsort(means, kind="stable")[:MOST_CLASSES])]
        note = f"the {len(kept)} of {len(present):,} classes with the lowest mean"
    lines = []
    for c in kept:
        cells = _shaded(None if np.isnan(v) else float(v) for v in recall[c])
        tips = [f"{n:,} rows" for n in rows[c]]
        lines.append((names[int(c)], [replace(cell, tip=tip) for cell, tip in zip(cells, tips, strict=True)]))
    return Table("Recall by class, %", "class", [detail.dataset for detail in group], lines, note)


def _shaded(values: Iterable[float | None]) -> list[Cell]:
    """Cells of fractions in [0, 1], each shaded by its value."""
    return [Cell(format_value(value, PERCENT), value, shade=value) for value in values]


def multilabel_tables(rows: Sequence[Row]) -> list[Table]:
    """Average precision, AUROC and F1 by class, a table per data set and head; the lowest of many."""
    tables = []
    for dataset in datasets_of(rows, "class_ap"):
        for row in [row for row in rows if isinstance(row.get(f"{dataset}:class_ap"), dict)][:MOST_IN_GROUPS]:
            columns = [row[f"{dataset}:class_{metric}"] for metric in ("ap", "auroc", "f1")]
            counts = row[f"{dataset}:class_positives"]
            known = [name for name in counts if columns[0].get(name) is not None]
            lowest = sorted(known, key=lambda name: columns[0][name])[:MOST_CLASSES]
            lines = []
            for name in known if len(lowest) == len(known) else lowest:
                count = Cell(f"{counts[name]:,}", float(counts[name]))
                lines.append((name, [*_shaded(column.get(name) for column in columns), count]))
            notes = []
            if len(lines) < len(known):
                notes.append(f"the {len(lines)} of {len(known):,} classes with the lowest precision")
            if left := row.get(f"{dataset}:left_out"):
                notes.append(f"without a positive: {', '.join(left[:MOST_CLASSES])}")
            title = f"By class, {label_of(row)} on {dataset}"
            heading = ["average precision, %", "AUROC, %", "F1, %", "positives"]
            tables.append(Table(title, "class", heading, lines, "; ".join(notes)))
    return tables


def _confusion_note(details: Sequence[Detail]) -> str:
    """Why some data sets have no pictures."""
    why: dict[str, list[str]] = {}
    for detail in details:
        if detail.no_pictures:
            why.setdefault(detail.no_pictures, []).append(detail.dataset)
    return "; ".join(f"no pictures of {', '.join(names)}: {reason}" for reason, names in why.items())


def group_tables(rows: Sequence[Row]) -> list[Table]:
    """Accuracy or mAP by group, a table per data set; of many groups the worst, of interpolations the chosen ones."""
    found = [(dataset, metric) for metric in ("top1", "map_macro") for dataset in datasets_of(rows, f"group_{metric}")]
    tables = []
    for dataset, metric in found:
        key = f"{dataset}:group_{metric}"
        of = [row for row in rows if isinstance(row.get(key), dict)]
        of = ([row for row in of if alpha_of(row) is None or row.get("chosen_on")] or of)[:MOST_IN_GROUPS]
        counts = of[0].get(f"{dataset}:group_rows") or {}
        values = {name: [row[key].get(name) for row in of] for name in of[0][key]}
        groups = sorted(values, key=lambda name: min(1.0 if v is None else v for v in values[name]))
        kept = groups[:MOST_CLASSES]
        lines = [(f"{name} ({counts.get(name, 0):,} rows)", _shaded(values[name])) for name in kept]
        note = "" if len(kept) == len(groups) else f"the {len(kept)} worst of {len(groups):,} groups"
        title = f"{metric_of(metric).title} by group on {dataset}, %"
        tables.append(Table(title, "group", list(map(label_of, of)), lines, note))
    return tables
