"""`trb eval` of a run asks, draws and grades as the run's own evaluations do, unless an option says otherwise.

The keys that this takes are not listed here: they are those that an evaluation is seen to read.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small_recipes import SMALL, SMALL_FILE, watched

from trb import zoo
from trb.cli import evaluate as command_module
from trb.cli import main
from trb.models.loading import load_model
from trb.studies import scores
from trb.studies.keys import default_of, run_fields, training_fields, valid_keys
from trb.studies.material import load_tokenizers, problem_sets
from trb.studies.recipe import Recipe, load_recipe, make_recipe
from trb.tasks.evaluation import EvalResult
from trb.tasks.grading import Verifier
from trb.vocab import SharedVocabulary

TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}{% if plain_chat %}<|im_start|>assistant
{% else %}9=9 9=9 9=9{% endif %}{% endif %}"""

# None of them what it is where nothing is said.
ASKED: dict[str, Any] = {
    "chat_template_kwargs": {"plain_chat": True},
    "system_prompt": "2+2=4",
    "eval_temperature": 0.7,
    "eval_max_new_tokens": 7,
    "reward_timeout_s": 3.0,
}
WITH_TOOLS: dict[str, Any] = {
    **ASKED,
    **{"tools": ["calculator"], "max_tool_calling_iterations": 2, "tool_timeout": 1.5, "tool_max_characters": 7},
}
WITH_TEACHER: dict[str, Any] = {
    **ASKED,
    **{"teacher_system_prompt": "1+1=2", "teacher_prompt_template": "{privileged_context} {prompt}"},
}
# What an evaluation reads and `trb eval` needs no word about.
OF_NO_CONSEQUENCE = {
    "teachers": "of several, each is scored on its own rows, and the student on all",
    "teacher_revision": "which teacher it is, as --teacher says",
    "teacher_trust_remote_code": "which teacher it is, as --teacher says",
    "teacher_column": "which teacher a row is for: that of several has no part in a student's score",
    "max_prompt_length": "for how many rows are drawn at once",
    "use_cpu": "where it is computed",
    "deepspeed": "how processes are launched",
    "fsdp": "how processes are launched",
    "fsdp_config": "how processes are launched",
    "parallelism_config": "how processes are launched",
    "teacher_sharded": "how the teacher is held",
    "teacher_offload": "how the teacher is held",
    "bf16": "the precision, which --dtype says",
    "fp16": "the precision, which --dtype says",
}


def recipe_of(kind: str) -> Recipe:
    if kind == "tools":
        return load_recipe("tools", {**WITH_TOOLS, "eval_limit": 2, "methods": {}, "method": "opd"})
    own = {"eval_data": "zoo:dialogue", "eval_assistant_turns": "all", "eval_limit": 2, "max_prompt_length": 160}
    return make_recipe({**SMALL, **own, **WITH_TEACHER, "eval_privileged_column": "solution"})


COMMANDS = {
    "tools": ["--data", "zoo:sums", "--limit=2"],
    "teacher": [
        *("--data", "zoo:dialogue", "--limit=2", "--assistant-turns=all", "--teacher=zoo:teacher"),
        "--privileged-column=solution",
    ],
}


def run_of(recipe: Recipe, directory: Path) -> Path:
    """A directory as a run leaves it, as far as an evaluation goes."""
    for model in (load_model(recipe.run.student, dtype="float32"), load_tokenizers(recipe.run)[0]):
        model.save_pretrained(directory / "model")
    (directory / "config.yaml").write_text(recipe.to_yaml())
    return directory


