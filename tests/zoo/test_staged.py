"""The staged task: every stage has a table of its own, and nothing mends a wrong step."""

import itertools
import random
import re
from string import ascii_lowercase

import pytest

from trb import zoo
from trb.tasks.prompts import load_prompts
from trb.zoo.staged import ENTRIES, Staged
from trb.zoo.tasks import boxed_answer
from trb.zoo.tokenizer import character_tokenizer

STAGED = zoo.TASKS["staged"]


def path_of(task: Staged, problem: str) -> str:
    """The answer, looked up here."""
    return "".join(stage + entry + task.table(stage)[int(entry)] for stage, entry in problem.split(" "))


@pytest.mark.parametrize("shared", [0, 0.5, 1])
def test_problems_are_right_distinct_and_split(shared):
    task = STAGED.with_settings(shared=shared)
    rows = task.problems(400, seed=1, split="test")
    texts = [row["prompt"][0]["content"] for row in rows]
    assert len(set(texts)) == 400
    assert all(re.fullmatch(r"a[0-3] b[0-3] c[0-3] d[0-3] e[0-3] f[0-3] g[0-3] h[0-3]", text) for text in texts)
    assert [row["answer"] for row in rows] == [path_of(task, text) for text in texts]
    assert [boxed_answer(task.solution(text)) for text in texts] == [row["answer"] for row in rows]
    assert not set(texts) & {row["prompt"][0]["content"] for row in task.problems(400, seed=1)}


def test_a_solution_is_its_steps_in_a_box():
    first, second = (STAGED.table(stage) for stage in "ab")
    assert STAGED.solution("a3 b0") == f"\\boxed{{a3{first[3]}b0{second[0]}}}"


def test_every_stage_has_a_table_of_its_own():
    tables = [*map(STAGED.table, ascii_lowercase), STAGED.with_settings(shared=1).table("a")]
    assert all(len(set(table)) == len(table) == len(ENTRIES) for table in tables)
    for one, other in itertools.combinations(tables, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) <= 3  # 0.4 by chance


def test_shared_says_in_how_many_stages_the_tables_are_one():
    for shared, stages in ((0.25, "dh"), (0.5, "bdfh"), (0.75, "bcdfgh"), (1, "abcdefgh")):
        task = STAGED.with_settings(shared=shared)
        common = STAGED.with_settings(shared=1).table("a")
        assert "".join(stage for stage in "abcdefgh" if task.table(stage) == common) == stages
        assert all(task.table(stage) == STAGED.table(stage) for stage in "abcdefgh" if stage not in stages)


def test_nothing_that_follows_a_wrong_step_leads_to_the_right_answer():
    """Two problems for every place of the wrong step; whatever is done after it, right or wrong."""
    draws = range(18)  # each of the nine wrong digits is among those that these seeds choose
    for i, row in enumerate(STAGED.problems(8, seed=2, size=4)):
        state, operations = STAGED.start(row["prompt"][0]["content"])
        wrong_at, ends = i % 4, {state}
        for place, operation in enumerate(operations):
            right = {STAGED.step(end, operation).state for end in ends}
            wrong = {STAGED.wrong_step(end, operation, random.Random(j)).state for end in ends for j in draws}
            assert not right & wrong
            ends = wrong if place == wrong_at else right if place < wrong_at else right | wrong
        assert len(ends) >= 9 and row["answer"] not in ends


def test_corruption_does_what_its_probability_says():
    texts = [
        (
            row["answer"],
            STAGED.corrupted_solution(row["prompt"][0]["content"], random.Random(i), wrong_step=0.2, drift=0),
        )
        for i, row in enumerate(STAGED.problems(500, seed=0, size=6))
    ]
    right = sum(boxed_answer(text) == answer for answer, text in texts)
    expected = 0.8**6
    assert abs(right / 500 - expected) < 4 * (expected * (1 - expected) / 500) ** 0.5
    drifted = STAGED.corrupted_solution("a3 b0", random.Random(0), wrong_step=0, drift=1)
    assert drifted and boxed_answer(drifted) is None


def test_one_character_is_one_token():
    tokenizer = character_tokenizer(STAGED, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    text = STAGED.solution(STAGED.problems(1, seed=0)[0]["prompt"][0]["content"])
    ids = tokenizer.encode(text)
    assert len(ids) == 1 + 8 * 3 + 1  # the box, stages, its end
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_sources_set_the_size_and_what_is_shared():
    half = STAGED.with_settings(shared=0.5)
    rows = load_prompts("zoo:staged?stages=5&shared=0.5", split="test", limit=6, seed=3)
    assert [row["answer"] for row in rows] == [row["answer"] for row in half.problems(6, seed=3, split="test", size=5)]
    assert {row["verifier"] for row in rows} == {"exact"}
    own = load_prompts("zoo:staged?stages=5", split="test", limit=6, seed=3)
    assert [row["prompt"] for row in own] == [row["prompt"] for row in rows]
    # The first stage of two keeps its own table, the second takes the common one.
    assert [row["answer"][:3] for row in own] == [row["answer"][:3] for row in rows]
    assert [row["answer"][3:6] for row in own] != [row["answer"][3:6] for row in rows]
    for spec, message in (
        ("zoo:staged?operands=3", "no setting 'operands'"),
        ("zoo:clock?shared=0.5", "no setting 'shared'"),
        ("zoo:staged?shared=1.5", "shared is 1.5"),
        ("zoo:staged?shared=all", "shared is 'all'"),
        ("zoo:staged?shared=true", "shared is True"),
        ("zoo:staged?stages=27", "at most 26 stages"),
        ("zoo:staged?stages=1", "at least 2 stages"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_prompts(spec)
