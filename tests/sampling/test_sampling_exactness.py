"""Samples against the exact law: every completion of tiny models enumerated, chi-square goodness of fit.

The exact law is built from plain full forward passes over all prefixes of one length, without cache or padding, and
from there in numpy. Prompts of different lengths share every batch. Seeds are fixed, so these tests pass or fail for
good; had they been drawn at random, a correct sampler would fail this file with probability below 1e-3
(`LEVEL` times fewer than 80 chi-square tests, plus 5-sigma bounds of 6e-7 each).

How many rollouts of each prompt: 5,000 (`MANY`) of a budget of 0.5 find another that is a third too large with
probability 0.999 (with 2,500 it would be 0.54), and laws that are off by 15% (the root of the chi-square distance) with
0.99. Every other law gets 2,500, which find 19%; any two policies here are further apart. These are of the lockstep
sampler. The speculative one must draw the very same tokens in the first 1,000, which finds a mistake that changes one
rollout in a hundred with probability 1 - 4e-5.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STUDENT_ROWS, TEACHER_ROWS, TinyPair, random_model, tiny_llama
from exact_laws import POLICIES
from reference import blend as oracle
from reference import policies as laws
from reference.distributions import Array, shared_events
from reference.policies import Law
from reference.sequences import Completion, Prefix, enumerate_completions
from reference.statistics import goodness_of_fit
from tiny_models import tiny_config
from transformers import LlamaForCausalLM, MambaForCausalLM, Qwen3_5ForCausalLM

from trb.policies import (
    BehaviorPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    TemperaturePolicy,
    TrustRegionPolicy,
)
from trb.sampling import Rollout, sample

LEVEL = 1.2e-5
SIGMAS = 5.0
METHODS = ["lockstep", "speculative"]
PROMPTS = ((1,), (2, 3, 1), (3, 5, 2, 2, 1))
HORIZON = 4
MANY, N, SAME = 5_000, 2_500, 1_000

every_method = pytest.mark.parametrize("method", METHODS)
every_prompt = pytest.mark.parametrize("prompt", range(len(PROMPTS)))


@cache
def next_token_logits(pair: TinyPair, prompt: tuple[int, ...], length: int) -> dict[Prefix, tuple[Array, Array]]:
    """Both models' logits after every prefix of so many tokens."""
    prefixes = list(product(range(pair.rows), repeat=length))
    rows = torch.tensor([prompt + prefix for prefix in prefixes])
    with torch.no_grad():
        student, teacher = (model(input_ids=rows).logits[:, -1] for model in (pair.student, pair.teacher))
    return dict(zip(prefixes, zip(student.double().numpy(), teacher.double().numpy(), strict=True), strict=True))


def conditionals(
    pair: TinyPair, prompt: tuple[int, ...], temperature: float = 1.0
) -> tuple[Callable[[Prefix], Array], Callable[[Prefix], Array]]:
    """The two models' probabilities of the next event after a prefix of the completion."""

    @cache
    def both(prefix: Prefix) -> tuple[Array, Array]:
        student, teacher = next_token_logits(pair, prompt, len(prefix))[prefix]
        student, teacher = student[: pair.rows], teacher[: pair.rows]
        return shared_events(student, teacher, pair.student_eos, pair.teacher_eos, temperature)

    return (lambda prefix: both(prefix)[0]), (lambda prefix: both(prefix)[1])


@cache
def exact_law(pair: TinyPair, prompt: tuple[int, ...], law: Law, temperature: float = 1.0) -> dict[Completion, float]:
    student, teacher = conditionals(pair, prompt, temperature)
    return enumerate_completions(student, teacher, law, max_new_tokens=HORIZON, stop=pair.student_eos)


