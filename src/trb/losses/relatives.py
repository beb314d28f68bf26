"""Targets that others proposed for on-policy distillation: entropy-aware, TIP, TrOPD and importance-weighted OPD.

What they have in common with ours is kept: the reverse KL is that of `ReverseKL` on the student's top-k, not an
estimate from the sampled token, and each token counts in the mean over the completion tokens of all processes. So a
comparison differs in the idea alone. What a token's loss depends on beyond its own prefix is its own sequence, never
the other sequences of a micro-batch: how a step is laid out over micro-batches and processes changes nothing.

A threshold, a choice of tokens, and weights are held fixed in the gradient.

Shape suffixes: N tokens, T tokens of one sequence, R rows of a chunk, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trb.errors import InputError, real
from trb.losses.chunked import RowLoss, TokenBatch
from trb.losses.reverse import ReverseKL
from trb.losses.terms import (
    TOP_K,
    Rows,
    TokenMetrics,
    check_supports,
    checked_amount,
    entropy,
    forward_kl_terms,
)

__all__ = ["EntropyAware", "PrefixWeighted", "ReliableRegion", "TokenImportance"]


@dataclass(frozen=True)
class EntropyAware(RowLoss):
    """Reverse KL, plus forward KL where the teacher is unsure: its entropy exceeds `threshold` nats (arXiv 2603.07079).

    The forward KL is taken on the teacher's `forward_top_k` tokens (`trb.losses.terms.forward_kl_terms`).
    """

    top_k: int = TOP_K
    threshold: float = 0.8
    forward_top_k: int = TOP_K

    def __post_init__(self) -> None:
        check_supports(self, "top_k", "forward_top_k")
        object.__setattr__(self, "threshold", checked_amount("threshold", self.threshold))

    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        unsure_R = entropy(rows.teacher, rows.log_teacher) > self.threshold
        forward_R, forward_gradient_RV = _forward_terms(rows, self.forward_top_k)
        loss_R, gradient_RV, mass_R = ReverseKL(self.top_k).terms(rows)
        gradient_RV.addcmul_(forward_gradient_RV, unsure_R[:, None].to(gradient_RV.dtype))
        return loss_R + torch.where(unsure_R, forward_R, 0.0), gradient_RV, mass_R


@dataclass(frozen=True)
class ReliableRegion(RowLoss):
    """TrOPD's loss (arXiv 2606.01249): reverse KL where the teacher is reliable, forward KL on its top-k elsewhere.

    There a draw M ~ Bernoulli(m), m = min(1, πT(x)/πS(x)) at the completion's own token x, chooses one of the two at
    each token. Here the loss is its mean over M: m times the one plus 1 - m times the other, m held fixed. The expected
    gradient is the same, without the noise of the draws, and nothing depends on a seed. Continuing from teacher
    prefixes, the other half of TrOPD, is a behavior and not part of this loss.
    """

    top_k: int = TOP_K
    forward_top_k: int = TOP_K

    def __post_init__(self) -> None:
        check_supports(self, "top_k", "forward_top_k")

    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        reliable_R = self._reliability(rows)
        forward_R, forward_gradient_RV = _forward_terms(rows, self.forward_top_k)
        loss_R, gradient_RV, mass_R = ReverseKL(self.top_k).terms(rows)
        # Where the teacher forbids the token, the reverse KL may be infinite and has no say: 0 times infinity is NaN.
        forbidden_R = reliable_R == 0
        gradient_RV.mul_(reliable_R[:, None]).masked_fill_(forbidden_R[:, None], 0.0)
        gradient_RV.addcmul_(forward_gradient_RV, 1 - reliable_R[:, None])
        loss_R = (reliable_R * loss_R).masked_fill(forbidden_R, 0.0)
        return loss_R + ((1 - reliable_R) * forward_R).masked_fill(reliable_R == 1, 0.0), gradient_RV, mass_R

    @staticmethod
    def _reliability(rows: Rows) -> Tensor:
        """`[R]` m: the chance that speculative sampling would keep the token as the teacher's."""
        if rows.token is None:
            raise InputError("TrOPD's loss needs the tokens of the completions")
        student_R, teacher_R = (
            log_probs_RV.gather(-1, rows.token[:, None]).squeeze(-1)
            for log_probs_RV in (rows.log_student, rows.log_teacher)
        )
        return (teacher_R - student_R.clamp_min(torch.finfo(student_R.dtype).min)).clamp_max(0).exp()


