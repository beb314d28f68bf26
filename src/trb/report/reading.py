"""Reads a run directory or a comparison directory into plain records.

A run directory holds config.yaml, provenance.json, metrics.jsonl, held_out.jsonl, evals.jsonl, rollouts.jsonl and
results.json; a comparison directory holds one run directory per method and its own results.json. Files that a
young run has not written yet are allowed to be missing. This module checks shapes and says where a file is
wrong; it draws nothing, averages nothing, and leaves rollouts on disk, because those files can be larger than
memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from trb import checkpoints
from trb.methods import METHODS
from trb.untrusted import parse_yaml, require_inside

RUN_FILES = ("config.yaml", "metrics.jsonl", "held_out.jsonl", "evals.jsonl", "rollouts.jsonl")
REFERENCES = ("student", "teacher")
_LARGEST = 1e300


class ReportError(ValueError):
    """A directory or file cannot be reported on; the message names it and says what was expected."""


@dataclass(frozen=True)
class Score:
    """One evaluation: pass@1 in [0, 1] with its 95% interval; None wherever the file has no number."""

    pass_at_1: float | None = None
    interval: tuple[float, float] | None = None
    n_problems: float | None = None
    n_samples: float | None = None
    mean_length: float | None = None
    stop_rate: float | None = None
    name: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl or held_out.jsonl; `where` names file and line for messages about `values`."""

    step: int
    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run. `metrics` has one record per step, sorted; `evals` is sorted by step."""

    name: str
    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Step, ...] = ()
    held_out: tuple[Step, ...] = ()
    evals: tuple[Score, ...] = ()

    @property
    def rollouts(self) -> Path:
        return self.directory / "rollouts.jsonl"

    @property
    def last_step(self) -> int | None:
        """The last optimizer step on record, or None for a run that has not made one."""
        return self.metrics[-1].step if self.metrics else None


@dataclass(frozen=True)
class Source:
    """Everything read from one directory. `scores` follows results.json: student, teacher and method
    names."""

    directory: Path
    kind: Literal["run", "comparison"]
    runs: tuple[Run, ...]
    scores: Mapping[str, Score]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]


def read(directory: str | Path) -> Source:
    """Read a run or a comparison directory.

    Raises ReportError if it is neither, or if a file in it is malformed (naming file and line).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ReportError(f"{directory} is not a directory. Expected {_expected()}.")
    notes: list[str] = []
    children = () if (directory / "metrics.jsonl").is_file() else tuple(_run_directories(directory))
    if children:
        return _read_comparison(directory, children, notes)
    if not _is_run(directory):
        raise ReportError(f"{directory} holds nothing to report on. Expected {_expected()}.")
    return _read_single(directory, notes)


def records(path: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, object) for each line of a .jsonl file; `where` names file and line for messages.

    A last line that was cut off while being written (no line end, not valid JSON) is left out and added to
    `notes`. Raises ReportError for any other malformed line.
    """
    with _own(path).open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    name = f"{path.parent.name}/{path.name}"
                    notes.append(f"{name}: line {number} was cut off in writing and is left out.")
                    return
                raise ReportError(f"{where}: not valid JSON ({error}). Repair or remove that line.") from error
            if not isinstance(record, dict):
                raise ReportError(f"{where}: expected a JSON object, found {type(record).__name__}.")
            yield where, record


def number(record: Mapping[str, Any], key: str, where: str) -> float | None:
    """A finite number, or None where the key is missing, null, NaN or infinite. Other types raise
    ReportError."""
    return finite(record.get(key), f"{where}: {key}")


def finite(value: Any, where: str) -> float | None:
    """`value` if it is a finite number, None if it is null, NaN or infinite; other types raise
    ReportError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ReportError(f"{where} is {value!r:.80}, expected a number or null.")
    # Comparisons are false for NaN, and unlike math.isfinite they accept integers beyond the float range.
    return value if -_LARGEST < value < _LARGEST else None


