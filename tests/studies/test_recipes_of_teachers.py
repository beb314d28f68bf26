"""Recipes with several teachers: routed, run, scored, reported and counted; and what is wrong with some."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_recipes import study_of

from trb.cli import main
from trb.cli.outline import outlined_pairs
from trb.cli.plan import pair_of_all
from trb.errors import InputError
from trb.records import SCORES
from trb.report import write_report
from trb.studies.comparison import compare
from trb.studies.material import load_tokenizers, problem_sets, routes_of, training_prompts
from trb.studies.recipe import Recipe, load_recipe, make_recipe
from trb.studies.shipped import recipe_file
from trb.studies.study import ProblemSets, Setting
from trb.studies.sweep import _check_problems
from trb.studies.yaml_files import ConfigError, read_yaml
from trb.tasks.prompts import load_prompts
from trb.training.routes import Routes
from trb.zoo import TASKS

SHORT: dict[str, Any] = {
    "max_steps": 2,
    "prompts_per_step": 4,
    "per_device_train_batch_size": 16,
    "train_limit": 40,
    "eval_limit": 24,
    "eval_every": 0,
}
ROUTES = Routes("kind", ("alone", "told"))


def recipe(**changes: Any) -> Recipe:
    """The shipped one, of one method."""
    values = {key: value for key, value in read_yaml(recipe_file("several-teachers")).items() if key != "methods"}
    return make_recipe({**values, **SHORT, **changes})


# ---- the zoo's data ----


def test_some_problems_are_told_and_say_so() -> None:
    rows = load_prompts("zoo:chains?told=0.4&operands=3", limit=300, routes=ROUTES)
    kinds = rows["kind"]
    assert 0.3 < kinds.count("told") / len(kinds) < 0.5 and {*kinds} == {"alone", "told"}
    for row in rows:
        problem, _, told = row["prompt"][0]["content"].partition("\n\n")
        assert row["answer"] == TASKS["chains"].answer_to(problem)
        assert told == (TASKS["chains"].solution(problem) if row["kind"] == "told" else "")
    context = load_prompts("zoo:chains?told=1", limit=3, privileged_column="solution")
    assert all(row["prompt"][0]["content"].endswith(row["privileged_context"]) for row in context)
    assert "kind" not in load_prompts("zoo:chains?told=1", limit=3).column_names
    for value in ("2", "true", '"x"'):
        with pytest.raises(InputError, match="told is"):
            load_prompts(f"zoo:chains?told={value}", limit=3)


# ---- a run ----


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("several") / "run"
    return directory, compare(load_recipe("several-teachers", SHORT), directory)


def test_each_teacher_is_scored_on_its_own_rows(compared: tuple[Path, dict[str, Any]]) -> None:
    """Either alone would be wrong on the other's."""
    directory, results = compared
    assert results["teacher"]["pass_at_1"] > 0.85 > 0.4 > results["student"]["pass_at_1"]
    assert results["teacher"]["n_problems"] == results["student"]["n_problems"] == 24
    low, high = results["teacher"]["interval"]
    assert low < results["teacher"]["pass_at_1"] <= high
    parts = [
        file.read_text().splitlines()[1:] for file in sorted((directory / "evaluations").glob("teacher/*/*.jsonl"))
    ]
    assert len(parts) == 2 and sum(map(len, parts)) == 24


