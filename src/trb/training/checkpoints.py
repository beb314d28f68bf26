"""Checkpoints that are whole or not there: written beside, sealed with checksums, renamed into place, verified.

A run writes checkpoint N into checkpoint.partial/checkpoint-N. When every process is done, checksums.json is written
there (the size and the SHA-256 of every file), everything is flushed to the disk, and the folder is renamed to
checkpoint-N. Killed at any moment, the run keeps its earlier checkpoints, and at most a checkpoint.partial that the
next save removes. On resume every file is compared with its checksum; a checkpoint that differs is passed over for the
one before it, with a warning that names the file. Those of an earlier training, which whoever begins anew finds in the
directory, are moved to _earlier.

Hashing reads each file once after writing and once before resuming: about 2 GB/s where the processor has instructions
for SHA-256, 0.4 GB/s elsewhere. `checksums=False` keeps sizes only.

Left out on purpose: what is in a checkpoint, which is transformers' affair, and authenticity: whoever can change a file
can change its checksum too.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any

from trb.errors import InputError
from trb.records import CHECKPOINT_PARTIAL, CHECKPOINT_PREFIX, CHECKPOINTS_ASIDE, CHECKSUMS, REACH, RUN, TRAINER_STATE
from trb.safety.files import flush, remove
from trb.safety.untrusted import printable

__all__ = [
    "PARTIAL",
    "CheckpointError",
    "best_beside",
    "check_named",
    "check_reach",
    "clear_partial",
    "differing",
    "latest",
    "none_whole",
    "numbered",
    "prune",
    "publish",
    "seal",
    "set_aside_later",
    "short_of_reach",
    "unseal",
    "verify",
    "write_reach",
]

PARTIAL = CHECKPOINT_PARTIAL  # transformers looks for checkpoint-*, and must not find it

logger = logging.getLogger(__name__)


class CheckpointError(InputError):
    """A checkpoint that cannot be trusted; the message names it and the file that is wrong."""


# ---- writing ----


def seal(checkpoint: Path, *, checksums: bool = True, files_of: Iterable[Path] | None = None) -> None:
    """Write checksums.json into a finished folder, and flush its files to the disk.

    `files_of` seals these files and folders inside it only, as far as they exist.
    """
    files: dict[str, dict[str, Any]] = {}
    inside = [entry for root in files_of or [checkpoint] for entry in (root, *root.rglob("*"))]
    for path in sorted(path for path in inside if path.is_file() and path.name != CHECKSUMS.name):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            entry: dict[str, Any] = {"bytes": os.fstat(file.fileno()).st_size}
            if checksums:
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(checkpoint).as_posix()] = entry
    CHECKSUMS.write(checkpoint / CHECKSUMS, {"files": files, "sha256": _digest(files)})
    for folder in {checkpoint, *(checkpoint / name for name in map(os.path.dirname, files))}:
        flush(folder)


def write_reach(directory: Path, checkpoint: Path) -> None:
    """Keep in a checkpoint how far the record files of its run reach: their bytes, and the SHA-256 of those."""
    files = [path for path in sorted(directory.glob("*.jsonl")) if path.is_file()]
    REACH.write(checkpoint / REACH, {path.name: _reach(path, path.stat().st_size) for path in files})


def publish(directory: Path, name: str) -> None:
    """Move the sealed checkpoint `name` out of checkpoint.partial, in place of one that has its name already.

    The files beside it are flushed first: records must reach at least as far as the checkpoint, and the configuration
    says what it is of.
    """
    partial = directory / PARTIAL
    for beside in (path for path in directory.iterdir() if path.is_file()):
        flush(beside)
    if (directory / name).exists():  # damaged, or of steps that are being taken again
        (directory / name).rename(partial / "replaced")
    (partial / name).rename(directory / name)
    flush(directory)
    clear_partial(directory)


def clear_partial(directory: Path) -> None:
    """Remove what a save that was cut off has left."""
    remove(directory / PARTIAL)


def prune(directory: Path, newest: int, limit: int | None, protected: Iterable[str | os.PathLike[str] | None]) -> None:
    """Keep `limit` checkpoints: the one of step `newest`, which is known to be whole, and those before it.

    Checkpoints of later steps go first: they are damaged, or the run that is now at `newest` would not have started
    before them. None or 0 keeps all.
    """
    if not limit or limit < 0:
        return
    kept = {Path(path).resolve() for path in protected if path is not None}
    found = numbered(directory)
    order = sorted(found, key=lambda step: (step <= newest, step))
    spare = [step for step in order if step != newest and found[step].resolve() not in kept]
    for step in spare[: max(0, len(found) - limit)]:
        shutil.rmtree(found[step], ignore_errors=True)


def set_aside_later(directory: Path, step: int, protected: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Move whole checkpoints of later steps than `step` to where `latest` does not look.

    The run that now begins after `step` has not come by them, and once killed would go on from them all the same.
    """
    kept = {Path(path).resolve() for path in protected if path is not None}
    found = [path for number, path in sorted(numbered(directory).items()) if number > step]
    found = [path for path in found if path.resolve() not in kept and _is_whole(path)]
    if found:
        aside = directory / CHECKPOINTS_ASIDE
        place = aside / str(next(number for number in count(1) if not (aside / str(number)).exists()))
        place.mkdir(parents=True)
        for path in found:
            path.rename(place / path.name)
        names = ", ".join(path.name for path in found)
        logger.warning(printable(f"{names} moved to {place}: of an earlier training, and this one goes on from none"))


