"""Exact laws of whole completions, by enumerating every one of them."""

from collections.abc import Callable, Iterator

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

    `student` and `teacher` map the tokens generated so far to probabilities on shared events.
    """

    def grow(prefix: Prefix, probability: float) -> Iterator[tuple[Completion, float]]:
        if len(prefix) == max_new_tokens or (prefix and prefix[-1] == stop):
            yield prefix, probability
            return
        step = law(student(prefix), teacher(prefix))
        for token, p in enumerate(step):
            if p > 0.0:
                yield from grow((*prefix, token), probability * float(p))

    return dict(grow((), 1.0))
