"""Is a completion's final answer right? 1.0 or 0.0, from graders that cannot hang or exhaust the run.

math-verify and the reasoning-gym scorers evaluate what a model wrote, and a model can write a power tower.
They therefore run in one worker process with a time limit per answer, enforced from outside, and a memory
limit; an answer that breaks a limit scores 0, the worker is replaced, and the event is counted. What graders
evaluate cannot act on the machine either: see `trb.safety.confinement`.

The worker is a plain subprocess that imports this module and nothing heavy. It is not a `multiprocessing`
process: that would import the caller's main script again, torch included.

Left out on purpose: partial credit (a reasoning-gym score below full marks is 0) and judging the reasoning.

What it still gets wrong is listed in docs/grading.md.
"""

import contextlib
import inspect
import json
import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import ModuleType, TracebackType
from typing import IO, Any, Self

from trb.errors import InputError, OperationError, PackageError
from trb.safety import confinement
from trb.tasks.answers import Box, Row, after_thinking, announced_answer, decode_metadata, final_boxes, last_boxed
from trb.tasks.coding import PYTHON, program_job
from trb.tasks.equality import compare_exactly, math_equal, plain_verdict, unwrapped
from trb.tasks.gym import WorthlessScorerError, check_scorer, full_marks, import_reasoning_gym
from trb.tasks.programs import Programs, require_confinement
from trb.tasks.sources import REASONING_GYM

__all__ = ["VERIFIERS", "Verifier", "can_be_scored", "check_verifier"]

logger = logging.getLogger(__name__)

BATCH = 256  # answers sent to the worker at once
MAX_MATH_CHARS = 2_000  # of an answer
MAX_TASK_CHARS = 20_000  # of an answer to a reasoning-gym task (grids are long)

# What the worker is asked:
# ["math", gold, [readings of the answer]] or ["gym", verifier, metadata, answer]. ["python", job] is for `Programs`.
Job = list[Any]


class Verifier:
    """Scores completions against reference answers: 1.0 right, 0.0 wrong, nan where the row has no answer.

    `score(completions, rows)` reads of each row `answer` (text or a number), `verifier` ("math" by default, or
    another of VERIFIERS) and, for reasoning-gym, `metadata`, as `trb.tasks.prompts.load_prompts` gives them.

    - "exact": the last \\boxed{} equals the answer, after collapsing white space.
    - "math": the last \\boxed{} (or a run of boxes such as `\\boxed{1}, \\boxed{2}`) is the same value, by math-verify
      made exact (`trb.tasks.equality`); without a box, what the end of the completion announces ("the answer is ...").
    - "reasoning-gym:TASK": the task's own scorer, full marks only, on the last \\boxed{} or
      <answer>...</answer>.
    - "python": the program passes the tests of the row, in processes of its own (`trb.tasks.programs`); it is the last
      fenced block, or all of the completion.

    Of a completion with thoughts, what follows the last </think> is read; one that ends inside a box scores 0.

    The worker starts with the first answer that needs it, and ends with `close()`, the `with` block or the
    interpreter. `timeouts` and `crashes` count answers that broke the time limit or killed the worker.
    `timeout_s` is wall-clock time per answer; `memory_limit_mb` bounds the worker's address space. Where the system has
    no such limit, a warning says so: an answer is then stopped by time alone. Programs are not run there at all.
    """

    def __init__(self, timeout_s: float = 5.0, *, memory_limit_mb: int = 2048) -> None:
        if not timeout_s > 0:
            raise InputError(f"timeout_s is {timeout_s}; give a positive number of seconds")
        self.timeouts = 0
        self.crashes = 0
        self._timeout_s = timeout_s
        self._memory_limit_mb = memory_limit_mb
        self._worker: _Worker | None = None
        self._finalizer: weakref.finalize | None = None
        self._programs: Programs | None = None

    def score(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """One score per completion, in order; `rows[i]` belongs to `completions[i]`.

        Raises ValueError for lengths that differ, an unknown verifier or metadata unfit for it, ImportError when a
        reasoning-gym row meets no reasoning-gym, and OperationError where programs cannot be confined.
        """
        if len(completions) != len(rows):
            raise InputError(f"{len(completions)} completions for {len(rows)} rows; pass one row each")
        scores: list[float] = []
        jobs: list[tuple[int, Job]] = []
        programs: list[tuple[int, Job]] = []
        for index, (completion, row) in enumerate(zip(completions, rows, strict=True)):
            verdict = _prepare(completion, row, f" for row {index}")
            if isinstance(verdict, list):
                (programs if verdict[0] == PYTHON else jobs).append((index, verdict))
                verdict = 0.0
            scores.append(verdict)
        self._run(programs, scores)
        for start in range(0, len(jobs), BATCH):
            self._work(jobs[start : start + BATCH], scores)
        return scores

    def close(self) -> None:
        """Stop the worker, if any. The verifier stays usable: the next answer starts a new one."""
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None
        if self._programs is not None:
            self._programs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, jobs: list[tuple[int, Job]], scores: list[float]) -> None:
        """Fill in the scores of programs."""
        if not jobs:
            return
        if self._programs is None:
            self._programs = Programs(self._timeout_s, memory_limit_mb=self._memory_limit_mb)
        outcomes = self._programs.run([job for _, (_, job) in jobs])
        for (index, _), outcome in zip(jobs, outcomes, strict=True):
            scores[index] = float(outcome == "passed")
        self.timeouts += outcomes.count("timeout")
        self.crashes += outcomes.count("crash")

    def _work(self, jobs: list[tuple[int, Job]], scores: list[float]) -> None:
        """Fill in the scores of `jobs`: one round trip, and one more for the rest after every lost worker."""
        while jobs:
            done = 0
            try:
                worker = self._running_worker()
                worker.ask([job for _, job in jobs])
                for index, _ in jobs:
                    scores[index] = worker.reply(self._timeout_s)
                    done += 1
            except TimeoutError:
                self.timeouts += 1
            except EOFError:
                self.crashes += 1
            except BaseException:
                self.close()  # replies are still on their way; the next call must not read them as its own
                raise
            else:
                return
            self.close()
            jobs = jobs[done + 1 :]  # the job that lost the worker keeps its 0

    def _running_worker(self) -> "_Worker":
        if self._worker is None or not self._worker.alive():
            self.close()
            self._worker = _Worker(self._timeout_s, self._memory_limit_mb)
            self._finalizer = weakref.finalize(self, self._worker.stop)
        return self._worker


