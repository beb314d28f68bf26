"""Checkpoints that are whole, resumes that go on where the run was, and models saved also where transformers would not.

Seams of transformers and TRL:
- `_save_checkpoint` writes into `_get_output_dir()`/checkpoint-N and rotates there; `_push_from_checkpoint` uploads it;
- `_save_rng_state` and `_load_rng_state` are called on every process when a checkpoint is saved and resumed from, the
  latter after `_tr_loss`, `_total_loss_scalar` and `_globalstep_last_logged` were set to zero;
- `_run_epoch` is told the number of the epoch, and takes a step before it asks whether any is left;
- `training_step` comes for each micro-batch, and `_maybe_log_save_evaluate` at the end of each step and epoch;
- `_evaluate` is told by `skip_scheduler` that it is called at the start;
- `_finalize_training` divides the sum of losses by the steps since a resume, skipped ones among them, and logs it as
  `train_loss`;
- `_step` counts micro-batches, `_buffered_inputs` holds those of a step and `_current_train_step_time` their seconds;
  a new call of `train` keeps them, and the texts in `_logs`;
- `train` reads weights with `_load_from_checkpoint`, calls `_load_callback_state` once the trainer's state was read,
  which builds callbacks anew from the checkpoint, and `_load_best_model` at the end;
- `save_model` gathers sharded weights and calls `_save` where it should.

Left out: what a checkpoint is, and when it is whole (`trb.training.checkpoints`), and what makes two runs the same
(`trb.training.resume`).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, GenerationConfig, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from trb.models.bases import name_base
from trb.models.generators import generators_now
from trb.models.modeling import without_adapters
from trb.records import CHECKPOINT_PREFIX, PROGRESS, TRAINER_STATE, progress_name
from trb.safety.untrusted import check_checkpoint
from trb.training import checkpoints, resume
from trb.training.config import TRBConfig
from trb.training.guard import StepGuard
from trb.training.metrics import Observers, Sums
from trb.training.prompts import PromptsInOrder
from trb.training.ranks import Ranks
from trb.training.recording import RunRecorder
from trb.vocab import SharedVocabulary

__all__ = ["ResumableTrainer"]

logger = logging.get_logger(__name__)


class ResumableTrainer(PromptsInOrder):
    """The part of `TRBTrainer` that saves and resumes."""

    args: TRBConfig
    model: Any
    vocabulary: SharedVocabulary
    _ranks: Ranks
    _guard: StepGuard
    _sums: dict[str, Sums]
    _observers: Observers
    _teacher_is_sharded: bool
    _unfinished: Path | None = None
    _resumed_from: Path | None = None
    _description: dict[str, Any] | None = None
    _accept_changes: bool = False
    _goes_on: bool = False
    _lost_patience: bool = False
    _mean_loss: float | None = None
    _skipped_before: int = 0  # steps that were skipped before the first that `train_loss` is of
    _before_step: dict[str, Any]  # `_progress` where the present step began
    _seen_before: tuple[Any, Any]
    _logs_before: dict[str, Any]
    _put_back: Callable[[], None]  # the global generators, to where the last step or epoch left them
    recorder: RunRecorder

    def train(
        self,
        resume_from_checkpoint: Any = None,
        *args: Any,
        verify: bool = True,
        accept_changes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Train, as transformers' `Trainer.train`.

        `resume_from_checkpoint=True` takes the latest checkpoint of the output directory that is whole, None the one
        that the configuration names, if any, and False none. `verify=False` trusts one that is named. A checkpoint of a
        run that differs in what changes results (`trb.training.resume` says what does: options, prompts, models) is
        refused; `accept_changes=True` warns and goes on.

        Raises:
            ValueError: prompts that cannot be trained on (`check_prompts`); a checkpoint that could run code.
            ChangedRunError: lists everything that differs from the checkpoint's run.
            CheckpointError: the checkpoint named is damaged or not one of this trainer's, or True finds no whole one.
            NonFiniteError: `max_skipped_steps` steps in a row had a loss or gradient that is not finite.
        """
        self.check_prompts()
        if not self._teacher_is_sharded:  # options may have changed since, and both models are whole
            self._description = None
        self._describe_run()
        self._forget_earlier_call()
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint is True:
            # Never handed on as it is: transformers would choose by itself, and does not verify.
            resume_from_checkpoint = str(self._ranks.from_first(self._latest_checkpoint))
        elif resume_from_checkpoint:
            self._ranks.from_first(partial(checkpoints.check_named, Path(resume_from_checkpoint), whole=verify))
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._accept_changes, self._goes_on, self._lost_patience, self._mean_loss = accept_changes, False, False, None
        self._skipped_before = 0
        if resume_from_checkpoint:
            saved = Path(resume_from_checkpoint)
            check_checkpoint(saved)  # here too: DeepSpeed's files are not read as others are
            self.check_same_run(saved, accept_changes=accept_changes)
            if saved.parent.resolve() == Path(str(self.args.output_dir)).resolve() and self.accelerator.is_main_process:
                checkpoints.check_reach(saved)
        self.set_aside_others(self._resumed_from)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _forget_earlier_call(self) -> None:
        """`train` may be called again, also after an interrupt amid a step: what that left belongs to no later one."""
        self._guard = StepGuard(self._guard.directory)
        self._step, self._buffered_inputs, self._current_train_step_time = 0, None, 0.0
        for texts in self._logs.values():
            texts.clear()
        self._metrics["train"].clear()
        self._sums["train"] = Sums()
        self._observers.reset()

    def set_aside_others(self, begins_with: Path | None) -> None:
        """Whoever resumes this run takes the latest checkpoint that is there, which must be its own; collective."""
        directory, step = Path(str(self.args.output_dir)), -1
        protected: list[Path | str | None] = [begins_with]
        if begins_with is not None:
            state = TrainerState.load_from_json(str(begins_with / TRAINER_STATE))
            protected.append(checkpoints.best_beside(begins_with, state.best_model_checkpoint))
            if begins_with.parent.resolve() == directory.resolve():
                step = state.global_step
        for moves in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
            self.accelerator.wait_for_everyone()
            if moves:
                checkpoints.set_aside_later(directory, step, protected)
        self.accelerator.wait_for_everyone()

    def _latest_checkpoint(self) -> Path:
        directory = Path(str(self.args.output_dir))
        found = checkpoints.latest(directory)
        if found is None:
            raise checkpoints.CheckpointError(
                f"{checkpoints.none_whole(directory)}; to start anew, call train() without resume_from_checkpoint"
            )
        return found

    def _describe_run(self) -> dict[str, Any]:
        """What this run is, for its checkpoints; collective the first time."""
        if self._description is None:
            describe = partial(
                resume.describe,
                self.args,
                world_size=self.accelerator.num_processes,
                train_dataset=self.train_dataset,
                tokenizer=self._tokenizer,
                vocabulary=self.vocabulary,
                student=self.model,
                teachers={each.name: self.accelerator.unwrap_model(each.model) for each in self.teachers},
                routes=self._routes,
                tools=[tool.__name__ for tool in self.tools],
            )
            self._description = self._ranks.from_first(describe)
        return self._description

    def check_same_run(self, checkpoint: Path, *, accept_changes: bool = False) -> None:
        """Compare this run with a checkpoint's; collective. `train` does so before it resumes.

        Raises:
            ChangedRunError: lists everything that differs, and what the checkpoint does not hold of its run, unless
                `accept_changes` turns that into warnings.
        """
        saved = self._ranks.from_first(lambda: resume.read(checkpoint))
        if saved is None:
            logger.warning(f"{checkpoint} does not say which run it is of: its settings and data are not compared")
            return
        found = resume.differences(saved, self._describe_run(), length=resume.length_matters(self.args))
        held = partial(resume.missing_state, checkpoint, deepspeed=self.is_deepspeed_enabled)
        missing = self._ranks.from_first(held)
        texts = [resume.explain(checkpoint, found, accepted=accept_changes)] if found else []
        texts += [resume.explain_missing(checkpoint, missing, accepted=accept_changes)] if missing else []
        if texts and not accept_changes:
            raise resume.ChangedRunError(". ".join(texts))
        for text in texts:
            logger.warning(text)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_callback_state(self) -> None:
        """Called when the state has been read, and a best checkpoint forgotten that is not where it was."""
        before = self._callback_arguments()
        super()._load_callback_state()
        for name, arguments in self._callback_arguments().items():
            if arguments != before.get(name):
                logger.warning(
                    f"{name} goes on as the checkpoint has it, with {arguments} and not with {before.get(name)}; "
                    "restore_callback_states_from_checkpoint=False begins it anew"
                )
        self._lost_patience = self.args.restore_callback_states_from_checkpoint and any(
            isinstance(each, EarlyStoppingCallback)
            and each.early_stopping_patience_counter >= each.early_stopping_patience
            for each in self.callback_handler.callbacks
        )
        if self._resumed_from is not None:
            saved = TrainerState.load_from_json(str(self._resumed_from / TRAINER_STATE))
            self.state.best_model_checkpoint = checkpoints.best_beside(self._resumed_from, saved.best_model_checkpoint)

    def _callback_arguments(self) -> dict[str, Any]:
        """How the callbacks that have a state were built, by class."""
        stateful = (each for each in self.callback_handler.callbacks if isinstance(each, ExportableState))
        return {type(each).__name__: each.state().get("args") for each in stateful}

    def _clear_callback_states(self) -> None:
        """Make room for the states of callbacks. Of several of a class transformers appends to those of earlier saves,
        of which it later reads the first, and of one that the resumed run did not have it finds no place."""
        callbacks = [*self.callback_handler.callbacks, self.control]
        counts = Counter(type(each).__name__ for each in callbacks if isinstance(each, ExportableState))
        states: Any = self.state.stateful_callbacks
        states.update({name: [] if count > 1 else {} for name, count in counts.items()})

    def _run_epoch(self, model: nn.Module, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        """Called also for what is left of the last epoch when all steps are taken; takes one before it looks."""
        if self._lost_patience:
            logger.warning(
                f"the run of {self._resumed_from} had been stopped early, and takes no further step; "
                "restore_callback_states_from_checkpoint=False has it go on"
            )
        if self._lost_patience or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if getattr(train_dataloader, "persistent_workers", False) and train_dataloader._iterator is not None:
            # As an iterator that is new draws, which a resumed run has: rows are shuffled with what comes after it.
            torch.empty((), dtype=torch.int64).random_()
        self._epoch, self._put_back = epoch, generators_now()
        super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self._guard.began:
            self._before_step = deepcopy(self._progress())
            self._seen_before = self.state.num_input_tokens_seen, self.current_flos
            self._logs_before = deepcopy(self._logs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, *args: Any, **options: Any
    ) -> None:
        """Called at the end of a step, and of an epoch, which a callback may have brought about amid a step."""
        if self._guard.began:
            self._give_up_step(model)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **options)
        self._put_back = generators_now()

    def _give_up_step(self, model: nn.Module) -> None:
        """Go back to the end of the last step: what was begun since is no part of what is logged, saved and resumed."""
        model.zero_grad()
        self._guard.reset()
        self._step, self._buffered_inputs, self._current_train_step_time = 0, None, 0.0
        self._logs = self._logs_before
        self._metrics["train"].clear()
        self._take_back(self._before_step)
        self._observers.forget_step()
        self.state.num_input_tokens_seen, self.current_flos = self._seen_before
        self._put_back()
        if self.is_world_process_zero():
            self.recorder.drop_rollouts(self.state.global_step)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        """Not at the start (`eval_on_start`, of which `skip_scheduler` tells) of a run that had started before: it
        would be on record, and count for callbacks, once more than where nothing was resumed."""
        if skip_scheduler and self._resumed_from is not None:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The mean loss is of all steps that were taken; transformers has that of this call's, skipped ones among them,
        or a sum where there was none."""
        path = None if self._resumed_from is None else self._progress_file(str(self._resumed_from))
        if path is not None and path.exists() and not self._goes_on:  # no step has asked for it
            self._go_on_from(PROGRESS.read(path))
        steps = self.state.global_step - (0 if self._goes_on else self._initial_global_step)
        if steps:
            taken = steps - (self._guard.skipped - self._skipped_before)
            total = self._total_loss_scalar + self._tr_loss.item()
            self._mean_loss = total / taken if taken else math.nan
        output = super()._finalize_training(*args, **kwargs)
        return output if self._mean_loss is None else output._replace(training_loss=self._mean_loss)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write it beside, seal it, and rename it into place; then remove those that `save_total_limit` leaves over."""
        directory = Path(self._get_output_dir(trial))
        step, name = self.state.global_step, f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        if self.accelerator.is_local_main_process:
            checkpoints.clear_partial(directory)
        self.accelerator.wait_for_everyone()
        description = self._describe_run()
        self._clear_callback_states()
        self._unfinished = directory / checkpoints.PARTIAL
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(self._unfinished / name):
                self.state.best_model_checkpoint = str(directory / name)
                if self.args.should_save:
                    self.state.save_to_json(str(self._unfinished / name / TRAINER_STATE))
        finally:
            self._unfinished = None
        # The second round is for nodes whose disks are their own.
        for publishes in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
            self.accelerator.wait_for_everyone()
            if publishes and (directory / checkpoints.PARTIAL / name).exists():
                resume.write(directory / checkpoints.PARTIAL / name, description)
                checkpoints.write_reach(directory, directory / checkpoints.PARTIAL / name)
                checkpoints.seal(directory / checkpoints.PARTIAL / name, checksums=self.args.checkpoint_checksums)
                checkpoints.publish(directory, name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.prune(directory, step, self.args.save_total_limit, [self.state.best_model_checkpoint])
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(directory / name))

    def _load_best_model(self) -> None:
        """As in transformers, which loads it unseen: it may have been saved hours ago, or be named by another run."""
        best = Path(str(self.state.best_model_checkpoint))
        check_checkpoint(best)  # a resumed trainer_state.json may name any
        self._ranks.from_first(lambda: checkpoints.verify(best))
        super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # else it is about to be renamed, and is pushed then
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        PROGRESS.write(self._progress_file(output_dir), self._progress())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._put_back = generators_now()
        if checkpoint is None:
            return
        path, progress = self._progress_file(checkpoint), None
        if path.exists():  # another trainer writes none, and fewer processes fewer
            progress = PROGRESS.read(path)
            self._go_on_from(progress)
        # The same on every process, of which there may be more now.
        states, memories, guard = self._ranks.from_first(
            lambda: [(progress or {}).get(name) or {} for name in ("schedules", "memories", "guard")]
        )
        if guard:
            self._guard.load(guard)
            self._skipped_before = 0 if self._goes_on else self._guard.skipped
        self._observers.load_state_dict(states, memories, accept_changes=self._accept_changes)

    def _progress_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / progress_name(self.accelerator.process_index)

    def _progress(self) -> dict[str, Any]:
        """What this process has added up since the last log, and counted since the first step: JSON keeps every bit."""
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
            "sums": self._sums["train"].state_dict(),
            "schedules": self._observers.state_dict(),
            "memories": self._observers.memories(),
            "guard": self._guard.state(),
        }

    def _go_on_from(self, progress: Mapping[str, Any]) -> None:
        self._goes_on = True
        self._take_back(progress)

    def _take_back(self, progress: Mapping[str, Any]) -> None:
        self._tr_loss.fill_(progress["loss"])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]
        self._metrics["train"].update(progress["metrics"])
        self._sums["train"].load_state_dict(progress["sums"])
        self._guard.load(progress["guard"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, and also where that writes no model: under FSDP2 with sharded checkpoints, and with
        DeepSpeed before it has wrapped the model."""
        state = self.accelerator.state
        if not _internal_call and self.is_fsdp_enabled and "SHARDED" in str(state.fsdp_plugin.state_dict_type):
            weights = self.accelerator.get_state_dict(self.model)
        elif not _internal_call and self.is_deepspeed_enabled and self.model_wrapped is self.model:
            weights = None
        else:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """An adapter too is saved with the ids that end its completions, which its base may not know; and with a name
        of its base that is found from other folders."""
        super()._save(output_dir, state_dict)
        if without_adapters(self.model) is not self.model:
            directory = str(self.args.output_dir if output_dir is None else output_dir)
            GenerationConfig(eos_token_id=self.vocabulary.stop_ids).save_pretrained(directory)
            name_base(Path(directory), self.model)
