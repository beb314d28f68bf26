"""Conversations as data: which turns become prompts, what stands before each, and every kind of bad conversation."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_recipes import SMALL, study_of

from trb import zoo
from trb.sampling import prompt_key
from trb.studies.material import load_tokenizers, training_prompts
from trb.studies.recipe import make_recipe
from trb.studies.study import ProblemSets, Setting
from trb.studies.sweep import _check_problems
from trb.tasks.conversations import conversation_of
from trb.tasks.prompts import load_prompts, render


def say(*turns: str) -> list[dict[str, str]]:
    """ "u:1+1", "a:2", "s:be brief" as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def write(path: Path, *rows: Any, **columns: Any) -> Path:
    path.write_text("".join(json.dumps({"messages": row, **columns}) + "\n" for row in rows))
    return path


TALK = say("s:be brief", "u:1+1", "a:2", "u:and 1?", "a:3", "u:twice", "a:6")
OTHER = say("u:1+1", "a:2", "u:no", "a:yes")


def test_every_turn_of_the_assistant_is_a_prompt_after_what_came_before(tmp_path: Path) -> None:
    rows = load_prompts(write(tmp_path / "talk.jsonl", TALK, OTHER), assistant_turns="all")
    assert [row["prompt"] for row in rows] == [TALK[:2], TALK[:4], TALK[:6], OTHER[:1], OTHER[:3]]
    said = [json.loads(row["metadata"]) for row in rows]
    assert [one["reference"] for one in said] == ["2", "3", "6", "2", "yes"]
    assert [one["turn"] for one in said] == [1, 2, 3, 1, 2]
    assert len({one["conversation"] for one in said[:3]}) == len({one["conversation"] for one in said[3:]}) == 1
    assert said[0]["conversation"] != said[3]["conversation"]
    assert {(row["answer"], row["verifier"]) for row in rows} == {("", "math")}


def test_the_last_turn_alone_is_what_a_prompt_without_its_reply_is(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.jsonl", TALK, OTHER)
    rows = load_prompts(path, assistant_turns="last")
    assert [row["prompt"] for row in rows] == [TALK[:6], OTHER[:3]] == [row["prompt"] for row in load_prompts(path)]
    assert [json.loads(row["metadata"])["turn"] for row in rows] == [3, 2]


def test_a_greeting_is_no_turn_to_answer(tmp_path: Path) -> None:
    talk = say("a:hello", "u:1+1", "a:2")
    rows = load_prompts(write(tmp_path / "talk.jsonl", talk), assistant_turns="all")
    assert [row["prompt"] for row in rows] == [talk[:2]]


def test_an_answer_is_that_of_the_last_turn_and_a_box_that_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.jsonl", TALK, answer="6")
    assert [row["answer"] for row in load_prompts(path, assistant_turns="all")] == ["", "", "6"]
    boxed = say("u:1+1", "a:\\boxed{2}", "u:and 1?", "a:\\boxed{3}")
    rows = load_prompts(write(tmp_path / "boxed.jsonl", boxed), assistant_turns="all")
    assert [row["answer"] for row in rows] == ["2", "3"]


def test_the_limit_counts_conversations_and_a_system_prompt_reaches_every_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.jsonl", TALK, OTHER)
    rows = load_prompts(path, assistant_turns="all", limit=1, seed=1, system_prompt="be kind")
    assert len({conversation_of(row) for row in rows}) == 1
    assert {row["prompt"][0]["content"] for row in rows} == {"be kind"}


def test_keys_of_prompts_are_stable_and_differ_between_turns(tmp_path: Path) -> None:
    _, tokenizer = zoo.load("student")
    path = write(tmp_path / "talk.jsonl", TALK, OTHER)
    keys = [prompt_key(ids) for ids in render(tokenizer, load_prompts(path, assistant_turns="all"))]
    assert len(set(keys)) == 5
    moved = write(tmp_path / "moved.jsonl", OTHER, TALK)
    assert sorted(prompt_key(ids) for ids in render(tokenizer, load_prompts(moved, assistant_turns="all"))) == sorted(
        keys
    )
    text = tokenizer.decode(render(tokenizer, load_prompts(path, assistant_turns="last"))[1])
    assert text.endswith("<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n") and "assistant\n2<|im_end|>" in text


@pytest.mark.parametrize(
    ("talk", "complaint"),
    [
        (say("u:1+1", "a:2", "u:and?"), r"ends with a turn of the user; with assistant_turns it must end"),
        (say("s:be brief", "u:1+1"), r"has no turn of the assistant; leave out assistant_turns"),
        (say("s:a", "s:b", "u:1", "a:2"), r"message 2 in .* is a second system message; there can be one"),
        (say("u:1", "s:b", "a:2"), r"message 2 in .* is a system message; there can be one, at the start"),
        (say("u:1", "a: ", "u:2", "a:3"), r"message 2 in .* is empty"),
        (say("u:1", "a:2", "a:3"), r"message 3 in .* is a second one of the assistant in a row; join them"),
        (say("s:be brief", "a:hello"), r"has no user message to answer"),
        ("1+1", r"is of type str \('1\+1'\); with assistant_turns every row is a list of messages"),
        (None, r"is missing \(null\); with assistant_turns"),
        ([], r"has no turn of the assistant"),
    ],
)
@pytest.mark.parametrize("which", ["all", "last"])
def test_a_bad_conversation_is_refused_with_its_row(tmp_path: Path, talk: Any, complaint: str, which: str) -> None:
    path = write(tmp_path / "talk.jsonl", OTHER, talk)
    with pytest.raises(
        ValueError, match=f"row 2 of .*talk.jsonl.*{complaint}" if "message" not in complaint[:7] else complaint
    ):
        load_prompts(path, assistant_turns=which)


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
@pytest.mark.parametrize("which", ["all", None])
def test_a_call_in_data_is_refused_and_not_lost(tmp_path: Path, key: str, which: str | None) -> None:
    called = {"role": "assistant", "content": "let me see", key: [{"function": {"name": "calculator"}}]}
    path = write(tmp_path / "talk.jsonl", [*say("u:1+1"), called, *say("u:and?", "a:2")])
    with pytest.raises(ValueError, match=f"message 2 in .* has {key}, which are not read from data"):
        load_prompts(path, **({} if which is None else {"assistant_turns": which}))


def test_what_has_no_conversations_refuses_the_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"assistant_turns='all' means nothing for 'zoo:chains'"):
        load_prompts("zoo:chains", assistant_turns="all")
    with pytest.raises(ValueError, match=r"assistant_turns is 'lst'; choose one of all, last; did you mean 'last'"):
        load_prompts("zoo:dialogue", assistant_turns="lst")
    path = write(tmp_path / "taught.jsonl", OTHER, teacher_prompt=say("u:1"))
    with pytest.raises(ValueError, match=r"row 1 .* has a teacher_prompt, which is of one prompt"):
        load_prompts(path, assistant_turns="all")
    assert load_prompts(path, assistant_turns="last")[0]["teacher_prompt"] == say("u:1")


