"""The command `trb`: train, eval, compare, sweep, probe, report, doctor.

Arguments in, tables and exit codes out; what the commands do is in the modules they call. Those are imported inside
the commands, so that `trb --help` answers at once. Exit codes: 0 done, 1 a check of `doctor` failed (or a bug), 2 the
request cannot be carried out (the message says why), 130 interrupted.

Nothing a model wrote is ever printed: a completion can hold terminal escape sequences.
"""

import argparse
import errno
import logging
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trb
from trb.cli.display import (
    following,
    listening,
    message,
    new_console,
    print_keys,
    print_paths,
    print_plan,
    score_table,
    study_table,
)
from trb.cli.doctor import run_doctor
from trb.records import CONFIG, EVALUATIONS, METRICS, PROBE, RECIPE, REPORT, RESULTS, STUDY, STUDY_PLAN
from trb.safety.untrusted import printable

if TYPE_CHECKING:
    from trb.studies.recipe import Recipe

__all__ = ["main"]

_OVERRIDES = """\
Every key of the recipe is also an option: --learning-rate 3e-5, --max_steps=50, --bf16, --no-bf16,
--methods.trb.initial_kl_budget 0.1. `trb train --help-keys` lists them with their defaults."""

_EXAMPLES = {
    "": """\
    trb compare --config recipes/quickstart.yaml
    trb train --config recipes/qwen3-1.7b-from-8b.yaml --output-dir runs/qwen3
    trb eval --model runs/qwen3 --data math500 gsm8k --samples 4
    trb sweep --config recipes/studies/zoo.yaml --workers 2
    trb report runs/qwen3
    trb doctor --config recipes/qwen3-1.7b-from-8b.yaml""",
    "train": """\
    trb train --config recipes/baselines/trb.yaml
    trb train --config recipes/baselines/trb.yaml --output-dir runs/try --initial-kl-budget 0.1 --seed 1
    trb train --help-keys""",
    "compare": """\
    trb compare --config recipes/quickstart.yaml --output-dir runs/quickstart
    trb compare --config recipes/quickstart.yaml --max-steps 20 --methods.trb.blend_warmup_steps 10""",
    "eval": """\
    trb eval --model zoo:student --data zoo:chains --limit 200
    trb eval --model runs/quickstart/trb --data zoo:chains --samples 4 --output-dir runs/eval
    trb eval --model Qwen/Qwen3-1.7B-Base --data math500 aime24=aime24.jsonl --dtype auto""",
    "sweep": """\
    trb sweep --config recipes/studies/zoo.yaml --plan
    trb sweep --config recipes/studies/zoo.yaml --output-dir runs/study --workers 2
    trb sweep --config recipes/studies/paper.yaml --output-dir /shared/study --ray auto --gpus 1""",
    "probe": """\
    trb probe --config recipes/quickstart.yaml
    trb probe --config recipes/quickstart.yaml --model runs/quickstart/opd --output-dir runs/probe-opd
    trb probe --config recipes/studies/zoo.yaml --setting clock --budgets 0 0.1 0.5 inf --problems 256""",
    "report": """\
    trb report runs/quickstart
    trb report runs/study --export runs/study/paper""",
    "doctor": """\
    trb doctor
    trb doctor --student zoo:student --teacher zoo:teacher
    trb doctor --config recipes/qwen3-1.7b-from-8b.yaml --launch recipes/accelerate/fsdp2.yaml
    trb doctor --config recipes/smollm2.yaml
    trb doctor --plan --config recipes/qwen3-1.7b-from-8b.yaml --machine h100 --gpus 8 --strategy fsdp""",
}


# Files of a run, a comparison or a study, whose results an evaluation must not replace.
_OF_A_RUN = (CONFIG, METRICS, RECIPE, STUDY_PLAN)

