"""Chains of single-digit additions and subtractions, worked out one operation at a time.

A problem is an expression such as `3+5-2+7`; its worked solution is `3+5=8 8-2=6 6+7=13 \\boxed{13}`.
"""

import hashlib
import random
from dataclasses import dataclass, replace
from typing import Any

from trb.errors import InputError
from trb.zoo.tasks import Step, Task


@dataclass(frozen=True)
class Chains(Task):
    """`operands` digits joined by + or -.

    Attributes:
        told: share of problems whose prompt has an empty line and the worked solution after it, which is then to be
            written down. Where it is not 0, rows have a column `kind`: told or alone.
    """

    told: float = 0.0

    name = "chains"
    unit = "operands"
    smallest = 2
    default = 4
    settings = ("told",)

    def __post_init__(self) -> None:
        if isinstance(self.told, bool) or not isinstance(self.told, int | float) or not 0 <= self.told <= 1:
            raise InputError(f"told is {self.told!r}; give the share of problems with their solution, from 0 to 1")

    def with_settings(self, **settings: Any) -> "Chains":
        return replace(self, **settings)

    def row(self, problem: str) -> dict[str, Any]:
        found = super().row(problem)
        if not self.told:
            return found
        digest = hashlib.sha256(b"told " + problem.encode()).digest()
        told = int.from_bytes(digest[:8], "big") < self.told * 2**64
        text = f"{problem}\n\n{self.solution(problem)}" if told else problem
        return {**found, "prompt": [{"role": "user", "content": text}], "kind": "told" if told else "alone"}

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
