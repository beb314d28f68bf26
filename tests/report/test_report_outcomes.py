"""Results per problem in a report: paired differences and the problems that changed; and which options it shows."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from report_helpers import Page, page_of, write_comparison, write_jsonl, write_outcomes, write_run

from trb.records import AS_BY_DEFAULT
from trb.report import changes, outcomes, summary
from trb.report.reading import read


def drawn(share: float, count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [int(rng.random() < share) for _ in range(count)]


def changed(before: list[int], *, up: int = 0, down: int = 0) -> list[int]:
    """The same results with so many problems turned right, and so many turned wrong."""
    after = list(before)
    for turned, old in ((up, 0), (down, 1)):
        for place in [place for place, right in enumerate(before) if right == old][:turned]:
            after[place] = 1 - old
    return after


def test_who_is_closer_on_a_problem_is_told_by_that_problem_alone(tmp_path: Path) -> None:
    """Short problems hardly move a mean over tokens, and their shares of it are nearly the mean itself."""
    tokens, kls = [100] * 5 + [2] * 15, {"a": [0.4] * 5 + [1.0] * 15, "b": [0.8] * 5 + [0.5] * 15}
    read_back = {}
    for name, values in kls.items():
        path = tmp_path / f"{name}.jsonl"
        lines: list[dict[str, Any]] = [{"settings": {"name": "talks", "n_problems": 20}}]
        for place, (count, value) in enumerate(zip(tokens, values, strict=True)):
            line = {"problem": place, "prompt_hash": str(place), "n": 1, "correct": 0, "lengths": [count]}
            lines.append(line | {"reverse_kl": count * value})
        write_jsonl(path, lines)
        suite = outcomes._read_suite(path, [])
        assert suite is not None
        read_back[name] = (suite,)
    found = outcomes._difference(read_back, "a", "b")
    assert found is not None
    assert (found.gained, found.lost) == (5, 15)
    of_tokens = {name: sum(n * v for n, v in zip(tokens, values, strict=True)) / 530 for name, values in kls.items()}
    assert found.estimate == pytest.approx(of_tokens["a"] - of_tokens["b"])


def comparison(directory: Path, correct: dict[str, list[int]], **options: Any) -> Path:
    """A comparison with these results on one problem set."""
    write_comparison(directory, {name: {"pass_at_1": 0.5} for name in correct if name != "student"})
    return write_outcomes(directory, {name: {"chains": counts} for name, counts in correct.items()}, **options)


def differences(directory: Path, notes: list[str] | None = None) -> outcomes.Comparisons:
    source = read(directory)
    return outcomes.comparisons(source, outcomes.read_outcomes(source, [] if notes is None else notes))


def said(page: Page) -> str:
    """The headline, and what is said below it."""
    return " ".join(page.text_of["p"][:2])


BEFORE = drawn(0.4, 400)


# ---- paired differences --------------------------------------------------------------------------------


def test_a_pair_resolves_what_two_intervals_do_not(tmp_path: Path) -> None:
    after = changed(BEFORE, up=24, down=4)
    directory = comparison(tmp_path / "c", {"student": BEFORE, "trb": after, "opd": BEFORE})
    results = json.loads((directory / "results.json").read_text())
    assert results["trb"]["interval"][0] < results["opd"]["interval"][1]
    page = page_of(directory)
    assert ": TRB is ahead by 5.0 points on the same 400 problems (95% interval +2." in said(page)
    assert "overlap" not in said(page)
    assert "Not resolved from the student itself: OPD." in said(page)
    (pair,) = differences(directory).of_best
    changes_P = [a - b for a, b in zip(after, BEFORE, strict=True)]
    error = statistics.stdev(changes_P) / math.sqrt(len(changes_P))
    assert pair.estimate == pytest.approx(0.05)
    assert pair.interval == pytest.approx((0.05 - 1.96 * error, 0.05 + 1.96 * error), abs=0.15 * error)
    assert (pair.gained, pair.lost, pair.verdict) == (24, 4, "above")


def test_the_table_of_differences_shows_both_comparisons(tmp_path: Path) -> None:
    directory = comparison(
        tmp_path / "c", {"student": BEFORE, "trb": changed(BEFORE, up=40), "opd": changed(BEFORE, down=40)}
    )
    page = page_of(directory)
    assert "differences" in {a.get("id") for a in page.all("section")}
    captions = [text.strip() for text in page.text_of["caption"]]
    assert captions[:2] == ["Method minus the student before training", "TRB, the highest, minus each other method"]
    rows = [row for row in page.rows if row and row[0].strip() in ("TRB", "OPD") and row[-1] == "400" and len(row) == 8]
    assert [[row[0].strip(), row[1], *row[5:]] for row in rows] == [
        ["TRB", "+10.0", "40", "0", "400"],
        ["OPD", "−10.0", "0", "40", "400"],
        ["OPD", "+20.0", "80", "0", "400"],
    ]
    assert "Below the student: OPD." in said(page)


def test_a_run_is_compared_with_its_own_beginning(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_outcomes(run, {"student": {"chains": BEFORE}, "trb": {"chains": changed(BEFORE, up=30)}})
    text = said(page_of(run))
    assert ", above the student's " in text and "before training: +7.5 points on the same 400 problems" in text
    write_outcomes(run, {"student": {"chains": BEFORE}, "trb": {"chains": changed(BEFORE, up=30, down=28)}})
    assert "the difference is not resolved: +0.5 points on the same 400 problems" in said(page_of(run))


def test_copies_of_a_problem_are_one_problem() -> None:
    """In the difference, its interval and the number of changes; a copy that came out otherwise is averaged with it."""
    rng = random.Random(6)
    rates = {name: [int(rng.random() < rate) for _ in range(40)] for name, rate in (("a", 0.7), ("b", 0.4))}

    def pair(copies: int) -> outcomes.Paired:
        names, ones = tuple(map(str, range(40))) * copies, (1,) * 40 * copies
        suites = {
            name: (outcomes.Suite("s", Path(), names, ones, tuple(right) * copies),) for name, right in rates.items()
        }
        return outcomes.paired(suites, [("a", "b")])[0]

    once, thrice = pair(1), pair(3)
    assert (thrice.gained, thrice.lost, thrice.problems) == (once.gained, once.lost, 40)
    assert (thrice.estimate, *thrice.interval) == pytest.approx((once.estimate, *once.interval))
    assert thrice.p_value == once.p_value


def test_a_handful_of_changes_resolves_nothing(tmp_path: Path) -> None:
    """Five changes that all go one way have p = 0.06, though no resample of them falls below zero."""
    directory = comparison(tmp_path / "few", {"student": BEFORE, "trb": changed(BEFORE, up=5), "opd": BEFORE})
    page = page_of(directory)
    assert "only 5 of 400 problems came out differently, so the difference is not resolved" in said(page)
    # The table's interval may exclude zero.
    assert any("fewer than 6 problems came out differently" in text for text in page.text_of["p"])
    run = write_run(tmp_path / "all")  # a resample of changes that are all alike knows no spread at all
    write_outcomes(run, {"student": {"chains": [0] * 4}, "trb": {"chains": [1] * 4}})
    assert "only 4 of 4 problems came out differently" in said(page_of(run))


def test_equal_models_are_not_told_apart_more_often_than_one_says() -> None:
    """Two models that are equally good, on many draws of 40 problems: the share that is called a difference."""
    rng, found, names = random.Random(5), 0, tuple(map(str, range(40)))
    for _ in range(300):
        suites = [
            outcomes.Suite("s", Path(), names, (1,) * 40, tuple(int(rng.random() < 0.3) for _ in range(40)))
            for _ in range(2)
        ]
        (pair,) = outcomes.paired({"a": (suites[0],), "b": (suites[1],)}, [("a", "b")])
        found += pair.verdict != "unresolved"
    assert found / 300 < 0.08


def test_many_methods_are_corrected_for_their_number(tmp_path: Path) -> None:
    names = ("trb", "opd", "sft", "skd", "fixed")
    results = dict.fromkeys(names, BEFORE) | {"trb": changed(BEFORE, up=14, down=4)}
    directory = comparison(tmp_path / "c", {"student": BEFORE, **results})
    pairs = differences(directory)
    assert all(0.01 < pair.p_value < 0.05 and pair.interval[0] > 0 for pair in pairs.of_best)
    assert {pair.verdict for pair in pairs.of_best} == {"unresolved"}
    assert "but on the same problems the lead is not resolved" in said(page_of(directory))
    mixed = {**results, "opd": changed(BEFORE, down=50)}
    text = said(page_of(comparison(tmp_path / "mixed", {"student": BEFORE, **mixed})))
    assert "clear of OPD; not resolved from " in text
    assert "on the same problems" in text and "overlap" not in text
    clear = {"student": BEFORE, "trb": changed(BEFORE, up=90), "opd": BEFORE, "sft": BEFORE}
    assert "and on the same problems ahead of every other." in said(page_of(comparison(tmp_path / "clear", clear)))


def test_problem_sets_count_alike_as_in_the_score(tmp_path: Path) -> None:
    large, small = drawn(0.5, 300, 1), drawn(0.5, 50, 2)
    run = write_run(tmp_path / "run")
    after = {"large": changed(large, up=30), "small": changed(small, down=10)}
    write_outcomes(run, {"student": {"large": large, "small": small}, "trb": after})
    (pair,) = differences(run).to_student
    assert pair.estimate == pytest.approx((30 / 300 - 10 / 50) / 2) and pair.problems == 350
    assert {row[0].split(" of ")[1].split()[0] for row in problem_rows(page_of(run))} == {"large", "small"}


@pytest.mark.parametrize("wrong", ["score", "problems", "torn", "missing", "alone"])
def test_results_that_do_not_belong_together_are_not_paired(tmp_path: Path, wrong: str) -> None:
    after = changed(BEFORE, up=60)
    directory = comparison(tmp_path / "c", {"student": BEFORE, "trb": after, "opd": after})
    path = directory / "trb" / "evaluations" / "step-000100" / "chains.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if wrong == "score":  # of another evaluation than results.json
        rows[1]["correct"] = 1 - rows[1]["correct"]
    elif wrong == "problems":
        rows[1]["prompt_hash"] = "other"
    elif wrong == "torn":
        rows = rows[:200]
    elif wrong == "missing":
        path.unlink()
    if wrong == "alone":
        write_outcomes(directory, {"trb": {"chains": [1]}})
    elif wrong != "missing":
        write_jsonl(path, rows)
    notes: list[str] = []
    pairs = differences(directory, notes)
    assert [pair.first for pair in pairs.to_student] == ["opd"] and pairs.of_best == ()
    assert bool(notes) is (wrong in ("score", "torn", "missing"))
    assert "without results per problem on record" in said(page_of(directory)) or wrong == "alone"


def test_a_comparison_under_way_pairs_what_it_has(tmp_path: Path) -> None:
    directory = comparison(tmp_path / "c", {"student": BEFORE, "trb": changed(BEFORE, up=60)})
    rows = [{"step": 0, "name": "chains", "pass_at_1": sum(BEFORE) / 400}]
    rows += [{"step": 100, "name": "chains", "pass_at_1": sum(BEFORE) / 400 + 0.15}]
    write_jsonl(directory / "trb" / "evals.jsonl", rows)
    (directory / "results.json").unlink()
    assert [pair.verdict for pair in differences(directory).to_student] == ["above"]


@pytest.mark.parametrize(
    "line", ['{"correct": 2}', '{"n": 0, "correct": 0}', '{"correct": -1}', '{"n": "one"}', "[]", '{"n":']
)
def test_damaged_results_are_named_by_line_and_cost_only_their_part_of_the_page(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path / "run")
    write_outcomes(run, {"student": {"chains": BEFORE}, "trb": {"chains": BEFORE}})
    path = run / "evaluations" / "step-000100" / "chains.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | json.loads(line)) if line.startswith("{") and line[-1] == "}" else line
    path.write_text("\n".join(lines) + "\n")
    page = page_of(run)
    assert any("chains.jsonl, line 3: " in text for text in page.text_of["li"])
    assert "overlap" in said(page) and page.row("TRB")[1] and not problem_rows(page)


# ---- the problems that changed -------------------------------------------------------------------------


def problem_rows(page: Page) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in page.rows if row and row[0].strip().startswith("problem ")]


def test_both_directions_are_listed_with_what_every_method_made_of_them(tmp_path: Path) -> None:
    results = {"student": [1, 0, 1, 0, 1], "trb": [1, 1, 0, 0, 1], "opd": [1, 0, 0, 1, 1]}
    page = page_of(comparison(tmp_path / "c", results))
    assert [text for text in page.text_of["h3"] if "efore" in text] == [
        "Right before, wrong after 1", "Wrong before, right after 2",
    ]  # fmt: skip
    assert [row for row in page.rows if row[:2] == ["Problem", "Student, before"]] == [
        ["Problem", "Student, before", "TRB", "OPD"]
    ] * 2
    assert problem_rows(page) == [
        ["problem 3 How much is 2 + 1?", "right", "wrong ▼", "wrong ▼"],
        ["problem 2 How much is 1 + 1?", "wrong", "right ▲", "wrong"],
        ["problem 4 How much is 3 + 1?", "wrong", "wrong", "right ▲"],
    ]


def test_with_several_samples_shares_are_compared_and_large_changes_come_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_outcomes(run, {"student": {"chains": [8, 4, 0, 2]}, "trb": {"chains": [7, 0, 0, 8]}}, n=8)
    page = page_of(run)
    assert [text for text in page.text_of["h3"] if "efore" in text] == [
        "Right less often after than before 2", "Right more often after than before 1",
    ]  # fmt: skip
    assert [row[1:] for row in problem_rows(page)] == [
        ["4 of 8", "0 of 8 ▼"], ["8 of 8", "7 of 8 ▼"], ["2 of 8", "8 of 8 ▲"],
    ]  # fmt: skip


def test_links_lead_to_the_completions_of_the_problem(tmp_path: Path) -> None:
    page = page_of(comparison(tmp_path / "c", {"student": [1, 0, 1], "trb": [1, 1, 0], "opd": [1, 0, 1]}))
    links = [a for a in page.all("a") if "data-match" in a]
    rows = {(row["match"], row["method"]): row for row in page.data["rollouts"] if "moment" in row}
    assert {(link["data-match"], link["data-model"]) for link in links} == {
        (row["match"], str(row["model"])) for row in rows.values()
    }
    assert [rows["0.1", name]["model"] for name in ("student", "trb", "opd")] == [0, 1, 2] and len(rows) == 6
    row = rows["0.1", "trb"]
    assert (row["tokens"], row["prompt"], row["reward"]) == (["trb chains says 1"], "How much is 1 + 1?", 1.0)
    assert (row["moment"], row["length"], row["name"]) == ("after training", 7, "problem 2")
    assert rows["0.1", "student"]["moment"] == "before training"
    assert {method["name"] for method in page.data["methods"]} == {"student", "trb", "opd"}


def test_runs_that_kept_no_texts_have_the_table_without_links(tmp_path: Path) -> None:
    page = page_of(comparison(tmp_path / "c", {"student": [1, 0], "trb": [0, 1]}, texts=False))
    assert problem_rows(page) == [["problem 1", "right", "wrong ▼"], ["problem 2", "wrong", "right ▲"]]
    assert not [a for a in page.all("a") if "data-match" in a]
    assert not [text for text in page.text_of["p"] if "lead to the completions" in text]
    assert not [row for row in page.data["rollouts"] if "moment" in row]


def test_a_large_evaluation_makes_a_small_page_that_says_what_was_cut(tmp_path: Path) -> None:
    before = drawn(0.5, 30_000)
    run = write_run(tmp_path / "run", steps=5)
    results = {"student": {"chains": before}, "trb": {"chains": changed(before, up=4_000, down=1_234)}}
    write_outcomes(run, results)
    for path in (run / "evaluations").rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        long = [row | {"question": "q" * 2_001, "completions": ["c" * 2_001]} for row in rows[1:2_001]]
        write_jsonl(path, [rows[0], *long, *rows[2_001:]])
    start = time.process_time()
    page = page_of(run)
    assert time.process_time() - start < 30
    assert (run / "report.html").stat().st_size < 1_500_000
    assert len(problem_rows(page)) == 2 * changes.MAX_PROBLEMS
    captions = "".join(page.text_of["caption"])
    assert "100 of 1,234 problems are listed." in captions and "100 of 4,000 problems are listed." in captions
    shown = [row for row in page.data["rollouts"] if "moment" in row]
    assert sum(len(row["prompt"]) + len(row["tokens"][0]) for row in shown) <= changes.MAX_CHARACTERS
    assert any(
        text == f"Problems: the completions of {len(shown) // 2} of 200 are in the viewer."
        for text in page.text_of["li"]
    )
    assert {(row["cut"], row["prompt_cut"]) for row in shown} == {(True, True)}


# ---- the configuration ---------------------------------------------------------------------------------


def with_config(directory: Path, chosen: dict[str, Any], defaults: dict[str, Any]) -> Path:
    write_run(directory, chosen.get("method", "trb"), steps=3)
    parts = ("".join(f"{key}: {json.dumps(value)}\n" for key, value in part.items()) for part in (chosen, defaults))
    (directory / "config.yaml").write_text(AS_BY_DEFAULT.join(parts))
    return directory


def test_only_what_was_chosen_is_open_and_the_rest_is_folded(tmp_path: Path) -> None:
    run = with_config(tmp_path / "run", {"student": "s", "max_steps": 3}, {"method": "trb", "seed": 0, "bf16": False})
    config = summary.config_table(read(run).runs)
    assert config.shared == (("student", "s"), ("max_steps", "3"), ("method", "trb"))
    assert config.defaults == (("seed", "0"), ("bf16", "false")) and config.differing == ()
    page = page_of(run)
    assert [("class" in a, "open" in a) for a in page.all("details")] == [(False, True), (True, False)]
    assert [" ".join(text.split()) for text in page.text_of["summary"]] == [
        "Resolved options, other than by default 3", "As by default 2",
    ]  # fmt: skip


def test_knobs_that_a_method_does_not_read_are_not_listed(tmp_path: Path) -> None:
    schedule = {"budget_schedule": "linear", "blend_warmup_steps": 4}
    with_config(tmp_path / "c" / "trb", {"method": "trb", "initial_kl_budget": 0.3, "veto_strength": 9}, schedule)
    with_config(
        tmp_path / "c" / "opd", {"method": "opd", "initial_kl_budget": 0.3, "skd_teacher_top_k": 3}, {"seed": 0}
    )
    with_config(tmp_path / "c" / "skd", {"method": "skd", "skd_teacher_top_k": 7}, {"seed": 0})
    config = summary.config_table(read(tmp_path / "c").runs)
    assert config.columns == ("OPD", "SKD", "TRB")
    assert dict(config.differing) == {
        "method": ("opd", "skd", "trb"),
        "skd_teacher_top_k": ("–", "7", "–"),
        "initial_kl_budget": ("–", "–", "0.3"),
    }
    assert dict(config.defaults) == {"seed": "0", "budget_schedule": "linear", "blend_warmup_steps": "4"}
    assert not [row for row in page_of(tmp_path / "c").rows if row and row[0] == "veto_strength"]


def test_a_line_inside_a_text_makes_no_defaults(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    (run / "config.yaml").write_text(f'method: trb\nsystem_prompt: "a\n{AS_BY_DEFAULT}b: c"\n')
    assert read(run).runs[0].defaults == frozenset()
    assert summary.config_table(read(run).runs).defaults == ()
