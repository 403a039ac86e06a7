"""Charts of the page: pixel positions of ticks, lines and marks, which the template draws as SVG."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import expit, logit

from heads.evaluation.metrics import Row, metric_of
from heads.report.plots import EDGE, OUTER, STEPS
from heads.report.rows import alpha_of, curve_of, datasets_of, label_of, paths_of, point_of

WIDTH, HEIGHT = 400, 310
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 46
X, Y = (LEFT, WIDTH - RIGHT), (HEIGHT - BOTTOM, TOP)  # pixels of both ends of an axis
COLOURS = 8
SHAPES = ("circle", "square", "triangle", "cross")
ENDS: dict[float | None, str] = {0.0: "star", 1.0: "diamond"}  # of interpolations, by alpha, as in WiSE-FT
MOST_IN_LEGEND = 14
SHOTS = re.compile(r", \d+ shots?\b")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A point at (x, y); `tip` is shown when the pointer is over it."""

    x: float
    y: float
    shape: str
    tip: str
    label: str = ""
    size: float = 1.0


@dataclass(frozen=True)
class Series:
    """A line, the band of its spread (both as points of SVG's polyline and polygon), and its marks."""

    name: str
    colour: int
    line: str = ""
    band: str = ""
    marks: Sequence[Mark] = ()
    kind: str = ""  # "dashed", "strong", "faint"


@dataclass(frozen=True)
class Chart:
    """A chart of `WIDTH` x `HEIGHT` pixels; ticks are (pixel, text)."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    series: Sequence[Series]

    @property
    def legend(self) -> list[Series]:
        """The series in the legend; none if there is only one, or too many."""
        named = [series for series in self.series if series.name]
        return named if 1 < len(named) <= MOST_IN_LEGEND else []

    @property
    def y_label_fits(self) -> bool:
        """Whether the tick labels leave room for the label of the vertical axis."""
        return max((len(text) for _, text in self.y_ticks), default=0) < 5


@dataclass(frozen=True)
class Curve:
    """Lines to draw: a path over C, shots, or updates."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Points]  # by name, ascending in x
    spread: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # standard deviations, by line
    log: bool = False  # whether the x axis is logarithmic


