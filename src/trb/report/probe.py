"""The diagnostics in a probe.json as charts: continuation success, what budgets change, what SKD replaces.

`trb.studies.probe` writes that file, into a directory of its own or as an entry of study.json; every number in it
has an interval over problems already. Charts without a number are left out. This module also reads a probe's directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trb.records import PROBE
from trb.report.panels import Axis, Group, Panel, Quantity, Series, slug
from trb.report.reading import ReportError, Run, finite, fitting, interval_of, number, read_json
from trb.report.style import label, show, style_indices

CONTINUERS = ("student", "teacher")

_BUDGETS = (
    Quantity("reward", "Reward by budget", "", "Mean over rollouts"),
    Quantity("teacher_log_prob", "Teacher log-probability by budget", "nats", "Mean over sampled tokens"),
    Quantity("auroc", "AUROC by budget", "", "Mean log-ratio ranking right above wrong rollouts"),
    Quantity(
        "sequence_kl",
        "Sequence KL by budget",
        "nats",
        "Sum over a completion; dotted: its bound T·ε",
        bound="sequence_kl_bound",
        bound_name="bound",
    ),
    Quantity("length", "Length by budget", "tokens", "Mean over rollouts"),
    Quantity("teacher_entropy", "Teacher entropy by budget", "nats", "Mean over visited prefixes"),
    Quantity("teacher_weight", "Teacher weight by budget", "", "Mean over sampled tokens"),
    Quantity("accept_rate", "Accept rate by budget", "", "Student drafts kept by the sampler", format="percent"),
)
_REPLACED = Quantity("replaced", "Replaced by SKD", "", "Share of tokens outside the teacher's top-k", format="percent")


@dataclass(frozen=True)
class Probe:
    """A probe's directory: its record, its excerpts as a run for the viewer, and the names of their policies."""

    directory: Path
    record: Mapping[str, Any]
    run: Run
    notes: tuple[str, ...]


def read_probe(directory: str | Path) -> Probe:
    """Read DIRECTORY/probe.json; raises ReportError if it is malformed."""
    directory = Path(directory)
    record = fitting(PROBE, read_json(directory / PROBE), directory / PROBE)
    return Probe(directory, record, Run("probe", directory), ())


def policy_label(name: str) -> str:
    """A policy's shown name: the student's own law has no method."""
    return {"student": "Student", "teacher": "Teacher"}.get(name, label(name))


def policy_styles(names: Sequence[str]) -> dict[str, int]:
    """Style indices by policy; the student's own law looks like plain distillation, whose rollouts it draws."""
    found = style_indices(["opd" if name == "student" else name for name in names])
    return {name: found["opd" if name == "student" else name] for name in names}


def groups(record: Mapping[str, Any], name: str, where: str) -> tuple[Group, ...]:
    """The charts of one probe. `name` makes their ids unique; `where` names the record in error messages.

    Raises ReportError for entries of the wrong shape.
    """
    drawn = _Drawing(record, name, where)
    found = (
        ("Going on from a cut rollout", drawn.continuation()),
        ("Rollouts at each KL budget", drawn.budgets()),
        ("Interleaved teacher injection", drawn.replacement()),
    )
    return tuple(Group(title, tuple(panels)) for title, panels in found if panels)


def headline(record: Mapping[str, Any], where: str) -> str:
    """In how many cuts the teacher does better from the trust region's prefixes than from the student's own."""
    above = below = total = 0
    for entry in _entries(record.get("continuation"), "truncations", where):
        difference = _estimate(_inner(entry, ("difference", "trb", "teacher"), where), where)
        if difference is not None and difference[1] is not None:
            total += 1
            above += difference[1][0] > 0
            below += difference[1][1] < 0
    if not total:
        return "No continuation of cut rollouts has been measured."
    lengths = "the one length" if total == 1 else f"{total} lengths"
    return (
        f"Cut at {lengths} and continued by the teacher, prefixes of {label('trb')} succeed more often than the "
        f"student's own at {above}, less often at {below}, not resolved at {total - above - below}."
    )


def facts(record: Mapping[str, Any], where: str) -> str:
    """One sentence on what was measured."""
    problems = record.get("problems") or {}
    if not isinstance(problems, Mapping):
        raise ReportError(f"{where}: problems is {problems!r:.80}, expected an object of counts.")
    counts = [number(problems, name, f"{where}: problems") for name in problems]
    parts = [f"{show(sum(filter(None, counts)), 'count')} problems"] if counts else []
    if record.get("samples") is not None:
        parts.append(f"{show(number(record, 'samples', where), 'count')} rollouts of each")
    if record.get("kl_budget") is not None:
        parts.append(f"trust region of ε = {show(number(record, 'kl_budget', where))}")
    models = [f"{record[role]} as the {role}" for role in CONTINUERS if record.get(role)]
    return "; ".join([*models, ", ".join(parts)] if parts else models)


