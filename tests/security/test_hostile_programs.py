"""Programs made to pass tests that they do not solve, to outlast them, or to do anything else than compute."""

import json
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostile_helpers import canary, each, within

from trb.errors import InputError, OperationError
from trb.safety.confinement import permitted_environment
from trb.tasks import programs
from trb.tasks.grading import Verifier

WANTED = 48151623


@pytest.fixture(scope="module")
def runner() -> Iterator[Verifier]:
    """One for all attempts, as in a run: what one of them does must not cost the next."""
    with Verifier(timeout_s=1.5) as verifier:
        yield verifier


def row(*tests: str, **more: Any) -> dict[str, Any]:
    return {"answer": "", "verifier": "python", "metadata": json.dumps({"tests": tests, **more})}


EXPECTING = row(f"assert f(7) == {WANTED}", f"assert not f(8) != {WANTED + 1}", f"assert f(9) in [{WANTED + 2}]")
HONEST = f"def f(x): return x + {WANTED - 7}"


def left_of(verifier: Verifier) -> list[psutil.Process]:
    """Processes of programs that are still there, after those that were told to end had a second for it."""
    server = psutil.Process(verifier._programs._server._process.pid)  # type: ignore[union-attr]
    _, alive = psutil.wait_procs(server.children(recursive=True), timeout=5)
    return alive


def attempt(verifier: Verifier, program: str, problem: dict[str, Any] = EXPECTING) -> None:
    """Fails if it passes, hangs, leaves a process, or costs an honest program before or after it its point."""
    with within(30):
        scores = verifier.score([HONEST, textwrap.dedent(program), HONEST], [EXPECTING, problem, EXPECTING])
        assert scores == [1.0, 0.0, 1.0]
        assert left_of(verifier) == []


# An object that is equal to anything, however it is asked.
EQUAL = """
class Equal({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 1
    def __bool__(self): return True
    def __lt__(self, other): return True
    def __contains__(self, other): return True
def f(x): return {value}
"""
SEARCH = """
import gc, os, sys
def f(x):
    seen, frame = [], sys._getframe()
    while frame:
        seen += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
        frame = frame.f_back
    for found in [*seen, *gc.get_objects(), *sys.modules.values(), dict(os.environ), sys.argv]:
        if "assert f(" in repr(found)[:10**6]:
            text = repr(found)
            return int(text[text.index("assert f(7) == ") + 15 :].split()[0].strip("'\\",)]")) - 7 + x
"""

