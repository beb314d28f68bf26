"""The compiled kernels on one small row: `python trial.py LIBRARY` ends with 0 if their answers are right.

A library that a broken compiler, disk or processor spoiled may kill whoever loads it. `trb.kernels.building` runs this
file, which therefore imports nothing but the standard library, in a process of its own first.
"""

import ctypes
import math
import sys
from typing import Any

STUDENT = (2.0, 0.5, -1.0, 0.0, 1.0, -3.0)
TEACHER = (0.0, 2.5, 1.0, -1.0, 1.0, -2.0)
BUDGET = 0.02
TOLERANCE = 1e-5  # float32 log-probabilities of half a dozen tokens


def main(path: str) -> str:
    """What is wrong with the library's answers; nothing if they are right."""
    library = ctypes.CDLL(path)
    return wrong_blend(library.solve_rows) or wrong_loss(library.reverse_kl_rows)


def wrong_blend(solve_rows: Any) -> str:
    student, teacher = log_normalise(STUDENT), log_normalise(TEACHER)
    for budget, expected in ((0.0, student), (math.inf, teacher), (BUDGET, None)):
        found = solve(solve_rows, budget)
        gaps = [] if expected is None else [abs(a - b) for a, b in zip(found, expected, strict=True)]
        gaps.append(abs(sum(map(math.exp, found)) - 1))
        if budget == BUDGET:
            gaps.append(abs(divergence(found, student) / BUDGET - 1) - 1e-3)  # the budget is kept, and used
            gaps.append(divergence(found, teacher) - divergence(student, teacher))  # on the teacher's side
        if not all(gap < TOLERANCE for gap in gaps):
            return f"wrong answers at a budget of {budget}: {found}"
    return ""


def solve(solve_rows: Any, budget: float) -> list[float]:
    """The library's log-probabilities; its arguments are those of `blend.c`."""
    size = len(STUDENT)
    row, integer = ctypes.c_float * size, ctypes.c_int64
    numbers, passes, out = [ctypes.c_double() for _ in range(4)], integer(), row()
    results = [*map(ctypes.byref, numbers), ctypes.byref(passes)]
    bounds = [integer(value) for value in (size, size, size, 0, 1)]
    scratch = (ctypes.c_float * (2 * size))()
    solve_rows(row(*STUDENT), row(*TEACHER), 0, *bounds, ctypes.byref(ctypes.c_double(budget)), *results, out, scratch)
    return list(out)


def wrong_loss(reverse_kl_rows: Any) -> str:
    student, teacher = log_normalise(STUDENT), log_normalise(TEACHER)
    loss = divergence(student, teacher)
    expected = [math.exp(a) * (a - b - loss) for a, b in zip(student, teacher, strict=True)]
    size = len(STUDENT)
    row, integer = ctypes.c_float * size, ctypes.c_int64
    numbers, gradient, scratch = (ctypes.c_float * 7)(), row(), (ctypes.c_float * (2 * size))()
    # strides, rows of the head, V, start, end, support
    bounds = [integer(value) for value in (size, size, size, size, size, 0, 1, 0)]
    stop = ctypes.byref(integer(0))
    others = (ctypes.c_double(1.0), stop, integer(1), ctypes.byref(integer(0)), None, numbers, gradient, scratch)
    reverse_kl_rows(row(*STUDENT), row(*TEACHER), 0, 0, *bounds, *others)
    gaps = [abs(a - b) for a, b in zip((numbers[0], *gradient), (loss, *expected), strict=True)]
    return "" if all(gap < TOLERANCE for gap in gaps) else f"wrong losses: {numbers[0]}, {list(gradient)}"


def log_normalise(logits: tuple[float, ...]) -> list[float]:
    total = math.log(sum(map(math.exp, logits)))
    return [value - total for value in logits]


def divergence(law: list[float], other: list[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(law, other, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) or 0)
