"""Arithmetic on a dial of ten, in words: addition, subtraction and multiplication, read from left to right.

A problem is `three times four minus five`; its worked solution is
`three times four is two two minus five is seven \\boxed{seven}`. Only the last digit of a number is kept.
"""

import random

from trb.zoo.tasks import Step, Task

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPERATIONS = ("plus", "minus", "times")


class Clock(Task):
    """`operands` digits joined by plus, minus or times."""

    name = "clock"
    unit = "operands"
    smallest = 2
    default = 8

    def random_problem(self, rng: random.Random, size: int) -> str:
        tail = (f"{rng.choice(OPERATIONS)} {rng.choice(DIGITS)}" for _ in range(size - 1))
        return " ".join([rng.choice(DIGITS), *tail])

    def variety(self, size: int) -> int:
        return 10**size * 3 ** (size - 1)

    def start(self, problem: str) -> tuple[str, list[str]]:
        first, *words = problem.split(" ")
        return first, [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]

    def step(self, state: str, operation: str) -> Step:
        return _equation(state, operation, _apply(state, operation))

    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        return _equation(state, operation, (_apply(state, operation) + rng.randint(1, 9)) % 10)


def _apply(state: str, operation: str) -> int:
    sign, operand = operation.split(" ")
    a, b = DIGITS.index(state), DIGITS.index(operand)
    return {"plus": a + b, "minus": a - b, "times": a * b}[sign] % 10


def _equation(state: str, operation: str, result: int) -> Step:
    return Step(f"{state} {operation} is {DIGITS[result]}", DIGITS[result])
