"""The scripts behind docs/performance.md: what they write of measurements whose outcome is known, and of none."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs_blocks import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import conditions
import growth
import performance_files
import performance_growth
import performance_steps
from pages import by_hand, filled, paragraph

# (plain, warm-up 0.02, warm-up 0.005, TRL's two trainers): processor seconds of a step.
USUAL = (5.0, 6.0, 5.5, 10.0, 12.0)
DEAREST = (7.1, 8.0, 8.875, 10.0, 7.1)
MACHINE = {"cpu": "a processor", "cores": 4, "gpus": []}
ORIGIN = {
    **{"commit": "0123456789", "dirty": False, "time": "2026-01-02T03:04:05+00:00", "machine": MACHINE, "threads": 2},
    **{"instructions": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": None, "busy": True},
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the files of measurements."""
    monkeypatch.setattr(performance_files, "RESULTS", tmp_path)
    yield tmp_path


def cell(condition: conditions.Condition, seconds: tuple[float, ...]) -> dict[str, Any]:
    """As `conditions.measure` returns it; a tenth of a step is the optimizer's, and the clock shows twice the time."""
    steps = {
        name: [{"optimizer": (0.1 * total, 0.2 * total), "loss": (0.9 * total, 1.8 * total)}]
        for name, total in zip(conditions.CONTENDERS, seconds, strict=True)
    }
    return conditions.summary(steps) | condition._asdict() | {"rows": condition.rows, "repeats": 1}


def write_conditions(folder: Path) -> tuple[str, str]:
    """Two conditions, the usual one and the dearest; their names."""
    usual, dearest = conditions.ALL[0], conditions.ALL[-1]
    cells = {dearest.name: cell(dearest, DEAREST), usual.name: cell(usual, USUAL)}
    record = {"conditions": cells, "provenance": dict.fromkeys(cells, ORIGIN), "worst": conditions.worst(cells)}
    (folder / "conditions.json").write_text(json.dumps(record, sort_keys=True))
    return usual.name, dearest.name


def test_the_number_of_conditions_is_that_of_the_benchmark() -> None:
    assert len(conditions.ALL) == performance_steps.CONDITIONS
    assert performance_steps.LIMITS.keys() == conditions.RATIOS.keys()
    assert set(performance_steps._CONTENDERS) == set(conditions.CONTENDERS)


def test_each_bar_is_held_against_its_worst_condition(results: Path) -> None:
    usual, dearest = write_conditions(results)
    found = {bar.label: [*bar.row()[1:4], bar.verdict] for bar in performance_steps.step_bars()}
    # Annealed: 0.375 of the larger budget's and 0.625 of the smaller's.
    assert found == {
        "plain / TRL": ["0.500", "0.710", dearest, "missed"],
        "warm-up 0.02 / TRL": ["0.600", "0.800", dearest, "met"],
        "warm-up 0.005 / TRL": ["0.550", "0.887", dearest, "met"],
        "warm-up 0.02 / plain": ["1.127", "1.200", usual, "met"],
        "warm-up 0.005 / plain": ["1.100", "1.250", dearest, "met"],
        "annealed / plain": ["1.137", "1.204", dearest, "missed"],
        "plain / GKD": ["0.417", "1.000", dearest, "-"],
    }


def test_more_is_better_where_a_bar_is_the_least() -> None:
    bar = performance_steps.Bar("speed", {"slow": 0.9, "fast": 2.0}, 1.0, at_least=True)
    assert (bar.worst, bar.verdict) == ("slow", "missed")
    assert performance_steps.Bar("speed", {"slow": 1.0}, 1.0, at_least=True).verdict == "met"


