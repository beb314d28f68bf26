"""The record of one sampling call: completions, what the sampler saw at every token, or why there is none.

Left out: what is computed from it later (`trb.sampling.scoring`), and files (`trb.training.recording`).

Shape suffixes: N prefixes, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch
from torch import Tensor

from trb.errors import OperationError
from trb.vocab import SharedVocabulary

__all__ = ["EngineOptions", "NonFiniteLogitsError", "Rollout", "RolloutStats", "without_law"]


class NonFiniteLogitsError(OperationError):
    """A model's logits at a prefix make no law: one is NaN or +infinity, or all are -infinity.

    Attributes:
        model: whose they are: "student", "teacher" or "student and teacher".
        row: of the call.
        position: of the completion's token that was to be drawn, from 0.
    """

    def __init__(self, model: str, row: int, position: int, place: str | None = None) -> None:
        self.model, self.row, self.position = model, row, position
        super().__init__(
            f"the {model}'s logits for token {position} of the completion of {place or f'row {row}'} are NaN or "
            "infinite, which makes no law to sample from. Check the weights; if they are finite, a larger dtype "
            "(bfloat16 or float32 for float16) or a temperature nearer to 1 may keep the logits so"
        )

    @classmethod
    def of(cls, verdict: float, row: int, position: int) -> "NonFiniteLogitsError":
        """From an entry of `without_law`."""
        return cls({1: "student", 2: "teacher"}.get(int(verdict), "student and teacher"), row, position)


def without_law(log_student_NV: Tensor, log_teacher_NV: Tensor | None, token: int) -> Tensor:
    """`[N]` float64: 0 where both models have a law, else 1 for the student, 2 for the teacher, 3 for both.

    What makes no law makes NaN of every log-probability, so that one token tells: any that stands for itself.
    """
    verdict_N = log_student_NV[:, token].isnan().double()
    return verdict_N if log_teacher_NV is None else verdict_N + 2 * log_teacher_NV[:, token].isnan()


class EngineOptions(TypedDict):
    """What `trb.sampling.sample` asks of an engine besides prompts and policy; checked, and defaults filled in."""

    vocabulary: SharedVocabulary
    max_new_tokens: int
    temperature: float
    seed: int
    prompt_keys: Sequence[int]
    rollout_index: Sequence[int]


@dataclass
class RolloutStats:
    """Per-token numbers, each a list per row, parallel to `Rollout.completions`.

    Attributes:
        teacher_weight: share of the teacher in the law the token came from (see `trb.policies.Target`).
        kl_student: KL(μ || student) at the token's prefix, nats.
        kl_teacher: KL(μ || teacher) there, nats; empty lists where no teacher took part.
        accepted: 1.0 where the student's draft was kept, 0.0 where it was replaced.
    """

    teacher_weight: list[list[float]] = field(default_factory=list)
    kl_student: list[list[float]] = field(default_factory=list)
    kl_teacher: list[list[float]] = field(default_factory=list)
    accepted: list[list[float]] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int) -> "RolloutStats":
        columns: dict[str, list[list[float]]] = {name: [[] for _ in range(rows)] for name in cls.__dataclass_fields__}
        return cls(**columns)

    def extend(self, other: "RolloutStats") -> None:
        for name in self.__dataclass_fields__:
            getattr(self, name).extend(getattr(other, name))


@dataclass
class Rollout:
    """Completions of a batch of prompts.

    Attributes:
        prompts: token ids as the student read them before it drew: of a row that was `begun`, with those.
        completions: token ids per row, the stop token included where one was drawn.
        stopped: whether the row ended with a stop token (rather than at `max_new_tokens`).
        stats: per-token numbers.
        teacher_calls: forward passes of the teacher (a batch counts once).
        student_calls: forward passes of the student.
        teacher_hidden: one `[tokens, hidden size]` tensor per row, what the teacher's output head read at each
            completion token; None unless asked for.
    """

    prompts: list[list[int]] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)
    teacher_calls: int = 0
    student_calls: int = 0
    teacher_hidden: list[Tensor] | None = None

    @classmethod
    def joined(cls, parts: Sequence[tuple[Sequence[int], "Rollout"]]) -> "Rollout":
        """One call's record of several: each part with the places of its rows, which together are all there are.

        Statistics that a part lacks are empty lists. Hidden states are kept where every part has them.
        """
        if len(parts) == 1:
            return parts[0][1]
        count = sum(len(places) for places, _ in parts)
        whole = cls([[] for _ in range(count)], [[] for _ in range(count)], [False] * count, RolloutStats.empty(count))
        hidden: dict[int, Tensor] = {}
        for places, part in parts:
            whole.teacher_calls += part.teacher_calls
            whole.student_calls += part.student_calls
            hidden.update(zip(places, part.teacher_hidden or [], strict=bool(part.teacher_hidden)))
            for here, place in enumerate(places):
                for name in ("prompts", "completions", "stopped"):
                    getattr(whole, name)[place] = getattr(part, name)[here]
                for name in whole.stats.__dataclass_fields__:
                    getattr(whole.stats, name)[place] = getattr(part.stats, name)[here]
        if count and len(hidden) == count:
            whole.teacher_hidden = [hidden[place] for place in range(count)]
        return whole

    def rows(self, start: int, stop: int) -> "Rollout":
        """Some of the rows; the passes are those of the whole call."""
        part = slice(start, stop)
        columns = {name: getattr(self.stats, name)[part] for name in self.stats.__dataclass_fields__}
        hidden = None if self.teacher_hidden is None else self.teacher_hidden[part]
        return replace(
            self,
            prompts=self.prompts[part],
            completions=self.completions[part],
            stopped=self.stopped[part],
            stats=RolloutStats(**columns),
            teacher_hidden=hidden,
        )

    def extend(self, other: "Rollout") -> None:
        """Append another call's rows and add its passes. The teacher's states stay if both calls kept them."""
        own, others = (part.teacher_hidden if part.completions else [] for part in (self, other))
        self.teacher_hidden = None if own is None or others is None else [*own, *others] or None
        for name in ("prompts", "completions", "stopped"):
            getattr(self, name).extend(getattr(other, name))
        self.stats.extend(other.stats)
        self.teacher_calls += other.teacher_calls
        self.student_calls += other.student_calls

    def cut(self, lengths: Sequence[int]) -> None:
        """Keep so many tokens of each completion."""
        for row, length in enumerate(lengths):
            self.stopped[row] &= length >= len(self.completions[row])
            del self.completions[row][length:]
            for name in self.stats.__dataclass_fields__:
                del getattr(self.stats, name)[row][length:]
            if self.teacher_hidden is not None:
                self.teacher_hidden[row] = self.teacher_hidden[row][:length]

    def continue_rows(self, rows: Sequence[int], other: "Rollout") -> None:
        """Append to some rows what another call drew after them, and add its passes. The teacher's states stay if both
        calls kept them."""
        for place, row in enumerate(rows):
            self.completions[row].extend(other.completions[place])
            self.stopped[row] = other.stopped[place]
            for name in self.stats.__dataclass_fields__:
                column = getattr(self.stats, name)[row]
                column.extend(getattr(other.stats, name)[place])
                if len(column) < len(self.completions[row]):  # the other call knows no such number
                    column.clear()
        if rows and self.teacher_hidden is not None:
            self._continue_hidden(self.teacher_hidden, rows, other.teacher_hidden)
        self.teacher_calls += other.teacher_calls
        self.student_calls += other.student_calls

    def _continue_hidden(self, own: list[Tensor], rows: Sequence[int], hidden: list[Tensor] | None) -> None:
        if hidden is None:
            self.teacher_hidden = None
            return
        for row, states in zip(rows, hidden, strict=True):
            own[row] = torch.cat([own[row], states])
