"""Numbers for completions that exist already: both models and the behavior law at every token, teacher-forced.

The samplers keep only what they need of each position. Here one pass per model over prompt and completion gives the
log-probabilities, entropies and divergences at every token, under any behavior policy, whoever wrote the completion.
It feeds recorded rollouts and the diagnostics; nothing is drawn, and no gradient is taken (that is `losses`).

Shape suffixes: B rows, L padded length, N completion tokens of a group of rows, C tokens of one chunk, H hidden size,
V shared vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trb.errors import InputError
from trb.losses.chunked import default_chunk_tokens
from trb.models.modeling import OutputHead, completion_hidden_states, evaluation_mode, without_adapters
from trb.models.rows import padded
from trb.policies import BehaviorPolicy, Target, TeacherPolicy
from trb.vocab import SharedVocabulary, checked_temperature, head_rows

__all__ = ["TokenScores", "score_completions"]

Alternatives = dict[str, list[tuple[int, float]]]
"""The likeliest tokens at one prefix as (id, probability), under "student", "teacher" and "behavior"."""

_COLUMNS = (
    "student_log_prob",
    "teacher_log_prob",
    "behavior_log_prob",
    "student_entropy",
    "teacher_entropy",
    "kl_student",
    "kl_teacher",
    "teacher_weight",
)


@dataclass
class TokenScores:
    """Per-token numbers, each a list per row, parallel to the completions; nats.

    Attributes:
        student_log_prob: log πS of the token, at the sampling temperature, on the shared events.
        teacher_log_prob: log πT of it.
        behavior_log_prob: log μ of it; -inf for a token the policy cannot draw.
        student_entropy: entropy of πS at the token's prefix.
        teacher_entropy: entropy of πT there.
        kl_student: KL(μ || student) there.
        kl_teacher: KL(μ || teacher) there.
        teacher_weight: share of the teacher in μ there (see `trb.policies.Target`).
        alternatives: the likeliest tokens under each law, likeliest first; None unless asked for.
    """

    student_log_prob: list[list[float]] = field(default_factory=list)
    teacher_log_prob: list[list[float]] = field(default_factory=list)
    behavior_log_prob: list[list[float]] = field(default_factory=list)
    student_entropy: list[list[float]] = field(default_factory=list)
    teacher_entropy: list[list[float]] = field(default_factory=list)
    kl_student: list[list[float]] = field(default_factory=list)
    kl_teacher: list[list[float]] = field(default_factory=list)
    teacher_weight: list[list[float]] = field(default_factory=list)
    alternatives: list[list[Alternatives]] | None = None


def score_completions(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    policy: BehaviorPolicy,
    vocabulary: SharedVocabulary,
    teacher_prompts: Sequence[Sequence[int]] | None = None,
    teacher_tokens: Sequence[int] | None = None,
    temperature: float = 1.0,
    top: int = 0,
    max_rows: int | None = None,
) -> TokenScores:
    """What both models and the law of `policy` say at every token of completions, whoever wrote them.

    For a rollout drawn from `policy`, `kl_student`, `kl_teacher` and `teacher_weight` repeat the sampler's own (up to
    the rounding of a block pass). Models are read in eval mode and left as they were; autocast is the caller's. With
    sharded weights, every process must call it with equally many rows and the same `max_rows`.

    Args:
        student: a causal LM, or a PEFT wrapper around one; the laws are computed on its device.
        teacher: the same.
        prompts: token ids of each row, not empty.
        completions: token ids of each row, the stop token included where there is one; a row may be empty. Any stop
            id of `vocabulary` counts as the stop event.
        policy: the behavior law μ, one of `trb.policies`.
        vocabulary: the events that both models share.
        teacher_prompts: token ids of each row that the teacher reads in place of the student's prompt; None for the
            same.
        teacher_tokens: so many first tokens of each completion are the teacher's own, so that μ is the teacher's law
            at them and that of `policy` after them; None for none.
        temperature: divides both models' logits, as in sampling.
        top: how many of the likeliest tokens of each law to return per position; 0 for none. Tokens of probability
            zero are left out.
        max_rows: rows read at once, to bound memory; by default all.

    Raises:
        ValueError: prompts and completions that do not pair up, an empty prompt, an id outside the shared events,
            a head smaller than `vocabulary`, or a number out of range.
    """
    rows = _pairs("prompts", prompts, completions)
    taught = rows if teacher_prompts is None else _pairs("teacher_prompts", teacher_prompts, completions)
    _check(student, teacher, vocabulary, temperature, top, max_rows)
    for name, own in (("", rows), ("teacher ", taught)):
        _check_rows(own, vocabulary, name)
    begun = _first_tokens(teacher_tokens, rows)
    scores = TokenScores(alternatives=[] if top else None)
    scorer = _Scorer(student, teacher, policy, vocabulary, temperature, top)
    step = max_rows or max(1, len(rows))
    with torch.no_grad(), evaluation_mode(student, teacher):
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            scorer.score(rows[part], taught[part], begun[part], scores)
    return scores


Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class _Scorer:
    student: PreTrainedModel
    teacher: PreTrainedModel
    policy: BehaviorPolicy
    vocabulary: SharedVocabulary
    temperature: float
    top: int

    def score(self, rows: list[Row], taught: list[Row], begun: list[int], scores: TokenScores) -> None:
        """Append the numbers of a group of rows, as the student and the teacher read them, to `scores`; the first
        `begun` tokens of each are the teacher's."""
        token_N = torch.tensor([self.vocabulary.event_of(token) for _, completion in rows for token in completion])
        lengths = [len(completion) for _, completion in rows]
        theirs = [place < first for length, first in zip(lengths, begun, strict=True) for place in range(length)]
        columns: list[list[float]] = [[] for _ in _COLUMNS]
        alternatives: list[Alternatives] = []
        if len(token_N):
            for numbers_KC, found in self._chunks(rows, taught, token_N.to(self.student.device), theirs):
                for column, values in zip(columns, numbers_KC.tolist(), strict=True):
                    column.extend(values)
                alternatives.extend(found)
        for name, column in zip(_COLUMNS, columns, strict=True):
            getattr(scores, name).extend(_ragged(column, lengths))
        if scores.alternatives is not None:
            scores.alternatives.extend(_ragged(alternatives, lengths))

    def _chunks(
        self, rows: list[Row], taught: list[Row], token_N: Tensor, theirs: list[bool]
    ) -> Iterator[tuple[Tensor, list[Alternatives]]]:
        """`[columns, C]` numbers and the alternatives of one chunk of tokens after the other."""
        heads = OutputHead.checked(self.student), OutputHead.checked(self.teacher)
        student_NH, teacher_NH = _hidden(self.student, rows), _hidden(self.teacher, taught)
        size = default_chunk_tokens(self.vocabulary.size, token_N.device.type)
        for part, by_teacher in _stretches(theirs, size):
            log_student_CV, log_teacher_CV = (
                self.vocabulary.log_probs(head(hidden_NH[part]).to(token_N.device), self.temperature)
                for head, hidden_NH in zip(heads, (student_NH, teacher_NH), strict=True)
            )
            policy = TeacherPolicy() if by_teacher else self.policy
            target = policy.target(log_student_CV, log_teacher_CV)
            numbers_KC = _numbers(log_student_CV, log_teacher_CV, target, token_N[part])
            yield numbers_KC, self._alternatives(log_student_CV, log_teacher_CV, target) if self.top else []

    def _alternatives(self, log_student_CV: Tensor, log_teacher_CV: Tensor, target: Target) -> list[Alternatives]:
        laws = {
            "student": _likeliest(log_student_CV, self.top),
            "teacher": _likeliest(log_teacher_CV, self.top),
            "behavior": _likeliest(target.log_probs, self.top),
        }
        return [{name: found[place] for name, found in laws.items()} for place in range(len(log_student_CV))]


