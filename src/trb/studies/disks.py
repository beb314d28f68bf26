"""Disks that fill up or may not be written: found before anything is loaded, and explained where they are met.

Left out: making room.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from trb import records
from trb.errors import FileError
from trb.studies.keys import RunConfig
from trb.studies.material import RunDirectoryError
from trb.training import checkpoints
from trb.training.config import TRBConfig

__all__ = ["DiskFullError", "explained_disk_errors", "require_space", "require_writable"]

_FULL_BYTES = 1 << 20


class DiskFullError(FileError):
    """The disk filled up while saving; the message says what is intact and how to go on."""


def require_writable(directory: Path) -> None:
    """Make the directory, and fail now rather than after an hour of training if nothing can be written there."""
    # A name that `remove_unfinished` knows, which may do so meanwhile for the run that is there.
    probe = directory / f".trb-probe-{os.environ.get('RANK', '0')}.{os.getpid()}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink(missing_ok=True)
    except OSError as error:
        probe.unlink(missing_ok=True) if directory.is_dir() else None
        raise RunDirectoryError(
            f"cannot write to {directory}: {error.strerror}; choose another --output-dir"
        ) from error


def require_space(
    directory: Path, student: PreTrainedModel, run: RunConfig, args: TRBConfig, *, freed: int = 0
) -> None:
    """Refuse to start a run whose first checkpoint or final model cannot fit on the disk.

    `freed` bytes will be removed before it writes anything.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    checkpoint = 0 if args.save_strategy == "no" else weights * (1 if args.save_only_model else 3)
    if run.lora_rank:
        weights, checkpoint = weights // 20, checkpoint // 20
    needed = checkpoint + (weights if run.save_final_model else 0)
    free = _free_bytes(directory) + freed
    if free < needed:
        raise RunDirectoryError(
            f"the disk of {directory} has {_size(free)} free, and a checkpoint and the final model take about "
            f"{_size(needed)}; free some space, choose another --output-dir, or set save_strategy: no"
        )


@contextmanager
def explained_disk_errors(directory: Path) -> Iterator[None]:
    """Turn a full disk, whichever library met it, into one error that says what is intact and how to go on."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not (_is_disk_full(error) or _free_bytes(directory) < _FULL_BYTES):
            raise
        checkpoints.clear_partial(directory)
        shutil.rmtree(directory / records.MODEL_PARTIAL, ignore_errors=True)
        checkpoint = checkpoints.latest(directory, contents=False, warn=None)
        way_on = f"continue from {checkpoint.name}" if checkpoint else "start over (no checkpoint was complete yet)"
        raise DiskFullError(
            errno.ENOSPC,
            f"the disk of {directory} is full: what was being written is lost, and everything saved before is intact. "
            f"Free some space and run the same command again to {way_on}; save_total_limit: 1 keeps fewer checkpoints "
            f"({type(error).__name__}: {error!s:.200})",
        ) from error


def _free_bytes(directory: Path) -> int:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors and torch.save report it in words only.
        if re.search(r"No space left on device|os error 28\b|inline_container\.cc|iostream error", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
