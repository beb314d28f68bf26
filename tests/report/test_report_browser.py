"""The report in a browser, used as a reader uses it: pointer, keyboard, both colour schemes, paper, hostile text."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, Tab, chromium
from report_helpers import (
    HOSTILE,
    METHODS,
    STEPS,
    matched_rows,
    write_comparison,
    write_hostile,
    write_jsonl,
    write_outcomes,
    write_run,
    write_study,
)

from trb.records import AS_BY_DEFAULT
from trb.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium installed: the page cannot be used without one")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_study(tmp_path_factory.mktemp("browser") / "study")
    write_report(directory)
    return directory


@pytest.fixture
def tab(browser: Browser, study: Path) -> Iterator[Tab]:
    """The study's page, opened from disk; whatever a test does, the page must not complain."""
    opened = browser.open((study / "report.html").as_uri())
    yield opened
    assert opened.complaints == []
    assert {url.split("#")[0] for url in opened.requests} <= {(study / "report.html").as_uri(), "data:,"}


STATE = """(() => {
  const text = (query) => [...document.querySelectorAll(query)].map((node) => node.textContent);
  const pins = [...document.querySelectorAll(".pin:not([hidden])")];
  return {
    step: text(".step-name")[0], prompt: text(".prompt")[0], panes: text(".pane .part"), tokens: text(".tokens"),
    value: document.querySelector(".slider").value, said: document.querySelector(".slider").ariaValueText,
    pins: pins.map((pin) => [pin.closest("figure").id, Number(pin.getAttribute("x1"))]),
    earlier: document.querySelector('[aria-label="Earlier step"]').disabled,
    later: document.querySelector('[aria-label="Later step"]').disabled,
  };
})()"""


def rows_at(method: str, step: int, setting: str = "chains") -> list[dict[str, Any]]:
    """What the fixture wrote for one method and step."""
    return [row for row in matched_rows(method, setting, step) if row["step"] == step]


def focused(tab: Tab) -> tuple[int, int]:
    """Which pane and which of its tokens has the focus, -1 for none."""
    return tuple(
        tab.evaluate(
            "(() => { const boxes = [...document.querySelectorAll('.tokens')], at = document.activeElement;"
            " const pane = boxes.findIndex((box) => box.contains(at));"
            " return [pane, pane < 0 ? -1 : [...boxes[pane].children].indexOf(at)]; })()"
        )
    )


# ---- the viewer ----------------------------------------------------------------------------------------


def test_two_methods_stand_side_by_side_on_the_same_prompt(tab: Tab) -> None:
    first, second = rows_at("trb", 0)[0], rows_at("opd", 0)[0]
    state = tab.evaluate(STATE)
    assert state["prompt"] == first["prompt"] == second["prompt"]
    shown = [text.replace("\n", "") for text in state["tokens"]]
    assert shown == ["".join(row["tokens"]).replace("\n", "") for row in (first, second)]
    assert [text.split(" step")[0] for text in state["panes"]] == ["TRB", "OPD"]
    tab.choose(".controls select", 2, "skd")
    tab.click(".rows button", 2)
    state = tab.evaluate(STATE)
    assert state["prompt"] == rows_at("skd", 0)[2]["prompt"]
    assert state["panes"][1].startswith("SKD step 0")
    tab.choose(".controls select", 2, "")
    assert len(tab.evaluate(STATE)["tokens"]) == 1
    tab.choose(".controls select", 0, "1")
    state = tab.evaluate(STATE)
    assert state["prompt"] == rows_at("trb", 0, "sums")[2]["prompt"]


def test_the_slider_moves_through_training_by_pointer_and_keys(tab: Tab) -> None:
    before = tab.evaluate(STATE)
    assert (before["step"], before["value"], before["earlier"], before["later"]) == ("step 0", "0", True, False)
    tab.drag(".slider", 0.02, 0.98)
    state = tab.evaluate(STATE)
    assert (state["step"], state["said"], state["later"]) == ("step 15", "step 15", True)
    assert state["prompt"] == rows_at("trb", 15)[0]["prompt"] != before["prompt"]
    tab.press("ArrowLeft")  # the drag left the focus on the slider
    assert tab.evaluate(STATE)["step"] == "step 10"
    tab.press("Home")
    assert tab.evaluate(STATE)["step"] == "step 0"
    tab.click('[aria-label="Later step"]')
    assert tab.evaluate(STATE)["step"] == "step 5"


