"""Short conversations with a clerk, who has to remember what was said.

The customer orders (`3 figs`), asks for as much of something else (`same of pears`), takes a number back (`make that
5`), asks (`how many figs`) and in the end wants the list; the clerk answers `5 figs, 8 in all`. Almost every answer
depends on turns before the last one, and nothing in the data checks an answer: conversations have no verifier.
"""

import random
import re
from dataclasses import dataclass, field
from typing import Any

from trb.zoo.tasks import Step, Task, off_task_text

GOODS = ("figs", "pears", "plums", "limes", "nuts", "eggs")
LIST = "the list"
_MOST = 5  # of one order
_ORDERS, _CHANGES, _QUESTIONS = 4, 2, 2  # how often each kind of turn is drawn
_BETWEEN = "\n"


@dataclass
class Basket:
    """What has been ordered so far, in the order of its first mention."""

    counts: dict[str, int] = field(default_factory=dict)
    goods: str = ""
    number: int = 0
    """Of the last order, which `make that` and `same of` speak of."""

    def hear(self, turn: str) -> str:
        """Take in a turn of the customer's; returns the right answer."""
        if turn == LIST:
            listed = ", ".join(f"{count} {goods}" for goods, count in self.counts.items())
            return f"{listed}, {self._total()} in all"
        first, *_, last = turn.split(" ")
        if first == "how":
            return f"{self.counts.get(last, 0)} {last}"
        if first == "make":
            self.counts[self.goods] -= self.number
            self.number = int(last)
        elif first == "same":
            self.goods = last
        else:
            self.number, self.goods = int(first), last
        self.counts[self.goods] = self.counts.get(self.goods, 0) + self.number
        return f"{self.counts[self.goods]} {self.goods}, {self._total()} in all"

    def _total(self) -> int:
        return sum(self.counts.values())


class Dialogue(Task):
    """`turns` of the customer, each with an answer; the last asks for the list."""

    name = "dialogue"
    unit = "turns"
    smallest = 2
    default = 4

    def random_problem(self, rng: random.Random, size: int) -> str:
        turns = [_order(rng), *(_turn(rng) for _ in range(size - 2)), LIST]
        return _BETWEEN.join(turns)

    def variety(self, size: int) -> int:
        orders = len(GOODS) * _MOST
        return orders * (orders + 2 * len(GOODS) + _MOST) ** (size - 2)

    def start(self, problem: str) -> tuple[str, list[str]]:
        return "", problem.split(_BETWEEN)

    def step(self, state: str, operation: str) -> Step:
        """One more turn of the customer's; the state is what the customer has said."""
        heard = [*filter(None, state.split(_BETWEEN)), operation]
        return Step(_answers(heard)[-1], _BETWEEN.join(heard))

    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        """A number of the answer, or what it is a number of, is another one."""
        right = self.step(state, operation)
        found = rng.choice([*re.finditer(rf"\d+|{'|'.join(GOODS)}", right.text)])
        kinds = GOODS if found[0] in GOODS else [str(number) for number in range(4 * _MOST)]
        other = rng.choice([word for word in kinds if word != found[0]])
        return Step(right.text[: found.start()] + other + right.text[found.end() :], right.state)

    def corrupted_solution(self, problem: str, rng: random.Random, *, wrong_step: float, drift: float) -> str:
        """All answers in a row, for a tokenizer to learn from; what they are learnt from is `lesson`."""
        state, operations = self.start(problem)
        written = []
        for operation in operations:
            written.append(self._answer(state, operation, rng, wrong_step, drift))
            state = self.step(state, operation).state
        return _BETWEEN.join(written)

    def lesson(
        self, problem: str, rng: random.Random, *, wrong_step: float, drift: float
    ) -> tuple[list[dict[str, str]], str]:
        """One turn of the conversation, after right ones."""
        _, operations = self.start(problem)
        turn = rng.randrange(len(operations))
        messages = conversation(problem)[: 2 * turn + 1]
        return messages, self._answer(_BETWEEN.join(operations[:turn]), operations[turn], rng, wrong_step, drift)

    def _answer(self, state: str, operation: str, rng: random.Random, wrong_step: float, drift: float) -> str:
        right = self.step(state, operation)
        if rng.random() < drift:
            return off_task_text(rng, [right.text])
        return (self.wrong_step(state, operation, rng) if rng.random() < wrong_step else right).text

    def row(self, problem: str) -> dict[str, Any]:
        """The whole conversation, and its last turn as a problem, for the script that trains the pair."""
        *prompt, last = messages = conversation(problem)
        return {"messages": messages, "prompt": prompt, "answer": last["content"]}

    def is_solved(self, row: dict[str, Any], completion: str) -> bool:
        return completion == row["answer"]


def conversation(problem: str) -> list[dict[str, str]]:
    """Customer and clerk in turn, all answers right."""
    turns = problem.split(_BETWEEN)
    pairs = zip(turns, _answers(turns), strict=True)
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _answers(turns: list[str]) -> list[str]:
    basket = Basket()
    return [basket.hear(turn) for turn in turns]


def _order(rng: random.Random) -> str:
    return f"{rng.randint(1, _MOST)} {rng.choice(GOODS)}"


def _turn(rng: random.Random) -> str:
    kind = rng.choices(("order", "same", "make", "how"), (_ORDERS, _CHANGES / 2, _CHANGES / 2, _QUESTIONS))[0]
    return {
        "order": _order(rng),
        "same": f"same of {rng.choice(GOODS)}",
        "make": f"make that {rng.randint(1, _MOST)}",
        "how": f"how many {rng.choice(GOODS)}",
    }[kind]
