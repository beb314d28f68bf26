"""One run: a student trained by one method, scored before, during and after, and everything left on disk.

A run directory holds config.yaml (a recipe with every default filled in), provenance.json, metrics.jsonl, evals.jsonl,
held_out.jsonl, rollouts.jsonl, checkpoints, evaluations/ (results per problem), model/ and, once finished,
results.json. Calling again continues: finished parts are kept, an interrupted run starts from its last complete
checkpoint, and another configuration in the same directory is refused.

Left out on purpose: several methods (`trb.studies.comparison`), settings and seeds (`trb.studies.sweep`), machines
other than this one, and drawing (`trb.report`).
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from trb import records
from trb.models.generators import generators_kept
from trb.records import CONFIG, EVALS, EVALUATIONS, MODEL, RESULTS, SKIPPED
from trb.safety.files import remove
from trb.safety.untrusted import check_checkpoint, printable
from trb.studies import provenance
from trb.studies.claims import left_as_found
from trb.studies.directories import (
    begin,
    check_claim,
    finish_ending,
    finish_pruning,
    finished_results,
    has_begun_with,
    is_damaged,
    is_last,
    models_of,
    named_checkpoint,
    seal_run,
    size_of_run,
    sole_run,
    state_of,
    warn_of_other_models,
    written_by_run,
)
from trb.studies.disks import explained_disk_errors, require_space
from trb.studies.keys import RunConfig
from trb.studies.listener import Listener
from trb.studies.material import Material, RunDirectoryError, free_memory, load_material, lora
from trb.studies.packages import require_packages
from trb.studies.recipe import Recipe
from trb.studies.scores import check_suites, evaluate_suites, judge_of, mean_of_suites
from trb.studies.yaml_files import ConfigError
from trb.tasks.grading import Verifier
from trb.tasks.reward_free import Judge
from trb.training import checkpoints, doubts
from trb.training.config import TRBConfig
from trb.training.methods import name_of
from trb.training.ranks import Ranks
from trb.training.recording import drop_after_step, read_records
from trb.training.trainer import TRBTrainer

__all__ = ["train", "train_in"]

logger = logging.getLogger(__name__)

_KEPT_LOGS = 10


def train(
    recipe: Recipe,
    output_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    accept_changes: bool = False,
    listener: Listener | None = None,
    initial_scores: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train one student, evaluating it before, during and after; returns what results.json holds.

    Args:
        recipe: a checked recipe (`trb.studies.recipe.load_recipe`).
        output_dir: the run directory. A finished run with this recipe is returned as it is; an interrupted one goes on
            from its last complete checkpoint.
        overwrite: remove the run that the directory holds, and start over.
        accept_changes: go on from a checkpoint though the recipe, the data or the models have changed, with a warning.
            What was measured before stays as it was measured.
        listener: hears about progress.
        initial_scores: what `evaluate_suites` said of the untrained student, where that is known already.

    Raises:
        ConfigError: the trainer refuses a value.
        RunDirectoryError: the directory holds another run, cannot be written, or its disk lacks the space.
        DiskFullError: the disk filled up while saving. Earlier checkpoints and metrics are intact.
        ValueError, OSError: models or data cannot be loaded, or do not go together.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe is {recipe!r:.80}: load it, as with trb.studies.recipe.load_recipe")
    if recipe.run.methods:
        raise ConfigError(f"{recipe.source} has methods: choose one with for_method, or use compare")
    listener, args = listener or Listener(), recipe.training_config(output_dir)
    listener.plan({name_of(args): max(0, args.max_steps)})
    return train_in(recipe, Path(output_dir), name_of(args), initial_scores, overwrite, listener, accept_changes)


# ---- one run ----


def train_in(
    recipe: Recipe,
    directory: Path,
    name: str,
    before: list[dict[str, Any]] | None,
    overwrite: bool,
    listener: Listener,
    accept_changes: bool,
) -> dict[str, Any]:
    """`train` under a name, with the initial student's scores where they are known already."""
    args = recipe.training_config(directory)
    finished = None if overwrite else Ranks.of_launch().from_first(lambda: finished_results(directory, recipe))
    if finished is not None:
        if args.process_index == 0:
            finish_ending(directory, args)
            warn_of_other_models(directory, models_of(recipe.run))
        listener.kept(name)
        return finished
    with sole_run(directory, first=args.process_index == 0):
        return _train_alone(recipe, args, directory, name, before, overwrite, listener, accept_changes)