def _stretches(kinds: list[bool], longest: int) -> Iterator[tuple[slice, bool]]:
    """Neighbours of one kind, at most so many at once, and their kind."""
    start = 0
    for kind, same in groupby(kinds):
        stop = start + len(list(same))
        for first in range(start, stop, longest):
            yield slice(first, min(first + longest, stop)), kind
        start = stop


def _hidden(model: PreTrainedModel, rows: list[Row]) -> Tensor:
    """`[N, H]` hidden states that predict the completion tokens of padded rows."""
    prompts, completions = zip(*rows, strict=True)
    return completion_hidden_states(model, *padded(prompts, completions, model.device))


def _numbers(log_student_CV: Tensor, log_teacher_CV: Tensor, target: Target, token_C: Tensor) -> Tensor:
    """`[columns, C]` float64, in the order of `_COLUMNS`."""
    assert target.kl_teacher is not None  # every policy gives it where the teacher is given
    values = (
        log_student_CV.gather(-1, token_C[:, None]).squeeze(-1),
        log_teacher_CV.gather(-1, token_C[:, None]).squeeze(-1),
        target.law.at(token_C),
        torch.special.entr(log_student_CV.exp()).sum(-1),
        torch.special.entr(log_teacher_CV.exp()).sum(-1),
        target.kl_student,
        target.kl_teacher,
        target.teacher_weight,
    )
    return torch.stack([value.double() for value in values])


