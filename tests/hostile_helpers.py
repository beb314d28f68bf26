"""What the attempts of tests/security/test_hostile_*.py share: a folder under guard, a bomb, and the count of them.

An attempt succeeds if its code runs (it would leave a file called canary), if it reads, writes or removes something
outside of the folder it came in, opens a connection, hangs, or is taken for an ordinary input. It is refused if the
package says no in an error of its own, or gives a wrong answer no point.

Left out on purpose: denial of service by honest size, such as a model larger than memory (see SECURITY.md).
"""

import json
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch.distributed import checkpoint as sharded

from trb import zoo
from trb.safety.files import write_json
from trb.studies import provenance

SECONDS = 120  # for one attempt on a busy machine, processes that have to import torch included

# An attempt that takes seconds: `make hostile` and `make torture` make it, `make test` does not.
slow = pytest.mark.torture


def each(argument: str, /, *, slow_ones: Collection[str] = (), **values: Any) -> pytest.MarkDecorator:
    """One attempt for each of `values`, named by its key."""
    return pytest.mark.parametrize(
        argument,
        [pytest.param(value, id=name, marks=slow if name in slow_ones else ()) for name, value in values.items()],
    )


# ---- the guard ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where one attempt lies. Asking the hub is allowed, as it is for users: an attempt may not come so far."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with guarded(tmp_path):
        yield tmp_path


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Fails if the block takes too long, opens a connection, or lets code run."""
    with within(SECONDS), watched() as seen:
        yield
    assert not canary(folder).exists(), "its code ran"
    assert not seen, f"it opened a connection: {seen}"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails if the block takes longer, as far as Python gets to act."""

    def late(*_: Any) -> None:
        pytest.fail(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)  # of the block around this one


# (a folder, what was seen), the innermost last; audit hooks cannot be taken back, so one looks here.
WATCHES: list[tuple[Path | None, list[str]]] = []


@contextmanager
def watched(place: Path | None = None) -> Iterator[list[str]]:
    """Fails at every connection; gives what is seen of it, and every file that is opened in a place."""
    if note not in HOOKS:
        HOOKS.append(note)
        sys.addaudithook(note)
    seen: list[str] = []
    WATCHES.append((place, seen))
    try:
        yield seen
    finally:
        WATCHES.pop()


HOOKS: list[Callable[..., None]] = []


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if not WATCHES:
        return
    connecting = event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    local = event == "socket.connect" and isinstance(arguments[1], str | bytes)  # a socket of this machine
    if connecting and not local:
        WATCHES[0][1].append(f"{event} {arguments}")
        pytest.fail(f"it opened a connection: {event} {arguments}")  # which no library takes for a bad network
    if event == "open":
        for place, seen in WATCHES:
            if place and str(place) in str(arguments[0]):
                seen.append(f"open {arguments[0]}")


def refused(call: Callable[[], Any]) -> str:
    """The error that a call ends with, which must be one that the package explains."""
    try:
        result = call()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    pytest.fail(f"it was accepted: {result!r:.200}")


# ---- what attempts are made of ----


def canary(folder: Path) -> Path:
    return folder / "canary"


class Bomb:
    """Pickles to a call that leaves the canary."""

    def __init__(self, folder: Path) -> None:
        self.code = f"open({str(canary(folder))!r}, 'w').close()"

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


# Nine lines that stand for 9^9 values.
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

RECIPE: dict[str, Any] = {
    "student": "zoo:student",
    "teacher": "zoo:teacher",
    "train_data": "zoo:chains",
    "train_limit": 8,
    "max_prompt_length": 32,
    "max_steps": 1,
    "prompts_per_step": 1,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 4,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_final_model": False,
}


def model_copy(folder: Path) -> Path:
    return Path(shutil.copytree(zoo.path("student"), folder / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**record, **changes}))


def checkpoint(folder: Path) -> Path:
    path = model_copy(folder).rename(folder / "checkpoint-1")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    weight = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weight.parameters())
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    return path


def shards(folder: Path, content: dict[str, Any]) -> Path:
    """What FSDP with sharded state writes."""
    path = checkpoint(folder) / "optimizer_0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded.save(content, checkpoint_id=path, no_dist=True)
    return path


# ---- the count ----


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attempts-json", type=Path, metavar="FILE", help="write there which attempts were refused")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--attempts-json")
    if path is not None and not hasattr(config, "workerinput"):  # workers hand their reports to the first process
        config.pluginmanager.register(Count(path), "count of attempts")


class Count:
    """Writes the attempts of a session: the area is the name of the file, the attempt that of the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = re.search(r"test_hostile_(\w+)\.py::test_(\w+)(?:\[(.*)\])?$", report.nodeid)
        if found:
            area, name, variant = (text and text.replace("_", " ") for text in found.groups())
            new = {"area": area, "name": f"{name}: {variant}" if variant else name, "refused": True, "seconds": 0.0}
            attempt = self.attempts.setdefault(report.nodeid, new)
            attempt["refused"] &= report.passed  # nor is one refused that was skipped
            attempt["seconds"] = round(attempt["seconds"] + report.duration, 1)

    def pytest_sessionfinish(self) -> None:
        cases = sorted(self.attempts.values(), key=lambda attempt: (attempt["area"], attempt["name"]))
        counts = {"tried": len(cases), "refused": sum(attempt["refused"] for attempt in cases)}
        write_json(self.path, {**counts, "cases": cases, "provenance": provenance.describe()})
