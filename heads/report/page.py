"""The Markdown page of an evaluation: tables and plots in one folder."""

from collections.abc import Sequence
from pathlib import Path

from featcache.store.places.targets import write_target
from heads.evaluation.metrics import METRICS, Row
from heads.report.plots import plot_nll_against_alpha, plot_robustness
from heads.report.rows import alpha_of, choose_datasets, datasets_of, paths_of
from heads.report.tables import markdown_table, markdown_text

PAGE = "report.md"
ROBUSTNESS = "accuracy.png"
NLL = "nll-{}.png"


def write_report(
    rows: Sequence[Row],
    folder: str | Path,
    *,
    datasets: Sequence[str] | None = None,
    reference: str | None = None,
    metrics: Sequence[str] = ("top1", "nll"),
    title: str = "Evaluation",
    notes: str = "",
) -> list[Path]:
    """Write ``report.md`` with a table per metric and the plots that the rows allow.

    Parameters
    ----------
    rows : one per head, as `heads.evaluate` returns them
    folder : created if missing; files of an earlier report are replaced
    datasets : data sets to show, in order; default: all in the rows
    reference : the in-distribution data set; default: the first
    metrics : one table for each
    title : heading of the page
    notes : Markdown between heading and tables, such as what was run on which machine

    Returns
    -------
    The page, then the plots: accuracy in-distribution against shifted if there are shifted data sets, and NLL against
    alpha for each interpolation.

    Raises
    ------
    HeadError
        If the rows lack a data set or metric.
    """
    first, shifted = choose_datasets(rows, datasets, reference, metrics[0])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}", notes.strip(), _legend(first, shifted)]
    parts += _tables([row for row in rows if alpha_of(row) is None], first, shifted, metrics, "Heads")
    plots: list[Path] = []
    if shifted and "top1" in metrics:
        plots.append(plot_robustness(rows, folder / ROBUSTNESS, datasets=[first, *shifted], reference=first))
        parts += ["## Accuracy, in-distribution against shifted", f"![accuracy]({ROBUSTNESS})"]
    for number, (name, path) in enumerate(paths_of(rows).items(), start=1):
        parts += _tables(path, first, shifted, metrics, f"Interpolation {markdown_text(name)}")
        if len(path) > 1 and first in datasets_of(path, "nll"):
            file = folder / NLL.format(number)
            plots.append(plot_nll_against_alpha(rows, file, datasets=[first, *shifted], name=name))
            parts += [f"![NLL against alpha]({file.name})"]
    page = folder / PAGE
    write_target(page, ("\n\n".join(filter(None, parts)) + "\n").encode())
    return [page, *plots]


def _legend(first: str, shifted: Sequence[str]) -> str:
    named = markdown_text(first)
    if not shifted:
        return f"Evaluated on {named}."
    return (
        f"In-distribution: {named}. Shifted: {', '.join(map(markdown_text, shifted))}. "
        "*Shifted mean* is the unweighted mean over the shifted data sets, *drop* (for losses *rise*) the change from "
        "the in-distribution data set to it. Bold: the best of a column."
    )


def _tables(rows: Sequence[Row], first: str, shifted: Sequence[str], metrics: Sequence[str], heading: str) -> list[str]:
    if not rows:
        return []
    tables = [
        markdown_table(rows, [first, *(name for name in shifted if name in datasets_of(rows, m))], metric=m)
        for m in metrics
        if m in METRICS and first in datasets_of(rows, m)
    ]
    return [f"## {heading}", *tables] if tables else []
