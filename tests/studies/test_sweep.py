"""Sweeps that really run: small studies of the embedded pair, finished, continued, refused and killed."""

import errno
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import held_by_another, student_stopping_as_the_teacher
from small_recipes import STUDY, pool_of_this_process

from trb import zoo
from trb.errors import InputError
from trb.records import REFERENCE_SCORES
from trb.report.tables import configuration_text
from trb.studies import jobs, provenance, sweep, workers
from trb.studies.material import RunDirectoryError
from trb.studies.recipe import load_recipe
from trb.studies.study import ROLES, Reference, Study, Unit
from trb.studies.sweep import StudyListener, run_study
from trb.studies.workers import StudyError, default_workers
from trb.studies.yaml_files import ConfigError
from trb.training.trainer import TRBTrainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Two methods, three configurations, one seed for the choice and one for the test: five runs of two steps.


class Diary(StudyListener):
    def __init__(self) -> None:
        self.runs: list[str] = []
        self.phases: list[tuple[str, int, int]] = []

    def phase(self, name: str, done: int, total: int) -> None:
        self.phases.append((name, done, total))

    def finished(self, job: str, seconds: float) -> None:
        self.runs.append(job)


def study(**changes: object) -> Study:
    return Study.model_validate({**STUDY, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Diary]:
    directory, diary = tmp_path_factory.mktemp("sweep") / "study", Diary()
    run_study(study(), directory, workers=1, listener=diary)
    return directory, diary


@pytest.fixture
def here(monkeypatch):
    """Runs happen in this process; those of `finished` and of some tests below in processes of their own."""
    monkeypatch.setattr(sweep, "open_pool", pool_of_this_process)


def test_a_study_runs_to_its_end(finished):
    directory, diary = finished
    assert diary.phases == [("references", 0, 2), ("selection", 0, 3), ("test", 0, 2)]
    results = json.loads((directory / "study.json").read_text())
    methods = results["settings"]["chains"]["methods"]
    assert list(methods) == ["opd", "trb"]
    assert all((entry["seeds"], entry["problems"]) == (1, 6) for entry in methods.values())
    chosen = [row["configuration"] for row in results["settings"]["chains"]["sweep"]["trb"] if row["selected"]]
    assert chosen == [methods["trb"]["configuration"]]


def test_any_pair_of_a_behavior_and_a_loss_is_swept(here: None, tmp_path: Path) -> None:
    both = {"method": "trb", "loss": "eopd", "initial_kl_budget": math.inf}
    methods = {"opd": [{}], "iw": {"iw_gamma": [0.25, 1.0]}, "both": [both]}
    diary, recipe = Diary(), {**STUDY["recipe"], "max_steps": 1}
    run_study(study(methods=methods, recipe=recipe), tmp_path, workers=1, listener=diary)
    assert diary.phases == [("references", 0, 2), ("selection", 0, 4), ("test", 0, 3)]
    results = json.loads((tmp_path / "study.json").read_text())["settings"]["chains"]
    assert list(results["methods"]) == ["opd", "iw", "both"]
    assert sorted(row["configuration"]["iw_gamma"] for row in results["sweep"]["iw"]) == [0.25, 1.0]
    # Infinity is trained, and no default in its place.
    run = Unit("chains", "test", "both", 0, 0)
    assert load_recipe(tmp_path / run.path / "config.yaml").training["initial_kl_budget"] == math.inf
    assert configuration_text(results["methods"]["both"]["configuration"]).endswith("initial_kl_budget = Infinity")
    assert run_study(study(methods=methods, recipe=recipe), tmp_path, listener=(again := Diary())) and not again.runs


def test_outcomes_are_kept_per_problem_and_models_are_not(finished):
    directory, _ = finished
    for method in ("opd", "trb"):
        run = directory / "chains" / "test" / method / "seed-0"
        suites = json.loads((run / "test.json").read_text())["suites"]
        assert {name: len(suite["correct"]) for name, suite in suites.items()} == {
            "zoo:chains?operands=3": 3,
            "zoo:chains?operands=5": 3,
        }
        assert all(suite["pass_at_1"] == sum(suite["correct"]) / 3 for suite in suites.values())
        assert not (run / "model").exists() and not (run / "scoring").exists()


def test_a_run_begins_with_the_students_scores_and_not_what_is_kept_of_each_problem(finished, tmp_path):
    path = Reference("chains", "student").path
    whole = json.loads((finished[0] / path).read_text())
    for split in whole.values():
        for suite in split["suites"].values():
            suite["same_as"] = [0] * len(suite["correct"])
    REFERENCE_SCORES.write(tmp_path / path, whole)
    assert jobs._initial_scores(tmp_path, "chains") == jobs._initial_scores(finished[0], "chains")


def test_the_test_split_is_scored_after_the_choice_is_on_disk(finished):
    directory, _ = finished
    chosen = (directory / "chains" / "selection.json").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns > chosen for path in directory.rglob("test.json"))


