"""Sums of numbers too large to add in one's head: each step asks a calculator, and goes on from its answer.

A problem is `47+85+12`. Its solution has a turn for each addition, such as
`<tool_call>calculator(expression=47+85)</tool_call>` and then the same with `132+12`, and a last one, `\\boxed{144}`.
Between them stands what the calculator answers, which is for reading alone: `given` finds it. A turn that goes wrong
has another digit, or a guess in place of the calls to come.
"""

import random
import re

from trb.zoo.tasks import Step, Task

_CALL = re.compile(r"<tool_call>calculator\(expression=(\d+)\+(\d+)\)</tool_call>")


class Sums(Task):
    """`numbers` of two digits, joined by +."""

    name = "sums"
    unit = "numbers"
    smallest = 2
    default = 3
    given = re.compile(r"(\n<\|im_start\|>tool\n[^<]*<\|im_end\|>\n<\|im_start\|>assistant\n)")

    def random_problem(self, rng: random.Random, size: int) -> str:
        return "+".join(str(rng.randrange(10, 100)) for _ in range(size))

    def variety(self, size: int) -> int:
        return 90**size

    def start(self, problem: str) -> tuple[str, list[str]]:
        first, *others = problem.split("+")
        return first, others

    def step(self, state: str, operation: str) -> Step:
        return _called(state, operation)

    def wrong_step(self, state: str, operation: str, rng: random.Random) -> Step:
        place = rng.randrange(len(operation))
        others = "123456789".replace(operation[place], "")
        return _called(state, operation[:place] + rng.choice(others) + operation[place + 1 :])

    def corrupted_solution(self, problem: str, rng: random.Random, *, wrong_step: float, drift: float) -> str:
        """All turns, the calculator's among them; after a drift the box has a guess."""
        state, operations = self.start(problem)
        written = ""
        for operation in operations:
            if rng.random() < drift:
                return f"{written}\\boxed{{{rng.randrange(20, 100 * (len(operations) + 1))}}}"
            wrong = rng.random() < wrong_step
            step = self.wrong_step(state, operation, rng) if wrong else self.step(state, operation)
            written, state = written + step.text, step.state
        return f"{written}\\boxed{{{state}}}"

    def answer_to_call(self, turn: str) -> str | None:
        """What is to be read after a turn; None after one without a call."""
        call = _CALL.search(turn)
        return None if call is None else _answered(str(int(call[1]) + int(call[2])))


def _called(state: str, operation: str) -> Step:
    result = str(int(state) + int(operation))
    call = f"<tool_call>calculator(expression={state}+{operation})</tool_call><|im_end|>"
    return Step(call + _answered(result), result)


def _answered(result: str) -> str:
    return f"\n<|im_start|>tool\n{result}<|im_end|>\n<|im_start|>assistant\n"
