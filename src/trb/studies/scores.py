"""Scores of models on problem sets, their means, and the results file that keeps them.

Left out: how one set is scored (`trb.tasks.evaluation`), and intervals over seeds (`trb.studies.statistics`).
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trb import records
from trb.errors import calls
from trb.measures import PER_TOKEN, measure_of, pass_at_1_interval
from trb.models.memory import bytes_of, cache_entries
from trb.models.residence import present
from trb.records import EVALUATIONS, RECIPE, SCORES
from trb.sampling import sample
from trb.studies.directories import set_aside, write_configuration
from trb.studies.keys import RunConfig
from trb.studies.listener import Listener
from trb.studies.material import (
    EVALUATION_NAMES,
    as_teacher_reads,
    free_memory,
    load_material,
    routes_of,
    template_options,
    with_template_options,
)
from trb.studies.recipe import Recipe
from trb.studies.statistics import combined_interval
from trb.studies.yaml_files import ConfigError
from trb.tasks.evaluation import check_problems, evaluate
from trb.tasks.grading import Verifier
from trb.tasks.reward_free import Judge, is_reward_free
from trb.tools import TOOLS
from trb.tools.calls import ToolBox
from trb.tools.chats import ToolChat
from trb.tools.turns import ToolSampler
from trb.training import checkpoints
from trb.training.config import TRBConfig
from trb.training.ranks import Ranks
from trb.training.routes import Routes, places_of
from trb.vocab import SharedVocabulary, stop_token_ids

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "check_suites",
    "evaluate_suites",
    "evaluate_teachers",
    "judge_of",
    "mean_of_suites",
    "precision",
    "rows_in_flight",
    "scores_before",
]

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 2 << 30

_MOST_ROWS = 512

_MEANS = ("mean_length", "stop_rate")  # over samples


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
    outcomes: dict[str, dict[str, list[Any]]] | None = None,
    vocabulary: SharedVocabulary | None = None,
    save_completions: int = 0,
    judge: Judge | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The score of `model` on every problem set, as the lines of evals.jsonl without their step.

    Sampling runs in the precision of training. The processes of a launch share the problems, so `model` must be whole
    on each; the main one writes results per problem into `folder`, from where an interrupted evaluation goes on.
    `outcomes` is filled with what each score is the mean of, by problem set. `vocabulary`, `save_completions`,
    `judge` and `about` are as in `trb.tasks.evaluation.evaluate`.
    """
    longest, sampler = _longest_completion(run, args), _sampler(model, tokenizer, args, vocabulary)
    reads = partial(nullcontext) if judge is None else partial(present, judge.teacher, args.device)
    scores = []
    for name, rows in problems.items():
        (listener or Listener()).stage(f"{label}: {len(rows)} problems of {name}")
        with precision(args), calls(EVALUATION_NAMES), reads():
            result = evaluate(
                model.to(args.device),  # type: ignore[arg-type]
                with_template_options(tokenizer, template_options(args, tokenizer)),
                rows,
                n=run.samples_of(name),
                max_new_tokens=longest,
                temperature=run.eval_temperature,
                seed=run.eval_seed,
                max_rows=run.eval_max_rows or rows_in_flight(model, run.max_prompt_length + longest, args.device),
                results_path=folder / records.problems_name(name, run.eval_data) if folder else None,
                ranks=Ranks.of_launch(),
                verifier=verifier,
                name=name,
                progress=False,
                save_completions=save_completions,
                vocabulary=vocabulary,
                sampler=sampler,
                judge=judge,
                about=about,
            )
        if outcomes is not None:
            outcomes[name] = result.outcomes
        scores.append(result.to_dict())
    return scores


def _sampler(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TRBConfig, vocabulary: SharedVocabulary | None
) -> Callable[..., Any]:
    """What draws completions: with tools in as many turns as the model takes, as in training."""
    if not args.tools:
        return sample
    stop_ids = stop_token_ids(model, tokenizer) if vocabulary is None else vocabulary.stop_ids
    options = {name: value for name, value in template_options(args).items() if name != "tools"}
    chat = ToolChat.of([TOOLS[name] for name in args.tools], tokenizer, stop_ids, options)
    box = ToolBox({name: TOOLS[name] for name in args.tools}, args.tool_timeout, args.tool_max_characters)
    return ToolSampler(chat, box, args.max_tool_calling_iterations)


def judge_of(
    teacher: PreTrainedModel, vocabulary: SharedVocabulary, problems: Mapping[str, "Dataset"], args: TRBConfig
) -> Judge | None:
    """Who reads completions that nothing can check, each prompt as the teacher does; None where there are none."""
    if not any(map(is_reward_free, problems.values())):
        return None
    return Judge(teacher, vocabulary, as_teacher_reads(problems, args))


