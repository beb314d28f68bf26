"""Runs a study (`trb.studies.study`) to its end: references, selection, test, on local processes or as tasks of a Ray
cluster.

A study directory holds study.yaml, provenance.json (of the first start), one folder per setting and, in the end,
study.json. A setting's folder has reference/ (scores of the untrained student and the teacher), select/ and
test/ with a run directory per training run, and selection.json, written once and never changed. Whatever is finished
is kept: a study that was killed goes on where it was, and ends with the same study.json.

The test split is scored after the choice is on disk, once per chosen run, from the model that the run wrote.

Left out on purpose: judging the results (`trb.studies.findings`), and what one run does (`trb.studies.experiments`).
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import yaml

from trb import records
from trb.models.loading import load_model
from trb.models.packaged import quiet_libraries
from trb.records import MODEL, REFERENCE_SCORES, RESULTS, SCORING, SELECTION, STUDY, STUDY_PLAN, TEST, JsonFile
from trb.safety.files import LOCK, exclusive, write_text
from trb.safety.untrusted import parse_yaml
from trb.studies import findings, provenance
from trb.studies.experiments import (
    RunDirectoryError,
    evaluate_suites,
    holds_scores,
    load_pair,
    load_tokenizers,
    make_again,
    problem_sets,
    train,
)
from trb.studies.study import ROLES, ProblemSets, Reference, Study, Unit, load_study
from trb.tasks.grading import Verifier
from trb.training.ranks import end_with
from trb.vocab import SharedVocabulary

__all__ = ["StudyError", "StudyListener", "default_workers", "run_study"]

# What may change between two starts: how results are judged, not what is run.
_JUDGEMENT = ("description", "target", "level", "resamples")


class StudyError(RuntimeError):
    """A study that cannot go on; the message names the run and says what is kept."""


class StudyListener:
    """Hears how far a study is. This one is silent."""

    def stage(self, text: str) -> None:
        """What happens from now on, in a few words."""

    def phase(self, name: str, done: int, total: int) -> None:
        """A phase begins, with `done` of its `total` runs finished earlier."""

    def finished(self, job: str, seconds: float) -> None:
        """One run of the phase is finished."""


Job = Unit | Reference


def run_study(
    study: Study,
    directory: str | os.PathLike[str],
    *,
    workers: int | None = None,
    ray: str | None = None,
    gpus: float = 0,
    keep_models: bool = False,
    listener: StudyListener | None = None,
) -> dict[str, Any]:
    """Run what a study still lacks, and judge it; returns what study.json holds.

    Args:
        study: a checked study (`trb.studies.study.load_study`).
        directory: the study directory. A study that was begun there goes on; another one is refused. More test seeds
            and more settings may join a study that is on disk, and how results are judged may change.
        workers: runs at once; `default_workers` if None. With Ray, None leaves it to the cluster.
        ray: address of a Ray cluster ("local" starts one here, "auto" finds a running one); None for local processes.
            Every node must see `directory` under the same path.
        gpus: GPUs that each Ray task asks for.
        keep_models: keep the trained models of the test runs; they are removed once scored otherwise.
        listener: hears about progress.

    Raises:
        RunDirectoryError: the directory holds another study, cannot be written, or another sweep is running there.
        StudyError: a run failed, or its process died. Finished runs are intact.
        ValueError: development and test problems overlap.
    """
    directory, listener = Path(directory).absolute(), listener or StudyListener()
    with _claimed(directory):
        _begin(directory, study)
        listener.stage("checking that development and test problems differ")
        for name in study.settings:
            _check_disjoint(study, name)
        with _pool(directory, study, workers, ray, gpus, keep_models) as pool:
            references = [Reference(name, role) for name in study.settings for role in ROLES]
            _run(pool, "references", references, directory, listener)
            _run(pool, "selection", study.units("select"), directory, listener)
            chosen = {name: _select(study, directory, name) for name in study.settings}
            _run(pool, "test", study.units("test", chosen), directory, listener)
    listener.stage("comparing")
    results = findings.assemble(study, directory)
    STUDY.write(directory / STUDY, results)
    return results


def default_workers(threads: int) -> int:
    """One run per GPU, or as many as the cores hold."""
    return torch.cuda.device_count() or max(1, (os.cpu_count() or 1) // threads)


# ---- one run: all of this happens in a worker ----


def _work(directory: str, keep_models: bool, job: Job) -> float:
    """Do a job, unless it is done; returns the seconds it took."""
    start, study = time.monotonic(), _study_in(directory)
    if isinstance(job, Reference):
        _score_reference(study, Path(directory), job)
        return time.monotonic() - start
    run = Path(directory) / job.path
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run, wait=True, inside=True):
        if not _is_done(Path(directory), job):
            if job.phase == "test" and not (run / MODEL).is_dir():  # removed once scored, and now needed again
                (run / RESULTS).unlink(missing_ok=True)
            train(study.recipe_of(job), run, initial_scores=_initial_scores(Path(directory), job.setting))
            if job.phase == "test":
                _score_trained(study, job, run)
            _keep_seconds(run, time.monotonic() - start)
        if job.phase == "test" and not keep_models:
            for leftover in (MODEL, SCORING):
                shutil.rmtree(run / leftover, ignore_errors=True)
    return time.monotonic() - start


def _is_done(directory: Path, job: Job) -> bool:
    """Whether a job's results are there. Damaged ones are moved aside, so that the job is done again."""
    if isinstance(job, Reference):
        return _is_whole(REFERENCE_SCORES, directory / job.path)
    if job.phase == "test":
        return _is_whole(TEST, directory / job.path / TEST)
    return _is_whole(RESULTS, directory / job.path / RESULTS, holds_scores)


