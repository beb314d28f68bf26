"""What a study's charts show: learning curves with bands over seeds, metrics, strips of scores and differences.

Pure data and geometry from `trb.report.study`; values are never changed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trb.measures import MEASURES, PASS_AT_1, Measure
from trb.records import Band, Configuration, Difference, Method
from trb.report import panels, svg
from trb.report.panels import Axis, Group, Panel, Quantity, Series, Values, slug
from trb.report.study import Setting, Study
from trb.report.tables import configuration_text, seeds_of, spanned


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
    measure: Measure = PASS_AT_1

    @property
    def has_intervals(self) -> bool:
        return any(row.interval for row in self.rows)


def groups(study: Study, setting: Setting) -> tuple[Group, ...]:
    """Every chart of a setting over training steps; quantities nobody recorded are left out."""
    axis = Axis(group=setting.name)
    outcome = (panels.score_quantity(setting.measure, "development"), *panels.OUTCOME)
    found = []
    for title, quantities in (
        ("Outcome", outcome),
        ("Behavior policy", panels.BEHAVIOR),
        ("Optimizer", panels.OPTIMIZER),
    ):
        charts = [panel for quantity in quantities if (panel := _panel(study, setting, quantity, axis))]
        if charts:
            found.append(Group(title, tuple(charts)))
    return tuple(found)


def _panel(study: Study, setting: Setting, quantity: Quantity, axis: Axis) -> Panel | None:
    methods = {name: method for name, method in setting.found.methods.items() if _band_of(method, quantity)}
    if not methods:
        return None
    note = f"mean and {study.interval_name} over {seeds_of(methods.values())}"
    # A band over seeds says how noisy a curve is; smoothing the mean inside it would hide that.
    shown = replace(quantity, smooth=False)
    series = tuple(_series(study, name, method, quantity) for name, method in methods.items())
    name = f"{slug(setting.name)}-{slug(quantity.key.removeprefix('trb/'))}"
    return Panel(name, shown, series, axis=axis, interval_name=study.interval_name, note=note)


def _band_of(method: Method, quantity: Quantity) -> Band | None:
    """A method's band, unless it has nothing to draw."""
    band = method.curve if quantity.key in MEASURES else method.metrics.get(quantity.key)
    return band if band and _is_drawn(band) else None


def _is_drawn(band: Band) -> bool:
    return any(value is not None for value in band.mean or ())


def _series(study: Study, name: str, method: Method, quantity: Quantity) -> Series:
    band = _band_of(method, quantity) or Band()
    bound = method.metrics.get(quantity.bound) if quantity.bound else None
    low, high = (band.low, band.high) if band.low and band.high else ([], [])
    return Series(
        name,
        study.labels[name],
        study.styles[name],
        tuple(band.steps or ()),
        tuple(band.mean or ()),
        low=tuple(low),
        high=tuple(high),
        bound=tuple(bound.mean or ()) if bound and _is_drawn(bound) and bound.steps == band.steps else (),
    )


def scores(study: Study, setting: Setting) -> Bars:
    """Each method's test score with its interval and its seeds."""
    methods = setting.found.methods
    strip = svg.interval_bars(list(methods.values()), [method.per_seed or () for method in methods.values()])
    rows = tuple(
        _bar(study.labels[name], study.styles[name], method, bar)
        for (name, method), bar in zip(methods.items(), strip.bars, strict=True)
    )
    return Bars(f"{setting.title}, {seeds_of(methods.values())}", rows, strip, setting.measure)


def _bar(label: str, style: int, scored: Method | Configuration, bar: svg.IntervalBar, selected: bool = False) -> Bar:
    per_seed = tuple(scored.per_seed or ())
    return Bar(label, style, scored.value, scored.interval, scored.seeds, bar, selected=selected, per_seed=per_seed)


def forests(study: Study) -> tuple[Bars, ...]:
    """Differences to plain distillation: on average over the settings, then in each; one axis for what is measured
    alike."""
    return tuple(bars for measure in study.measures for bars in _forests(study, measure))


def _forests(study: Study, measure: Measure) -> tuple[Bars, ...]:
    everyone = [method for setting in study.settings for method in setting.found.methods.values()]
    sections: list[tuple[str, list[tuple[str, int | None, Difference]]]] = []
    rows = [
        (name, _common_seeds(study, name), entry.difference_to_opd)
        for name, entry in study.average.items()
        if entry.difference_to_opd and len(study.measures) == 1
    ]
    if rows:
        sections.append((f"Average over {len(study.settings)} settings, {seeds_of(everyone)} in each", rows))
    for setting in study.settings:
        if setting.measure is not measure:
            continue
        methods = setting.found.methods
        found = [(name, m.seeds, m.difference_to_opd) for name, m in methods.items() if m.difference_to_opd]
        if found:
            sections.append((f"{setting.title}, {seeds_of(methods.values())}", found))
    differences = [difference for _, entries in sections for *_, difference in entries]
    strip = svg.difference_bars([(one.estimate, one.interval) for one in differences], measure)
    bars = iter(strip.bars)
    return tuple(
        Bars(
            title,
            tuple(
                Bar(study.labels[name], study.styles[name], d.estimate, d.interval, seeds, next(bars), difference=d)
                for name, seeds, d in entries
            ),
            strip,
            measure,
        )
        for title, entries in sections
    )


def _common_seeds(study: Study, name: str) -> int | None:
    """How many seeds a method has in every setting; None where settings differ."""
    counts = {method.seeds for setting in study.settings if (method := setting.found.methods.get(name))}
    return counts.pop() if len(counts) == 1 else None


def sweep(study: Study, setting: Setting) -> Bars:
    """Every configuration's development score, method by method, the selected one marked."""
    named = [(name, entry) for name, entries in setting.found.sweep.items() for entry in entries]
    configurations = [entry for _, entry in named]
    strip = svg.interval_bars(configurations, [entry.per_seed or () for entry in configurations])
    rows = tuple(
        _bar(
            f"{study.labels.get(name, name)}: {configuration_text(entry.configuration)}",
            study.styles.get(name, 7),
            entry,
            bar,
            selected=bool(entry.selected),
        )
        for (name, entry), bar in zip(named, strip.bars, strict=True)
    )
    return Bars(f"{setting.title}, {spanned(entry.seeds for entry in configurations)}", rows, strip, setting.measure)
