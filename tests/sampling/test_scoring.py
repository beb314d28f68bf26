"""Teacher-forced numbers, against the models called on one unpadded prefix at a time and the laws in numpy.

Nothing here is random beyond fixed seeds. The oracle shares no code with the package: plain forward passes, then
definitions (`reference`).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyPair, tiny_gpt2, tiny_llama
from exact_laws import POLICIES
from peft import LoraConfig, get_peft_model
from reference import policies as laws
from reference.distributions import Array, entropy, kl, shared_events
from reference.policies import Law
from transformers import PreTrainedModel

from trb import zoo
from trb.policies import (
    BehaviorPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    TrustRegionPolicy,
)
from trb.sampling import sample, scoring
from trb.sampling.scoring import TokenScores, score_completions
from trb.vocab import SharedVocabulary, head_rows, stop_token_ids

PROMPTS = [[1], [2, 3, 1, 5], [3, 5, 2, 2, 1, 1, 3], [2, 1]]
COMPLETIONS = [[3, 1, 2, 5, 0], [5], [], [1, 2, 0]]


def shared(pair: TinyPair) -> SharedVocabulary:
    sizes = (head_rows(pair.student), head_rows(pair.teacher))
    return SharedVocabulary.of(sizes, pair.student_eos, pair.teacher_eos)


def prefix_laws(
    pair: TinyPair, prefix: list[int], temperature: float, taught: list[int] | None = None
) -> tuple[Array, Array]:
    """Both models' probabilities of the next event after a prefix, the teacher's maybe after another: one plain forward
    pass each."""
    read = ((pair.student, prefix), (pair.teacher, taught or prefix))
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row])).logits[0, -1].double().numpy() for model, row in read]
    return shared_events(logits[0], logits[1], pair.student_eos, pair.teacher_eos, temperature)


def log(p: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(p)


def expected_numbers(
    pair: TinyPair, law: Law, temperature: float, teacher_prompts: list[list[int]] = PROMPTS
) -> dict[str, list[list[float]]]:
    numbers: dict[str, list[list[float]]] = {}
    for prompt, taught, completion in zip(PROMPTS, teacher_prompts, COMPLETIONS, strict=True):
        for name in ("student_log_prob", "teacher_log_prob", "behavior_log_prob", "student_entropy"):
            numbers.setdefault(name, []).append([])
        for name in ("teacher_entropy", "kl_student", "kl_teacher"):
            numbers.setdefault(name, []).append([])
        for place, token in enumerate(completion):
            written = completion[:place]
            student, teacher = prefix_laws(pair, prompt + written, temperature, taught + written)
            mu = law(student, teacher)
            for name, value in (
                ("student_log_prob", log(student)[token]),
                ("teacher_log_prob", log(teacher)[token]),
                ("behavior_log_prob", log(mu)[token]),
                ("student_entropy", entropy(log(student))),
                ("teacher_entropy", entropy(log(teacher))),
                ("kl_student", kl(log(mu), log(student))),
                ("kl_teacher", kl(log(mu), log(teacher))),
            ):
                numbers[name][-1].append(float(value))
    return numbers


def assert_close(ours: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    assert [len(row) for row in ours] == [len(row) for row in expected]
    for row, other in zip(ours, expected, strict=True):
        assert row == pytest.approx(other, abs=tolerance)


def scores_of(pair: TinyPair, **options: Any) -> TokenScores:
    """Of the completions that most tests score."""
    return score_completions(pair.student, pair.teacher, PROMPTS, COMPLETIONS, vocabulary=shared(pair), **options)


@pytest.mark.parametrize("max_rows", [None, 1])
def test_each_model_reads_its_own_prompt(tiny_pair: TinyPair, max_rows: int | None) -> None:
    taught = [[5, 2, 3, 3], [1], [2, 5], [3, 1, 1, 2, 5, 1]]
    policy, law = POLICIES["weight 0.3"]
    options = {"policy": policy, "vocabulary": shared(tiny_pair), "teacher_prompts": taught, "max_rows": max_rows}
    scores = score_completions(tiny_pair.student, tiny_pair.teacher, PROMPTS, COMPLETIONS, **options)
    for column, expected in expected_numbers(tiny_pair, law, 1.0, taught).items():
        assert_close(getattr(scores, column), expected, 1e-9)
    for wrong, complaint in (
        (taught[:3], "4 completions for 3 teacher_prompts"),
        ([[], *taught[1:]], "teacher prompt 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            score_completions(
                tiny_pair.student, tiny_pair.teacher, PROMPTS, COMPLETIONS, **{**options, "teacher_prompts": wrong}
            )


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("max_rows", [None, 1])
def test_tokens_that_the_teacher_wrote_have_its_law(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, max_rows: int | None, chunk: int
) -> None:
    """The student goes on from them; chunks may hold tokens of both."""
    monkeypatch.setattr(scoring, "default_chunk_tokens", lambda *_: chunk)
    theirs = [2, 1, 0, 0]
    policy, law = POLICIES["weight 0.3"]
    scores = scores_of(tiny_pair, policy=policy, teacher_tokens=theirs, max_rows=max_rows, top=1)
    before = expected_numbers(tiny_pair, lambda student, teacher: teacher, 1.0)
    after = expected_numbers(tiny_pair, law, 1.0)
    for column, rows in after.items():
        for row, count in enumerate(theirs):
            rows[row][:count] = before[column][row][:count]
        assert_close(getattr(scores, column), rows, 1e-9)
    assert scores.teacher_weight == [[1.0, 1.0, 0.3, 0.3, 0.3], [1.0], [], [0.3] * 3]
    assert scores.alternatives is not None
    assert all(found["behavior"] == found["teacher"] for found in scores.alternatives[0][:2])
    assert all(found["behavior"] != found["teacher"] for found in scores.alternatives[0][2:])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", POLICIES)
def test_numbers_are_those_of_the_definition_prefix_by_prefix(
    tiny_pair: TinyPair, name: str, temperature: float
) -> None:
    """Stop ids differ, heads are padded to different sizes, prompts are ragged, one completion is empty."""
    policy, law = POLICIES[name]
    scores = scores_of(tiny_pair, policy=policy, temperature=temperature)
    # The solver may stop up to a thousandth short of a binding budget; everything else is exact.
    binding = name.startswith("budget 0.")
    for column, expected in expected_numbers(tiny_pair, law, temperature).items():
        loose = binding and column in ("behavior_log_prob", "kl_student", "kl_teacher")
        assert_close(getattr(scores, column), expected, 1e-3 if loose else 1e-9)
    assert scores.alternatives is None
    assert scores.teacher_weight[2] == []
    if binding:
        assert 0 < scores.teacher_weight[0][0] < 1
    if name in ("student", "budget 0"):
        assert scores.teacher_weight[0] == [0.0] * 5
    if name in ("teacher", "budget inf"):
        assert scores.teacher_weight[0] == [1.0] * 5


@pytest.mark.parametrize("method", ["lockstep", "speculative"])
@pytest.mark.parametrize("policy", [TrustRegionPolicy(0.05), SKDPolicy(2, 0.6), TeacherPolicy()], ids=str)
def test_a_rollouts_numbers_are_the_samplers_own(gpt2_pair: TinyPair, policy: BehaviorPolicy, method: str) -> None:
    """Learned positions: a row shifted by its padding would see other models."""
    rollout = sample(
        gpt2_pair.student,
        gpt2_pair.teacher,
        [prompt for prompt in PROMPTS for _ in range(8)],
        policy,
        max_new_tokens=10,
        eos_token_id=gpt2_pair.student_eos,
        teacher_eos_token_id=gpt2_pair.teacher_eos,
        temperature=0.9,
        seed=3,
        method=method,
    )
    scores = score_completions(
        gpt2_pair.student,
        gpt2_pair.teacher,
        rollout.prompts,
        rollout.completions,
        policy=policy,
        vocabulary=shared(gpt2_pair),
        temperature=0.9,
        max_rows=5,
    )
    for name in ("teacher_weight", "kl_student", "kl_teacher"):
        assert_close(getattr(scores, name), getattr(rollout.stats, name), 1e-5)
    assert min(min(row) for row in scores.behavior_log_prob) > -30  # every token could be drawn


def test_the_embedded_pair_repeats_its_samplers_numbers_in_float32() -> None:
    (student, tokenizer), (teacher, _) = zoo.load("student"), zoo.load("teacher")
    stops = stop_token_ids(student, tokenizer), stop_token_ids(teacher)
    vocabulary = SharedVocabulary.of((head_rows(student), head_rows(teacher)), *stops)
    prompts = [tokenizer.encode(text) for text in ("3+5-2", "1-9+4+4", "7+7")] * 4
    policy = TrustRegionPolicy(0.02)
    rollout = sample(
        student, teacher, prompts, policy, max_new_tokens=32, eos_token_id=stops[0], teacher_eos_token_id=stops[1]
    )
    scores = score_completions(
        student, teacher, rollout.prompts, rollout.completions, policy=policy, vocabulary=vocabulary
    )
    for name in ("teacher_weight", "kl_student", "kl_teacher"):
        # A budget is met within a thousandth, and where in that window the search ends may turn on rounding.
        assert_close(getattr(scores, name), getattr(rollout.stats, name), 5e-3)


def test_alternatives_are_the_likeliest_tokens_of_each_law(tiny_pair: TinyPair) -> None:
    scores = scores_of(tiny_pair, policy=TrustRegionPolicy(0.02), top=3)
    assert scores.alternatives is not None
    assert [len(row) for row in scores.alternatives] == [5, 1, 0, 3]
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        for place in range(len(completion)):
            student, teacher = prefix_laws(tiny_pair, prompt + completion[:place], 1.0)
            mu = laws.trust_region(0.02)(student, teacher)
            for name, law, tolerance in (
                ("student", student, 1e-9),
                ("teacher", teacher, 1e-9),
                ("behavior", mu, 1e-3),
            ):
                found = scores.alternatives[row][place][name]
                best = sorted(range(len(law)), key=lambda token: -law[token])[:3]
                assert [token for token, _ in found] == best
                assert [probability for _, probability in found] == pytest.approx(law[best], abs=tolerance)


def test_alternatives_leave_out_impossible_tokens(tiny_pair: TinyPair) -> None:
    """Asked for more than there are: the folded stop id has no probability of its own and is not listed."""
    scores = score_completions(
        tiny_pair.student,
        tiny_pair.teacher,
        [[1]],
        [[2]],
        policy=StudentPolicy(),
        vocabulary=shared(tiny_pair),
        top=50,
    )
    assert scores.alternatives is not None
    for found in scores.alternatives[0][0].values():
        assert sorted(token for token, _ in found) == [0, 1, 2, 3, 5]
        assert sum(probability for _, probability in found) == pytest.approx(1.0)


def test_every_stop_id_counts_as_the_stop_event(tiny_pair: TinyPair) -> None:
    """A completion from an engine that emitted the teacher's stop id scores like one with the student's."""

    def scored(stop: int) -> TokenScores:
        return score_completions(
            tiny_pair.student,
            tiny_pair.teacher,
            [[1, 2]],
            [[3, stop]],
            policy=TrustRegionPolicy(0.1),
            vocabulary=shared(tiny_pair),
        )

    ours, other = scored(tiny_pair.student_eos), scored(tiny_pair.teacher_eos)
    assert ours.student_log_prob == other.student_log_prob
    assert ours.behavior_log_prob == other.behavior_log_prob
    assert math.isfinite(other.student_log_prob[0][1])


def test_rows_and_chunks_do_not_change_the_numbers(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(max_rows: int | None) -> TokenScores:
        return scores_of(tiny_pair, policy=TrustRegionPolicy(0.02), top=2, max_rows=max_rows)

    whole = scored(None)
    monkeypatch.setattr("trb.sampling.scoring.default_chunk_tokens", lambda size, device: 2)
    for max_rows in (None, 1, 3):
        part = scored(max_rows)
        assert_close(part.behavior_log_prob, whole.behavior_log_prob, 1e-9)
        assert_close(part.teacher_entropy, whole.teacher_entropy, 1e-9)
        assert part.alternatives is not None and whole.alternatives is not None
        ids = [
            [{name: [token for token, _ in found] for name, found in place.items()} for row in scores for place in row]
            for scores in (part.alternatives, whole.alternatives)
        ]
        assert ids[0] == ids[1]


def test_no_rows_and_only_empty_completions(tiny_pair: TinyPair) -> None:
    for prompts in ([], [[1], [2, 3]]):
        scores = score_completions(
            tiny_pair.student,
            tiny_pair.teacher,
            prompts,
            [[] for _ in prompts],
            policy=StudentPolicy(),
            vocabulary=shared(tiny_pair),
            top=2,
        )
        empty: list[list[float]] = [[] for _ in prompts]
        assert scores.student_log_prob == scores.alternatives == scores.kl_teacher == empty


def test_models_are_read_in_eval_mode_and_left_as_they_were(tiny_pair: TinyPair) -> None:
    noisy = tiny_llama(6, seed=41, dropout=0.5)  # the pair's student, with dropout on its attention
    noisy.train()
    state = torch.random.get_rng_state()
    arguments = {"policy": TrustRegionPolicy(0.02), "vocabulary": shared(tiny_pair)}
    noisy_scores = score_completions(noisy, tiny_pair.teacher, PROMPTS, COMPLETIONS, **arguments)
    assert noisy.training and not tiny_pair.teacher.training
    assert torch.equal(state, torch.random.get_rng_state())
    exact = score_completions(tiny_pair.student, tiny_pair.teacher, PROMPTS, COMPLETIONS, **arguments)
    assert noisy_scores.student_log_prob == exact.student_log_prob


def test_adapters_take_part(tiny_pair: TinyPair) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(
        tiny_llama(6, seed=41), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).double()

    def student_log_prob(student: PreTrainedModel) -> list[float]:
        return score_completions(
            student, tiny_pair.teacher, [[1, 2]], [[3, 1]], policy=StudentPolicy(), vocabulary=shared(tiny_pair)
        ).student_log_prob[0]

    row = torch.tensor([[1, 2, 3, 1]])
    with torch.no_grad():
        logits = adapted.eval()(input_ids=row).logits[0, 1:3].numpy()
    expected = [log(shared_events(step, step, 0, 4)[0])[token] for step, token in zip(logits, [3, 1], strict=True)]
    assert student_log_prob(adapted) == pytest.approx(expected, abs=1e-9)
    assert student_log_prob(tiny_pair.student) != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": [[1]]}, "1 completions for 2 prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"completions": [[1], [2, 6]]}, "row 1 contains token id 6"),
        ({"prompts": [[-1], [2]]}, "row 0 contains token id -1"),
        ({"temperature": 0.0}, "temperature must be positive and finite .*, got 0.0"),
        ({"top": -1}, "top must be at least 0, got -1"),
        ({"teacher_tokens": [1]}, "teacher_tokens has 1 entries for 2 completions"),
        ({"teacher_tokens": [1, 2]}, "teacher_tokens is 2 for row 1, whose completion has 1 tokens"),
        ({"teacher_tokens": [-1, 0]}, "teacher_tokens is -1 for row 0"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"vocabulary": SharedVocabulary(7, 0, (4,))}, "the student's head has 6 rows, fewer than the 7"),
    ],
)
def test_invalid_arguments(tiny_pair: TinyPair, change: dict, message: str) -> None:
    arguments = {
        "prompts": [[1], [2]],
        "completions": [[1], [2]],
        "policy": StudentPolicy(),
        "vocabulary": shared(tiny_pair),
    }
    with pytest.raises(ValueError, match=message):
        score_completions(tiny_pair.student, tiny_pair.teacher, **{**arguments, **change})


def test_learned_positions_start_at_the_first_real_token() -> None:
    """Rows of one batch score as they do alone, whatever the others' lengths."""
    pair = TinyPair(tiny_gpt2(6, seed=1), tiny_gpt2(8, seed=2))
    score: Callable[..., TokenScores] = score_completions
    arguments = {"policy": TrustRegionPolicy(0.1), "vocabulary": shared(pair)}
    together = score(pair.student, pair.teacher, PROMPTS, COMPLETIONS, **arguments)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        alone = score(pair.student, pair.teacher, [prompt], [completion], **arguments)
        assert together.teacher_log_prob[row] == pytest.approx(alone.teacher_log_prob[0], abs=1e-9)
