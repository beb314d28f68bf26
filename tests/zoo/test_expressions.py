"""The task of programs: what is described, what its tests expect, and what solves it, by an evaluator of its own."""

import functools
import json
import random
import re

import pytest

from trb import zoo
from trb.tasks.grading import Verifier
from trb.tasks.prompts import load_prompts
from trb.zoo import train as zoo_train
from trb.zoo.programs import INPUTS, PREFIX

PROGRAMS = zoo.TASKS["programs"]

MEANING = {
    "add": lambda y, d: y + d,
    "sub": lambda y, d: y - d,
    "cap": lambda y, d: y if y < d else d,
    "floor": lambda y, d: y if y > d else d,
    "from": lambda y, d: d - y,
    "size": lambda y, _: y if y > 0 else -y,
}


def described(problem: str, x: int) -> int:
    """What a problem makes of x, read here."""
    steps = re.findall(r"([a-z]+)(?: (\d))?", problem)
    return functools.reduce(lambda y, step: MEANING[step[0]](y, int(step[1] or 0)), steps, x)


def corrupted(problem: str, seed: int) -> str:
    return PROGRAMS.corrupted_solution(problem, random.Random(seed), wrong_step=0.1, drift=0.05)


def problem_of(row: dict) -> str:
    return row["prompt"][0]["content"]


@pytest.mark.parametrize("size", [2, 5, 8])
def test_problems_are_right_distinct_and_split(size: int) -> None:
    rows = PROGRAMS.problems(80, seed=1, split="test", size=size)
    texts = [problem_of(row) for row in rows]
    assert len(set(texts)) == 80
    assert all(re.fullmatch(rf"((add|sub|cap|floor|from) [1-9] ?|size ?){{{size}}}", text) for text in texts)
    assert not set(texts) & {problem_of(row) for row in PROGRAMS.problems(500, seed=1, size=size)}
    for row, text in zip(rows, texts, strict=True):
        wanted = {x: described(text, x) for x in INPUTS}
        assert len(set(wanted.values())) >= 3
        assert {x: eval(row["answer"], {"x": x}) for x in INPUTS} == wanted
        assert json.loads(row["metadata"]) == {
            "prefix": PREFIX,
            "tests": [f"assert f({x}) == {y}" for x, y in wanted.items()],
            "entry_points": ["f"],
        }


def test_a_program_is_written_from_the_outside() -> None:
    assert PROGRAMS.solution("add 3 cap 7 from 9 size") == "abs(9-(min(x+3,7)))"


def test_corruption_does_what_its_probabilities_say() -> None:
    rows = PROGRAMS.problems(300, seed=2, size=4)
    drifted = [
        PROGRAMS.corrupted_solution(problem_of(row), random.Random(i), wrong_step=0.0, drift=0.2)
        for i, row in enumerate(rows)
    ]
    others = [(row, text) for text, row in zip(drifted, rows, strict=True) if text != row["answer"]]
    assert abs(1 - len(others) / 300 - 0.8**4) < 4 * (0.41 * 0.59 / 300) ** 0.5
    assert not any(PROGRAMS.is_solved(row, text) for row, text in others)
    for i, row in enumerate(rows[:50]):
        wrong = PROGRAMS.corrupted_solution(problem_of(row), random.Random(i), wrong_step=1.0, drift=0.0)
        assert wrong != row["answer"] and isinstance(eval(wrong, {"x": 0}), int)


def test_the_verifier_runs_what_the_script_evaluates() -> None:
    rows = list(load_prompts("zoo:programs?operations=4", limit=40, seed=3))
    texts = [corrupted(problem_of(row), seed) for seed, row in enumerate(rows)]
    right = [float(PROGRAMS.is_solved(row, text)) for row, text in zip(rows, texts, strict=True)]
    assert 10 < sum(right) < 35
    with Verifier(timeout_s=20.0) as verifier:
        assert verifier.score(texts, rows) == right


ROW = PROGRAMS.row("add 3 cap 7")
ANSWERS = {
    "min(x+3,7)": True,
    "min(7,3+x)": True,
    "-max(-x-3,-7)": True,
    "min(x,4)+3": True,
    "min(x+3,8)": False,
    "min(x+3,7": False,
    "min(x+3,7) so": False,
    "abs(x,3)": False,
    "min(x+3)": False,
    "y": False,
    "": False,
}


def test_any_expression_with_the_right_values_will_do() -> None:
    solved = {text: PROGRAMS.is_solved(ROW, text) for text in ANSWERS}
    assert solved == {**ANSWERS, "-max(-x-3,-7)": False}  # no solution looks like that; the verifier takes it
    with Verifier(timeout_s=20.0) as verifier:
        assert verifier.score(list(ANSWERS), [ROW] * len(ANSWERS)) == [float(right) for right in ANSWERS.values()]


def test_solutions_fit_the_tokens_of_the_pair() -> None:
    pair = zoo_train.PAIRS["programs"]
    tokenizer = pair.tokenizer(pair.task, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert len(tokenizer) <= min(recipe.head_rows for recipe in pair.models)
    for row in PROGRAMS.problems(50, seed=3, size=6):
        for text in (problem_of(row), row["answer"], corrupted(problem_of(row), 0)):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
            assert len(ids) < 30