# long because what may be refused comes first, in one place, and the steps of a run one after another
def _train_alone(
    recipe: Recipe,
    args: TRBConfig,
    directory: Path,
    name: str,
    before: list[dict[str, Any]] | None,
    overwrite: bool,
    listener: Listener,
    accept_changes: bool,
) -> dict[str, Any]:
    """The run itself, in a directory that nobody else writes to."""
    run = recipe.run
    require_packages(args, run.teacher_quantization)
    checkpoint = _start(recipe, args, directory, overwrite, accept_changes)
    listener.stage(f"{name}: loading models and data")
    material = load_material(run, args, doubtful=before is None)  # a comparison or a study has said it
    if args.process_index == 0:
        doubts.warn(doubts.of_settings(args, doubts.steps_of(args, len(material.prompts))))
    require_space(directory, material.student, run, args, freed=size_of_run(directory) if overwrite else 0)
    judge = None if run.teachers else judge_of(material.teacher, material.vocabulary, material.problems, args)
    with Verifier(run.reward_timeout_s) as verifier, explained_disk_errors(directory):
        score = partial(
            evaluate_suites,
            tokenizer=material.tokenizer,
            problems=material.problems,
            run=run,
            args=args,
            verifier=verifier,
            vocabulary=material.vocabulary,
            judge=judge,
        )
        observer = _Observer(directory, name, run.eval_every if material.problems else 0, score, listener)
        trainer = observer.trainer = _trainer(material, run, args, verifier, observer)
        _check(trainer, material, judge, recipe, directory, checkpoint, accept_changes)
        with left_as_found(_at_risk(directory, args, checkpoint), partial(_has_begun, trainer, directory, checkpoint)):
            # Not before: a run that cannot start must not claim the directory.
            _claim(trainer, directory, recipe, checkpoint, overwrite)
            if observer.scores_at(0) is None:
                observer.measure(0) if before is None else observer.keep(0, before)
            start = time.monotonic()
            _take_steps(trainer, checkpoint, accept_changes)
        seconds = round(time.monotonic() - start, 1)
        steps = trainer.state.global_step
        if run.save_final_model:
            listener.stage(f"{name}: saving the model")
            _save_model(trainer, directory)
        observer.measure(steps)
        trained = mean_of_suites(observer.scores_at(steps) or []) | {"steps": steps, "train_seconds": seconds}
        results = {
            "student": mean_of_suites(observer.scores_at(0) or []),
            name: trained | _ends(directory),
            "provenance": provenance.describe(),
        }
        if args.process_index == 0:
            RESULTS.write(directory / RESULTS, results)
            seal_run(directory, args)
    listener.finished(name)
    del trainer, observer, material, score, judge
    free_memory()
    return results


def _start(recipe: Recipe, args: TRBConfig, directory: Path, overwrite: bool, accept_changes: bool) -> Path | None:
    """The checkpoint that the run goes on from; None for a run that begins."""
    if overwrite:
        named = named_checkpoint(args.resume_from_checkpoint)
        if named is not None and named.resolve().is_relative_to(directory.resolve()):
            raise RunDirectoryError(
                f"resume_from_checkpoint is {args.resume_from_checkpoint!r}, which --overwrite would remove; leave "
                "one of the two out"
            )
        return named
    found = Ranks.of_launch().from_first(partial(checkpoints.latest, directory))
    own = check_claim(directory, recipe, found, accept_changes)
    name = args.resume_from_checkpoint
    if own is not None and name and Ranks.of_launch().from_first(partial(has_begun_with, directory, name)):
        if args.process_index == 0:
            logger.warning(printable(f"{directory} goes on from its own {own}, and not from {name} once more"))
        return own
    if (named := named_checkpoint(name)) is not None and args.process_index == 0:
        logger.info(printable(f"{directory} begins with {named}"))
    checkpoint = named or own
    if checkpoint is None and checkpoints.numbered(directory):
        raise RunDirectoryError(
            f"{checkpoints.none_whole(directory)}, and starting over would drop what it has measured. Use another "
            "output directory, or --overwrite to remove what is there"
        )
    return checkpoint


