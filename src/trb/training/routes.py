"""Several teachers: which rows of the data are whose.

A column names the teacher of each row: `teacher_id`, TRL's name for it, unless `teacher_column` says otherwise. Left
out: the teachers themselves (`trb.training.teachers`).
"""

import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trb.errors import InputError, TrbError, did_you_mean

__all__ = ["TEACHER_ID", "Named", "Routes", "by_name", "named_in_errors", "places_of", "value_for"]

TEACHER_ID = "teacher_id"

Named = dict[str | None, Any]
"""Something of each teacher, by its name; None for the only one, which needs none."""


def by_name(value: Any) -> Named:
    """A mapping of teachers' names, or what there is of the only teacher."""
    return {**value} if isinstance(value, Mapping) else {None: value}


def value_for(name: str | None, value: Any) -> Any:
    """What of a mapping, or of the only value, belongs to a teacher; None for nothing."""
    return value.get(name) if isinstance(value, Mapping) else value


@contextmanager
def named_in_errors(name: str | None) -> Iterator[None]:
    """Inside, refusals say which teacher they are about."""
    try:
        yield
    except TrbError as error:
        if name is not None:
            error.args = (f"teacher {name!r}: {error}",)
        raise


@dataclass(frozen=True)
class Routes:
    """Whose each row is.

    Attributes:
        column: of the data; it holds a name in every row.
        names: of the teachers.
        required: whether data without the column is refused; if not, nobody's rows are there.
    """

    column: str
    names: tuple[str, ...]
    required: bool = True

    def of_rows(self, rows: Iterable[Mapping[str, Any]], name: str) -> list[int]:
        """The place in `names` of each row's teacher.

        Raises:
            ValueError: a row names no teacher, or one that is not there; says which row, from 0.
        """
        return self._places((row.get(self.column) for row in rows), name)

    def check(self, rows: Any, name: str) -> list[int]:
        """`of_rows` of a whole set of prompts, of which the one column is read."""
        columns = getattr(rows, "column_names", None)
        if columns is None:
            return self.of_rows((rows[row] for row in range(len(rows))), name)
        self.check_columns(columns, name)
        return self._places(rows.with_format(None)[self.column], name)

    def check_columns(self, columns: Sequence[str], name: str) -> None:
        """Refuse data without the column. Raises ValueError."""
        if self.column not in columns:
            raise InputError(
                f"{name} has no column {self.column!r}, which says who teaches a row "
                f"({', '.join(self.names)}){did_you_mean(self.column, columns)} (it has {', '.join(columns)}): add it, "
                "or set teacher_column"
            )

    def name_in(self, row: Mapping[str, Any], place: str) -> str:
        """The name of a row's teacher; `place` is the row in errors. Raises ValueError."""
        value = row.get(self.column)
        if not isinstance(value, str) or value not in self.names:
            what = "nothing" if value in (None, "") else reprlib.repr(value)
            raise InputError(
                f"{place} has {what} in its column {self.column!r}, and the teachers are "
                f"{', '.join(self.names)}{did_you_mean(str(value)[:80], self.names)}: name one of them in every row"
            )
        return value

    def _places(self, values: Iterable[Any], name: str) -> list[int]:
        places = {known: place for place, known in enumerate(self.names)}
        column = self.column
        return [places[self.name_in({column: value}, f"{name}[{row}]")] for row, value in enumerate(values)]

    def unused(self, places: Sequence[int]) -> list[str]:
        """The teachers that have no row."""
        counts = Counter(places)
        return [name for place, name in enumerate(self.names) if not counts[place]]


def places_of(values: Sequence[int]) -> dict[int, list[int]]:
    """The places of each value, in order of the first."""
    found: dict[int, list[int]] = {}
    for place, value in enumerate(values):
        found.setdefault(value, []).append(place)
    return found
