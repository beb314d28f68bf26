"""Turns after a tool's answer: their samples against the exact law, and against an oracle.

The toy asks with a turn of two tokens, such as `1 0`, and is answered by one. The oracle shares nothing with the
samplers but the random numbers, as in test_teacher_prompts.py. Seeds are fixed; drawn at random, a correct sampler
would fail one of the chi-square tests with probability below 1e-4.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from conftest import TinyPair
from reference import policies as laws
from reference.distributions import shared_events
from reference.sequences import Completion
from reference.statistics import goodness_of_fit
from test_sampling_exactness import LEVEL
from test_teacher_prompts import BUDGET, inverse, next_token

from trb.models.modeling import OutputHead
from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import NonFiniteLogitsError, Rollout, sample
from trb.sampling.uniforms import uniforms
from trb.tools.calls import Answer
from trb.tools.turns import LaterTurns, ToolSampler, Turns, take_turns

STOP = 0
LONGEST = 4
ASKS = {1: 3, 2: 5, 3: 1, 5: 2}  # what a turn of this token and the stop is answered by
LAW = laws.trust_region(BUDGET)
PROMPTS = [[1], [2, 3, 1], [2, 1]]
TAUGHT = [[2, 5, 1, 3], [3], [2, 1]]
N = 2_500
WAYS: list[dict[str, Any]] = [
    {"method": "lockstep"},
    {"block_size": 1},
    {"block_size": 3, "max_rows": 4},
    {"block_size": 4},
]


class Toy:
    """Stands for both a `ToolChat` and a `ToolBox`."""

    def calls(self, ids: Sequence[int], prefix: Sequence[int]) -> list[dict[str, Any]]:
        return [{"token": ids[0]}] if len(ids) == 2 and ids[1] == STOP and ids[0] in ASKS else []

    def answer(self, call: dict[str, Any]) -> Answer:
        return Answer("toy", str(ASKS[call["token"]]), failed=call["token"] == 2)

    def after(self, completion: list[int], answers: list[Answer]) -> list[int]:
        return [*completion, *(int(each.text) for each in answers)]


def draw(pair: TinyPair, most: int | None = None, longest: int = LONGEST, **changes: Any) -> tuple[Turns, Rollout]:
    prompts = changes.pop("prompts", PROMPTS)
    columns = {
        "prompts": prompts,
        "policy": [changes.pop("policy", TrustRegionPolicy(BUDGET))] * len(prompts),
        "prompt_keys": changes.pop("prompt_keys", [*range(len(prompts))]),
        "rollout_index": changes.pop("rollout_index", [0] * len(prompts)),
        "teacher_prompts": changes.pop("teacher_prompts", None),
    }
    options = {"eos_token_id": STOP, "teacher_eos_token_id": pair.teacher_eos, "seed": 3, **changes}
    sampler = partial(sample, pair.student, pair.teacher, max_new_tokens=longest, **options)
    rollout = sampler(**columns)
    toy: Any = Toy()
    return take_turns(rollout, toy, toy, LaterTurns(sampler, columns, longest), most=most), rollout


@cache
def exact_law(pair: TinyPair, prompt: tuple[int, ...], taught: tuple[int, ...]) -> dict[Completion, float]:
    """Of whole completions, answers included."""

    def grow(whole: Completion, turn: Completion, chance: float) -> Iterator[tuple[Completion, float]]:
        if len(turn) == 2 and turn[1] == STOP and turn[0] in ASKS and len(whole) < LONGEST:
            whole, turn = (*whole, ASKS[turn[0]]), ()
        if len(whole) == LONGEST or turn[-1:] == (STOP,):
            yield whole, chance
            return
        logits = next_token(pair.student, prompt + whole), next_token(pair.teacher, taught + whole)
        for token, p in enumerate(LAW(*shared_events(*logits, pair.student_eos, pair.teacher_eos))):
            if p > 0:
                yield from grow((*whole, token), (*turn, token), chance * float(p))

    return dict(grow((), (), 1.0))


@pytest.mark.parametrize("method", ["lockstep", "speculative"])
def test_whole_completions_have_the_exact_law_of_both_prompts(tiny_pair: TinyPair, method: str) -> None:
    """The law of all turns together: one that repeats another's random numbers would depend on it."""
    rows = [row for _ in range(N) for row in range(2)]
    turns, _ = draw(
        tiny_pair,
        prompts=[PROMPTS[row] for row in rows],
        teacher_prompts=[TAUGHT[row] for row in rows],
        prompt_keys=rows,
        rollout_index=[number for number in range(N) for _ in range(2)],
        method=method,
    )
    for row in range(2):
        completions = [tuple(ids) for ids in turns.completions[row::2]]
        own, its = tuple(PROMPTS[row]), tuple(TAUGHT[row])
        assert goodness_of_fit(completions, exact_law(tiny_pair, own, its)) > LEVEL
        assert goodness_of_fit(completions, exact_law(tiny_pair, own, own)) < LEVEL  # another teacher's prompt
    assert sum(0 in own for own in turns.own) > N / 10


