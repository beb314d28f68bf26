"""What a pair of benchmarks/map.py is like before any training: the numbers that may foretell what blending gains.

Left out: training, and any judgement of which number foretells best.
"""

import math
from collections.abc import Sequence
from typing import Any

from map_pairs import Knobs, Pair, stage_rates
from transformers import AutoModelForCausalLM, AutoTokenizer

from trb.policies import BehaviorPolicy, StudentPolicy, TeacherPolicy, TrustRegionPolicy
from trb.sampling import Rollout, sample
from trb.sampling.scoring import TokenScores, score_completions
from trb.tasks.prompts import load_prompts, render
from trb.vocab import SharedVocabulary
from trb.zoo.tasks import boxed_answer

PROBLEMS, SAMPLES, SEED = 128, 4, 5
SEQUENCE_BUDGET = 4.0  # nats of a whole completion, spread evenly over a solution's tokens
TOP = 4  # of each model, whose sets are compared


def measure_pair(knobs: Knobs, pair: Pair) -> dict[str, Any]:
    """Numbers of rollouts of the student, of a blend at a fixed sequence budget, and of the teacher."""
    length = 3 * knobs.stages + 3  # of a solution
    policies = {
        "student": StudentPolicy(),
        "blend": TrustRegionPolicy(SEQUENCE_BUDGET / length),
        "teacher": TeacherPolicy(),
    }
    subject = _Subject(knobs, pair)
    found = {name: subject.describe(policy, length) for name, policy in policies.items()}
    return {
        "knobs": vars(knobs),
        "sequence_budget": SEQUENCE_BUDGET,
        "rollouts": found,
        "stage_rates": {name: stage_rates(model, subject.tokenizer, knobs) for name, model in subject.models.items()},
    }


class _Subject:
    """The models of a pair, and problems that no run is scored on."""

    def __init__(self, knobs: Knobs, pair: Pair) -> None:
        paths = {"student": pair.student, "teacher": pair.teacher}
        self.models = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in paths.items()}
        self.tokenizer, other = (AutoTokenizer.from_pretrained(path) for path in paths.values())
        student, teacher = self.models.values()
        self.vocabulary = SharedVocabulary.of_pair(student, teacher, self.tokenizer, other)
        limit = min(PROBLEMS, knobs.task.variety(knobs.stages) // 20)
        rows = load_prompts(knobs.data, split="test", limit=limit, seed=SEED)
        self.rows = [dict(row) for row in rows for _ in range(SAMPLES)]
        self.prompts = render(self.tokenizer, self.rows)

    def describe(self, policy: BehaviorPolicy, length: int) -> dict[str, Any]:
        student, teacher = self.models.values()
        rollout = sample(
            student,
            teacher if policy.needs_teacher else None,
            self.prompts,
            policy,
            max_new_tokens=length + 4,
            eos_token_id=self.vocabulary.stop_ids,
            vocab_size=self.vocabulary.size,
            seed=SEED,
            rollout_index=[row % SAMPLES for row in range(len(self.rows))],
        )
        scores = score_completions(
            *(student, teacher, self.prompts, rollout.completions), policy=policy, vocabulary=self.vocabulary, top=TOP
        )
        reverse = (
            scores
            if policy == StudentPolicy()
            else score_completions(
                *(student, teacher, self.prompts, rollout.completions),
                policy=StudentPolicy(),
                vocabulary=self.vocabulary,
            )
        )
        texts = self.tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
        return self._numbers(rollout, scores, reverse.kl_teacher, texts, length)

    def _numbers(
        self, rollout: Rollout, scores: TokenScores, reverse_kl: list[list[float]], texts: list[str], length: int
    ) -> dict[str, Any]:
        answers = [row["answer"] for row in self.rows]
        wrong_at = [
            _first_difference(text, f"\\boxed{{{answer}}}") for text, answer in zip(texts, answers, strict=True)
        ]
        right = [boxed_answer(text) == answer for text, answer in zip(texts, answers, strict=True)]
        half, characters = length // 2, len(answers[0]) + len("\\boxed{}")
        wrong = [at for at in wrong_at if at is not None]
        return {
            "pass_at_1": sum(right) / len(right),
            "length": _mean([list(map(len, rollout.completions))]),
            "accept_rate": _mean(rollout.stats.accepted),
            "teacher_log_prob": _mean(scores.teacher_log_prob),
            "sequence_kl": sum(map(math.fsum, scores.kl_student)) / len(texts),
            "reverse_kl": _mean(reverse_kl),
            "reverse_kl_early": _mean([row[:half] for row in reverse_kl]),
            "reverse_kl_late": _mean([row[half:] for row in reverse_kl]),
            "first_wrong_in_first_half": sum(at < characters / 2 for at in wrong) / max(1, len(wrong)),
            "overlap_of_likeliest": _mean([[_overlap(place) for place in row] for row in scores.alternatives or []]),
            "teacher_log_prob_by_position": _by_position(scores.teacher_log_prob),
            "reverse_kl_by_position": _by_position(reverse_kl),
        }


def _first_difference(text: str, solution: str) -> int | None:
    """The first character at which a completion leaves the solution; None if it does not."""
    same = [a == b for a, b in zip(text, solution, strict=False)]
    if text == solution:
        return None
    return same.index(False) if False in same else min(len(text), len(solution))


def _overlap(laws: dict[str, list[tuple[int, float]]]) -> float:
    """The share of the student's likeliest tokens that are among the teacher's."""
    student, teacher = ({token for token, _ in laws[name]} for name in ("student", "teacher"))
    return len(student & teacher) / max(1, len(student))


def _mean(rows: Sequence[Sequence[float]]) -> float | None:
    values = [value for row in rows for value in row]
    return float(f"{math.fsum(values) / len(values):.4g}") if values else None


def _by_position(rows: Sequence[Sequence[float]]) -> list[float | None]:
    """Mean over the rows that reach each position."""
    return [_mean([row[at : at + 1] for row in rows]) for at in range(max(map(len, rows)))]
