"""Methods of two parts of one study against each other, on the seeds and problems that both have.

    python benchmarks/across.py study2-others study2    each method of the first minus each of the second
    python benchmarks/across.py study2-default study2-fresh --other-commits    one method as it was and as it is

The parts are files of benchmarks/results (`collect.py`) whose runs are of one commit, from the same weights: their
rollouts share their noise, as those of one part do. Where the code changed between them, that plain OPD solved the same
problems, to the last one, is what shows that only the method did; seeds of a setting in which it did not are left out.

Left out: studies without right and wrong answers, and learning curves, which such a file has as means only.
"""

import argparse
import math
from typing import Any

import numpy as np
from collect import unpacked_outcomes
from performance_files import read

from trb.studies.statistics import Estimate, paired_difference
from trb.studies.study import BASELINE


def check(first: dict[str, Any], second: dict[str, Any], *, other_commits: bool = False) -> None:
    """Raises ValueError unless what both ran is the same to the last problem; with `other_commits` but for a tenth."""
    commits = {commit for study in (first, second) for commit in study["provenance"]["commits_of_the_runs"]}
    if len(commits) != 1 and not other_commits:
        raise ValueError(f"runs of several commits: {', '.join(sorted(commits))}")
    if first["models"] != second["models"]:
        raise ValueError("the weights are others")
    for setting in first["settings"]:
        both, apart = _seeds(first, second, setting)
        if not both:
            raise ValueError(f"{setting}: no seed of {BASELINE} is in both")
        if apart and (not other_commits or 10 * len(apart) > len(both)):
            raise ValueError(f"{setting}, {', '.join(apart)}: {BASELINE} solved other problems")


def _seeds(first: dict[str, Any], second: dict[str, Any], setting: str) -> tuple[list[str], list[str]]:
    """The seeds that both have, and those among them in which plain OPD solved other problems."""
    one, other = (study["outcomes"][setting][BASELINE] for study in (first, second))
    both = sorted(one.keys() & other.keys(), key=lambda seed: int(seed.removeprefix("seed-")))
    return both, [seed for seed in both if one[seed] != other[seed]]


def difference(first: dict[str, Any], second: dict[str, Any], setting: str, one: str, other: str) -> Estimate:
    """Method `one` of the first part minus `other` of the second, in shares of right answers."""
    both, apart = _seeds(first, second, setting)
    seeds = [seed for seed in both if seed not in apart]
    return _paired([(first, one, second, other, seeds)], setting)


def together(parts: list[dict[str, Any]], setting: str, one: str) -> Estimate:
    """A method minus plain OPD over parts with seeds of their own, each of which has both."""
    return _paired([(part, one, part, BASELINE, _seeds(part, part, setting)[0]) for part in parts], setting)


def _paired(pairs: list[tuple[dict[str, Any], str, dict[str, Any], str, list[str]]], setting: str) -> Estimate:
    sets = pairs[0][0]["settings"][setting]["test"]
    tables: tuple[list[list[int]], list[list[int]]] = ([], [])
    for first, one, second, other, seeds in pairs:
        for table, study, method in zip(tables, (first, second), (one, other), strict=True):
            table += [solved(study["outcomes"][setting][method][seed], sets) for seed in seeds]
    strata_P = np.repeat(np.arange(len(sets)), [suite["problems"] for suite in sets])
    return paired_difference(*tables, strata_P=strata_P)


def solved(run: dict[str, str], sets: list[dict[str, Any]]) -> list[int]:
    """Of all problems, the sets in a row."""
    return [bit for suite in sets for bit in unpacked_outcomes(run[suite["name"]], suite["problems"])]


def average(estimates: list[Estimate]) -> tuple[float, float]:
    """Over independent settings: mean and standard error."""
    errors = [estimate.standard_error for estimate in estimates]
    return math.fsum(estimate.value for estimate in estimates) / len(estimates), math.hypot(*errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="example: python benchmarks/across.py study2-others study2"
    )
    parser.add_argument("parts", nargs=2, metavar="NAME", help="a file of benchmarks/results, without its ending")
    parser.add_argument("--other-commits", action="store_true", help="the runs may be of several commits")
    options = parser.parse_args()
    names = options.parts
    first, second = map(read, names)
    if first is None or second is None:
        parser.error(f"{names[first is not None]}: no such file in benchmarks/results")
    check(first, second, other_commits=options.other_commits)
    settings = list(first["settings"])
    for one in first["settings"][settings[0]]["methods"]:
        for other in second["settings"][settings[0]]["methods"]:
            estimates = [difference(first, second, setting, one, other) for setting in settings]
            shown = [
                f"{name} {100 * found.value:+.2f} ({100 * found.interval[0]:.2f} to {100 * found.interval[1]:.2f})"
                for name, found in zip(settings, estimates, strict=True)
            ]
            mean, error = average(estimates)
            print(f"{one} minus {other}: {', '.join(shown)}; average {100 * mean:+.2f} (se {100 * error:.2f})")


if __name__ == "__main__":
    main()
