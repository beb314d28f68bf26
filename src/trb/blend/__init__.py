"""The trust-region blend: the policy closest to the teacher inside a KL ball around the student.

At one prefix, with budget ε ≥ 0, the behavior policy is `argmin_μ KL(μ || teacher)` subject to
`KL(μ || student) ≤ ε`. The solution is the geometric path `μ ∝ student^(1-β) teacher^β` at the largest
feasible teacher weight β (paper, section 2); `solve` finds it.

Numerics. With r = log teacher - log student, A(β) = log Σ student · e^{βr} and moments under μ:
KL(μ||student) = βA' - A, and its derivative in β is β·Var[r]. `sqrt(2 KL)` is almost linear in β, so Newton on
it, kept inside a bracket, usually needs two or three passes over the vocabulary. Centring r at its student mean
and summing `expm1` leaves no cancellation, which is what makes float32 enough for small budgets. Rows whose
log-probabilities lie too far apart for that (one-hot rows, say) are solved in float64 in log space.

Two compiled kernels do the same for ordinary rows in a fraction of the time, and leave the others to this module:
`blend_native` on a CPU with a C compiler, `blend_triton` on a GPU.

Left out on purpose: schedules of the budget (`schedule`), end-of-sequence and head alignment (`vocab`), and
drawing tokens (`sampling`).

Shape suffixes: N rows (flattened prefixes), V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trb.blend import native as blend_native
from trb.blend import triton as blend_triton

__all__ = ["BlendResult", "DenseLaw", "GeometricLaw", "Law", "WeightResult", "log_softmax", "solve", "weigh"]

# Accepted shortfall below the budget, relative to it. Newton aims at the middle of this window, so that landing
# a little to either side still ends the search without ever exceeding the budget.
_WINDOW = 8e-4
_MAX_EVALUATIONS = 90
# Newton has converged by then on ordinary rows; bisection afterwards guarantees the end on the others.
_NEWTON_EVALUATIONS = 8
# Above this, every student probability and every e^{βr} is a normal float32 number (r ≤ -log student ≤ 85).
_FLOAT32_LOG_PROB_FLOOR = -85.0
# Below this, a log-probability may stem from a mask written as the dtype's minimum (-65504 in float16).
_POSSIBLE_MASK = -1e4
# Below this budget, rounding of float32 log-probabilities reaches a thousandth of the divergence.
_FLOAT32_BUDGET_FLOOR = 5e-4
# Beyond this log-normaliser, differences of float64 numbers of its size no longer tell a divergence.
_FAR = 1e4
# Beyond this one, float32 logits are too coarse for log-probabilities to be read off as their difference from it.
_LARGEST_SHIFT = 1e3
# Rows are solved in blocks of about this many elements. On a CPU, temporaries of a megabyte stay in cache; an
# accelerator wants few large kernels, and the block only bounds memory.
_BLOCK_ELEMENTS_CPU = 1 << 18
_BLOCK_ELEMENTS = 1 << 26
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
    student_NV, teacher_NV, budget_N = _flat(student_logits, teacher_logits, kl_budget)
    dtype = torch.float64 if torch.float64 in (student_NV.dtype, teacher_NV.dtype) else torch.float32
    leading = student_logits.shape[:-1]
    found = _solve_natively(student_NV, teacher_NV, budget_N, write=True)
    if found is None:
        result = _solve_in_blocks(student_NV, teacher_NV, budget_N, dtype)
    else:
        result = BlendResult(found.log_probs, found.teacher_weight, found.kl_student, found.kl_teacher, found.passes)
        left = (found.passes < 0).nonzero().squeeze(-1)
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
    student_NV, teacher_NV, budget_N = _flat(student_logits_NV, teacher_logits_NV, kl_budget)
    found = None if student_NV.device.type != "cpu" else _solve_natively(student_NV, teacher_NV, budget_N, write=False)
    if found is None:
        whole = solve(student_NV, teacher_NV, budget_N)
        law = DenseLaw(whole.log_probs)
        return WeightResult(law, whole.teacher_weight, whole.kl_student, whole.kl_teacher, whole.passes)
    left = ((found.passes < 0) | (found.log_norm.abs() > _LARGEST_SHIFT)).nonzero().squeeze(-1)
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
    block = max(1, _BLOCK_ELEMENTS_CPU // scores.shape[-1])
    totals = [part_NV.exp().sum(-1, keepdim=True) for part_NV in rows_NV.split(block)]
    return torch.cat(totals).log().reshape(*scores.shape[:-1], 1)


def _flat(student_logits: Tensor, teacher_logits: Tensor, kl_budget: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both models as `[N, V]` and the budget as `[N]` float64, checked."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape, {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}: align them first with trb.vocab.align"
        )
    leading, vocabulary = student_logits.shape[:-1], student_logits.shape[-1]
    budget_N = _checked_budget(kl_budget, leading, student_logits.device).reshape(-1)
    return student_logits.reshape(-1, vocabulary), teacher_logits.reshape(-1, vocabulary), budget_N


def _solve_natively(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor, *, write: bool) -> Any:
    """The result of a compiled kernel, rows it leaves to us marked by negative `passes`; None where there is none."""
    if torch.float64 in (student_NV.dtype, teacher_NV.dtype) or not student_NV.numel():
        return None
    if blend_triton.available(student_NV):
        return blend_triton.solve_rows(student_NV, teacher_NV, budget_N)
    if student_NV.device.type == "cpu" and blend_native.available():
        return blend_native.solve_rows(student_NV, teacher_NV, budget_N, write=write)
    return None


def _solve_in_blocks(student_NV: Tensor, teacher_NV: Tensor, budget_N: Tensor, dtype: torch.dtype) -> BlendResult:
    result = _empty_result(student_NV, dtype)
    elements = _BLOCK_ELEMENTS_CPU if student_NV.device.type == "cpu" else _BLOCK_ELEMENTS
    block = max(1, elements // max(1, student_NV.shape[-1]))
    for start in range(0, student_NV.shape[0], block):
        rows = slice(start, start + block)
        _store(result, rows, _solve_rows(student_NV[rows], teacher_NV[rows], budget_N[rows], dtype))
    return result


def _checked_budget(kl_budget: float | Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(kl_budget, Tensor) and kl_budget >= 0:  # without asking an accelerator
        return torch.full(leading, kl_budget, dtype=torch.float64, device=device)
    budget = torch.as_tensor(kl_budget, dtype=torch.float64, device=device)
    invalid = ~(budget >= 0)
    if invalid.any():
        value = budget[invalid].reshape(-1)[0].item()
        raise ValueError(f"kl_budget must be a non-negative number of nats, got {value}")
    return budget.expand(leading)


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
    hard_N = torch.minimum(lowest_student_N, lowest_teacher_N) < _FLOAT32_LOG_PROB_FLOOR
    hard_N |= (budget_N > 0) & (budget_N < _FLOAT32_BUDGET_FLOOR)
    if dtype == torch.float64 or not hard_N.any():
        return _solve_log_probs(log_student_NV, log_teacher_NV, budget_N)
    result = _empty_result(student_NV, dtype)
    easy_N = ~hard_N
    _store(result, easy_N, _solve_log_probs(log_student_NV[easy_N], log_teacher_NV[easy_N], budget_N[easy_N]))
    hard_student_NV, _ = _log_softmax(student_NV[hard_N], torch.float64)
    hard_teacher_NV, _ = _log_softmax(teacher_NV[hard_N], torch.float64)
    _store(result, hard_N, _solve_log_probs(hard_student_NV, hard_teacher_NV, budget_N[hard_N]))
    return result


def _log_softmax(logits_NV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the lowest finite one of each row; a dtype's most negative number counts as -inf."""
    log_probs_NV = log_softmax(logits_NV, dtype)
    lowest_N = _lowest_finite(log_probs_NV)
    if (lowest_N < _POSSIBLE_MASK).any():
        masked_NV = logits_NV <= torch.finfo(logits_NV.dtype).min / 2
        log_probs_NV = log_softmax(logits_NV.to(dtype).masked_fill(masked_NV, -math.inf), dtype)
        lowest_N = _lowest_finite(log_probs_NV)
    return log_probs_NV, lowest_N


