"""A loss and its gradient at single prefixes, from both laws there, and what is measured of them.

Gradients are by the logits, and written by hand. Left out: where the laws come from, averages, and chunks
(`trb.losses.chunked`).

Shape suffixes: R prefixes, C tokens of one chunk, K support, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trb.errors import InputError, named, real, shown, whole

__all__ = [
    "TOP_K",
    "Chunk",
    "Rows",
    "TokenMetrics",
    "check_supports",
    "checked_amount",
    "checked_support",
    "entropy",
    "forward_kl_terms",
    "reverse_kl_terms",
    "token_metrics",
]

TOP_K = 16
"""Tokens in the support of a loss, unless it is told otherwise (paper, section 6)."""

# Below any log-probability that matters, above minus infinity.
_LOWEST_LOG_PROB = -1e30


def checked_support(argument: str, k: int) -> int:
    """The size of a support; 0 means the full vocabulary. Raises ValueError naming the argument for anything else."""
    size = whole(argument, k)
    if size < 0:
        raise InputError(f"{named(argument)} must be at least 0 (0 means the full vocabulary), got {shown(size)}")
    return size


def check_supports(loss: object, *names: str) -> None:
    """Hold fields of a frozen loss to `checked_support`."""
    for name in names:
        object.__setattr__(loss, name, checked_support(name, getattr(loss, name)))


def checked_amount(argument: str, value: float) -> float:
    """A number of at least 0, as a float. Raises ValueError naming the argument for anything else."""
    found = real(argument, value)
    if not found >= 0:
        raise InputError(f"{named(argument)} must be at least 0, got {found}")
    return found


@dataclass(frozen=True)
class TokenMetrics:
    """What a loss pass saw at the N unmasked tokens, detached, in the order of the mask; nats.

    Attributes:
        reverse_kl: full-vocabulary KL(student || teacher).
        student_entropy: entropy of the student's distribution.
        teacher_entropy: entropy of the teacher's.
        student_log_prob: log πS of the token itself.
        teacher_log_prob: log πT of the token itself.
        support_mass: student probability of the loss's support; far below 1, the truncated loss is a poor guide.
    """

    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_log_prob: Tensor
    teacher_log_prob: Tensor
    support_mass: Tensor


@dataclass(frozen=True)
class Rows:
    """Both laws at R prefixes, `[R, V]`, normalised over the shared events; a loss may overwrite the probabilities."""

    log_student: Tensor
    log_teacher: Tensor
    student: Tensor
    teacher: Tensor
    token: Tensor | None = None

    @classmethod
    def of(cls, log_student: Tensor, log_teacher: Tensor, token: Tensor | None = None) -> "Rows":
        # A teacher may be wider than its student, and what is gathered from both meets again.
        dtype = torch.promote_types(log_student.dtype, log_teacher.dtype)
        log_student, log_teacher = log_student.to(dtype), log_teacher.to(dtype)
        return cls(log_student, log_teacher, log_student.exp(), log_teacher.exp(), token)


class Chunk(NamedTuple):
    """Both models' logits at the prefixes of a chunk, and where a loss's gradient goes.

    Attributes:
        student: `[C, V_student]` logits.
        teacher: `[C, V_teacher]` logits; may be of another dtype.
        token: `[C]` events.
        weight: `[C]` factors of the losses, and so of the gradient; None for 1.
        gradient: `[C, V_student]`, where the gradient by the student's logits is written, in their dtype; None if
            nobody wants it.
    """

    student: Tensor
    teacher: Tensor
    token: Tensor
    weight: Tensor | None = None
    gradient: Tensor | None = None

    def rows(self, which: slice | Tensor) -> "Chunk":
        """Some of its rows: views of a slice, copies of rows by number."""
        weight, gradient = (None if x is None else x[which] for x in (self.weight, self.gradient))
        return Chunk(self.student[which], self.teacher[which], self.token[which], weight, gradient)


def reverse_kl_terms(
    log_student_CV: Tensor, log_target_CV: Tensor, student_CV: Tensor, target_CV: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient by the logits and support mass of each row; overwrites the probabilities."""
    if 0 < k < log_student_CV.shape[-1]:
        return _top_k_terms(log_student_CV, log_target_CV, student_CV, k)
    return _full_terms(log_student_CV, log_target_CV, student_CV, target_CV)


