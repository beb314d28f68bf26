"""Reads a run directory or a comparison directory into plain records.

A run directory holds config.yaml, provenance.json, metrics.jsonl, held_out.jsonl, evals.jsonl, rollouts.jsonl and
results.json; a comparison directory holds one run directory per method and its own results.json. Files that a
young run has not written yet are allowed to be missing. This module checks shapes and says where a file is
wrong; it draws nothing, averages nothing, and leaves rollouts on disk, because those files can be larger than
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from trb.errors import InputError
from trb.measures import MEASURES, RunScore, Score
from trb.records import (
    AS_BY_DEFAULT,
    CONFIG,
    EVALS,
    HELD_OUT,
    MEASUREMENTS,
    METRICS,
    MODEL,
    PROBE,
    PROVENANCE,
    RESULTS,
    ROLLOUTS,
    STUDY,
)
from trb.safety.fields import known
from trb.safety.typed_files import JsonFile, LinesFile, RecordError, TypedFile, VersionError, load_json
from trb.safety.untrusted import parse_yaml, require_inside
from trb.training import checkpoints
from trb.training.methods import METHODS

RUN_FILES = (CONFIG, *MEASUREMENTS)
REFERENCES = ("student", "teacher")
_SCORE = JsonFile("a score", schema=RunScore)


class ReportError(InputError):
    """A directory or file cannot be reported on; the message names it and says what was expected."""


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl or held_out.jsonl; `where` names file and line for messages about `values`."""

    step: int
    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run. `metrics` has one record per step, sorted; `evals` is sorted by step; `defaults` are the keys
    of `config` that are known to be as by default."""

    name: str
    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    defaults: frozenset[str] = frozenset()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Step, ...] = ()
    held_out: tuple[Step, ...] = ()
    evals: tuple[Score, ...] = ()

    @property
    def rollouts(self) -> Path:
        return self.directory / ROLLOUTS

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
    children = () if (directory / METRICS).is_file() else tuple(_run_directories(directory))
    if children:
        return _read_comparison(directory, children, notes)
    if not _is_run(directory):
        raise ReportError(f"{directory} holds nothing to report on. Expected {_expected()}.")
    return _read_single(directory, notes)


def records(file: LinesFile, path: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, object) for each line of a .jsonl file; `where` names file and line for messages.

    A last line that was cut off while being written (no line end, not valid JSON) is left out and added to
    `notes`. Raises ReportError for any other malformed line.
    """
    with _in_words():
        for line in file.lines(own(path)):
            where = f"{path}, line {line.number}"
            if line.is_torn:
                name = f"{path.parent.name}/{path.name}"
                notes.append(f"{name}: line {line.number} was cut off in writing and is left out.")
                return
            if line.error:
                raise ReportError(f"{where}: {line.error}. Repair or remove that line.")
            yield where, line.record


def number(record: Mapping[str, Any], key: str, where: str) -> float | None:
    """A finite number, or None where the key is missing, null, NaN or infinite. Other types raise
    ReportError."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ReportError(f"{where}: {key} is {value!r:.80}, expected a number or null.")
    return known(value)


def _expected() -> str:
    return (
        f"a run directory (any of {', '.join(map(str, RUN_FILES))}), a comparison directory (one run directory per "
        f"method, and {RESULTS}), a study directory ({STUDY}) or a probe directory ({PROBE})"
    )


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in RUN_FILES)


def _run_directories(directory: Path) -> Iterator[Path]:
    for child in sorted(directory.iterdir()):
        if child.is_dir() and _is_run(child):
            yield own(child)


def _read_single(directory: Path, notes: list[str]) -> Source:
    run = read_run(directory, notes)
    path = directory / RESULTS
    results = read_json(path)
    if results.keys() & MEASURES.keys():
        results = {run.name: results}
    scores = parse_scores(results, path)
    methods = [name for name in scores if name not in REFERENCES]
    if len(methods) == 1:
        run = replace(run, name=methods[0])
    scores = scores or _scores_from_evals((run,), notes)
    provenance = run.provenance or _mapping(results.get("provenance"))
    return Source(directory, "run", (run,), scores, provenance, tuple(notes))


def _read_comparison(directory: Path, children: tuple[Path, ...], notes: list[str]) -> Source:
    path = directory / RESULTS
    results = read_json(path)
    notes += [f"{directory.name}: {text}." for text in _damage(directory)]
    order = {name: rank for rank, name in enumerate(results)}
    children = tuple(sorted(children, key=lambda child: (order.get(child.name, len(order)), child.name)))
    runs = tuple(read_run(child, notes, name=child.name) for child in children)
    scores = parse_scores(results, path)
    if not scores:
        notes.append(f"{RESULTS} has no evaluation yet: the summary uses each run's latest one.")
        scores = _scores_from_evals(runs, notes)
    for name in scores:
        if name not in REFERENCES and name not in {run.name for run in runs}:
            notes.append(f"{RESULTS} lists {name}, but there is no run directory {name}/: it has no curves.")
    provenance = _mapping(results.get("provenance")) or runs[0].provenance
    commits = sorted({str(run.provenance["commit"]) for run in runs if run.provenance.get("commit")})
    if len(commits) > 1:
        notes.append(f"The runs were made from different commits: {', '.join(commits)}.")
    return Source(directory, "comparison", runs, scores, provenance, tuple(notes))


def read_run(directory: Path, notes: list[str], name: str | None = None) -> Run:
    """One run directory; `name` overrides the method its configuration names."""
    config, defaults = _read_config(directory / CONFIG)
    notes += [f"{directory.name}: {text}." for text in _damage(directory)]
    if not config:
        notes.append(f"{directory.name}/{CONFIG} is missing or empty: the configuration is not shown.")
    return Run(
        name=name or _method(config) or directory.resolve().name,
        directory=directory,
        config=config,
        defaults=defaults,
        provenance=fitting(PROVENANCE, read_json(directory / PROVENANCE), directory / PROVENANCE),
        metrics=_read_metrics(METRICS, directory / METRICS, notes),
        held_out=_read_metrics(HELD_OUT, directory / HELD_OUT, notes),
        evals=_read_evals(directory / EVALS, notes),
    )


def _damage(directory: Path) -> list[str]:
    """What is known to be damaged in a run: against its checksums, and against its last checkpoint's until it ends."""
    with _in_words():
        shown = list(checkpoints.differing(directory, of=lambda name: not name.startswith(f"{MODEL}/")).values())
    last = max(checkpoints.numbered(directory).items(), default=None)
    if last is None or (directory / RESULTS).exists():
        return shown
    try:
        with _in_words():
            return shown + checkpoints.short_of_reach(last[1])
    except (OSError, ValueError):
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


