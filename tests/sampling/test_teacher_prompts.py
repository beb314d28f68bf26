"""Teachers that read another prompt than the student's: their samples against the exact law, and against an oracle.

The oracle shares nothing with the samplers but the random numbers: one row at a time, each model in whole passes over
its own prompt and the completion so far, and in numpy from there (tests/reference). Seeds are fixed; drawn at random, a
correct sampler would fail one of the chi-square tests with probability below 1e-4 (`LEVEL` times 6).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyPair
from reference import policies as laws
from reference.distributions import Array, shared_events
from reference.policies import Law
from reference.sequences import Completion, Prefix, enumerate_completions
from reference.statistics import goodness_of_fit
from test_sampling_exactness import HORIZON, LEVEL
from tiny_models import build
from transformers import PreTrainedModel

from trb.models.modeling import OutputHead, rope_switch
from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import Rollout, sample
from trb.sampling.uniforms import uniforms

# Shorter and longer than the student's, ending in the same token and in others, and one that is equal.
PROMPTS = [[1], [2, 3, 1], [3, 5, 2, 2, 1], [2, 1]]
TAUGHT = [[2, 5, 1, 3, 1, 2], [3], [5, 3, 1], [2, 1]]
BUDGET = 0.3
WAYS: list[dict[str, Any]] = [
    {"method": "lockstep"},
    {"method": "lockstep", "max_rows": 3},
    {"block_size": 1},
    {"block_size": 3, "max_rows": 2},
    {"block_size": 4},
]
N = 4_000


@cache
def next_token(model: PreTrainedModel, tokens: tuple[int, ...]) -> Array:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0, -1].double().numpy()


def draw(pair: TinyPair, **changes: Any) -> Rollout:
    options = {
        "prompts": PROMPTS,
        "teacher_prompts": TAUGHT,
        "policy": TrustRegionPolicy(BUDGET),
        "max_new_tokens": HORIZON,
        "eos_token_id": pair.student_eos,
        "teacher_eos_token_id": pair.teacher_eos,
        "seed": 3,
    }
    return sample(pair.student, pair.teacher, **{**options, **changes})


def inverse(weights: Array, uniform: float) -> int:
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, uniform * sums[-1], side="right"))


def oracle(
    pair: TinyPair, prompt: Sequence[int], taught: Sequence[int], key: int, seed: int, limit: int, law: Law
) -> list[int]:
    """One completion, by the rule of docs/method.md."""
    completion: list[int] = []
    while len(completion) < limit and completion[-1:] != [pair.student_eos]:
        words = (torch.tensor([number]) for number in (key, 0, len(completion)))
        u_draft, u_accept, u_residual = uniforms(seed, *words)[0].tolist()
        logits = (next_token(pair.student, (*prompt, *completion)), next_token(pair.teacher, (*taught, *completion)))
        student, teacher = shared_events(*logits, pair.student_eos, pair.teacher_eos)
        mixed = law(student, teacher)
        token = inverse(student, u_draft)
        if u_accept * student[token] >= mixed[token]:
            token = inverse(np.maximum(mixed - student, 0), u_residual)
        completion.append(token)
    return completion


MANY = PROMPTS * 5, [TAUGHT[(row + row // 4) % 4] for row in range(20)]


@cache
def many(pair: TinyPair) -> list[list[int]]:
    return oracles(pair, *MANY, limit=7)


def oracles(pair: TinyPair, prompts: Any, taught: Any, limit: int) -> list[list[int]]:
    rows = enumerate(zip(prompts, taught, strict=True))
    law = laws.trust_region(BUDGET)
    return [oracle(pair, own, its, key, seed=3, limit=limit, law=law) for key, (own, its) in rows]


@pytest.mark.parametrize("method", ["lockstep", "speculative"])
def test_completions_have_the_exact_law_of_both_prompts(tiny_pair: TinyPair, method: str) -> None:
    """And not that of a teacher that reads the student's prompt, or of a student that reads the teacher's."""
    rows = [row for _ in range(N) for row in range(3)]
    index = [number for number in range(N) for _ in range(3)]
    out = draw(
        tiny_pair,
        prompts=[PROMPTS[row] for row in rows],
        teacher_prompts=[TAUGHT[row] for row in rows],
        prompt_keys=rows,
        rollout_index=index,
        method=method,
    )
    for row in range(3):
        completions = [tuple(ids) for ids in out.completions[row::3]]
        own, its = tuple(PROMPTS[row]), tuple(TAUGHT[row])
        assert goodness_of_fit(completions, exact_law(tiny_pair, own, its)) > LEVEL
        for wrong in ((own, own), (its, its)):
            assert goodness_of_fit(completions, exact_law(tiny_pair, *wrong)) < LEVEL


@cache
def exact_law(pair: TinyPair, prompt: tuple[int, ...], taught: tuple[int, ...]) -> dict[Completion, float]:
    @cache
    def both(prefix: Prefix) -> tuple[Array, Array]:
        logits = next_token(pair.student, prompt + prefix), next_token(pair.teacher, taught + prefix)
        return shared_events(*logits, pair.student_eos, pair.teacher_eos)

    return enumerate_completions(
        lambda prefix: both(prefix)[0],
        lambda prefix: both(prefix)[1],
        laws.trust_region(BUDGET),
        max_new_tokens=HORIZON,
        stop=pair.student_eos,
    )


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("family", ["tiny_pair", "gpt2_pair"])
def test_tokens_are_the_oracles(family: str, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Relative and learned positions; learned ones would notice if a model counted from the other's prompt."""
    pair: TinyPair = request.getfixturevalue(family)
    prompts, taught = MANY
    wanted = many(pair)
    assert draw(pair, prompts=prompts, teacher_prompts=taught, max_new_tokens=7, **options).completions == wanted
    assert draw(pair, prompts=prompts, teacher_prompts=None, max_new_tokens=7, **options).completions != wanted
    assert len({*map(len, wanted)}) > 3


