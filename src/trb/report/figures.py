"""The page's curves, forest plots and sweeps as files for papers, drawn with matplotlib without a display.

Same panels, colours, dashes and markers as the page; values are drawn as recorded, with the smoothed line
over faint raw points only where the page does so too. No titles inside the figure: a paper has its own
caption. Names of methods and settings are drawn as they are: no part of them is read as a formula or by TeX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trb.records import PROBE, STUDY
from trb.report import panels, probe, study_panels
from trb.report.panels import Panel, Series, Values, slug
from trb.report.probe import read_probe
from trb.report.reading import ReportError, read
from trb.report.study import Study, read_study
from trb.report.study_panels import Bar, Bars
from trb.report.style import COLOURS, DASHES, MARKERS, visible
from trb.report.svg import FEW_POINTS, smoothing_window

_HOURGLASS, _BOWTIE = ((-1, -1), (1, -1), (-1, 1), (1, 1)), ((-1, -1), (-1, 1), (1, -1), (1, 1))
_OURS = ("o", "s", "^", "D", "x", "+", "v", "|", ">", "<", "h", "_", "*", "p", _HOURGLASS, _BOWTIE)
_MARKERS: dict[str, Any] = dict(zip(MARKERS, _OURS, strict=True))
_SIZE_INCHES = (3.4, 2.3)
_PLOT_INCHES = 4.0
_INCHES_PER_CHARACTER = 0.066  # of bold labels at the font size below
_LONGEST_NAME = 80  # characters; a figure grows with its longest name
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
    # Whoever wrote the files chose the names in them.
    "text.parse_math": False,
    "text.usetex": False,
    # Without a fixed salt the ids inside an SVG differ from one call to the next.
    "svg.hashsalt": "trb",
}


def write_figures(
    directory: str | Path, formats: Sequence[str] = ("png", "svg"), folder: str | Path | None = None
) -> list[Path]:
    """Write each chart of the report into `folder` (by default directory/figures/), as NAME.FORMAT; returns the paths.

    A study also gets differences.FORMAT, the forest plot, and per setting scores-SETTING and sweep-SETTING.
    `formats` are matplotlib's (png, svg, pdf, ...). An empty run gives an empty list.
    Raises ReportError as `write_report` does, and for an unknown format.
    """
    known = Figure().canvas.get_supported_filetypes()
    unknown = [name for name in formats if name not in known]
    if unknown:
        raise ReportError(f"unknown figure formats {unknown}; choose from {', '.join(sorted(known))}.")
    folder = Path(directory) / "figures" if folder is None else Path(folder)
    paths = []
    with matplotlib.rc_context(_STYLE):
        for stem, figure in _figures(Path(directory)):
            folder.mkdir(parents=True, exist_ok=True)
            for name in formats:
                path = folder / f"{stem}.{name}"
                figure.savefig(path, metadata={"Date": None} if name == "svg" else None)
                paths.append(path)
    return paths


def _figures(directory: Path) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of everything a directory's page draws."""
    if (directory / STUDY).is_file():
        yield from _study_figures(read_study(directory))
        return
    if (directory / PROBE).is_file():
        source = read_probe(directory)
        found = probe.groups(source.record, "", str(source.directory / PROBE))
    else:
        found = panels.groups(read(directory))
    yield from ((panel.id, draw(panel)) for group in found for panel in group.panels)


def _study_figures(study: Study) -> Iterator[tuple[str, Figure]]:
    forests = study_panels.forests(study)
    for place, measure in enumerate(study.measures):
        if alike := [one for one in forests if one.measure is measure]:
            text = f"difference in {measure.title}, {measure.unit}; {study.interval_name}s"
            yield f"differences-{measure.key}" if place else "differences", draw_bars(alike, text, zero=True)
    for setting in study.settings:
        name = slug(setting.name)
        for stem, bars in (
            ("scores", study_panels.scores(study, setting)),
            ("sweep", study_panels.sweep(study, setting)),
        ):
            if any(row.value is not None for row in bars.rows):
                yield f"{stem}-{name}", draw_bars([bars], setting.measure.in_units)
        for group in study_panels.groups(study, setting):
            yield from ((panel.id, draw(panel)) for panel in group.panels)
    for setting_name, record in study.diagnostics.items():
        where = f"{study.directory / STUDY}: diagnostics.{setting_name}"
        for group in probe.groups(record, setting_name, where):
            yield from ((panel.id, draw(panel)) for panel in group.panels)


