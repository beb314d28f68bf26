"""The diagnostics in a probe.json as charts: continuation success, what budgets change, what SKD replaces.

`trb.studies.probe` writes that file, into a directory of its own or as an entry of study.json; every number in it
has an interval over problems already. Charts without a number are left out. This module also reads a probe's directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trb import records
from trb.records import PROBE, Estimate, Truncation
from trb.report.panels import Axis, Group, Panel, Quantity, Series, slug
from trb.report.reading import Run, fitting, read_json
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
    """A probe's directory: its record, what the schema makes of it, and its excerpts as a run for the viewer."""

    directory: Path
    record: Mapping[str, Any]
    found: records.Probe
    run: Run


def read_probe(directory: str | Path) -> Probe:
    """Read DIRECTORY/probe.json; raises ReportError if it is malformed."""
    directory = Path(directory)
    record = read_json(directory / PROBE)
    return Probe(directory, record, fitting(PROBE, record, directory / PROBE), Run("probe", directory))


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
    drawn = _Drawing(fitting(PROBE, record, where), name)
    found = (
        ("Going on from a cut rollout", drawn.continuation()),
        ("Rollouts at each KL budget", drawn.budgets()),
        ("Interleaved teacher injection", drawn.replacement()),
    )
    return tuple(Group(title, tuple(panels)) for title, panels in found if panels)


def headline(found: records.Probe) -> str:
    """In how many cuts the teacher does better from the trust region's prefixes than from the student's own."""
    above = below = total = 0
    for cut in _cuts(found):
        difference = cut.difference.get("trb", {}).get("teacher")
        if difference and difference.interval:
            total += 1
            above += difference.interval[0] > 0
            below += difference.interval[1] < 0
    if not total:
        return "No continuation of cut rollouts has been measured."
    lengths = "the one length" if total == 1 else f"{total} lengths"
    return (
        f"Cut at {lengths} and continued by the teacher, prefixes of {label('trb')} succeed more often than the "
        f"student's own at {above}, less often at {below}, not resolved at {total - above - below}."
    )


def facts(found: records.Probe) -> str:
    """One sentence on what was measured."""
    counts = found.problems.values()
    parts = [f"{show(sum(filter(None, counts)), 'count')} problems"] if counts else []
    if found.samples is not None:
        parts.append(f"{show(found.samples, 'count')} rollouts of each")
    if "kl_budget" in found.model_fields_set:
        parts.append(f"trust region of ε = {_budget(found.kl_budget)}")
    models = [f"{model} as the {role}" for role in CONTINUERS if (model := getattr(found, role))]
    return "; ".join([*models, ", ".join(parts)] if parts else models)


class _Drawing:
    """The charts of one record."""

    def __init__(self, found: records.Probe, name: str) -> None:
        self.found = found
        self.prefix = "-".join(filter(None, (slug(name), "probe")))
        self.interval = f"{100 * (0.95 if found.level is None else found.level):g}% interval"

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
        cuts = _cuts(self.found)
        lengths = tuple(show(cut.length, "count") for cut in cuts)
        axis = Axis("cut after token", lengths, f"{self.prefix}-cut")
        policies = dict.fromkeys(name for cut in cuts for name in cut.policies)
        parts = {name: [cut.policies.get(name) for cut in cuts] for name in policies}
        found: list[Panel] = []
        for continuer in CONTINUERS:
            quantity = Quantity(
                f"continued-{continuer}",
                f"Continued by the {continuer}",
                "",
                "Success after cutting rollouts of each policy",
                format="percent",
            )
            success = {
                name: [part.success.get(continuer) if part else None for part in row] for name, row in parts.items()
            }
            found += self.panel(quantity, _lines(success), axis)
        for name in dict.fromkeys(name for cut in cuts for name in cut.relative):
            title = f"{policy_label(name)} prefixes, relative"
            quantity = Quantity(f"relative-{name}", title, "", "Success over that of the student's own")
            ratios = [cut.relative.get(name) or {} for cut in cuts]
            series = [
                _series(continuer, f"by the {continuer}", style, [ratio.get(continuer) for ratio in ratios])
                for continuer, style in zip(CONTINUERS, (5, 6), strict=True)
            ]
            found += self.panel(quantity, series, axis, [("equal", 1.0)])
        ended = Quantity("ended", "Ended before the cut", "", "Rollouts counted as they stand", format="percent")
        shares = {name: [part.ended if part else None for part in row] for name, row in parts.items()}
        return found + self.panel(ended, _lines(shares), axis)

    def budgets(self) -> list[Panel]:
        """What rollouts are like, by KL budget."""
        points = self.found.budgets or []
        values = [_value(point.get("kl_budget")) for point in points]
        axis = Axis("ε =", tuple(map(_budget, values)), f"{self.prefix}-budget")
        style = style_indices(["trb"])["trb"]
        found = []
        for quantity in _BUDGETS:
            bounds = [point.get(quantity.bound or "") for point in points]
            series = _series("trb", label("trb"), style, [point.get(quantity.key) for point in points], bounds)
            levels = [("chance", 0.5)] if quantity.key == "auroc" else []
            found += self.panel(quantity, [series], axis, levels)
        return found

    def replacement(self) -> list[Panel]:
        """The share of tokens that SKD replaces, by its top-k."""
        points = self.found.replacement or []
        labels = tuple(show(_value(point.get("teacher_top_k")), "count") for point in points)
        axis = Axis("top-k =", labels, f"{self.prefix}-top-k")
        style = style_indices(["skd"])["skd"]
        return self.panel(_REPLACED, [_series("skd", label("skd"), style, [p.get("replaced") for p in points])], axis)


def _cuts(found: records.Probe) -> list[Truncation]:
    return (found.continuation and found.continuation.truncations) or []


def _budget(value: float | None) -> str:
    """A KL budget, infinite where the file has null."""
    return "∞" if value is None else show(value)


def _value(estimate: Estimate | None) -> float | None:
    return estimate.value if estimate else None


def _lines(points: Mapping[str, Sequence[Estimate | None]]) -> list[Series]:
    """A line for each policy."""
    styles = policy_styles(list(points))
    return [_series(name, policy_label(name), styles[name], estimates) for name, estimates in points.items()]


def _series(
    name: str,
    shown: str,
    style: int,
    estimates: Sequence[Estimate | None],
    bounds: Sequence[Estimate | None] = (),
) -> Series:
    """One line through the estimates, with their intervals where there are any."""
    intervals = [estimate.interval if estimate else None for estimate in estimates]
    low, high = zip(*((ends or (None, None)) for ends in intervals), strict=True) if any(intervals) else ((), ())
    return Series(
        name,
        shown,
        style,
        tuple(range(len(estimates))),
        tuple(map(_value, estimates)),
        low=low,
        high=high,
        bound=tuple(map(_value, bounds)) if any(bounds) else (),
    )
