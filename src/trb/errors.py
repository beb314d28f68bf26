"""The errors that are meant for people, what they call an argument, and the hint that ends a refusal of unknown names.

A `TrbError` says what is wrong and what to do; the command line shows that, and no traceback. The other classes are
also what Python calls such an error, so that `except ValueError` goes on working, and are the bases of the named ones
(`ConfigError`, `CheckpointError`, ...). An error of any other class is a bug, and its traceback says where.
"""

import difflib
import errno
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = [
    "FileError",
    "InputError",
    "MissingFileError",
    "OperationError",
    "PackageError",
    "ServerError",
    "ServerTimeoutError",
    "TrbError",
    "calls",
    "did_you_mean",
    "is_for_people",
    "named",
    "nearest",
    "real",
    "shown",
    "whole",
]

# What a machine refuses, whichever library asked it: the error of the system names the file, and no line of code.
_ENVIRONMENT = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP),  # something else than the file that should be there
    *(errno.ENAMETOOLONG, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ESTALE),  # limits, and a server that lost it
)


class TrbError(Exception):
    """Something that whoever asked for it can set right; the message says how."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes by what it says: the arguments of a subclass may be models, and its message is made already.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[TrbError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> TrbError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error


class InputError(TrbError, ValueError):
    """A value, file or combination of options that cannot be used."""


class OperationError(TrbError, RuntimeError):
    """What was asked for failed, or cannot be done now or here."""


class FileError(TrbError, OSError):
    """A file that cannot be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that is not there."""


class PackageError(TrbError, ImportError):
    """A package that is missing, or installed in a version that does not do."""


class ServerError(TrbError, ConnectionError):
    """A server that cannot be reached, or that ended the connection."""


class ServerTimeoutError(TrbError, TimeoutError):
    """A server that did not answer in time."""


def is_for_people(error: BaseException) -> bool:
    """Whether an error is shown by its message alone; any other is a bug, and is shown with its traceback."""
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        return True
    torch = sys.modules.get("torch")  # which has raised it, or is not loaded; its message says how much was asked for
    hub = sys.modules.get("huggingface_hub.errors")
    others = () if torch is None else (torch.OutOfMemoryError,)
    others += () if hub is None else (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, hub.LocalTokenNotFoundError)
    return isinstance(error, (TrbError, *others))


def real(argument: str, value: Any) -> float:
    """An argument's value as a float.

    Raises:
        ValueError: names the argument; the value is no number, or an integer that no float holds, with which one
            function goes on (comparisons do) and the next one fails.
    """
    bound = ""
    if not isinstance(value, str | bytes):
        try:
            return float(value)
        except OverflowError:
            bound = " below 1e308"
        except (TypeError, ValueError):
            pass
    raise InputError(f"{named(argument)} must be a number{bound}, got {shown(value)}")


def whole(argument: str, value: Any) -> int:
    """An argument's value as an int, of numpy's and torch's integers too.

    Raises:
        ValueError: names the argument; the value is no whole number, or a whole one of a type with a fraction.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{named(argument)} must be a whole number, got {shown(value)}") from error


def shown(value: Any) -> str:
    """A value in a message, at no great length; Python itself writes no integer of more than 4300 digits."""
    if isinstance(value, int) and value.bit_length() > 1023:
        return f"an integer of {value.bit_length():,} bits"
    return f"{value!r:.100}"


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """`"; did you mean 'x'?"` for the candidate most like `name`, or `""`; `cutoff` is difflib's, in [0, 1]."""
    close = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`did_you_mean` for names that are made of a few words, such as keys: half of one in common is worth a hint."""
    return did_you_mean(name, candidates, cutoff=0.5)


# What is called otherwise by whoever called: the innermost caller's names last.
_names: ContextVar[tuple[Mapping[str, str], ...]] = ContextVar("names", default=())


@contextmanager
def calls(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, messages call the arguments of functions by these names: a recipe's key, an option of a command."""
    before = _names.set((*_names.get(), names))
    try:
        yield
    finally:
        _names.reset(before)


def named(argument: str) -> str:
    """An argument as a message should call it: by its own name, or by that of whoever called (`calls`)."""
    for names in reversed(_names.get()):
        argument = names.get(argument, argument)
    return argument
