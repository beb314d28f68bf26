"""Token-by-token sampling from a behavior policy: the reference every faster sampler is held to.

Both models read every token, one KV cache each; each position draws exactly once from μ. Clarity first: the only
optimisation is that finished rows leave the batch. It shares no cache with the speculative sampler: rows of different
lengths are padded on the left once, at the prompt, and the library's own cache grows by concatenation.

Shape suffixes: R rows in flight, P padded prompt length, V shared vocabulary or head rows.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trb.policies import BehaviorPolicy, Target
from trb.sampling.draw import accept_or_replace, inverse_cdf
from trb.sampling.rollout import Rollout, RolloutStats
from trb.sampling.uniforms import as_int64, uniforms
from trb.vocab import SharedVocabulary, log_probs

__all__ = ["sample_lockstep"]

# Copying the KV cache costs about one step's memory traffic, so rows leave in groups of this share of the batch.
_DROP_SHARE = 0.25


def sample_lockstep(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prompts: Sequence[Sequence[int]],
    policy: BehaviorPolicy,
    *,
    max_rows: int | None,
    prompt_keys: Sequence[int],
    rollout_index: Sequence[int],
    **options: Any,
) -> Rollout:
    """Sample one completion per prompt; arguments as in `trb.sampling.sample`, already validated."""
    rollout = Rollout()
    step = max_rows or max(1, len(prompts))
    for start in range(0, len(prompts), step):
        part = slice(start, start + step)
        keys, index = prompt_keys[part], rollout_index[part]
        rollout.extend(
            _sample_batch(student, teacher, prompts[part], policy, prompt_keys=keys, rollout_index=index, **options)
        )
    return rollout


def _sample_batch(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prompts: Sequence[Sequence[int]],
    policy: BehaviorPolicy,
    *,
    vocabulary: SharedVocabulary,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    prompt_keys: Sequence[int],
    rollout_index: Sequence[int],
) -> Rollout:
    device = student.device
    readers = [_Reader(student)]
    if policy.needs_teacher:
        assert teacher is not None
        readers.append(_Reader(teacher))
    keys_R = as_int64(prompt_keys, device)
    index_R = torch.tensor(list(rollout_index), device=device)
    rows_R = torch.arange(len(prompts), device=device)
    open_R = torch.ones_like(rows_R, dtype=torch.bool)
    trace = _Trace(len(prompts), max_new_tokens, device)

    logits = [reader.read_prompts(prompts) for reader in readers]
    for position in range(max_new_tokens):
        uniform_R3 = uniforms(seed, keys_R, index_R, torch.full_like(index_R, position))
        student_and_teacher = [log_probs(vocabulary.fold(rows).to(device), temperature) for rows in logits]
        token_R, accepted_R, target = _draw(policy, student_and_teacher, uniform_R3)
        trace.write(position, rows_R[open_R], token_R[open_R], accepted_R[open_R], target, open_R)
        open_R = open_R & (token_R != vocabulary.stop_id)
        still_open = int(open_R.sum())
        if not still_open or position + 1 == max_new_tokens:
            break
        if still_open <= (1 - _DROP_SHARE) * len(open_R):
            kept = open_R.nonzero().squeeze(-1)
            for reader in readers:
                reader.keep(kept.to(reader.model.device))
            token_R, rows_R, keys_R, index_R = token_R[kept], rows_R[kept], keys_R[kept], index_R[kept]
            open_R = torch.ones_like(rows_R, dtype=torch.bool)
        logits = [reader.read_tokens(token_R.to(reader.model.device)) for reader in readers]

    calls = [reader.calls for reader in readers]
    return trace.rollout(prompts, vocabulary.stop_id, calls[0], sum(calls[1:]))


def _draw(
    policy: BehaviorPolicy, student_and_teacher: list[Tensor], uniform_R3: Tensor
) -> tuple[Tensor, Tensor, Target]:
    log_student_RV, *log_teacher = student_and_teacher
    draft_uniform_R, accept_R, residual_R = uniform_R3.unbind(-1)
    draft_R = inverse_cdf(log_student_RV.exp(), draft_uniform_R)
    target = policy.target(log_student_RV, log_teacher[0] if log_teacher else None)
    token_R, accepted_R = accept_or_replace(target, log_student_RV, draft_R, accept_R, residual_R)
    return token_R, accepted_R, target


class _Trace:
    """What was drawn, kept on the device until the end: reading it back token by token would stall the models."""

    _COLUMNS = ("teacher_weight", "kl_student", "kl_teacher", "accepted")

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.tokens_RT = torch.full((rows, length), -1, dtype=torch.long, device=device)
        self.numbers = {name: torch.zeros(rows, length, device=device) for name in self._COLUMNS}
        self.has_teacher = False

    def write(
        self, position: int, rows: Tensor, token: Tensor, accepted: Tensor, target: Target, open_R: Tensor
    ) -> None:
        self.tokens_RT[rows, position] = token
        self.has_teacher = target.kl_teacher is not None
        values = {
            "teacher_weight": target.teacher_weight[open_R],
            "kl_student": target.kl_student[open_R],
            "accepted": accepted,
        }
        if target.kl_teacher is not None:
            values["kl_teacher"] = target.kl_teacher[open_R]
        for name, value in values.items():
            self.numbers[name][rows, position] = value.float()

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


class _Reader:
    """Feeds tokens to one model and returns its logits at the newest position of each row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.calls = 0
        self._parameters = inspect.signature(model.forward).parameters
        self._cache: Any = None
        self._mask_RP: Tensor | None = None
        self._position_R = torch.empty(0, dtype=torch.long)

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read whole prompts; `[R, V]` logits of the first completion token."""
        longest, device = max(map(len, prompts)), self.model.device
        ids_RP = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_RP = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_RP[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_RP[row, longest - len(prompt) :] = 1
        position_RP = (mask_RP.cumsum(-1) - 1).clamp_min(0).to(device)
        self._position_R = position_RP[:, -1] + 1
        # Without padding no mask is passed: attention kernels are faster without one.
        self._mask_RP = None if bool(mask_RP.all()) else mask_RP.to(device)
        return self._forward(ids_RP.to(device), position_RP)

    def read_tokens(self, token_R: Tensor) -> Tensor:
        """Read one more token per row; `[R, V]` logits of the next one."""
        position_R1 = self._position_R[:, None]
        self._position_R = self._position_R + 1
        if self._mask_RP is not None:
            self._mask_RP = torch.cat([self._mask_RP, self._mask_RP.new_ones(len(token_R), 1)], dim=1)
        return self._forward(token_R[:, None], position_R1)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` (indices, ascending)."""
        self._cache.batch_select_indices(rows)
        self._position_R = self._position_R[rows]
        if self._mask_RP is not None:
            self._mask_RP = self._mask_RP[rows]

    def _forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True, "past_key_values": self._cache}
        if self._mask_RP is not None:
            inputs["attention_mask"] = self._mask_RP
        if "position_ids" in self._parameters:
            inputs["position_ids"] = position_ids
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = 1
        output = self.model(**inputs)
        self._cache = output.past_key_values
        self.calls += 1
        return output.logits[:, -1]
