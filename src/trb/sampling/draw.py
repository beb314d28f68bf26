"""Draft, accept, or draw the residual: an exact draw from μ that reuses the student's sample (design, principle 4).

Sums run in float64: at V = 150,000 a float32 running sum is off by more than many tokens' probability.

Shape suffixes: N prefixes, V vocabulary.
"""

import torch
from torch import Tensor

from trb.policies import Target

__all__ = ["accept_or_replace", "inverse_cdf"]


def inverse_cdf(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """`[N]` token ids drawn from unnormalised non-negative weights; a weight of zero is never drawn."""
    cumulative_NV = weights_NV.double().cumsum(-1)
    total_N = cumulative_NV[:, -1]
    # Rounding may lift u · total to the total itself; just below it is still inside the last positive weight.
    level_N = torch.minimum(uniform_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(cumulative_NV, level_N[:, None], right=True).squeeze(-1)


def accept_or_replace(
    target: Target, student_NV: Tensor, draft_N: Tensor, accept_N: Tensor, residual_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep each draft with probability overlap / student, else draw from the normalised `μ - overlap`.

    Args:
        target: the law at the N prefixes.
        student_NV: student probabilities the drafts were drawn from.
        draft_N: drafted token ids.
        accept_N: uniforms deciding acceptance.
        residual_N: uniforms for the residual draws.

    Returns:
        Token ids `[N]` and whether the draft was kept `[N]`.
    """
    drafts = draft_N[:, None]
    drafted_N = student_NV.gather(-1, drafts).squeeze(-1).double()
    if target.overlap is None:
        kept_N = target.log_probs.gather(-1, drafts).squeeze(-1).exp().double()
    else:
        kept_N = target.overlap.gather(-1, drafts).squeeze(-1).double()
    accepted_N = accept_N * drafted_N < kept_N
    rejected = (~accepted_N).nonzero().squeeze(-1)
    token_N = draft_N.clone()
    if rejected.numel():
        law_RV = target.log_probs[rejected].exp().double()
        overlap_RV = student_NV[rejected] if target.overlap is None else target.overlap[rejected]
        residual_RV = (law_RV - overlap_RV.double()).clamp_min(0)
        replaced_R = inverse_cdf(residual_RV, residual_N[rejected])
        # Only rounding can reject where nothing is left over; the draft then stands.
        empty_R = residual_RV.sum(-1) == 0
        token_N[rejected] = torch.where(empty_R, draft_N[rejected], replaced_R)
        accepted_N[rejected] = empty_R
    return token_N, accepted_N
