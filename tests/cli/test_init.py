"""`trb init`: the recipe it writes runs as it is, and nothing is ever overwritten."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trb import zoo
from trb.cli import doctor, draft, main
from trb.studies.recipe import Recipe, load_recipe
from trb.studies.shared import check_shared
from trb.studies.yaml_files import ConfigError
from trb.tasks import prompts
from trb.tasks.prompts import load_prompts, render
from trb.training.doubts import safe_rate

PAIR = ("--student", "zoo:student", "--teacher", "zoo:teacher")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def questions(path: str, count: int = 40, text: str = "{}+2+3=") -> str:
    rows = [{"question": text.format(number % 10), "answer": str(number % 10 + 5)} for number in range(count)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def initial(*arguments: str) -> Recipe:
    assert main(["init", *arguments]) == 0
    return load_recipe(next((name for name in arguments if name.endswith(".yaml")), "distil.yaml"))


def runs_a_step(config: str) -> dict[str, Any]:
    """The doctor finds nothing wrong, and a step is trained and scored; returns the results."""
    assert main(["doctor", "--config", config]) == 0
    options = ["--max-steps", "1", "--quiet", "--output-dir", "runs/step"]
    options += ["--eval-limit", "4"] if load_recipe(config).run.eval_data else []
    assert main(["train", "--config", config, *options]) == 0
    return json.loads(Path("runs/step/results.json").read_text())


def test_without_arguments_it_is_the_embedded_pair(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = initial()
    assert "trb train --config distil.yaml" in capsys.readouterr().out
    run, training = recipe.run, recipe.training
    assert (run.student, run.teacher, run.train_data) == ("zoo:student", "zoo:teacher", "zoo:chains")
    lengths = [len(ids) for ids in render(zoo.load("student")[1], load_prompts("zoo:chains"))]
    assert max(lengths) <= run.max_prompt_length < max(lengths) + 16
    assert "initial_kl_budget" not in training
    assert training["per_device_train_batch_size"] == 64  # a whole step: the pair is tiny
    assert "0.2 M parameters" in Path("distil.yaml").read_text()
    assert runs_a_step("distil.yaml")["trb"]["pass_at_1"] is not None


@pytest.mark.parametrize("name", ["my recipes/a first.yaml", "it's.yaml", "plain.yaml", "$HOME;x.yaml"])
def test_what_it_says_to_type_is_read_by_a_shell_as_the_file(
    project: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """In the terminal, and in the head of the file."""
    initial(name)
    for text in (capsys.readouterr().out, Path(name).read_text().partition("# Every other key")[0]):
        commands = re.findall(r"^#? *(trb (?:doctor|train) --config .*?)(?: {2,}.*)?$", text, re.MULTILINE)
        assert len(commands) == 2
        for command in commands:
            typed = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True)
            assert typed.stdout.splitlines()[-1] == name, command


def test_the_command_for_a_study_is_read_by_a_shell_too() -> None:
    Path("my study.yaml").write_text("settings: {}\n")
    with pytest.raises(ConfigError, match=r"run it with `trb sweep --config 'my study\.yaml'`"):
        load_recipe("my study.yaml")


def test_every_line_says_why_or_speaks_for_itself() -> None:
    initial()
    lines = [line for line in Path("distil.yaml").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) < 30
    bare = {line.partition(":")[0] for line in lines if "#" not in line}
    assert bare <= {"num_generations", "logging_steps", "save_total_limit", "eval_limit", "eval_every"}
    assert all(len(line) <= 150 for line in lines)


def zoo_specs() -> Iterator[str]:
    """Every task of the zoo, as it is, in a larger size and with each of its settings."""
    for name, task in zoo.TASKS.items():
        yield f"zoo:{name}"
        yield f"zoo:{name}?{task.unit}={task.default + 1}"
        yield from (f"zoo:{name}?{setting}=0.5" for setting in task.settings)


@pytest.mark.parametrize("spec", list(zoo_specs()))
def test_a_right_answer_fits_into_a_completion(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle solves each problem that the prompts show, or reads what the clerk of the conversation says."""
    monkeypatch.setattr(prompts, "GENERATED_ROWS", 100)
    name, _, setting = spec.removeprefix("zoo:").partition("?")
    key, _, value = setting.partition("=")
    task = zoo.TASKS[name].with_settings(**({key: float(value)} if key in zoo.TASKS[name].settings else {}))
    if name == "dialogue":
        turns = int(value) if value else task.default
        right = [row["messages"][-1]["content"] for row in task.problems(100, seed=0, size=turns)]
    else:
        right = [task.solution(row["prompt"][0]["content"].split("\n")[0]) for row in load_prompts(spec)]
    tokenizer = zoo.load("student")[1]
    needed = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in right)
    longest = initial(*PAIR, "--data", spec).training["max_completion_length"]
    assert needed < longest < 1.5 * needed + 16  # a token to stop with; half as much again, in sixteens
    assert f"the longest worked solution has {needed} tokens" in Path("distil.yaml").read_text()


