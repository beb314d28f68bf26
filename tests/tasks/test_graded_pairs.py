"""The grader over the table of pairs: every verdict, what it gets wrong, and what docs/grading.md says of both."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from graded_pairs import Pair, pairs

from trb.tasks.grading import Verifier

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "grading.md"
RESULT = ROOT / "benchmarks" / "results" / "grading.json"


@pytest.fixture(scope="module")
def table() -> list[Pair]:
    return pairs()


@pytest.fixture(scope="module")
def scores(table: list[Pair]) -> list[float]:
    with Verifier(timeout_s=30.0) as verifier:
        found = verifier.score([pair.completion for pair in table], [{"answer": pair.gold} for pair in table])
        assert verifier.timeouts == verifier.crashes == 0
    return found


def test_the_table_is_large_and_half_of_it_wrong(table: list[Pair]) -> None:
    assert len(table) >= 300
    assert 0.4 < sum(pair.right for pair in table) / len(table) < 0.6
    assert [pair for pair, count in Counter(table).items() if count > 1] == []
    for kind in {pair.kind for pair in table}:
        assert {pair.right for pair in table if pair.kind == kind} == {True, False}, kind


def test_every_pair_has_its_verdict(table: list[Pair], scores: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    mistaken = {pair for pair, score in zip(table, scores, strict=True) if score != pair.right}
    share = 1 - len(mistaken) / len(table)
    with capsys.disabled():
        print(f"\n{len(table) - len(mistaken)} of {len(table)} pairs graded right: {share:.1%}")
    assert mistaken == {pair for pair in table if pair.known}
    assert share >= 0.98


def test_the_page_lists_what_is_graded_wrong(table: list[Pair]) -> None:
    listed = re.findall(r"^\| `` (.+?) `` \| `` (.+?) `` \| (right|wrong) \|", PAGE.read_text(encoding="utf-8"), re.M)
    known = [(pair.gold, pair.answer, "right" if pair.right else "wrong") for pair in table if pair.known]
    assert sorted(listed) == sorted(known)


def test_the_numbers_of_the_page_are_those_of_the_file(table: list[Pair]) -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert result["pairs"] == len(table), "run `python benchmarks/grading.py`"
    page = PAGE.read_text(encoding="utf-8")
    words = " ".join(page.split())
    assert f"{len(table)} rows by kind, {sum(not pair.right for pair in table)} of them" in words
    for name in ("trb", "math_verify"):
        row = result[name]
        assert f"about {row['right']} of {result['pairs']}" in words and f"({row['share']:.1%})" in words
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \| (\d+) \|", page, re.M)
    kinds = {kind: dict(zip(("trb", "math_verify", "pairs"), map(int, counts), strict=True)) for kind, *counts in rows}
    assert kinds == result["kinds"]
