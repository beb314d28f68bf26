"""Runs programs that models wrote against the tests of their problems, several at once, confined, and bounded in time.

`Programs` is the caller's side: it keeps one server (`trb.tasks.program_host`), hands it a socket for each program,
sends program and tests through that, and waits for the verdict. Programs are started by forking the server, which has
imported what they may import: that takes less than a fresh Python.

Left out on purpose: what a row of a data set says about its tests (`trb.tasks.coding`), and partial credit.
"""

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from trb.errors import InputError, OperationError
from trb.safety.confinement import STARTUP_LIMIT_S, boot, permitted_environment
from trb.safety.system_calls import why_not_confined
from trb.tasks.program_host import EXTRA_S
from trb.tasks.values import MAX_MESSAGE

__all__ = ["Programs", "require_confinement"]

PATIENCE_S = 30.0  # beyond what the kernel grants a program, before the server is given up
MOST_AT_ONCE = 8
MEMORY_MB = 512  # of a program, and of its tests; less where the caller allows less
MAX_SAID = 2**16  # bytes of a judge, whose tests may write to its socket, too

_TOO_LONG = b""  # instead of a program that does not fit beside its tests

_BOOT = boot("trb.tasks.program_host", "serve")


def require_confinement() -> None:
    """Raises OperationError on a system where programs cannot be confined, as far as that is known without trying."""
    if why := why_not_confined():
        raise OperationError(f"programs that a model wrote are not run here: {why}. Run this in a Linux container")


class Programs:
    """Runs programs against tests: "passed", "failed", "timeout" or "crash" for each.

    A job has `readings` (texts of the program, of which the first that is Python is run), `prefix` and `setup` (run
    before the tests), `tests` (texts, each to run without an exception), and `entry_points`, the names in them that are
    the program's; without these, what `reference` (a solution) defines; without that, every name that is nothing else.
    `timeout_s` is wall-clock time per program.
    """

    def __init__(self, timeout_s: float, *, memory_limit_mb: int = MEMORY_MB, at_once: int | None = None) -> None:
        require_confinement()
        self._timeout_s = timeout_s
        self._memory_limit_mb = min(memory_limit_mb, MEMORY_MB)
        self._at_once = at_once or min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)
        self._server: _Server | None = None
        self._finalizer: weakref.finalize | None = None

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
        """Equal jobs, which a good model writes many of, are run once.

        Raises ValueError for tests too large or none, OperationError where it cannot be confined.
        """
        messages = [_message(job) for job in jobs]
        outcomes = {_TOO_LONG: "failed"}
        waiting = [message for message in dict.fromkeys(messages) if message not in outcomes][::-1]
        judges: dict[socket.socket, _Judge] = {}
        try:
            while waiting or judges:
                while waiting and len(judges) < self._at_once:
                    judge = _Judge(waiting.pop(), self._running_server().new_judge(), self._timeout_s)
                    judges[judge.socket] = judge
                for judge in _heard(judges):
                    if judge.outcome == "crash" and not self._server_lives():
                        raise OperationError("the process that runs programs was ended from outside")
                    outcomes[judge.message] = judge.outcome
                    judges.pop(judge.socket).socket.close()
        except BaseException:
            self.close()  # programs end with the server
            raise
        finally:
            for judge in judges.values():
                judge.socket.close()
        return [outcomes[message] for message in messages]

    def close(self) -> None:
        """Stop the server, if any, and with it every program."""
        if self._finalizer is not None:
            self._finalizer()
        self._server = self._finalizer = None

    def _server_lives(self) -> bool:
        return self._server is not None and self._server.alive()

    def _running_server(self) -> "_Server":
        if self._server is None or not self._server.alive():
            self.close()
            self._server = _Server(self._timeout_s, self._memory_limit_mb)
            self._finalizer = weakref.finalize(self, self._server.stop)
        return self._server