def oracle(pair: TinyPair, prompt: Sequence[int], taught: Sequence[int], key: int, index: int, longest: int) -> Any:
    """One row by the rule of docs/method.md: whole, and the mask."""
    whole: list[int] = []
    own: list[int] = []
    turn: list[int] = []
    while len(whole) < longest and turn[-1:] != [STOP]:
        words = (torch.tensor([number]) for number in (key, index, len(whole)))
        u_draft, u_accept, u_residual = uniforms(3, *words)[0].tolist()
        logits = next_token(pair.student, (*prompt, *whole)), next_token(pair.teacher, (*taught, *whole))
        student, teacher = shared_events(*logits, pair.student_eos, pair.teacher_eos)
        mixed = LAW(student, teacher)
        token = inverse(student, u_draft)
        if u_accept * student[token] >= mixed[token]:
            token = inverse((mixed - student).clip(0), u_residual)
        whole, own, turn = [*whole, token], [*own, 1], [*turn, token]
        if len(turn) == 2 and turn[1] == STOP and turn[0] in ASKS and len(whole) < longest:
            whole, own, turn = [*whole, ASKS[turn[0]]], [*own, 0], []
    return whole, own


MANY = PROMPTS * 20, TAUGHT * 20, [row // 3 for row in range(60)]


@cache
def many(pair: TinyPair) -> list[tuple[list[int], list[int]]]:
    rows = zip(*MANY, strict=True)
    return [oracle(pair, own, its, key, index, 12) for key, (own, its, index) in enumerate(rows)]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_tokens_are_the_oracles(tiny_pair: TinyPair, options: dict[str, Any]) -> None:
    prompts, taught, index = MANY
    turns, rollout = draw(
        tiny_pair, longest=12, prompts=prompts, teacher_prompts=taught, rollout_index=index, **options
    )
    wanted = many(tiny_pair)
    assert [*zip(turns.completions, turns.own, strict=True)] == wanted
    own = [[token for token, ours in zip(*row, strict=True) if ours] for row in wanted]
    assert rollout.completions == own
    assert [*map(len, rollout.stats.teacher_weight)] == [*map(len, own)]
    rounds = [mask.count(0) for _, mask in wanted]
    assert max(rounds) >= 2 and min(rounds) == 0
    assert turns.calls == sum(rounds)
    assert turns.failures == sum(
        not ours and token == ASKS[2] for row in wanted for token, ours in zip(*row, strict=True)
    )


def test_a_row_is_the_same_alone_and_in_any_company(tiny_pair: TinyPair) -> None:
    """Two rows of the batch are alike in all but which rollout they are: nothing finds a row again by its tokens."""
    prompts, taught, index = MANY
    wanted = many(tiny_pair)
    asking = [row for row, (_, own) in enumerate(wanted) if 0 in own]
    for rows in (asking[:1], asking[1:4][::-1]):
        turns, _ = draw(
            tiny_pair,
            longest=12,
            prompts=[prompts[row] for row in rows],
            teacher_prompts=[taught[row] for row in rows],
            prompt_keys=rows,
            rollout_index=[index[row] for row in rows],
        )
        assert turns.completions == [wanted[row][0] for row in rows]


def test_kept_hidden_states_are_of_the_models_own_tokens(tiny_pair: TinyPair) -> None:
    prompts, taught, index = MANY
    turns, rollout = draw(
        tiny_pair,
        longest=12,
        prompts=prompts,
        teacher_prompts=taught,
        rollout_index=index,
        keep_teacher_hidden=True,
        block_size=3,
    )
    assert rollout.teacher_hidden is not None
    head = OutputHead.of(tiny_pair.teacher)
    rows = [row for row, own in enumerate(turns.own) if 0 in own][:3]
    for row in rows:
        whole, states = turns.completions[row], iter(head(rollout.teacher_hidden[row]))
        for place, ours in enumerate(turns.own[row]):
            if ours:
                wanted = torch.tensor(next_token(tiny_pair.teacher, (*taught[row], *whole[:place])))
                torch.testing.assert_close(next(states), wanted, rtol=1e-9, atol=1e-9)
        assert next(states, None) is None


def test_rounds_are_counted_and_an_answer_without_room_is_left_out(tiny_pair: TinyPair) -> None:
    prompts, taught, index = MANY
    columns: dict[str, Any] = {"prompts": prompts, "teacher_prompts": taught, "rollout_index": index}
    for most in (0, 1):
        turns, _ = draw(tiny_pair, longest=12, most=most, **columns)
        assert max(own.count(0) for own in turns.own) == most
    first, cut = draw(tiny_pair, longest=2, **columns)  # the call fills all there is
    assert first.calls and all(0 not in own for own in first.own)
    _, unasked = draw(tiny_pair, longest=2, most=0, **columns)
    assert unasked.stopped.count(True) - cut.stopped.count(True) == first.calls, "who got no answer has not stopped"
    full, rollout = draw(tiny_pair, longest=3, **columns)  # and here its answer does
    ended = [row for row, own in enumerate(full.own) if own == [1, 1, 0]]
    assert ended and not any(rollout.stopped[row] for row in ended)
    assert all(len(rollout.completions[row]) == 2 for row in ended)


def test_the_sampler_of_evaluations_takes_turns_too(tiny_pair: TinyPair) -> None:
    toy: Any = Toy()
    options: dict[str, Any] = {"eos_token_id": STOP, "teacher_eos_token_id": STOP, "seed": 3, "temperature": 4.0}
    sampler = ToolSampler(toy, toy)
    rollout = sampler(tiny_pair.student, None, PROMPTS * 20, StudentPolicy(), max_new_tokens=12, **options)
    wanted, _ = draw(tiny_pair, longest=12, prompts=PROMPTS * 20, policy=StudentPolicy(), **options)
    assert rollout.completions == [
        [token for token, ours in zip(ids, own, strict=True) if ours]
        for ids, own in zip(wanted.completions, wanted.own, strict=True)
    ]
    assert any(0 in own for own in wanted.own)


def test_a_model_without_a_law_in_a_later_turn_is_named_with_its_row() -> None:
    def lawless(**columns: Any) -> Rollout:
        raise NonFiniteLogitsError("student", row=1, position=7)

    later = LaterTurns(lawless, {"prompts": PROMPTS, "teacher_prompts": None}, LONGEST)
    with pytest.raises(NonFiniteLogitsError, match="token 7 of the completion of row 2") as raised:
        later([0, 2], [[1], [1]])
    assert (raised.value.row, raised.value.position) == (2, 7)
