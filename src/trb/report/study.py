"""Reads a study directory: study.json, and for the rollout viewer the run of the smallest seed of each method.

A study compares methods in several settings (a pair of models and a task), each with several training seeds; its
estimates, intervals and tests are computed elsewhere and only shown here. A young study may lack methods, settings and
most keys: what is missing is None or empty. `trb.records` says of which kind an entry must be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trb import records
from trb.measures import MEASURES, PASS_AT_1, Measure
from trb.records import STUDY, Average, Findings
from trb.report.reading import Run, fitting, read_json, read_run
from trb.report.style import label, style_indices

BASELINE = "opd"
OURS = "trb"


@dataclass(frozen=True)
class Setting:
    """One pair of models on one task; `runs` are those the viewer shows."""

    name: str
    title: str
    found: records.Setting
    runs: tuple[Run, ...]

    @property
    def measure(self) -> Measure:
        """What its models are scored by."""
        return MEASURES[self.found.measure]


@dataclass(frozen=True)
class Study:
    """Everything read from one study directory; `labels` and `styles` cover every method, in order of appearance, and
    index names, colours and dashes, the same on the whole page."""

    directory: Path
    name: str
    description: str
    rule: str
    level: float
    settings: tuple[Setting, ...]
    average: Mapping[str, Average]
    diagnostics: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Any]
    labels: Mapping[str, str]
    styles: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What its models are scored by, setting by setting, each once; an average has the one of all."""
        return tuple(dict.fromkeys(setting.measure for setting in self.settings)) or (PASS_AT_1,)

    @property
    def titles(self) -> str:
        return " or ".join(measure.title for measure in self.measures)

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
    found: Findings = fitting(STUDY, record, where)
    # The average over one setting would repeat it.
    average = {} if len(found.settings) == 1 or found.average is None else found.average.methods
    labels = _labels(found.settings.values(), average)
    notes: list[str] = []
    return Study(
        directory=directory,
        name=found.name or directory.resolve().name,
        description=found.description,
        rule=found.rule,
        level=0.95 if found.level is None else found.level,
        settings=tuple(
            Setting(name, entry.title or name, entry, _first_runs(directory, name, labels, notes))
            for name, entry in found.settings.items()
        ),
        average=average,
        diagnostics={name: probe.model_dump(exclude_unset=True) for name, probe in found.diagnostics.items()},
        provenance=found.provenance or {},
        labels=labels,
        styles=style_indices(list(labels)),
        notes=tuple(notes),
    )


def _labels(settings: Iterable[records.Setting], average: Mapping[str, Average]) -> dict[str, str]:
    """Every method of the study with its shown name: the paper's where the study gives none."""
    found: dict[str, str] = {}
    for setting in settings:
        for name, method in setting.methods.items():
            if method.label or name not in found:
                found[name] = method.label or label(name)
    return found | {name: label(name) for name in average if name not in found}


def _first_runs(directory: Path, setting: str, methods: Iterable[str], notes: list[str]) -> tuple[Run, ...]:
    return tuple(run for method in methods if (run := _first_run(directory, setting, method, notes)))


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
