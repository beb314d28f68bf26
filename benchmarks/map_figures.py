"""Draw the map: final scores along each panel, method by method, with the collapsed runs.

    python benchmarks/map_figures.py                # docs/figures/map-*.png, of the committed records
    python benchmarks/map_figures.py runs/map.json  # of another one

A second record fills in: the runs of a method at a point are those of the record that has more of them there. Its pairs
may be others, so that what stands side by side in a figure need not be paired.

Left out: the runs and their records (benchmarks/map.py).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from map_record import filled_in
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trb.report.style import COLOURS, label

RESULTS = Path(__file__).parent / "results"
RECORDS = (RESULTS / "map.json", RESULTS / "map-rest.json")
LINES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D", "x", "+", "v", "|")
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # two-sided, by degrees of freedom from 1


def write_figures(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write map-PANEL.png for each panel of a record that has a run; returns the paths."""
    paths = []
    for name, panel in record["panels"].items():
        runs = [run for run in record["runs"] if run["point"] in panel["points"] and run["method"] in record["methods"]]
        if runs:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"map-{name}.png")
            draw(record, panel, runs).savefig(paths[-1], dpi=110)
    return paths


def draw(record: Mapping[str, Any], panel: Mapping[str, Any], runs: list[dict[str, Any]]) -> Figure:
    """Scores above, the share of collapsed runs below; a column for each value of the panel's second property."""
    points = {name: record["points"][name] for name in panel["points"] if name in record["points"]}
    columns = list(dict.fromkeys(_value(point, panel["by"]) for point in points.values()))
    figure = Figure(figsize=(3.2 * len(columns) + 1.6, 4.4), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for place, column in enumerate(columns):
        inside = {name: point for name, point in points.items() if _value(point, panel["by"]) == column}
        for style, method in enumerate(record["methods"]):
            found = [(_value(inside[run["point"]], panel["along"]), run) for run in runs
                     if run["point"] in inside and run["method"] == method]  # fmt: skip
            if found:
                _draw_method(axes[:, place], method, style, found)
        axes[0, place].set_title("" if column is None else f"{panel['by'].replace('_', ' ')}: {column}", fontsize=9)
        axes[1, place].set_xlabel(panel["along"].replace("_", " "), fontsize=8)
        if panel["along"] in ("learning_rate", "rollouts", "steps"):
            measured = sorted({_value(point, panel["along"]) for point in points.values()})
            axes[1, place].set_xscale("log", base=2)
            axes[1, place].set_xticks(measured, [f"{value:g}" for value in measured])
    for axis, text in zip(axes[:, 0], ("pass@1", "collapsed"), strict=True):
        axis.set_ylabel(text, fontsize=8)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylim(-0.03, 1.03)
    shown = {text: line for axis in axes[0] for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    title = "hollow, without interval: one seed"
    options = {"title": title, "title_fontsize": 6, "fontsize": 7, "frameon": False}
    figure.legend(shown.values(), shown.keys(), loc="outside right center", **options)
    return figure


def _draw_method(axes: Any, method: str, style: int, found: list[tuple[Any, dict[str, Any]]]) -> None:
    values = sorted({value for value, _ in found})
    scores = [[run["final"] for value, run in found if value == at] for at in values]
    shares = [fmean(run["collapsed"] for value, run in found if value == at) for at in values]
    look = {"color": COLOURS[style % len(COLOURS)], "linestyle": LINES[style % 4], "marker": MARKS[style % 8]}
    look |= {"markersize": 4, "linewidth": 1.2}
    base, _, rest = method.partition("-")
    name = f"{label(base)} {rest}".strip()
    axes[0].errorbar(
        values, list(map(fmean, scores)), yerr=list(map(half_width, scores)), capsize=2, label=name, **look
    )
    axes[1].plot(values, shares, **look)
    hollow = look | {"linestyle": "", "markerfacecolor": "white"}
    single = [(at, each[0]) for at, each in zip(values, scores, strict=True) if len(each) == 1]
    if single:
        axes[0].plot(*zip(*single, strict=True), zorder=3, **hollow)


def half_width(scores: list[float]) -> float:
    """Half of the 95% interval of a mean over seeds; 0 for a single one."""
    if len(scores) < 2:
        return 0.0
    t = T_95[len(scores) - 2] if len(scores) - 2 < len(T_95) else 2.1
    return t * stdev(scores) / len(scores) ** 0.5


def _value(point: Mapping[str, Any], name: str | None) -> Any:
    return None if name is None else point["knobs"].get(name, point.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", nargs="*", type=Path, default=RECORDS, metavar="FILE", help="records of map.py")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), metavar="DIR", help="default: docs/figures")
    options = parser.parse_args()
    first, *others = (json.loads(path.read_text()) for path in options.records)
    for other in others:
        first = filled_in(first, other)
    for path in write_figures(first, options.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
