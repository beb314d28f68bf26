"""`trb eval`: pass@1 of a model, or of a run's, on problem sets; or its reverse KL to a teacher, where nothing checks.

Left out: how completions are drawn, graded and resumed (`trb.tasks.evaluation`), and comparing two models' scores.
"""

import argparse
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trb.cli.display import listening, new_console, score_table
from trb.errors import InputError, shown
from trb.safety.untrusted import parse_json

if TYPE_CHECKING:
    from trb.studies.keys import RunConfig
    from trb.studies.listener import Listener
    from trb.training.config import TRBConfig

__all__ = ["add_eval", "run_eval"]


_LONGEST = 1024

# What the keys of a recipe are called here, where messages name them.
_OF_STUDENT = ("revision", "dtype", "keep_layers", "trust_remote_code")
_OF_EVALUATION = ("data", "split", "limit", "samples", "max_new_tokens", "temperature", "seed", "max_rows")
_COLUMNS = ("prompt_column", "answer_column", "privileged_column", "assistant_turns")
# Of these the recipe of a run says what no option does.
_ASKING = ("system_prompt", "chat_template_kwargs", "tools", "teacher_system_prompt")


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


OPTIONS = {
    **{f"student_{key}": _option(key) for key in _OF_STUDENT},
    **{f"eval_{key}": _option(key) for key in (*_OF_EVALUATION, *_COLUMNS)},
    **{key: _option(key) for key in ("chat_template", *_ASKING)},
    "student": "--model",
    "teacher": "--teacher",
    "student_files": "--model (files)",
    "teacher_files": "--teacher (files)",
    "chat_template: plain": "--chat-template plain",
    "output directory": "--output-dir",
}

logger = logging.getLogger(__name__)


