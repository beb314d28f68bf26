"""The report of a study and of a probe, and the tables and figures made from them: numbers equal the files', and the
headline claims no more than the intervals do."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import (
    HOSTILE,
    METHODS,
    PROVENANCE,
    SEEDS,
    Page,
    difference,
    page_of,
    score,
    study_record,
    write_comparison,
    write_jsonl,
    write_probe,
    write_run,
    write_study,
)

from trb.records import AS_BY_DEFAULT
from trb.report import ReportError, export, figures, probe, rollouts, study_panels, study_summary, tables, write_report
from trb.report.figures import write_figures
from trb.report.study import parse_study, read_study
from trb.report.tables import Cell, Table

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "study")


@pytest.fixture(scope="module")
def record(study: Path) -> dict[str, Any]:
    return json.loads((study / "study.json").read_text())


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return page_of(study)


def parsed(record: dict[str, Any]) -> Any:
    return parse_study(record, Path("nowhere"), "study.json")


def table_under(page: Page, caption: str) -> list[list[str]]:
    """The rows of the one table whose caption begins so."""
    starts = [text for text in page.text_of["caption"] if text.startswith(caption)]
    assert len(starts) == 1, starts
    html = next(text for text in page.text_of["table"] if text.strip().startswith(starts[0]))
    return [row for row in page.rows if row and all(cell in html for cell in row)]


# ---- the headline --------------------------------------------------------------------------------------


def two_methods(
    trb: float, opd: float, interval: list[float] | None, *, p_holm: float | None = 0.01, average: bool = True
) -> Any:
    """A study of two methods whose difference has this interval, in points."""
    record = study_record(methods=("opd", "trb"))
    ends = None if interval is None else [end / 100 for end in interval]
    found = {**difference(trb - opd), "interval": ends, "p_value_holm": p_holm}
    for entry in [record["average"], *record["settings"].values()]:
        for name, value in (("trb", trb), ("opd", opd)):
            entry["methods"][name] |= {"pass_at_1": value, "interval": [value - 0.01, value + 0.01]}
        entry["methods"]["trb"]["difference_to_opd"] = found
    if not average:
        record["average"] = {"methods": {}}
    return parsed(record)


@pytest.mark.parametrize(
    ("interval", "resolved"),
    [([0.1, 2.0], True), ([-2.0, -0.1], True), ([-0.2, 2.0], False), ([0.0, 2.0], False), ([-2.0, 0.0], False)],
)
def test_a_difference_is_resolved_only_if_its_interval_excludes_zero(interval: list[float], resolved: bool) -> None:
    middle = sum(interval) / 200
    text = study_summary.headline(two_methods(0.45 + middle, 0.45, interval))
    assert ("is resolved: the interval excludes zero" in text) is resolved
    assert ("is not resolved: the interval includes zero" in text) is not resolved
    assert f"{100 * middle:+.1f} points".replace("-", MINUS) in text


def test_the_headline_names_the_highest_average_and_the_difference_to_plain_distillation() -> None:
    text = study_summary.headline(two_methods(0.47, 0.45, [0.5, 3.5]))
    assert text == (
        "Averaged over 2 settings, TRB scores highest, 47.0% pass@1 (95% interval 46.0 to 48.0); its difference to "
        "OPD, +2.0 points (+0.5 to +3.5), is resolved: the interval excludes zero."
    )
    behind = study_summary.headline(two_methods(0.44, 0.45, [-2.5, 0.5]))
    assert "OPD scores highest, 45.0% pass@1" in behind and f"TRB's difference to OPD, {MINUS}1.0 points" in behind


def test_the_headline_falls_back_to_a_setting_and_to_saying_what_is_missing() -> None:
    assert study_summary.headline(two_methods(0.47, 0.45, [0.5, 3.5], average=False)).startswith(
        "In Chains, the first of the settings, TRB scores highest"
    )
    only = study_record(settings=("chains",), methods=("opd", "skd"))
    assert study_summary.headline(parsed(only)).endswith("TRB has no score yet.")
    alone = study_summary.headline(parsed(study_record(settings=("chains",), methods=("trb",))))
    assert "there is no OPD to compare with yet" in alone and "highest" not in alone
    assert "cannot be judged without an interval" in study_summary.headline(two_methods(0.47, 0.45, None))
    assert study_summary.headline(parsed({"settings": {}})) == "No method has been scored on the test problems yet."


def test_the_correction_for_several_comparisons_is_said_beside_the_headline() -> None:
    assert "p = 0.200: not resolved" in study_summary.context(two_methods(0.47, 0.45, [0.5, 3.5], p_holm=0.2))
    assert "p < 0.001: still resolved" in study_summary.context(two_methods(0.47, 0.45, [0.5, 3.5], p_holm=1e-5))
    assert "Holm" not in study_summary.context(two_methods(0.47, 0.45, [0.5, 3.5], p_holm=None))


# ---- the page ------------------------------------------------------------------------------------------


def test_results_show_every_setting_the_average_and_the_seeds(page: Page, record: dict[str, Any]) -> None:
    caption = next(text for text in page.text_of["caption"] if text.startswith("pass@1 on the test"))
    assert f"95% intervals over {SEEDS} seeds and 1,024 problems" in caption
    row = page.row("SKD")
    expected = []
    for entry in (record["settings"]["chains"], record["settings"]["sums"], record["average"]):
        low, high = entry["methods"]["skd"]["interval"]
        expected.append(f"{100 * entry['methods']['skd']['pass_at_1']:.1f}%{100 * low:.1f} to {100 * high:.1f}")
    assert row == ["SKD", *expected]
    best = {name: max(METHODS, key=lambda m, n=name: record["settings"][n]["methods"][m]["pass_at_1"])
            for name in record["settings"]}  # fmt: skip
    assert len(page.by_class("best")) >= 3 and set(best.values()) == {"trb"}
    assert page.row("Student, before")[1].startswith("12.0%") and page.row("Teacher")[3] == "–"


def test_every_table_and_chart_of_results_says_over_how_many_seeds(page: Page) -> None:
    captions = page.text_of["caption"]
    assert len(captions) == 14 and all(re.search(r"\b\d+ seeds", text) for text in captions), captions
    charts = [text for text in page.text_of["figcaption"] if "probe" not in text and "problems" not in text]
    assert len(charts) == 20 and all(f"over {SEEDS} seeds" in text for text in charts)


def test_forests_share_one_axis_with_zero_on_it(study: Path, record: dict[str, Any]) -> None:
    forests = study_panels.forests(read_study(study))
    assert forests[0].title == f"Average over 2 settings, {SEEDS} seeds in each"
    zero = forests[0].strip.zero
    assert zero is not None
    found = {(bars.title.split(",")[0], row.label): row.bar for bars in forests for row in bars.rows}
    assert len(found) == 3 * (len(METHODS) - 1)
    # Two known differences fix the scale; it must then hold for every mean and end.
    scale = (found["Chains", "TRB"].mean - zero) / 0.02  # type: ignore[operator]
    for setting in ("chains", "sums"):
        for name in ("skd", "veto", "temperature"):
            entry = record["settings"][setting]["methods"][name]["difference_to_opd"]
            bar = found[setting.capitalize(), {"skd": "SKD", "veto": "Veto", "temperature": "Temperature"}[name]]
            drawn = (bar.low, bar.mean, bar.high)
            true = (entry["interval"][0], entry["estimate"], entry["interval"][1])
            assert drawn == pytest.approx([zero + scale * value for value in true], abs=0.3)


def test_single_seeds_are_dots_on_the_scores_axis(study: Path, record: dict[str, Any]) -> None:
    found = read_study(study)
    bars = study_panels.scores(found, found.settings[0])
    per_seed = record["settings"]["chains"]["methods"]["trb"]["per_seed"]
    row = next(row for row in bars.rows if row.label == "TRB")
    assert row.bar.mean is not None and len(row.bar.dots) == SEEDS
    slope = (row.bar.dots[1] - row.bar.dots[0]) / (per_seed[1] - per_seed[0])
    assert row.bar.dots == pytest.approx([row.bar.dots[0] + slope * (v - per_seed[0]) for v in per_seed], abs=0.5)


def test_curves_and_bands_equal_the_file(page: Page, record: dict[str, Any]) -> None:
    charts = {chart["id"]: chart for chart in page.data["charts"]}
    curve = record["settings"]["sums"]["methods"]["veto"]["curve"]
    drawn = next(series for series in charts["sums-pass_at_1"]["series"] if series["method"] == "veto")
    assert drawn["x"] == curve["steps"]
    for mine, theirs in (("y", "mean"), ("low", "low"), ("high", "high")):
        assert drawn[mine] == pytest.approx(curve[theirs], rel=1e-5)
    budget = next(series for series in charts["chains-sequence_kl"]["series"] if series["method"] == "trb")
    bound = record["settings"]["chains"]["methods"]["trb"]["metrics"]["trb/sequence_kl_bound"]["mean"]
    assert budget["bound"] == pytest.approx(bound, rel=1e-5)
    assert {chart["axis"] for chart in charts.values() if chart["section"] == "curves"} == {"chains", "sums"}


def test_the_sweep_lists_every_configuration_and_marks_the_selected_one(page: Page) -> None:
    rows = [row for row in page.rows if row and "initial_kl_budget = " in row[0]]
    assert [row[-1] for row in rows] == ["", "selected", ""] * 2
    assert rows[1][0].strip() == "TRB: initial_kl_budget = 0.02" and rows[1][1] == "45.5%"


def test_a_study_folds_what_is_as_by_default(tmp_path: Path) -> None:
    directory = write_study(tmp_path / "study", study_record(("chains",), ("opd", "trb")))
    for path in directory.rglob("config.yaml"):
        method = path.parts[-3]
        path.write_text(f"student: s\nmax_steps: 20\n{AS_BY_DEFAULT}method: {method}\nseed: 0\nveto_strength: 1.0\n")
    page = page_of(directory)
    assert [" ".join(text.split()) for text in page.text_of["summary"] if "pair" not in text] == [
        "What differs between the runs 1", "Resolved options, other than by default 2", "As by default 1",
    ]  # fmt: skip
    assert [a.get("class") for a in page.all("details") if "open" not in a][-1] == "defaults"
    assert not [row for row in page.rows if row and row[0] == "veto_strength"]


def test_configurations_and_learning_speed_are_shown(page: Page) -> None:
    assert ["TRB", "initial_kl_budget = 0.02, blend_warmup_steps = 50"] in page.rows
    (speed, *_) = [row for row in page.rows if row and row[0] == "TRB" and row[-1] == f"{SEEDS - 1} of {SEEDS}"]
    assert speed[3] == "40" and "Steps to 40.0%" in page.text_of["th"]


def test_rollouts_are_those_of_the_smallest_seed_at_the_same_steps(page: Page, study: Path) -> None:
    rows = page.data["rollouts"]
    assert {row["method"] for row in rows} == set(METHODS) and {row["group"] for row in rows} == {0, 1}
    assert {row["step"] for row in rows} == {0, 5, 10, 15}
    assert "of another seed" not in {row["prompt"] for row in rows}
    path = study / "sums" / "test" / "trb" / "seed-100" / "rollouts.jsonl"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    shown = [row for row in rows if row["method"] == "trb" and row["group"] == 1]
    assert [(row["match"], row["rollout_index"]) for row in shown] == [
        (row["prompt_key"], row["rollout_index"]) for row in written
    ]
    texts = page.data["texts"]
    for row, original in zip(shown, written, strict=True):
        for key in ("student_log_prob", "teacher_log_prob", "kl_teacher"):
            assert row[key] == pytest.approx(original[key], rel=1e-3, abs=1e-9)
        for laws, expected in zip(row["alternatives"], original["alternatives"], strict=True):
            for flat, law in zip(laws, ("student", "teacher", "behavior"), strict=True):
                assert [texts[int(index)] for index in flat[::2]] == [text for text, _ in expected[law]]
                assert flat[1::2] == pytest.approx([chance for _, chance in expected[law]], rel=5e-3)


def test_all_methods_of_a_study_keep_their_colours_everywhere(page: Page) -> None:
    styles = {method["name"]: method["style"] for method in page.data["methods"]}
    assert len(set(styles.values())) == len(METHODS)
    for chart in page.data["charts"]:
        if chart["section"] == "curves":
            assert {series["method"]: series["style"] for series in chart["series"]}.items() <= styles.items()


def test_a_method_may_bring_its_own_label(tmp_path: Path) -> None:
    record = study_record(settings=("chains",), methods=("opd", "trb"))
    record["settings"]["chains"]["methods"]["trb"]["label"] = "Trust region"
    page = page_of(write_study(tmp_path / "study", record))
    assert page.row("Trust region")[1].startswith("46.")
    assert "Trust region's difference" in page.text_of["p"][0] or "its difference to OPD" in page.text_of["p"][0]


# ---- young, broken and hostile studies -----------------------------------------------------------------


def thin(record: dict[str, Any]) -> dict[str, Any]:
    """Every method reduced to its score."""
    for setting in record["settings"].values():
        for name, method in setting["methods"].items():
            setting["methods"][name] = {"pass_at_1": method["pass_at_1"]}
        for key in ("test", "dev", "steps", "student", "teacher", "sweep", "description"):
            del setting[key]
    return {"settings": record["settings"]}


@pytest.mark.parametrize(
    "young",
    [
        {},
        {"settings": {}},
        {"name": "n", "settings": {"a": {}}},
        {"settings": {"a": {"methods": {"trb": {}}}}},
        {"settings": {"a": {"methods": {"trb": {"curve": None, "area": None, "steps_to_target": None}}}}},
        thin(study_record()),
        {**study_record(methods=("trb",)), "average": {"methods": {}}},
        {**study_record(), "average": None, "diagnostics": None, "provenance": None},
    ],
    ids=["empty", "no-settings", "no-methods", "empty-method", "nulls", "scores-only", "one-method", "no-average"],
)
def test_a_young_study_makes_a_page_tables_and_figures(tmp_path: Path, young: dict[str, Any]) -> None:
    directory = tmp_path / "study"
    directory.mkdir()
    (directory / "study.json").write_text(json.dumps(young))
    page = page_of(directory)
    assert page.text_of["h1"] == [young.get("name", "study")]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {(a["href"] or "")[1:] for a in page.all("a")} <= ids
    for table in tables.study_tables(read_study(directory)):
        assert {len(row) for row in table.rows} == {len(table.header)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": []}, r"study\.json: settings is \[\], expected an object"),
        ({"settings": {"a": {"methods": {"trb": 1}}}}, r"settings\.a\.methods\.trb is 1, expected an object"),
        ({"settings": {"a": {"methods": {"trb": {"pass_at_1": "high"}}}}}, r"settings\.a\.methods\.trb\.pass_at_1"),
        ({"settings": {"a": {"methods": {"trb": {"interval": [1]}}}}}, r"methods\.trb\.interval is \[1\]"),
        (
            {"settings": {"a": {"methods": {"trb": {"curve": {"steps": [1, 2], "mean": [0.1]}}}}}},
            r"methods\.trb\.curve is .*, expected a number for each of its 2 steps",
        ),
        ({"settings": {"a": {"sweep": {"trb": {}}}}}, r"settings\.a\.sweep\.trb is \{\}, expected a list"),
        ({"level": 95}, r"level is 95, expected a share"),
        ({"name": 1}, r"name is 1, expected text"),
        ({"diagnostics": {"a": {"budgets": 3}}}, r"diagnostics\.a\.budgets is 3, expected a list"),
    ],
)
def test_a_malformed_study_is_refused_by_the_name_of_the_entry(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "study.json").write_text(json.dumps(change))
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path)


def test_setting_names_do_not_lead_out_of_the_study(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere" / "test" / "trb" / "seed-1", steps=3)
    inside = tmp_path / "study"
    inside.mkdir()
    for name in ("../elsewhere", "..", "/"):
        (inside / "study.json").write_text(json.dumps({"settings": {name: {"methods": {"trb": {"pass_at_1": 0.5}}}}}))
        assert read_study(inside).settings[0].runs == ()


def test_hostile_names_and_texts_stay_text(tmp_path: Path, page: Page) -> None:
    record = study_record(settings=("chains",), methods=("opd", "trb"))
    hostile = HOSTILE[0]
    setting = record["settings"].pop("chains")
    setting |= {"title": hostile, "description": HOSTILE[1], "test": [{"name": hostile, "problems": hostile}]}
    setting["methods"]["trb"] |= {"label": hostile, "configuration": {HOSTILE[1]: hostile, "hub_token": "hf_secret"}}
    setting["methods"][hostile] = copy.deepcopy(setting["methods"]["trb"])
    setting["methods"]["trb"]["suites"] = {hostile: 0.5, "b": 0.4}
    record["settings"][hostile] = setting
    record |= {
        "name": hostile,
        "description": hostile,
        "rule": hostile,
        "diagnostics": {hostile: record["diagnostics"]["chains"]},
    }
    (tmp_path / "study.json").write_text(json.dumps(record))
    made = page_of(tmp_path)
    assert {tag for tag, _ in made.tags} <= {tag for tag, _ in page.tags}
    assert len(made.all("script")) == 2 and not [n for _, a in made.tags for n in a if n.startswith("on")]
    assert made.text_of["h1"] == [hostile]
    assert "hf_secret" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    ids = [a["id"] for _, a in made.tags if "id" in a]
    assert len(ids) == len(set(ids))


# ---- rollouts ------------------------------------------------------------------------------------------


def runs_of(directory: Path, **rows: list[dict[str, Any]]) -> list[Any]:
    for name, lines in rows.items():
        (directory / name).mkdir()
        write_jsonl(directory / name / "rollouts.jsonl", lines)
    return [rollouts.Run(name, directory / name) for name in rows]


def test_runs_without_keys_are_matched_by_prompt_and_order(tmp_path: Path) -> None:
    rows = [{"step": 1, "prompt": prompt, "tokens": ["a"]} for prompt in ("p", "p", "q")]
    found = rollouts.collect([runs_of(tmp_path, trb=rows, opd=rows)]).rows
    keys = [(row["match"], row["rollout_index"]) for row in found]
    assert keys == [("p", 0), ("p", 1), ("q", 0)] * 2


def test_steps_that_were_scored_are_preferred(tmp_path: Path) -> None:
    plain = [{"step": step, "prompt": "p", "tokens": ["a"]} for step in range(20)]
    scored = [{**row, "teacher_log_prob": [-1.0]} if row["step"] % 5 == 0 else row for row in plain]
    found = rollouts.collect([runs_of(tmp_path, trb=scored, opd=plain)]).rows
    assert {row["step"] for row in found} == {0, 5, 10, 15}
    assert {row["method"] for row in found} == {"trb", "opd"}


def test_a_page_holds_bounded_tokens_and_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MAX_PAGE_TOKENS", 8 * 20)
    monkeypatch.setattr(rollouts, "MAX_ALTERNATIVES", 8 * 6)
    laws = {"student": [["x", 0.5], ["y", 0.25]], "teacher": [["x", 0.9]], "behavior": [["x", 0.7]]}
    row = {"step": 1, "tokens": ["x"] * 30, "teacher_log_prob": [-0.5] * 30, "alternatives": [laws] * 30}
    groups = [runs_of(tmp_path, **{f"{name}{k}": [row] * 2 for name in ("a", "b")}) for k in range(2)]
    found = rollouts.collect(groups)
    assert len(found.rows) == 8 and found.texts == ("x", "y")
    for key, length in (("tokens", 20), ("teacher_log_prob", 20), ("alternatives", 6)):
        assert {len(row[key]) for row in found.rows} == {length}
    assert {row["length"] for row in found.rows} == {30}
    notes = " ".join(found.notes)
    assert "longer than 20 tokens" in notes and "alternatives are kept for the first 6 tokens" in notes


@pytest.mark.parametrize(
    ("alternatives", "message"),
    [
        ("abc", "alternatives is 'abc'"),
        ([3], r"alternatives\[0\] is 3, expected an object"),
        ([{"student": "x"}], r"alternatives\[0\]\.student is 'x', expected a list"),
        ([{"student": [["x"]]}], r"alternatives\[0\]\.student\[0\] is \['x'\], expected \[text, probability\]"),
        (
            [{"student": [["x", "likely"]]}],
            r"alternatives\[0\]\.student\[0\] is \['x', 'likely'\], expected",
        ),
    ],
)
def test_malformed_alternatives_are_refused_with_their_line(tmp_path: Path, alternatives: Any, message: str) -> None:
    row = {"step": 1, "tokens": ["a"], "alternatives": alternatives}
    write_jsonl(tmp_path / "rollouts.jsonl", [row])
    with pytest.raises(ReportError, match=rf"rollouts\.jsonl, line 1: {message}"):
        write_report(tmp_path)


# ---- probes --------------------------------------------------------------------------------------------


def test_a_probe_makes_a_page_of_its_own(tmp_path: Path) -> None:
    directory = write_probe(tmp_path / "probe")
    record = json.loads((directory / "probe.json").read_text())
    page = page_of(directory)
    charts = {chart["id"]: chart for chart in page.data["charts"]}
    teacher = {series["method"]: series for series in charts["probe-continued-teacher"]["series"]}
    for name in ("student", "trb"):
        points = [t["policies"][name]["success"]["teacher"] for t in record["continuation"]["truncations"]]
        assert teacher[name]["y"] == pytest.approx([point["value"] for point in points])
        assert teacher[name]["low"] == pytest.approx([point["interval"][0] for point in points])
    assert charts["probe-continued-teacher"]["xLabels"] == ["4", "8", "16"]
    assert charts["probe-auroc"]["series"][0]["y"] == [0.7, 0.7, None]
    assert charts["probe-sequence_kl"]["series"][0]["bound"] == pytest.approx([0, 0.25, 1.25])
    assert charts["probe-replaced"]["xLabels"] == ["5", "15", "25"]
    assert {row["method"] for row in page.data["rollouts"]} == {"student", "trb", "skd"}
    # Of the lower ends -0.02, 0.02 and 0.10, two lie above zero.
    assert "more often than the student's own at 2, less often at 0, not resolved at 1" in page.text_of["p"][0]
    assert page.row("commit")[1] == PROVENANCE["commit"]


def test_an_unbounded_budget_and_missing_parts_are_drawn_as_such(tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text(
        json.dumps(
            {"budgets": [{"kl_budget": 0.0, "reward": {"value": 0.1}}, {"kl_budget": None, "reward": {"value": 0.9}}]}
        )
    )
    page = page_of(tmp_path)
    (chart,) = page.data["charts"]
    assert chart["xLabels"] == ["0", "∞"] and chart["series"][0]["y"] == [0.1, 0.9]
    assert "No continuation of cut rollouts has been measured." in page.text_of["p"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"budgets": [1]}, r"budgets\[0\] is 1, expected an object"),
        ({"continuation": {"truncations": [{"length": "x"}]}}, "length is 'x', expected a number"),
        ({"continuation": 3}, "continuation is 3, expected an object"),
        ({"budgets": [{"kl_budget": 1, "reward": {"value": 1, "interval": 2}}]}, "interval is 2"),
        ({"problems": [1]}, r"problems is \[1\]"),
    ],
)
def test_a_malformed_probe_is_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    (tmp_path / "probe.json").write_text(json.dumps(record))
    with pytest.raises(ReportError, match=rf"probe\.json.*{message}"):
        write_report(tmp_path)


# ---- tables --------------------------------------------------------------------------------------------


def cells_of_markdown(line: str) -> list[str]:
    """The cells of one row as a reader sees them: split at unescaped pipes, escapes undone."""
    cells = re.split(r"(?<!\\)(?:\\\\)*\|", line.strip())[1:-1]
    plain = [re.sub(r"\\([\\`*_\[\]|~#$])", r"\1", cell.strip()) for cell in cells]
    return [cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for cell in plain]


# Every character that LaTeX reads as something else, and what stands for it.
LATEX_TEXT = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"\textquotedbl{}": '"', r"\textasciigrave{}": "`",
    **{"\\" + c: c for c in "&%$#_{}"},
}  # fmt: skip


def text_of_latex(source: str) -> str:
    """What LaTeX would print; fails on a special character that stands unescaped."""
    known = sorted(LATEX_TEXT, key=len, reverse=True)
    found = ""
    while source:
        command = next((one for one in known if source.startswith(one)), None)
        if command is None:
            assert source[0] not in '\\&%$#_{}~^<>|"`', source
            found, source = found + source[0], source[1:]
        else:
            found, source = found + LATEX_TEXT[command], source[len(command) :]
    return found


PLAIN = st.text(st.sampled_from("ab 1.5[]\\&%$#_{}~^<>|\"`*'-=é"), min_size=1, max_size=12).map(str.strip).filter(bool)


@given(PLAIN, PLAIN)
def test_any_text_survives_markdown_and_latex(first: str, second: str) -> None:
    table = Table("t", "caption", ("A", first), ((Cell(second), Cell(first)),))
    one_line = [" ".join(text.split()) for text in (first, second)]
    lines = tables.to_markdown(table).splitlines()
    assert cells_of_markdown(lines[2]) == ["A", one_line[0]]
    assert cells_of_markdown(lines[4]) == [one_line[1], one_line[0]]
    latex = tables.to_latex(table)
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().removesuffix(r"\\").strip()
    cells = [cell.strip() for cell in re.split(r"(?<!\\) & ", body)]
    assert [text_of_latex(cell.removeprefix("{}")) for cell in cells] == [one_line[1], one_line[0]]
    assert not body.startswith("[")
    for written, text in zip(list(csv.reader(io.StringIO(tables.to_csv(table))))[1], (second, first), strict=True):
        assert written in (text, f"'{text}") and written[:1] not in ("=", "+", "-", "@")  # no spreadsheet runs it


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
@pytest.mark.parametrize(
    "before", ["", " ", "\xa0", "\t", "\r", "\n", "\0", "\ufeff", "\u200b", "a;", 'a"; ', "a\n", "a\t"]
)
def test_no_cell_of_a_csv_file_begins_a_formula(before: str, start: str) -> None:
    """However a spreadsheet cuts the file: at commas, semicolons, tabs or lines, with and without minding quotes."""
    text = f"{before}{start}1+1"
    written = tables.to_csv(Table("t", "caption", ("A", text), ((Cell(text), Cell("b")), (Cell("c"), Cell(text)))))
    cuts = [re.split(cut, written) for cut in ("[,\r\n]", "[;\r\n]", "[\t\r\n]", "[,;\t\r\n]")]
    ignored = '\0\ufeff\u200b"' + "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
    for cell in itertools.chain.from_iterable(cuts):
        assert cell.strip(ignored)[:1] not in ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20"), cell


def test_negative_numbers_stay_numbers_in_csv() -> None:
    table = Table("t", "caption", ("A", "B"), ((Cell("a"), Cell(-0.5, "number", (-1.0, 0.25))),))
    assert tables.to_csv(table).splitlines()[1] == "a,-0.5,-1.0,0.25"


def test_tables_show_the_numbers_of_the_study(study: Path, record: dict[str, Any]) -> None:
    found = {table.name: table for table in tables.tables_of(study)}
    assert {"results", "differences", "suites-chains", "learning-sums", "sweep-chains", "pairs-sums"} <= set(found)
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(found["results"]))))
    by_method = {line["Method"]: line for line in lines}
    trb = record["settings"]["sums"]["methods"]["trb"]
    assert float(by_method["TRB"]["Sums"]) == trb["pass_at_1"]
    assert [float(by_method["TRB"][f"Sums, {end}"]) for end in ("low", "high")] == trb["interval"]
    assert by_method["Teacher"]["Average"] == ""
    text = tables.to_markdown(found["results"])
    low, high = (100 * end for end in trb["interval"])
    assert f"**{100 * trb['pass_at_1']:.1f}%** ({low:.1f} to {high:.1f})" in text
    assert text.count("**") == 2 * 3  # one best per column
    pairs = list(csv.DictReader(io.StringIO(tables.to_csv(found["pairs-chains"]))))
    skd = next(line for line in pairs if line["Method"] == "SKD")
    expected = record["settings"]["chains"]["methods"]["skd"]["differences"]["veto"]["estimate"]
    assert float(skd["Veto"]) == expected and skd["SKD"] == ""


def test_latex_tables_are_booktabs_with_seeds_in_the_caption(study: Path) -> None:
    for table in tables.tables_of(study / "study.json"):
        latex = tables.to_latex(table)
        for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
            assert latex.count(rule) == 1
        columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", latex)[1]  # type: ignore[index]
        body = latex.split(r"\toprule")[1].split(r"\bottomrule")[0].replace("\\midrule", "").strip()
        rows = [row for row in body.split("\\\\") if row.strip()]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}
        assert re.search(r"\d seeds", latex.split("\n")[2])
        assert re.search(r"[εβμ−–‖]", latex) is None  # pdflatex does not know them


def test_comparisons_and_records_have_tables_too(tmp_path: Path, record: dict[str, Any]) -> None:
    directory = write_comparison(tmp_path / "comparison")
    (table,) = tables.tables_of(directory)
    assert table.header[:2] == ("Model", "pass@1")
    assert tables.tables_of(directory / "results.json") == [table]
    assert tables.tables_of(json.loads((directory / "results.json").read_text())) == [table]
    trb = next(row for row in table.rows if row[0].value == "TRB")
    assert trb[1].value == 0.46 and trb[1].best
    assert tables.tables_of(record)[0].name == "results"
    with pytest.raises(ReportError, match="neither settings"):
        tables.tables_of({"provenance": {}})
    with pytest.raises(ReportError, match=r"nothing\.json does not exist"):
        tables.tables_of(tmp_path / "nothing.json")


def test_write_tables_writes_each_in_three_formats(tmp_path: Path) -> None:
    results = {"trb": score(0.4), "x/../y": score(0.3), "\ud800": score(0.2)}
    paths = tables.write_tables(results, tmp_path / "new" / "tables")
    assert [path.name for path in paths] == ["scores.md", "scores.csv", "scores.tex"]
    assert all(path.parent == tmp_path / "new" / "tables" for path in paths)
    assert "x/../y" in paths[0].read_text(encoding="utf-8")


# ---- figures -------------------------------------------------------------------------------------------


def small_study(directory: Path) -> Path:
    record = study_record(settings=("chains",), methods=("opd", "trb"))
    for method in record["settings"]["chains"]["methods"].values():
        method["metrics"] = {"trb/kl_student": method["metrics"]["trb/kl_student"]}
    record["diagnostics"]["chains"] = {"replacement": record["diagnostics"]["chains"]["replacement"]}
    directory.mkdir()
    (directory / "study.json").write_text(json.dumps(record))
    return directory


def test_export_writes_figures_and_tables(tmp_path: Path) -> None:
    paths = export(small_study(tmp_path / "study"), tmp_path / "out")
    assert all(path.is_file() for path in paths)
    drawn = {path.stem for path in paths if path.suffix == ".svg"}
    curves = {"chains-pass_at_1", "chains-kl_student", "chains-probe-replaced"}
    assert drawn == {"differences", "scores-chains", "sweep-chains"} | curves
    assert {path.parent for path in paths} == {tmp_path / "out" / "figures", tmp_path / "out" / "tables"}
    assert not (tmp_path / "study" / "figures").exists()
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_probe_exports_figures_and_no_tables(tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text(
        json.dumps({"replacement": [{"teacher_top_k": 5, "replaced": {"value": 0.1}}]})
    )
    assert [path.name for path in export(tmp_path, tmp_path)] == ["probe-replaced.png", "probe-replaced.svg"]
    assert [path.name for path in write_figures(tmp_path, ("svg",))] == ["probe-replaced.svg"]


def test_the_forest_figure_draws_estimates_and_intervals_in_points(tmp_path: Path) -> None:
    found = read_study(small_study(tmp_path / "study"))
    axes = figures.draw_bars(study_panels.forests(found), "points", zero=True).axes[0]
    spans = [line.get_xdata() for line in axes.get_lines() if len(line.get_xdata()) == 2]
    # 2 points with a half width of 1.2; with one setting there is no average beside it.
    assert list(spans[0]) == pytest.approx([0.8, 3.2])
    means = [line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert means == pytest.approx([2.0])
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.get_lines())


def test_figures_of_ordinal_axes_name_their_places(tmp_path: Path) -> None:
    record = json.loads((write_probe(tmp_path / "probe") / "probe.json").read_text())
    (panel,) = [p for group in probe.groups(record, "", "x") for p in group.panels if p.id == "probe-reward"]
    axes = figures.draw(panel).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.01", "0.05"]
    assert "one pair of models" in axes.get_xlabel()


def test_long_labels_leave_room_for_the_plot() -> None:
    record = study_record()
    name, entries = next(iter(record["settings"].items()))
    for configurations in entries["sweep"].values():
        for entry in configurations:
            entry["configuration"] = {"initial_temperature": 0.9, "temperature_warmup_steps": 25}
    study = parse_study(record, Path("unused"), "x")
    setting = next(found for found in study.settings if found.name == name)
    figure = figures.draw_bars([study_panels.sweep(study, setting)], "pass@1, percent")
    figure.savefig(io.BytesIO())  # warns, which is an error here, where nothing is left of the axes
    inches = figure.axes[0].get_position().width * figure.get_figwidth()
    assert inches > 2.5
