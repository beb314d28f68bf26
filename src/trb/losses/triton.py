"""The reverse KL on a GPU as one fused kernel: loss, metrics and gradient of a chunk, from both models' logits.

One program does one row. A first sweep over the vocabulary finds both normalisers, both entropies, the divergence and
the student's likeliest tokens; a second writes the gradient by the student's logits, in their dtype, over the
student's logits if the caller wishes. In bf16 that is ten bytes a vocabulary entry for the whole vocabulary (both
models read twice, the gradient written once) and eight for a top-k support, whose gradient needs the teacher at k
tokens only.

The top k come out of the first sweep: each lane of a block keeps the three largest logits it meets and where the first
two stand. The k largest of those are the row's, unless some lane met three of them; that is seen from the third, has a
chance of about k^3 / (6 lanes^2) (with 4,096 lanes 4e-5 at k = 16, 3e-3 at 64) and costs such a row k sweeps more.
By comparison `torch.topk` selects by radix, in several sweeps, and knows nothing of folded stop ids. Among equal logits
the smaller token comes first, so that the support is the same in every run.

The matrix products stay with cuBLAS, a chunk of tokens at a time (`trb.losses.chunked`), which bounds memory as a fused
projection would. Written out, a token's logits cost about 18 V bytes of traffic: two products write them (4 V), this
kernel moves 10 V, two products read the gradient (4 V); 5 ps per vocabulary entry at an H100's 3.35 TB/s. The products
of a 1.7B student (H = 2,048) and an 8B teacher (4,096) are 20,480 V operations, 21 ps at its 989 TFLOP/s, and a fused
kernel would have to do 12,288 V of them twice, since the gradient needs the normalisers: 12 ps to save 5.

`trb.losses.terms` remains the semantics of record. Left out on purpose: rows whose loss is infinite or not a number,
which come back with a loss of NaN and their gradient unwritten, for `trb.losses.chunked` to do again; supports of more
than 64 tokens that are not the whole vocabulary; float64; and losses other than the reverse KL. Logits below -1e30
count as impossible.

Importing this module without Triton works; `available` is then False, as it is where the kernel, tried once on a few
rows, fails or gives other losses.

Shape suffixes: C tokens of one chunk, V rows of a head. In kernels, names in capitals are compile-time constants and
vectors have one lane for every token of a block, or for every token of the support.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trb.errors import OperationError
from trb.losses.terms import Rows, reverse_kl_terms
from trb.safety.untrusted import printable
from trb.vocab import log_probs

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["available", "reverse_kl_chunk"]

logger = logging.getLogger(__name__)

_DTYPES = torch.float32, torch.bfloat16, torch.float16
_MOST_SUPPORT, _MOST_STOPS = 64, 64
_METRICS = 6
_LARGEST_BLOCK = 4096
_LANES_PER_THREAD = 4
# Decided when the kernels are decorated, so setting the variable later changes nothing.
_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def available(logits_CV: Tensor, taught_CV: Tensor, k: int, size: int, stop_ids: int) -> bool:
    """Whether `reverse_kl_chunk` can do these logits, with a support of `k` tokens of `size` and so many stop ids."""
    if triton is None or not all(x_CV.dtype in _DTYPES for x_CV in (logits_CV, taught_CV)):
        return False
    if (k > _MOST_SUPPORT and k < size) or stop_ids > _MOST_STOPS:
        return False
    support = k if k < size else 0
    return _INTERPRETED or (logits_CV.is_cuda and _works(logits_CV.device, logits_CV.dtype, taught_CV.dtype, support))


@functools.cache
@torch.no_grad()
def _works(device: torch.device, dtype: torch.dtype, taught_dtype: torch.dtype, k: int) -> bool:
    """Whether the kernel, as it is compiled there, gives the losses and gradients of `terms`; says once if not."""
    place_CV = torch.arange(300, device=device) * 7 + torch.arange(3, device=device)[:, None]
    # Steps of 0.14 below 32 stay apart in bfloat16: of equal logits any may be in the support.
    logits_CV, taught_CV = (0.14 * (place_CV % 300)).to(dtype), (0.14 * (place_CV % 211)).to(taught_dtype)
    rows = Rows.of(log_probs(logits_CV), log_probs(taught_CV))
    loss_C, gradient_CV, _ = reverse_kl_terms(rows.log_student, rows.log_teacher, rows.student, rows.teacher, k)
    found_CV, token_C = torch.empty_like(logits_CV), torch.zeros(3, dtype=torch.long, device=device)
    options: dict[str, Any] = {"k": k, "temperature": 1.0, "size": 300, "stop_ids": (0,), "gradient_CV": found_CV}
    try:
        found_C, _ = reverse_kl_chunk(logits_CV, taught_CV, token_C, **options)
        right = torch.allclose(found_C, loss_C, rtol=1e-3) and torch.allclose(
            found_CV.float(), gradient_CV, rtol=2 * torch.finfo(dtype).eps, atol=1e-4
        )
        reason = "its losses are others"
    except Exception as error:  # whatever compilers and drivers do: torch does the same
        right, reason = False, printable(f"{type(error).__name__}: {error}", lines=False)
    if not right:
        logger.warning("computing the loss with torch operations, as the fused kernel does not work here: %s", reason)
    return right


@torch.no_grad()
def reverse_kl_chunk(
    logits_CV: Tensor,
    taught_CV: Tensor,
    token_C: Tensor,
    *,
    k: int,
    temperature: float,
    size: int,
    stop_ids: Sequence[int],
    weight_C: Tensor | None = None,
    gradient_CV: Tensor | None = None,
    block: int | None = None,
    warps: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Reverse KL on the student's top `k` tokens, as `trb.losses.terms.reverse_kl_terms`, from both models' logits.

    Args:
        logits_CV: `[C, V_student]` of the student, in float32, bfloat16 or float16; any row stride.
        taught_CV: `[C, V_teacher]` of the teacher; may be of another of these dtypes.
        token_C: `[C]` events, below `size`.
        k: support size, at most 64, or 0 for the whole vocabulary.
        temperature: divides both models' logits.
        size: the first so many head rows are shared.
        stop_ids: ids that are one event, the one that stands for it first.
        weight_C: `[C]` factors of the losses, and so of the gradient; None for 1.
        gradient_CV: `[C, V_student]`, where the gradient by the student's logits goes, in its dtype; may be
            `logits_CV` itself.
        block: tokens read at once, a power of two; chosen from `size` by default.
        warps: warps of a program; chosen from `block` by default.

    Returns:
        `[C]` losses in float32, NaN where a row is left to tensors, and the `[C]` values of
        `trb.losses.terms.TokenMetrics` in its order.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if triton is None:
        raise OperationError("the fused loss needs Triton, which is not installed; use trb.losses.chunked")
    logits_CV, taught_CV = (x_CV if x_CV.stride(1) == 1 else x_CV.contiguous() for x_CV in (logits_CV, taught_CV))
    rows, support = len(token_C), k if k < size else 0
    padded_support = max(2, triton.next_power_of_2(support))
    block = max(block or min(_LARGEST_BLOCK, triton.next_power_of_2(size)), padded_support // 2)
    number_MC = torch.empty(1 + _METRICS, rows, dtype=torch.float32, device=logits_CV.device)
    if rows:
        with torch.cuda.device_of(logits_CV):
            _reverse_kl_kernel[(rows,)](
                logits_CV,
                taught_CV,
                token_C.contiguous(),
                None if weight_C is None else weight_C.contiguous(),
                number_MC,
                gradient_CV,
                logits_CV.stride(0),
                taught_CV.stride(0),
                0 if gradient_CV is None else gradient_CV.stride(0),
                size,
                logits_CV.shape[1],
                rows,
                1 / temperature,
                STOPS=tuple(stop_ids) if len(stop_ids) > 1 else (),
                K=support,
                PADDED_K=padded_support,
                BLOCK=block,
                enable_fp_fusion=True,
                num_warps=warps or max(1, min(32, block // (32 * _LANES_PER_THREAD))),
            )
    loss_C, *metrics = number_MC.unbind(0)
    return loss_C, metrics


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


def _constant(value: float) -> Any:
    return value if triton is None else tl.constexpr(value)


# Below any logit that matters, finite, so that no infinities are subtracted and nothing overflows in a sum.
_LOWEST = _constant(-1e30)
# What stands where there is no token: below every token's.
_NOTHING = _constant(-2e30)


@_jit
def _reverse_kl_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    tokens: tl.tensor,
    weights: tl.tensor,
    numbers: tl.tensor,
    gradient: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    gradient_stride: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    coldness: tl.tensor,
    STOPS: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    numbers += row
    stop_s = _stop_logit(student, coldness, STOPS)
    stop_t = _stop_logit(teacher, coldness, STOPS)
    token = tl.load(tokens + row)
    token_s = _logits(student, token, size, coldness, stop_s, STOPS)
    token_t = _logits(teacher, token, size, coldness, stop_t, STOPS)

    top_s, norm_s, top_t, norm_t, divergence, entropy_s, entropy_t, beyond, keys, decided = _statistics(
        student, teacher, token_s, token_t, size, coldness, stop_s, stop_t, STOPS, K, PADDED_K, BLOCK
    )
    tl.store(numbers + rows, tl.maximum(divergence, 0.0))
    tl.store(numbers + 2 * rows, entropy_s)
    tl.store(numbers + 3 * rows, entropy_t)
    tl.store(numbers + 4 * rows, tl.where(token_s > _LOWEST, token_s - top_s - norm_s, float("-inf")))
    tl.store(numbers + 5 * rows, tl.where(token_t > _LOWEST, token_t - top_t - norm_t, float("-inf")))
    loss, mass, level, place, slope = divergence, 1.0, divergence, keys, divergence
    if K:
        if decided == 0:
            keys = _search(student, size, coldness, stop_s, STOPS, K, PADDED_K, BLOCK)
        loss, mass, level, place, slope, beyond = _on_support(
            keys, teacher, size, coldness, stop_t, top_s, norm_s, top_t, norm_t, STOPS, K, PADDED_K
        )
    # False for NaN too.
    solved = (beyond == 0) & (tl.abs(loss) < float("inf")) & (tl.abs(norm_s) + tl.abs(norm_t) < float("inf"))
    solved = solved & (top_s > _LOWEST) & (top_t > _LOWEST) & (top_s < float("inf")) & (top_t < float("inf"))
    scale = coldness
    if weights is not None:
        weight = tl.load(weights + row).to(tl.float32)
        loss *= weight
        scale *= weight
    tl.store(numbers, tl.where(solved, loss, float("nan")))
    tl.store(numbers + 6 * rows, mass)
    if gradient is not None:  # noqa: SIM102 - decided when the kernel is compiled
        if solved:
            _write(
                gradient + row * gradient_stride, student, teacher, size, width, coldness, stop_s, stop_t,
                top_s, norm_s, top_t, norm_t, scale, level, place, slope, STOPS, K, BLOCK,
            )  # fmt: skip


# --- logits of events ------------------------------------------------------------


@_jit
def _stop_logit(row: tl.tensor, coldness: tl.tensor, STOPS: tl.constexpr) -> tl.tensor:
    """log-sum-exp of the logits of all stop ids, at the temperature; -inf if they all are, or if nothing is folded."""
    top = tl.full((), float("-inf"), tl.float32)
    for index in tl.static_range(len(STOPS)):
        top = tl.maximum(top, tl.load(row + STOPS[index]).to(tl.float32) * coldness)
    total = tl.full((), 0.0, tl.float32)
    for index in tl.static_range(len(STOPS)):
        total += tl.exp(tl.load(row + STOPS[index]).to(tl.float32) * coldness - top)
    return tl.where(top == float("-inf"), top, top + tl.log(total))


@_jit
def _raw(row: tl.tensor, token: tl.tensor, size: tl.tensor, coldness: tl.tensor) -> tl.tensor:
    # Read again by the row's next sweep, so worth keeping in the cache.
    return tl.load(row + token, mask=token < size, other=0.0, eviction_policy="evict_last").to(tl.float32) * coldness


@_jit
def _folded(raw: tl.tensor, token: tl.tensor, size: tl.tensor, stop_logit: tl.tensor, STOPS: tl.constexpr) -> tl.tensor:
    """Logits of events from those of tokens: bounded below by _LOWEST, and _NOTHING beyond the vocabulary."""
    for index in tl.static_range(len(STOPS)):
        raw = tl.where(token == STOPS[index], stop_logit if index == 0 else float("-inf"), raw)
    raw = tl.where(raw < _LOWEST, _LOWEST, raw)  # written so that NaN stays
    return tl.where(token < size, raw, _NOTHING)


@_jit
def _logits(
    row: tl.tensor,
    token: tl.tensor,
    size: tl.tensor,
    coldness: tl.tensor,
    stop_logit: tl.tensor,
    STOPS: tl.constexpr,
) -> tl.tensor:
    return _folded(_raw(row, token, size, coldness), token, size, stop_logit, STOPS)


# --- the first sweep ------------------------------------------------------------


@_jit
def _statistics(
    student: tl.tensor,
    teacher: tl.tensor,
    token_s: tl.tensor,
    token_t: tl.tensor,
    size: tl.tensor,
    coldness: tl.tensor,
    stop_s: tl.tensor,
    stop_t: tl.tensor,
    STOPS: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """One sweep: largest logit and log-sum-exp below it of each model, KL(student || teacher), both entropies, whether
    the student can draw what the teacher cannot (for a top-k support: 0), and the K largest keys with whether they
    surely are the row's.

    Sums are taken about the logits of the drawn token, near which most of the mass usually lies, so that little
    cancels.
    """
    lane = tl.arange(0, BLOCK)
    top_s, sum_s, self_s = _empty(BLOCK)
    top_t, sum_t, self_t = _empty(BLOCK)
    gap = tl.zeros((BLOCK,), tl.float32)
    # With K: the second and third of a lane, and where the first two stand. Without: the student's largest logit among
    # tokens that the teacher cannot draw.
    second = tl.full((BLOCK,), _NOTHING, tl.float32)
    third = tl.full((BLOCK,), _NOTHING, tl.float32)
    first_at = tl.zeros((BLOCK,), tl.int32)
    second_at = tl.zeros((BLOCK,), tl.int32)
    pivot_s = tl.where(tl.abs(token_s) < -_LOWEST, token_s, 0.0)
    pivot_t = tl.where(tl.abs(token_t) < -_LOWEST, token_t, 0.0)
    for start in range(0, size, BLOCK):
        token = start + lane
        s = _logits(student, token, size, coldness, stop_s, STOPS)
        t = _logits(teacher, token, size, coldness, stop_t, STOPS)
        if K:
            is_first = s > top_s
            is_second = s > second
            third = tl.where(is_second, second, tl.where(s > third, s, third))
            second = tl.where(is_first, top_s, tl.where(is_second, s, second))
            second_at = tl.where(is_first, first_at, tl.where(is_second, token, second_at))
            first_at = tl.where(is_first, token, first_at)
        else:
            second = tl.where((t <= _LOWEST) & (s > second), s, second)
        top_s, kept, e = _accumulate(top_s, s)
        sum_s = sum_s * kept + e
        self_s = self_s * kept + e * (s - pivot_s)
        gap = gap * kept + e * ((s - pivot_s) - (t - pivot_t))
        top_t, kept, e = _accumulate(top_t, t)
        sum_t = sum_t * kept + e
        self_t = self_t * kept + e * (t - pivot_t)
    max_s, total_s, mean_s, gap_mean = _reduce(top_s, sum_s, self_s, gap)
    max_t, total_t, mean_t, _ = _reduce(top_t, sum_t, self_t, gap)
    norm_s, norm_t = tl.log(total_s), tl.log(total_t)
    # The difference of two numbers of the size of a logit: worth float64, as nothing else here is.
    offset_s = max_s.to(tl.float64) - pivot_s + tl.log(total_s.to(tl.float64))
    offset_t = max_t.to(tl.float64) - pivot_t + tl.log(total_t.to(tl.float64))
    divergence = (gap_mean - offset_s + offset_t).to(tl.float32)
    entropy_s, entropy_t = (offset_s - mean_s).to(tl.float32), (offset_t - mean_t).to(tl.float32)
    beyond = tl.full((), 0, tl.int32)
    keys = tl.full((PADDED_K,), 0, tl.int64)
    decided = beyond
    if K:
        candidates = tl.join(_key(top_s, first_at), _key(second, second_at))
        keys = tl.topk(tl.reshape(candidates, (2 * BLOCK,)), PADDED_K)
        weakest, _ = _decoded(tl.min(tl.where(tl.arange(0, PADDED_K) < K, keys, tl.max(keys, axis=0)), axis=0))
        # Rows that are not numbers have no largest: nothing is to be searched there.
        decided = ((tl.max(third, axis=0) < weakest) | (total_s != total_s)).to(tl.int32)
    else:
        beyond = (tl.exp(tl.max(second, axis=0) - max_s - norm_s) > 0).to(tl.int32)
    return max_s, norm_s, max_t, norm_t, divergence, entropy_s, entropy_t, beyond, keys, decided


@_jit
def _empty(BLOCK: tl.constexpr) -> tl.tensor:
    zeros = tl.zeros((BLOCK,), tl.float32)
    return tl.full((BLOCK,), _NOTHING, tl.float32), zeros, zeros


@_jit
def _accumulate(top: tl.tensor, logits: tl.tensor) -> tl.tensor:
    """Largest logit so far, by what sums so far shrink, and the new term's weight in them: one exponential a token."""
    change = tl.exp(-tl.abs(logits - top))
    grows = logits > top
    return tl.where(grows, logits, top), tl.where(grows, change, 1.0), tl.where(grows, 1.0, change)


