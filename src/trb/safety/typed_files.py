"""Files with a name, a schema and a version, read and written in one way. Which files there are: `trb.records`.

A file says which version of its layout it has, a whole file in its object and lines in their first one; what does not
say has version 1. A file of another version is refused with a VersionError, and never taken for a damaged one; a file
whose content does not fit raises a RecordError that names the file and the field.
"""

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from trb.errors import InputError, OperationError
from trb.safety.files import finite, write_text
from trb.safety.untrusted import parse_json

__all__ = [
    "JsonFile",
    "Line",
    "LinesFile",
    "RecordError",
    "RunFile",
    "Schema",
    "TypedFile",
    "VersionError",
    "load_json",
]

VERSION_KEY = "format_version"


class RecordError(InputError):
    """A file that is damaged or holds something else than its name says; the message names it and the field."""


class VersionError(OperationError):
    """A file in another version of its layout. No ValueError: it is whole, and must not be made again."""


class Schema(BaseModel):
    """An object. Fields without a default must be there."""

    model_config = ConfigDict(extra="allow", strict=True)


class Line(NamedTuple):
    """One line of a file: its number from 1, its bytes, and the object in it, or else why there is none."""

    number: int
    raw: bytes
    record: dict[str, Any]
    error: str | None

    @property
    def is_torn(self) -> bool:
        """Whether this is half a last line, which a running or killed process leaves."""
        return self.error is not None and not self.raw.endswith(b"\n")


@dataclass(frozen=True)
class RunFile(os.PathLike[str]):
    """A file by its name, which can be joined to a folder; `patterns` are for those that have many names."""

    name: str
    patterns: tuple[str, ...] = ()

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def claims(self, path: PurePath) -> bool:
        """Whether a path inside an output directory is one of these."""
        return any(map(path.match, self.patterns or (self.name,)))


@dataclass(frozen=True)
class TypedFile(RunFile):
    """A file whose content, or each line of it, is what pydantic understands by `schema`."""

    schema: Any = Any
    version: int = 1

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.schema, config=None if _is_model(self.schema) else ConfigDict(strict=True))

    def fits(self, value: Any) -> bool:
        """Whether the schema takes a value."""
        try:
            self._validate(value)
        except (ValidationError, RecursionError):
            return False
        return True

    def check(self, value: Any, where: str | os.PathLike[str]) -> Any:
        """What the schema makes of a value. Raises RecordError naming `where` and the field, unless it takes it."""
        try:
            return self._validate(value)
        except ValidationError as error:
            raise RecordError(f"{os.fspath(where)}: {_first(error)}") from error
        except RecursionError as error:
            raise RecordError(f"{os.fspath(where)}: it is nested too deeply") from error

    def _validate(self, value: Any) -> Any:
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            # Legal in JSON, and unknown to pydantic: they are text like any other here.
            if not {item["type"] for item in error.errors()} & {"invalid_key", "string_unicode"}:
                raise
            return self._adapter.validate_python(_without_lone_surrogates(value))

    def check_version(self, value: Any, where: str | os.PathLike[str]) -> None:
        """Raises VersionError for an object that says it has another version."""
        found = value.get(VERSION_KEY, 1) if isinstance(value, Mapping) else 1
        if type(found) is not int or found != self.version:
            raise VersionError(
                f"{os.fspath(where)} has version {reprlib.repr(found)} of its layout, and this trb understands version "
                f"{self.version}. Upgrade trb, or use the one that wrote the file (provenance beside it says which)"
            )


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", errors="replace").decode()
    if isinstance(value, Mapping):
        return {_without_lone_surrogates(key): _without_lone_surrogates(item) for key, item in value.items()}
    return list(map(_without_lone_surrogates, value)) if isinstance(value, list | tuple) else value


def _is_model(schema: Any) -> bool:
    return isinstance(schema, type) and issubclass(schema, BaseModel)


def _first(error: ValidationError) -> str:
    """The first complaint: which field has what, and what was expected."""
    item = error.errors(include_url=False, include_context=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
    if item["type"] == "missing":
        return f"{where} is missing"
    expected = _EXPECTED.get(item["type"], item["msg"])
    return f"{where} is {reprlib.repr(item['input'])}, {expected}".lstrip()


_EXPECTED = {
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "dict_type": "expected an object",
    "list_type": "expected a list",
    "string_type": "expected text",
    "bool_type": "expected true or false",
}


@dataclass(frozen=True)
class JsonFile(TypedFile):
    """A whole file of JSON; `compact` ones may hold NaN and infinities."""

    compact: bool = False

    def write(self, path: Path, value: Any) -> None:
        """Replace the file at once. Raises ValueError for infinities and NaN, unless it is compact."""
        if self.version > 1:
            value = {VERSION_KEY: self.version, **value}
        layout: dict[str, Any] = {} if self.compact else {"indent": 2, "ensure_ascii": False, "allow_nan": False}
        write_text(path, json.dumps(value, **layout) + "\n")

    def read(self, path: Path) -> Any:
        """What the file holds, without its version. Raises RecordError, VersionError, and OSError as `open` does."""
        return self.parse(load_json(path), path)

    def parse(self, value: Any, where: str | os.PathLike[str]) -> Any:
        """What `read` returns of a file with this content; `where` names it in messages."""
        value = self.unversioned(value, where)
        self.check(value, where)
        return value

    def unversioned(self, value: Any, where: str | os.PathLike[str]) -> Any:
        """The content without its version. Raises VersionError for another one than this."""
        self.check_version(value, where)
        return {key: item for key, item in value.items() if key != VERSION_KEY} if isinstance(value, dict) else value


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises RecordError naming file and line where it is none, and OSError."""
    try:
        return parse_json(path.read_bytes().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except ValueError as error:
        raise RecordError(f"{path}: not valid JSON ({error})") from error


@dataclass(frozen=True)
class LinesFile(TypedFile):
    """A file of JSON objects, one in a line."""

    def append(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append one object per line; NaN and infinities become null."""
        with path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, rows))

    def write(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file at once."""
        write_text(path, "".join(map(_line, rows)))

    def lines(self, path: Path) -> Iterator[Line]:
        """Every line that is not blank, read one after the other; objects are not compared with the schema.

        That takes as long again as reading them does, and readers know best what they need of a line: `check` it.
        """
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    record, error = parse_json(raw.decode("utf-8")), None
                except ValueError as why:
                    record, error = None, f"not valid JSON ({why})"
                if error is None and not isinstance(record, dict):
                    error = f"expected a JSON object, found {type(record).__name__}"
                if number == 1:
                    self.check_version(record, path)
                yield Line(number, raw, {} if error else record, error)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row)) + "\n"
