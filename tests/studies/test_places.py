"""Paths in a recipe: beside its file, then in the current directory; and errors that say where was looked."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_recipes import SMALL, STUDY
from transformers import AutoModelForCausalLM

from trb import zoo
from trb.cli import main
from trb.models.loading import load_model, load_tokenizer
from trb.safety.files import remove
from trb.studies import sweep
from trb.studies.comparison import compare
from trb.studies.jobs import _study_in
from trb.studies.keys import parse_overrides
from trb.studies.material import RunDirectoryError, load_student
from trb.studies.recipe import Recipe, load_recipe
from trb.studies.run import train
from trb.studies.study import load_study
from trb.training import checkpoints

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


# ---- a project that is worked on from several folders, and moved ----

TINY = {
    **{key: value for key, value in SMALL.items() if not key.startswith("eval_")},
    **{"student": "models/student", "teacher": "models/teacher", "train_data": "data.jsonl", "train_limit": None},
    **{"max_steps": 2, "lora_rank": 2, "lora_target_modules": ["q_proj"], "learning_rate": 0.1},
}


def small_project(folder: str, **changes: Any) -> Path:
    """A folder with a pair, prompts, and a recipe that names them as they lie beside it."""
    for name in ("student", "teacher"):
        shutil.copytree(zoo.path(name), Path(folder, "models", name))
    rows = [{"prompt": f"{number} + 2 = ?", "answer": str(number + 2)} for number in range(8)]
    written(f"{folder}/data.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    written(f"{folder}/recipe.yaml", yaml.safe_dump({**TINY, **changes}))
    return Path(folder).resolve()


def spoil(model: Path) -> None:
    """Another model of the same shapes."""
    weights = load_file(model / "model.safetensors")
    save_file({name: 1.5 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})


def says(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5]])).logits


def with_peft(base: Path, adapter: Path) -> torch.Tensor:
    """What an adapter says on a base, by the libraries alone."""
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return says(PeftModel.from_pretrained(whole, adapter).eval())


@pytest.fixture
def project_trained(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a run `lora`, started in it, and a folder beside it with another model by the same name."""
    place = small_project("proj", save_strategy="steps", save_steps=1)
    spoil(small_project("other") / "models" / "student")
    monkeypatch.chdir(place)
    train(load_recipe("recipe.yaml"), "lora")
    return place


def test_an_adapter_of_a_run_is_read_on_its_own_base_from_every_folder(
    project_trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = project_trained / "lora"
    expected = with_peft(project_trained / "models" / "student", run / "model")
    assert not torch.equal(expected, with_peft(Path("../other/models/student"), run / "model"))
    for model in (run / "model", run / "checkpoint-2"):
        named = json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(project_trained / "models" / "student")
    for folder in (".", "..", "../other"):
        monkeypatch.chdir(project_trained / folder)
        for model in (run / "model", run / "checkpoint-2"):
            torch.testing.assert_close(says(load_model(str(model))), expected)
    monkeypatch.chdir("/")
    project_trained.rename(project_trained.parent / "moved")
    moved = project_trained.parent / "moved"
    torch.testing.assert_close(says(load_model(str(moved / "lora" / "model"))), expected)
    assert load_tokenizer(str(moved / "lora" / "checkpoint-1")).eos_token
    assert "trained on another model" not in caplog.text
    spoil(moved / "models" / "student")
    with pytest.raises(FileNotFoundError) as caught:
        load_model(str(moved / "lora" / "model"))
    assert f"the base of the adapter in {moved / 'lora' / 'model'}" in "".join(caught.value.__notes__)


def test_a_base_that_is_another_one_now_is_said(project_trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil(project_trained / "models" / "student")
    load_model("lora/model")
    base = project_trained / "models" / "student"
    assert f"lora/model was trained on another model than the one in {base}" in caplog.text


def test_an_adapter_trained_on_an_adapter_stands_on_it(project_trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, base = Path("lora/model"), project_trained / "models" / "student"
    train(load_recipe("recipe.yaml", {"student": str(first), "save_strategy": "no"}), "again")
    named = json.loads(Path("again/model/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(first.resolve())
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), first)
    expected = says(PeftModel.from_pretrained(whole.merge_and_unload(), "again/model").eval())
    torch.testing.assert_close(says(load_model("again/model")), expected)
    assert "trained on another model" not in caplog.text
    path = Path("again/model/adapter_config.json")  # as earlier versions wrote it
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "models/student"}))
    load_model("again/model")
    assert "again/model was trained on another model" in caplog.text


