"""The table of answers and their verdicts (tests/tasks/graded_pairs.yaml), as completions for a grader."""

from pathlib import Path
from typing import NamedTuple

import yaml

TABLE = Path(__file__).parent / "tasks" / "graded_pairs.yaml"


class Pair(NamedTuple):
    kind: str
    gold: str
    answer: str
    completion: str
    right: bool
    known: bool  # that this package's grader is wrong about it


def pairs() -> list[Pair]:
    found = []
    for kind, rows in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items():
        for verdict in ("right", "wrong", "known"):
            for gold, answer, *deserved in rows.get(verdict, []):
                boxed = f"First \\boxed{{0}}? No.\n\nSo it is $\\boxed{{{answer}}}$."
                completion = answer if rows.get("reads") == "completions" else boxed
                right = (deserved or [verdict])[0] == "right"
                found.append(Pair(kind, gold, answer, completion, right, verdict == "known"))
    return found