class Axis:
    """A scale, "linear", "log" or "logit", from the values `low` to `high` to the pixels `start` to `stop`."""

    def __init__(self, low: float, high: float, start: float, stop: float, kind: str = "linear") -> None:
        self.kind, self.low, self.high = kind, low, high
        self._ends, self._pixels = (self._z(low), self._z(high)), (start, stop)

    def _z(self, value: float) -> float:
        if self.kind == "logit":
            return float(logit(min(max(value, EDGE), 1 - EDGE)))
        return math.log(value) if self.kind == "log" else value

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        (low, high), (start, stop) = self._ends, self._pixels
        return round(start + (self._z(value) - low) / ((high - low) or 1.0) * (stop - start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and texts of round values."""
        if self.kind == "logit":
            return [(self(value), f"{100 * value:g}") for value in _logit_ticks(self)]
        found = _log_ticks(self.low, self.high) if self.kind == "log" else _round_ticks(self.low, self.high)
        return [(self(value), f"{value:g}") for value in found]


def _logit_ticks(axis: Axis) -> list[float]:
    """Fractions to label: every 5 points, or a finer step where fewer than 4 have room."""
    kept: list[float] = []
    for step in STEPS:
        inside = {n * step / 100 for n in range(1, round(100 / step))} | {p / 100 for p in OUTER}
        kept = _apart(axis, [value for value in inside if axis.low <= value <= axis.high])
        if len(kept) >= 4:
            break
    return kept


def _apart(axis: Axis, values: Sequence[float]) -> list[float]:
    """The values whose labels do not overlap, from the middle of the axis outwards."""
    kept: list[float] = []
    for value in sorted(values, key=lambda v: (round(200 * v) % 10 != 0, abs(v - (axis.low + axis.high) / 2))):
        if all(abs(axis(value) - axis(other)) >= 22 for other in kept):
            kept.append(value)
    return sorted(kept)


def _round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten.

    >>> _round_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = ((high - low) or 1.0) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """At most 8: 1, 2 and 5 of each decade, or decades alone."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(found) <= 8:
            return found
    return found[:: math.ceil(len(found) / 8)]


def _axis(values: Sequence[float], ends: tuple[float, float], kind: str = "linear") -> Axis:
    """An axis with a margin around the values."""
    found = np.asarray(values, np.float64)
    if kind == "logit":
        z = logit(np.clip(found, EDGE, 1 - EDGE))
        margin = max(0.09 * np.ptp(z), 0.12)
        low, high = expit([z.min() - margin, z.max() + margin])
    elif kind == "log":
        low, high = found.min() / 1.1, found.max() * 1.1
    else:
        margin = 0.06 * np.ptp(found) or 0.05 * abs(found.max()) or 0.5
        low, high = found.min() - margin, found.max() + margin
    return Axis(float(low), float(high), *ends, kind)


def _polyline(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in pairs)


def robustness_chart(rows: Sequence[Row], first: str, shifted: Sequence[str], metric: str = "top1") -> Chart | None:
    """In-distribution against one shifted data set, or the mean of several, on logit scales; None without such rows."""
    kept = [row for row in rows if point_of(row, first, shifted, metric) is not None]
    points = [point for row in kept if (point := point_of(row, first, shifted, metric)) is not None]
    if not kept:
        return None
    shown = metric_of(metric)
    over = shifted[0] if len(shifted) == 1 else f"mean of {len(shifted)} shifted data sets"
    x, y = _axis([px for px, _ in points], X, "logit"), _axis([py for _, py in points], Y, "logit")

    def mark(row: Row, shape: str) -> Mark:
        px, py = point_of(row, first, shifted, metric) or (0.0, 0.0)
        tip = f"{label_of(row)}\n{first} {100 * px:.2f} {shown.unit}\n{over} {100 * py:.2f} {shown.unit}"
        return Mark(x(px), y(py), shape, tip, f"{alpha:g}" if (alpha := alpha_of(row)) in (0.0, 0.5, 1.0) else "")

    low, high = max(x.low, y.low), min(x.high, y.high)
    diagonal = _polyline([(x(p), y(p)) for p in (low, high)])  # straight, as both axes have one scale
    series = [Series("no drop", COLOURS, diagonal, kind="dashed")] if low < high else []
    paths = paths_of(kept)
    for number, (name, path) in enumerate(paths.items()):
        marks = [mark(row, ENDS.get(alpha_of(row), "thin")) for row in path]
        series.append(Series(f"{name}, by α", number % COLOURS, _polyline([(m.x, m.y) for m in marks]), marks=marks))
    for place, (name, group) in enumerate(_by_shots(kept).items(), start=len(paths)):
        marks = [mark(row, SHAPES[place // COLOURS % len(SHAPES)]) for row in group]
        joined = len({row.get("shots") for row in group}) == len(group) > 1
        line = _polyline([(m.x, m.y) for m in marks]) if joined else ""
        series.append(Series(name, place % COLOURS, line, marks=marks))
    unit = f"({shown.unit}, logit scale)"
    return Chart(f"{shown.title} on {over}", f"{first} {unit}", f"{over} {unit}", x.ticks(), y.ticks(), series)


def _by_shots(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that are not interpolations, by head; those that differ only in shots share a name, in that order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if alpha_of(row) is None:
            name = SHOTS.sub("", label_of(row)) if isinstance(row.get("shots"), int) else label_of(row)
            groups.setdefault(name, []).append(row)
    return {name: sorted(group, key=lambda row: row.get("shots") or 0) for name, group in groups.items()}


def alpha_charts(rows: Sequence[Row], datasets: Sequence[str], metrics: Sequence[str]) -> list[Chart]:
    """Every metric along each of the first six interpolations, a line per data set."""
    charts = []
    for name, path in list(paths_of(rows).items())[:6]:
        if len(path) < 2:
            continue
        for metric in metrics:
            shown = metric_of(metric)
            known = datasets_of(path, metric)
            curves = {d: curve_of(path, d, metric, shown.factor) for d in datasets if d in known}
            lines = {d: [(float(a), float(v)) for a, v in curve] for d, curve in curves.items() if len(curve)}
            if lines:
                curve = Curve(f"{shown.title} along {name}", "α", f"{shown.title} ({shown.unit})", lines)
                charts.append(curve_chart(curve, best=max if shown.higher_is_better else min))
    return charts


def curve_chart(curve: Curve, best: object = None) -> Chart:
    """A chart of lines; the first is drawn strong, and with `best` (max or min) the best point of each is marked."""
    flat = [point for line in curve.lines.values() for point in line]
    spreads = [s for found in curve.spread.values() for s in found if s is not None]
    edge = max(spreads, default=0.0)
    log = curve.log and min(px for px, _ in flat) > 0
    x = _axis([px for px, _ in flat], X, "log" if log else "linear")
    bounds = (0.0, 100.0) if curve.y_label.endswith("(%)") else (-math.inf, math.inf)
    y = _axis([min(max(py + sign * edge, bounds[0]), bounds[1]) for _, py in flat for sign in (-1, 1)], Y)
    series = []
    for number, (name, line) in enumerate(curve.lines.items()):
        spread = curve.spread.get(name, [None] * len(line))
        winner = best(line, key=lambda point: point[1]) if callable(best) else None
        marks = []
        for (px, py), s in zip(line, spread, strict=True):
            around = "" if s is None else f" ± {s:.3g}"
            tip = f"{name}\n{curve.x_label} {px:g}\n{curve.y_label} {py:.4g}{around}"
            marks.append(Mark(x(px), y(py), "circle", tip, size=1.0 if (px, py) == winner else 0.6))
        drawn = _polyline([(mark.x, mark.y) for mark in marks])
        kind = "strong" if number == 0 and len(curve.lines) > 1 else ""
        series.append(Series(name, number % COLOURS, drawn, _band(line, spread, x, y, bounds), marks, kind))
    return Chart(curve.title, curve.x_label, curve.y_label, x.ticks(), y.ticks(), series)


def _band(line: Points, spread: Sequence[float | None], x: Axis, y: Axis, bounds: tuple[float, float]) -> str:
    """The outline of mean ± spread within `bounds`; empty where a spread is missing."""
    sides = [(px, py, s) for (px, py), s in zip(line, spread, strict=True) if s is not None]
    if len(sides) < 2 or len(sides) != len(line):
        return ""
    upper = [(x(px), y(min(py + s, bounds[1]))) for px, py, s in sides]
    lower = [(x(px), y(max(py - s, bounds[0]))) for px, py, s in reversed(sides)]
    return _polyline([*upper, *lower])


def reliability_chart(title: str, lines: Mapping[str, Sequence[tuple[float, float, int]]]) -> Chart:
    """Accuracy against confidence, bin by bin: (confidence, accuracy, rows); the area of a mark grows with its rows."""
    x, y = Axis(0, 1, *X), Axis(0, 1, *Y)
    series = [Series("calibrated", COLOURS, _polyline([(x(0), y(0)), (x(1), y(1))]), kind="dashed")]
    for number, (name, bins) in enumerate(lines.items()):
        total = sum(rows for *_, rows in bins) or 1
        marks = []
        for confidence, accuracy, rows in bins:
            tip = f"{name}\nconfidence {100 * confidence:.1f} %\naccuracy {100 * accuracy:.1f} %\n{rows:,} rows"
            marks.append(Mark(x(confidence), y(accuracy), "circle", tip, size=0.5 + 2 * math.sqrt(rows / total)))
        series.append(Series(name, number, _polyline([(m.x, m.y) for m in marks]), marks=marks, kind="faint"))
    percent = [(value, f"{100 * value:.0f}") for value in (0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    ticks = [(x(v), text) for v, text in percent], [(y(v), text) for v, text in percent]
    return Chart(title, "confidence (%)", "accuracy (%)", *ticks, series)