# --- reading answers out of completions (in the caller's process: linear time only) -----------------------


def _exact(completion: str, row: Mapping[str, Any]) -> float:
    if not row["answer"]:
        return math.nan
    boxes = final_boxes(after_thinking(completion))
    return float(boxes is not None and any(box.content.split() == row["answer"].split() for box in boxes[-1:]))


def _math(completion: str, row: Mapping[str, Any]) -> float | Job:
    if not row["answer"]:
        return math.nan
    ending, gold = after_thinking(completion), last_boxed(row["answer"]) or row["answer"]
    boxes = final_boxes(ending)
    if boxes is None:
        return 0.0
    answer = boxes[-1].content if boxes else announced_answer(ending)
    if not answer:
        return 0.0
    plain = plain_verdict(gold, answer)
    if plain is not None:
        return float(plain)
    readings = [text for text in (answer, _last_run(ending, boxes)) if text]
    return ["math", gold, [text for text in readings if len(text) <= MAX_MATH_CHARS]]


def _reasoning_gym(completion: str, row: Mapping[str, Any]) -> float | Job:
    ending = after_thinking(completion)
    boxes = final_boxes(ending)
    closing = ending.rfind("</answer>")
    opening = ending.rfind("<answer>", 0, max(closing, 0))
    if boxes is None or ending.rfind("<answer>") > max(closing, 0):
        return 0.0
    candidates = [(box.end, box.content) for box in boxes[-1:]]
    if opening >= 0:
        candidates.append((closing, ending[opening + len("<answer>") : closing].strip()))
    if not candidates:
        return 0.0
    answer = unwrapped(max(candidates)[1])
    return ["gym", row["verifier"], row.get("metadata", "{}"), answer] if len(answer) <= MAX_TASK_CHARS else 0.0


def _python(completion: str, row: Mapping[str, Any]) -> float | Job:
    require_confinement()
    job = program_job(completion, row)
    if job is None:
        return 0.0
    return [PYTHON, job] if job["tests"] else math.nan