def test_charts_of_the_setting_mark_the_step_and_lead_to_it(tab: Tab) -> None:
    def place(step: int) -> float:
        # The fixture's curves run from step 0 to 100 over the plot's width.
        return 44 + step / 100 * (360 - 44 - 8)

    tab.drag(".slider", 0.02, 0.98)
    pins = tab.evaluate(STATE)["pins"]
    assert len(pins) == 10 and all(name.startswith("figure-chains-") for name, _ in pins)
    assert [x for _, x in pins] == pytest.approx([place(15)] * len(pins), abs=0.1)
    tab.click("#figure-sums-pass_at_1 > svg", across=place(10) / 360)
    state = tab.evaluate(STATE)
    assert state["step"] == "step 10" and state["prompt"] == rows_at("trb", 10, "sums")[0]["prompt"]
    assert all(name.startswith("figure-sums-") for name, _ in state["pins"])


TINTS = """[...document.querySelectorAll(".tokens")].map((box) => [...box.children].map(
  (span) => [Number(span.style.getPropertyValue("--a")), getComputedStyle(span).backgroundColor]))"""


def test_tints_follow_the_numbers_and_the_legend_says_which(tab: Tab) -> None:
    row = rows_at("trb", 0)[0]
    strengths: dict[str, list[float]] = {}
    colours = {}
    for place, name in enumerate(("weight", "kl", "accepted", "log_prob")):
        tab.click(".choices button", place)
        (mine, theirs), legend = tab.evaluate(TINTS), tab.texts(".scale")[0]
        strengths[name], colours[name] = [a for a, _ in mine], [colour for _, colour in mine]
        assert tab.evaluate("document.querySelectorAll('.choices button[aria-pressed=true]').length") == 1
        assert len(theirs) == len(row["tokens"])
        if name == "weight":
            assert legend.startswith("share of the teacher in μ:") and legend.endswith("00.250.50.751")
            assert {a for a, _ in theirs} == {0}
    assert strengths["weight"] == pytest.approx(row["teacher_weight"], abs=2e-3)
    top = max(max(r["kl_student"]) for m in METHODS for s in ("chains", "sums") for t in (0, 5, 10, 15)
              for r in rows_at(m, t, s))  # fmt: skip
    assert strengths["kl"] == pytest.approx([kl / top for kl in row["kl_student"]], abs=3e-3)
    assert strengths["accepted"] == [float(value == 0) for value in row["accepted"]]
    assert "draft rejected, token replaced (0)" in tab.texts(".scale")[0] or "log-probability" in legend
    order = sorted(range(len(row["tokens"])), key=lambda k: row["teacher_log_prob"][k])
    drawn = [strengths["log_prob"][k] for k in order]
    assert drawn == sorted(drawn, reverse=True) and len(set(drawn)) > 3
    assert len({tuple(found) for found in colours.values()}) == 4


def test_pointing_at_a_token_shows_its_numbers_and_alternatives_without_moving_the_page(tab: Tab) -> None:
    row = rows_at("trb", 0)[0]
    tab.place(".tok", 3)
    boxes = "[...document.querySelectorAll('.tokens, .rows, .scale')].map((node) => node.getBoundingClientRect())"
    panel = "document.querySelector('.panel').offsetHeight"
    layout = f"[document.documentElement.scrollHeight, {panel}, ...{boxes}.map((box) => box.top + scrollY)]"
    before = tab.evaluate(layout)
    for index in (3, 5, 8):  # a character, a line end, a long token
        tab.hover(".tok", index)
        assert tab.evaluate(layout) == before
    assert tab.texts(".panel .title") == ["Token 9 <|end|>"]
    tab.hover(".tok", 5)
    assert tab.texts(".panel .title") == ["Token 6 ↵"]
    tab.hover(".tok", 3)
    numbers = dict(zip(tab.texts(".numbers dt"), tab.texts(".numbers dd"), strict=True))
    assert float(numbers["Teacher weight"]) == pytest.approx(row["teacher_weight"][3], rel=5e-3)
    assert float(numbers["KL to teacher"]) == pytest.approx(row["kl_teacher"][3], rel=5e-3)
    assert numbers["Draft"] == ("kept" if row["accepted"][3] else "rejected")
    assert float(numbers["Student"].split(" ")[0]) == pytest.approx(math.exp(row["student_log_prob"][3]), abs=6e-4)
    laws = tab.evaluate(
        "[...document.querySelectorAll('.law')].map((law) => [law.querySelector('.part').textContent,"
        " [...law.querySelectorAll('.alternative')].map((one) => [one.querySelector('code').textContent,"
        " Number(one.querySelector('span').textContent), one.classList.contains('drawn')])])"
    )
    assert [name for name, _ in laws] == ["Student", "Teacher", "μ, sampled from"]
    for (_, shown), law in zip(laws, ("student", "teacher", "behavior"), strict=True):
        written = row["alternatives"][3][law]
        assert [text for text, _, _ in shown] == [text.replace(" ", "␣") for text, _ in written]
        assert [value for _, value, _ in shown] == pytest.approx([chance for _, chance in written], abs=1e-3)
        assert [drawn for _, _, drawn in shown] == [text == row["tokens"][3] for text, _ in written]
    tab.hover("h1")
    assert tab.texts(".panel")[0].startswith("Point at a token")


