"""Optimizer steps that must not be taken: a loss or gradient that is not finite, found before the optimizer sees it.

One decision per optimizer step, the same on every process: the losses of its micro-batches are added up on the device,
and one small all-reduce carries that sum's and the gradient norm's verdict. A step that is skipped counts as a step
(the scheduler and the budget go on), changes neither weights nor optimizer state, and leaves its prompts and
completions in skipped/step-N.jsonl, N being the step's number in metrics.jsonl.

Seams of transformers: `training_step` comes for each micro-batch; `_get_grad_norm` once per optimizer step, after
clipping and right before `optimizer.step()`; `_tr_loss` is the sum that `log` will average.

Left out on purpose: repairing numbers, and DeepSpeed, which takes its step inside the backward pass: there a number
that is not finite can only end the run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging
from trl import DistillationTrainer

from trb.errors import OperationError
from trb.records import SKIPPED_STEP, step_name
from trb.training import checkpoints
from trb.training.calling import own_tokens
from trb.training.config import TRBConfig

__all__ = ["GuardedTrainer", "NonFiniteError", "StepGuard"]

logger = logging.get_logger(__name__)


class NonFiniteError(OperationError):
    """Too many steps in a row had a loss or a gradient that is not finite; the message says where to look."""


@dataclass
class _Part:
    """One micro-batch: what it was made of, and the reverse KL of each completion token that a model wrote."""

    inputs: dict[str, Tensor]
    reverse_kl_N: Tensor

    def own(self, row: int) -> list[int]:
        """1 at the tokens of a row's completion that a model wrote, 0 at those of tools."""
        return self.inputs["tool_mask"][row][self.inputs["completion_mask"][row].bool()].tolist()

    def tokens(self, name: str, row: int) -> list[int]:
        """The real ones of a row, of the prompts or the completions."""
        return self.inputs[f"{name}_ids"][row][self.inputs[f"{name}_mask"][row].bool()].tolist()


