"""The hint that every refusal of an unknown name ends with."""

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """`"; did you mean 'x'?"` for the candidate most like `name`, or `""`; `cutoff` is difflib's, in [0, 1]."""
    close = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""