def _is_whole(file: JsonFile, path: Path, check: Callable[[Any], bool] = lambda _: True) -> bool:
    if not path.exists():
        return False
    try:
        if check(file.read(path)):
            return True
    except (IsADirectoryError, ValueError):
        pass
    make_again(path)
    return False


def _score_reference(study: Study, directory: Path, job: Reference) -> None:
    setting = study.settings[job.setting]
    run = study.scoring_recipe(job.setting, setting.dev).run
    student, teacher = load_pair(run)
    vocabulary = SharedVocabulary.of_pair(student, teacher, *load_tokenizers(run))
    model = student if job.role == "student" else teacher
    scores = {
        name: _score(study, job.setting, getattr(setting, name), model, None, vocabulary) for name in ("dev", "test")
    }
    REFERENCE_SCORES.write(directory / job.path, scores)


def _initial_scores(directory: Path, setting: str) -> list[dict[str, Any]]:
    """The untrained student on the development split: every run of a setting starts there."""
    path = directory / Reference(setting, "student").path
    suites = REFERENCE_SCORES.read(path)["dev"]["suites"].values()
    return [{key: value for key, value in suite.items() if key != "correct"} for suite in suites]


def _score_trained(study: Study, job: Unit, run: Path) -> None:
    """Score the model of a finished run on the test split, and keep the outcome of every problem."""
    problems = study.settings[job.setting].test
    dtype = study.scoring_recipe(job.setting, problems).run.student_dtype
    model = load_model(str(run / MODEL), dtype=dtype)  # it was saved with every stop id of its pair
    TEST.write(run / TEST, _score(study, job.setting, problems, model, run / SCORING))


def _score(
    study: Study,
    setting: str,
    problems: ProblemSets,
    model: Any,
    folder: Path | None,
    vocabulary: SharedVocabulary | None = None,
) -> dict[str, Any]:
    """Scores per suite, each with the number of right answers to every problem. Goes on where `folder` has results."""
    recipe = study.scoring_recipe(setting, problems)
    args = recipe.training_config("unused")
    tokenizer, _ = load_tokenizers(recipe.run)
    sets = problem_sets(recipe.run)
    outcomes: dict[str, list[int]] = {}
    with Verifier(recipe.run.reward_timeout_s) as verifier:
        scores = evaluate_suites(
            model,
            tokenizer=tokenizer,
            problems=sets,
            run=recipe.run,
            args=args,
            verifier=verifier,
            folder=folder,
            outcomes=outcomes,
            vocabulary=vocabulary,
        )
    return {"suites": {score["name"]: score | {"correct": outcomes[score["name"]]} for score in scores}}


