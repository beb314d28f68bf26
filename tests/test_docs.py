"""Documentation names only things that exist."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from trb.policies import POLICIES
from trb.training.methods import BEHAVIORS, BUDGET_SCHEDULES, METHODS, TARGETS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def resolve(dotted: str) -> object:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_tests_and_files_named_in_a_page_exist(page: Path) -> None:
    for dotted in re.findall(r"`(trb\.[A-Za-z_.]+[A-Za-z_])(?:\(\))?`", text(page)):
        resolve(dotted)
    for path, name in re.findall(r"`(tests/[a-z_]+\.py)::(\w+)`", text(page)):
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), f"{path}::{name}"
    for path in re.findall(r"`((?:tests|recipes|benchmarks|examples|docs|src)/[\w./-]+\.\w+)`", text(page)):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text(page)):
        assert (page.parent / target).exists(), target


def cells(page: str, first: str) -> dict[str, list[str]]:
    """The table of a page whose header begins with `first`: the names in backquotes of each row, by the row's own."""
    table = page.split(f"\n| `{first}` |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    rows = [re.findall(r"`([\w.]+)`", line) for line in table]
    return {name: rest for name, *rest in rows}


def test_the_method_page_has_every_method_behavior_and_loss_with_its_knobs() -> None:
    page = text(ROOT / "docs" / "method.md")
    assert cells(page, "method") == {name: [row.behavior, row.loss] for name, row in METHODS.items()}
    for first, halves in (("behavior", BEHAVIORS), ("loss", TARGETS)):
        found = cells(page, first)
        assert found.keys() == halves.keys()
        for name, half in halves.items():
            assert [word for word in found[name] if "." not in word] == [*half.knobs]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", text(ROOT / "README.md"), re.S), ids=range(3))
def test_python_blocks_of_the_readme_run(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_walk_through_extending_runs() -> None:
    tables: list[dict[str, Any]] = [POLICIES, BEHAVIORS, TARGETS, BUDGET_SCHEDULES, METHODS]
    before, scope = [dict(table) for table in tables], {"__name__": "walk"}
    try:
        for block in re.findall(r"```python\n(.*?)```", text(ROOT / "docs" / "extending.md"), re.S):
            exec(compile(block, "extending.md", "exec"), scope)
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
    schedule = scope["Closing"](0.4)
    for value in (2.0, 1.0):
        schedule.observe(0, {"reverse_kl": value})
    assert schedule.value(1) == 0.2


def test_recipes_and_flags_of_the_readme_exist() -> None:
    from trb.cli import main

    for recipe in re.findall(r"--config (\S+)", text(ROOT / "README.md")):
        assert (ROOT / recipe).exists(), recipe
    for command in sorted(set(re.findall(r"^trb (\w+)", text(ROOT / "README.md"), re.M))):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
