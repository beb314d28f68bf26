"""The kernel of `trb.losses.triton`: one program does one row of a chunk.

Where Triton is missing, functions stay undecorated and nothing calls them. Names in capitals are compile-time
constants; vectors have one lane for every token of a block, or for every token of the support.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["reverse_kl_kernel", "triton"]


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


def _constant(value: float) -> Any:
    return value if triton is None else tl.constexpr(value)


# Below any logit that matters, finite, so that no infinities are subtracted and nothing overflows in a sum.
_LOWEST = _constant(-1e30)
# What stands where there is no token: below every token's.
_NOTHING = _constant(-2e30)


# long for its arguments, of which each has a line
@_jit
def reverse_kl_kernel(
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
    """Loss, metrics and gradient of row `program_id`.

    Args:
        student: `[C, V_student]` logits of rows `student_stride` apart; `teacher` alike.
        tokens: `[C]` events.
        weights: `[C]` factors of the losses, or None.
        numbers: `[7, C]` float32 results: the loss, NaN where a row is left to tensors, and the metrics.
        gradient: `[C, width]` results of rows `gradient_stride` apart, or None; may be `student`.
        size: the first so many head rows are shared.
        width: rows of the student's head.
        rows: C.
        coldness: 1 / temperature.
        STOPS: ids that are one event, the one that stands for it first; none if it is one id anyway.
        K: support size, or 0 for the whole vocabulary.
        PADDED_K: the next power of two, at least 2.
        BLOCK: tokens read at once, at least half of that.
    """
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


# long because it is one sweep: its fifteen running values would be arguments and results of any helper
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
