"""Diagnostics against enumeration: every completion of tiny models, with its probability, from plain forward passes.

Measured means must lie within 5 standard errors of the exact expectation, the error itself being exact. Seeds are
fixed; had they been drawn at random, correct code would fail this file with probability below 1e-4 (fewer than 100
such comparisons at 6e-7 each, and one coverage count outside 3.3 standard deviations, 1e-3, noted there).
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TinyPair
from reference import policies as laws
from reference.distributions import Array, entropy, kl, shared_events
from reference.policies import Law
from small_recipes import watched

from trb import zoo
from trb.policies import BehaviorPolicy, SKDPolicy, StudentPolicy, TeacherPolicy, TrustRegionPolicy
from trb.report import write_report
from trb.sampling.scoring import score_completions
from trb.studies import diagnostics
from trb.studies import probe as probe_module
from trb.studies.diagnostics import (
    budget_curve,
    continuation_probe,
    default_truncations,
    matched_excerpts,
    replacement_curve,
)
from trb.studies.keys import run_fields
from trb.studies.listener import Listener
from trb.studies.material import RunDirectoryError, load_tokenizers, problem_sets
from trb.studies.probe import probe
from trb.studies.recipe import Recipe, make_recipe
from trb.studies.subject import Subject
from trb.studies.yaml_files import ConfigError

SIGMAS = 5.0
LETTERS = "abcdef"  # token ids 0 to 5; 0 and 4 end a completion
PROBLEMS = ["b", "cdb", "dfccb"]
HORIZON = 4
SAMPLES = 400
BUDGET = 0.3
Completion = tuple[int, ...]
ExactLaw = dict[Completion, float]


class LetterTokenizer:
    """One letter per token, no template around the prompt."""

    chat_template = "letters"
    name_or_path = "letters"
    bos_token = None
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def get_vocab(self) -> dict[str, int]:
        return {letter: token for token, letter in enumerate(LETTERS)}

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> list[int]:
        return [LETTERS.index(letter) for letter in messages[0]["content"]]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(LETTERS[token] for token in tokens if token or not skip_special_tokens)

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]


class OddGrader:
    """Right where the letters d and f occur an odd number of times, wrong elsewhere."""

    def score(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        assert len(completions) == len(rows)
        return [float((text.count("d") + text.count("f")) % 2) for text in completions]


def reward(completion: Completion) -> float:
    return float(sum(token in (3, 5) for token in completion) % 2)


def subject_of(pair: TinyPair, **changes: Any) -> Subject:
    arguments: dict[str, Any] = {
        "student": pair.student,
        "teacher": pair.teacher,
        "tokenizer": LetterTokenizer(pair.student_eos),
        "problems": [{"prompt": [{"role": "user", "content": text}], "answer": "odd"} for text in PROBLEMS],
        "verifier": OddGrader(),
        "samples": SAMPLES,
        "max_new_tokens": HORIZON,
        "seed": 5,
        "teacher_tokenizer": LetterTokenizer(pair.teacher_eos),
    }
    return Subject(**{**arguments, **changes})


@pytest.mark.parametrize("whose", ["", "the teacher's prompt of "])
def test_a_problem_of_no_token_is_named(tiny_pair: TinyPair, whose: str) -> None:
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": "odd"} for text in PROBLEMS]
    blank = [*rows[:1], {**rows[1], "prompt": [{"role": "user", "content": ""}]}, *rows[2:]]
    changes = {"teacher_problems": blank} if whose else {"problems": blank}
    with pytest.raises(ValueError, match=rf"^{whose}problem 2 of {len(PROBLEMS)} has no tokens"):
        subject_of(tiny_pair, **changes)


def test_a_probe_goes_on_from_one_that_has_read_the_same_of_its_recipe() -> None:
    """Whatever of a recipe its models' texts and its problems depend on is among what two probes are compared by."""
    changes = {"train_data": "none", "eval_data": ["zoo:dialogue"], "eval_limit": 2, "teacher": "zoo:teacher"}
    run, seen = make_recipe({"student": "zoo:student", **changes}).run, set[str]()
    problem_sets(watched(run, seen))
    load_tokenizers(run)
    # The student may be another than the recipe's, and is compared by itself; several teachers are refused; who trusts
    # code reads the same.
    elsewhere = {"student", "teachers", "student_trust_remote_code", "teacher_trust_remote_code"}
    assert seen & run_fields().keys() <= {*probe_module._READ_OF_RECIPE, *elsewhere}
    assert {"eval_assistant_turns", "eval_split", "chat_template"} <= seen


