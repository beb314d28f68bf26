"""The sentences at the top of a study's page, computed from its numbers.

A difference is called resolved only if its interval excludes zero; whether it stays so after the correction for several
comparisons is said beside it. Nothing is claimed from two separate intervals here: methods share seeds and problems,
and the paired difference is the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

from trb.measures import Measure, Scored
from trb.records import Average, Difference, Method
from trb.report.study import BASELINE, OURS, Study
from trb.report.style import label, show, show_range


@dataclass(frozen=True)
class Scope:
    """What the headline speaks about: the average, or one setting where there is no average yet."""

    where: str
    scores: dict[str, Average] | dict[str, Method]
    measure: Measure

    @property
    def difference(self) -> Difference | None:
        """Of the method of this package to plain distillation."""
        ours = self.scores.get(OURS)
        return ours.difference_to_opd if ours else None


def scope(study: Study) -> Scope | None:
    """The average over all settings if it is on record, else the first setting with a score; None without any."""
    averages = {name: entry for name, entry in study.average.items() if entry.value is not None}
    if averages:
        return Scope(f"Averaged over {len(study.settings)} settings", averages, study.measures[0])
    for setting in study.settings:
        methods = {name: method for name, method in setting.found.methods.items() if method.value is not None}
        if methods:
            where = f"In {setting.title}" + (", the first of the settings" if len(study.settings) > 1 else "")
            return Scope(where, methods, setting.measure)
    return None


def headline(study: Study) -> str:
    """Which method scores best, and whether the difference between TRB and plain distillation is resolved."""
    found = scope(study)
    if found is None:
        return "No method has been scored on the test problems yet."
    measure = found.measure
    best = measure.best(score.value for score in found.scores.values())
    name = next(name for name, score in found.scores.items() if score.value == best)
    score, rank = found.scores[name], f"{measure.superlative}, " if len(found.scores) > 1 else ""
    first = f"{found.where}, {study.labels[name]} scores {rank}{_shown(study, score)}"
    if OURS not in found.scores:
        return f"{first}; {label(OURS)} has no score yet."
    if BASELINE not in found.scores:
        return f"{first}; there is no {label(BASELINE)} to compare with yet."
    # Said once what the brackets are, unless the score had none.
    interval = "" if score.interval else f"{study.interval_name} "
    return f"{first}; {_verdict(study, found, interval, ours_first=name == OURS)}."


def _verdict(study: Study, found: Scope, interval: str, ours_first: bool) -> str:
    difference, measure = found.difference, found.measure
    ours, baseline = study.labels.get(OURS, label(OURS)), study.labels.get(BASELINE, label(BASELINE))
    subject = f"its difference to {baseline}" if ours_first else f"{ours}'s difference to {baseline}"
    if difference is None or difference.estimate is None:
        return f"{subject} has not been computed"
    size = f"{subject}, {show(difference.estimate, measure.difference_format)} {measure.unit}"
    if difference.interval is None:
        return f"{size}, cannot be judged without an interval"
    low, high = difference.interval
    size += f" ({interval}{show_range(difference.interval, measure.difference_format)})"
    if low > 0 or high < 0:
        return f"{size}, is resolved: the interval excludes zero"
    return f"{size}, is not resolved: the interval includes zero"


def context(study: Study) -> str:
    """The correction for several comparisons, the other methods that are resolved, and the ends of the range."""
    found = scope(study)
    parts = [study.description] if study.description else []
    if found and found.difference and found.difference.p_value_holm is not None:
        resolved = found.difference.p_value_holm < 1 - study.level
        p_holm = show(found.difference.p_value_holm, "p")
        parts.append(
            f"After correction for the comparisons with {label(BASELINE)} (Holm), p {'' if '<' in p_holm else '= '}"
            f"{p_holm}: {'still' if resolved else 'not'} resolved."
        )
    scored = {name for setting in study.settings for name in setting.found.methods}
    missing = [setting.title for setting in study.settings if setting.found.methods.keys() < scored]
    if missing:
        parts.append(f"Not every method has been scored yet in {', '.join(missing)}.")
    return " ".join(parts)


def _shown(study: Study, score: Scored) -> str:
    measure = score.measure
    interval = f" ({study.interval_name} {show_range(score.interval, measure.format)})" if score.interval else ""
    return f"{show(score.value, measure.format)} {measure.phrase}{interval}"
