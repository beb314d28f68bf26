"""The report: what is on the page equals what is in the files, and nothing in the files can become more than
text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from report_helpers import (
    HOSTILE,
    PROVENANCE,
    STEPS,
    Page,
    page_of,
    score,
    write_comparison,
    write_hostile,
    write_jsonl,
    write_run,
)
from tiny_runs import build

from trb.report import ReportError, figures, panels, rollouts, style, summary, svg, write_report
from trb.report import page as page_module
from trb.report.figures import write_figures
from trb.report.panels import Panel, Quantity, Series
from trb.report.reading import Run, Score, Source, read
from trb.report.study_panels import Bar, Bars
from trb.training.methods import METHODS


def source_with(**scores: tuple[float, tuple[float, float] | None]) -> Source:
    """A comparison with nothing but scores; `_` in a name stands for nothing special."""
    runs = tuple(Run(name, Path(name)) for name in scores if name not in ("student", "teacher"))
    found = {name: Score(pass_at_1=value, interval=interval) for name, (value, interval) in scores.items()}
    return Source(Path("."), "comparison", runs, found, {}, ())


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("report") / "comparison")


@pytest.fixture(scope="module")
def comparison_page(comparison: Path) -> Page:
    return page_of(comparison)


# ---- the page as a document ----------------------------------------------------------------------------


def test_page_is_one_file_that_loads_nothing(comparison_page: Page) -> None:
    links = [a[name] or "" for _, a in comparison_page.tags for name in ("src", "href", "action", "data") if name in a]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert not {"img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in comparison_page.tags}
    style = comparison_page.text_of["style"][0]
    assert "url(" not in style and "@import" not in style
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|import|eval|innerHTML|insertAdjacentHTML)\b *\(?",
        comparison_page.text_of["script"][0],
    )


def test_policy_allows_exactly_the_inline_style_and_script(comparison_page: Page) -> None:
    policy = next(a["content"] or "" for a in comparison_page.all("meta") if "http-equiv" in a)
    assert [a.get("type") for a in comparison_page.all("script")] == [None, "application/json"]
    assert len(comparison_page.all("style")) == 1
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        digest = hashlib.sha256(comparison_page.text_of[tag][0].encode()).digest()
        assert directives[name] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert directives["default-src"] == "'none'" and "unsafe" not in policy
    handlers = [name for _, a in comparison_page.tags for name in a if name.startswith("on") or name == "style"]
    assert handlers == []  # the policy would block them


def test_ids_are_unique_and_links_lead_somewhere(comparison_page: Page) -> None:
    ids = [a["id"] for _, a in comparison_page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for a in comparison_page.all("a")} <= set(ids)


def test_stylesheet_and_figures_use_the_same_colours(comparison_page: Page) -> None:
    css = comparison_page.text_of["style"][0]
    assert tuple(re.findall(r"--s\d+: light-dark\((#\w+),", css)) == style.COLOURS


def test_every_method_has_a_style_of_its_own_in_colour_dash_and_marker(comparison_page: Page) -> None:
    styles = style.style_indices([*METHODS])
    assert sorted(styles.values()) == [*range(len(METHODS))]
    assert style.style_indices(["mine", *METHODS])["mine"] == len(METHODS), "and one is nobody's"
    css = comparison_page.text_of["style"][0]
    assert re.findall(r"^\.s(\d+) { --c: var\(--s\1\); }$", css, re.MULTILINE) == [
        str(index) for index in range(len(style.COLOURS))
    ]
    for table in (style.COLOURS, style.DASHES, style.MARKERS):
        assert len(set(table)) == len(table) == len(style.COLOURS)
    assert svg._MARKER_PATHS.keys() == figures._MARKERS.keys() == {*style.MARKERS}


def test_an_existing_report_is_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    (run / "report.html").write_text("old")
    assert write_report(str(run)) == run / "report.html"
    assert "old" not in (run / "report.html").read_text(encoding="utf-8")[:3]
    assert not list(run.glob(".*"))


# ---- numbers -------------------------------------------------------------------------------------------


def test_summary_shows_the_numbers_of_results_json(comparison_page: Page) -> None:
    assert comparison_page.row("TRB")[1:2] + comparison_page.row("TRB")[3:] == [
        "46.0%", "42.1% to 49.9%", "200", "4", "131.2", "91.2%",
    ]  # fmt: skip
    assert comparison_page.row("Student, before")[1] == "12.5%"
    assert comparison_page.row("Teacher")[1] == "71.0%"


def test_interval_bars_share_one_axis(comparison_page: Page, comparison: Path) -> None:
    results = json.loads((comparison / "results.json").read_text())
    bars = [a["d"] or "" for a in comparison_page.by_class("range")]
    ends = [tuple(map(float, re.match(r"M([\d.]+) 13H([\d.]+)", bar).groups())) for bar in bars]  # type: ignore[union-attr]
    means = [float(a["cx"] or 0) for a in comparison_page.by_class("mean")]
    values = [results[name] for name in ("student", "trb", "opd", "teacher")]
    # Two of the points fix the axis; it must then hold for all the others.
    scale = (means[3] - means[0]) / (values[3]["pass_at_1"] - values[0]["pass_at_1"])
    for (low, high), mean, value in zip(ends, means, values, strict=True):
        for drawn, true in (
            (low, value["interval"][0]),
            (mean, value["pass_at_1"]),
            (high, value["interval"][1]),
        ):
            assert drawn == pytest.approx(means[0] + scale * (true - values[0]["pass_at_1"]), abs=0.3)


def test_curve_data_equal_the_files(comparison_page: Page, comparison: Path) -> None:
    charts = {chart["id"]: chart for chart in comparison_page.data["charts"]}
    lines = (comparison / "opd" / "metrics.jsonl").read_text().splitlines()
    loss = next(series for series in charts["loss"]["series"] if series["method"] == "opd")
    assert loss["x"] == list(range(1, STEPS + 1))
    assert loss["y"] == pytest.approx([json.loads(line)["loss"] for line in lines], rel=1e-5)
    evals = [json.loads(line) for line in (comparison / "trb" / "evals.jsonl").read_text().splitlines()]
    accuracy = next(series for series in charts["pass_at_1"]["series"] if series["method"] == "trb")
    assert accuracy["y"] == pytest.approx([e["pass_at_1"] for e in evals], rel=1e-5)
    assert accuracy["low"] == pytest.approx([e["interval"][0] for e in evals], rel=1e-5)
    assert charts["sequence_kl"]["series"][0]["bound"][0] == pytest.approx(
        json.loads((comparison / "trb" / "metrics.jsonl").read_text().splitlines()[0])["trb/sequence_kl_bound"],
        rel=1e-5,
    )


def test_what_a_gap_run_logs_of_its_share_and_gap_is_drawn(tmp_path: Path) -> None:
    """Of a run as the trainer leaves it, so that the names are those it logs."""
    settings: dict[str, Any] = {"budget_schedule": "gap", "blend_warmup_steps": None, "learning_rate": 1e-3}
    settings |= {"max_steps": 3, "per_device_train_batch_size": 4, "max_completion_length": 8}
    build(tmp_path / "run", **settings).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    charts = {chart["id"]: chart for chart in page_of(tmp_path / "run").data["charts"]}
    for name in ("share", "gap"):
        (series,) = charts[name]["series"]
        assert series["x"] == [1, 2, 3]
        assert series["y"] == pytest.approx([row[f"trb/{name}"] for row in rows], rel=1e-5)
    assert charts["share"]["series"][0]["y"] == [0.75] * 3 and charts["gap"]["series"][0]["y"][0] == 1


def test_drawn_line_reads_back_through_the_axis_labels() -> None:
    values = (0.05, 0.031, None, 0.012, 0.0)
    panel = Panel("x", Quantity("x", "x", "", ""), (Series("trb", "TRB", 0, (1, 2, 3, 4, 5), values),))
    drawn = svg.draw(panel, (1, 5))
    (y0, v0), (y1, v1) = [(tick.at, float(tick.label)) for tick in drawn.y_ticks[:2]]
    (x0, s0), (x1, s1) = [(tick.at, float(tick.label)) for tick in drawn.x_ticks[:2]]
    points = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", drawn.lines[0].raw)]
    read = {round(s0 + (x - x0) * (s1 - s0) / (x1 - x0)): v0 + (y - y0) * (v1 - v0) / (y1 - y0) for x, y in points}
    assert read == pytest.approx({1: 0.05, 2: 0.031, 4: 0.012, 5: 0.0}, abs=2e-4)
    assert drawn.lines[0].raw.count("M") == 2  # the gap at step 3 is not bridged


def test_rollouts_on_the_page_equal_the_file(comparison_page: Page, comparison: Path) -> None:
    shown = [row for row in comparison_page.data["rollouts"] if row["method"] == "trb"]
    written = [json.loads(line) for line in (comparison / "trb" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in shown] == [row["tokens"] for row in written]
    for row, original in zip(shown, written, strict=True):
        assert row["teacher_weight"] == pytest.approx(original["teacher_weight"], rel=1e-3)
        assert (row["step"], row["prompt"], row["reward"]) == tuple(original[k] for k in ("step", "prompt", "reward"))


def test_configuration_puts_what_differs_first_and_hides_secrets(comparison_page: Page) -> None:
    assert comparison_page.row("schedule.initial_kl_budget") == ["schedule.initial_kl_budget", "0.05", "0.0"]
    keys = [cells[0] for cells in comparison_page.rows]
    assert keys.index("method") < keys.index("schedule.initial_kl_budget") < keys.index("student")
    assert comparison_page.row("trainer.max_steps") == ["trainer.max_steps", "100"]
    assert comparison_page.row("trainer.hub_token") == ["trainer.hub_token", "[redacted]"]
    assert comparison_page.row("command")[1] == "trb compare quickstart --hub_token [redacted]"
    assert comparison_page.row("commit")[1] == PROVENANCE["commit"]
    assert "hf_do_not_show" not in "".join(comparison_page.text_of["html"])


def test_options_that_only_sound_secret_are_shown() -> None:
    options = {"max_new_tokens": 64, "eos_token": "<|end|>", "nested": {"api_key": "abc", "password": None}}
    assert dict(summary.flatten(options)) == {
        "max_new_tokens": "64",
        "eos_token": "<|end|>",
        "nested.api_key": "[redacted]",
        "nested.password": "null",
    }


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.4125, "percent", "41.2%"),
        (1.0, "percent", "100.0%"),
        (None, "percent", "–"),
        (1234.5678, "number", "1,235"),
        (-0.61234, "number", "-0.6123"),
        (0.0, "number", "0"),
        (0.00001234, "number", "1.23e-5"),
        (12800, "count", "12,800"),
        # What rounds to zero has no sign, from either side.
        *((sign * 1e-5, "percent", "0.0%") for sign in (1, -1)),
        *((sign * 1e-5, "points", "0.0") for sign in (1, -1)),
        *((sign * 1e-3, "effect", "0.00") for sign in (1, -1)),
        *((-0.0, kind, "0") for kind in ("number", "count", "change")),
        (-0.4, "count", "0"),
        (-0.006, "effect", "\N{MINUS SIGN}0.01"),
        (0.006, "points", "+0.6"),
    ],
)
def test_shown_numbers(value: float | None, kind: Any, text: str) -> None:
    assert style.show(value, kind) == text


# ---- the headline --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "resolved"),
    [
        ((0.30, (0.25, 0.35)), True),
        ((0.38, (0.33, 0.43)), False),
        ((0.35, (0.30, 0.40)), False),
        ((0.45, (0.40, 0.50)), False),
    ],
    ids=["apart", "overlapping", "touching", "equal"],
)
def test_two_methods_are_told_apart_only_by_disjoint_intervals(other: Any, resolved: bool) -> None:
    text = summary.headline(source_with(trb=(0.45, (0.40, 0.50)), opd=other))
    assert ("TRB is ahead" in text) is resolved
    assert ("the difference is not resolved" in text) is not resolved
    low, high = (100 * end for end in other[1])
    assert text.startswith("TRB scores 45.0% pass@1 (95% interval 40.0 to 50.0) and OPD ")
    assert f"{100 * other[0]:.1f}% ({low:.1f} to {high:.1f})" in text


def test_the_better_method_is_named_whatever_the_order() -> None:
    text = summary.headline(source_with(trb=(0.2, (0.18, 0.22)), opd=(0.4, (0.38, 0.42))))
    assert "OPD is ahead" in text and "TRB is ahead" not in text


def test_headline_over_many_methods_names_who_is_unresolved() -> None:
    best = {"trb": (0.50, (0.45, 0.55))}
    mixed = summary.headline(source_with(**best, opd=(0.47, (0.42, 0.52)), sft=(0.30, (0.25, 0.35))))
    assert "clear of SFT warm-up" in mixed and "not resolved from OPD" in mixed
    clear = summary.headline(source_with(**best, opd=(0.2, (0.1, 0.3)), sft=(0.3, (0.25, 0.35))))
    assert "overlaps no other" in clear and "not resolved" not in clear
    close = summary.headline(source_with(**best, opd=(0.47, (0.4, 0.5)), sft=(0.48, (0.4, 0.5))))
    assert "overlaps every other" in close and "not resolved" in close


def test_headline_without_intervals_claims_nothing() -> None:
    for text in (
        summary.headline(source_with(trb=(0.9, None), opd=(0.1, (0.0, 0.2)))),
        summary.headline(source_with(student=(0.1, None), trb=(0.9, (0.8, 1.0)))),
        summary.headline(source_with(trb=(0.9, None), opd=(0.1, (0.0, 0.2)), sft=(0.1, (0.0, 0.2)))),
    ):
        assert "ahead" not in text and "above" not in text and "clear of" not in text
        assert "cannot be judged" in text or "want of intervals" in text


def test_single_run_is_compared_with_the_student_before() -> None:
    student = (0.2, (0.15, 0.25))
    assert "above the student's" in summary.headline(source_with(student=student, trb=(0.4, (0.35, 0.45))))
    assert "below the student's" in summary.headline(source_with(student=student, trb=(0.1, (0.05, 0.14))))
    assert "not resolved" in summary.headline(source_with(student=student, trb=(0.22, (0.17, 0.27))))


def test_methods_no_better_than_the_student_are_named() -> None:
    text = summary.context(
        source_with(
            student=(0.2, (0.15, 0.25)),
            trb=(0.22, (0.17, 0.27)),
            opd=(0.1, (0.05, 0.14)),
            sft=(0.5, (0.4, 0.6)),
        )
    )
    assert "Not resolved from the student itself: TRB." in text and "Below the student: OPD." in text


# ---- what a directory may lack -------------------------------------------------------------------------


def test_run_directory_makes_a_page_from_its_evaluations(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "anything"))
    assert page.text_of["h1"] == ["TRB"]
    assert page.row("TRB")[1] == "46.0%" and page.row("Student, before")[1] == "12.5%"
    assert "intervals do not overlap" in "".join(page.text_of["p"])


def test_run_results_are_preferred_to_evaluations(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text(json.dumps({"trb": score(0.33, step=80), "teacher": score(0.7)}))
    page = page_of(run)
    assert page.row("TRB")[0].strip() == "TRB step 80" and page.row("TRB")[1] == "33.0%"
    (run / "results.json").write_text(json.dumps(score(0.34)))
    assert page_of(run).row("TRB")[1] == "34.0%"


def test_comparison_in_progress_uses_the_latest_evaluations(tmp_path: Path) -> None:
    directory = write_comparison(tmp_path / "comparison")
    (directory / "results.json").unlink()
    page = page_of(directory)
    assert page.row("TRB")[1] == "46.0%" and any("results.json has no evaluation" in t for t in page.text_of["li"])


def test_missing_keys_leave_their_charts_out_and_nulls_leave_gaps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows: list[dict[str, Any]] = [{"step": step, "loss": 1 / step, "trb/reward": None} for step in range(1, 6)]
    rows[2]["loss"] = math.nan
    rows[3].pop("loss")
    write_jsonl(run / "metrics.jsonl", rows)
    page = page_of(run)
    assert page.chart_ids == ["loss"]
    assert page.data["charts"][0]["series"][0]["y"] == [1.0, 0.5, None, None, 0.2]
    assert any("config.yaml is missing" in text for text in page.text_of["li"])


def test_held_out_measurements_are_drawn_at_their_own_steps(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=6)
    rows = [{"step": step, "loss": 0.5 / step, "trb/teacher_log_prob": -1.0 / step} for step in (2, 4, 6)]
    write_jsonl(directory / "held_out.jsonl", rows)
    drawn = {panel.id: panel for group in panels.groups(read(directory)) for panel in group.panels}
    (series,) = drawn["held-out-teacher_log_prob"].series
    assert series.x == (2, 4, 6)
    assert series.y == (-0.5, -0.25, pytest.approx(-1 / 6))
    assert drawn["held-out-loss"].series[0].y[0] == 0.25
    assert len(drawn["loss"].series[0].x) == 6


def test_empty_run_makes_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: trb\n")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "rollouts.jsonl").touch()
    page = page_of(tmp_path)
    assert "No steps have been recorded yet." in page.text_of["p"]
    assert page.chart_ids == [] and page.data["rollouts"] == []


def test_run_with_steps_but_no_evaluation_says_how_far_it_is(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 7, "loss": 1.0}])
    assert "Training has reached step 7; no evaluation has been recorded yet." in page_of(tmp_path).text_of["p"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "evals.jsonl", "rollouts.jsonl"])
def test_torn_last_line_is_left_out_and_noted(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    before = page_of(run).data
    with (run / name).open("ab") as stream:
        stream.write('{"step": 101, "prompt": "é'.encode()[:-1])  # torn inside a character
    page = page_of(run)
    assert page.data == before
    assert sum(f"run/{name}: line" in text and "cut off" in text for text in page.text_of["li"]) == 1


def test_of_several_held_out_sets_the_first_is_drawn_and_the_others_are_named(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", "trb")
    rows = [{"step": step, "set": name, "loss": loss} for step in (1, 2) for name, loss in (("a", 0.5), ("b", 0.25))]
    write_jsonl(directory / "held_out.jsonl", rows)
    page = page_of(directory)
    (chart,) = (chart for chart in page.data["charts"] if chart["id"] == "held-out-loss")
    assert [series["y"] for series in chart["series"]] == [[0.5, 0.5]]
    text = " ".join(page.text_of["li"])
    assert "held_out.jsonl: shown is the set a; there are also b." in text and "recorded twice" not in text


def test_repeated_steps_of_a_resumed_run_show_the_later_record(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "metrics.jsonl",
        [{"step": s, "loss": v} for s, v in ((1, 1.0), (2, 9.0), (2, 0.5), (3, 0.4))],
    )
    page = page_of(tmp_path)
    assert page.data["charts"][0]["series"][0]["y"] == [1.0, 0.5, 0.4]
    assert any("recorded twice" in text for text in page.text_of["li"])


def test_several_evaluations_get_a_chart_each(tmp_path: Path) -> None:
    rows = [{"step": s, **score(0.2 + s / 100), "name": name} for s in (0, 20) for name in ("GSM 8k", "math500")]
    write_jsonl(tmp_path / "evals.jsonl", rows)
    page = page_of(tmp_path)
    assert page.chart_ids == ["pass_at_1-1-gsm-8k", "pass_at_1-2-math500"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step": \n{"step": 3}\n', r"metrics\.jsonl, line 2: not valid JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"step": \n', r"metrics\.jsonl, line 2: not valid JSON"),
        ("metrics.jsonl", "[1]\n", r"metrics\.jsonl, line 1: expected a JSON object, found list"),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics\.jsonl, line 1: step is missing"),
        ("metrics.jsonl", '{"step": 1.5}\n', r"metrics\.jsonl, line 1: step is 1\.5"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', r"metrics\.jsonl, line 1: loss is 'low'"),
        ("evals.jsonl", '{"step": 1, "interval": 3}\n', r"evals\.jsonl, line 1: interval is 3"),
        ("rollouts.jsonl", '{"step": 1, "tokens": "abc"}\n', r"rollouts\.jsonl, line 1: tokens is 'abc'"),
        ("rollouts.jsonl", '{"step": 1, "prompt": []}\n', r"rollouts\.jsonl, line 1: prompt is \[\]"),
        ("results.json", '{\n"trb": }', r"results\.json, line 2: not valid JSON"),
        ("results.json", '{"student": 0.5}', r"results\.json: student is 0\.5"),
        ("provenance.json", "[]", r"provenance\.json: expected a JSON object"),
        ("config.yaml", "a: 1\nb: [\n", r"config\.yaml, line \d: not valid YAML"),
        ("config.yaml", "- 1\n", r"config\.yaml: expected a mapping"),
    ],
)  # fmt: skip
def test_malformed_files_are_named_with_their_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    run = write_run(tmp_path / "run", steps=3)
    (run / name).write_text(text)
    with pytest.raises(ReportError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_directory_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ReportError, match=rf"{re.escape(str(directory))}.*run directory .*metrics\.jsonl"):
            write_report(directory)


def test_runs_from_different_commits_are_noted(tmp_path: Path) -> None:
    directory = write_comparison(tmp_path / "comparison")
    (directory / "opd" / "provenance.json").write_text(json.dumps({**PROVENANCE, "commit": "0badc0de"}))
    assert any("different commits: 0badc0de, 3f9c2ab17d5e" in text for text in page_of(directory).text_of["li"])


# ---- size ----------------------------------------------------------------------------------------------


def test_long_runs_give_bounded_pages_that_say_what_was_cut(tmp_path: Path) -> None:
    steps = 3000
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": s, "loss": 9.0 if s == 1234 else 1.0} for s in range(1, steps)])
    tokens = ["tok"] * 450
    row = {"prompt": "p" * 9000, "completion": "tok" * 450, "tokens": tokens, "kl_student": [0.01] * 450}
    write_jsonl(tmp_path / "rollouts.jsonl", [{"step": s, **row} for s in range(0, 400) for _ in range(2)])
    page = page_of(tmp_path)
    rows = page.data["rollouts"]
    assert len(rows) == rollouts.MAX_ROLLOUTS
    assert {len(r["tokens"]) for r in rows} == {len(r["kl_student"]) for r in rows} == {rollouts.MAX_TOKENS}
    assert rows[0]["length"] == 450 and min(r["step"] for r in rows) == 0 and max(r["step"] for r in rows) == 399
    loss = page.data["charts"][0]["series"][0]
    assert len(loss["y"]) <= svg.MAX_POINTS and loss["y"][loss["x"].index(1234)] == 9.0
    assert (tmp_path / "report.html").stat().st_size < 2_500_000
    notes = " ".join(page.text_of["li"])
    for said in ("200 of 800", "longer than 400 tokens", "prompts are cut", "thinned"):
        assert said in notes


@pytest.mark.parametrize(
    ("steps", "limit", "kept"),
    [
        ([[1, 1, 2, 2]], 4, {1, 2}),
        ([[1, 1, 2, 2, 3, 3]], 5, {1, 3}),
        ([[5, 5, 5]], 2, {5}),
        ([[1, 1, 2, 2, 2]], 2, {2}),
        ([[]], 3, set()),
        ([[1, 2, 3, 4, 5], [1, 2]], 3, {1, 3, 5}),
        ([[1, 1], [1, 2, 2, 2]], 4, {2}),
    ],
)  # fmt: skip
def test_whole_steps_are_kept_the_same_ones_in_every_run(steps: list[list[int]], limit: int, kept: set[int]) -> None:
    assert rollouts.kept_steps(steps, limit) == kept


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 300))
def test_rows_are_cut_to_the_longest_length_that_fits(lengths: list[int], total: int) -> None:
    def size(limit: int) -> int:
        return sum(min(length, limit) for length in lengths)

    most = rollouts.fitting(lengths, total)
    assert size(most) <= total
    assert most == max(lengths, default=0) or size(most + 1) > total


def test_thinning_keeps_extremes_ends_and_gaps() -> None:
    rng = random.Random(3)
    values: list[float | None] = [rng.gauss(0, 1) for _ in range(5000)]
    values[2500], values[77], values[4000] = None, 50.0, -50.0
    kept = panels.thinned(values, 600)
    assert len(kept) <= 600 and kept == sorted(set(kept))
    assert {0, 4999, 77, 4000, 2500} <= set(kept)
    assert panels.thinned(values[:600], 600) == list(range(600))


def test_smoothing_keeps_lines_and_gaps_and_reduces_noise() -> None:
    line: list[float | None] = [3 - 0.5 * i for i in range(50)]
    line[20] = None
    smooth = panels.smoothed(line, 8)
    assert smooth[20] is None
    assert [v for v in smooth if v is not None] == pytest.approx([v for v in line if v is not None])
    rng = random.Random(4)
    noise = [rng.gauss(0, 1) for _ in range(400)]
    mean_square = sum((v or 0.0) ** 2 for v in panels.smoothed(noise, 8)) / 400
    assert mean_square < 0.3  # nine points average to about a ninth of the variance
    assert panels.smoothed([1.0], 8) == (1.0,)


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-6, 1e6), least=st.integers(2, 5))
def test_ticks_are_evenly_spaced_inside_the_range(low: float, width: float, least: int) -> None:
    high = low + width
    values = svg.ticks(low, high, least)
    gap = values[1] - values[0]
    assert least <= len(values) <= 6 * least
    assert values[0] >= low - 1e-6 * gap - 1e-9 * abs(low) and values[-1] <= high + 1e-6 * gap + 1e-9 * abs(high)


@given(st.lists(st.none() | st.floats(-1e200, 1e200), min_size=1, max_size=60))
@example([0.0]).via("all zero")
@example([0.3, 0.3]).via("constant")
@example([1e-300, -1e-300]).via("tiny")
def test_any_finite_values_can_be_drawn(values: list[float | None]) -> None:
    if all(v is None for v in values):
        return
    series = Series("m", "m", 0, tuple(range(len(values))), tuple(values))
    drawn = svg.draw(Panel("x", Quantity("x", "x", "", "", smooth=True), (series,)), (0, max(1, len(values) - 1)))
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d", drawn.lines[0].raw)]
    assert numbers and all(-1 <= n <= svg.WIDTH + 1 for n in numbers)
    assert len({tick.label for tick in drawn.y_ticks}) == len(drawn.y_ticks)


# ---- hostile content -----------------------------------------------------------------------------------


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    benign = page_of(write_comparison(tmp_path / "benign"))
    page = page_of(write_hostile(tmp_path / "hostile"))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in benign.tags}
    assert len(page.all("script")) == 2
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]
    assert page.data["rollouts"][0]["tokens"] == HOSTILE
    assert page.row("command")[1] == HOSTILE[0]


def test_embedded_json_has_no_markup_characters_and_no_nan() -> None:
    text = str(page_module.embed({"a": HOSTILE, "b": "<>&\u2028\u2029é"}))
    assert not set(text) & set("<>&\u2028\u2029") and text.isascii()
    assert json.loads(text) == {"a": HOSTILE, "b": "<>&\u2028\u2029é"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        page_module.embed([math.nan])


# ---- figures -------------------------------------------------------------------------------------------


def test_figures_are_written_for_every_chart(comparison: Path, comparison_page: Page) -> None:
    paths = write_figures(comparison, formats=("svg",))
    assert [path.stem for path in paths] == comparison_page.chart_ids
    assert {path.parent for path in paths} == {comparison / "figures"}
    for path in paths:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_figures_draw_the_recorded_values(comparison: Path) -> None:
    (panel,) = [p for g in panels.groups(read(comparison)) for p in g.panels if p.id == "kl_student"]
    axes = figures.draw(panel).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    rows = [json.loads(line) for line in (comparison / "trb" / "metrics.jsonl").read_text().splitlines()]
    assert list(lines["TRB"].get_ydata()) == [row["trb/kl_student"] for row in rows]
    assert list(lines["TRB, budget"].get_ydata()) == [row["trb/kl_budget"] for row in rows]
    assert lines["TRB"].get_color() != lines["OPD"].get_color()
    assert lines["TRB"].get_marker() != lines["OPD"].get_marker()


FORMULAS = [
    "$",
    "costs $5 or $6",
    "$\\frac{1}{0$",
    "$" + "{" * 400 + "$",  # too deep for a parser that calls itself
    "$\\input{/etc/passwd}$",
    "_begins with an underscore",
    "ab\0\x1b[31m\u202e\ud800\ncd",
    "w" * 5_000,
    "",
]


# Long names leave no room for the axes, and fonts lack characters: matplotlib says so, and draws what it can.
@pytest.mark.filterwarnings("ignore:constrained_layout not applied", "ignore:Glyph")
@pytest.mark.parametrize("text", FORMULAS, ids=lambda text: ascii(text[:20]))
def test_names_are_drawn_as_they_are(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a method, a setting or a quantity is called, figures are written, and show what they show otherwise."""
    quantity = Quantity("k", text, text, text, bound="b", bound_name=text)
    lines = tuple(
        Series(name, name, style, (1, 2), (0.5, 0.25), bound=(0.5, 0.5)) for style, name in enumerate((text, "other"))
    )
    panel = Panel(
        "panel", quantity, lines, axis=panels.Axis(text, (text, text, text)), levels=((text, 0.3),), note=text
    )
    rows = tuple(Bar(name, 0, 0.5, (0.25, 0.75), 1, None, per_seed=(0.5,)) for name in (text, "other"))
    drawn = [("panel", figures.draw), ("bars", lambda _: figures.draw_bars([Bars(text, rows, None)], text))]
    monkeypatch.setattr(figures, "_figures", lambda directory: ((name, draw(panel)) for name, draw in drawn))
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # somebody's own settings, for other figures
    for path in write_figures(tmp_path, formats=("png", "svg")):
        assert path.stat().st_size > 1_000
        if path.suffix == ".svg":
            ElementTree.parse(path)
    axes = figures.draw(panel).axes[0]
    assert len(axes.get_legend().get_texts()) == 4
    assert max(figures.draw_bars([Bars(text, rows, None)], text).get_size_inches()) < 12


def test_figure_formats_and_empty_runs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}])
    (path,) = write_figures(tmp_path, formats=("png",))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ReportError, match=r"unknown figure formats.*'bmp2'"):
        write_figures(tmp_path, formats=("png", "bmp2"))
    (tmp_path / "metrics.jsonl").write_text("")
    assert write_figures(tmp_path) == []


def test_the_page_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, trb.report; sys.exit(bool({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