class StepGuard:
    """Watches the micro-batches of an optimizer step, judges it, and counts.

    Attributes:
        skipped: steps skipped so far in this run.
        in_a_row: of these, the ones since the last step that was taken.
        taken, left_out: steps since the last log, by whether they were taken.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.skipped = self.in_a_row = self.taken = self.left_out = 0
        self._parts: list[_Part] = []
        self._loss: Tensor | None = None

    @property
    def began(self) -> bool:
        """Whether a micro-batch of the present step was seen."""
        return self._loss is not None

    def reset(self) -> None:
        """Forget the present step."""
        self._parts, self._loss = [], None

    def watch(self, inputs: dict[str, Tensor], reverse_kl_N: Tensor) -> None:
        """Keep a micro-batch until its step is judged."""
        self._parts.append(_Part(inputs, reverse_kl_N.detach()))

    def add_loss(self, loss: Tensor) -> None:
        """The loss of a micro-batch; stays on its device."""
        # A sum is finite only if every term is: infinities and NaN never cancel out.
        self._loss = loss.detach().float() if self._loss is None else self._loss + loss.detach().float()

    def judge(self, accelerator: Accelerator, grad_norm: Tensor | float | None) -> list[str]:
        """Which of "loss" and "gradient" was not finite, on any process. Call on all of them, once per step."""
        loss = torch.zeros((), device=accelerator.device) if self._loss is None else self._loss
        whole = getattr(grad_norm, "full_tensor", lambda: grad_norm)()  # of a sharded model, it may be sharded too
        norm = torch.as_tensor(0.0 if whole is None else whole, dtype=loss.dtype, device=loss.device)
        wrong = torch.stack([loss, norm]).isfinite().logical_not().float()
        verdict = accelerator.reduce(wrong, reduction="sum").tolist()
        return [name for name, count in zip(("loss", "gradient"), verdict, strict=True) if count]

    def count(self, *, skipped: bool) -> None:
        """Count the step that was judged."""
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.taken, self.left_out = self.taken + (not skipped), self.left_out + skipped

    def mean_loss(self, mean: float) -> float:
        """The mean loss of the steps that were taken, from one to which skipped steps added 0; starts a new mean."""
        taken, left_out = self.taken, self.left_out
        self.taken = self.left_out = 0
        if not left_out:
            return mean
        return mean * (taken + left_out) / taken if taken else math.nan

    def save(self, step: int, found: list[str], process: int, decode: Callable[[list[int]], str]) -> Path:
        """Write the rows of the step, those of every process, and return the file. Call on all processes.

        Where a row's own reverse KL is not finite, only such rows are written; where none is, all are.
        """
        rows = [{"step": step, "non_finite": found, "process": process, **row} for row in self._rows(decode)]
        rows = gather_object(rows)
        guilty = [row for row in rows if not all(map(math.isfinite, row["reverse_kl"]))]
        path = self.directory / f"{step_name(step)}.jsonl"
        if process == 0:
            SKIPPED_STEP.write(path, guilty or rows)
        return path

    def _rows(self, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
        rows = []
        for number, part in enumerate(self._parts):
            lengths = own_tokens(part.inputs).sum(dim=1).tolist()
            for row, divergences in enumerate(part.reverse_kl_N.float().split(lengths)):
                prompt, completion = (part.tokens(name, row) for name in ("prompt", "completion"))
                taught = part.tokens("teacher_prompt", row) if "teacher_prompt_ids" in part.inputs else prompt
                rows.append(
                    {
                        "micro_batch": number,
                        "prompt": decode(prompt),
                        **({} if taught == prompt else {"teacher_prompt": decode(taught)}),
                        "completion": decode(completion),
                        "prompt_ids": prompt,
                        "completion_ids": completion,
                        **({"own": part.own(row)} if "tool_mask" in part.inputs else {}),
                        "reverse_kl": divergences.tolist(),
                    }
                )
        return rows

    def state(self) -> dict[str, int]:
        """What a checkpoint must hold for the count to go on."""
        return {name: getattr(self, name) for name in ("skipped", "in_a_row", "taken", "left_out")}

    def load(self, state: dict[str, int]) -> None:
        """Take `state()` back."""
        for name in self.state():
            setattr(self, name, state[name])


class GuardedTrainer(DistillationTrainer):
    """The part of `TRBTrainer` that judges a step before it is taken."""

    args: TRBConfig
    _guard: StepGuard
    _loss_before: Tensor

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self._guard.began:
            self._loss_before = self._tr_loss.clone()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._guard.add_loss(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Every gradient is there, and none was applied: the last moment to keep the optimizer from this step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        found = self._guard.judge(self.accelerator, grad_norm)
        if found:
            self._skip_step(model, found)
        self._guard.count(skipped=bool(found))
        self._guard.reset()
        return grad_norm

    def _skip_step(self, model: nn.Module, found: list[str]) -> None:
        """An optimizer finds no gradients, and changes nothing. The step counts all the same."""
        step, process = self.state.global_step + 1, self.accelerator.process_index
        path = self._guard.save(step, found, process, self._tokenizer.decode)
        what, in_a_row = " and ".join(found), self._guard.in_a_row + 1
        if self.is_deepspeed_enabled and not self.args.fp16:  # with fp16, its own loss scaling has skipped the step
            raise NonFiniteError(
                f"step {step}: {what} not finite, and DeepSpeed has applied the step already. {self._way_back(path)}"
            )
        if in_a_row >= self.args.max_skipped_steps:
            raise NonFiniteError(
                f"step {step}: {what} not finite, in max_skipped_steps={in_a_row} steps in a row. None of them was "
                f"applied. {self._way_back(path)}"
            )
        model.zero_grad(set_to_none=True)
        self._tr_loss.copy_(self._loss_before)
        logger.warning(f"step {step} is skipped: {what} not finite; its rollouts are in {path}")

    def _way_back(self, skipped: Path) -> str:
        saved = checkpoints.latest(Path(str(self.args.output_dir)), contents=False, warn=None)
        where = f"The last checkpoint is {saved}" if saved else "There is no checkpoint yet"
        return f"{where}; the rollouts of this step are in {skipped}. A lower learning_rate is the usual remedy"
