"""The solve in plain torch: the semantics of record, for rows and machines that the compiled kernels leave.

Works on log-probabilities in whichever dtype it is given, float32 or float64; which rows need which is decided in
`trb.blend`. Left out on purpose: logits, gradients, and memory (the caller cuts rows into blocks).

Shape suffixes: N rows, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trb.blend.laws import BlendResult, kl

__all__ = [
    "FLOAT32_BUDGET_FLOOR",
    "FLOAT32_LOG_PROB_FLOOR",
    "LARGEST_SHIFT",
    "MAX_EVALUATIONS",
    "NEWTON_EVALUATIONS",
    "POSSIBLE_MASK",
    "WINDOW",
    "solve_log_probs",
]

# Above this, every student probability and every e^{βr} is a normal float32 number (r ≤ -log student ≤ 85).
FLOAT32_LOG_PROB_FLOOR = -85.0

# Below this budget, rounding of float32 log-probabilities reaches a thousandth of the divergence.
FLOAT32_BUDGET_FLOOR = 5e-4

# Accepted shortfall below the budget, relative to it. Newton aims at the middle of this window, so that landing
# a little to either side still ends the search without ever exceeding the budget.
WINDOW = 8e-4

MAX_EVALUATIONS = 90

# Newton has converged by then on ordinary rows; bisection afterwards guarantees the end on the others.
NEWTON_EVALUATIONS = 8

# Below this, a log-probability may stem from a mask written as the dtype's minimum (-65504 in float16).
POSSIBLE_MASK = -1e4

# Beyond this log-normaliser, differences of float64 numbers of its size no longer tell a divergence.
_FAR = 1e4

# Beyond this one, float32 logits are too coarse for log-probabilities to be read off as their difference from it.
LARGEST_SHIFT = 1e3


def solve_log_probs(log_student_NV: Tensor, log_teacher_NV: Tensor, budget_N: Tensor) -> BlendResult:
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
        slack_N = WINDOW * budget_N[searched_N]
        point.put(searched_N, _search(path.rows(searched_N), room_N[searched_N], slack_N))
    if reaches_N.any():
        point.put(reaches_N, _Point.at_teacher(path.rows(reaches_N)))

    kl_student_N = (point.kl_N - kept_student_N).masked_fill(stays_N, 0.0)
    kl_teacher_N = (point.weight_N - 1) * point.mean_N - point.log_norm_N - kept_teacher_N
    log_probs_NV = path.log_probs(point)
    if log_probs_NV.dtype == torch.float64 and (far_N := point.is_far).any():
        kl_teacher_N[far_N] = kl(log_probs_NV[far_N], shared.log_teacher_NV[far_N]).double() - kept_teacher_N[far_N]
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
        far_kl_N = kl(_normalised(log_blend_NV[far_N]), self.log_student_NV[far_N])
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
    for evaluation in range(MAX_EVALUATIONS):
        kl_N, variance_N, log_norm_N, mean_N = path.evaluate(weight_N)
        best.evaluations_N[rows_N] += 1
        feasible_N = kl_N <= room_N
        low_N, high_N = torch.where(feasible_N, weight_N, low_N), torch.where(feasible_N, high_N, weight_N)
        found = _Point(weight_N, kl_N, log_norm_N, mean_N, best.evaluations_N[rows_N])
        _keep_feasible(best, rows_N, feasible_N, found)

        middle_N = _representable((low_N + high_N) / 2, path)
        newton_N = _representable(_newton(weight_N, kl_N, variance_N, aim_N), path)
        usable_N = (newton_N > low_N) & (newton_N < high_N) & (evaluation < NEWTON_EVALUATIONS)
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