FORGING = {
    "exit before the tests": "import os; os._exit(0)",
    "exit in a test": "import os\ndef f(x): os._exit(0)",
    "system exit": "import sys; sys.exit(0)",
    "system exit in a test": "def f(x): raise SystemExit(0)",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "generator exit": "def f(x): raise GeneratorExit",
    "end of an iteration": "def f(x): raise StopIteration",
    "nothing": "",
    "no python": "The answer is 5.",
    "equal to all": EQUAL.format(base="object", value="Equal()"),
    "number equal to all": EQUAL.format(base="int", value="Equal(1)"),
    "text equal to all": EQUAL.format(base="str", value="Equal('x')"),
    "list equal to all": EQUAL.format(base="list", value="Equal([1])"),
    "claims to be a number": EQUAL.format(base="object", value="Equal()") + "Equal.__class__ = int",
    "equal inside a list": EQUAL.format(base="object", value="[Equal()]"),
    "class equal to all": """
        class Kind(type):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
        class f(metaclass=Kind):
            def __new__(cls, x): return cls""",
    "other builtins": """
        import builtins
        for name in ("all", "any", "isinstance", "len", "abs", "repr", "sorted", "exec", "compile", "getattr"):
            setattr(builtins, name, lambda *a, **k: True)
        builtins.AssertionError = builtins.Exception = ZeroDivisionError
        def f(x): return 1""",
    "other json": "import json; json.dumps = json.loads = lambda *a: '{\"passed\": true}'\ndef f(x): return 1",
    "other protocol": """
        import sys
        host = sys.modules["trb.tasks.program_host"]
        host.pack = lambda *a: True
        host._Tests.pass_with = lambda *a: True
        host.Remote.__eq__ = lambda *a: True
        def f(x): return 1""",
    "message of success": """
        import json, os
        said = json.dumps({"passed": True, "lost": False, "unusable": ""}).encode()
        for place in range(64):
            try: os.write(place, len(said).to_bytes(4, "big") + said)
            except OSError: pass
        def f(x): return 1""",
    "messages of values": """
        import json, os
        said = json.dumps(["value", True]).encode()
        for _ in range(100): os.write(3, len(said).to_bytes(4, "big") + said)
        def f(x): return 1""",
    "message without end": "import os; os.write(3, b'\\xff' * 2**16)",
    "message of nonsense": "import os; os.write(3, b'\\0\\0\\0\\5[1,2,' * 9)\ndef f(x): 0",
    "prints success": "print('1 passed'); print({'passed': True})\ndef f(x): print('OK'); return None",
    "frames and objects": SEARCH,
    "closes everything": "import os; os.closerange(0, 1024)\ndef f(x): return 1",
    "error of its own": "class E(AssertionError):\n    def __str__(s): raise s\ndef f(x): raise E",
    "redefined names": "assertion = check = lambda *a: True\ndef f(x): return 1\ndef int(x): return 1",
    "source of zeros": "\0" * 100,
    "source of brackets": "(" * 50_000 + ")" * 50_000,
    "source of minuses": "f = lambda x: " + "-" * 90_000 + "1",
    "half a surrogate": "def f(x): return '\ud800'",
    "cyclic list": "def f(x):\n    a = []; a.append(a); return a",
    "deep list": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "not a number": "def f(x): return float('nan')",
}


@each("program", **FORGING)
def test_a_program_that_forges_its_success(folder: Path, runner: Verifier, program: str) -> None:
    attempt(runner, program)


# What is wrong, and would be right if it lost something on its way to the test.
LOSING = {
    "halves of a character": ("'\U0001f600'", "'\\ud83d\\ude00'"),
    "order": ("OrderedDict(a=1, b=2)", "OrderedDict(b=2, a=1)"),
    "order inside": ("[OrderedDict(a=1, b=2)]", "[OrderedDict(b=2, a=1)]"),
}


@each("values", **LOSING)
def test_a_program_that_returns_nearly_the_same(folder: Path, runner: Verifier, values: tuple[str, str]) -> None:
    right, wrong = (f"from collections import OrderedDict\ndef f(x): return {value}" for value in values)
    problem = row(f"from collections import OrderedDict\nassert f(1) == {values[0]}")
    assert runner.score([right], [problem]) == [1.0]
    attempt(runner, wrong, problem)


# In HumanEval's form, with a helper that the problem gives.
CHECK = "def check(candidate):\n    assert abs(half(candidate(3)) - 3) < 1e-6\n    assert candidate(4) == 8\ncheck(f)"
HELPED = row(
    CHECK,
    prefix="import math\ndef half(x):\n    return x / 2\n\ndef f(x):\n    'Twice x.'\n",
    entry_points=["f"],
)
BLOCKS = {
    "check": "def check(candidate): pass\ndef f(x): return 1",
    "helper": "def half(x): return 3\ndef f(x): return 8",
    "builtin": "def abs(x): return 0\ndef f(x): return 8",
    "exit": "raise SystemExit",
}


@each("block", **BLOCKS)
def test_a_program_that_redefines_what_checks_it(folder: Path, runner: Verifier, block: str) -> None:
    assert runner.score(["    return 2 * x"], [HELPED]) == [1.0]
    attempt(runner, f"```python\n{block}\n```", HELPED)


# An iteration that a program's error ended would leave `all` nothing to complain about.
SWALLOWING = row("assert all(map(f, [1, 2]))", "try:\n    assert f(3)\nexcept Exception:\n    pass")