def test_a_run_whose_checkpoint_names_a_relative_base_goes_on(project_trained: Path) -> None:
    shutil.copytree("lora", "killed")
    for name in ("model", "checkpoint-2", "results.json", "checksums.json"):
        remove(Path("killed", name))
    path = Path("killed/checkpoint-1/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "models/student"}))
    checkpoints.seal(path.parent, checksums=True)
    train(load_recipe("recipe.yaml"), "killed")
    one, other = (Path(run, "model", "adapter_model.safetensors").read_bytes() for run in ("lora", "killed"))
    assert one == other


def test_a_recipe_is_the_same_one_wherever_it_is_started(
    project_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished, and half done: from the folder above nothing is refused and nothing is trained twice."""
    found = train(load_recipe("recipe.yaml"), "lora")
    monkeypatch.chdir(project_trained.parent)
    assert train(load_recipe("proj/recipe.yaml"), "proj/lora") == found
    for name in ("model", "checkpoint-2", "results.json", "checksums.json"):
        remove(Path("proj/lora", name))
    again = train(load_recipe("proj/recipe.yaml"), "proj/lora")
    assert again["trb"]["training"] == found["trb"]["training"]
    monkeypatch.chdir(project_trained)  # and back
    assert train(load_recipe("recipe.yaml"), "lora") == again


def test_the_same_words_in_another_folder_are_another_recipe(
    project_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("../other")
    with pytest.raises(RunDirectoryError) as caught:
        train(load_recipe("recipe.yaml"), "../proj/lora")
    here, text = Path.cwd(), str(caught.value)
    for name in ("models/student", "data.jsonl"):
        assert f"is '{project_trained / name}' there and '{here / name}' here" in text
    assert f"Start it in {project_trained} as before, use another output directory, or --overwrite" in text


def test_a_copy_of_a_run_goes_on_where_its_paths_lead_nowhere(project_trained: Path) -> None:
    found = train(load_recipe("recipe.yaml"), "lora")
    copy = project_trained.parent / "far" / "away" / "lora"
    shutil.copytree("lora", copy)
    assert train(load_recipe("recipe.yaml"), copy) == found


def test_a_comparison_and_a_study_are_the_same_wherever_they_are_started(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = small_project(
        "proj", eval_data="zoo:chains", eval_limit=2, eval_every=0, methods={"opd": None, "trb": None}
    )
    monkeypatch.chdir(place)
    found = compare(load_recipe("recipe.yaml", {"lora_rank": 0}), "both")
    monkeypatch.chdir("..")
    again = compare(load_recipe("proj/recipe.yaml", {"lora_rank": 0}), "proj/both")
    assert {**again, "provenance": None} == {**found, "provenance": None}
    monkeypatch.chdir(place)
    assert compare(load_recipe("recipe.yaml", {"lora_rank": 0}), "both")["trb"] == found["trb"]

    plan = copy.deepcopy(STUDY)
    plan["settings"]["chains"]["recipe"] |= {"student": "models/student", "train_data": "data.jsonl"}
    written("study.yaml", yaml.safe_dump(plan))
    path = place / "sweep" / "study.yaml"
    sweep._begin(path.parent, load_study("study.yaml"), False)
    monkeypatch.chdir("..")
    sweep._check_same(path, load_study("proj/study.yaml"))
    shutil.copytree("proj/models", "models")
    shutil.copy("proj/study.yaml", "study.yaml")
    with pytest.raises(RunDirectoryError, match="student is"):
        sweep._check_same(path, load_study("study.yaml"))


def test_a_base_of_another_depth_is_refused_with_what_is_an_option_there(
    project_trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project_trained / "lora" / "model" / "adapter_config.json"
    teacher = str(project_trained / "models" / "teacher")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": teacher}))
    depth, other = (zoo.load(name)[0].config.num_hidden_layers for name in ("student", "teacher"))
    assert depth < other
    recipe = load_recipe("recipe.yaml", {"student": "lora/model"})
    for name, load in {
        "keep_layers": lambda: load_model("lora/model"),
        "student_keep_layers": lambda: load_student(recipe.run),
    }.items():
        with pytest.raises(ValueError, match=f"its base, .*teacher, has {other}: .* pass {name}={depth}"):
            load()
    monkeypatch.setattr("trb.studies.material.check_seal", lambda spec: None)  # the file was edited
    assert main(["eval", "--model", "lora/model", "--data", "zoo:chains", "--limit", "2"]) == 2
    assert f"pass --keep-layers={depth} (or drop --keep-layers)" in " ".join(capsys.readouterr().err.split())
    assert main(["eval", "--model", "zoo:student", "--data", "zoo:chains", "--limit", "2", "--keep-layers", "99"]) == 2
    assert "--keep-layers=99 is out of range" in capsys.readouterr().err
