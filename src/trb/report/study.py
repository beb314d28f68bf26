"""Reads a study directory: study.json, and for the rollout viewer the run of the smallest seed of each method.

A study compares methods in several settings (a pair of models and a task), each with several training seeds; its
estimates, intervals and tests are computed elsewhere and only shown here. A young study may lack methods, settings and
most keys: what is missing is None or empty. `trb.records` says of which kind
an entry must be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trb.records import STUDY
from trb.report.panels import Values
from trb.report.reading import ReportError, Run, Score, fitting, known, known_ends, read_json, read_run
from trb.report.style import label, style_indices

BASELINE = "opd"
OURS = "trb"


@dataclass(frozen=True)
class Difference:
    """First minus second in pass@1; effect size is Cohen's d over seeds, `p_holm` is corrected for the comparisons."""

    estimate: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    p_holm: float | None = None
    effect_size: float | None = None


@dataclass(frozen=True)
class Band:
    """A quantity over training steps: the mean over seeds and the ends of its interval, parallel to `steps`."""

    steps: tuple[int, ...]
    mean: Values
    low: Values = ()
    high: Values = ()


@dataclass(frozen=True)
class Target:
    """When seeds first reached pass@1 `target`: the median step (None where most never did), and how many did."""

    target: float | None
    median: float | None
    reached: float | None
    seeds: float | None


@dataclass(frozen=True)
class Method:
    """One method in one setting. `differences` and `suites` are by name; `curve` is pass@1 on the development
    problems; `style` indexes colours and dashes, the same on the whole page."""

    name: str
    label: str
    style: int
    score: Score
    configuration: Mapping[str, Any] = field(default_factory=dict)
    seeds: int | None = None
    difference: Difference | None = None
    differences: Mapping[str, Difference] = field(default_factory=dict)
    suites: Mapping[str, float | None] = field(default_factory=dict)
    curve: Band | None = None
    area: Score = field(default_factory=Score)
    area_difference: Difference | None = None
    target: Target | None = None
    metrics: Mapping[str, Band] = field(default_factory=dict)
    per_seed: Values = ()


@dataclass(frozen=True)
class Configuration:
    """One configuration of a method's sweep; the selected one was trained on all seeds and tested."""

    configuration: Mapping[str, Any]
    score: Score
    seeds: int | None
    selected: bool
    per_seed: Values = ()


@dataclass(frozen=True)
class Setting:
    """One pair of models on one task. `sweep` is by method name; `runs` are those the viewer shows."""

    name: str
    title: str
    description: str
    test: tuple[Mapping[str, Any], ...]
    dev: tuple[Mapping[str, Any], ...]
    steps: int | None
    student: Score
    teacher: Score
    methods: tuple[Method, ...]
    sweep: Mapping[str, tuple[Configuration, ...]]
    runs: tuple[Run, ...]

    def method(self, name: str) -> Method | None:
        """The method of that name, or None."""
        return next((method for method in self.methods if method.name == name), None)


@dataclass(frozen=True)
class Average:
    """A method's pass@1 averaged over the settings."""

    name: str
    label: str
    style: int
    score: Score
    difference: Difference | None


@dataclass(frozen=True)
class Study:
    """Everything read from one study directory; `labels` and `styles` cover every method, in order of appearance."""

    directory: Path
    name: str
    description: str
    rule: str
    level: float
    settings: tuple[Setting, ...]
    average: tuple[Average, ...]
    diagnostics: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Any]
    labels: Mapping[str, str]
    styles: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def interval_name(self) -> str:
        """What intervals are called: "95% interval"."""
        return f"{100 * self.level:g}% interval"


def read_study(directory: str | Path) -> Study:
    """Read DIRECTORY/study.json and the runs beside it. Raises ReportError naming the entry that is malformed."""
    directory = Path(directory)
    path = directory / STUDY
    record = read_json(path)
    return parse_study(record, directory, str(path))


def parse_study(record: Mapping[str, Any], directory: Path, where: str) -> Study:
    """A study from the contents of study.json; `where` names their source in error messages."""
    record = fitting(STUDY, record, where)
    settings = _entries(record, "settings")
    average = {} if len(settings) == 1 else _entries(record.get("average") or {}, "methods")  # it would repeat it
    labels = _labels(settings, average)
    styles = style_indices(list(labels))
    notes: list[str] = []
    level = known(record.get("level"))
    return Study(
        directory=directory,
        name=record.get("name") or directory.resolve().name,
        description=record.get("description") or "",
        rule=record.get("rule") or "",
        level=0.95 if level is None else level,
        settings=tuple(
            _setting(name, value, directory, (labels, styles), f"{where}: settings.{name}", notes)
            for name, value in settings.items()
        ),
        average=tuple(
            Average(name, labels[name], styles[name], _score(value), _difference(value.get("difference_to_opd")))
            for name, value in average.items()
        ),
        diagnostics=_entries(record, "diagnostics"),
        provenance=record.get("provenance") or {},
        labels=labels,
        styles=styles,
        notes=tuple(notes),
    )


