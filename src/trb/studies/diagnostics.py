"""Diagnostics of a student-teacher pair: what blending does to the prefixes a student visits (paper, section 6).

Everything is measured on rollouts of fixed models: at step 0, or on any saved student. A `Subject` says which models
and problems, and draws and grades completions once per behavior policy, however many diagnostics look at them. Policies
share their random numbers, so that differences have less noise than either side. Intervals speak about problems like
these, given these models; they say nothing about other training runs.

`probe` runs everything for a recipe and leaves probe.json, rollouts.jsonl and provenance.json. It is a single process.

Left out on purpose: comparing trained methods and their learning curves (`trb.studies.sweep`), and drawing
(`trb.report`).

Shape suffixes: N rows (rollouts), P problems.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trb.policies import BehaviorPolicy, SKDPolicy, StudentPolicy, TrustRegionPolicy
from trb.records import PART, PARTS, PROBE, PROBE_SETTINGS, PROVENANCE, ROLLOUTS, RUN_MARKS, part_name
from trb.safety.files import finite
from trb.sampling import NonFiniteLogitsError, Rollout, prompt_key, sample, stream_seed
from trb.sampling.scoring import TokenScores, score_completions
from trb.studies import provenance
from trb.studies.experiments import (
    Listener,
    RunDirectoryError,
    load_pair,
    load_tokenizers,
    make_again,
    model_of_run,
    precision,
    problem_sets,
    sole_run,
    template_options,
)
from trb.studies.recipe import Recipe
from trb.studies.statistics import Estimate, auroc_estimate, mean_estimate, paired_difference
from trb.studies.yaml_files import ConfigError
from trb.tasks.grading import Verifier
from trb.tasks.prompts import render
from trb.training.recording import score_record
from trb.vocab import SharedVocabulary, check_heads, head_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "KL_BUDGETS",
    "SKD_TOP_K",
    "Sampled",
    "Subject",
    "budget_curve",
    "continuation_probe",
    "default_truncations",
    "matched_excerpts",
    "probe",
    "replacement_curve",
]

KL_BUDGETS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05)
"""The student itself and the paper's sweep of ε0, in nats per token."""
SKD_TOP_K = (5, 15, 25, 50)
"""The paper's sweep of SKD's K, and a smaller one."""

_LEVEL = 0.95
# Columns of `trb.sampling.scoring.TokenScores` that are kept as a sum per rollout.
_TOTALS = ("student_log_prob", "teacher_log_prob", "teacher_entropy", "kl_student", "kl_teacher", "teacher_weight")
_CONTINUERS = ("student", "teacher")
_ROWS = 256  # completions in flight unless the recipe says otherwise
# What the numbers of a probe depend on; rows in flight and the device only round differently.
_READ_OF_RECIPE = (
    *("student_revision", "student_dtype", "student_keep_layers", "teacher", "teacher_revision", "teacher_dtype"),
    *("chat_template", "system_prompt", "eval_data", "eval_split", "eval_seed", "eval_limit", "reward_timeout_s"),
)
_NOT_KEPT = ("recipe", "max_rows", "device")

Remember = Callable[[str, Callable[[], Any]], Any]
"""`remember(name, compute)`: what was computed under that name before, or `compute()` now."""


