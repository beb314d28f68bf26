"""From run directories to study.json: every number from files written by hand, checked by arithmetic done here."""

import json
import math
import random
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from trb.records import SELECTION, STUDY
from trb.report.study import parse_study
from trb.report.tables import configuration_text, learning_table
from trb.studies import findings
from trb.studies.study import Study, Unit

SEEDS = range(6)
PROBLEMS = {"short": 40, "long": 20}
METHODS: dict[str, Any] = {
    "opd": [{}],
    "trb": {"initial_kl_budget": [0.1, 0.5]},
    "fixed": {"initial_kl_budget": [0.1, 0.5]},
}
RATES = {"opd": 0.4, "trb": 0.7, "fixed": 0.45}


def study(**changes: Any) -> Study:
    problems = {"data": ["short", "long"], "limit": 40}
    setting = {"recipe": {"student": "s", "teacher": "t", "train_data": "d"}, "dev": problems, "test": problems}
    values = {
        "name": "study",
        "seeds": {"select": [100, 101], "test": len(SEEDS)},
        "configurations": 2,
        "resamples": 1000,
        "settings": {"one": setting, "two": setting},
        "methods": METHODS,
    }
    return Study.model_validate({**values, **changes})


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(rng: random.Random, rate: float) -> dict[str, Any]:
    suites = {}
    for name, count in PROBLEMS.items():
        correct = [int(rng.random() < rate) for _ in range(count)]
        suites[name] = {
            "name": name,
            "pass_at_1": mean(correct),
            "interval": [0.0, 1.0],
            "n_problems": count,
            "n_samples": count,
            "mean_length": 10.0,
            "stop_rate": 1.0,
            "correct": correct,
        }
    return {"suites": suites}


