"""Geometry of the page's charts: panels and scores become SVG path data, ticks and a sentence for screen readers.

Only numbers and path strings leave this module; the template writes the elements and the stylesheet gives
them colour. Coordinates are in the chart's own units (WIDTH x HEIGHT), rounded to a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trb.measures import PASS_AT_1, Measure, Scored, decimals
from trb.report.panels import Axis, Panel, Series, Values, smoothed, thinned
from trb.report.style import DASHES, MARKERS, MINUS, Format, show

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22
MAX_POINTS = 600
BAR_WIDTH, BAR_HEIGHT = 280, 26
# Fewer points than this are all marked and never smoothed.
FEW_POINTS = 20
_MARKERS_PER_LINE = 7
_SMOOTH_SHARE = 12
_MOST_BAR_TICKS = 6

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Linear map of [low, high] onto [start, stop] in chart units."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


@dataclass(frozen=True)
class Tick:
    """A gridline at `at` chart units and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series as SVG path data; empty strings where there is nothing to draw. `raw` is always as
    recorded."""

    method: str
    style: int
    dash: str
    raw: str
    smooth: str
    bound: str
    band: str
    markers: str


@dataclass(frozen=True)
class Chart:
    """One drawn panel; `data` is what hovering needs, ready for JSON."""

    panel: Panel
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    levels: tuple[Tick, ...]
    description: str
    data: dict[str, Any]


@dataclass(frozen=True)
class IntervalBar:
    """A value on a common axis: mean and interval ends in bar units, None where not recorded; `dots` are the values
    it is the mean of."""

    mean: float | None
    low: float | None
    high: float | None
    dots: tuple[float, ...] = ()


@dataclass(frozen=True)
class Strip:
    """Bars that share an axis; `zero` is where 0 lies on it, None where it is nothing special."""

    axis: tuple[Tick, ...]
    bars: tuple[IntervalBar, ...]
    zero: float | None = None


def draw(panel: Panel, steps: tuple[int, int]) -> Chart:
    """Draw a panel over the step range `steps`, which all charts of a page share; a panel with an axis of its own is
    drawn over that."""
    labels = panel.axis.labels
    low, high = (-0.3, len(labels) - 0.7) if labels else _padded_steps(steps)
    x = Scale(low, high, LEFT, WIDTH - RIGHT)
    kind = panel.quantity.format
    y = Scale(*_y_domain(panel), HEIGHT - BOTTOM, TOP)
    kept = {series.method: thinned(series.y, MAX_POINTS) for series in panel.series}
    lines = [_line(s, kept[s.method], x, y, panel.quantity.smooth, rank) for rank, s in enumerate(panel.series)]
    return Chart(
        panel=panel,
        x_ticks=tuple(Tick(round(x(v), 1), text) for v, text in _x_labels(x, labels)),
        y_ticks=tuple(Tick(round(y(v), 1), text) for v, text in _labelled(y.low, y.high, 3, kind)),
        lines=tuple(lines),
        levels=tuple(Tick(round(y(value), 1), name) for name, value in panel.levels),
        description=" ".join(_describe(series, kind, panel.axis) for series in panel.series),
        data={
            "id": panel.id,
            "title": panel.quantity.title,
            "unit": panel.quantity.unit,
            "format": kind,
            "boundName": panel.quantity.bound_name,
            "intervalName": panel.interval_name,
            "axis": panel.axis.group,
            "xName": panel.axis.name,
            "xLabels": list(labels) or None,
            "x": [x.low, x.high],
            "y": [y.low, y.high],
            "series": [_series_data(s, kept[s.method]) for s in panel.series],
        },
    )


def interval_bars(scores: Sequence[Scored], dots: Sequence[Sequence[float | None]] = ()) -> Strip:
    """Scores on a common axis of what they measure; `dots` are each score's values per seed."""
    measure = next((score.measure for score in scores if score.value is not None), PASS_AT_1)
    rows = [(score.value, score.interval) if score.measure is measure else (None, None) for score in scores]
    low, high = measure.bounds
    return _strip(rows, dots or [()] * len(rows), measure.format, floor=low, ceiling=high)


def difference_bars(
    rows: Sequence[tuple[float | None, tuple[float, float] | None]], measure: Measure = PASS_AT_1
) -> Strip:
    """Differences with their intervals on a common axis that holds zero: a forest plot."""
    return _strip(rows, [()] * len(rows), measure.difference_format, floor=-math.inf, ceiling=math.inf, include=(0.0,))


