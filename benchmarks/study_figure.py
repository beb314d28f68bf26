"""Draw the study of self-setting warm-ups: each method minus plain OPD in each setting, part by part.

    python benchmarks/study_figure.py docs/figures/self-setting.png

The parts are committed files of benchmarks/results; methods of one part share its seeds, those of two parts may not.
Left out: corrections for the number of comparisons, which the tables of docs/experiments.md have.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from performance_files import read

from trb.report.style import COLOURS
from trb.studies.study import BASELINE

PARTS = ("study2", "study2-others", "study2-rivals", "study2-fresh", "study2-default")


def draw(parts: dict[str, dict[str, Any]]) -> Figure:
    """A column for each setting, a row for each method of a part, with 95% intervals in percentage points."""
    rows = [
        (name, method)
        for name, part in parts.items()
        for method in next(iter(part["settings"].values()))["methods"]
        if method != BASELINE
    ]
    settings = list(next(iter(parts.values()))["settings"])
    figure = Figure(figsize=(3.1 * len(settings) + 2.4, 0.26 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axis, setting in zip(axes, settings, strict=True):
        for place, (name, method) in enumerate(rows):
            _draw_one(axis, place, parts[name]["settings"][setting]["methods"][method], list(parts).index(name))
        axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axis.set_title(setting, fontsize=9)
        axis.set_xlabel("points of pass@1, minus plain OPD", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(rows)), [f"{method}  ({_seeds(parts[name])})" for name, method in rows], fontsize=7)
    axes[0].invert_yaxis()
    return figure


def _draw_one(axis: Any, place: int, entry: dict[str, Any], part: int) -> None:
    found = entry["difference_to_opd"]
    low, high = (100 * end for end in found["interval"])
    colour = COLOURS[part]
    axis.plot([low, high], [place, place], color=colour, linewidth=1.4)
    axis.plot([100 * found["estimate"]], [place], "o", color=colour, markersize=4)


def _seeds(part: dict[str, Any]) -> str:
    """The seeds that its runs have, from first to last."""
    outcomes = next(iter(part["outcomes"][next(iter(part["settings"]))].values()))
    numbers = sorted(int(name.removeprefix("seed-")) for name in outcomes)
    return f"seeds {numbers[0]} to {numbers[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, metavar="FILE", help="the figure to write")
    output = parser.parse_args().output
    parts = {name: part for name in PARTS if (part := read(name)) is not None}
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(parts).savefig(output, dpi=110)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