def test_the_report_has_a_chart_of_each_teacher(compared: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = compared
    page = write_report(directory).read_text()
    assert all(f'id="figure-teacher_{what}-1-alone"' in page for what in ("reverse_kl", "accept_rate", "share"))
    assert "Reverse KL to told" in page
    metrics = [json.loads(line) for line in (directory / "trb" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["trb/teacher_share/alone"] + row["trb/teacher_share/told"] == 1 for row in metrics)


def test_the_recipe_is_taken_back_and_its_paths_are_placed(tmp_path: Path) -> None:
    values = recipe().resolved()
    assert "teacher" not in values and values["teachers"] == {"alone": "zoo:teacher", "told": "zoo:told"}
    assert make_recipe(values).run == recipe().run
    (tmp_path / "a").mkdir()
    (tmp_path / "r.yaml").write_text(
        "student: zoo:student\nteachers: {alone: a, told: zoo:told}\ntrain_data: zoo:chains\n"
    )
    assert load_recipe(tmp_path / "r.yaml").run.teachers == {"alone": str(tmp_path / "a"), "told": "zoo:told"}
    over = load_recipe(tmp_path / "r.yaml", {"teachers.told": "zoo:teacher"})
    assert over.run.teachers["told"] == "zoo:teacher"
    assert over.run.taught_by == f"alone: {tmp_path / 'a'}, told: zoo:teacher"


def test_problem_sets_without_a_route_are_the_students_alone(tmp_path: Path) -> None:
    from trb.studies.scores import evaluate_teachers

    mixed = recipe(eval_data=["zoo:chains"])
    args = mixed.training_config("unused")
    sets = problem_sets(mixed.run, args)
    assert "kind" not in sets["zoo:chains"].column_names
    assert evaluate_teachers({}, problems=sets, routes=routes_of(mixed.run, args), run=mixed.run) == []
    SCORES.write(tmp_path / "teacher.json", [])
    assert SCORES.read(tmp_path / "teacher.json") == [], "what a comparison reads of it again"


def test_a_study_without_a_route_is_refused_before_its_first_run() -> None:
    keys = ("student", "teachers", "teacher_column", "train_data", "max_prompt_length", "max_completion_length")
    settings = {key: value for key, value in recipe().resolved().items() if key in keys}
    setting = Setting(
        recipe=settings,
        dev=ProblemSets(data=["zoo:chains?told=0.5"], limit=4, split="train"),
        test=ProblemSets(data=["zoo:chains"], limit=4),
    )
    with pytest.raises(ValueError, match=r"s: zoo:chains has no column 'kind'.*no teacher"):
        _check_problems(study_of(setting), "s")


# ---- the plan and the doctor ----


def test_plans_count_every_teacher_and_with_offload_the_largest() -> None:
    sizes = {}
    for offload in (False, True):
        run = recipe(teacher_offload=offload)
        pair = pair_of_all(run.run, run.training_config("unused"), outlined_pairs(run.run))
        assert pair.teacher.config.hidden_size == 128  # the larger of the two
        sizes[offload] = pair.others
    _, told = outlined_pairs(recipe().run)["told"]
    assert sizes == {False: 4 * told.num_parameters(), True: 0}


def test_the_doctor_names_the_teachers_and_their_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", "several-teachers"]) == 0
    said = capsys.readouterr().out
    assert "heads (alone): student 64 rows, teacher 80" in said and "heads (told): student 64 rows" in said
    assert "other teachers' weights" in said
    assert main(["doctor", "--config", "several-teachers", "--train-data", "zoo:chains?told=1"]) == 0
    assert "is of teacher 'alone', which teaches nothing" in capsys.readouterr().out
    assert main(["doctor", "--config", "several-teachers", "--plan", "--machine", "cpu"]) in (0, 1)
    assert "alone: zoo:teacher, told: zoo:told" in capsys.readouterr().out


# ---- what is refused ----

BASE = {"student": "zoo:student", "train_data": "zoo:chains?told=0.5"}
TWO = {"alone": "zoo:teacher", "told": "zoo:told"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"teacher": "zoo:teacher", "teachers": TWO}, "teacher is 'zoo:teacher', and teachers has alone, told: give one"),
    ({}, "teacher is missing"),
    ({"teachers": {}}, "teacher is missing"),
    ({"teachers": {"alone": ""}}, "teachers has 'alone': ''"),
    ({"teachers": {"alone": 3}}, "teachers is"),
    ({"teachers": TWO, "teacher_revision": "main"}, "teacher_revision is 'main', and there are several"),
    ({"teachers": TWO, "chat_template": "teacher"}, "chat_template is 'teacher', and there are alone, told"),
    ({"teacher": "zoo:teacher", "teacher_column": "kind"}, "teacher_column is 'kind', and there is one teacher"),
    (
        {"teachers": TWO, "teacher_offload": True, "teacher_quantization": "bnb-4bit"},
        "leave out that or teacher_offload",
    ),
    (
        {"teachers": {**TWO, "told": "base"}, "lora_rank": 2, "teacher_quantization": "bnb-4bit"},
        "teacher 'told': teacher_quantization",
    ),
]


@pytest.mark.parametrize(("values", "complaint"), WRONG, ids=range(len(WRONG)))
def test_recipes_that_contradict_themselves_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_recipe({**BASE, **values})


def rows(tmp_path: Path, *kinds: Any) -> str:
    path = tmp_path / "rows.jsonl"
    lines = ({"question": f"{number}+2", "answer": "3", "kind": kind} for number, kind in enumerate(kinds))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("kinds", "complaint"),
    [
        (("alone", "tolt"), "row 2 of .* has 'tolt' in its column 'kind'.*did you mean 'told'"),
        (("alone", None), "row 2 of .* has nothing in its column 'kind'"),
        (("alone", "told", 7), "row 3 of .* has 7 in its column 'kind'"),
        (("alone", ["told"]), r"row 2 of .* has \['told'\] in its column"),
    ],
)
def test_rows_of_nobody_are_named(tmp_path: Path, kinds: tuple[Any, ...], complaint: str) -> None:
    run = recipe(train_data=rows(tmp_path, *kinds), train_limit=None)
    tokenizer, _ = load_tokenizers(run.run)
    with pytest.raises(InputError, match=complaint):
        training_prompts(run.run, run.training_config("unused"), tokenizer)


def test_data_without_the_column_is_refused_by_its_name() -> None:
    for changes, complaint in (
        ({"train_data": "zoo:chains"}, "zoo:chains has no column 'kind', which says who teaches a row"),
        ({"teacher_column": "kinds"}, "has no column 'kinds'.*did you mean 'kind'"),
        ({"teacher_column": None}, "has no column 'teacher_id'"),
    ):
        run = recipe(**changes)
        tokenizer, _ = load_tokenizers(run.run)
        with pytest.raises(InputError, match=complaint):
            training_prompts(run.run, run.training_config("unused"), tokenizer)


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "several-teachers", "--teachers.told", str(tmp_path / "nowhere")]
    assert main(["doctor", *options]) == 1
    assert "teacher 'told': " in capsys.readouterr().out


def test_a_probe_looks_at_one_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--config", "several-teachers", "--output-dir", str(tmp_path)]) == 2
    assert "a probe looks at one pair" in capsys.readouterr().err