def _keep_seconds(run: Path, seconds: float) -> None:
    """How long a run took, apart from what it found: that must not depend on the clock."""
    records.SECONDS.write(run / records.SECONDS, round(seconds, 1))


@cache
def _study_in(directory: str) -> Study:
    return load_study(Path(directory) / STUDY_PLAN)


# ---- selection ----


def _select(study: Study, directory: Path, setting: str) -> dict[str, int]:
    """The chosen configuration of every family: read if it is on disk, made and written otherwise."""
    path = directory / setting / SELECTION
    if not _is_whole(SELECTION, path):  # the same again, from the same scores
        table = findings.selection(study, directory, setting)
        SELECTION.write(path, {"select_by": study.select_by, "seeds": study.seeds.select, "methods": table})
    return dict(_chosen(SELECTION.read(path)))


def _chosen(table: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, rows in table["methods"].items():
        yield name, [bool(row["selected"]) for row in rows].index(True)


# ---- pools ----


class _Pool(Protocol):
    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, float]]:
        """Do the jobs in any order, yielding each with its seconds as it is finished. Raises StudyError."""


def _run(pool: _Pool, phase: str, jobs: Sequence[Job], directory: Path, listener: StudyListener) -> None:
    missing = [job for job in jobs if not _is_done(directory, job)]
    listener.phase(phase, len(jobs) - len(missing), len(jobs))
    for job, seconds in pool.map(missing) if missing else ():
        listener.finished(str(job), seconds)


@contextmanager
def _pool(
    directory: Path, study: Study, workers: int | None, ray: str | None, gpus: float, keep_models: bool
) -> Iterator[_Pool]:
    work = (str(directory), keep_models)
    if ray is None:
        with _LocalPool(work, workers or default_workers(study.threads), study.threads) as pool:
            yield pool
    else:
        with _ray_session(ray):
            yield _RayPool(work, workers, study.threads, gpus)


def _environment(threads: int) -> dict[str, str]:
    # Before torch is imported there: threads that spin while they wait slow each other down on shared cores.
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


class _LocalPool(AbstractContextManager):
    """Processes of this machine, which end with the one that started them."""

    def __init__(self, work: tuple[str, bool], workers: int, threads: int) -> None:
        self._work, self._workers, self._threads = work, workers, threads
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if self._executor is None:
            return
        if kind is not None and not issubclass(kind, Exception):
            # Interrupted: what runs, and what the workers have been handed already, would take its hours.
            for process in list(self._executor._processes.values()):  # Python 3.14's terminate_workers
                process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, float]]:
        with _with_environment(_environment(self._threads)):  # inherited by the processes started meanwhile
            executor = self._executor = self._executor or ProcessPoolExecutor(
                self._workers,
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(os.getpid(), self._threads),
            )
            with _deaf_children():
                futures: dict[Future[float], Job] = {executor.submit(_work, *self._work, job): job for job in jobs}
            yield from _gathered(futures)


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: it is for this one, which hears of it afterwards and ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started with the first process, it would take the mask off again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gathered(futures: dict[Future[float], Job]) -> Iterator[tuple[Job, float]]:
    for future in as_completed(futures):
        try:
            seconds = future.result()
        except BrokenProcessPool as error:
            raise StudyError(
                "a worker process died (killed, or out of memory). Finished runs are intact: run the same command "
                "again to go on, with fewer --workers if memory was short"
            ) from error
        except Exception as error:
            for other in futures:
                other.cancel()
            raise _failed(futures[future], error) from error
        yield futures[future], seconds


def _failed(job: Job, error: Exception) -> StudyError:
    text = str(error) or type(error).__name__
    return StudyError(f"{job}: {text} (finished runs are intact; run the same command again to go on)")


def _start_worker(parent: int, threads: int) -> None:
    torch.set_num_threads(threads)
    quiet_libraries()
    end_with(parent)  # a killed study must not leave processes behind that write into its directory