def _message(job: Mapping[str, Any]) -> bytes:
    data = json.dumps(job, ensure_ascii=False).encode(errors="surrogatepass")
    if len(data) > MAX_MESSAGE:
        if not job["readings"]:
            raise InputError(f"the tests of a program take {len(data)} bytes, more than the limit of {MAX_MESSAGE}")
        _message({**job, "readings": []})
        return _TOO_LONG
    return len(data).to_bytes(4, "big") + data


class _Judge:
    """One program on trial: what its judge has said so far."""

    def __init__(self, message: bytes, connection: socket.socket, timeout_s: float) -> None:
        self.message, self.socket, self.outcome = message, connection, ""
        self._said, self._timeout_s, self._began = b"", timeout_s, time.monotonic()
        self.deadline = self._began + timeout_s + EXTRA_S + PATIENCE_S
        connection.settimeout(PATIENCE_S)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is read below
            connection.sendall(message)

    def listen(self) -> bool:
        """Whether its process has ended, after reading what there is to read. A verdict alone may come from tests."""
        part = b""
        with contextlib.suppress(ConnectionResetError):
            part = self.socket.recv(MAX_SAID)
        self._said = (self._said + part)[:MAX_SAID]
        if part:
            return False
        match _frames(self._said):
            case []:
                raise OperationError("a program could not be started: the system has no process or memory left for it")
            case ["ready", {"unusable": str(problem)}] if problem:
                raise InputError(f"a row of 'python' has unusable tests: {problem}")
            case ["ready", {"passed": bool(passed), "lost": False}]:
                self.outcome = "passed" if passed else "failed"
            case _:
                self.outcome = "timeout" if time.monotonic() - self._began >= self._timeout_s else "crash"
        return True


def _frames(data: bytes) -> list[Any]:
    """The messages up to the first that is none."""
    found = []
    with contextlib.suppress(ValueError, RecursionError):
        while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:4], "big")):
            found.append(json.loads(data[4:end]))
            data = data[end:]
    return found


def _heard(judges: Mapping[socket.socket, _Judge]) -> list[_Judge]:
    """Waits until some judge says something; those that are done."""
    first = min(judge.deadline for judge in judges.values())
    with selectors.DefaultSelector() as selector:
        for connection in judges:
            selector.register(connection, selectors.EVENT_READ)
        ready = selector.select(max(0.0, first - time.monotonic()))
    if not ready:
        raise OperationError("a program outlived its time limit, which the kernel should keep")
    return [judge for key, _ in ready if (judge := judges[key.fileobj]).listen()]  # type: ignore[index]


class _Server:
    """The process that programs are forked from. Raises OperationError if it cannot confine them."""

    def __init__(self, timeout_s: float, memory_limit_mb: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._control, theirs = socket.socketpair()
        settings = json.dumps([[str(entry) for entry in sys.path], timeout_s, memory_limit_mb])
        # One order of sets for all: what a program returns is then the same in every run.
        environment = {**permitted_environment(os.environ), "PYTHONHASHSEED": "0"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-S", "-c", _BOOT, settings],
                stdin=theirs.fileno(),
                stdout=self._errors,
                stderr=self._errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the caller
            )
        try:
            problem = self._first_word()
        except BaseException:
            self.stop()
            raise
        if problem:
            self.stop()
            raise OperationError(f"programs that a model wrote are not run here: {problem}")

    def _first_word(self) -> str:
        self._control.settimeout(STARTUP_LIMIT_S)
        with contextlib.suppress(OSError), self._control.makefile("rb") as replies:
            if line := replies.readline():
                return json.loads(line)["problem"]
        self._errors.seek(0)
        trace = self._errors.read()[-2000:].decode(errors="replace").strip()
        raise OperationError(f"the process that runs programs did not start: {trace}")

    def alive(self) -> bool:
        return self._process.poll() is None

    def new_judge(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise OperationError(f"the process that runs programs was ended from outside ({error})") from error
        return ours

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._control.close()
        self._errors.close()