# By what a row calls its verifier; a name that ends in ":" takes what follows it. Each returns the score where that is
# plain to see, nan for a row that nothing can be scored against, else what to ask the worker.
VERIFIERS: dict[str, Callable[[str, Mapping[str, Any]], float | Job]] = {
    "math": _math,
    "exact": _exact,
    REASONING_GYM: _reasoning_gym,
    PYTHON: _python,
}


def check_verifier(verifier: Any, what: str = "unknown verifier") -> str:
    """The name in VERIFIERS of what a row calls its verifier. Raises ValueError, which begins with `what`."""
    name, colon, _ = str(verifier).partition(":")
    if name + colon not in VERIFIERS:
        known = (f"{name}NAME" if name.endswith(":") else name for name in VERIFIERS)
        raise InputError(f"{what} {verifier!r}; use one of {', '.join(map(repr, known))}")
    return name + colon


def _prepare(completion: str, row: Mapping[str, Any], place: str = "") -> float | Job:
    """The score where it is plain to see, else what to ask the worker; `place` is the row's, in messages.

    Rows may be of the caller's own making: without an answer, or with a number.
    """
    name = row.get("verifier") or "math"
    read = VERIFIERS[check_verifier(name)]
    verdict: Any = read(completion, {**row, "verifier": name, "answer": _as_text(row.get("answer"))})
    if isinstance(verdict, list):
        return verdict
    try:
        score = float("" if isinstance(verdict, str) else verdict)
    except (TypeError, ValueError):
        score = math.inf
    if not (score in (0.0, 1.0) or math.isnan(score)):
        if inspect.iscoroutine(verdict):
            verdict.close()  # or Python would warn that nobody waited for it
        raise InputError(f"verifier {name!r} gave {verdict!r:.80}{place}; it must give 1.0, 0.0 or nan")
    return score


def _as_text(answer: Any) -> str:
    """A reference answer as `trb.tasks.prompts.load_prompts` would have it."""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    if isinstance(answer, list):
        return ", ".join(map(str, answer))
    return "" if answer is None else str(answer)


def can_be_scored(row: Mapping[str, Any]) -> bool:
    """Whether the row has something to score completions against. Raises ValueError for an unknown verifier."""
    verdict = _prepare("", row)
    return isinstance(verdict, list) or not math.isnan(verdict)


_BETWEEN_BOXES = re.compile(r"(?:[\s$,;.()\[\]{}\\]|and|or|text|quad)*")


def _joined(between: str) -> bool:
    return len(between) <= 80 and _BETWEEN_BOXES.fullmatch(between) is not None


def _last_run(text: str, boxes: list[Box]) -> str:
    """The contents of several boxes that end the text as one list, joined by commas; "" for a single box."""
    first = max(len(boxes) - 1, 0)
    while first and _joined(text[boxes[first - 1].end : boxes[first].start]):
        first -= 1
    run = boxes[first:]
    return ", ".join(box.content for box in run) if 1 < len(run) <= 50 else ""


# --- the worker, seen from the caller ---------------------------------------------------------------------

_BOOT = confinement.boot("trb.tasks.grading", "_serve")


