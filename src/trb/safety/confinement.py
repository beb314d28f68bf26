"""What the process that checks answers may do: evaluate expressions, and nothing to the machine it runs on.

Graders evaluate text that a model wrote. sympy's `parse_expr` passes it to `eval` with every builtin in reach, and
several scorers of reasoning-gym call `eval` on it directly: without this module an answer such as
`__import__('os').system(...)` is executed. There are three layers:

1. `tame_sympy` and `tame_reasoning_gym`: those calls evaluate arithmetic, literals and sympy's own classes only.
2. `forbid_side_effects`: an audit hook refuses processes, sockets, native calls, and writing, moving or removing files.
3. `limit_resources`: the kernel bounds memory, and refuses files of any size and further processes.

Left out on purpose: time, which the caller limits from outside, and reading files. Code that got past the first layer
could still read them and forge the score of its own answer; it could not tell anybody what it read. Containers and
system-call filters are stronger, and their use is up to whoever runs this package.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

from trb.errors import InputError

__all__ = [
    "STARTUP_LIMIT_S",
    "arithmetic",
    "boot",
    "forbid_side_effects",
    "lifted",
    "limit_resources",
    "permitted_environment",
    "tame_reasoning_gym",
    "tame_sympy",
]

# ---- layer 1: what is evaluated ----


def arithmetic(text: str, *_: Any) -> Any:
    """The value of a Python expression without a single name: literals, containers and operators.

    Raises ValueError for anything else, and SyntaxError for what is no expression.
    """
    code = compile(text, "<answer>", "eval", dont_inherit=True)
    _check_names(code, lambda name: False)
    return eval(code, {"__builtins__": {}})


def tame_sympy() -> None:
    """Let `parse_expr` call sympy's expression classes and a few functions, and nothing else."""
    import sympy
    from sympy.parsing import sympy_parser

    functions = {id(function) for function in (sympy.sqrt, sympy.cbrt, sympy.root, sympy.real_root, abs, pow)}

    def permitted(value: Any) -> bool:
        is_class = isinstance(value, type) and issubclass(value, sympy.Basic)
        return is_class or isinstance(value, sympy.Basic) or id(value) in functions

    def eval_expr(code: str | CodeType, local_dict: dict[str, Any], global_dict: dict[str, Any]) -> Any:
        compiled = code if isinstance(code, CodeType) else compile(code, "<answer>", "eval", dont_inherit=True)
        _check_names(compiled, lambda name: permitted(local_dict.get(name, global_dict.get(name))))
        return eval(compiled, {**global_dict, "__builtins__": {}}, local_dict)

    sympy_parser.eval_expr = eval_expr


def tame_reasoning_gym() -> None:
    """Let the scorers of reasoning-gym, imported before, evaluate what `arithmetic` does, and execute nothing."""
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] == "reasoning_gym":
            vars(module).update(eval=arithmetic, exec=_refuse_to_execute)


def _refuse_to_execute(*_: Any) -> None:
    raise InputError("answers are not executed")


def _check_names(code: CodeType, permitted: Callable[[str], bool]) -> None:
    """Refuse code that uses a name (attributes are names too) that is not permitted, or that holds further code.

    Names are all that an expression can act through: without one it cannot call, import or reach into anything.
    """
    refused = [name for name in code.co_names if not permitted(name)]
    if refused:
        raise InputError(f"the expression uses {refused[0]!r}, which answers may not")
    if any(isinstance(constant, CodeType) for constant in code.co_consts):
        raise InputError("the expression defines a function, which answers may not")


# ---- layer 2: what the interpreter does ----

# Prefixes of audit events: https://docs.python.org/3/library/audit_events.html
_FORBIDDEN = (
    "code.__new__",
    "ctypes.",
    "ftplib.",
    "gc.get_",
    "http.",
    "mmap.",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.lockf",
    "os.mkdir",
    "os.posix_spawn",
    "os.removexattr",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.setxattr",
    "os.spawn",
    "os.startfile",
    "os.symlink",
    "os.system",
    "os.truncate",
    "os.utime",
    "pty.",
    "resource.setrlimit",
    "shutil.",
    "signal.pthread_kill",
    "smtplib.",
    "socket.",
    "sqlite3.",
    "subprocess.",
    "syslog.",
    "urllib.",
    "webbrowser.",
    "winreg.Create",
    "winreg.Delete",
    "winreg.Set",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_lifted = [0]


def forbid_side_effects() -> None:
    """Refuse, from now on and for good, what changes anything outside this process. Raises PermissionError then."""
    sys.dont_write_bytecode = True  # imports would only be refused their caches, one by one
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _lifted[0]:
        return
    if event == "open":
        _, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITING):
            raise PermissionError("the process that checks answers writes no files")
    elif event.startswith(_FORBIDDEN):
        raise PermissionError(f"the process that checks answers may not use {event}")


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Permit everything for a moment: for imports of trusted packages, never around text of others."""
    _lifted[0] += 1
    try:
        yield
    finally:
        _lifted[0] -= 1


# ---- layer 3: what the kernel grants ----


def limit_resources(memory_limit_mb: int, *, seconds: int | None = None) -> bool:
    """Bound the address space of this process and refuse it files and processes; whether memory is bounded now.

    `seconds` of processor time end the process, where given.

    Systems without these limits (Windows has none, macOS ignores the one on memory) leave what they lack unlimited.
    """
    try:
        import resource
    except ImportError:
        return False
    limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_AS": memory_limit_mb * 2**20}
    if seconds is not None:
        limits["RLIMIT_CPU"] = seconds
    done = set()
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system knows, or lowers, each
            resource.setrlimit(getattr(resource, name), (value, value))
            done.add(name)
    return "RLIMIT_AS" in done


# What Python and the libraries below need to start. Anything else may be a secret (HF_TOKEN, ...), and so may what only
# begins like one of these (LANGCHAIN_API_KEY, TEMPORAL_API_KEY, ...). Of Python's own those that say where modules are,
# and how sets are ordered: others change what is read (PYTHONIOENCODING), checked (PYTHONOPTIMIZE) or left running.
_ENVIRONMENT = re.compile(
    "PATH|PATHEXT|HOME|LANG|LANGUAGE|LC_[A-Z]+|TEMP|TMP|TMPDIR|SYSTEMROOT|TZ|TZDIR|VIRTUAL_ENV"
    "|PYTHON(PATH|HOME|PLATLIBDIR|USERBASE|NOUSERSITE|SAFEPATH|HASHSEED|DONTWRITEBYTECODE|PYCACHEPREFIX)"
    "|(DY)?LD_([A-Z_]+_PATH|PRELOAD|INSERT_LIBRARIES)"
)


STARTUP_LIMIT_S = 120.0  # until a confined process says that it is ready: importing sympy on a busy machine


def boot(module: str, function: str) -> str:
    """What `python -c` runs in a process of its own: a function of this package, found on the caller's path.

    The process gets one argument, a JSON list of that path and of what the function is called with.
    """
    start = "import json, sys; path, *given = json.loads(sys.argv[1]); sys.path[:] = path"
    return f"{start}; from {module} import {function}; {function}(*given)"


def permitted_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a confined process gets to see."""
    kept = {name: value for name, value in environment.items() if _ENVIRONMENT.fullmatch(name.upper())}
    # It speaks UTF-8 whatever the locale, and takes no cores from the run.
    return kept | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