class _Memory:
    """Remembers for as long as it lives."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.found:
            self.found[name] = compute()
        return self.found[name]


@dataclass(frozen=True)
class Sampled:
    """Rollouts under one policy: row `problem * samples + sample`, lists of length N.

    Attributes:
        completions: token ids, the stop token included.
        stopped: whether a stop token ended the row.
        rewards: 1.0 right, 0.0 wrong.
        accepted: per token, 1.0 where the student's draft was kept.
        totals: sums over each row's tokens of columns of `trb.sampling.scoring.TokenScores`, under this policy.
    """

    completions: list[list[int]]
    stopped: list[bool]
    rewards: list[float]
    accepted: list[list[float]]
    totals: dict[str, list[float]]

    @property
    def lengths(self) -> list[int]:
        return [len(completion) for completion in self.completions]


@dataclass(frozen=True)
class Subject:
    """Two models, problems, and how completions are drawn and graded.

    Attributes:
        student: a causal LM; `teacher` another one with its tokenizer.
        tokenizer: the student's, with its chat template.
        problems: rows of `trb.tasks.prompts.load_prompts`, each with an answer.
        verifier: grades completions.
        samples: rollouts per problem and policy.
        max_new_tokens: the longest completion, continuations included.
        temperature: divides both models' logits.
        seed: of every draw.
        max_rows: completions in flight at once; None for all.
        teacher_tokenizer: names the teacher's stop id where its generation config does not.
        template_options: keyword arguments of the chat template.
        remember: keeps finished parts; by default in memory. Parts are JSON values.

    Raises:
        ValueError: fewer than two problems, no samples, a problem without an answer, or a head that does not cover the
            tokenizer.
    """

    student: "PreTrainedModel"
    teacher: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    problems: Sequence[Mapping[str, Any]]
    verifier: Verifier
    samples: int = 4
    max_new_tokens: int = 1024
    temperature: float = 1.0
    seed: int = 0
    max_rows: int | None = None
    teacher_tokenizer: "PreTrainedTokenizerBase | None" = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    remember: Remember = field(default_factory=_Memory)

    def __post_init__(self) -> None:
        if self.samples < 1 or len(self.problems) < 2:
            raise ValueError(
                f"an interval over problems needs two problems and a sample of each, got {len(self.problems)} problems "
                f"and samples={self.samples}"
            )
        for index, row in enumerate(self.rows):
            if not row["answer"] and row.get("verifier", "math") in ("math", "exact"):
                raise ValueError(
                    f"problem {index + 1} of {len(self.rows)} has no answer to score against; leave it out"
                )
        check_heads(head_rows(self.student), head_rows(self.teacher), max(self.tokenizer.get_vocab().values()) + 1)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.problems]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids of each problem's prompt."""
        return render(self.tokenizer, self.rows, **self.template_options)

    @cached_property
    def vocabulary(self) -> SharedVocabulary:
        """The events of the pair."""
        return SharedVocabulary.of_pair(self.student, self.teacher, self.tokenizer, self.teacher_tokenizer)

    @property
    def problem_of_row(self) -> list[int]:
        """`[N]` which problem each rollout belongs to."""
        return [problem for problem in range(len(self.rows)) for _ in range(self.samples)]

    def rollouts(self, policy: BehaviorPolicy) -> Sampled:
        """`samples` graded rollouts of every problem under `policy`; drawn once, then remembered."""
        policy = _canonical(policy)
        return Sampled(**self.remember(f"rollouts of {policy!r}", lambda: vars(self._draw(policy))))

    def continued(self, model: "PreTrainedModel", prefixes: Mapping[int, list[int]], stream: str) -> dict[int, float]:
        """Rewards of rows whose prefix `model` writes on to the end, up to `max_new_tokens` in all.

        `prefixes` maps rows to the first tokens of their completions, all of one length. Rows share the random numbers
        of `stream` with the same rows of other prefixes.
        """
        rows = list(prefixes)
        if not rows:
            return {}
        problems = [self.problem_of_row[row] for row in rows]
        longest = self.max_new_tokens - len(prefixes[rows[0]])
        prompts = [self.prompts[problem] + prefixes[row] for problem, row in zip(problems, rows, strict=True)]
        rollout = self._sample(model, None, prompts, rows, StudentPolicy(), longest, stream)
        whole = [prefixes[row] + completion for row, completion in zip(rows, rollout.completions, strict=True)]
        return dict(zip(rows, self._grade(whole, problems), strict=True))

    def score(
        self, policy: BehaviorPolicy, rows: Sequence[int], completions: Sequence[Sequence[int]], top: int = 0
    ) -> TokenScores:
        """`trb.sampling.scoring.score_completions` of completions of the given rows, under `policy`.

        Raises NonFiniteLogitsError where a model that has only been read here has no law.
        """
        scores = score_completions(
            self.student,
            self.teacher,
            [self.prompts[self.problem_of_row[row]] for row in rows],
            completions,
            policy=policy,
            vocabulary=self.vocabulary,
            temperature=self.temperature,
            top=top,
            max_rows=self.max_rows,
        )
        for place, row in enumerate(rows):
            for model in ("student", "teacher"):
                for position, entropy in enumerate(getattr(scores, f"{model}_entropy")[place]):
                    if math.isnan(entropy):
                        raise NonFiniteLogitsError(model, row, position)
        return scores

    def _draw(self, policy: BehaviorPolicy) -> Sampled:
        rows = list(range(len(self.problem_of_row)))
        prompts = [self.prompts[problem] for problem in self.problem_of_row]
        teacher = self.teacher if policy.needs_teacher else None
        rollout = self._sample(self.student, teacher, prompts, rows, policy, self.max_new_tokens, "rollout")
        scores = self.score(policy, rows, rollout.completions)
        return Sampled(
            completions=rollout.completions,
            stopped=rollout.stopped,
            rewards=self._grade(rollout.completions, self.problem_of_row),
            accepted=rollout.stats.accepted,
            totals={name: [math.fsum(row) for row in getattr(scores, name)] for name in _TOTALS},
        )

    def _sample(
        self,
        model: "PreTrainedModel",
        teacher: "PreTrainedModel | None",
        prompts: list[list[int]],
        rows: list[int],
        policy: BehaviorPolicy,
        max_new_tokens: int,
        stream: str,
    ) -> Rollout:
        return sample(
            model,
            teacher,
            prompts,
            policy,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.vocabulary.stop_ids,
            vocab_size=self.vocabulary.size,
            temperature=self.temperature,
            seed=stream_seed(self.seed, "diagnostics", stream),
            prompt_keys=[prompt_key(self.prompts[self.problem_of_row[row]]) for row in rows],
            rollout_index=[row % self.samples for row in rows],
            max_rows=self.max_rows,
        )

    def _grade(self, completions: list[list[int]], problems: Sequence[int]) -> list[float]:
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return self.verifier.score(texts, [self.rows[problem] for problem in problems])

    def problem_means(self, values: ArrayLike) -> NDArray[np.float64]:
        """`[P]` means over each problem's rollouts of `[N]` values."""
        return np.asarray(values, dtype=np.float64).reshape(len(self.rows), self.samples).mean(axis=1)


