"""Results rows as CSV, Markdown, LaTeX, and text for the terminal."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heads.evaluation.metrics import METRICS, Row
from heads.report.rows import alpha_of, choose_datasets, datasets_of, label_of
from heads.report.tables import best_marked, markdown_table, table_text


@dataclass(frozen=True)
class Shown:
    """Which results to show."""

    datasets: Sequence[str] | None = None  # in order; None for all in the rows
    reference: str | None = None  # the in-distribution data set; None for the first
    metrics: Sequence[str] = ("top1", "nll")  # one table each; those that the rows lack are left out
    width: int = 110  # most characters per line of text

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
    tables = [
        latex_table(*best_marked(rows, *_places(rows, shown, metric), metric, best=r"\textbf{{{}}}"))
        for metric in shown.present(rows)
    ]
    return "\n".join([r"% \usepackage{booktabs}", *tables]) + "\n"


def latex_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A ``tabular`` with one text column and number columns; the numbers may contain LaTeX commands."""
    cells = [map(latex_text, header), *([latex_text(first), *others] for first, *others in lines)]
    top, *body = (" & ".join(line) + r" \\" for line in cells)
    begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    return "\n".join([begin, r"\toprule", top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


def latex_text(text: str) -> str:
    r"""A name as one line of LaTeX without commands.

    >>> print(latex_text("a_b & 50% α=1"))
    a\_b \& 50\% $\alpha$=1
    """
    return "".join(LATEX.get(char, char if char.isprintable() else " ") for char in text)


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


def _places(rows: Sequence[Row], shown: Shown, metric: str) -> tuple[str, list[str]]:
    """The data sets that have a metric; the first of them is the reference if the reference lacks it."""
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
