"""Experiments: train one method, or several from the same start, and leave everything on disk that a reader needs.

A run directory holds config.yaml (a recipe with every default filled in), provenance.json, metrics.jsonl, evals.jsonl,
held_out.jsonl, rollouts.jsonl, checkpoints, evaluations/ (results per problem), model/ and, once finished,
results.json. A comparison directory holds recipe.yaml, evaluations/ of the student and the teacher, one run directory
per method, and results.json. Calling again continues: finished parts are kept, an interrupted run starts from its last
complete checkpoint, and another configuration in the same directory is refused.

Methods of a comparison start from the same weights, see the same prompts in the same order and, because every draw is
a function of (seed, prompt, rollout, position), share their noise: paired comparisons have less variance.

Left out on purpose: sweeps over settings and seeds, machines other than this one, and drawing (`trb.report`).
"""

import errno
import gc
import json
import logging
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from trb import records
from trb.models.loading import load_model, load_tokenizer, take_template
from trb.models.memory import memory_estimate
from trb.models.modeling import without_adapters
from trb.records import CONFIG, EVALS, EVALUATIONS, MODEL, RECIPE, RESULTS, SCORES, SKIPPED, TRAINER_STATE
from trb.safety.files import exclusive, remove, remove_unfinished, write_text
from trb.safety.templates import PLAIN_TEMPLATE
from trb.safety.untrusted import parse_yaml
from trb.studies import provenance
from trb.studies.keys import RunConfig, is_method_name
from trb.studies.recipe import Recipe
from trb.studies.statistics import combined_interval
from trb.studies.yaml_files import ConfigError
from trb.tasks.evaluation import BENCHMARKS, evaluate, load_benchmark
from trb.tasks.grading import Verifier
from trb.tasks.prompts import check_lengths, load_prompts
from trb.training import checkpoints, resume
from trb.training.checkpoints import CheckpointError
from trb.training.config import TRBConfig
from trb.training.methods import name_of
from trb.training.ranks import Ranks
from trb.training.recording import drop_after_step, read_records
from trb.training.sharding import loaded_whole
from trb.training.trainer import TRBTrainer
from trb.vocab import SharedVocabulary, check_same_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "DiskFullError",
    "Listener",
    "RunDirectoryError",
    "compare",
    "evaluate_suites",
    "holds_scores",
    "load_pair",
    "load_student",
    "load_tokenizers",
    "make_again",
    "mean_of_suites",
    "model_of_run",
    "precision",
    "problem_sets",
    "read_results",
    "sole_run",
    "template_options",
    "train",
]

logger = logging.getLogger(__name__)


# What may differ when a run is continued: how long it is (the trainer refuses that where its schedule depends on it),
# and what it leaves behind, not what it computes.
_MAY_CHANGE = {*resume.FREE, *resume.LENGTH, "eval_every", "eval_max_rows", "save_final_model"}
_OF_A_RUN = (*records.MEASUREMENTS, CONFIG, records.PROVENANCE, RESULTS)
_SEALED = (*_OF_A_RUN, RECIPE, MODEL, EVALUATIONS, SKIPPED)
_REMOVED = (*_OF_A_RUN, records.REPORT, records.CHECKSUMS, MODEL, records.MODEL_PARTIAL, EVALUATIONS, SKIPPED)
_CPU_CACHE_BYTES = 2 << 30
_FULL_BYTES = 1 << 20
_KEPT_LOGS = 10
_MOST_ROWS = 512


class RunDirectoryError(ValueError):
    """An output directory that cannot be used for this run; the message says why and what to do."""


class DiskFullError(OSError):
    """The disk filled up while saving; the message says what is intact and how to go on."""


class Listener:
    """Hears what an experiment is doing. This one is silent; a display overrides what it needs."""

    def plan(self, runs: Mapping[str, int]) -> None:
        """The runs to come, by name, with the optimizer steps of each."""

    def stage(self, text: str) -> None:
        """What happens from now on, in a few words."""

    def run(self, name: str, done: int, steps: int) -> None:
        """A run begins to train, at step `done` of `steps`."""

    def step(self, step: int, logs: Mapping[str, Any]) -> None:
        """An optimizer step has been taken; `logs` holds the latest metrics."""

    def finished(self, name: str) -> None:
        """A run is complete."""


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
    if recipe.run.methods:
        raise ConfigError(f"{recipe.source} has methods: choose one with for_method, or use compare")
    listener, args = listener or Listener(), recipe.training_config(output_dir)
    listener.plan({name_of(args): max(0, args.max_steps)})
    return _train(recipe, Path(output_dir), name_of(args), initial_scores, overwrite, listener, accept_changes)