def test_data_of_ones_own_with_the_recipe_in_another_folder() -> None:
    questions("data.jsonl")
    recipe = initial("recipes/mine.yaml", *PAIR, "--data", "data.jsonl")
    assert Path(recipe.run.train_data).resolve() == Path("data.jsonl").resolve()
    assert recipe.run.held_out_prompts > 0
    assert recipe.run.eval_data == []
    questions("recipes/data.jsonl", 1)  # what is meant stays what was named
    runs_a_step("recipes/mine.yaml")


def test_columns_of_other_names_are_named_by_options(capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal names an option; with it the recipe is written, and has the key that the run needs."""
    rows = [{"frage": f"{number}+2+3=", "loesung": str(number + 5)} for number in range(9)]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (*PAIR, "--data", "own.jsonl")
    assert "name the right one with --prompt-column" in refused(capsys, *data)
    assert "no column 'lösung'; did you mean 'loesung'" in refused(
        capsys, *data, "--prompt-column", "frage", "--answer-column", "lösung"
    )
    run = initial(*data, "--prompt-column", "frage", "--answer-column", "loesung").run
    assert (run.train_prompt_column, run.train_answer_column) == ("frage", "loesung")
    runs_a_step("distil.yaml")
    assert "--answer-column='a' means nothing for 'zoo:chains'" in refused(capsys, "a.yaml", "--answer-column", "a")


def test_a_teacher_on_the_students_own_weights_needs_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--student", "zoo:student", "--teacher", "base", "--data", "zoo:chains?told=0.5")
    assert "--lora-rank is 0, which trains these: set --lora-rank" in refused(capsys, *data)
    recipe = initial(*data, "--lora-rank", "4")
    assert (recipe.run.teacher, recipe.run.lora_rank) == ("base", 4)
    assert recipe.training["learning_rate"] > initial("whole.yaml").training["learning_rate"]  # as adapters want
    assert Path("distil.yaml").read_text().count("lora_rank") == 1
    assert main(["doctor", "--config", "distil.yaml"]) == 0


@pytest.mark.parametrize("free", [2**40, 10**6], ids=["enough memory", "too little for any batch"])
def test_an_adapter_that_is_trained_as_it_is_gets_no_other_and_its_own_rate(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, tokenizer = zoo.load("student")
    student.save_pretrained("base")
    tokenizer.save_pretrained("base")
    tokenizer.save_pretrained("adapter")
    options = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), options)
    adapted.save_pretrained("adapter")
    monkeypatch.setattr(doctor, "device_bytes", lambda *_: free)
    recipe = initial("--student", "adapter", "--teacher", "base", "--data", "zoo:chains")
    assert recipe.run.lora_rank == 0
    assert recipe.training["learning_rate"] == safe_rate(10**6, adapters=True)
    check_shared(recipe.run)


def test_few_prompts_still_make_a_step() -> None:
    recipe = initial(*PAIR, "--data", questions("data.jsonl", 3))
    assert (recipe.run.prompts_per_step, recipe.run.held_out_prompts) == (2, 0)


def test_copies_of_a_prompt_are_held_out_together() -> None:
    questions("copied.jsonl", 100)  # ten different ones
    assert initial(*PAIR, "--data", "copied.jsonl").run.held_out_prompts == 2
    lines = Path("copied.jsonl").read_text().splitlines(keepends=True)
    Path("uneven.jsonl").write_text("".join(lines[:10] + 90 * lines[:1]))  # one is nine tenths of all
    assert initial("uneven.yaml", *PAIR, "--data", "uneven.jsonl").run.held_out_prompts == 0


def test_lengths_keep_to_the_positions_of_the_models() -> None:
    """The zoo's have 512."""
    questions("data.jsonl", text="{}" + "+2" * 200 + "=")
    recipe = initial(*PAIR, "--data", "data.jsonl")
    assert recipe.run.max_prompt_length + recipe.training["max_completion_length"] <= 512
    assert recipe.run.overlong_prompts == "drop"
    with Path("data.jsonl").open("a") as file:
        for number in range(40):  # enough for a step once the long ones are dropped
            file.write(json.dumps({"question": f"{number}+1=", "answer": str(number + 1)}) + "\n")
    assert main(["doctor", "--config", "distil.yaml"]) == 0


def test_of_much_data_a_part_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "READ", 30)
    recipe = initial(*PAIR, "--data", questions("data.jsonl", 60))
    assert recipe.run.overlong_prompts == "drop"  # the longest may be among those that were not read
    assert recipe.run.train_limit == draft.STEPS * 16


