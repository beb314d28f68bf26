"""Draft, accept, or draw the residual: an exact draw from μ that reuses the student's sample.

Running sums are float64: at V = 150,000 a float32 one is off by more than many tokens' probability. They run over bins
of the vocabulary and then inside one bin, which costs one read of the weights instead of a widened copy and its scan.

Shape suffixes: N prefixes, V vocabulary, B bins, W tokens of one bin.
"""

import torch
from torch import Tensor

from trb.blend.laws import DenseLaw
from trb.policies import Target

__all__ = ["accept_or_replace", "inverse_cdf"]

_BIN = 256


def inverse_cdf(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """`[N]` token ids drawn from unnormalised non-negative weights; a weight of zero is never drawn."""
    sums_NB = _bin_sums(weights_NV)
    level_N1, before_N1, bin_N1 = _locate(sums_NB, uniform_N[:, None] * sums_NB.sum(-1, keepdim=True))
    inside_W = torch.arange(_BIN, device=weights_NV.device)
    place_NW = bin_N1 * _BIN + inside_W
    beyond_NW = place_NW >= weights_NV.shape[-1]
    bin_NW = weights_NV.gather(-1, place_NW.masked_fill(beyond_NW, 0)).double().masked_fill_(beyond_NW, 0.0)
    _, _, offset_N1 = _locate(bin_NW, level_N1 - before_N1)
    # Weights that are NaN lead nowhere, and must not lead outside: on a GPU that would end the process. Whatever is
    # drawn then, the loss at that prefix is NaN as well.
    return (bin_N1 * _BIN + offset_N1).squeeze(-1).clamp_max(weights_NV.shape[-1] - 1)


def _bin_sums(weights_NV: Tensor) -> Tensor:
    """Float64 sums of consecutive bins of `_BIN` tokens: the vocabulary is read once, and never summed in order."""
    rows, vocabulary = weights_NV.shape
    whole = vocabulary // _BIN * _BIN
    sums_NB = weights_NV[:, :whole].view(rows, -1, _BIN).sum(-1).double() if whole else weights_NV[:, :0].double()
    if whole == vocabulary:
        return sums_NB
    return torch.cat([sums_NB, weights_NV[:, whole:].sum(-1, keepdim=True).double()], dim=-1)


def _locate(weights_NB: Tensor, level_N1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which entry each level falls into: the level, the sum before that entry, and its index."""
    cumulative_NB = weights_NB.cumsum(-1)
    total_N1 = cumulative_NB[:, -1:]
    # Rounding may lift the level to the total itself; just below it is still inside the last positive weight.
    level_N1 = torch.minimum(level_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    index_N1 = torch.searchsorted(cumulative_NB, level_N1, right=True)
    before_N1 = cumulative_NB.gather(-1, (index_N1 - 1).clamp_min(0)).masked_fill_(index_N1 == 0, 0.0)
    return level_N1, before_N1, index_N1


def accept_or_replace(
    target: Target, log_student_NV: Tensor, draft_N: Tensor, accept_N: Tensor, residual_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep each draft with probability overlap / student, else draw from the normalised `μ - overlap`.

    Args:
        target: the law at the N prefixes.
        log_student_NV: log-probabilities the drafts were drawn from.
        draft_N: drafted token ids.
        accept_N: uniforms deciding acceptance.
        residual_N: uniforms for the residual draws.

    Returns:
        Token ids `[N]` and whether the draft was kept `[N]`.
    """
    if target.overlap is None and isinstance(target.law, DenseLaw) and target.law.log_probs is log_student_NV:
        return draft_N, torch.ones_like(draft_N, dtype=torch.bool)  # drawn from the very law: nothing to decide
    drafts = draft_N[:, None]
    drafted_N = log_student_NV.gather(-1, drafts).squeeze(-1).double().exp()
    if target.overlap is None:
        kept_N = target.law.at(draft_N).double().exp()
    else:
        kept_N = target.overlap.gather(-1, drafts).squeeze(-1).double()
    accepted_N = accept_N * drafted_N < kept_N
    rejected = (~accepted_N).nonzero().squeeze(-1)
    token_N = draft_N.clone()
    if rejected.numel():
        overlap_RV = log_student_NV[rejected].exp() if target.overlap is None else target.overlap[rejected]
        residual_RV = target.law.rows(rejected).exp().sub_(overlap_RV).clamp_min_(0)
        replaced_R = inverse_cdf(residual_RV, residual_N[rejected])
        # Only rounding can reject where nothing is left over; the draft then stands.
        empty_R = residual_RV.sum(-1) == 0
        token_N[rejected] = torch.where(empty_R, draft_N[rejected], replaced_R)
        accepted_N[rejected] = empty_R
    return token_N, accepted_N
