"""Results rows as CSV, Markdown, LaTeX, and text for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from heads.evaluation.metrics import METRICS, Row, metric_of
from heads.report.rows import alpha_of, choose_datasets, datasets_of, label_of
from heads.report.tables import bold_cells, markdown_table, table_text


@dataclass(frozen=True)
class Shown:
    """Selection of results to show.

    Attributes
    ----------
    datasets : data sets, in order; None for all in the rows
    reference : the in-distribution data set; None for the first
    metrics : metrics, one table each; those that the rows lack are left out
    width : maximal number of characters per line of text
    """

    datasets: Sequence[str] | None = None
    reference: str | None = None
    metrics: Sequence[str] = ("top1", "nll")
    width: int = 110

    def places(self, rows: Sequence[Row], metric: str) -> tuple[str, list[str]]:
        """The in-distribution data set and the shifted ones, as `choose_datasets`."""
        return choose_datasets(rows, self.datasets, self.reference, metric)

    def present(self, rows: Sequence[Row]) -> list[str]:
        """The metrics that the rows have, and the first one in any case, so that an error names it if it is missing."""
        return [m for i, m in enumerate(self.metrics) if i == 0 or datasets_of(rows, m)]


def as_text(rows: Sequence[Row], shown: Shown) -> str:
    """Tables for the terminal; metrics that some data sets lack have separate tables."""
    first, shifted = shown.places(rows, shown.metrics[0])
    everywhere = [m for m in shown.present(rows) if {first, *shifted} <= set(datasets_of(rows, m))]
    return table_text(rows, [first, *shifted], everywhere, reference=first, width=shown.width)


def as_csv(rows: Sequence[Row], shown: Shown) -> str:
    r"""One line per head: its name, alpha, model, and a column per data set and metric, as in the rows.

    Every metric is written, not only those shown.

    Examples
    --------
    >>> print(as_csv([{"head": "ridge", "encoder": "tiny", "digits:top1": 0.5}], Shown()))
    head,alpha,model,digits:top1
    ridge,,tiny,0.5
    <BLANKLINE>
    """
    first, shifted = shown.places(rows, shown.metrics[0])
    known = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    names = list(dict.fromkeys([*shown.metrics, *METRICS]))
    columns = [key for data in (first, *shifted) for m in names if (key := f"{data}:{m}") in known]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["head", "alpha", "model", *columns])
    for row in rows:
        place = [label_of({**row, "alpha": None}), alpha_of(row), row.get("encoder") or row.get("model")]
        writer.writerow([*place, *(row.get(key) for key in columns)])
    return out.getvalue()


def as_markdown(rows: Sequence[Row], shown: Shown) -> str:
    """A Markdown table per metric."""
    tables = []
    for metric in shown.present(rows):
        first, shifted = _places(rows, shown, metric)
        tables.append(markdown_table(rows, [first, *shifted], metric=metric, reference=first))
    return "\n\n".join(tables) + "\n"


def as_latex(rows: Sequence[Row], shown: Shown) -> str:
    r"""A ``tabular`` per metric, with booktabs' rules; the best of each column bold.

    Examples
    --------
    >>> print(as_latex([{"head": "zero_shot", "a:top1": 0.8}, {"head": "ridge", "a:top1": 0.9}], Shown()))
    % \usepackage{booktabs}
    \begin{tabular}{lr}
    \toprule
    Accuracy, \% & a \\
    \midrule
    zero\_shot & 80.0 \\
    ridge & \textbf{90.0} \\
    \bottomrule
    \end{tabular}
    <BLANKLINE>
    """
    parts = [r"% \usepackage{booktabs}"]
    for metric in shown.present(rows):
        metric_shown = metric_of(metric)
        cells = bold_cells(rows, *_places(rows, shown, metric), metric, best=r"\textbf{{{}}}")
        head = [f"{metric_shown.title}, {metric_shown.unit}", *cells]
        lines = [[label_of(row), *(column[i] for column in cells.values())] for i, row in enumerate(rows)]
        parts.append(latex_table(head, lines))
    return "\n".join(parts) + "\n"


def latex_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A ``tabular`` with one text column and number columns; the numbers may contain LaTeX commands."""
    body = [_latex_line([latex_text(first), *cells]) for first, *cells in lines]
    top = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", _latex_line(map(latex_text, header))]
    return "\n".join([*top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


def latex_text(text: str) -> str:
    r"""A name as LaTeX shows it: one line, without commands.

    Examples
    --------
    >>> print(latex_text("a_b & 50% α=1"))
    a\_b \& 50\% $\alpha$=1
    """
    line = "".join(char if char.isprintable() else " " for char in text)
    return "".join(LATEX.get(char, char) for char in line)


LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "α": r"$\alpha$",
    "–": "--",
}


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _places(rows: Sequence[Row], shown: Shown, metric: str) -> tuple[str, list[str]]:
    """The data sets that have a metric; if the reference does not, the first of them takes its place."""
    first, shifted = shown.places(rows, shown.metrics[0])
    known = [name for name in (first, *shifted) if name in datasets_of(rows, metric)]
    return choose_datasets(rows, known, known[0], metric) if known else (first, shifted)


FORMATS: dict[str, Callable[[Sequence[Row], Shown], str]] = {
    "text": as_text,
    "csv": as_csv,
    "markdown": as_markdown,
    "latex": as_latex,
}
"""Name -> text of results rows."""

ENDINGS = {"csv": "csv", "latex": "tex"}
"""Formats that a report also writes to files, and the extensions of these files."""
