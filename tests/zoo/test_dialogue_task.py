"""The task of dialogue: what a clerk answers, by an account kept here, and what the pair is taught."""

import random
import re

import pytest

from trb import zoo
from trb.tasks.prompts import load_prompts
from trb.zoo import train as zoo_train
from trb.zoo.dialogue import GOODS, conversation

DIALOGUE = zoo.TASKS["dialogue"]


def test_the_clerk_remembers_everything() -> None:
    turns = [
        "2 figs",
        "same of nuts",
        "make that 5",
        "3 figs",
        "how many nuts",
        "how many eggs",
        "make that 1",
        "the list",
    ]
    said = [message["content"] for message in conversation("\n".join(turns))[1::2]]
    assert said == [
        "2 figs, 2 in all",
        "2 nuts, 4 in all",
        "5 nuts, 7 in all",
        "5 figs, 10 in all",
        "5 nuts",
        "0 eggs",
        "3 figs, 8 in all",
        "3 figs, 5 nuts, 8 in all",
    ]


@pytest.mark.parametrize("size", [2, 4, 6])
def test_conversations_are_distinct_and_split(size: int) -> None:
    rows, others = (DIALOGUE.problems(n, seed=1, split=s, size=size) for n, s in ((1, "test"), (13, "train")))
    texts = ["\n".join(m["content"] for m in row["messages"][::2]) for row in (*rows, *others)]
    assert len(set(texts)) == 14
    for row in (*rows, *others):
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * size
        assert row["prompt"] == row["messages"][:-1] and row["messages"][-2]["content"] == "the list"
        listed = re.findall(r"(\d+) ([a-z]+)", row["answer"])
        assert sum(int(n) for n, goods in listed if goods in GOODS) == int(listed[-1][0]), "what is listed adds up"


def test_lessons_go_wrong_as_often_as_they_are_told_to() -> None:
    rng, wrong = random.Random(0), 0
    for index in range(300):
        problem = DIALOGUE.random_problem(random.Random(index), 4)
        messages, text = DIALOGUE.lesson(problem, rng, wrong_step=0.3, drift=0.0)
        whole = conversation(problem)
        assert messages == whole[: len(messages)] and messages[-1]["role"] == "user", "what came before is right"
        wrong += text != whole[len(messages)]["content"]
        _, right = DIALOGUE.lesson(problem, random.Random(index), wrong_step=0.0, drift=0.0)
        assert {"role": "assistant", "content": right} in whole
    assert abs(wrong / 300 - 0.3) < 4 * (0.3 * 0.7 / 300) ** 0.5


def test_conversations_fit_the_tokens_of_the_pair_and_have_no_answer() -> None:
    pair = zoo_train.PAIRS["dialogue"]
    tokenizer = pair.tokenizer(pair.task, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert len(tokenizer) <= min(recipe.head_rows for recipe in pair.models)
    for row in load_prompts("zoo:dialogue?turns=5", limit=20, assistant_turns="all"):
        ids = zoo_train.chat_ids(tokenizer, row["prompt"])
        assert tokenizer.unk_token_id not in ids and len(ids) < 128
        assert row["answer"] == ""
