"""The trust-region blend: the policy closest to the teacher inside a KL ball around the student.

At one prefix, with budget ε ≥ 0, the behavior policy is `argmin_μ KL(μ || teacher)` subject to
`KL(μ || student) ≤ ε`. The solution is the geometric path `μ ∝ student^(1-β) teacher^β` at the largest
feasible teacher weight β (paper, section 2); `solve` finds it.

Numerics. With r = log teacher - log student, A(β) = log Σ student · e^{βr} and moments under μ: KL(μ||student) = βA' -
A, and its derivative in β is β·Var[r]. `sqrt(2 KL)` is almost linear in β, so Newton on it, kept inside a bracket,
usually needs two or three passes over the vocabulary. Centring r at its student mean and summing `expm1` leaves no
cancellation, which is what makes float32 enough for small budgets. Rows with a log-probability below -85 (one-hot rows,
say) or a positive budget below 5e-4 are solved in float64 in log space.

Two compiled kernels do the same for ordinary rows in a fraction of the time, and leave the others to `eager`:
`native` on a CPU with a C compiler, which keeps positive budgets down to 1e-5, and `triton` on a GPU.

Left out on purpose: schedules of the budget (`schedule`), end-of-sequence and head alignment (`vocab`), and
drawing tokens (`sampling`).

Shape suffixes: N rows (flattened prefixes), V vocabulary.
"""

import math

import torch
from torch import Tensor

from trb import kernels
from trb.blend import native as blend_native
from trb.blend import triton as blend_triton
from trb.blend.eager import (
    FLOAT32_BUDGET_FLOOR,
    FLOAT32_LOG_PROB_FLOOR,
    LARGEST_SHIFT,
    POSSIBLE_MASK,
    solve_log_probs,
)
from trb.blend.laws import (
    BLOCK_ELEMENTS_CPU,
    FLAGGED,
    BlendResult,
    DenseLaw,
    GeometricLaw,
    Law,
    WeightResult,
    flat,
    log_softmax,
)
from trb.blend.native import NativeResult
from trb.blend.triton import SolvedRows

__all__ = ["BlendResult", "DenseLaw", "GeometricLaw", "Law", "WeightResult", "log_softmax", "solve", "weigh"]

_BLOCK_ELEMENTS = 1 << 26


@torch.no_grad()
def solve(student_logits: Tensor, teacher_logits: Tensor, kl_budget: float | Tensor) -> BlendResult:
    """Blend the student towards the teacher as far as the KL budget allows (paper, section 2).

    Budget 0 returns the student exactly; an infinite budget or a feasible teacher, the teacher exactly. Where the
    two supports differ and the budget is finite, μ lives on the tokens that both models allow; if that restriction
    alone costs more than the budget, μ is the student. `-inf` (or a dtype's most negative number, a common mask)
    means probability zero. No gradient flows through the blend.

    Args:
        student_logits: `[..., V]`, any float dtype; solved in float32, or float64 if either input is float64.
        teacher_logits: `[..., V]`, over the same events as the student's (see `trb.vocab.align`).
        kl_budget: ε in nats per token, a number or a tensor that broadcasts to `[...]`; may be infinite.

    Raises:
        ValueError: the shapes differ, or a budget is negative or NaN.
    """
    student_NV, teacher_NV, budget_N = flat(student_logits, teacher_logits, kl_budget)
    dtype = torch.float64 if torch.float64 in (student_NV.dtype, teacher_NV.dtype) else torch.float32
    leading = student_logits.shape[:-1]
    result = _solve_natively(student_NV, teacher_NV, budget_N)
    if result is None:
        result = _solve_in_blocks(student_NV, teacher_NV, budget_N, dtype)
    else:
        left = (result.passes == FLAGGED).nonzero().squeeze(-1)
        if left.numel():
            _store(result, left, _solve_in_blocks(student_NV[left], teacher_NV[left], budget_N[left], dtype))
    return BlendResult(
        result.log_probs.reshape(student_logits.shape),
        result.teacher_weight.reshape(leading),
        result.kl_student.reshape(leading),
        result.kl_teacher.reshape(leading),
        result.passes.reshape(leading),
    )


@torch.no_grad()
def weigh(student_logits_NV: Tensor, teacher_logits_NV: Tensor, kl_budget: float | Tensor) -> WeightResult:
    """`solve` for a sampler: the same blend at `[N, V]` logits, with log μ left unwritten where that saves work.

    Raises:
        ValueError: as `solve`.
    """
    student_NV, teacher_NV, budget_N = flat(student_logits_NV, teacher_logits_NV, kl_budget)
    if not _is_for_c(student_NV, teacher_NV):
        whole = solve(student_NV, teacher_NV, budget_N)
        law = DenseLaw(whole.log_probs)
        return WeightResult(law, whole.teacher_weight, whole.kl_student, whole.kl_teacher, whole.passes)
    found = blend_native.solve_rows(student_NV, teacher_NV, budget_N, write=False)
    left = ((found.passes == FLAGGED) | (found.log_norm.abs() > LARGEST_SHIFT)).nonzero().squeeze(-1)
    dense_N = torch.full_like(found.passes, -1)
    part = _solve_in_blocks(student_NV[left], teacher_NV[left], budget_N[left], torch.float32)
    if left.numel():
        dense_N[left] = torch.arange(left.numel())
        for name in ("teacher_weight", "kl_student", "kl_teacher", "passes"):
            getattr(found, name)[left] = getattr(part, name)
    geometric = GeometricLaw(
        student_NV, teacher_NV, found.teacher_weight, found.log_norm, dense_N, DenseLaw(part.log_probs)
    )
    return WeightResult(geometric, found.teacher_weight, found.kl_student, found.kl_teacher, found.passes)


