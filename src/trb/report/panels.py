"""What the charts show: which quantity, from which key, as which series.

Pure data, drawn by `svg` and `figures`.

A quantity that no run recorded gives no panel; a null or NaN point stays None, a gap. Values are never
changed here: smoothing (`smoothed`) and thinning (`thinned`) are separate, and say so on the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trb.measures import PASS_AT_1, Measure
from trb.report.reading import REFERENCES, Run, Source, Step, number
from trb.report.style import Format, label, style_indices

Values = tuple[float | None, ...]


@dataclass(frozen=True)
class Axis:
    """What lies along x. With `labels`, x counts them from 0: values that are not evenly spaced, such as budgets.
    Charts of one `group` are read together and share their step range."""

    name: str = "step"
    labels: tuple[str, ...] = ()
    group: str = ""


STEPS = Axis()


@dataclass(frozen=True)
class Quantity:
    """One chart's subject. `smooth` is for noisy quantities only: smoothing one that follows the schedule
    would draw a warm-up that ends where it does not.
    `held_out` reads held_out.jsonl instead of metrics.jsonl. `bound` is the key of an upper bound drawn beside it."""

    key: str
    title: str
    unit: str
    caption: str
    format: Format = "number"
    smooth: bool = False
    held_out: bool = False
    bound: str | None = None
    bound_name: str = ""


def capitalised(title: str) -> str:
    """The title of a measure as it begins a sentence or a column."""
    return title if title.startswith(PASS_AT_1.title) else title[0].upper() + title[1:]


def score_quantity(measure: Measure, of: str = "", caption: str = "") -> Quantity:
    """A chart of scores; `of` says of which problems."""
    unit = "" if measure is PASS_AT_1 else "nats"
    return Quantity(
        measure.key,
        capitalised(measure.title) + (of and f", {of}"),
        unit,
        measure.caption + caption,
        format=measure.format,
    )


OUTCOME = (
    Quantity("trb/reward", "Reward", "", "Mean over the step's rollouts; logged, never trained on", smooth=True),
    Quantity("trb/teacher_log_prob", "Teacher log-probability", "nats", "Mean over visited tokens", smooth=True),
    Quantity("trb/teacher_entropy", "Teacher entropy", "nats", "Mean over visited prefixes", smooth=True),
    Quantity("trb/completion_length", "Completion length", "tokens", "Mean, stop token included", smooth=True),
    Quantity(
        "trb/stop_rate",
        "Stop rate",
        "",
        "Completions that ended by themselves",
        format="percent",
        smooth=True,
    ),
)
BEHAVIOR = (
    Quantity("trb/kl_budget", "KL budget ε", "nats", "Allowed KL(μ ‖ student) at a prefix"),
    Quantity("trb/share", "Share of blended rollouts", "", "The others are the student's own", format="percent"),
    Quantity("trb/gap", "Gap left", "", "Reverse KL, smoothed, relative to step 0; the budget falls with it"),
    Quantity("trb/teacher_weight", "Teacher weight β", "", "Mean over visited tokens; 0 student, 1 teacher"),
    Quantity(
        "trb/kl_student",
        "KL(μ ‖ student)",
        "nats",
        "Mean over visited prefixes; dotted: the budget",
        bound="trb/kl_budget",
        bound_name="budget",
    ),
    Quantity("trb/kl_teacher", "KL(μ ‖ teacher)", "nats", "Mean over visited prefixes"),
    Quantity(
        "trb/sequence_kl",
        "Sequence KL",
        "nats",
        "Sum over a completion; dotted: its bound T·ε",
        bound="trb/sequence_kl_bound",
        bound_name="bound",
    ),
    Quantity("trb/accept_rate", "Accept rate", "", "Student drafts kept by the sampler", format="percent"),
)
HELD_OUT = (
    Quantity("loss", "Held-out loss", "", "Reverse KL on student rollouts for held-out prompts", held_out=True),
    Quantity(
        "trb/teacher_log_prob",
        "Held-out teacher log-probability",
        "nats",
        "Of the student's own tokens on held-out prompts",
        held_out=True,
    ),
)
OPTIMIZER = (
    Quantity("loss", "Loss", "", "Training loss, token mean", smooth=True),
    Quantity(
        "trb/support_mass", "Support mass", "", "Student probability of the loss's top-k", format="percent", smooth=True
    ),
    Quantity("grad_norm", "Gradient norm", "", "Before clipping", smooth=True),
    Quantity("learning_rate", "Learning rate", "", "As scheduled"),
    Quantity("step_time", "Step time", "seconds", "Wall clock of one optimizer step"),
)


# Of each of several teachers: title and the rest of a quantity, by the beginning of its key.
OF_A_TEACHER: dict[str, tuple[str, dict[str, Any]]] = {
    "trb/teacher_reverse_kl/": (
        "Reverse KL to",
        {"unit": "nats", "caption": "Mean over visited tokens of its rows", "smooth": True},
    ),
    "trb/teacher_accept_rate/": (
        "Accept rate,",
        {"unit": "", "caption": "Student drafts kept beside this teacher", "format": "percent"},
    ),
    "trb/teacher_share/": (
        "Share of rows,",
        {"unit": "", "caption": "Of the step's rollouts", "format": "percent", "smooth": True},
    ),
}
MOST_TEACHERS = 8


@dataclass(frozen=True)
class Series:
    """One method's line: `x` steps (or places on the panel's axis), `y` values (None: a gap); `low`, `high`, `bound`
    parallel to `y` or empty."""

    method: str
    label: str
    style: int
    x: tuple[int, ...]
    y: Values
    low: Values = ()
    high: Values = ()
    bound: Values = ()


@dataclass(frozen=True)
class Panel:
    """One chart. `id` is a slug, unique on the page; `levels` are named horizontal reference lines; `interval_name`
    says what `low` and `high` of its series are; `legend` asks for one of its own; `note` says what was averaged."""

    id: str
    quantity: Quantity
    series: tuple[Series, ...]
    levels: tuple[tuple[str, float], ...] = ()
    axis: Axis = STEPS
    interval_name: str = "95% interval"
    legend: bool = False
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def groups(source: Source) -> tuple[Group, ...]:
    """Every chart of a source, grouped; quantities without a single number, and empty groups, are left
    out."""
    styles = style_indices([run.name for run in source.runs])
    found = (
        ("Outcome", (*_scores(source, styles), *_panels(source.runs, OUTCOME, styles))),
        ("Held-out prompts", _panels(source.runs, HELD_OUT, styles)),
        ("Behavior policy", _panels(source.runs, BEHAVIOR, styles)),
        ("Teachers", _teachers_panels(source.runs, styles)),
        ("Optimizer", _panels(source.runs, OPTIMIZER, styles)),
    )
    return tuple(Group(title, panels) for title, panels in found if panels)


def smoothed(values: Sequence[float | None], window: int) -> Values:
    """Smooth by a straight line fitted to the nearest `window` points; gaps stay gaps and carry no weight.

    In the interior this is nearly a centred moving mean; at the ends, unlike one, it neither lags nor
    flattens.
    """
    reach = window // 2
    result: list[float | None] = []
    for index, value in enumerate(values):
        start = max(0, min(index - reach, len(values) - 2 * reach - 1))
        near = [(i - index, v) for i, v in enumerate(values[start : start + 2 * reach + 1], start) if v is not None]
        result.append(None if value is None else _line_at_zero(near))
    return tuple(result)


def _line_at_zero(points: Sequence[tuple[int, float]]) -> float:
    """The least-squares line through (offset, value) points, at offset 0; their mean if they share one
    offset."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_y - slope * mean_x


