"""Completions that are gone on with: from given tokens, and from the first share of a teacher's completion.

Seeds are fixed; drawn at random, a correct sampler would fail the one chi-square test with probability `LEVEL`.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TinyPair
from reference import policies as laws
from reference.statistics import goodness_of_fit
from test_sampling_exactness import HORIZON, LEVEL, exact_law

from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import Rollout, RolloutStats, sample
from trb.training.shares import from_teacher_prefixes
from trb.vocab import SharedVocabulary


@pytest.mark.parametrize("method", ["speculative", "lockstep"])
def test_a_completion_goes_on_from_where_it_was(tiny_pair: TinyPair, method: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": tiny_pair.student_eos, "seed": 5, "method": method}
    options["teacher_eos_token_id"] = tiny_pair.teacher_eos
    prompts = [[1], [2, 3, 1], [3, 5, 2, 2, 1]] * 20
    keys = list(range(60))
    models = (tiny_pair.student, tiny_pair.teacher)
    whole = sample(*models, prompts, TrustRegionPolicy(0.3), prompt_keys=keys, **options)
    rows = [row for row, ids in enumerate(whole.completions) if len(ids) > row % 4]
    assert len(rows) > 30
    rest = sample(
        *models,
        [prompts[row] for row in rows],
        TrustRegionPolicy(0.3),
        prompt_keys=[keys[row] for row in rows],
        begun=[whole.completions[row][: row % 4] for row in rows],
        **options,
    )
    for place, row in enumerate(rows):
        assert rest.completions[place] == whole.completions[row][row % 4 :]
        assert rest.stopped[place] == whole.stopped[row]
        assert rest.stats.kl_student[place] == pytest.approx(whole.stats.kl_student[row][row % 4 :], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ["speculative", "lockstep"])
def test_what_is_begun_is_read_as_a_prompt_is(tiny_pair: TinyPair, method: str) -> None:
    """Also where it ends with a stop id, as an earlier turn of a chat does."""
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": tiny_pair.student_eos, "seed": 5, "method": method}
    stop = SharedVocabulary.of([8], tiny_pair.student_eos).stop_id
    found = sample(tiny_pair.student, None, [[1], [2, 3]], StudentPolicy(), begun=[[3, stop], []], **options)
    assert found.completions[0] and len(found.completions[0]) <= 4
    assert found.prompts == [[1, 3, stop], [2, 3]]


def test_rollouts_put_together_keep_what_the_teacher_read_where_both_have_it() -> None:
    def rollout(*lengths: int, hidden: bool = True) -> Rollout:
        states = [torch.full((length, 2), float(length)) for length in lengths]
        stats = RolloutStats.empty(len(lengths))
        columns = [[1]] * len(lengths), [[2] * length for length in lengths], [True] * len(lengths)
        return Rollout(*map(list, columns), stats, 1, 1, states if hidden else None)

    for parts, kept in (
        ([rollout(1, 2), rollout(3)], [1, 2, 3]),
        ([Rollout(), rollout(3)], [3]),
        ([rollout(3), Rollout()], [3]),
        ([rollout(1), rollout(3, hidden=False)], None),
        ([rollout(1, hidden=False), rollout(3)], None),
        ([Rollout(), Rollout()], None),
    ):
        whole, other = parts
        whole.extend(other)
        found = whole.teacher_hidden
        assert (None if found is None else [len(states) for states in found]) == kept
        assert kept is None or [len(ids) for ids in whole.completions] == kept


def test_what_cannot_be_gone_on_from_is_named(tiny_pair: TinyPair) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "eos_token_id": 0}
    cases: list[tuple[list[list[int]], str]] = [
        ([[1, 1]], "row 0 has 2 tokens"),
        ([], "0 entries for 1 prompts"),
        ([[77]], "token id 77"),
    ]
    for begun, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            sample(tiny_pair.student, None, [[1]], StudentPolicy(), begun=begun, **options)


def test_teacher_prefixes_have_the_exact_law(tiny_pair: TinyPair) -> None:
    """Half of a teacher's completion, rounded up, and then the student: summed over the teacher's completions."""
    prompt, rows = (2, 3, 1), 5000
    expected: dict[tuple[int, ...], float] = {}
    for completion, chance in exact_law(tiny_pair, prompt, laws.teacher()).items():
        start = completion[: math.ceil(0.5 * len(completion))]
        if start == completion:
            expected[completion] = expected.get(completion, 0.0) + chance
            continue
        for rest, after in exact_law(tiny_pair, prompt + start, laws.student()).items():
            cut = start + rest[: HORIZON - len(start)]
            expected[cut] = expected.get(cut, 0.0) + chance * after
    assert sum(expected.values()) == pytest.approx(1.0)
    stops = {"eos_token_id": tiny_pair.student_eos, "teacher_eos_token_id": tiny_pair.teacher_eos}
    draw = partial(sample, tiny_pair.student, tiny_pair.teacher, max_new_tokens=HORIZON, **stops)
    found = from_teacher_prefixes(draw, [list(prompt)] * rows, 0.5, keys=[0] * rows, rollout_index=range(rows), seed=3)
    completions = [tuple(ids) for ids in found.completions]
    assert goodness_of_fit(completions, expected) > LEVEL
    for other in (laws.student(), laws.teacher()):
        assert goodness_of_fit(completions, exact_law(tiny_pair, prompt, other)) < LEVEL
    for row, weight in enumerate(found.stats.teacher_weight):
        assert len(weight) == len(completions[row])
        assert weight == sorted(weight, reverse=True)  # the teacher, and then the student
    assert found.stats.kl_teacher == [[]] * rows  # of the student's parts it is not known
