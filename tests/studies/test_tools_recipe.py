"""The recipe with tools: it runs, in training and in evaluations, and what cannot take turns is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from trb.cli import main
from trb.records import EVALUATIONS
from trb.studies.comparison import compare
from trb.studies.material import template_options
from trb.studies.recipe import load_recipe
from trb.studies.yaml_files import ConfigError
from trb.tools import TOOLS

SHORT: dict[str, Any] = {
    "max_steps": 2,
    "prompts_per_step": 4,
    "per_device_train_batch_size": 16,
    "train_limit": 40,
    "eval_limit": 32,
    "recorded_scores_every": 1,
}


def test_the_recipe_trains_and_evaluates_with_its_tool(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    results = compare(load_recipe("tools", SHORT), directory)
    assert results["teacher"]["pass_at_1"] > 0.9 > 0.7 > results["student"]["pass_at_1"] > 0.1
    rows = [json.loads(line) for line in (directory / "trb" / "rollouts.jsonl").read_text().splitlines()]
    assert any("tool\n" in "".join(row["tokens"]) for row in rows)
    (file,) = (directory / EVALUATIONS).glob("student/*.jsonl")
    texts = [text for line in file.read_text().splitlines()[1:] for text in json.loads(line)["completions"]]
    assert any(text.count("<tool_call>") == 2 and "\\boxed{" in text for text in texts)
    assert not any("assistant" in text for text in texts)  # the model's own words alone
    assert main(["report", str(directory)]) == 0
    # An evaluation of its model has the recipe's tools, and says so in its files.
    scores = tmp_path / "scores"
    model = str(directory / "trb")
    assert main(["eval", "--model", model, "--data", "zoo:sums", "--limit", "32", "--output-dir", str(scores)]) == 0
    (again,) = scores.glob("evaluations/*.jsonl")
    lines = [json.loads(line) for line in again.read_text().splitlines()]
    assert lines[0]["settings"]["tools"] == ["calculator"]
    (last,) = (directory / "trb" / EVALUATIONS).glob("step-*2/*.jsonl")
    assert [line["correct"] for line in lines[1:]] == [
        json.loads(line)["correct"] for line in last.read_text().splitlines()[1:]
    ]


def test_prompts_are_measured_with_the_tools_that_they_describe() -> None:
    recipe = load_recipe("tools", SHORT)
    assert template_options(recipe.training_config("unused")) == {"tools": [TOOLS["calculator"]]}
    plain = load_recipe("tools", {**SHORT, "tools": None})
    assert template_options(plain.training_config("unused")) == {}


def test_recipes_name_tools_of_the_package_and_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("os:system", "mytools:search", "calculater"):
        with pytest.raises(ConfigError, match=rf"tools has '{name}', which is none of calculator"):
            load_recipe("tools", {**SHORT, "tools": name})
    assert main(["probe", "--config", "tools", "--output-dir", str(tmp_path / "probe")]) == 2
    assert "a probe looks at completions of one turn" in capsys.readouterr().err


def test_models_that_call_no_tools_are_refused_before_they_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--student", "zoo:student", "--teacher", "zoo:teacher"]
    assert main(["compare", "--config", "tools", *models, "--output-dir", str(tmp_path / "run")]) == 2
    assert "error: tools: the chat template of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
