"""Recipes whose teacher stands on the student's weights: run, compared, probed, checked and planned like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_recipes import SMALL

from trb import zoo
from trb.cli import main
from trb.models.loading import load_model
from trb.studies import material, shared
from trb.studies.comparison import compare
from trb.studies.probe import probe
from trb.studies.recipe import Recipe, load_recipe, make_recipe
from trb.studies.run import train
from trb.studies.yaml_files import ConfigError

LORA: dict[str, Any] = {"lora_rank": 2, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]}


def small(**changes: Any) -> Recipe:
    return make_recipe({**SMALL, "eval_every": 0, **LORA, **changes})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter on the embedded student that a run has left, far enough from its base to be learnt from."""
    directory = tmp_path_factory.mktemp("adapter")
    train(small(max_steps=2, learning_rate=3e-2, eval_data=[], lora_rank=8), directory)
    return str(directory / "model")


def numbers(value: Any) -> Any:
    """What was found, without times, places and versions."""
    unequal = ("provenance", "teacher_name", "seconds", "train_seconds", "tokens_per_second")
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items() if key not in unequal and "seconds" not in key}
    return [numbers(item) for item in value] if isinstance(value, list) else value


def test_a_comparison_finds_what_it_finds_with_a_teacher_in_memory_of_its_own(adapter: str, tmp_path: Path) -> None:
    """The teacher's score is the adapter's, and the methods learn as much from it, to the last digit."""
    found = [
        compare(small(teacher=teacher, methods={"trb": None}, max_steps=2), tmp_path / name)
        for name, teacher in (("one", f"adapter:{adapter}"), ("two", adapter))
    ]
    assert numbers(found[0]) == numbers(found[1])
    assert set(found[0]) == {"student", "trb", "teacher", "provenance"}
    card = (tmp_path / "one" / "trb" / "model" / "README.md").read_text()
    assert "with an adapter), on the student's own weights |" in card
    assert f"teacher: adapter:{adapter}\n" in (tmp_path / "one" / "trb" / "config.yaml").read_text()


def test_an_adapter_learns_on_from_its_own_base(adapter: str, tmp_path: Path) -> None:
    """It is trained as it is, and its base, which teaches, stays what it was."""
    recipe = small(student=adapter, teacher="base", lora_rank=0, max_steps=2, learning_rate=1e-3)
    results = train(recipe, tmp_path / "run")
    assert results["trb"]["steps"] == 2
    before, after = (load_file(Path(path) / "adapter_model.safetensors") for path in (adapter, tmp_path / "run/model"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "run/model/adapter_config.json").read_text())["r"] == 8
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] > 1e-3 for row in metrics if "loss" in row)
    student, teacher = material.load_pair(recipe.run, for_training=True)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(teacher(input_ids=ids).logits, zoo.load("student")[0](input_ids=ids).logits)
        assert torch.equal(student(input_ids=ids).logits, load_model(adapter)(input_ids=ids).logits)


def test_a_probe_of_a_run_reads_its_adapter_and_its_base(adapter: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"problems": 2, "samples": 2, "budgets": [0.1], "truncations": [2], "excerpts": 0}
    recipe = small(teacher="base")
    ours = probe(recipe, tmp_path / "one", model=adapter, **options, advice=False)
    theirs = probe(small(teacher="zoo:student"), tmp_path / "two", model=adapter, **options, advice=False)
    assert {**numbers(ours), "teacher": ""} == {**numbers(theirs), "teacher": ""}
    with pytest.raises(ConfigError, match=r"zoo:teacher is a whole model, and the teacher \(base\) is what is under"):
        probe(recipe, tmp_path / "three", model="zoo:teacher", **options)


def test_the_recipe_of_the_package_runs(adapter: str, tmp_path: Path) -> None:
    cut = {"max_steps": 1, "train_limit": 32, "eval_limit": 4, "teacher": f"adapter:{adapter}"}
    recipe = load_recipe("one-base", cut)
    assert load_recipe("one-base").run.teacher == "adapter:runs/lora/model"
    assert train(recipe, tmp_path)["trb"]["steps"] == 1


# ---- doctor and plan ----


