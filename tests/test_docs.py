"""Documentation names only things that exist."""

import ast
import importlib
import inspect
import json
import math
import pkgutil
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from docs_blocks import PAGES, ROOT
from module_list import PAGE, first_line, with_list
from transformers import TrainerCallback
from trl import DistillationConfig

import trb
import trb.training
from trb.blend import eager
from trb.studies.statistics import holm
from trb.training.methods import BEHAVIORS, BUDGET_SCHEDULES, METHODS, TARGETS

sys.path.insert(0, str(ROOT / "benchmarks"))
import across
import performance
from map_record import pair_name
from pages import by_hand, filled

HEADER = "| | measured | under which conditions |"


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def resolve(dotted: str) -> object:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_tests_and_files_named_in_a_page_exist(page: Path) -> None:
    for dotted in re.findall(r"`(trb\.[A-Za-z_.]+[A-Za-z_])(?:\(\))?`", text(page)):
        resolve(dotted)
    for path, name in re.findall(r"`(tests/[a-z_/]+\.py)::(\w+)`", text(page)):
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), f"{path}::{name}"
    for path in re.findall(r"`((?:tests|recipes|benchmarks|examples|docs|src)/[\w./-]+\.\w+)`", text(page)):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text(page)):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_scripts_named_without_their_folder_exist(page: Path) -> None:
    folders = ("src", "tests", "benchmarks", "examples")
    there = [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.*")]
    named = re.findall(r"`([\w./-]+\.(?:py|c|sh))`", text(page))
    assert [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in there)] == []


def test_what_the_sources_name_exists() -> None:
    for path in sorted((ROOT / "src").rglob("*.py")):
        for dotted in re.findall(r"`(trb\.[A-Za-z_.]+[A-Za-z_])(?:\(\))?`", text(path)):
            try:
                resolve(dotted)
            except (ImportError, AttributeError) as error:
                pytest.fail(f"{path} names {dotted}: {error}")


def test_the_floors_of_the_method_page_are_those_of_the_solvers() -> None:
    page = " ".join(text(ROOT / "docs" / "method.md").split())
    of_torch = re.search(r"log-probability below (\S+) or a positive budget under (\S+) go through float64", page)
    of_c = re.search(r"in C keeps budgets down to (\S+) and log-ratios up to (\S+) above", page)
    assert of_torch and of_c
    assert [float(number) for number in of_torch.groups()] == [
        eager.FLOAT32_LOG_PROB_FLOOR,
        eager.FLOAT32_BUDGET_FLOOR,
    ]
    source = text(ROOT / "src" / "trb" / "kernels" / "blend.c")
    floors = [re.search(rf" {name} = ([\d.e-]+)", source) for name in ("BUDGET_FLOOR", "LARGEST_RATIO")]
    assert [float(number) for number in of_c.groups()] == [float(found[1]) for found in floors if found]