def test_whole_steps_are_shown_condition_by_condition(results: Path) -> None:
    usual, _ = write_conditions(results)
    first, second = performance_steps.by_processor().splitlines()[2:]
    assert first.startswith("| float32 | fixed | 32 | 64 | 5.0 | 0.50 [0.50, 0.50] | 0.60 [0.60, 0.60] |")
    assert second.startswith("| bf16 | natural | 512 | 256 | 7.1 | 0.71 [0.71, 0.71] | 0.80 [0.80, 0.80] |")
    assert performance_steps.by_clock().splitlines()[2].startswith("| float32 | fixed | 32 | 64 | 0.50 | 0.60 |")
    said = performance_steps.how_measured().replace("\n", " ")
    assert "2 of 16 conditions" in said and "instruction set AVX2, ONEDNN_MAX_CPU_ISA AVX2" in said
    assert "threads: 2" in said and "ATEN_CPU_CAPABILITY not set" in said
    parts = performance_steps.parts()
    assert f"**{usual}**, the worst for warm-up 0.02 / plain:" in parts
    assert "| whole step, s | 7.1 | 8.0 | 8.9 | 10.0 | 7.1 |\n| loss | 90% | 90% | 90% | 90% | 90% |" in parts
    row = performance_steps.step_row()
    assert "a plain step takes 0.50 to 0.71 of TRL's" in row and "0.55 to 0.89 of it and 1.10 to 1.25 of a plain" in row
    assert "bars that we set ourselves 2 are missed ([which, and where](docs/performance.md#the-bars));" in row


def test_the_floor_of_a_warm_up_step_leaves_out_one_thing_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {
        "plain": {"draft": 0.4, "teacher": 0.2, "decide": 0.0, "loss": 0.4},
        "warm-up 0.02": {"draft": 0.4, "teacher": 0.26, "decide": 0.04, "loss": 0.3},
    }
    fixed = {"dtype": "bf16", "lengths": "fixed", "prompt": 32, "tokens": 64, "parts": shares}
    fixed["seconds"] = {"plain": {"median": 10.0}, "warm-up 0.02": {"median": 13.0}}
    monkeypatch.setattr(performance_steps, "conditions", lambda: {"one": fixed, "other": {"lengths": "natural"}})
    (row,) = performance_steps.floors().splitlines()[2:]
    # Drafting 5.2 s of 4; teacher 3.38 s, and 2 s of plain's for 1.3 times the tokens; deciding 0.52 s.
    assert row == "| bf16 | fixed | 32 | 64 | 1.30 | 1.30 | 1.22 | 1.05 |"


def test_what_was_not_measured_is_said_to_be_so(results: Path) -> None:
    assert {bar.verdict for bar in performance_steps.step_bars()} == {"not measured"}
    tables = performance_steps.STEP_TABLES | performance_growth.GROWTH_TABLES
    written = {name: make() for name, make in tables.items()}
    assert written.pop("growth, figure") == ""
    assert {name for name, found in written.items() if "Not measured yet" not in found} == set()
    assert "not measured" in performance_steps.step_row()


# ---- growth ----


def moment(cpu: float, drawn: int, student: int, teacher: int) -> growth.Moment:
    return growth.Moment(cpu, 2 * cpu, drawn, student, teacher, slots=6000)


def test_a_window_runs_from_half_of_its_mark() -> None:
    point = growth.Point("length", "blend", rows=2, marks=(4, 8))
    seen = [moment(0.0, 0, 1, 1), moment(1.0, 9, 4, 2), moment(3.0, 16, 8, 3)]
    found = growth.window(point, 8, seen, {"bytes_per_position": 50, "longest_prompt": 5})
    assert (found["drawn"], found["seconds"], found["wall_seconds"]) == (7, 2.0, 4.0)
    assert (found["student_passes"], found["teacher_passes"]) == (4, 1)
    assert (found["slot_bytes_per_row"], found["needed_bytes_per_row"]) == (3000, 650)
    alone = growth.window(point._replace(marks=(8,)), 8, seen, {"bytes_per_position": 50, "longest_prompt": 5})
    assert (alone["drawn"], alone["student_passes"]) == (16, 7)


def test_the_floor_is_the_slower_of_reading_weights_and_multiplying_by_them() -> None:
    window = {"student_passes": 4, "teacher_passes": 1, "drawn": 7}
    rates = {"copy_bytes_per_second": 20.0, "flops_per_second": 50.0}
    # The student's four passes read 40 bytes each: 8 s. The teacher multiplies 7 tokens by 100 numbers: 28 s.
    assert growth.floor_seconds({"student_weights": 10, "teacher_weights": 100, **rates}, window) == 8.0 + 28.0
    assert growth.floor_seconds({"student_weights": 10, "teacher_weights": 0, **rates}, window) == 8.0


