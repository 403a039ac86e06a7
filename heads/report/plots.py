"""Plots of an evaluation; the only file that imports matplotlib.

Figures are made without pyplot: no global state, no display, safe in threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featcache.errors import HeadError
from heads.report.layout import PLACES, drawable, expit, logit, percent_ticks, place_labels, spread
from heads.report.rows import (
    Point,
    Row,
    alpha_of,
    choose_datasets,
    curve_of,
    datasets_of,
    metric_of,
    name_of,
    paths_of,
    point_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Floats = npt.NDArray[np.float64]
Label = tuple[Point, str, str]  # where, what, in which colour

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#666666")
INK = "#222222"


def plot_robustness(
    rows: Sequence[Row],
    path: str | Path,
    *,
    datasets: Sequence[str] | None = None,
    reference: str | None = None,
    metric: str = "top1",
) -> Path:
    """Scatter plot of accuracy in-distribution (x) against the mean over shifted data sets (y), as in WiSE-FT.

    Both axes are logit-scaled, log(p / (1 - p)). An interpolation is a thin line with a star at alpha 0 and a
    diamond at alpha 1; other heads are points with their names. On the dashed line a shift costs nothing.

    Parameters
    ----------
    rows : sequence of rows
        One a head; interpolations have a float ``alpha``. Heads that lack a data set are left out.
    path : str or Path
        Image file to write; the suffix tells the format.
    datasets : sequence of str, optional
        Data sets to use; default: all in the rows.
    reference : str, optional
        The in-distribution data set; default: the first.
    metric : str
        A metric in [0, 1].

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    HeadError
        Where there is no shifted data set, or no head has them all.

    References
    ----------
    Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903.
    """
    first, shifted = choose_datasets(rows, datasets, reference, metric)
    found = [(row, point_of(row, first, shifted, metric)) for row in rows]
    kept = [row for row, point in found if point is not None]
    points = [drawable(*point) for _, point in found if point is not None]
    if not kept:
        raise HeadError(
            f"no head has {metric!r} on {first!r} and a shifted data set (got {shifted}); "
            "evaluate a head on two data sets or more"
        )
    figure, axes = _figure(6.6, 5.2)
    _logit_axes(axes, points)
    labels = _draw_paths(axes, kept, points)
    labels += _draw_heads(axes, kept, points, ends=[point for point, _, _ in labels])
    shown = metric_of(metric)
    over = shifted[0] if len(shifted) == 1 else f"mean of {len(shifted)} shifted data sets"
    axes.set_xlabel(f"{shown.title} on {first} ({shown.unit}, logit scale)")
    axes.set_ylabel(f"{shown.title} on {over} ({shown.unit}, logit scale)")
    _title(axes, f"{shown.title}: in-distribution against shifted")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8, frameon=False)
    _place_labels(figure, axes, labels, points)
    return _save(figure, path)


def plot_nll_against_alpha(
    rows: Sequence[Row],
    path: str | Path,
    *,
    datasets: Sequence[str] | None = None,
    name: str | None = None,
    metric: str = "nll",
) -> Path:
    """NLL along an interpolation of two heads, one line a data set, a dot at each line's minimum.

    The scale of the NLL is logarithmic where the values span more than a factor of ten.

    Parameters
    ----------
    rows : sequence of rows
        One a head; those with a float ``alpha`` count.
    path : str or Path
        Image file to write; the suffix tells the format.
    datasets : sequence of str, optional
        Lines, the first one drawn thick; default: all in the rows.
    name : str, optional
        Which interpolation; needed where the rows hold several.
    metric : str
        ``nll``, or another metric.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    HeadError
        Where there is no such interpolation, or several and no name.
    """
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
    figure, axes = _figure(7.2, 4.6)
    values = np.concatenate([curve[:, 1] for curve in curves.values()])
    if values.min() > 0 and values.max() > 10 * values.min():
        _log_scale(axes, values)
    for number, curve in enumerate(curves.values()):
        colour = INK if number == 0 else COLOURS[(number - 1) % len(COLOURS)]
        best = curve[curve[:, 1].argmax() if shown.higher_is_better else curve[:, 1].argmin()]
        axes.plot(curve[:, 0], curve[:, 1], color=colour, linewidth=2.4 if number == 0 else 1.5)
        axes.plot(*best, "o", color=colour, markersize=6, clip_on=False, zorder=4)
    alphas = np.concatenate([curve[:, 0] for curve in curves.values()])
    if np.ptp(alphas) > 0:
        axes.set_xlim(alphas.min(), alphas.max())
    axes.set_xlabel("Interpolation coefficient α")
    axes.set_ylabel(f"{shown.title} ({shown.unit})")
    _title(axes, f"{shown.title} along {name}; dots: best α of each data set")
    _label_ends(figure, axes, curves)
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    return figure, axes


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=INK, pad=10)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No version and no date, so that the same rows give the same bytes.
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
    return path


def _logit_axes(axes: Axes, points: Sequence[Point]) -> None:
    """Logit scales with room around the points, ticks in percent, and the line of no drop."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("function", functions=(logit, expit))
    axes.set_yscale("function", functions=(logit, expit))
    lows, highs = [], []
    for axis, values in zip((axes.xaxis, axes.yaxis), zip(*points, strict=True), strict=True):
        z = logit(values)
        room = max(0.18 * float(np.ptp(z)), 0.25)
        low, high = (float(p) for p in expit([z.min() - room, z.max() + room]))
        axis.set_major_locator(FixedLocator(percent_ticks(low, high)))
        axis.set_major_formatter(FuncFormatter(lambda p, _: f"{100 * p:g}"))
        axis.set_minor_locator(NullLocator())
        lows.append(low)
        highs.append(high)
    axes.set_xlim(lows[0], highs[0])
    axes.set_ylim(lows[1], highs[1])
    if max(lows) < min(highs):  # the diagonal crosses the frame
        line = expit(np.linspace(-7, 7, 200))
        axes.plot(line, line, "--", color="#999999", linewidth=1, label="no drop", scalex=False, scaley=False)