def test_the_keyboard_alone_reaches_every_token(tab: Tab) -> None:
    tab.evaluate("document.querySelector('.rows li:last-child button').focus()")
    tab.press("Tab")
    assert focused(tab) == (0, 0)
    tab.press("ArrowRight")
    tab.press("ArrowRight")
    assert focused(tab) == (0, 2) and tab.texts(".panel .title") == ["Token 3 " + rows_at("trb", 0)[0]["tokens"][2]]
    said = tab.texts(".spoken")[0]
    assert said.startswith("Token 3 of 9") and "Teacher weight" in said and "μ, sampled from: " in said
    tab.press("ArrowDown")  # the fixture's sixth token ends the line
    assert focused(tab)[1] >= 6
    tab.press("ArrowUp")
    assert focused(tab)[1] < 6
    tab.press("End")
    assert focused(tab) == (0, 8)
    tab.press("ArrowRight")
    assert focused(tab) == (0, 8)
    tab.press("Tab")
    assert focused(tab) == (1, 0)
    selected = "[...document.querySelectorAll('.tokens')].map((box) => box.querySelectorAll('[tabindex=\"0\"]').length)"
    assert tab.evaluate(selected) == [1, 1]  # one stop each: tabbing through hundreds of tokens would be a trap
    # What is read by keyboard stays read while the pointer passes over another token.
    tab.hover(".tok", 4)
    tab.hover("h1")
    assert tab.texts(".panel .title")[0].startswith("Token 1 ")


def test_a_rollout_without_a_partner_says_so(browser: Browser, tmp_path: Path) -> None:
    directory = write_comparison(tmp_path / "comparison")
    trb, opd = rows_at("trb", 0), rows_at("opd", 0)
    write_jsonl(directory / "trb" / "rollouts.jsonl", trb)
    write_jsonl(directory / "opd" / "rollouts.jsonl", opd[1:])
    tab = browser.open(write_report(directory).as_uri())
    assert tab.texts(".missing")[1:] == ["No rollout of this prompt was recorded at step 0."]
    tab.click(".rows button", 1)
    assert len(tab.texts(".tokens")) == 2 and tab.complaints == []


def test_a_setting_without_rollouts_is_passed_over(browser: Browser, tmp_path: Path) -> None:
    directory = write_study(tmp_path / "study")
    shutil.rmtree(directory / "chains")
    for method in METHODS[2:]:
        shutil.rmtree(directory / "sums" / "test" / method)
    tab = browser.open(write_report(directory).as_uri())
    assert tab.evaluate(STATE)["prompt"] == rows_at("trb", 0, "sums")[0]["prompt"]
    tab.click("#figure-chains-pass_at_1 > svg")
    assert tab.evaluate(STATE)["step"] == "step 0"
    assert tab.complaints == []


def with_changes(directory: Path) -> Path:
    """A comparison in which training changed problems, with their completions."""
    write_comparison(directory)
    return write_outcomes(
        directory, {name: {"chains": results} for name, results in
                    (("student", [1, 0, 1, 0]), ("trb", [1, 1, 0, 0]), ("opd", [1, 0, 1, 1]))}
    )  # fmt: skip