def rollouts(pair: TinyPair, policy: BehaviorPolicy | list[BehaviorPolicy], n: int, **options: Any) -> Rollout:
    """n rollouts of each prompt, interleaved so that every batch is ragged."""
    arguments = {
        "max_new_tokens": HORIZON,
        "eos_token_id": pair.student_eos,
        "teacher_eos_token_id": pair.teacher_eos,
        "seed": 7,
        "prompt_keys": [10, 11, 12] * n,
        "rollout_index": [index for index in range(n) for _ in PROMPTS],
    }
    prompts = [list(prompt) for _ in range(n) for prompt in PROMPTS]
    return sample(pair.student, pair.teacher, prompts, policy, **{**arguments, **options})


def of_prompt(rollout: Rollout, prompt: int) -> list[Completion]:
    return [tuple(completion) for completion in rollout.completions[prompt :: len(PROMPTS)]]


@cache
def drawn(pair: TinyPair, name: str, method: str) -> Rollout:
    if name == "budget 0" or method == "speculative":  # the student, to the last bit; what lockstep draws
        n = SAME
    else:
        n = MANY if (name, type(pair.student)) == ("budget 0.5", LlamaForCausalLM) else N
    return rollouts(pair, POLICIES[name][0], n, method=method)


def assert_lockstep_has_the_law_and_speculative_its_tokens(
    pair: TinyPair, policy: BehaviorPolicy, exact: Callable[[tuple[int, ...]], dict[Completion, float]], **options: Any
) -> Rollout:
    """Gives what lockstep drew."""
    out = rollouts(pair, policy, N, method="lockstep", **options)
    rows = SAME * len(PROMPTS)
    fewer = {name: value[:rows] if isinstance(value, list) else value for name, value in options.items()}
    again = rollouts(pair, policy, SAME, method="speculative", **fewer)
    assert again.completions == out.completions[:rows]
    for prompt, tokens in enumerate(PROMPTS):
        assert goodness_of_fit(of_prompt(out, prompt), exact(tokens)) > LEVEL
    return out


# --- the law ------------------------------------------------------------------------------------


@every_method
@every_prompt
@pytest.mark.parametrize("name", POLICIES)
def test_completions_have_the_exact_law(tiny_pair: TinyPair, name: str, prompt: int, method: str) -> None:
    samples = of_prompt(drawn(tiny_pair, name, method), prompt)
    law = exact_law(tiny_pair, PROMPTS[prompt], POLICIES[name][1])
    assert sum(law.values()) == pytest.approx(1.0)
    assert len(law) == 341  # 1 + 4 + 16 + 64 that stop, 256 that do not
    assert goodness_of_fit(samples, law) > LEVEL
    assert samples[:SAME] == of_prompt(drawn(tiny_pair, name, "lockstep"), prompt)[:SAME]


@every_method
def test_every_row_has_the_law_of_its_own_policy(tiny_pair: TinyPair, method: str) -> None:
    """Three policies in turn over the rollouts of each prompt: each draws what it draws alone, whose law is tested."""
    names, n = ["student", "budget 0.5", "weight 0.3"], 300
    policies = [POLICIES[names[index % 3]][0] for index in range(n) for _ in PROMPTS]
    out = rollouts(tiny_pair, policies, n, method=method, max_rows=64)
    for place, name in enumerate(names):
        alone = drawn(tiny_pair, name, method)
        for prompt in range(len(PROMPTS)):
            assert of_prompt(out, prompt)[place::3] == of_prompt(alone, prompt)[place:n:3]
    weights = out.stats.teacher_weight
    assert all(weight == 0 for row in weights[0::9] for weight in row)
    assert all(weight == pytest.approx(0.3) for row in weights[6::9] for weight in row)


def test_policies_of_rows_are_checked(tiny_pair: TinyPair) -> None:
    with pytest.raises(ValueError, match="policy has 2 entries for 3 prompts"):
        rollouts(tiny_pair, [StudentPolicy()] * 2, 1)
    options: dict[str, Any] = {"max_new_tokens": 2, "eos_token_id": tiny_pair.student_eos}
    with pytest.raises(ValueError, match=r"TrustRegionPolicy\(kl_budget=0.1\) needs a teacher"):
        sample(tiny_pair.student, None, [[1], [2]], [StudentPolicy(), TrustRegionPolicy(0.1)], **options)


