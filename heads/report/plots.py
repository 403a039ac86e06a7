"""Plots, without pyplot: no global state, no display, safe in threads. The only file that imports matplotlib."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from featcache.errors import HeadError
from featcache.store.places.targets import replacing
from heads.evaluation.metrics import Row, metric_of
from heads.report.rows import Point, alpha_of, choose_datasets, curve_of, datasets_of, label_of, paths_of, point_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

# Okabe and Ito's palette, told apart with every kind of colour vision; markers go on where colours repeat.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#666666")
MARKERS = "os^vP"
ENDS: dict[float | None, tuple[str, int]] = {0.0: ("*", 13), 1.0: ("D", 9)}  # marker and size by alpha
INK = "#222222"

EDGE = 1e-3
"""A logit scale has no 0 and no 1: points are drawn within [EDGE, 1 - EDGE]."""

STEPS = (5, 2, 1, 0.5)
OUTER = (0.1, 0.5, 1, 2, 98, 99, 99.5, 99.9)
"""Percentages labelled on a logit scale: every 5 points, or a finer step where fewer than 3 fit, and `OUTER`."""


def plot_robustness(
    rows: Sequence[Row],
    path: str | Path,
    *,
    datasets: Sequence[str] | None = None,
    reference: str | None = None,
    metric: str = "top1",
) -> Path:
    """Plot accuracy on the mean over shifted data sets against accuracy in-distribution, as in WiSE-FT.

    Both axes are logit-scaled, log(p / (1 - p)). An interpolation is a line with a star at alpha 0 and a diamond at
    alpha 1; other heads are single points. The dashed line is equal accuracy on both.

    Parameters
    ----------
    rows : one per head; interpolations have a float ``alpha``. Heads that lack a data set are left out
    path : image file to write, in the format of its suffix
    datasets : data sets to use; default: all in the rows
    reference : the in-distribution data set; default: the first
    metric : a metric in [0, 1]

    Raises
    ------
    HeadError
        If there is no shifted data set, or no head has them all.

    References
    ----------
    Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903.
    """
    first, shifted = choose_datasets(rows, datasets, reference, metric)
    found = [(row, point) for row in rows if (point := point_of(row, first, shifted, metric)) is not None]
    if not found:
        raise HeadError(
            f"no head has {metric!r} on {first!r} and a shifted data set (got {shifted}); "
            "evaluate a head on two data sets or more"
        )
    kept, points = [row for row, _ in found], np.clip([point for _, point in found], EDGE, 1 - EDGE)
    figure, axes = _figure(8.2, 5.2)
    _logit_axes(axes, points)
    _draw_paths(axes, kept, points)
    singles = [(row, point) for row, point in zip(kept, points, strict=True) if alpha_of(row) is None]
    for number, (row, point) in enumerate(singles):
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        colour = COLOURS[-1 - number % len(COLOURS)]
        axes.plot(*point, marker, color=colour, markersize=6, zorder=4, linestyle="", label=label_of(row))
    shown = metric_of(metric)
    over = shifted[0] if len(shifted) == 1 else f"mean of {len(shifted)} shifted data sets"
    axes.set_xlabel(f"{shown.title} on {first} ({shown.unit}, logit scale)")
    axes.set_ylabel(f"{shown.title} on {over} ({shown.unit}, logit scale)")
    return _save(figure, axes, path, f"{shown.title}: in-distribution against shifted")


def plot_nll_against_alpha(
    rows: Sequence[Row],
    path: str | Path,
    *,
    datasets: Sequence[str] | None = None,
    name: str | None = None,
    metric: str = "nll",
) -> Path:
    """Plot NLL along an interpolation of two heads, one line per data set, with a dot at each minimum.

    The NLL axis is logarithmic if the values span more than a factor of ten.

    Parameters
    ----------
    rows, path : as in `plot_robustness`; rows without a float ``alpha`` are left out
    datasets : one line each, the first one thick; default: all in the rows
    name : name of the interpolation; needed if the rows have several
    metric : ``nll``, or another metric

    Raises
    ------
    HeadError
        If there is no such interpolation, or several and no name.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    paths = paths_of(rows)
    if name is None and len(paths) == 1:
        name = next(iter(paths))
    if name is None or name not in paths:
        raise HeadError(f"interpolation {name!r}: the rows hold {', '.join(paths) or 'none'}; pass one as name")
    shown = metric_of(metric)
    known = datasets_of(paths[name], metric)
    chosen = [d for d in datasets or known if d in known]
    curves = {d: curve for d in chosen if len(curve := curve_of(paths[name], d, metric, shown.factor))}
    if not curves:
        raise HeadError(f"no {metric!r} along {name} on {datasets}; the rows hold {', '.join(known) or 'none'}")
    figure, axes = _figure(8.2, 4.6)
    alphas, values = np.concatenate(list(curves.values())).T
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.set_ylim(values.min() / 1.15, values.max() * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for number, (dataset, curve) in enumerate(curves.items()):
        colour = INK if number == 0 else COLOURS[(number - 1) % len(COLOURS)]
        best = curve[curve[:, 1].argmax() if shown.higher_is_better else curve[:, 1].argmin()]
        axes.plot(curve[:, 0], curve[:, 1], color=colour, linewidth=2.4 if number == 0 else 1.5, label=dataset)
        axes.plot(*best, "o", color=colour, markersize=6, clip_on=False, zorder=4)
    if np.ptp(alphas) > 0:
        axes.set_xlim(alphas.min(), alphas.max())
    axes.set_xlabel("Interpolation coefficient α")
    axes.set_ylabel(f"{shown.title} ({shown.unit})")
    return _save(figure, axes, path, f"{shown.title} along {name}; dots: best α of each data set")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: str | Path, title: str) -> Path:
    """Add title and legend, and write the file; names of data sets and heads are shown as they are, one line each."""
    shown = axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    legend = figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    for text in (shown, axes.xaxis.label, axes.yaxis.label, *legend.get_texts()):
        text.set_parse_math(False)
        text.set_text("".join(char if char.isprintable() else " " for char in text.get_text()))
    path = Path(path)
    # No version and no date, so that the same rows give the same bytes.
    kind = path.suffix.removeprefix(".") or None
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks are shown as boxes
        figure.savefig(file, format=kind, metadata={"Software": None} if kind == "png" else None)
    return path


