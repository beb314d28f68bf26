"""The zoo's task: chains of single-digit additions and subtractions, worked out one operation at a time.

A problem is an expression such as `3+5-2+7`; its worked solution is `3+5=8 8-2=6 6+7=13 \\boxed{13}`.
This module generates problems, clean solutions, and the corrupted solutions that make a poor student.
It knows nothing about tokens or models, and it does not grade: `boxed_answer` only reads an answer out.
"""

import hashlib
import random
import re

SPLITS = ("train", "test")
DRIFT_WORDS = ("so", "the", "sum", "is", "then", "we", "go", "on", "maybe", "look", "again", "well")

_TEST_SHARE = 10  # one expression in ten belongs to the test split
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def split_of(expression: str) -> str:
    """Split an expression belongs to: a hash of its text, so the splits are disjoint whatever the seed."""
    digest = hashlib.sha256(expression.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


def random_expression(rng: random.Random, operands: int) -> str:
    """A uniformly random chain of `operands` digits joined by + or -."""
    tail = (rng.choice("+-") + str(rng.randrange(10)) for _ in range(operands - 1))
    return str(rng.randrange(10)) + "".join(tail)


def draw_expression(rng: random.Random, operands: int, split: str) -> str:
    """A random chain of the given split (redrawn until it falls into it)."""
    while split_of(expression := random_expression(rng, operands)) != split:
        pass
    return expression


def operations(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """First operand, then every (sign, operand) that follows: `3+5-2` -> (3, [("+", 5), ("-", 2)])."""
    return int(expression[0]), [(expression[i], int(expression[i + 1])) for i in range(1, len(expression), 2)]


def apply(value: int, sign: str, operand: int) -> int:
    """One operation of a chain."""
    return value + operand if sign == "+" else value - operand


def answer_to(expression: str) -> str:
    """The final value of a chain, as it should stand in the box."""
    value, rest = operations(expression)
    for sign, operand in rest:
        value = apply(value, sign, operand)
    return str(value)


def solution(expression: str) -> str:
    """The worked solution: one equation per operation, then the boxed answer."""
    return corrupted_solution(expression, random.Random(0), wrong_step=0.0, drift=0.0)


def corrupted_solution(expression: str, rng: random.Random, *, wrong_step: float, drift: float) -> str:
    """A worked solution in which every step may go wrong.

    With probability `drift` the step and all that follows is off-task text (no box is reached); otherwise
    with probability `wrong_step` its result is off by 1 to 9, and the chain goes on from the wrong value.
    """
    value, rest = operations(expression)
    steps: list[str] = []
    for sign, operand in rest:
        if rng.random() < drift:
            return " ".join([*steps, _off_task_text(rng, steps)])
        result = apply(value, sign, operand)
        if rng.random() < wrong_step:
            result += rng.choice((-1, 1)) * rng.randint(1, 9)
        steps.append(f"{value}{sign}{operand}={result}")
        value = result
    return " ".join([*steps, f"\\boxed{{{value}}}"])


def _off_task_text(rng: random.Random, steps: list[str]) -> str:
    """Drift: either the last step over and over, or words that have nothing to do with the problem."""
    if steps and rng.random() < 0.5:
        return " ".join([steps[-1]] * rng.randint(1, 4))
    return " ".join(rng.choice(DRIFT_WORDS) for _ in range(rng.randint(2, 8)))


def boxed_answer(completion: str) -> str | None:
    """Content of the last `\\boxed{}` in a completion, or None where there is none."""
    found = _BOXED.findall(completion)
    return found[-1] if found else None


def problems(n: int, *, seed: int, split: str = "train", operands: int = 4) -> list[dict]:
    """`n` different problems as rows {"prompt": [{"role": "user", "content": expression}], "answer": str}.

    The rows are a function of the arguments alone; rows of "train" and "test" never share an expression,
    whatever their seeds. The shipped pair was trained on "train" chains of 2 to 8 operands. Raises ValueError
    for an unknown split, for fewer than 2 operands, and where `n` exceeds half of what the split is expected
    to hold.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if operands < 2:
        raise ValueError(f"a chain needs at least 2 operands, got operands={operands}")
    share = 1 if split == "test" else _TEST_SHARE - 1
    limit = 10**operands * 2 ** (operands - 1) * share // (2 * _TEST_SHARE)
    if not 0 <= n <= limit:
        raise ValueError(
            f"n={n} is outside 0..{limit}, the number of different {split} problems this draws from chains "
            f"of {operands} operands; ask for fewer, or for longer chains"
        )
    rng = random.Random(f"{split}:{operands}:{seed}")
    expressions: dict[str, None] = {}
    while len(expressions) < n:
        expressions[draw_expression(rng, operands, split)] = None
    return [
        {"prompt": [{"role": "user", "content": expression}], "answer": answer_to(expression)}
        for expression in expressions
    ]
