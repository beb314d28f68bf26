"""The sentences and tables at the top and the end of the page: headline, scores, configuration, provenance.

The headline claims a difference between two scores only if their 95% intervals do not touch, and says so when
they do. That rule is conservative: a paired comparison on the same problems can resolve more, and is not
attempted here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trb.report.reading import REFERENCES, Run, Score, Source
from trb.report.style import label, show, style_indices

Verdict = Literal["above", "below", "unresolved", "unknown"]

_SECRET = r"(?:api_key|hub_token|access_token|auth_token|hf_token|password|secret)"
_SECRET_KEY = re.compile(rf"(?:^|[._-]){_SECRET}$", re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"(--?[\w.-]*{_SECRET}[= ]+)(\S+)", re.IGNORECASE)
_HIDDEN = "(hidden)"
_UNSET = "not set"


@dataclass(frozen=True)
class Row:
    """One line of the summary table; `style` is None for the student and the teacher."""

    label: str
    role: Literal["student", "method", "teacher"]
    style: int | None
    score: Score


@dataclass(frozen=True)
class ConfigTable:
    """Flattened options: `differing` and `shared` are (dotted key, one text per run); `columns` names the
    runs."""

    columns: tuple[str, ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]
    shared: tuple[tuple[str, str], ...]


def compare(first: Score, second: Score) -> Verdict:
    """Whether `first` lies above or below `second`, or their intervals touch ("unresolved").

    "unknown" if a number or an interval is missing.
    """
    if first.interval is None or second.interval is None or None in (first.pass_at_1, second.pass_at_1):
        return "unknown"
    if first.interval[0] > second.interval[1]:
        return "above"
    if first.interval[1] < second.interval[0]:
        return "below"
    return "unresolved"


def title(source: Source) -> str:
    """What the page is about: the methods compared, or the run's method."""
    return _join([label(run.name) for run in source.runs])


def rows(source: Source) -> tuple[Row, ...]:
    """The summary table: student before training, each method in the order of results.json, teacher."""
    methods = [name for name in source.scores if name not in REFERENCES]
    styles = style_indices([run.name for run in source.runs])
    extra = style_indices([*styles, *(name for name in methods if name not in styles)])
    found = []
    if "student" in source.scores:
        found.append(Row("Student, before", "student", None, source.scores["student"]))
    for name in methods:
        found.append(Row(label(name), "method", styles.get(name, extra[name]), source.scores[name]))
    if "teacher" in source.scores:
        found.append(Row("Teacher", "teacher", None, source.scores["teacher"]))
    return tuple(found)


def headline(source: Source) -> str:
    """One plain sentence on the result, computed from the scores."""
    scored = _scored_methods(source)
    if not scored:
        return _progress(source)
    if len(scored) == 1:
        return _against_student(*scored[0], source.scores.get("student"))
    best, *others = sorted(scored, key=lambda item: -(item[1].pass_at_1 or 0.0))
    return _between_two(best, others[0]) if len(others) == 1 else _between_many(best, others)


def context(source: Source) -> str:
    """Where the student started and where the teacher stands; empty if neither is on record."""
    student, teacher = (source.scores.get(name) for name in REFERENCES)
    parts = []
    if student is not None and student.pass_at_1 is not None and len(_scored_methods(source)) != 1:
        parts.append(f"the student started at {show(student.pass_at_1, 'percent')}")
    if teacher is not None and teacher.pass_at_1 is not None:
        parts.append(f"the teacher scores {show(teacher.pass_at_1, 'percent')}")
    sentences = [_sentence(_join(parts))] if parts else []
    if student is not None and len(scored := _scored_methods(source)) > 1:
        unresolved = [name for name, score in scored if compare(score, student) == "unresolved"]
        below = [name for name, score in scored if compare(score, student) == "below"]
        if unresolved:
            sentences.append(f"Not resolved from the student itself: {_join(unresolved)}.")
        if below:
            sentences.append(f"Below the student: {_join(below)}.")
    return " ".join(sentences)


