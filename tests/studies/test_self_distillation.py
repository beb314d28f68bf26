"""The recipe in which a model teaches itself: it runs, its teacher is told, and the teacher's prompts are counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trb import zoo
from trb.cli import main
from trb.cli.plan import work_of
from trb.records import EVALUATIONS
from trb.studies.comparison import compare
from trb.studies.material import as_teacher_reads, longest_teacher_prompt, problem_sets
from trb.studies.recipe import Recipe, load_recipe, make_recipe
from trb.tasks.prompts import load_prompts, render
from trb.zoo import TASKS

SHORT: dict[str, Any] = {
    "max_steps": 3,
    "prompts_per_step": 4,
    "per_device_train_batch_size": 16,
    "train_limit": 40,
    "eval_limit": 16,
    "eval_every": 0,
    "recorded_scores_every": 1,
}


def test_a_model_that_teaches_itself_is_no_mistake_where_the_teacher_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one where it is not."""
    for options, said in (([], False), (["--train-privileged-column", "null"], True)):
        assert main(["doctor", "--config", "self-distillation", *options]) == 0
        assert ("student and teacher are the same model" in capsys.readouterr().out) is said


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("self") / "run"
    return directory, compare(load_recipe("self-distillation", SHORT), directory)


def test_the_teacher_is_scored_as_it_teaches_and_the_student_as_it_learns(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    """The same weights: told they are right, and alone they are not."""
    directory, results = compared
    assert results["teacher"]["pass_at_1"] > 0.8 > 0.4 > results["student"]["pass_at_1"]
    student, teacher = (
        {json.loads(line)["prompt_hash"] for line in file.read_text().splitlines()[1:]}
        for file in sorted((directory / EVALUATIONS).glob("*/*.jsonl"))
    )
    assert len(student) == len(teacher) == 16 and not student & teacher


def test_the_rollouts_say_what_the_teacher_read(compared: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = compared
    lines = (directory / "trb" / "rollouts.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        problem = row["prompt"].partition("user\n")[2].partition("<|im_end|>")[0]
        told = f"{problem}\n\n{TASKS['chains'].solution(problem)}"
        assert row["teacher_prompt"] == row["prompt"].replace(problem, told)
    told_by = [value for row in map(json.loads, lines) for value in row["kl_teacher"]]
    assert max(told_by) > 0.05  # the same weights after the same prompt would agree everywhere


def test_problem_sets_without_a_prompt_for_the_teacher_stay_as_they_are() -> None:
    recipe = load_recipe("self-distillation", {**SHORT, "eval_privileged_column": None})
    sets = problem_sets(recipe.run)
    args = recipe.training_config("unused")
    assert all(as_teacher_reads(sets, args)[name] is rows for name, rows in sets.items())
    args.teacher_system_prompt = "add"
    (rows,) = as_teacher_reads(sets, args).values()
    assert [row["prompt"][0] for row in rows] == [{"role": "system", "content": "add"}] * len(rows)
    assert [row["prompt"][1:] for row in rows] == [row["prompt"] for row in sets["zoo:chains"]]


def test_the_plan_counts_the_teachers_longer_prompt(tmp_path: Path) -> None:
    recipe = load_recipe("self-distillation", SHORT)
    args, (_, tokenizer) = recipe.training_config("unused"), zoo.load("told")
    rows = load_prompts("zoo:chains", limit=40)
    told = [f"{row['prompt'][0]['content']}\n\n{TASKS['chains'].solution(row['prompt'][0]['content'])}" for row in rows]
    longest = max(map(len, render(tokenizer, [{"prompt": [{"role": "user", "content": text}]} for text in told])))
    assert longest_teacher_prompt(recipe.run, args) == longest == work_of(recipe.run, args, 1).teacher_prompt
    plain = make_recipe({**recipe.resolved(), "train_privileged_column": None})
    assert longest_teacher_prompt(plain.run, args) is None
    written = tmp_path / "rows.jsonl"
    written.write_text("".join(json.dumps({"prompt": "1+2", "teacher_prompt": text}) + "\n" for text in told))
    of_file = replace(plain.run, train_data=str(written), train_limit=None)
    assert longest_teacher_prompt(of_file, args) == longest
    assert longest_teacher_prompt(replace(of_file, train_data="nobody/nothing"), args) is None


def test_the_recipe_for_qwen3_reads_worked_solutions(tmp_path: Path) -> None:
    """Its data are on the hub; a file with their columns stands in for them here."""
    recipe: Recipe = load_recipe("qwen3-1.7b-self")
    assert recipe.run.student == recipe.run.teacher == "Qwen/Qwen3-1.7B"
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "How much is 1+2?", "answer": "1 and 2 are 3.\n#### 3"}) + "\n")
    run = recipe.run
    rows = load_prompts(
        path,
        system_prompt=run.system_message,
        prompt_column=run.train_prompt_column,
        answer_column=run.train_answer_column,
        privileged_column=run.train_privileged_column,
    )
    ((row,),) = as_teacher_reads({"gsm8k": rows}, recipe.training_config("unused")).values()
    assert rows[0]["answer"] == "3"
    assert row["prompt"][0]["role"] == "system"
    asked = row["prompt"][1]["content"]
    assert asked.startswith("How much is 1+2?\n\n") and "1 and 2 are 3.\n#### 3" in asked and "{" not in asked
