"""Growth with lengths, rows and vocabularies in docs/performance.md: tables, and docs/figures/growth.svg.

Left out: the measuring (`growth.py`), and the rest of the page (`performance.py`).
"""

from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from pages import paragraph, table
from performance_files import NOT_MEASURED, ROOT, listed, read

from trb.report.style import COLOURS

FIGURE = ROOT / "docs" / "figures" / "growth.svg"
SWEEPS = {"length": "tokens of a completion", "rows": "rows at once", "vocabulary": "entries of V"}
_LOOKS = (("-", "o"), ("--", "s"))


def windows(record: dict[str, Any], sweep: str, contender: str) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    """(value, window, its point) of a sweep, in order of the values."""
    found = [
        (window["tokens"] if sweep == "length" else point[sweep], window, point)
        for point in record["points"].values()
        if (point["sweep"], point["contender"]) == (sweep, contender)
        for window in point["windows"]
    ]
    return sorted(found, key=lambda entry: entry[0])


def contenders(record: dict[str, Any]) -> list[str]:
    return [*dict.fromkeys(point["contender"] for point in record["points"].values())]


def rate(window: dict[str, Any]) -> float:
    """Tokens per processor second."""
    return float(window["drawn"] / window["seconds"])


def ceiling(window: dict[str, Any]) -> float:
    """What the rate would be if every pass took its floor, and nothing else any time."""
    return float(window["drawn"] / window["floor_seconds"])


# ---- in words and tables ----


def how_measured() -> str:
    record = read("growth")
    if record is None:
        return f"{NOT_MEASURED}: `python benchmarks/growth.py`."
    points, origins = record["points"].values(), record["provenance"].values()
    copies = [point["copy_bytes_per_second"] / 1e9 for point in points]
    products = [point["flops_per_second"] / 1e9 for point in points]
    rows = {sweep: listed(point["rows"] for point in points if point["sweep"] == sweep) for sweep in SWEEPS}
    tokens = listed(max(point["marks"]) for point in points if point["sweep"] != "length")
    busy = ", on a machine busy with other work" if any(origin["busy"] for origin in origins) else ""
    return paragraph(
        f"{record['dtype']}, ε = {record['kl_budget']:g}, threads: {listed(origin['threads'] for origin in origins)}, "
        f"{listed(origin['machine']['cpu'] for origin in origins)}{busy}. Copies ran at {min(copies):.0f} to "
        f"{max(copies):.0f} GB/s, products at {min(products):.0f} to {max(products):.0f} GFLOP/s. "
        f"Rows at once: {rows['length']} where lengths grow, {rows['vocabulary']} where the vocabulary does; where "
        f"lengths do not, completions have {tokens} tokens."
    )


def growth(sweep: str) -> str:
    """Tokens per processor second, those at the floor, and the floor's share of the time."""
    if read("growth") is None:
        return f"{NOT_MEASURED}."
    columns = ("tokens / s", "at the floor", "floor / taken")
    return _by_value(sweep, columns, _rates)


def memory() -> str:
    """What a row holds of keys and values, and what its tokens need."""
    if read("growth") is None:
        return f"{NOT_MEASURED}."
    return _by_value("length", ("MB a row", "its tokens, MB"), _megabytes)


def limit() -> str:
    """How far the student alone is from its floor: with fewest and most rows, and with the largest vocabulary."""
    record = read("growth")
    if record is None:
        return paragraph(f"**Passes.** {NOT_MEASURED}.", item=True)
    rows, vocabularies = (windows(record, sweep, contenders(record)[0]) for sweep in ("rows", "vocabulary"))
    few, many, wide = (
        window["seconds"] / window["floor_seconds"] for _, window, _ in (rows[0], rows[-1], vocabularies[-1])
    )
    return paragraph(
        f"**Products of few rows.** The student alone takes {few:.1f} times the floor of its passes at {rows[0][0]} "
        f"row, {many:.1f} times at {rows[-1][0]} rows, and {wide:.1f} times at V = {vocabularies[-1][0]:,} and "
        f"{vocabularies[-1][2]['rows']} rows: a product of few rows with a float32 matrix reads it far more slowly "
        "than a copy does.",
        item=True,
    )