def _top_k_terms(
    log_student_CV: Tensor, log_target_CV: Tensor, student_CV: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient by the logits (w r, scattered, less (Σ w r) p; overwrites `student_CV`), support mass."""
    support_CK = log_student_CV.topk(k, dim=-1).indices
    log_student_CK, log_target_CK = log_student_CV.gather(-1, support_CK), log_target_CV.gather(-1, support_CK)
    loss_C, mass_C = _terms_on_support(log_student_CK, log_target_CK)
    student_CK = log_student_CK.exp()
    ratio_CK = torch.where(student_CK > 0, log_student_CK - log_target_CK, 0.0)
    pull_CK = student_CK / mass_C[:, None] * ratio_CK
    gradient_CV = student_CV.mul_(-pull_CK.sum(-1, keepdim=True)).scatter_add_(-1, support_CK, pull_CK)
    return loss_C, gradient_CV, mass_C


def _full_terms(
    log_student_CV: Tensor, log_target_CV: Tensor, student_CV: Tensor, target_CV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_top_k_terms` with the whole vocabulary as support: the gradient is p (r - KL)."""
    mass_C, target_mass_C = student_CV.sum(-1), target_CV.sum(-1)
    # A token the student cannot draw, or whose probability underflows, contributes only the target's mass: zero times
    # an infinite ratio is NaN. A NaN of the logits stays in the masses.
    weighted_CV = (log_student_CV - log_target_CV).mul_(student_CV)
    weighted_CV.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    divergence_C = weighted_CV.sum(-1)
    gradient_CV = weighted_CV.addcmul_(student_CV, divergence_C[:, None], value=-1).div_(mass_C[:, None])
    return (divergence_C - mass_C + target_mass_C) / mass_C, gradient_CV, mass_C


def _terms_on_support(log_student_NK: Tensor, log_target_NK: Tensor) -> tuple[Tensor, Tensor]:
    student_NK, target_NK = log_student_NK.exp(), log_target_NK.exp()
    # A token the student cannot draw contributes only the target's mass; log 0 - log 0 must not reach the product.
    possible_NK = student_NK > 0
    log_ratio_NK = torch.where(possible_NK, log_student_NK, 0.0) - torch.where(possible_NK, log_target_NK, 0.0)
    support_mass_N = student_NK.detach().sum(-1)
    return (student_NK * log_ratio_NK - student_NK + target_NK).sum(-1) / support_mass_N, support_mass_N


def forward_kl_terms(
    log_student_CV: Tensor, log_target_CV: Tensor, student_CV: Tensor, target_CV: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Forward KL on the target's top-k, Σ_K [q log(q/p) - q + p], and its gradient by the logits.

    The mirror of `reverse_kl_terms` but for the division by the support's mass: non-negative, nothing to learn where
    p = q, and the forward KL itself where K is the vocabulary. The gradient is finite even where the loss is not.
    """
    if not 0 < k < log_student_CV.shape[-1]:
        gradient_CV = student_CV - target_CV
        return _forward_loss(log_student_CV, log_target_CV, student_CV, target_CV), gradient_CV
    support_CK = log_target_CV.topk(k, dim=-1).indices
    on_support = [x_CV.gather(-1, support_CK) for x_CV in (log_student_CV, log_target_CV, student_CV, target_CV)]
    pull_CK = on_support[2] - on_support[3]
    gradient_CV = (student_CV * -pull_CK.sum(-1, keepdim=True)).scatter_add_(-1, support_CK, pull_CK)
    return _forward_loss(*on_support), gradient_CV


def _forward_loss(log_student_CK: Tensor, log_target_CK: Tensor, student_CK: Tensor, target_CK: Tensor) -> Tensor:
    # What the target never draws contributes the student's mass alone: 0 (log 0 - log 0) is NaN.
    ratio_CK = torch.where(target_CK > 0, log_target_CK - log_student_CK, 0.0)
    return (target_CK * ratio_CK - target_CK + student_CK).sum(-1)


def token_metrics(
    log_student_CV: Tensor, log_teacher_CV: Tensor, student_CV: Tensor, teacher_CV: Tensor, token_C: Tensor
) -> tuple[Tensor, ...]:
    token_log_probs = [x_CV.gather(-1, token_C[:, None]).squeeze(-1) for x_CV in (log_student_CV, log_teacher_CV)]
    student_entropy_C, teacher_entropy_C = entropy(student_CV, log_student_CV), entropy(teacher_CV, log_teacher_CV)
    reverse_kl_C = (_expected_surprise(student_CV, log_teacher_CV) - student_entropy_C).clamp_min(0)
    return reverse_kl_C, student_entropy_C, teacher_entropy_C, *token_log_probs


def entropy(probs_CV: Tensor, log_probs_CV: Tensor) -> Tensor:
    """Of each row, in nats."""
    return _expected_surprise(probs_CV, log_probs_CV)


def _expected_surprise(probs_CV: Tensor, log_probs_CV: Tensor) -> Tensor:
    """`-Σ p log q` with 0 log 0 = 0: clamping is an order cheaper than masking, and what it changes has no weight."""
    return log_probs_CV.clamp_min(_LOWEST_LOG_PROB).mul_(probs_CV).sum(-1).neg_()
