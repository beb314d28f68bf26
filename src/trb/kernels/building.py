"""The kernels in C: built with the system's compiler when first needed, kept, loaded, and given rows to work on.

Tensor operations stream `[rows, V]` through memory once for every elementary step; `blend.c` and `reverse_kl.c` work on
one row after another while it stays in cache. This module builds both into one library (a second or two, once for each
machine and version), loads it and spreads rows over `torch.get_num_threads()` threads. What they compute, and which
rows they leave to tensors, is said by `trb.blend.native` and `trb.losses.native`.

Without a compiler that builds a library which solves known rows in a process of its own (`trial.py`), or with the
environment variable TRB_NATIVE=0, `available()` is False. Libraries are kept in `$TRB_CACHE/native` (by default
`~/.cache/trb/native`) under the hash of their content, as long as nobody else can write there.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from trb.errors import OperationError
from trb.safety.files import cache_directory
from trb.safety.untrusted import printable

__all__ = ["available", "library", "scratch", "spread"]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("blend.c", "reverse_kl.c"))
_HEADER = _FOLDER / "rows.h"
_TRIAL = _FOLDER / "trial.py"
# Not -ffast-math: linking with it makes the whole process flush denormals, and it forgets infinities.
_FLAGS = (
    "-std=c11",
    "-O3",
    "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-freciprocal-math",
    "-ffp-contract=fast",
    "-fPIC",
)
_COMPILERS = ("cc", "gcc", "clang")
_BUILD_SECONDS = 120
# Pieces of work for each thread: more even out rows of different cost, fewer cost less to hand out.
_PIECES_PER_THREAD = 4
# Below about this many elements (a tenth of a millisecond), handing work to a thread costs more than the work.
_PIECE_ELEMENTS = 1 << 16


def available() -> bool:
    """Whether the kernels can run here; builds them on the first call, and says once why it cannot."""
    return _library() is not None


def library(otherwise: str) -> ctypes.CDLL:
    """The kernels.

    Raises:
        RuntimeError: there are none here, use `otherwise`.
    """
    found = _library()
    if found is None:
        raise OperationError(f"the compiled kernels are not available here; use {otherwise}")
    return found


# --- threads ------------------------------------------------------------

_local = threading.local()


def spread(work: Callable[[int, int], object], rows: int, vocabulary: int) -> None:
    """Call `work(start, end)` for all rows, a few at a time, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    pieces = min(rows, _PIECES_PER_THREAD * threads, rows * vocabulary // _PIECE_ELEMENTS)
    if threads == 1 or pieces <= 1:
        work(0, rows)
    else:
        bounds = [rows * piece // pieces for piece in range(pieces + 1)]
        list(_pool(threads).map(work, bounds[:-1], bounds[1:]))


def scratch(floats: int) -> Tensor:
    """Memory of this thread alone, kept between calls: fresh pages would cost as much as a sweep."""
    kept: Tensor | None = getattr(_local, "scratch", None)
    if kept is None or kept.numel() < floats:
        kept = _local.scratch = torch.empty(floats, dtype=torch.float32)
    return kept


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="trb-native")


# The threads of a pool do not survive a fork, and its queue would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


# --- building and loading ------------------------------------------------------------


class _BuildError(Exception):
    """The library cannot be built here; the message says why."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("TRB_NATIVE") == "0" or os.name != "posix":
        return None
    try:
        return _load()
    except Exception as error:  # whatever compilers, disks and systems do: torch does the same
        reason = printable(f"{error or type(error).__name__}", lines=False)
        logger.warning("computing with torch operations, as the kernels in C cannot be built: %s", reason)
        return None


def _load() -> ctypes.CDLL:
    compiler = _compiler()
    # The macros name the compiler's version and, under -march=native, the instructions this CPU has: a home directory
    # may be shared by machines that differ in both.
    macros = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    texts = [path.read_text(encoding="utf-8") for path in (_HEADER, *_SOURCES)]
    key = hashlib.sha256("\0".join([*texts, *compiler, *_FLAGS, macros]).encode(errors="surrogateescape")).hexdigest()
    try:
        directory = _own_directory()
        return _declared(_kept(directory, key[:24]) or _build(compiler, directory, key[:24]))
    except OSError as error:
        logger.info("not keeping the kernels for other processes: %s", error)
    with tempfile.TemporaryDirectory(prefix="trb-native-") as temporary:
        return _declared(_build(compiler, Path(temporary), key[:24]))  # stays mapped when its file is gone


def _compiler() -> list[str]:
    named = os.environ.get("CC", "").strip()
    if named:
        try:
            return shlex.split(named)
        except ValueError as error:
            raise _BuildError(f"CC={named!r} is not a command ({error})") from error
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise _BuildError(f"no C compiler found (looked for $CC, {', '.join(_COMPILERS)})")
    return [found]


def _own_directory() -> Path:
    """Where libraries are kept. Raises OSError where nothing can be, or where others could put something."""
    directory = cache_directory() / "native"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = directory.resolve()  # what the checks below are about is what is opened
    # What lies there is executed: nobody else may have put it there, nor be able to put another folder in its place.
    # Whoever may write into a sticky folder (/tmp) cannot rename what others have in it.
    _require_private(directory, {os.getuid()}, sticky=0)
    for parent in directory.parents:
        _require_private(parent, {0, os.getuid()}, sticky=stat.S_ISVTX)
    return directory


def _require_private(folder: Path, owners: set[int], sticky: int) -> None:
    status = folder.stat()
    if status.st_uid not in owners or (status.st_mode & 0o022 and not status.st_mode & sticky):
        raise PermissionError(f"{folder} belongs to another user or can be written by others")


def _kept(directory: Path, key: str) -> ctypes.CDLL | None:
    """A library of an earlier process, if what is in the file is what its name says: loading half of one is fatal."""
    for path in directory.glob(f"kernels-{key}-*.so"):
        if path == _path(directory, key, path.read_bytes()):
            return ctypes.CDLL(str(path))
        logger.info("%s is damaged: building it again", path)
        path.unlink(missing_ok=True)
    return None


def _path(directory: Path, key: str, content: bytes) -> Path:
    return directory / f"kernels-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _build(compiler: list[str], directory: Path, key: str) -> ctypes.CDLL:
    """Compile, try, flush and rename, so that no process ever loads half a library, or one that kills it."""
    handle, building = tempfile.mkstemp(prefix=f".kernels-{key}-", suffix=".so", dir=directory)
    os.close(handle)
    try:
        _run([*compiler, *_FLAGS, "-shared", "-o", building, *map(str, _SOURCES), "-lm"])
        _try(building, compiler)
        with open(building, "rb+") as file:
            path = _path(directory, key, file.read())
            os.fsync(file.fileno())
        os.replace(building, path)
    finally:
        Path(building).unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _try(library: str, compiler: list[str]) -> None:
    """Raises _BuildError unless the library gets known rows right, in a process that it may crash."""
    command = [sys.executable, "-I", "-S", str(_TRIAL), library]
    done = subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        reason = lines[-1] if lines else f"status {done.returncode}"
        raise _BuildError(f"what {compiler[0]} built does not work ({reason.strip()})")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise _BuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()  # a compiler may write in any encoding
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise _BuildError(f"{command[0]} failed with status {done.returncode}: {reason.strip()}")
    return done.stdout.decode(errors="replace")


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, flag, integer = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    # logits, bf16, strides, V, start, end, budget, five results, log_probs, scratch
    library.solve_rows.argtypes = [pointer, pointer, flag, *[integer] * 5, *[pointer] * 8]
    # logits, bf16, three strides, rows of the head, V, start, end, support, temperature, stops, their number, then
    # tokens, weights, numbers, gradient, scratch
    library.reverse_kl_rows.argtypes = [pointer, pointer, flag, flag, *[integer] * 8, ctypes.c_double, pointer, integer]
    library.reverse_kl_rows.argtypes += [pointer] * 5
    library.solve_rows.restype = library.reverse_kl_rows.restype = flag
    return library