@pytest.mark.parametrize("options", [WAYS[0], WAYS[3]], ids=str)
def test_each_model_crosses_its_own_switch_of_rotary_factors(options: dict[str, Any]) -> None:
    """LongRoPE: of some rows the student is beyond its switch first, of others the teacher; the switches differ too."""
    pair = TinyPair(build("phi3-longrope", seed=0), build("phi3-longrope", seed=1), 5, 5, 24)
    config = pair.teacher.config
    config.rope_parameters = {**config.rope_parameters, "original_max_position_embeddings": 9}
    config.original_max_position_embeddings = 9
    assert [rope_switch(model) for model in (pair.student, pair.teacher)] == [12, 9]
    lengths = [(2, 2), (10, 3), (3, 8), (13, 1), (1, 12), (14, 11), (9, 6)]
    rows = [[[1 + (7 * place + length) % 23 for place in range(length)] for length in pair] for pair in lengths]
    prompts, taught = map(list, zip(*rows, strict=True))
    wanted = oracles(pair, prompts, taught, limit=9)
    out = draw(pair, prompts=prompts, teacher_prompts=taught, max_new_tokens=9, keep_teacher_hidden=True, **options)
    assert out.completions == wanted
    assert [len(row) for row in out.stats.accepted] == [*map(len, wanted)]
    ends = [(own + len(ids), its + len(ids)) for (own, its), ids in zip(lengths, wanted, strict=True)]
    assert any(own > 13 and its < 9 for own, its in ends) or any(own < 12 and its > 10 for own, its in ends)


def test_kept_hidden_states_are_those_of_the_teachers_own_prompt(tiny_pair: TinyPair) -> None:
    out = draw(tiny_pair, keep_teacher_hidden=True, block_size=3, max_rows=2)
    assert out.teacher_hidden is not None
    head = OutputHead.of(tiny_pair.teacher)
    for taught, completion, hidden in zip(TAUGHT, out.completions, out.teacher_hidden, strict=True):
        own = [next_token(tiny_pair.teacher, (*taught, *completion[:place])) for place in range(len(completion))]
        np.testing.assert_allclose(head(hidden).numpy(), np.stack(own), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [WAYS[0], WAYS[3]], ids=str)
def test_a_completion_goes_on_where_both_models_were(tiny_pair: TinyPair, options: dict[str, Any]) -> None:
    whole = draw(tiny_pair, **options)
    rows = [row for row, ids in enumerate(whole.completions) if len(ids) > 1]
    rest = draw(
        tiny_pair,
        prompts=[PROMPTS[row] for row in rows],
        teacher_prompts=[TAUGHT[row] for row in rows],
        prompt_keys=rows,
        begun=[whole.completions[row][:1] for row in rows],
        **options,
    )
    assert len(rows) > 1
    assert rest.completions == [whole.completions[row][1:] for row in rows]


def test_the_same_prompts_for_both_are_no_other_prompts(tiny_pair: TinyPair) -> None:
    for options in WAYS:
        same, none = (draw(tiny_pair, teacher_prompts=taught, **options) for taught in (PROMPTS, None))
        assert same.completions == none.completions
        assert same.stats.teacher_weight == none.stats.teacher_weight


def test_the_student_draws_what_it_draws_alone(tiny_pair: TinyPair) -> None:
    """Random numbers are those of the student's prompt: where the teacher plays no part its prompt changes nothing."""
    alone = sample(
        tiny_pair.student, None, PROMPTS, StudentPolicy(), max_new_tokens=HORIZON, eos_token_id=[0, 4], seed=3
    )
    for budget in (StudentPolicy(), TrustRegionPolicy(0.0)):
        assert draw(tiny_pair, policy=budget).completions == alone.completions


def test_what_is_wrong_with_teacher_prompts_is_named(tiny_pair: TinyPair) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher_prompts": TAUGHT[:3]}, "teacher_prompts has 3 entries for 4 prompts"),
        ({"teacher_prompts": [[1], [], [1], [1]]}, "teacher prompt 1 is empty"),
        ({"teacher_prompts": [[1], [1], [1, 77], [1]]}, "teacher prompt 2 contains token id 77"),
        ({"teacher_prompts": [[1], [1] * 30, [1], [1]]}, "a teacher prompt of 30 tokens plus max_new_tokens=4 exceeds"),
        ({"engine": object()}, r"teacher_prompts: .* sample in this process \(engine=None\)"),
    ]
    for changes, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            draw(tiny_pair, **changes)
    with pytest.raises(ValueError, match="teacher=None"):
        sample(
            tiny_pair.student,
            None,
            PROMPTS,
            StudentPolicy(),
            teacher_prompts=TAUGHT,
            max_new_tokens=2,
            eos_token_id=0,
        )
