"""The trust-region blend on CPUs in C: `trb.blend.solve` at about the cost of two log-softmaxes.

A row's result depends on that row alone, to the last bit. Built, and given threads, by `trb.kernels`.

Left out on purpose: rows that float32 cannot represent (a log-ratio more than 60 above its mean, say), positive budgets
below 1e-5, supports that differ and NaN. They come back with `passes = FLAGGED`; `trb.blend` solves those, and remains
the semantics of record. Also left out: gradients, and checks of the budget's sign (a negative or NaN one is flagged).

Shape suffixes: N rows (flattened prefixes), V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trb import kernels
from trb.errors import InputError

__all__ = ["NativeResult", "solve_rows"]


class NativeResult(NamedTuple):
    """As `trb.blend.laws.BlendResult`, for N rows. Where `passes` is FLAGGED nothing was solved: the rest is NaN.

    Attributes:
        log_probs: `[N, V]` float32 log μ, or None if it was not asked for.
        teacher_weight: `[N]` float64, the largest feasible β in [0, 1].
        log_norm: `[N]` float64, with log μ = (1-β) student + β teacher - log_norm in terms of the logits given.
        kl_student: `[N]` float64, KL(μ || student) in nats.
        kl_teacher: `[N]` float64, KL(μ || teacher) in nats.
        passes: `[N]` int64, sweeps over the vocabulary (one to normalise both models, one for the moments if a
            weight is searched, one for each trial teacher weight, one to write `log_probs`), or FLAGGED.
    """

    log_probs: Tensor | None
    teacher_weight: Tensor
    log_norm: Tensor
    kl_student: Tensor
    kl_teacher: Tensor
    passes: Tensor


@torch.no_grad()
def solve_rows(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor, *, write: bool = True) -> NativeResult:
    """Blend N rows, as `trb.blend.solve` does, flagging those that need more than float32.

    Args:
        student_NV: `[N, V]` CPU logits, both float32 or both bfloat16, with any row stride; others are copied.
        teacher_NV: `[N, V]`, over the same events as the student's.
        budget_N: `[N]` ε in nats, non-negative; 0 gives the student, infinity the teacher.
        write: whether to return `[N, V]` log μ; without it the last sweep is saved.

    Raises:
        RuntimeError: the library is not available.
        ValueError: shapes that differ, or tensors that are not on the CPU.
    """
    library = kernels.library(otherwise="trb.blend.solve")
    _check(student_NV, teacher_NV, budget_N)
    student_NV, teacher_NV = _readable(student_NV, teacher_NV)
    budget_N = budget_N.double().contiguous()
    rows, vocabulary = student_NV.shape
    weight_N, log_norm_N, kl_student_N, kl_teacher_N = torch.empty(4, rows, dtype=torch.float64)
    log_probs_NV = torch.empty(rows, vocabulary, dtype=torch.float32) if write else None
    passes_N = torch.empty(rows, dtype=torch.int64)
    result = NativeResult(log_probs_NV, weight_N, log_norm_N, kl_student_N, kl_teacher_N, passes_N)

    def solve(start: int, end: int) -> None:
        library.solve_rows(
            student_NV.data_ptr(),
            teacher_NV.data_ptr(),
            student_NV.dtype == torch.bfloat16,
            student_NV.stride(0),
            teacher_NV.stride(0),
            vocabulary,
            start,
            end,
            budget_N.data_ptr(),
            *(None if values is None else values.data_ptr() for values in (*result[1:], result.log_probs)),
            kernels.scratch(2 * vocabulary).data_ptr(),
        )

    kernels.spread(solve, rows, vocabulary)
    return result


def _check(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor) -> None:
    matching = student_NV.shape == teacher_NV.shape and budget_N.shape == student_NV.shape[:1]
    if student_NV.dim() != 2 or not matching:
        raise InputError(
            f"expected student and teacher [N, V] and budgets [N], got {tuple(student_NV.shape)}, "
            f"{tuple(teacher_NV.shape)} and {tuple(budget_N.shape)}"
        )
    for tensor in (student_NV, teacher_NV, budget_N):
        if tensor.device.type != "cpu":
            raise InputError(f"the native solver reads CPU tensors, got one on {tensor.device}")


def _readable(*logits: Tensor) -> list[Tensor]:
    """One dtype that the library reads, tokens adjacent; masks written as another dtype's lowest number become -inf."""
    if len({x_NV.dtype for x_NV in logits}) > 1 or logits[0].dtype not in (torch.float32, torch.bfloat16):
        logits = tuple(x_NV.float().masked_fill(x_NV <= torch.finfo(x_NV.dtype).min / 2, -torch.inf) for x_NV in logits)
    return [x_NV if x_NV.stride(1) == 1 else x_NV.contiguous() for x_NV in logits]
