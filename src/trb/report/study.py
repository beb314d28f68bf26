"""Reads a study directory: study.json, and for the rollout viewer the run of the smallest seed of each method.

A study compares methods in several settings (a pair of models and a task), each with several training seeds; its
estimates, intervals and tests are computed elsewhere and only shown here. A young study may lack methods, settings and
most keys: what is missing is None or empty. This module checks shapes and says which entry is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trb.report.panels import Values
from trb.report.reading import ReportError, Run, Score, finite, interval_of, number, read_json, read_run
from trb.report.style import label, style_indices

STUDY_FILE = "study.json"
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
    path = directory / STUDY_FILE
    record = read_json(path)
    return parse_study(record, directory, str(path))


def parse_study(record: Mapping[str, Any], directory: Path, where: str) -> Study:
    """A study from the contents of study.json; `where` names their source in error messages."""
    settings = _objects(record, "settings", where)
    average = _objects(_object(record.get("average"), f"{where}: average"), "methods", f"{where}: average")
    if len(settings) == 1:
        average = {}  # it would repeat the setting
    labels = _labels(settings, average, where)
    styles = style_indices(list(labels))
    notes: list[str] = []
    level = number(record, "level", where)
    if level is not None and not 0 < level < 1:
        raise ReportError(f"{where}: level is {level}, expected a share between 0 and 1 such as 0.95.")
    return Study(
        directory=directory,
        name=_text(record, "name", where) or directory.resolve().name,
        description=_text(record, "description", where),
        rule=_text(record, "rule", where),
        level=0.95 if level is None else level,
        settings=tuple(
            _setting(name, value, directory, (labels, styles), f"{where}: settings.{name}", notes)
            for name, value in settings.items()
        ),
        average=tuple(
            Average(
                name,
                labels[name],
                styles[name],
                _score(value, f"{where}: average.{name}"),
                _difference(value.get("difference_to_opd"), f"{where}: average.{name}.difference_to_opd"),
            )
            for name, value in average.items()
        ),
        diagnostics=_objects(record, "diagnostics", where),
        provenance=_object(record.get("provenance"), f"{where}: provenance"),
        labels=labels,
        styles=styles,
        notes=tuple(notes),
    )


def _labels(settings: Mapping[str, Any], average: Mapping[str, Any], where: str) -> dict[str, str]:
    """Every method of the study with its shown name: the paper's where the study gives none."""
    found: dict[str, str] = {}
    for setting, value in settings.items():
        for name, method in _objects(value, "methods", f"{where}: settings.{setting}").items():
            shown = _text(method, "label", f"{where}: settings.{setting}.methods.{name}")
            if shown or name not in found:
                found[name] = shown or label(name)
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
    methods = _objects(value, "methods", where)
    steps = number(value, "steps", where)
    return Setting(
        name=name,
        title=_text(value, "title", where) or name,
        description=_text(value, "description", where),
        test=_suites(value, "test", where),
        dev=_suites(value, "dev", where),
        steps=None if steps is None else int(steps),
        student=_score(_object(value.get("student"), f"{where}.student"), f"{where}.student"),
        teacher=_score(_object(value.get("teacher"), f"{where}.teacher"), f"{where}.teacher"),
        methods=tuple(
            _method(method, labels[method], styles[method], entry, f"{where}.methods.{method}")
            for method, entry in methods.items()
        ),
        sweep={
            method: tuple(
                _configuration(_object(entry, f"{where}.sweep.{method}"), f"{where}.sweep.{method}[{index}]")
                for index, entry in enumerate(_list(_object(value.get("sweep"), f"{where}.sweep"), method, where))
            )
            for method in _object(value.get("sweep"), f"{where}.sweep")
        },
        runs=tuple(run for method in labels if (run := _first_run(directory, name, method, notes))),
    )