# What the machine refuses needs no traceback, whoever asked for it.
_ENVIRONMENT = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP),  # something else than the file that should be there
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is None:  # this process is the command, and nobody else's
        _shield_terminal()
        _end_with_launcher()
    # Threads that spin while they wait slow each other down wherever cores are shared; set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with _interruptible(alone=argv is None):
            return arguments.command(arguments, rest)
    except KeyboardInterrupt:
        _say(f"interrupted. {arguments.hint}")
        return 130
    except Exception as error:
        if arguments.debug or os.environ.get("TRB_DEBUG") == "1" or not _is_explained(error):
            raise
        _say(f"error: {message(error)}")
        return 2


def _is_explained(error: Exception) -> bool:
    """Whether the message was written for the user: raised by this package about its input, not a bug below it."""
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        return True
    if not isinstance(error, ValueError | OSError | ImportError | RuntimeError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module == "trb" or module.startswith("trb.")


def _shield_terminal() -> None:
    """Let warnings and tracebacks, which quote files and what is in them, write plain text only."""
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **options: printable(format_warning(*arguments, **options))
    sys.excepthook = lambda *error: _say("".join(traceback.format_exception(*error)).rstrip())
    if logging.lastResort is not None:  # what prints the log of a process that set up none
        logging.lastResort.setFormatter(_PlainText())


def _end_with_launcher() -> None:
    """A launcher that is killed ends none of its processes, which would train on beside the next start."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        from trb.training.ranks import end_with

        end_with(parent)


@contextmanager
def _interruptible(*, alone: bool) -> Iterator[None]:
    """Ctrl-C interrupts what is done inside; from then on, or once it is done, it ends the process as a kill does.

    `alone` says that this process is the command; nothing changes for a process that is more than that, or that was
    started with Ctrl-C switched off.
    """
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(*_: Any) -> None:
        os._exit(130)

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, end)


class _PlainText(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)


# ---- arguments ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trb",
        description="On-policy distillation of language models with trust-region behavior blending.",
        epilog=f"examples:\n{_EXAMPLES['']}\n\nTRB_DEBUG=1 shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trb {trb.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(_command(commands, "train", "distil a teacher into a student", _train, overrides=True))
    _add_compare(_command(commands, "compare", "train several methods from the same student", _compare, overrides=True))
    _add_eval(_command(commands, "eval", "pass@1 of a model, with a 95%% interval", _eval))
    _add_sweep(_command(commands, "sweep", "run a study: methods x settings x seeds, judged by fixed rules", _sweep))
    _add_probe(_command(commands, "probe", "what blending does to a student's prefixes, before training", _probe))
    report = _command(commands, "report", f"write {REPORT} for a run, a comparison, a study or a probe", _report)
    report.add_argument("directory", metavar="DIR", help="a run, comparison, study or probe directory")
    report.add_argument(
        "--export", metavar="OUT", help="also write figures (PNG, SVG) and tables (Markdown, CSV, LaTeX)"
    )
    _add_doctor(_command(commands, "doctor", "check this machine, and a pair of models", run_doctor, overrides=True))
    return parser


def _command(
    commands: Any,
    name: str,
    text: str,
    function: Callable[[argparse.Namespace, list[str]], int],
    *,
    overrides: bool = False,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:].replace("%%", "%") + ".",
        epilog=(f"{_OVERRIDES}\n\n" if overrides else "") + f"examples:\n{_EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.set_defaults(command=function, takes_overrides=overrides, hint="Run the same command again.")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_run_arguments(parser)
    parser.add_argument("--help-keys", action="store_true", help="list every key of a recipe, and exit")
    parser.set_defaults(hint="Run the same command again to continue from the last complete checkpoint.")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    _add_run_arguments(parser)
    parser.set_defaults(
        hint="Run the same command again: finished methods are kept, and the rest continues from checkpoints."
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument("--output-dir", "--output_dir", metavar="DIR", help="default: runs/ and the recipe's name")
    parser.add_argument("--overwrite", action="store_true", help="remove the run in the output directory first")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue from a checkpoint of other settings, data or models, with a warning",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="SPEC", help="zoo:student, smollm2-135m, a directory, a run or a hub id")
    add(
        "--data", required=True, nargs="+", metavar="SPEC", help="problem sets: gsm8k, math500, zoo:chains, a file, ..."
    )
    add("--samples", type=int, default=1, metavar="N", help="completions per problem (default: 1)")
    add("--limit", type=int, metavar="N", help="problems per set (default: all)")
    add("--split", default="test", help="split of the data (default: test)")
    add("--max-new-tokens", type=int, default=1024, metavar="N", help="longest completion (default: 1024)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    add("--seed", type=int, default=0, help="seed of problems and sampling (default: 0)")
    add("--system-prompt", metavar="TEXT", help="system message; math for the paper's")
    add("--dtype", default="float32", help="weights: float32, bfloat16, float16 or auto (default: float32)")
    add("--keep-layers", type=int, metavar="N", help="prune the model to N layers first")
    add("--revision", help="branch, tag or commit of a model on the hub")
    add("--chat-template", metavar="FILE", help="a Jinja file, or plain, for models without a chat template")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    add("--max-rows", type=int, metavar="N", help="completions in flight at once")
    add("--output-dir", metavar="DIR", help=f"write {RESULTS} and the results of every problem there")
    add("--resume", action="store_true", help="continue an interrupted evaluation of the same model in --output-dir")
    add("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(hint="With --output-dir, add --resume to go on from there.")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the study, a YAML file")
    add("--output-dir", metavar="DIR", help="default: runs/ and the study's name")
    add("--plan", action="store_true", help="check the study, print its runs, and stop")
    add("--workers", type=int, metavar="N", help="runs at once (default: one per GPU, or as many as the cores hold)")
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run as tasks of a Ray cluster: its address, auto for one that is running, nothing to start one here",
    )
    add("--gpus", type=float, default=0, metavar="N", help="with --ray: GPUs per run (default: 0)")
    add("--keep-models", action="store_true", help="keep the trained models; they are removed once scored otherwise")
    add("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(hint="Run the same command again: finished runs are kept.")


def _add_probe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a recipe with eval_data, or a study (with --setting)")
    add("--setting", metavar="NAME", help="the setting of a study, probed on its development problems")
    add("--output-dir", metavar="DIR", help="default: runs/probe- and the name of the file or setting")
    add("--model", metavar="SPEC", help="another student than the recipe's: a run directory, or a model")
    add("--problems", type=int, default=128, metavar="N", help="problems of each set (default: 128)")
    add("--samples", type=int, default=4, metavar="N", help="rollouts per problem and policy (default: 4)")
    add("--budgets", type=float, nargs="*", metavar="E", help="KL budgets per token, inf for the teacher itself")
    add("--truncations", type=int, nargs="*", metavar="T", help="prefix lengths that are continued, in tokens")
    add(
        "--kl-budget", type=float, metavar="E", help="budget of the prefixes that are continued (default: the recipe's)"
    )
    add("--skd-top-k", type=int, nargs="*", metavar="K", help="teacher's top-k of SKD, to count replaced tokens")
    add("--excerpts", type=int, default=4, metavar="N", help="problems shown token by token (default: 4)")
    add("--alternatives", type=int, default=3, metavar="N", help="likeliest tokens shown with each (default: 3)")
    add("--max-new-tokens", type=int, metavar="N", help="longest completion (default: the recipe's)")
    add("--max-rows", type=int, metavar="N", help="completions in flight at once")
    add("--seed", type=int, help="of the draws (default: the recipe's)")
    add("--overwrite", action="store_true", help="remove the probe in the output directory first")
    add("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(hint="Run the same command again: finished parts are kept.")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    from trb.cli.plan import add_plan_arguments

    parser.add_argument("--config", metavar="FILE", help="check the pair, lengths and batch of this recipe")
    parser.add_argument("--student", metavar="SPEC", help="with --teacher: check this pair")
    parser.add_argument("--teacher", metavar="SPEC", help="with --student: check this pair")
    parser.add_argument("--launch", metavar="FILE", help="estimate memory for this `accelerate launch` configuration")
    add_plan_arguments(parser)


# ---- commands ----


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.help_keys:
        print_keys()
        return 0
    from trb.studies.run import train
    from trb.studies.yaml_files import ConfigError

    recipe, directory = _recipe(arguments, rest)
    methods = recipe.run.methods
    if methods:
        name = recipe.training.get("method")
        if name not in methods:
            raise ConfigError(
                f"{arguments.config} compares {', '.join(methods)}: use `trb compare`, or choose one with --method"
            )
        recipe = recipe.for_method(name)
        directory = directory if arguments.output_dir else directory / name
    with listening(arguments.quiet) as listener:
        results = train(recipe, directory, **_conditions(arguments), listener=listener)
    return _conclude(results, directory)


def _compare(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.studies.comparison import compare
    from trb.studies.yaml_files import ConfigError

    recipe, directory = _recipe(arguments, rest)
    if recipe.run.methods and "method" in recipe.training:
        raise ConfigError("method means nothing to `trb compare`: it runs every entry of methods")
    with listening(arguments.quiet) as listener:
        results = compare(recipe, directory, **_conditions(arguments), listener=listener)
    return _conclude(results, directory)


def _recipe(arguments: argparse.Namespace, rest: list[str]) -> tuple["Recipe", Path]:
    from trb.models.packaged import quiet_libraries
    from trb.studies.keys import parse_overrides
    from trb.studies.recipe import load_recipe
    from trb.studies.yaml_files import ConfigError

    if arguments.config is None:
        raise ConfigError("--config is missing: name a recipe, such as recipes/quickstart.yaml")
    quiet_libraries()
    recipe = load_recipe(arguments.config, parse_overrides(rest))
    return recipe, Path(arguments.output_dir or Path("runs") / Path(arguments.config).stem)


def _conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What may happen to a run that is in the output directory."""
    return {"overwrite": arguments.overwrite, "accept_changes": arguments.accept_changes}


def _conclude(results: Mapping[str, Any], directory: Path) -> int:
    """The table, the report, and where everything is."""
    if int(os.environ.get("RANK", "0")):
        return 0
    from trb.report import write_report

    report = write_report(directory)
    new_console().print(score_table(results))
    print_paths(results=directory / RESULTS, report=report)
    return 0


def _eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.models.packaged import quiet_libraries
    from trb.studies.directories import sole_run
    from trb.studies.material import RunDirectoryError, load_student, load_tokenizers, model_of_run, problem_sets
    from trb.studies.recipe import make_recipe
    from trb.studies.scores import evaluate_suites
    from trb.tasks.grading import Verifier
    from trb.training.ranks import Ranks

    quiet_libraries()
    model_spec = model_of_run(arguments.model)
    folder = Path(arguments.output_dir) if arguments.output_dir else None
    recipe = make_recipe(_eval_values(arguments, model_spec), source="options")
    run, args = recipe.run, recipe.training_config(folder or "unused")
    is_first = Ranks.of_launch().is_first
    held = [name for name in _OF_A_RUN if folder and (folder / name).exists()]
    if held:
        raise RunDirectoryError(f"{folder} holds {held[0]} of a training run; give the evaluation its own --output-dir")
    with sole_run(folder, first=is_first) if folder else nullcontext():
        with listening(arguments.quiet) as listener, Verifier(run.reward_timeout_s) as verifier:
            listener.stage("loading the model and problems")
            problems = problem_sets(run)
            tokenizer, _ = load_tokenizers(run)
            model = load_student(run)
            if folder and not arguments.resume and is_first:
                shutil.rmtree(folder / EVALUATIONS, ignore_errors=True)
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
            )
        if is_first:
            _keep_evaluation(scores, model_spec, folder)
    return 0


