"""Results as tables: plain text for the terminal, Markdown for a report."""

import html
import re
from collections.abc import Iterable, Sequence

from featcache.progress import printable
from heads.evaluation.metrics import Metric, Row, metric_of
from heads.report.rows import MEAN, choose_datasets, comparable, format_value, label_of, mean_of, shifts_of, value_of

CHANGES = ("drop", "rise")
"""Titles of the column with the change from the in-distribution data set to the mean over the shifted ones."""


def markdown_table(
    rows: Sequence[Row], datasets: Sequence[str] | None = None, *, metric: str = "top1", reference: str | None = None
) -> str:
    r"""One metric as a Markdown table: one line per head, one column per data set, the best of each column bold.

    With shifted data sets there are two more columns: their mean, if there are several, and the change to it from the
    in-distribution data set.

    Parameters
    ----------
    rows : one per head, with keys such as ``"digits:top1"``
    datasets : columns in order; default: all in the rows
    metric : a key of `heads.evaluation.metrics.METRICS`
    reference : the in-distribution data set; default: the first

    Raises
    ------
    HeadError
        If the metric or a data set is unknown.

    >>> rows = [{"head": "zero_shot", "a:top1": 0.8, "b:top1": 0.7}, {"head": "ridge", "a:top1": 0.9, "b:top1": 0.5}]
    >>> print(markdown_table(rows))
    | Accuracy, % | a | b | drop |
    |:---|---:|---:|---:|
    | zero\_shot | 80.0 | **70.0** | 10.0 |
    | ridge | **90.0** | 50.0 | 40.0 |
    """
    metric_of(metric)  # refuses an unknown one
    first, shifted = choose_datasets(rows, datasets, reference, metric)
    header, lines = best_marked(rows, first, shifted, metric, best="**{}**")
    escaped = [[markdown_text(name), *cells] for name, *cells in lines]
    return _markdown([*map(markdown_text, header)], escaped, right=1)