def test_a_changed_problem_leads_to_both_completions(browser: Browser, tmp_path: Path) -> None:
    tab = browser.open(write_report(with_changes(tmp_path / "comparison")).as_uri())
    assert tab.texts(".problems tbody tr th") == [
        f"problem {number} How much is {number - 1} + 1?" for number in (3, 2, 4)
    ]
    assert tab.evaluate("document.querySelector('.controls select').value") == "0"  # training comes first
    tab.click("a[data-match]", 1)  # what trb made of the third problem
    assert tab.evaluate("location.hash") == "#rollouts"
    state = tab.evaluate(STATE)
    assert state["prompt"] == "How much is 2 + 1?"
    assert state["tokens"] == ["student chains says 2", "trb chains says 2"]
    assert state["panes"] == ["Student before training, right, 7 tokens", "TRB after training, wrong, 7 tokens"]
    assert tab.evaluate("[...document.querySelectorAll('.panel, .steps, .scale, .tint')].every((n) => !n.offsetParent)")
    assert state["pins"] == []
    current = "[...document.querySelectorAll('.rows button')].findIndex((one) => one.ariaCurrent === 'true')"
    assert tab.texts(".rows .excerpt")[tab.evaluate(current)] == "How much is 2 + 1?"
    tab.evaluate("document.querySelectorAll('a[data-match]')[8].focus()")  # what opd made of the fourth
    tab.press("Enter")
    assert tab.evaluate(STATE)["tokens"] == ["student chains says 3", "opd chains says 3"]
    tab.choose(".controls select", 0, "0")  # back to training
    state = tab.evaluate(STATE)
    assert state["step"] == "step 1" and state["panes"][0].startswith("OPD step 1")
    tab.click("#figure-loss > svg")
    assert tab.evaluate(STATE)["pins"] and tab.complaints == []


# ---- colours -------------------------------------------------------------------------------------------