def interval_of(record: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    """The record's `interval`, two finite numbers; None where it or an end is missing.

    Anything else raises ReportError.
    """
    value = record.get("interval")
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2):
        raise ReportError(f"{where}: interval is {value!r:.80}, expected [low, high] or null.")
    low, high = (finite(end, f"{where}: interval") for end in value)
    return None if low is None or high is None else (low, high)


def step_of(record: Mapping[str, Any], where: str) -> int:
    """The record's optimizer step, a whole number >= 0; anything else raises ReportError."""
    value = number(record, "step", where)
    if value is None or value < 0 or value != int(value):
        raise ReportError(f"{where}: step is {record.get('step')!r:.80}, expected a whole number, 0 or more.")
    return int(value)


def _expected() -> str:
    return (
        f"a run directory (any of {', '.join(RUN_FILES)}), a comparison directory (one run directory per method, and "
        "results.json), a study directory (study.json) or a probe directory (probe.json)"
    )


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in RUN_FILES)


def _run_directories(directory: Path) -> Iterator[Path]:
    for child in sorted(directory.iterdir()):
        if child.is_dir() and _is_run(child):
            yield _own(child)


def _read_single(directory: Path, notes: list[str]) -> Source:
    run = read_run(directory, notes)
    results = read_json(directory / "results.json")
    if "pass_at_1" in results:
        results = {run.name: results}
    scores = parse_scores(results, directory / "results.json")
    methods = [name for name in scores if name not in REFERENCES]
    if len(methods) == 1:
        run = replace(run, name=methods[0])
    scores = scores or _scores_from_evals((run,), notes)
    provenance = run.provenance or _mapping(results.get("provenance"))
    return Source(directory, "run", (run,), scores, provenance, tuple(notes))


def _read_comparison(directory: Path, children: tuple[Path, ...], notes: list[str]) -> Source:
    path = directory / "results.json"
    results = read_json(path)
    notes += [f"{directory.name}: {text}." for text in _damage(directory)]
    order = {name: rank for rank, name in enumerate(results)}
    children = tuple(sorted(children, key=lambda child: (order.get(child.name, len(order)), child.name)))
    runs = tuple(read_run(child, notes, name=child.name) for child in children)
    scores = parse_scores(results, path)
    if not scores:
        notes.append("results.json has no evaluation yet: the summary uses each run's latest one.")
        scores = _scores_from_evals(runs, notes)
    for name in scores:
        if name not in REFERENCES and name not in {run.name for run in runs}:
            notes.append(f"results.json lists {name}, but there is no run directory {name}/: it has no curves.")
    provenance = _mapping(results.get("provenance")) or runs[0].provenance
    commits = sorted({str(run.provenance["commit"]) for run in runs if run.provenance.get("commit")})
    if len(commits) > 1:
        notes.append(f"The runs were made from different commits: {', '.join(commits)}.")
    return Source(directory, "comparison", runs, scores, provenance, tuple(notes))


def read_run(directory: Path, notes: list[str], name: str | None = None) -> Run:
    """One run directory; `name` overrides the method its configuration names."""
    config = _read_yaml(directory / "config.yaml")
    notes += [f"{directory.name}: {text}." for text in _damage(directory)]
    if not config:
        notes.append(f"{directory.name}/config.yaml is missing or empty: the configuration is not shown.")
    return Run(
        name=name or _method(config) or directory.resolve().name,
        directory=directory,
        config=config,
        provenance=read_json(directory / "provenance.json"),
        metrics=_read_metrics(directory / "metrics.jsonl", notes),
        held_out=_read_metrics(directory / "held_out.jsonl", notes),
        evals=_read_evals(directory / "evals.jsonl", notes),
    )


def _damage(directory: Path) -> list[str]:
    """What is known to be damaged in a run: against its checksums, and against its last checkpoint's until it ends."""
    shown = list(checkpoints.differing(directory, of=lambda name: not name.startswith("model/")).values())
    last = max(checkpoints.numbered(directory).items(), default=None)
    if last is None or (directory / "results.json").exists():
        return shown
    try:
        return shown + checkpoints.short_of_reach(last[1])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [*shown, f"{last[1].name} is damaged"]


