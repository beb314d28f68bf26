"""Paths in a recipe: beside its file, then in the current directory; and errors that say where was looked."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_recipes import SMALL, STUDY

from trb.cli import main
from trb.studies.jobs import _study_in
from trb.studies.keys import parse_overrides
from trb.studies.recipe import Recipe, load_recipe
from trb.studies.study import load_study

ROW = '{"prompt": "1+1=", "answer": "2"}\n'


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with recipes in a folder of their own."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(path: str, text: str = ROW) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def recipe(*options: str, **values: Any) -> Recipe:
    given = {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains", **values}
    return load_recipe(written("recipes/mine.yaml", yaml.safe_dump(given)), parse_overrides(options))


def test_what_lies_beside_the_recipe_comes_first() -> None:
    for folder in ("recipes", "."):
        for name in ("data.jsonl", "sets/test.jsonl", "template.jinja"):
            written(f"{folder}/{name}")
        written(f"{folder}/models/student/config.json")
    run = recipe(
        student="models/student",
        teacher="./models/student",
        train_data="data.jsonl",
        chat_template="template.jinja",
        eval_data=["data.jsonl", "gsm8k=sets/test.jsonl", "math500"],
        eval_samples={"data.jsonl": 2, "gsm8k=sets/test.jsonl": 3, "math500": 4},
    ).run
    assert run.student == "recipes/models/student"
    assert Path(run.teacher) == Path("recipes/models/student")
    assert run.train_data == "recipes/data.jsonl"
    assert run.chat_template == "recipes/template.jinja"
    assert run.eval_data == ["recipes/data.jsonl", "gsm8k=recipes/sets/test.jsonl", "math500"]
    assert [run.samples_of(name) for name in run.eval_data] == [2, 3, 4]


def test_an_adapter_on_the_students_weights_lies_beside_the_recipe_too() -> None:
    written("recipes/runs/lora/adapter_config.json")
    assert recipe(teacher="adapter:runs/lora").run.teacher == "adapter:recipes/runs/lora"
    assert recipe(teacher="adapter:elsewhere").run.teacher == "adapter:elsewhere"
    assert recipe("--teacher", "adapter:runs/lora").run.teacher == "adapter:runs/lora"


def test_then_the_current_directory() -> None:
    written("data.jsonl")
    assert recipe(train_data="data.jsonl", eval_data="data.jsonl").run.train_data == "data.jsonl"


def test_files_of_the_trainer_are_looked_for_too_and_what_a_run_wrote_is_not() -> None:
    written("recipes/fsdp.json", "{}")
    written("recipes/runs/mine/checkpoint-2/trainer_state.json", "{}")
    found = recipe(fsdp_config="fsdp.json", resume_from_checkpoint="runs/mine/checkpoint-2").training
    assert found["fsdp_config"] == "recipes/fsdp.json"
    assert found["resume_from_checkpoint"] == "runs/mine/checkpoint-2"


@pytest.mark.parametrize(
    ("key", "name"),
    [("student", "smollm2-135m"), ("teacher", "base"), ("eval_data", "gsm8k"), ("chat_template", "plain")],
)
def test_a_name_is_no_path_whatever_lies_beside_the_recipe(key: str, name: str) -> None:
    (Path("recipes") / name).mkdir()
    assert getattr(recipe(**{key: name}).run, key) in (name, [name])


def test_options_are_relative_to_the_current_directory() -> None:
    written("recipes/data.jsonl")
    assert recipe("--train-data", "data.jsonl").run.train_data == "data.jsonl"


def test_a_recipe_of_the_current_directory_stays_as_it_is_written() -> None:
    written("data.jsonl")
    values = {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "./data.jsonl"}
    path = Path(written("mine.yaml", yaml.safe_dump(values)))
    for spelling in (path, path.absolute()):
        assert load_recipe(spelling).run.train_data == "./data.jsonl"


def test_values_of_any_kind_are_left_to_the_checks_of_their_keys() -> None:
    for value in ([1, {"a": "b"}], {"data.jsonl": 1}, 3, True, None, "\0", ""):
        with pytest.raises(ValueError, match=r"train_data|mine\.yaml"):
            recipe(train_data=value, eval_data=value, eval_samples=value, teacher=value)


@pytest.mark.parametrize(
    ("command", "key", "name"),
    [
        ("train", "train_data", "data.jsonl"),
        ("train", "student", "./student"),
        ("train", "teacher", "models/teacher"),
        ("train", "chat_template", "template.jinja"),
        ("train", "eval_data", "gsm8k=test.jsonl"),
        ("probe", "teacher", "models/teacher"),
        ("doctor", "student", "./student"),
        ("doctor", "teacher", "models/teacher"),
    ],
)
def test_an_error_says_where_was_looked(
    command: str, key: str, name: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written("recipes/mine.yaml", yaml.safe_dump({**SMALL, key: name}))
    assert main([command, "--config", "recipes/mine.yaml"]) in (1, 2)
    shown = "".join(capsys.readouterr())
    assert f"(looked for beside the recipe, in {project / 'recipes'}, and in the current directory, {project})" in shown


def test_an_error_about_something_else_says_nothing_of_places(capsys: pytest.CaptureFixture[str]) -> None:
    written("recipes/mine.yaml", yaml.safe_dump({**SMALL, "student": "zoo:studnet"}))
    assert main(["train", "--config", "recipes/mine.yaml"]) == 2
    assert "looked for" not in capsys.readouterr().err


def test_studies_are_read_in_the_same_way_and_their_plans_as_they_were_found(project: Path) -> None:
    for name in ("train", "dev", "test"):
        written(f"recipes/{name}.jsonl")
        written(f"runs/study/recipes/{name}.jsonl")  # where nobody means it
    setting = {
        "recipe": {**STUDY["settings"]["chains"]["recipe"], "train_data": "train.jsonl"},
        "dev": {"data": "dev.jsonl"},
        "test": {"data": ["test.jsonl"], "samples": {"test.jsonl": 2}},
    }
    written("recipes/study.yaml", yaml.safe_dump({**STUDY, "settings": {"mine": setting}}))
    study = load_study("recipes/study.yaml")
    found = study.settings["mine"]
    assert found.recipe["train_data"] == "recipes/train.jsonl"
    assert (found.dev.data, found.test.data) == (["recipes/dev.jsonl"], ["recipes/test.jsonl"])
    assert found.test.samples == {"recipes/test.jsonl": 2}
    written("runs/study/study.yaml", study.to_yaml())
    assert _study_in("runs/study") == study


def test_a_sweep_says_where_was_looked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = {**STUDY["settings"]["chains"], "dev": {"data": "dev.jsonl"}}
    written("recipes/study.yaml", yaml.safe_dump({**STUDY, "settings": {"mine": setting}}))
    assert main(["sweep", "--config", "recipes/study.yaml", "--quiet"]) == 2
    assert f"(looked for beside the recipe, in {project / 'recipes'}, and" in capsys.readouterr().err