def _strip(
    rows: Sequence[tuple[float | None, tuple[float, float] | None]],
    dots: Sequence[Sequence[float | None]],
    kind: Format,
    *,
    floor: float,
    ceiling: float,
    include: tuple[float, ...] = (),
) -> Strip:
    values = [v for value, interval in rows for v in (value, *(interval or ())) if v is not None]
    values += [v for column in dots for v in column if v is not None]
    if not values:
        return Strip((), tuple(IntervalBar(None, None, None) for _ in rows))
    low, high = _domain([*values, *include], share=0.08, floor=floor, ceiling=ceiling)
    scale = Scale(low, high, 6, BAR_WIDTH - 6)

    def at(value: float | None) -> float | None:
        return None if value is None else round(scale(value), 1)

    bars = []
    for (value, interval), seeds in zip(rows, dots, strict=True):
        places = tuple(round(scale(v), 1) for v in seeds if v is not None)
        start, end = interval or (None, None)
        bars.append(IntervalBar(at(value), at(start), at(end), places))
    labelled = _labelled(low, high, 4, kind)
    if len(labelled) > _MOST_BAR_TICKS:
        labelled = labelled[::2]
    axis = tuple(Tick(round(scale(v), 1), text) for v, text in labelled)
    return Strip(axis, tuple(bars), at(0.0) if include else None)


def smoothing_window(values: Values) -> int:
    """Points in the moving mean for a series of this length, about a twelfth of it; 0 for a short series."""
    return len(values) // _SMOOTH_SHARE if len(values) >= 2 * FEW_POINTS else 0


def ticks(low: float, high: float, least: int) -> list[float]:
    """Round values inside [low, high], the widest gap of 1, 2 or 5 times a power of ten that gives
    `least`."""
    power = 10.0 ** math.floor(math.log10(high - low))
    for gap in (m * power * scale for scale in (1, 0.1, 0.01) for m in (5, 2, 1)):
        first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
        if last - first + 1 >= least:
            break
    return [index * gap for index in range(first, last + 1)]


def polyline(points: Iterable[tuple[float, float | None]]) -> str:
    """Path data through the points; a None starts a new stroke, and a lone point becomes a dot."""
    strokes: list[list[Point]] = [[]]
    for x, y in points:
        if y is None:
            strokes.append([])
        else:
            strokes[-1].append((x, y))
    return "".join(_stroke(stroke) for stroke in strokes if stroke)


def _stroke(points: Sequence[Point]) -> str:
    head, *tail = (f"{x:.1f} {y:.1f}" for x, y in points)
    # A zero-length segment is drawn by the round line cap; a bare move is not drawn at all.
    return f"M{head}" + ("".join(f"L{point}" for point in tail) or "h0")


def _line(series: Series, kept: list[int], x: Scale, y: Scale, smooth: bool, rank: int) -> Line:
    place = _placer(series, kept, x, y)
    window = smoothing_window(series.y) if smooth else 0
    shown = smoothed(series.y, window) if window else series.y
    return Line(
        method=series.method,
        style=series.style,
        dash=DASHES[series.style],
        raw=polyline(place(series.y)),
        smooth=polyline(place(shown)) if window else "",
        bound=polyline(place(series.bound)) if series.bound else "",
        band=_band(place(series.low), place(series.high)) if series.low else "",
        markers=_markers(place(shown), MARKERS[series.style], rank),
    )


def _placer(
    series: Series, kept: list[int], x: Scale, y: Scale
) -> Callable[[Values], list[tuple[float, float | None]]]:
    def place(values: Values) -> list[tuple[float, float | None]]:
        return [(x(series.x[i]), None if (v := values[i]) is None else y(v)) for i in kept]

    return place


def _band(low: list[tuple[float, float | None]], high: list[tuple[float, float | None]]) -> str:
    """One closed outline per stretch where both ends are known."""
    outlines: list[tuple[list[Point], list[Point]]] = [([], [])]
    for (x, bottom), (_, top) in zip(low, high, strict=True):
        if bottom is None or top is None:
            outlines.append(([], []))
        else:
            outlines[-1][0].append((x, top))
            outlines[-1][1].append((x, bottom))
    return "".join(_stroke([*tops, *reversed(bottoms)]) + "Z" for tops, bottoms in outlines if tops)


def _markers(points: list[tuple[float, float | None]], shape: str, rank: int) -> str:
    """Marker outlines on every point of a short series, on a few of a long one, staggered between series."""
    known = [(x, y) for x, y in points if y is not None]
    if len(known) > FEW_POINTS:
        gap = len(known) / _MARKERS_PER_LINE
        offset = gap * (0.35 + 0.3 * (rank % 3))
        known = [known[min(len(known) - 1, int(offset + i * gap))] for i in range(_MARKERS_PER_LINE)]
    return "".join(_MARKER_PATHS[shape].format(x=f"{x:.1f}", y=f"{y:.1f}") for x, y in known)