# The contrast of text with what lies behind it, after painting every layer on a canvas.
CONTRAST = """((query) => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (layers) => {
    context.clearRect(0, 0, 1, 1);
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  return [...document.querySelectorAll(query)].map((node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
    const [paper, ink] = [light(paint(layers)), light(paint([...layers, getComputedStyle(node).color]))];
    return (Math.max(paper, ink) + 0.05) / (Math.min(paper, ink) + 0.05);
  });
})"""
TEXT = (
    ".tok, .panel dt, .panel dd, .panel code, .panel span, .part, .facts-of dt, .rows .meta, .scale, caption, .aside, "
    ".between, .headline, .context, .choices button, button.key, figcaption .caption, .missing, .step-name"
)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_keeps_its_contrast_on_every_tint_in_both_schemes(tab: Tab, dark: bool) -> None:
    tab.emulate(dark=dark)
    assert (tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")) is dark
    tab.evaluate("document.querySelectorAll('.tok').forEach((span) => span.style.setProperty('--a', '1'))")
    tab.evaluate("[...document.querySelectorAll('.tok')].slice(0, 4).forEach((span) => span.classList.add('rejected'))")
    tab.hover(".tok", 6)
    contrasts = tab.evaluate(f"{CONTRAST}({json.dumps(TEXT)})")
    assert len(contrasts) > 80 and min(contrasts) >= 4.5


def test_dark_differs_from_light_and_can_be_chosen(tab: Tab) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    tab.emulate(dark=False)
    light = tab.evaluate(paper)
    tab.emulate(dark=True)
    dark = tab.evaluate(paper)
    assert light != dark
    tab.click("#theme")
    assert tab.texts("#theme") == ["Theme: light"] and tab.evaluate(paper) == light
    tab.click("#theme")
    assert tab.texts("#theme") == ["Theme: dark"] and tab.evaluate(paper) == dark


def test_on_paper_tints_survive_as_lines_and_controls_are_gone(tab: Tab) -> None:
    tab.emulate(dark=True, media="print")
    seen = tab.evaluate(
        """({
          hidden: [...document.querySelectorAll(".controls, .panel, .rows, .top")].every((node) => !node.offsetParent),
          legend: document.querySelector(".scale").offsetHeight,
          paper: getComputedStyle(document.body).backgroundColor,
          lines: [...document.querySelector(".tokens").children].map((span) => [
            Number(span.style.getPropertyValue("--a")), parseFloat(getComputedStyle(span).borderBottomWidth)]),
        })"""
    )
    assert seen["hidden"] and seen["legend"] > 0 and seen["paper"] == "rgb(255, 255, 255)"
    lines = seen["lines"]
    assert all((width > 0) == (strength > 0) for strength, width in lines)
    assert sorted(width for _, width in sorted(lines)) == [width for _, width in sorted(lines)]
    assert len({width for _, width in lines}) > 1


# Columns break as pages do: every heading whose next neighbour begins in another column is stranded.
STRANDED = """((height) => {
  document.querySelectorAll("details:not(.defaults)").forEach((one) => { one.open = true; });
  Object.assign(document.querySelector("main").style,
    { height: `${height}px`, width: "680px", columnWidth: "680px", columnGap: "40px", columnFill: "auto" });
  const shown = (node) => node.getClientRects().length && getComputedStyle(node).position !== "absolute";
  const column = (rects, last) => Math.floor(((last ? rects[rects.length - 1] : rects[0]).left + 20) / 720);
  const next = (node) => {
    let at = node.nextElementSibling;
    while (at && !shown(at)) at = at.nextElementSibling;
    return at;
  };
  const all = document.querySelectorAll("main :is(h2, h3, h4, caption, summary, .lead, .legend)");
  const headings = [...all].filter(shown);
  const stranded = headings.filter((node) => {
    let after = next(node);
    // The first thing inside a box is what stays or goes.
    while (after?.firstElementChild && !/^(P|TR|FIGURE|SVG)$/i.test(after.tagName) && shown(after.firstElementChild)) {
      after = after.firstElementChild;
    }
    return after && column(node.getClientRects(), true) !== column(after.getClientRects(), false);
  });
  return [headings.length, stranded.map((node) => `${node.tagName} ${node.textContent.trim().slice(0, 40)}`)];
})"""


@pytest.mark.parametrize("kind", ["study", "comparison"])
def test_on_paper_no_heading_is_left_alone_at_the_end_of_a_page(
    browser: Browser, study: Path, tmp_path: Path, kind: str
) -> None:
    directory = study if kind == "study" else with_changes(tmp_path / "comparison")
    tab = browser.open(write_report(directory).as_uri())
    tab.emulate(dark=False, media="print")
    found = {height: tab.evaluate(f"{STRANDED}({height})") for height in range(900, 1040, 10)}
    assert min(count for count, _ in found.values()) > 10
    assert {height: stranded for height, (_, stranded) in found.items() if stranded} == {}
    tab.evaluate(
        "(() => { const sheet = new CSSStyleSheet(); sheet.replaceSync('main * { break-after: auto !important;"
        " break-before: auto !important; }'); document.adoptedStyleSheets = [sheet]; })()"
    )
    assert any(tab.evaluate(f"{STRANDED}({height})")[1] for height in range(900, 1040, 10)), "the check sees them"


def test_on_paper_what_is_as_by_default_stays_folded(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    (run / "config.yaml").write_text(f"method: trb\nmax_steps: 3\n{AS_BY_DEFAULT}seed: 0\n")
    tab = browser.open(write_report(run).as_uri())
    opened = "[...document.querySelectorAll('details')].map((one) => one.open)"
    assert tab.evaluate(opened) == [True, False]
    tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = false; })")
    tab.evaluate("(dispatchEvent(new Event('beforeprint')), true)")
    assert tab.evaluate(opened) == [True, False]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(tab: Tab, width: int) -> None:
    tab.resize(width, 800)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    before = tab.evaluate("document.querySelector('.panel').offsetHeight")
    tab.hover(".tok", 3)
    assert tab.evaluate("document.querySelector('.panel').offsetHeight") == before


# ---- hostile content and old files ---------------------------------------------------------------------


def test_markup_and_scripts_in_rollouts_do_nothing(browser: Browser, tmp_path: Path) -> None:
    directory = write_hostile(tmp_path / "hostile")
    alternatives = [{law: [[text, 0.5]] for law in ("student", "teacher", "behavior")} for text in HOSTILE]
    row = {"step": 1, "prompt": " ".join(HOSTILE), "prompt_key": HOSTILE[0], "tokens": HOSTILE, "reward": 1.0}
    row |= {"teacher_prompt": f"answered: {' '.join(HOSTILE)}"}
    numbers = {"teacher_weight": [0.5] * len(HOSTILE), "teacher_log_prob": [-1.0] * len(HOSTILE)}
    for run in directory.iterdir():
        if run.is_dir():
            write_jsonl(run / "rollouts.jsonl", [{**row, **numbers, "alternatives": alternatives}] * 2)
    tab = browser.open(write_report(directory).as_uri())
    elements = "document.querySelectorAll('script, img, iframe, object, embed').length"
    before = tab.evaluate(elements)
    for index in range(len(HOSTILE)):
        tab.hover(".tok", index)
        assert len(tab.texts(".alternative")) == 3
    tab.click(".rows button", 1)
    tab.press("Tab")
    tab.press("ArrowRight")
    assert tab.evaluate(elements) == before == 2
    assert tab.evaluate("typeof window.hacked") == "undefined"
    assert tab.complaints == []
    prompt, taught = tab.texts(".prompt")
    assert HOSTILE[0] in prompt and taught == f"answered: {prompt}"
    shown = tab.texts(".tok")[: len(HOSTILE)]
    assert shown[0] == HOSTILE[0] and "⟨U+202E⟩" in shown[3] and "␛" in shown[3]  # shown, not obeyed


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_comparison(tmp_path_factory.mktemp("browser") / "comparison")
    write_report(directory)
    return directory


