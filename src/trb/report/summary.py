"""The sentences and tables at the top and the end of the page: headline, scores, configuration, provenance.

The headline claims a difference between two scores only if the paired difference on the same problems is resolved
(`trb.report.outcomes`). Without results per problem it must do with the two 95% intervals, and claims one only if they
do not touch: a rule that resolves less.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from trb.measures import PASS_AT_1
from trb.report.outcomes import FEWEST_CHANGES, Comparisons, Paired, by_score
from trb.report.reading import REFERENCES, Run, Score, Source
from trb.report.style import MINUS, label, show, show_range, style_indices
from trb.safety.secrets import HIDDEN, hide_options, names_secret
from trb.training.methods import BUDGET_SCHEDULES, CHOICES, every_knob, knobs_of

Verdict = Literal["above", "below", "unresolved", "unknown"]

_UNSET, _UNREAD = "not set", "–"


@dataclass(frozen=True)
class Row:
    """One line of the summary table; `style` is None for the student and the teacher."""

    label: str
    role: Literal["student", "method", "teacher"]
    style: int | None
    score: Score


@dataclass(frozen=True)
class ConfigTable:
    """Flattened options as (dotted key, text), of `differing` ones a text for each of the runs that `columns` names.
    What is known to be as by default in all runs is in `defaults` and in neither of the others."""

    columns: tuple[str, ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]
    shared: tuple[tuple[str, str], ...]
    defaults: tuple[tuple[str, str], ...]


def compare(first: Score, second: Score, pair: Paired | None = None) -> Verdict:
    """Whether `first` lies above or below `second`: as their paired difference says, or else their intervals, which may
    touch ("unresolved").

    "unknown" if there is no such difference and a number or an interval is missing.
    """
    if pair is not None:
        return pair.verdict
    if first.interval is None or second.interval is None or None in (first.value, second.value):
        return "unknown"
    if first.measure is not second.measure:
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


def headline(source: Source, pairs: Comparisons | None = None) -> str:
    """One plain sentence on the result, computed from the scores and their paired differences."""
    pairs, names = pairs or Comparisons(), by_score(source)
    if not names:
        return _progress(source)
    best, *others = [(name, source.scores[name]) for name in names]
    if not others:
        return _against_student(*best, source.scores.get("student"), pairs.find(best[0], "student"))
    if len(others) == 1:
        return _between_two(best, others[0], pairs.find(best[0], others[0][0]))
    return _between_many(best, others, pairs)


def context(source: Source, pairs: Comparisons | None = None) -> str:
    """Where the student started and where the teacher stands; empty if neither is on record."""
    pairs, names = pairs or Comparisons(), by_score(source)
    student, teacher = (source.scores.get(name) for name in REFERENCES)
    parts = []
    if student is not None and student.value is not None and len(names) != 1:
        parts.append(f"the student started at {show(student.value, student.measure.format)}")
    # Its divergence from itself is zero, and says nothing.
    if teacher is not None and teacher.value is not None and teacher.measure is PASS_AT_1:
        parts.append(f"the teacher scores {show(teacher.value, 'percent')}")
    sentences = [_sentence(_join(parts))] if parts else []
    if student is not None and len(names) > 1:
        verdicts = {
            name: compare(score, student, pairs.find(name, "student"))
            for name, score in source.scores.items()
            if name in names
        }
        worse = ("below", "Below the student") if student.measure.higher_is_better else ("above", "Above the student")
        for verdict, start in (("unresolved", "Not resolved from the student itself"), worse):
            if found := [label(name) for name in verdicts if verdicts[name] == verdict]:
                sentences.append(f"{start}: {_join(found)}.")
    return " ".join(sentences)


def config_table(runs: Sequence[Run], labels: Mapping[str, str] | None = None) -> ConfigTable:
    """The resolved configurations, flattened to dotted keys, without the knobs that no method here reads; secrets are
    hidden."""
    known = [run for run in runs if run.config]
    unread = [_unread(run.config) for run in known]
    flat = [
        {path: text for key, item in run.config.items() if key not in skipped for path, text in flatten({key: item})}
        for run, skipped in zip(known, unread, strict=True)
    ]
    differing: list[tuple[str, tuple[str, ...]]] = []
    shared: list[tuple[str, str]] = []
    defaults: list[tuple[str, str]] = []
    for path in dict.fromkeys(path for config in flat for path in config):
        key = path.split(".")[0]
        texts = tuple(
            config.get(path, _UNREAD if path in skipped else _UNSET)
            for config, skipped in zip(flat, unread, strict=True)
        )
        found = {config[path] for config in flat if path in config}
        # Of a run that did not write its defaults down, nothing is known to be one.
        by_default = all(key in run.defaults for run, config in zip(known, flat, strict=True) if path in config)
        if len(found) == 1 and by_default and key not in CHOICES[:1]:
            defaults.append((path, found.pop()))
        elif len(set(texts)) == 1:
            shared.append((path, texts[0]))
        else:
            differing.append((path, texts))
    columns = tuple((labels or {}).get(run.name, label(run.name)) for run in known)
    return ConfigTable(columns, tuple(differing), tuple(shared), tuple(defaults))


def _unread(config: Mapping[str, Any]) -> frozenset[str]:
    """The knobs that a run's method does not read; none where the method is not known here."""
    chosen = {key: config.get(key) for key in CHOICES}
    # An older run has no budget_schedule.
    kinds = [chosen["budget_schedule"]] if chosen["budget_schedule"] else [*BUDGET_SCHEDULES]
    try:
        read = knobs_of(SimpleNamespace(**chosen | {"budget_schedule": kind}) for kind in kinds)
    except (KeyError, TypeError):
        return frozenset()
    return frozenset(every_knob() - read)


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) for every leaf of nested mappings; values of keys that name a secret are hidden."""
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            found += flatten(item, f"{path}.")
        else:
            found.append((path, HIDDEN if item and names_secret(path) else _text(item)))
    return found


def provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of everything recorded about where the results come from, secrets hidden."""
    return [(key, hide_options(text)) for key, text in flatten(record)]