def _suites(value: Mapping[str, Any], key: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """The problem sets under `key`: a list of them, or a single one."""
    entries = [value[key]] if isinstance(value.get(key), Mapping) else _list(value, key, where)
    return tuple(_object(suite, f"{where}.{key}[{index}]") for index, suite in enumerate(entries))


def _method(name: str, shown: str, style: int, value: Mapping[str, Any], where: str) -> Method:
    differences = _objects(value, "differences", where)
    suites = _object(value.get("suites"), f"{where}.suites")
    metrics = _objects(value, "metrics", where)
    area = _object(value.get("area"), f"{where}.area")
    seeds = number(value, "seeds", where)
    return Method(
        name=name,
        label=shown,
        style=style,
        score=_score(value, where),
        configuration=_object(value.get("configuration"), f"{where}.configuration"),
        seeds=None if seeds is None else int(seeds),
        difference=_difference(value.get("difference_to_opd"), f"{where}.difference_to_opd"),
        differences={
            other: found
            for other, entry in differences.items()
            if (found := _difference(entry, f"{where}.differences.{other}"))
        },
        suites={suite: number(suites, suite, f"{where}.suites") for suite in suites},
        curve=_band(value.get("curve"), f"{where}.curve"),
        area=Score(number(area, "estimate", f"{where}.area"), interval_of(area, f"{where}.area")),
        area_difference=_difference(value.get("area_difference_to_opd"), f"{where}.area_difference_to_opd"),
        target=_target(value.get("steps_to_target"), f"{where}.steps_to_target"),
        metrics={key: band for key, entry in metrics.items() if (band := _band(entry, f"{where}.metrics.{key}"))},
        per_seed=tuple(finite(one, f"{where}.per_seed") for one in _list(value, "per_seed", where)),
    )


def _score(value: Mapping[str, Any], where: str) -> Score:
    return Score(
        pass_at_1=number(value, "pass_at_1", where),
        interval=interval_of(value, where),
        n_problems=number(value, "problems", where),
    )


def _difference(value: Any, where: str) -> Difference | None:
    record = _object(value, where)
    if not record:
        return None
    return Difference(
        estimate=number(record, "estimate", where),
        interval=interval_of(record, where),
        p_value=number(record, "p_value", where),
        p_holm=number(record, "p_value_holm", where),
        effect_size=number(record, "effect_size", where),
    )


def _target(value: Any, where: str) -> Target | None:
    record = _object(value, where)
    if not record:
        return None
    return Target(*(number(record, key, where) for key in ("target", "median", "reached", "seeds")))


def _configuration(value: Mapping[str, Any], where: str) -> Configuration:
    seeds = number(value, "seeds", where)
    return Configuration(
        configuration=_object(value.get("configuration"), f"{where}.configuration"),
        score=_score(value, where),
        seeds=None if seeds is None else int(seeds),
        selected=value.get("selected") is True,
        per_seed=tuple(finite(one, f"{where}.per_seed") for one in _list(value, "per_seed", where)),
    )


def _band(value: Any, where: str) -> Band | None:
    record = _object(value, where)
    if not record:
        return None
    steps = [finite(step, f"{where}.steps") for step in _list(record, "steps", where)]
    if any(step is None or step < 0 for step in steps):
        raise ReportError(f"{where}.steps is {record['steps']!r:.80}, expected whole numbers, 0 or more.")
    columns = {}
    for key in ("mean", "low", "high"):
        values = tuple(finite(one, f"{where}.{key}") for one in _list(record, key, where))
        if values and len(values) != len(steps):
            raise ReportError(f"{where}.{key} has {len(values)} numbers for {len(steps)} steps; give one per step.")
        columns[key] = values
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


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ReportError(f"{where} is {value!r:.80}, expected an object.")
    return value


def _objects(record: Mapping[str, Any], key: str, where: str) -> dict[str, Mapping[str, Any]]:
    """The object under `key`, each of whose values is an object; null values are left out."""
    found = _object(record.get(key), f"{where}: {key}")
    return {name: _object(value, f"{where}: {key}.{name}") for name, value in found.items() if value is not None}


def _list(record: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list | None):
        raise ReportError(f"{where}: {key} is {value!r:.80}, expected a list.")
    return value or []


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str | None):
        raise ReportError(f"{where}: {key} is {value!r:.80}, expected text.")
    return value or ""