def draw_bars(sections: Sequence[Bars], label: str, *, zero: bool = False) -> Figure:
    """Means with their intervals, one row each, section below section; single seeds as faint dots, selected rows bold.

    Shares are shown in percent, their differences in points (`zero` marks no difference).
    """
    rows = sum(len(section.rows) + 1 for section in sections)
    longest = max((len(_name(row.label)) for section in sections for row in section.rows), default=0)
    width = _PLOT_INCHES + _INCHES_PER_CHARACTER * longest
    figure = Figure(figsize=(width, 0.55 + 0.2 * rows), layout="constrained")
    axes = figure.add_subplot()
    names: list[tuple[float, str, bool]] = []
    place = 0.0
    for section in sections:
        axes.annotate(_name(section.title), (0, -place), xycoords=("axes fraction", "data"), xytext=(3, 0),
                      textcoords="offset points", va="center", size=7, color="0.35")  # fmt: skip
        for row in section.rows:
            place += 1
            names.append((-place, _name(row.label), row.selected))
            _draw_bar(axes, row, -place, section.measure.scale)
        place += 1
    if zero:
        axes.axvline(0, color="0.3", linewidth=0.7)
    axes.set_yticks([at for at, _, _ in names], [name for _, name, _ in names])
    for tick, (_, _, selected) in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if selected else "normal")
    axes.set_ylim(0.6 - place, 0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(_name(label))
    return figure


def _draw_bar(axes: Axes, row: Bar, at: float, scale: int) -> None:
    colour = "0.45" if row.style is None else COLOURS[row.style]
    seeds = [scale * value for value in row.per_seed if value is not None]
    axes.plot(seeds, [at] * len(seeds), "o", color=colour, markersize=2.5, alpha=0.3, linewidth=0)
    if row.value is None:
        return
    if row.interval:
        low, high = (scale * end for end in row.interval)
        axes.plot([low, high], [at, at], color=colour)
    marker = "o" if row.style is None else _MARKERS[MARKERS[row.style]]
    axes.plot([scale * row.value], [at], marker, color=colour, markersize=4)


def draw(panel: Panel) -> Figure:
    """One panel as a figure."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    lines = [line for series in panel.series for line in _draw_series(axes, series, panel)]
    for name, value in panel.levels:
        axes.axhline(value, color="0.45", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            _name(name),
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="0.35",
            size=7,
        )
    quantity = panel.quantity
    axes.set_xlabel("\n".join(map(visible, filter(None, (panel.axis.name, panel.note)))))
    axes.set_ylabel(_name(f"{quantity.title} ({quantity.unit})" if quantity.unit else quantity.title))
    if panel.axis.labels:
        axes.set_xticks(range(len(panel.axis.labels)), [_name(text) for text in panel.axis.labels])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if quantity.format == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    if len(panel.series) > 1 or any(series.bound for series in panel.series):
        # Given one by one: matplotlib leaves out what begins with an underscore.
        axes.legend(lines, [str(line.get_label()) for line in lines])
    return figure


def _draw_series(axes: Axes, series: Series, panel: Panel) -> list[Line2D]:
    """The lines that belong in the legend."""
    colour = COLOURS[series.style]
    window = smoothing_window(series.y) if panel.quantity.smooth else 0
    shown = panels.smoothed(series.y, window) if window else series.y
    if window:
        axes.plot(series.x, _with_gaps(series.y), color=colour, alpha=0.25, linewidth=0.7)
    lines = axes.plot(
        series.x,
        _with_gaps(shown),
        color=colour,
        label=_name(series.label),
        linestyle=_dash(DASHES[series.style]),
        marker=_MARKERS[MARKERS[series.style]],
        markersize=3,
        markevery=max(1, len(series.y) // 7) if len(series.y) > FEW_POINTS else 1,
    )
    if series.low:
        low, high = _with_gaps(series.low), _with_gaps(series.high)
        axes.fill_between(series.x, low, high, color=colour, alpha=0.15, linewidth=0)
    if series.bound:
        lines += axes.plot(
            series.x,
            _with_gaps(series.bound),
            color=colour,
            linewidth=0.8,
            linestyle=(0, (1, 2)),
            label=f"{_name(series.label)}, {_name(panel.quantity.bound_name)}",
        )
    return lines


def _name(text: str) -> str:
    """A name as it can be drawn: on one line, without control characters, of bounded length."""
    shown = visible(text)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}…"


def _with_gaps(values: Values) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _dash(dash: str) -> str | tuple[float, tuple[float, ...]]:
    """An SVG dash array as matplotlib's line style."""
    return (0, tuple(float(length) / 2 for length in dash.split())) if dash else "solid"
