"""Reverse KL to the teacher, and to Veto's target.

Left out: what it is at a single prefix (`trb.losses.terms`).

Shape suffixes: R rows of a chunk, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from trb.losses.chunked import RowLoss
from trb.losses.terms import TOP_K, Rows, check_supports, checked_amount, reverse_kl_terms
from trb.vocab import log_probs

__all__ = ["ReverseKL", "Veto", "veto_target"]


@dataclass(frozen=True)
class ReverseKL(RowLoss):
    """Reverse KL to the teacher on the student's `top_k` tokens; 0 for the full vocabulary (paper, section 5)."""

    top_k: int = TOP_K

    def __post_init__(self) -> None:
        check_supports(self, "top_k")

    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        return reverse_kl_terms(rows.log_student, rows.log_teacher, rows.student, rows.teacher, self.top_k)

    def reverse_kl_on(self) -> int | None:
        return self.top_k if type(self) is ReverseKL else None  # a subclass may have terms of its own


@dataclass(frozen=True)
class Veto(RowLoss):
    """The same to Veto's target of strength b ≥ 0 (`veto_target`; paper, section 6)."""

    top_k: int = TOP_K
    strength: float = 0.0

    def __post_init__(self) -> None:
        check_supports(self, "top_k")
        object.__setattr__(self, "strength", checked_amount("Veto strength", self.strength))

    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        if not self.strength:
            return ReverseKL(self.top_k).terms(rows)
        target_RV = veto_target(rows.log_student, rows.log_teacher, self.strength)
        return reverse_kl_terms(rows.log_student, target_RV, rows.student, target_RV.exp(), self.top_k)

    def reverse_kl_on(self) -> int | None:
        return self.top_k if type(self) is Veto and not self.strength else None


def veto_target(student_logits: Tensor, teacher_logits: Tensor, strength: float) -> Tensor:
    """`[..., V]` log-probabilities of Veto's target, softmax(log πT + b · sg[log πS]) (paper, section 6).

    Args:
        student_logits: `[..., V]`; no gradient flows through the target.
        teacher_logits: `[..., V]`.
        strength: b ≥ 0; 0 gives the teacher.

    Raises:
        ValueError: a negative or NaN strength.
    """
    strength = checked_amount("Veto strength", strength)
    log_teacher = log_probs(teacher_logits.detach())
    if strength == 0:
        return log_teacher
    log_student = log_probs(student_logits.detach())
    return log_probs(log_teacher + strength * log_student)
