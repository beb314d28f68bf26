"""The trust-region blend on CPUs in C: `trb.blend.solve` at about the cost of two log-softmaxes.

Tensor operations stream `[rows, V]` through memory once for every elementary step; `blend.c` solves one row
after another while it stays in cache. This module builds that file with the system's compiler when it is first
needed (about a second, once for each machine and version), loads it and spreads rows over `torch.get_num_threads()`
threads. A row's result depends on that row alone, to the last bit.

Left out on purpose: rows that float32 cannot represent (a log-ratio more than 60 above its mean, say), positive budgets
below 1e-5, supports that differ and NaN. They come back with `passes = FLAGGED`; `trb.blend` solves those, and remains
the semantics of record. Also left out: gradients, and checks of the budget's sign (a negative or NaN one is flagged).

Without a compiler that builds a library which solves a known row in a process of its own (`trb.blend.trial`), or with
the environment variable TRB_NATIVE=0, `available()` is False. Libraries are kept in `$TRB_CACHE/native` (by default
`~/.cache/trb/native`) under the hash of their content, as long as nobody else can write there.

Shape suffixes: N rows (flattened prefixes), V vocabulary.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trb.errors import InputError, OperationError
from trb.safety.files import cache_directory
from trb.safety.untrusted import printable

__all__ = ["FLAGGED", "NativeResult", "available", "solve_rows"]

logger = logging.getLogger(__name__)

FLAGGED = -1

_SOURCE = Path(__file__).with_name("blend.c")
_TRIAL = Path(__file__).with_name("trial.py")
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


class NativeResult(NamedTuple):
    """As `trb.blend.laws.BlendResult`, for N rows. Where `passes` is FLAGGED nothing was solved: the rest is NaN.

    Attributes:
        log_probs: `[N, V]` float32 log μ, or None if it was not asked for.
        teacher_weight: `[N]` float64, the largest feasible β in [0, 1].
        log_norm: `[N]` float64, with log μ = (1-β) student + β teacher - log_norm in terms of the logits given.
        kl_student: `[N]` float64, KL(μ || student) in nats.
        kl_teacher: `[N]` float64, KL(μ || teacher) in nats.
        passes: `[N]` int64, sweeps over the vocabulary (one to normalise both models, one for the moments if a
            weight is searched, one for each trial teacher weight, one to write `log_probs`), or FLAGGED.
    """

    log_probs: Tensor | None
    teacher_weight: Tensor
    log_norm: Tensor
    kl_student: Tensor
    kl_teacher: Tensor
    passes: Tensor


def available() -> bool:
    """Whether `solve_rows` can run here; builds the library on the first call, and says once why it cannot."""
    return _library() is not None


@torch.no_grad()
def solve_rows(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor, *, write: bool = True) -> NativeResult:
    """Blend N rows, as `trb.blend.solve` does, flagging those that need more than float32.

    Args:
        student_NV: `[N, V]` CPU logits, both float32 or both bfloat16, with any row stride; others are copied.
        teacher_NV: `[N, V]`, over the same events as the student's.
        budget_N: `[N]` ε in nats, non-negative; 0 gives the student, infinity the teacher.
        write: whether to return `[N, V]` log μ; without it the last sweep is saved.

    Raises:
        RuntimeError: the library is not available.
        ValueError: shapes that differ, or tensors that are not on the CPU.
    """
    library = _library()
    if library is None:
        raise OperationError("the native solver is not available here; use trb.blend.solve")
    _check(student_NV, teacher_NV, budget_N)
    student_NV, teacher_NV = _readable(student_NV, teacher_NV)
    budget_N = budget_N.double().contiguous()
    rows, vocabulary = student_NV.shape
    weight_N, log_norm_N, kl_student_N, kl_teacher_N = torch.empty(4, rows, dtype=torch.float64)
    log_probs_NV = torch.empty(rows, vocabulary, dtype=torch.float32) if write else None
    passes_N = torch.empty(rows, dtype=torch.int64)
    result = NativeResult(log_probs_NV, weight_N, log_norm_N, kl_student_N, kl_teacher_N, passes_N)

    def solve(start: int, end: int) -> None:
        library.solve_rows(
            student_NV.data_ptr(),
            teacher_NV.data_ptr(),
            student_NV.dtype == torch.bfloat16,
            student_NV.stride(0),
            teacher_NV.stride(0),
            vocabulary,
            start,
            end,
            budget_N.data_ptr(),
            *(None if values is None else values.data_ptr() for values in (*result[1:], result.log_probs)),
            _scratch(2 * vocabulary).data_ptr(),
        )

    threads = torch.get_num_threads()
    pieces = min(rows, _PIECES_PER_THREAD * threads, rows * vocabulary // _PIECE_ELEMENTS)
    if threads == 1 or pieces <= 1:
        solve(0, rows)
    else:
        bounds = [rows * piece // pieces for piece in range(pieces + 1)]
        list(_pool(threads).map(solve, bounds[:-1], bounds[1:]))
    return result


def _check(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor) -> None:
    matching = student_NV.shape == teacher_NV.shape and budget_N.shape == student_NV.shape[:1]
    if student_NV.dim() != 2 or not matching:
        raise InputError(
            f"expected student and teacher [N, V] and budgets [N], got {tuple(student_NV.shape)}, "
            f"{tuple(teacher_NV.shape)} and {tuple(budget_N.shape)}"
        )
    for tensor in (student_NV, teacher_NV, budget_N):
        if tensor.device.type != "cpu":
            raise InputError(f"the native solver reads CPU tensors, got one on {tensor.device}")


def _readable(*logits: Tensor) -> list[Tensor]:
    """One dtype that the library reads, tokens adjacent; masks written as another dtype's lowest number become -inf."""
    if len({x_NV.dtype for x_NV in logits}) > 1 or logits[0].dtype not in (torch.float32, torch.bfloat16):
        logits = tuple(x_NV.float().masked_fill(x_NV <= torch.finfo(x_NV.dtype).min / 2, -torch.inf) for x_NV in logits)
    return [x_NV if x_NV.stride(1) == 1 else x_NV.contiguous() for x_NV in logits]


