"""Laws over a vocabulary, written out or as a blend of two others, and the results that carry them.

A sampler reads a law at one token of each prefix, or at a few whole rows: a blend need not be written out for that.
`log_softmax` is the one normaliser of the blend, as good as its dtype. Left out: which teacher weight a blend has
(`trb.blend`), and drawing from a law (`trb.sampling.draw`).

Shape suffixes: N prefixes, R rows of them, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trb.errors import InputError, named, real

__all__ = [
    "BLOCK_ELEMENTS_CPU",
    "FLAGGED",
    "BlendResult",
    "DenseLaw",
    "GeometricLaw",
    "Law",
    "WeightResult",
    "check_aligned",
    "flat",
    "kl",
    "log_softmax",
]

# Rows are solved in blocks of about this many elements. On a CPU, temporaries of a megabyte stay in cache; an
# accelerator wants few large kernels, and the block only bounds memory.
BLOCK_ELEMENTS_CPU = 1 << 18

# `passes` of a row that a compiled kernel leaves unsolved.
FLAGGED = -1

# Up to so many tokens, torch's float32 normaliser is as good as the rounding of the log-probabilities themselves.
_FEW_TOKENS = 256


class Law(Protocol):
    """Log-probabilities at N prefixes of which a sampler reads a few."""

    def at(self, token_N: Tensor) -> Tensor:
        """`[N]` log-probability of one token at each prefix."""

    def rows(self, index_R: Tensor) -> Tensor:
        """`[R, V]` log-probabilities at some of the prefixes; a new tensor."""


@dataclass(frozen=True)
class DenseLaw:
    """A law that is written out: `log_probs` is `[N, V]`."""

    log_probs: Tensor

    def at(self, token_N: Tensor) -> Tensor:
        return self.log_probs.gather(-1, token_N[:, None]).squeeze(-1)

    def rows(self, index_R: Tensor) -> Tensor:
        return self.log_probs[index_R]


@dataclass(frozen=True)
class GeometricLaw:
    """A blend that is not written out: `(1 - weight) student + weight teacher - log_norm`, on logits.

    Rows that cannot be had this way are kept written out, in `dense`.
    """

    student_NV: Tensor
    teacher_NV: Tensor
    weight_N: Tensor
    log_norm_N: Tensor
    dense_N: Tensor  # which rows are in `dense`, by index into it; -1 for none
    dense: DenseLaw

    def at(self, token_N: Tensor) -> Tensor:
        student_N, teacher_N = (
            logits_NV.gather(-1, token_N[:, None]).squeeze(-1).double()
            for logits_NV in (self.student_NV, self.teacher_NV)
        )
        log_prob_N = _mixed(student_N, teacher_N, self.weight_N) - self.log_norm_N
        kept = (self.dense_N >= 0).nonzero().squeeze(-1)
        if kept.numel():
            log_prob_N[kept] = self.dense.log_probs[self.dense_N[kept], token_N[kept]].double()
        return log_prob_N

    def rows(self, index_R: Tensor) -> Tensor:
        weight_R1 = self.weight_N[index_R, None].float()
        student_RV, teacher_RV = self.student_NV[index_R].float(), self.teacher_NV[index_R].float()
        log_probs_RV = _mixed(student_RV, teacher_RV, weight_R1) - self.log_norm_N[index_R, None].float()
        kept = (self.dense_N[index_R] >= 0).nonzero().squeeze(-1)
        if kept.numel():
            log_probs_RV[kept] = self.dense.log_probs[self.dense_N[index_R[kept]]]
        return log_probs_RV


def _mixed(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    # At the ends the other side must not take part: zero times minus infinity is no number.
    mixed = (1 - weight) * student + weight * teacher
    return torch.where(weight == 0, student, torch.where(weight == 1, teacher, mixed))


@dataclass(frozen=True)
class WeightResult:
    """What `weigh` found at N prefixes; the fields of `BlendResult`, with a law in place of `log_probs`."""

    law: Law
    teacher_weight: Tensor
    kl_student: Tensor
    kl_teacher: Tensor
    passes: Tensor


@dataclass(frozen=True)
class BlendResult:
    """The blended policy at each prefix; leading dimensions are those of the logits given to `solve`.

    Attributes:
        log_probs: `[..., V]` log μ, normalised; float64 for float64 logits, otherwise float32.
        teacher_weight: `[...]` float64, the largest feasible β in [0, 1].
        kl_student: `[...]` float64, KL(μ || student) in nats, at most the budget.
        kl_teacher: `[...]` float64, KL(μ || teacher) in nats.
        passes: `[...]` int64, sweeps over the vocabulary spent on the row: one to normalise both models, one for
            the moments at both ends of the path, one for each trial teacher weight, one to write `log_probs`.
    """

    log_probs: Tensor
    teacher_weight: Tensor
    kl_student: Tensor
    kl_teacher: Tensor
    passes: Tensor


def log_softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.log_softmax` over the last dimension, with a normaliser, and a gradient, as good as the dtype.

    On a CPU torch adds the V terms in as many float32 sums as a register has lanes. After one likely token, a long
    tail is rounded away term by term: at V = 150,000 all log-probabilities are then off by up to 1e-3, by an amount
    that depends on the processor. Where both models are off differently, μ / student is as well.
    """
    if dtype == torch.float64 or logits.device.type != "cpu" or logits.shape[-1] <= _FEW_TOKENS:
        return torch.log_softmax(logits, dim=-1, dtype=dtype)
    shifted = logits.to(dtype) - logits.detach().amax(-1, keepdim=True)
    log_total = _log_total(shifted)
    return shifted - log_total if shifted.requires_grad else shifted.sub_(log_total)


