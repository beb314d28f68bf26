"""The driver of the map, on a pair of a few lessons: runs are made once, resumed and collected."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    """A module of benchmarks, which finds those beside it as a script does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    return script("map")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return script("map_figures")


@pytest.fixture
def small(driver: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One point of three stages, two methods, two steps, and pairs that were taught next to nothing."""
    point, later = (driver.Point(knobs=driver.Knobs(stages=3, shared=at), rollouts=8, steps=2) for at in (0.0, 1.0))
    monkeypatch.setitem(driver.PANELS, "b", driver.Panel("small", "shared", None, (point, later), ("opd", "trb")))
    monkeypatch.setattr(driver, "CURVE", {"every": 1, "samples": 4, "seed": 1})
    monkeypatch.setattr(driver, "FINAL", {"samples": 8, "seed": 2})
    monkeypatch.setattr(
        driver, "ready", lambda knobs, folder: sys.modules["map_pairs"].ready(knobs, folder, scale=0.01)
    )
    return driver


def command(driver: ModuleType, root: Path, *more: str) -> None:
    """Of the first of the panel's points: a record is drawn before all are there."""
    driver.main(["run", "--panel", "b", "--values", "0.0", "--seeds", "1", "--root", str(root), *more])


def test_a_panel_is_run_once_and_goes_on_where_it_was_stopped(small, figures, tmp_path, capsys, monkeypatch):
    command(small, tmp_path, "--list")
    assert "2 of 2 runs are missing" in capsys.readouterr().out
    command(small, tmp_path)
    files = {path.name: path for path in (tmp_path / "runs").rglob("*.json")}
    assert set(files) == {"opd-seed-0.json", "trb-seed-0.json"}
    first = {name: json.loads(path.read_text()) for name, path in files.items()}
    for result in first.values():
        assert [point["step"] for point in result["curve"]] == [0, 1, 2]
        assert 0 <= result["final"] <= 1 and len(result["stage_rates"]["right"]) == 3
        assert all(entry["right"] < 0.5 and entry["lookup"][0] in "abc" for entry in result["lost"])
        assert len(result["log"]["loss"]) == 2 and result["processor_seconds"]["all"] > 0
    assert first["opd-seed-0.json"]["log"]["kl_budget"] == [0, 0] != first["trb-seed-0.json"]["log"]["kl_budget"]

    # One is lost and made again, the same; the other is left alone.
    files["trb-seed-0.json"].unlink()
    before = files["opd-seed-0.json"].stat().st_mtime_ns
    command(small, tmp_path)
    assert files["opd-seed-0.json"].stat().st_mtime_ns == before
    again = json.loads(files["trb-seed-0.json"].read_text())
    for key in ("final", "curve", "stage_rates", "log", "settings"):
        assert again[key] == first["trb-seed-0.json"][key]

    # Other settings of a method are another run.
    monkeypatch.setitem(small.METHODS, "trb", {**small.METHODS["trb"], "initial_kl_budget": 0.25})
    capsys.readouterr()
    command(small, tmp_path, "--list")
    assert "1 of 2 runs are missing" in capsys.readouterr().out

    # A pair that was taught in another way is not taken for this one, whatever else of the pair's knobs changes.
    pairs = sys.modules["map_pairs"]
    with pytest.raises(ValueError, match="taught in another way"):
        pairs.ready(small.Knobs(stages=3), tmp_path / "pairs", scale=0.03)
    assert pairs.ready(
        small.Knobs(stages=3, teacher="unaware", start=0.3), tmp_path / "pairs", scale=0.01
    ).teacher.exists()

    record = tmp_path / "map.json"
    small.main(["collect", "--root", str(tmp_path), "--out", str(record)])
    kept = json.loads(record.read_text())
    assert {run["method"] for run in kept["runs"]} == {"opd", "?"}  # what a method no longer is has no name
    monkeypatch.setattr(sys, "argv", ["map_figures.py", str(record), "--out", str(tmp_path / "figures")])
    figures.main()
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["map-b.png"]
    numbers = next(iter(kept["step0"].values()))["rollouts"]
    assert numbers["student"]["accept_rate"] == 1 > numbers["blend"]["accept_rate"]
    assert numbers["blend"]["sequence_kl"] <= 4.0

    # Of what is still to be run, a record's runs are none: here that of `opd`.
    capsys.readouterr()
    command(small, tmp_path / "elsewhere", "--onto", str(record), "--list")
    listed = capsys.readouterr().out
    assert "1 of 1 runs are missing" in listed and " trb 0" in listed
    kept["methods"]["opd"] = {"method": "opd", "learning_rate": 1.0}
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(kept))
    command(small, tmp_path / "elsewhere", "--onto", str(changed), "--list")
    assert "2 of 2 runs are missing" in capsys.readouterr().out

    # Runs whose files are gone stay in the record that has them, and what was made again must be what it was.
    files["trb-seed-0.json"].unlink()
    command(small, tmp_path)
    onto = ["collect", "--root", str(tmp_path), "--onto", str(record)]
    small.main([*onto, "--out", str(tmp_path / "joined.json")])
    both = json.loads((tmp_path / "joined.json").read_text())
    assert [run["method"] for run in both["runs"]] == ["?", "opd", "trb"]
    assert {**kept["runs"][0], "method": ""} in [{**run, "method": ""} for run in both["runs"]]
    (opd,) = (run for run in kept["runs"] if run["method"] == "opd")
    opd["final"] += 0.5
    record.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"opd 0 scored"):
        small.main([*onto, "--out", str(tmp_path / "never.json")])
    model = next(iter(kept["pairs"]))
    kept["pairs"][model]["measured"] = {}
    record.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=f"{model} is not the model of the earlier runs"):
        small.main([*onto, "--out", str(tmp_path / "never.json")])