def test_rollouts_recorded_without_scores_still_show(browser: Browser, comparison: Path) -> None:
    tab = browser.open((comparison / "report.html").as_uri())
    rows = {
        name: [json.loads(line) for line in (comparison / name / "rollouts.jsonl").read_text().splitlines()]
        for name in ("trb", "opd")
    }
    assert tab.texts(".choices button") == ["Teacher weight", "KL to student", "Acceptance"]
    tab.hover(".tok", 1)
    assert tab.texts(".panel .title") == ["Token 2 ␣"] and tab.texts(".law") == []
    assert tab.texts(".numbers dt") == ["Teacher weight", "KL to student", "Draft"]
    tab.click(".choices button", 2)
    rejected = tab.evaluate("[...document.querySelectorAll('.tok')].map((span) => span.classList.contains('rejected'))")
    first = [value == 0 for value in rows["trb"][0]["accepted"]]
    assert any(first) and rejected[: len(first)] == first
    tab.click('[aria-label="Later step"]')
    assert tab.texts(".step-name") == ["step 5"]
    assert tab.texts(".tokens")[0].replace("\n", "") == "".join(rows["trb"][4]["tokens"]).replace("\n", "")
    assert tab.complaints == []


# ---- curves --------------------------------------------------------------------------------------------


def test_values_are_read_off_the_curves(browser: Browser, comparison: Path) -> None:
    tab = browser.open((comparison / "report.html").as_uri())
    metrics = [json.loads(line) for line in (comparison / "trb" / "metrics.jsonl").read_text().splitlines()]
    tab.hover("#figure-kl_student > svg", across=(44 + 3.2) / 360)
    lines = tab.texts(".tip:not([hidden]) div")
    step = int(lines[0].removeprefix("step "))
    assert 1 <= step <= 3
    first = next(row for row in metrics if row["step"] == step)
    assert float(lines[1].removeprefix("TRB")) == pytest.approx(first["trb/kl_student"], rel=1e-3)
    assert float(lines[2].removeprefix("budget")) == pytest.approx(first["trb/kl_budget"], rel=1e-3)
    assert tab.evaluate("document.querySelectorAll('.cursor:not([hidden])').length") == 16
    tab.hover("h1")
    assert tab.texts(".tip:not([hidden])") == []
    tab.evaluate("document.querySelector('#figure-kl_student').focus()")
    for key in ("End", "ArrowLeft"):
        tab.press(key)
    assert tab.texts(".reading") == [f"KL(μ ‖ student), step {STEPS - 1}: TRB 0 budget 0; OPD 0 budget 0"]
    tab.press("Escape")
    assert tab.texts(".tip:not([hidden])") == []
    tab.click("button.key", 1)
    off = "[...new Set([...document.querySelectorAll('.line.off')].map((line) => line.dataset.method))]"
    assert tab.evaluate(off) == ["opd"]
    tab.click("button.key", 1)
    assert tab.evaluate(off) == []
    tab.click(".smoothing input")
    assert tab.evaluate("getComputedStyle(document.querySelector('.smooth')).display") == "none"
    assert tab.complaints == []


def test_ordinal_axes_name_their_places(tab: Tab) -> None:
    tab.evaluate("document.querySelector('#figure-chains-probe-reward').focus()")
    tab.press("Home")
    tab.press("ArrowRight")
    assert tab.texts("#diagnostics .reading")[0].startswith("Reward by budget, ε = 0.01: TRB 0.14 95% interval 0.11 to")
    cursors = "[...document.querySelectorAll('.cursor:not([hidden])')].map((node) => node.closest('figure').id)"
    assert set(tab.evaluate(cursors)) == {
        f"figure-chains-probe-{name}"
        for name in ("reward", "teacher_log_prob", "auroc", "sequence_kl", "length", "accept_rate")
    }
