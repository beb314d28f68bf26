"""The results file of an evaluation: finished problems as they come, from where a killed one goes on.

Left out: what a record of a problem holds (`trb.tasks.evaluation`, and `trb.records` for whoever reads the file).
"""

import json
import os
from pathlib import Path
from typing import Any

from trb.errors import InputError, named
from trb.records import PROBLEMS
from trb.training.ranks import Ranks

__all__ = ["Results"]


class Results:
    """The finished problems, in order, and their file if there is one.

    The file is a header line with the settings, then one line per problem. A last line without its newline was
    torn by a kill and is dropped. So are the finished problems of an unfinished round: a batch of another
    composition rounds differently, and a resumed run must repeat the interrupted one exactly. The first process reads
    the file for all, which therefore agree on what is left to do.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], round_size: int, ranks: Ranks) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = ranks.from_first(lambda: _resumed(path, settings, round_size))

    def append(self, records: list[dict[str, Any]]) -> None:
        self.records += records
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
                file.flush()
                os.fsync(file.fileno())


def _resumed(path: Path | None, settings: dict[str, Any], round_size: int) -> list[dict[str, Any]]:
    """The records of the finished rounds in a results file, which is cut to them, or begun."""
    if path is None:
        return []
    header = json.dumps({"settings": settings}).encode() + b"\n"
    content = path.read_bytes() if path.exists() else b""
    if header.startswith(content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header)
        return []
    lines = [line for line in PROBLEMS.lines(path) if line.raw.endswith(b"\n")]
    for place, line in enumerate(lines, start=1):
        if line.error or line.number != place:
            raise InputError(
                f"line {place} of {path} is not a result ({line.error or 'it is empty'}); use {_elsewhere()}, or "
                "delete the file if it is a damaged one"
            )
    parsed = [line.record for line in lines]
    _check_settings(parsed[0] if parsed else {}, settings, path)
    for number, record in enumerate(parsed[1:]):
        if record.get("problem") != number:
            raise InputError(f"line {number + 2} of {path} is not problem {number} as it should be; delete the file")
    kept = len(parsed) - 1
    if kept < settings["n_problems"]:
        kept -= kept % round_size
    os.truncate(path, sum(len(line.raw) for line in lines[: kept + 1]))
    return parsed[1 : kept + 1]


def _elsewhere() -> str:
    return f"another {named('results_path')}"


def _check_settings(header: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Refuse to continue a file that was written with other settings, or is something else altogether."""
    written = header.get("settings")
    if not isinstance(written, dict):
        raise InputError(f"{path} is not a results file of an evaluation; use {_elsewhere()}")
    # A model whose files are known is told by them, wherever it lies and however its path is written.
    files = {key: value for key, value in settings.items() if key.endswith("_files") and value is not None}
    same = {key.removesuffix("_files") for key, value in files.items() if written.get(key) == value}
    differences = [
        f"{named(key)} is {written.get(key)!r} there and {settings.get(key)!r} here"
        for key in {**settings, **written}
        if written.get(key) != settings.get(key) and key not in same
    ]
    if differences:
        raise InputError(
            f"{path} holds results of another evaluation ({'; '.join(differences)}); delete it or use {_elsewhere()}"
        )
