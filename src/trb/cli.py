"""The command `trb`: train, eval, compare, sweep, probe, report, doctor.

Arguments in, tables and exit codes out; what the commands do is in the modules they call. Those are imported inside
the commands, so that `trb --help` answers at once. Exit codes: 0 done, 1 a check of `doctor` failed (or a bug), 2 the
request cannot be carried out (the message says why), 130 interrupted.

Nothing a model wrote is ever printed: a completion can hold terminal escape sequences.
"""

import argparse
import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import trb

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from trb.config import Recipe, RunConfig
    from trb.experiments import Listener
    from trb.study import Study
    from trb.sweep import StudyListener
    from trb.trainer import TRBConfig

__all__ = ["main"]

_OVERRIDES = """\
Every key of the recipe is also an option: --learning-rate 3e-5, --max_steps=50, --bf16, --no-bf16,
--methods.trb.initial_kl_budget 0.1. `trb train --help-keys` lists them with their defaults."""

_EXAMPLES = {
    "": """\
    trb compare --config recipes/quickstart.yaml
    trb train --config recipes/qwen3-1.7b-from-8b.yaml --output-dir runs/qwen3
    trb eval --model runs/qwen3 --data math500 gsm8k --samples 4
    trb sweep --config recipes/study/zoo.yaml --workers 2
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
    trb sweep --config recipes/study/zoo.yaml --plan
    trb sweep --config recipes/study/zoo.yaml --output-dir runs/study --workers 2
    trb sweep --config recipes/study/qwen3.yaml --output-dir /shared/study --ray auto --gpus 8""",
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
    trb doctor --config recipes/smollm2.yaml""",
}


# What the machine refuses needs no traceback, whoever asked for it.
_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # Threads that spin while they wait slow each other down wherever cores are shared; set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.command(arguments, rest)
    except KeyboardInterrupt:
        _say(f"interrupted. {arguments.hint}")
        return 130
    except Exception as error:
        if os.environ.get("TRB_DEBUG") == "1" or not _is_explained(error):
            raise
        _say(f"error: {_message(error)}")
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


def _message(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)


def _say(text: str) -> None:
    print(_printable(text), file=sys.stderr)


def _printable(text: str) -> str:
    """`text` without control characters: messages quote files and names that others wrote."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


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
    report = _command(commands, "report", "write report.html for a run, a comparison, a study or a probe", _report)
    report.add_argument("directory", metavar="DIR", help="a run, comparison, study or probe directory")
    report.add_argument(
        "--export", metavar="OUT", help="also write figures (PNG, SVG) and tables (Markdown, CSV, LaTeX)"
    )
    _add_doctor(_command(commands, "doctor", "check this machine, and a pair of models", _doctor, overrides=True))
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
    add("--output-dir", metavar="DIR", help="write results.json and the results of every problem there")
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
    parser.add_argument("--config", metavar="FILE", help="check the pair, lengths and batch of this recipe")
    parser.add_argument("--student", metavar="SPEC", help="with --teacher: check this pair")
    parser.add_argument("--teacher", metavar="SPEC", help="with --student: check this pair")


# ---- commands ----


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.help_keys:
        _print_keys()
        return 0
    from trb.config import ConfigError
    from trb.experiments import train

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
    with _listening(arguments.quiet) as listener:
        results = train(recipe, directory, overwrite=arguments.overwrite, listener=listener)
    return _conclude(results, directory)


def _compare(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.config import ConfigError
    from trb.experiments import compare

    recipe, directory = _recipe(arguments, rest)
    if recipe.run.methods and "method" in recipe.training:
        raise ConfigError("method means nothing to `trb compare`: it runs every entry of methods")
    with _listening(arguments.quiet) as listener:
        results = compare(recipe, directory, overwrite=arguments.overwrite, listener=listener)
    return _conclude(results, directory)


def _recipe(arguments: argparse.Namespace, rest: list[str]) -> tuple["Recipe", Path]:
    from trb.config import ConfigError, load_recipe, parse_overrides
    from trb.loading import quiet_libraries

    if arguments.config is None:
        raise ConfigError("--config is missing: name a recipe, such as recipes/quickstart.yaml")
    quiet_libraries()
    recipe = load_recipe(arguments.config, parse_overrides(rest))
    return recipe, Path(arguments.output_dir or Path("runs") / Path(arguments.config).stem)


def _conclude(results: Mapping[str, Any], directory: Path) -> int:
    """The table, the report, and where everything is."""
    if int(os.environ.get("RANK", "0")):
        return 0
    from trb.report import write_report

    console = _console()
    report = write_report(directory)
    console.print(_score_table(results))
    for label, path in (("results", directory / "results.json"), ("report", report)):
        console.print(f"{label}: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb import provenance
    from trb.config import make_recipe
    from trb.experiments import evaluate_suites, load_student, load_tokenizers, mean_of_suites, problem_sets
    from trb.files import write_json
    from trb.loading import quiet_libraries
    from trb.rewards import Verifier

    quiet_libraries()
    model_spec = _model_of_run(arguments.model)
    folder = Path(arguments.output_dir) if arguments.output_dir else None
    recipe = make_recipe(_eval_values(arguments, model_spec), source="options")
    run, args = recipe.run, recipe.training_config(folder or "unused")
    if folder and not arguments.resume:
        shutil.rmtree(folder / "evaluations", ignore_errors=True)
    with _listening(arguments.quiet) as listener, Verifier(run.reward_timeout_s) as verifier:
        listener.stage("loading the model and problems")
        problems = problem_sets(run)
        tokenizer, _ = load_tokenizers(run)
        model = load_student(run)
        scores = evaluate_suites(
            model,
            tokenizer=tokenizer,
            problems=problems,
            run=run,
            args=args,
            verifier=verifier,
            folder=folder / "evaluations" if folder else None,
            label=model_spec,
            listener=listener,
        )
    results = {score["name"]: score for score in scores}
    if len(scores) > 1:
        results["mean"] = {**mean_of_suites(scores), "suites": list(results)}
    _console().print(_score_table(results, gain=False))
    if folder:
        write_json(folder / "results.json", {"model": model_spec, **results, "provenance": provenance.describe()})
    return 0


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


def _model_of_run(spec: str) -> str:
    """The trained model of a run directory; any other spec is itself."""
    model = Path(spec).expanduser() / "model"
    return str(model) if model.is_dir() and not (model.parent / "config.json").exists() else spec


def _sweep(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.loading import quiet_libraries
    from trb.study import load_study

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers is {arguments.workers}; give at least 1")
    quiet_libraries()
    study = load_study(arguments.config)
    if arguments.plan:
        _print_plan(study)
        return 0
    from trb.sweep import run_study

    directory = Path(arguments.output_dir or Path("runs") / study.name)
    with _following(arguments.quiet) as listener:
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

    console = _console()
    for setting in results["settings"].values():
        console.print(_study_table(setting))
    for label, path in (("results", directory / "study.json"), ("report", write_report(directory))):
        console.print(f"{label}: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _probe(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.diagnostics import probe
    from trb.loading import quiet_libraries
    from trb.report import write_report

    quiet_libraries()
    recipe = _probed_recipe(arguments)
    directory = Path(arguments.output_dir or f"runs/probe-{arguments.setting or Path(arguments.config).stem}")
    names = ("problems", "samples", "excerpts", "alternatives", "overwrite", "model")
    options = {name: getattr(arguments, name) for name in names}
    for name in ("budgets", "truncations", "kl_budget", "skd_top_k", "max_new_tokens", "max_rows", "seed"):
        if (value := getattr(arguments, name)) is not None:  # else the probe's own default
            options[name] = value
    with _listening(arguments.quiet) as listener:
        probe(recipe, directory, **options, listener=listener)
    for label, path in (("results", directory / "probe.json"), ("report", write_report(directory))):
        print(f"{label}: {path}")
    return 0


def _probed_recipe(arguments: argparse.Namespace) -> "Recipe":
    """The recipe named, or the first trb configuration of a study's setting."""
    from trb.config import ConfigError, load_recipe, read_yaml
    from trb.study import Unit, load_study

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

    print(write_report(arguments.directory))
    for path in export(arguments.directory, arguments.export) if arguments.export else ():
        print(path)
    return 0


# ---- what is shown ----


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _score_table(results: Mapping[str, Any], *, gain: bool = True) -> Any:
    """Student before, each method, teacher: pass@1 in percent, its 95% interval, and the gain in points."""
    from rich.table import Table
    from rich.text import Text

    names = {"student": "student before", "teacher": "teacher"}
    table = Table(caption_justify="left")
    for heading in ("", "pass@1 %", "95% interval", *(["gain"] if gain else []), "tokens", "stop %"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    start = results.get("student", {}).get("pass_at_1")
    for name, score in results.items():
        if name == "provenance":
            continue
        value, interval = score.get("pass_at_1"), score.get("interval")
        is_method = name not in names and value is not None and start is not None
        cells = [
            _percent(value),
            "" if interval is None else f"{_percent(interval[0])} to {_percent(interval[1])}",
            *([f"{100 * (value - start):+.1f}" if is_method else ""] if gain else []),
            f"{score['mean_length']:.0f}" if "mean_length" in score else "",
            _percent(score.get("stop_rate")),
        ]
        table.add_row(Text(_printable(names.get(name, name))), *cells)
    return table


def _print_plan(study: "Study") -> None:
    """What a study is about to run."""
    from rich.table import Table

    table = Table("method", "configurations", "keys", title=study.name, title_justify="left")
    for method, configurations in study.methods.items():
        keys = ", ".join(dict.fromkeys(key for entry in configurations for key in entry))
        table.add_row(_printable(method), str(len(configurations)), _printable(keys) or "nothing to choose")
    console = _console()
    console.print(table)
    select, test = len(study.units("select")), len(study.methods) * len(study.settings) * len(study.seeds.test)
    console.print(
        f"settings: {', '.join(study.settings)}\nselection: {select} runs ({len(study.seeds.select)} seeds, by the "
        f"{study.select_by} development score)\ntest: {test} runs ({len(study.seeds.test)} paired seeds)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _study_table(setting: Mapping[str, Any]) -> Any:
    """Per method: pass@1 in percent with its interval, and the paired difference to plain distillation in points."""
    from rich.table import Table

    methods = setting["methods"]
    first = next(iter(methods.values()), {"seeds": 0, "problems": 0})
    title = f"{setting['title']}: {first['seeds']} paired seeds, {first['problems']} test problems"
    table = Table(title=_printable(title), title_justify="left")
    for heading in ("", "pass@1 %", "95% interval", "minus opd", "95% interval", "p (Holm)"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in ("student", "teacher"):
        low, high = map(_percent, setting[name]["interval"])
        table.add_row(name, _percent(setting[name]["pass_at_1"]), f"{low} to {high}", "", "", "")
    for name, score in methods.items():
        difference, (low, high) = score["difference_to_opd"], map(_percent, score["interval"])
        cells = ["", "", ""]
        if difference is not None:
            ends = " to ".join(f"{100 * end:+.2f}" for end in difference["interval"])
            cells = [f"{100 * difference['estimate']:+.2f}", ends, f"{difference['p_value_holm']:.3f}"]
        table.add_row(_printable(name), _percent(score["pass_at_1"]), f"{low} to {high}", *cells)
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _print_keys() -> None:
    """Every key of a recipe with its type, default and help."""
    from trb.config import describe_keys

    for title, entries in describe_keys().items():
        print(f"\n{title}\n")
        for key, kind, default, text in entries:
            print(textwrap.fill(f"{key}  ({kind}; {default})", 100, initial_indent="  ", subsequent_indent="    "))
            print(textwrap.fill(text, 100, initial_indent="      ", subsequent_indent="      "))


@contextmanager
def _listening(quiet: bool) -> Iterator["Listener"]:
    """A display on standard error: live bars on a terminal, a line now and then elsewhere, nothing when quiet."""
    from rich.console import Console

    from trb.experiments import Listener

    console = Console(stderr=True)
    if quiet or int(os.environ.get("RANK", "0")):
        yield Listener()
    elif console.is_terminal:
        with _live_display(console) as listener:
            yield listener
    else:
        yield _lines_display(console)


@contextmanager
def _following(quiet: bool) -> Iterator["StudyListener"]:
    """A display of a whole study on standard error: one bar per phase on a terminal, a line per run elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from trb.sweep import StudyListener

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    class Bars(StudyListener):
        def __init__(self, progress: Progress) -> None:
            self.progress, self.name, self.done, self.total = progress, "", 0, 0
            self.task: Any = None

        def stage(self, text: str) -> None:
            console.print(_printable(text), markup=False, highlight=False, soft_wrap=True)

        def phase(self, name: str, done: int, total: int) -> None:
            self.name, self.done, self.total = name, done, total
            self.task = self.progress.add_task(f"{name} runs", completed=done, total=total)

        def finished(self, job: str, seconds: float) -> None:
            self.done += 1
            self.progress.advance(self.task)
            if not console.is_terminal:
                self.stage(f"{self.name} {self.done} of {self.total}: {job}, {seconds:.0f} s")

    if quiet:
        yield StudyListener()
        return
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        yield Bars(progress)


def _numbers(logs: Mapping[str, Any]) -> str:
    """Loss, reward and budget, as far as they are known."""
    shown = (("loss", "loss", ".3f"), ("reward", "trb/reward", ".2f"), ("budget", "trb/kl_budget", ".3g"))
    return "  ".join(f"{label} {logs[key]:{form}}" for label, key, form in shown if logs.get(key) is not None)


@contextmanager
def _live_display(console: "Console") -> Iterator["Listener"]:
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from trb.experiments import Listener

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )

    class Live(Listener):
        def __init__(self, progress: Progress) -> None:
            self.progress = progress
            self.steps: dict[str, int] = {}
            self.done: list[str] = []
            self.current = ""
            self.whole = progress.add_task("", total=None, numbers="", visible=False)
            self.task = progress.add_task("starting", total=None, numbers="")

        def plan(self, runs: Mapping[str, int]) -> None:
            self.steps = dict(runs)
            if len(runs) > 1:
                total = sum(runs.values()) if all(runs.values()) else None
                self.progress.update(self.whole, total=total, visible=True)
                self._show_whole(0)

        def stage(self, text: str) -> None:
            self.progress.update(self.task, description=escape(_printable(text)), numbers="")

        def run(self, name: str, done: int, steps: int) -> None:
            self.current = name
            self.steps[name] = steps
            description = escape(f"{name}: training")
            self.progress.update(self.task, description=description, total=steps, completed=done)
            self._show_whole(done)

        def step(self, step: int, logs: Mapping[str, Any]) -> None:
            self.progress.update(self.task, completed=step, numbers=_numbers(logs))
            self._show_whole(step)

        def finished(self, name: str) -> None:
            self.done.append(name)
            self._show_whole(0)

        def _show_whole(self, step: int) -> None:
            completed = sum(self.steps.get(name, 0) for name in self.done) + step
            description = f"methods {len(self.done)} of {len(self.steps)}"
            self.progress.update(self.whole, description=description, completed=completed)

    with Progress(*columns, console=console, transient=True) as progress:
        yield Live(progress)


def _lines_display(console: "Console") -> "Listener":
    from trb.experiments import Listener

    class Lines(Listener):
        name, steps = "", 0

        def stage(self, text: str) -> None:
            console.print(_printable(text), markup=False, highlight=False, soft_wrap=True)

        def run(self, name: str, done: int, steps: int) -> None:
            self.name, self.steps = name, steps

        def step(self, step: int, logs: Mapping[str, Any]) -> None:
            if step == self.steps or step % max(1, self.steps // 10) == 0:
                self.stage(f"{self.name}: step {step} of {self.steps}  {_numbers(logs)}")

    return Lines()


# ---- doctor ----


class Check(NamedTuple):
    """One line of `trb doctor`."""

    status: Literal["ok", "warn", "fail"]
    subject: str
    text: str
    remedy: str = ""


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    from rich.text import Text

    from trb.config import load_recipe, make_recipe, parse_overrides
    from trb.loading import quiet_libraries

    options = {name: value for name in ("student", "teacher") if (value := getattr(arguments, name))}
    options |= parse_overrides(rest)
    recipe = None
    if arguments.config:
        quiet_libraries()
        recipe = load_recipe(arguments.config, options)
    elif options:
        recipe = make_recipe({"train_data": "none"}, options, source="options")
    console, failed = _console(), False
    for check in _checks(recipe):
        style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.status]
        remedy = f". {check.remedy}" if check.remedy else ""
        line = Text.assemble(
            (f"{check.status:<5}", style), f"{check.subject}: {_printable(check.text)}{_printable(remedy)}"
        )
        console.print(line, soft_wrap=True)
        failed = failed or check.status == "fail"
    return 1 if failed else 0


def _checks(recipe: "Recipe | None") -> Iterator[Check]:
    from trb.loading import quiet_libraries

    quiet_libraries()
    yield from _check_software()
    yield from _check_machine()
    if recipe is not None:
        yield from _check_pair(recipe.run, recipe.training_config("unused"), has_lengths=recipe.source != "options")


def _check_software() -> Iterator[Check]:
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("ok" if sys.version_info >= (3, 11) else "fail", "python", python, "")
    try:
        requirements = [Requirement(text) for text in requires("trb") or []]
    except PackageNotFoundError:
        requirements = [
            Requirement(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
        ]
        yield Check(
            "warn", "trb", f"{trb.__version__}, not installed: its version ranges are not checked", "pip install ."
        )
    else:
        yield Check("ok", "trb", trb.__version__)
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Check("fail", requirement.name, "missing", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Check("ok", requirement.name, found)
        else:
            yield Check(
                "fail", requirement.name, f"{found}, supported: {requirement.specifier}", f"pip install '{requirement}'"
            )


def _check_machine() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Check("ok", f"gpu {index}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    elif torch.accelerator.is_available():
        yield Check("ok", "accelerator", str(torch.accelerator.current_accelerator()))
    else:
        yield Check("warn", "gpu", "none", "The zoo and models to about 0.2 B parameters train on a CPU")
    yield Check("ok", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use by torch")
    yield Check("ok", "memory", f"{_memory_bytes() / 1e9:.1f} GB available")
    free = shutil.disk_usage(".").free
    status: Literal["ok", "warn"] = "ok" if free > 5e9 else "warn"
    remedy = "" if free > 5e9 else "A checkpoint takes about 3 times the student; choose --output-dir on a larger disk"
    yield Check(status, "disk", f"{free / 1e9:.1f} GB free here", remedy)


def _memory_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available


def _check_pair(run: "RunConfig", args: "TRBConfig", *, has_lengths: bool) -> Iterator[Check]:
    from trb.experiments import load_tokenizers
    from trb.vocab import SharedVocabulary, check_heads, head_rows, stop_token_ids

    try:
        tokenizer, teacher_tokenizer = load_tokenizers(run)
    except (ValueError, OSError, ImportError) as error:
        yield Check("fail", "tokenizer", _message(error))
        return
    yield Check("ok", "tokenizer", f"the same for both, {len(tokenizer)} tokens")
    if tokenizer.chat_template:
        yield Check("ok", "chat template", "present")
    else:
        yield Check(
            "fail", "chat template", "the student's tokenizer has none", "Set chat_template to a Jinja file or plain"
        )
    try:
        student, teacher = _outline(run, "student"), _outline(run, "teacher")
        used = max(tokenizer.get_vocab().values()) + 1
        rows = head_rows(student), head_rows(teacher)
        check_heads(*rows, used)
    except (ValueError, OSError, ImportError) as error:
        yield Check("fail", "models", _message(error))
        return
    same = "" if rows[0] == rows[1] else f": blended and scored on the {min(rows)} both have"
    yield Check("ok", "heads", f"student {rows[0]} rows, teacher {rows[1]}, tokenizer uses {used}{same}")
    try:
        stops = stop_token_ids(student, tokenizer), stop_token_ids(teacher, teacher_tokenizer)
        shared = SharedVocabulary.of(rows, *stops)
    except ValueError as error:
        yield Check("fail", "end of sequence", str(error), "Set eos_token_id in the model's generation_config.json")
        return
    folded = f"{', '.join(map(str, shared.folded_ids))} folded onto it" if shared.folded_ids else "nothing to fold"
    yield Check(
        "ok",
        "end of sequence",
        f"student stops with {_ids(stops[0])}, teacher with {_ids(stops[1])}; {shared.stop_id} is emitted, {folded}",
    )
    if has_lengths:  # a bare pair has no recipe that says how long its sequences are
        yield _check_lengths(run, args, student, teacher)
        yield _check_memory(run, args, student, teacher)


def _ids(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def _outline(run: "RunConfig", role: str) -> "PreTrainedModel":
    """A model without weights: what it would be, without the memory to load it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from trb.loading import load_model, prune_depth, resolve

    spec, revision = getattr(run, role), getattr(run, f"{role}_revision")
    trust = getattr(run, f"{role}_trust_remote_code")
    keep = run.student_keep_layers if role == "student" else None
    if (Path(spec).expanduser() / "adapter_config.json").is_file():
        return load_model(spec, trust_remote_code=trust, keep_layers=keep)
    source = resolve(spec, revision)
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust, revision=revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    try:
        model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:  # none was saved; the model's configuration names the stop ids
        model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
    return model if keep is None else prune_depth(model, keep)


def _check_lengths(
    run: "RunConfig", args: "TRBConfig", student: "PreTrainedModel", teacher: "PreTrainedModel"
) -> Check:
    longest = run.max_prompt_length + max(int(args.max_completion_length or 0), run.eval_max_new_tokens or 0)
    for role, model in (("student", student), ("teacher", teacher)):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            remedy = "Lower max_prompt_length, max_completion_length or eval_max_new_tokens"
            return Check("fail", "lengths", f"up to {longest} tokens, and the {role} has {limit} positions", remedy)
    return Check("ok", "lengths", f"up to {longest} tokens fit both models")


def _check_memory(run: "RunConfig", args: "TRBConfig", student: "PreTrainedModel", teacher: "PreTrainedModel") -> Check:
    import torch

    needed = _memory_needed(run, args, student, teacher)
    on_gpu = torch.cuda.is_available()
    available = torch.cuda.mem_get_info()[0] if on_gpu else _memory_bytes()
    text = (
        f"about {needed / 1e9:.1f} GB for both models, optimizer, caches and activations on one device "
        f"(a rough estimate); {available / 1e9:.1f} GB are free"
    )
    remedy = "Lower per_device_train_batch_size or rollout_batch_size, use bfloat16 or lora_rank, or shard with FSDP"
    if needed > available:
        return Check("fail", "memory estimate", text, remedy)
    return (
        Check("warn", "memory estimate", text, remedy)
        if needed > 0.8 * available
        else Check("ok", "memory estimate", text)
    )


def _memory_needed(run: "RunConfig", args: "TRBConfig", student: "PreTrainedModel", teacher: "PreTrainedModel") -> int:
    """Bytes on one device: sampling and the update take turns, so the larger of the two counts."""
    from trb.loading import memory_estimate
    from trb.losses import default_chunk_tokens
    from trb.vocab import head_rows

    length = run.max_prompt_length + int(args.max_completion_length or 0)
    batch = args.per_device_train_batch_size
    rows = min(
        args.rollout_batch_size or batch * args.gradient_accumulation_steps, batch * args.gradient_accumulation_steps
    )
    if run.lora_rank:
        student.requires_grad_(False)
    update = memory_estimate(
        student,
        batch=batch,
        sequence_length=length,
        training=True,
        dtype=run.student_dtype,
        logits_chunk=args.loss_chunk_tokens or default_chunk_tokens(head_rows(student), args.device.type),
    )
    draft = memory_estimate(student, batch=rows, sequence_length=length, training=False, dtype=run.student_dtype)
    reference = memory_estimate(teacher, batch=rows, sequence_length=length, training=False, dtype=run.teacher_dtype)
    activations = update["activations"]
    if args.gradient_checkpointing:
        # Each layer keeps its input, and one layer at a time keeps the rest.
        config = student.config.get_text_config()
        layers, element = config.num_hidden_layers, update["weights"] // sum(p.numel() for p in student.parameters())
        activations = activations // layers + layers * batch * length * config.hidden_size * element
    resident = update["weights"] + update["gradients"] + update["optimizer"] + reference["weights"]
    sampling = draft["kv_cache"] + reference["kv_cache"] + draft["logits"] + reference["logits"]
    return resident + max(sampling, activations + update["logits"])