def add_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="SPEC", help="zoo:student, smollm2-135m, a directory, a run or a hub id")
    add(
        "--data", required=True, nargs="+", metavar="SPEC", help="problem sets: gsm8k, math500, zoo:chains, a file, ..."
    )
    _add_teacher(parser)
    add("--samples", type=int, default=1, metavar="N", help="completions per problem (default: 1)")
    add("--limit", type=int, metavar="N", help="problems per set (default: all)")
    add("--split", default="test", help="split of the data (default: test)")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest completion, at most what the model's positions leave (default: of a run its recipe's, else "
        f"{_LONGEST})",
    )
    add("--temperature", type=float, help="sampling temperature (default: of a run its recipe's, else 1)")
    add("--seed", type=int, default=0, help="seed of problems and sampling (default: 0)")
    add(
        "--system-prompt",
        metavar="TEXT",
        help="system message; math for the paper's, or none (default: of a run its recipe's)",
    )
    add(
        "--chat-template-kwargs",
        type=_mapping,
        metavar="JSON",
        help="arguments of the chat template, such as '{\"enable_thinking\": false}' (default: of a run its recipe's)",
    )
    add("--dtype", default="float32", help="weights: float32, bfloat16, float16 or auto (default: float32)")
    add("--keep-layers", type=int, metavar="N", help="prune the model to N layers first")
    add("--revision", help="branch, tag or commit of a model on the hub")
    add("--chat-template", metavar="FILE", help="a Jinja file, or plain, for models without a chat template")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    add("--prompt-column", metavar="NAME", help="column of the data with the problem, if not guessed right")
    add("--answer-column", metavar="NAME", help="column of the data with the answer, if not guessed right")
    add(
        "--assistant-turns",
        choices=("all", "last"),
        help="the data are conversations: evaluate all of the assistant's turns, or the last",
    )
    add("--max-rows", type=int, metavar="N", help="completions in flight at once")
    add(
        "--tools",
        nargs="+",
        metavar="NAME",
        help="tools that the model may call, or none (default: of a run its recipe's)",
    )
    add("--output-dir", metavar="DIR", help="write the scores and the results of every problem there")
    add("--resume", action="store_true", help="continue an interrupted evaluation of the same model in --output-dir")
    add("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(hint="With --output-dir, add --resume to go on from there.")


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--teacher", metavar="SPEC", help="reads completions of data without answers: the score is the KL to it")
    add(
        "--privileged-column",
        metavar="NAME",
        help="with --teacher: column of the data that the teacher reads in its prompt",
    )
    add(
        "--teacher-system-prompt",
        metavar="TEXT",
        help="with --teacher: system message of its prompts, or none (default: of a run its recipe's)",
    )


def run_eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.errors import calls

    with calls(OPTIONS):
        return _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from trb.models.packaged import quiet_libraries
    from trb.records import EVALUATIONS
    from trb.studies.directories import sole_run
    from trb.studies.material import load_student, load_teacher, load_tokenizers, model_of_run, problem_sets
    from trb.studies.recipe import make_recipe
    from trb.studies.scores import check_suites, evaluate_suites, judge_of
    from trb.tasks.grading import Verifier
    from trb.training.ranks import Ranks
    from trb.vocab import SharedVocabulary

    if arguments.resume and not arguments.output_dir:
        raise InputError(
            "--resume goes on with what lies in --output-dir, and none is given: name it, or leave both out"
        )
    quiet_libraries()
    model_spec = model_of_run(arguments.model)
    folder = Path(arguments.output_dir) if arguments.output_dir else None
    _check_teachers_options(arguments)
    asked, as_in_run = _asked(arguments)
    recipe = make_recipe(_eval_values(arguments, model_spec, asked), source="options")
    run, args = recipe.run, recipe.training_config(folder or "unused")
    is_first = Ranks.of_launch().is_first
    _check_folder(folder)
    with sole_run(folder, first=is_first) if folder else nullcontext():
        with listening(arguments.quiet) as listener, Verifier(run.reward_timeout_s) as verifier:
            if as_in_run:
                listener.stage(as_in_run)
            listener.stage("loading the model and problems")
            problems = problem_sets(run)
            _check_teacher(arguments.teacher, problems)
            tokenizer, teacher_tokenizer = load_tokenizers(run)
            model = load_student(run)
            judge = None
            if arguments.teacher:
                teacher = load_teacher(run, model)
                pair = SharedVocabulary.of_pair(model, teacher, tokenizer, teacher_tokenizer)
                judge = judge_of(teacher, pair, problems, args)
            length = _completion_length(arguments, args, model, tokenizer, problems, listener)
            run = replace(run, eval_max_new_tokens=length)
            check_suites(model, tokenizer, problems, run, args, judge)
            # Not before: what is refused leaves earlier results alone.
            with _for_results(folder if is_first else None, goes_on=arguments.resume):
                scores = evaluate_suites(
                    model,
                    tokenizer=tokenizer,
                    problems=problems,
                    run=run,
                    args=args,
                    verifier=verifier,
                    folder=folder / EVALUATIONS if folder else None,
                    label=model_spec,
                    listener=listener,
                    judge=judge,
                    about=_models_of(run, judge is not None),
                )
        if is_first:
            _keep_evaluation(scores, model_spec, folder)
    return 0


def _models_of(run: "RunConfig", judged: bool) -> dict[str, Any]:
    """What an evaluation that goes on must have in common with the one it goes on from, apart from problems."""
    from trb.models.identity import fingerprint

    keys = ("student", "student_revision", "student_dtype", "student_keep_layers")
    teacher = {"teacher_files": fingerprint(run.teacher, run.teacher_revision)} if judged else {}
    files = {"student_files": fingerprint(run.student, run.student_revision), **teacher}
    return {key: getattr(run, key) for key in keys} | files


@contextmanager
def _for_results(folder: Path | None, *, goes_on: bool) -> Iterator[None]:
    """Make room for results per problem, or go on with those that are there; undone if the model is refused."""
    from trb.records import EVALUATIONS
    from trb.studies.claims import left_as_found, out_of_the_way

    if folder is None:
        yield
    elif goes_on:
        with left_as_found([folder / EVALUATIONS], begun=lambda: False):
            yield
    else:
        with left_as_found([folder / EVALUATIONS], begun=lambda: False), out_of_the_way(folder / EVALUATIONS):
            yield


def _check_folder(folder: Path | None) -> None:
    """Refuse a folder of a run, a comparison or a study, whose results an evaluation must not replace."""
    from trb.records import CONFIG, METRICS, RECIPE, STUDY_PLAN
    from trb.studies.material import RunDirectoryError

    held = [name for name in (CONFIG, METRICS, RECIPE, STUDY_PLAN) if folder and (folder / name).exists()]
    if held:
        raise RunDirectoryError(f"{folder} holds {held[0]} of a training run; give the evaluation its own --output-dir")


def _check_teachers_options(arguments: argparse.Namespace) -> None:
    """Refuse what a teacher would read, where there is none."""
    for name in ("privileged_column", "teacher_system_prompt"):
        if getattr(arguments, name) is not None and not arguments.teacher:
            raise InputError(f"{_option(name)} would do nothing without --teacher, who reads it: give both, or neither")


def _check_teacher(teacher: str | None, problems: Mapping[str, Any]) -> None:
    """Refuse a teacher that has nothing to read, which would be loaded and make no difference."""
    from trb.tasks.reward_free import is_reward_free

    if teacher and not any(map(is_reward_free, problems.values())):
        raise InputError(
            f"--teacher {teacher} would do nothing: it reads completions of data without answers, and "
            f"{', '.join(problems)} can be scored against answers; leave it out"
        )


def _completion_length(
    arguments: argparse.Namespace,
    args: "TRBConfig",
    model: Any,
    tokenizer: Any,
    problems: Mapping[str, Any],
    listener: "Listener",
) -> int:
    """What was asked for, or what a run's recipe says, as far as the model's positions go; says where it is less."""
    from trb.models.modeling import position_limit
    from trb.studies.directories import completion_length_of
    from trb.studies.material import template_options, with_template_options
    from trb.tasks.evaluation import longest_prompt

    asked = arguments.max_new_tokens
    if asked is None and (of_run := completion_length_of(arguments.model)):
        asked, config = of_run
        listener.stage(f"completions of up to {asked} tokens, as in {config}; --max-new-tokens sets another length")
    asked = _LONGEST if asked is None else asked
    positions = position_limit(model)
    if positions is None:
        return asked
    reader = with_template_options(tokenizer, template_options(args, tokenizer))
    room = positions - max(longest_prompt(reader, rows) for rows in problems.values())
    if not 0 < room < asked:
        return asked
    logger.warning(
        "completions are cut after %d tokens instead of %d: of the model's %d positions the longest prompt takes %d",
        *(room, asked, positions, positions - room),
    )
    return room


def _keep_evaluation(scores: list[dict[str, Any]], model_spec: str, folder: Path | None) -> None:
    from trb.records import RESULTS
    from trb.studies import provenance
    from trb.studies.scores import mean_of_suites

    results = {score["name"]: score for score in scores}
    if len(scores) > 1:
        results["mean"] = {**mean_of_suites(scores), "suites": list(results)}
    new_console().print(score_table(results, gain=False))
    if folder:
        RESULTS.write(folder / RESULTS, {"model": model_spec, **results, "provenance": provenance.describe()})


def _mapping(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no JSON object, such as '{{\"enable_thinking\": false}}'")
    return found


def _asked(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """How completions are asked for, drawn and graded: by the options, else as in the recipe of the run whose model it
    is; and what to say of the latter."""
    from trb.studies.directories import asked_by_run
    from trb.studies.keys import TOOL_KEYS, default_of, run_fields, training_fields

    given = {key: value for key in _ASKING if (value := getattr(arguments, key)) is not None}
    if arguments.temperature is not None:
        given["eval_temperature"] = arguments.temperature
    of_run, config = asked_by_run(arguments.model) or ({}, None)
    kept = {key: value for key, value in of_run.items() if key not in given}
    if not arguments.teacher:
        kept = {key: value for key, value in kept.items() if not key.startswith("teacher_")}
    without = [key for key, value in given.items() if value in ("none", ["none"])]
    if "tools" in without:
        kept = {key: value for key, value in kept.items() if key not in TOOL_KEYS}
    fields = run_fields() | training_fields()
    other = [f"{key} {shown(value)}" for key, value in kept.items() if value != default_of(fields[key])]
    said = f"as in {config}: {'; '.join(other)}; options may say otherwise" if other else ""
    return kept | {key: value for key, value in given.items() if key not in without}, said


def _eval_values(arguments: argparse.Namespace, model: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `trb eval` as keys of a recipe, with those of `_asked`."""
    return {
        "student": model,
        "teacher": arguments.teacher or model,
        "train_data": "none",
        "student_revision": arguments.revision,
        "teacher_revision": None if arguments.teacher else arguments.revision,
        "student_dtype": arguments.dtype,
        "student_keep_layers": arguments.keep_layers,
        "student_trust_remote_code": arguments.trust_remote_code,
        "teacher_trust_remote_code": arguments.trust_remote_code,
        "chat_template": arguments.chat_template,
        "eval_data": arguments.data,
        "eval_split": arguments.split,
        "eval_limit": arguments.limit,
        "eval_samples": arguments.samples,
        "eval_max_new_tokens": arguments.max_new_tokens,
        "eval_seed": arguments.seed,
        "eval_max_rows": arguments.max_rows,
        "eval_prompt_column": arguments.prompt_column,
        "eval_answer_column": arguments.answer_column,
        "eval_assistant_turns": arguments.assistant_turns,
        "eval_privileged_column": arguments.privileged_column,
        **asked,
        "bf16": False,
    }
