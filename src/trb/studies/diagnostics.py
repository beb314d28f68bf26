"""Diagnostics of a student-teacher pair: what blending does to the prefixes a student visits (paper, section 6).

Everything is measured on rollouts of fixed models: at step 0, or on any saved student. A `Subject` says which models
and problems, and draws and grades completions once per behavior policy, however many diagnostics look at them. Policies
share their random numbers, so that differences have less noise than either side. Intervals speak about problems like
these, given these models; they say nothing about other training runs.

Left out on purpose: running everything for a recipe, and its files (`trb.studies.probe`), comparing trained methods and
their learning curves (`trb.studies.sweep`), and drawing (`trb.report`).

Shape suffixes: N rows (rollouts), P problems.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trb.errors import InputError
from trb.measures import token_mean_shares
from trb.policies import BehaviorPolicy, SKDPolicy, TrustRegionPolicy
from trb.sampling import prompt_key
from trb.sampling.scoring import TokenScores
from trb.studies.statistics import Estimate, auroc_estimate, mean_estimate, paired_difference
from trb.studies.subject import CONTINUERS, Sampled, Subject, canonical
from trb.training.recording import score_record

__all__ = [
    "KL_BUDGETS",
    "LEVEL",
    "SKD_TOP_K",
    "budget_curve",
    "check_truncations",
    "continuation_probe",
    "default_truncations",
    "matched_excerpts",
    "relative_success",
    "replacement_curve",
]

KL_BUDGETS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05)
"""The student itself and the paper's sweep of ε0, in nats per token."""

SKD_TOP_K = (5, 15, 25, 50)
"""The paper's sweep of SKD's K, and a smaller one."""

LEVEL = 0.95


# ---- estimates over problems ----


def _mean(subject: Subject, values: ArrayLike, bounds: tuple[float, float] | None = None) -> dict[str, Any]:
    """Mean over rollouts, its interval over problems."""
    return _dict(mean_estimate(subject.problem_means(values)[None], level=LEVEL, bounds=bounds))


def _per_token(subject: Subject, totals: ArrayLike, lengths: ArrayLike) -> dict[str, Any]:
    """Mean over tokens, its interval over problems."""
    return _dict(mean_estimate(_token_mean_shares(subject, totals, lengths)[None], level=LEVEL))


def _token_mean_shares(subject: Subject, totals: ArrayLike, lengths: ArrayLike) -> NDArray[np.float64]:
    """`[P]` values whose mean is the mean over tokens."""
    return token_mean_shares(subject.problem_means(totals), subject.problem_means(lengths))


def relative_success(first_P: NDArray[np.float64], second_P: NDArray[np.float64]) -> dict[str, Any] | None:
    """Ratio of two means over the same problems, linearised in its logarithm; None where a mean is zero.

    With 4 rollouts a problem and success rates from 0.1 to 0.5, nominal 95% intervals covered 94% to 95% of the time
    with 20 problems and with 64; resampling problems covered 91% to 95%.
    """
    first, second = first_P.mean(), second_P.mean()
    if not (first > 0 and second > 0):
        return None
    log_ratio = mean_estimate((math.log(first / second) + first_P / first - second_P / second)[None], level=LEVEL)
    value, (low, high) = float(first / second), log_ratio.interval
    return {
        "value": value,
        "interval": [math.exp(low), math.exp(high)],
        "standard_error": value * log_ratio.standard_error,
        "problems": log_ratio.problems,
    }