@each("act", exit="import os; os._exit(0)", stop="raise StopIteration", lost="import os; os.write(3, b'x' * 64)")
def test_tests_that_swallow_errors(folder: Path, runner: Verifier, act: str) -> None:
    assert runner.score(["def f(x): return True"], [SWALLOWING]) == [1.0]
    attempt(runner, f"def f(x):\n    {act}", SWALLOWING)


def test_a_module_in_the_place_of_one_that_tests_use(folder: Path, runner: Verifier) -> None:
    problem = row("assert math.isclose(f(1), 3)")  # and does not import
    assert runner.score(["def f(x): return 3.0"], [problem]) == [1.0]
    attempt(runner, "class math:\n    isclose = lambda *a: True\ndef f(x): return 1", problem)


# ---- what they do instead ----

# Each would return what is right if it got through: without the filter of system calls, all of them pass.
ACTING = {
    "writes": "open('CANARY', 'w').close()",
    "writes by number": "os.open('CANARY', os.O_CREAT | os.O_WRONLY)",
    "reads": "open('/etc/passwd').read()",
    "reads a folder": "os.listdir('/')",
    "looks at its tests": "open('/proc/self/mem', 'rb')",
    "asks where it is": "os.stat('/')",
    "removes": "os.remove('KEPT')",
    "renames": "os.rename('KEPT', 'CANARY')",
    "makes a folder": "os.mkdir('CANARY')",
    "links": "os.symlink('/', 'CANARY')",
    "changes folder": "os.chdir('/')",
    "forks": "os.fork() or os._exit(0)",
    "forks by itself": "import ctypes\npid = ctypes.CDLL(None).fork()\npid or os._exit(0)\nassert pid > 0",
    "runs a command": "import subprocess; subprocess.run(['true'])",
    "spawns": "os.posix_spawn('/bin/true', ['true'], {})",
    "starts a thread": "import threading; threading.Thread(target=print).start()",
    "opens a socket": "import socket; socket.socket()",
    "makes a pair": "import socket; socket.socketpair()",
    "makes a pipe": "os.pipe()",
    "asks for a name": "import socket; socket.gethostbyname('localhost')",
    "signals its parent": "os.kill(os.getppid(), 0)",
    "signals all": "os.kill(-1, 0)",
    "ignores its end": "import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)",
    "blocks its end": "import signal; signal.pthread_sigmask(0, [14])\nassert 14 in signal.pthread_sigmask(0, [])",
    "puts off its end": "import signal; assert signal.setitimer(0, 99)",
    "wants more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "outlives its parent": "import ctypes; assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "shares memory": "os.memfd_create('x')",
    "imports what is not there": "import wave",
    # As root, other advice takes pages from the machine for good (MADV_HWPOISON).
    "advises on memory": "import ctypes; assert ctypes.CDLL(None).madvise(None, 0, 0) == 0",
    "closes what it has": "os.close(0)",
}


@each("act", **ACTING)
def test_a_program_that_acts(folder: Path, runner: Verifier, act: str) -> None:
    (kept := folder / "kept").touch()
    act = textwrap.indent(act.replace("CANARY", str(canary(folder))).replace("KEPT", str(kept)), "        ")
    attempt(runner, f"import os\ndef f(x):\n    if x == 7:\n{act}\n    return x + {WANTED - 7}")
    assert kept.exists()


# ---- what they take ----

