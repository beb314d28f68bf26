"""Documentation names only things that exist."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

from trb import TRBConfig
from trb.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_every_method_and_its_knobs_are_in_the_method_page() -> None:
    page = text(ROOT / "docs" / "method.md")
    known = {field.name for field in fields(TRBConfig)}
    rows = {row[0]: row[1] for row in re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", page, re.M)}
    rows.pop("method")  # the table's header
    assert set(rows) == set(METHODS)
    for knobs in rows.values():
        assert set(re.findall(r"`(\w+)`", knobs)) <= known


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", text(ROOT / "README.md"), re.S), ids=range(3))
def test_python_blocks_of_the_readme_run(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_recipes_and_flags_of_the_readme_exist() -> None:
    from trb.cli import main

    for recipe in re.findall(r"--config (\S+)", text(ROOT / "README.md")):
        assert (ROOT / recipe).exists(), recipe
    for command in sorted(set(re.findall(r"^trb (\w+)", text(ROOT / "README.md"), re.M))):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