def write_growth(folder: Path) -> None:
    def point(sweep: str, contender: str, rows: int, vocabulary: int, tokens: tuple[int, ...]) -> dict[str, Any]:
        windows = [
            {
                **{"tokens": count, "drawn": 10 * count, "seconds": 2.0, "floor_seconds": 0.5},
                **{"slot_bytes_per_row": 3e6 * count, "needed_bytes_per_row": 2e6 * count},
            }
            for count in tokens
        ]
        return {
            **{"sweep": sweep, "contender": contender, "rows": rows, "marks": tokens, "vocabulary": vocabulary},
            **{"windows": windows, "head_bytes": 4e6 * vocabulary},
            **{"copy_bytes_per_second": 9e9, "flops_per_second": 4e10},
        }

    points = {
        "length 4, blend": point("length", "blend", 4, 7, (2, 4)),
        "rows 16, blend": point("rows", "blend", 16, 7, (8,)),
        "rows 4, blend": point("rows", "blend", 4, 7, (4,)),
        "vocabulary 9, blend": point("vocabulary", "blend", 4, 9, (4,)),
    }
    record = {"points": points, "provenance": dict.fromkeys(points, ORIGIN), "kl_budget": 0.02, "dtype": "float32"}
    (folder / "growth.json").write_text(json.dumps(record))


def test_growth_is_shown_beside_its_floor(results: Path) -> None:
    write_growth(results)
    assert performance_growth.growth("rows").splitlines()[2:] == ["| 4 | 20 | 80 | 0.25 |", "| 16 | 40 | 160 | 0.25 |"]
    assert performance_growth.growth("vocabulary").splitlines()[2:] == ["| 9 | 36 | 20 | 80 | 0.25 |"]
    assert performance_growth.memory().splitlines()[2:] == ["| 2 | 6.0 | 4.0 |", "| 4 | 12.0 | 8.0 |"]
    assert "on a machine busy with other work. Copies ran at 9" in performance_growth.how_measured().replace("\n", " ")


def test_the_figure_has_every_sweep_with_its_floor(results: Path) -> None:
    write_growth(results)
    figure = performance_growth.draw(performance_growth.read("growth"))
    shown = [[(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] for axis in figure.axes]
    assert shown == [
        [([2, 4], [10, 20]), ([2, 4], [40, 80])],
        [([4, 16], [20, 40]), ([4, 16], [80, 160])],
        [([9], [20]), ([9], [80])],
        [([2, 4], [6, 12]), ([2, 4], [4, 8])],
    ]


# ---- places of a page ----


def test_a_page_is_filled_in_its_places_and_nowhere_else() -> None:
    page = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\n"
    written = filled(page, {"one": lambda: "new\nlines", "two": lambda: r"\1"})
    assert written == page.replace("old", "new\nlines").replace("two -->\n", "two -->\n\\1\n")
    assert filled(written, {"one": lambda: "old", "two": lambda: ""}) == page.replace("two -->\n", "two -->\n\n")
    assert by_hand(written) == "a\n\nb\n\n"


@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]])
def test_a_page_with_a_place_too_few_or_too_many_is_refused(names: list[str]) -> None:
    page = "<!-- table: one -->\n<!-- end -->\n<!-- table: two -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match=r"every table needs one place.*: (two|three)"):
        filled(page, dict.fromkeys(names, str))
    with pytest.raises(ValueError, match=r"one place.*: two"):
        filled(page + "<!-- table: two -->\n<!-- end -->\n", dict.fromkeys(("one", "two"), str))


def test_an_item_of_a_list_is_indented_below_its_first_line() -> None:
    lines = paragraph("word " * 40, item=True).splitlines()
    assert lines[0].startswith("- word") and lines[1].startswith("  word") and max(map(len, lines)) <= 120
