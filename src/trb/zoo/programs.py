"""Programs of one expression: a function is described step by step, and its Python is to be written.

A problem is `add 3 cap 7 from 9`, what is done to x in turn; its solution is `9-(min(x+3,7))`. What is done last stands
first, so that the whole must be planned before anything is written. Whether an answer is right is found by running it
(`verifier: python`): any expression with the right values will do.
"""

import ast
import json
import random
from typing import Any

from trb.zoo.tasks import Step, Task, off_task_text

# What stands before and after the expression so far; # is the digit.
OPERATIONS = {
    "add": ("", "+#"),
    "sub": ("", "-#"),
    "cap": ("min(", ",#)"),
    "floor": ("max(", ",#)"),
    "from": ("#-(", ")"),
    "size": ("abs(", ")"),
}
INPUTS = range(-12, 13, 3)
PREFIX = "def f(x):\n    return "
_DIGITS = "123456789"
_VARIED = 3  # different values on INPUTS: less would let an answer be right that is hardly an answer


class Programs(Task):
    """`operations` on x, each with a digit but for size."""

    name = "programs"
    unit = "operations"
    smallest = 2
    default = 5

    def random_problem(self, rng: random.Random, size: int) -> str:
        while True:
            problem = " ".join(_operation(rng) for _ in range(size))
            if len({value(problem, x) for x in INPUTS}) >= _VARIED:
                return problem

    def variety(self, size: int) -> int:
        return 40**size  # of 46 ** size, those that vary

    def start(self, problem: str) -> tuple[str, list[str]]:
        return "x", _operations(problem)

    def step(self, state: str, operation: str) -> Step:
        word, _, digit = operation.partition(" ")
        before, after = (part.replace("#", digit) for part in OPERATIONS[word])
        return Step(before + state + after, before + state + after)

    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        while (other := _operation(rng)) == operation:
            pass
        return self.step(state, other)

    def corrupted_solution(self, problem: str, rng: random.Random, *, wrong_step: float, drift: float) -> str:
        """The expression alone, from wrong steps maybe; after a drift it is no expression."""
        state, operations = self.start(problem)
        for operation in operations:
            if rng.random() < drift:
                return f"{state} {off_task_text(rng, [state])}"
            wrong = rng.random() < wrong_step
            state = (self.wrong_step(state, operation, rng) if wrong else self.step(state, operation)).state
        return state

    def row(self, problem: str) -> dict[str, Any]:
        tests = [f"assert f({x}) == {value(problem, x)}" for x in INPUTS]
        scoring = {"prefix": PREFIX, "tests": tests, "entry_points": ["f"]}
        return {**super().row(problem), "verifier": "python", "metadata": json.dumps(scoring)}

    def is_solved(self, row: dict[str, Any], completion: str) -> bool:
        """Whether the completion is an expression of the kind that solutions are, with the right values."""
        try:
            expression = ast.parse(completion, mode="eval").body
            return all(_evaluate(expression, x) == value(row["prompt"][0]["content"], x) for x in INPUTS)
        except (SyntaxError, ValueError):
            return False


def value(problem: str, x: int) -> int:
    """What the described function makes of x."""
    for operation in _operations(problem):
        word, _, digit = operation.partition(" ")
        number = int(digit or 0)
        x = {
            "add": x + number,
            "sub": x - number,
            "cap": min(x, number),
            "floor": max(x, number),
            "from": number - x,
            "size": abs(x),
        }[word]
    return x


def _operation(rng: random.Random) -> str:
    word = rng.choice(list(OPERATIONS))
    return word if word == "size" else f"{word} {rng.choice(_DIGITS)}"


def _operations(problem: str) -> list[str]:
    found: list[str] = []
    for word in problem.split(" "):
        if word.isdigit():
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


_FUNCTIONS: dict[str, Any] = {"min": min, "max": max, "abs": abs}


def _evaluate(node: ast.expr, x: int) -> Any:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id="x"):
            return x
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left, x) + _evaluate(right, x)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _evaluate(left, x) - _evaluate(right, x)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS and len(
            arguments
        ) == 1 + (name != "abs"):
            return _FUNCTIONS[name](*(_evaluate(argument, x) for argument in arguments))
    raise ValueError("no expression of this task")
