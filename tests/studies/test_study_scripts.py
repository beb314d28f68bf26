"""The scripts that prepare a study: making its pair, and choosing its learning rate with plain distillation only."""

import importlib.util
import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from trb.models.loading import load_model, load_tokenizer
from trb.studies.shipped import RECIPES
from trb.zoo import TASKS

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study_pair(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on the embedded teacher (three layers) and its task, for two steps of four problems."""
    module = script("study_pair")
    for name, value in {
        "BASE": "zoo:teacher",
        "TASK": TASKS["chains"],
        "SIZES": (2, 4),
        "MEASURED": {"data": "zoo:chains", "split": "test", "seed": 1},
        "TEACHER": replace(module.TEACHER, layers=3, steps=2, batch_size=4),
        "STUDENT": replace(module.STUDENT, layers=2, steps=2, batch_size=4),
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def make(module: ModuleType, out: Path, *options: str) -> dict:
    module.main(["--out", str(out), "--device", "cpu", "--problems", "4", *options])
    return json.loads((out / "training.json").read_text())


def test_a_pair_is_two_models_that_a_recipe_can_name(study_pair, tmp_path):
    record = make(study_pair, tmp_path)
    base = load_model("zoo:teacher").state_dict()
    for role, layers in (("teacher", 3), ("student", 2)):
        model = load_model(str(tmp_path / role), dtype="auto")
        assert model.config.num_hidden_layers == layers == record[role]["course"]["layers"]
        assert model.dtype == torch.bfloat16
        trained = model.state_dict()["model.embed_tokens.weight"].float()
        assert not torch.equal(trained, base["model.embed_tokens.weight"].bfloat16().float()), "nothing was learned"
        assert load_tokenizer(str(tmp_path / role)).chat_template
        assert record[role]["measured"]["n_problems"] == 4
        assert record[role]["provenance"]["versions"]["torch"] == metadata.version("torch")


def test_a_model_is_kept_only_if_it_was_taught_in_this_very_way(study_pair, tmp_path):
    make(study_pair, tmp_path)
    times = {role: (tmp_path / role / "model.safetensors").stat().st_mtime_ns for role in ("teacher", "student")}
    again = study_pair.STUDENT
    study_pair.STUDENT = replace(again, wrong_step=0.5)
    record = make(study_pair, tmp_path, "--keep")
    assert record["student"]["course"]["wrong_step"] == 0.5
    kept = {role: (tmp_path / role / "model.safetensors").stat().st_mtime_ns == times[role] for role in times}
    assert kept == {"teacher": True, "student": False}
    make(study_pair, tmp_path, "--keep", "--only", "student", "--seed", "1")
    assert json.loads((tmp_path / "training.json").read_text())["student"]["seed"] == 1
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == times["teacher"]


def test_a_tokenizer_without_padding_gets_one(study_pair, tmp_path, monkeypatch):
    def without_padding(spec: str):
        tokenizer = load_tokenizer(spec)
        tokenizer.pad_token = None
        return tokenizer

    monkeypatch.setattr(study_pair, "load_tokenizer", without_padding)
    make(study_pair, tmp_path, "--only", "student")
    assert load_tokenizer(str(tmp_path / "student")).pad_token == "<|im_end|>"


# ---- the learning rate ----


def runs(finals: dict[float, list[float]]) -> list[dict]:
    return [
        {"learning_rate": rate, "curve": [{"step": 0, "pass_at_1": 0.9}, {"step": 4, "pass_at_1": score}]}
        for rate, scores in finals.items()
        for score in scores
    ]


@pytest.mark.parametrize(
    ("finals", "chosen"),
    [
        ({1e-5: [0.3, 0.3], 1e-4: [0.5, 0.3]}, 1e-4),
        ({1e-5: [0.3, 0.3], 1e-4: [0.9, 0.99]}, 1e-5),  # solved: no room for a difference
        ({1e-5: [0.95], 1e-4: [0.99]}, None),
        ({1e-5: [0.4], 1e-4: [0.6, 0.0]}, 1e-5),  # one collapse counts
    ],
)
def test_the_best_rate_with_room_is_chosen(finals, chosen):
    assert script("study_pilot").choose(runs(finals), teacher=1.0) == chosen


def test_a_pilot_runs_plain_distillation_at_the_rate_and_seed_it_was_given(tmp_path):
    study = yaml.safe_load((RECIPES / "studies" / "zoo.yaml").read_text())
    study["recipe"] |= {
        "save_strategy": "no",  # YAML 1.1 reads the word as false
        "max_steps": 1,
        "prompts_per_step": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "train_limit": 4,
    }
    setting = study["settings"]["long-chains"]
    setting["recipe"] |= {"student": "zoo:student", "teacher": "zoo:teacher", "max_completion_length": 8}
    setting["dev"]["limit"] = 4
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    result = script("study_pilot").run(str(path), "long-chains", 0.25, 900, str(tmp_path / "out"))
    assert [point["step"] for point in result["curve"]] == [0, 1]
    config = yaml.safe_load((tmp_path / "out/long-chains/rate-0.25/seed-900/config.yaml").read_text())
    assert (config["method"], config["learning_rate"], config["seed"], config["train_seed"]) == ("opd", 0.25, 900, 900)


def test_a_pilot_leaves_the_seeds_of_its_study_alone(monkeypatch, capsys):
    options = ["--rates", "1e-4", "--seeds", "1", "900", "--out", "unused", "--record", "unused.json"]
    monkeypatch.setattr("sys.argv", ["study_pilot.py", "studies/zoo", *options])
    with pytest.raises(SystemExit):
        script("study_pilot").main()
    assert "seed 1 belongs to the study" in capsys.readouterr().err