def _lowest_finite(log_probs_NV: Tensor) -> Tensor:
    return torch.nan_to_num(log_probs_NV, nan=0.0, neginf=0.0).amin(-1)


def _solve_log_probs(log_student_NV: Tensor, log_teacher_NV: Tensor, budget_N: Tensor) -> BlendResult:
    shared = _shared_support(log_student_NV, log_teacher_NV)
    kept_student_N, kept_teacher_N = shared.kept_student_N, shared.kept_teacher_N
    path = _Path.between(shared)
    # KL(μ || student) = KL(μ || student on the shared support) - log student(shared support): the budget shrinks.
    room_N = budget_N + kept_student_N
    unbounded_N = budget_N.isposinf()
    stays_N = ~unbounded_N & ((budget_N == 0) | ~(room_N >= 0))
    reaches_N = unbounded_N | (~stays_N & (path.kl_end_N <= room_N))
    searched_N = ~stays_N & ~reaches_N

    point = _Point.at_student(path)
    if searched_N.any():
        slack_N = _WINDOW * budget_N[searched_N]
        point.put(searched_N, _search(path.rows(searched_N), room_N[searched_N], slack_N))
    if reaches_N.any():
        point.put(reaches_N, _Point.at_teacher(path.rows(reaches_N)))

    kl_student_N = (point.kl_N - kept_student_N).masked_fill(stays_N, 0.0)
    kl_teacher_N = (point.weight_N - 1) * point.mean_N - point.log_norm_N - kept_teacher_N
    log_probs_NV = path.log_probs(point)
    if log_probs_NV.dtype == torch.float64 and (far_N := point.is_far).any():
        kl_teacher_N[far_N] = _kl(log_probs_NV[far_N], shared.log_teacher_NV[far_N]).double() - kept_teacher_N[far_N]
    kl_teacher_N = kl_teacher_N.clamp_min(0).masked_fill(stays_N & (kept_student_N < 0), math.inf)
    if reaches_N.any():
        log_probs_NV[reaches_N] = shared.log_teacher_NV[reaches_N]
    if stays_N.any():
        log_probs_NV[stays_N] = log_student_NV[stays_N]
    if unbounded_N.any():  # the teacher itself, even where it allows what the student does not
        log_probs_NV[unbounded_N] = log_teacher_NV[unbounded_N]
        kl_teacher_N = kl_teacher_N.masked_fill(unbounded_N, 0.0)
        kl_student_N = kl_student_N.masked_fill(unbounded_N & (kept_teacher_N < 0), math.inf)
    return BlendResult(log_probs_NV, point.weight_N, kl_student_N, kl_teacher_N, point.evaluations_N + 3)


