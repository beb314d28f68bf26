"""Values between a program that a model wrote and the tests that call it: plain data, as JSON.

What is read back is of Python's own types, whatever a hostile program sends: an object whose class could answer a
comparison stays where it is, and only its number is sent. A message has a length, and is refused above a limit.
"""

import datetime
import json
import os
from collections import OrderedDict, deque
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from decimal import Decimal
from fractions import Fraction
from typing import Any

__all__ = ["MAX_MESSAGE", "Channel", "LostError", "in_full", "pack", "unpack"]

MAX_MESSAGE = 4 * 2**20  # bytes

_MANY: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
# An order that counts in comparisons must not get lost.
_MAPPINGS: dict[str, type[dict[Any, Any]]] = {"ordered": OrderedDict, "dict": dict}
# Made again from a text or from whole numbers.
_ATOMS: dict[type, tuple[str, Callable[[Any], list[Any]], Callable[..., Any]]] = {
    bytes: ("bytes", lambda it: [it.hex()], bytes.fromhex),
    bytearray: ("bytearray", lambda it: [it.hex()], bytearray.fromhex),
    complex: ("complex", lambda it: [it.real, it.imag], complex),
    Fraction: ("fraction", lambda it: [str(it)], Fraction),
    Decimal: ("decimal", lambda it: [str(it)], Decimal),
    range: ("range", lambda it: [it.start, it.stop, it.step], range),
    datetime.datetime: ("datetime", lambda it: [it.isoformat()], datetime.datetime.fromisoformat),
    datetime.date: ("date", lambda it: [it.isoformat()], datetime.date.fromisoformat),
    datetime.time: ("time", lambda it: [it.isoformat()], datetime.time.fromisoformat),
    datetime.timedelta: ("timedelta", lambda it: [it.days, it.seconds, it.microseconds], datetime.timedelta),
}
_MAKERS = {name: make for name, _, make in _ATOMS.values()}
_LARGE = 2**63  # beyond, decimal digits take more than linear time


class LostError(BaseException):
    """The process at the other end is gone, or says what nothing of ours says. No test catches it by accident."""


def pack(value: Any, refer: Callable[[Any], int]) -> Any:
    """A value as JSON types; `refer` gives the number of an object that is no plain data, or raises."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -_LARGE < value < _LARGE else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (list, tuple, set, frozenset, deque):
        if isinstance(value, kind):
            return [kind.__name__, *(pack(item, refer) for item in value)]
    for name, mapping in _MAPPINGS.items():
        if isinstance(value, mapping):
            return [name, *(pack(part, refer) for item in value.items() for part in item)]
    if type(value) in _ATOMS:
        name, parts, _ = _ATOMS[type(value)]
        return [name, *parts(value)]
    return ["object", refer(value)]


def in_full(value: Any) -> Any:
    """What gives its items one at a time, and views of a dictionary, as a list; anything else as it is."""
    return list(value) if isinstance(value, Iterator | KeysView | ValuesView | ItemsView) else value


def unpack(data: Any, meant: Callable[[int], Any]) -> Any:
    """The inverse of `pack`; `meant` gives the object of a number. Raises LostError for what `pack` does not write."""
    if isinstance(data, dict):
        raise LostError("no value: an object")
    if not isinstance(data, list):
        return data
    try:
        name, *parts = data
        if name == "int":
            return int(parts[0], 16)
        if name == "object":
            return meant(parts[0])
        if name in _MAKERS:
            return _MAKERS[name](*parts)
        items: Iterable[Any] = (unpack(part, meant) for part in parts)
        if name in _MAPPINGS:
            return _MAPPINGS[name](zip(items, items, strict=True))
        return _MANY[name](items)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise LostError(f"no value: {error}") from error


class Channel:
    """Messages over one open socket, by `read` and `write` alone: what is left to a confined process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, message: Any) -> None:
        """Raises LostError where nobody reads, ValueError for a message that is too long."""
        # Not in ASCII, where two halves of a character would be read as one.
        data = json.dumps(message, ensure_ascii=False).encode(errors="surrogatepass")
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a value of {len(data)} bytes is more than the limit of {MAX_MESSAGE}")
        rest = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise LostError(str(error)) from error

    def receive(self) -> Any:
        """Raises LostError at the end, for no JSON, and for a message that is too long or nested too deeply."""
        try:
            size = int.from_bytes(self._read(4), "big")
            if size > MAX_MESSAGE:
                raise LostError(f"a message of {size} bytes")
            return json.loads(self._read(size))
        except (OSError, ValueError, RecursionError) as error:
            raise LostError(str(error)) from error

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._descriptor, size)
            if not part:
                raise LostError("the other end is closed")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