def _method(config: Mapping[str, Any]) -> str | None:
    """The method named in a resolved config: `method` at the top, or inside one of its sections.

    Inside a section only a known method counts: other sections have a `method` of their own (of sampling,
    say).
    """
    top = config.get("method")
    if isinstance(top, str) and top:
        return top
    sections = (section for section in config.values() if isinstance(section, Mapping))
    names = (section.get("method") for section in sections)
    return next((name for name in names if isinstance(name, str) and name in METHODS), None)


def _read_metrics(path: Path, notes: list[str]) -> tuple[Step, ...]:
    if not path.is_file():
        return ()
    by_step: dict[int, Step] = {}
    repeated = 0
    for where, record in records(path, notes):
        step = step_of(record, where)
        repeated += step in by_step
        by_step[step] = Step(step, where, record)
    if repeated:
        notes.append(
            f"{path.parent.name}/{path.name}: {repeated} steps were recorded twice (a resumed run); "
            "the later record is shown."
        )
    return tuple(by_step[step] for step in sorted(by_step))


def _read_evals(path: Path, notes: list[str]) -> tuple[Score, ...]:
    if not path.is_file():
        return ()
    found: dict[tuple[str, int], Score] = {}
    for where, record in records(path, notes):
        score = _score({**record, "step": step_of(record, where)}, where)
        found[score.name, score.step or 0] = score
    return tuple(sorted(found.values(), key=lambda score: score.step or 0))


def parse_scores(results: Mapping[str, Any], path: str | Path) -> dict[str, Score]:
    """The scores in the contents of results.json, by name; `path` names their source in messages."""
    scores = {}
    for name, value in results.items():
        if name == "provenance" or (name not in REFERENCES and not isinstance(value, Mapping)):
            continue
        if not isinstance(value, Mapping):
            raise ReportError(f"{path}: {name} is {value!r:.80}, expected an object with pass_at_1 and interval.")
        if "pass_at_1" in value:
            scores[name] = _score(value, f"{path}: {name}")
    return scores


def _scores_from_evals(runs: tuple[Run, ...], notes: list[str]) -> dict[str, Score]:
    """Scores from evals.jsonl: step 0 is the student before training, the latest one is the method's."""
    names = sorted({score.name for run in runs for score in run.evals})
    if len(names) > 1:
        notes.append(f"Several evaluations are on record ({', '.join(names)}): the summary shows {names[0]}.")
    scores: dict[str, Score] = {}
    for run in runs:
        evals = [score for score in run.evals if score.name == names[0]] if names else []
        if evals and evals[0].step == 0:
            scores.setdefault("student", evals[0])
        if evals and evals[-1].step != 0:
            scores[run.name] = evals[-1]
    return scores


def _score(record: Mapping[str, Any], where: str) -> Score:
    return Score(
        pass_at_1=number(record, "pass_at_1", where),
        interval=interval_of(record, where),
        n_problems=number(record, "n_problems", where),
        n_samples=number(record, "n_samples", where),
        mean_length=number(record, "mean_length", where),
        stop_rate=number(record, "stop_rate", where),
        name=str(record.get("name") or ""),
        step=None if record.get("step") is None else step_of(record, where),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file; anything else raises ReportError."""
    if not path.is_file():
        return {}
    _own(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    _own(path)
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise ReportError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    if not isinstance(value, dict | None):
        raise ReportError(f"{path}: expected a mapping of options, found {type(value).__name__}.")
    return value or {}


def _own(path: Path) -> Path:
    """`path`, unless it is a link out of its directory: a page of somebody's runs must not show other files."""
    try:
        return require_inside(path, path.parent)
    except ValueError as error:
        raise ReportError(str(error)) from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