def _labels(settings: Mapping[str, Any], average: Mapping[str, Any]) -> dict[str, str]:
    """Every method of the study with its shown name: the paper's where the study gives none."""
    found: dict[str, str] = {}
    for value in settings.values():
        for name, method in _entries(value, "methods").items():
            if method.get("label") or name not in found:
                found[name] = method.get("label") or label(name)
    return found | {name: label(name) for name in average if name not in found}


def _setting(
    name: str,
    value: Mapping[str, Any],
    directory: Path,
    looks: tuple[Mapping[str, str], Mapping[str, int]],
    where: str,
    notes: list[str],
) -> Setting:
    labels, styles = looks
    return Setting(
        name=name,
        title=value.get("title") or name,
        description=value.get("description") or "",
        test=_suites(value.get("test")),
        dev=_suites(value.get("dev")),
        steps=_whole(value.get("steps")),
        student=_score(value.get("student") or {}),
        teacher=_score(value.get("teacher") or {}),
        methods=tuple(
            _method(method, labels[method], styles[method], entry, f"{where}.methods.{method}")
            for method, entry in _entries(value, "methods").items()
        ),
        sweep={method: tuple(map(_configuration, rows or ())) for method, rows in (value.get("sweep") or {}).items()},
        runs=tuple(run for method in labels if (run := _first_run(directory, name, method, notes))),
    )


def _suites(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Problem sets: a list of them, or a single one."""
    return (value,) if isinstance(value, Mapping) else tuple(value or ())


def _method(name: str, shown: str, style: int, value: Mapping[str, Any], where: str) -> Method:
    differences = {other: _difference(entry) for other, entry in _entries(value, "differences").items()}
    metrics = {key: _band(entry, f"{where}.metrics.{key}") for key, entry in _entries(value, "metrics").items()}
    area = value.get("area") or {}
    return Method(
        name=name,
        label=shown,
        style=style,
        score=_score(value),
        configuration=value.get("configuration") or {},
        seeds=_whole(value.get("seeds")),
        difference=_difference(value.get("difference_to_opd")),
        differences={other: difference for other, difference in differences.items() if difference},
        suites={suite: known(score) for suite, score in (value.get("suites") or {}).items()},
        curve=_band(value.get("curve"), f"{where}.curve"),
        area=Score(known(area.get("estimate")), known_ends(area.get("interval"))),
        area_difference=_difference(value.get("area_difference_to_opd")),
        target=_target(value.get("steps_to_target")),
        metrics={key: band for key, band in metrics.items() if band},
        per_seed=_numbers(value, "per_seed"),
    )


def _score(value: Mapping[str, Any]) -> Score:
    score, problems = known(value.get("pass_at_1")), known(value.get("problems"))
    return Score(score, known_ends(value.get("interval")), problems)


def _difference(value: Mapping[str, Any] | None) -> Difference | None:
    if not value:
        return None
    return Difference(
        estimate=known(value.get("estimate")),
        interval=known_ends(value.get("interval")),
        p_value=known(value.get("p_value")),
        p_holm=known(value.get("p_value_holm")),
        effect_size=known(value.get("effect_size")),
    )


def _target(value: Mapping[str, Any] | None) -> Target | None:
    return Target(*(known(value.get(key)) for key in ("target", "median", "reached", "seeds"))) if value else None


def _configuration(value: Mapping[str, Any]) -> Configuration:
    return Configuration(
        configuration=value.get("configuration") or {},
        score=_score(value),
        seeds=_whole(value.get("seeds")),
        selected=value.get("selected") is True,
        per_seed=_numbers(value, "per_seed"),
    )


def _band(value: Mapping[str, Any] | None, where: str) -> Band | None:
    if not value:
        return None
    steps = _numbers(value, "steps")
    if any(step is None or step < 0 for step in steps):
        raise ReportError(f"{where}.steps is {value['steps']!r:.80}, expected whole numbers, 0 or more.")
    columns = {key: _numbers(value, key) for key in ("mean", "low", "high")}
    for key, values in columns.items():
        if values and len(values) != len(steps):
            raise ReportError(f"{where}.{key} has {len(values)} numbers for {len(steps)} steps; give one per step.")
    if not any(one is not None for one in columns["mean"]):
        return None
    if not (columns["low"] and columns["high"]):
        columns |= {"low": (), "high": ()}
    return Band(tuple(int(step or 0) for step in steps), **columns)


def _first_run(directory: Path, setting: str, method: str, notes: list[str]) -> Run | None:
    """The run of a method's smallest seed, if it has left anything; names that lead elsewhere are not followed."""
    if any(not re.fullmatch(r"[\w.+ -]+", name) or name in (".", "..") for name in (setting, method)):
        return None
    folders = [
        (int(found[1]), folder)
        for folder in (directory / setting / "test" / method).glob("seed-*")
        if (found := re.fullmatch(r"seed-(\d+)", folder.name)) and folder.is_dir()
    ]
    return read_run(min(folders)[1], notes, name=method) if folders else None


def _entries(record: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    """The objects under `key` by name; null ones are left out."""
    return {name: value for name, value in (record.get(key) or {}).items() if value is not None}


def _numbers(record: Mapping[str, Any], key: str) -> Values:
    return tuple(map(known, record.get(key) or ()))


def _whole(value: float | None) -> int | None:
    number = known(value)
    return None if number is None else int(number)
