"""Every file of a run, a comparison, a study or a probe has one owner, a schema and a version."""

import ast
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from small_recipes import SMALL, STUDY, pool_of_this_process

import trb
from trb import records
from trb.cli import main
from trb.records import MEASUREMENTS, RESULTS, owner
from trb.report import ReportError, write_report
from trb.report.tables import tables_of
from trb.safety import files
from trb.safety.typed_files import JsonFile, LinesFile, RecordError, TypedFile, VersionError
from trb.studies import sweep
from trb.studies.comparison import compare
from trb.studies.probe import probe
from trb.studies.recipe import make_recipe
from trb.studies.run import train
from trb.studies.study import Study
from trb.studies.sweep import run_study
from trb.training.guard import StepGuard
from trb.training.recording import drop_after_step

PACKAGE, COMMITTED = Path(trb.__file__).parent, Path(__file__).parents[1] / "benchmarks" / "results"
ALL = [file for file in vars(records).values() if isinstance(file, records.RunFile)]


# ---- one owner for every name ----


def spelled(path: Path, names: list[str]) -> Iterator[str]:
    """Where a module has one of the names in a string that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and is_text(node)}
    pattern = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, names))})(?!\w)")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found = pattern.search(node.value.replace("checkpoints/", ""))
            if found:
                yield f"{path.name}:{node.lineno} spells {found[1]}"


def is_text(node: Any) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


NAMES = [
    *(file.name for file in ALL if re.fullmatch(r"[a-z_]+\.[a-z]+", file.name)),
    *("trb_state_", "checkpoint.partial", "model.partial", ".damaged"),
]


def test_no_other_module_spells_the_name_of_a_file() -> None:
    assert len(NAMES) > 20
    # Below trb.records, `files` marks the folders that are held with the runs in them.
    others = [path for path in PACKAGE.rglob("*.py") if path.name not in ("records.py", "files.py")]
    assert [place for path in others for place in spelled(path, NAMES)] == []
    assert set(files.HOLDS_RUNS) == {records.RECIPE.name, records.STUDY_PLAN.name}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('path = folder / "results.json"', True),
        ('path = f"{folder}/{name} results.json"', True),
        ('def f():\n    """Reads results.json."""', False),
        ('path = "my-results.json"', False),
        ('path = "a.results.jsonl"', False),
    ],
)
def test_the_check_sees_names_in_strings_and_not_in_docstrings(tmp_path: Path, source: str, found: bool) -> None:
    (tmp_path / "module.py").write_text(source)
    assert bool(list(spelled(tmp_path / "module.py", NAMES))) is found


# ---- what is written ----


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint and a skipped step, a comparison, a study with a probe, an evaluation, and pages."""
    root = tmp_path_factory.mktemp("outputs")
    small = SMALL | {"max_steps": 2, "held_out_prompts": 2}
    train(make_recipe(small | {"save_strategy": "steps", "save_steps": 2}), root / "run")
    skip_a_step(root / "run" / records.SKIPPED)
    compare(make_recipe(small | {"methods": {"opd": {}, "trb": {}}}), root / "comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "open_pool", pool_of_this_process)
        run_study(Study.model_validate(STUDY), root / "study", workers=1, keep_models=True)
    options: dict[str, Any] = {"problems": 2, "samples": 1, "excerpts": 1, "max_new_tokens": 6}
    where = root / "study" / "chains" / records.PROBE_FOLDER
    probe(make_recipe(small), where, truncations=[2, 4], budgets=[0.0, 0.1], skd_top_k=[5], **options)
    evaluation = ["eval", "--model", "zoo:student", "--data", "zoo:chains", "zoo:clock", "--limit", "2", "--quiet"]
    assert main([*evaluation, "--max-new-tokens", "4", "--output-dir", str(root / "evaluation")]) == 0
    for folder in (root / "run", root / "comparison", root / "study", where):
        write_report(folder)
    return root


def skip_a_step(folder: Path) -> None:
    guard = StepGuard(folder)
    inputs = {
        f"{part}_{what}": torch.ones(2, 3, dtype=torch.long)
        for part in ("prompt", "completion")
        for what in ("ids", "mask")
    }
    guard.watch(inputs, torch.tensor([0.1, math.nan, 0.2, 0.3, 0.4, 0.5]))
    guard.save(2, ["loss"], 0, str)


def test_every_file_that_is_written_has_an_owner_and_fits_its_schema(outputs: Path) -> None:
    found: dict[str, list[Path]] = {}
    for path in (path for path in outputs.rglob("*") if path.is_file()):
        file = owner(path.relative_to(outputs))
        assert file is not None, f"nobody owns {path.relative_to(outputs)}"
        found.setdefault(file.name, []).append(path)
        if isinstance(file, JsonFile):
            file.read(path)
        elif isinstance(file, LinesFile):
            for line in file.lines(path):
                assert line.error is None
                file.check(line.record, path)
    unwritten = {file.name for file in records.OWN} - found.keys()
    assert unwritten == {records.DAMAGED.name}
    assert not any(path.suffix in (".jsonl", ".yaml", ".html") for path in found[records.SAVED.name])


def test_what_is_written_is_listed_in_its_schema(outputs: Path) -> None:
    """Of the files whose fields are known beforehand, no field is without its line in `trb.records`."""
    for path in (path for path in outputs.rglob("*.json*") if path.is_file()):
        file = owner(path.relative_to(outputs))
        if file in (records.EVALS, records.ROLLOUTS, records.SKIPPED_STEP, records.PROBLEMS):
            assert isinstance(file, LinesFile)
            assert not [
                unlisted(file.schema, line.record) for line in file.lines(path) if unlisted(file.schema, line.record)
            ]
        elif file in (
            records.STUDY,
            records.PROBE,
            records.SELECTION,
            records.CHECKSUMS,
            records.TEST,
            records.PROGRESS,
        ):
            assert isinstance(file, JsonFile)
            assert not unlisted(file.schema, file.read(path)), path


def unlisted(schema: type[BaseModel], value: Any) -> list[str]:
    return list(extras(schema.model_validate(value)))


def extras(value: Any) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from value.model_extra or {}
        value = dict(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from extras(item)


@pytest.mark.parametrize("name", ["study.json", "smollm2-study.json", "quickstart.json"])
def test_committed_results_are_still_read(name: str, tmp_path: Path) -> None:
    assert (
        tables_of(COMMITTED / name)
        if "study" in name
        else tables_of(json.loads((COMMITTED / name).read_text())["results"])
    )


# ---- what is read ----


def first(outputs: Path, file: TypedFile) -> Path:
    return next(
        path for path in sorted(outputs.rglob("*")) if path.is_file() and owner(path.relative_to(outputs)) is file
    )


@pytest.mark.parametrize("file", [file for file in ALL if isinstance(file, JsonFile)], ids=str)
def test_whole_files_of_another_version_say_so(outputs: Path, tmp_path: Path, file: JsonFile) -> None:
    path = tmp_path / first(outputs, file).name
    later = replace(file, version=2)
    value = file.read(first(outputs, file))
    later.write(path, value if isinstance(value, dict) else {"value": value})
    if isinstance(value, dict):
        assert later.read(path) == value
    with pytest.raises(VersionError, match=rf"{path} has version 2 .* understands version 1\. Upgrade trb"):
        file.read(path)
    with pytest.raises(VersionError, match=r"has version 1 .* understands version 2"):
        later.read(first(outputs, file))


@pytest.mark.parametrize("file", MEASUREMENTS, ids=str)
def test_lines_of_another_version_say_so_and_stay(outputs: Path, tmp_path: Path, file: LinesFile) -> None:
    run = tmp_path / "run"
    shutil.copytree(outputs / "run", run)
    changed = b'{"format_version": 2}\n' + (run / file).read_bytes()
    (run / file).write_bytes(changed)
    with pytest.raises(ReportError, match=rf"{file} has version 2 of its layout"):
        write_report(run)
    with pytest.raises(VersionError, match=rf"{file} has version 2 of its layout"):
        drop_after_step(run / file, 1)
    assert (run / file).read_bytes() == changed and not list(run.glob("*.damaged"))


def with_version(path: Path) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({"format_version": 7} | value if isinstance(value, dict) else {"format_version": 7}))


@pytest.mark.parametrize("name", ["results.json", "provenance.json", "checkpoint-2/trb_run.json", "checksums.json"])
def test_a_run_of_another_version_is_neither_reported_nor_made_again(outputs: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(outputs / "run", run)
    with_version(run / name)
    before = (run / name).read_bytes()
    if not name.startswith("checkpoint"):
        with pytest.raises(ReportError, match=r"has version 7 of its layout, and this trb understands version 1"):
            write_report(run)
    if name in ("results.json", "checksums.json"):
        recipe = make_recipe(SMALL | {"max_steps": 2, "held_out_prompts": 2, "save_strategy": "steps", "save_steps": 2})
        with pytest.raises(VersionError, match=rf"{name} has version 7"):
            train(recipe, run)
    assert (run / name).read_bytes() == before and not list(run.rglob("*.damaged"))


def test_a_study_of_another_version_is_neither_reported_nor_made_again(outputs: Path, tmp_path: Path) -> None:
    directory = tmp_path / "study"
    shutil.copytree(outputs / "study", directory)
    for name in ("study.json", "chains/test/opd/seed-0/test.json", "chains/selection.json"):
        with_version(directory / name)
    with pytest.raises(ReportError, match=r"study\.json has version 7"):
        write_report(directory)
    with pytest.raises(VersionError, match=r"selection\.json has version 7"):
        run_study(Study.model_validate(STUDY), directory, workers=1)
    assert not list(directory.rglob("*.damaged"))


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        (RESULTS, {"trb": {"pass_at_1": "high"}}, r"trb\.pass_at_1 is 'high', expected a number or null"),
        (RESULTS, {"trb": 3}, "trb is 3, expected an object"),
        (records.STUDY, {"settings": {"a": {"sweep": {"b": [{"seeds": ""}]}}}}, r"settings\.a\.sweep\.b\[0\]\.seeds"),
        (records.TEST, {"suites": {"a": {}}}, r"suites\.a .*expected pass_at_1 or reverse_kl"),
        (records.TEST, {}, "suites is missing"),
        (records.SELECTION, {"methods": {"opd": [{"selected": False}]}}, ".* expected a selected configuration of opd"),
        (records.PROGRESS, {"loss": "nan"}, "loss is 'nan', expected a number"),
        (records.CHECKSUMS, {"files": {"a": 1}, "sha256": ""}, r"files\.a is 1, expected an object"),
        (records.SCORES, [{"pass_at_1": 0.5, "interval": None}], r"\[0\] .* expected a score with all of its numbers"),
        (records.REACH, [], r"is \[\], expected an object"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_field(tmp_path: Path, file: JsonFile, value: Any, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(value))
    with pytest.raises(RecordError, match=rf"{path}: {message}"):
        file.read(path)


def test_hostile_values_fit_where_they_did(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"\\ud800": {"pass_at_1": NaN, "interval": [1e999, 0], "n_problems": 1%s}}' % ("0" * 400))
    assert RESULTS.read(path)["\ud800"]["interval"][1] == 0
    for text in ("[" * 100_000, '{"suites": ' * 500 + "1" + "}" * 500, "\x00", '"\xff'):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(RecordError, match=str(path)):
            RESULTS.read(path)


def test_names_of_steps_are_read_back() -> None:
    assert [records.named_step(Path(records.step_name(step))) for step in (0, 7, 10**7)] == [0, 7, 10**7]
    assert [records.named_step(Path(name)) for name in ("step-x", "student", "step-000012.jsonl")] == [None, None, 12]