def _by_value(sweep: str, columns: tuple[str, ...], cells: Callable[[dict[str, Any]], list[str]]) -> str:
    """A row for each value of a sweep, with those columns for each contender; of vocabularies the head's size, too."""
    record = read("growth")
    series = {name: {value: rest for value, *rest in windows(record, sweep, name)} for name in contenders(record)}
    values = {value: point for found in series.values() for value, (_, point) in found.items()}
    head = ("head, MB",) if sweep == "vocabulary" else ()
    rows = []
    for value in sorted(values):
        shown = [f"{value:,}", *(f"{values[value]['head_bytes'] / 1e6:.0f}" for _ in head)]
        for found in series.values():
            shown += cells(found[value][0]) if value in found else [""] * len(columns)
        rows.append(shown)
    return table((SWEEPS[sweep], *head, *(f"{name}: {column}" for name in series for column in columns)), rows)


def _rates(window: dict[str, Any]) -> list[str]:
    share = window["floor_seconds"] / window["seconds"]
    return [f"{rate(window):,.0f}", f"{ceiling(window):,.0f}", f"{share:.2f}"]


def _megabytes(window: dict[str, Any]) -> list[str]:
    return [f"{window[name] / 1e6:.1f}" for name in ("slot_bytes_per_row", "needed_bytes_per_row")]


# ---- the figure ----


def draw(record: dict[str, Any]) -> Figure:
    """Rates along each sweep and the memory of a row, every line with its floor, thin and without marks, beside it."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, (sweep, title) in zip(axes, SWEEPS.items(), strict=False):
        _lines(axis, record, sweep, rate, ceiling)
        axis.set(title=f"tokens per processor second, by {title}", xlabel=title)
    memory = figure.axes[-1]
    _lines(
        memory,
        record,
        "length",
        lambda window: window["slot_bytes_per_row"] / 1e6,
        lambda window: window["needed_bytes_per_row"] / 1e6,
    )
    memory.set(title="MB of keys and values a row, by its tokens", xlabel=SWEEPS["length"])
    for axis in figure.axes:
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return figure


def _lines(
    axis: Axes,
    record: dict[str, Any],
    sweep: str,
    measured: Callable[[dict[str, Any]], float],
    floor: Callable[[dict[str, Any]], float],
) -> None:
    values: list[int] = []
    for colour, (dash, mark), name in zip(COLOURS, _LOOKS, contenders(record), strict=False):
        found = windows(record, sweep, name)
        values = [value for value, *_ in found]
        look: dict[str, Any] = {"color": colour, "linestyle": dash}
        axis.plot(values, [measured(window) for _, window, _ in found], label=name, marker=mark, markersize=4, **look)
        axis.plot(values, [floor(window) for _, window, _ in found], label=f"{name}, floor", linewidth=0.8, **look)
    if values:
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.tick_params(labelsize=8)


def write_figure() -> None:
    """The figure, the same bytes from the same record."""
    record = read("growth")
    if record is not None:
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "growth"}):
            draw(record).savefig(FIGURE, metadata={"Date": None})


def figure() -> str:
    """The place of the figure on the page."""
    if read("growth") is None:
        return ""
    return f"![Tokens per second and memory of a row, as lengths, rows and vocabularies grow](figures/{FIGURE.name})"


GROWTH_TABLES: dict[str, Callable[[], str]] = {
    "growth, how": how_measured,
    "growth, figure": figure,
    "growth with length": lambda: growth("length"),
    "growth with rows": lambda: growth("rows"),
    "growth with the vocabulary": lambda: growth("vocabulary"),
    "memory of a row": memory,
    "limit of passes": limit,
}
