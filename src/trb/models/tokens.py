"""Prompts as token ids, and whether they leave a model room for what is to follow.

Left out: chat templates (`trb.tasks.prompts` and the trainer render them), and cutting prompts to fit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from trb.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_not_empty", "check_room", "token_ids"]


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a prompt as text. One that begins with the BOS token, as a rendered chat does, gets no second."""
    ids: list[int] = list(tokenizer(text)["input_ids"])
    bos = tokenizer.bos_token
    if not bos or not text.startswith(str(bos)):
        return ids
    own: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    added = ids[:1] == [tokenizer.bos_token_id] and ids[1 : 1 + len(own)] == own
    return ids[1:] if added else ids


def check_not_empty(lengths: Sequence[int], place: Callable[[int], str]) -> None:
    """Refuse prompts that a tokenizer makes nothing of, as of spaces alone: no model has a law after no token.

    Args:
        lengths: tokens of every prompt, in the order of the rows.
        place: what a row is called, by its number from 0.

    Raises:
        ValueError: names the first such row, and counts them.
    """
    empty = [row for row, length in enumerate(lengths) if not length]
    if empty:
        raise InputError(
            f"{place(empty[0])} has no tokens: the tokenizer makes nothing of its prompt ({len(empty)} of "
            f"{len(lengths)} rows); a prompt needs at least one, so drop such rows or write something into them"
        )


def check_room(
    lengths: Sequence[int], name: str, max_new_tokens: int, limits: Mapping[str, int | None], *, knob: str
) -> None:
    """Refuse prompts that leave no room for their completions, before the first is sampled.

    Args:
        lengths: tokens of every prompt, in the order of the rows.
        name: what the rows are called.
        max_new_tokens: the longest completion.
        limits: tokens that a sequence may have at most, by what limits it; None for no limit.
        knob: the option that sets `max_new_tokens`.

    Raises:
        ValueError: names the first such row (from 0, as it is indexed), and counts them.
    """
    owner, limit = min(
        ((owner, limit) for owner, limit in limits.items() if limit is not None),
        key=lambda pair: pair[1],
        default=("", None),
    )
    if limit is None:
        return
    overlong = [row for row, length in enumerate(lengths) if length + max_new_tokens > limit]
    if overlong:
        raise InputError(
            f"{name}[{overlong[0]}] has {lengths[overlong[0]]} tokens, and with {knob}={max_new_tokens} more exceeds "
            f"the {limit} positions of {owner} ({len(overlong)} of {len(lengths)} rows do); shorten or drop such rows, "
            f"or lower {knob}"
        )
