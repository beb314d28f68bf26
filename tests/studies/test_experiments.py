"""Runs and comparisons on the embedded pair: what they write, and what a kill, a full disk or a re-run does to it."""

import errno
import json
import math
import os
import shutil
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import held_by_another, student_stopping_as_the_teacher
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_recipes import SMALL
from tiny_runs import dropping_student
from transformers import TrainerCallback

from trb import zoo
from trb.cli import main
from trb.models.loading import load_model, load_tokenizer
from trb.report import write_report
from trb.report.outcomes import read_outcomes
from trb.report.reading import read
from trb.studies import disks, material, scores
from trb.studies import run as run_module
from trb.studies.comparison import compare
from trb.studies.directories import is_damaged
from trb.studies.disks import DiskFullError
from trb.studies.listener import Listener
from trb.studies.material import RunDirectoryError, check_seal, model_of_run
from trb.studies.recipe import Recipe, load_recipe, make_recipe
from trb.studies.run import train
from trb.studies.scores import mean_of_suites
from trb.studies.yaml_files import ConfigError
from trb.training import checkpoints
from trb.training.checkpoints import latest
from trb.training.resume import ChangedRunError
from trb.training.trainer import TRBTrainer
from trb.zoo.tasks import split_of

# Clocks.
UNREPEATABLE = {"step_time", "runtime", "samples_per_second", "steps_per_second"}


def small(**changes: Any) -> Recipe:
    values = {**SMALL, **changes}
    methods = {name: (entry or {}).get("method", name) for name, entry in values.get("methods", {}).items()}
    if not {"trb", "fixed"} & set(methods.values() or [values.get("method", "trb")]):  # whose knobs these are
        del values["initial_kl_budget"], values["blend_warmup_steps"]
    return make_recipe(values)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def repeatable(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in UNREPEATABLE} for row in records(path)]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("metrics.jsonl", "evals.jsonl", "rollouts.jsonl"):
        assert repeatable(first / name) == repeatable(second / name), name
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `small(save_strategy="steps", save_steps=2)`, never interrupted. Read it, change nothing."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    train(small(save_strategy="steps", save_steps=2), directory)
    return directory


def test_a_finished_run_of_a_model_that_has_changed_since_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its results stay; that they are not of what lies there now must not go unsaid."""
    student = tmp_path / "student"
    shutil.copytree(zoo.path("student"), student)
    recipe = small(student=str(student), max_steps=1)
    found = train(recipe, tmp_path / "run")
    assert train(recipe, tmp_path / "run") == found and "another model" not in caplog.text
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert train(recipe, tmp_path / "run") == found
    assert f"{tmp_path / 'run'} is of another model {student}: its files have changed since" in caplog.text
    caplog.clear()
    shutil.rmtree(student)
    assert train(recipe, tmp_path / "run") == found and "another model" not in caplog.text


# ---- what a run leaves ----


def test_the_trained_model_has_its_card(finished: Path) -> None:
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert "None" not in card and str(finished) not in card
    for row in ("student | zoo:student", "teacher | zoo:teacher", "method | trb: ", "budget | 0.3", "steps | 6 of 6"):
        assert f"| {row}" in card


def test_a_run_leaves_what_the_report_reads(finished: Path) -> None:
    assert [row["step"] for row in records(finished / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in records(finished / "evals.jsonl")] == [0, 2, 4, 6]
    assert records(finished / "evals.jsonl")[0].keys() == {
        "step", "name", "pass_at_1", "interval", "n_problems", "n_samples", "mean_length", "stop_rate"
    }  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    assert results.keys() == {"student", "trb", "provenance"}
    assert results["trb"]["steps"] == 6
    first, last = records(finished / "evals.jsonl")[0], records(finished / "evals.jsonl")[-1]
    assert results["student"]["interval"] == first["interval"]
    assert results["trb"]["pass_at_1"] == last["pass_at_1"]
    assert results["provenance"]["versions"]["torch"]
    assert json.loads((finished / "provenance.json").read_text())["python"]
    texts = [
        ["completions" in row for row in records(path)[1:]]
        for path in sorted((finished / "evaluations").glob("step-*/*.jsonl"))
    ]
    assert texts == [[True] * 4, [False] * 4, [False] * 4, [True] * 4], "before and after, for readers to compare"
    assert not list(finished.rglob("*partial*"))
    assert not list((finished / "model").glob("*.bin")), "the final model holds no pickles"


def test_its_config_is_a_recipe_for_the_same_run(finished: Path) -> None:
    again = load_recipe(finished / "config.yaml")
    assert again.resolved() == small(save_strategy="steps", save_steps=2).resolved()
    assert yaml.safe_load((finished / "config.yaml").read_text())["method"] == "trb"


def test_its_model_is_the_trained_student(finished: Path) -> None:
    trained, start = weights(finished), zoo.load("student")[0].state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in trained)
    last = load_file(finished / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(trained[name], last[name]) for name in trained)
    load_model(str(finished / "model"))
    assert load_tokenizer(str(finished / "model")).chat_template


def test_a_finished_run_is_not_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "TRBTrainer", None)
    monkeypatch.setattr(material, "load_model", None)
    results = train(small(save_strategy="steps", save_steps=2), finished)
    assert results == json.loads((finished / "results.json").read_text())


def test_a_run_without_evaluation_data_has_results_without_a_score(tmp_path: Path) -> None:
    results = train(small(max_steps=1, eval_data=[], save_final_model=False), tmp_path)
    assert results["trb"]["pass_at_1"] is None
    assert not (tmp_path / "evals.jsonl").exists()
    assert not (tmp_path / "model").exists()


# ---- interruptions ----


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a kill."""