def test_the_doctor_counts_one_set_of_weights(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--student", "zoo:student", "--lora-rank", "2", "--teacher"]
    assert main(["doctor", *pair, f"adapter:{adapter}"]) == 0
    assert f"one set of weights: adapter:{adapter} has the student's, and 0.01 million of its own" in said(capsys)
    assert main(["doctor", *pair, "base"]) == 0
    text = said(capsys)
    assert "one set of weights: base has the student's, and none of its own" in text
    assert "student and teacher are the same model, so the loss is 0" in text
    assert main(["doctor", *pair, "base", "--launch", "accelerate/fsdp2"]) == 1
    assert "fail one set of weights: FSDP and ZeRO-3 divide what the teacher stands on. Name the base" in said(capsys)
    assert main(["doctor", *pair[:2], "--teacher", "base"]) == 1
    assert "teacher is base, on the student's own weights, and lora_rank is 0, which trains these" in said(capsys)


def test_the_plan_counts_the_memory_of_one(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*options: str) -> dict[str, Any]:
        main(["doctor", "--plan", "--json", "--config", "baselines/trb", "--machine", "cpu", *options])
        return json.loads(capsys.readouterr().out)

    def weights(plan: dict[str, Any]) -> float:
        return plan["memory"]["update"]["teacher's weights"]

    lora = ("--lora-rank", "2")
    one, other, two = (
        planned(*lora, "--teacher", teacher) for teacher in ("base", f"adapter:{adapter}", "zoo:student")
    )
    whole = 4 * sum(weight.numel() for weight in zoo.load("student")[0].parameters())
    own = 4 * sum(value.numel() for value in load_file(Path(adapter) / "adapter_model.safetensors").values())
    assert (weights(one), weights(other), weights(two)) == (0, own, whole)
    assert not one["problems"] and one["peak"] < two["peak"]
    sharded = planned(*lora, "--teacher", "base", "--strategy", "fsdp", "--gpus", "2")
    assert "which sharding divides in a way of its own: leave them where they are (--strategy ddp" in str(sharded)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


# ---- refused ----


@pytest.mark.parametrize(("changes", "message"), [
    ({"teacher": "base", "teacher_revision": "main"}, "teacher_revision is 'main', and the teacher .base. stands on"),
    ({"teacher": "base", "teacher_dtype": "bfloat16"}, "leave teacher_dtype out; what is said of the student holds"),
    ({"teacher": "base", "teacher_quantization": "bnb-4bit"}, "teacher_quantization is 'bnb-4bit'"),
    ({"teacher": "adapter:x", "teacher_trust_remote_code": True}, "teacher_trust_remote_code is True"),
])  # fmt: skip
def test_what_the_teacher_has_from_the_student_is_not_said_twice(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)
    assert small(teacher="base", student_dtype="bfloat16").run.teacher_dtype == "bfloat16"


def test_a_student_that_would_move_its_teacher_is_refused_before_anything_is_loaded(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "load_model", None)
    for changes, message in (
        ({"lora_rank": 0}, "teacher is base, on the student's own weights, and lora_rank is 0, which trains these"),
        ({"student": adapter}, "lora_rank is 2, and the student is an adapter already, which teacher: base has"),
        ({"teacher": "adapter:nowhere"}, "no adapter at 'nowhere'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            train(small(**{"teacher": "base", **changes}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_doubted(adapter: str, tmp_path: Path) -> None:
    run = small(teacher=f"adapter:{adapter}").run
    assert not list(shared.doubts_of_base(run))
    path = Path(adapter) / "adapter_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"base_model_name_or_path": "zoo:teacher"}))
        (doubt,) = shared.doubts_of_base(run)
    finally:
        path.write_text(before)
    assert doubt.text.endswith("was made for zoo:teacher, and the student is zoo:student")


# ---- on file ----


def test_the_page_says_what_was_measured() -> None:
    """Peak memory with one set of weights and with two copies, of one model and the same adapters."""
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "results" / "one_base.json").read_text())
    ratio = found["one set of weights"]["peak"] / found["two copies"]["peak"]
    assert found["ratio of peaks"] == pytest.approx(ratio, abs=1e-3) and ratio <= 0.6
    assert (found["model"], found["lora_rank"]) == ("smollm2-135m", 16)
    said = f"is saved, {found['saved']:.0f} MB: the peak of a small step is {ratio:.2f} of that with two copies"
    assert said in " ".join((root / "docs" / "lora.md").read_text().split())