def _progress(source: Source) -> str:
    steps = [run.last_step for run in source.runs if run.last_step is not None]
    if not steps:
        return "No steps have been recorded yet."
    return f"Training has reached step {max(steps)}; no evaluation has been recorded yet."


def _against_student(name: str, score: Score, student: Score | None, pair: Paired | None) -> str:
    result = f"{label(name)} reaches {_shown(score)}"
    if student is None or student.value is None:
        return f"{result}; there is no evaluation of the student before training to compare with."
    before = f"the student's {_again(student, score)} before training"
    verdict = compare(score, student, pair)
    if verdict == "unknown":
        return f"{result} against {before}; without both intervals the difference cannot be judged."
    if verdict == "unresolved":
        return f"{result} against {before}: {_unresolved(pair)}."
    why = f"{_points(pair)} {_same_problems(pair)}" if pair else "the intervals do not overlap"
    return f"{result}, {verdict} {before}: {why}."


def _between_two(best: tuple[str, Score], other: tuple[str, Score], pair: Paired | None) -> str:
    name = label(best[0])
    both = f"{name} scores {_shown(best[1])} and {label(other[0])} {_again(other[1], best[1])}"
    verdict = compare(best[1], other[1], pair)
    if verdict == "unknown":
        return f"{both}; without both intervals the difference cannot be judged."
    if verdict == "unresolved":
        return f"{both}: {_unresolved(pair)}."
    if pair:
        return f"{both}: {name} is ahead by {_points(pair).lstrip('+' + MINUS)} {_same_problems(pair)}."
    return f"{both}: the intervals do not overlap, so {name} is ahead."


def _between_many(best: tuple[str, Score], others: Sequence[tuple[str, Score]], pairs: Comparisons) -> str:
    found = {other: pairs.find(best[0], other) for other, _ in others}
    verdicts = {label(other): compare(best[1], score, found[other]) for other, score in others}
    measure = best[1].measure
    ahead = "above" if measure.higher_is_better else "below"
    above = [other for other, verdict in verdicts.items() if verdict == ahead]
    close = [other for other, verdict in verdicts.items() if verdict == "unresolved"]
    unknown = [other for other, verdict in verdicts.items() if verdict == "unknown"]
    start = f"Of {len(others) + 1} methods {label(best[0])} is {measure.superlative} with {_shown(best[1])}"
    paired = all(found.values())
    if len(above) == len(others):
        why = "and on the same problems ahead of every other" if paired else "and its interval overlaps no other"
        return f"{start}, {why}."
    if len(close) == len(others):
        why = "on the same problems" if paired else "its interval overlaps every other, so"
        return f"{start}, but {why} the lead is not resolved."
    parts = []
    if above:
        parts.append(f"clear of {_join(above)}")
    if close:
        parts.append(f"not resolved from {_join(close)}{'' if paired else ', whose intervals overlap it'}")
    if unknown:
        parts.append(f"not comparable with {_join(unknown)} for want of intervals")
    return f"{start}: {'; '.join(parts)}{' on the same problems' if paired else ''}."


def _unresolved(pair: Paired | None) -> str:
    if pair is None:
        return (
            "the intervals overlap, and without results per problem on record that is all there is to judge by, so the "
            "difference is not resolved"
        )
    if (changed := pair.gained + pair.lost) < FEWEST_CHANGES:
        return f"only {changed} of {pair.problems:,} problems came out differently, so the difference is not resolved"
    return f"the difference is not resolved: {_points(pair)} {_same_problems(pair)}"


def _points(pair: Paired) -> str:
    return f"{show(pair.estimate, pair.measure.difference_format)} {pair.measure.unit}"


def _same_problems(pair: Paired) -> str:
    interval = show_range(pair.interval, pair.measure.difference_format)
    return f"on the same {pair.problems:,} problems (95% interval {interval})"


def _shown(score: Score) -> str:
    measure = score.measure
    return f"{show(score.value, measure.format)} {measure.phrase}{_interval(score, '95% interval ')}"


def _again(score: Score, first: Score) -> str:
    """A second score in a sentence: what its brackets mean was said with the first, if that had an interval."""
    return show(score.value, score.measure.format) + _interval(score, "" if first.interval else "95% interval ")


def _interval(score: Score, name: str) -> str:
    if score.interval is None:
        return ""
    return f" ({name}{show_range(score.interval, score.measure.format)})"


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