def kill_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > step:
                raise Killed

    class Doomed(TRBTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(Killer())

    monkeypatch.setattr(run_module, "TRBTrainer", Doomed)


@pytest.mark.parametrize("saved", [True, False], ids=["with checkpoints", "without"])
def test_a_killed_run_ends_like_one_that_was_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    recipe = small(save_strategy="steps", save_steps=2) if saved else small()
    with monkeypatch.context() as patch:
        kill_after(4, patch)
        with pytest.raises(Killed):
            train(recipe, tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert len(records(tmp_path / "metrics.jsonl")) == 4
    for name in ("metrics.jsonl", "evals.jsonl", "rollouts.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 5, "lo')  # as a kill leaves it
    steps = []

    class Watch(Listener):
        def step(self, step: int, logs: Any) -> None:
            steps.append(step)

    train(recipe, tmp_path, listener=Watch())
    assert steps == ([5, 6] if saved else [1, 2, 3, 4, 5, 6])
    assert_same_run(tmp_path, finished)


def times_anywhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a clock had been far ahead for some files, the older checkpoint's among them, and not set for others."""
    random = Random(0)
    for path in (run, *run.rglob("*")):
        os.utime(path, (random.choice((4e7, 4e9)),) * 2)
    for path in (run / "checkpoint-2", *(run / "checkpoint-2").iterdir()):
        os.utime(path, (5e9, 5e9))


def clock_set_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() - 86_400)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() - 86_400 * 10**9)


def leftovers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kills inside a save, and inside the small writes; and the lock of a process elsewhere, of a later time."""
    torn = run / checkpoints.PARTIAL / "checkpoint-6"
    torn.mkdir(parents=True)
    (run / checkpoints.PARTIAL / "replaced").mkdir()
    (torn / "trainer_state.json").write_text("{}")
    (run / "model.partial").mkdir()
    (run / "model.partial" / "adapter_config.json").write_text("{}")
    (run / ".results.json.1.partial").write_text("{")
    holder = {"host": "elsewhere", "pid": os.getpid(), "since": "2099-01-01T00:00:00+00:00"}
    (run / ".lock").write_text(json.dumps(holder))
    with monkeypatch.context() as patch:  # killed right after the disk was found to take bytes
        patch.setattr(Path, "unlink", lambda *arguments, **options: None)
        disks.require_writable(run)


def files_for_folders(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (checkpoints.PARTIAL, "model.partial"):
        (run / name).write_text("not a folder")


@pytest.mark.parametrize("disturb", [times_anywhere, clock_set_back, leftovers, files_for_folders])
def test_a_killed_run_that_was_copied_goes_on_whatever_is_about_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, disturb: Any
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for folder in ("checkpoint-6", "model"):
        shutil.rmtree(run / folder)
    (run / "results.json").unlink()
    (run / "checksums.json").unlink()
    disturb(run, monkeypatch)
    there = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train(small(save_strategy="steps", save_steps=2), run)
    assert_same_run(run, finished)
    assert "is not what it was" not in caplog.text, "its records are"
    assert there == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert {path.relative_to(run) for path in run.rglob("*")} == {path.relative_to(finished) for path in there}


@pytest.mark.parametrize("epochs", [False, True], ids=["counted in steps", "counted in epochs"])
def test_a_run_killed_in_its_last_evaluation_only_evaluates(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: bool
) -> None:
    length = {"max_steps": -1, "num_train_epochs": 1, "train_limit": 4} if epochs else {}
    last = 2 if epochs else 6
    recipe = small(save_strategy="steps", save_steps=2, **length)
    with monkeypatch.context() as patch:
        evaluate = scores.evaluate

        def killed_after_training(*args: Any, **kwargs: Any) -> Any:
            if f"step-{last:06d}" in str(kwargs["results_path"]):
                raise Killed
            return evaluate(*args, **kwargs)

        patch.setattr(scores, "evaluate", killed_after_training)
        with pytest.raises(Killed):
            train(recipe, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    train(recipe, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert records(tmp_path / "metrics.jsonl")[-1]["step"] == records(tmp_path / "evals.jsonl")[-1]["step"] == last
    if not epochs:
        assert_same_run(tmp_path, finished)


def test_a_named_checkpoint_must_be_one(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint is '.*missing', and there is no such"):
        train(small(resume_from_checkpoint=str(tmp_path / "missing")), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match="no complete checkpoint"):
        train(small(resume_from_checkpoint=str(tmp_path / "empty")), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    train(small(resume_from_checkpoint=str(finished / "checkpoint-4"), save_strategy="no"), tmp_path / "run")
    assert [row["step"] for row in records(tmp_path / "run" / "metrics.jsonl")] == [5, 6]


def steps_taken(recipe: Recipe, directory: Path) -> list[int]:
    steps: list[int] = []

    class Watch(Listener):
        def step(self, step: int, logs: Any) -> None:
            steps.append(step)

    train(recipe, directory, listener=Watch())
    return steps


def killed(recipe: Recipe, directory: Path, after: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(after, patch)
        train(recipe, directory)


@pytest.mark.parametrize("place", ["another run", "an earlier step", "a place that is written otherwise"])
def test_a_named_checkpoint_is_where_a_run_begins_and_not_where_it_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    run, saved = tmp_path / "run", {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    named = tmp_path / "other" / "checkpoint-2"
    if place == "an earlier step":
        killed(small(**saved), run, after=3)
        named = tmp_path / "run" / ".." / "run" / "checkpoint-2"
    else:
        shutil.copytree(finished / "checkpoint-2", named)
    monkeypatch.chdir(tmp_path)
    killed(small(**saved, resume_from_checkpoint=str(named.relative_to(tmp_path))), run, after=4)
    earlier = ["checkpoint-3"] if place == "an earlier step" else []
    assert [path.name for path in run.glob("_earlier/*/*")] == earlier
    again = str(named)
    if place == "a place that is written otherwise":
        monkeypatch.chdir(tmp_path / "other")
        again = "checkpoint-2"
    recipe = small(**saved, resume_from_checkpoint=again)
    caplog.clear()
    assert steps_taken(recipe, run) == [5, 6]
    assert f"goes on from its own {run / 'checkpoint-4'}, and not from {again} once more" in caplog.text
    assert [path.name for path in run.glob("_earlier/*/*")] == earlier
    ours, theirs = weights(run), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_killed_before_its_first_step_begins_with_the_named_checkpoint_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is claimed by then, and its checkpoints are another run's."""
    run, saved = tmp_path / "run", {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    killed(small(**saved), run, after=4)
    recipe = small(**saved, resume_from_checkpoint=str(finished / "checkpoint-2"))

    def stop(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module._Observer, "scores_at", stop)
        train(recipe, run)
    assert yaml.safe_load((run / "config.yaml").read_text())["resume_from_checkpoint"] == str(finished / "checkpoint-2")
    assert steps_taken(recipe, run) == [3, 4, 5, 6]
    assert sorted(path.name for path in run.glob("_earlier/*/*")) == [f"checkpoint-{step}" for step in range(1, 5)]


def test_a_checkpoint_that_was_not_named_before_is_taken(tmp_path: Path) -> None:
    run, saved = tmp_path / "run", {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    killed(small(**saved), run, after=4)
    for name in ("one", "two"):
        shutil.copytree(run / "checkpoint-2", tmp_path / name / "checkpoint-2")
    for name in ("one", "two"):
        recipe = small(**saved, resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"), max_steps=4)
        killed(recipe, run, after=3)
        assert checkpoints.numbered(run).keys() == {3}
    shutil.rmtree(tmp_path / "two")
    assert steps_taken(recipe, run) == [4], "which no longer needs it"


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_keeps_what_it_has(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "results.json").unlink()
    for folder in checkpoints.numbered(run).values():
        os.truncate(folder / "optimizer.pt", 10)
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=r"no whole checkpoint to resume from \(not whole: checkpoint-2, .*"):
        train(small(save_strategy="steps", save_steps=2), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


def test_a_kill_between_a_save_and_the_removal_of_older_ones_leaves_no_more_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(max_steps=2, eval_data=[], save_strategy="steps", save_steps=1, save_total_limit=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        prune = checkpoints.prune

        def killed(directory: Path, newest: int, *rest: Any) -> None:
            if newest == 2:
                raise Killed
            prune(directory, newest, *rest)

        patch.setattr(checkpoints, "prune", killed)
        train(recipe, tmp_path)
    assert checkpoints.numbered(tmp_path).keys() == {1, 2}
    train(recipe, tmp_path)
    assert checkpoints.numbered(tmp_path).keys() == {2}


def test_logs_do_not_pile_up_in_memory_and_checkpoints(tmp_path: Path) -> None:
    train(small(max_steps=12, save_strategy="steps", save_steps=12, eval_data=[]), tmp_path)
    assert len(records(tmp_path / "metrics.jsonl")) == 12
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == list(range(3, 13))


# ---- directories ----


def test_another_configuration_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    train(small(max_steps=1, eval_every=0), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(RunDirectoryError, match=r"learning_rate is 0\.001 there and 0\.002 here.*--overwrite"):
        train(small(max_steps=1, eval_every=0, learning_rate=2e-3), tmp_path)
    with pytest.raises(RunDirectoryError, match="max_steps is 1 there and 2 here"):  # no checkpoint to go on from
        train(small(max_steps=2, eval_every=0), tmp_path)
    with pytest.raises(RunDirectoryError, match="seed is 42 there and 1 here") as caught:  # nor here
        train(small(max_steps=1, eval_every=0, seed=1), tmp_path, accept_changes=True)
    assert "--accept-changes" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    results = train(small(max_steps=2, eval_every=0), tmp_path, overwrite=True)
    assert results["trb"]["steps"] == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_finished_run_is_made_longer_if_that_is_asked_for(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    train(small(save_strategy="steps", save_steps=2, max_steps=4), directory)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=r"is finished and .*: max_steps is 4 there and 6 here.*accept-changes"):
        train(small(save_strategy="steps", save_steps=2), directory)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    train(small(save_strategy="steps", save_steps=2), directory, accept_changes=True)
    assert_same_run(directory, finished)


LINEAR: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "eval_data": [], "lr_scheduler_type": "linear"}


@pytest.fixture(scope="module")
def one_linear_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("linear") / "run"
    train(small(**LINEAR, max_steps=1), directory)
    return directory


def test_a_run_whose_schedule_ends_with_it_is_made_longer_only_if_that_is_accepted(
    one_linear_step: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(one_linear_step, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=r"max_steps is 1 there and 2 here.*--accept-changes"):
        train(small(**LINEAR, max_steps=2), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    results = train(small(**LINEAR, max_steps=2), tmp_path, accept_changes=True)
    assert results["trb"]["steps"] == 2
    assert "with changes (saved -> now): max_steps: 1 -> 2" in caplog.text


def test_data_that_changed_under_its_name_is_found(tmp_path: Path) -> None:
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    rows = zoo.problems(8, seed=0, split="train")
    recipe: dict[str, Any] = LINEAR | {"train_data": str(data), "train_limit": None, "max_steps": 2, "save_steps": 1}
    data.write_text("\n".join(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) for row in rows))
    train(small(**recipe), run)
    shutil.rmtree(run / "checkpoint-2")
    (run / "results.json").unlink()
    data.write_text("\n".join(json.dumps({"prompt": row["prompt"], "answer": "7"}) for row in rows))
    with pytest.raises(ChangedRunError, match=r"train_dataset\.answers: "):
        train(small(**recipe), run)
    assert train(small(**recipe), run, accept_changes=True)["trb"]["steps"] == 2


def test_a_changed_recipe_goes_on_if_that_is_accepted(
    one_linear_step: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(one_linear_step, tmp_path, dirs_exist_ok=True)
    longer = LINEAR | {"max_steps": 2, "method": "opd"}
    with pytest.raises(RunDirectoryError, match=r"method is 'trb' there and 'opd' here.*--accept-changes"):
        train(small(**longer), tmp_path)
    results = train(small(**longer), tmp_path, accept_changes=True)
    assert results["opd"]["steps"] == 2
    assert "goes on with changes: max_steps is 1 there and 2 here; method is 'trb' there" in caplog.text
    assert "method: opd" in (tmp_path / "config.yaml").read_text()


def test_what_a_comparison_shares_stays_though_changes_are_accepted(tmp_path: Path) -> None:
    shared = {**LINEAR, "eval_data": "zoo:chains", "eval_every": 0, "save_final_model": False}
    compare(small(**shared, max_steps=1, methods={"opd": {}}), tmp_path)
    with pytest.raises(RunDirectoryError, match="eval_seed is 0 there and 1 here"):
        compare(small(**shared, max_steps=1, eval_seed=1, methods={"opd": {}}), tmp_path, accept_changes=True)
    with pytest.raises(RunDirectoryError, match="loss_top_k is 16 there and 8 here"):
        compare(small(**shared, max_steps=2, methods={"opd": {"loss_top_k": 8}}), tmp_path)
    results = compare(small(**shared, max_steps=2, methods={"opd": {"loss_top_k": 8}}), tmp_path, accept_changes=True)
    assert results["opd"]["steps"] == 2


def test_a_prompt_without_room_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "evaluate", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"train_dataset\[0\] has .* exceeds the \d+ positions"):
        train(small(max_completion_length=2000), tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def rows(path: Path, *lengths: int) -> str:
    """Prompts of so many digits."""
    prompts = [f"{'1' * length} + {number} = ?" for number, length in enumerate(lengths)]
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return str(path)


@pytest.mark.parametrize(
    ("lengths", "changes", "causes"),
    [
        ([1], {}, {"add prompts"}),
        ([1, 1, 1], {"train_limit": 1}, {"train_limit"}),
        ([1], {"train_limit": 9}, {"add prompts"}),
        ([1, 1, 1], {"held_out_prompts": 2}, {"add prompts", "held_out_prompts"}),
        ([1, 300, 300], {"overlong_prompts": "drop"}, {"add prompts", "max_prompt_length"}),
        (
            [1, 1, 300, 1],
            {"overlong_prompts": "drop", "train_limit": 4, "held_out_prompts": 2},
            {"train_limit", "max_prompt_length", "held_out_prompts"},
        ),
    ],
)
def test_too_few_prompts_name_what_leaves_so_few_and_nothing_else(
    tmp_path: Path, lengths: list[int], changes: dict[str, Any], causes: set[str]
) -> None:
    data = rows(tmp_path / "data.jsonl", *lengths)
    recipe = small(**{"train_data": data, "train_limit": None, **changes})
    with pytest.raises(ConfigError) as caught:
        material.training_prompts(recipe.run, recipe.training_config(tmp_path), load_tokenizer("zoo:student"))
    text = str(caught.value)
    assert "fewer than the 2 of one optimizer step are left" in text and "prompts_per_step" in text
    named = {"add prompts", "train_limit", "held_out_prompts", "max_prompt_length"}
    assert {cause for cause in named if cause in text} == causes
    assert ("drop leaves out" in text) == ("overlong_prompts" in changes)
    assert (f"leaves out {lengths.count(300)} of more than 32 tokens" in text) == ("overlong_prompts" in changes)


def test_a_run_that_cannot_load_does_not_claim_its_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        train(small(teacher=str(tmp_path / "nowhere")), tmp_path / "run")
    with pytest.raises(ConfigError, match="2 are held out: fewer than the 2"):
        train(small(train_limit=3, held_out_prompts=2), tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"chat_template is 'no\.jinja', none of student, teacher and plain, and no readable file"
    ):
        train(small(chat_template="no.jinja"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_unknown_origin_are_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").symlink_to(finished / "checkpoint-4")
    with pytest.raises(RunDirectoryError, match=r"checkpoints but no config\.yaml"):
        train(small(), tmp_path)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("[")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml is damaged"):
        train(small(), tmp_path)


def test_two_runs_at_once_in_one_directory_are_refused(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as holder:
        with pytest.raises(RunDirectoryError, match=f"another run is writing to .* process {holder} on "):
            train(small(max_steps=1, eval_data=[]), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    train(small(max_steps=1, eval_data=[], save_final_model=False), tmp_path)
    assert not (tmp_path / ".lock").exists()


# ---- damage ----

DAMAGES: dict[str, Any] = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b"0", b"1")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["results.json", "model/config.json"])
def test_damaged_results_of_a_finished_run_are_made_again(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    DAMAGES[damage](run / name)
    recipe = small(save_strategy="steps", save_steps=2)
    if name != "results.json":
        with pytest.raises(RunDirectoryError, match=r"model/config\.json"):
            check_seal(model_of_run(str(run)))
    train(recipe, run)
    assert f"damaged: the contents of {name}" in caplog.text or f"damaged: {name} " in caplog.text
    assert_same_run(run, finished)
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (run, finished))
    assert ours["student"] == theirs["student"]
    assert ours["trb"]["pass_at_1"] == theirs["trb"]["pass_at_1"]
    assert model_of_run(str(run)) == str(run / "model")


def test_a_finished_run_of_a_version_without_an_option_that_changes_nothing_is_finished(
    finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "checksums.json").unlink()
    config = run / "config.yaml"
    written = yaml.safe_load(config.read_text())
    del written["vllm_request_timeout"]
    config.write_text(yaml.safe_dump(written))
    train(small(save_strategy="steps", save_steps=2), run)
    del written["learning_rate"]
    config.write_text(yaml.safe_dump(written))
    with pytest.raises(RunDirectoryError, match="learning_rate is None there"):
        train(small(save_strategy="steps", save_steps=2), run)


@pytest.mark.parametrize("line", [b'{"a":\n', b"\xff\x00\n", b"[]\n", b""])
def test_a_damaged_line_of_an_evaluation_is_named_by_the_run_and_its_page(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    path = sorted((run / "evaluations").glob("step-*/*.jsonl"))[0]
    name = path.relative_to(run).as_posix()
    first, _, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, line, *rest]))
    train(small(save_strategy="steps", save_steps=2), run)
    assert f"records are damaged, and the results are not: {name} has" in caplog.text
    assert f"{name} has" in write_report(run).read_text()


@pytest.mark.parametrize("of", ["run", "model", "checkpoint", "as a teacher", "as a student"])
def test_a_damaged_model_of_a_run_is_not_evaluated_or_trained(finished: Path, tmp_path: Path, of: str) -> None:
    """One byte of the weights, which no reader of safetensors could notice."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    spec = {"run": run, "checkpoint": max(run.glob("checkpoint-*"))}.get(of, run / "model")
    weights = spec / "model.safetensors" if spec != run else run / "model" / "model.safetensors"
    command = ["eval", "--data", "zoo:chains", "--limit", "1", "--max-new-tokens", "4", "--quiet"]
    assert main([*command, "--model", str(spec)]) == 0
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    if of.startswith("as a "):
        with pytest.raises(RunDirectoryError, match=r"damaged: the contents of model/model\.safetensors differ"):
            train(small(max_steps=1, eval_data=[], **{of.removeprefix("as a "): str(spec)}), tmp_path / "next")
    else:
        assert main([*command, "--model", str(spec)]) == 2


def test_a_file_called_as_our_checksums_beside_somebody_elses_model_is_theirs(tmp_path: Path) -> None:
    model = Path(shutil.copytree(zoo.path("student"), tmp_path / "model"))
    for folder in (tmp_path, model):
        (folder / "checksums.json").write_text('{"model.safetensors": "d41d8cd9"}')
    check_seal(str(model))


def test_damaged_results_that_nothing_can_make_again_are_named_and_kept(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))
    os.truncate(run / "results.json", 20)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=r"results\.json has 20 bytes .* no whole checkpoint"):
        train(small(save_strategy="steps", save_steps=2), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_config_costs_no_checkpoint(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a loss of power could leave it. The checkpoint says itself which run it is of."""
    for content in (b"", b"\xff", b"- a", b"{"):
        (tmp_path / "config.yaml").write_bytes(content)
        assert is_damaged(tmp_path / "config.yaml")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoint-6")
    (run / "results.json").unlink()
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(ChangedRunError, match="learning_rate"):
        train(small(save_strategy="steps", save_steps=2, learning_rate=0.5), run)
    assert (run / "checkpoint-4").is_dir()
    train(small(save_strategy="steps", save_steps=2), run)
    assert "config.yaml is damaged" in caplog.text
    assert (run / "config.yaml.damaged").read_bytes() == content
    assert (run / "config.yaml").read_bytes() == (finished / "config.yaml").read_bytes()
    assert_same_run(run, finished)


def test_no_advice_about_a_damaged_config_destroys_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("trb_run.json")))
    (run / "config.yaml").write_bytes(b"")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml is damaged; restore it") as caught:
        train(small(save_strategy="steps", save_steps=2), run)
    assert "--overwrite" not in str(caught.value)


@pytest.mark.parametrize("damage", ["emptied", "halved", "changed", None])
def test_records_that_a_checkpoint_had_and_that_are_gone_are_named(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str | None
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoint-6")
    (run / "results.json").unlink()
    if damage is not None:
        DAMAGES[damage](run / "metrics.jsonl")
    train(small(save_strategy="steps", save_steps=2), run)
    said = f"{run / 'metrics.jsonl'} is not what it was when checkpoint-4 was saved"
    assert (said in caplog.text) == (damage is not None)


def test_everything_beside_a_checkpoint_is_on_the_disk_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[str] = set()
    monkeypatch.setattr(checkpoints, "flush", lambda path: flushed.add(path.name))
    (tmp_path / checkpoints.PARTIAL / "checkpoint-1").mkdir(parents=True)
    for name in ("config.yaml", "provenance.json", "metrics.jsonl"):
        (tmp_path / name).write_text("a")
    checkpoints.publish(tmp_path, "checkpoint-1")
    assert {"config.yaml", "provenance.json", "metrics.jsonl", tmp_path.name} <= flushed


# ---- one at a time ----


def command(name: str, recipe: str, directory: str) -> list[str]:
    if name == "eval":
        return ["eval", "--model", "zoo:student", "--data", "zoo:chains", "--limit", "1", "--output-dir", directory]
    return [name, "--config", recipe, "--output-dir", directory, "--overwrite"]


@pytest.mark.parametrize("name", ["train", "compare", "probe", "eval"])
@pytest.mark.parametrize("part", [".", "opd"], ids=["all of it", "one method"])
def test_nothing_of_a_living_run_is_removed_by_any_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, part: str
) -> None:
    """Held: a comparison, or one method's run inside it, which somebody trains by itself."""
    recipe = yaml.safe_dump({**SMALL, "methods": {"opd": {}, "trb": {}}})
    directory = tmp_path / "run"
    for run in (directory, directory / "opd"):
        for file in ("metrics.jsonl", "results.json", "checkpoint-2/optimizer.pt", "evaluations/student.json"):
            (run / file).parent.mkdir(parents=True, exist_ok=True)
            (run / file).write_text("kept")
    for file in (directory / "recipe.yaml", tmp_path / "recipe.yaml"):
        file.write_text(recipe)
    method = ["--method", "opd"] if name == "train" else []
    with held_by_another(directory / part):
        before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        inside = directory if name == "compare" else directory / part
        assert main([*command(name, str(tmp_path / "recipe.yaml"), str(inside)), *method]) == 2
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    refused = "of a training run; give the evaluation its own" if name == "eval" else f"{directory / part} is in use by"
    assert refused in capsys.readouterr().err


def test_a_run_inside_a_living_comparison_is_not_started_over(tmp_path: Path) -> None:
    (tmp_path / "trb").mkdir()
    (tmp_path / "recipe.yaml").write_text("methods: {}")
    (tmp_path / "trb" / "metrics.jsonl").write_text("kept")
    with held_by_another(tmp_path), pytest.raises(RunDirectoryError, match="in use by process"):
        train(small(max_steps=1, eval_data=[]), tmp_path / "trb", overwrite=True)
    assert (tmp_path / "trb" / "metrics.jsonl").read_text() == "kept"


# ---- disks ----


def test_an_unwritable_directory_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "load_tokenizer", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot write to .*file/run: Not a directory; choose another"):
        train(small(), tmp_path / "file" / "run")


def test_too_small_a_disk_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "TRBTrainer", None)
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunDirectoryError, match=r"has 0\.0 MB free, and a checkpoint and the final model take about"):
        train(small(save_strategy="steps"), tmp_path)


ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [
        ENOSPC,
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 672192 vs 672084"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_is_recognised_in_every_library_s_words(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="is full") as caught, disks.explained_disk_errors(tmp_path):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("while saving") from cause
    assert "start over" in str(caught.value)


def test_any_error_on_a_disk_without_space_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(DiskFullError), disks.explained_disk_errors(tmp_path / "not" / "made"):
        raise RuntimeError("words of a library nobody has read")


def test_other_errors_stay_themselves(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disks.explained_disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_disk_that_fills_up_costs_the_step_and_nothing_else(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(save_strategy="steps", save_steps=2)
    shutil.copytree(finished, tmp_path, ignore=shutil.ignore_patterns("*-[46]", "model"), dirs_exist_ok=True)
    for name in ("results.json", "checksums.json"):
        (tmp_path / name).unlink()
    with monkeypatch.context() as patch:

        def fills_up(trainer: TRBTrainer, output_dir: str) -> None:
            if output_dir.endswith("checkpoint-4"):
                (Path(output_dir) / "optimizer.pt").write_bytes(b"half")
                raise ENOSPC
            save(trainer, output_dir)

        save = TRBTrainer._save_optimizer_and_scheduler
        patch.setattr(TRBTrainer, "_save_optimizer_and_scheduler", fills_up)
        with pytest.raises(
            DiskFullError, match=r"Free some space and run the same command again to continue from"
        ) as e:
            train(recipe, tmp_path)
    assert "checkpoint-2" in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert not (tmp_path / "checkpoint-4").exists(), "half a checkpoint only takes space"
    assert [row["step"] for row in records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.partial"))
    assert latest(tmp_path) == tmp_path / "checkpoint-2"
    train(recipe, tmp_path)
    assert_same_run(tmp_path, finished)


def test_a_disk_that_fills_up_while_the_final_model_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills_up(trainer: TRBTrainer, path: str, **options: Any) -> None:
        Path(path).mkdir()
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise ENOSPC

    monkeypatch.setattr(TRBTrainer, "save_model", fills_up)
    with pytest.raises(DiskFullError):
        train(small(max_steps=1, eval_every=0), tmp_path)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.partial").exists()
    assert len(records(tmp_path / "metrics.jsonl")) == 1


# ---- comparisons ----

METHODS: dict[str, Any] = {"opd": {}, "trb": {"initial_kl_budget": 0.3}}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compared") / "runs"
    compare(
        small(max_steps=2, eval_every=0, methods=METHODS | {"free": {"method": "trb", "initial_kl_budget": 0}}),
        directory,
    )
    return directory


@pytest.mark.parametrize("damages", [("emptied", "a folder"), ("changed", "halved")], ids=str)
def test_damaged_scores_of_a_comparison_are_measured_again(
    compared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damages: tuple[str, str]
) -> None:
    directory = Path(shutil.copytree(compared, tmp_path / "runs"))
    for name, damage in zip(("student", "teacher"), damages, strict=True):
        DAMAGES[damage](directory / "evaluations" / f"{name}.json")
        DAMAGES["emptied"](directory / "evaluations" / name / "zoo-chains.jsonl")
    DAMAGES["halved"](directory / "results.json")
    methods = METHODS | {"free": {"method": "trb", "initial_kl_budget": 0}}
    again = compare(small(max_steps=2, eval_every=0, methods=methods), directory)
    expected = json.loads((compared / "results.json").read_text())
    assert {name: again[name] for name in expected if name != "provenance"} == {
        name: score for name, score in expected.items() if name != "provenance"
    }
    assert "student.json is damaged; moved to student.json.damaged" in caplog.text
    assert (directory / "evaluations" / "teacher.json.damaged").exists()


def test_a_comparison_leaves_one_run_per_method_and_shared_scores(compared: Path) -> None:
    results = json.loads((compared / "results.json").read_text())
    assert list(results) == ["student", "opd", "trb", "free", "teacher", "provenance"]
    for name in ("student", "opd", "trb", "free", "teacher"):
        assert results[name]["n_problems"] == 4
        low, high = results[name]["interval"]
        assert 0 <= low <= results[name]["pass_at_1"] <= high <= 1
    for name in ("opd", "trb", "free"):
        start = records(compared / name / "evals.jsonl")[0]
        assert {key: start[key] for key in results["student"]} == results["student"]
        assert not (compared / name / "evaluations" / "step-000000").exists(), "measured once, for all"
        assert records(compared / name / "evaluations" / "step-000002" / "zoo-chains.jsonl")[1]["question"]
        assert json.loads((compared / name / "results.json").read_text())[name] == results[name]
    start, teacher = (records(compared / "evaluations" / of / "zoo-chains.jsonl")[1] for of in ("student", "teacher"))
    assert start["completions"] and "completions" not in teacher
    source = read(compared)
    assert read_outcomes(source, []).keys() == {"student", "opd", "trb", "free"}
    assert {path.name for path in compared.iterdir() if path.is_dir()} == {"opd", "trb", "free", "evaluations"}


def test_every_score_of_a_comparison_stops_with_every_stop_id_of_the_pair(tmp_path: Path) -> None:
    """Of a student that stops with the teacher's id: before training, during it, after it, and of the teacher."""
    student = tmp_path / "student"
    student_stopping_as_the_teacher().save_pretrained(student)
    zoo.load("student")[1].save_pretrained(student)
    recipe = small(student=str(student), methods={"opd": {}}, max_steps=2, eval_every=1, eval_max_new_tokens=48)
    results = compare(recipe, tmp_path / "runs")
    rates = [row["stop_rate"] for row in records(tmp_path / "runs" / "opd" / "evals.jsonl")]
    assert len(rates) == 3
    assert min(*rates, *(results[name]["stop_rate"] for name in ("student", "opd", "teacher"))) >= 0.5


def test_methods_are_paired(compared: Path) -> None:
    """Same weights, prompts, order and noise: TRB without a budget is on-policy distillation, bit for bit."""
    opd, free, trb = (compared / name for name in ("opd", "free", "trb"))
    assert_same_run(opd, free)
    prompts = [[row["prompt"] for row in records(path / "rollouts.jsonl")] for path in (opd, trb)]
    assert prompts[0] == prompts[1]
    assert repeatable(opd / "metrics.jsonl") != repeatable(trb / "metrics.jsonl")


def test_a_comparison_run_again_only_does_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(max_steps=1, eval_every=0, methods={"opd": {}})
    first = compare(recipe, tmp_path)
    built, evaluated, finished = [], [], []

    class Counted(TRBTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            built.append(kwargs["args"].method)
            super().__init__(*args, **kwargs)

    class Watch(Listener):
        def plan(self, runs: Any) -> None:
            assert runs == {"opd": 1, "veto": 1}

        def finished(self, name: str) -> None:
            finished.append(name)

    evaluate = scores.evaluate
    monkeypatch.setattr(run_module, "TRBTrainer", Counted)
    monkeypatch.setattr(scores, "evaluate", lambda *a, **k: evaluated.append(k["name"]) or evaluate(*a, **k))
    wider = small(max_steps=1, eval_every=0, methods={"opd": {}, "veto": {}})
    second = compare(wider, tmp_path, listener=Watch())
    assert built == ["veto"]
    assert finished == ["opd", "veto"]
    assert len(evaluated) == 1
    assert second["opd"] == first["opd"]
    assert second["student"] == first["student"]
    compare(wider, tmp_path)
    assert built == ["veto"]

    with pytest.raises(RunDirectoryError, match="seed is 42 there and 1 here"):
        compare(small(max_steps=1, eval_every=0, seed=1, methods={"opd": {}}), tmp_path)
    with pytest.raises(
        RunDirectoryError, match=r"opd is finished and holds another .*: loss_top_k is 16 there and 8 here"
    ):
        compare(small(max_steps=1, eval_every=0, methods={"veto": {}, "opd": {"loss_top_k": 8}}), tmp_path)
    again = compare(small(max_steps=1, eval_every=0, seed=1, methods={"opd": {}}), tmp_path, overwrite=True)
    assert built == ["veto", "opd"]
    assert list(again) == ["student", "opd", "teacher", "provenance"]
    assert not (tmp_path / "veto" / "config.yaml").exists(), "methods of the old comparison go with it"


def test_any_pair_of_a_behavior_and_a_loss_is_compared(tmp_path: Path) -> None:
    methods = {
        "eopd": {"eopd_entropy": 0.2, "forward_top_k": 4},
        "blended": {"method": "trb", "loss": "tip", "tip_share": 0.25},
        "reliable": {"method": "opd", "behavior": "skd", "loss": "tropd", "skd_teacher_top_k": 4},
    }
    results = compare(small(max_steps=1, eval_every=0, methods=methods), tmp_path)
    assert list(results) == ["student", *methods, "teacher", "provenance"]
    losses = {name: records(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in methods}
    assert all(map(math.isfinite, losses.values()))
    assert len(set(losses.values())) == len(methods), "each has a loss of its own"
    write_report(str(tmp_path))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(shown in page for shown in ("EOPD", "blended", "reliable"))
    with pytest.raises(ConfigError, match="tip_share must be above 0"):
        compare(small(methods={"tip": {"tip_share": 0.0}}), tmp_path / "refused")


def test_a_comparison_needs_methods_and_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has methods: choose one"):
        train(small(methods=METHODS), tmp_path)
    with pytest.raises(ConfigError, match="methods is empty"):
        compare(small(), tmp_path)
    with pytest.raises(ConfigError, match="eval_data is empty"):
        compare(small(eval_data=[], methods=METHODS), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- options ----


def test_lora_trains_adapters_that_load_again(tmp_path: Path) -> None:
    train(small(max_steps=2, eval_every=0, lora_rank=2, lora_target_modules=["q_proj", "v_proj"]), tmp_path)
    assert json.loads((tmp_path / "model" / "adapter_config.json").read_text())["r"] == 2
    assert not (tmp_path / "model" / "model.safetensors").exists()
    trained = load_model(str(tmp_path / "model"), merge_adapter=True)
    merged, start = trained.state_dict(), zoo.load("student")[0].state_dict()
    changed = {name for name in start if not torch.allclose(merged[name], start[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def test_adapters_killed_and_resumed_end_like_those_that_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"lora_rank": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    recipe = small(max_steps=2, eval_data=[], save_strategy="steps", save_steps=1, **lora)
    train(recipe, tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(1, patch)
        train(recipe, tmp_path / "killed")
    train(recipe, tmp_path / "killed")
    one, other = (tmp_path / name / "model" / "adapter_model.safetensors" for name in ("straight", "killed"))
    assert one.read_bytes() == other.read_bytes()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert repeatable(tmp_path / "straight" / name) == repeatable(tmp_path / "killed" / name), name


def test_scores_amid_a_training_that_draw_change_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student that drops, in steps that draw what they drop from the generators of the process."""
    evaluate_suites = run_module.evaluate_suites

    def drawing(*args: Any, **named: Any) -> Any:
        torch.rand(3)
        return evaluate_suites(*args, **named)

    student = dropping_student()
    student.save_pretrained(tmp_path / "student")
    zoo.load("student")[1].save_pretrained(tmp_path / "student")
    dropping = {"student": str(tmp_path / "student"), "disable_dropout": False, "max_steps": 3}
    train(small(eval_data=[], **dropping), tmp_path / "unmeasured")
    monkeypatch.setattr(run_module, "evaluate_suites", drawing)
    train(small(eval_every=1, **dropping), tmp_path / "measured")
    assert len(records(tmp_path / "measured" / "evals.jsonl")) == 4
    ours, theirs = weights(tmp_path / "unmeasured"), weights(tmp_path / "measured")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_held_out_prompts_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Watched(TRBTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seen.update(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(run_module, "TRBTrainer", Watched)
    recipe = small(max_steps=2, eval_data=[], held_out_prompts=5, held_out_every=1, save_strategy="steps", save_steps=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_place(patch, Watched, 1)
        train(recipe, tmp_path)
    results = train(recipe, tmp_path)
    trained, held_out = (
        {row["prompt"][-1]["content"] for row in seen[f"{part}_dataset"]} for part in ("train", "eval")
    )
    assert (len(trained), len(held_out)) == (35, 5)
    assert not trained & held_out
    assert [row["step"] for row in records(tmp_path / "held_out.jsonl")] == [0, 1, 2]
    assert all(math.isfinite(row["loss"]) for row in records(tmp_path / "held_out.jsonl"))
    ends = results["trb"]["held_out"]
    assert (ends["before"]["step"], ends["after"]["step"]) == (0, 2)
    assert ends["after"]["loss"] == records(tmp_path / "held_out.jsonl")[-1]["loss"]


def split_of_file(path: Path, held_out: int) -> tuple[list[str], list[str]]:
    recipe = small(train_data=str(path), train_limit=None, eval_data=[], held_out_prompts=held_out)
    tokenizer, _ = material.load_tokenizers(recipe.run)
    parts = material.training_prompts(recipe.run, recipe.training_config("unused"), tokenizer)
    trained, aside = ([row["prompt"][-1]["content"] for row in part or ()] for part in parts)
    return trained, aside


def test_a_copy_of_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    questions = [f"{first} + 2 - 1 = ?" for first in range(1, 10)]
    once, copied = tmp_path / "once.jsonl", tmp_path / "copied.jsonl"
    once.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    copied.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions for _ in range(8)))
    trained, aside = split_of_file(copied, 4)
    assert len(set(aside)) == len(aside) == 4
    assert sorted(trained) == sorted(8 * [question for question in questions if question not in aside])
    # Without copies nothing changes: those rows are held out that the seed draws of all.
    drawn = sorted(Random(0).sample(range(9), 4))
    assert split_of_file(once, 4)[1] == [questions[index] for index in drawn] == aside
    with pytest.raises(ConfigError, match="has 9 different prompts, and held_out_prompts is 10"):
        split_of_file(copied, 10)
    with pytest.raises(ConfigError, match=r"9 prompts are held out of .* with their copies .*: 0 prompts are left"):
        split_of_file(copied, 9)


def kill_in_place(patch: pytest.MonkeyPatch, trainer: type[TRBTrainer], step: int) -> None:
    generate = trainer._generate_single_turn

    def dies(self: TRBTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.model.training and self.state.global_step == step:
            raise Killed
        return generate(self, *args, **kwargs)

    patch.setattr(trainer, "_generate_single_turn", dies)


def test_template_options_reach_training_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "brief.jinja"
    template.write_text("{% if brief %}b{% else %}l{% endif %}{{ messages[-1]['content'] }}=")
    rendered: list[list[int]] = []
    evaluate = scores.evaluate

    def watch(model: Any, tokenizer: Any, problems: Any, **options: Any) -> Any:
        rendered.append(tokenizer.apply_chat_template(problems[0]["prompt"], return_dict=False))
        return evaluate(model, tokenizer, problems, **options)

    monkeypatch.setattr(scores, "evaluate", watch)
    options = {"chat_template": str(template), "chat_template_kwargs": {"brief": True}}
    train(small(max_steps=1, eval_every=0, **options), tmp_path / "run")
    tokenizer = zoo.load("student")[1]
    assert tokenizer.decode(rendered[0]).startswith("b")
    assert all(row["prompt"].startswith("b") for row in records(tmp_path / "run" / "rollouts.jsonl"))


def test_messages_without_a_template_are_joined_by_blank_lines(tmp_path: Path) -> None:
    train(small(max_steps=1, eval_data=[], chat_template="plain", system_prompt="so"), tmp_path)
    first = records(tmp_path / "rollouts.jsonl")[0]["prompt"]
    assert "so" in first
    assert "user" not in first


def test_problem_sets_have_their_names_and_limits(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{n}+1", "answer": f"#### {n + 1}"}) for n in range(9)]
    (tmp_path / "g.jsonl").write_text("\n".join(lines))
    name = f"gsm8k={tmp_path / 'g.jsonl'}"
    sets = material.problem_sets(small(eval_data=[name, "zoo:chains"], eval_limit=5).run)
    assert list(sets) == [name, "zoo:chains"]
    assert [len(rows) for rows in sets.values()] == [5, 5]
    everything = material.problem_sets(small(eval_data=[name], eval_limit=None).run)[name]
    assert sets[name]["answer"] == [answer for answer in everything["answer"] if answer in sets[name]["answer"]]
    other = material.problem_sets(small(eval_data=[name], eval_limit=5, eval_seed=1).run)[name]
    assert other["answer"] != sets[name]["answer"]
    test, training = (row["prompt"][-1]["content"] for row in (sets["zoo:chains"][0], zoo.problems(1, seed=0)[0]))
    assert split_of(test) == "test" != split_of(training)


def test_the_mean_over_suites() -> None:
    def score(name: str, value: float, low: float, high: float, samples: int) -> dict[str, Any]:
        counts = {"n_problems": 10, "n_samples": samples, "mean_length": 5.0 * samples, "stop_rate": 1.0}
        return {"name": name, "pass_at_1": value, "interval": [low, high], **counts}

    one, two = score("a", 0.5, 0.4, 0.6, 10), score("b", 0.1, 0.1 - 0.075, 0.1 + 0.24, 30)
    mean = mean_of_suites([one, two])
    assert mean["pass_at_1"] == pytest.approx(0.3)  # suites count alike, whatever their size
    assert mean["interval"] == pytest.approx([0.3 - 0.125 / 2, 0.3 + 0.26 / 2])  # 3-4-5 and 5-12-13 triangles
    assert (mean["n_problems"], mean["n_samples"]) == (20, 40)
    assert mean["mean_length"] == pytest.approx((10 * 50 + 30 * 150) / 40)
    assert mean["suites"] == {"a": one, "b": two}
    assert mean_of_suites([one]) == one
    assert mean_of_suites([])["pass_at_1"] is None


def test_rows_in_flight_keep_the_cache_within_its_budget() -> None:
    model = zoo.load("student")[0]
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    rows = scores.rows_in_flight(model, 1 << 20, torch.device("cpu"))
    assert rows * per_token * (1 << 20) <= 2 << 30 < (rows + 1) * per_token * (1 << 20)
    assert scores.rows_in_flight(model, 1 << 30, torch.device("cpu")) == 1
    assert scores.rows_in_flight(model, 16, torch.device("cpu")) == 512


def test_a_run_killed_after_its_results_is_sealed_by_the_next_start(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    seal = json.loads((run / "checksums.json").read_text())
    before = {path.relative_to(run) for path in run.rglob("*")}
    (run / "checksums.json").unlink()
    for name in (".lock", ".checksums.json.12345.partial", "model/.config.json.9.partial"):
        (run / name).write_text("torn")
    monkeypatch.setattr(material, "load_model", None)  # nothing is done again
    train(small(save_strategy="steps", save_steps=2), run)
    assert {path.relative_to(run) for path in run.rglob("*")} == before
    assert json.loads((run / "checksums.json").read_text()) == seal