class Asked:
    """Stands in for drawing: keeps what an evaluation would have been asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: Any, tokenizer: Any, rows: Any, **options: Any) -> EvalResult:
        judge, sampler = options["judge"], options["sampler"]
        chats = [[row["prompt"] for row in rows]]
        chats += [] if judge is None else [[row["prompt"] for row in judge.problems[options["name"]]]]
        box = getattr(sampler, "box", None)
        self.calls.append(
            {
                "prompts": [
                    [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in each]
                    for each in chats
                ],
                "length": options["max_new_tokens"],
                "temperature": options["temperature"],
                "seconds": vars(options["verifier"])["_timeout_s"],
                "tools": getattr(sampler, "settings", {}),
                "limits": None if box is None else {key: value for key, value in vars(box).items() if key != "_tools"},
            }
        )
        return EvalResult(options["name"], 0.5, (0.0, 1.0), len(rows), len(rows), 1.0, 1.0)


@pytest.mark.parametrize("kind", COMMANDS)
def test_whatever_an_evaluation_reads_is_as_in_the_run_or_has_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipe = recipe_of(kind)
    run, args, seen = recipe.run, recipe.training_config(tmp_path / "unused"), set[str]()
    asked = Asked()
    monkeypatch.setattr(scores, "evaluate", asked)
    directory = run_of(recipe, tmp_path / "run")
    tokenizer, _ = load_tokenizers(watched(run, seen))
    student, judge = load_model(run.student, dtype="float32"), None
    problems = problem_sets(run, watched(args, seen))
    if kind == "teacher":
        teacher, _ = zoo.load("teacher")
        judge = scores.judge_of(teacher, SharedVocabulary.of_pair(student, teacher, tokenizer), problems, args)
    with Verifier(run.reward_timeout_s) as verifier:
        scores.check_suites(student, tokenizer, problems, run, args, judge)
        scores.evaluate_suites(
            student, tokenizer=tokenizer, problems=problems, run=run, args=args, verifier=verifier, judge=judge
        )
    own = recipe_of(kind)
    taken = WITH_TOOLS if kind == "tools" else WITH_TEACHER
    assert taken.keys() <= seen, "else they decide nothing"
    fields = run_fields() | training_fields()
    assert all(value != default_of(fields[key]) for key, value in taken.items())
    assert seen & {*valid_keys()} <= {*taken, *command_module.OPTIONS, *OF_NO_CONSEQUENCE}

    used: list[tuple[Any, Any]] = []
    evaluate_suites = scores.evaluate_suites

    def noted(*arguments: Any, **named: Any) -> Any:
        used.append((named["run"], named["args"]))
        return evaluate_suites(*arguments, **named)

    monkeypatch.setattr(scores, "evaluate_suites", noted)
    command = ["eval", "--model", str(directory), *COMMANDS[kind], "--quiet"]
    with suppress(KeyError):  # of the table, which has no reverse KL to show
        assert main(command) == 0
    assert len(asked.calls) == 2 and asked.calls[0] == asked.calls[1]
    ((its_run, its_args),) = used
    for key in taken:
        mine = own.run if key in run_fields() else own.training_config("unused")
        assert getattr(its_run if key in run_fields() else its_args, key) == getattr(mine, key), key


def test_options_say_otherwise_and_what_is_as_in_the_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Asked()
    monkeypatch.setattr(scores, "evaluate", asked)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    directory = run_of(make_recipe({**SMALL, **ASKED, "chat_template": str(tmp_path / "chat.jinja")}), tmp_path / "run")
    command = ["eval", "--model", str(directory), "--data", "zoo:chains", "--limit", "1"]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"as in {directory / 'config.yaml'}: chat_template_kwargs {{'plain_chat': True}};" in said
    assert "system_prompt '2+2=4'; eval_temperature 0.7; reward_timeout_s 3.0; options may say otherwise" in said
    otherwise = ["--chat-template-kwargs", "{}", "--system-prompt=none", "--temperature=1.5", "--max-new-tokens=3"]
    assert main([*command, *otherwise]) == 0
    assert "options may say otherwise" in capsys.readouterr().err, "of reward_timeout_s there is none"
    first, second = asked.calls
    ((prompt,),), ((other,),) = first["prompts"], second["prompts"]
    assert prompt.startswith("<|im_start|>system\n2+2=4<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert other.startswith("<|im_start|>user\n") and other.endswith("9=9 9=9 9=9")
    assert [(call["temperature"], call["length"]) for call in asked.calls] == [(0.7, 7), (1.5, 3)]


def test_tools_of_an_option_keep_the_limits_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    monkeypatch.setattr(scores, "evaluate", asked)
    directory = run_of(recipe_of("tools"), tmp_path / "run")
    for tools in ([], ["--tools", "calculator"], ["--tools", "none"]):
        assert main(["eval", "--model", str(directory), *COMMANDS["tools"], *tools, "--quiet"]) == 0
    first, second, third = asked.calls
    assert first == second
    assert first["limits"] is not None and third["limits"] is None


@pytest.mark.parametrize("option", ["--privileged-column=solution", "--teacher-system-prompt=none"])
def test_what_only_a_teacher_reads_is_refused_without_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "zoo:student", "--data", "zoo:chains", option]) == 2
    assert f"{option.partition('=')[0]} would do nothing without --teacher" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[1]", "{", "plain_chat", "[" * 100_000])
def test_arguments_of_a_template_that_are_no_object_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--model", "zoo:student", "--data", "zoo:chains", "--chat-template-kwargs", text])
    assert ended.value.code == 2
    assert "is no JSON object" in capsys.readouterr().err


def test_a_run_is_scored_as_it_was_scored_in_training(tmp_path: Path) -> None:
    """With everything that its prompts and draws depend on as the recipe has it, and nothing repeated."""
    (tmp_path / "small.yaml").write_text(SMALL_FILE)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    run, out = tmp_path / "run", tmp_path / "out"
    train = ["train", "--config", str(tmp_path / "small.yaml"), "--output-dir", str(run), "--quiet", "--max-steps=1"]
    train += ["--chat-template", str(tmp_path / "chat.jinja"), "--chat-template-kwargs", '{"plain_chat": true}']
    train += ["--max-prompt-length=96", "--system-prompt=2+2=4", "--eval-temperature=0.7", "--eval-max-new-tokens=32"]
    assert main([*train, "--eval-samples=4"]) == 0
    last = json.loads((run / "evals.jsonl").read_text().splitlines()[-1])
    assert last.pop("step") == 1
    evaluation = ["eval", "--model", str(run), "--data", "zoo:chains", "--limit", "4", "--samples", "4", "--quiet"]
    assert main([*evaluation, "--output-dir", str(out)]) == 0
    assert json.loads((out / "results.json").read_text())["zoo:chains"] == last