def _keep_evaluation(scores: list[dict[str, Any]], model_spec: str, folder: Path | None) -> None:
    from trb.studies import provenance
    from trb.studies.scores import mean_of_suites

    results = {score["name"]: score for score in scores}
    if len(scores) > 1:
        results["mean"] = {**mean_of_suites(scores), "suites": list(results)}
    new_console().print(score_table(results, gain=False))
    if folder:
        RESULTS.write(folder / RESULTS, {"model": model_spec, **results, "provenance": provenance.describe()})


def _eval_values(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """The options of `trb eval` as keys of a recipe."""
    return {
        "student": model,
        "teacher": model,
        "train_data": "none",
        "student_revision": arguments.revision,
        "teacher_revision": arguments.revision,
        "student_dtype": arguments.dtype,
        "student_keep_layers": arguments.keep_layers,
        "student_trust_remote_code": arguments.trust_remote_code,
        "teacher_trust_remote_code": arguments.trust_remote_code,
        "chat_template": arguments.chat_template,
        "system_prompt": arguments.system_prompt,
        "eval_data": arguments.data,
        "eval_split": arguments.split,
        "eval_limit": arguments.limit,
        "eval_samples": arguments.samples,
        "eval_max_new_tokens": arguments.max_new_tokens,
        "eval_temperature": arguments.temperature,
        "eval_seed": arguments.seed,
        "eval_max_rows": arguments.max_rows,
        "bf16": False,
    }


def _sweep(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.models.packaged import quiet_libraries
    from trb.studies.study import load_study

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers is {arguments.workers}; give at least 1")
    quiet_libraries()
    study = load_study(arguments.config)
    if arguments.plan:
        print_plan(study)
        return 0
    from trb.studies.sweep import run_study

    directory = Path(arguments.output_dir or Path("runs") / study.name)
    with following(arguments.quiet) as listener:
        results = run_study(
            study,
            directory,
            workers=arguments.workers,
            ray=arguments.ray,
            gpus=arguments.gpus,
            keep_models=arguments.keep_models,
            listener=listener,
        )
    from trb.report import write_report

    console = new_console()
    for setting in results["settings"].values():
        console.print(study_table(setting))
    print_paths(results=directory / STUDY, report=write_report(directory))
    return 0


def _probe(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.models.packaged import quiet_libraries
    from trb.report import write_report
    from trb.studies.probe import probe

    quiet_libraries()
    recipe = _probed_recipe(arguments)
    directory = Path(arguments.output_dir or f"runs/probe-{arguments.setting or Path(arguments.config).stem}")
    names = ("problems", "samples", "excerpts", "alternatives", "overwrite", "model")
    options = {name: getattr(arguments, name) for name in names}
    for name in ("budgets", "truncations", "kl_budget", "skd_top_k", "max_new_tokens", "max_rows", "seed"):
        if (value := getattr(arguments, name)) is not None:  # else the probe's own default
            options[name] = value
    with listening(arguments.quiet) as listener:
        probe(recipe, directory, **options, listener=listener)
    print_paths(results=directory / PROBE, report=write_report(directory))
    return 0


def _probed_recipe(arguments: argparse.Namespace) -> "Recipe":
    """The recipe named, or the first trb configuration of a study's setting."""
    from trb.studies.recipe import load_recipe
    from trb.studies.study import Unit, load_study
    from trb.studies.yaml_files import ConfigError, read_yaml

    path = Path(arguments.config)
    if "settings" not in read_yaml(path):
        if arguments.setting:
            raise ConfigError(f"--setting means nothing for {path}, which is a recipe and no study; leave it out")
        return load_recipe(path)
    study = load_study(path)
    if arguments.setting not in study.settings:
        raise ConfigError(f"{path} is a study: choose one of its settings with --setting, {', '.join(study.settings)}")
    method = "trb" if "trb" in study.methods else next(iter(study.methods))
    return study.recipe_of(Unit(arguments.setting, "select", method, 0, study.seeds.select[0]))


def _report(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.report import export, write_report

    print(printable(str(write_report(arguments.directory)), lines=False))
    for path in export(arguments.directory, arguments.export) if arguments.export else ():
        print(printable(str(path), lines=False))
    return 0