def compare(
    recipe: Recipe,
    output_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    accept_changes: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train every entry of `methods` from the same student; returns what results.json holds.

    The student and the teacher are evaluated once, and each method has a run directory of its name. What is finished
    is not repeated. Arguments and errors are those of `train`; ConfigError also for a recipe without methods or
    evaluation data. `accept_changes` is for single methods and for the length of training: what all methods share
    stays as it is.
    """
    listener, directory = listener or Listener(), Path(output_dir)
    for needed in ("methods", "eval_data"):
        if not getattr(recipe.run, needed):
            raise ConfigError(f"{recipe.source}: {needed} is empty; a comparison needs at least one entry")
    recipes = {name: recipe.for_method(name) for name in recipe.run.methods}
    args = recipe.training_config(directory)
    with ExitStack() as held:
        held.enter_context(sole_run(directory, first=args.process_index == 0))
        if overwrite and args.process_index == 0:
            names = _listed_methods(directory) | set(recipes)
            for run in (directory / name for name in names if (directory / name).is_dir()):
                held.enter_context(sole_run(run, first=args.process_index == 0))
            _clear_comparison(directory, names)
        args.distributed_state.wait_for_everyone()
        _check_shared_recipe(directory, recipe)
        for name, variant in recipes.items():
            # Sizes will do here: contents are compared once more before anything is resumed from.
            checkpoint = checkpoints.latest(directory / name, contents=False, warn=None)
            _check_claim(directory / name, variant, checkpoint, accept_changes, warn=False)
        for name in recipes:  # all of them, before the first one takes its hours
            held.enter_context(sole_run(directory / name, first=args.process_index == 0))
        return _compare_alone(recipe, recipes, args, directory, listener, accept_changes)


def _compare_alone(
    recipe: Recipe,
    recipes: Mapping[str, Recipe],
    args: TRBConfig,
    directory: Path,
    listener: Listener,
    accept_changes: bool,
) -> dict[str, Any]:
    """The comparison itself, in directories that nobody else writes to."""
    listener.plan({name: max(0, variant.training_config(directory).max_steps) for name, variant in recipes.items()})
    with _explained_disk_errors(directory):
        initial = _initial_scores(recipe, args, directory, listener)
        results = {"student": mean_of_suites(initial["student"])}
        for name, variant in recipes.items():
            finished = _train(variant, directory / name, name, initial["student"], False, listener, accept_changes)
            results[name] = finished[name]
            complete = {**results, "teacher": mean_of_suites(initial["teacher"]), "provenance": provenance.describe()}
            if args.process_index == 0:
                RESULTS.write(directory / RESULTS, complete)
        if args.process_index == 0:
            _seal(directory, args)
    return complete


# ---- one run ----


def _train(
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
    finished = None if overwrite else Ranks.of_launch().from_first(lambda: _finished_results(directory, recipe))
    if finished is not None:
        listener.finished(name)
        return finished
    with sole_run(directory, first=args.process_index == 0):
        if overwrite and args.process_index == 0:
            _clear(directory)
        args.distributed_state.wait_for_everyone()
        return _train_alone(recipe, args, directory, name, before, listener, accept_changes)


def _train_alone(
    recipe: Recipe,
    args: TRBConfig,
    directory: Path,
    name: str,
    before: list[dict[str, Any]] | None,
    listener: Listener,
    accept_changes: bool,
) -> dict[str, Any]:
    """The run itself, in a directory that nobody else writes to."""
    run = recipe.run
    found = Ranks.of_launch().from_first(partial(checkpoints.latest, directory))
    checkpoint = _check_claim(directory, recipe, found, accept_changes)
    checkpoint = _named_checkpoint(args.resume_from_checkpoint) or checkpoint
    if checkpoint is None and checkpoints.numbered(directory):
        raise RunDirectoryError(
            f"{checkpoints.none_whole(directory)}, and starting over would drop what it has measured. Use another "
            "output directory, or --overwrite to remove what is there"
        )
    listener.stage(f"{name}: loading models and data")
    material = _load(run, args)
    _require_space(directory, material.student, run, args)
    with Verifier(run.reward_timeout_s) as verifier, _explained_disk_errors(directory):
        score = partial(
            evaluate_suites,
            tokenizer=material.tokenizer,
            problems=material.problems,
            run=run,
            args=args,
            verifier=verifier,
            vocabulary=material.vocabulary,
        )
        observer = _Observer(directory, name, run.eval_every if material.problems else 0, score, listener)
        trainer = observer.trainer = _trainer(material, run, args, verifier, observer)
        trainer.check_prompts()
        config = directory / CONFIG
        unknown = Ranks.of_launch().from_first(lambda: _is_damaged(config))
        if checkpoint is not None and not accept_changes and (unknown or not _is_last(checkpoint, args)):
            trainer.check_same_run(checkpoint)
        if args.process_index == 0:
            # Not before: a run that cannot start must not claim the directory.
            _begin(directory, recipe, afresh=checkpoint is None)
            if checkpoint is not None and args.resume_from_checkpoint is None:
                _finish_pruning(directory, checkpoint, args)
        args.distributed_state.wait_for_everyone()
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
            name: trained | _held_out_summary(directory),
            "provenance": provenance.describe(),
        }
        if args.process_index == 0:
            RESULTS.write(directory / RESULTS, results)
            _seal(directory, args)
    listener.finished(name)
    del trainer, observer, material, score
    _free_memory()
    return results


def _seal(directory: Path, args: TRBConfig) -> None:
    """Checksums of what a run or a comparison has left, its checkpoints apart, which have their own."""
    files = [directory / name for name in _SEALED]
    checkpoints.seal(directory, checksums=args.checkpoint_checksums, files_of=files)


def _trainer(
    material: "_Material", run: RunConfig, args: TRBConfig, verifier: Verifier, observer: "_Observer"
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
        peft_config=_lora(run),
        callbacks=[observer],
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _take_steps(trainer: TRBTrainer, checkpoint: Path | None, accept_changes: bool) -> None:
    """Train to the end, from a checkpoint where there is one. Raises ValueError for one that could run code."""
    if checkpoint is None:
        trainer.args.eval_on_start = trainer.eval_dataset is not None
        trainer.train()
    elif _is_last(checkpoint, trainer.args):
        # transformers would take one more step than asked for.
        if checkpoint.parent == Path(str(trainer.args.output_dir)):
            Ranks.of_launch().from_first(partial(checkpoints.check_reach, checkpoint))
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = _state_of(checkpoint)
    else:
        # Verified it was, before anything was loaded.
        trainer.train(resume_from_checkpoint=str(checkpoint), verify=False, accept_changes=accept_changes)


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
        if not control.should_log:
            self.listener.step(state.global_step, self._logs)
        # The last evaluation comes after training, when the model has been saved.
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.measure(state.global_step)
            self.listener.run(self.name, state.global_step, state.max_steps)

    def measure(self, step: int) -> None:
        """Evaluate the student as it is now and record the scores under `step`."""
        student = self.trainer.sampling_student()
        folder = self.directory / EVALUATIONS / records.step_name(step)
        self.keep(step, self.score(student, folder=folder, label=f"{self.name}: step {step}", listener=self.listener))

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


def _held_out_summary(directory: Path) -> dict[str, Any]:
    """The first and the last measurement on held-out prompts: the student's own rollouts, whatever the sampler was."""
    recorded = read_records(directory / records.HELD_OUT)
    if not recorded:
        return {}
    ends = zip(("before", "after"), (recorded[0], recorded[-1]), strict=True)
    keys = ("step", "loss", "trb/teacher_log_prob")
    return {"held_out": {name: {key: record.get(key) for key in keys} for name, record in ends}}


def _lora(run: RunConfig) -> Any:
    if not run.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=run.lora_rank,
        lora_alpha=run.lora_alpha,
        lora_dropout=0.0,
        target_modules=run.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def _save_model(trainer: TRBTrainer, directory: Path) -> None:
    """Write model/ so that it is never seen half written."""
    partial_copy, target = directory / records.MODEL_PARTIAL, directory / MODEL
    if trainer.args.process_index == 0:
        remove(partial_copy)  # what a kill has left there would be part of the model
    trainer.save_model(str(partial_copy))
    if trainer.args.process_index == 0:
        (partial_copy / "training_args.bin").unlink(missing_ok=True)  # config.yaml says it, and no code in it
        shutil.rmtree(target, ignore_errors=True)
        partial_copy.rename(target)
    trainer.accelerator.wait_for_everyone()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- models and data ----


def load_tokenizers(run: RunConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The student's tokenizer, with the recipe's chat template, and the teacher's.

    Raises:
        ValueError: the two are different tokenizers.
        RunDirectoryError: one of them lies in a run or a checkpoint that is damaged (`check_seal`).
    """
    for spec in dict.fromkeys((run.student, run.teacher)):
        check_seal(spec)
    student = load_tokenizer(
        run.student, trust_remote_code=run.student_trust_remote_code, revision=run.student_revision
    )
    teacher = load_tokenizer(
        run.teacher, trust_remote_code=run.teacher_trust_remote_code, revision=run.teacher_revision
    )
    check_same_tokenizer(student, teacher)
    if run.chat_template is not None:
        take_template(student, run.chat_template, _template(run.chat_template))
    return student, teacher


def _template(name: str) -> str:
    if name == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"chat_template is {name!r}, neither plain nor a readable file: {why}") from error


def model_of_run(spec: str) -> str:
    """The trained model of a run directory; any other spec is itself."""
    model = Path(spec).expanduser() / MODEL
    return spec if not model.is_dir() or (model.parent / "config.json").exists() else str(model)


def check_seal(spec: str) -> None:
    """Compare a run's model, or a checkpoint that is used as a model, with the checksums that the run wrote.

    Raises:
        RunDirectoryError: a file differs.
    """
    path = Path(spec).expanduser()
    # Others may keep a file of this name beside their models.
    if (path.parent / CONFIG).exists():
        wrong = checkpoints.differing(path.parent, of=lambda name: name.startswith(f"{path.name}/"))
    else:
        wrong = {}
    if (path / TRAINER_STATE).exists():
        wrong |= checkpoints.differing(path)
    if wrong:
        raise RunDirectoryError(
            f"{path} is damaged: {'; '.join(wrong.values())}. The command that trained it makes its model again, from "
            "the last whole checkpoint"
        )


def load_student(run: RunConfig, *, for_training: bool = False) -> PreTrainedModel:
    """The student, pruned where the recipe says so. An adapter stays apart from its base, but for training."""
    return load_model(
        run.student,
        dtype=run.student_dtype,
        trust_remote_code=run.student_trust_remote_code,
        revision=run.student_revision,
        keep_layers=run.student_keep_layers,
        merge_adapter=for_training,
    )


def load_pair(run: RunConfig, *, for_training: bool = False) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The student and the teacher; see `load_student`."""
    student = load_student(run, for_training=for_training)
    teacher = load_model(
        run.teacher,
        dtype=run.teacher_dtype,
        trust_remote_code=run.teacher_trust_remote_code,
        revision=run.teacher_revision,
    )
    return student, teacher


@dataclass
class _Material:
    """What a run is made of, checked against each other."""

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    prompts: "Dataset"
    held_out: "Dataset | None"
    problems: dict[str, "Dataset"]
    student: PreTrainedModel
    teacher: PreTrainedModel
    vocabulary: SharedVocabulary


def _load(run: RunConfig, args: TRBConfig) -> _Material:
    """Load everything, what is cheap to find wrong first."""
    tokenizer, teacher_tokenizer = load_tokenizers(run)
    prompts, held_out = _training_prompts(run, args, tokenizer)
    problems = problem_sets(run)
    with loaded_whole(args):
        student, teacher = load_pair(run, for_training=True)
    vocabulary = SharedVocabulary.of_pair(student, teacher, tokenizer, teacher_tokenizer)
    return _Material(tokenizer, teacher_tokenizer, prompts, held_out, problems, student, teacher, vocabulary)


def _training_prompts(
    run: RunConfig, args: TRBConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple["Dataset", "Dataset | None"]:
    """The prompts to train on, and those held out to measure the loss on."""
    prompts = load_prompts(
        run.train_data,
        split=run.train_split,
        limit=run.train_limit,
        seed=run.train_seed,
        system_prompt=run.system_message,
        prompt_column=run.train_prompt_column,
        answer_column=run.train_answer_column,
        revision=run.train_revision,
    )
    prompts = check_lengths(prompts, tokenizer, run.max_prompt_length, run.overlong_prompts, **template_options(args))
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    needed = batch // args.num_generations
    if len(prompts) - run.held_out_prompts < needed:
        raise ConfigError(
            f"{run.train_data} has {len(prompts)} prompts, {run.held_out_prompts} of them held out: fewer than the "
            f"{needed} of one optimizer step are left; add prompts, or lower prompts_per_step or held_out_prompts"
        )
    if not run.held_out_prompts:
        return prompts, None
    held_out = set(random.Random(run.train_seed).sample(range(len(prompts)), run.held_out_prompts))
    return (
        prompts.select([index for index in range(len(prompts)) if index not in held_out]),
        prompts.select(sorted(held_out)),
    )


def problem_sets(run: RunConfig) -> dict[str, "Dataset"]:
    """The problems of every entry of `eval_data`, by its name."""
    return {name: _problems(name, run) for name in run.eval_data}


def _problems(name: str, run: RunConfig) -> "Dataset":
    benchmark, _, path = name.partition("=")
    if benchmark not in BENCHMARKS:
        return load_prompts(
            name, split=run.eval_split, limit=run.eval_limit, seed=run.eval_seed, system_prompt=run.system_message
        )
    problems = load_benchmark(benchmark, path or None)
    if run.eval_limit is None or run.eval_limit >= len(problems):
        return problems
    return problems.select(sorted(random.Random(run.eval_seed).sample(range(len(problems)), run.eval_limit)))


# ---- evaluation ----


def evaluate_suites(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    problems: Mapping[str, "Dataset"],
    run: RunConfig,
    args: TRBConfig,
    verifier: Verifier,
    folder: Path | None = None,
    label: str = "",
    listener: Listener | None = None,
    outcomes: dict[str, list[int]] | None = None,
    vocabulary: SharedVocabulary | None = None,
) -> list[dict[str, Any]]:
    """pass@1 of `model` on every problem set, as the lines of evals.jsonl without their step.

    Sampling runs in the precision of training. The processes of a launch share the problems, so `model` must be whole
    on each; the main one writes results per problem into `folder`, from where an interrupted evaluation goes on.
    `outcomes` is filled with the number of right answers to every problem, by problem set. `vocabulary` is as in
    `trb.tasks.evaluation.evaluate`.
    """
    longest = run.eval_max_new_tokens or int(args.max_completion_length or 0)
    scores = []
    for name, rows in problems.items():
        (listener or Listener()).stage(f"{label}: {len(rows)} problems of {name}")
        with precision(args):
            result = evaluate(
                model.to(args.device),  # type: ignore[arg-type]
                _with_template_options(tokenizer, template_options(args)),
                rows,
                n=run.samples_of(name),
                max_new_tokens=longest,
                temperature=run.eval_temperature,
                seed=run.eval_seed,
                max_rows=run.eval_max_rows or _rows_in_flight(model, run.max_prompt_length + longest, args.device),
                results_path=folder / records.problems_name(name) if folder else None,
                ranks=Ranks.of_launch(),
                verifier=verifier,
                name=name,
                progress=False,
                vocabulary=vocabulary,
            )
        if outcomes is not None:
            outcomes[name] = result.correct
        scores.append(result.to_dict())
    return scores


def mean_of_suites(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """One score from those of several problem sets: the unweighted mean of pass@1 (paper, section 6).

    The interval combines theirs as independent ones (`trb.studies.statistics.combined_interval`). The single scores
    stay under "suites". Without scores, pass_at_1 is None.
    """
    if not scores:
        return {"name": "", "pass_at_1": None, "interval": None}
    if len(scores) == 1:
        return dict(scores[0])
    count, samples = len(scores), sum(score["n_samples"] for score in scores)
    mean = math.fsum(score["pass_at_1"] for score in scores) / count
    low, high = combined_interval([(score["pass_at_1"], score["interval"]) for score in scores])
    weighted = {
        key: math.fsum(score[key] * score["n_samples"] for score in scores) / samples
        for key in ("mean_length", "stop_rate")
    }
    return {
        "name": "mean of " + ", ".join(score["name"] for score in scores),
        "pass_at_1": mean,
        "interval": [max(0.0, low), min(1.0, high)],
        "n_problems": sum(score["n_problems"] for score in scores),
        "n_samples": samples,
        **weighted,
        "suites": {score["name"]: score for score in scores},
    }


def _initial_scores(
    recipe: Recipe, args: TRBConfig, directory: Path, listener: Listener
) -> dict[str, list[dict[str, Any]]]:
    """Scores of the untrained student and of the teacher, both on the student's prompts; measured once, then read."""
    folder = directory / EVALUATIONS
    paths = {name: folder / records.role_name(name) for name in ("student", "teacher")}
    if args.process_index == 0:
        _check_sealed_scores(directory, paths)
    args.distributed_state.wait_for_everyone()
    missing = not all(path.exists() for path in paths.values())
    args.distributed_state.wait_for_everyone()  # nobody looks after somebody has written
    if missing:
        listener.stage("loading models and data")
        material = _load(recipe.run, args)
        if args.process_index == 0:
            write_text(directory / RECIPE, recipe.to_yaml())
        with Verifier(recipe.run.reward_timeout_s) as verifier:
            for name in paths:
                scores = evaluate_suites(
                    getattr(material, name),
                    tokenizer=material.tokenizer,
                    problems=material.problems,
                    run=recipe.run,
                    args=args,
                    verifier=verifier,
                    folder=folder / name,
                    label=f"{name} before training" if name == "student" else name,
                    listener=listener,
                    vocabulary=material.vocabulary,
                )
                if args.process_index == 0:
                    SCORES.write(paths[name], scores)
        del material
        _free_memory()
        args.distributed_state.wait_for_everyone()
    elif args.process_index == 0:
        write_text(directory / RECIPE, recipe.to_yaml())  # methods may have joined
    return {name: SCORES.read(path) for name, path in paths.items()}


def _check_sealed_scores(directory: Path, paths: Mapping[str, Path]) -> None:
    """Set damaged scores aside, so that they are measured again, and take the seal off what is written next."""
    wrong = checkpoints.differing(directory)
    for name, path in paths.items():
        if path.exists() and (f"{EVALUATIONS}/{path.name}" in wrong or not _read_scores(path)):
            logger.warning("%s is damaged; moved to %s, and the %s is scored again", path, set_aside(path).name, name)
    checkpoints.unseal(directory)


def _read_scores(path: Path) -> list[dict[str, Any]] | None:
    try:
        return list(SCORES.read(path))
    except (IsADirectoryError, ValueError):
        return None


def precision(args: TRBConfig) -> AbstractContextManager[Any]:
    """The autocast context that training runs in."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return nullcontext() if dtype is None else torch.autocast(args.device.type, dtype=dtype)


def template_options(args: TRBConfig) -> dict[str, Any]:
    """Keyword arguments of the chat template."""
    options = args.chat_template_kwargs or {}
    return dict(options) if isinstance(options, dict) else json.loads(options)


def _with_template_options(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template gets `options`, as the trainer's does."""
    if not options:
        return tokenizer
    tokenizer = copy(tokenizer)
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **options)  # type: ignore[method-assign]
    return tokenizer


def _rows_in_flight(model: PreTrainedModel, tokens: int, device: torch.device) -> int:
    """How many completions keep their KV cache within 2 GiB, or a quarter of a GPU's memory."""
    budget = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else _CPU_CACHE_BYTES
    row = memory_estimate(without_adapters(model), batch=1, sequence_length=tokens, training=False, dtype="auto")[
        "kv_cache"
    ]
    return max(1, min(_MOST_ROWS, budget // max(1, row)))


# ---- directories ----


@dataclass(frozen=True)
class _Difference:
    key: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.key} is {self.there!r} there and {self.here!r} here"


def _differences(path: Path, recipe: Recipe, ignore: frozenset[str] = frozenset()) -> list[_Difference]:
    """What a written configuration says otherwise than `recipe`; nothing if there is none."""
    if not path.exists():
        return []
    there = _written_recipe(path)
    if there is None:
        kept = (path.parent / RESULTS).exists() or checkpoints.numbered(path.parent)
        remedy = "" if kept else ", or --overwrite to start over"
        raise RunDirectoryError(
            f"{path} is damaged; restore it (the recipe with its defaults), or use another output directory{remedy}"
        )
    # As it would be read back: through YAML, so that tuples and numbers compare alike.
    here = yaml.safe_load(recipe.to_yaml())
    # An option that the version which wrote it did not have yet, and that changes no result, is no difference.
    new = {key for key in here if key not in there and key in _MAY_CHANGE}
    keys = [key for key in dict.fromkeys([*there, *here]) if key not in ignore | new]
    return [_Difference(key, there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)]


def _written_recipe(path: Path) -> dict[str, Any] | None:
    """The keys of a written configuration, or None if it is damaged."""
    try:
        there = parse_yaml(path.read_bytes().decode("utf-8"))
    except (IsADirectoryError, yaml.YAMLError, ValueError):
        return None
    return there if isinstance(there, dict) else None


def _is_damaged(path: Path) -> bool:
    return path.exists() and _written_recipe(path) is None


def _check_claim(
    directory: Path, recipe: Recipe, checkpoint: Path | None, accept_changes: bool, *, warn: bool = True
) -> Path | None:
    """The checkpoint to go on from, if any. Raises RunDirectoryError if the directory holds another run."""
    if checkpoint is not None and not (directory / CONFIG).exists():
        raise RunDirectoryError(
            f"{directory} holds checkpoints but no {CONFIG}, so it is unknown what they are; "
            "use another output directory"
        )
    if _is_damaged(directory / CONFIG) and _says_itself(checkpoint):
        if warn:
            logger.warning("%s is damaged: what %s says of its run is compared", directory / CONFIG, checkpoint)
        return checkpoint
    found = _differences(directory / CONFIG, recipe)
    # A longer run may go on from a checkpoint; without one it would silently start over.
    refused = [difference for difference in found if difference.key not in _MAY_CHANGE or checkpoint is None]
    if refused and not (accept_changes and checkpoint is not None):
        _refuse(directory, refused, can_accept=checkpoint is not None)
    if refused and warn:
        logger.warning("%s goes on with changes: %s", directory, "; ".join(map(str, refused)))
    return checkpoint


def _says_itself(checkpoint: Path | None) -> bool:
    """Whether a checkpoint says which run it is of."""
    try:
        return checkpoint is not None and resume.read(checkpoint) is not None
    except ValueError:
        return False


def _check_shared_recipe(directory: Path, recipe: Recipe) -> None:
    ignore = frozenset({"methods", *_MAY_CHANGE})
    differences = _differences(directory / RECIPE, recipe, ignore)
    if differences:
        _refuse(directory, differences, can_accept=False)


def _refuse(directory: Path, differences: list[_Difference], *, can_accept: bool) -> None:
    remedy = "Use another output directory, or --overwrite to remove what is there"
    if can_accept:
        remedy += ", or --accept-changes to go on from its last checkpoint all the same"
    raise RunDirectoryError(f"{directory} holds another configuration: {'; '.join(map(str, differences))}. {remedy}")


def _finished_results(directory: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What a finished run found, if its directory holds that.

    None where results or model are damaged and the last checkpoint can make them again. Raises RunDirectoryError where
    it cannot. Damaged records are named in a warning: nothing can bring them back.
    """
    path, config = directory / RESULTS, directory / CONFIG
    if not path.exists():
        return None
    if (_is_damaged(config) and _says_itself(checkpoints.latest(directory, warn=None))) or _differences(config, recipe):
        return None
    results = read_results(path)  # first, as a file that may not be read is not damaged
    damaged = checkpoints.differing(directory)
    again = [text for name, text in damaged.items() if name == path.name or name.partition("/")[0] == MODEL]
    if results is None and path.name not in damaged:
        again.append(f"{path.name} cannot be read")
    if again:
        listed = f"{directory} is damaged: {'; '.join(again)}"
        if checkpoints.latest(directory) is None:
            raise RunDirectoryError(
                f"{listed}. There is no whole checkpoint to make it again from: restore it, use another output "
                "directory, or --overwrite to remove what is there"
            )
        logger.warning("%s; made again from the last checkpoint", listed)
        return None
    if damaged:
        logger.warning("%s: records are damaged, and the results are not: %s", directory, "; ".join(damaged.values()))
    return results


def read_results(path: Path) -> dict[str, Any] | None:
    """Scores by name in a results.json, or None if it holds none. Raises OSError where it may not be read."""
    try:
        return results if holds_scores(results := RESULTS.read(path)) else None
    except (IsADirectoryError, ValueError):
        return None


def holds_scores(results: dict[str, Any]) -> bool:
    """Whether the contents of a results.json are scores by name."""
    scores = [score for name, score in results.items() if name != "provenance"]
    return bool(scores) and SCORES.fits(scores)


def set_aside(path: Path) -> Path:
    """Move a damaged file or folder out of the way, keeping what can be kept; returns where it is now."""
    aside = records.aside(path)
    remove(aside)
    return path.rename(aside)


def make_again(path: Path) -> None:
    """Move damaged results aside with a warning; the caller computes them anew."""
    logger.warning("%s is damaged; moved to %s, and made again", path, set_aside(path).name)


def _clear(directory: Path) -> None:
    """Remove what a run writes, and nothing else."""
    saved = directory.glob(f"{records.CHECKPOINT_PREFIX}*")
    for path in (*saved, *(directory / name for name in (*_REMOVED, checkpoints.PARTIAL))):
        remove(path)


def _begin(directory: Path, recipe: Recipe, *, afresh: bool) -> None:
    """Claim the directory for a run; without a checkpoint, drop what an interrupted one measured."""
    checkpoints.unseal(directory)
    for path, read in ((directory / RESULTS, read_results), (directory / CONFIG, _written_recipe)):
        if path.exists() and read(path) is None:
            set_aside(path)
    (directory / RESULTS).unlink(missing_ok=True)
    if afresh:
        for file in records.MEASUREMENTS:
            (directory / file).unlink(missing_ok=True)
        for folder in (EVALUATIONS, SKIPPED):
            shutil.rmtree(directory / folder, ignore_errors=True)
    checkpoints.clear_partial(directory)
    remove_unfinished(directory)
    for file in records.MEASUREMENTS:
        drop_after_step(directory / file, sys.maxsize)  # a kill may have cut the last line off
    write_text(directory / CONFIG, recipe.to_yaml())
    checkpoints.seal(directory, files_of=[directory / CONFIG, provenance.write(directory)])


def _finish_pruning(directory: Path, checkpoint: Path, args: TRBConfig) -> None:
    """Remove what `save_total_limit` leaves over: a kill may have come between a save and that."""
    state = _state_of(checkpoint)
    best = checkpoints.best_beside(checkpoint, state.best_model_checkpoint)
    checkpoints.prune(directory, state.global_step, args.save_total_limit, [best])


def _listed_methods(directory: Path) -> set[str]:
    """The runs of the comparison that a directory holds, as far as its recipe can be read."""
    try:
        there = parse_yaml((directory / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError):
        return set()
    listed = there.get("methods") if isinstance(there, dict) else None
    # "../x" would clear a directory elsewhere.
    return {name for name in (listed if isinstance(listed, dict) else {}) if is_method_name(name)}


def _clear_comparison(directory: Path, names: set[str]) -> None:
    for name in names:
        _clear(directory / name)
    _clear(directory)
    remove(directory / RECIPE)


def _named_checkpoint(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint is {name!r}, and there is no such directory")
    try:
        Ranks.of_launch().from_first(partial(checkpoints.verify, path))
    except CheckpointError as error:
        raise RunDirectoryError(f"resume_from_checkpoint is {name!r}: {error}") from error
    return path


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / records.TRAINER_STATE))


def _is_last(checkpoint: Path, args: TRBConfig) -> bool:
    """Whether nothing is left to train after a checkpoint."""
    state = _state_of(checkpoint)
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs


@contextmanager
def sole_run(directory: Path, *, first: bool = True, inside: bool = False) -> Iterator[None]:
    """Keep every other command, also a second start of this one, from writing into a directory, which is made.

    Args:
        directory: of a run, a comparison, a probe or an evaluation.
        first: whether this is the first process of its launch; the others hold nothing.
        inside: as in `trb.safety.files.exclusive`.

    Raises RunDirectoryError naming the holder, or where nothing can be written.
    """
    if not first:
        yield
        return
    _require_writable(directory)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(directory, inside=inside))
        except BlockingIOError as error:
            raise RunDirectoryError(
                f"another run is writing to {directory}: {error.strerror}; wait for it, or use another output directory"
            ) from error
        yield


# ---- disks ----


def _require_writable(directory: Path) -> None:
    """Make the directory, and fail now rather than after an hour of training if nothing can be written there."""
    # A name that `remove_unfinished` knows, which may do so meanwhile for the run that is there.
    probe = directory / f".trb-probe-{os.environ.get('RANK', '0')}.{os.getpid()}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink(missing_ok=True)
    except OSError as error:
        probe.unlink(missing_ok=True) if directory.is_dir() else None
        raise RunDirectoryError(
            f"cannot write to {directory}: {error.strerror}; choose another --output-dir"
        ) from error


def _require_space(directory: Path, student: PreTrainedModel, run: RunConfig, args: TRBConfig) -> None:
    """Refuse to start a run whose first checkpoint or final model cannot fit on the disk."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    checkpoint = 0 if args.save_strategy == "no" else weights * (1 if args.save_only_model else 3)
    if run.lora_rank:
        weights, checkpoint = weights // 20, checkpoint // 20
    needed = checkpoint + (weights if run.save_final_model else 0)
    free = _free_bytes(directory)
    if free < needed:
        raise RunDirectoryError(
            f"the disk of {directory} has {_size(free)} free, and a checkpoint and the final model take about "
            f"{_size(needed)}; free some space, choose another --output-dir, or set save_strategy: no"
        )


@contextmanager
def _explained_disk_errors(directory: Path) -> Iterator[None]:
    """Turn a full disk, whichever library met it, into one error that says what is intact and how to go on."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not (_is_disk_full(error) or _free_bytes(directory) < _FULL_BYTES):
            raise
        checkpoints.clear_partial(directory)
        shutil.rmtree(directory / records.MODEL_PARTIAL, ignore_errors=True)
        checkpoint = checkpoints.latest(directory, contents=False, warn=None)
        way_on = f"continue from {checkpoint.name}" if checkpoint else "start over (no checkpoint was complete yet)"
        raise DiskFullError(
            errno.ENOSPC,
            f"the disk of {directory} is full: what was being written is lost, and everything saved before is intact. "
            f"Free some space and run the same command again to {way_on}; save_total_limit: 1 keeps fewer checkpoints "
            f"({type(error).__name__}: {error!s:.200})",
        ) from error


def _free_bytes(directory: Path) -> int:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors and torch.save report it in words only.
        if re.search(r"No space left on device|os error 28\b|inline_container\.cc|iostream error", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
