"""What the fields of records hold: numbers, text, intervals and objects by name, and what a schema makes of them.

A number that is not finite is not known, and becomes None; text that is null becomes empty. Left out: which fields
there are (`trb.records`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

T = TypeVar("T")
_LARGEST = 1e300


def known(value: float | None) -> float | None:
    """A number, or None for null, NaN and infinities."""
    # Comparisons are false for NaN, and unlike math.isfinite they accept integers beyond the float range.
    return value if value is not None and -_LARGEST < value < _LARGEST else None


def _known_ends(interval: Sequence[float | None] | None) -> tuple[float, float] | None:
    """Both ends; None where the interval or an end is not known."""
    low, high = map(known, interval or (None, None))
    return None if low is None or high is None else (low, high)


def of_kind(fits: Callable[[Any], bool], expected: str) -> PlainValidator:
    """What makes `Annotated[Any, ...]` take the values that `fits` is true of; `expected` says in words which."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise PydanticCustomError("kind", "expected {what}", {"what": expected})
        return value

    return PlainValidator(check)


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)))


def _is_level(value: Any) -> bool:
    return _is_number(value) and (value is None or 0 < value < 1 or not abs(value) < math.inf)


def _is_chance(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and _is_number(value[1])


def _without_nulls(value: Any) -> Any:
    """Objects by name: those that are null are left out, and null is none."""
    if value is None or isinstance(value, Mapping):
        return {name: item for name, item in (value or {}).items() if item is not None}
    return value


Number = Annotated[float | None, of_kind(_is_number, "a number or null"), AfterValidator(known)]
Whole = Annotated[
    int | None, of_kind(_is_number, "a number or null"), AfterValidator(lambda n: None if known(n) is None else int(n))
]
Known = Annotated[Any, of_kind(lambda value: type(value) in (int, float), "a number")]
Count = Annotated[int, of_kind(lambda value: type(value) is int and 0 <= value < _LARGEST, "a whole number, 0 or more")]
Flag = Annotated[bool | None, of_kind(lambda value: value in (None, True, False), "true or false")]
Share = Annotated[
    float | None,
    of_kind(lambda value: type(value) is bool or _is_number(value), "a number, true or false"),
    AfterValidator(known),
]
Text = Annotated[
    str, of_kind(lambda value: isinstance(value, str | None), "text"), AfterValidator(lambda text: text or "")
]
Interval = Annotated[
    tuple[float, float] | None, of_kind(_is_interval, "[low, high] or null"), AfterValidator(_known_ends)
]
Level = Annotated[float | None, of_kind(_is_level, "a share between 0 and 1 such as 0.95"), AfterValidator(known)]
Chance = Annotated[Any, of_kind(_is_chance, "[text, probability]")]
Numbers = list[Number] | None
Options = dict[str, Any] | None
Named = Annotated[dict[str, T], BeforeValidator(_without_nulls), Field(default_factory=dict)]