@dataclass(frozen=True)
class TokenImportance:
    """TIP (arXiv 2604.14084): reverse KL at the share of each completion's tokens that matter most.

    A token matters by 1 - (1 - h)(1 - d), with h the student's entropy and d the reverse KL over the whole vocabulary,
    each scaled to 0..1 by the least and the largest value in its completion. The paper is said to scale and choose in a
    batch; in a completion, the choice does not depend on which completions share a micro-batch. ⌈share · T⌉ of T tokens
    are kept, earlier ones first where scores are equal. They stand for the completion: their losses weigh
    T / ⌈share · T⌉ in the mean over all completion tokens, so that the loss is that of `ReverseKL` at a share of 1.

    The scores need all tokens before the first gradient: a sweep without gradients, then one over the kept tokens. The
    metrics are those of all tokens.
    """

    top_k: int = TOP_K
    share: float = 0.5

    def __post_init__(self) -> None:
        check_supports(self, "top_k")
        object.__setattr__(self, "share", real("share", self.share))
        if not 0 < self.share <= 1:
            raise InputError(f"share must be above 0 and at most 1, got {self.share}")

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, TokenMetrics]:
        metrics = _seen(batch, self.top_k)
        kept_n, weight_n = self.kept(batch, metrics)
        chosen = replace(
            batch,
            student_hidden=batch.student_hidden[kept_n],
            teacher_hidden=batch.teacher_hidden[kept_n],
            tokens=batch.tokens[kept_n],
            normaliser=len(batch.tokens) if batch.normaliser is None else batch.normaliser,
            lengths=None,
            weights=weight_n,
        )
        return ReverseKL(self.top_k)(chosen)[0], metrics

    def kept(self, batch: TokenBatch, metrics: TokenMetrics) -> tuple[Tensor, Tensor]:
        """Indices of the tokens that are kept, in order, and their weights."""
        kept, weights, start = [], [], 0
        both = zip(*map(batch.by_sequence, (metrics.student_entropy, metrics.reverse_kl)), strict=True)
        for entropy_T, divergence_T in both:
            length = len(entropy_T)
            # 0.07 of 100 tokens are 7, although the product is a little more in floating point.
            count = max(1, math.ceil(self.share * length - 1e-9)) if length else 0
            score_T = 1 - (1 - _scaled(entropy_T)) * (1 - _scaled(divergence_T))
            best = score_T.argsort(descending=True, stable=True)[:count]
            kept.append(best.sort().values + start)
            weights.append(entropy_T.new_full((count,), length / max(1, count)))
            start += length
        return torch.cat(kept), torch.cat(weights)


@dataclass(frozen=True)
class PrefixWeighted:
    """Importance-weighted OPD (arXiv 2606.22600): reverse KL that counts less the more a completion has gone astray.

    Token t weighs 1 + γ (1 - Σ_{s<t} |a_s| / Σ_s |a_s|), with a = log πT - log πS of the completion's own tokens: 1 + γ
    at the start, falling towards 1. The weights are TRL's (`trl.experimental.iw_opd`), which puts them on the policy
    gradient of the sampled token instead. As there, the mean is over all tokens and the weights are not scaled to 1.

    Totals need whole completions before the first gradient: a sweep without gradients, then one with them.
    """

    top_k: int = TOP_K
    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_supports(self, "top_k")
        object.__setattr__(self, "gamma", checked_amount("gamma", self.gamma))

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, TokenMetrics]:
        return ReverseKL(self.top_k)(replace(batch, weights=self.weights(batch, _seen(batch, self.top_k))))

    def weights(self, batch: TokenBatch, metrics: TokenMetrics) -> Tensor:
        """`[N]` weights of the tokens."""
        parts = map(
            self._weights_of_one, batch.by_sequence((metrics.teacher_log_prob - metrics.student_log_prob).abs())
        )
        return torch.cat([*parts])

    def _weights_of_one(self, gap_T: Tensor) -> Tensor:
        before_T = gap_T.cumsum(0).roll(1)
        before_T[:1] = 0
        total = gap_T.sum()
        # Two models that agree have gone nowhere; after a token that the teacher forbids, nothing is left.
        astray_T = torch.where(total.isinf(), before_T.isinf().to(gap_T.dtype), before_T / total.clamp_min(1e-8))
        return 1 + self.gamma * (1 - astray_T)


def _forward_terms(rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Before anything that overwrites the rows' probabilities."""
    return forward_kl_terms(rows.log_student, rows.log_teacher, rows.student, rows.teacher, k)


def _seen(batch: TokenBatch, top_k: int) -> TokenMetrics:
    with torch.no_grad():
        return ReverseKL(top_k)(batch)[1]


def _scaled(values_T: Tensor) -> Tensor:
    """To 0..1; all 0 where all are equal, and what is not finite above what is."""
    if not len(values_T):
        return values_T
    known_T = values_T.isfinite()
    low = torch.where(known_T, values_T, math.inf).amin()
    high = torch.where(known_T, values_T, -math.inf).amax()
    width = (high - low).clamp_min(torch.finfo(values_T.dtype).tiny)
    return torch.where(known_T, (values_T - low) / width, 1.0)
