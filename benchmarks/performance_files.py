"""What `performance.py` reads: records of measurements, and how their numbers are written.

Left out: what is made of them.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
NOT_MEASURED = "Not measured yet"
_SMALL = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def read(name: str) -> Any:
    """The record of that name; None where it has not been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def each(cells: Iterable[dict[str, Any]], **wanted: Any) -> Iterator[dict[str, Any]]:
    """The cells that have all these values."""
    return (cell for cell in cells if all(cell[name] == value for name, value in wanted.items()))


def spread(cell: dict[str, float], *, least: str = "min", most: str = "max") -> str:
    return f"{cell['median']:.2f} [{cell[least]:.2f}, {cell[most]:.2f}]"


def count(number: int) -> str:
    return _SMALL[number] if number < len(_SMALL) else f"{number}"


def listed(names: Iterable[Any]) -> str:
    """Different names in their order, as a phrase."""
    *first, last = [f"{name}" for name in dict.fromkeys(names)] or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def one_origin(origin: dict[str, Any]) -> tuple[str, str, str, str]:
    """Commit, day, machine and threads of a record's provenance."""
    machine = origin["machine"]
    name = listed(machine["gpus"]) if machine["gpus"] else f"{machine['cpu']}, {count(machine['cores'])} cores"
    return (
        f"`{origin['commit'][:7]}`" + (", changed" if origin["dirty"] else ""),
        origin["time"][:10],
        name,
        f"{origin.get('threads', '-')}",
    )