def best_marked(
    rows: Sequence[Row], first: str, shifted: Sequence[str], metric: str, *, best: str
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table of one metric, with the best of each column in the form `best`."""
    shown, columns = metric_of(metric), columns_of(rows, first, shifted, metric)
    cells = [_marked(rows, values, shown, title, best=best) for title, values in columns.items()]
    lines = [[label_of(row), *line] for row, *line in zip(rows, *cells, strict=True)]
    return [f"{shown.title}, {shown.unit}", *columns], lines


def markdown_lines(header: Sequence[str], lines: Sequence[Sequence[str]], right: int = 0) -> str:
    """A Markdown table of plain strings; from column `right` on, if it is not 0, right-aligned."""
    return _markdown(header, [[*map(markdown_text, line)] for line in lines], right)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], right: int) -> str:
    first, *others = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    rule = "|" + "".join("---:|" if right and i >= right else ":---|" for i in range(len(header)))
    return "\n".join([first, rule, *others])


def markdown_text(text: str) -> str:
    r"""A name on one line, with everything escaped that Markdown or HTML would interpret.

    >>> print(markdown_text("a_b\n<script>`x`"))
    a\_b &lt;script&gt;\`x\`
    """
    line = "".join(char if char.isprintable() else " " for char in text)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(line, quote=False))


def aligned_lines(lines: Sequence[Sequence[str]], right: int = 0) -> list[str]:
    r"""Lines of cells, aligned in columns; from column `right` on, if it is not 0, right-aligned.

    >>> print("\n".join(aligned_lines([["model", "a"], ["x", "10.5"]], right=1)))
    model     a
    x      10.5
    """
    columns = []
    for i, column in enumerate(zip(*lines, strict=True)):
        cells = [*map(cell_text, column)]
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if right and i >= right else cell.ljust(width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def cell_text(text: str) -> str:
    r"""A name as one line of plain text, with control characters escaped.

    >>> cell_text("a\n# b\x1b[31m")
    'a # b\\x1b[31m'
    """
    return printable(" ".join(text.splitlines()))


def table_text(
    rows: Sequence[Row],
    datasets: Sequence[str] | None = None,
    metrics: Sequence[str] = ("top1", "nll"),
    *,
    reference: str | None = None,
    width: int = 110,
) -> str:
    """All metrics as plain text: one line per head, a group of columns per data set, ``*`` at the best of each column.

    Data sets that do not fit into `width` characters go into further blocks.

    Parameters
    ----------
    rows, datasets, reference : as in `markdown_table`
    metrics : columns of each data set
    width : characters per line

    Raises
    ------
    HeadError
        If a metric or data set is unknown.

    >>> row = {"a:top1": 0.8, "b:top1": 0.7, "a:nll": 0.5, "b:nll": 0.9}
    >>> print(table_text([{"head": "zero_shot", **row}, {"head": "ridge", **row, "a:top1": 0.9}]))
                              a                  b        drop / rise
                 top1 %     nll     top1 %     nll     top1 %     nll
    zero_shot      80.0   0.500*      70.0*  0.900*      10.0   0.400
    ridge          90.0*  0.500*      70.0*  0.900*      20.0   0.400
    """
    first, shifted = choose_datasets(rows, datasets, reference, metrics[0])
    for metric in metrics[1:]:
        choose_datasets(rows, [first, *shifted], first, metric)
    by_title: dict[str, list[list[str]]] = {}
    for metric in metrics:
        shown = metric_of(metric)
        for title, values in columns_of(rows, first, shifted, metric).items():
            texts = [f"{metric} % " if shown.unit == "%" else f"{metric} "]
            texts += _marked(rows, values, shown, title, best="{}*", other="{} ")
            by_title.setdefault("drop / rise" if title in CHANGES else title, []).append(texts)
    groups = [_group(cell_text(title), columns) for title, columns in by_title.items()]
    return in_blocks(["", "", *(cell_text(label_of(row)) for row in rows)], groups, width, gap="    ")


def _group(title: str, columns: Sequence[Sequence[str]]) -> list[str]:
    """A title above right-aligned columns, as lines of equal width."""
    padded = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    body = ["  ".join(cells) for cells in zip(*padded, strict=True)]
    width = max(len(title) + 1, len(body[0]))
    return [f"{title} ".rjust(width), *(line.rjust(width) for line in body)]


def in_blocks(left: Sequence[str], columns: Iterable[Sequence[str]], width: int, gap: str = "  ") -> str:
    r"""Right-aligned columns after the left one; those beyond `width` characters go into further blocks.

    A block has at least one column, however wide. Blocks are separated by an empty line.

    >>> print(in_blocks(["", "ridge"], [["pets", "98.1"], ["flowers", "9.5"]], 16))
           pets
    ridge  98.1
    <BLANKLINE>
           flowers
    ridge      9.5
    """
    margin = max(map(len, left))
    blocks: list[list[Sequence[str]]] = []
    room = 0
    for cells in columns:
        size = max(map(len, cells))
        if not blocks or size + len(gap) > room:
            blocks.append([[text.ljust(margin) for text in left]])
            room = width - margin
        blocks[-1].append([cell.rjust(size) for cell in cells])
        room -= size + len(gap)
    lines = ["\n".join(gap.join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks]
    return "\n\n".join(lines)


def columns_of(rows: Sequence[Row], first: str, shifted: Sequence[str], metric: str) -> dict[str, list[float | None]]:
    """Values of all heads by data set, the mean of several shifted ones (see `shifts_of`), and the change to it."""
    columns = {name: [value_of(row, name, metric) for row in rows] for name in (first, *shifted)}
    if shifted := shifts_of(rows, first, shifted, metric):
        means = [mean_of(row, shifted, metric) for row in rows]
        columns |= {MEAN: means} if len(shifted) > 1 else {}
        sign = -1 if metric_of(metric).higher_is_better else 1
        columns["drop" if sign < 0 else "rise"] = [
            None if mean is None or start is None else sign * (mean - start)
            for mean, start in zip(means, columns[first], strict=True)
        ]
    return columns


def _marked(
    rows: Sequence[Row], values: Sequence[float | None], metric: Metric, title: str, *, best: str, other: str = "{}"
) -> list[str]:
    """Values as text, in the form `best` for the best ones; values that read the same tie.

    The best drop is not marked: a head that is bad everywhere has the smallest.
    """
    texts, counted = [format_value(value, metric) for value in values], comparable(rows, title)
    known = [value for value, counts in zip(values, counted, strict=True) if counts and value is not None]
    if not known or len(values) < 2 or title in CHANGES:
        return [other.format(text) for text in texts]
    winner = format_value(max(known) if metric.higher_is_better else min(known), metric)
    return [
        (best if text == winner and counts else other).format(text) for text, counts in zip(texts, counted, strict=True)
    ]