@pytest.mark.parametrize("role", ROLES)
def test_references_stop_with_every_stop_id_of_the_pair(tmp_path, role):
    student = tmp_path / "student"
    student_stopping_as_the_teacher().save_pretrained(student)
    zoo.load("student")[1].save_pretrained(student)
    chains = STUDY["settings"]["chains"]
    recipe = {**chains["recipe"], "student": str(student), "max_completion_length": 48}
    reference = Reference("chains", role)
    (tmp_path / "study.yaml").write_text(study(settings={"chains": {**chains, "recipe": recipe}}).to_yaml())
    jobs.do_job(str(tmp_path), False, reference)
    suites = json.loads((tmp_path / reference.path).read_text())["test"]["suites"]
    assert [suite["stop_rate"] >= 0.5 for suite in suites.values()] == [True, True]


def test_a_finished_study_is_not_run_again(finished):
    directory, _ = finished
    before, diary = (directory / "study.json").read_bytes(), Diary()
    run_study(study(), directory, workers=1, listener=diary)
    assert diary.runs == []
    assert (directory / "study.json").read_bytes() == before


def test_a_study_of_models_that_have_changed_since_says_so(finished, here, tmp_path, caplog):
    directory = tmp_path / "study"
    shutil.copytree(finished[0], directory)
    described = json.loads((directory / "provenance.json").read_text())
    models = described["models"]
    assert {*models} == {"zoo:student", "zoo:teacher"}
    run_study(study(), directory)
    assert "another model" not in caplog.text
    described["models"]["zoo:teacher"] = "0" * 16
    (directory / "provenance.json").write_text(json.dumps(described))
    run_study(study(), directory)
    assert "is of another model zoo:teacher: its files have changed since" in caplog.text


def test_another_study_in_the_directory_is_refused(finished):
    directory, _ = finished
    with pytest.raises(RunDirectoryError, match=r"other recipe: max_steps is 2 there and 3 here"):
        run_study(study(recipe={**STUDY["recipe"], "max_steps": 3}), directory)
    with pytest.raises(RunDirectoryError, match="other seeds"):
        run_study(study(seeds={"select": [100], "test": [5]}), directory)


def test_what_an_older_version_took_in_vain_keeps_no_study_from_going_on(finished, here, tmp_path):
    directory, diary = Path(shutil.copytree(finished[0], tmp_path / "study")), Diary()
    there = yaml.safe_load((directory / "study.yaml").read_text())
    there["recipe"]["eval_split"] = "train"
    there["methods"]["opd"][0] |= {"seed": 77, "train_seed": 77, "eval_limit": 1, "save_final_model": True}
    (directory / "study.yaml").write_text(yaml.safe_dump(there))
    run_study(study(), directory, workers=1, listener=diary)
    assert diary.runs == []
    there["recipe"]["max_steps"] = 3
    (directory / "study.yaml").write_text(yaml.safe_dump(there))
    with pytest.raises(RunDirectoryError, match=r"other recipe: max_steps is 3 there and 2 here"):
        run_study(study(), directory)


def test_damaged_results_of_a_study_are_made_again(finished, here, tmp_path, caplog):
    whole, _ = finished
    directory, diary = Path(shutil.copytree(whole, tmp_path / "study")), Diary()
    reference = Reference("chains", "teacher").path
    damaged = {
        directory / reference: b'{"dev": {"suites": {"a": {}}}, "test": {}}',
        directory / "chains" / "selection.json": b"[]",
        directory / "chains/test/opd/seed-0/test.json": b'{"suites": {"a"',
        directory / "chains/select/opd/0/seed-100/results.json": b"",
    }
    for file, content in damaged.items():
        file.write_bytes(content)
    again = run_study(study(), directory, workers=1, listener=diary)
    assert again["settings"] == json.loads((whole / "study.json").read_text())["settings"]
    assert diary.runs == ["chains/reference/teacher", "chains/select/opd/0/seed-100", "chains/test/opd/seed-0"]
    for file, content in damaged.items():
        assert file.with_name(f"{file.name}.damaged").read_bytes() == content
        assert f"{file} is damaged" in caplog.text


def test_two_sweeps_at_once_are_refused(finished):
    directory, _ = finished
    with held_by_another(directory), pytest.raises(RunDirectoryError, match="another sweep is writing to"):
        run_study(study(), directory)


