"""Exact laws of whole completions, by enumerating every one of them."""

from collections.abc import Callable

import numpy as np

from .distributions import Array
from .policies import Law

Completion = tuple[int, ...]
Prefix = tuple[int, ...]


def enumerate_completions(
    student: Callable[[Prefix], Array],
    teacher: Callable[[Prefix], Array],
    law: Law,
    *,
    max_new_tokens: int,
    stop: int,
) -> dict[Completion, float]:
    """Probability of every completion that ends with `stop` or reaches `max_new_tokens`, stop token included.

    `student` and `teacher` map the tokens generated so far to probabilities on shared events. Prefixes grow together,
    a token at a time, and the law is asked about all of one length at once.
    """

    whole: dict[Completion, float] = {}
    growing: dict[Prefix, float] = {(): 1.0}
    for length in range(1, max_new_tokens + 1):
        laws = law(np.stack([*map(student, growing)]), np.stack([*map(teacher, growing)]))
        longer = {
            (*prefix, token): probability * float(p)
            for (prefix, probability), row in zip(growing.items(), laws, strict=True)
            for token, p in enumerate(row)
            if p > 0.0
        }
        growing = {prefix: p for prefix, p in longer.items() if prefix[-1] != stop and length < max_new_tokens}
        whole |= {completion: p for completion, p in longer.items() if completion not in growing}
    return whole
