"""How much of what good prefixes teach a student also learns from other prefixes, to first order and before training.

With g(μ) the gradient of the token-mean reverse KL on rollouts of a policy μ, the rollouts being given, a small step
along -g(μ) lowers the loss on the teacher's rollouts by <g(μ), g(T)> per unit of rate, and one along -g(T) by
<g(T), g(T)>. The ratio is the *transfer* of μ: near 1, the student's own rollouts teach what it will need on good
prefixes and there is little for blending to add; far below, they do not. How well it foretells the gain of training
with blended rollouts is in docs/experiments.md.

The two gradients of a product come from different problems, so that what they share by chance does not count. Left out:
what an optimizer makes of a gradient, and everything after the first step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trb.losses import chunked_reverse_kl
from trb.models.modeling import OutputHead, completion_hidden_states, evaluation_mode
from trb.models.rows import padded
from trb.policies import BehaviorPolicy, TeacherPolicy
from trb.studies.subject import Subject
from trb.vocab import wide

__all__ = ["gradient_transfer"]

_ROWS = 32  # read at once with a gradient

Gradient = list[Tensor]


def gradient_transfer(
    subject: Subject, *, policies: Mapping[str, BehaviorPolicy], loss_top_k: int = 0
) -> dict[str, Any]:
    """The transfer of each policy's rollouts to the teacher's.

    Holds four copies of the student's trained parameters at a time.

    Args:
        subject: models and problems; with a student whose parameters take gradients.
        policies: name -> policy.
        loss_top_k: support of the loss, 0 for the vocabulary.

    Returns:
        `agreement`: cosine of the teacher's two gradients, from half of the problems each; with less than one half
        more problems are needed. `policies`: name -> `transfer`, `cosine` (of the gradients, freed of noise; null where
        noise is all there is) and `loss`, the reverse KL in nats per token. Where the teacher's gradients are zero,
        `agreement` and every `transfer` are null too.
    """
    name = f"transfer of {policies!r} with top {loss_top_k}"
    return dict(subject.remember(name, lambda: _measure(subject, policies, loss_top_k)))


def _measure(subject: Subject, policies: Mapping[str, BehaviorPolicy], loss_top_k: int) -> dict[str, Any]:
    (first, _), (second, _) = (_gradient(subject, TeacherPolicy(), half, loss_top_k) for half in (0, 1))
    length = _product(first, second)
    found = {}
    for name, policy in policies.items():
        (own, loss), (other, other_loss) = (_gradient(subject, policy, half, loss_top_k) for half in (0, 1))
        shared = (_product(own, second) + _product(other, first)) / 2
        squares = _product(own, other) * length
        found[name] = {
            "transfer": shared / length if length else None,
            "cosine": shared / math.sqrt(squares) if squares > 0 else None,
            "loss": (loss + other_loss) / 2,
        }
    norms = math.sqrt(_product(first, first) * _product(second, second))
    return {"agreement": length / norms if length else None, "policies": found}


def _gradient(subject: Subject, policy: BehaviorPolicy, half: int, loss_top_k: int) -> tuple[Gradient, float]:
    """Gradient of the loss on rollouts of every other problem, and the loss."""
    rollouts = subject.rollouts(policy)
    numbers = subject.problem_numbers
    rows = [row for row, problem in enumerate(subject.problem_of_row) if numbers[problem] % 2 == half]
    tokens = sum(len(rollouts.completions[row]) for row in rows)
    learnt = [parameter for parameter in subject.student.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in learnt]
    for parameter in learnt:
        parameter.grad = None
    total = 0.0
    try:
        with evaluation_mode(subject.student, subject.teacher):
            for at in range(0, len(rows), _ROWS):
                chosen = rows[at : at + _ROWS]
                loss = _loss(subject, chosen, [rollouts.completions[row] for row in chosen], tokens, loss_top_k)
                loss.backward()
                total += loss.item()
        return [p.grad.to(wide(p.grad)) for p in learnt if p.grad is not None], total
    finally:
        for parameter, gradient in zip(learnt, before, strict=True):
            parameter.grad = gradient


def _loss(
    subject: Subject, rows: Sequence[int], completions: Sequence[list[int]], tokens: int, loss_top_k: int
) -> Tensor:
    problems = [subject.problem_of_row[row] for row in rows]
    prompts = [subject.prompts[problem] for problem in problems]
    ids, mask, completion = padded(prompts, completions, subject.student.device)
    read = padded(subject.taught(problems) or prompts, completions, subject.teacher.device)
    hidden = completion_hidden_states(subject.student, ids, mask, completion)
    with torch.no_grad():
        taught = completion_hidden_states(subject.teacher, *read)
    sampled = ids[completion != 0]
    loss, _ = chunked_reverse_kl(
        *(hidden, taught, OutputHead.of(subject.student), OutputHead.of(subject.teacher)),
        *(sampled, torch.ones_like(sampled)),
        k=loss_top_k,
        vocabulary=subject.vocabulary,
        temperature=subject.temperature,
        normaliser=tokens,
    )
    return loss


def _product(one: Gradient, other: Gradient) -> float:
    return math.fsum(float(torch.dot(a.flatten(), b.flatten())) for a, b in zip(one, other, strict=True))
