"""Sums with a calculator: what is written and what is read, and the pair that has learnt it."""

import random
import re

from trb import zoo
from trb.tools.calculator import calculator
from trb.zoo import train as zoo_train

SUMS = zoo.TASKS["sums"]
CALL = re.compile(r"<tool_call>calculator\(expression=([^)]*)\)</tool_call>")


def turns(text: str) -> tuple[list[str], list[str]]:
    """What the model writes, and what it reads."""
    assert SUMS.given is not None
    pieces = SUMS.given.split(text)
    return pieces[::2], pieces[1::2]


def test_a_solution_calls_the_calculator_and_goes_on_from_its_answers() -> None:
    for row in SUMS.problems(50, seed=1, size=4):
        problem = row["prompt"][0]["content"]
        assert row["answer"] == str(eval(problem))
        written, read = turns(SUMS.solution(problem))
        assert written[-1] == f"\\boxed{{{row['answer']}}}" and len(read) == 3
        for turn, answer in zip(written, read, strict=False):
            assert SUMS.answer_to_call(turn) == answer
            (call,) = CALL.findall(turn)
            assert f"\n{calculator(call)}<" in answer
        assert SUMS.answer_to_call(written[-1]) is None
        assert SUMS.is_solved(row, "".join(written))


def test_what_goes_wrong_is_the_models_and_never_the_calculators() -> None:
    rng = random.Random(0)
    right = 0
    for row in SUMS.problems(300, seed=2):
        text = SUMS.corrupted_solution(row["prompt"][0]["content"], rng, wrong_step=0.2, drift=0.2)
        written, read = turns(text)
        for turn, answer in zip(written, read, strict=False):
            assert f"\n{calculator(CALL.findall(turn)[0])}<" in answer
        right += SUMS.is_solved(row, text)
    assert abs(right / 300 - 0.64**2) < 0.11  # neither of two steps goes wrong; four standard errors


def test_answers_are_read_and_not_learnt() -> None:
    lessons, tokenizer = zoo_train.PAIRS["caller"].models[1], zoo.load("caller-teacher")[1]
    ids, labels = zoo_train.supervised_batch(tokenizer, random.Random(0), lessons, SUMS, (3, 3))
    for row, learnt in zip(ids.tolist(), labels.tolist(), strict=True):
        own = tokenizer.decode([label for label in learnt if label != -100])
        whole = tokenizer.decode(row)
        assert "tool\n" in whole and "tool\n" not in own
        assert own.count("<tool_call>") == 2 and own.count("<|im_end|>") == 3


def test_the_pair_calls_and_the_student_does_not_always() -> None:
    rows = SUMS.problems(100, seed=5, split="test")
    found = {}
    for name in ("caller-student", "caller-teacher"):
        model, tokenizer = zoo.load(name)
        found[name] = zoo_train.measure(model, tokenizer, SUMS, rows, seed=0, max_new_tokens=32)["pass_at_1"]
    assert found["caller-teacher"] > 0.95 and 0.2 < found["caller-student"] < 0.6  # 100% and 40% of 300