def _canonical(policy: BehaviorPolicy) -> BehaviorPolicy:
    """One name for the student's own law: a budget of 0 gives the same tokens."""
    return StudentPolicy() if policy == TrustRegionPolicy(0.0) else policy


# ---- estimates over problems ----


def _mean(subject: Subject, values: ArrayLike, bounds: tuple[float, float] | None = None) -> dict[str, Any]:
    """Mean over rollouts, its interval over problems."""
    return _dict(mean_estimate(subject.problem_means(values)[None], level=_LEVEL, bounds=bounds))


def _per_token(subject: Subject, totals: ArrayLike, lengths: ArrayLike) -> dict[str, Any]:
    """Mean over tokens, its interval over problems."""
    return _dict(mean_estimate(_token_mean_shares(subject, totals, lengths)[None], level=_LEVEL))


def _token_mean_shares(subject: Subject, totals: ArrayLike, lengths: ArrayLike) -> NDArray[np.float64]:
    """`[P]` values whose mean is the mean over tokens: the ratio of two means, linearised (Cochran, 1977, ch. 6)."""
    total_P, length_P = subject.problem_means(totals), subject.problem_means(lengths)
    value = total_P.sum() / length_P.sum()
    return value + (total_P - value * length_P) / length_P.mean()


def _relative(first_P: NDArray[np.float64], second_P: NDArray[np.float64]) -> dict[str, Any] | None:
    """Ratio of two means over the same problems, linearised in its logarithm; None where a mean is zero.

    With 4 rollouts a problem and success rates from 0.1 to 0.5, nominal 95% intervals covered 94% to 95% of the time
    with 20 problems and with 64; resampling problems covered 91% to 95%.
    """
    first, second = first_P.mean(), second_P.mean()
    if not (first > 0 and second > 0):
        return None
    log_ratio = mean_estimate((math.log(first / second) + first_P / first - second_P / second)[None], level=_LEVEL)
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
        raise ValueError(f"reference is {reference!r}; choose one of the policies: {', '.join(policies)}")
    _check_truncations(truncations, subject.max_new_tokens)
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
                    f"{continuer} continuations of {_canonical(policies[name])!r} at {length}",
                    partial(_continuation_rewards, subject, rollouts, length, continuer),
                )
            )
            for continuer in _CONTINUERS
        }
        found["policies"][name] = {
            "ended": float(np.mean([_ended(rollouts, row, length) for row in range(len(rollouts.rewards))])),
            "success": {
                continuer: _dict(mean_estimate(success_P[None], level=_LEVEL, bounds=(0, 1)))
                for continuer, success_P in success[name].items()
            },
        }
    for name in drawn:
        if name != reference:
            pairs = {continuer: (success[name][continuer], success[reference][continuer]) for continuer in _CONTINUERS}
            found["relative"][name] = {continuer: _relative(*pair) for continuer, pair in pairs.items()}
            found["difference"][name] = {continuer: _difference(*pair) for continuer, pair in pairs.items()}
    return found


