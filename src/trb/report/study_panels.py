"""What a study's charts show: learning curves with bands over seeds, metrics, strips of scores and differences.

Pure data and geometry from `trb.report.study`; values are never changed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trb.report import panels, svg
from trb.report.panels import Axis, Group, Panel, Quantity, Series, Values, slug
from trb.report.study import Band, Configuration, Difference, Method, Setting, Study
from trb.report.tables import configuration_text, seeds_of, spanned

_PASS_AT_1 = Quantity("pass_at_1", "pass@1, development", "", "Share of samples that are right", format="percent")


@dataclass(frozen=True)
class Bar:
    """One row of a strip: a method or a configuration."""

    label: str
    style: int | None
    value: float | None
    interval: tuple[float, float] | None
    seeds: int | None
    bar: svg.IntervalBar
    difference: Difference | None = None
    selected: bool = False
    per_seed: Values = ()


@dataclass(frozen=True)
class Bars:
    """Rows that share an axis, under a title."""

    title: str
    rows: tuple[Bar, ...]
    strip: svg.Strip

    @property
    def has_intervals(self) -> bool:
        return any(row.interval for row in self.rows)


def groups(study: Study, setting: Setting) -> tuple[Group, ...]:
    """Every chart of a setting over training steps; quantities nobody recorded are left out."""
    axis = Axis(group=setting.name)
    outcome = (_PASS_AT_1, *panels.OUTCOME)
    found = []
    for title, quantities in (
        ("Outcome", outcome),
        ("Behavior policy", panels.BEHAVIOR),
        ("Optimizer", panels.OPTIMIZER),
    ):
        drawn = [panel for quantity in quantities if (panel := _panel(study, setting, quantity, axis))]
        if drawn:
            found.append(Group(title, tuple(drawn)))
    return tuple(found)


def _panel(study: Study, setting: Setting, quantity: Quantity, axis: Axis) -> Panel | None:
    drawn = [(method, band) for method in setting.methods if (band := _band_of(method, quantity))]
    if not drawn:
        return None
    note = f"mean and {study.interval_name} over {seeds_of([method for method, _ in drawn])}"
    # A band over seeds says how noisy a curve is; smoothing the mean inside it would hide that.
    shown = replace(quantity, smooth=False)
    series = tuple(_series(method, band, quantity) for method, band in drawn)
    name = f"{slug(setting.name)}-{slug(quantity.key.removeprefix('trb/'))}"
    return Panel(name, shown, series, axis=axis, interval_name=study.interval_name, note=note)


def _band_of(method: Method, quantity: Quantity) -> Band | None:
    if quantity is _PASS_AT_1:
        return method.curve
    return method.metrics.get(quantity.key)


def _series(method: Method, band: Band, quantity: Quantity) -> Series:
    bound = method.metrics.get(quantity.bound) if quantity.bound else None
    return Series(
        method.name,
        method.label,
        method.style,
        band.steps,
        band.mean,
        low=band.low,
        high=band.high,
        bound=bound.mean if bound and bound.steps == band.steps else (),
    )


def scores(study: Study, setting: Setting) -> Bars:
    """Each method's test score with its interval and its seeds."""
    strip = svg.interval_bars([m.score for m in setting.methods], [m.per_seed for m in setting.methods])
    rows = tuple(
        Bar(m.label, m.style, m.score.pass_at_1, m.score.interval, m.seeds, bar, per_seed=m.per_seed)
        for m, bar in zip(setting.methods, strip.bars, strict=True)
    )
    return Bars(f"{setting.title}, {seeds_of(setting.methods)}", rows, strip)


def forests(study: Study) -> tuple[Bars, ...]:
    """Differences to plain distillation: on average over the settings, then in each; one axis for all."""
    everyone = [method for setting in study.settings for method in setting.methods]
    sections: list[tuple[str, list[tuple[str, int, int | None, Difference]]]] = []
    rows = [
        (entry.label, entry.style, _common_seeds(study, entry.name), entry.difference)
        for entry in study.average
        if entry.difference
    ]
    if rows:
        sections.append((f"Average over {len(study.settings)} settings, {seeds_of(everyone)} in each", rows))
    for setting in study.settings:
        found = [(m.label, m.style, m.seeds, m.difference) for m in setting.methods if m.difference]
        if found:
            sections.append((f"{setting.title}, {seeds_of(setting.methods)}", found))
    differences = [difference for _, entries in sections for *_, difference in entries]
    strip = svg.difference_bars([(one.estimate, one.interval) for one in differences])
    bars = iter(strip.bars)
    return tuple(
        Bars(
            title,
            tuple(
                Bar(name, style, d.estimate, d.interval, seeds, next(bars), difference=d)
                for name, style, seeds, d in entries
            ),
            strip,
        )
        for title, entries in sections
    )


def _common_seeds(study: Study, name: str) -> int | None:
    """How many seeds a method has in every setting; None where settings differ."""
    counts = {method.seeds for setting in study.settings if (method := setting.method(name))}
    return counts.pop() if len(counts) == 1 else None


def sweep(setting: Setting) -> Bars:
    """Every configuration's development score, method by method, the selected one marked."""
    entries: list[tuple[str, int, Configuration]] = []
    for name, configurations in setting.sweep.items():
        method = setting.method(name)
        shown, style = (name, 7) if method is None else (method.label, method.style)
        entries += [(shown, style, configuration) for configuration in configurations]
    strip = svg.interval_bars([entry.score for *_, entry in entries], [entry.per_seed for *_, entry in entries])
    rows = tuple(
        Bar(
            f"{shown}: {configuration_text(entry.configuration)}",
            style,
            entry.score.pass_at_1,
            entry.score.interval,
            entry.seeds,
            bar,
            selected=entry.selected,
            per_seed=entry.per_seed,
        )
        for (shown, style, entry), bar in zip(entries, strip.bars, strict=True)
    )
    return Bars(f"{setting.title}, {spanned(entry.seeds for *_, entry in entries)}", rows, strip)
