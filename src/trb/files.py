"""Files written at once or not at all, JSON that any reader takes, and where this package caches.

Left out on purpose: what the files mean, which is the business of the modules that write them.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["cache_directory", "exclusive", "finite", "remove_unfinished", "write_bytes", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in UTF-8, at once. Its folder is made if missing."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file at once, never leaving it half written. Its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named by the process: two that write the same file must not write into each other's.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed inside `write_bytes` have left in a folder and those below it."""
    for path in folder.rglob(".*.[0-9]*.partial"):
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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process. The system lets go of it with the process, however that ends, and no file stays.

    Raises BlockingIOError if another process holds it. Where folders cannot be locked (Windows, some network file
    systems), nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BlockingIOError(error.errno, f"{folder} is in use") from error
        yield
    finally:
        os.close(handle)


def cache_directory() -> Path:
    """$TRB_CACHE, or ~/.cache/trb: what can be made again. It may not exist yet.

    Raises FileNotFoundError for a user without a home directory, or for the name of a user who is none.
    """
    named = os.environ.get("TRB_CACHE") or "~/.cache/trb"
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"no home directory for {named!r}: set TRB_CACHE to a folder of your own") from error