class _Drawing:
    """The charts of one record."""

    def __init__(self, record: Mapping[str, Any], name: str, where: str) -> None:
        self.record, self.where = record, where
        self.prefix = "-".join(filter(None, (slug(name), "probe")))
        level = number(record, "level", where)
        self.interval = f"{100 * (0.95 if level is None else level):g}% interval"

    def panel(self, quantity: Quantity, series: list[Series], axis: Axis, levels: Sequence[Any] = ()) -> list[Panel]:
        """A chart in a list, or none if there is nothing to draw."""
        drawn = tuple(one for one in series if any(value is not None for value in one.y))
        if not drawn:
            return []
        note = f"{self.interval} over problems, one pair of models"
        return [
            Panel(
                f"{self.prefix}-{slug(quantity.key)}",
                quantity,
                drawn,
                tuple(levels),
                axis,
                interval_name=self.interval,
                legend=len(drawn) > 1,
                note=note,
            )
        ]

    def continuation(self) -> list[Panel]:
        """Success by truncation length: for each continuer, and relative to the student's own prefixes."""
        entries = _entries(self.record.get("continuation"), "truncations", self.where)
        lengths = tuple(show(number(entry, "length", self.where), "count") for entry in entries)
        axis = Axis("cut after token", lengths, f"{self.prefix}-cut")
        policies, others = (_names(entries, key, self.where) for key in ("policies", "relative"))
        styles = policy_styles(policies)
        found: list[Panel] = []
        for continuer in CONTINUERS:
            quantity = Quantity(
                f"continued-{continuer}",
                f"Continued by the {continuer}",
                "",
                "Success after cutting rollouts of each policy",
                format="percent",
            )
            series = [
                self.series(name, policy_label(name), styles[name], entries, ("policies", name, "success", continuer))
                for name in policies
            ]
            found += self.panel(quantity, series, axis)
        for name in others:
            title = f"{policy_label(name)} prefixes, relative"
            quantity = Quantity(f"relative-{name}", title, "", "Success over that of the student's own")
            series = [
                self.series(continuer, f"by the {continuer}", style, entries, ("relative", name, continuer))
                for continuer, style in zip(CONTINUERS, (5, 6), strict=True)
            ]
            found += self.panel(quantity, series, axis, [("equal", 1.0)])
        ended = Quantity("ended", "Ended before the cut", "", "Rollouts counted as they stand", format="percent")
        series = [
            self.series(name, policy_label(name), styles[name], entries, ("policies", name, "ended"))
            for name in policies
        ]
        return found + self.panel(ended, series, axis)

    def budgets(self) -> list[Panel]:
        """What rollouts are like, by KL budget."""
        entries = _entries(self.record, "budgets", self.where)
        labels = tuple("∞" if (b := number(e, "kl_budget", self.where)) is None else show(b) for e in entries)
        axis = Axis("ε =", labels, f"{self.prefix}-budget")
        style = style_indices(["trb"])["trb"]
        found = []
        for quantity in _BUDGETS:
            series = self.series("trb", label("trb"), style, entries, (quantity.key,), quantity.bound)
            levels = [("chance", 0.5)] if quantity.key == "auroc" else []
            found += self.panel(quantity, [series], axis, levels)
        return found

    def replacement(self) -> list[Panel]:
        """The share of tokens that SKD replaces, by its top-k."""
        entries = _entries(self.record, "replacement", self.where)
        labels = tuple(show(number(entry, "teacher_top_k", self.where), "count") for entry in entries)
        axis = Axis("top-k =", labels, f"{self.prefix}-top-k")
        style = style_indices(["skd"])["skd"]
        return self.panel(_REPLACED, [self.series("skd", label("skd"), style, entries, ("replaced",))], axis)

    def series(
        self,
        name: str,
        shown: str,
        style: int,
        entries: Sequence[Mapping[str, Any]],
        path: tuple[str, ...],
        bound: str | None = None,
    ) -> Series:
        """One line: the estimate at `path` of every entry, or a plain number there."""
        estimates = [_estimate(_inner(entry, path, self.where), self.where) for entry in entries]
        ends = [interval for estimate in estimates if estimate for interval in [estimate[1]] if interval]
        bounds = [_estimate(entry.get(bound), self.where) if bound else None for entry in entries]
        return Series(
            name,
            shown,
            style,
            tuple(range(len(entries))),
            tuple(estimate[0] if estimate else None for estimate in estimates),
            low=tuple(e[1][0] if e and e[1] else None for e in estimates) if ends else (),
            high=tuple(e[1][1] if e and e[1] else None for e in estimates) if ends else (),
            bound=tuple(one[0] if one else None for one in bounds) if any(bounds) else (),
        )


Estimate = tuple[float | None, tuple[float, float] | None]


def _estimate(value: Any, where: str) -> Estimate | None:
    """Value and interval of an estimate; a bare number has no interval."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return finite(value, where), None
    return number(value, "value", where), interval_of(value, where)


def _inner(record: Mapping[str, Any], path: tuple[str, ...], where: str) -> Any:
    """What lies at `path`, None where a part of it is missing."""
    value: Any = record
    for key in path:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ReportError(f"{where}: {value!r:.80} holds no {key}, expected an object.")
        value = value.get(key)
    return value


def _names(entries: Sequence[Mapping[str, Any]], key: str, where: str) -> list[str]:
    """The keys of the objects that the entries have under `key`, each once."""
    found: dict[str, None] = {}
    for entry in entries:
        value = entry.get(key)
        if not isinstance(value, Mapping | None):
            raise ReportError(f"{where}: {key} is {value!r:.80}, expected an object.")
        found |= dict.fromkeys(value or ())
    return list(found)


def _entries(record: Any, key: str, where: str) -> list[Mapping[str, Any]]:
    """The list of objects under `key`, empty if it is missing."""
    value = _inner(record, (key,), where) if record is not None else None
    if not (isinstance(value, list | None) and all(isinstance(entry, Mapping) for entry in value or ())):
        raise ReportError(f"{where}: {key} is {value!r:.80}, expected a list of objects.")
    return value or []
