"""What a pair of benchmarks/map.py is like before any training: the numbers that may foretell what blending gains.

Left out: training, and any judgement of which number foretells best.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from map_pairs import Knobs, Pair, stage_rates
from transformers import AutoModelForCausalLM, AutoTokenizer

from trb.policies import BehaviorPolicy, StudentPolicy, TeacherPolicy, TrustRegionPolicy
from trb.studies.subject import Subject
from trb.studies.transfer import gradient_transfer
from trb.tasks.prompts import load_prompts
from trb.zoo.tasks import boxed_answer

PROBLEMS, SAMPLES, SEED = 128, 4, 5
SEQUENCE_BUDGET = 4.0  # nats of a whole completion, spread evenly over a solution's tokens
TOP = 4  # of each model, whose sets are compared


class InBox:
    """Grades in this process: the last box must hold the answer."""

    @staticmethod
    def score(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(boxed_answer(text) == row["answer"]) for text, row in zip(texts, rows, strict=True)]


def measure_pair(knobs: Knobs, pair: Pair) -> dict[str, Any]:
    """Numbers of rollouts of the student, of a blend at a fixed sequence budget, and of the teacher."""
    length = 3 * knobs.stages + 3  # of a solution
    policies = {
        "student": StudentPolicy(),
        "blend": TrustRegionPolicy(SEQUENCE_BUDGET / length),
        "teacher": TeacherPolicy(),
    }
    subject = _subject(knobs, pair, length + 4)
    models = {"student": subject.student, "teacher": subject.teacher}
    return {
        "knobs": vars(knobs),
        "sequence_budget": SEQUENCE_BUDGET,
        "rollouts": {name: _describe(subject, policy, length) for name, policy in policies.items()},
        "transfer": gradient_transfer(subject, policies=policies),
        "stage_rates": {name: stage_rates(model, subject.tokenizer, knobs) for name, model in models.items()},
    }


def _subject(knobs: Knobs, pair: Pair, longest: int) -> Subject:
    """The models of a pair, and problems that no run is scored on."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (pair.student, pair.teacher))
    tokenizer, teacher_tokenizer = (AutoTokenizer.from_pretrained(path) for path in (pair.student, pair.teacher))
    limit = min(PROBLEMS, knobs.task.variety(knobs.stages) // 20)
    return Subject(
        student,
        teacher,
        tokenizer,
        load_prompts(knobs.data, split="test", limit=limit, seed=SEED),
        InBox(),  # type: ignore[arg-type]
        samples=SAMPLES,
        max_new_tokens=longest,
        seed=SEED,
        teacher_tokenizer=teacher_tokenizer,
    )


def _describe(subject: Subject, policy: BehaviorPolicy, length: int) -> dict[str, Any]:
    rollouts = subject.rollouts(policy)
    rows = list(range(len(rollouts.completions)))
    scores = subject.score(policy, rows, rollouts.completions, TOP)
    own = scores if policy == StudentPolicy() else subject.score(StudentPolicy(), rows, rollouts.completions)
    reverse_kl = own.kl_teacher
    answers = [subject.rows[problem]["answer"] for problem in subject.problem_of_row]
    texts = subject.tokenizer.batch_decode(rollouts.completions, skip_special_tokens=True)
    half, characters = length // 2, len(answers[0]) + len("\\boxed{}")
    differences = [_first_difference(text, f"\\boxed{{{answer}}}") for text, answer in zip(texts, answers, strict=True)]
    wrong = [at for at in differences if at is not None]
    return {
        "pass_at_1": sum(rollouts.rewards) / len(rows),
        "length": _mean([rollouts.lengths]),
        "accept_rate": _mean(rollouts.accepted),
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