class _Shared(NamedTuple):
    """Both models on the tokens that both allow; -inf elsewhere."""

    log_student_NV: Tensor
    log_teacher_NV: Tensor
    ratio_NV: Tensor  # log teacher - log student, 0 off the support
    kept_student_N: Tensor  # log of the student's mass on the support
    kept_teacher_N: Tensor


def _shared_support(log_student_NV: Tensor, log_teacher_NV: Tensor) -> _Shared:
    """Restrict rows whose supports differ. Masking is an order dearer than arithmetic on a CPU, so others are left."""
    ratio_NV = (log_teacher_NV - log_student_NV).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    differ_N = ratio_NV.amax(-1).isinf() | ratio_NV.amin(-1).isinf()
    kept_student_N, kept_teacher_N = torch.zeros(2, len(ratio_NV), dtype=torch.float64, device=ratio_NV.device)
    if differ_N.any():
        off_NV = ratio_NV.isinf()
        log_student_NV, kept_student_N = _restrict(log_student_NV, off_NV)
        log_teacher_NV, kept_teacher_N = _restrict(log_teacher_NV, off_NV)
        ratio_NV = (log_teacher_NV - log_student_NV).nan_to_num_(nan=0.0)
    return _Shared(log_student_NV, log_teacher_NV, ratio_NV, kept_student_N, kept_teacher_N)


