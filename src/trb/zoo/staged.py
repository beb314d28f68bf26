"""Chains of lookups in which every stage has a table of its own: what one stage teaches does not help at the next.

A problem is a digit and an entry for each stage, such as `4 a3 b0`; its worked solution is `\\boxed{4a37b01}`: stage a
turns the state 4 into 7 where the entry is 3, stage b turns 7 into 1 where it is 0. For a given entry a table permutes
the digits, so right steps do not lead from a wrong state back to the right one; and the answer is the whole path, so
nothing at all that follows a wrong step makes the answer right.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import floor
from string import ascii_lowercase
from typing import Any

from trb.errors import InputError
from trb.zoo.tasks import Step, Task

ENTRIES = 4  # columns of a table: 0 to 3
GIVE_UP = "?"
"""What a teacher can say after a wrong step, before it stops."""

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
        entries = (f" {stage}{rng.randrange(ENTRIES)}" for stage in ascii_lowercase[:size])
        return rng.choice(_DIGITS) + "".join(entries)

    def variety(self, size: int) -> int:
        return 10 * ENTRIES**size

    def start(self, problem: str) -> tuple[str, list[str]]:
        state, *operations = problem.split(" ")
        return state, operations

    def step(self, state: str, operation: str) -> Step:
        return _written(state, operation, self._right(state, operation))

    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        return _written(state, operation, rng.choice(_DIGITS.replace(self._right(state, operation), "")))

    def corrupted_solution(self, problem: str, rng: random.Random, *, wrong_step: float, drift: float) -> str:
        """As in every task, but the steps stand in the box alone: they are the answer."""
        text = super().corrupted_solution(problem, rng, wrong_step=wrong_step, drift=drift)
        steps, box, path = text.partition("\\boxed{")
        return box + path or steps

    def table(self, stage: str) -> Sequence[str]:
        """For each entry, what the ten states become at a stage."""
        place = ascii_lowercase.index(stage)
        shares = floor((place + 1) * self.shared) > floor(place * self.shared)
        return _table("shared" if shares else stage)

    def _right(self, state: str, operation: str) -> str:
        return self.table(operation[0])[int(operation[1])][int(state[-1])]


@cache
def _table(name: str) -> tuple[str, ...]:
    rng = random.Random(f"staged:{name}")
    return tuple("".join(rng.sample(_DIGITS, len(_DIGITS))) for _ in range(ENTRIES))


def _written(state: str, operation: str, result: str) -> Step:
    return Step(operation + result, state + operation + result)
