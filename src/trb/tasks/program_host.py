"""Where a program that a model wrote is run, and where it is tested: two processes, and the server that starts them.

The *player* runs the program. The *judge* runs the tests, in which the program's functions are stand-ins (`Remote`)
that send arguments to the player and get plain values back. No test, no expected value and no verdict is ever in the
player's memory: it was started before the judge was told anything, from a server that is told nothing at all. So a
program can only return values; it has no check to read, to redefine or to forge. Both are confined: see `_confine`.

The server imports what programs import, once, and forks a judge (which forks its player) for every socket that it is
handed. They end by themselves: at the time limit, which the kernel keeps, and with the process that started them.
"""

import ast
import builtins
import contextlib
import gc
import importlib
import json
import math
import os
import random
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any, NoReturn

from trb.errors import OperationError
from trb.safety.confinement import limit_resources
from trb.safety.system_calls import adopt_orphans, die_with_parent, forbid_system_calls
from trb.tasks.values import Channel, LostError, in_full, pack, unpack

__all__ = ["EXTRA_S", "serve"]

EXTRA_S = 1.0  # the judge outlives its player by this, to say that it was lost

# Nothing can be opened later: programs import these and what these import, and nothing else.
_IMPORTED = """
abc array ast base64 binascii bisect calendar cmath collections collections.abc colorsys contextlib copy csv dataclasses
datetime decimal difflib enum fractions functools gc graphlib hashlib heapq hmac html inspect io ipaddress itertools
json keyword logging math numbers operator os pathlib pprint queue random re secrets shlex statistics string struct sys
textwrap threading time timeit token tokenize traceback types typing unicodedata unittest urllib.parse uuid warnings
weakref zlib _strptime
encodings.ascii encodings.idna encodings.latin_1 encodings.utf_16 encodings.utf_32 encodings.unicode_escape
"""
_MODULES = tuple(_IMPORTED.split())


def serve(timeout_s: float, memory_limit_mb: int) -> None:
    """Start a judge for every socket that comes through standard input, until that closes. Entry point of the server.

    Says first whether a process can be confined here, by trying.
    """
    control = socket.socket(fileno=os.dup(0))
    warnings.simplefilter("ignore")
    for name in _MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the children
    try:
        adopt_orphans()
        problem = _trial(timeout_s, memory_limit_mb)
    except OperationError as error:
        problem = str(error)
    control.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    gc.collect()
    gc.freeze()  # so that collections in the children do not copy what they share
    server = os.getpid()
    while not problem:
        _, handed, _, _ = socket.recv_fds(control, 1, 1)
        if not handed:
            return
        if os.fork() == 0:
            _as_judge(handed[0], server, timeout_s, memory_limit_mb)
        os.close(handed[0])


# ---- confinement ----


def _confine(kept: list[int], parent: int, seconds: float, memory_limit_mb: int) -> list[Channel]:
    """Leave this process some sockets, some time and memory, and no way to anything else.

    - The default action of SIGALRM ends it at the time limit, and without system calls for signals and timers it can
      neither ignore nor put off that. It ends with its parent, too.
    - Limits of the kernel on memory and processor time; what it prints goes nowhere.
    - `forbid_system_calls` for the rest.
    """
    from fcntl import F_DUPFD, fcntl

    die_with_parent(parent, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where the machine's memory ends, this ends first, and not the run
    high = [fcntl(descriptor, F_DUPFD, 64) for descriptor in (os.open(os.devnull, os.O_RDWR), *kept)]
    for low, descriptor in enumerate([high[0], high[0], *high]):  # 0, 1, 2: nowhere
        os.dup2(descriptor, low)
    os.closerange(3 + len(kept), 256)  # the server was started with three, and never has many more
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if not limit_resources(memory_limit_mb, seconds=math.ceil(seconds) + 1):
        raise OperationError("this system does not limit the memory of a process")
    forbid_system_calls()
    random.seed(0)  # a score is a function of the program and its tests
    return [Channel(3 + place) for place in range(len(kept))]


def _trial(timeout_s: float, memory_limit_mb: int) -> str:
    """What a confined process can do here that it must not, or why there is none; "" if all is as it should be."""
    ours, theirs = socket.socketpair()
    server = os.getpid()
    if os.fork() == 0:
        _as_trial(theirs.fileno(), server, timeout_s, memory_limit_mb)
    theirs.close()
    with ours:
        try:
            return Channel(ours.fileno()).receive()
        except LostError as error:
            return f"a confined process does not live ({error})"


def _as_trial(descriptor: int, server: int, timeout_s: float, memory_limit_mb: int) -> NoReturn:
    try:
        (channel,) = _confine([descriptor], server, timeout_s, memory_limit_mb)
        done = [name for name, attempt in _ATTEMPTS.items() if not _is_refused(attempt)]
        channel.send("a confined process can " + ", ".join(done) if done else "")
    except OperationError as error:
        for place in (descriptor, 3):  # before or after it was moved; before, 3 is the server's
            with contextlib.suppress(LostError):
                Channel(place).send(str(error))
                break
    finally:
        os._exit(0)


_ATTEMPTS: dict[str, Callable[[], Any]] = {
    "start a process": lambda: os.fork(),
    "open a file": lambda: os.open(os.devnull, os.O_RDONLY),
    "open a socket": socket.socket,
    "list a folder": lambda: os.listdir("/"),
    "send a signal": lambda: os.kill(os.getppid(), 0),
    "ignore a signal": lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN),
    "put off its end": lambda: signal.setitimer(signal.ITIMER_REAL, 0),
    "hide that it is there": lambda: os.close(0),
}


