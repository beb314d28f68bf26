"""The page: one HTML file with its style, script and data inside, and no way to load anything else.

The policy in the page allows exactly this style and this script (by hash), no requests, and no text parsed as
markup. Data go in as JSON with `<`, `>`, `&` and everything outside ASCII escaped, so that no string in them
can end the element that holds them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import trb
from trb.measures import PASS_AT_1, Measure
from trb.records import REPORT
from trb.report import changes, outcomes, panels, rollouts, summary, svg, tables
from trb.report.outcomes import Comparisons, Paired
from trb.report.reading import Source
from trb.report.style import DASHES, label, show, show_range, style_indices

SCRIPTS = ("base.js", "curves.js", "viewer.js", "start.js")


def render(source: Source) -> str:
    """The whole page of a run or a comparison as text."""
    groups = panels.groups(source)
    steps = step_range(groups)
    charts = [(group.title, [svg.draw(panel, steps) for panel in group.panels]) for group in groups]
    notes = [*source.notes]
    found = outcomes.read_outcomes(source, notes)
    pairs = outcomes.comparisons(source, found)
    changed = changes.collect(found, group=1)
    chosen = rollouts.collect([source.runs])
    rows = summary.rows(source)
    strip = svg.interval_bars([row.score for row in rows])
    config = summary.config_table(source.runs)
    drawn = [chart for _, charts_of in charts for chart in charts_of]
    styles = style_indices([run.name for run in source.runs])
    methods = [method_entry(run.name, label(run.name), styles[run.name]) for run in source.runs]
    differences = _differences(pairs, styles)
    shown = replace(chosen, rows=(*chosen.rows, *changed.rollouts))
    sections = (
        ("summary", "Summary", rows),
        ("differences", "Differences", differences),
        ("problems", "Problems", changed.tables),
        ("curves", "Curves", charts),
        ("rollouts", "Rollouts", shown.rows),
        ("configuration", "Configuration", config.columns),
    )
    viewed = [*methods, {"name": changes.STUDENT, "label": "Student", "style": None}]
    groups_of = [("", "training"), ("evaluation", "the last evaluation")]
    return document(
        REPORT.name,  # the template is called as the page is
        page_data({"curves": drawn}, viewed if changed.rollouts else methods, groups_of, shown, group_name="Show"),
        kind="comparison" if source.kind == "comparison" else "run",
        sections=sections,
        title=summary.title(source),
        headline=summary.headline(source, pairs),
        context=summary.context(source, pairs),
        facts=facts([run.last_step for run in source.runs], source.provenance),
        provenance=summary.provenance(source.provenance),
        rows=list(zip(rows, strip.bars, strict=True)),
        strip=strip,
        measure=next((row.score.measure for row in rows), PASS_AT_1),
        per_token=tables.PER_TOKEN_TITLES,
        differences=differences,
        fewest_changes=outcomes.FEWEST_CHANGES,
        problems=changed.tables,
        linked=bool(changed.rollouts),
        methods=methods,
        charts=charts,
        config=config,
        notes=[*notes, *changed.notes, *chosen.notes, *thinning_notes(groups)],
    )


@dataclass(frozen=True)
class Differences:
    """Paired differences under a title, drawn on one axis: (label, style, difference, bar) in a row."""

    title: str
    rows: tuple[tuple[str, int | None, Paired, svg.IntervalBar], ...]
    strip: svg.Strip
    measure: Measure


def _differences(pairs: Comparisons, styles: Mapping[str, int]) -> list[Differences]:
    found = [("Method minus the student before training", [(one.first, one) for one in pairs.to_student])]
    if pairs.of_best:
        best, superlative = label(pairs.of_best[0].first), pairs.of_best[0].measure.superlative
        found.append(
            (f"{best}, the {superlative}, minus each other method", [(one.second, one) for one in pairs.of_best])
        )
    shown = []
    for title, named in found:
        measure = next((one.measure for _, one in named), PASS_AT_1)
        strip = svg.difference_bars([(one.estimate, one.interval) for _, one in named], measure)
        rows = tuple(
            (label(name), styles.get(name), one, bar) for (name, one), bar in zip(named, strip.bars, strict=True)
        )
        shown += [Differences(title, rows, strip, measure)] if rows else []
    return shown


def document(template: str, data: dict[str, Any], **values: Any) -> str:
    """A page from one of the templates, with its style, its script and `data` inside.

    `sections` are (id, name, what the section shows): those that show nothing get no link.
    """
    css = _template_text("report.css")
    js = '(() => {\n"use strict";\n' + "\n".join(map(_template_text, SCRIPTS)) + "\n})();"
    links = [(section, name) for section, name, content in values.pop("sections") if content]
    return (
        _environment()
        .get_template(template)
        .render(
            **{**values, "notes": list(dict.fromkeys(values["notes"]))},
            sections=[*links, ("provenance", "Provenance")],
            has_rollouts=bool(data["rollouts"]),
            version=trb.__version__,
            policy=_policy(css, js),
            css=Markup(css),
            js=Markup(js),
            data=embed(data),
        )
    )


def embed(data: Any) -> Markup:
    """JSON that is inert inside a script element; raises ValueError for NaN or infinity."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trb.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "show_range": show_range}
    environment.globals |= {"size": svg, "dashes": DASHES}
    return environment