def _check(
    trainer: TRBTrainer,
    material: Material,
    judge: Judge | None,
    recipe: Recipe,
    directory: Path,
    checkpoint: Path | None,
    accept_changes: bool,
) -> None:
    """Whatever can be refused before the directory is written to."""
    trainer.check_prompts()
    check_suites(material.student, material.tokenizer, material.problems, recipe.run, trainer.args, judge)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    config = directory / CONFIG
    unknown = Ranks.of_launch().from_first(lambda: is_damaged(config))
    if checkpoint is not None and not accept_changes and (unknown or not is_last(checkpoint, trainer.args)):
        trainer.check_same_run(checkpoint)


def _at_risk(directory: Path, args: TRBConfig, checkpoint: Path | None) -> list[Path]:
    """What may have to be put back. A run that goes on drops measurements after its checkpoint, whatever comes then."""
    if args.process_index:
        return []
    measured = (
        [] if checkpoint is None else [path for file in records.MEASUREMENTS if (path := directory / file).exists()]
    )
    return [path for path in written_by_run(directory) if path not in measured]


def _has_begun(trainer: TRBTrainer, directory: Path, checkpoint: Path | None) -> bool:
    """Whether a step has been taken, or one that could not be is on record."""
    done = 0 if checkpoint is None else state_of(checkpoint).global_step
    return trainer.state.global_step > done or any((directory / SKIPPED).glob("*"))


def _claim(trainer: TRBTrainer, directory: Path, recipe: Recipe, checkpoint: Path | None, overwrite: bool) -> None:
    args = trainer.args
    if not overwrite:
        # Before the directory says which checkpoint its run has begun with: those that it keeps are then its own.
        trainer.set_aside_others(checkpoint)
    if args.process_index == 0:
        begin(directory, recipe, afresh=checkpoint is None, overwrite=overwrite)
        if checkpoint is not None and checkpoint.parent.samefile(directory):
            finish_pruning(directory, checkpoint, args)
    args.distributed_state.wait_for_everyone()


def _trainer(
    material: "Material", run: RunConfig, args: TRBConfig, verifier: Verifier, observer: "_Observer"
) -> TRBTrainer:
    set_seed(args.seed)  # before adapters are initialised
    trainer = TRBTrainer(
        model=material.student,
        teacher_model=material.teacher,
        args=args,
        train_dataset=material.prompts,
        eval_dataset=material.held_out,
        processing_class=material.tokenizer,
        teacher_processing_class=material.teacher_tokenizer,
        reward_fn=verifier.score,
        peft_config=lora(run, material.student),
        callbacks=[observer],
    )
    trainer.doubts_said = True  # here, before anything is evaluated
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _take_steps(trainer: TRBTrainer, checkpoint: Path | None, accept_changes: bool) -> None:
    """Train to the end, from a checkpoint where there is one. Raises ValueError for one that could run code."""
    if checkpoint is None:
        trainer.args.eval_on_start = trainer.eval_dataset is not None
        trainer.train()
    else:
        # Verified it was, before anything was loaded. What is left of a run with no step to take is told by neither
        # settings nor data.
        accepted = accept_changes or is_last(checkpoint, trainer.args)
        trainer.train(resume_from_checkpoint=str(checkpoint), verify=False, accept_changes=accepted)