@_jit
def _reduce(top: tl.tensor, total: tl.tensor, moment: tl.tensor, other: tl.tensor) -> tl.tensor:
    """Over lanes: the largest logit, the sum of exponentials below it, and the means of both moments in float64."""
    largest = tl.max(top, axis=0)
    share = tl.exp(top - largest)
    whole = tl.sum(total * share, axis=0)
    mean = tl.sum(moment * share, axis=0).to(tl.float64) / whole
    return largest, whole, mean, tl.sum(other * share, axis=0).to(tl.float64) / whole


# --- the student's top k ------------------------------------------------------------


@_jit
def _key(logits: tl.tensor, token: tl.tensor) -> tl.tensor:
    """Integers in the order of the logits; among equal ones the smaller token is larger."""
    bits = logits.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (token ^ 0x7FFFFFFF).to(tl.int64)


@_jit
def _decoded(key: tl.tensor) -> tl.tensor:
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@_jit
def _search(
    student: tl.tensor,
    size: tl.tensor,
    coldness: tl.tensor,
    stop_s: tl.tensor,
    STOPS: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The K largest keys by K sweeps: slow, never wrong."""
    lane = tl.arange(0, BLOCK)
    keys = tl.full((PADDED_K,), -0x7FFFFFFFFFFFFFFF, tl.int64)
    below = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for index in range(0, K):
        best = tl.full((BLOCK,), -0x7FFFFFFFFFFFFFFF, tl.int64)
        for start in range(0, size, BLOCK):
            key = _key(_logits(student, start + lane, size, coldness, stop_s, STOPS), start + lane)
            best = tl.where((key < below) & (key > best), key, best)
        below = tl.max(best, axis=0)
        keys = tl.where(tl.arange(0, PADDED_K) == index, below, keys)
    return keys


@_jit
def _on_support(
    keys: tl.tensor,
    teacher: tl.tensor,
    size: tl.tensor,
    coldness: tl.tensor,
    stop_t: tl.tensor,
    top_s: tl.tensor,
    norm_s: tl.tensor,
    top_t: tl.tensor,
    norm_t: tl.tensor,
    STOPS: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
) -> tl.tensor:
    """Loss, mass, what the gradient is in multiples of -p off the support, the support, the gradient on it (neither
    at stop ids other than the event's nor beyond K), and whether it has tokens that the teacher cannot draw."""
    logit, place = _decoded(keys)
    member = tl.arange(0, PADDED_K) < K
    taught = _logits(teacher, tl.where(member, place, 0), size, coldness, stop_t, STOPS)
    log_p = logit - top_s - norm_s
    log_q = taught - top_t - norm_t
    p = tl.where(member, tl.exp(log_p), 0.0)
    q = tl.where(member, tl.exp(log_q), 0.0)
    mass = tl.sum(p, axis=0)
    # What the student cannot draw contributes only the teacher's mass.
    ratio = tl.where(p > 0, log_p - log_q, 0.0)
    loss = tl.sum(p * ratio - p + q, axis=0) / mass
    pull = p / mass * ratio
    level = tl.sum(pull, axis=0)
    beyond = tl.max(((p > 0) & (taught <= _LOWEST)).to(tl.int32), axis=0)
    return loss, mass, level, tl.where(member, place, -1), pull - level * p, beyond


# --- the second sweep ------------------------------------------------------------


@_jit
def _write(
    gradient: tl.tensor,
    student: tl.tensor,
    teacher: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    coldness: tl.tensor,
    stop_s: tl.tensor,
    stop_t: tl.tensor,
    top_s: tl.tensor,
    norm_s: tl.tensor,
    top_t: tl.tensor,
    norm_t: tl.tensor,
    scale: tl.tensor,
    level: tl.tensor,
    place: tl.tensor,
    on_support: tl.tensor,
    STOPS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient by tokens: p (log p - log q - level) of each event, or -level p and then what it is on the support;
    every stop id has its share of the stop event's."""
    stop = tl.maximum(stop_s, _LOWEST) - top_s - norm_s
    at_stop = tl.exp(stop) * -level
    if K:
        if len(STOPS):
            here = place == STOPS[0]
            found = tl.sum(tl.where(here, on_support, 0.0), axis=0)
            at_stop = tl.where(tl.max(here.to(tl.int32), axis=0) == 0, at_stop, found)
    else:
        at_stop += tl.exp(stop) * (stop - (tl.maximum(stop_t, _LOWEST) - top_t - norm_t))
    for start in range(0, width, BLOCK):
        token = start + tl.arange(0, BLOCK)
        raw = _raw(student, token, size, coldness)
        log_p = _folded(raw, token, size, stop_s, STOPS) - top_s - norm_s
        if K:
            slope = tl.exp(log_p) * -level
        else:
            log_q = _logits(teacher, token, size, coldness, stop_t, STOPS) - top_t - norm_t
            slope = tl.exp(log_p) * (log_p - log_q - level)
        for index in tl.static_range(len(STOPS)):
            share = tl.where(raw == float("-inf"), 0.0, tl.exp(raw - stop_s))
            slope = tl.where(token == STOPS[index], at_stop * share, slope)
        tl.store(gradient + token, (slope * scale).to(gradient.dtype.element_ty), mask=token < width)
    if K:
        alone = place >= 0
        for index in tl.static_range(len(STOPS)):
            alone = alone & (place != STOPS[index])
        # Over what other threads of the program have just written there.
        tl.debug_barrier()
        tl.store(gradient + place, (on_support * scale).to(gradient.dtype.element_ty), mask=alone)