def test_a_tokenizer_without_a_template_gets_the_plain_one(tmp_path: Path) -> None:
    model, tokenizer = zoo.load("student")
    model.save_pretrained("bare")
    tokenizer.chat_template = None
    tokenizer.save_pretrained("bare")
    Path("bare/chat_template.jinja").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").chat_template is None
    recipe = initial("--student", "./bare", "--teacher", "./bare", "--data", questions("data.jsonl"))
    assert recipe.run.chat_template == "plain"
    assert main(["doctor", "--config", "distil.yaml"]) == 0


@pytest.mark.parametrize(
    ("fits", "rank", "batch"),
    [
        (lambda rank, batch: True, 0, 64),
        (lambda rank, batch: batch <= 8, 0, 8),
        (lambda rank, batch: rank > 0 and batch <= 4, 16, 4),
        (lambda rank, batch: False, 16, 1),
    ],
)
def test_the_batch_is_the_largest_that_fits_and_adapters_are_the_last_resort(
    fits: Any, rank: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate(run: Any, args: Any, launch: Any, pairs: Any, available: float, taught: int | None) -> Any:
        needed = 0.5 if fits(run.lora_rank, args.per_device_train_batch_size) else 0.9
        return "update", {"everything": needed * available}

    monkeypatch.setattr(doctor, "largest_phase", estimate)
    recipe = initial()
    assert (recipe.run.lora_rank, recipe.training["per_device_train_batch_size"]) == (rank, batch)


def test_a_model_that_cannot_be_planned_for_gets_a_small_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any) -> Any:
        raise ValueError("no layers")

    monkeypatch.setattr(doctor, "largest_phase", unknown)
    assert initial().training["per_device_train_batch_size"] == 8


# ---- refusals ----


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["init", *arguments]) == 2
    return capsys.readouterr().err


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("distil.yaml").write_text("mine: 1\n")
    assert "distil.yaml is there already" in refused(capsys)
    seen = Path.exists
    absent = [Path("distil.yaml")]  # as if it came after the first look
    monkeypatch.setattr(Path, "exists", lambda path: seen(path) and not (path in absent and bool(absent.pop())))
    assert "distil.yaml is there already" in refused(capsys)
    assert Path("distil.yaml").read_text() == "mine: 1\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mine"], "ends in .yaml"),
        (["--student", "zoo:student"], "--teacher and --data missing"),
        (["--data", "zoo:chains"], "--student and --teacher missing"),
        ([*PAIR, "--data", "none.jsonl"], "there is no file none.jsonl"),
        ([*PAIR, "--data", "zoo:chain"], "unknown task"),
        (
            ["--student", "zoo:studnt", "--teacher", "zoo:teacher", "--data", "zoo:chains"],
            "did you mean 'zoo:student'",
        ),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_and_leaves_no_file(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refused(capsys, *arguments)
    assert list(Path().iterdir()) == []