class _Observer(TrainerCallback):
    """Evaluates during training, keeps evals.jsonl in step with the checkpoints, and tells the listener."""

    trainer: TRBTrainer

    def __init__(self, directory: Path, name: str, every: int, score: Any, listener: Listener) -> None:
        self.directory, self.name, self.every, self.score, self.listener = directory, name, every, score, listener
        self.path = directory / EVALS
        self._logs: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            drop_after_step(self.path, state.global_step)
            for folder in (self.directory / EVALUATIONS).glob("*"):
                if (records.named_step(folder) or 0) > state.global_step:
                    shutil.rmtree(folder)
        self.listener.run(self.name, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._logs = dict(logs or {})
        # metrics.jsonl has them all. Here they would fill the memory, and each checkpoint's trainer_state.json.
        del state.log_history[:-_KEPT_LOGS]
        if "loss" in self._logs:
            self.listener.step(state.global_step, self._logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run without its ends says little. The trainer sees to the last; of the first, callers of its own decide.
        if state.global_step == 1 and args.logging_strategy != "no":
            control.should_log = True
        if not control.should_log:
            self.listener.step(state.global_step, self._logs)
        # The last evaluation comes after training, when the model has been saved.
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.measure(state.global_step)
            self.listener.run(self.name, state.global_step, state.max_steps)

    def measure(self, step: int) -> None:
        """Evaluate the student as it is now and record the scores under `step`; the steps that follow draw what they
        would have drawn without it."""
        student = self.trainer.sampling_student()
        folder = self.directory / EVALUATIONS / records.step_name(step)
        shown = step in (0, self.trainer.state.max_steps)  # a report lays the first beside the last
        label = f"{self.name}: step {step}"
        with generators_kept():
            scores = self.score(
                student, folder=folder, label=label, listener=self.listener, save_completions=int(shown)
            )
        self.keep(step, scores)

    def keep(self, step: int, scores: list[dict[str, Any]]) -> None:
        """Record scores under `step`, in place of any that are there."""
        if scores and self.trainer.args.process_index == 0:
            drop_after_step(self.path, step - 1)
            EVALS.append(self.path, [{"step": step, **score} for score in scores])
        self.trainer.accelerator.wait_for_everyone()

    def scores_at(self, step: int) -> list[dict[str, Any]] | None:
        """The recorded scores of `step`, or None; the first process reads for all, so that they decide alike."""
        return Ranks.of_launch().from_first(lambda: self._recorded(step))

    def _recorded(self, step: int) -> list[dict[str, Any]] | None:
        recorded = (record for record in read_records(self.path) if record["step"] == step)
        found = [{key: record[key] for key in record if key != "step"} for record in recorded]
        return found or None


def _ends(directory: Path) -> dict[str, Any]:
    """The first and the last loss: of the steps, and on held-out prompts, which is of the student's own rollouts
    whatever the sampler was."""
    found = {}
    keys = ("step", "loss", "trb/teacher_log_prob")
    for name, file in (("training", records.METRICS), ("held_out", records.HELD_OUT)):
        if recorded := read_records(directory / file):
            ends = zip(("before", "after"), (recorded[0], recorded[-1]), strict=True)
            found[name] = {end: {key: record.get(key) for key in keys} for end, record in ends}
    return found


def _save_model(trainer: TRBTrainer, directory: Path) -> None:
    """Write model/ so that it is never seen half written."""
    partial_copy, target = directory / records.MODEL_PARTIAL, directory / MODEL
    if trainer.args.process_index == 0:
        remove(partial_copy)  # what a kill has left there would be part of the model
    trainer.save_model(str(partial_copy))
    if trainer.args.process_index == 0:
        (partial_copy / "training_args.bin").unlink(missing_ok=True)  # config.yaml says it, and no code in it
        (partial_copy / records.CARD).write_text(trainer.model_card(), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial_copy.rename(target)
    trainer.accelerator.wait_for_everyone()