def evaluate_teachers(
    teachers: Any,
    *,
    problems: Mapping[str, Any],
    routes: Routes | None,
    run: RunConfig,
    folder: Path | None = None,
    outcomes: dict[str, dict[str, list[Any]]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """`evaluate_suites` of the teacher; of several each on its own rows of every problem set that says whose they are.

    `teachers` is the model, or a mapping of names with `routes`.
    """
    if routes is None:
        with _visiting(teachers, options["args"]):
            return evaluate_suites(teachers, problems=problems, run=run, folder=folder, outcomes=outcomes, **options)
    scores = []
    for name, parts in _routed(problems, routes).items():
        correct, found = [0] * sum(map(len, parts.values())), []
        for place, rows in parts.items():
            teacher, right = teachers[routes.names[place]], dict[str, dict[str, list[Any]]]()
            with _visiting(teacher, options["args"]):
                found += evaluate_suites(
                    teacher,
                    problems={name: [problems[name][row] for row in rows]},
                    run=run,
                    folder=folder / str(place) if folder else None,
                    outcomes=right,
                    **options,
                )
            for row, count in zip(rows, right[name]["correct"], strict=True):
                correct[row] = count
        n, samples = run.samples_of(name), sum(score["n_samples"] for score in found)
        scores.append(
            {
                "name": name,
                "pass_at_1": sum(correct) / samples,
                "interval": list(pass_at_1_interval(correct, n, [json.dumps(row["prompt"]) for row in problems[name]])),
                "n_problems": len(correct),
                "n_samples": samples,
                **{key: sum(each[key] * each["n_samples"] for each in found) / samples for key in _MEANS},
            }
        )
        if outcomes is not None:
            outcomes[name] = {"correct": correct}
    return scores


def _visiting(model: PreTrainedModel, args: TRBConfig) -> AbstractContextManager[None]:
    """With teacher_offload a model is on the accelerator within the block alone."""
    return present(model, args.device) if args.teacher_offload else nullcontext()


def _routed(problems: Mapping[str, Any], routes: Routes) -> dict[str, dict[int, list[int]]]:
    """Of every problem set that says whose its rows are, the rows of each teacher, by its place."""
    known = {name: rows for name, rows in problems.items() if len(rows) and routes.column in rows[0]}
    return {name: places_of(routes.check(rows, name)) for name, rows in known.items()}


def check_teachers(
    teachers: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Mapping[str, Any],
    routes: Routes | None,
    run: RunConfig,
    args: TRBConfig,
    judge: Judge | None = None,
) -> None:
    """`check_suites` of what `evaluate_teachers` is to read."""
    if routes is None:
        check_suites(teachers, tokenizer, problems, run, args, judge)
        return
    for name, parts in _routed(problems, routes).items():
        for place, rows in parts.items():
            its: Any = {name: [problems[name][row] for row in rows]}
            check_suites(teachers[routes.names[place]], tokenizer, its, run, args)


def check_suites(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Mapping[str, "Dataset"],
    run: RunConfig,
    args: TRBConfig,
    judge: Judge | None = None,
) -> None:
    """Refuse what `evaluate_suites` would refuse of any of the problem sets, before the first of them is sampled.

    Raises ConfigError for sets that are measured differently, which have no mean, and for a teacher that no process
    has as a whole to read completions with.
    """
    free = [name for name, rows in problems.items() if is_reward_free(rows)]
    if 0 < len(free) < len(problems):
        other = next(name for name in problems if name not in free)
        raise ConfigError(
            f"no completion of {free[0]} can be scored and those of {other} can; evaluate the two apart, as their "
            "scores have no mean"
        )
    if free and run.teachers:
        raise ConfigError(
            f"no completion of {free[0]} can be scored, so that the teacher reads them, and there are several; "
            "evaluate students of several teachers on data with answers"
        )
    if free and args.tools:
        raise ConfigError(
            f"no completion of {free[0]} can be scored, so that the teacher reads them, and with tools they hold "
            "answers that nobody wrote; leave out eval_data or tools"
        )
    if free and args.teacher_sharded:
        raise ConfigError(
            f"no completion of {free[0]} can be scored, so that the teacher reads them, and teacher_sharded leaves no "
            "process a whole teacher; leave one of the two out"
        )
    tokenizer = with_template_options(tokenizer, template_options(args, tokenizer))
    longest = _longest_completion(run, args)
    with calls(EVALUATION_NAMES):
        for name, rows in problems.items():
            check_problems(
                model, tokenizer, rows, n=run.samples_of(name), max_new_tokens=longest, name=name, judge=judge
            )


def _longest_completion(run: RunConfig, args: TRBConfig) -> int:
    return run.eval_max_new_tokens or int(args.max_completion_length or 0)


def mean_of_suites(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """One score from those of several problem sets: the unweighted mean of what they measure (paper, section 6).

    The interval combines theirs as independent ones (`trb.studies.statistics.combined_interval`). The single scores
    stay under "suites". Without scores, pass_at_1 is None.
    """
    if not scores:
        return {"name": "", "pass_at_1": None, "interval": None}
    if len(scores) == 1:
        return dict(scores[0])
    count, samples, measure = len(scores), sum(score["n_samples"] for score in scores), measure_of(scores[0])
    means = {
        key: math.fsum(score[key] for score in scores) / count
        for key in (measure.key, *PER_TOKEN)
        if all(key in score for score in scores)
    }
    low, high = combined_interval([(score[measure.key], score["interval"]) for score in scores])
    weighted = {key: math.fsum(score[key] * score["n_samples"] for score in scores) / samples for key in _MEANS}
    return {
        "name": "mean of " + ", ".join(score["name"] for score in scores),
        **means,
        "interval": [max(measure.bounds[0], low), min(measure.bounds[1], high)],
        "n_problems": sum(score["n_problems"] for score in scores),
        "n_samples": samples,
        **weighted,
        "suites": {score["name"]: score for score in scores},
    }


def scores_before(
    recipe: Recipe, args: TRBConfig, directory: Path, listener: Listener, *, clear: Callable[[], None] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Scores of the untrained student and of the teacher, each on the prompts that it reads; measured once, then read.

    `clear` removes what is in the way, once nothing is left to be refused.
    """
    folder = directory / EVALUATIONS
    paths = {name: folder / records.role_name(name) for name in ("student", "teacher")}
    if args.process_index == 0 and clear is None:
        _check_sealed_scores(directory, paths)
    args.distributed_state.wait_for_everyone()
    missing = clear is not None or not all(path.exists() for path in paths.values())
    args.distributed_state.wait_for_everyone()  # nobody looks after somebody has written
    if missing:
        _score_pair(recipe, args, directory, listener, paths, clear)
    elif args.process_index == 0:
        write_configuration(directory / RECIPE, recipe.to_yaml())  # methods may have joined
    return {name: SCORES.read(path) for name, path in paths.items()}


def _score_pair(
    recipe: Recipe,
    args: TRBConfig,
    directory: Path,
    listener: Listener,
    paths: Mapping[str, Path],
    clear: Callable[[], None] | None,
) -> None:
    listener.stage("loading models and data")
    material = load_material(recipe.run, args)
    taught = as_teacher_reads(material.problems, args)
    problems: dict[str, Any] = {"student": material.problems, "teacher": taught}
    routes = routes_of(recipe.run, args)
    judge = None if routes else judge_of(material.teacher, material.vocabulary, material.problems, args)
    for name in paths:
        whose = routes if name == "teacher" else None
        check_teachers(getattr(material, name), material.tokenizer, problems[name], whose, recipe.run, args, judge)
    if args.process_index == 0:
        if clear is not None:
            clear()
        (directory / EVALUATIONS).mkdir(exist_ok=True)  # first: it shows whose the recipe is
        write_configuration(directory / RECIPE, recipe.to_yaml())
    with Verifier(recipe.run.reward_timeout_s) as verifier:
        for name, path in paths.items():
            scores = evaluate_teachers(
                getattr(material, name),
                tokenizer=material.tokenizer,
                problems=problems[name],
                routes=routes if name == "teacher" else None,
                run=recipe.run,
                args=args,
                verifier=verifier,
                folder=path.parent / name,
                label=f"{name} before training" if name == "student" else name,
                listener=listener,
                vocabulary=material.vocabulary,
                save_completions=1 if name == "student" else 0,
                judge=judge,
            )
            if args.process_index == 0:
                SCORES.write(path, scores)
    del material
    free_memory()
    args.distributed_state.wait_for_everyone()


def _check_sealed_scores(directory: Path, paths: Mapping[str, Path]) -> None:
    """Set damaged scores aside, so that they are measured again, and take the seal off what is written next."""
    wrong = checkpoints.differing(directory)
    for name, path in paths.items():
        if path.exists() and (f"{EVALUATIONS}/{path.name}" in wrong or _read_scores(path) is None):
            logger.warning("%s is damaged; moved to %s, and the %s is scored again", path, set_aside(path).name, name)
    checkpoints.unseal(directory)


def _read_scores(path: Path) -> list[dict[str, Any]] | None:
    try:
        return list(SCORES.read(path))
    except (IsADirectoryError, ValueError):
        return None


def precision(args: TRBConfig) -> AbstractContextManager[Any]:
    """The autocast context that training runs in."""
    dtype = args.autocast_dtype
    return nullcontext() if dtype is None else torch.autocast(args.device.type, dtype=getattr(torch, dtype))


def rows_in_flight(model: PreTrainedModel, tokens: int, device: torch.device) -> int:
    """How many completions keep their KV cache within 2 GiB, or a quarter of a GPU's memory."""
    budget = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else _CPU_CACHE_BYTES
    row = tokens * cache_entries(model) * bytes_of("auto", model)
    return max(1, min(_MOST_ROWS, budget // max(1, row)))
