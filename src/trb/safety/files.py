"""Files written at once or not at all, JSON that any reader takes, and where this package caches.

Left out on purpose: what the files mean, which is the business of the modules that write them.
"""

import errno
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, date, datetime, time, timedelta
from numbers import Number
from pathlib import Path
from typing import Any

from trb.errors import FileError, MissingFileError

__all__ = [
    "HOLDS_RUNS",
    "LOCK",
    "UNFINISHED",
    "cache_directory",
    "exclusive",
    "finite",
    "flush",
    "json_types",
    "make_folder",
    "remove",
    "remove_unfinished",
    "stable_json",
    "write_bytes",
    "write_json",
    "write_text",
]


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in UTF-8, at once. Its folder is made if missing."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file at once; it is never half written, not even if power is lost. Its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named by the process: two that write the same file must not write into each other's.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the new name may reach the disk before the contents do
        unfinished.replace(path)
        flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def make_folder(path: Path, remedy: str) -> None:
    """Make a folder that somebody has named. Raises FileError with the remedy where the system does not let it be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write to {path}: {error.strerror}; {remedy}") from error


def flush(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk, where it can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a folder, on a system without handles for them
        return
    try:
        os.fsync(handle)
    except OSError:  # a file system that does not know how
        return
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, whichever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed inside `write_bytes` have left in a folder and those below it."""
    for path in folder.rglob(UNFINISHED):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as JSON, at once. Raises ValueError for infinities and NaN: see `finite`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None for every infinity and NaN inside it, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def json_types(value: Any) -> Any:
    """`value` as it is read from JSON, with text for every infinity and NaN inside it: null would be another value."""
    return json.loads(json.dumps(value), parse_constant=str)


def stable_json(value: Any) -> str:
    """`value` as JSON text that is the same in every process, also of what JSON has no words for: numbers, dates, bytes
    and arrays are what they hold, and any other object is its kind alone."""
    return json.dumps(value, default=_in_words)


def _in_words(value: Any) -> Any:
    kind = type(value).__qualname__
    if isinstance(value, bytes | bytearray | memoryview):
        return [kind, bytes(value).hex()]
    if isinstance(value, Number | date | time | timedelta):
        return [kind, str(value)]
    if isinstance(value, set | frozenset):
        return sorted(map(stable_json, value))
    if isinstance(value, Mapping):
        return dict(value)
    # The text of other objects may hold their address.
    return value.tolist() if hasattr(value, "tolist") else kind


# What `write_bytes` writes beside a file before it takes its place.
UNFINISHED = ".*.[0-9]*.partial"

LOCK = ".lock"  # who holds a folder; what holds it is the system's lock on this file
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # from systems that can lock nothing there
HOLDS_RUNS = ("recipe.yaml", "study.yaml")
_held: set[str] = set()


@contextmanager
def exclusive(folder: Path, *, wait: bool = False, inside: bool = False) -> Iterator[None]:
    """Hold a folder for this process, against every other command; a holder may hold it again.

    The system lets go of it with the process, however that ends. Meanwhile `.lock` in the folder says who holds it
    (host, process, since when); a killed holder leaves that file, and the next one takes its place.

    Args:
        folder: it must exist.
        wait: until another process lets go of it, instead of raising.
        inside: part of a comparison or study that another process holds, and on its behalf.

    Raises BlockingIOError naming the holder if another process holds the folder, or a comparison or study that it is
    part of. Where nothing can be locked (some network file systems), nothing is held.
    """
    name = str(folder.resolve())
    if name in _held:
        yield
        return
    if not inside:
        _check_above(folder)
    _held.add(name)
    try:
        with _locked(folder, wait):
            yield
    finally:
        _held.discard(name)


def _check_above(folder: Path) -> None:
    """Raises BlockingIOError if another process holds a comparison or study around a folder."""
    for above in folder.resolve().parents:
        if str(above) in _held or not any((above / name).exists() for name in HOLDS_RUNS):
            continue
        if (above / LOCK).is_file():
            with _locked(above, wait=False, note=False):
                pass


@contextmanager
def _locked(folder: Path, wait: bool, *, note: bool = True) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = folder / LOCK
    lock = FileLock(path, blocking=wait, fallback_to_soft=False, on_acquired=_write_note if note else None)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout as error:
            raise BlockingIOError(errno.EWOULDBLOCK, f"{folder} is in use by {_holder(path)}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if note:
            stack.callback(path.unlink, missing_ok=True)
        yield


def _write_note(handle: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    note = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    os.ftruncate(handle, 0)
    os.write(handle, f" {json.dumps(note)}".encode())  # Windows keeps the first byte of a locked file from readers


def _holder(note: Path) -> str:
    """Who holds a folder, in words: the file may be of any content."""
    try:
        with note.open("rb") as file:
            file.seek(1)
            holder = json.loads(file.read())
        return f"process {int(holder['pid'])} on {holder['host']!s:.100}, since {holder['since']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def cache_directory() -> Path:
    """$TRB_CACHE, or ~/.cache/trb: what can be made again. It may not exist yet.

    Raises FileNotFoundError for a user without a home directory, or for the name of a user who is none.
    """
    named = os.environ.get("TRB_CACHE") or "~/.cache/trb"
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise MissingFileError(f"no home directory for {named!r}: set TRB_CACHE to a folder of your own") from error