def thinned(values: Sequence[float | None], limit: int) -> list[int]:
    """Indices of at most `limit` points that keep the shape: the lowest and the highest of each bin, gaps
    kept.

    Every kept point is a recorded one, so that a spike of one step survives.
    """
    if len(values) <= limit:
        return list(range(len(values)))
    bins = max(1, (limit - 2) // 3)
    kept = {0, len(values) - 1}
    for index in range(bins):
        inside = range(index * len(values) // bins, (index + 1) * len(values) // bins)
        numbers = {i: v for i in inside if (v := values[i]) is not None}
        if numbers:
            kept |= {min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)}
        kept |= set([i for i in inside if values[i] is None][:1])
    return sorted(kept)


def _teachers_panels(runs: Sequence[Run], styles: dict[str, int]) -> tuple[Panel, ...]:
    """The first few of several teachers, by their names in the metrics."""
    keys = dict.fromkeys(key for run in runs for record in run.metrics for key in record.values)
    found = []
    for start, (title, rest) in OF_A_TEACHER.items():
        names = [key.removeprefix(start) for key in keys if key.startswith(start)][:MOST_TEACHERS]
        for place, name in enumerate(names, start=1):
            panel = _panel(runs, Quantity(start + name, f"{title} {name[:40]}", **rest), styles)
            own = f"{slug(start.removeprefix('trb/'))}-{place}-{slug(name)}".rstrip("-")
            found.append(replace(panel, id=own))  # names may differ in what a slug leaves out
    return tuple(panel for panel in found if panel.series)


def _panels(runs: Sequence[Run], quantities: Sequence[Quantity], styles: dict[str, int]) -> tuple[Panel, ...]:
    panels = (_panel(runs, quantity, styles) for quantity in quantities)
    return tuple(panel for panel in panels if panel.series)


def _panel(runs: Sequence[Run], quantity: Quantity, styles: dict[str, int]) -> Panel:
    series = []
    for run in runs:
        records = run.held_out if quantity.held_out else run.metrics
        values = _column(records, quantity.key)
        if not any(value is not None for value in values):
            continue
        bound = _column(records, quantity.bound) if quantity.bound else ()
        series.append(
            Series(
                method=run.name,
                label=label(run.name),
                style=styles[run.name],
                x=tuple(record.step for record in records),
                y=values,
                bound=bound if any(value is not None for value in bound) else (),
            )
        )
    prefix = "held-out-" if quantity.held_out else ""
    return Panel(prefix + slug(quantity.key.removeprefix("trb/")), quantity, tuple(series))


def _column(records: Sequence[Step], key: str) -> Values:
    return tuple(number(record.values, key, record.where) for record in records)


def _scores(source: Source, styles: dict[str, int]) -> tuple[Panel, ...]:
    names = list(dict.fromkeys(score.name for run in source.runs for score in run.evals))
    several = len(names) > 1
    panels = []
    for index, name in enumerate(names):
        series = tuple(s for run in source.runs if (s := _eval_series(run, name, styles[run.name])))
        levels = tuple(
            (role, score.value)
            for role in REFERENCES
            if (score := source.scores.get(role)) and score.value is not None and (score.name == name or not several)
        )
        if series:
            measure = next(one.measure for run in source.runs for one in run.evals if one.name == name)
            quantity = score_quantity(measure, (name or "unnamed") if several else "", ", with its 95% interval")
            suffix = f"-{index + 1}-{slug(name)}".rstrip("-") if several else ""
            panels.append(Panel(measure.key + suffix, quantity, series, levels))
    return tuple(panels)


def _eval_series(run: Run, name: str, style: int) -> Series | None:
    evals = [score for score in run.evals if score.name == name]
    if not any(score.value is not None for score in evals):
        return None
    intervals = [score.interval or (None, None) for score in evals]
    return Series(
        method=run.name,
        label=label(run.name),
        style=style,
        x=tuple(score.step or 0 for score in evals),
        y=tuple(score.value for score in evals),
        low=tuple(low for low, _ in intervals),
        high=tuple(high for _, high in intervals),
    )


def slug(text: str) -> str:
    """Lower-case letters, digits, - and _ only: safe as an element id and as a file name."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")[:40]