def write_run(run: Path, curve: list[float], last: int | None = None) -> None:
    steps = [5 * i for i in range(len(curve))]
    steps[-1] = steps[-1] if last is None else last
    write_lines(
        run / "evals.jsonl",
        [{"step": i, "name": name, "pass_at_1": y} for i, y in zip(steps, curve, strict=True) for name in PROBLEMS],
    )
    write_lines(
        run / "metrics.jsonl",
        [{"step": i + 1, "loss": 1.0 / (i + 1), "reward": value} for i, value in enumerate(curve)],
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    rng = random.Random(5)
    write_json(tmp_path / "provenance.json", {"commit": "abc"})
    for setting in ("one", "two"):
        for role, rate in (("student", 0.1), ("teacher", 0.95)):
            write_json(
                tmp_path / setting / "reference" / f"{role}.json", {n: scores(rng, rate) for n in ("dev", "test")}
            )
        for unit in study().units("select"):
            # The second configuration ends higher, the first has the larger area.
            curve = [0.1, 0.2, 0.8] if unit.configuration else [0.1, 0.9, 0.6]
            write_run(tmp_path / Unit(setting, "select", unit.method, unit.configuration, unit.seed).path, curve)
        for method in METHODS:
            for seed in SEEDS:
                run = tmp_path / Unit(setting, "test", method, 0, seed).path
                write_run(run, [0.1, RATES[method] / 2 + 0.01 * seed, RATES[method]])
                write_json(run / "test.json", scores(rng, RATES[method]))
    return tmp_path


def choose(directory: Path, judged: Study) -> None:
    for setting in judged.settings:
        SELECTION.write(directory / setting / SELECTION, {"methods": findings.selection(judged, directory, setting)})


def per_seed(directory: Path, method: str) -> list[float]:
    """Mean of the two suites' means, each seed."""
    values = []
    for seed in SEEDS:
        text = (directory / "one" / "test" / method / f"seed-{seed}" / "test.json").read_text()
        values.append(mean(mean(suite["correct"]) for suite in json.loads(text)["suites"].values()))
    return values


def test_selection_follows_the_rule_of_the_study(directory):
    chosen = {
        rule: [row["selected"] for row in findings.selection(study(select_by=rule), directory, "one")["trb"]]
        for rule in ("final", "area")
    }
    assert chosen == {"final": [False, True], "area": [True, False]}
    rows = findings.selection(study(), directory, "one")["trb"]
    assert [row["pass_at_1"] for row in rows] == pytest.approx([0.6, 0.8])
    assert rows[1]["configuration"] == {"initial_kl_budget": 0.5}


def test_the_earlier_configuration_wins_a_tie(directory):
    for seed in (100, 101):
        write_run(directory / "one" / "select" / "trb" / "0" / f"seed-{seed}", [0.1, 0.5, 0.8])
    assert [row["selected"] for row in findings.selection(study(), directory, "one")["trb"]] == [True, False]


def test_configurations_are_told_as_they_ran(directory):
    """JSON has no number for infinity, and null would be the default; nor is a small number rounded away."""
    fixed = [{"initial_kl_budget": 0.1, "learning_rate": 1e-9}, {"initial_kl_budget": math.inf, "learning_rate": 1e-9}]
    judged = study(methods={**METHODS, "fixed": fixed})
    choose(directory, judged)
    STUDY.write(directory / STUDY, findings.assemble(judged, directory))
    told = {"initial_kl_budget": "Infinity", "learning_rate": 1e-9}
    found = STUDY.read(directory / STUDY)["settings"]["one"]
    assert found["sweep"]["fixed"][1]["configuration"] == told
    assert found["methods"]["fixed"]["configuration"] == told
    assert configuration_text(told) == "initial_kl_budget = Infinity, learning_rate = 1e-09"


def test_estimates_are_the_means_of_the_files(directory):
    choose(directory, study())
    methods = findings.assemble(study(), directory)["settings"]["one"]["methods"]
    for method in METHODS:
        values, found = per_seed(directory, method), methods[method]
        assert found["pass_at_1"] == pytest.approx(mean(values), abs=1e-6)
        assert found["per_seed"] == pytest.approx(values, abs=1e-6)
        assert (found["seeds"], found["problems"]) == (len(SEEDS), sum(PROBLEMS.values()))
        assert found["interval"][0] < found["pass_at_1"] < found["interval"][1]
    pairs = [a - b for a, b in zip(per_seed(directory, "trb"), per_seed(directory, "opd"), strict=True)]
    difference = methods["trb"]["difference_to_opd"]
    assert difference["estimate"] == pytest.approx(mean(pairs), abs=1e-6)
    # Hedges' factor for six seeds, from tables: 0.841
    assert difference["effect_size"] == pytest.approx(0.841 * mean(pairs) / stdev(pairs), rel=1e-2)
    assert difference["interval"][0] > 0.15
    assert methods["opd"]["difference_to_opd"] is None


def test_differences_are_antisymmetric_and_corrected(directory):
    choose(directory, study())
    methods = findings.assemble(study(), directory)["settings"]["one"]["methods"]
    there, back = methods["trb"]["differences"]["fixed"], methods["fixed"]["differences"]["trb"]
    assert there["estimate"] == -back["estimate"]
    assert there["interval"] == [-back["interval"][1], -back["interval"][0]]
    # Two methods are compared with plain distillation: the smaller p-value doubles, the larger one stays.
    small, large = sorted((methods[name]["difference_to_opd"] for name in ("trb", "fixed")), key=lambda d: d["p_value"])
    assert small["p_value_holm"] == pytest.approx(min(1, 2 * small["p_value"]), abs=2e-6)
    assert large["p_value_holm"] == pytest.approx(max(large["p_value"], small["p_value_holm"]), abs=2e-6)


def test_curves_area_and_steps_to_target(directory):
    choose(directory, study())
    found = findings.assemble(study(target=0.5), directory)["settings"]["one"]["methods"]
    assert found["opd"]["curve"]["steps"] == [0, 5, 10]
    assert found["opd"]["curve"]["mean"] == pytest.approx([0.1, 0.225, 0.4])
    assert found["opd"]["curve"]["low"][0] == found["opd"]["curve"]["high"][0] == pytest.approx(0.1)
    # Trapezoids of two equal stretches: (0.1 + 2 x + y) / 4, with x = y / 2 + 0.025 on average.
    assert found["trb"]["area"]["estimate"] == pytest.approx((0.1 + 2 * 0.375 + 0.7) / 4)
    assert found["trb"]["area_difference_to_opd"]["estimate"] == pytest.approx((0.75 - 0.45 + 0.7 - 0.4) / 4)
    # Target: half of 0.4. Each seed's line from 0.1 at step 0 to 0.2 + 0.01 seed at step 5 (opd).
    crossings = sorted(5 * 0.1 / (0.1 + 0.01 * seed) for seed in SEEDS)
    assert found["opd"]["steps_to_target"] == {
        "target": 0.2,
        "median": pytest.approx(mean(crossings[2:4]), abs=1e-6),
        "reached": 6,
        "seeds": 6,
    }


@pytest.mark.parametrize("longer", [([0.1, 0.2, 0.3, 0.5], None), ([0.1, 0.2, 0.5], 11)])
def test_seeds_of_unequal_length_are_laid_over_the_steps_that_all_have(directory, longer):
    """Epochs of seeds whose prompts were dropped: one more evaluation, or the last one at another step."""
    choose(directory, study())
    for method in METHODS:
        for seed in SEEDS:
            curve, last = longer if seed == 2 else ([0.1, 0.2, 0.4], None)
            write_run(directory / Unit("one", "test", method, 0, seed).path, curve, last)
    results = findings.assemble(study(target=0.6), directory)
    setting = results["settings"]["one"]
    found, shared = setting["methods"]["opd"], [0, 5, 10] if longer[1] is None else [0, 5]
    assert found["curve"]["steps"] == shared
    assert found["curve"]["mean"][:2] == pytest.approx([0.1, 0.2])
    area = (0.1 + 2 * 0.2 + mean([0.4] * 5 + [0.3])) / 4 if longer[1] is None else 0.15
    assert found["area"]["estimate"] == pytest.approx(area, abs=1e-6)
    # Each seed's own last score decides the target, and its own curve when it was reached.
    assert found["steps_to_target"]["target"] == pytest.approx(0.6 * mean([0.4] * 5 + [0.5]))
    assert found["steps_to_target"]["reached"] == 6
    assert found["steps_per_seed"] == [10, 10, 15 if longer[1] is None else 11, 10, 10, 10]
    assert setting["steps"] == max(found["steps_per_seed"])
    assert "steps_per_seed" not in results["settings"]["two"]["methods"]["opd"]
    sentence = f"Seeds took 10 to {setting['steps']} steps; curves and areas cover those that all seeds have."
    assert sentence in learning_caption(results)


def test_curves_with_one_step_in_common_have_no_area(directory):
    choose(directory, study())
    for method in METHODS:
        for seed in SEEDS:
            write_run(directory / Unit("one", "test", method, 0, seed).path, [0.1, 0.4], 5 + seed)
    found = findings.assemble(study(), directory)["settings"]["one"]["methods"]["trb"]
    assert found["curve"]["steps"] == [0]
    assert found["area"] is None and found["area_difference_to_opd"] is None
    assert found["steps_to_target"]["reached"] == 6


def learning_caption(results: dict[str, Any]) -> str:
    shown = parse_study(results, Path("nowhere"), "study.json")
    return learning_table(shown, shown.settings[0]).caption


def with_copies(directory: Path, copies: dict[str, list[int]]) -> None:
    """Every test score of setting one, with the problems at these places of each problem set."""
    for run in (directory / "one" / "test").glob("*/seed-*"):
        found = json.loads((run / "test.json").read_text())
        for name, suite in found["suites"].items():
            places = copies[name]
            suite["correct"] = [suite["correct"][place] for place in places]
            suite["n_problems"] = suite["n_samples"] = len(places)
            suite["pass_at_1"] = mean(suite["correct"])
            suite["same_as"] = [places.index(place) for place in places]
        write_json(run / "test.json", found)


def test_problems_that_all_occur_three_times_count_once(directory):
    choose(directory, study())
    before = findings.assemble(study(), directory)["settings"]["one"]["methods"]["trb"]
    with_copies(directory, {name: [*range(count)] * 3 for name, count in PROBLEMS.items()})
    after = findings.assemble(study(), directory)["settings"]["one"]["methods"]["trb"]
    assert after["problems"] == before["problems"]
    assert after["pass_at_1"] == pytest.approx(before["pass_at_1"], abs=2e-6)
    for one, other in [(before, after), (before["difference_to_opd"], after["difference_to_opd"])]:
        assert one["interval"] == pytest.approx(other["interval"], abs=2e-6)


def test_the_error_over_copies_is_the_jackknife_over_distinct_problems(directory):
    """Of one seed, and within each problem set: leaving out a problem leaves out all of its copies."""
    rng = random.Random(8)
    copies = {name: sorted(rng.choices(range(count), k=2 * count)) for name, count in PROBLEMS.items()}
    with_copies(directory, copies)
    choose(directory, study())
    one = study(seeds={"select": [100, 101], "test": [2]})
    found = findings.assemble(one, directory)["settings"]["one"]["methods"]["trb"]["difference_to_opd"]
    variance, means = 0.0, []
    for name, places in copies.items():
        scores = [
            json.loads((directory / "one" / "test" / method / "seed-2" / "test.json").read_text())["suites"][name]
            for method in ("trb", "opd")
        ]
        pairs = [a - b for a, b in zip(*(score["correct"] for score in scores), strict=True)]
        left = [mean(pair for pair, other in zip(pairs, places, strict=True) if other != place) for place in {*places}]
        variance += (len(left) - 1) / len(left) * sum((value - mean(left)) ** 2 for value in left)
        means.append(mean(pairs))
    assert found["estimate"] == pytest.approx(mean(means), abs=1e-6)
    # The jackknife and the linearised ratio differ by terms of the order 1 / problems.
    assert found["standard_error"] == pytest.approx(variance**0.5 / 2, rel=0.06)


def test_a_study_that_an_older_version_began_is_told_its_copies_by_a_newer_seed(directory):
    choose(directory, study())
    with_copies(directory, {name: [*range(count)] * 2 for name, count in PROBLEMS.items()})
    whole = findings.assemble(study(), directory)["settings"]
    older = directory / Unit("one", "test", "opd", 0, 0).path / "test.json"
    scores = json.loads(older.read_text())
    for suite in scores["suites"].values():
        del suite["same_as"]
    write_json(older, scores)
    assert findings.assemble(study(), directory)["settings"] == whole


def test_bands_of_scores_stay_between_0_and_1(directory):
    choose(directory, study())
    for seed in SEEDS:
        write_run(directory / Unit("one", "test", "opd", 0, seed).path, [0.1, 0.0 if seed else 0.9, 0.99])
    curve = findings.assemble(study(), directory)["settings"]["one"]["methods"]["opd"]["curve"]
    assert curve["low"][1] == 0.0 < curve["mean"][1] < curve["high"][1] < 1.0


def test_a_target_that_few_seeds_reach_has_no_median(directory):
    choose(directory, study())
    for method in ("opd", "trb", "fixed"):
        for seed in SEEDS:
            curve = [0.1, 0.9, 0.9] if method == "opd" or seed == 0 else [0.1, 0.1, 0.1]
            write_run(directory / Unit("one", "test", method, 0, seed).path, curve)
    found = findings.assemble(study(), directory)["settings"]["one"]["methods"]["trb"]["steps_to_target"]
    assert (found["median"], found["reached"], found["seeds"]) == (None, 1, 6)


def test_metrics_are_averaged_where_every_seed_has_them(directory):
    choose(directory, study())
    (directory / "one" / "test" / "opd" / "seed-3" / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n')
    metrics = findings.assemble(study(), directory)["settings"]["one"]["methods"]["opd"]["metrics"]
    assert metrics["loss"]["steps"] == [1]
    assert metrics["loss"]["mean"] == [pytest.approx((5 * 1.0 + 4.0) / 6)]
    assert "reward" not in metrics


def test_average_takes_settings_as_independent(directory):
    choose(directory, study())
    results = findings.assemble(study(), directory)
    parts = [setting["methods"]["trb"] for setting in results["settings"].values()]
    average = results["average"]["methods"]["trb"]
    assert average["pass_at_1"] == pytest.approx(mean(part["pass_at_1"] for part in parts), abs=1e-6)
    errors = [part["difference_to_opd"]["standard_error"] for part in parts]
    assert average["difference_to_opd"]["standard_error"] == pytest.approx(
        (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2, abs=2e-6
    )
    below = [part["pass_at_1"] - part["interval"][0] for part in parts]
    assert average["pass_at_1"] - average["interval"][0] == pytest.approx(
        (below[0] ** 2 + below[1] ** 2) ** 0.5 / 2, abs=3e-6
    )
    assert [name for name, entry in results["average"]["methods"].items() if entry["best"]] == ["trb"]


def test_an_unfinished_study_uses_the_seeds_that_all_methods_have(directory):
    choose(directory, study())
    (directory / "one" / "test" / "fixed" / "seed-4" / "test.json").unlink()
    assert findings.finished_seeds(study(), directory, "one") == [0, 1, 2, 3, 5]
    for seed in SEEDS:
        (directory / "two" / "test" / "trb" / f"seed-{seed}" / "test.json").unlink()
    results = findings.assemble(study(), directory)
    assert results["settings"]["one"]["methods"]["opd"]["seeds"] == 5
    assert results["settings"]["two"]["methods"] == {}
    assert results["average"]["methods"] == {}


def test_one_seed_is_judged_without_areas(directory):
    choose(directory, study())
    one = study(seeds={"select": [100, 101], "test": [2]})
    found = findings.assemble(one, directory)["settings"]["one"]["methods"]["trb"]
    assert found["seeds"] == 1
    assert found["area"] is None and found["area_difference_to_opd"] is None


def test_judging_twice_gives_the_same_text(directory):
    choose(directory, study())
    first, second = (json.dumps(findings.assemble(study(), directory)) for _ in range(2))
    assert first == second