TAKING = {
    "time": "while True: pass",
    "time in a test": "def f(x):\n    while True: pass",
    "time, whatever is raised": """
        def f(x):
            while True:
                try:
                    while True: 1 / 0
                except BaseException: pass""",
    "time in one call": "def f(x): return 9 ** 9 ** 9",
    "time in a pattern": "import re\ndef f(x): return re.match('(a+)+b', 'a' * 99)",
    "sleep": "import time; time.sleep(10**6)",
    "iteration without end": "import itertools\nf = lambda x: itertools.count()",
    "output without end": "while True: print('x' * 10**4)",
    "errors without end": "import sys\nwhile True: sys.stderr.write('x' * 10**4)",
    "input": "f = lambda x: int(input())",
    "memory at once": "x = bytearray(8 * 2**30)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(2**20))",
    "recursion": "f = lambda x: f(x)",
    "stack": "import sys; sys.setrecursionlimit(10**9)\nf = lambda x: f(x)",
    "a crash": "import ctypes; ctypes.string_at(0)",
    "abortion": "import os; os.abort()",
    "a long answer": "f = lambda x: 'x' * 10**8",
    "a large number": "f = lambda x: 1 << 10**8",
    "many answers": "f = lambda x: range(10**18)",
    "answers to the end": "import atexit\natexit.register(lambda: 1 / 0)\nf = lambda x: 1",
    "a long program": "x = 1\n" * 10**6,
    "a long text": "x = '" + "\U0001f600" * 99_000 + "'",
}


# One for each kind of limit; `make hostile` makes them all.
QUICK = ("sleep", "output without end", "memory at once", "a crash", "a long answer", "stack")


@each("program", slow_ones=TAKING.keys() - set(QUICK), **TAKING)
def test_a_program_that_takes(folder: Path, runner: Verifier, program: str) -> None:
    attempt(runner, program)


def test_a_program_longer_than_its_tests_leave_room_for(folder: Path, runner: Verifier) -> None:
    """It fails; the run does not."""
    problem = row("#" * 3_900_000, "assert f(1) == 1")
    assert runner.score(["f = abs"], [problem]) == [1.0]
    attempt(runner, "f = abs\nx = '" + "\1" * 99_000 + "'", problem)


def test_a_program_goes_before_the_run_where_memory_ends(folder: Path) -> None:
    server = programs._Server(20.0, programs.MEMORY_MB)
    with server.new_judge() as judge:
        assert judge.recv(100).endswith(b'"ready"')
        confined = psutil.Process(server._process.pid).children(recursive=True)
        assert [Path(f"/proc/{it.pid}/oom_score_adj").read_text() for it in confined] == ["1000\n"] * 2
    server.stop()


# ---- what the user's environment says ----


def test_assertions_count_whatever_the_environment_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    problem = row("x = f(1)\nassert x == 2")
    with Verifier(timeout_s=20.0) as verifier:
        assert verifier.score(["f = lambda x: 2", "f = lambda x: 1"], [problem] * 2) == [1.0, 0.0]


def test_no_secret_has_the_name_of_a_setting(folder: Path) -> None:
    """Only begins with it."""
    names = [
        "LANGCHAIN_API_KEY",
        "TEMPORAL_API_KEY",
        "HOMEBREW_GITHUB_API_TOKEN",
        "LD_SDK_KEY",
        "PYTHONANYWHERE_API_TOKEN",
    ]
    settings = {
        "PATH": "a",
        "HOME": "b",
        "LANG": "c",
        "LC_ALL": "d",
        "LD_LIBRARY_PATH": "e",
        "PYTHONPATH": "f",
        "TMPDIR": "g",
    }
    kept = permitted_environment({**dict.fromkeys(names, "1"), **settings})
    assert settings.items() <= kept.items() and not kept.keys() & names


# ---- what ends or refuses the processes that run them ----


def test_a_server_that_is_ended_costs_no_program_its_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the machine's memory ends: nobody knows what its programs would have scored."""
    heard = programs._heard
    runner = programs.Programs(20.0)

    def ended(judges: Any) -> Any:
        (judge,) = judges
        judge.recv(1, socket.MSG_PEEK)  # it is ready: this is no program that could not be started
        monkeypatch.setattr(programs, "_heard", heard)
        runner._server._process.kill()  # type: ignore[union-attr]
        return heard(judges)

    monkeypatch.setattr(programs, "_heard", ended)
    job = {"readings": ["while True: pass"], "prefix": "", "setup": "", "entry_points": ["f"], "reference": ""}
    with pytest.raises(OperationError, match="ended from outside"):
        runner.run([{**job, "tests": ["f()"]}])


