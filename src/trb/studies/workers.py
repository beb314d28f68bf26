"""Where the runs of a study are computed: processes of this machine, or tasks of a Ray cluster.

Left out: what a job does (`trb.studies.jobs`), and going on after a failure: the pool stops and names the run, and the
same command continues.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from trb.errors import OperationError, PackageError, is_for_people
from trb.models.packaged import quiet_libraries
from trb.studies.jobs import Job, do_job
from trb.studies.study import Study
from trb.training.ranks import end_with

__all__ = ["Pool", "StudyError", "default_workers", "open_pool"]

_GO_ON = "finished runs are intact; run the same command again to go on"


class StudyError(OperationError):
    """A study that cannot go on; the message names the run and says what is kept."""


def default_workers(threads: int) -> int:
    """One run per GPU, or as many as the cores hold."""
    return torch.cuda.device_count() or max(1, (os.cpu_count() or 1) // threads)


class Pool(Protocol):
    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, float]]:
        """Do the jobs in any order, yielding each with its seconds as it is finished.

        Raises StudyError for what people can set right; a bug in a job is raised as it is, with a note of the job.
        """


@contextmanager
def open_pool(
    directory: Path, study: Study, workers: int | None, ray: str | None, gpus: float, keep_models: bool
) -> Iterator[Pool]:
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
                futures: dict[Future[float], Job] = {executor.submit(do_job, *self._work, job): job for job in jobs}
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
            _explain(futures[future], error)
            raise
        yield futures[future], seconds


def _explain(job: Job, error: Exception) -> None:
    """Raise what is for people as a StudyError that names the job; a bug, which keeps its traceback, gets a note."""
    if is_for_people(error):
        raise StudyError(f"{job}: {error} ({_GO_ON})") from error
    error.add_note(f"{job} ({_GO_ON})")


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
                _explain(job, error.cause if isinstance(error.cause, Exception) else error)
                raise
            except ray.exceptions.RayError as error:  # of the cluster: a lost node, a full store
                raise StudyError(f"{job}: {error} ({_GO_ON})") from error
            yield job, seconds


def _ray_work(directory: str, keep_models: bool, job: Job, threads: int) -> float:
    torch.set_num_threads(threads)
    quiet_libraries()
    return do_job(directory, keep_models, job)


@contextmanager
def _ray_session(address: str) -> Iterator[None]:
    try:
        import ray
    except ImportError as error:
        raise PackageError("--ray needs Ray: pip install 'trb[ray]'") from error
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