def test_figures_take_a_methods_runs_from_the_record_that_has_more_of_them(figures, tmp_path, monkeypatch):
    """Two runs of `opd` come from the second record, and the one of the first is not among them; `trb` stays."""

    def of(*runs: tuple[str, str, int], final: float) -> dict[str, Any]:
        points = {point: {"rollouts": 16} for point, _, _ in runs}
        made = [dict(zip(("point", "method", "seed"), run, strict=True), final=final) for run in runs]
        return {"points": points, "runs": made, "panels": {"d": {}}}

    first = of(("p", "opd", 0), ("p", "trb", 0), ("q", "opd", 0), final=0.1)
    second = of(("p", "opd", 0), ("p", "opd", 1), ("p", "trb", 0), ("r", "sft", 0), final=0.2)
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, record in zip(files, (first, second), strict=True):
        file.write_text(json.dumps(record))
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(figures, "write_figures", lambda record, folder: drawn.append(record) or [])
    monkeypatch.setattr(sys, "argv", ["map_figures.py", *map(str, files)])
    figures.main()
    scores = {(run["point"], run["method"], run["seed"]): run["final"] for run in drawn[0]["runs"]}
    second_has_more = {("p", "opd", 0): 0.2, ("p", "opd", 1): 0.2, ("r", "sft", 0): 0.2}
    assert scores == {("p", "trb", 0): 0.1, ("q", "opd", 0): 0.1} | second_has_more
    assert len(drawn[0]["runs"]) == len(scores) and set(drawn[0]["points"]) == {"p", "q", "r"}


def test_a_run_that_lost_what_it_had_collapsed(driver):
    curve = [{"step": 0, "pass_at_1": 0.1}, {"step": 10, "pass_at_1": 0.6}]
    assert driver.collapsed(0.29, curve) and not driver.collapsed(0.31, curve)
    assert not driver.collapsed(0.0, [{"step": 0, "pass_at_1": 0.0}])  # what never rose did not fall


def test_the_students_law_is_right_as_often_as_asked_and_has_a_rival(driver):
    laws = sys.modules["map_pairs"].hesitation
    for start in (0.3, 0.45, 0.7):
        knobs = driver.Knobs(stages=4, start=start)
        law = laws(knobs)
        assert law.sum(-1).allclose(law.new_ones(()))
        tables = [knobs.task.table(stage) for stage in "abcd"]
        right = law.new_tensor([[law[s, e, int(tables[s][e])] for e in range(4)] for s in range(4)])
        assert right.mean(1).allclose(right.new_tensor(start))
        # Making it surer does not make it right: the rival is as likely wherever the entry is not known.
        unknown = right < 0.99
        assert unknown.any(1).all() and (law.topk(2).values[unknown].diff() == 0).all()
    shared = laws(driver.Knobs(stages=4, shared=1.0))
    assert all(shared[0].equal(one) for one in shared)


def test_dead_prefixes_are_told_to_give_up_and_no_others(driver):
    import random

    lessons = sys.modules["map_pairs"].Lessons(driver.Knobs(stages=5), wrong=0.3, gives_up=True)
    for i in range(100):
        problem, written, aim = lessons.example(random.Random(i))
        solution = lessons.knobs.task.solution(problem)
        assert len(written) == len(aim) == len(solution)
        same = [a == b for a, b in zip(written, solution, strict=True)]
        alive = same.index(False) if False in same else len(same)
        assert aim[: alive + 1] == solution[: alive + 1] and set(aim[alive + 1 :]) <= {"?"}


def test_a_lookup_that_was_lost_is_named_with_what_stands_in_its_place(driver):
    """A student and a teacher that are tables: `a2` is lost to giving up, all else is right."""
    pairs = sys.modules["map_pairs"]
    knobs, vocabulary = driver.Knobs(stages=5), pairs.VOCABULARY
    tables = {stage: knobs.task.table(stage) for stage in "abcde"}

    def law(lost: float) -> Any:
        def forward(input_ids: torch.Tensor) -> SimpleNamespace:
            # What stands after a letter and an entry is looked up; what stands anywhere else does not matter.
            probabilities = torch.full((*input_ids.shape, len(vocabulary)), 1e-6)
            for stage, table in tables.items():
                for entry, result in zip("0123", table, strict=True):
                    here = (input_ids == vocabulary[entry]) & (input_ids.roll(1, 1) == vocabulary[stage])
                    share = lost if stage + entry == "a2" else 0.0
                    probabilities[here] = torch.full((len(vocabulary),), 1e-6)
                    probabilities[..., vocabulary[result]] += here * (1 - share)
                    probabilities[..., vocabulary["?"]] += here * share
            return SimpleNamespace(logits=probabilities.log())

        return forward

    tokenizer = pairs.character_tokenizer(knobs.task, eos_token=pairs.END_OF_TURN, pad_token=pairs.END_OF_TEXT)
    assert pairs.lost_lookups(law(0.0), law(0.0), tokenizer, knobs) == []
    (found,) = pairs.lost_lookups(law(0.75), law(0.125), tokenizer, knobs)
    assert (found["lookup"], found["instead"]) == ("a2", "?")
    assert found["right"] == pytest.approx(0.25, rel=1e-3) and found["probability"] == pytest.approx(0.75, abs=1e-4)
    assert found["teacher_log_prob"] == pytest.approx(math.log(0.125), abs=0.01)
