"""Blended requests inside a serving engine, without one: the tokens are the in-process ones, whatever is scheduled.

A small stand-in runs the two models and schedules at random what real engines do: all of a draft, part of it, padding
in its place, nothing, a row put off for a while. Equality with the lockstep sampler holds token for token in float64.
"""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from conftest import TinyPair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trb.policies import (
    BehaviorPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    TemperaturePolicy,
    TrustRegionPolicy,
)
from trb.sampling import Rollout, sample
from trb.sampling.vllm import ServedEngine
from trb.sampling.vllm.verification import BlendRequest, BlendRow, BlendState, Proposal
from trb.vocab import SharedVocabulary

PROMPTS = [[1], [2, 3, 1], [3, 5, 2, 2, 1], [5, 5], [1, 2]]
LENGTH = 7
POLICIES: list[BehaviorPolicy] = [
    StudentPolicy(),
    TemperaturePolicy(0.8),
    TrustRegionPolicy(0.05),
    TrustRegionPolicy(math.inf),
    SKDPolicy(2, 0.6),
    TeacherPolicy(),
]


def requests(pair: TinyPair, policies: Sequence[BehaviorPolicy], temperature: float = 1.0) -> list[BlendRequest]:
    vocabulary = SharedVocabulary.of((pair.rows,), pair.student_eos, pair.teacher_eos)
    return [
        BlendRequest(f"row {row}", policy, vocabulary, temperature, LENGTH, 7, 10 + row, row % 2)
        for row, policy in enumerate(policies)
    ]


def in_process(pair: TinyPair, policies: Sequence[BehaviorPolicy], temperature: float = 1.0) -> list[Rollout]:
    return [
        sample(
            pair.student,
            pair.teacher,
            [PROMPTS[row]],
            policy,
            max_new_tokens=LENGTH,
            eos_token_id=pair.student_eos,
            teacher_eos_token_id=pair.teacher_eos,
            temperature=temperature,
            seed=7,
            prompt_keys=[10 + row],
            rollout_index=[row % 2],
            method="lockstep",
        )
        for row, policy in enumerate(policies)
    ]


def logits(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


class Engine:
    """Schedules by `choices`: how many rows run, how much is drafted, and what becomes of the drafts."""

    def __init__(self, pair: TinyPair, requests: Sequence[BlendRequest], choices: random.Random) -> None:
        self.pair, self.choices = pair, choices
        self.state = BlendState()
        self.state.admit({request.name: request for request in requests})
        self.prompts = {request.name: PROMPTS[row] for row, request in enumerate(requests)}

    def run(self) -> dict[str, dict]:
        names = list(self.prompts)
        for _ in range(200):
            live = [name for name in names if name in self.state.rows and not self.state.rows[name].finished]
            if not live:
                return self.state.take_records(names)
            self.step(self.choices.sample(live, self.choices.randint(1, len(live))))
        raise AssertionError("the engine made no progress")

    def step(self, names: list[str]) -> None:
        rows = [self.state.rows[name] for name in names]
        for name, row in zip(names, rows, strict=True):
            if not row.drafted_here():
                self.draft([name], 1)
        scheduled = [self.schedule(row) for row in rows]
        lines = []
        for name, row, after in zip(names, rows, scheduled, strict=True):
            known = [*self.prompts[name], *row.tokens]
            lines.append(logits(self.pair.teacher, [*known, *after])[len(known) - 1 :])
        new = self.state.decide(rows, scheduled, torch.cat(lines))
        assert all(new)
        going = [name for name, row in zip(names, rows, strict=True) if not row.finished]
        if going and self.choices.random() < 0.8:
            self.draft(going, self.choices.randint(1, 4))

    def schedule(self, row: BlendRow) -> list[int]:
        assert row.draft is not None
        tokens = list(row.draft.tokens)
        fate = self.choices.choice(["all", "part", "padding", "spoilt", "none"])
        if fate == "part":
            return tokens[: self.choices.randint(0, len(tokens))]
        if fate == "padding":
            return [1] * len(tokens)
        if fate == "spoilt":
            tokens[-1] = (tokens[-1] + 1) % self.pair.rows
        return [] if fate == "none" else tokens

    def draft(self, names: list[str], count: int) -> None:
        rows = [self.state.rows[name] for name in names]
        proposal = Proposal(rows, [len(row.tokens) for row in rows], [True] * len(rows))
        ahead = [[*self.prompts[name], *row.tokens] for name, row in zip(names, rows, strict=True)]
        for _ in range(count):
            drawn = proposal.step(torch.stack([logits(self.pair.student, tokens)[-1] for tokens in ahead]))
            for tokens, token in zip(ahead, drawn.tolist(), strict=True):
                tokens.append(token)
        proposal.file()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), shift=st.integers(0, len(POLICIES) - 1), temperature=st.sampled_from([1.0, 0.7]))