def test_no_conversation_is_held_out_and_trained_on() -> None:
    values = {**SMALL, "train_data": "zoo:dialogue", "train_assistant_turns": "all", "max_prompt_length": 200}
    recipe = make_recipe({**values, "held_out_prompts": 8})
    tokenizer, _ = load_tokenizers(recipe.run)
    prompts, held_out = training_prompts(recipe.run, recipe.training_config("unused"), tokenizer)
    assert held_out is not None and len(held_out) == 8
    trained, kept_back = ({conversation_of(row) for row in rows} for rows in (prompts, held_out))
    assert trained and kept_back and not trained & kept_back
    assert len(prompts) == 160 - 4 * len(kept_back)
    recipe = make_recipe({**values, "train_limit": 3, "held_out_prompts": 8})
    with pytest.raises(ValueError, match=r"all turns of their conversations: 0 prompts are left for the 2"):
        training_prompts(recipe.run, recipe.training_config("unused"), tokenizer)


def test_only_the_last_turn_is_checked_by_what_a_row_brings(tmp_path: Path) -> None:
    turns = [("user", "say hi"), ("assistant", "hi"), ("user", "write add"), ("assistant", "def add(a, b): ...")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({"prompt": messages, "test_list": ["assert add(1, 2) == 3"]}) + "\n")
    first, last = load_prompts(str(path), assistant_turns="all")
    assert first["verifier"] != "python" and "assert add" not in json.dumps(first["prompt"])
    assert last["verifier"] == "python" and "assert add" in json.dumps(last["prompt"])


def test_metadata_without_a_conversation_name_none() -> None:
    assert [conversation_of({"metadata": text}) for text in ('{"conversation": null}', "{}", "[]", "")] == [""] * 4


@pytest.mark.parametrize("free", ["dev", "test"])
def test_a_study_refuses_sets_that_are_measured_differently(tmp_path: Path, free: str) -> None:
    recipe = {key: value for key, value in SMALL.items() if not key.startswith("eval")} | {"train_data": "zoo:chains"}
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"prompt": f"{n} + 1 = ?"}) + "\n" for n in range(3)))
    sets = {"dev": ProblemSets(data=["zoo:chains"], limit=3), "test": ProblemSets(data=["zoo:clock"], limit=3)}
    setting = Setting(recipe=recipe, **(sets | {free: ProblemSets(data=[str(bare)])}))
    with pytest.raises(ValueError, match=r"s: zoo:\w+ \(\w+\) has answers .*bare.jsonl \(\w+\) has none"):
        _check_problems(study_of(setting), "s")


def test_a_study_refuses_equal_problems_with_different_replies(tmp_path: Path) -> None:
    """A conversation is known by all of its text; what is asked is its prompt alone."""
    recipe = {key: value for key, value in SMALL.items() if not key.startswith("eval")} | {"train_data": "zoo:dialogue"}
    other = [*TALK[:-1], {"role": "assistant", "content": "quite another reply"}]
    setting = Setting(
        recipe={**recipe, "eval_assistant_turns": "last"},
        dev=ProblemSets(data=[str(write(tmp_path / "talk.jsonl", TALK))]),
        test=ProblemSets(data=[str(write(tmp_path / "again.jsonl", other, OTHER))]),
    )
    with pytest.raises(ValueError, match="1 development problems are test problems too"):
        _check_problems(study_of(setting), "s")


def test_a_study_refuses_two_turns_of_one_conversation_in_development_and_test(tmp_path: Path) -> None:
    recipe = {key: value for key, value in SMALL.items() if not key.startswith("eval")} | {"train_data": "zoo:dialogue"}
    shared = write(tmp_path / "talk.jsonl", TALK)
    setting = Setting(
        recipe={**recipe, "eval_assistant_turns": "all"},
        dev=ProblemSets(data=[str(shared)]),
        test=ProblemSets(data=[str(write(tmp_path / "again.jsonl", OTHER, TALK))]),
    )
    with pytest.raises(ValueError, match="1 development problems are test problems too"):
        _check_problems(study_of(setting), "s")
