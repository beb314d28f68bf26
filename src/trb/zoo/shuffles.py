"""Four letters moved about: a state is tracked through swaps, rotations and reversals, and no arithmetic helps.

A problem is a starting order and the moves, such as `dbca: s14 rot rev`; its worked solution is
`s14 abcd rot bcda rev adcb \\boxed{adcb}`. `s14` swaps the first and the fourth letter, `rot` moves the first to
the end, `rev` turns the order around.
"""

import itertools
import math
import random

from trb.zoo.tasks import Step, Task

LETTERS = "abcd"
SWAPS = tuple(f"s{i}{j}" for i, j in itertools.combinations(range(1, len(LETTERS) + 1), 2))
MOVES = (*SWAPS, "rot", "rev")


class Shuffles(Task):
    """`moves` moves from a random order of the letters."""

    name = "shuffles"
    unit = "moves"
    smallest = 1
    default = 12

    def random_problem(self, rng: random.Random, size: int) -> str:
        order = "".join(rng.sample(LETTERS, len(LETTERS)))
        return f"{order}: {' '.join(rng.choice(MOVES) for _ in range(size))}"

    def variety(self, size: int) -> int:
        return math.factorial(len(LETTERS)) * len(MOVES) ** size

    def start(self, problem: str) -> tuple[str, list[str]]:
        order, _, moves = problem.partition(": ")
        return order, moves.split(" ")

    def step(self, state: str, operation: str) -> Step:
        result = move(state, operation)
        return Step(f"{operation} {result}", result)

    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        # One swap too many: it always changes the result.
        result = move(move(state, operation), rng.choice(SWAPS))
        return Step(f"{operation} {result}", result)


def move(state: str, operation: str) -> str:
    """The order of the letters after one move."""
    if operation == "rot":
        return state[1:] + state[0]
    if operation == "rev":
        return state[::-1]
    letters, i, j = list(state), int(operation[1]) - 1, int(operation[2]) - 1
    letters[i], letters[j] = letters[j], letters[i]
    return "".join(letters)
