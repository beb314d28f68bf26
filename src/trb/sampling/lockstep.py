"""Token-by-token sampling from a behavior policy: the reference every faster sampler is held to.

Both models read every token; each position draws exactly once from μ. Clarity first: the only optimisation is that
finished rows leave the batch. It shares no cache with the speculative sampler: `readers` has the library's own, and
none at all.

Shape suffixes: R rows in flight, V shared vocabulary or head rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trb.policies import BehaviorPolicy
from trb.sampling.draw import Decision, decide, distinct, inverse_cdf
from trb.sampling.readers import Reader
from trb.sampling.rollout import NonFiniteLogitsError, Rollout, RolloutStats, without_law
from trb.sampling.uniforms import as_int64, uniforms
from trb.vocab import SharedVocabulary

__all__ = ["sample_lockstep"]

# Copying the KV cache costs about one step's memory traffic, so rows leave in groups of this share of the batch.
_DROP_SHARE = 0.25


def sample_lockstep(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[BehaviorPolicy],
    *,
    teacher_prompts: Sequence[Sequence[int]],
    max_rows: int | None,
    max_new_tokens: Sequence[int],
    drawn: Sequence[int],
    prompt_keys: Sequence[int],
    rollout_index: Sequence[int],
    row_numbers: Sequence[int],
    readers: Sequence[Callable[[PreTrainedModel], Reader]],
    **options: Any,
) -> Rollout:
    """Sample one completion per prompt; arguments as in `trb.sampling.sample`, already validated, but for these.

    Args:
        policies: of each row.
        teacher_prompts: of each row.
        max_new_tokens: of each row.
        drawn: tokens of each row's completion that its prompts already hold.
        row_numbers: what errors call each row.
        readers: how to read the student, and the teacher.
    """
    rollout = Rollout()
    step = max_rows or max(1, len(prompts))
    different, which = distinct(policies)
    columns = (max_new_tokens, drawn, prompt_keys, rollout_index, row_numbers, which)
    rows = list(zip(prompts, teacher_prompts, *columns, strict=True))
    for start in range(0, len(prompts), step):
        rollout.extend(_sample_batch(student, teacher, different, rows[start : start + step], readers, **options))
    return rollout


def _sample_batch(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    policies: Sequence[BehaviorPolicy],
    rows: Sequence[tuple[Sequence[int], Sequence[int], int, int, int, int, int, int]],
    readers_of: Sequence[Callable[[PreTrainedModel], Reader]],
    *,
    vocabulary: SharedVocabulary,
    temperature: float,
    seed: int,
    allow_non_finite: bool,
) -> Rollout:
    device = student.device
    models = [student]
    if any(policy.needs_teacher for policy in policies):
        assert teacher is not None
        models.append(teacher)
    readers = [read(model) for read, model in zip(readers_of, models, strict=False)]
    prompts, taught, limits, drawn, keys, indices, numbers, which = map(list, zip(*rows, strict=True))
    keys_R = as_int64(keys, device)
    limit_R, first_R, index_R, which_R = (
        torch.tensor(values, device=device) for values in (limits, drawn, indices, which)
    )
    rows_R = torch.arange(len(prompts), device=device)
    open_R = torch.ones_like(rows_R, dtype=torch.bool)
    longest = max(limits)
    trace = _Trace(len(prompts), longest, device)

    logits = [reader.read_prompts(own) for reader, own in zip(readers, (prompts, taught), strict=False)]
    for position in range(longest):
        uniform_R3 = uniforms(seed, keys_R, index_R, first_R + position)
        student_and_teacher = [vocabulary.log_probs(rows.to(device), temperature) for rows in logits]
        decision = _draw(policies, which_R, student_and_teacher, uniform_R3)
        token_R = decision.token
        trace.write(position, rows_R[open_R], decision, open_R)
        if not allow_non_finite:
            log_student_RV, *log_teacher = student_and_teacher
            verdict_R = without_law(log_student_RV, log_teacher[0] if log_teacher else None, vocabulary.stop_id)
            trace.without_law_RT[rows_R[open_R], position] = verdict_R[open_R]
        open_R = open_R & (token_R != vocabulary.stop_id) & (position + 1 < limit_R)
        still_open = int(open_R.sum())
        if not still_open:
            break
        if still_open <= (1 - _DROP_SHARE) * len(open_R):
            kept = open_R.nonzero().squeeze(-1)
            for reader in readers:
                reader.keep(kept.to(reader.model.device))
            token_R, rows_R, keys_R = token_R[kept], rows_R[kept], keys_R[kept]
            index_R, first_R, limit_R, which_R = index_R[kept], first_R[kept], limit_R[kept], which_R[kept]
            open_R = torch.ones_like(rows_R, dtype=torch.bool)
        logits = [reader.read_tokens(token_R.to(reader.model.device)) for reader in readers]

    trace.require_laws(numbers, drawn)
    calls = [reader.calls for reader in readers]
    return trace.rollout(prompts, vocabulary.stop_id, calls[0], sum(calls[1:]))


def _draw(
    policies: Sequence[BehaviorPolicy], which_R: Tensor, student_and_teacher: list[Tensor], uniform_R3: Tensor
) -> Decision:
    log_student_RV, *log_teacher = student_and_teacher
    draft_R = inverse_cdf(log_student_RV.exp(), uniform_R3[:, 0])
    log_teacher_RV = log_teacher[0] if log_teacher else None
    return decide(policies, which_R, log_student_RV, log_teacher_RV, draft_R, uniform_R3[:, 1:])


class _Trace:
    """What was drawn, kept on the device until the end: reading it back token by token would stall the models."""

    _COLUMNS = ("teacher_weight", "kl_student", "kl_teacher", "accepted")

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.tokens_RT = torch.full((rows, length), -1, dtype=torch.long, device=device)
        self.numbers = {name: torch.zeros(rows, length, device=device) for name in self._COLUMNS}
        self.without_law_RT = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self.has_teacher = False

    def write(self, position: int, rows: Tensor, decision: Decision, open_R: Tensor) -> None:
        self.tokens_RT[rows, position] = decision.token[open_R]
        self.has_teacher = decision.kl_teacher is not None
        for name in self._COLUMNS:
            column_R = getattr(decision, name)
            if column_R is not None:
                self.numbers[name][rows, position] = column_R[open_R].float()

    def require_laws(self, row_numbers: Sequence[int], drawn: Sequence[int]) -> None:
        """Raises NonFiniteLogitsError for the first row that met a prefix without a law."""
        for row, position in self.without_law_RT.nonzero().tolist():
            verdict = self.without_law_RT[row, position].item()
            raise NonFiniteLogitsError.of(verdict, row_numbers[row], drawn[row] + position)

    def rollout(
        self, prompts: Sequence[Sequence[int]], stop_id: int, student_calls: int, teacher_calls: int
    ) -> Rollout:
        completions = [[token for token in row if token >= 0] for row in self.tokens_RT.tolist()]
        stats = RolloutStats()
        for name in self._COLUMNS:
            present = name != "kl_teacher" or self.has_teacher
            ragged = [
                row[: len(completion)] if present else []
                for row, completion in zip(self.numbers[name].tolist(), completions, strict=True)
            ]
            setattr(stats, name, ragged)
        stopped = [bool(completion) and completion[-1] == stop_id for completion in completions]
        return Rollout(list(map(list, prompts)), completions, stopped, stats, teacher_calls, student_calls)
