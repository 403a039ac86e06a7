"""Write the report of an evaluation to a folder: HTML and Markdown pages, tables, and plots."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featcache.store.places.targets import write_target
from heads.evaluation.metrics import METRICS, Row
from heads.report.against import HEADER, comparison_cells
from heads.report.formats import ENDINGS, FORMATS, Shown
from heads.report.plots import plot_nll_against_alpha, plot_robustness
from heads.report.rows import alpha_of, choose_datasets, datasets_of, paths_of, point_of, shifts_of
from heads.report.tables import markdown_lines, markdown_table, markdown_text
from heads.report.web import Background, write_page

PAGE = "report.html"


def write_report(
    rows: Sequence[Row],
    folder: str | Path,
    *,
    datasets: Sequence[str] | None = None,
    reference: str | None = None,
    metrics: Sequence[str] = ("top1", "nll"),
    title: str = "Evaluation",
    notes: str = "",
    background: Background | None = None,
) -> list[Path]:
    """Write ``report.html``, ``report.md``, tables as ``report.csv`` and ``report.tex``, and plots as PNG files.

    Parameters
    ----------
    rows : one per head, as `heads.evaluate` returns them
    folder : created if missing; files of an earlier report are replaced
    datasets : data sets to show, in order; default: all in the rows
    reference : the in-distribution data set; default: the first
    metrics : one table for each
    title : heading of the page
    notes : plain text between heading and tables
    background : further content of the page

    Returns
    -------
    ``report.html``, ``report.md`` and the plots: accuracy in-distribution against the mean over the shifted data sets
    and against each, and NLL against alpha for each interpolation.

    Raises
    ------
    HeadError
        If the rows lack a data set or metric.
    """
    first, shifted = choose_datasets(rows, datasets, reference, metrics[0])
    shifts = shifts_of(rows, first, shifted, metrics[0])
    shown, background = Shown([first, *shifted], first, metrics), background or Background()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {markdown_text(title)}", notes.strip(), _legend(first, shifted, shifts)]
    parts += _tables([row for row in rows if alpha_of(row) is None], first, shifted, metrics, "Heads")
    plots: list[Path] = []
    if shifts and "top1" in metrics:
        plots += _shift_plots(rows, folder, first, shifts)
        parts.append("## Accuracy, in-distribution against shifted")
        parts += [f"![accuracy]({plot.name})" for plot in plots]
    for number, (name, path) in enumerate(paths_of(rows).items(), start=1):
        parts += _tables(path, first, shifted, metrics, f"Interpolation {markdown_text(name)}")
        if len(path) > 1 and first in datasets_of(path, "nll"):
            file = folder / f"nll-{number}.png"
            plots.append(plot_nll_against_alpha(rows, file, datasets=[first, *shifted], name=name))
            parts.append(f"![NLL against alpha]({file.name})")
    if background.published:
        parts += ["## Published figures", markdown_lines(HEADER, comparison_cells(background.published))]
    markdown = folder / "report.md"
    write_target(markdown, ("\n\n".join(filter(None, parts)) + "\n").encode())
    for kind, ending in ENDINGS.items():
        write_target(folder / f"report.{ending}", FORMATS[kind](rows, shown).encode())
    noted = replace(background, notes=[*notes.split("\n\n"), *background.notes])
    page = write_page(rows, folder / PAGE, shown, title=title, background=noted)
    return [page, markdown, *plots]


def _shift_plots(rows: Sequence[Row], folder: Path, first: str, shifted: Sequence[str]) -> list[Path]:
    """Plots against the mean over shifted data sets and, as in WiSE-FT, against each, where a head has results."""
    wanted = [("accuracy.png", list(shifted))]
    if len(shifted) > 1:
        wanted += [(f"accuracy-{file}.png", [name]) for name, file in zip(shifted, file_names(shifted), strict=True)]
    return [
        plot_robustness(rows, folder / file, datasets=[first, *names], reference=first)
        for file, names in wanted
        if any(point_of(row, first, names, "top1") for row in rows)
    ]


def file_names(names: Sequence[str]) -> list[str]:
    """Distinct parts of file names for data sets.

    >>> file_names(["ImageNetV2", "a/b", "a b"])
    ['ImageNetV2', 'a_b', 'a_b-2']
    """
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.@+-]", "_", name)[:80]
        numbered = (f"{plain}-{number}" for number in range(2, len(names) + 2))
        found.append(plain if plain not in found else next(other for other in numbered if other not in found))
    return found


def _legend(first: str, others: Sequence[str], shifts: Sequence[str]) -> str:
    if not shifts:
        return f"Evaluated on {', '.join(map(markdown_text, (first, *others)))}."
    return (
        f"In-distribution: {markdown_text(first)}. Shifted: {', '.join(map(markdown_text, shifts))}. "
        "*Shifted mean* is the unweighted mean over the shifted data sets, *drop* (for losses *rise*) the change from "
        "the in-distribution data set to it. Bold: the best of a column."
    )


def _tables(rows: Sequence[Row], first: str, shifted: Sequence[str], metrics: Sequence[str], heading: str) -> list[str]:
    """The heading and a table per metric; empty if the rows have none of the metrics on the first data set."""
    tables = [
        markdown_table(rows, [first, *(name for name in shifted if name in datasets_of(rows, m))], metric=m)
        for m in metrics
        if m in METRICS and first in datasets_of(rows, m)
    ]
    return [f"## {heading}", *tables] if tables else []
