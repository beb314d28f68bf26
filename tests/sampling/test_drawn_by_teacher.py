"""Two teachers in one batch: samples against the exact law of each row's own teacher, and against an oracle.

The oracle is that of test_teacher_prompts.py: one row at a time, in whole passes and in numpy. Seeds are fixed; drawn
at random, a correct sampler would fail one of the chi-square tests with probability below 1e-4 (`LEVEL` times 4).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from conftest import STUDENT_ROWS, TEACHER_ROWS, TinyPair, tiny_gpt2
from reference import policies as laws
from reference.statistics import goodness_of_fit
from test_sampling_exactness import HORIZON, LEVEL
from test_teacher_prompts import BUDGET, PROMPTS, TAUGHT, WAYS, draw, exact_law, oracle

from trb.sampling import Rollout
from trb.training.teachers import drawn_by_teacher

N = 4_000
WHOSE = [0, 1, 1, 0, 1, 0, 0, 1]


@cache
def pairs(first: TinyPair) -> tuple[TinyPair, TinyPair]:
    """Two teachers of one student, of other families."""
    return first, TinyPair(first.student, tiny_gpt2(TEACHER_ROWS + STUDENT_ROWS, seed=46), first.student_eos)


def drawn(two: Sequence[TinyPair], whose: Sequence[int], *, rows: Sequence[int], **options: Any) -> Rollout:
    """Completions of rows of PROMPTS; a row's key is its place."""

    def one(place: int, **columns: Any) -> Rollout:
        return draw(two[place], **columns, **options)

    columns = {"prompts": [PROMPTS[row] for row in rows], "teacher_prompts": [TAUGHT[row] for row in rows]}
    index = {"prompt_keys": range(len(rows)), "rollout_index": [0] * len(rows)}
    return drawn_by_teacher(one, whose, **columns, **index)


@pytest.mark.parametrize("method", ["lockstep", "speculative"])
def test_each_row_has_the_exact_law_of_its_own_teacher(tiny_pair: TinyPair, method: str) -> None:
    """And not that of the other one."""
    two, whose = pairs(tiny_pair), [0, 1] * N
    out = drawn(two, whose, rows=[0] * len(whose), method=method)
    own, its = tuple(PROMPTS[0]), tuple(TAUGHT[0])
    for place in range(2):
        completions = [tuple(ids) for ids in out.completions[place::2]]
        assert goodness_of_fit(completions, exact_law(two[place], own, its)) > LEVEL
        assert goodness_of_fit(completions, exact_law(two[1 - place], own, its)) < LEVEL
    assert max(map(len, out.completions)) == HORIZON


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_tokens_are_the_oracles_and_states_each_teachers(tiny_pair: TinyPair, options: dict[str, Any]) -> None:
    two, rows = pairs(tiny_pair), [number % 4 for number in range(len(WHOSE))]
    wanted = [
        oracle(two[place], PROMPTS[row], TAUGHT[row], key, seed=3, limit=7, law=laws.trust_region(BUDGET))
        for key, (place, row) in enumerate(zip(WHOSE, rows, strict=True))
    ]
    keep = {"keep_teacher_hidden": True} if "block_size" in options else {}
    out = drawn(two, WHOSE, rows=rows, max_new_tokens=7, **options, **keep)
    assert out.completions == wanted
    assert drawn(two, [0] * len(WHOSE), rows=rows, max_new_tokens=7, **options).completions != wanted
    assert out.prompts == [PROMPTS[row] for row in rows]
    assert [*map(len, out.stats.accepted)] == [*map(len, wanted)]
    assert out.stopped == [ids[-1] == tiny_pair.student_eos for ids in wanted]
    for place, states in zip(WHOSE, out.teacher_hidden or [], strict=bool(keep)):
        assert states.shape[-1] == two[place].teacher.config.hidden_size


def test_parts_without_states_leave_none(tiny_pair: TinyPair) -> None:
    """States of some rows alone would be taken for those of all."""
    two = pairs(tiny_pair)

    def one(place: int, **columns: Any) -> Rollout:
        return draw(two[place], **columns, block_size=2, keep_teacher_hidden=place == 0)

    columns = {"prompts": PROMPTS, "teacher_prompts": TAUGHT, "prompt_keys": range(4), "rollout_index": [0] * 4}
    assert drawn_by_teacher(one, [0, 1, 0, 1], **columns).teacher_hidden is None
    alone = drawn_by_teacher(one, [0, 0, 0, 0], **columns)
    assert alone.teacher_hidden is not None and all(isinstance(states, torch.Tensor) for states in alone.teacher_hidden)
    assert drawn_by_teacher(one, []).completions == []