def test_a_directory_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty"):
        run_study(study(), tmp_path)


@pytest.mark.parametrize("error", [PermissionError, BlockingIOError])
def test_a_file_inside_a_study_that_is_refused_is_named_itself(tmp_path, monkeypatch, error):
    """And is neither the study's directory nor another sweep."""
    refused = str(tmp_path / "chains" / "selection.json")

    def begin(directory, models):
        raise error(errno.EACCES, "not for you", refused)

    monkeypatch.setattr(provenance, "write", begin)
    with pytest.raises(error) as caught:
        run_study(Study.model_validate(STUDY), tmp_path)
    assert caught.value.filename == refused


@pytest.mark.parametrize(
    ("test", "seeds", "message"),
    [
        ({"data": "zoo:chains", "limit": 1, "seed": 2}, 1, "test: zoo:chains has one problem.*limit.*test seeds"),
        ({"data": "zoo:chains", "limit": 1, "seed": 2}, 2, None),
        (
            {"data": ["zoo:chains?operands=3", "zoo:chains?operands=5"], "limit": 1, "seed": 2},
            2,
            r"chains: test: zoo:chains\?operands=3 has one problem",
        ),
        ({"data": "COPIES"}, 1, "has one problem, 3 times"),
    ],
)
def test_too_few_test_problems_for_an_interval_are_refused_before_training(here, tmp_path, test, seeds, message):
    copies = tmp_path / "copies.jsonl"
    copies.write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 3)
    if test["data"] == "COPIES":
        test = {**test, "data": str(copies)}
    asked = study(
        settings={"chains": {**STUDY["settings"]["chains"], "test": test}},
        seeds={"select": [100], "test": seeds},
        methods={"opd": [{}]},
        recipe={**STUDY["recipe"], "max_steps": 1},
    )
    directory = tmp_path / "study"
    if message is None:
        run_study(asked, directory, workers=1)
        assert (directory / "study.json").exists()
        return
    with pytest.raises(InputError, match=message):
        run_study(asked, directory, workers=1)
    assert not directory.exists()


def test_development_problems_among_the_test_problems_are_refused(tmp_path):
    setting = STUDY["settings"]["chains"]
    overlapping = {**setting, "test": {"data": "zoo:chains", "limit": 20, "seed": 1}}
    with pytest.raises(ValueError, match="chains: 4 development problems are test problems too"):
        run_study(study(settings={"chains": overlapping}), tmp_path / "study")


@pytest.mark.parametrize("pool", ["here", pytest.param("processes", marks=pytest.mark.torture)])
def test_a_run_that_fails_is_named_and_the_rest_kept(tmp_path, pool, request):
    if pool == "here":
        request.getfixturevalue(pool)
    setting = STUDY["settings"]["chains"]
    broken = {**setting, "recipe": {**setting["recipe"], "train_data": str(tmp_path / "missing.jsonl")}}
    with pytest.raises(StudyError, match=r"chains/select/opd/0/seed-100: .*missing\.jsonl.*run the same command again"):
        run_study(study(settings={"chains": broken}), tmp_path / "study", workers=1)
    assert (tmp_path / "study" / "chains" / "reference" / "teacher.json").exists()


class Executor:
    """Does every job at once, in place of processes."""

    def __init__(self, job, asked, workers, **kwargs):
        self.job = job
        asked.append(workers)

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(self.job())
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **kwargs):
        pass


@pytest.mark.parametrize(
    ("error", "shown"), [(ConfigError("no key x"), StudyError), (KeyError("x"), KeyError)], ids=["for people", "a bug"]
)
def test_a_bug_in_a_run_is_not_dressed_up(tmp_path, monkeypatch, error, shown):
    def done():
        raise error

    monkeypatch.setattr(workers, "ProcessPoolExecutor", partial(Executor, done, []))
    with pytest.raises(shown) as caught, workers.open_pool(tmp_path, study(), 3, None, 0.0, False) as pool:
        list(pool.map(["job of a test"]))
    said = [str(caught.value), *getattr(caught.value, "__notes__", [])][-1]
    assert "job of a test" in said and "run the same command again" in said


@pytest.mark.torture
def test_a_worker_that_dies_is_reported_and_the_rest_kept(tmp_path):
    class Assassin(Diary):
        def finished(self, job, seconds):
            super().finished(job, seconds)
            for worker in psutil.Process().children():
                if "spawn_main" in " ".join(worker.cmdline()):
                    worker.kill()

    victim = Assassin()
    with pytest.raises(StudyError, match=r"a worker process died .* run the same command again"):
        run_study(study(), tmp_path / "study", workers=1, listener=victim)
    assert victim.runs == ["chains/reference/student"]
    assert (tmp_path / "study" / "chains" / "reference" / "student.json").exists()