def _check_truncations(truncations: Sequence[int], max_new_tokens: int) -> None:
    for length in truncations:
        if not 0 <= length < max_new_tokens:
            raise ValueError(f"truncation {length} leaves nothing to continue; give lengths in [0, {max_new_tokens})")


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
        raise ValueError("budgets is empty; give at least one KL budget")
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
    return _dict(paired_difference(first_P[None], second_P[None], level=_LEVEL))


def _auroc(subject: Subject, rollouts: Sampled) -> dict[str, Any] | None:
    if len(set(rollouts.rewards)) < 2:
        return None
    ratios = np.subtract(rollouts.totals["teacher_log_prob"], rollouts.totals["student_log_prob"])
    scores = ratios / np.asarray(rollouts.lengths)
    return _dict(auroc_estimate(scores, rollouts.rewards, subject.problem_of_row, level=_LEVEL))


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
    subject: Subject, *, policies: Mapping[str, BehaviorPolicy], prompts: int = 4, top: int = 3, step: int = 0
) -> list[dict[str, Any]]:
    """The same problems under several policies, token by token (paper, section 6, diagnostic 6).

    Args:
        subject: models and problems.
        policies: name -> policy.
        prompts: how many problems, from the first; one rollout of each.
        top: likeliest tokens per law and position; 0 for none.
        step: recorded as the optimizer step.

    Returns:
        Records in the format of rollouts.jsonl, problem by problem, each with its `policy`'s name.
    """
    if prompts < 0:
        raise ValueError(f"prompts must be at least 0, got {prompts}")
    rows = [problem * subject.samples for problem in range(min(prompts, len(subject.rows)))]
    by_policy = []
    for name, policy in policies.items():
        rollouts = subject.rollouts(policy)
        completions = [rollouts.completions[row] for row in rows]
        scores = subject.score(policy, rows, completions, top)
        by_policy.append(
            [_excerpt(subject, name, row, rollouts, scores, place, step) for place, row in enumerate(rows)]
        )
    return [record for records in zip(*by_policy, strict=True) for record in records]


