"""The page's curves as files for papers: one figure per quantity, drawn with matplotlib without a display.

Same panels, colours, dashes and markers as the page; values are drawn as recorded, with the smoothed line
over faint raw points only where the page does so too. No titles inside the figure: a paper has its own
caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trb.report import panels
from trb.report.panels import Panel, Series, Values
from trb.report.reading import ReportError, read
from trb.report.style import COLOURS, DASHES, MARKERS
from trb.report.svg import FEW_POINTS, smoothing_window

_MARKERS = dict(zip(MARKERS, ("o", "s", "^", "D", "x", "+", "v", "|"), strict=True))
_SIZE_INCHES = (3.4, 2.3)
# Typed loosely: the stubs of rc_context list every key.
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    # Without a fixed salt the ids inside an SVG differ from one call to the next.
    "svg.hashsalt": "trb",
}


def write_figures(directory: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write each chart of the report into directory/figures/, as NAME.FORMAT; returns the paths written.

    `formats` are matplotlib's (png, svg, pdf, ...). An empty run gives an empty list.
    Raises ReportError as `write_report` does, and for an unknown format.
    """
    known = Figure().canvas.get_supported_filetypes()
    unknown = [name for name in formats if name not in known]
    if unknown:
        raise ReportError(f"unknown figure formats {unknown}; choose from {', '.join(sorted(known))}.")
    source = read(directory)
    folder = source.directory / "figures"
    paths = []
    with matplotlib.rc_context(_STYLE):
        for panel in (panel for group in panels.groups(source) for panel in group.panels):
            folder.mkdir(exist_ok=True)
            figure = draw(panel)
            for name in formats:
                path = folder / f"{panel.id}.{name}"
                figure.savefig(path, metadata={"Date": None} if name == "svg" else None)
                paths.append(path)
    return paths


def draw(panel: Panel) -> Figure:
    """One panel as a figure."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    for series in panel.series:
        _draw_series(axes, series, panel)
    for name, value in panel.levels:
        axes.axhline(value, color="0.45", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="0.35",
            size=7,
        )
    quantity = panel.quantity
    axes.set_xlabel("step")
    axes.set_ylabel(f"{quantity.title} ({quantity.unit})" if quantity.unit else quantity.title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if quantity.format == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    if len(panel.series) > 1 or any(series.bound for series in panel.series):
        axes.legend()
    return figure


def _draw_series(axes: Axes, series: Series, panel: Panel) -> None:
    colour = COLOURS[series.style]
    window = smoothing_window(series.y) if panel.quantity.smooth else 0
    shown = panels.smoothed(series.y, window) if window else series.y
    if window:
        axes.plot(series.x, _with_gaps(series.y), color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(
        series.x,
        _with_gaps(shown),
        color=colour,
        label=series.label,
        linestyle=_dash(DASHES[series.style]),
        marker=_MARKERS[MARKERS[series.style]],
        markersize=3,
        markevery=max(1, len(series.y) // 7) if len(series.y) > FEW_POINTS else 1,
    )
    if series.low:
        low, high = _with_gaps(series.low), _with_gaps(series.high)
        axes.fill_between(series.x, low, high, color=colour, alpha=0.15, linewidth=0)
    if series.bound:
        axes.plot(
            series.x,
            _with_gaps(series.bound),
            color=colour,
            linewidth=0.8,
            linestyle=(0, (1, 2)),
            label=f"{series.label}, {panel.quantity.bound_name}",
        )


def _with_gaps(values: Values) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _dash(dash: str) -> str | tuple[float, tuple[float, ...]]:
    """An SVG dash array as matplotlib's line style."""
    return (0, tuple(float(length) / 2 for length in dash.split())) if dash else "solid"