def _draw_paths(axes: Axes, rows: Sequence[Row], points: Sequence[Point]) -> list[Label]:
    """Interpolations: thin lines, a star at alpha 0, a diamond at alpha 1; returns the ends' labels."""
    where = {id(row): point for row, point in zip(rows, points, strict=True)}
    heads = {point: name_of(row) for row, point in zip(rows, points, strict=True) if alpha_of(row) is None}
    labels: list[Label] = []
    for number, (name, path) in enumerate(paths_of(rows).items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = zip(*(where[id(row)] for row in path), strict=True)
        axes.plot(x, y, "-d", color=colour, linewidth=1, markersize=3.5, label=f"{name}, α from 0 to 1")
        for row in path:
            alpha, point = alpha_of(row), where[id(row)]
            if alpha in (0.0, 1.0):
                marker, size = ("*", 13) if alpha == 0 else ("D", 8)
                axes.plot(*point, marker, color=colour, markersize=size, zorder=3)
                near = [head for end, head in heads.items() if np.allclose(end, point, rtol=0, atol=1e-6)]
                labels.append((point, f"{near[0]} (α = {alpha:g})" if near else f"α = {alpha:g}", colour))
            elif alpha == 0.5:
                labels.append((point, "α = 0.5", colour))
    return labels


def _draw_heads(axes: Axes, rows: Sequence[Row], points: Sequence[Point], ends: Sequence[Point]) -> list[Label]:
    """Heads that are no interpolation and no end of one: a disc each; returns their labels."""
    labels: list[Label] = []
    for row, point in zip(rows, points, strict=True):
        if alpha_of(row) is None and not any(np.allclose(point, end, rtol=0, atol=1e-6) for end in ends):
            colour = COLOURS[-1 - len(labels) % len(COLOURS)]
            axes.plot(*point, "o", color=colour, markersize=7, zorder=3)
            labels.append((point, name_of(row), colour))
    return labels


def _place_labels(figure: Figure, axes: Axes, labels: Sequence[Label], points: Sequence[Point]) -> None:
    """Write each label beside its point, where it covers neither points nor other labels, joined by a thin line."""
    from matplotlib.text import Text

    notes = [
        axes.annotate(
            text, point, (0, 0), textcoords="offset points", fontsize=9, color=colour, verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 8},
        )
        for point, text, colour in labels
    ]  # fmt: skip
    figure.draw_without_rendering()  # settles the layout, so that sizes in pixels are known
    extents = [Text.get_window_extent(note) for note in notes]  # without the line to the point
    scale = figure.dpi / 72
    centres = axes.transData.transform(np.array(points))
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in centres]
    legend = axes.get_legend()
    taken += [legend.get_window_extent().extents] if legend is not None else []
    places = place_labels(
        [tuple(axes.transData.transform(point)) for point, _, _ in labels],
        [(box.width, box.height) for box in extents],
        taken,
        axes.get_window_extent().extents,
        scale,
    )
    for note, place in zip(notes, places, strict=True):
        dx, dy, side = PLACES[place]
        note.set(position=(dx, dy), horizontalalignment={1: "left", 0: "center", -1: "right"}[side])


def _log_scale(axes: Axes, values: Floats) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(values.min() / 1.15, values.max() * 1.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _label_ends(figure: Figure, axes: Axes, curves: dict[str, Floats]) -> None:
    """Name each line at its right end, pushed apart where ends lie close."""
    figure.draw_without_rendering()  # settles the layout
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform(curve[-1])[1]) for curve in curves.values()]
    for k, (name, height) in enumerate(zip(curves, spread(heights, 0.05, 1.0), strict=True)):
        colour = INK if k == 0 else COLOURS[(k - 1) % len(COLOURS)]
        axes.text(1.015, height, name, transform=axes.transAxes, va="center", fontsize=9, color=colour)