def _excerpt(
    subject: Subject, name: str, row: int, rollouts: Sampled, scores: TokenScores, place: int, step: int
) -> dict[str, Any]:
    completion = rollouts.completions[row]
    prompt = subject.prompts[subject.problem_of_row[row]]

    def decode(token: int) -> str:
        return str(subject.tokenizer.decode([token]))

    return {
        "policy": name,
        "step": step,
        "prompt": subject.tokenizer.decode(prompt, skip_special_tokens=False),
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


def probe(
    recipe: Recipe,
    output_dir: str | os.PathLike[str],
    *,
    model: str | None = None,
    budgets: Sequence[float] = KL_BUDGETS,
    truncations: Sequence[int] | None = None,
    kl_budget: float | None = None,
    skd_top_k: Sequence[int] = SKD_TOP_K,
    problems: int = 128,
    samples: int = 4,
    excerpts: int = 4,
    alternatives: int = 3,
    max_new_tokens: int | None = None,
    max_rows: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Every diagnostic of a recipe's pair, on its evaluation problems; returns what probe.json holds.

    Writes probe.json (infinities as null), provenance.json and rollouts.jsonl (the excerpts). Finished parts stay in
    parts/, from where a killed probe goes on; a finished probe with the same settings is returned as it is.

    Args:
        recipe: a checked recipe with `eval_data`. Its methods, if any, only tell the settings of trb and skd.
        output_dir: the directory of this probe.
        model: another student than the recipe's: a run directory (its model/ is read), or a model spec.
        budgets: of `budget_curve`; empty to leave it out.
        truncations: of `continuation_probe`, in tokens; by default `default_truncations`, empty to leave it out.
        kl_budget: of the trust region in the continuation probe and the excerpts; by default the recipe's.
        skd_top_k: of `replacement_curve`, at the recipe's `skd_teacher_temperature`; empty to leave it out.
        problems: at most so many of every problem set.
        samples: rollouts per problem and policy.
        excerpts: problems shown token by token; 0 for none.
        alternatives: likeliest tokens per law shown with each token.
        max_new_tokens: longest completion; by default the recipe's max_completion_length.
        max_rows: completions in flight; by default `eval_max_rows` of the recipe, or 256.
        seed: of the draws; by default the recipe's.
        overwrite: remove the probe that the directory holds.
        listener: hears about progress.

    Raises:
        ConfigError: a recipe without evaluation data.
        RunDirectoryError: the directory holds a probe with other settings.
        ValueError, OSError: a value out of range, or models or data that cannot be loaded or do not go together.
    """
    if not recipe.run.eval_data:
        raise ConfigError(f"{recipe.source}: eval_data is empty; a probe needs problems with answers")
    directory, listener = Path(output_dir), listener or Listener()
    settings = _Settings.of(
        recipe,
        directory,
        model=model,
        budgets=tuple(map(float, budgets)),
        truncations=truncations,
        kl_budget=kl_budget,
        skd_top_k=tuple(skd_top_k),
        problems=problems,
        samples=samples,
        excerpts=excerpts,
        alternatives=alternatives,
        max_new_tokens=max_new_tokens,
        max_rows=max_rows,
        seed=seed,
    )
    with sole_run(directory, inside=True):  # beside the runs of a study, it touches none of them
        return _probe_alone(recipe, settings, directory, overwrite, listener)


def _probe_alone(
    recipe: Recipe, settings: "_Settings", directory: Path, overwrite: bool, listener: Listener
) -> dict[str, Any]:
    """The probe itself, in a directory that nobody else writes to."""
    if overwrite:
        _clear(directory)
    parts = _Parts(directory / PARTS, listener)
    parts.claim(settings.to_dict())
    finished = directory / PROBE
    if finished.exists():
        try:
            return PROBE.read(finished)
        except ValueError:
            make_again(finished)
    provenance.write(directory)
    with Verifier(recipe.run.reward_timeout_s) as verifier:
        results = _measure(settings, verifier, parts, directory, listener)
    PROBE.write(finished, results)
    return results


@dataclass(frozen=True)
class _Settings:
    """Everything that decides the numbers of a probe."""

    recipe: Recipe
    student: str
    budgets: tuple[float, ...]
    truncations: tuple[int, ...]
    kl_budget: float
    skd_top_k: tuple[int, ...]
    skd_default_top_k: int
    skd_temperature: float
    problems: int
    samples: int
    excerpts: int
    alternatives: int
    max_new_tokens: int
    max_rows: int
    seed: int
    temperature: float
    template_options: Mapping[str, Any]
    dtype: str | None
    device: str

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        directory: Path,
        *,
        model: str | None,
        truncations: Sequence[int] | None,
        kl_budget: float | None,
        max_new_tokens: int | None,
        max_rows: int | None,
        seed: int | None,
        **given: Any,
    ) -> "_Settings":
        args = recipe.training_config(directory)
        if args.world_size > 1:
            raise ConfigError("a probe runs in one process; start it without a launcher")
        trb, skd = (_variant(recipe, method).training_config(directory) for method in ("trb", "skd"))
        longest = int(args.max_completion_length or 0) if max_new_tokens is None else max_new_tokens
        return cls(
            recipe=recipe,
            student=recipe.run.student if model is None else model_of_run(model),
            truncations=default_truncations(longest) if truncations is None else tuple(truncations),
            kl_budget=trb.initial_kl_budget if kl_budget is None else kl_budget,
            skd_default_top_k=skd.skd_teacher_top_k,
            skd_temperature=skd.skd_teacher_temperature,
            max_new_tokens=longest,
            max_rows=max_rows or recipe.run.eval_max_rows or _ROWS,
            seed=args.seed if seed is None else seed,
            temperature=args.temperature,
            template_options=template_options(args),
            dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
            device=str(args.device),
            **given,
        )

    def __post_init__(self) -> None:
        for name, smallest in (("problems", 2), ("samples", 1), ("excerpts", 0), ("alternatives", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        for name in ("max_new_tokens", "max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_truncations(self.truncations, self.max_new_tokens)
        for budget in (*self.budgets, self.kl_budget):
            TrustRegionPolicy(budget)
        for top_k in self.skd_top_k:
            SKDPolicy(top_k, self.skd_temperature)

    def to_dict(self) -> dict[str, Any]:
        """What another probe must agree on to go on from this one's parts, as JSON types."""
        run = replace(self.recipe.run, eval_limit=self._limit)
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in _NOT_KEPT}
        return json.loads(json.dumps({name: getattr(run, name) for name in _READ_OF_RECIPE} | own))

    @property
    def _limit(self) -> int:
        return min(self.problems, self.recipe.run.eval_limit or self.problems)

    def load(self, verifier: Verifier, remember: Remember) -> tuple[Subject, dict[str, int]]:
        """The subject, and how many problems each set contributed."""
        run = replace(self.recipe.run, eval_limit=self._limit)
        tokenizer, teacher_tokenizer = load_tokenizers(run)
        sets = problem_sets(run)
        if self.student != run.student:
            run = replace(run, student=self.student, student_revision=None)
        student, teacher = (model.to(self.device) for model in load_pair(run))  # type: ignore[arg-type]
        subject = Subject(
            student,
            teacher,
            tokenizer,
            [row for rows in sets.values() for row in rows],
            verifier,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            max_rows=self.max_rows,
            teacher_tokenizer=teacher_tokenizer,
            template_options=self.template_options,
            remember=remember,
        )
        return subject, {name: len(rows) for name, rows in sets.items()}


def _variant(recipe: Recipe, method: str) -> Recipe:
    """The recipe of the first entry that trains by `method`, or else the recipe itself."""
    for name, entry in recipe.run.methods.items():
        if (entry or {}).get("method", name) == method:
            return recipe.for_method(name)
    return recipe


def _measure(
    settings: _Settings, verifier: Verifier, parts: "_Parts", directory: Path, listener: Listener
) -> dict[str, Any]:
    listener.stage("loading models and problems")
    subject, counts = settings.load(verifier, parts)
    trust_region = TrustRegionPolicy(settings.kl_budget)
    policies: dict[str, BehaviorPolicy] = {"student": StudentPolicy(), "trb": trust_region}
    shown = {**policies, "skd": SKDPolicy(settings.skd_default_top_k, settings.skd_temperature)}
    results: dict[str, Any] = {
        "student": settings.student,
        "teacher": settings.recipe.run.teacher,
        "problems": counts,
        "samples": settings.samples,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "kl_budget": settings.kl_budget,
        "skd_teacher_temperature": settings.skd_temperature,
        "seed": settings.seed,
        "level": _LEVEL,
        "continuation": None,
        "budgets": None,
        "replacement": None,
    }
    with precision(settings.recipe.training_config(directory)):
        if settings.truncations:
            results["continuation"] = continuation_probe(subject, policies=policies, truncations=settings.truncations)
        if settings.budgets:
            results["budgets"] = budget_curve(subject, budgets=settings.budgets)
        if settings.skd_top_k:
            results["replacement"] = replacement_curve(
                subject, top_ks=settings.skd_top_k, teacher_temperature=settings.skd_temperature
            )
        if settings.excerpts:
            listener.stage("excerpts")
            records = matched_excerpts(subject, policies=shown, prompts=settings.excerpts, top=settings.alternatives)
            ROLLOUTS.write(directory / ROLLOUTS, records)
    return finite({**results, "provenance": provenance.describe()})


class _Parts:
    """Remembers finished parts as files, so that a killed probe goes on from there."""

    def __init__(self, folder: Path, listener: Listener) -> None:
        self.folder, self.listener = folder, listener

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        path = self.folder / part_name(name)
        if path.exists():
            try:
                return PART.read(path)
            except ValueError:
                make_again(path)
        self.listener.stage(name)
        value = compute()
        PART.write(path, value)
        return value

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Take the folder for these settings, or refuse if it was taken for others."""
        path, directory = self.folder / PROBE_SETTINGS, self.folder.parent
        runs = [file for file in RUN_MARKS if (directory / file).exists()]
        if runs:
            raise RunDirectoryError(f"{directory} holds {runs[0]} of a training run; give the probe its own directory")
        begun = [part for part in self.folder.glob("*") if PART.claims(part) and part != path]
        if begun and path.exists():
            there = PROBE_SETTINGS.read(path)
            different = [key for key in dict.fromkeys([*there, *settings]) if there.get(key) != settings.get(key)]
            if different:
                named = "; ".join(
                    f"{key} is {there.get(key)!r} there and {settings.get(key)!r} here" for key in different
                )
                raise RunDirectoryError(
                    f"{directory} holds another probe: {named}. Use another output directory, or --overwrite to "
                    "remove what is there"
                )
        PROBE_SETTINGS.write(path, settings)


def _clear(directory: Path) -> None:
    """Remove what a probe writes, and nothing else."""
    if (directory / PARTS / PROBE_SETTINGS).exists():
        shutil.rmtree(directory / PARTS)
        for file in (PROBE, ROLLOUTS, PROVENANCE):
            (directory / file).unlink(missing_ok=True)