class _RayPool:
    """Tasks of a Ray cluster."""

    def __init__(self, work: tuple[str, bool], workers: int | None, threads: int, gpus: float) -> None:
        self._work, self._workers, self._threads, self._gpus = work, workers, threads, gpus

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, float]]:
        import ray

        task = ray.remote(_ray_work).options(
            num_cpus=self._threads,
            num_gpus=self._gpus,
            max_retries=2,  # of a lost node or process; an exception is an answer
            runtime_env={"env_vars": _environment(self._threads)},
        )
        waiting = list(reversed(jobs))
        running: dict[Any, Job] = {}
        while waiting or running:
            while waiting and (self._workers is None or len(running) < self._workers):
                job = waiting.pop()
                running[task.remote(*self._work, job, self._threads)] = job
            [reference], _ = ray.wait(list(running))
            job = running.pop(reference)
            try:
                seconds = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                for other in running:
                    ray.cancel(other)
                raise _failed(job, error.cause if isinstance(error.cause, Exception) else error) from error
            except ray.exceptions.RayError as error:
                raise _failed(job, error) from error
            yield job, seconds


def _ray_work(directory: str, keep_models: bool, job: Job, threads: int) -> float:
    torch.set_num_threads(threads)
    quiet_libraries()
    return _work(directory, keep_models, job)


@contextmanager
def _ray_session(address: str) -> Iterator[None]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'trb[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by init; a local cluster would report itself
    ray.init(address=None if address == "local" else address, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _with_environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- the directory ----


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    with ExitStack() as stack:
        # Around the claim alone: what is refused later on has a file of its own to name.
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(directory))
        except BlockingIOError as error:
            raise RunDirectoryError(
                f"another sweep is running in {directory}: {error.strerror}; wait for it, or use another directory"
            ) from error
        except PermissionError as error:
            raise RunDirectoryError(
                f"cannot write to {error.filename or directory}: {error.strerror}; choose another --output-dir"
            ) from error
        yield


def _begin(directory: Path, study: Study) -> None:
    path = directory / STUDY_PLAN
    if path.exists():
        _check_same(path, study)
    elif any(entry.name != LOCK for entry in directory.iterdir()):
        raise RunDirectoryError(f"{directory} is not empty and holds no study; use another output directory")
    write_text(path, study.to_yaml())
    if not (directory / records.PROVENANCE).exists():
        provenance.write(directory)


def _check_same(path: Path, study: Study) -> None:
    """Refuse to go on with a study whose finished runs would not belong to it."""
    try:
        there = Study.model_validate(parse_yaml(path.read_text(encoding="utf-8"))).model_dump()
    except (ValueError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"{path} is damaged ({error!s:.200}); use another output directory") from error
    here = study.model_dump()
    kept = set(there["seeds"]["test"]) <= set(here["seeds"]["test"])
    there["seeds"]["test"] = here["seeds"]["test"] if kept else there["seeds"]["test"]
    here["settings"] = {name: here["settings"].get(name) for name in there["settings"]}
    changed = [key for key in there if key not in _JUDGEMENT and there[key] != here[key]]
    if changed:
        key = changed[0]
        raise RunDirectoryError(
            f"{path.parent} holds a study with other {key}: {_difference(there[key], here[key])}. Settings and test "
            "seeds may join a study; for anything else use another output directory"
        )


def _difference(there: Any, here: Any, where: str = "") -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in there | here:
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{where}{key}.")
    return f"{where.rstrip('.') or 'it'} is {there!r:.80} there and {here!r:.80} here"


def _check_disjoint(study: Study, setting: str) -> None:
    """Raises ValueError if a development problem is also a test problem."""
    seen: dict[str, set[str]] = {}
    for name in ("dev", "test"):
        sets = problem_sets(study.scoring_recipe(setting, getattr(study.settings[setting], name)).run)
        seen[name] = {json.dumps(row["prompt"]) for rows in sets.values() for row in rows}
    shared = len(seen["dev"] & seen["test"])
    if shared:
        raise ValueError(
            f"{setting}: {shared} development problems are test problems too; choose another seed or split for one"
        )