def _likeliest(log_probs_CV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    best = log_probs_CV.topk(min(count, log_probs_CV.shape[-1]), dim=-1)
    return [
        [(token, probability) for token, probability in zip(ids, values, strict=True) if probability > 0]
        for ids, values in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]


def _ragged(values: list, lengths: list[int]) -> list[list]:
    """Cut a flat list into rows."""
    entries = iter(values)
    return [[next(entries) for _ in range(length)] for length in lengths]


def _pairs(name: str, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Row]:
    if len(prompts) != len(completions):
        raise InputError(f"{len(completions)} completions for {len(prompts)} {name}; pass one prompt per completion")
    return [
        (list(map(int, prompt)), list(map(int, completion)))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _first_tokens(counts: Sequence[int] | None, rows: list[Row]) -> list[int]:
    """How many tokens of each completion the teacher has drawn itself."""
    if counts is None:
        return [0] * len(rows)
    if len(counts) != len(rows):
        raise InputError(f"teacher_tokens has {len(counts)} entries for {len(rows)} completions")
    for row, (count, (_, completion)) in enumerate(zip(counts, rows, strict=True)):
        if not 0 <= count <= len(completion):
            raise InputError(f"teacher_tokens is {count} for row {row}, whose completion has {len(completion)} tokens")
    return list(counts)


def _check(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    vocabulary: SharedVocabulary,
    temperature: float,
    top: int,
    max_rows: int | None,
) -> None:
    checked_temperature(temperature)
    if top < 0:
        raise InputError(f"top must be at least 0, got {top}")
    if max_rows is not None and max_rows < 1:
        raise InputError(f"max_rows must be at least 1, got {max_rows}")
    for name, model in (("student", student), ("teacher", teacher)):
        rows_of_head = head_rows(without_adapters(model))
        if rows_of_head < vocabulary.size:
            raise InputError(
                f"the {name}'s head has {rows_of_head} rows, fewer than the {vocabulary.size} of the shared "
                "vocabulary; build it with SharedVocabulary.of from both models' head_rows"
            )


def _check_rows(rows: list[Row], vocabulary: SharedVocabulary, whose: str) -> None:
    for row, (prompt, completion) in enumerate(rows):
        if not prompt:
            raise InputError(f"{whose}prompt {row} is empty; a prompt needs at least one token")
        outside = [token for token in prompt + completion if not 0 <= token < vocabulary.size]
        if outside:
            raise InputError(
                f"{whose}row {row} contains token id {outside[0]}, outside the {vocabulary.size} shared rows"
            )
