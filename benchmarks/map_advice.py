"""Which numbers of an untrained pair foretell what blending gains, over the points of benchmarks/results/map.json.

    python benchmarks/map_advice.py       # prints the table, writes it to map.json and to the package's advice.json

A point is a pair of panels a, b and e: settings that only change how it is trained have the same numbers at step 0. The
gain is that of `trb` with its defaults over plain distillation, the mean over paired seeds. Each number alone
foretells it by a straight line; how well is judged by leaving a point out, predicting it from the others, and
comparing with what the mean of the others would have said. The number with the smallest error is the advice of
`trb probe` (trb.studies.advice). The list of candidates and this rule were written before any gain was known, and that
the gain is that of today's default before any gain of it was.
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from map_record import as_text, pair_name
from numpy.typing import NDArray
from scipy.stats import spearmanr

from trb.safety.files import write_json, write_text
from trb.studies.advice import TABLE

PANELS = ("a", "b", "e")
METHOD = "trb-sequence-linear"
OTHERS = ("trb-gap", "trb-wide")  # looked at beside it

CANDIDATES = {
    "transfer": lambda s: s["transfer"]["policies"]["student"]["transfer"],
    "cosine": lambda s: s["transfer"]["policies"]["student"]["cosine"],
    "transfer gained by the blend": lambda s: (
        s["transfer"]["policies"]["blend"]["transfer"] - s["transfer"]["policies"]["student"]["transfer"]
    ),
    "student's pass@1": lambda s: s["rollouts"]["student"]["pass_at_1"],
    "pass@1 gained by the blend": lambda s: s["rollouts"]["blend"]["pass_at_1"] - s["rollouts"]["student"]["pass_at_1"],
    "reverse KL": lambda s: s["rollouts"]["student"]["reverse_kl"],
    "reverse KL, late over early": lambda s: (
        s["rollouts"]["student"]["reverse_kl_late"] / s["rollouts"]["student"]["reverse_kl_early"]
    ),
    "first mistake in the first half": lambda s: s["rollouts"]["student"]["first_wrong_in_first_half"],
    "fall of the teacher's log-probability": lambda s: _fall(s["rollouts"]["student"]["teacher_log_prob_by_position"]),
    "overlap of likeliest tokens": lambda s: s["rollouts"]["student"]["overlap_of_likeliest"],
    "accept rate": lambda s: s["rollouts"]["blend"]["accept_rate"],
}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A straight line through points, and how far off it is for points it has not seen."""

    slope: float
    intercept: float
    error: float
    """Mean absolute error of a point predicted from the others, in points of pass@1 / 100."""
    explained: float
    """1 - squared error left over that of the mean of the others."""
    rank_correlation: float

    @classmethod
    def through(cls, x: Floats, y: Floats) -> "Line":
        wrong, plain = np.empty(len(x)), np.empty(len(x))
        for out in range(len(x)):
            others = np.arange(len(x)) != out
            slope, intercept = _fit(x[others], y[others])
            wrong[out] = y[out] - (slope * x[out] + intercept)
            plain[out] = y[out] - y[others].mean()
        return cls(
            *_fit(x, y),
            error=float(np.abs(wrong).mean()),
            explained=float(1 - (wrong**2).sum() / (plain**2).sum()),
            rank_correlation=float(spearmanr(x, y).statistic),
        )


def _fit(x: Floats, y: Floats) -> tuple[float, float]:
    variance = ((x - x.mean()) ** 2).sum()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / variance) if variance > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def _fall(by_position: list[float | None]) -> float:
    values = [value for value in by_position if value is not None]
    half = len(values) // 2
    return math.fsum(values[:half]) / half - math.fsum(values[half:]) / (len(values) - half)


def points_of(record: Mapping[str, Any], method: str = METHOD) -> list[dict[str, Any]]:
    """Every point of the panels that has both methods: its pair's name, its gain by seed, and its numbers at step 0."""
    names = list(dict.fromkeys(name for panel in PANELS for name in record["panels"][panel]["points"]))
    found = []
    for name in names:
        scores = {
            of: {run["seed"]: run["final"] for run in record["runs"] if (run["point"], run["method"]) == (name, of)}
            for of in ("opd", method)
        }
        seeds = sorted(scores["opd"].keys() & scores[method].keys())
        if seeds:
            pair = pair_name(record["points"][name]["knobs"])
            gains = [scores[method][seed] - scores["opd"][seed] for seed in seeds]
            found.append({"pair": pair, "gains": gains, "step0": record["step0"][pair]})
    return found


def judge(points: list[dict[str, Any]]) -> dict[str, Line]:
    """A line for every candidate, the best one first."""
    gains = np.array([math.fsum(point["gains"]) / len(point["gains"]) for point in points])
    lines = {
        name: Line.through(np.array([number(point["step0"]) for point in points]), gains)
        for name, number in CANDIDATES.items()
    }
    return dict(sorted(lines.items(), key=lambda entry: entry[1].error))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--map", type=Path, default=Path("benchmarks/results/map.json"))
    parser.add_argument("--advice", type=Path, default=TABLE)
    options = parser.parse_args()
    record = json.loads(options.map.read_text())
    points = points_of(record)
    judged = {method: judge(points_of(record, method)) for method in (METHOD, *OTHERS)}
    lines = judged[METHOD]
    best = next(iter(lines))
    for name, line in lines.items():
        print(
            f"{name:40s} error {100 * line.error:5.1f} points, explained {line.explained:6.2f}, "
            f"rank correlation {line.rank_correlation:6.2f}"
        )
    record["advice"] = {
        "points": len(points),
        "seeds": sorted({len(point["gains"]) for point in points}),
        "lines": {method: {name: vars(line) for name, line in found.items()} for method, found in judged.items()},
    }
    write_text(options.map, as_text(record))
    write_json(
        options.advice,
        {
            "source": "benchmarks/results/map.json",
            "method": METHOD,
            "seeds": sorted({len(point["gains"]) for point in points}),
            "best": best,
            "line": vars(lines[best]),
            "points": [
                {
                    "pair": point["pair"],
                    best: round(CANDIDATES[best](point["step0"]), 4),
                    "gain": round(math.fsum(point["gains"]) / len(point["gains"]), 4),
                }
                for point in points
            ],
        },
    )


if __name__ == "__main__":
    main()