def _restrict(log_probs_NV: Tensor, off_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities renormalised on the support, and the log of their mass there: 0 where nothing is lost."""
    lost_N = log_probs_NV.exp().masked_fill_(~off_NV, 0.0).sum(-1, dtype=torch.float64)
    rest_NV = log_probs_NV.masked_fill(off_NV, -math.inf)
    # Through the lost mass while it is small, through the rest where little remains: each is exact where it is used.
    kept_N = torch.where(lost_N < 0.5, torch.log1p(-lost_N.clamp_max(1.0)), rest_NV.double().logsumexp(-1))
    shift_N = torch.where(kept_N.isfinite(), kept_N, 0.0)
    return rest_NV - shift_N[:, None].to(rest_NV.dtype), kept_N


class _Path(NamedTuple):
    """The geometric path of N rows on the support both models share, each renormalised there.

    In float32 `ratio_NV` is centred at its student mean; in float64 it is left as it is.
    """

    log_student_NV: Tensor  # -inf off the shared support
    weight_NV: Tensor  # student probabilities, 0 off the shared support
    ratio_NV: Tensor  # log teacher - log student, minus shift_N; finite off the shared support
    shift_N: Tensor  # what was subtracted from the ratio
    mean_N: Tensor  # E_student[log teacher - log student] = -KL(student || teacher)
    variance_N: Tensor  # of the ratio under the student
    third_N: Tensor  # its third central moment under the student
    kl_end_N: Tensor  # KL(teacher || student): the divergence at the end of the path

    @classmethod
    def between(cls, shared: _Shared) -> "_Path":
        # Rounded log-probabilities sum to 1 within their rounding; the sums below need more.
        weight_NV, teacher_NV = shared.log_student_NV.exp(), shared.log_teacher_NV.exp()
        total_N, teacher_total_N = weight_NV.sum(-1, keepdim=True), teacher_NV.sum(-1, keepdim=True)
        weight_NV /= total_N
        log_student_NV = shared.log_student_NV - total_N.log()
        ratio_NV = shared.ratio_NV.add_((total_N / teacher_total_N).log())
        kl_end_N = teacher_NV.mul_(ratio_NV).sum(-1) / teacher_total_N.squeeze(-1)
        mean_N = torch.mul(weight_NV, ratio_NV, out=teacher_NV).sum(-1)
        centred_NV = ratio_NV - mean_N[:, None]
        moment_NV = torch.mul(weight_NV, centred_NV, out=teacher_NV).mul_(centred_NV)
        variance_N = moment_NV.sum(-1)
        third_N = moment_NV.mul_(centred_NV).sum(-1)
        centre = ratio_NV.dtype == torch.float32
        return cls(
            log_student_NV,
            weight_NV,
            centred_NV if centre else ratio_NV,
            (mean_N if centre else torch.zeros_like(mean_N)).double(),
            mean_N.double(),
            variance_N.double(),
            third_N.double(),
            kl_end_N.double().clamp_min(0),
        )

    def rows(self, chosen_N: Tensor) -> "_Path":
        return self if chosen_N.all() else _Path(*(value[chosen_N] for value in self))

    def log_probs(self, point: "_Point") -> Tensor:
        dtype = self.ratio_NV.dtype
        log_norm_N = point.log_norm_N - point.weight_N * self.shift_N
        log_probs_NV = (self.log_student_NV - log_norm_N[:, None].to(dtype)).addcmul_(
            point.weight_N[:, None].to(dtype), self.ratio_NV
        )
        if dtype == torch.float64 and (far_N := point.is_far).any():
            # Rounding may have moved the law: it must be the one whose divergence was taken.
            scaled_NV = point.weight_N[far_N, None].to(dtype) * self.ratio_NV[far_N]
            log_probs_NV[far_N] = _normalised(scaled_NV.add_(self.log_student_NV[far_N]))
        return log_probs_NV

    def evaluate(self, weight_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One pass over the vocabulary: (KL(μ||student), Var_μ[r], A(β), E_μ[r]) at teacher weights `weight_N`."""
        scaled_NV = weight_N[:, None].to(self.ratio_NV.dtype) * self.ratio_NV
        if self.ratio_NV.dtype == torch.float32:
            return self._evaluate_centred(weight_N, scaled_NV.expm1_().mul_(self.weight_NV))
        return self._evaluate_log_space(weight_N, scaled_NV.add_(self.log_student_NV))

    def _evaluate_centred(self, weight_N: Tensor, change_NV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # change = student · (e^{βr} - 1), so its sums are the *changes* of the student's moments: no cancellation.
        growth_N = change_NV.sum(-1).double()
        change_NV.mul_(self.ratio_NV)
        first_N = change_NV.sum(-1).double()
        second_N = change_NV.mul_(self.ratio_NV).sum(-1).double()
        mean_N = first_N / (1 + growth_N)
        variance_N = (self.variance_N + second_N) / (1 + growth_N) - mean_N.square()
        log_norm_N = growth_N.log1p()
        kl_N = (weight_N * mean_N - log_norm_N).clamp_min(0)
        return kl_N, variance_N, log_norm_N + weight_N * self.shift_N, mean_N + self.shift_N

    def _evaluate_log_space(self, weight_N: Tensor, log_blend_NV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_norm_N = log_blend_NV.logsumexp(-1)
        far_N = log_norm_N.abs() > _FAR
        far_kl_N = _kl(_normalised(log_blend_NV[far_N]), self.log_student_NV[far_N])
        # At |A| = 2e4 the normaliser is off by 4e-12, which |r| = 4e4 would magnify: divide by the sum as well.
        blend_NV = log_blend_NV.sub_(log_norm_N[:, None]).exp_()
        total_N = blend_NV.sum(-1)
        blend_NV, log_norm_N = blend_NV.div_(total_N[:, None]), log_norm_N + total_N.log()
        mean_N = (blend_NV * self.ratio_NV).sum(-1)
        variance_N = (blend_NV * (self.ratio_NV - mean_N[:, None]).square()).sum(-1)
        kl_N = (weight_N * mean_N - log_norm_N).clamp_min(0)
        kl_N[far_N] = far_kl_N
        return kl_N, variance_N, log_norm_N, mean_N


def _normalised(scores_NV: Tensor) -> Tensor:
    """Log-probabilities, however large the scores: what the first normaliser leaves over is small, and so exact."""
    rest_NV = scores_NV - scores_NV.amax(-1, keepdim=True)
    return rest_NV - rest_NV.logsumexp(-1, keepdim=True)


def _kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q) of each row from the definition."""
    p_NV = log_p_NV.exp()
    return (p_NV * (log_p_NV - log_q_NV)).masked_fill_(p_NV == 0, 0.0).sum(-1).clamp_min(0)


@dataclass
class _Point:
    """Where each row stands on its path, with what the pass there found."""

    weight_N: Tensor
    kl_N: Tensor
    log_norm_N: Tensor
    mean_N: Tensor
    evaluations_N: Tensor

    @property
    def is_far(self) -> Tensor:
        return self.log_norm_N.abs() > _FAR

    @classmethod
    def at_student(cls, path: _Path) -> "_Point":
        zero_N = torch.zeros_like(path.mean_N)
        return cls(zero_N, zero_N.clone(), zero_N.clone(), path.mean_N.clone(), zero_N.long())

    @classmethod
    def at_teacher(cls, path: _Path) -> "_Point":
        zero_N = torch.zeros_like(path.mean_N)
        return cls(zero_N + 1, path.kl_end_N.clone(), zero_N, path.kl_end_N.clone(), zero_N.long())

    def put(self, rows: Tensor, other: "_Point") -> None:
        for name in ("weight_N", "kl_N", "log_norm_N", "mean_N", "evaluations_N"):
            getattr(self, name)[rows] = getattr(other, name)


def _search(path: _Path, room_N: Tensor, slack_N: Tensor) -> _Point:
    """The largest feasible teacher weight of rows whose teacher is out of reach: bracketed, safeguarded Newton.

    Returns the last feasible point of each row, with KL within `slack_N` below `room_N` (or the best that the
    arithmetic resolves).
    """
    best = _Point.at_student(path)
    aim_N = torch.maximum(room_N - slack_N / 2, room_N / 2)
    low_N, high_N = torch.zeros_like(room_N), torch.ones_like(room_N)
    weight_N = _first_guess(path, aim_N)
    rows_N = torch.arange(room_N.numel(), device=room_N.device)
    for evaluation in range(_MAX_EVALUATIONS):
        kl_N, variance_N, log_norm_N, mean_N = path.evaluate(weight_N)
        best.evaluations_N[rows_N] += 1
        feasible_N = kl_N <= room_N
        low_N, high_N = torch.where(feasible_N, weight_N, low_N), torch.where(feasible_N, high_N, weight_N)
        found = _Point(weight_N, kl_N, log_norm_N, mean_N, best.evaluations_N[rows_N])
        _keep_feasible(best, rows_N, feasible_N, found)

        middle_N = _representable((low_N + high_N) / 2, path)
        newton_N = _representable(_newton(weight_N, kl_N, variance_N, aim_N), path)
        usable_N = (newton_N > low_N) & (newton_N < high_N) & (evaluation < _NEWTON_EVALUATIONS)
        next_N = torch.where(usable_N, newton_N, middle_N)
        met_N = feasible_N & (kl_N >= room_N - slack_N)
        exhausted_N = (next_N <= low_N) | (next_N >= high_N)
        open_N = ~(met_N | exhausted_N)
        if not open_N.any():
            break
        path, weight_N, rows_N = path.rows(open_N), next_N[open_N], rows_N[open_N]
        room_N, slack_N, aim_N = room_N[open_N], slack_N[open_N], aim_N[open_N]
        low_N, high_N = low_N[open_N], high_N[open_N]
    return best


def _keep_feasible(best: _Point, rows_N: Tensor, feasible_N: Tensor, found: _Point) -> None:
    chosen = _Point(*(getattr(found, name)[feasible_N] for name in _Point.__dataclass_fields__))
    best.put(rows_N[feasible_N], chosen)


def _first_guess(path: _Path, aim_N: Tensor) -> Tensor:
    """β from the cumulants at the student, KL ≈ κ₂β²/2 + κ₃β³/3, or from the far end where that overshoots."""
    small_N = (2 * aim_N / path.variance_N.clamp_min(1e-300)).sqrt()
    skew_N = (path.third_N / (3 * path.variance_N.clamp_min(1e-300)) * small_N).clamp(-0.5, 0.5)
    chord_N = (aim_N / path.kl_end_N).sqrt()
    guess_N = small_N * (1 - skew_N)
    return _representable(torch.where(guess_N < 1, guess_N, chord_N).clamp(1e-12, 1 - 1e-7), path)


def _newton(weight_N: Tensor, kl_N: Tensor, variance_N: Tensor, aim_N: Tensor) -> Tensor:
    root_N = (2 * kl_N).sqrt()
    return weight_N - (root_N - (2 * aim_N).sqrt()) * root_N / (weight_N * variance_N)


def _representable(weight_N: Tensor, path: _Path) -> Tensor:
    """Round to the dtype the pass computes in, so that the weight reported is the weight that was evaluated."""
    return weight_N.to(path.ratio_NV.dtype).double()