@every_prompt
def test_the_chi_square_tells_any_two_policies_apart(tiny_pair: TinyPair, prompt: int) -> None:
    """Power: samples of one policy are rejected under the law of every other."""
    compared = 0
    for sampled, assumed in permutations(set(POLICIES) - {"budget 0", "budget inf"}, 2):  # student and teacher again
        law = exact_law(tiny_pair, PROMPTS[prompt], POLICIES[assumed][1])
        assert goodness_of_fit(of_prompt(drawn(tiny_pair, sampled, METHODS[0]), prompt), law) < LEVEL
        compared += 1
    assert compared == 42


@every_prompt
def test_the_chi_square_sees_small_mistakes(tiny_pair: TinyPair, prompt: int) -> None:
    """Power: a budget a third too large, a split stop event and a student one token behind are rejected."""
    samples = of_prompt(drawn(tiny_pair, "budget 0.5", METHODS[0]), prompt)
    tokens = PROMPTS[prompt]
    student, teacher = conditionals(tiny_pair, tokens)
    options: dict[str, Any] = {"max_new_tokens": HORIZON, "stop": tiny_pair.student_eos}
    larger_budget = exact_law(tiny_pair, tokens, laws.trust_region(0.66))
    stale = enumerate_completions(lambda p: student(p[:-1]), lambda p: teacher(p), laws.trust_region(0.5), **options)

    @cache
    def unaligned(side: int, prefix: Prefix) -> Array:
        logits = next_token_logits(tiny_pair, tokens, len(prefix))[prefix][side][: tiny_pair.rows]
        return shared_events(logits, logits, tiny_pair.student_eos, tiny_pair.student_eos)[0]

    split_stop = enumerate_completions(
        lambda p: unaligned(0, p), lambda p: unaligned(1, p), laws.trust_region(0.5), **options
    )
    for wrong in (larger_budget, stale, split_stop):
        assert goodness_of_fit(samples, wrong) < LEVEL


def test_temperature_sharpens_both_models_before_their_stop_ids_are_merged(tiny_pair: TinyPair) -> None:
    """What is shared are the models' own laws at the temperature: stopping gets the sum of what its ids have there."""
    blend = laws.trust_region(1.0)
    out = assert_lockstep_has_the_law_and_speculative_its_tokens(
        tiny_pair,
        TrustRegionPolicy(1.0),
        lambda tokens: exact_law(tiny_pair, tokens, blend, temperature=0.5),
        temperature=0.5,
    )
    sharpen = laws.temperature(0.5)

    def of_the_student_only(p: Array, q: Array) -> Array:
        return blend(sharpen(p, p), q)

    def of_the_merged_events(p: Array, q: Array) -> Array:
        return blend(sharpen(p, p), sharpen(q, q))

    for prompt, tokens in enumerate(PROMPTS):
        samples = of_prompt(out, prompt)
        for wrong in (of_the_student_only, of_the_merged_events):
            assert goodness_of_fit(samples, exact_law(tiny_pair, tokens, wrong)) < LEVEL


@every_method
@pytest.mark.parametrize("name", ["student", "budget 0.5"])
def test_learned_positions_count_from_the_first_prompt_token(gpt2_pair: TinyPair, name: str, method: str) -> None:
    out, lockstep = drawn(gpt2_pair, name, method), drawn(gpt2_pair, name, "lockstep")
    for prompt, tokens in enumerate(PROMPTS):
        samples = of_prompt(out, prompt)
        assert goodness_of_fit(samples, exact_law(gpt2_pair, tokens, POLICIES[name][1])) > LEVEL
        assert samples[:SAME] == of_prompt(lockstep, prompt)[:SAME]


