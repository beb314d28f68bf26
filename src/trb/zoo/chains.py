"""Chains of single-digit additions and subtractions, worked out one operation at a time.

A problem is an expression such as `3+5-2+7`; its worked solution is `3+5=8 8-2=6 6+7=13 \\boxed{13}`.
"""

import random

from trb.zoo.tasks import Step, Task


class Chains(Task):
    """`operands` digits joined by + or -."""

    name = "chains"
    unit = "operands"
    smallest = 2
    default = 4

    def random_problem(self, rng: random.Random, size: int) -> str:
        tail = (rng.choice("+-") + str(rng.randrange(10)) for _ in range(size - 1))
        return str(rng.randrange(10)) + "".join(tail)

    def variety(self, size: int) -> int:
        return 10**size * 2 ** (size - 1)

    def start(self, problem: str) -> tuple[str, list[str]]:
        return problem[0], [problem[i : i + 2] for i in range(1, len(problem), 2)]

    def step(self, state: str, operation: str) -> Step:
        return _equation(state, operation, _apply(state, operation))

    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        return _equation(state, operation, _apply(state, operation) + rng.choice((-1, 1)) * rng.randint(1, 9))


def _apply(state: str, operation: str) -> int:
    value, operand = int(state), int(operation[1])
    return value + operand if operation[0] == "+" else value - operand


def _equation(state: str, operation: str, result: int) -> Step:
    return Step(f"{state}{operation}={result}", str(result))
