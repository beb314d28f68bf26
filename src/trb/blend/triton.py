"""The trust-region blend as one fused kernel: `trb.blend.solve` for rows that live on a GPU.

One program solves one row and keeps nothing but scalars between its sweeps over the vocabulary: one sweep for both
models' normalisers, one for the moments at both ends of the path, one for each trial teacher weight and one to write
log μ. The search is the one of `trb.blend` (bracketed Newton on `sqrt(2 KL)`, sums of `expm1` of the centred
log-ratio), with its decisions in float64 and its sweeps in float32. A row's number of sweeps depends on that row
alone.

Left out on purpose: rows that float32 cannot represent, budgets in (0, 5e-4), supports that differ and NaN. The
kernel flags them with `passes = FLAGGED`; `trb.blend` solves those afterwards, and remains the semantics of record.
Also left out: float64 logits, checks of the budget's sign (a negative or NaN one is flagged), and gradients.

Importing this module without Triton works; `available` is then False.

Shape suffixes: N rows (flattened prefixes), V vocabulary. In kernels, names in capitals are compile-time constants
and vectors have one lane for every token of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trb.blend.eager import (
    FLOAT32_BUDGET_FLOOR,
    FLOAT32_LOG_PROB_FLOOR,
    MAX_EVALUATIONS,
    NEWTON_EVALUATIONS,
    WINDOW,
)
from trb.blend.laws import FLAGGED
from trb.errors import InputError, OperationError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["SolvedRows", "available", "solve_rows"]

# Kept below the budget: far more than float32 sums are off by, far less than the window.
_MARGIN = 2e-5
# With the student's mean log-ratio above this, e^{βr} of the centred ratio, times r², stays a float32 number.
_MEAN_RATIO_FLOOR = -64.0
# Wide enough that a row's loads hide their latency. One program solves one row, so that few rows leave most of a GPU
# idle and want every warp a program may have: on an H100, 32 warps beat 16 from 8 rows (0.145 ms against 0.159) to 512
# (0.810 against 0.943; benchmarks/results/gpu-first.json, time_solver).
_LARGEST_BLOCK = 4096
_LANES_PER_THREAD = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Decided when the kernels are decorated, so setting the variable later changes nothing.
_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


class SolvedRows(NamedTuple):
    """As `trb.blend.laws.BlendResult`, for N rows. Where `passes` is FLAGGED nothing was solved: the rest is NaN.

    Attributes:
        log_probs: `[N, V]` float32 log μ, or None if it was not asked for.
        teacher_weight: `[N]` float64, the largest feasible β in [0, 1].
        kl_student: `[N]` float64, KL(μ || student) in nats.
        kl_teacher: `[N]` float64, KL(μ || teacher) in nats.
        passes: `[N]` int64, sweeps over the vocabulary, or FLAGGED.
    """

    log_probs: Tensor | None
    teacher_weight: Tensor
    kl_student: Tensor
    kl_teacher: Tensor
    passes: Tensor


def available(tensor: Tensor) -> bool:
    """Whether `solve_rows` can run on this tensor: Triton, a dtype it reads, and a GPU (or Triton's interpreter)."""
    if triton is None or tensor.dtype not in _DTYPES:
        return False
    return tensor.is_cuda or _INTERPRETED


@torch.no_grad()
def solve_rows(
    student_NV: Tensor,
    teacher_NV: Tensor,
    budget_N: Tensor,
    *,
    with_log_probs: bool = True,
    block: int | None = None,
    warps: int | None = None,
) -> SolvedRows:
    """Blend N rows, as `trb.blend.solve` does, flagging those that need more than float32.

    Args:
        student_NV: `[N, V]` logits in float32, bfloat16 or float16; any row stride.
        teacher_NV: `[N, V]`, over the same events; may be of another of these dtypes.
        budget_N: `[N]` ε in nats, non-negative; 0 gives the student, infinity the teacher.
        with_log_probs: whether to write `[N, V]` log μ; without it the last sweep is saved.
        block: tokens read at once, a power of two; chosen from V by default.
        warps: warps of a program; chosen from `block` by default.

    Raises:
        RuntimeError: Triton is not installed.
        ValueError: shapes that differ, no tokens, or a dtype the kernel does not read.
    """
    if triton is None:
        raise OperationError("the fused solver needs Triton, which is not installed; use trb.blend.solve")
    _check(student_NV, teacher_NV, budget_N)
    student_NV, teacher_NV = (x if x.stride(1) == 1 else x.contiguous() for x in (student_NV, teacher_NV))
    rows, vocabulary = student_NV.shape
    block = block or min(_LARGEST_BLOCK, triton.next_power_of_2(vocabulary))
    warps = warps or max(1, min(32, block // (32 * _LANES_PER_THREAD)))
    solved = _empty(student_NV, with_log_probs)
    if rows:
        with torch.cuda.device_of(student_NV):
            _solve_kernel[(rows,)](
                student_NV,
                teacher_NV,
                budget_N.to(student_NV.device, torch.float64).contiguous(),
                *solved,
                student_NV.stride(0),
                teacher_NV.stride(0),
                vocabulary,
                WRITE=with_log_probs,
                BLOCK=block,
                num_warps=warps,
                enable_fp_fusion=True,
                **_CONSTANTS,
            )
    return solved


def _check(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor) -> None:
    matching = student_NV.shape == teacher_NV.shape and budget_N.shape == student_NV.shape[:1]
    if student_NV.dim() != 2 or not matching or not student_NV.shape[1]:
        raise InputError(
            f"expected student and teacher [N, V] and budgets [N] with V > 0, got {tuple(student_NV.shape)}, "
            f"{tuple(teacher_NV.shape)} and {tuple(budget_N.shape)}"
        )
    for logits_NV in (student_NV, teacher_NV):
        if logits_NV.dtype not in _DTYPES:
            raise InputError(f"the fused solver reads float32, bfloat16 and float16, got {logits_NV.dtype}")


def _empty(like_NV: Tensor, with_log_probs: bool) -> SolvedRows:
    rows, device = like_NV.shape[0], like_NV.device
    weight_N, kl_student_N, kl_teacher_N = torch.empty(3, rows, dtype=torch.float64, device=device)
    log_probs_NV = torch.empty(like_NV.shape, dtype=torch.float32, device=device) if with_log_probs else None
    passes_N = torch.empty(rows, dtype=torch.int64, device=device)
    return SolvedRows(log_probs_NV, weight_N, kl_student_N, kl_teacher_N, passes_N)


_CONSTANTS = {
    "WINDOW": WINDOW,
    "MARGIN": _MARGIN,
    "LOG_PROB_FLOOR": FLOAT32_LOG_PROB_FLOOR,
    "BUDGET_FLOOR": FLOAT32_BUDGET_FLOOR,
    "MEAN_RATIO_FLOOR": _MEAN_RATIO_FLOOR,
    "MAX_EVALUATIONS": MAX_EVALUATIONS,
    "NEWTON_EVALUATIONS": NEWTON_EVALUATIONS,
    "FLAGGED": FLAGGED,
}


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


# long because it is one search: its twenty running values would be arguments and results of any helper
@_jit
def _solve_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    budgets: tl.tensor,
    log_probs: tl.tensor,
    teacher_weight: tl.tensor,
    kl_student: tl.tensor,
    kl_teacher: tl.tensor,
    passes: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    vocabulary: tl.tensor,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    MARGIN: tl.constexpr,
    LOG_PROB_FLOOR: tl.constexpr,
    BUDGET_FLOOR: tl.constexpr,
    MEAN_RATIO_FLOOR: tl.constexpr,
    MAX_EVALUATIONS: tl.constexpr,
    NEWTON_EVALUATIONS: tl.constexpr,
    FLAGGED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    budget = tl.load(budgets + row)
    none = tl.full((), 0.0, tl.float64)

    top_s, norm_s, top_t, norm_t, pivot, lowest, differ = _normalisers(student, teacher, vocabulary, BLOCK)
    norm_s_64, norm_t_64, centre, variance, third, kl_end = _moments(
        student, teacher, vocabulary, top_s, norm_s, top_t, norm_t, pivot, BLOCK
    )
    # The log-ratio is `ratio - centre + mean`, where `ratio` is the difference of the logits below their maxima.
    mean = centre.to(tl.float64) + norm_s_64 - norm_t_64
    solvable = (lowest >= LOG_PROB_FLOOR) & (differ == 0) & (mean >= MEAN_RATIO_FLOOR) & (kl_end >= 0)
    # Written out in float64: a bare constant would be rounded to float32 first, which lifts 5e-4 above itself.
    budget_floor = tl.full((), BUDGET_FLOOR, tl.float64)
    solvable = solvable & ((budget == 0) | (budget >= budget_floor))

    room = budget * (1 - MARGIN)
    slack = budget * WINDOW
    aim = room - slack / 2
    stays = budget == 0
    reaches = (stays == 0) & (kl_end <= room)
    searching = solvable & (stays == 0) & (reaches == 0)

    best_weight, best_kl, best_growth, best_mean = none, none, none, none
    low, high = none, none + 1
    weight = _first_guess(aim, variance, third, kl_end)
    evaluations = tl.full((), 0, tl.int32)
    while searching:
        growth, mean_here, variance_here = _evaluate(
            student, teacher, vocabulary, top_s, norm_s, norm_s_64, top_t, centre, weight, BLOCK
        )
        evaluations += 1
        kl = tl.maximum(weight * mean_here - growth, none)
        feasible = kl <= room
        best_weight = tl.where(feasible, weight, best_weight)
        best_kl = tl.where(feasible, kl, best_kl)
        best_growth = tl.where(feasible, growth, best_growth)
        best_mean = tl.where(feasible, mean_here, best_mean)
        low = tl.where(feasible, weight, low)
        high = tl.where(feasible, high, weight)
        met = feasible & (kl >= room - slack)
        weight = _next_weight(weight, kl, variance_here, aim, low, high, evaluations < NEWTON_EVALUATIONS)
        exhausted = (weight <= low) | (weight >= high) | (evaluations >= MAX_EVALUATIONS)
        searching = (met | exhausted) == 0

    best_weight = tl.where(reaches, 1.0, best_weight)
    best_kl = tl.where(reaches, kl_end, best_kl)
    log_norm = tl.where(reaches, none, best_growth + best_weight * mean)
    to_teacher = tl.where(reaches, none, (best_weight - 1) * (best_mean + mean) - log_norm)
    unsolved = tl.full((), float("nan"), tl.float64)
    tl.store(teacher_weight + row, tl.where(solvable, best_weight, unsolved))
    tl.store(kl_student + row, tl.where(solvable, best_kl, unsolved))
    tl.store(kl_teacher + row, tl.where(solvable, tl.maximum(to_teacher, none), unsolved))
    tl.store(passes + row, tl.where(solvable, evaluations + (2 + WRITE), FLAGGED))
    if WRITE:
        log_norm += (1 - best_weight) * norm_s_64 + best_weight * norm_t_64
        log_norm = tl.where(solvable, log_norm, unsolved)
        out = log_probs + row * vocabulary
        _write(student, teacher, out, vocabulary, top_s, top_t, best_weight, log_norm.to(tl.float32), BLOCK)


@_jit
def _load(row: tl.tensor, token: tl.tensor, vocabulary: tl.tensor) -> tl.tensor:
    # Read again by every later sweep of the row, so worth keeping in the cache.
    logits = tl.load(row + token, mask=token < vocabulary, other=float("-inf"), eviction_policy="evict_last")
    return logits.to(tl.float32)


@_jit
def _normalisers(student: tl.tensor, teacher: tl.tensor, vocabulary: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """One sweep: each model's largest logit and log-sum-exp below it, the teacher's logit (below its largest) where
    the student's is largest, the lowest finite log-probability, and whether the supports differ."""
    lane = tl.arange(0, BLOCK)
    # Finite, so that a lane which meets only -inf subtracts no infinities; such a lane ends with no weight.
    top_s = tl.full((BLOCK,), -1e38, tl.float32)
    top_t = tl.full((BLOCK,), -1e38, tl.float32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    low_s = tl.full((BLOCK,), float("inf"), tl.float32)
    low_t = tl.full((BLOCK,), float("inf"), tl.float32)
    teacher_at_top = tl.zeros((BLOCK,), tl.float32)
    differ = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        s = _load(student, start + lane, vocabulary)
        t = _load(teacher, start + lane, vocabulary)
        off_s = s == float("-inf")
        off_t = t == float("-inf")
        differ = differ | (off_s != off_t).to(tl.int32)
        low_s = tl.minimum(low_s, tl.where(off_s, float("inf"), s))
        low_t = tl.minimum(low_t, tl.where(off_t, float("inf"), t))
        teacher_at_top = tl.where(s > top_s, t, teacher_at_top)
        top_s, sum_s = _accumulate(top_s, sum_s, s)
        top_t, sum_t = _accumulate(top_t, sum_t, t)
    max_s = tl.max(top_s, axis=0)
    max_t = tl.max(top_t, axis=0)
    norm_s = tl.log(tl.sum(sum_s * tl.exp(top_s - max_s), axis=0))
    norm_t = tl.log(tl.sum(sum_t * tl.exp(top_t - max_t), axis=0))
    pivot = tl.max(tl.where(top_s == max_s, teacher_at_top, float("-inf")), axis=0) - max_t
    lowest = tl.minimum(tl.min(low_s, axis=0) - max_s - norm_s, tl.min(low_t, axis=0) - max_t - norm_t)
    return max_s, norm_s, max_t, norm_t, pivot, lowest, tl.max(differ, axis=0)


@_jit
def _accumulate(top: tl.tensor, total: tl.tensor, logits: tl.tensor) -> tl.tensor:
    """Largest logit so far and the sum of exponentials below it, at one exponential a token."""
    bounded = tl.maximum(logits, -1e38)
    change = tl.exp(-tl.abs(bounded - top))
    return tl.maximum(top, bounded), tl.where(bounded > top, total * change + 1, total + change)


@_jit
def _moments(
    student: tl.tensor,
    teacher: tl.tensor,
    vocabulary: tl.tensor,
    top_s: tl.tensor,
    norm_s: tl.tensor,
    top_t: tl.tensor,
    norm_t: tl.tensor,
    pivot: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """One sweep: exact normalisers, the student's mean log-ratio (of logits below their maxima, rounded to float32),
    variance and third central moment, and KL(teacher || student).

    Moments are taken about the ratio at the student's likeliest token: no probability mass lies far from it when the
    variance is small, so little cancels.
    """
    lane = tl.arange(0, BLOCK)
    mass_s = tl.zeros((BLOCK,), tl.float32)
    mass_t = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    third = tl.zeros((BLOCK,), tl.float32)
    first_t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        s = _load(student, start + lane, vocabulary) - top_s
        t = _load(teacher, start + lane, vocabulary) - top_t
        ratio = tl.where(s == float("-inf"), 0.0, t - s - pivot)
        p = tl.exp(s - norm_s)
        q = tl.exp(t - norm_t)
        mass_s += p
        mass_t += q
        first_t += q * ratio
        moment = p * ratio
        first += moment
        moment = moment * ratio
        second += moment
        third += moment * ratio
    # A float32 normaliser is off by up to 1e-6: these masses say by how much.
    total_s = tl.sum(mass_s, axis=0).to(tl.float64)
    total_t = tl.sum(mass_t, axis=0).to(tl.float64)
    mean = tl.sum(first, axis=0).to(tl.float64) / total_s
    square = tl.sum(second, axis=0).to(tl.float64) / total_s
    cube = tl.sum(third, axis=0).to(tl.float64) / total_s
    norm_s_64 = norm_s.to(tl.float64) + tl.log(total_s)
    norm_t_64 = norm_t.to(tl.float64) + tl.log(total_t)
    offset = pivot.to(tl.float64)
    kl_end = tl.sum(first_t, axis=0).to(tl.float64) / total_t + offset + norm_s_64 - norm_t_64
    # Only rounding can make it negative; NaN must survive, since it flags the row.
    kl_end = tl.where(kl_end < 0, 0.0, kl_end)
    third_central = cube - 3 * mean * square + 2 * mean * mean * mean
    return norm_s_64, norm_t_64, (offset + mean).to(tl.float32), square - mean * mean, third_central, kl_end


@_jit
def _evaluate(
    student: tl.tensor,
    teacher: tl.tensor,
    vocabulary: tl.tensor,
    top_s: tl.tensor,
    norm_s: tl.tensor,
    norm_s_64: tl.tensor,
    top_t: tl.tensor,
    centre: tl.tensor,
    weight: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """One sweep at a teacher weight: log Σ student e^{βr}, E_μ[r] and Var_μ[r] of the centred log-ratio r."""
    lane = tl.arange(0, BLOCK)
    step = weight.to(tl.float32)
    growth = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        s = _load(student, start + lane, vocabulary) - top_s
        t = _load(teacher, start + lane, vocabulary) - top_t
        ratio = tl.where(s == float("-inf"), 0.0, t - s - centre)
        change, blend = _tilt(s - norm_s, step * ratio)
        growth += change
        first += change * ratio
        second += blend * ratio * ratio
    mass = tl.exp(norm_s_64 - norm_s.to(tl.float64))
    grown = tl.sum(growth, axis=0).to(tl.float64) / mass
    mean = tl.sum(first, axis=0).to(tl.float64) / mass / (1 + grown)
    variance = tl.sum(second, axis=0).to(tl.float64) / mass / (1 + grown) - mean * mean
    return tl.log(1 + grown), mean, variance


@_jit
def _tilt(log_p: tl.tensor, x: tl.tensor) -> tl.tensor:
    """`p (e^x - 1)` and `p e^x`. Near x = 0 the difference comes from a series (relative error 1e-8 at |x| = 1/2), as
    the sums live on its cancellation; further away no e^x without its p is formed, which could overflow."""
    p = tl.exp(log_p)
    blend = tl.exp(log_p + x)
    series = 1 / 5040 + x * (1 / 40320)
    series = 1 / 120 + x * (1 / 720 + x * series)
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series))))
    return tl.where(tl.abs(x) < 0.5, p * series, blend - p), blend


@_jit
def _first_guess(aim: tl.tensor, variance: tl.tensor, third: tl.tensor, kl_end: tl.tensor) -> tl.tensor:
    """β from the cumulants at the student, KL ≈ κ₂β²/2 + κ₃β³/3, or from the far end where that overshoots."""
    variance = tl.maximum(variance, 1e-300)
    small = tl.sqrt(2 * aim / variance)
    skew = tl.minimum(tl.maximum(third / (3 * variance) * small, -0.5), 0.5)
    guess = small * (1 - skew)
    guess = tl.where(guess < 1, guess, tl.sqrt(aim / kl_end))
    return _representable(tl.minimum(tl.maximum(guess, 1e-12), 1 - 1e-7))


@_jit
def _next_weight(
    weight: tl.tensor,
    kl: tl.tensor,
    variance: tl.tensor,
    aim: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    newton_allowed: tl.tensor,
) -> tl.tensor:
    root = tl.sqrt(2 * kl)
    newton = _representable(weight - (root - tl.sqrt(2 * aim)) * root / (weight * variance))
    usable = (newton > low) & (newton < high) & newton_allowed
    return tl.where(usable, newton, _representable((low + high) / 2))


@_jit
def _representable(weight: tl.tensor) -> tl.tensor:
    # Sweeps compute in float32: the weight reported must be the weight that was evaluated.
    return weight.to(tl.float32).to(tl.float64)


@_jit
def _write(
    student: tl.tensor,
    teacher: tl.tensor,
    out: tl.tensor,
    vocabulary: tl.tensor,
    top_s: tl.tensor,
    top_t: tl.tensor,
    weight: tl.tensor,
    log_norm: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    lane = tl.arange(0, BLOCK)
    share_s = (1 - weight).to(tl.float32)
    share_t = weight.to(tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + lane
        s = _load(student, token, vocabulary) - top_s
        t = _load(teacher, token, vocabulary) - top_t
        # 0 · -inf at either end of the path would be NaN.
        blended = tl.where(s == float("-inf"), s, share_s * s + share_t * t) - log_norm
        tl.store(out + token, blended, mask=token < vocabulary)