def test_a_teacher_reads_its_own_prompts_in_every_diagnostic(tiny_pair: TinyPair) -> None:
    """Rollouts, scores, continuations, gradients and excerpts; the same without prompts of its own gives other ones."""
    texts = ["fdb", "b", "ccdd"]
    taught = [[LETTERS.index(letter) for letter in text] for text in texts]
    problems = [{"prompt": [{"role": "user", "content": text}], "answer": "odd"} for text in texts]
    own, same = (subject_of(tiny_pair, samples=8, teacher_problems=given) for given in (problems, None))
    policy = TrustRegionPolicy(BUDGET)
    found = own.rollouts(policy)
    places = [row // 8 for row in range(24)]
    options: dict[str, Any] = {"vocabulary": own.vocabulary, "teacher_prompts": [taught[place] for place in places]}
    prompts = [own.prompts[place] for place in places]
    scores = score_completions(
        *(tiny_pair.student, tiny_pair.teacher, prompts, found.completions), policy=policy, **options
    )
    assert found.totals["kl_teacher"] == pytest.approx([math.fsum(row) for row in scores.kl_teacher])
    assert found.completions != same.rollouts(policy).completions
    begun = {row: [1] for row in range(24)}
    read = [[*taught[place], 1] for place in places]
    drawn = own._sample(tiny_pair.teacher, None, read, [*begun], StudentPolicy(), HORIZON - 1, "x")
    continued = own.continued(tiny_pair.teacher, begun, "x")
    assert [*continued.values()] == [reward((1, *completion)) for completion in drawn.completions]
    assert continued != same.continued(tiny_pair.teacher, begun, "x")
    for subject, shown in ((own, texts[0]), (same, None)):
        assert matched_excerpts(subject, policies={"trb": policy}, prompts=1)[0].get("teacher_prompt") == shown


@pytest.fixture(scope="module")
def subject(tiny_pair: TinyPair) -> Subject:
    """Rollouts are drawn once for all tests of this file."""
    return subject_of(tiny_pair)


@cache
def conditionals(pair: TinyPair, tokens: Completion) -> tuple[Array, Array]:
    """Both models' probabilities of the next event after prompt and prefix."""
    row = torch.tensor([tokens])
    with torch.no_grad():
        logits = [model(input_ids=row).logits[0, -1].double().numpy() for model in (pair.student, pair.teacher)]
    return shared_events(logits[0], logits[1], pair.student_eos, pair.teacher_eos)


LAWS: dict[str, Law] = {
    "student": laws.student(),
    "teacher": laws.teacher(),
    "trust region 0.05": laws.trust_region(0.05),
    "trust region": laws.trust_region(BUDGET),
    "skd 1": laws.skd(1, 0.6),
    "skd 2": laws.skd(2, 0.6),
    "skd 6": laws.skd(6, 0.6),
}


@cache
def next_event(pair: TinyPair, tokens: Completion, law: str) -> list[float]:
    return LAWS[law](*conditionals(pair, tokens)).tolist()


@cache
def enumerated(pair: TinyPair, problem: int, law: str, then: str = "", cut: int = HORIZON) -> ExactLaw:
    """Probability of every completion whose first `cut` tokens come from `law`, and the rest from the law `then`."""
    prompt = tuple(LETTERS.index(letter) for letter in PROBLEMS[problem])

    def grow(prefix: Completion, probability: float) -> ExactLaw:
        if len(prefix) == HORIZON or (prefix and prefix[-1] == pair.student_eos):
            return {prefix: probability}
        found: ExactLaw = {}
        for token, p in enumerate(next_event(pair, prompt + prefix, law if len(prefix) < cut else then)):
            if p > 0:
                found |= grow((*prefix, token), probability * p)
        return found

    return grow((), 1.0)


def every_problem(pair: TinyPair, *law: Any) -> list[ExactLaw]:
    return [enumerated(pair, problem, *law) for problem in range(len(PROBLEMS))]


def assert_expected(measured: float, exact_laws: Sequence[ExactLaw], value: Callable[[int, Completion], float]) -> None:
    """`measured`, a mean over SAMPLES completions of every problem, is what `value` has in expectation."""
    mean = variance = 0.0
    for problem, law in enumerate(exact_laws):
        values = {completion: value(problem, completion) for completion in law}
        expected = sum(p * values[completion] for completion, p in law.items())
        mean += expected / len(exact_laws)
        variance += sum(p * (values[c] - expected) ** 2 for c, p in law.items()) / (SAMPLES * len(exact_laws) ** 2)
    assert measured == pytest.approx(mean, abs=SIGMAS * math.sqrt(variance) + 1e-9)


# --- the continuation probe ----------------------------------------------------------------------


def test_continuations_succeed_as_often_as_enumeration_says(tiny_pair: TinyPair, subject: Subject) -> None:
    policies = {"student": StudentPolicy(), "trb": TrustRegionPolicy(BUDGET)}
    cuts = continuation_probe(subject, policies=policies, truncations=range(HORIZON))["truncations"]
    assert [found["length"] for found in cuts] == [0, 1, 2, 3]
    for length, found in enumerate(cuts):

        def ended(problem: int, completion: Completion, length: int = length) -> float:
            return float(len(completion) <= length and completion[-1:] == (tiny_pair.student_eos,))

        for name, before in (("student", "student"), ("trb", "trust region")):
            for continuer in ("student", "teacher"):
                exact = every_problem(tiny_pair, before, continuer, length)
                success = found["policies"][name]["success"][continuer]
                assert_expected(success["value"], exact, lambda problem, completion: reward(completion))
            assert_expected(found["policies"][name]["ended"], every_problem(tiny_pair, before), ended)


def test_prefixes_that_agree_are_continued_alike(subject: Subject) -> None:
    """Common random numbers: at length 0 every policy's prefix is empty; a budget of 0 gives the student's prefixes."""
    policies = {"student": StudentPolicy(), "trb": TrustRegionPolicy(BUDGET), "zero": TrustRegionPolicy(0.0)}
    start, later = continuation_probe(subject, policies=policies, truncations=[0, 2])["truncations"]
    for continuer in ("student", "teacher"):
        assert start["relative"]["trb"][continuer]["value"] == 1.0
        assert start["relative"]["trb"][continuer]["interval"] == pytest.approx([1.0, 1.0])
        assert start["difference"]["trb"][continuer]["value"] == 0.0
        assert later["difference"]["zero"][continuer]["value"] == 0.0
        assert later["difference"]["trb"][continuer]["value"] != 0.0


class LengthGrader:
    def score(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(len(text)) for text in completions]


def test_a_continuation_depends_on_its_own_row_alone_and_keeps_the_length_limit(tiny_pair: TinyPair) -> None:
    """Rows that had ended, and are not continued, do not shift the random numbers of the others."""
    measured = subject_of(tiny_pair, verifier=LengthGrader(), samples=20)
    prefixes = {row: [3, 2] for row in range(60)}
    every = measured.continued(tiny_pair.teacher, prefixes, "some stream")
    some = measured.continued(tiny_pair.teacher, {row: prefixes[row] for row in (7, 31, 58)}, "some stream")
    assert some == {row: every[row] for row in (7, 31, 58)}
    assert max(every.values()) == HORIZON
    assert min(every.values()) == 2  # the stop token came at once
    assert every != measured.continued(tiny_pair.teacher, prefixes, "another stream")
    assert measured.continued(tiny_pair.teacher, {}, "some stream") == {}


def test_relative_success_is_the_ratio_and_the_difference_is_paired(subject: Subject) -> None:
    policies = {"a": StudentPolicy(), "b": TeacherPolicy()}
    result = continuation_probe(subject, policies=policies, truncations=[2], reference="a")
    (found,) = result["truncations"]
    success = {name: found["policies"][name]["success"]["teacher"]["value"] for name in policies}
    relative, difference = found["relative"]["b"]["teacher"], found["difference"]["b"]["teacher"]
    assert relative["value"] == pytest.approx(success["b"] / success["a"])
    assert difference["value"] == pytest.approx(success["b"] - success["a"])
    assert relative["interval"][0] < relative["value"] < relative["interval"][1]
    assert 0 < difference["p_value"] <= 1
    assert "a" not in found["relative"] and "a" not in found["difference"]
    whole = result["rollouts"]["b"]
    assert whole["success"]["value"] == pytest.approx(np.mean(subject.rollouts(TeacherPolicy()).rewards))
    assert whole["length"]["value"] == pytest.approx(np.mean(subject.rollouts(TeacherPolicy()).lengths))


def test_relative_success_is_unknown_where_nothing_succeeds(tiny_pair: TinyPair) -> None:
    class Never:
        def score(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
            return [0.0] * len(completions)

    policies = {"student": StudentPolicy(), "trb": TrustRegionPolicy(BUDGET)}
    hopeless = subject_of(tiny_pair, verifier=Never(), samples=2)
    (found,) = continuation_probe(hopeless, policies=policies, truncations=[1])["truncations"]
    assert found["relative"]["trb"] == {"student": None, "teacher": None}
    assert found["policies"]["trb"]["success"]["teacher"]["value"] == 0.0
    (point,) = budget_curve(hopeless, budgets=[0.1])
    assert point["auroc"] is None


def test_the_interval_of_relative_success_covers() -> None:
    """300 experiments of 30 problems x 4 rollouts; 285 of the 95% intervals should cover, 273 to 297 is 3.3 sigma."""
    rng = np.random.default_rng(1)
    rates = rng.beta(1, 2, size=200_000)
    truth = np.mean(rates + 0.1 * (1 - rates)) / np.mean(rates)
    covered = 0
    for _ in range(300):
        rate_P = rng.beta(1, 2, size=30)
        luck, other = rng.random((30, 4)), rng.random((30, 4))
        shared = np.where(rng.random((30, 4)) < 0.5, luck, other)  # pairs share half of their noise
        second_P = (luck < rate_P[:, None]).mean(axis=1)
        first_P = (shared < (rate_P + 0.1 * (1 - rate_P))[:, None]).mean(axis=1)
        relative = diagnostics.relative_success(first_P, second_P)
        assert relative is not None
        low, high = relative["interval"]
        covered += low <= truth <= high
    assert 273 <= covered <= 297


def test_the_probe_refuses_lengths_and_references_out_of_range(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"truncation 4 leaves nothing to continue; give lengths in \[0, 4\)"):
        continuation_probe(subject, policies={"student": StudentPolicy()}, truncations=[4])
    with pytest.raises(ValueError, match="reference is 'student'; choose one of the policies: a"):
        continuation_probe(subject, policies={"a": StudentPolicy()}, truncations=[1])


# --- budgets and SKD -----------------------------------------------------------------------------

BUDGETS = {0.0: "student", 0.05: "trust region 0.05", BUDGET: "trust region", math.inf: "teacher"}


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_budget_curve_is_what_enumeration_says(tiny_pair: TinyPair, subject: Subject, budget: float) -> None:
    (point,) = budget_curve(subject, budgets=[budget])
    exact = every_problem(tiny_pair, BUDGETS[budget])
    student, teacher = every_problem(tiny_pair, "student"), every_problem(tiny_pair, "teacher")
    assert point["kl_budget"] == budget
    assert_expected(point["reward"]["value"], exact, lambda problem, completion: reward(completion))
    assert_expected(point["length"]["value"], exact, lambda problem, completion: len(completion))
    stops = (tiny_pair.student_eos,)
    assert_expected(point["stop_rate"]["value"], exact, lambda problem, completion: completion[-1:] == stops)

    rollouts = subject.rollouts(TrustRegionPolicy(budget))
    for name, other in (("student_log_prob", student), ("teacher_log_prob", teacher)):
        mean_total = np.mean(rollouts.totals[name])
        assert_expected(
            mean_total, exact, lambda problem, completion, other=other: math.log(other[problem][completion])
        )
        assert point[name]["value"] == pytest.approx(mean_total / np.mean(rollouts.lengths))

    # Summed divergences at prefixes estimate the divergence of the laws of whole completions, which enumeration knows.
    # Their variance is taken from the rollouts themselves.
    divergence = np.mean([
        sum(p * math.log(p / student[problem][completion]) for completion, p in exact[problem].items() if p > 0)
        for problem in range(len(PROBLEMS))
    ])  # fmt: skip
    totals = np.asarray(rollouts.totals["kl_student"])
    slack = SIGMAS * totals.std() / math.sqrt(len(totals)) + 1e-3 * (divergence > 0)
    assert point["sequence_kl"]["value"] == pytest.approx(divergence, abs=slack + 1e-9)
    if math.isfinite(budget):
        assert point["sequence_kl_bound"]["value"] == pytest.approx(budget * point["length"]["value"])
        assert point["sequence_kl"]["value"] <= point["sequence_kl_bound"]["value"] + 1e-9
    else:
        assert point["sequence_kl_bound"] is None


def test_teacher_entropy_and_weight_are_token_means(tiny_pair: TinyPair, subject: Subject) -> None:
    """Re-scored token by token from plain forward passes, on the rollouts that were drawn."""
    rollouts = subject.rollouts(TrustRegionPolicy(BUDGET))
    (point,) = budget_curve(subject, budgets=[BUDGET])
    entropies, divergences, tokens = 0.0, 0.0, 0
    for row, completion in enumerate(rollouts.completions):
        prompt = tuple(LETTERS.index(letter) for letter in PROBLEMS[row // SAMPLES])
        for place in range(len(completion)):
            student, teacher = conditionals(tiny_pair, prompt + tuple(completion[:place]))
            with np.errstate(divide="ignore"):
                entropies += float(entropy(np.log(teacher)))
                divergences += float(kl(np.log(teacher), np.log(student)))
            tokens += 1
    assert point["teacher_entropy"]["value"] == pytest.approx(entropies / tokens, rel=1e-6)
    assert divergences / tokens > BUDGET  # the budget binds, so the weight is a real number between 0 and 1
    assert 0 < point["teacher_weight"]["value"] < 1
    low, high = point["teacher_entropy"]["interval"]
    assert low < entropies / tokens < high


def test_token_means_have_the_standard_error_of_the_jackknife(tiny_pair: TinyPair) -> None:
    """Leave one problem out at a time: another estimate of the same error, here within a tenth of it."""
    rng = np.random.default_rng(3)
    drawn = ("".join(rng.choice(list("bcdf"), size=rng.integers(1, 7))) for _ in range(80))
    texts = list(dict.fromkeys(drawn))[:40]
    problems = [{"prompt": [{"role": "user", "content": text}], "answer": "odd"} for text in texts]
    many = subject_of(tiny_pair, problems=problems, samples=2)
    (point,) = budget_curve(many, budgets=[BUDGET])
    rollouts = many.rollouts(TrustRegionPolicy(BUDGET))
    length_P = np.reshape(rollouts.lengths, (40, 2)).sum(axis=1)
    for name in ("student_log_prob", "teacher_log_prob", "teacher_entropy", "teacher_weight"):
        total_P = np.reshape(rollouts.totals[name], (40, 2)).sum(axis=1)
        left_out = (total_P.sum() - total_P) / (length_P.sum() - length_P)
        error = math.sqrt(39 / 40 * np.sum((left_out - left_out.mean()) ** 2))
        assert point[name]["value"] == pytest.approx(total_P.sum() / length_P.sum())
        assert point[name]["standard_error"] == pytest.approx(error, rel=0.1)
        low, high = point[name]["interval"]
        assert high - low == pytest.approx(2 * scipy.stats.t.ppf(0.975, 39) * error, rel=0.15)


def test_copies_of_a_problem_do_not_narrow_an_interval(tiny_pair: TinyPair) -> None:
    """Each problem three times is what each is once, in every number of every diagnostic."""
    row = [{"prompt": [{"role": "user", "content": text}], "answer": "odd"} for text in PROBLEMS]
    once, thrice = (subject_of(tiny_pair, problems=row * copies, samples=8) for copies in (1, 3))
    policies = {"student": StudentPolicy(), "trb": TrustRegionPolicy(BUDGET)}

    def measured(subject: Subject) -> list[Any]:
        return [
            continuation_probe(subject, policies=policies, truncations=[1, 2]),
            budget_curve(subject, budgets=[0.0, BUDGET]),
            replacement_curve(subject, top_ks=[1], teacher_temperature=1.0),
        ]

    one, other = (list(numbers_in(measured(subject))) for subject in (once, thrice))
    assert len(one) > 50
    assert other == pytest.approx(one, rel=1e-9, abs=1e-12)


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def test_differences_are_to_the_first_budget_and_paired(subject: Subject) -> None:
    points = budget_curve(subject, budgets=[0.0, BUDGET])
    for point in points:
        for name in ("reward", "teacher_log_prob"):
            gap = point[name]["value"] - points[0][name]["value"]
            assert point[f"{name}_difference"]["value"] == pytest.approx(gap, abs=1e-12)
    assert points[0]["reward_difference"]["interval"] == [0.0, 0.0]
    assert points[1]["teacher_log_prob_difference"]["value"] > 0.05


def test_auroc_is_the_share_of_pairs_in_order(tiny_pair: TinyPair) -> None:
    few = subject_of(tiny_pair, samples=30)
    (point,) = budget_curve(few, budgets=[BUDGET])
    rollouts = few.rollouts(TrustRegionPolicy(BUDGET))
    scores = score_completions(
        tiny_pair.student,
        tiny_pair.teacher,
        [few.prompts[row // 30] for row in range(90)],
        rollouts.completions,
        policy=StudentPolicy(),
        vocabulary=few.vocabulary,
    )
    means = [
        np.mean(np.subtract(teacher, student))
        for teacher, student in zip(scores.teacher_log_prob, scores.student_log_prob, strict=True)
    ]
    right = [mean for mean, correct in zip(means, rollouts.rewards, strict=True) if correct]
    wrong = [mean for mean, correct in zip(means, rollouts.rewards, strict=True) if not correct]
    in_order = sum((a > b + 1e-9) + 0.5 * (abs(a - b) <= 1e-9) for a in right for b in wrong)
    assert point["auroc"]["value"] == pytest.approx(in_order / (len(right) * len(wrong)), abs=2e-3)
    assert point["auroc"]["problems"] == 3


def test_skd_replaces_as_many_tokens_as_enumeration_says(tiny_pair: TinyPair, subject: Subject) -> None:
    points = replacement_curve(subject, top_ks=[1, 2, 6], teacher_temperature=0.6)
    for point in points:
        top_k = point["teacher_top_k"]
        exact = every_problem(tiny_pair, f"skd {top_k}")

        @cache
        def replaced(problem: int, completion: Completion, top_k: int = top_k) -> float:
            """Expected replacements along a completion; given its tokens they still depend on the drafts."""
            prompt = tuple(LETTERS.index(letter) for letter in PROBLEMS[problem])
            total = 0.0
            for place, token in enumerate(completion):
                student, teacher = conditionals(tiny_pair, prompt + completion[:place])
                outside = sorted(range(6), key=lambda other: -teacher[other])[top_k:]
                swap = sum(student[other] for other in outside) * teacher[token] ** (1 / 0.6)
                swap /= sum(teacher ** (1 / 0.6))
                kept = 0.0 if token in outside else student[token]
                total += swap / (swap + kept) if swap + kept else 0.0
            return total

        rollouts = subject.rollouts(SKDPolicy(top_k, 0.6))
        counts = [sum(accepted == 0 for accepted in row) for row in rollouts.accepted]
        expected = np.mean([sum(p * replaced(i, c) for c, p in law.items()) for i, law in enumerate(exact)])
        assert np.mean(counts) == pytest.approx(expected, abs=SIGMAS * np.std(counts) / math.sqrt(len(counts)) + 1e-9)
        assert point["replaced"]["value"] == pytest.approx(sum(counts) / sum(rollouts.lengths))
        # The policy's own probability of a replacement is another estimate of the same share.
        assert point["teacher_weight"]["value"] == pytest.approx(point["replaced"]["value"], abs=0.02)
    shares = [point["replaced"]["value"] for point in points]
    assert shares[0] > shares[1] > shares[2] == 0.0


def test_a_subject_says_what_is_wrong_with_it(tiny_pair: TinyPair) -> None:
    row = {"prompt": [{"role": "user", "content": "b"}], "answer": "odd"}
    with pytest.raises(ValueError, match="got 1 problems and samples=4"):
        subject_of(tiny_pair, problems=[row], samples=4)
    with pytest.raises(ValueError, match="samples=0"):
        subject_of(tiny_pair, samples=0)
    with pytest.raises(ValueError, match="problem 2 of 2 has no answer"):
        subject_of(tiny_pair, problems=[row, row | {"answer": ""}])
    with pytest.raises(ValueError, match="the 3 problems are one, copied"):
        subject_of(tiny_pair, problems=[row] * 3)
    with pytest.raises(ValueError, match="budgets is empty"):
        budget_curve(subject_of(tiny_pair), budgets=[])
    with pytest.raises(ValueError, match="non-negative"):
        budget_curve(subject_of(tiny_pair, samples=1), budgets=[-0.1])


def test_rollouts_are_drawn_once_and_shared(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[BehaviorPolicy] = []
    draw = Subject._draw

    def counting(self: Subject, policy: BehaviorPolicy) -> Any:
        drawn.append(policy)
        return draw(self, policy)

    monkeypatch.setattr(Subject, "_draw", counting)
    few = subject_of(tiny_pair, samples=2)
    policies = {"student": StudentPolicy(), "trb": TrustRegionPolicy(0.05)}
    continuation_probe(few, policies=policies, truncations=[1, 2])
    budget_curve(few, budgets=[0.0, 0.05])
    matched_excerpts(few, policies=policies)
    assert drawn == [StudentPolicy(), TrustRegionPolicy(0.05)]


# --- excerpts ------------------------------------------------------------------------------------


def test_excerpts_are_matched_and_carry_every_number(tiny_pair: TinyPair, subject: Subject) -> None:
    policies = {"student": StudentPolicy(), "zero": TrustRegionPolicy(0.0), "trb": TrustRegionPolicy(BUDGET)}
    records = matched_excerpts(subject, policies=policies, prompts=2, top=2)
    assert [record["policy"] for record in records] == ["student", "zero", "trb"] * 2
    for first in (0, 3):
        group = records[first : first + 3]
        assert len({(record["prompt"], record["prompt_key"], record["rollout_index"]) for record in group}) == 1
        assert group[0]["tokens"] == group[1]["tokens"]  # the same noise, and the same law
    trb = records[5]
    assert trb["prompt"] == PROBLEMS[1]
    assert trb["step"] == 0 and trb["rollout_index"] == 0
    completion = [LETTERS.index(letter) for letter in trb["tokens"]]
    assert completion == subject.rollouts(TrustRegionPolicy(BUDGET)).completions[SAMPLES]
    assert trb["completion"] == "".join(letter for letter in trb["tokens"] if letter != "a")
    assert trb["reward"] == reward(tuple(completion))
    prompt = tuple(LETTERS.index(letter) for letter in PROBLEMS[1])
    for place, token in enumerate(completion):
        student, teacher = conditionals(tiny_pair, prompt + tuple(completion[:place]))
        assert trb["student_log_prob"][place] == pytest.approx(math.log(student[token]), rel=1e-5)
        assert trb["teacher_log_prob"][place] == pytest.approx(math.log(teacher[token]), rel=1e-5)
        assert trb["kl_student"][place] <= BUDGET + 1e-6
        best = sorted(range(6), key=lambda other: -student[other])[:2]
        expected = [[LETTERS[other], student[other]] for other in best]
        for (text, probability), (letter, p) in zip(trb["alternatives"][place]["student"], expected, strict=True):
            assert text == letter and probability == pytest.approx(p, rel=1e-5)
    per_token = ("teacher_weight", "kl_student", "kl_teacher", "accepted", "student_log_prob", "teacher_log_prob")
    assert {len(trb[name]) for name in (*per_token, "alternatives")} == {len(completion)}
    assert "alternatives" not in matched_excerpts(subject, policies=policies, prompts=1, top=0)[0]
    with pytest.raises(ValueError, match="prompts must be at least 0, got -1"):
        matched_excerpts(subject, policies=policies, prompts=-1)


# --- the driver ----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "student": "zoo:student",
    "teacher": "zoo:teacher",
    "train_data": "zoo:chains",
    "max_completion_length": 12,
    "eval_data": "zoo:chains",
    "methods": {"opd": {}, "trb": {"initial_kl_budget": 0.2}, "skd": {"skd_teacher_top_k": 3}},
}
OPTIONS: dict[str, Any] = {"problems": 3, "samples": 2, "budgets": [0.0, 0.2], "truncations": [4], "skd_top_k": [3]}


def small(**changes: Any) -> Recipe:
    return make_recipe({**SMALL, **changes})


class Stages(Listener):
    """Hears the stages; interrupts at the stage that `stop_at` begins, as a kill would."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.heard: list[str] = []
        self.stop_at = stop_at

    def stage(self, text: str) -> None:
        self.heard.append(text)
        if self.stop_at is not None and text.startswith(self.stop_at):
            raise KeyboardInterrupt


def numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "provenance"}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished probe of `small()`. Read it, change nothing."""
    directory = tmp_path_factory.mktemp("probed")
    probe(small(), directory, **OPTIONS)
    return directory


def test_a_probe_leaves_everything_a_reader_needs(probed: Path) -> None:
    results = json.loads((probed / "probe.json").read_text())
    assert results["student"] == "zoo:student" and results["problems"] == {"zoo:chains": 3}
    assert results["kl_budget"] == 0.2  # of the recipe's trb entry
    assert [cut["length"] for cut in results["continuation"]["truncations"]] == [4]
    assert [point["kl_budget"] for point in results["budgets"]] == [0.0, 0.2]
    assert [point["teacher_top_k"] for point in results["replacement"]] == [3]
    assert results["provenance"]["versions"]["torch"]
    assert json.loads((probed / "provenance.json").read_text())["python"]
    records = [json.loads(text) for text in (probed / "rollouts.jsonl").read_text().splitlines()]
    assert [record["policy"] for record in records] == ["student", "trb", "skd"] * 3
    # What the trainer records, so that one viewer shows both.
    assert records[0].keys() > {"step", "prompt", "completion", "tokens", "reward", "teacher_weight", "kl_student"}
    assert {path.name for path in probed.iterdir()} == {"parts", "probe.json", "provenance.json", "rollouts.jsonl"}


def test_a_killed_probe_goes_on_where_it_was(probed: Path, tmp_path: Path) -> None:
    done: list[str] = []
    for stop_at in ("teacher continuations of Trust", "rollouts of SKDPolicy", "excerpts"):
        stages = Stages(stop_at)
        with pytest.raises(KeyboardInterrupt):
            probe(small(), tmp_path, listener=stages, **OPTIONS)
        assert not (tmp_path / "probe.json").exists()
        done += stages.heard[1:-1]
    stages = Stages()
    results = probe(small(), tmp_path, listener=stages, **OPTIONS)
    done += stages.heard[1:]
    assert len(done) == len(set(done)) > 5, "a finished part was done again"
    assert numbers(results) == numbers(json.loads((probed / "probe.json").read_text()))
    assert (tmp_path / "rollouts.jsonl").read_text() == (probed / "rollouts.jsonl").read_text()


def test_a_finished_probe_is_not_repeated(probed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "load_pair", None)
    written = (probed / "probe.json").read_bytes()
    assert probe(small(), probed, max_rows=2, **OPTIONS) == json.loads(written)
    assert (probed / "probe.json").read_bytes() == written


def test_another_probe_in_the_directory_is_refused_or_overwritten(probed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "probe"
    shutil.copytree(probed, copy)
    changed = {**OPTIONS, "samples": 1, "budgets": [], "skd_top_k": [], "excerpts": 0}
    with pytest.raises(RunDirectoryError, match=r"another probe: .*samples is 2 there and 1 here.*--overwrite"):
        probe(small(), copy, **changed)
    assert (copy / "probe.json").read_bytes() == (probed / "probe.json").read_bytes()
    results = probe(small(), copy, overwrite=True, **changed)
    assert results["samples"] == 1 and results["budgets"] is results["replacement"] is None
    assert not (copy / "rollouts.jsonl").exists()


def test_an_infinite_budget_is_part_of_a_probes_settings(tmp_path: Path) -> None:
    options = {**OPTIONS, "budgets": [], "skd_top_k": [], "truncations": [], "excerpts": 0}
    probe(small(), tmp_path, kl_budget=math.inf, **options)
    settings = json.loads((tmp_path / "parts" / "settings.json").read_text())
    assert settings["kl_budget"] == "Infinity"


def test_a_run_directory_is_left_alone(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (tmp_path / name).write_text("{}\n")
    for overwrite in (False, True):
        with pytest.raises(RunDirectoryError, match=r"metrics.jsonl of a training run"):
            probe(small(), tmp_path, overwrite=overwrite, **OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "rollouts.jsonl"}


def test_a_trained_students_run_directory_takes_the_initial_students_place(probed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    student, tokenizer = zoo.load("student")
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1.3)
    student.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    options = {**OPTIONS, "truncations": [], "skd_top_k": [], "excerpts": 0}
    results = probe(small(), tmp_path / "probe", model=str(run), **options)
    assert results["student"] == str(run / "model")
    before = json.loads((probed / "probe.json").read_text())["budgets"][0]
    assert results["budgets"][0]["student_log_prob"]["value"] > before["student_log_prob"]["value"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"truncations": [12]}, ValueError, "truncation 12 leaves nothing"),
        ({"budgets": [-1.0]}, ValueError, "kl_budget must be a non-negative"),
        ({"kl_budget": math.nan}, ValueError, "kl_budget must be a non-negative"),
        ({"skd_top_k": [0]}, ValueError, "teacher_top_k must be at least 1, got 0"),
        ({"problems": 1}, ValueError, "problems must be at least 2, got 1"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"excerpts": -1}, ValueError, "excerpts must be at least 0, got -1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_a_probe_refuses_bad_options_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(probe_module, "load_pair", None)
    with pytest.raises(error, match=message):
        probe(small(), tmp_path, **{**OPTIONS, **change})
    assert not list(tmp_path.iterdir())


def test_a_probe_needs_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_data is empty"):
        probe(small(eval_data=[]), tmp_path)


def test_default_truncations_are_shares_of_the_longest_completion() -> None:
    assert default_truncations(48) == (3, 6, 12, 24)
    assert default_truncations(7168) == (448, 896, 1792, 3584)
    assert default_truncations(4) == (1, 2)
    assert default_truncations(1) == ()


def test_an_infinite_budget_goes_through_every_file_of_a_probe(tmp_path: Path) -> None:
    options = {**OPTIONS, "budgets": [0.0, math.inf], "kl_budget": math.inf, "truncations": [], "excerpts": 0}
    written = probe(small(), tmp_path, advice=False, **options)
    assert [point["kl_budget"] for point in written["budgets"]] == [0.0, None] and written["kl_budget"] is None
    assert json.loads((tmp_path / "parts" / "settings.json").read_text())["budgets"] == [0.0, "Infinity"]
    (tmp_path / "probe.json").unlink()
    stages = Stages()
    again = probe(small(), tmp_path, advice=False, listener=stages, **options)
    assert numbers(again) == numbers(written) and stages.heard == ["loading models and problems"]
    with pytest.raises(RunDirectoryError, match=r"kl_budget is 'Infinity' there and 0.5 here"):
        probe(small(), tmp_path, advice=False, **{**options, "kl_budget": 0.5})
    assert "trust region of ε = ∞" in write_report(tmp_path).read_text()


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    found = probe(small(teacher="zoo:student"), tmp_path, **{**OPTIONS, "truncations": [], "excerpts": 0})
    assert found["outlook"]["transfer"]["agreement"] is None
    assert not found["advice"]["blend"] and "nothing to distil" in found["advice"]["sentences"][-1]
    assert write_report(tmp_path).exists()


@pytest.mark.parametrize(
    ("training", "budget", "nats"),
    [
        ({"method": "opd"}, 16 / 12, 16),  # what trb begins with by itself: 16 nats a completion, 12 tokens at most
        ({"method": "skd", "skd_teacher_top_k": 3}, 16 / 12, 16),
        ({"methods": {"opd": {}, "sft": {}}}, 16 / 12, 16),
        ({"method": "trb", "sequence_kl_budget": 6}, 6 / 12, 6),
        ({"method": "trb", "budget_schedule": "sequence"}, 1 / 12, 1),
        ({"method": "trb", "budget_schedule": "gap", "sequence_kl_budget": 3}, 3 / 12, 3),
        ({"methods": {"opd": {}, "mine": {"method": "trb", "sequence_kl_budget": 4}}}, 4 / 12, 4),
        # Where every token has its own budget, a completion is given one nat.
        ({"method": "trb", "budget_schedule": "gap", "initial_kl_budget": 0.2}, 0.2, 1),
        ({"method": "fixed", "initial_kl_budget": 0.3}, 0.3, 1),
        ({"method": "trb", "initial_kl_budget": 0.3, "blend_warmup_steps": 1}, 0.3, 1),
    ],
)
def test_a_probe_looks_at_the_budget_with_which_trb_would_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: dict[str, Any], budget: float, nats: float
) -> None:
    """The continuations at its first ε, the advice at the nats of a completion, both of the same schedule."""
    names = ("kl_budget", "sequence_kl_budget")
    monkeypatch.setattr(probe_module, "_measure", lambda settings, *rest: {x: getattr(settings, x) for x in names})
    recipe = make_recipe({**{key: value for key, value in SMALL.items() if key != "methods"}, **training})
    found = probe(recipe, tmp_path, **OPTIONS)
    assert (found["kl_budget"], found["sequence_kl_budget"]) == (pytest.approx(budget), nats)


def test_a_probe_is_the_same_one_wherever_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the paths of its models, template and problems are written; and where all has been moved."""
    here = tmp_path / "here"
    for name in ("student", "teacher"):
        for part in zoo.load(name):
            part.save_pretrained(here / name)
    (here / "inside").mkdir()
    shutil.copyfile(here / "student" / "chat_template.jinja", here / "template.jinja")
    (here / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in zoo.problems(3, seed=0, split="test")))
    options = {**OPTIONS, "budgets": [0.0], "truncations": [], "skd_top_k": [], "excerpts": 0, "advice": False}
    keys = {"student": "student", "teacher": "teacher", "chat_template": "template.jinja", "eval_data": "rows.jsonl"}

    def probed_in(folder: Path, begin: str, **changes: str) -> dict[str, Any]:
        monkeypatch.chdir(folder)
        return probe(small(**{key: begin + path for key, path in (keys | changes).items()}), f"{begin}probe", **options)

    first = probed_in(here, "")
    assert probed_in(here / "inside", "../") == first
    assert probed_in(tmp_path, f"{here}/") == first
    monkeypatch.chdir(tmp_path)
    here.rename(tmp_path / "moved")
    here = tmp_path / "moved"
    assert probed_in(here, "") == first
    for key, path in keys.items():
        other = f"inside/{path}"
        (shutil.copytree if (here / path).is_dir() else shutil.copyfile)(here / path, here / other)
        with pytest.raises(RunDirectoryError, match=f"{key} is .*{path}.* there and .*{other}.* here"):
            probed_in(here, "", **{key: other})


def test_another_model_at_the_same_path_is_another_probe(tmp_path: Path) -> None:
    student, tokenizer = zoo.load("student")

    def save() -> None:
        student.save_pretrained(tmp_path / "student")
        tokenizer.save_pretrained(tmp_path / "student")

    save()
    directory = tmp_path / "probe"
    options = {**OPTIONS, "budgets": [0.0], "truncations": [], "skd_top_k": [], "excerpts": 0, "advice": False}
    recipe = small(student=str(tmp_path / "student"))
    first = probe(recipe, directory, **options)
    save()
    assert probe(recipe, directory, **options) == first  # the same weights, written anew
    settings = json.loads((directory / "parts" / "settings.json").read_text())
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1.3)
    save()
    with pytest.raises(RunDirectoryError, match=f"student_files is '{settings['student_files']}' there and"):
        probe(recipe, directory, **options)
    shutil.rmtree(tmp_path / "student")  # as a study removes what it has scored
    assert probe(recipe, directory, **options) == first