def test_more_methods_may_join_and_only_they_are_run(finished, here, tmp_path):
    """One without a choice and one with; the others keep what was chosen for them."""
    directory = tmp_path / "study"
    shutil.copytree(finished[0], directory)
    before = json.loads((directory / "chains" / "selection.json").read_text())["methods"]
    diary = Diary()
    methods = {**STUDY["methods"], "skd": [{}], "fixed": {"initial_kl_budget": [0.1, 0.2]}}
    results = run_study(study(methods=methods), directory, workers=1, listener=diary)
    assert not any("/opd/" in run or "/trb/" in run for run in diary.runs)
    assert sum("/select/fixed" in run for run in diary.runs) == 2
    after = json.loads((directory / "chains" / "selection.json").read_text())["methods"]
    assert {name: after[name] for name in before} == before
    assert list(results["settings"]["chains"]["methods"]) == list(methods)
    changed = {**methods, "skd": [{"skd_teacher_top_k": 3}]}
    with pytest.raises(RunDirectoryError, match=r"with other methods: skd"):
        run_study(study(methods=changed), directory, workers=1)


def test_more_seeds_may_join_and_only_they_are_run(finished, here, tmp_path):
    directory, diary = Path(shutil.copytree(finished[0], tmp_path / "study")), Diary()
    results = run_study(study(seeds={"select": [100], "test": 2}), directory, workers=1, listener=diary)
    assert sorted(diary.runs) == ["chains/test/opd/seed-1", "chains/test/trb/seed-1"]
    assert results["settings"]["chains"]["methods"]["trb"]["seeds"] == 2


def test_a_small_first_phase_does_not_shrink_the_pool(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "ProcessPoolExecutor", partial(Executor, lambda: 0.0, asked))
    with workers.open_pool(tmp_path, study(), 3, None, 0.0, False) as pool:
        for jobs in (["one"], ["one", "two", "three", "four"]):
            assert len(list(pool.map(jobs))) == len(jobs)
    assert asked == [3]


def test_workers_default_to_what_the_machine_holds():
    assert default_workers(10**6) == 1


class Killed(BaseException):
    """What nothing catches."""


# Where each kill meets the sweep: inside the second run, between the runs and the choice, and with the second of the
# chosen runs trained and not scored.
KILLS = [(TRBTrainer, "training_step", 4), (sweep, "_select", 1), (jobs, "_score", 2)]


def test_a_sweep_killed_in_its_runs_and_between_them_ends_with_the_same_study(finished, here, tmp_path, monkeypatch):
    """And with the same records of every run; `make torture` kills real processes at random moments."""
    whole, directory = finished[0], tmp_path / "study"
    for owner, name, call in KILLS:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, killed_at(getattr(owner, name), call))
            run_study(study(), directory, workers=1)
        assert not (directory / "study.json").exists()
    run_study(study(), directory, workers=1)
    assert outcome(directory) == outcome(whole)


def killed_at(function, call):
    """It works but for its `call`-th call."""
    calls = []

    def doomed(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    return doomed


CLOCKS = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def outcome(directory):
    """The settings of study.json, and the records of its runs without clock readings."""
    found = {"study.json": json.loads((directory / "study.json").read_text())["settings"]}
    for path in sorted(directory.rglob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.relative_to(directory)] = [
            {key: value for key, value in record.items() if key not in CLOCKS} for record in records
        ]
    assert len(found) > 10
    return found


@pytest.mark.torture
def test_killed_sweeps_end_with_the_same_study(tmp_path):
    out = tmp_path / "kills.json"
    command = [sys.executable, str(BENCHMARKS / "kill_sweep.py"), "--kills", "2", "--seed", "3", "--out", str(out)]
    command += ["--signals", "kill", "terminal"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["kills"]["met_a_running_sweep"] >= 1
    assert result["files_differing"] == [] and result["processes_left_behind"] == 0
    assert result["tracebacks_shown"] == 0
    assert result["files_compared"] > 10


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'trb[ray]')")
def test_ray_runs_the_same_study(finished, tmp_path):
    directory, _ = finished
    command = [sys.executable, "-m", "trb", "sweep", "--config", str(directory / "study.yaml"), "--ray", "--quiet"]
    done = subprocess.run([*command, "--output-dir", str(tmp_path / "study")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, there = (json.loads((path / "study.json").read_text()) for path in (directory, tmp_path / "study"))
    assert here["settings"] == there["settings"]