def cells(page: str, first: str) -> dict[str, list[str]]:
    """The table of a page whose header begins with `first`: the names in backquotes of each row, by the row's own."""
    table = page.split(f"\n| `{first}` |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    rows = [re.findall(r"`([\w.-]+)`", line) for line in table]
    return {name: rest for name, *rest in rows}


def test_the_method_page_has_every_method_behavior_and_loss_with_its_knobs() -> None:
    page = text(ROOT / "docs" / "method.md")
    assert cells(page, "method") == {name: [row.behavior, row.loss] for name, row in METHODS.items()}
    for first, halves in (("behavior", BEHAVIORS), ("loss", TARGETS)):
        found = cells(page, first)
        assert found.keys() == halves.keys()
        for name, half in halves.items():
            knobs = [*([half.choice] if half.choice else []), *half.knobs]
            assert [word for word in found[name] if "." not in word] == knobs
    schedules = cells(page, "budget_schedule")
    assert schedules.keys() == BUDGET_SCHEDULES.keys()
    for name, kind in BUDGET_SCHEDULES.items():
        assert [word for word in schedules[name] if "." not in word] == [*kind.knobs]


def test_the_list_of_modules_is_that_of_their_docstrings() -> None:
    assert text(PAGE) == with_list(text(PAGE)), "run `make docs-modules`"


def test_a_module_begins_with_one_sentence_in_one_line() -> None:
    lines = {path: first_line(path) for path in Path(trb.__file__).parent.rglob("*.py")}
    assert {str(path): line for path, line in lines.items() if not line.endswith(".")} == {}


# ---- the seam with TRL ----

# What a class statement leaves in every class.
IMPLICIT = set(vars(type("Empty", (), {}))) | {
    "__annotations__",
    "__parameters__",
    "__static_attributes__",
    "__firstlineno__",
}


def overriding(module: Any) -> Iterator[tuple[str, str]]:
    """(class, name) of whatever a module's classes replace of a library's, but for callbacks and configurations."""
    for owner in vars(module).values():
        if not inspect.isclass(owner) or owner.__module__ != module.__name__:
            continue
        if issubclass(owner, TrainerCallback | DistillationConfig):
            continue
        theirs = [base for base in owner.__mro__ if base.__module__.split(".")[0] in ("trl", "transformers", "torch")]
        for name in vars(owner).keys() - IMPLICIT:
            if any(name in vars(base) for base in theirs):
                yield owner.__name__, name


def overridden() -> dict[str, tuple[str, str, str]]:
    """`Class.name` -> (class, name, file) in `trb.training`."""
    found = {}
    for info in pkgutil.iter_modules(trb.training.__path__):
        for owner, name in overriding(importlib.import_module(f"trb.training.{info.name}")):
            found[f"{owner}.{name}"] = (owner, name, f"{info.name}.py")
    return found


def table_rows(page: str, header: str) -> list[list[str]]:
    table = page.split(f"\n{header}\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_seams_are_those_of_the_classes() -> None:
    rows = table_rows(text(PAGE), "| seam | overridden in | what is relied on |")
    listed = [(seam, where.strip("`")) for seams, where, _ in rows for seam in re.findall(r"`([\w.]+)`", seams)]
    assert len(dict(listed)) == len(listed)
    assert dict(listed) == {seam: where for seam, (_, _, where) in overridden().items()}


def test_each_part_of_the_trainer_lists_its_own_seams() -> None:
    modules = {where: importlib.import_module(f"trb.training.{where[:-3]}") for _, _, where in overridden().values()}
    for _, name, where in overridden().values():
        assert re.search(rf"`{name}\b", modules[where].__doc__ or ""), f"{where} does not list {name}"


def test_the_private_names_that_are_used_are_listed() -> None:
    rows = table_rows(text(PAGE), "| name | used in | what is relied on |")
    listed = {name for names, _, _ in rows for name in re.findall(r"`(\w+)`", names)}
    used: set[str] = set()
    ours: set[str] = set()
    for where in {where for _, _, where in overridden().values()} - {"vllm.py"} | {"taught.py"}:
        tree = ast.parse((ROOT / "src" / "trb" / "training" / where).read_text(encoding="utf-8"))
        for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            ours |= {node.target.id for node in owner.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
            for method in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
                ours.add(method.name)
                names = {node for node in ast.walk(method) if isinstance(node, ast.Attribute)}
                own = {node for node in names if ast.unparse(node.value) == "self"}
                used |= {node.attr for node in own if node.attr.startswith("_")}
                if method.name == "__init__" or method.name.startswith("_set_up_"):
                    ours |= {node.attr for node in own if isinstance(node.ctx, ast.Store)}
    assert used - ours <= listed, used - ours - listed
    assert {name for name in listed if name.startswith("_")} - {"_iter_named_params"} <= used


def test_the_first_block_of_the_readme_is_short() -> None:
    first = re.search(r"```python\n(.*?)```", text(ROOT / "README.md"), re.S)
    assert first and len([line for line in first[1].splitlines() if line]) <= 10


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def points(difference: dict[str, Any]) -> tuple[str, str]:
    """A difference of shares in percentage points, with its interval."""
    low, high = (f"{100 * end:.2f}" for end in difference["interval"])
    return f"{100 * difference['estimate']:+.2f} points", f"{low} to {high})"


def with_chance(difference: dict[str, Any]) -> str:
    """The same with Holm's p, as tables of studies show it."""
    estimate, interval = points(difference)
    chance = difference["p_value_holm"]
    return f"{estimate.removesuffix(' points')} ({interval}, p = {chance:.{2 if chance > 0.01 else 4}f}"


def with_vetos_target(method: str, file: str, beside: str) -> list[str]:
    """What is said of a warm-up and Veto's target: three differences to plain OPD, and one to swept budgets."""
    parts = result(file), result(beside)
    found = [setting["methods"][method]["difference_to_opd"] for setting in parts[0]["settings"].values()]
    mean, error = across.average([across.difference(*parts, name, method, "trb") for name in parts[0]["settings"]])
    ends = [text.removesuffix(" points").removesuffix(")") for difference in found for text in points(difference)]
    return [*ends, f"{100 * mean:+.2f} (standard error {100 * error:.2f})"]


def fresh_seeds() -> list[str]:
    return with_vetos_target("sequence-linear-veto", "study2-fresh", "study2-fresh")


def test_what_is_said_of_a_self_setting_warm_up_with_vetos_target_is_what_was_found() -> None:
    page = " ".join(text(ROOT / "docs" / "choosing.md").split())
    (row,) = re.findall(r"\| not `gap`, though it ends by itself \|[^\n]*?on the map", page)
    for phrase in with_vetos_target("gap-veto", "study2-others", "study2")[:-1]:
        assert phrase in row
    (row,) = re.findall(r"\| `method: trb`, `loss: veto` \|[^\n]*?map.json", page)
    for phrase in fresh_seeds():
        assert phrase in row


def test_the_correction_over_settings_is_that_of_the_file() -> None:
    settings = result("study2-fresh")["settings"]
    p_values = {
        name: setting["methods"]["sequence-linear-veto"]["differences"]["sequence-linear"]["p_value"]
        for name, setting in settings.items()
    }
    corrected = holm(p_values)
    log = " ".join(text(ROOT / "docs" / "experiments.md").split())
    assert "(p = {:.2f}, {:.4f} and {:.4f})".format(*(corrected[name] for name in settings)) in log


FIVE = ("opd", "trb-wide", "trb-sequence-linear", "trb-sequence-linear-veto", "trb-gap-veto")


def logged_means(file: str, setting: str, metric: str) -> dict[int, float]:
    """Of the default's blended steps, the k-th of a training under k."""
    found = result(file)["settings"][setting]["methods"]["sequence-linear"]["metrics"][metric]
    return {step: mean for step, mean in zip(found["steps"], found["mean"], strict=True) if mean}


def test_that_the_default_draws_the_teacher_is_what_the_studies_logged() -> None:
    studies = {
        "long-chains": "study2",
        "clock": "study2",
        "staged": "study2",
        "programs": "code-study",
        "dialogue": "dialogue-study",
    }
    weights = {name: logged_means(file, name, "trb/teacher_weight") for name, file in studies.items()}
    spent = {name: logged_means(file, name, "trb/sequence_kl") for name, file in studies.items()}
    far = {name: max(step for step, mean in means.items() if mean < 0.9985) for name, means in weights.items()}
    assert far == {"long-chains": 4, "clock": 1, "staged": 1, "programs": 1, "dialogue": 1}
    log = " ".join(text(ROOT / "docs" / "experiments.md").partition("what the default draws is the teacher")[2].split())
    assert "from the second step of the warm-up in `clock`, `staged`, code and dialogue, and the fifth in" in log
    every = [mean for means in spent.values() for mean in means.values()]
    assert f"completions spend {min(every):.1f} to {max(every):.1f} nats" in log
    assert f"spent {spent['long-chains'][10]:.1f} nats in `long-chains`" in log


def on_the_map(record: dict[str, Any], point: str, method: str, seeds: Sequence[int] = range(8)) -> float:
    """Mean pass@1 in percent of a method at a point of the map."""
    runs = {run["seed"]: run["final"] for run in record["runs"] if (run["point"], run["method"]) == (point, method)}
    return 100 * sum(runs[seed] for seed in seeds) / len(seeds)


def hard_pair(record: dict[str, Any], *methods: str) -> tuple[str, ...]:
    """What is said of the map's pair of eight stages and a start of 30%."""
    (name,) = [
        name
        for name, point in record["points"].items()
        if point["knobs"] == {"stages": 8, "start": 0.3, "shared": 0.0, "teacher": "gives-up"}
    ]
    return tuple(f"{on_the_map(record, name, method):.1f}%" for method in methods)


def test_the_default_on_the_map_is_what_was_found() -> None:
    """The tables of four seeds and of eight, pair by pair, and what is said of them."""
    record = result("map")
    log = text(ROOT / "docs" / "experiments.md").partition("the default and Veto's target on the map\n\n")[2]
    shown_methods = "| plain OPD | TRB (2, 50) | `sequence-linear` | `sequence-linear-veto` | `gap-veto` |"
    rows = table_rows(log, f"| pair | cosine {shown_methods}")
    names = list(dict.fromkeys(name for panel in "abe" for name in record["panels"][panel]["points"]))
    for name, (_, cosine, *shown) in zip(names, rows, strict=True):
        knobs = record["points"][name]["knobs"]
        step0 = record["step0"][pair_name(knobs)]
        assert cosine == f"{step0['transfer']['policies']['student']['cosine']:.2f}"
        assert shown == [f"{on_the_map(record, name, method, range(4)):.1f}" for method in FIVE]

    log = " ".join(log.partition("the map, eight seeds of six methods\n\n")[2].split())
    names_of = "| plain OPD | TRB (2, 50) | `gap` | `sequence-linear` | `sequence-linear-veto` | `gap-veto` |"
    rows = table_rows(text(ROOT / "docs" / "experiments.md"), f"| pair {names_of}")
    six = (*FIVE[:2], "trb-gap", *FIVE[2:])
    for name, (_, *shown) in zip(names, rows, strict=True):
        assert shown == [f"{on_the_map(record, name, method):.1f}" for method in six]

    def behind(method: str, others: Sequence[str], seeds: Sequence[int]) -> str:
        """In words, by how much a method is at most below the best of others."""
        means = [{each: on_the_map(record, name, each, seeds) for each in (method, *others)} for name in names]
        return f"never more than {max(max(each.values()) - each[method] for each in means):.1f} points below"

    new = range(4, 8)
    assert f"{behind('trb-sequence-linear-veto', six, new)} the best of the six" in log
    assert f"{behind('trb-sequence-linear', ['trb-wide'], new)} TRB (2, 50)" in log
    page = " ".join(text(ROOT / "docs" / "choosing.md").split())
    twelve = [each for each in record["methods"] if each not in ("temperature", "tropd", "teacher-first")]
    assert len(twelve) == 12
    assert f"{behind('trb-sequence-linear-veto', twelve, range(8))} the best of twelve methods" in page
    found = hard_pair(record, "trb-sequence-linear", "opd", "trb-gap-veto")
    assert "{} where plain OPD reached {} in each of eight seeds".format(*found) in page
    assert f"{found[2]} where `sequence-linear` reaches {found[0]}" in page
    line = record["advice"]["lines"]["trb-sequence-linear"]["cosine"]
    assert f"missed by {100 * line['error']:.1f} points on the average" in page
    said = f"error on a pair left out {100 * line['error']:.1f} points, {100 * line['explained']:.0f}% of the squares"
    assert f"{said} explained, rank correlation {line['rank_correlation']:.2f}" in log


def test_the_teachers_completions_on_the_map_are_what_was_found() -> None:
    shipped, record = result("map"), result("map-default")
    log = text(ROOT / "docs" / "experiments.md").partition("the teacher's completions on the map, eight seeds")[2]
    rows = table_rows(log, "| pair | `sequence-linear` | the same, mended | `teacher-first` |")
    points = [name for name in record["panels"]["a"]["points"] if name in record["points"]]
    assert len(rows) == len(points) == 6
    columns = [(shipped, "trb-sequence-linear"), (record, "trb-sequence-linear"), (record, "teacher-first")]
    for name, (pair, *shown) in zip(points, rows, strict=True):
        knobs = record["points"][name]["knobs"]
        assert pair == f"{knobs['stages']} stages, start {knobs['start']:g}"
        assert shown == [f"{on_the_map(source, name, method):.1f}" for source, method in columns]
    lost = [(run["method"], run["seed"], points.index(run["point"])) for run in record["runs"] if run["lost"]]
    assert lost == [("teacher-first", 0, 3), ("teacher-first", 1, 3)]
    kept = [
        100 * run["final"]
        for run in record["runs"]
        if run["point"] == points[3] and run["method"] == "teacher-first" and not run["lost"]
    ]
    assert f"the other six are at {min(kept):.1f} to {max(kept):.1f}%" in log and len(kept) == 6
    chance = math.comb(8, 2) / math.comb(24, 2)  # both of the two that are lost among the eight
    assert f"Fisher's exact p = {chance:.2f}" in log


def test_what_the_maps_last_four_seeds_say_of_runs() -> None:
    record = result("map")
    places = {name for panel in "abe" for name in record["panels"][panel]["points"]}
    new = {
        (run["point"], run["method"], run["seed"]): run
        for run in record["runs"]
        if run["point"] in places and run["seed"] >= 4 and run["method"] in (*FIVE, "trb-gap")
    }
    assert len(new) == 336
    won = [
        run["final"] > new[point, "opd", seed]["final"]
        for (point, method, seed), run in new.items()
        if method.startswith("trb-sequence-linear") and on_the_map(record, point, "opd") < 80
    ]
    assert len(won) == 2 * 28 and all(won)
    middle = {key: run for key, run in new.items() if 0.3 <= run["final"] <= 0.75}
    assert {method for _, method, _ in middle} == {"opd"}
    lost = [len(run["lost"]) for run in middle.values()]
    assert sorted(lost) == [1] * 8 + [2] * 2
    assert all(round(100 * run["final"]) == 49 for run in middle.values() if len(run["lost"]) == 2)
    gone = [lookup for run in middle.values() for lookup in run["lost"]]
    assert max(lookup["right"] for lookup in gone) <= 0.02 and min(lookup["probability"] for lookup in gone) >= 0.96
    risen = [run for (_, method, _), run in new.items() if method != "opd" and run["final"] > 0.3]
    assert len(risen) == 264 and not any(run["lost"] for run in risen)


MIDDLE = "8-stages-0.45-start-0-shared-gives-up-{}-steps"
CHANGED = ("0.003-rate-0-top-64-rollouts-60", "0.003-rate-16-top-64-rollouts-60", "0.001-rate-16-top-64-rollouts-60")
CHANGED += ("0.001-rate-0-top-16-rollouts-60", "0.001-rate-0-top-64-rollouts-180")
IN_WORDS = {
    "plain OPD": "opd",
    "TRB (2, 50)": "trb-wide",
    "TRB (0.5, 25)": "trb",
    "fixed 0.5": "fixed",
    "`sequence-linear`": "trb-sequence-linear",
    "`sequence-linear-veto`": "trb-sequence-linear-veto",
    "`sequence`": "trb-sequence",
    "`gap`": "trb-gap",
    "`gap-veto`": "trb-gap-veto",
    "Veto": "veto",
    "SFT": "sft",
    "SKD": "skd",
    "temperature": "temperature",
}


def runs_of(record: dict[str, Any], changed: str, method: str) -> list[dict[str, Any]]:
    """The runs of a method at the middle of the map with one property changed, by seed."""
    point = MIDDLE.format(changed)
    found = [run for run in record["runs"] if (run["point"], run["method"]) == (point, method)]
    return sorted(found, key=lambda run: run["seed"])


def test_the_panels_of_one_property_are_what_was_found() -> None:
    record, log = result("map"), text(ROOT / "docs" / "experiments.md").partition("panels c, d and f\n\n")[2]
    rows = table_rows(log, "| method | 3 × rate | 3 × rate, top 16 | top 16 | 16 rollouts | 180 steps |")
    assert len(rows) == len(IN_WORDS)
    for name, *cells in rows:
        for changed, cell in zip(CHANGED, cells, strict=True):
            finals = [100 * run["final"] for run in runs_of(record, changed, IN_WORDS[name])]
            if not cell:
                assert len(finals) < 4
                continue
            failed = sum(final < 20 for final in finals)
            shown = f"{sum(finals) / len(finals):.1f}" + (f", {failed} fail" if failed else "")
            assert cell == shown + (f" ({len(finals)})" if len(finals) != 8 else "")


HIGH = ("0.008-rate-0-top-64-rollouts-60", "0.008-rate-16-top-64-rollouts-60")
REST = ("0.001-rate-0-top-256-rollouts-60", "0.001-rate-0-top-64-rollouts-60", CHANGED[3], CHANGED[2])


def test_the_maps_last_points_are_what_was_found() -> None:
    record, log = result("map-rest"), text(ROOT / "docs" / "experiments.md").partition("the map's last points\n\n")[2]
    rows = table_rows(log, "| method | 256 rollouts | 64 rollouts | 16 rollouts | top 16 |")
    assert len(rows) == 10
    for name, *cells in rows:
        for changed, cell in zip(REST, cells, strict=True):
            runs = runs_of(record, changed, IN_WORDS[name])
            lost = sum(bool(run["lost"]) for run in runs)
            assert len(runs) == (8 if cell else 0)
            if cell:
                assert cell == f"{on_the_map(record, MIDDLE.format(changed), IN_WORDS[name]):.1f}" + (
                    f", {lost} lost" if lost else ""
                )
    ends = {method: [run["final"] for run in runs_of(record, REST[0], method)] for method in ("opd", "veto")}
    assert [sum(final > 0.9 for final in finals) for finals in ends.values()] == [1, 3]
    low = [100 * final for finals in ends.values() for final in finals if final < 0.9]
    assert f"the others end at {min(low):.0f} to {max(low):.0f}%" in " ".join(log.split())
    gap = [100 * (veto - opd) for opd, veto in zip(*ends.values(), strict=True)]
    error = statistics.stdev(gap) / math.sqrt(len(gap))
    assert f"{statistics.fmean(gap):.1f} points above plain OPD" in log and f"standard error {error:.1f}" in log


def test_eight_times_the_rate_is_what_was_found() -> None:
    record, log = result("map-rest"), text(ROOT / "docs" / "experiments.md")
    log = log.partition("eight times the rate, and Veto's target with 256 rollouts\n\n")[2]
    rows = table_rows(log, "| method | eight times the rate | the same, top 16 |")
    assert len(rows) == 12
    held: dict[str, dict[str, list[float]]] = {"vocabulary": {}, "top 16": {}}
    for name, *cells in rows:
        for (support, found), changed, cell in zip(held.items(), HIGH, cells, strict=True):
            finals = [100 * run["final"] for run in runs_of(record, changed, IN_WORDS[name])]
            failed = sum(final < 20 for final in finals)
            assert len(finals) == 8 and cell == f"{statistics.fmean(finals):.1f}, {failed} fail", (name, support)
            if failed < 8:
                found[name] = sorted(final for final in finals if final >= 20)
    assert [list(found) for found in held.values()] == [["SFT"], ["SFT"]]
    (one,), (other,) = (found.values() for found in held.values())
    assert (len(one), len(other)) == (6, 3)
    words = " ".join(log.split())
    first = [run["final"] for changed in HIGH for run in runs_of(record, changed, "teacher-first")]
    assert len(first) == 16 and not any(first) and "**It does: 0.0% in all sixteen.**" in words
    assert f"six of eight over the vocabulary, where four end at {one[2]:.1f} to {one[-1]:.1f}%" in words
    assert f"three of eight with the top 16, at {other[0]:.1f} to {other[-1]:.1f}%" in words
    target, plain, gap, before = (
        on_the_map(record, MIDDLE.format(REST[0]), method)
        for method in ("trb-sequence-linear-veto", "trb-sequence-linear", "trb-gap-veto", "trb-gap")
    )
    assert f"ends at {target:.1f}%, level with the default ({plain:.1f})" in words
    assert f"`gap` with it at {gap:.1f}, beside {before:.1f} without" in words
    assert "at eight times SFT ends above 20% in six of eight seeds" in text(ROOT / "docs" / "choosing.md")


def test_the_relatives_are_what_was_found() -> None:
    record = result("map-relatives")
    log = text(ROOT / "docs" / "experiments.md").rpartition("the relatives in `staged`\n\n`bench")[2]
    rows, choosing = table_rows(log, "| method | start 0.45 | start 0.3 |"), text(ROOT / "docs" / "choosing.md")
    assert (
        len(rows) == 8 and log.startswith("marks/results/map-relatives.json`: 74 of 128") and len(record["runs"]) == 74
    )
    for name, *cells in rows:
        method = IN_WORDS.get(name, name.strip("`"))
        for start, seeds, cell in zip(("0.45", "0.3"), (4, 5), cells, strict=True):
            of_all = [run for run in record["runs"] if f"-{start}-start-" in run["point"] and run["method"] == method]
            runs = [run for run in of_all if run["seed"] < seeds]
            finals = [100 * run["final"] for run in runs]
            lost = sum(bool(run["lost"]) for run in runs)
            ends = f"{statistics.fmean(finals):.1f} ({min(finals):.1f} to {max(finals):.1f})"
            assert len(runs) == seeds and cell == ends + (f", {lost} lost" if lost else "")
            if start == "0.45" and method not in ("veto", "trb-sequence-linear"):
                assert f"{statistics.fmean(finals):.1f}" in choosing, method
            for run in (run for run in of_all if run["seed"] >= seeds):
                assert f"{100 * run['final']:.1f}" in log and method in ("opd", "veto")


def test_what_the_panels_are_said_to_show_is_what_was_found() -> None:
    record, log = result("map"), text(ROOT / "docs" / "experiments.md").partition("panels c, d and f\n\n")[2]
    log = " ".join(log.split())

    def mean(changed: str, method: str) -> float:
        return on_the_map(record, MIDDLE.format(changed), method)

    usual = "0.001-rate-0-top-64-rollouts-60"
    blended = ("trb-wide", "trb-gap", "trb-sequence-linear", "trb-sequence-linear-veto", "trb-gap-veto")
    costs = sorted(round(mean(usual, method) - mean(CHANGED[2], method), 1) for method in blended)
    assert f"loses {costs[0]} to {costs[-1]} points to itself" in log
    assert [round(mean(usual, method) - mean(CHANGED[2], method)) for method in ("opd", "veto")] == [18, 18]
    long = {method: runs_of(record, CHANGED[4], method) for method in ("opd", "veto", "temperature")}
    short = {method: [run for run in runs if run["final"] < 0.95] for method, runs in long.items()}
    assert {method: len(runs) for method, runs in short.items()} == {"opd": 3, "veto": 2, "temperature": 2}
    asked = [run for runs in short.values() for run in runs if "lost" in run]  # not Veto's first, of earlier code
    assert len(asked) == 6 and all(run["lost"] for run in asked)
    one, other = mean(usual, "temperature"), mean(usual, "opd")
    assert f"is {one - other:.1f} points above plain OPD ({one:.1f} against {other:.1f})" in log


def test_what_a_high_rate_does_is_what_was_found() -> None:
    record = result("map")
    at = {
        method: [run for changed in CHANGED[:2] for run in runs_of(record, changed, method)]
        for method in IN_WORDS.values()
    }
    assert {len(runs) for method, runs in at.items() if method != "temperature"} == {16}
    failed = {method: sum(run["final"] < 0.2 for run in runs) for method, runs in at.items()}
    assert [failed[method] for method in ("opd", "veto", "trb-gap", "trb-sequence", "trb-gap-veto")] == [16] * 5
    three = ("trb-sequence-linear", "trb-sequence-linear-veto", "trb-wide", "skd")
    assert [failed[method] for method in (*three, "fixed", "trb", "sft")] == [3, 3, 3, 3, 7, 9, 0]
    every = [run for runs in at.values() for run in runs]
    middle = [run for run in every if 0.2 <= run["final"] < 0.9]
    assert (len(middle), sum(bool(run["lost"]) for run in middle)) == (39, 38)
    assert {len(run["lost"]) for run in middle} == {0, 1, 2, 3} and not any(run in middle for run in at["sft"])
    fallen = {method: sum(run["collapsed"] for run in runs) for method, runs in at.items()}
    assert {method: count for method, count in fallen.items() if count} == dict.fromkeys((*three[:2], "trb"), 3)
    assert max(max(point["pass_at_1"] for point in run["curve"]) for run in every if run["collapsed"]) < 0.1
    page = " ".join(text(ROOT / "docs" / "choosing.md").split())
    assert (
        "plain OPD, Veto, `gap` and one nat to the end failed in each of sixteen runs, the default, TRB (2, 50) and "
        "SKD in three, SFT in none"
    ) in page


BESIDE = {name: IN_WORDS[name] for name in ("SFT", "SKD", "fixed 0.5", "TRB (0.5, 25)", "`sequence`", "Veto")}


def test_what_is_said_of_the_maps_other_methods_is_what_was_found() -> None:
    """The table of eight seeds, and what is said of each method beside TRB (2, 50), the default and plain OPD."""
    record = result("map")
    log = text(ROOT / "docs" / "experiments.md").partition(
        "## 2026-11-30: the other methods at the pairs of panels a, b and e\n"
    )[2]
    names = list(dict.fromkeys(name for panel in "abe" for name in record["panels"][panel]["points"]))
    order = [name for name in names if "unaware" not in name] + [name for name in names if "unaware" in name]
    means = {
        method: {name: on_the_map(record, name, method) for name in names}
        for method in set(IN_WORDS.values()) - {"temperature"}
    }
    for name, (_, *shown) in zip(order, table_rows(log, f"| pair | {' | '.join(BESIDE)} |"), strict=True):
        assert shown == [f"{means[method][name]:.1f}" for method in BESIDE.values()]
    log = " ".join(log.split())
    assert f"new runs of {len(record['runs'])} in" in log

    def beside(method: str, other: str, *but: str) -> list[float]:
        found = {name: means[method][name] - means[other][name] for name in names}
        return sorted(found[name] for name in names if not name.startswith(but))

    hard = ("8-stages-0.3-start-0-shared-gives-up", "12-stages-0.3-")
    sft, skd = beside("sft", "trb-wide", hard[1]), beside("skd", "trb-wide", hard[1])
    assert f"SFT lies between {sft[0]:+.1f} and {sft[-1]:+.1f} points" in log and round(skd[0], 1) == 0.0
    assert f"SKD between 0.0 and {skd[-1]:+.1f}" in log
    both = beside("fixed", "trb-wide", *hard) + beside("trb", "trb-wide", *hard)
    assert f"({min(both):+.1f} to {max(both):+.1f})" in log
    assert all(each > -1 for each in beside("trb-sequence", "trb-sequence-linear", *hard))
    unaware = [name for name in names if "unaware" in name]
    without = [method for method in means if "veto" not in method]
    gains = [means["veto"][name] - max(means[method][name] for method in without) for name in unaware]
    assert f"it is {min(gains):.1f} to {max(gains):.1f} points above everything" in log
    assert all(means["skd"][name] == max(means[method][name] for method in without) for name in unaware)
    gains = [means["skd"][name] - means["opd"][name] for name in unaware]
    assert f"{min(gains):.1f} to {max(gains):.1f} above plain OPD" in log
    page = text(ROOT / "docs" / "choosing.md")
    assert "did as well there ({}% and {}%)".format(*(f"{means[of][names[3]]:.1f}" for of in ("sft", "skd"))) in page


def test_a_run_in_the_middle_has_lost_one_lookup_and_the_table_of_tropd_is_that_of_its_file() -> None:
    record, again = result("map"), result("lost-lookups")
    places = {name for panel in "abe" for name in record["panels"][panel]["points"]}
    runs = {(run["point"], run["method"], run["seed"]): run for run in again["runs"] if run["method"] != "tropd"}
    found = ((run["point"], run["method"], run["seed"], run) for run in record["runs"] if run["point"] in places)
    known = {key: run for *names, run in found if (key := tuple(names)) in runs}  # the later ones have entries after
    middle = {key for key, run in known.items() if 0.3 <= run["final"] <= 0.75}
    assert len(runs) == 22 and len(middle) == 21
    for key in middle:
        assert sum(right < 0.95 for right in known[key]["stage_rates"]["right"]) == 1
    for key, run in runs.items():
        assert len(run["lost"]) == (key in middle), key
        for lookup in run["lost"]:
            assert lookup["right"] <= 0.05 and lookup["probability"] >= 0.91
            assert -26.5 < lookup["teacher_log_prob"] < -7
    changed = [key for key, run in runs.items() if any(run[of] != known[key][of] for of in ("final", "curve"))]
    assert len(changed) == 4 and all(abs(runs[key]["final"] - known[key]["final"]) < 0.0015 for key in changed)

    log = text(ROOT / "docs" / "experiments.md").partition("a target that was to bring them back")[2]
    columns = "plain OPD | `tropd` | `sequence-linear` | lookups that `tropd` lost, by seed |"
    rows = table_rows(log, f"| pair | {columns}")
    for name, (_, *shown) in zip(record["panels"]["a"]["points"], rows, strict=True):
        found = [run for run in again["runs"] if (run["point"], run["method"]) == (name, "tropd")]
        three = ((record, name, "opd"), (again, name, "tropd"), (record, name, "trb-sequence-linear"))
        means = [on_the_map(*of, range(4)) for of in three]
        lost = ", ".join(str(len(run["lost"])) for run in sorted(found, key=lambda run: run["seed"]))
        assert shown == [*(f"{mean:.1f}" for mean in means), lost]


def test_the_numbers_of_the_readme_are_those_of_the_files() -> None:
    study, smollm2 = result("study"), result("smollm2-study")["settings"]["smollm2-clock"]["methods"]["trb"]
    code = result("code-study")["settings"]["programs"]["methods"]
    average = study["average"]["methods"]
    dialogue = result("dialogue-study")["settings"]["dialogue"]["methods"]["trb"]["difference_to_opd"]
    counts, kills = result("models")["counts"], result("torture")["kills"]
    rows = {row[0].strip("* "): " ".join(row[1:]) for row in table_rows(text(ROOT / "README.md"), HEADER)}
    after = {
        setting: found["continuation"]["truncations"][-1]["policies"] for setting, found in study["diagnostics"].items()
    }
    solved = {
        (setting, policy): f"{100 * numbers['success']['teacher']['value']:.1f}%"
        for setting, policies in after.items()
        for policy, numbers in policies.items()
    }
    expected = {
        "A better student than plain OPD? No, not in arithmetic": points(average["trb"]["difference_to_opd"]),
        "nor on a real language model": (*points(smollm2["difference_to_opd"]), f"{smollm2['seeds']} seeds"),
        "a small setting of code: a little": (
            *points(code["trb"]["difference_to_opd"]),
            *points(code["veto"]["difference_to_opd"]),
        ),
        "what did end higher": points(average["veto"]["difference_to_opd"]),
        "Where it decides": (
            "{} instead of {}, in each of eight seeds".format(*hard_pair(result("map"), "trb-sequence-linear", "opd")),
        ),
        "Nothing to set": over_forty_seeds(),
        "and ends higher, with Veto's target": fresh_seeds(),
        "a budget, or just the teacher?": of_the_missing_arm(),
        "dialogue, by closeness to the teacher: no": (
            f"TRB {dialogue['estimate']:+.4f} nats per token",
            f"({dialogue['interval'][0]:.4f} to {dialogue['interval'][1]:.4f})",
        ),
        "Better prefixes? Yes": (
            f"solves {solved['long-chains', 'trb']} instead of {solved['long-chains', 'student']}",
            f"{solved['clock', 'trb']}, {solved['clock', 'student']})",
        ),
        "Exact for every model, or refused by name": (
            f"of {sum(counts.values())} causal-LM types {counts['exact']} exact",
            f"{counts['refused']} refused, {counts['library']} the library",
        ),
        "One set of weights": (f"{result('one_base')['ratio of peaks']:.2f} of the memory of two copies",),
        "Runs that survive": (f"{kills['survived']} of {kills['tried']} killed runs",),
    }
    by_script = {row().split("|")[1].strip("* ") for row in performance.ROWS}
    assert rows.keys() == expected.keys() | by_script
    for name, phrases in expected.items():
        for phrase in phrases:
            assert phrase in rows[name], (name, phrase)


def test_what_is_said_of_speed_is_what_the_script_writes() -> None:
    readme, page = (path.read_text(encoding="utf-8") for path in (performance.README, performance.PAGE))
    assert performance.with_rows(readme) == readme, "run `make performance`"
    assert filled(page, performance.TABLES) == page, "run `make performance`"


def test_no_measured_number_of_the_page_of_speed_is_written_by_hand() -> None:
    page = by_hand(text(ROOT / "docs" / "performance.md"))
    for given in (r"`[^`]*`", r"\]\([^)]*\)", r"ε = [\d.]+", r"from 0\.02 to 0", r"Qwen3[\w.-]*"):
        page = re.sub(given, "", page)
    assert re.findall(r"\d+\.\d+|\d+ ?%|\d ?(?:ms|s|[KMGT]i?B|GFLOP|times|tokens per second)\b", page) == []


def test_the_speeds_inside_vllm_are_those_of_their_file() -> None:
    page, found = text(ROOT / "docs" / "vllm.md"), result("vllm")
    cells = {(str(cell["batch"]), cell["contender"]): cell for cell in found["throughput"]["cells"]}
    columns = "in process | blended in vLLM | stock speculation in vLLM | plain student in vLLM | accepted, blended | "
    header = f"| batch | {columns}accepted, stock | deciding, of a blended call's time | the same, solver in torch |"
    rows = table_rows(page, header)
    assert [row[0] for row in rows] == ["8", "64"]
    for batch, *shown in rows:
        of = {name: cell for (size, name), cell in cells.items() if size == batch}
        speeds = [of[name] for name in ("in-process", "blended", "stock speculation", "plain student")]
        deciding = [of[name] for name in ("blended", "blended, solver in torch")]
        assert shown == [
            *(f"{cell['tokens_per_cpu_second']['median']:.0f}" for cell in speeds),
            *(f"{of[name]['accepted']:.2f}" for name in ("blended", "stock speculation")),
            *(f"{cell['cpu_seconds_in']['deciding'] / cell['cpu_seconds']:.1%}" for cell in deciding),
        ]
    words, law = " ".join(page.split()), found["stock_law"]
    blended = [cells[batch, "blended"] for batch in ("8", "64")]
    shares = {
        part: " and ".join(f"{cell['cpu_seconds_in'][part] / cell['cpu_seconds']:.0%}" for cell in blended)
        for part in ("teacher pass", "drafting", "first drafts")
    }
    for phrase in (
        f"the teacher's pass ({shares['teacher pass']} of the time at batches 8 and 64)",
        f"the student's ({shares['drafting']}, its head",
        f"first drafts costs {shares['first drafts']}",
        f"{law['completions_each']:,} completions: p = {law['mended']['p_value']:.2f}",
        f"kept {law['as_built']['accepted']:.0%} of its drafts there instead of {law['mended']['accepted']:.0%}",
    ):
        assert phrase in words, phrase
    assert law["as_built"]["p_value"] < 1e-70 < 0.01 < law["mended"]["p_value"]


def test_drafts_held_to_the_blend_are_kept_at_least_as_often_as_those_held_to_the_teacher() -> None:
    record = result("vllm")["throughput"]
    accepted = {(cell["batch"], cell["contender"]): cell.get("accepted") for cell in record["cells"]}
    assert [entry["batch"] for entry in record["acceptance"]] == [8, 64]
    for entry in record["acceptance"]:
        ours, stock = (accepted[entry["batch"], name] for name in ("blended", "stock speculation"))
        assert (entry["blended"], entry["stock"]) == (ours, stock)
        assert entry["floor_holds"] and ours >= stock


def test_the_table_of_the_study_of_self_setting_warm_ups_is_that_of_its_file() -> None:
    log = text(ROOT / "docs" / "experiments.md").partition("self-setting warm-ups, all twenty seeds of three methods")[
        2
    ]
    columns = "swept TRB, minus plain OPD | `sequence-linear`, minus plain OPD | swept TRB minus `sequence-linear` |"
    shown = {name: cells for name, *cells in table_rows(log, f"| setting | plain OPD | {columns}")}
    settings, behind = result("study2")["settings"], []
    assert shown.keys() == settings.keys()
    for name, setting in settings.items():
        methods = setting["methods"]
        ahead = methods["sequence-linear"]["differences"]["trb"]
        low, high = sorted(-100 * end for end in ahead["interval"])
        cells = [f"{100 * methods['opd']['pass_at_1']:.1f}"]
        cells += [with_chance(methods[method]["difference_to_opd"]) for method in ("trb", "sequence-linear")]
        cells.append(f"{-100 * ahead['estimate']:.2f} ({low:.2f} to {high:.2f})")
        behind.append(-ahead["estimate"])
        assert shown[name] == cells, name
        assert methods["trb"]["seeds"] == 20
    assert f"{100 * sum(behind) / len(behind):.2f} points above it" in " ".join(log.split())


class Part(NamedTuple):
    """A part of the study of self-setting warm-ups, after its first."""

    file: str
    beside: str
    """The part whose methods its own are compared with."""
    seeds: int
    title: str
    """In the log."""
    comparisons: int
    other_commits: bool = False


PARTS = [
    Part("study2-others", "study2", 20, "self-setting warm-ups, twenty seeds of three more methods", 4),
    Part("study2-rivals", "study2", 20, "self-setting warm-ups, twenty seeds of its last four methods", 8),
    Part("study2-teacher", "study2-fresh", 8, "the arm that was missing: the teacher's completions for as long", 3),
    Part("study2-fresh", "study2-fresh", 20, "the default with Veto's target in the study, on twenty fresh seeds", 3),
    Part("study2-default", "study2-fresh", 20, "the default after its mend, twenty seeds", 5, other_commits=True),
]


def test_what_is_said_against_sequence_budgets_to_the_end_is_what_was_found() -> None:
    parts = result("study2-rivals"), result("study2")
    found = [across.difference(*parts, name, "sequence", "trb") for name in parts[0]["settings"]]
    first, second, third = (
        f"{100 * x.value:+.2f}{' points' * (x is found[0])} ({100 * x.interval[0]:.2f} to {100 * x.interval[1]:.2f})"
        for x in found
    )
    assert f"over twenty seeds {first}, {second} and {third} beside" in text(ROOT / "docs" / "choosing.md")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.file)
def test_the_table_of_a_part_of_the_study_is_that_of_its_file(part: Part) -> None:
    log = text(ROOT / "docs" / "experiments.md").partition(part.title)[2]
    settings = result(part.file)["settings"]
    shown = {name.strip("`"): cells for name, *cells in table_rows(log, f"| method | {' | '.join(settings)} |")}
    tables = [setting["methods"] for setting in settings.values()]
    assert {entry["seeds"] for table in tables for entry in table.values()} == {part.seeds}
    expected = {"opd": [f"{100 * table['opd']['pass_at_1']:.1f}" for table in tables]}
    for method in tables[0].keys() - {"opd"}:
        expected[method] = [with_chance(table[method]["difference_to_opd"]) for table in tables]
    assert shown == expected


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.file)
def test_methods_of_two_parts_of_the_study_are_compared_on_the_same_problems(part: Part) -> None:
    """One commit, the same weights, and plain OPD again, on another day and machine, solved what it had solved."""
    parts = result(part.file), result(part.beside)
    across.check(*parts, other_commits=part.other_commits)
    settings = list(parts[0]["settings"])
    assert all(len(parts[0]["outcomes"][setting]["opd"]) == part.seeds for setting in settings)
    log = text(ROOT / "docs" / "experiments.md").partition(part.title)[2]
    rows = table_rows(log, f"| difference | {' | '.join(settings)} | average |")
    assert len(rows) == part.comparisons
    assert_differences(rows, *parts)


def assert_differences(rows: list[list[str]], *parts: dict[str, Any]) -> None:
    """A table of methods of one part minus those of another, setting by setting, and on the average."""
    for name, *shown in rows:
        one, other = re.findall(r"`([\w-]+)`", name)
        found = [across.difference(*parts, setting, one, other) for setting in parts[0]["settings"]]
        mean, error = across.average(found)
        cells = [f"{100 * x.value:+.2f} ({100 * x.interval[0]:.2f} to {100 * x.interval[1]:.2f})" for x in found]
        assert shown == [*cells, f"{100 * mean:+.2f}, standard error {100 * error:.2f}"]


def test_what_decided_on_the_mend_of_the_default_is_what_was_found() -> None:
    """The table of the runs among themselves, the rule that fired, and what forty seeds say of the schedule before."""
    part = result("study2-default")
    log = text(ROOT / "docs" / "experiments.md").partition("the default after its mend, twenty seeds")[2]
    rows = table_rows(log, f"| in these runs | {' | '.join(part['settings'])} | average |")
    assert len(rows) == 3
    assert_differences(rows, part, part)
    assert part["settings"]["long-chains"]["methods"]["sequence-linear"]["difference_to_opd"]["interval"][1] < 0
    assert over_forty_seeds()[0] in log
    chances = {
        name: across.difference(part, part, name, "teacher-first", "sequence-linear").p_value
        for name in part["settings"]
    }
    assert f"p = {chances['long-chains']:.2f}, and {holm(chances)['long-chains']:.2f} with Holm's correction" in log


def over_forty_seeds() -> list[str]:
    """What is said of the default against plain OPD, setting by setting."""
    parts = [result("study2"), result("study2-fresh")]
    found = [across.together(parts, name, "sequence-linear") for name in parts[0]["settings"]]
    return [
        f"{100 * x.value:+.2f}{' points' * (x is found[0])} ({100 * x.interval[0]:.2f} to {100 * x.interval[1]:.2f})"
        for x in found
    ]


def test_the_correction_of_the_missing_arm_is_that_of_its_files() -> None:
    parts = result("study2-teacher"), result("study2-fresh")
    log = " ".join(text(ROOT / "docs" / "experiments.md").split())
    found = []
    for other in ("sequence-linear", "trb"):
        chances = {
            name: across.difference(*parts, name, "teacher-first", other).p_value for name in parts[0]["settings"]
        }
        found += [chances["long-chains"], holm(chances)["long-chains"]]
    first, corrected, swept, swept_corrected = (f"{chance:.2f}" for chance in found)
    said = f"against the default p = {first}, and {corrected} with Holm's correction over the three settings"
    assert f"{said}; against the swept budget {swept} and {swept_corrected})" in log


def of_the_missing_arm() -> list[str]:
    """What README says of the teacher's completions beside the default's."""
    parts = [result("study2-default")] * 2
    settings = ("clock", "staged", "long-chains")
    found = [across.difference(*parts, name, "teacher-first", "sequence-linear") for name in settings]
    phrases = []
    for each in found:
        low, high = (100 * end for end in each.interval)
        phrases.append(f"{100 * each.value:+.2f}{' points' * (each is found[0])} ({low:.2f} to {high:.2f}")
    corrected = holm({name: each.p_value for name, each in zip(settings, found, strict=True)})
    return [*phrases, f"p = {corrected['long-chains']:.2f} after Holm's correction"]


def test_a_part_is_compared_with_itself_as_its_own_study_did() -> None:
    """The differences that a sweep writes, from the outcomes alone."""
    study = result("study2")
    entry = study["settings"]["clock"]["methods"]["trb"]["differences"]["sequence-linear"]
    found = across.difference(study, study, "clock", "trb", "sequence-linear")
    assert [found.value, *found.interval] == pytest.approx([entry["estimate"], *entry["interval"]], abs=1e-6)


def test_parts_that_cannot_be_compared_are_refused() -> None:
    study, other = result("study2"), result("study2")
    other["outcomes"]["clock"]["opd"]["seed-3"] = other["outcomes"]["clock"]["opd"]["seed-4"]
    with pytest.raises(ValueError, match="clock, seed-3: opd solved other problems"):
        across.check(study, other)
    with pytest.raises(ValueError, match="weights are others"):
        across.check(study, study | {"models": {}})
    later = study | {"provenance": {"commits_of_the_runs": ["a"]}}
    with pytest.raises(ValueError, match="several commits"):
        across.check(study, later)
    across.check(study, later, other_commits=True)
    across.check(other, later, other_commits=True)  # one of twenty; three are too many
    found = across.difference(other, later, "clock", "trb", "opd")
    left = {seed: run for seed, run in study["outcomes"]["clock"]["opd"].items() if seed != "seed-3"}
    study["outcomes"]["clock"]["opd"] = left
    assert found == across.difference(study, study, "clock", "trb", "opd")
    for seed in ("seed-5", "seed-7"):
        other["outcomes"]["clock"]["opd"][seed] = left["seed-4"]
    with pytest.raises(ValueError, match="clock, seed-3, seed-5, seed-7: opd solved other problems"):
        across.check(other, later | {"outcomes": result("study2")["outcomes"]}, other_commits=True)
    with pytest.raises(ValueError, match="long-chains: no seed of opd is in both"):
        across.check(study, result("study2-fresh"), other_commits=True)


def test_the_numbers_of_the_study_of_dialogue_are_those_of_its_file() -> None:
    setting = result("dialogue-study")["settings"]["dialogue"]
    methods, names = setting["methods"], {"TRB": "trb", "`sequence-linear`": "sequence-linear", "Veto": "veto"}

    def shown(name: str) -> tuple[str, str]:
        difference = methods[name]["difference_to_opd"]
        low, high = difference["interval"]
        return f"{difference['estimate']:+.4f}", f"{low:.4f} to {high:.4f}"

    page, log = (text(ROOT / "docs" / name) for name in ("domains.md", "experiments.md"))
    rows = table_rows(page, "| minus plain distillation, nats per token | difference | 95% interval |")
    assert rows == [[title, *shown(name)] for title, name in names.items()]
    ends = f"{setting['student']['reverse_kl']:.3f} to {methods['opd']['reverse_kl']:.3f} nats per token"
    assert ends in " ".join(page.split())
    columns = "TRB, minus plain OPD | `sequence-linear`, minus plain OPD | Veto, minus plain OPD |"
    (opd, *others) = table_rows(log.partition("the study of dialogue, all eight seeds")[2], f"| plain OPD | {columns}")[
        0
    ]
    assert opd == f"{methods['opd']['reverse_kl']:.3f}"
    for cell, name in zip(others, names.values(), strict=True):
        estimate, interval = shown(name)
        assert cell == f"{estimate} ({interval}), p = {methods[name]['difference_to_opd']['p_value_holm']:.2f}"
    relative = [
        100 * methods[name]["difference_to_opd"]["estimate"] / methods["opd"]["reverse_kl"] for name in names.values()
    ]
    assert f"end {relative[0]:.1f} and {relative[1]:.1f}% above plain OPD" in " ".join(log.split())


@pytest.mark.parametrize(("pair", "unit"), [("programs", "operations"), ("dialogue", "turns")])
def test_the_numbers_of_a_domain_are_those_of_its_pair(pair: str, unit: str) -> None:
    header = f"| model | parameters | {' | '.join(f'{size} {unit}' for size in (4, 5, 6))} |"
    rows = table_rows(text(ROOT / "docs" / "domains.md"), header)
    models = result(f"{pair}-pair")["models"]
    assert [row[0] for row in rows] == [*models]
    for (_, parameters, *shares), found in zip(rows, models.values(), strict=True):
        assert parameters == f"{found['parameters'] / 1e6:.2f} M"
        assert shares == [f"{100 * entry['pass_at_1']:.1f}%" for entry in found[f"by_{unit}"].values()]


def test_the_numbers_of_the_first_steps_are_those_of_the_files() -> None:
    page = text(ROOT / "docs" / "first-steps.md")
    rows = table_rows(page, "| quickstart, 512 test problems, one seed | pass@1 | 95% interval |")
    expected = []
    for name in ("student", "opd", "trb", "teacher"):
        found = result("quickstart")["results"][name]
        low, high = (f"{100 * end:.1f}" for end in found["interval"])
        expected.append([f"{100 * found['pass_at_1']:.1f}%", f"{low} to {high}"])
    assert [row[1:] for row in rows] == expected
    smollm2 = result("smollm2")
    first, last = smollm2["held_out"][0], smollm2["held_out"][-1]
    assert f"fell from {first['loss']:.2f} to {last['loss']:.2f} nats" in page
    name = "trb/teacher_log_prob"
    assert f"rose from {first[name]:.2f} to {last[name]:.2f}" in " ".join(page.split())
    kept = [row["trb/accept_rate"] for row in smollm2["metrics"] if row["step"] <= 15]
    assert f"{100 * sum(kept) / len(kept):.0f}% of the student's drafts" in page