def _solve_natively(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor) -> BlendResult | None:
    """The result of a compiled kernel, where rows it leaves to us have FLAGGED `passes`; None where there is none."""
    if _is_plain(student_NV, teacher_NV) and blend_triton.available(student_NV):
        return _written(blend_triton.solve_rows(student_NV, teacher_NV, budget_N))
    if _is_for_c(student_NV, teacher_NV):
        return _written(blend_native.solve_rows(student_NV, teacher_NV, budget_N))
    return None


def _is_for_c(student_NV: Tensor, teacher_NV: Tensor) -> bool:
    return _is_plain(student_NV, teacher_NV) and student_NV.device.type == "cpu" and kernels.available()


def _is_plain(student_NV: Tensor, teacher_NV: Tensor) -> bool:
    return torch.float64 not in (student_NV.dtype, teacher_NV.dtype) and student_NV.numel() > 0


def _written(found: NativeResult | SolvedRows) -> BlendResult:
    assert found.log_probs is not None  # it is written unless somebody says otherwise
    return BlendResult(found.log_probs, found.teacher_weight, found.kl_student, found.kl_teacher, found.passes)


def _solve_in_blocks(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor, dtype: torch.dtype) -> BlendResult:
    result = _empty_result(student_NV, dtype)
    elements = BLOCK_ELEMENTS_CPU if student_NV.device.type == "cpu" else _BLOCK_ELEMENTS
    block = max(1, elements // max(1, student_NV.shape[-1]))
    for start in range(0, student_NV.shape[0], block):
        rows = slice(start, start + block)
        _store(result, rows, _solve_rows(student_NV[rows], teacher_NV[rows], budget_N[rows], dtype))
    return result


def _empty_result(like_NV: Tensor, dtype: torch.dtype) -> BlendResult:
    rows, device = like_NV.shape[0], like_NV.device
    weight_N, kl_student_N, kl_teacher_N = torch.empty(3, rows, dtype=torch.float64, device=device)
    return BlendResult(
        torch.empty(like_NV.shape, dtype=dtype, device=device),
        weight_N,
        kl_student_N,
        kl_teacher_N,
        torch.empty(rows, dtype=torch.int64, device=device),
    )


def _store(result: BlendResult, rows: slice | Tensor, part: BlendResult) -> None:
    for name in ("log_probs", "teacher_weight", "kl_student", "kl_teacher", "passes"):
        target = getattr(result, name)
        target[rows] = getattr(part, name).to(target.dtype)


def _solve_rows(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor, dtype: torch.dtype) -> BlendResult:
    """Solve in `dtype`, sending rows that float32 cannot represent well through float64."""
    log_student_NV, lowest_student_N = _log_softmax(student_NV, dtype)
    log_teacher_NV, lowest_teacher_N = _log_softmax(teacher_NV, dtype)
    hard_N = torch.minimum(lowest_student_N, lowest_teacher_N) < FLOAT32_LOG_PROB_FLOOR
    hard_N |= (budget_N > 0) & (budget_N < FLOAT32_BUDGET_FLOOR)
    if dtype == torch.float64 or not hard_N.any():
        return solve_log_probs(log_student_NV, log_teacher_NV, budget_N)
    result = _empty_result(student_NV, dtype)
    easy_N = ~hard_N
    _store(result, easy_N, solve_log_probs(log_student_NV[easy_N], log_teacher_NV[easy_N], budget_N[easy_N]))
    hard_student_NV, _ = _log_softmax(student_NV[hard_N], torch.float64)
    hard_teacher_NV, _ = _log_softmax(teacher_NV[hard_N], torch.float64)
    _store(result, hard_N, solve_log_probs(hard_student_NV, hard_teacher_NV, budget_N[hard_N]))
    return result


def _log_softmax(logits_NV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the lowest finite one of each row; a dtype's most negative number counts as -inf."""
    log_probs_NV = log_softmax(logits_NV, dtype)
    lowest_N = _lowest_finite(log_probs_NV)
    if (lowest_N < POSSIBLE_MASK).any():
        masked_NV = logits_NV <= torch.finfo(logits_NV.dtype).min / 2
        log_probs_NV = log_softmax(logits_NV.to(dtype).masked_fill(masked_NV, -math.inf), dtype)
        lowest_N = _lowest_finite(log_probs_NV)
    return log_probs_NV, lowest_N


def _lowest_finite(log_probs_NV: Tensor) -> Tensor:
    return torch.nan_to_num(log_probs_NV, nan=0.0, neginf=0.0).amin(-1)
