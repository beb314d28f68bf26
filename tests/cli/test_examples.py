"""Every command that a help text or a document shows: run as far as this machine can, and parsed at least.

The commands are read from the texts themselves, so that a new one is tested by being written.
"""

import argparse
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_recipes import STUDY

from trb import cli
from trb.cli import main
from trb.studies import study as studies
from trb.studies import sweep
from trb.studies.jobs import do_job
from trb.studies.keys import parse_overrides
from trb.studies.recipe import load_recipe, make_recipe
from trb.studies.shipped import RECIPES
from trb.studies.study import Study

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RECIPES.rglob("*.yaml"))]

# Options that follow those of the example, and so win: models and data that need no download, and sizes of seconds.
# What is left of the example is its command, its recipe, its other options and where it writes.
PAIR = ["--student", "zoo:student", "--teacher", "zoo:teacher", "--student-dtype=float32", "--teacher-dtype=float32"]
RUN = [
    *PAIR,
    *("--train-data", "zoo:chains", "--train-limit=16", "--max-prompt-length=64", "--student-keep-layers=null"),
    *("--train-prompt-column=null", "--train-answer-column=null", "--system-prompt=null", "--chat-template=null"),
    *("--eval-data", "zoo:chains", "--eval-limit=2", "--eval-samples=1", "--eval-max-new-tokens=8"),
    *("--max-steps=1", "--prompts-per-step=2", "--num-generations=2", "--per-device-train-batch-size=4"),
    *("--max-completion-length=8", "--held-out-prompts=0", "--save-strategy=no", "--bf16=false"),
]
SMALL = {
    "train": [*RUN, "--quiet"],
    "compare": [*RUN, "--quiet"],
    "eval": ["--limit", "2", "--samples", "1", "--quiet"],
    "probe": [
        *("--problems", "2", "--samples", "1", "--excerpts", "1", "--budgets", "0.1", "--truncations", "4"),
        *("--skd-top-k", "3", "--max-new-tokens", "8", "--quiet"),
    ],
    "sweep": ["--workers", "1", "--quiet"],
    "report": [],
    "doctor": [],
    "init": [],
}

# Models and data of the hub, by what stands for them in an example: the zoo takes their place.
FROM_THE_HUB = ("qwen3", "smollm2", "Qwen/", "math500", "gsm8k")

# Examples that this machine can only parse, and why.
ONLY_PARSED = {"--ray": "it needs a Ray cluster", "--help-keys": "test_cli reads what it prints"}


def commands() -> dict[str, argparse.ArgumentParser]:
    subparsers = next(action for action in cli._parser()._actions if isinstance(action.choices, dict))
    return dict(subparsers.choices)  # type: ignore[arg-type]


def shown() -> list[str]:
    """The examples in the help texts of `trb` and of each command."""
    texts = [parser.format_help() for parser in (cli._parser(), *commands().values())]
    lines = [line.strip() for text in texts for line in text.partition("examples:")[2].splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("trb ")))


def words_of(line: str) -> list[str]:
    """The arguments of a command line that runs trb, however it starts it."""
    words = shlex.split(line, comments=True)
    return words[words.index("trb") + 1 :]


def test_every_command_shows_examples() -> None:
    named = {words_of(line)[0] for line in shown()}
    assert named >= commands().keys()
    assert len(shown()) > 2 * len(commands())


# ---- they parse, and their options and recipes exist ----


@cache
def documented() -> list[str]:
    """Every command in a code block of a page, and in the comments at the head of a recipe."""
    found, names = [], "|".join(commands())
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
        blocks = [block for kind, block in fenced if kind != "python"] if page.suffix == ".md" else [text]
        for line in re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines():
            command = line.lstrip("#$ ").partition("   ")[0]
            if re.match(rf"(\w+=\S+ )*(trb|(accelerate launch|torchrun|python) .*-m trb) ({names}) ", command):
                found.append(f"{page.name}: {command}")
    return found


def test_the_documents_are_read() -> None:
    pages = {line.partition(":")[0] for line in documented()}
    known = {"README.md", "first-steps.md", "studies.md", "distributed.md", "scaling.md", "quickstart.yaml"}
    assert pages >= known, pages


@pytest.mark.parametrize("line", [*shown(), *documented()])
def test_an_example_parses_and_what_it_names_exists(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments, rest = cli._parser().parse_known_args(words_of(line))
    assert not rest or arguments.takes_overrides
    overrides = parse_overrides(rest)
    if words_of(line)[0] in ("sweep", "probe") and str(arguments.config).startswith("studies/"):
        study = studies.load_study(arguments.config)
        assert getattr(arguments, "setting", None) in (None, *study.settings)
    elif getattr(arguments, "config", None):
        load_recipe(arguments.config, overrides)
    elif overrides or getattr(arguments, "student", None):
        make_recipe({"student": "a", "teacher": "b", "train_data": "none"}, overrides)
    launch = re.search(r"--config_file (\S+)", line)
    assert launch is None or (ROOT / launch[1]).is_file()


# ---- they run ----


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples read: a run, a comparison and a study, where earlier examples would have put them."""
    root = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["compare", "--config", "quickstart", *RUN, "--quiet"]) == 0
        shutil.copytree("runs/quickstart/trb", "runs/qwen3")
        small_study(patch)
        assert main(["sweep", "--config", "studies/zoo", "--output-dir", "runs/study", *SMALL["sweep"]]) == 0
    return root


def small_study(patch: pytest.MonkeyPatch, setting: str | None = None) -> None:
    """In place of any study, a tiny one with one of its settings, once its own file has been read."""
    load = studies.load_study

    def loaded(path: Any) -> Study:
        [only] = STUDY["settings"].values()
        name = setting or next(iter(load(path).settings))
        changes = {"settings": {name: only}, "methods": {"opd": [{}]}, "configurations": 1}
        return Study.model_validate(STUDY | changes)

    @contextmanager
    def here(directory: Path, *_: Any) -> Iterator[Any]:
        yield SimpleNamespace(map=lambda missing: [(job, do_job(str(directory), False, job)) for job in missing])

    patch.setattr(studies, "load_study", loaded)
    patch.setattr(sweep, "open_pool", here)  # processes of their own take longer to start than to run


@pytest.mark.parametrize("line", shown())
def test_an_example_of_the_help_runs(
    line: str,
    directories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word, why in ONLY_PARSED.items():
        if word in line.split():
            pytest.skip(f"only parsed: {why}")
    name, *words = words_of(line)
    arguments = cli._parser().parse_known_args([name, *words])[0]
    written = [getattr(arguments, option, None) for option in ("output_dir", "export")]
    for word in words:
        if word.startswith("runs/") and word not in written:
            shutil.copytree(directories / word, tmp_path / word)
    monkeypatch.chdir(tmp_path)
    more = list(SMALL.get(name, []))
    if any(word.startswith(FROM_THE_HUB) for word in words):
        instead = {
            "eval": ["--data", "zoo:chains"],
            "doctor": PAIR if "--plan" in words else RUN,
            "init": [*PAIR[:4], "--data", "zoo:chains"],
        }
        more += instead.get(name, [])
        if name == "eval" and not str(arguments.model).startswith("runs/"):
            more += ["--model", "zoo:student"]
    if name in ("sweep", "probe") and arguments.config.startswith("studies/") and "--plan" not in words:
        small_study(monkeypatch, getattr(arguments, "setting", None))
    assert main([name, *words, *more]) == 0, capsys.readouterr().err
    for path in filter(None, written):
        assert any((tmp_path / path).iterdir())
