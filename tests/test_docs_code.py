"""The code of the documents runs, or, where it needs more than a CPU, names only what exists."""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from docs_blocks import BLOCK, MARK, NOTEBOOKS, PAGES, ROOT, Block, blocks, commands

from trb.cli import _parser, main
from trb.policies import POLICIES
from trb.studies.keys import checked_value, parse_overrides
from trb.studies.recipe import load_recipe
from trb.studies.shipped import recipe_file
from trb.studies.study import load_study
from trb.tasks.grading import VERIFIERS
from trb.training.methods import BEHAVIORS, BUDGET_SCHEDULES, METHODS, TARGETS

# A command is run as it stands but for these: the same code in seconds instead of minutes.
STEP = ["--max-steps=1", "--prompts-per-step=2", "--num-generations=2", "--per-device-train-batch-size=4"]
STEP += ["--max-completion-length=8", "--train-limit=40", "--eval-limit=4", "--quiet"]
PROBE = ["--problems=4", "--samples=1", "--excerpts=1", "--budgets", "0", "0.1", "--truncations", "4"]
PROBE += ["--skd-top-k", "3", "--max-new-tokens=8", "--quiet"]
CUT = {
    "train": STEP,
    "compare": STEP,
    "eval": ["--limit", "4", "--quiet"],
    "probe": PROBE,
}
LAUNCHERS = ("accelerate", "sbatch", "torchrun")
WITH_CODE = [page for page in PAGES if any(block.language in ("python", "bash") for block in blocks(page))]


def name(page: Path) -> str:
    return page.name


# ---- what runs ----


@contextmanager
def tables_put_back() -> Iterator[None]:
    """docs/extending.md adds to the registries."""
    tables: list[dict[str, Any]] = [POLICIES, BEHAVIORS, TARGETS, BUDGET_SCHEDULES, METHODS, VERIFIERS]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def run_page(page: Path) -> dict[str, Any]:
    """Every block that is not marked, in the page's order, in one folder and one namespace; gives the namespace."""
    scope: dict[str, Any] = {"__name__": page.stem}
    with tables_put_back():
        for block in blocks(page):
            if not block.runs:
                continue
            if block.language == "python":
                # Lines are those of the page, so that a traceback points there.
                exec(compile("\n" * block.line + block.text, str(page), "exec"), scope)
            if block.language == "bash":
                for words in commands(block.text):
                    run_command(words)
    return scope


def run_command(words: list[str]) -> None:
    if words[0] == "make":  # what it runs is in the Makefile, and takes minutes
        return
    assert words[0] == "trb", f"mark the block: only trb and make can be run here, and this is {words}"
    extra = [] if "--plan" in words or "--help-keys" in words else CUT.get(words[1], [])
    assert main([*words[1:], *extra]) == 0, words


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run_page(page)
    if page.name == "extending.md":
        check_schedule(scope)


def check_schedule(scope: dict[str, Any]) -> None:
    """The example of a schedule with a memory follows what it is shown, and stands a step that shows nothing."""
    schedule = scope["Closing"](0.4)
    for shown in ({}, {"reverse_kl": 2.0}, {"reverse_kl": 1.0}, {}):
        schedule.observe(0, shown)
    assert schedule.value(1) == 0.2
    agreed = scope["Closing"](0.4)
    agreed.observe(0, {"reverse_kl": 0.0})
    assert agreed.value(1) == 0.0
    budgets = {
        given: scope["closing"](SimpleNamespace(initial_kl_budget=given), lambda: 0).value(0) for given in (None, 0.0)
    }
    assert budgets == {None: 0.01, 0.0: 0.0}


