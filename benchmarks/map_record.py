"""The record of the map: what is kept of its runs in one file, and joined with the record of runs whose files are gone.

Left out: how runs are made and read (`map.py`), figures (`map_figures.py`).
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any


def pair_name(knobs: Mapping[str, Any]) -> str:
    """Of the pair that knobs of `map_pairs.Knobs` make, as the record's numbers of step 0 know it."""
    return f"{knobs['stages']}-{knobs['start']:g}-{knobs['shared']:g}-{knobs['teacher']}"


def joined(record: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the runs, and the numbers of step 0, of an earlier one whose files are gone.

    Raises ValueError unless what both have is the same in both: what models of a pair can, and of a run its scores.
    """
    for name, pair in record["pairs"].items():
        before = earlier["pairs"].get(name, pair)["measured"]
        if before != pair["measured"]:
            raise ValueError(f"{name} is not the model of the earlier runs: {pair['measured']}, and {before} before")
    runs = {_key(run): run for run in earlier["runs"]}
    for run in record["runs"]:
        known = runs.get(_key(run), run)
        if (known["final"], known["curve"]) != (run["final"], run["curve"]):
            raise ValueError(f"{' '.join(map(str, _key(run)))} scored {run['final']}, and {known['final']} before")
        runs[_key(run)] = run | known  # what later code also writes down joins what was known
    commits = {one for part in (record, earlier) for one in part["provenance"]["commits_of_the_runs"]}
    return {
        **record,
        "provenance": {**record["provenance"], "commits_of_the_runs": sorted(commits)},
        **{part: {**record[part], **earlier[part]} for part in ("points", "step0", "pairs")},
        "runs": [runs[key] for key in sorted(runs)],
    }


def filled_in(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A record in which the runs of a method at a point are another's, where that has more of them."""
    own, others = (Counter(_key(run)[:2] for run in one["runs"]) for one in (record, other))
    fuller = {key for key in others if others[key] > own[key]}
    runs = [run for run in record["runs"] if _key(run)[:2] not in fuller]
    runs += [run for run in other["runs"] if _key(run)[:2] in fuller]
    return {**record, "points": {**other["points"], **record["points"]}, "runs": runs}


def keys(record: Mapping[str, Any]) -> set[tuple[str, str, int]]:
    """Point, method and seed of each run of a record."""
    return {_key(run) for run in record["runs"]}


def _key(run: Mapping[str, Any]) -> tuple[str, str, int]:
    return run["point"], run["method"], run["seed"]


def as_text(record: Mapping[str, Any]) -> str:
    """JSON with a run on each line: hundreds of them would be tens of thousands of lines."""
    rest = json.dumps({**record, "runs": []}, indent=1, allow_nan=False)
    runs = ",\n".join(json.dumps(run, separators=(",", ":"), allow_nan=False) for run in record["runs"])
    return rest.replace('"runs": []', f'"runs": [\n{runs}\n]') + "\n"
