"""The pages of a study and of a probe: tables, forest plots, curves, sweep, diagnostics and the rollout viewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trb.records import PROBE, STUDY
from trb.report import page, panels, probe, rollouts, study_panels, study_summary, summary, svg, tables
from trb.report.probe import Probe
from trb.report.study import BASELINE, Setting, Study


@dataclass(frozen=True)
class Charts:
    """The drawn charts of one setting, group by group."""

    title: str
    groups: tuple[tuple[str, tuple[svg.Chart, ...]], ...]

    @property
    def all(self) -> list[svg.Chart]:
        return [chart for _, charts in self.groups for chart in charts]


def render_study(study: Study) -> str:
    """The whole page of a study as text."""
    curves, diagnostics = _curves(study), _diagnostics(study)
    chosen = rollouts.collect([setting.runs for setting in study.settings])
    methods = [page.method_entry(name, study.labels[name], study.styles[name]) for name in study.labels]
    forests = study_panels.forests(study)
    sweeps = [bars for setting in study.settings if (bars := study_panels.sweep(study, setting)).rows]
    details = [_details(study, setting) for setting in study.settings]
    results = tables.results_table(study)
    configuration = _configuration(study)
    sections = (
        ("summary", "Results", results.rows),
        ("differences", "Differences", forests),
        ("settings", "Settings", details),
        ("curves", "Curves", curves),
        ("sweep", "Sweep", sweeps),
        ("diagnostics", "Diagnostics", diagnostics),
        ("rollouts", "Rollouts", chosen.rows),
        ("configuration", "Configuration", configuration),
    )
    return page.document(
        "study.html",
        page.page_data(
            {"curves": _drawn(curves), "diagnostics": _drawn(diagnostics)},
            methods,
            [(setting.name, setting.title) for setting in study.settings],
            chosen,
        ),
        kind="study",
        sections=sections,
        title=study.name,
        headline=study_summary.headline(study),
        context=study_summary.context(study),
        facts=page.facts([setting.found.steps for setting in study.settings], study.provenance),
        provenance=summary.provenance(study.provenance),
        notes=[*study.notes, *chosen.notes],
        study=study,
        results=results,
        forests=forests,
        baseline=study.labels.get(BASELINE, "OPD"),
        differences=tables.differences_table(study),
        details=details,
        methods=methods,
        curves=curves,
        sweeps=sweeps,
        diagnostics=diagnostics,
        configuration=configuration,
    )


def render_probe(source: Probe) -> str:
    """The whole page of a probe's directory as text."""
    where = str(source.directory / PROBE)
    diagnostics = _charts("", probe.groups(source.record, "", where))
    chosen = rollouts.collect([(source.run,)], by_policy=True)
    names = list(dict.fromkeys(row["method"] for row in chosen.rows))
    styles = probe.policy_styles(names)
    record = source.record.get("provenance")
    origin = record if isinstance(record, Mapping) else {}
    shown = {key: value for key, value in source.record.items() if key not in _RESULTS}
    advice = source.found.advice.sentences if source.found.advice else []
    return page.document(
        "probe.html",
        page.page_data(
            {"diagnostics": diagnostics.all},
            [page.method_entry(name, probe.policy_label(name), styles[name]) for name in names],
            [("", "")],
            chosen,
        ),
        kind="probe",
        sections=(
            ("advice", "Advice", advice),
            ("diagnostics", "Diagnostics", diagnostics.groups),
            ("rollouts", "Rollouts", chosen.rows),
            ("configuration", "Configuration", shown),
        ),
        title="Diagnostics",
        headline=probe.headline(source.found),
        context=probe.facts(source.found),
        facts=page.facts([], origin),
        provenance=summary.provenance(origin),
        notes=chosen.notes,
        advice=advice,
        diagnostics=[diagnostics] if diagnostics.groups else [],
        shared=summary.flatten(shown),
    )


_RESULTS = ("continuation", "budgets", "replacement", "outlook", "advice", "provenance")


def _curves(study: Study) -> list[Charts]:
    found = (_charts(setting.title, study_panels.groups(study, setting)) for setting in study.settings)
    return [charts for charts in found if charts.groups]


def _diagnostics(study: Study) -> list[Charts]:
    where = str(study.directory / STUDY)
    titles = {setting.name: setting.title for setting in study.settings}
    found = (
        _charts(titles.get(name, name), probe.groups(record, name, f"{where}: diagnostics.{name}"))
        for name, record in study.diagnostics.items()
    )
    return [charts for charts in found if charts.groups]


def _charts(title: str, groups: tuple[panels.Group, ...]) -> Charts:
    steps = page.step_range(groups)
    drawn = tuple((group.title, tuple(svg.draw(panel, steps) for panel in group.panels)) for group in groups)
    return Charts(title, drawn)


def _drawn(charts: list[Charts]) -> list[svg.Chart]:
    return [chart for one in charts for chart in one.all]


def _details(study: Study, setting: Setting) -> dict[str, Any]:
    """One setting's own part of the page."""
    own = (tables.suites_table(study, setting), tables.described_table(setting), tables.learning_table(study, setting))
    return {
        "setting": setting,
        "test": _problem_sets(setting.found.test),
        "dev": _problem_sets(setting.found.dev),
        "scores": study_panels.scores(study, setting),
        "tables": [table for table in own if table.rows],
        "pairs": tables.pairs_table(study, setting),
    }


def _problem_sets(sets: list[dict[str, Any]] | None) -> str:
    """ "chains (512 problems) and sums (256 problems)"."""
    texts = []
    for one in sets or ():
        size = one.get("problems")
        texts.append(str(one.get("name", "unnamed")) + (f" ({size:,} problems)" if isinstance(size, int) else ""))
    return " and ".join(texts)


def _configuration(study: Study) -> list[dict[str, Any]]:
    """Per setting, the selected configuration of each method, and the options its shown runs share."""
    found = []
    for setting in study.settings:
        chosen = [
            (study.labels[name], tables.configuration_text(method.configuration))
            for name, method in setting.found.methods.items()
            if method.configuration
        ]
        options = summary.config_table(setting.runs, study.labels)
        if chosen or options.columns:
            found.append({"title": setting.title, "chosen": chosen, "options": options})
    return found