# ---- what is only looked at ----


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name)
def test_the_code_of_a_page_names_what_exists(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.language == "python":
            check_python(block.text, where)
        elif block.language == "bash":
            for words in commands(block.text):
                check_command(words, where)
        elif block.language == "yaml":
            for key, value in yaml.safe_load(block.text).items():
                checked_value(key, value, where)
        else:
            assert block.language in ("", "text"), f"{where}: {block.language} is not looked at; call it python or bash"


def test_what_builds_the_site_names_what_exists() -> None:
    hooks = sorted((ROOT / "docs").glob("*.py"))
    assert hooks
    for hook in hooks:
        check_python(hook.read_text(encoding="utf-8"), hook.name)


def check_python(code: str, where: str) -> None:
    """It compiles; what it imports from trb exists, and has the arguments that it is given."""
    names: dict[str, Any] = {}
    tree = ast.parse(code, where)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trb":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            given = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            try:
                inspect.signature(names[node.func.id]).bind_partial(*([] if starred else node.args), **given)
            except TypeError as error:
                raise AssertionError(f"{where}: {node.func.id}: {error}") from error


def check_command(words: list[str], where: str) -> None:
    program = words[0]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in [word for word in words[1:] if "=" not in word]:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"{where}: there is no target {target}"
    elif program in LAUNCHERS or program.endswith(".sh"):
        for word in words:
            if word.endswith((".sh", ".yaml")):
                assert (ROOT / word).is_file(), f"{where}: there is no {word}"
        rest = words[words.index("-m") + 2 :] if "-m" in words else words[words.index("--config") :]
        check_trb(rest if "-m" in words else ["train", *rest], where)
    elif program == "trb":
        check_trb(words[1:], where)
    else:
        assert re.fullmatch(r"(.*/)?(pip|python)", program), f"{where}: {words} cannot be looked at"


def check_trb(words: list[str], where: str) -> None:
    """The options of a command, the recipe it names, and the keys of it that are overridden."""
    try:
        arguments, rest = _parser().parse_known_args(words)
    except SystemExit as stop:
        assert stop.code == 0, f"{where}: trb {' '.join(words)} is refused"
        return
    overrides = parse_overrides(rest)
    assert not overrides or arguments.takes_overrides, f"{where}: {rest} is none of its options"
    config = getattr(arguments, "config", None)
    if config is None or not recipe_file(config).is_file():
        return
    if words[0] in ("sweep", "probe") and config.startswith("studies/"):
        load_study(config)
    else:
        load_recipe(config, overrides)


def test_a_wrong_option_key_argument_or_recipe_is_found() -> None:
    for command in (
        "trb eval --modle x --data y",
        "trb train --config quickstrat",
        "trb train --config quickstart --learning-rat 1",
        "trb sweep --config studies/zoo --learning-rate 1",
        "make quickstrt",
        "accelerate launch --config_file src/trb/recipes/accelerate/ddp2.yaml -m trb train --config quickstart",
        "curl example.org",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check_command(command.split(), "here")
    for code in ("from trb import Trainer", "from trb.blend import solve\nsolve(1, 2, budget=3)", "solve(..., x=1, 2)"):
        with pytest.raises((AssertionError, AttributeError, SyntaxError)):
            check_python(code, "here")


def test_every_mark_stands_before_a_block_and_says_what_it_needs() -> None:
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        assert content.count("<!-- not run") == len(re.findall(MARK, content)), page.name
        marked = [found for found in BLOCK.finditer(content) if found["mark"]]
        assert len(re.findall(MARK, content)) == len(marked), f"{page.name}: a mark that no block follows"


def test_a_block_behind_a_mark_is_not_run_and_others_are(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run here: needs luck -->\n```python\nraise\n```\n\n```python\nhere = 1\n```\n")
    assert [block.runs for block in blocks(page)] == [False, True]
    assert run_page(page)["here"] == 1
    page.write_text("```bash\nls\n```\n")
    with pytest.raises(AssertionError, match="mark the block"):
        run_page(page)
    assert list(blocks(page)) == [Block("bash", "ls\n", 1, runs=True)]


# ---- the site ----


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebooks_are_committed_without_outputs_and_end_with_a_report(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    assert re.search(r"\]\(runs/[\w-]+/report\.html\)", "".join(cells[-1]["source"]))


def test_the_site_has_every_page_and_fetches_nothing() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    site = yaml.safe_load(text)
    assert site["theme"]["font"] is False
    shown = set(re.findall(r": ([\w/-]+)\.md$", text, re.M))
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} | {f"tutorials/{page.stem}" for page in NOTEBOOKS}
    assert shown == pages | {"index", "security", "keys"}


def test_the_reference_has_the_public_names() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.M)
    assert len(set(listed)) == len(listed)
    for dotted in listed:
        module, _, attribute = dotted.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute)), dotted
    assert set(listed) >= PUBLIC


PUBLIC = {
    "trb.training.trainer.TRBTrainer",
    "trb.training.config.TRBConfig",
    "trb.blend.solve",
    "trb.blend.BlendResult",
    "trb.schedule.kl_budget",
    "trb.vocab.align",
    "trb.losses.topk_reverse_kl",
    *(f"trb.policies.{policy}" for policy in POLICIES),
    "trb.sampling.sample",
    "trb.sampling.Rollout",
}