def test_float32_models(tiny_pair: TinyPair) -> None:
    single = TinyPair(tiny_llama(6, seed=41).float(), tiny_pair.teacher)
    policy, law = POLICIES["budget 0.02"]
    assert_lockstep_has_the_law_and_speculative_its_tokens(
        single, policy, lambda tokens: exact_law(tiny_pair, tokens, law)
    )


def test_rows_that_differ_in_their_prompt_key_alone_are_independent(tiny_pair: TinyPair) -> None:
    policy, law = POLICIES["budget 0.02"]
    assert_lockstep_has_the_law_and_speculative_its_tokens(
        tiny_pair,
        policy,
        lambda tokens: exact_law(tiny_pair, tokens, law),
        prompt_keys=list(range(3 * N)),
        rollout_index=[0] * 3 * N,
    )


def test_calls_that_differ_in_their_seed_alone_are_independent(tiny_pair: TinyPair) -> None:
    policy, law = POLICIES["budget 0.02"]
    outs = [rollouts(tiny_pair, policy, N // 10, method="lockstep", seed=seed) for seed in range(10)]
    for prompt, tokens in enumerate(PROMPTS):
        samples = [completion for out in outs for completion in of_prompt(out, prompt)]
        assert goodness_of_fit(samples, exact_law(tiny_pair, tokens, law)) > LEVEL
    again = rollouts(tiny_pair, policy, N // 10, method="speculative", seed=9)
    assert again.completions == outs[9].completions


# --- what the record says about them ------------------------------------------------------------


@every_method
@pytest.mark.parametrize("name", POLICIES)
def test_completions_end_with_the_students_stop_id_or_at_the_limit(tiny_pair: TinyPair, name: str, method: str) -> None:
    out = drawn(tiny_pair, name, method)
    stop = tiny_pair.student_eos
    for completion, stopped in zip(out.completions, out.stopped, strict=True):
        assert 1 <= len(completion) <= HORIZON
        assert stop not in completion[:-1]
        assert stopped == (completion[-1] == stop)
        assert stopped or len(completion) == HORIZON
        assert all(0 <= token < tiny_pair.rows and token != tiny_pair.teacher_eos for token in completion)
    assert any(out.stopped)
    assert not all(out.stopped)
    for field in ("teacher_weight", "kl_student", "accepted"):
        assert [len(row) for row in getattr(out.stats, field)] == [len(row) for row in out.completions]


@every_method
def test_recorded_weights_and_divergences_are_those_of_the_prefix(tiny_pair: TinyPair, method: str) -> None:
    budget = 0.02
    out = drawn(tiny_pair, "budget 0.02", method)
    for prompt, tokens in enumerate(PROMPTS):
        student, teacher = conditionals(tiny_pair, tokens)
        rows = range(prompt, 90, len(PROMPTS))
        prefixes = [tuple(out.completions[row][:t]) for row in rows for t in range(len(out.completions[row]))]
        with np.errstate(divide="ignore"):
            log_s, log_t = (np.log(np.stack([*map(side, prefixes)])) for side in (student, teacher))
        exact = oracle.largest_weight(log_s, log_t, budget)
        weights, spent = (
            np.concatenate([field[row] for row in rows]) for field in (out.stats.teacher_weight, out.stats.kl_student)
        )
        assert weights == pytest.approx(exact, rel=2e-3)
        assert (budget * (1 - 1e-3) <= spent).all() and (spent <= budget + 1e-6).all()


def within_sigmas(values: Array, expected: float) -> bool:
    return bool(abs(values.mean() - expected) <= SIGMAS * values.std() / math.sqrt(len(values)))


@every_method
@pytest.mark.parametrize("name", ["budget 0.02", "budget 0.5", "skd", "temperature 0.8"])
def test_sequence_divergence_is_the_sum_over_tokens(tiny_pair: TinyPair, name: str, method: str) -> None:
    """The chain rule: the mean recorded sum of KL(mu_t || student_t) is KL(P_mu || P_student), at most T budgets."""
    out = drawn(tiny_pair, name, method)
    for prompt, tokens in enumerate(PROMPTS):
        law, student = (exact_law(tiny_pair, tokens, x) for x in (POLICIES[name][1], laws.student()))
        exact = sum(p * math.log(p / student[completion]) for completion, p in law.items())
        sums = np.array([sum(row) for row in out.stats.kl_student[prompt :: len(PROMPTS)]])
        # The blend uses its budget to within 1e-3, so its sum is off by at most as much.
        assert within_sigmas(sums, exact) or sums.mean() == pytest.approx(exact, rel=1e-3)
        policy = POLICIES[name][0]
        if isinstance(policy, TrustRegionPolicy):
            assert exact <= HORIZON * policy.kl_budget


@every_method
def test_drafts_are_kept_as_often_as_the_overlap_says(tiny_pair: TinyPair, method: str) -> None:
    """1 - TV(mu, student) for the blend; for SKD the student's mass on the teacher's top-k."""
    for prompt, tokens in enumerate(PROMPTS):
        student, teacher = (side(()) for side in conditionals(tiny_pair, tokens))
        for name in ("budget 0.02", "budget 0.5", "teacher"):
            mu = POLICIES[name][1](student, teacher)
            kept = np.array([row[0] for row in drawn(tiny_pair, name, method).stats.accepted[prompt::3]])
            assert set(kept.tolist()) == {0.0, 1.0}
            assert within_sigmas(kept, float(np.minimum(mu, student).sum()))
        kept = np.array([row[0] for row in drawn(tiny_pair, "skd", method).stats.accepted[prompt::3]])
        assert within_sigmas(kept, float(student[np.argsort(-teacher)[:2]].sum()))


@every_method
def test_the_teacher_is_called_only_when_needed(tiny_pair: TinyPair, method: str) -> None:
    for name, (policy, _) in POLICIES.items():
        calls = drawn(tiny_pair, name, method).teacher_calls
        assert (calls > 0) == policy.needs_teacher
    for policy in (StudentPolicy(), TrustRegionPolicy(0.0), TemperaturePolicy(0.8)):
        options: dict[str, Any] = {
            "max_new_tokens": HORIZON,
            "eos_token_id": 0,
            "teacher_eos_token_id": 4,
            "method": method,
        }
        prompts = [list(prompt) for prompt in PROMPTS]
        alone = sample(tiny_pair.student, None, prompts, policy, **options)
        assert alone == sample(tiny_pair.student, tiny_pair.teacher, prompts, policy, **options)


# --- determinism --------------------------------------------------------------------------------


@every_method
def test_budget_zero_is_student_sampling_to_the_last_bit(tiny_pair: TinyPair, method: str) -> None:
    ours, theirs = drawn(tiny_pair, "budget 0", method), drawn(tiny_pair, "student", method)
    rows = len(ours.completions)
    assert ours.completions == theirs.completions[:rows]
    assert vars(ours.stats) == {name: values[:rows] for name, values in vars(theirs.stats).items()}


@every_method
def test_common_random_numbers(tiny_pair: TinyPair, method: str) -> None:
    """Two policies with one seed share their drafts: a completion whose drafts were all kept is the student's own."""
    blended, student = drawn(tiny_pair, "budget 0.02", method), drawn(tiny_pair, "student", method)
    pairs = zip(blended.completions, student.completions, blended.stats.accepted, strict=True)
    kept = [(ours, theirs) for ours, theirs, accepted in pairs if all(accepted)]
    assert len(kept) > 0.6 * len(blended.completions)
    assert all(ours == theirs for ours, theirs in kept)
    rejected = zip(blended.completions, student.completions, blended.stats.accepted, strict=True)
    # A replaced first token never equals the draft: where the draft is too likely the residual is zero.
    assert all(ours[0] != theirs[0] for ours, theirs, accepted in rejected if not accepted[0])


def mixed_rows(pair: TinyPair, rows: list[int], policy: BehaviorPolicy, **options: Any) -> Rollout:
    """The rows with the given numbers, each with its own prompt, key and rollout index."""
    defaults = {
        "max_new_tokens": HORIZON,
        "eos_token_id": pair.student_eos,
        "teacher_eos_token_id": pair.teacher_eos,
        "seed": 3,
        "prompt_keys": [(row % 3) + (2**64 - 3) for row in rows],
        "rollout_index": [row // 3 for row in rows],
    }
    prompts = [list(PROMPTS[row % 3]) for row in rows]
    return sample(pair.student, pair.teacher, prompts, policy, **{**defaults, **options})


ROWS = list(range(40))
MIXED_POLICIES = [StudentPolicy(), TrustRegionPolicy(0.3), SKDPolicy(2, 0.6), TeacherPolicy(), TemperaturePolicy(0.8)]
each_mixed_policy = pytest.mark.parametrize("policy", MIXED_POLICIES, ids=lambda p: type(p).__name__)


@every_method
@each_mixed_policy
def test_a_row_does_not_depend_on_its_batch(tiny_pair: TinyPair, policy: BehaviorPolicy, method: str) -> None:
    together = mixed_rows(tiny_pair, ROWS, policy, method=method)
    for row in ROWS[:3]:
        alone = mixed_rows(tiny_pair, [row], policy, method=method)
        assert alone.completions == [together.completions[row]]
        assert alone.stopped == [together.stopped[row]]
        for field in ("teacher_weight", "kl_student", "accepted"):
            assert getattr(alone.stats, field)[0] == pytest.approx(getattr(together.stats, field)[row], abs=1e-6)
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    shuffled = mixed_rows(tiny_pair, order, policy, method=method)
    assert shuffled.completions == [together.completions[row] for row in order]


@every_method
@each_mixed_policy
def test_rows_in_flight_change_nothing(tiny_pair: TinyPair, policy: BehaviorPolicy, method: str) -> None:
    rows = ROWS[:8]
    whole = mixed_rows(tiny_pair, rows, policy, method=method)
    for max_rows in (1, 3, 1000):
        parts = mixed_rows(tiny_pair, rows, policy, method=method, max_rows=max_rows)
        assert parts.completions == whole.completions
        assert parts.stopped == whole.stopped
        assert parts.prompts == whole.prompts


@every_method
def test_a_shorter_limit_gives_a_prefix(tiny_pair: TinyPair, method: str) -> None:
    long = mixed_rows(tiny_pair, ROWS, TrustRegionPolicy(0.3), method=method)
    for limit in (1, 2, 3):
        short = mixed_rows(tiny_pair, ROWS, TrustRegionPolicy(0.3), method=method, max_new_tokens=limit)
        assert short.completions == [completion[:limit] for completion in long.completions]


@every_method
def test_global_random_state_is_neither_read_nor_written(tiny_pair: TinyPair, method: str) -> None:
    outs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        outs.append(mixed_rows(tiny_pair, ROWS, TrustRegionPolicy(0.3), method=method))
        assert torch.equal(torch.get_rng_state(), before)
    # Not the number of passes: with blocks chosen by the clock it is the clock's.
    assert (outs[0].completions, outs[0].stats) == (outs[1].completions, outs[1].stats)
    other = mixed_rows(tiny_pair, ROWS, TrustRegionPolicy(0.3), method=method, seed=4)
    assert other.completions != outs[0].completions


@every_method
def test_keys_and_rollout_indices_default_to_the_row_and_zero(tiny_pair: TinyPair, method: str) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": HORIZON,
        "eos_token_id": 0,
        "teacher_eos_token_id": 4,
        "method": method,
    }
    prompts = [[2, 3, 1]] * 30
    default = sample(tiny_pair.student, tiny_pair.teacher, prompts, StudentPolicy(), **options)
    explicit = sample(
        tiny_pair.student,
        tiny_pair.teacher,
        prompts,
        StudentPolicy(),
        prompt_keys=list(range(30)),
        rollout_index=[0] * 30,
        **options,
    )
    assert default.completions == explicit.completions
    assert len({tuple(completion) for completion in default.completions}) > 5


@every_method
def test_dropout_is_off_and_the_mode_is_restored(tiny_pair: TinyPair, method: str) -> None:
    noisy = tiny_llama(6, seed=41, dropout=0.9)
    noisy.train()
    trained = mixed_rows(TinyPair(noisy, tiny_pair.teacher), ROWS, TrustRegionPolicy(0.3), method=method)
    assert noisy.training
    assert not tiny_pair.teacher.training
    assert trained.completions == mixed_rows(tiny_pair, ROWS, TrustRegionPolicy(0.3), method=method).completions


@every_method
def test_sampling_from_the_first_head_rows_only(tiny_pair: TinyPair, method: str) -> None:
    """Head rows that no token uses are never drawn, and the law is that of the rest."""
    narrow = TinyPair(tiny_pair.student, tiny_pair.teacher, teacher_eos=3, rows=5)
    policy, law = POLICIES["budget 0.02"]
    out = sample(
        narrow.student,
        narrow.teacher,
        [[2, 1]] * N,
        policy,
        max_new_tokens=HORIZON,
        eos_token_id=narrow.student_eos,
        teacher_eos_token_id=narrow.teacher_eos,
        rollout_index=list(range(N)),
        prompt_keys=[5] * N,
        vocab_size=5,
        method=method,
    )
    samples = [tuple(completion) for completion in out.completions]
    assert max(map(max, samples)) < 5
    assert goodness_of_fit(samples, exact_law(narrow, (2, 1), law)) > LEVEL


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"teacher": None, "policy": TrustRegionPolicy(0.1)}, "teacher"),
        ({"prompts": [[1], []], "prompt_keys": None, "rollout_index": None}, "prompt 1"),
        ({"prompts": [[1, 6]]}, r"\b6\b"),
        ({"prompts": [[1] * 30]}, "32"),
        ({"method": "lokstep"}, "'lokstep'.*'lockstep'"),
        ({"max_new_tokens": 0}, r"max_new_tokens.*\b0\b"),
        ({"max_new_tokens": 3.0}, r"max_new_tokens must be a whole number, got 3\.0"),
        ({"temperature": 0.0}, r"temperature.*0\.0"),
        ({"temperature": math.inf}, r"temperature must be positive and finite .*, got inf"),
        ({"prompt_keys": [1, 2]}, r"prompt_keys.*2.*1"),
        ({"prompt_keys": [-1]}, r"-1"),
        ({"prompt_keys": [2**64]}, str(2**64)),
        ({"rollout_index": [1, 2]}, r"rollout_index.*2.*1"),
        ({"rollout_index": [-1]}, r"-1"),
        ({"rollout_index": [2**24]}, str(2**24)),
        ({"max_rows": 0}, r"max_rows.*\b0\b"),
        ({"max_rows": -1}, r"max_rows.*-1"),
        ({"eos_token_id": 9}, r"\b9\b"),
        ({"teacher_eos_token_id": 7}, r"\b7\b"),
        ({"policy": StudentPolicy}, r"policy must be an object of trb\.policies.*got <class .*StudentPolicy"),
        ({"policy": [StudentPolicy]}, r"policy must be an object of trb\.policies.*got <class .*StudentPolicy"),
        ({"policy": None}, r"policy must be an object of trb\.policies.*got None"),
        ({"policy": "student"}, r"policy must be an object of trb\.policies.*got 'student'"),
        ({"prompts": [3, 4]}, r"prompts must be lists of token ids, one for each row, got \[3, 4\]"),
        ({"prompts": [[1.5]]}, r"prompts must be lists of token ids.*1\.5"),
        ({"prompts": None}, "prompts must be lists of token ids.*None"),
        ({"teacher_prompts": [3]}, r"teacher_prompts must be lists of token ids.*\[3\]"),
        ({"begun": [3]}, r"begun must be lists of token ids.*\[3\]"),
        ({"block_size": 2.5}, r"block_size must be a whole number, got 2\.5"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": "plannd"}, "block_size must be a number or one of .*'plannd'; did you mean 'planned'"),
        ({"prompt_keys": ["a"]}, r"prompt_keys must hold whole numbers, got \['a'\]"),
        ({"prompt_keys": 5}, "prompt_keys must hold whole numbers, got 5"),
        ({"rollout_index": [0.5]}, r"rollout_index must hold whole numbers, got \[0\.5\]"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, got None"),
        ({"max_rows": 1.5}, r"max_rows must be a whole number, got 1\.5"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"vocab_size": 4.5}, r"vocab_size must be a whole number, got 4\.5"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refusals(tiny_pair: TinyPair, changed: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {
        "student": tiny_pair.student,
        "teacher": tiny_pair.teacher,
        "prompts": [[1]],
        "policy": StudentPolicy(),
        "max_new_tokens": 4,
        "eos_token_id": 0,
        "teacher_eos_token_id": 4,
    }
    with pytest.raises(ValueError, match=named):
        sample(**{**arguments, **changed})


def test_integers_of_numpy_and_torch_are_numbers(tiny_pair: TinyPair) -> None:
    def drawn(kind: Callable[[list[int]], Any]) -> list[list[int]]:
        one = kind([3])[0]
        return sample(
            tiny_pair.student,
            tiny_pair.teacher,
            kind([[1, 2], [2, 1]]),
            TrustRegionPolicy(0.3),
            max_new_tokens=one,
            eos_token_id=0,
            teacher_eos_token_id=4,
            seed=one,
            block_size=one,
            max_rows=one,
            prompt_keys=kind([5, 2**62 + 1]),
            rollout_index=kind([0, 7]),
        ).completions

    plain = drawn(list)
    for kind in (torch.tensor, np.array, lambda values: np.array(values, dtype=np.uint64)):
        assert drawn(kind) == plain


def test_a_block_size_of_none_is_planned(tiny_pair: TinyPair) -> None:
    draws = [mixed_rows(tiny_pair, ROWS, TrustRegionPolicy(0.3), block_size=size) for size in (None, "planned")]
    assert draws[0].completions == draws[1].completions
    assert draws[0].teacher_calls == draws[1].teacher_calls


def test_states_that_are_taken_back_leave_the_exact_law() -> None:
    """A delta rule, beside keys, drafts, and a selective scan decides."""
    models = []
    for kind, name, rows, seed in (
        (Qwen3_5ForCausalLM, "qwen3_5_text", STUDENT_ROWS, 1),
        (MambaForCausalLM, "mamba", TEACHER_ROWS, 2),
    ):
        config = tiny_config(name)
        config.vocab_size = rows
        models.append(random_model(kind, config, seed, 0.35))
    pair = TinyPair(*models)
    out = rollouts(pair, TrustRegionPolicy(0.5), 1_000, block_size=3)
    for prompt, tokens in enumerate(PROMPTS):
        samples = of_prompt(out, prompt)
        assert goodness_of_fit(samples, exact_law(pair, tokens, laws.trust_region(0.5))) > LEVEL
        assert goodness_of_fit(samples, exact_law(pair, tokens, laws.trust_region(1.0))) < LEVEL
    assert 0.2 < 1 - np.mean([kept for row in out.stats.accepted for kept in row]) < 0.8