def _dict(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON types, without what does not apply; there is one seed throughout."""
    return {key: value for key, value in estimate.to_dict().items() if value is not None and key != "seeds"}


# ---- the continuation probe ----


def continuation_probe(
    subject: Subject,
    *,
    policies: Mapping[str, BehaviorPolicy],
    truncations: Sequence[int],
    reference: str = "student",
) -> dict[str, Any]:
    """How good the prefixes of each policy are to go on from, for the student and for the teacher (paper, section 6).

    Rollouts of every policy are cut after t tokens and continued by plain sampling from either model, up to
    `max_new_tokens` in all. A rollout that had ended by then is counted as it stands, with its own reward; `ended` is
    the share of those. All continuations of one rollout index share their random numbers, so that policies with the
    same prefix have the same continuation: at t = 0 all are alike.

    Args:
        subject: models and problems.
        policies: name -> policy; `reference` is one of the names.
        truncations: lengths t in tokens, in [0, max_new_tokens).

    Returns:
        `reference`; `rollouts`: per policy the success and length of whole rollouts; `truncations`: a list with, for
        each `length`, `policies` (name -> `ended`, and `success` by continuer), and for every policy but the reference
        `relative` (ratio of success to the reference's, by continuer; null where one never succeeds) and `difference`
        (paired by problem). Estimates are mappings with `value` and a 95% `interval` over problems.

    Raises:
        ValueError: an unknown reference, or a truncation out of range.
    """
    if reference not in policies:
        raise InputError(f"reference is {reference!r}; choose one of the policies: {', '.join(policies)}")
    check_truncations(truncations, subject.max_new_tokens)
    drawn = {name: subject.rollouts(policy) for name, policy in policies.items()}
    return {
        "reference": reference,
        "rollouts": {
            name: {"success": _mean(subject, rollouts.rewards, (0, 1)), "length": _mean(subject, rollouts.lengths)}
            for name, rollouts in drawn.items()
        },
        "truncations": [_truncation(subject, policies, drawn, length, reference) for length in truncations],
    }


def _truncation(
    subject: Subject,
    policies: Mapping[str, BehaviorPolicy],
    drawn: Mapping[str, Sampled],
    length: int,
    reference: str,
) -> dict[str, Any]:
    success: dict[str, dict[str, NDArray[np.float64]]] = {}
    found: dict[str, Any] = {"length": length, "policies": {}, "relative": {}, "difference": {}}
    for name, rollouts in drawn.items():
        success[name] = {
            continuer: subject.problem_means(
                subject.remember(
                    f"{continuer} continuations of {canonical(policies[name])!r} at {length}",
                    partial(_continuation_rewards, subject, rollouts, length, continuer),
                )
            )
            for continuer in CONTINUERS
        }
        found["policies"][name] = {
            "ended": float(np.mean([_ended(rollouts, row, length) for row in range(len(rollouts.rewards))])),
            "success": {
                continuer: _dict(mean_estimate(success_P[None], level=LEVEL, bounds=(0, 1)))
                for continuer, success_P in success[name].items()
            },
        }
    for name in drawn:
        if name != reference:
            pairs = {continuer: (success[name][continuer], success[reference][continuer]) for continuer in CONTINUERS}
            found["relative"][name] = {continuer: relative_success(*pair) for continuer, pair in pairs.items()}
            found["difference"][name] = {continuer: _difference(*pair) for continuer, pair in pairs.items()}
    return found


def check_truncations(truncations: Sequence[int], max_new_tokens: int) -> None:
    for length in truncations:
        if not 0 <= length < max_new_tokens:
            raise InputError(f"truncation {length} leaves nothing to continue; give lengths in [0, {max_new_tokens})")


def _ended(rollouts: Sampled, row: int, length: int) -> bool:
    return rollouts.stopped[row] and len(rollouts.completions[row]) <= length


def _continuation_rewards(subject: Subject, rollouts: Sampled, length: int, continuer: str) -> list[float]:
    """`[N]` rewards of rollouts cut after `length` tokens and continued; of those that had ended, their own."""
    prefixes = {
        row: completion[:length]
        for row, completion in enumerate(rollouts.completions)
        if not _ended(rollouts, row, length)
    }
    model = subject.teacher if continuer == "teacher" else subject.student
    rewards = subject.continued(model, prefixes, f"continuation by the {continuer} at {length}")
    return [rewards.get(row, reward) for row, reward in enumerate(rollouts.rewards)]


# ---- curves over budgets and over SKD's top-k ----


def budget_curve(subject: Subject, *, budgets: Sequence[float] = KL_BUDGETS) -> list[dict[str, Any]]:
    """What rollouts of the trust region are like at each KL budget (paper, section 6, diagnostic 4).

    The paper averages over the first 25 steps of training; here the models stand still.

    Args:
        subject: models and problems.
        budgets: ε in nats per token, each at least 0; infinite for the teacher.

    Returns:
        Per budget, a mapping of `kl_budget` (as given) and estimates, each with `value` and a 95% `interval` over
        problems:

        - token means: `teacher_log_prob` and `student_log_prob` of the sampled tokens, `teacher_entropy`,
          `teacher_weight`, `accept_rate` (student drafts kept);
        - rollout means: `reward`, `length`, `stop_rate`;
        - `reward_difference` and `teacher_log_prob_difference` to the first budget, paired by problem;
        - `sequence_kl`: the rollout's summed KL(μ || student), an unbiased estimate of the divergence between the laws
          of whole completions, and `sequence_kl_bound`: mean length x ε (null for an infinite budget);
        - `auroc`: how well the rollout's mean of log teacher - log student ranks correct above incorrect; null where
          all rollouts are right, or all wrong.

    Raises:
        ValueError: a negative budget, or none.
    """
    if not len(budgets):
        raise InputError("budgets is empty; give at least one KL budget")
    first = subject.rollouts(TrustRegionPolicy(budgets[0]))
    return [_budget_point(subject, budget, subject.rollouts(TrustRegionPolicy(budget)), first) for budget in budgets]


def _budget_point(subject: Subject, budget: float, rollouts: Sampled, first: Sampled) -> dict[str, Any]:
    totals, lengths = rollouts.totals, rollouts.lengths
    return {
        "kl_budget": budget,
        **_law_numbers(subject, rollouts),
        "reward_difference": _difference(subject.problem_means(rollouts.rewards), subject.problem_means(first.rewards)),
        "teacher_log_prob_difference": _difference(
            *(_token_mean_shares(subject, one.totals["teacher_log_prob"], one.lengths) for one in (rollouts, first))
        ),
        "sequence_kl": _mean(subject, totals["kl_student"]),
        "sequence_kl_bound": _mean(subject, np.multiply(lengths, budget)) if math.isfinite(budget) else None,
        "auroc": _auroc(subject, rollouts),
    }


def _law_numbers(subject: Subject, rollouts: Sampled) -> dict[str, Any]:
    """What is reported of the rollouts of any policy."""
    lengths = rollouts.lengths
    columns = ("teacher_log_prob", "student_log_prob", "teacher_entropy", "teacher_weight")
    return {
        **{name: _per_token(subject, rollouts.totals[name], lengths) for name in columns},
        "accept_rate": _per_token(subject, list(map(sum, rollouts.accepted)), lengths),
        "reward": _mean(subject, rollouts.rewards, (0, 1)),
        "length": _mean(subject, lengths),
        "stop_rate": _mean(subject, rollouts.stopped, (0, 1)),
    }


def _difference(first_P: NDArray[np.float64], second_P: NDArray[np.float64]) -> dict[str, Any]:
    return _dict(paired_difference(first_P[None], second_P[None], level=LEVEL))


def _auroc(subject: Subject, rollouts: Sampled) -> dict[str, Any] | None:
    if len(set(rollouts.rewards)) < 2:
        return None
    ratios = np.subtract(rollouts.totals["teacher_log_prob"], rollouts.totals["student_log_prob"])
    scores = ratios / np.asarray(rollouts.lengths)
    groups = [subject.problem_numbers[problem] for problem in subject.problem_of_row]
    return _dict(auroc_estimate(scores, rollouts.rewards, groups, level=LEVEL))


def replacement_curve(
    subject: Subject, *, top_ks: Sequence[int] = SKD_TOP_K, teacher_temperature: float = 0.6
) -> list[dict[str, Any]]:
    """Share of the tokens that SKD replaces by a teacher sample, by its top-k (paper, section 6, diagnostic 7).

    Returns:
        Per k, a mapping of `teacher_top_k` and estimates as in `budget_curve`; `replaced` is the share.

    Raises:
        ValueError: a top-k below 1 or a temperature that is not positive.
    """
    points = []
    for top_k in top_ks:
        rollouts = subject.rollouts(SKDPolicy(top_k, teacher_temperature))
        replaced = [sum(accepted == 0 for accepted in row) for row in rollouts.accepted]
        share = _per_token(subject, replaced, rollouts.lengths)
        points.append({"teacher_top_k": top_k, "replaced": share, **_law_numbers(subject, rollouts)})
    return points


# ---- excerpts ----


def matched_excerpts(
    subject: Subject, *, policies: Mapping[str, BehaviorPolicy], prompts: int = 4, top: int = 3
) -> list[dict[str, Any]]:
    """The same problems under several policies, token by token (paper, section 6, diagnostic 6).

    Args:
        subject: models and problems.
        policies: name -> policy.
        prompts: how many problems, from the first; one rollout of each.
        top: likeliest tokens per law and position; 0 for none.

    Returns:
        Records in the format of rollouts.jsonl, problem by problem, each with its `policy`'s name.
    """
    if prompts < 0:
        raise InputError(f"prompts must be at least 0, got {prompts}")
    rows = [problem * subject.samples for problem in range(min(prompts, len(subject.rows)))]
    by_policy = []
    for name, policy in policies.items():
        rollouts = subject.rollouts(policy)
        completions = [rollouts.completions[row] for row in rows]
        scores = subject.score(policy, rows, completions, top)
        by_policy.append([_excerpt(subject, name, row, rollouts, scores, place) for place, row in enumerate(rows)])
    return [record for records in zip(*by_policy, strict=True) for record in records]


def _excerpt(
    subject: Subject, name: str, row: int, rollouts: Sampled, scores: TokenScores, place: int
) -> dict[str, Any]:
    completion = rollouts.completions[row]
    problem = subject.problem_of_row[row]
    prompt, (taught,) = subject.prompts[problem], subject.taught([problem]) or [subject.prompts[problem]]

    def decode(token: int) -> str:
        return str(subject.tokenizer.decode([token]))

    def text(ids: list[int]) -> str:
        return str(subject.tokenizer.decode(ids, skip_special_tokens=False))

    return {
        "policy": name,
        "step": 0,
        "prompt": text(prompt),
        **({} if taught == prompt else {"teacher_prompt": text(taught)}),
        "prompt_key": f"{prompt_key(prompt):016x}",
        "rollout_index": row % subject.samples,
        "completion": subject.tokenizer.decode(completion, skip_special_tokens=True),
        "tokens": list(map(decode, completion)),
        "reward": rollouts.rewards[row],
        "teacher_weight": scores.teacher_weight[place],
        "kl_student": scores.kl_student[place],
        "accepted": rollouts.accepted[row],
        **score_record(scores, place, decode),
    }


# ---- everything for a recipe ----


def default_truncations(max_new_tokens: int) -> tuple[int, ...]:
    """Cuts at 1/16, 1/8, 1/4 and 1/2 of the longest completion."""
    return tuple(sorted({max(1, max_new_tokens * share // 16) for share in (1, 2, 4, 8)} & set(range(max_new_tokens))))
