"""Lookups in stages, each in a table of its own: what one stage teaches does not help at the next.

A problem has an entry for each stage, such as `a3 b0`; its worked solution is `\\boxed{a39b02}`: the table of stage a
turns 3 into 9, that of stage b 0 into 2. The answer is all of it: nothing that follows a wrong step makes it right.
"""

import random
from dataclasses import dataclass, replace
from functools import cache
from math import floor
from string import ascii_lowercase
from typing import Any

from trb.errors import InputError
from trb.zoo.tasks import Step, Task

GIVE_UP = "?"
"""What a teacher can say after a wrong step, before it stops."""

ENTRIES = "0123"
_DIGITS = "0123456789"


@dataclass(frozen=True)
class Staged(Task):
    """`stages` lookups, each in the table of its stage or, in a share of them, in one table for all."""

    shared: float = 0.0
    """Share of the stages that use the common table, spread evenly: 0 for none, 1 for all."""

    name = "staged"
    unit = "stages"
    smallest = 2
    largest = len(ascii_lowercase)
    default = 8
    settings = ("shared",)

    def __post_init__(self) -> None:
        if isinstance(self.shared, bool) or not isinstance(self.shared, int | float) or not 0 <= self.shared <= 1:
            raise InputError(f"shared is {self.shared!r}; give the share of stages with a common table, from 0 to 1")

    def with_settings(self, **settings: Any) -> "Staged":
        return replace(self, **settings)

    def random_problem(self, rng: random.Random, size: int) -> str:
        return " ".join(stage + rng.choice(ENTRIES) for stage in ascii_lowercase[:size])

    def variety(self, size: int) -> int:
        return len(ENTRIES) ** size

    def start(self, problem: str) -> tuple[str, list[str]]:
        return "", problem.split(" ")

    def step(self, state: str, operation: str) -> Step:
        return _written(state, operation, self._right(operation))

    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        return _written(state, operation, rng.choice(_DIGITS.replace(self._right(operation), "")))

    def corrupted_solution(self, problem: str, rng: random.Random, *, wrong_step: float, drift: float) -> str:
        """As in every task, but the steps stand in the box alone: they are the answer."""
        text = super().corrupted_solution(problem, rng, wrong_step=wrong_step, drift=drift)
        steps, box, path = text.partition("\\boxed{")
        return box + path or steps

    def table(self, stage: str) -> str:
        """What each entry becomes at a stage: different digits."""
        place = ascii_lowercase.index(stage)
        shares = floor((place + 1) * self.shared) > floor(place * self.shared)
        return _table("shared" if shares else stage)

    def _right(self, operation: str) -> str:
        return self.table(operation[0])[int(operation[1])]


@cache
def _table(name: str) -> str:
    return "".join(random.Random(f"tables:{name}").sample(_DIGITS, len(ENTRIES)))


def _written(state: str, operation: str, result: str) -> Step:
    return Step(operation + result, state + operation + result)