def _template_text(name: str) -> str:
    return (files("trb.report") / "templates" / name).read_text(encoding="utf-8").strip()


def _policy(css: str, js: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_digest(js)}'",
            f"style-src '{_digest(css)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def step_range(groups: Sequence[panels.Group]) -> tuple[int, int]:
    """The first and the last step in any chart, (0, 0) if there is none."""
    steps = [x for group in groups for panel in group.panels for series in panel.series for x in series.x]
    return (min(steps), max(steps)) if steps else (0, 0)


def method_entry(name: str, shown: str, style: int) -> dict[str, Any]:
    """What legends and the viewer know of a method."""
    return {"name": name, "label": shown, "style": style, "dash": DASHES[style]}


def facts(steps: Sequence[int | None], provenance: Mapping[str, Any]) -> list[str]:
    """The short line under the headline: how long, where and when."""
    found = []
    known = [step for step in steps if step is not None]
    if known:
        found.append(f"{max(known):,} steps" if len(set(known)) == 1 else f"{min(known):,} to {max(known):,} steps")
    if provenance.get("commit"):
        found.append(f"commit {str(provenance['commit'])[:10]}" + (", modified" if provenance.get("dirty") else ""))
    if provenance.get("time"):
        found.append(re.sub(r"T(\d\d:\d\d)\S*?(?:\+00:00|Z)$", r" \1 UTC", str(provenance["time"])))
    return found


def thinning_notes(groups: Sequence[panels.Group]) -> list[str]:
    """A sentence for curves that are drawn with fewer points than were recorded."""
    longest = max((len(s.y) for g in groups for p in g.panels for s in p.series), default=0)
    if longest <= svg.MAX_POINTS:
        return []
    return [
        f"Curves of more than {svg.MAX_POINTS} points ({longest:,} here) are thinned to the lowest and highest point "
        "of each stretch."
    ]


def page_data(
    charts: Mapping[str, Sequence[svg.Chart]],
    methods: Sequence[Mapping[str, Any]],
    groups: Sequence[tuple[str, str]],
    chosen: rollouts.Rollouts,
    group_name: str = "Setting",
) -> dict[str, Any]:
    """What the script reads: charts by the id of their section, and rollouts in groups of (axis group, label), among
    which the reader chooses under `group_name`."""
    return {
        "plot": {
            "width": svg.WIDTH,
            "height": svg.HEIGHT,
            "left": svg.LEFT,
            "right": svg.RIGHT,
            "top": svg.TOP,
            "bottom": svg.BOTTOM,
        },
        "methods": [{key: method[key] for key in ("name", "label", "style")} for method in methods],
        "charts": [chart.data | {"section": section} for section, drawn in charts.items() for chart in drawn],
        "groupName": group_name,
        "groups": [{"name": name, "label": shown} for name, shown in groups],
        "rollouts": list(chosen.rows),
        "texts": list(chosen.texts),
    }