_MARKER_PATHS = {
    "circle": "M{x} {y}m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0Z",
    "square": "M{x} {y}m-2.4 -2.4h4.8v4.8h-4.8Z",
    "triangle": "M{x} {y}m0 -3.2l3 5.4h-6Z",
    "diamond": "M{x} {y}m0 -3.4l3.2 3.4l-3.2 3.4l-3.2 -3.4Z",
    "cross": "M{x} {y}m-2.4 -2.4l4.8 4.8m-4.8 0l4.8 -4.8",
    "plus": "M{x} {y}m-3 0h6m-3 -3v6",
    "nabla": "M{x} {y}m0 3.2l3 -5.4h-6Z",
    "bar": "M{x} {y}m0 -3.4v6.8",
    "right": "M{x} {y}m3.2 0l-5.4 3v-6Z",
    "left": "M{x} {y}m-3.2 0l5.4 3v-6Z",
    "hexagon": "M{x} {y}m0 -3l2.6 1.5v3l-2.6 1.5l-2.6 -1.5v-3Z",
    "dash": "M{x} {y}m-3.4 0h6.8",
    "star": "M{x} {y}m0 -3.4l1 2.4l2.4 1l-2.4 1l-1 2.4l-1 -2.4l-2.4 -1l2.4 -1Z",
    "pentagon": "M{x} {y}m0 -3l2.9 2.1l-1.1 3.3h-3.6l-1.1 -3.3Z",
    "hourglass": "M{x} {y}m-2.8 -2.8h5.6l-5.6 5.6h5.6Z",
    "bowtie": "M{x} {y}m-2.8 -2.8v5.6l5.6 -5.6v5.6Z",
}


def _padded_steps(steps: tuple[int, int]) -> tuple[float, float]:
    low, high = steps
    return (low, high) if low < high else (low - 1.0, high + 1.0)


def _y_domain(panel: Panel) -> tuple[float, float]:
    columns = (column for s in panel.series for column in (s.y, s.low, s.high, s.bound))
    values = [value for column in columns for value in column if value is not None]
    values += [value for _, value in panel.levels]
    # Quantities near zero are drawn from zero; a percentage never leaves [0, 1].
    ceiling = 1.0 if panel.quantity.format == "percent" and max(values) <= 1 else math.inf
    floor = 0.0 if min(values) >= 0 else -math.inf
    return _domain(values, share=0.06, floor=floor, ceiling=ceiling)


def _domain(values: Sequence[float], *, share: float, floor: float, ceiling: float) -> tuple[float, float]:
    """The values' range, widened by `share` inside [floor, ceiling] and reaching `floor` where that is
    near."""
    low, high = min(values), max(values)
    if 0 <= low <= 0.4 * high and floor == 0:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        widening = abs(high) * 0.5 or 1.0
        return low - (widening if low else 0.0), high + widening
    margin = share * (high - low)
    return max(low - margin, floor), min(high + margin, ceiling)


def _labelled(low: float, high: float, least: int, kind: Format) -> list[tuple[float, str]]:
    values = ticks(low, high, least)
    gap = values[1] - values[0]
    share = kind in ("percent", "points")
    if not share and gap < 1e-4:
        return [(v, f"{v:zg}".replace("e-0", "e-")) for v in values]
    unit, sign = 100 if share else 1, "%" if kind == "percent" else ""
    digits = max(0, -math.floor(math.log10(gap * unit) + 1e-9))
    plus = "+" if kind in ("points", "change") else ""
    texts = [f"{decimals(v * unit, digits, plus)}{sign}".replace("-", MINUS) for v in values]
    return list(zip(values, texts, strict=True))


def _x_labels(x: Scale, labels: Sequence[str]) -> list[tuple[float, str]]:
    if labels:
        return list(enumerate(labels))
    return [(v, f"{v:,.0f}") for v in ticks(x.low, x.high, 5) if v == int(v) >= 0]


def _describe(series: Series, kind: Format, axis: Axis) -> str:
    known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    (first, start), (last, end) = known[0], known[-1]
    low, high = min(y for _, y in known), max(y for _, y in known)
    begin, finish = (axis.labels[x] if axis.labels else x for x in (first, last))
    return (
        f"{series.label}: {show(start, kind)} at {axis.name} {begin}, {show(end, kind)} at {axis.name} {finish}, "
        f"between {show(low, kind)} and {show(high, kind)}."
    )


def _series_data(series: Series, kept: list[int]) -> dict[str, Any]:
    columns = {"y": series.y, "low": series.low, "high": series.high, "bound": series.bound}
    data: dict[str, Any] = {"method": series.method, "label": series.label, "style": series.style}
    data["x"] = [series.x[i] for i in kept]
    for name, values in columns.items():
        if values:
            data[name] = [None if (v := values[i]) is None else float(f"{v:.6g}") for i in kept]
    return data