# --- threads ------------------------------------------------------------

_local = threading.local()


def _scratch(floats: int) -> Tensor:
    """Memory of this thread alone, kept between calls: fresh pages would cost as much as a sweep."""
    scratch: Tensor | None = getattr(_local, "scratch", None)
    if scratch is None or scratch.numel() < floats:
        scratch = _local.scratch = torch.empty(floats, dtype=torch.float32)
    return scratch


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="trb-blend")


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
    except Exception as error:  # whatever compilers, disks and systems do: blends can be solved without the library
        reason = printable(f"{error or type(error).__name__}", lines=False)
        logger.warning("solving blends with torch operations, as the native solver cannot be built: %s", reason)
        return None


def _load() -> ctypes.CDLL:
    compiler = _compiler()
    # The macros name the compiler's version and, under -march=native, the instructions this CPU has: a home directory
    # may be shared by machines that differ in both.
    macros = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    text = _SOURCE.read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([text, *compiler, *_FLAGS, macros]).encode(errors="surrogateescape")).hexdigest()
    try:
        directory = _own_directory()
        return _declared(_kept(directory, key[:24]) or _build(compiler, directory, key[:24]))
    except OSError as error:
        logger.info("not keeping the native solver for other processes: %s", error)
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
    for path in directory.glob(f"blend-{key}-*.so"):
        if path == _path(directory, key, path.read_bytes()):
            return ctypes.CDLL(str(path))
        logger.info("%s is damaged: building it again", path)
        path.unlink(missing_ok=True)
    return None


def _path(directory: Path, key: str, content: bytes) -> Path:
    return directory / f"blend-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _build(compiler: list[str], directory: Path, key: str) -> ctypes.CDLL:
    """Compile, try, flush and rename, so that no process ever loads half a library, or one that kills it."""
    handle, building = tempfile.mkstemp(prefix=f".blend-{key}-", suffix=".so", dir=directory)
    os.close(handle)
    try:
        _run([*compiler, *_FLAGS, "-shared", "-o", building, str(_SOURCE), "-lm"])
        _try(building, compiler)
        with open(building, "rb+") as file:
            path = _path(directory, key, file.read())
            os.fsync(file.fileno())
        os.replace(building, path)
    finally:
        Path(building).unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _try(library: str, compiler: list[str]) -> None:
    """Raises _BuildError unless the library solves a known row, in a process that it may crash."""
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
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    # logits, bf16, strides, V, start, end, budget, five results, log_probs, scratch
    library.solve_rows.argtypes = [pointer, pointer, ctypes.c_int, *[integer] * 5, *[pointer] * 8]
    library.solve_rows.restype = ctypes.c_int
    return library
