"""The share of the table of graded pairs that this package's grader gets right, beside math-verify's own, and the time.

    python benchmarks/grading.py        writes benchmarks/results/grading.json

math-verify is asked as its README does: `verify(parse(reference), parse(completion))`, all defaults, the reference in a
box. The cases where the two differ are printed and recorded, with the verdict that mathematics has.
"""

import logging
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from trb.safety.files import write_json
from trb.studies.provenance import describe
from trb.tasks.grading import Verifier

ROOT = Path(__file__).parents[1]
PARSERS = ("math-verify", "latex2sympy2_extended", "sympy")
sys.path.insert(0, str(ROOT / "tests"))
from graded_pairs import Pair, pairs  # noqa: E402


def by_trb(table: list[Pair]) -> list[bool]:
    with Verifier(timeout_s=30.0) as verifier:
        return [
            bool(score)
            for score in verifier.score([pair.completion for pair in table], [{"answer": pair.gold} for pair in table])
        ]


def by_math_verify(table: list[Pair]) -> list[bool]:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return [bool(verify(parse(f"\\boxed{{{pair.gold}}}"), parse(pair.completion))) for pair in table]


def summary(table: list[Pair], verdicts: list[bool]) -> dict[str, Any]:
    right = sum(pair.right == verdict for pair, verdict in zip(table, verdicts, strict=True))
    return {"right": right, "share": right / len(table)}


def main() -> int:
    provenance, table, verdicts, seconds = describe(), pairs(), {}, {}
    provenance["versions"] |= {name: metadata.version(name) for name in PARSERS}
    for name, grade in (("trb", by_trb), ("math_verify", by_math_verify)):
        start = time.perf_counter()
        verdicts[name] = grade(table)
        seconds[name] = time.perf_counter() - start
    kinds: dict[str, dict[str, int]] = {}
    differing = []
    for pair, ours, theirs in zip(table, verdicts["trb"], verdicts["math_verify"], strict=True):
        row = kinds.setdefault(pair.kind, {"pairs": 0, "trb": 0, "math_verify": 0})
        row["pairs"] += 1
        row["trb"] += ours == pair.right
        row["math_verify"] += theirs == pair.right
        if ours != theirs:
            case = {"kind": pair.kind, "gold": pair.gold, "answer": pair.answer, "right": pair.right}
            differing.append(case | {"trb": ours, "math_verify": theirs})
            print(f"{pair.kind}: {pair.gold!r} and {pair.answer!r}: {pair.right}; trb {ours}, math-verify {theirs}")
    record: dict[str, Any] = {"provenance": provenance, "pairs": len(table)}
    record |= {name: summary(table, found) | {"seconds": seconds[name]} for name, found in verdicts.items()}
    for name in verdicts:
        print(f"{name}: {record[name]['right']} of {len(table)} right ({record[name]['share']:.1%})")
    write_json(ROOT / "benchmarks" / "results" / "grading.json", record | {"kinds": kinds, "differing": differing})
    return 0


if __name__ == "__main__":
    sys.exit(main())