def _logit_axes(axes: Axes, points: Floats) -> None:
    """Logit scales with a margin around the points (n, 2), and the line of no drop."""
    axes.set_xscale("logit")
    axes.set_yscale("logit")
    (left, right), (bottom, top) = _percent_axis(axes.xaxis, points[:, 0]), _percent_axis(axes.yaxis, points[:, 1])
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    if max(left, bottom) < min(right, top):  # the diagonal crosses the frame
        line = expit(np.linspace(-7, 7, 200))
        axes.plot(line, line, "--", color="#999999", linewidth=1, label="no drop", scalex=False, scaley=False)


def _percent_axis(axis: Axis, values: Floats) -> tuple[float, float]:
    """Set ticks in percent for fractions (n,); returns the limits."""
    z = logit(values)
    margin = max(0.18 * float(np.ptp(z)), 0.25)
    low, high = (float(p) for p in expit([z.min() - margin, z.max() + margin]))
    axis.set_ticks(percent_ticks(low, high))
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda p, _: f"{100 * p:g}")
    return low, high


def percent_ticks(low: float, high: float, most: int = 21) -> list[float]:
    """Round percentages between two fractions, as fractions: every 5 points, or finer where fewer than 3 fit.

    >>> percent_ticks(0.68, 0.86)
    [0.7, 0.75, 0.8, 0.85]
    >>> percent_ticks(0.942, 0.975)
    [0.95, 0.96, 0.97]
    """
    found: list[float] = []
    for step in STEPS:
        inner = [step * number for number in range(1, round(100 / step))]
        ticks = sorted({*inner, *OUTER}) if step == STEPS[0] else inner
        found = [t / 100 for t in ticks if low <= t / 100 <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, math.ceil(len(found) / most))]


def _draw_paths(axes: Axes, rows: Sequence[Row], points: Floats) -> None:
    """Draw interpolations: thin lines, a star at alpha 0, a diamond at alpha 1, their alphas beside them."""
    where: dict[int, Point] = {id(row): (float(x), float(y)) for row, (x, y) in zip(rows, points, strict=True)}
    for number, (name, path) in enumerate(paths_of(rows).items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = zip(*(where[id(row)] for row in path), strict=True)
        axes.plot(x, y, "-d", color=colour, linewidth=1, markersize=3.5, label=f"{name}, by α")
        for row in path:
            alpha, point = alpha_of(row), where[id(row)]
            if alpha in ENDS:
                marker, size = ENDS[alpha]
                axes.plot(*point, marker, color=colour, markersize=size, zorder=3)
            if alpha in (0.0, 0.5, 1.0):
                axes.annotate(f"{alpha:g}", point, (7, -12), textcoords="offset points", fontsize=8, color=colour)