def config_table(runs: Sequence[Run], labels: Mapping[str, str] | None = None) -> ConfigTable:
    """The resolved configurations, flattened to dotted keys; secrets are hidden, and in comparisons the
    options that differ come apart from those all runs share."""
    known = [run for run in runs if run.config]
    flat = [dict(flatten(run.config)) for run in known]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    texts = {key: tuple(config.get(key, _UNSET) for config in flat) for key in keys}
    return ConfigTable(
        columns=tuple((labels or {}).get(run.name, label(run.name)) for run in known),
        differing=tuple((key, values) for key, values in texts.items() if len(set(values)) > 1),
        shared=tuple((key, values[0]) for key, values in texts.items() if len(set(values)) == 1),
    )


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) for every leaf of nested mappings; values of keys that name a secret are hidden."""
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            found += flatten(item, f"{path}.")
        else:
            found.append((path, _HIDDEN if item and _SECRET_KEY.search(path) else _text(item)))
    return found


def provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of everything recorded about where the results come from, secrets hidden."""
    return [(key, _SECRET_FLAG.sub(rf"\1{_HIDDEN}", text)) for key, text in flatten(record)]


def _scored_methods(source: Source) -> list[tuple[str, Score]]:
    return [
        (label(name), score)
        for name, score in source.scores.items()
        if name not in REFERENCES and score.pass_at_1 is not None
    ]


def _progress(source: Source) -> str:
    steps = [run.last_step for run in source.runs if run.last_step is not None]
    if not steps:
        return "No steps have been recorded yet."
    return f"Training has reached step {max(steps)}; no evaluation has been recorded yet."


def _against_student(name: str, score: Score, student: Score | None) -> str:
    result = f"{name} reaches {_pass_at_1(score)}"
    if student is None or student.pass_at_1 is None:
        return f"{result}; there is no evaluation of the student before training to compare with."
    before = f"the student's {_again(student, score)} before training"
    verdict = compare(score, student)
    if verdict == "unknown":
        return f"{result} against {before}; without both intervals the difference cannot be judged."
    if verdict == "unresolved":
        return f"{result} against {before}: the intervals overlap, so the difference is not resolved."
    return f"{result}, {verdict} {before}: the intervals do not overlap."


def _between_two(best: tuple[str, Score], other: tuple[str, Score]) -> str:
    (name, score), (other_name, other_score) = best, other
    both = f"{name} scores {_pass_at_1(score)} and {other_name} {_again(other_score, score)}"
    verdict = compare(score, other_score)
    if verdict == "unknown":
        return f"{both}; without both intervals the difference cannot be judged."
    if verdict == "unresolved":
        return f"{both}: the intervals overlap, so the difference is not resolved."
    return f"{both}: the intervals do not overlap, so {name} is ahead."


def _between_many(best: tuple[str, Score], others: Sequence[tuple[str, Score]]) -> str:
    name, score = best
    verdicts = {other: compare(score, other_score) for other, other_score in others}
    above = [other for other, verdict in verdicts.items() if verdict == "above"]
    close = [other for other, verdict in verdicts.items() if verdict == "unresolved"]
    unknown = [other for other, verdict in verdicts.items() if verdict == "unknown"]
    start = f"Of {len(others) + 1} methods {name} is highest with {_pass_at_1(score)}"
    if len(above) == len(others):
        return f"{start}, and its interval overlaps no other."
    if len(close) == len(others):
        return f"{start}, but its interval overlaps every other, so the lead is not resolved."
    parts = []
    if above:
        parts.append(f"clear of {_join(above)}")
    if close:
        parts.append(f"not resolved from {_join(close)}, whose intervals overlap it")
    if unknown:
        parts.append(f"not comparable with {_join(unknown)} for want of intervals")
    return f"{start}: {'; '.join(parts)}."


def _pass_at_1(score: Score) -> str:
    return f"{show(score.pass_at_1, 'percent')} pass@1{_interval(score, '95% interval ')}"


def _again(score: Score, first: Score) -> str:
    """A second score in a sentence: what its brackets mean was said with the first, if that had an interval."""
    return show(score.pass_at_1, "percent") + _interval(score, "" if first.interval else "95% interval ")


def _interval(score: Score, name: str) -> str:
    if score.interval is None:
        return ""
    low, high = (f"{100 * end:.1f}" for end in score.interval)
    return f" ({name}{low} to {high})"


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