def test_a_confinement_that_is_refused_at_once_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = "from trb.tasks.program_host import serve"
    refuse = "from trb.tasks import program_host as host; from trb.errors import OperationError as E; \
host.die_with_parent = lambda *_: (_ for _ in ()).throw(E('not here'))"
    monkeypatch.setattr(programs, "_BOOT", programs._BOOT.replace(begin, f"{refuse}; {begin}"))
    with Verifier() as verifier, pytest.raises(OperationError, match="not here"):
        verifier.score([HONEST], [EXPECTING])


# ---- tests that others wrote ----


@each(
    "metadata",
    nesting="[" * 100_000,
    list="[]",
    numbers='{"tests": [1]}',
    unknown='{"tests": ["assert f(1)"], "exec": "1"}',
    syntax='{"tests": ["assert f("]}',
    calls_nothing='{"tests": ["assert 1 == 1"]}',
    brackets=json.dumps({"tests": ["assert f(1) == " + "(" * 10_000]}),
)
def test_tests_that_are_none(folder: Path, runner: Verifier, metadata: str) -> None:
    with pytest.raises(InputError, match="'python' has unusable"):
        runner.score(["def f(x): return x"], [{"answer": "", "verifier": "python", "metadata": metadata}])
    assert runner.score([HONEST], [EXPECTING]) == [1.0]


# Native code that returns from a signal that never came, to a mask that blocks them all, and sleeps. For x86-64: on
# other machines it is a crash.
BLOCKING = """
import ctypes, struct
libc = ctypes.CDLL(None)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_long] * 5]
page = libc.mmap(None, 8192, 7, 0x22, -1, 0)
code = bytes.fromhex("4889fc b80f000000 0f05 b823000000 0f05 ebf7")
frame, rip, eflags, segments, mask = bytearray(304), page + 10, 0x202, 0x33 | 0x2B << 48, 2**64 - 1
for place, word in {0: 6, 104: page + 8000, 168: rip, 176: eflags, 184: segments, 296: mask}.items():
    struct.pack_into("Q", frame, place, word)
for place, part in (0, code), (4096, bytes(frame)), (8000, struct.pack("QQ", 10**6, 0)):
    ctypes.memmove(page + place, part, len(part))
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(page)(page + 4096)
"""


@each(
    "act",
    writes=ACTING["writes"],
    forks=ACTING["forks"],
    connects=ACTING["opens a socket"],
    hangs="while True: pass",
    blocks_its_end=BLOCKING,
    speaks_nonsense="os.write(3, b'\\0\\0\\0\\5[[[[[')",
    speaks_nested="os.write(3, b'\\0\\1\\0\\0' + b'[' * 2**16)",
    speaks_without_end="while True: os.write(3, b'\\xff' * 2**16)",
)
def test_tests_that_act(folder: Path, runner: Verifier, act: str) -> None:
    """They say what is right, and can do no more than that."""
    test = act.replace("CANARY", str(canary(folder)))
    attempt(runner, "def f(x): return 1", row("import os", test, "assert f(1) == 1"))


def test_tests_that_stay_after_their_verdict(folder: Path, runner: Verifier) -> None:
    """A set of such rows would have as many processes at once as it has rows."""
    said = json.dumps({"passed": True, "lost": False, "unusable": ""}).encode()
    says = f"import os\nos.write(3, {len(said).to_bytes(4, 'big') + said})"
    runner.score(["f = abs"], [row(says, "try: os.close(3)\nexcept OSError: pass", "f(1)\nwhile True: pass")])
    server = psutil.Process(runner._programs._server._process.pid)  # type: ignore[union-attr]
    assert psutil.wait_procs(server.children(recursive=True), timeout=0.3)[1] == []