def _is_refused(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False


# ---- the program ----


def _as_player(descriptor: int, judge: int, timeout_s: float, memory_limit_mb: int) -> NoReturn:
    """Run the program that the judge sends, then do with it what the judge asks for."""
    try:
        (channel,) = _confine([descriptor], judge, timeout_s, memory_limit_mb)
        channel.send("ready")
        player = _Player()
        while True:
            channel.send(player.answer(channel.receive()))
    finally:
        os._exit(1)


class _Player:
    def __init__(self) -> None:
        self._module = ModuleType("program")
        sys.modules["program"] = self._module  # dataclasses look there
        self._objects: list[Any] = []

    def answer(self, request: list[Any]) -> list[Any]:
        """`["value", ...]` or, whatever is raised, `["raised", class, text]`."""
        try:
            name, *arguments = request
            return ["value", pack(getattr(self, name)(*arguments), self._refer)]
        except BaseException as error:
            try:
                text = str(error)[:1000]
            except BaseException:
                text = ""
            return ["raised", type(error).__name__, text]

    def run(self, readings: list[str]) -> None:
        """Execute the first of several texts that is Python at all; raises what the last of them raises."""
        for place, text in enumerate(readings, start=1):
            try:
                code = compile(text, "<program>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError):
                if place == len(readings):
                    raise
            else:
                exec(code, vars(self._module))
                return

    def named(self, name: str) -> Any:
        if name not in vars(self._module):
            raise NameError(f"name {name!r} is not defined")
        return _Kept(vars(self._module)[name])

    def call(self, target: int, arguments: Any, options: Any) -> Any:
        given, named = unpack(arguments, self._meant), unpack(options, self._meant)
        return self._meant(target)(*given, **named)

    def get(self, target: int, name: str) -> Any:
        return getattr(self._meant(target), name)

    def put(self, target: int, name: str, value: Any) -> None:
        setattr(self._meant(target), name, unpack(value, self._meant))

    def item(self, target: int, key: Any) -> Any:
        return self._meant(target)[unpack(key, self._meant)]

    def size(self, target: int) -> int:
        return len(self._meant(target))

    def iterator(self, target: int) -> Any:
        return _Kept(iter(self._meant(target)))

    def advance(self, target: int) -> list[Any]:
        """The next item in a list, or an empty list at the end."""
        end = object()
        found = next(self._meant(target), end)
        return [] if found is end else [found]

    def _meant(self, number: int) -> Any:
        return self._objects[number]

    def _refer(self, value: Any) -> int:
        self._objects.append(value.it if isinstance(value, _Kept) else value)
        return len(self._objects) - 1


class _Kept:
    """Something that stays here even if it is plain data."""

    def __init__(self, it: Any) -> None:
        self.it = it


# ---- the tests ----


def _as_judge(descriptor: int, server: int, timeout_s: float, memory_limit_mb: int) -> NoReturn:
    """Fork a player, read a job, and say whether the program passes its tests and whether it was there to the end."""
    try:
        ours, theirs = socket.socketpair()
        judge = os.getpid()
        if os.fork() == 0:
            _as_player(theirs.fileno(), judge, timeout_s, memory_limit_mb)
        caller, player = _confine([descriptor, ours.fileno()], server, timeout_s + EXTRA_S, memory_limit_mb)
        player.receive()
        caller.send("ready")
        job, program = caller.receive(), _Program(player)
        passed, unusable = False, ""
        try:
            tests = _Tests(job, program)
        except Exception as error:  # of a text that somebody else wrote, from the compiler
            unusable = f"{type(error).__name__}: {error}, in {job['tests'][0][:100]!r}"
        else:
            passed = tests.pass_with(job["readings"])
        caller.send({"passed": passed, "lost": program.lost, "unusable": unusable})
    finally:
        os._exit(0)


class _Tests:
    """The tests of a row, compiled, with stand-ins for what is the program's. Raises for what is no test."""

    def __init__(self, job: Mapping[str, Any], program: "_Program") -> None:
        self._program = program
        self._prefix, *self._codes = (
            compile(text, "<tests>", "exec", dont_inherit=True) for text in (job["prefix"], job["setup"], *job["tests"])
        )
        used = {name for code in (self._prefix, *self._codes) for name in _names(code)}
        self._namespace: dict[str, Any] = {"__name__": "tests"}
        theirs = set(job["entry_points"])
        if not theirs:
            imports, theirs = _defined(job["reference"])
            with contextlib.suppress(Exception):  # of a package that is not there
                exec(imports, self._namespace)
        if not theirs:
            theirs = used - vars(builtins).keys() - sys.modules.keys()
        self._theirs = {name: Remote(program, name) for name in theirs & used}
        self._namespace |= {name: sys.modules[name] for name in used & set(_MODULES) - theirs}
        if not self._theirs:
            raise ValueError("they call no function of the program")

    def pass_with(self, readings: list[str]) -> bool:
        """Whether a program is there to the end, is called, and no test raises anything."""
        try:
            self._program.ask("run", readings)
            exec(self._prefix, self._namespace)  # helpers that the problem gives are the judge's own
            self._namespace |= self._theirs
            for code in self._codes:
                exec(code, self._namespace)
        except BaseException:  # what a test raises, and whatever the program made it raise
            return False
        return self._program.called and not self._program.lost


def _defined(reference: str) -> tuple[CodeType, set[str]]:
    """The imports of a solution, which tests may use, and the other names that it defines, which are the program's."""
    body: list[ast.stmt] = []
    with contextlib.suppress(SyntaxError, ValueError):  # of another Python
        body = ast.parse(reference).body
    imports: list[ast.stmt] = [part for part in body if isinstance(part, ast.Import | ast.ImportFrom)]
    names = {part.name for part in body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for part in body:
        for target in part.targets if isinstance(part, ast.Assign) else ():
            names |= {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
    return compile(ast.Module(imports, []), "<tests>", "exec", dont_inherit=True), names


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class ProgramError(Exception):
    """The program raised something that is no error of Python's own."""


class _Program:
    """The player, as the judge sees it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers: dict[str, int] = {}
        self.lost = False
        self.called = False

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the player answers; raises what the program raised, as an error of Python's own or a ProgramError."""
        try:
            self._channel.send([name, *arguments])
            reply = self._channel.receive()
            self.called |= name == "call"
            match reply:
                case ["value", answer]:
                    return unpack(answer, lambda number: Remote(self, number))
                case ["raised", str(kind), str(text)]:
                    raise _raised(kind, text)
                case _:
                    raise LostError("no answer of ours")
        except LostError:
            self.lost = True
            raise

    def number(self, at: Any) -> int:
        """The player's number of what a stand-in stands for, which may have a name so far."""
        if isinstance(at, str):
            if at not in self._numbers:
                self._numbers[at] = self.ask("named", at)._at
            return self._numbers[at]
        return at


class Remote:
    """Something of the program's, in a test: a function, a class, or an object that is no plain data.

    It can be called, passed on, looked into and gone through. It cannot be compared, hashed or taken for a truth, as
    its own class would answer that.
    """

    __slots__ = ("_at", "_program")

    def __init__(self, program: _Program, at: int | str) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_at", at)

    def _ask(self, what: str, *arguments: Any) -> Any:
        return self._program.ask(what, self._program.number(self._at), *arguments)

    def _sent(self, value: Any) -> Any:
        return pack(value if isinstance(value, Remote) else in_full(value), self._number_of)

    def _number_of(self, value: Any) -> int:
        if not isinstance(value, Remote):
            raise TypeError(f"a {type(value).__name__} cannot be passed to a program")
        return self._program.number(value._at)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        given = ["list", *map(self._sent, arguments)]
        named = ["dict", *(part for name, value in options.items() for part in (name, self._sent(value)))]
        return self._ask("call", given, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("put", name, self._sent(value))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self._sent(key))

    def __len__(self) -> int:
        return self._ask("size")

    def __iter__(self) -> Iterator[Any]:
        items = self._ask("iterator")
        while found := items._ask("advance"):
            yield found[0]

    def __next__(self) -> Any:
        if found := self._ask("advance"):
            return found[0]
        raise StopIteration

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("the program returned an object of a class of its own; tests compare plain values")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse
    __hash__ = _refuse


def _raised(kind: str, text: str) -> Exception:
    """What a test sees of a program's error. Never StopIteration: `all(map(f, cases))` would end there, and be true."""
    error = getattr(builtins, kind, None)
    if isinstance(error, type) and issubclass(error, Exception) and not issubclass(error, StopIteration):
        with contextlib.suppress(TypeError):  # a few want more than a text
            return error(text)
    return ProgramError(f"{kind}: {text}")
