"""Lines that `featcache evaluate` prints below its table."""

from collections.abc import Sequence

from featcache.progress import counted
from featcache.store.protocol import FeatureTable
from heads.evaluation.evaluate import Judgement
from heads.evaluation.metrics import Row
from heads.evaluation.seen import fitted_on, names_only
from heads.fitted.base import LogitHead
from heads.report.rows import choice_text, datasets_of, interval_text, label_of, main_metrics
from heads.report.tables import aligned_lines

ALSO_SHOWN = {"macro_f1": "macro F1", "pm0": "pm-0 accuracy", "pm10": "pm-10 accuracy"}
"""Titles of metrics (fractions) that only some data sets have, or that are reported on request."""

INTERVALS = {
    "top1": {"top1": "top1 {} %", "nll": "nll {}"},
    "map_macro": {"map_macro": "mAP {} %", "f1_macro": "macro F1 {} %", "f1_micro": "micro F1 {} %"},
}
"""Forms of the intervals that are printed together, by their first metric."""

SHOWN_CLASSES = 40
"""Number of classes in the printed table of a multi-label head; the results file has all."""


def interval_lines(rows: Sequence[Row]) -> list[str]:
    """One line per head and store with intervals."""
    lines = []
    for row in rows:
        for first, forms in INTERVALS.items():
            for store in datasets_of([row], f"{first}_interval"):
                texts = [form.format(interval_text(row, store, metric)) for metric, form in forms.items()]
                lines.append(f"95 % interval of {label_of(row)} on {store}: {', '.join(texts)}")
    return lines


def worst_lines(rows: Sequence[Row]) -> list[str]:
    """The worst domain and groups of each head, and metrics without a column in the table."""
    lines = []
    for row in rows:
        main, name = main_metrics([row])[0], label_of(row)
        worst = row.get(f"shifted_worst_{main}")
        if worst is not None and worst < row[f"shifted_mean_{main}"]:
            lines.append(f"worst domain of {name}: {row['shifted_worst_domain']}, {100 * worst:.1f} %")
        for key in row:
            store, _, metric = key.rpartition(":")
            if metric == "worst_group":
                lines.append(f"worst group of {name} on {store}: {row[key]}, {100 * row[f'{key}_{main}']:.1f} %")
            if metric in ALSO_SHOWN:
                lines.append(f"{ALSO_SHOWN[metric]} of {name} on {store}: {100 * row[key]:.1f} %")
    return list(dict.fromkeys(lines))  # the chosen interpolation is one of its path


def class_lines(rows: Sequence[Row]) -> list[str]:
    """For multi-label heads, a table by class for each head and store, and the classes without a positive."""
    lines = []
    for row in rows:
        for store in datasets_of([row], "class_ap"):
            columns = [row[f"{store}:class_{name}"] for name in ("ap", "auroc", "f1")]
            counts = row[f"{store}:class_positives"]
            cells = [
                [name, *("–" if column[name] is None else f"{100 * column[name]:.1f}" for column in columns), f"{n:,}"]
                for name, n in list(counts.items())[:SHOWN_CLASSES]
            ]
            more = len(counts) - len(cells)
            lines += ["", f"{label_of(row)} on {store}, by class:"]
            lines += aligned_lines([["", "AP %", "AUROC %", "F1 %", "positives"], *cells], right=1)
            lines += [f"... and {more:,} more classes, in the results file"] * (more > 0)
            if left := row[f"{store}:left_out"]:
                lines.append(f"without a positive, left out of means over classes: {', '.join(left)}")
    return lines


def choice_line(head: LogitHead) -> str:
    """One line with the chosen alpha, the split it was chosen on, and its metric there."""
    choice = head.provenance.chosen_on[-1]
    return f"chosen on {choice['name']}/{choice['split']}: alpha = {head.alpha:g} ({choice_text(choice)})"


def shift_lines(judgement: Judgement, reference: str | None) -> list[str]:
    """Lines that name the reference, the shifted data sets, and those left out of means."""
    if len(judgement.stores) < 2:
        return []
    first = reference or next(iter(judgement.stores))
    shifted = ", ".join(label for label in judgement.stores if label != first)
    how = "" if reference else " (the first of --on; --reference names another)"
    lines = [f"reference: {first}{how}; shifted: {shifted}"]
    lines += [
        f"note: the means of {row['head']} leave out {', '.join(left)}, whose rows it was fitted on"
        for row in judgement.rows
        if (left := row.get("shifted_left_out"))
    ]
    return list(dict.fromkeys(lines))


def excluded_lines(row: Row) -> list[str]:
    """A line for each data set of which rows were left out."""
    counts = {key.removesuffix(":n_excluded"): count for key, count in row.items() if key.endswith(":n_excluded")}
    what = "that a head was fitted or chosen on left out of"
    return [f"{counted(count, 'row')} {what} {label}" for label, count in counts.items() if count]


def seen_lines(heads: Sequence[LogitHead], stores: Sequence[FeatureTable], judgement: Judgement) -> list[str]:
    """Lines on excluded rows, on training rows that were evaluated, and on splits that were compared by name only."""
    row = judgement.rows[0]
    lines = excluded_lines(row)
    for head in heads:
        for label, store in zip(judgement.stores, stores, strict=True):
            where = f"{store.name}/{store.split}"
            if f"{label}:n_excluded" not in row and fitted_on(head, store):
                lines.append(f"note: {head.name} was fitted on {where}; its figures there are those of training rows")
        if unknown := dict.fromkeys(name for store in stores for name in names_only(head, store)):
            names = ", ".join(unknown)
            lines.append(f"note: {head.name} has no hashes of the rows of {names}: only names were compared")
    return lines