def test_whatever_is_scheduled_the_completions_are_those_of_lockstep(
    tiny_pair: TinyPair, seed: int, shift: int, temperature: float
) -> None:
    """Rows of different policies share each batch; the record is that of the in-process sampler as well."""
    policies = [POLICIES[(row + shift) % len(POLICIES)] for row in range(len(PROMPTS))]
    blended = requests(tiny_pair, policies, temperature)
    found = Engine(tiny_pair, blended, random.Random(seed)).run()
    for request, expected in zip(blended, in_process(tiny_pair, policies, temperature), strict=True):
        record = found[request.name]
        assert record["tokens"] == expected.completions[0]
        for name in ("teacher_weight", "kl_student", "kl_teacher", "accepted"):
            row = getattr(expected.stats, name)[0]
            # In process a policy that needs no teacher is never shown one; nor is it here.
            assert len(record[name]) == len(row)
            assert record[name] == pytest.approx(row, rel=1e-6, abs=1e-9)


def test_a_request_survives_its_journey_as_text(tiny_pair: TinyPair) -> None:
    for request in requests(tiny_pair, POLICIES):
        assert BlendRequest.from_text(request.to_text()) == request


@pytest.mark.parametrize("name", ["MyPolicy", "TrustRegionPolicy"])
def test_a_policy_of_ones_own_is_refused_by_its_class_before_anything_is_sent(tiny_pair: TinyPair, name: str) -> None:
    """Also one that is called as one of ours: the engine would sample ours in its place."""
    own = type(name, (TrustRegionPolicy,), {"__module__": "my.policies"})(0.1)
    engine = ServedEngine("http://127.0.0.1:1", "nobody listens there")
    student, teacher = tiny_pair.student, tiny_pair.teacher
    with pytest.raises(ValueError, match=rf"my\.policies\.{name} cannot be sampled inside vLLM.*vllm_blended=False"):
        sample(student, teacher, [[1]], own, max_new_tokens=2, eos_token_id=tiny_pair.student_eos, engine=engine)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"policy": {"name": "NoPolicy"}}'])
def test_text_that_is_no_request_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a blended request.*BlendRequest\.to_text"):
        BlendRequest.from_text(text)


def test_a_request_for_nothing_is_refused(tiny_pair: TinyPair) -> None:
    text = requests(tiny_pair, [StudentPolicy()])[0].to_text()
    with pytest.raises(ValueError, match="max_new_tokens cannot be 0"):
        BlendRequest.from_text(text.replace(f'"max_new_tokens": {LENGTH}', '"max_new_tokens": 0'))


def test_nothing_is_sampled_where_the_student_has_not_spoken(tiny_pair: TinyPair) -> None:
    state = BlendState()
    state.admit({"a": requests(tiny_pair, [TrustRegionPolicy(0.1)])[0]})
    with pytest.raises(RuntimeError, match="no draft at position 0"):
        state.decide([state.rows["a"]], [[]], torch.zeros(1, tiny_pair.rows))


def test_records_are_taken_once_and_rows_forgotten(tiny_pair: TinyPair) -> None:
    blended = requests(tiny_pair, [StudentPolicy(), StudentPolicy()])
    engine = Engine(tiny_pair, blended, random.Random(0))
    assert set(engine.run()) == {"row 0", "row 1"}
    with pytest.raises(KeyError, match="'row 0'"):
        engine.state.take_records(["row 0"])
    engine.state.keep_only(["row 1"])
    assert list(engine.state.rows) == ["row 1"]


def test_counters_tell_what_the_engine_did_to_drafts(tiny_pair: TinyPair) -> None:
    blended = requests(tiny_pair, [TrustRegionPolicy(0.1)] * 3)
    engine = Engine(tiny_pair, blended, random.Random(1))
    names = list(engine.prompts)
    engine.draft(names, 3)
    rows = [engine.state.rows[name] for name in names]
    scheduled = [list(rows[0].draft.tokens), [], [(rows[2].draft.tokens[0] + 1) % 6, 0, 0]]  # type: ignore[union-attr]
    lines = [
        logits(tiny_pair.teacher, [*engine.prompts[name], *after])[len(engine.prompts[name]) - 1 :]
        for name, after in zip(names, scheduled, strict=True)
    ]
    new = engine.state.decide(rows, scheduled, torch.cat(lines))
    assert [len(tokens) for tokens in new[1:]] == [1, 1]
    assert engine.state.counters == {"steps": 1, "drafts_not_scheduled": 2, "decided": sum(map(len, new))}


def test_the_plugin_without_vllm_or_with_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from trb.sampling.vllm import BlendEngine
    from trb.sampling.vllm import plugin as vllm_plugin

    for found, said in ((None, "it is not installed"), ("0.31.0", "0.31.0 is installed")):
        monkeypatch.setattr(vllm_plugin, "installed_version", lambda found=found: found)
        vllm_plugin.register()  # leaves ordinary engines alone
        for refused in (lambda: BlendEngine("student", "teacher"), lambda: vllm_plugin.BlendWorker):
            with pytest.raises(ImportError, match=rf"needs vLLM 0\.32\.0.*{said}.*pip install vllm==0\.32\.0"):
                refused()
