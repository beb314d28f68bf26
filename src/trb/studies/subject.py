"""A pair and its problems, sampled and scored once however many diagnostics ask.

Left out: the diagnostics (`trb.studies.diagnostics`), and where results are kept between processes: whoever gives
`remember` decides that.

Shape suffixes: N rows (rollouts), P problems.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trb.errors import InputError
from trb.measures import shares_by_unit
from trb.models.tokens import check_not_empty
from trb.policies import BehaviorPolicy, StudentPolicy, TrustRegionPolicy
from trb.sampling import NonFiniteLogitsError, Rollout, prompt_key, sample, stream_seed
from trb.sampling.scoring import TokenScores, score_completions
from trb.tasks.grading import Verifier, can_be_scored
from trb.tasks.prompts import render
from trb.vocab import SharedVocabulary, check_heads, head_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CONTINUERS", "ROWS", "Remember", "Sampled", "Subject", "canonical"]

# Columns of `trb.sampling.scoring.TokenScores` that are kept as a sum per rollout.
_TOTALS = ("student_log_prob", "teacher_log_prob", "teacher_entropy", "kl_student", "kl_teacher", "teacher_weight")

CONTINUERS = ("student", "teacher")

ROWS = 256  # completions in flight unless the recipe says otherwise

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
        teacher_problems: the problems with the prompts that the teacher reads in place of the student's; None for the
            same.
        remember: keeps finished parts; by default in memory. Parts are JSON values.

    Raises:
        ValueError: fewer than two different problems, no samples, a problem without an answer or of no token, or a
            head that does not cover the tokenizer.
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
    teacher_problems: Sequence[Mapping[str, Any]] | None = None
    remember: Remember = field(default_factory=_Memory)

    def __post_init__(self) -> None:
        if self.samples < 1 or len(self.problems) < 2:
            raise InputError(
                f"an interval over problems needs two problems and a sample of each, got {len(self.problems)} problems "
                f"and samples={self.samples}"
            )
        for index, row in enumerate(self.rows):
            if not can_be_scored(row):
                raise InputError(
                    f"problem {index + 1} of {len(self.rows)} has no answer to score against; leave it out"
                )
        check_heads(head_rows(self.student), head_rows(self.teacher), max(self.tokenizer.get_vocab().values()) + 1)
        count = len(self.rows)
        check_not_empty([*map(len, self.prompts)], lambda row: f"problem {row + 1} of {count}")
        taught = self.teacher_prompts or []
        check_not_empty([*map(len, taught)], lambda row: f"the teacher's prompt of problem {row + 1} of {count}")
        if not any(self.problem_numbers):
            raise InputError(f"the {len(self.rows)} problems are one, copied; an interval needs two different ones")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.problems]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids of each problem's prompt."""
        return render(self.tokenizer, self.rows, **self.template_options)

    @cached_property
    def teacher_prompts(self) -> list[list[int]] | None:
        """Token ids of each problem's prompt as the teacher reads it; None for the student's."""
        if self.teacher_problems is None:
            return None
        return render(self.tokenizer, self.teacher_problems, **self.template_options)

    def taught(self, problems: Sequence[int]) -> list[list[int]] | None:
        """What the teacher reads before completions of some problems; None for what the student reads."""
        return self.teacher_prompts and [self.teacher_prompts[problem] for problem in problems]

    @cached_property
    def vocabulary(self) -> SharedVocabulary:
        """The events of the pair."""
        return SharedVocabulary.of_pair(self.student, self.teacher, self.tokenizer, self.teacher_tokenizer)

    @cached_property
    def problem_numbers(self) -> list[int]:
        """The number of each problem among the distinct ones: copies have one number, and the same rollouts."""
        prompts = list(map(tuple, self.prompts))
        number = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        return [number[prompt] for prompt in prompts]

    @property
    def problem_of_row(self) -> list[int]:
        """`[N]` which problem each rollout belongs to."""
        return [problem for problem in range(len(self.rows)) for _ in range(self.samples)]

    def rollouts(self, policy: BehaviorPolicy) -> Sampled:
        """`samples` graded rollouts of every problem under `policy`; drawn once, then remembered."""
        policy = canonical(policy)
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
        read = self.teacher_prompts if model is self.teacher and self.teacher_prompts else self.prompts
        prompts = [read[problem] + prefixes[row] for problem, row in zip(problems, rows, strict=True)]
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
            teacher_prompts=self.taught([self.problem_of_row[row] for row in rows]),
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
            teacher_prompts=None if teacher is None else self.taught([self.problem_of_row[row] for row in rows]),
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
        """`[P]` means over each problem's rollouts of `[N]` values; copies of a problem are one (`shares_by_unit`)."""
        means = np.asarray(values, dtype=np.float64).reshape(len(self.rows), self.samples).mean(axis=1)
        return shares_by_unit(means, self.problem_numbers)


def canonical(policy: BehaviorPolicy) -> BehaviorPolicy:
    """One name for the student's own law: a budget of 0 gives the same tokens."""
    return StudentPolicy() if policy == TrustRegionPolicy(0.0) else policy
