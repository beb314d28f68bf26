"""A comparison and a study where nothing checks answers: less is better, in nats per token, wherever that is shown."""

import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_recipes import SMALL, STUDY

from trb.cli import main
from trb.cli.display import result_table, study_table
from trb.report import write_report
from trb.report.reading import read
from trb.report.tables import tables_of, to_markdown
from trb.studies import sweep
from trb.studies.comparison import compare
from trb.studies.jobs import Job, do_job
from trb.studies.recipe import make_recipe
from trb.studies.run import train
from trb.studies.study import Study
from trb.studies.sweep import run_study
from trb.studies.yaml_files import ConfigError

DATA = {"train_data": "zoo:dialogue", "train_assistant_turns": "all", "eval_assistant_turns": "all"}
RECIPE = {
    **{key: value for key, value in SMALL.items() if key not in ("initial_kl_budget", "blend_warmup_steps")},
    **DATA,
    "eval_data": "zoo:dialogue",
    "max_prompt_length": 160,
    "learning_rate": 2e-3,
}


def text_of(table: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def text_of_page(directory: Path) -> str:
    """What a page says before its data and its script, which know all measures."""
    page = write_report(directory).read_text().partition("<body")[2].partition("<script")[0]
    assert len(page) > 5_000
    return page


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("dialogue")
    methods = {"opd": {}, "trb": {"initial_kl_budget": 0.3, "blend_warmup_steps": 2}}
    changes = {"max_steps": 2, "eval_every": 1, "methods": methods}
    return directory, compare(make_recipe({**RECIPE, **changes}), directory)


def test_a_comparison_says_how_far_every_model_is_from_the_teacher(compared: tuple[Path, dict[str, Any]]) -> None:
    directory, results = compared
    for name in ("student", "opd", "trb"):
        score = results[name]
        assert "pass_at_1" not in score and score["reverse_kl"] > 0
        assert score["interval"][0] <= score["reverse_kl"] <= score["interval"][1]
        assert score["student_entropy"] > 0 > score["teacher_log_prob"] and 0 <= score["stop_rate"] <= 1
    assert results["teacher"]["reverse_kl"] == 0
    table = text_of(result_table(results))
    assert "reverse KL" in table and "log-prob" in table and "pass@1" not in table and "gain" not in table
    change = results["opd"]["reverse_kl"] - results["student"]["reverse_kl"]
    assert f"{change:+.3f}" in table and f"{results['opd']['reverse_kl']:.3f}" in table
    lines = [json.loads(line) for line in (directory / "opd" / "evals.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and all("reverse_kl" in line for line in lines)


def test_the_page_of_a_comparison_knows_which_way_is_better(compared: tuple[Path, dict[str, Any]]) -> None:
    directory, results = compared
    page = text_of_page(directory)
    best = min(("opd", "trb"), key=lambda name: results[name]["reverse_kl"])
    assert "pass@1" not in page and "points" not in page and "highest" not in page
    assert "nats of held-out reverse KL per token" in page and "less is closer to the teacher" in page
    assert "Closer" in page and "Farther" in page and "Teacher log-probability" in page
    assert "Wrong before" not in page
    (table,) = tables_of(directory)
    marked = next(line for line in to_markdown(table).splitlines() if "**" in line)
    assert {"opd": "OPD", "trb": "TRB"}[best] in marked
    assert [score.measure.key for score in read(directory).scores.values()] == ["reverse_kl"] * 4


def test_a_model_is_evaluated_with_a_teacher_and_not_without(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["eval", "--model", "zoo:student", "--data", "zoo:dialogue", "--assistant-turns", "all", "--limit", "3"]
    command += ["--max-new-tokens", "8", "--quiet"]
    assert main([*command, "--teacher", "zoo:teacher", "--output-dir", str(tmp_path / "out")]) == 0
    assert "reverse KL to the teacher" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["zoo:dialogue"]["reverse_kl"] > 0
    assert main(command) == 2
    assert "no answer to score against; give answers, or a --teacher to read completions" in capsys.readouterr().err


def test_what_is_measured_differently_has_no_mean(tmp_path: Path) -> None:
    values = {**RECIPE, "eval_data": ["zoo:dialogue", "talk.jsonl"], "method": "opd"}
    talk = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "\\boxed{2}"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    values["eval_data"][1] = str(tmp_path / "talk.jsonl")
    with pytest.raises(ConfigError, match=r"no completion of zoo:dialogue can be scored and those of .*talk.jsonl can"):
        train(make_recipe(values), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


class Here:
    """A pool that is this process: another one would have to import everything again."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, float]]:
        for job in jobs:
            yield job, do_job(self.directory, False, job)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two configurations of TRB, far apart."""
    directory = tmp_path_factory.mktemp("study")
    own = ("train_data", "eval_data", "eval_limit", "student", "teacher")
    study = Study.model_validate(
        {
            **STUDY,
            "recipe": {key: value for key, value in RECIPE.items() if key not in own} | {"max_steps": 2},
            "settings": {
                "talk": {
                    "title": "Talk",
                    "recipe": {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:dialogue"},
                    "dev": {"data": "zoo:dialogue", "limit": 2, "seed": 5, "split": "train"},
                    "test": {"data": ["zoo:dialogue", "zoo:dialogue?turns=5"], "limit": 3},
                }
            },
            "methods": {"opd": [{}], "trb": {"blend_warmup_steps": 1, "learning_rate": [1e-6, 0.1]}},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "open_pool", lambda directory, *_: nullcontext(Here(directory)))
        return directory, run_study(study, directory)


def test_a_study_chooses_and_ranks_what_is_lowest(studied: tuple[Path, dict[str, Any]]) -> None:
    directory, results = studied
    setting = results["settings"]["talk"]
    assert setting["measure"] == "reverse_kl" and "lowest mean held-out reverse KL" in results["rule"]
    lowest, highest = sorted(setting["sweep"]["trb"], key=lambda one: one["reverse_kl"])
    assert lowest["selected"] and not highest["selected"] and lowest["reverse_kl"] < 0.99 * highest["reverse_kl"]
    methods = setting["methods"]
    opd, trb = methods["opd"], methods["trb"]
    assert setting["teacher"]["reverse_kl"] == 0 < min(opd["reverse_kl"], setting["student"]["reverse_kl"])
    difference = trb["difference_to_opd"]
    assert math.isclose(difference["estimate"], trb["reverse_kl"] - opd["reverse_kl"], abs_tol=2e-6)
    assert opd["per_seed"] == [opd["reverse_kl"]]
    assert opd["problems"] == 6, "conversations, not turns"
    target = opd["steps_to_target"]
    assert target["target"] > opd["curve"]["mean"][-1] and target["reached"] >= 1, "a target is above the end"
    assert results["average"]["methods"]["opd"]["reverse_kl"] == pytest.approx(opd["reverse_kl"], abs=2e-6)
    best = min(methods, key=lambda name: methods[name]["reverse_kl"])
    assert [name for name, one in results["average"]["methods"].items() if one["best"]] == [best]
    stored = json.loads((directory / "talk/test/opd/seed-0/test.json").read_text())["suites"]
    assert all("correct" not in suite and len(suite["values"]) == 3 for suite in stored.values())
    assert all(math.isclose(sum(s["values"]) / 3, s["reverse_kl"], rel_tol=1e-9) for s in stored.values())


def test_the_pages_of_a_study_say_nats_and_lowest(studied: tuple[Path, dict[str, Any]]) -> None:
    directory, results = studied
    page = text_of_page(directory)
    assert "pass@1" not in page and "points" not in page and "highest" not in page and "lowest" in page
    assert "nats of held-out reverse KL per token, where less is better" in page
    assert "Teacher log-probability" in page and "Cut" in page
    for table in tables_of(directory):
        text = to_markdown(table)
        assert "pass@1" not in text and "points" not in text
        if table.name == "results":
            methods = results["settings"]["talk"]["methods"]
            best = min(methods, key=lambda name: methods[name]["reverse_kl"])
            (marked,) = [line for line in text.splitlines() if "**" in line]
            assert {"opd": "OPD", "trb": "TRB"}[best] in marked
    shown = text_of(study_table(results["settings"]["talk"]))
    assert "reverse KL" in shown and f"{results['settings']['talk']['methods']['opd']['reverse_kl']:.3f}" in shown