class _Worker:
    """One worker process: `ask` a batch, then call `reply` once per job.

    `reply` raises TimeoutError when the limit passes and EOFError when the process is gone: stop it then.
    """

    def __init__(self, timeout_s: float, memory_limit_mb: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        settings = json.dumps([[str(entry) for entry in sys.path], timeout_s, memory_limit_mb])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=confinement.permitted_environment(os.environ),
            start_new_session=True,  # Ctrl-C is for the caller, who then stops the worker
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._pump = threading.Thread(target=_pump, args=(self._stdout, self._replies), daemon=True)
        self._pump.start()
        try:
            ready = self._message(confinement.STARTUP_LIMIT_S)
        except BaseException as error:
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            trace = self._errors.read()[-2000:].decode(errors="replace").strip()
            self.stop()
            if not isinstance(error, TimeoutError | EOFError):
                raise
            raise OperationError(f"the answer-checking worker did not start: {trace or error}") from error
        if not ready["memory_limited"]:
            logger.warning("this system cannot limit the memory of the process that checks answers, only its time")

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, jobs: list[Job]) -> None:
        """Send a batch. Cannot block for long: an idle worker reads all of it before it starts."""
        try:
            self._stdin.write(json.dumps(jobs) + "\n")
            self._stdin.flush()
        except BrokenPipeError as error:
            raise EOFError("the worker ended before it read its batch") from error

    def reply(self, timeout_s: float) -> float:
        return self._message(timeout_s)["score"]

    def _message(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no reply within {timeout_s} s") from None
        if line is None:
            raise EOFError("the worker ended")
        message = json.loads(line)
        if "error" in message:
            raise (PackageError if message["kind"] == "ImportError" else InputError)(message["error"])
        return message

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pump.join(timeout=5)
        with contextlib.suppress(BrokenPipeError):  # an unsent batch in the buffer
            self._stdin.close()
        self._stdout.close()
        self._errors.close()


def _pump(stdout: IO[str], replies: "queue.SimpleQueue[str | None]") -> None:
    for line in stdout:
        replies.put(line)
    replies.put(None)


# --- the worker, from inside -------------------------------------------------------------------------------


def _serve(timeout_s: float, memory_limit_mb: int) -> None:
    """Answer batches from stdin until it closes. Entry point of the worker process."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    logging.disable(logging.CRITICAL)
    compare_exactly()
    if not math_equal(r"x+\frac{1}{2}", "x+0.5") or math_equal("X", "x") or math_equal(r"\pi+10^{-20}", r"\pi"):
        raise OperationError("math-verify of this version does not work; install math-verify>=0.9,<0.10")
    confinement.tame_sympy()
    _silence()
    limited = confinement.limit_resources(memory_limit_mb)
    confinement.forbid_side_effects()
    # Everything slow about the first answer is behind us.
    _send(replies, {"memory_limited": limited})
    for line in sys.stdin:
        for job in json.loads(line):
            with _last_resort(2 * timeout_s + 1):
                reply = _answer_job(job)
            _send(replies, reply)


def _silence() -> None:
    """Drop what is printed from now on: answers come by the million, and some graders print about each."""
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)


def _send(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


@contextlib.contextmanager
def _last_resort(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer: the caller enforces the limit, unless it was killed itself.

    The default action of SIGALRM acts even inside one long C call, where no Python handler would run.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _answer_job(job: Job) -> dict[str, Any]:
    if job[0] == "gym":
        return _answer_task(*job[1:])
    _, gold, readings = job
    try:
        right = any(math_equal(gold, text) for text in readings)
    except Exception:
        # What a model wrote can raise anything at all inside sympy. It is then not a right answer. That the
        # grader itself works was checked before the first job.
        right = False
    return {"score": float(bool(right))}


def _answer_task(verifier: str, metadata: str, answer: str) -> dict[str, Any]:
    try:
        _confined_reasoning_gym()
    except ImportError as error:
        return {"error": str(error), "kind": "ImportError"}
    try:
        state = decode_metadata(metadata)
        entry = state["entry"]
        scorer = _task_scorer(state["task"], json.dumps(state["settings"]))
        _check_once(state["task"], scorer, entry)
    except WorthlessScorerError as error:
        return {"error": str(error), "kind": "ValueError"}
    except Exception as error:  # from a file of somebody else, and the generators check settings in their own ways
        return {"error": f"a row of {verifier!r} has unusable metadata: {error!r}", "kind": "ValueError"}
    try:
        return {"score": float(full_marks(scorer(answer, entry)))}
    except Exception:  # task scorers parse the answer, and some raise on nonsense
        return {"score": 0.0}


@lru_cache(maxsize=1)
def _confined_reasoning_gym() -> ModuleType:
    with confinement.lifted():
        gym = import_reasoning_gym()
    confinement.tame_reasoning_gym()
    return gym


@lru_cache(maxsize=64)
def _task_scorer(task: str, settings: str) -> Any:
    return _confined_reasoning_gym().create_dataset(task, **json.loads(settings)).score_answer


_checked: set[str] = set()


def _check_once(task: str, scorer: Any, entry: Row) -> None:
    """`check_scorer` on the first entry of a task: rows may come from a file, and were checked by nobody."""
    if task not in _checked:
        check_scorer(task, scorer, entry)
        _checked.add(task)