def _log_total(scores: Tensor) -> Tensor:
    """`[..., 1]` log Σ e^score: `Tensor.sum` adds in a tree. In blocks that stay in cache."""
    rows_NV = scores.reshape(-1, scores.shape[-1])
    block = max(1, BLOCK_ELEMENTS_CPU // scores.shape[-1])
    totals = [part_NV.exp().sum(-1, keepdim=True) for part_NV in rows_NV.split(block)]
    return torch.cat(totals).log().reshape(*scores.shape[:-1], 1)


def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """`[N]` KL(p || q) from the definition, with 0 log 0 = 0, also where it is e^log p that underflows."""
    p_NV = log_p_NV.exp()
    return (p_NV * (log_p_NV - log_q_NV)).masked_fill_(p_NV == 0, 0.0).sum(-1).clamp_min(0)


def check_aligned(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raises ValueError unless both models have logits of the same events."""
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student and teacher logits differ in shape, {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}: align them first with trb.vocab.align"
        )


def flat(student_logits: Tensor, teacher_logits: Tensor, kl_budget: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both models as `[N, V]` and the budget as `[N]` float64, checked."""
    check_aligned(student_logits, teacher_logits)
    leading, vocabulary = student_logits.shape[:-1], student_logits.shape[-1]
    budget_N = _checked_budget(kl_budget, leading, student_logits.device).reshape(-1)
    return student_logits.reshape(-1, vocabulary), teacher_logits.reshape(-1, vocabulary), budget_N


def _checked_budget(kl_budget: float | Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(kl_budget, Tensor):
        kl_budget = real("kl_budget", kl_budget)
    if not isinstance(kl_budget, Tensor) and kl_budget >= 0:  # without asking an accelerator
        return torch.full(leading, kl_budget, dtype=torch.float64, device=device)
    budget = torch.as_tensor(kl_budget, dtype=torch.float64, device=device)
    invalid = ~(budget >= 0)
    if invalid.any():
        value = budget[invalid].reshape(-1)[0].item()
        raise InputError(f"{named('kl_budget')} must be a non-negative number of nats, got {value}")
    pairs = zip(reversed(budget.shape), reversed(leading), strict=False)
    if budget.dim() > len(leading) or any(own not in (1, other) for own, other in pairs):
        raise InputError(
            f"{named('kl_budget')} of shape {tuple(budget.shape)} does not broadcast to {tuple(leading)}, the shape of "
            "the logits without the vocabulary"
        )
    return budget.expand(leading)
