"""The teachers of a training run: rows of a batch teacher by teacher, and weights where they are read.

Rows that are drawn and scored by groups are what they are together, as their random numbers are their own
(`trb.sampling.uniforms`).

Left out: whose each row is (`trb.training.routes`), what a pair of models must have in common (`trb.vocab`), loading
(`trb.training.pair`), and how weights move (`trb.models.residence`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trb.losses.terms import TokenMetrics
from trb.models.modeling import OutputHead, without_adapters
from trb.models.residence import present
from trb.sampling import Rollout
from trb.training.routes import Named, named_in_errors, places_of
from trb.vocab import SharedVocabulary, head_rows, stop_token_ids

__all__ = ["Teacher", "drawn_by_teacher", "joined_metrics", "shared_vocabulary"]


def drawn_by_teacher(draw: Callable[..., Rollout], whose: Sequence[int], **columns: Sequence[Any] | None) -> Rollout:
    """One record of rows that are drawn teacher by teacher.

    Args:
        draw: of a teacher's place and of its rows' `columns`.
        whose: the place of each row's teacher.
        columns: what there is of each row; None stays None.
    """
    parts = []
    for place, rows in places_of(whose).items():
        own = {name: column and [column[row] for row in rows] for name, column in columns.items()}
        parts.append((rows, draw(place, **own)))
    return Rollout.joined(parts)


@dataclass(frozen=True)
class Teacher:
    """A teacher in a training run.

    Attributes:
        name: None for the only one.
        model: as Accelerate prepared it.
        head: its output head.
        tokenizer: None where it is not known.
        device: where it is brought while it is read; None where it is there already, and stays.
    """

    name: str | None
    model: nn.Module
    head: OutputHead
    tokenizer: PreTrainedTokenizerBase | None = None
    device: torch.device | None = None

    def present(self, part: nn.Module | None = None) -> AbstractContextManager[None]:
        """Within the block the teacher, or a part of it, is where it is read."""
        return nullcontext() if self.device is None else present(self.model if part is None else part, self.device)


def shared_vocabulary(
    student: nn.Module, tokenizer: PreTrainedTokenizerBase, teachers: Named, tokenizers: Named
) -> SharedVocabulary:
    """The events that a student and all of its teachers share; every pair is checked as the only one would be.

    Raises:
        ValueError: as `SharedVocabulary.of_pair`; of several teachers it says which.
    """
    bare: Any = without_adapters(student)
    models = {name: without_adapters(model) for name, model in teachers.items()}
    pairs = []
    for name, model in models.items():
        with named_in_errors(name):
            pairs.append(SharedVocabulary.of_pair(bare, model, tokenizer, tokenizers.get(name)))
    if len(pairs) == 1:
        return pairs[0]
    sizes = [head_rows(model) for model in (bare, *models.values())]
    theirs = chain.from_iterable(stop_token_ids(model, tokenizers.get(name)) for name, model in models.items())
    return SharedVocabulary.of(sizes, stop_token_ids(bare, tokenizer), list(dict.fromkeys(theirs)))


def joined_metrics(count: int, parts: Sequence[tuple[Any, TokenMetrics]]) -> TokenMetrics:
    """What was seen of `count` tokens, from parts of them, each with the places of its tokens."""
    if len(parts) == 1:
        return parts[0][1]
    columns = []
    for item in fields(TokenMetrics):
        values = [getattr(seen, item.name) for _, seen in parts]
        whole_N = values[0].new_zeros(count)
        for (places, _), value in zip(parts, values, strict=True):
            whole_N[places] = value
        columns.append(whole_N)
    return TokenMetrics(*columns)
