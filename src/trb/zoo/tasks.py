"""What the zoo's tasks have in common: splits, sets of different problems, corrupted solutions, and their answers.

A task is a family of problems of growing size whose worked solution goes step by step, so that one early mistake spoils
everything after it. Nothing here knows about tokens or models, and nothing grades runs: `is_solved` is for the script
that trains the pairs.
"""

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trb.errors import InputError

SPLITS = ("train", "test")
DRIFT_WORDS = ("so", "the", "sum", "is", "then", "we", "go", "on", "maybe", "look", "again", "well")

_TEST_SHARE = 10  # one problem in ten belongs to the test split
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class Step:
    """One step of a solution as it is written, and the state it leads to."""

    text: str
    state: str


class Task(ABC):
    """A kind of problem: how to draw one, its steps, and how a step goes wrong."""

    name: str
    unit: str
    """What a problem's size counts, in the plural."""
    smallest: int
    largest: int | None = None
    default: int
    settings: tuple[str, ...] = ()
    """What else a data spec may set, beside the size."""
    given: re.Pattern[str] | None = None
    """Finds, with one group, what in a solution is no model's to write: the answers of tools."""

    def with_settings(self, **settings: Any) -> "Task":
        """The task with other values of its `settings`. Raises ValueError for one out of range."""
        return self

    @abstractmethod
    def random_problem(self, rng: random.Random, size: int) -> str:
        """A uniformly random problem of a size, as the text of the prompt."""

    @abstractmethod
    def variety(self, size: int) -> int:
        """How many different problems of a size there are."""

    @abstractmethod
    def start(self, problem: str) -> tuple[str, list[str]]:
        """The state a problem starts from, and its operations in order."""

    @abstractmethod
    def step(self, state: str, operation: str) -> Step:
        """One operation, done right."""

    @abstractmethod
    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        """The same operation with another result than the right one."""

    # ---- what follows from these ----

    def draw(self, rng: random.Random, size: int, split: str) -> str:
        """A random problem of the given split (redrawn until it falls into it)."""
        while split_of(problem := self.random_problem(rng, size)) != split:
            pass
        return problem

    def answer_to(self, problem: str) -> str:
        """The final state of a problem, as it should stand in the box."""
        state, operations = self.start(problem)
        for operation in operations:
            state = self.step(state, operation).state
        return state

    def solution(self, problem: str) -> str:
        """The worked solution: one piece of text per operation, then the boxed answer."""
        return self.corrupted_solution(problem, random.Random(0), wrong_step=0.0, drift=0.0)

    def corrupted_solution(self, problem: str, rng: random.Random, *, wrong_step: float, drift: float) -> str:
        """A worked solution in which every step may go wrong.

        With probability `drift` the step and all that follows is off-task text (no box is reached); otherwise
        with probability `wrong_step` its result is wrong, and the solution goes on from the wrong state.
        """
        state, operations = self.start(problem)
        written: list[str] = []
        for operation in operations:
            if rng.random() < drift:
                return " ".join([*written, off_task_text(rng, written)])
            wrong = rng.random() < wrong_step
            step = self.wrong_step(state, operation, rng) if wrong else self.step(state, operation)
            written.append(step.text)
            state = step.state
        return " ".join([*written, f"\\boxed{{{state}}}"])

    def lesson(
        self, problem: str, rng: random.Random, *, wrong_step: float, drift: float
    ) -> tuple[list[dict[str, str]], str]:
        """What a model is taught with a problem: a prompt, and the text to write."""
        text = self.corrupted_solution(problem, rng, wrong_step=wrong_step, drift=drift)
        return [{"role": "user", "content": problem}], text

    def problems(self, n: int, *, seed: int, split: str = "train", size: int | None = None) -> list[dict]:
        """`n` different problems as rows {"prompt": [{"role": "user", "content": problem}], "answer": str}.

        Where an answer is not compared but tried, a row also says its `verifier` and `metadata`; of a conversation it
        has all `messages`. The rows are a function of the arguments alone; rows of "train" and "test" never share a
        problem, whatever their seeds.

        Raises ValueError for an unknown split, for a size that the task does not have, and where `n` exceeds half of
        what the split is expected to hold.
        """
        size = self.default if size is None else size
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        if size < self.smallest:
            raise InputError(f"{self.name} needs at least {self.smallest} {self.unit}, got {self.unit}={size}")
        if self.largest is not None and size > self.largest:
            raise InputError(f"{self.name} has at most {self.largest} {self.unit}, got {self.unit}={size}")
        share = 1 if split == "test" else _TEST_SHARE - 1
        limit = self.variety(size) * share // (2 * _TEST_SHARE)
        if not 0 <= n <= limit:
            raise InputError(
                f"n={n} is outside 0..{limit}, the number of different {split} problems this draws from {self.name} "
                f"of {size} {self.unit}; ask for fewer, or for longer ones"
            )
        found: dict[str, None] = {}
        for problem in self._endless(split, size, seed):
            if len(found) >= n:
                break
            found[problem] = None
        return [self.row(problem) for problem in found]

    def row(self, problem: str) -> dict[str, Any]:
        """A problem as a row."""
        return {"prompt": [{"role": "user", "content": problem}], "answer": self.answer_to(problem)}

    def is_solved(self, row: dict[str, Any], completion: str) -> bool:
        """Whether a completion ends with the right answer."""
        return boxed_answer(completion) == row["answer"]

    def answer_to_call(self, turn: str) -> str | None:
        """What is to be read after a turn that asks for something; None after one that does not."""
        return None

    def _endless(self, split: str, size: int, seed: int) -> Iterator[str]:
        rng = random.Random(f"{split}:{size}:{seed}")
        while True:
            yield self.draw(rng, size, split)


def split_of(problem: str) -> str:
    """Split a problem belongs to: a hash of its text, so the splits are disjoint whatever the seed."""
    digest = hashlib.sha256(problem.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


def boxed_answer(completion: str) -> str | None:
    """Content of the last `\\boxed{}` in a completion, or None where there is none."""
    found = _BOXED.findall(completion)
    return found[-1] if found else None


def off_task_text(rng: random.Random, written: list[str]) -> str:
    """Drift: either the last step over and over, or words that have nothing to do with the problem."""
    if written and rng.random() < 0.5:
        return " ".join([written[-1]] * rng.randint(1, 4))
    return " ".join(rng.choice(DRIFT_WORDS) for _ in range(rng.randint(2, 8)))