# ---- reading ----


def best_beside(checkpoint: Path, best: str | None) -> str | None:
    """Where the best checkpoint is that `checkpoint` names by its path of that time.

    The one of that name beside it, if there is one: a run may have been moved since, or copied.
    """
    here = checkpoint.parent / Path(best).name if best else None
    return str(here) if here is not None and here.is_dir() else best


def numbered(directory: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, whole or not."""
    names = ((path.name.removeprefix(CHECKPOINT_PREFIX), path) for path in directory.glob(f"{CHECKPOINT_PREFIX}*"))
    return {int(step): path for step, path in names if step.isdecimal()}


def latest(
    directory: Path, *, contents: bool = True, warn: Callable[[str], None] | None = logger.warning
) -> Path | None:
    """The latest checkpoint that is whole, or None. `warn` hears of every one that was passed over.

    `contents=False` compares sizes only.
    """
    found = numbered(directory)
    for step in sorted(found, reverse=True):
        try:
            verify(found[step], contents=contents)
        except CheckpointError as error:
            if warn is not None:
                warn(printable(f"{error}; it is passed over"))
        else:
            return found[step]
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True


_ANOTHERS = "of another trainer, whose weights alone can be used, as the model"


def none_whole(directory: Path) -> str:
    """Why there is nothing to resume from, where `latest` has found nothing."""
    kinds: dict[str, list[str]] = {"not whole": [], _ANOTHERS: []}
    for _, path in sorted(numbered(directory).items()):
        kinds[_ANOTHERS if _is_anothers(path) else "not whole"].append(path.name)
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    return f"{directory} has no whole checkpoint to resume from" + (f" ({listed})" if listed else "")


def check_named(checkpoint: Path, *, whole: bool = True) -> None:
    """Refuse a path that somebody has named and that is no checkpoint; `whole` also one that `verify` refuses.

    Raises:
        CheckpointError: says what is there instead, and which checkpoints are near.
    """
    is_there = checkpoint.is_dir()
    if not is_there or (not (checkpoint / TRAINER_STATE).exists() and numbered(checkpoint)):
        directory = checkpoint if is_there else checkpoint.parent
        near = latest(directory, contents=False, warn=None)
        what = "is the directory of a run" if is_there else "is a file" if checkpoint.exists() else "does not exist"
        if near is not None:
            remedy = (
                f"name one of its checkpoints, such as {near}" if is_there else f"the latest one beside it is {near}"
            )
        elif numbered(directory):
            remedy = none_whole(directory)
        else:
            remedy = f"name a checkpoint of a run, one of its folders {CHECKPOINT_PREFIX}N"
        raise CheckpointError(f"{checkpoint} {what}, and no checkpoint: {remedy}")
    if whole:
        verify(checkpoint)


def _is_anothers(checkpoint: Path) -> bool:
    """Whether another trainer than ours has written a checkpoint; TRL's, for instance."""
    return (checkpoint / TRAINER_STATE).exists() and not any((checkpoint / file).exists() for file in (CHECKSUMS, RUN))


def verify(checkpoint: Path, *, contents: bool = True) -> None:
    """Compare a checkpoint with its checksums.json: sizes, and contents unless told otherwise.

    Raises:
        CheckpointError: a file is missing or differs, or there are no checksums.
    """
    files = _sealed_files(checkpoint)
    if TRAINER_STATE.name not in files:
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: it has no {TRAINER_STATE}")
    for name, entry in files.items():
        found = _difference(checkpoint / name, name, entry, contents)
        if found:
            raise CheckpointError(f"{checkpoint} is damaged: {found}")


def differing(folder: Path, of: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """What is wrong with the files of a sealed folder that are still there, by name; only those that `of` is true of.

    Nothing where the folder has no seal.
    """
    if not (folder / CHECKSUMS).exists():
        return {}
    try:
        files = _sealed_files(folder)
    except CheckpointError as error:
        return {CHECKSUMS.name: str(error)}
    there = [name for name in files if of(name) and (folder / name).exists()]
    checked = ((name, _difference(folder / name, name, files[name], contents=True)) for name in there)
    return {name: found for name, found in checked if found}


def unseal(folder: Path) -> None:
    """Remove the checksums of a folder that is about to be written to."""
    path = folder / CHECKSUMS
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _difference(path: Path, name: str, entry: dict[str, Any], contents: bool) -> str | None:
    """How a file differs from its entry in checksums.json, in words."""
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            return f"{name} is not a file"
        if status.st_size != entry["bytes"]:
            return f"{name} has {status.st_size} bytes instead of {entry['bytes']}"
        if contents and "sha256" in entry:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                return f"the contents of {name} differ from its checksum"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def check_reach(checkpoint: Path) -> None:
    """Warn of every record file beside a checkpoint that does not begin as it was when the checkpoint was saved."""
    for found in short_of_reach(checkpoint):
        said = printable(f"{checkpoint.parent / found}", lines=False)
        logger.warning(f"{said}. The run goes on, as its results do not depend on it")


def short_of_reach(checkpoint: Path) -> list[str]:
    """What `check_reach` warns of, in words that begin with the file's name. Raises ValueError for a damaged list."""
    path, wrong = checkpoint / REACH, []
    for name, saved in (REACH.read(path) if path.exists() else {}).items():
        file = checkpoint.parent / name
        there = _reach(file, saved["bytes"]) if file.is_file() else {"bytes": 0}
        if there != saved:
            short = there["bytes"] < saved["bytes"]
            what = f"{there['bytes']} of {saved['bytes']} bytes are there" if short else "it has changed"
            wrong.append(f"{name} is not what it was when {checkpoint.name} was saved: {what}")
    return wrong


def _reach(path: Path, most: int) -> dict[str, Any]:
    """Size and digest of the first bytes of a file, which may be larger than memory."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while size < most and (block := file.read(min(1 << 20, most - size))):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _digest(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sealed_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    path = checkpoint / CHECKSUMS
    try:
        content = CHECKSUMS.read(path)
        files: dict[str, dict[str, Any]] = content["files"]
        if content["sha256"] != _digest(files):
            raise InputError("differs from its own checksum")
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise InputError(f"{name} is not inside")
    except FileNotFoundError as error:
        if _is_anothers(checkpoint):
            raise CheckpointError(
                f"{checkpoint} was written by another trainer (it has neither {CHECKSUMS} nor {RUN}), and this one "
                "cannot go on from it: start from its weights, with this path as the model (in recipes, student)"
            ) from error
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: it has no {CHECKSUMS}") from error
    except (OSError, ValueError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint} is damaged: {CHECKSUMS} cannot be read ({cause:.200})") from error
    return files