def _read_metrics(file: LinesFile, path: Path, notes: list[str]) -> tuple[Step, ...]:
    if not path.is_file():
        return ()
    by_step: dict[int, Step] = {}
    repeated, sets = 0, dict[str, None]()
    for where, record in records(file, path, notes):
        step = checked(file, record, where).step
        sets[name := f"{record.get('set', '')!s:.40}"] = None
        if name != next(iter(sets)):
            continue  # of another set of prompts, which is not for this line
        repeated += step in by_step
        by_step[step] = Step(step, where, record)
    if repeated:
        notes.append(
            f"{path.parent.name}/{path.name}: {repeated} steps were recorded twice (a resumed run); "
            "the later record is shown."
        )
    if len(sets) > 1:
        first, *others = sets
        notes.append(f"{path.parent.name}/{path.name}: shown is the set {first}; there are also {', '.join(others)}.")
    return tuple(by_step[step] for step in sorted(by_step))


def _read_evals(path: Path, notes: list[str]) -> tuple[Score, ...]:
    if not path.is_file():
        return ()
    found: dict[tuple[str, int], Score] = {}
    for where, record in records(EVALS, path, notes):
        score = checked(EVALS, record, where)
        found[score.name, score.step] = score
    return tuple(sorted(found.values(), key=lambda score: score.step or 0))


def parse_scores(results: Mapping[str, Any], path: str | Path) -> dict[str, Score]:
    """The scores in the contents of results.json, by name; `path` names their source in messages."""
    fitting(RESULTS, results, path)
    return {
        name: checked(_SCORE, value, f"{path}: {name}")
        for name, value in results.items()
        if name != "provenance" and isinstance(value, Mapping) and value.keys() & MEASURES.keys()
    }


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file; anything else raises ReportError."""
    if not path.is_file():
        return {}
    with _in_words():
        value = load_json(own(path))
    if not isinstance(value, dict):
        raise ReportError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def fitting(file: JsonFile, value: Mapping[str, Any], where: str | Path) -> Any:
    """What a file's schema makes of its contents without their version; raises ReportError if they do not fit."""
    with _in_words():
        return file.check(file.unversioned(dict(value), where), where)


def checked(file: TypedFile, value: Any, where: str) -> Any:
    """What a file's schema makes of a line of it, or of a part; raises ReportError if it does not fit."""
    with _in_words():
        return file.check(value, where)


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except (RecordError, VersionError) as error:
        raise ReportError(f"{error}.") from error


def _read_config(path: Path) -> tuple[dict[str, Any], frozenset[str]]:
    """A configuration, and its keys that are as by default, so far as the run has said so."""
    if not path.is_file():
        return {}, frozenset()
    own(path)
    try:
        text = path.read_text(encoding="utf-8")
        if parts := _two_parts(text):
            return parts[0] | parts[1], frozenset(map(str, parts[1]))
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise ReportError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    if not isinstance(value, dict | None):
        raise ReportError(f"{path}: expected a mapping of options, found {type(value).__name__}.")
    return value or {}, frozenset()


def _two_parts(text: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What a configuration has chosen, and what is as by default, each read by itself; None if those are not its parts.

    The line between them may stand inside somebody's text: then one of the two is no mapping.
    """
    try:
        chosen, rest = (parse_yaml(part) for part in text.split(f"\n{AS_BY_DEFAULT}", 1))
    except (yaml.YAMLError, ValueError):
        return None
    parts = isinstance(chosen, dict) and isinstance(rest, dict) and not chosen.keys() & rest.keys()
    return (chosen, rest) if parts else None


def own(path: Path) -> Path:
    """`path`, unless it is a link out of its directory: a page of somebody's runs must not show other files."""
    try:
        return require_inside(path, path.parent)
    except ValueError as error:
        raise ReportError(str(error)) from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
