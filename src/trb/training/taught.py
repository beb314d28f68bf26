"""What the loss has of the teachers: their weights where they are read, each row against its own.

Seams of TRL: `_forward_redirection` does for a teacher's wrapper what is done for the student's; the rows of what
`_generate_and_score_completions` returns are shuffled and split together.

Left out: which teacher a row has (`trb.training.teachers`), and rollouts (`trb.training.trainer`).

Shape suffixes: B sequences, N completion tokens, P prompt length, T completion length, L = P + T; b rows of a teacher.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import DistillationTrainer
from trl.models import prepare_deepspeed

from trb.losses import Loss, TokenMetrics
from trb.losses.chunked import TokenBatch
from trb.models.modeling import OutputHead, completion_hidden_states
from trb.models.prefixes import shared_hidden_states
from trb.models.sharing import shares_weights
from trb.sampling import Rollout
from trb.training.calling import own_tokens
from trb.training.config import TRBConfig
from trb.training.methods import Behavior, needs_teacher
from trb.training.routes import Named, Routes, places_of
from trb.training.sharding import Replica, shard_in_place
from trb.training.teachers import Teacher, joined_metrics
from trb.vocab import SharedVocabulary

__all__ = ["TaughtTrainer", "with_completions"]


class TaughtTrainer(DistillationTrainer):
    """The part of `TRBTrainer` that holds the teachers."""

    args: TRBConfig
    model: Any
    teachers: list[Teacher]
    vocabulary: SharedVocabulary
    behavior: Behavior
    _routes: Routes | None
    _student_head: OutputHead
    _student_replica: Replica | None
    _teacher_is_sharded: bool
    _rollout: Rollout | None
    # Of the step's rollouts: the place of each one's teacher, and what the teachers' heads read where that is known
    # before the loss asks.
    _taught_by: list[int]
    _scored: list[Tensor] | None

    def _add_teachers_metrics(self, name: str | None, metrics: TokenMetrics) -> None:
        """What was seen of the tokens of one teacher."""
        raise NotImplementedError

    def _prepared_teacher(
        self, name: str | None, model: PreTrainedModel, head: OutputHead, tokenizers: Named
    ) -> Teacher:
        model.requires_grad_(False)
        model.eval()  # for good: nothing trains it, and its dropout would make the target a draw
        device, away = self.accelerator.device, self.args.teacher_offload and not shares_weights(model, self.model)
        if away:
            model.to("cpu")  # type: ignore[arg-type]
        elif self._student_replica is not None:
            # Accelerate leaves placement to the sharding, which the teacher takes no part in.
            model.to(device)
        placed = False if away else None
        prepared = self.accelerator.prepare_model(model, device_placement=placed, evaluation_mode=True)
        return Teacher(name, prepared, head, tokenizers.get(name), device if away else None)

    def _shard_teacher(self) -> None:
        """Leave this process a shard of the only teacher; collective. The head stays whole: the loss projects through
        it outside the teacher's own passes."""
        (whole,) = self.teachers
        model, head = self.accelerator.unwrap_model(whole.model), whole.head
        if self.is_deepspeed_enabled:
            head = replace(head, projection=copy.deepcopy(head.projection))
            self.teacher_model = prepare_deepspeed(model, self.accelerator)
        else:
            self.teacher_model = shard_in_place(model, whole=head.projection, accelerator=self.accelerator)
        self.teachers = [replace(whole, model=self.teacher_model, head=head)]
        self._teacher_is_sharded = True

    def _teacher_may_be_sharded(self, step: int) -> bool:
        """Whether the teacher waits to be sharded and no longer takes part in sampling."""
        if not self.args.teacher_sharded or self._teacher_is_sharded:
            return False
        return not needs_teacher(self.behavior, step)

    def _matched(
        self, match: Loss, inputs: dict[str, Tensor], student_NH: Tensor, normaliser: Tensor | None
    ) -> tuple[Tensor, TokenMetrics]:
        """The loss of a batch, every row against its own teacher: the token mean over all rows."""
        own_BT = own_tokens(inputs)
        lengths_B, losses, metrics = own_BT.sum(dim=1), [], []
        token_N = self.vocabulary.events(inputs["completion_ids"][own_BT.bool()])
        sequence_N = torch.arange(len(lengths_B), device=token_N.device).repeat_interleave(lengths_B)
        whose = [0] * len(lengths_B)
        if self._routes is not None:
            whose = [self._taught_by[row] for row in inputs["rollout_row"].tolist()]
        parts = places_of(whose)
        if normaliser is None and len(parts) > 1:
            normaliser = lengths_B.sum()
        for place, rows in parts.items():
            teacher, row_b = self.teachers[place], torch.tensor(rows, device=token_N.device)
            mine_N = torch.isin(sequence_N, row_b).nonzero().squeeze(-1) if len(parts) > 1 else slice(None)
            teacher_NH = self._teacher_hidden({name: inputs[name][row_b] for name in _read(inputs)}, teacher)
            with teacher.present(teacher.head.projection):
                loss, seen = match(
                    TokenBatch(
                        student_NH[mine_N],
                        teacher_NH,
                        self._student_head,
                        teacher.head,
                        token_N[mine_N],
                        vocabulary=self.vocabulary,
                        temperature=self.temperature,
                        normaliser=normaliser,
                        chunk_tokens=self.args.loss_chunk_tokens,
                        lengths=lengths_B[row_b],
                    )
                )
            self._add_teachers_metrics(teacher.name, seen)
            losses.append(loss)
            metrics.append((mine_N, seen))
        return torch.stack(losses).sum(), joined_metrics(len(token_N), metrics)

    def _teacher_hidden(self, inputs: dict[str, Tensor], teacher: Teacher | None = None) -> Tensor:
        """What a teacher's head reads at each completion token of its rows: from the sampler if it took part in it."""
        teacher = teacher or self.teachers[0]
        kept = self._scored or (self._rollout and self._rollout.teacher_hidden)
        if kept and "rollout_row" in inputs:
            return torch.cat([kept[row] for row in inputs["rollout_row"].tolist()])
        bare = self.accelerator.unwrap_model(teacher.model)
        states = completion_hidden_states if self._teacher_is_sharded else shared_hidden_states
        read = with_completions(inputs, "teacher_prompt" if "teacher_prompt_ids" in inputs else "prompt")
        with torch.no_grad(), teacher.present():
            return self._forward_redirection(teacher.model, bare, states, bare, *read)

    def _scored_ahead(self, output: dict[str, Tensor]) -> list[Tensor]:
        """What the teachers' heads read at each token of every row, so that each teacher comes once a step."""
        found: dict[int, Tensor] = {}
        at_once = self.args.per_device_train_batch_size
        for place, rows in places_of(self._taught_by).items():
            with self.compute_loss_context_manager(), self.teachers[place].present():
                for start in range(0, len(rows), at_once):
                    part = rows[start : start + at_once]
                    row_b = torch.tensor(part, device=output["completion_ids"].device)
                    inputs = {name: output[name][row_b] for name in _read(output)}
                    states = self._teacher_hidden(inputs, self.teachers[place])
                    found.update(zip(part, states.split(own_tokens(inputs).sum(dim=1).tolist()), strict=True))
        return [found[row] for row in range(len(self._taught_by))]


def _read(inputs: Mapping[str, Any]) -> list[str]:
    """The names of what a teacher reads of its rows."""
    kinds = ("prompt", "teacher_prompt", "completion")
    names = ["rollout_row", "tool_mask", *(f"{kind}_{what}" for kind in kinds for what in ("ids", "mask"))]
    return [name for name in names if name in inputs]


def with_completions(inputs: dict[str, Tensor], prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, L]` token ids, what of them is real, and what of them a model wrote as its completion."""
    ids_BP, mask_BP = inputs[f"{prompt}_ids"], inputs[f"{prompt}_mask"]
    ids_BT, mask_BT = inputs["completion_ids"], inputs["completion_mask"]
    return (
        torch.cat([ids_BP, ids_BT], dim=1),
        torch.cat([mask_BP, mask_BT], dim=1),
        torch.cat([torch.zeros_like(mask_BP), own_tokens(inputs)], dim=1),
    )
