"""Whose a directory is: nobody's until a step has been taken in it, and left as it was found by what is refused.

Left out: what may go on in a directory that is somebody's (`trb.studies.directories`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trb import records
from trb.errors import TrbError, is_for_people
from trb.records import MEASURED, MODEL, RESULTS, SKIPPED
from trb.safety.files import remove
from trb.training import checkpoints

__all__ = ["has_step", "left_as_found", "out_of_the_way", "without_what_is_made"]


def has_step(directory: Path) -> bool:
    """Whether a run has taken a step there, or a comparison has finished one of its runs."""
    if any((directory / name).exists() for name in (RESULTS, MODEL)) or checkpoints.numbered(directory):
        return True
    if any((directory / SKIPPED).glob("*")):
        return True
    return any(_says_a_step(directory / file) for file in (records.METRICS, records.HELD_OUT, records.EVALS))


def _says_a_step(path: Path) -> bool:
    """Whether a line tells of a step, or tells nothing that can be read: whoever wrote it may have taken many."""
    lines = MEASURED.lines(path) if path.is_file() else ()
    return any(not (MEASURED.fits(line.record) and line.record["step"] <= 0) for line in lines if not line.is_torn)


@contextmanager
def left_as_found(ours: Iterable[Path], begun: Callable[[], bool]) -> Iterator[None]:
    """Undo what has been written in the meantime if something is refused before `begun()`: files and folders that were
    not there are removed, and files that were have their contents again.

    `ours` are the files and folders that may be written; no other is touched, and no folder that is removed comes
    back. Whoever is interrupted, and whoever a disk has failed, goes on with what is there.
    """
    ours = list(ours)
    kept = {path: path.read_bytes() for path in ours if path.is_file()}
    there = {path for each in ours if each.is_dir() for path in (each, *each.rglob("*"))}
    try:
        yield
    except Exception as error:
        if _is_refusal(error) and not begun():
            for path in ours:
                if path in kept:
                    path.write_bytes(kept[path])
                elif path in there:
                    _remove_new(path, there)
                else:
                    remove(path)
        raise


def _is_refusal(error: Exception) -> bool:
    return is_for_people(error) and (isinstance(error, TrbError) or not isinstance(error, OSError))


@contextmanager
def out_of_the_way(folder: Path) -> Iterator[None]:
    """The folder is not there inside; it comes back if its replacement is refused, and is removed if it is not."""
    aside = folder.with_name(f"{folder.name}.before")
    remove(aside)
    if folder.exists():
        folder.rename(aside)
    try:
        yield
    except Exception as error:
        if _is_refusal(error) and aside.exists():
            remove(folder)
            aside.rename(folder)
        raise
    finally:
        remove(aside)


def _remove_new(folder: Path, there: set[Path]) -> None:
    for path in sorted(folder.rglob("*")):
        if path not in there:
            remove(path)


@contextmanager
def without_what_is_made(directory: Path) -> Iterator[None]:
    """Remove the directory, and those above it, if they were made inside and are empty in the end."""
    made = [path for path in (directory, *directory.absolute().parents) if not path.exists()]
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()
