"""Puts the page together: one HTML file with its style, script and data inside, and no way to load anything
else.

The policy in the page allows exactly this style and this script (by hash), no requests, and no text parsed as
markup. Data go in as JSON with `<`, `>`, `&` and everything outside ASCII escaped, so that no string in them
can end the element that holds them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import trb
from trb.report import panels, rollouts, summary, svg
from trb.report.reading import Source
from trb.report.style import DASHES, label, show, style_indices


def render(source: Source) -> str:
    """The whole page as text."""
    css, js = _template_text("report.css"), _template_text("report.js")
    groups = panels.groups(source)
    steps = _step_range(groups)
    charts = [(group.title, [svg.draw(panel, steps) for panel in group.panels]) for group in groups]
    chosen = rollouts.collect(source.runs)
    rows = summary.rows(source)
    axis, bars = svg.interval_bars([row.score for row in rows])
    return (
        _environment()
        .get_template("report.html")
        .render(
            source=source,
            title=summary.title(source),
            headline=summary.headline(source),
            context=summary.context(source),
            facts=_facts(source),
            provenance=summary.provenance(source),
            rows=list(zip(rows, bars, strict=True)),
            axis=axis,
            methods=_methods(source),
            charts=charts,
            config=summary.config_table(source),
            has_rollouts=bool(chosen.rows),
            notes=_notes(source, groups, chosen),
            size=svg,
            dashes=DASHES,
            version=trb.__version__,
            policy=_policy(css, js),
            css=Markup(css),
            js=Markup(js),
            data=embed(_page_data(source, charts, chosen)),
        )
    )


def embed(data: Any) -> Markup:
    """JSON that is inert inside a script element; raises ValueError for NaN or infinity."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trb.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
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


def _step_range(groups: tuple[panels.Group, ...]) -> tuple[int, int]:
    steps = [x for group in groups for panel in group.panels for series in panel.series for x in series.x]
    return (min(steps), max(steps)) if steps else (0, 0)


def _methods(source: Source) -> list[dict[str, Any]]:
    styles = style_indices([run.name for run in source.runs])
    return [
        {"name": name, "label": label(name), "style": styles[name], "dash": DASHES[styles[name]]}
        for name in (run.name for run in source.runs)
    ]


def _facts(source: Source) -> list[str]:
    """The short line under the headline: how long, how often evaluated, where and when."""
    found = []
    steps = [run.last_step for run in source.runs if run.last_step is not None]
    if steps:
        found.append(f"{max(steps):,} steps" if len(set(steps)) == 1 else f"{min(steps):,} to {max(steps):,} steps")
    record = source.provenance
    if record.get("commit"):
        found.append(f"commit {str(record['commit'])[:10]}" + (", modified" if record.get("dirty") else ""))
    if record.get("time"):
        found.append(re.sub(r"T(\d\d:\d\d)\S*?(?:\+00:00|Z)$", r" \1 UTC", str(record["time"])))
    return found


def _notes(source: Source, groups: tuple[panels.Group, ...], chosen: rollouts.Rollouts) -> list[str]:
    notes = [*source.notes, *chosen.notes]
    longest = max((len(s.y) for g in groups for p in g.panels for s in p.series), default=0)
    if longest > svg.MAX_POINTS:
        notes.append(
            f"Curves of more than {svg.MAX_POINTS} points ({longest:,} here) are thinned to the lowest and "
            "highest point of each stretch."
        )
    return list(dict.fromkeys(notes))


def _page_data(source: Source, charts: list[tuple[str, list[svg.Chart]]], chosen: rollouts.Rollouts) -> dict[str, Any]:
    return {
        "plot": {
            "width": svg.WIDTH,
            "height": svg.HEIGHT,
            "left": svg.LEFT,
            "right": svg.RIGHT,
            "top": svg.TOP,
            "bottom": svg.BOTTOM,
        },
        "methods": [{key: method[key] for key in ("name", "label", "style")} for method in _methods(source)],
        "charts": [chart.data for _, drawn in charts for chart in drawn],
        "rollouts": list(chosen.rows),
    }
