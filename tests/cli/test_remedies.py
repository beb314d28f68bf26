"""What a message tells people to set exists where they are told: an option of the command, or a key of recipes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trb
from trb import cli
from trb.cli import evaluate, init, main, plan, probe
from trb.errors import calls, named
from trb.studies import material
from trb.studies.keys import valid_keys

SOURCES = Path(trb.__file__).parent

# Words of messages that look like options of ours and are none, by what they are instead.
OTHERS = {
    "options of pip, hf and accelerate": "--no-deps --local-dir fsdp_version fsdp_cpu_ram_efficient_loading",
    "placeholders": "--key key",
    "files, and what is in them": """adapter_config adapter_model generation_config base_model_name_or_path eos_token_id
        return_dict output_router_logits router_aux_loss_coef entry_point""",
    "of Python, in messages that only its callers can meet": """for_method head_rows merge_adapter
        is_trainable requires_grad torch_dtype save_pretrained
        merge_and_unload unmerge_adapter peft_config p_values variance_components teacher_model
        teacher_model_name_or_path update_student train_dataset processing_class reward_fn teacher_prompts
        environment_factory teacher_processing_class hyperparameter_search model_init
        teacher_tokens resize_token_embeddings""",
    "an argument of chat templates": "enable_thinking",
    "options of vLLM's own engine": """async_scheduling draft_model max_model_len max_tokens num_speculative_tokens
        speculative_config tensor_parallel_size""",
    "what the trainer is told, which a recipe's check comes before": "timeout_s prompt_ids",
}
KNOWN = {word for words in OTHERS.values() for word in words.split()}


def options() -> set[str]:
    """Every option of every command."""

    def below(parser: Any) -> Iterator[str]:
        for action in parser._actions:
            yield from action.option_strings
            for each in action.choices.values() if isinstance(action.choices, dict) else ():
                yield from below(each)

    return set(below(cli._parser()))


def exists(word: str) -> bool:
    """Whether a word is an option of a command or, with or without its dashes, a key of recipes."""
    key = word.removeprefix("--").replace("-", "_")
    return key in valid_keys() or f"--{key.replace('_', '-')}" in options()


def mentions(text: str) -> list[str]:
    """What a message names that could be set: --options, words_like_this, and words before an equals sign."""
    return re.findall(r"--[a-z][a-z-]+", text) + re.findall(
        r"(?<![\w./-])([a-z][a-z0-9]*(?:_[a-z0-9]+)+|[a-z]+(?==[\w'\"]))", text
    )


def messages() -> Iterator[tuple[str, str]]:
    """(place, text) of what is raised, warned of or advised anywhere in the package; `{}` for what is filled in."""
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = [value for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values]
        translated = [each for node in ast.walk(tree) if _is_named(node) for each in ast.walk(node)]
        parts = {id(part) for part in (*inside, *translated)}
        for node in (each for top in ast.walk(tree) if _speaks(top) for each in ast.walk(top)):
            if isinstance(node, ast.JoinedStr):
                text = "".join(value.value if isinstance(value, ast.Constant) else "{}" for value in node.values)
                yield f"{path.relative_to(SOURCES)}:{node.lineno}", text
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                yield f"{path.relative_to(SOURCES)}:{node.lineno}", node.value


def _is_named(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "named"


def _speaks(node: ast.AST) -> bool:
    """A statement that raises, the call of a warning or a check, or what is put aside for one of them."""
    if isinstance(node, ast.Assign):
        return {"remedy", "way_on", "text", "why"} & {ast.unparse(target) for target in node.targets} != set()
    says = ("Check", "Advice", "warnings.warn", "logger.warning")
    return isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and ast.unparse(node.func) in says)


def test_every_remedy_exists() -> None:
    found = list(messages())
    assert len(found) > 300
    lost = {word: place for place, text in found for word in mentions(text) if not exists(word) and word not in KNOWN}
    assert lost == {}


def test_no_exception_is_kept_for_nothing() -> None:
    said = {word for _, text in messages() for word in mentions(text)}
    assert KNOWN - said == set()


TABLES = {
    "student": material.STUDENT_NAMES,
    "adapter": material.LORA_NAMES,
    "training data": material.TRAINING_NAMES,
    "evaluation": material.EVALUATION_NAMES,
    "trb eval": evaluate.OPTIONS,
    "trb doctor --plan": plan.OPTIONS,
    "trb probe": probe.OPTIONS,
    "trb init": init.OPTIONS,
}


@pytest.mark.parametrize("table", TABLES)
def test_what_arguments_are_called_exists(table: str) -> None:
    for name in TABLES[table].values():
        first = re.split(r"[ :]", name)[0]
        assert exists(first) or name == "output directory", name


def test_every_argument_that_is_translated_has_a_translation() -> None:
    """What `named` is given is a key of some table; of a name that is only known when it runs nothing can be said."""
    given = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if _is_named(node):
                given |= {part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
    translated = {name for table in TABLES.values() for name in table}
    assert given - translated == set()
    assert {"prompt_column", "plain=True", "max_new_tokens"} <= given


def test_names_are_those_of_the_outermost_caller() -> None:
    assert named("limit") == "limit"
    with calls({"eval_limit": "--limit"}), calls({"limit": "eval_limit"}):
        assert named("limit") == "--limit"
        assert named("seed") == "seed"
    assert named("limit") == "limit"


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("train --train-data {table} --train-limit 4", "--train-prompt-column"),
        ("train --eval-data {table}", "--eval-prompt-column"),
        (
            "train --train-data {table} --train-prompt-column puzzle --teacher {bare} --student {bare}",
            "--chat-template",
        ),
        ("eval --model zoo:student --data {table}", "--prompt-column"),
        ("eval --model {bare} --data zoo:chains --limit 2", "--chat-template"),
    ],
)
def test_a_remedy_can_be_followed(
    command: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What each command says is an option that it takes, and with it the command runs."""
    from small_recipes import SMALL_FILE

    from trb import zoo

    (tmp_path / "small.yaml").write_text(SMALL_FILE)
    (tmp_path / "table.jsonl").write_text('{"puzzle": "1+1+1+1", "answer": "4"}\n' * 4)
    for part in zoo.load("student"):
        part.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    name, *words = command.format(table=tmp_path / "table.jsonl", bare=tmp_path / "bare").split()
    more = ["--max-new-tokens=8"] if name == "eval" else ["--config", str(tmp_path / "small.yaml"), "--max-steps=1"]
    assert main([name, *words, *more, "--output-dir", str(tmp_path / "out"), "--quiet"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    key = remedy.removeprefix("--").replace("-", "_")
    assert re.search(rf"(?<!\w)({remedy}|{key})\b", said), said
    value = "plain" if key == "chat_template" else "puzzle"
    assert main([name, *words, remedy, value, *more, "--output-dir", str(tmp_path / "out"), "--quiet"]) == 0
