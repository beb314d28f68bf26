"""Draft, accept, or draw the residual: an exact draw from μ that reuses the student's sample.

Running sums are float64: at V = 150,000 a float32 one is off by more than many tokens' probability. They run over bins
of the vocabulary and then inside one bin, which costs one read of the weights instead of a widened copy and its scan.

Shape suffixes: N prefixes, V vocabulary, B bins, W tokens of one bin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trb.blend.laws import DenseLaw
from trb.policies import BehaviorPolicy, Target

__all__ = ["Decision", "accept_or_replace", "decide", "decide_alike", "distinct", "inverse_cdf"]

_BIN = 256


@dataclass(frozen=True)
class Decision:
    """What was drawn at N prefixes, and the numbers of `trb.policies.Target` there.

    Attributes:
        token: `[N]` token ids.
        accepted: `[N]` whether the student's draft was kept.
        teacher_weight, kl_student: `[N]` as in `Target`.
        kl_teacher: `[N]`; None where no teacher took part.
    """

    token: Tensor
    accepted: Tensor
    teacher_weight: Tensor
    kl_student: Tensor
    kl_teacher: Tensor | None


def distinct(policies: Sequence[BehaviorPolicy]) -> tuple[list[BehaviorPolicy], list[int]]:
    """The different policies of some rows, and which of them each row has."""
    different: list[BehaviorPolicy] = []
    which = []
    for policy in policies:
        if policy not in different:
            different.append(policy)
        which.append(different.index(policy))
    return different, which


def decide(
    policies: Sequence[BehaviorPolicy],
    which_N: Tensor,
    log_student_NV: Tensor,
    log_teacher_NV: Tensor | None,
    draft_N: Tensor,
    uniform_N2: Tensor,
) -> Decision:
    """An exact draw at each prefix from the law of its own policy, reusing the student's draft.

    Args:
        policies: different policies.
        which_N: `[N]` the place in `policies` of each prefix's.
        log_student_NV: the student's log-probabilities, which the drafts were drawn from.
        log_teacher_NV: the teacher's; None if no policy needs them.
        draft_N: `[N]` drafted token ids.
        uniform_N2: `[N, 2]` uniforms for acceptance and for the residual draw.
    """
    if len(policies) == 1:
        return decide_alike(policies[0], log_student_NV, log_teacher_NV, draft_N, uniform_N2)
    parts, places = [], []
    for number, policy in enumerate(policies):
        rows = (which_N == number).nonzero().squeeze(-1)
        if rows.numel():
            teacher_RV = None if log_teacher_NV is None else log_teacher_NV[rows]
            parts.append(decide_alike(policy, log_student_NV[rows], teacher_RV, draft_N[rows], uniform_N2[rows]))
            places.append(rows)
    back_N = torch.cat(places).argsort()

    def merged(name: str) -> Tensor | None:
        columns = [getattr(part, name) for part in parts]
        if any(column is None for column in columns):
            return None
        return torch.cat([column.to(columns[0].dtype) for column in columns])[back_N]

    return Decision(**{name: merged(name) for name in Decision.__dataclass_fields__})  # type: ignore[arg-type]


def decide_alike(
    policy: BehaviorPolicy,
    log_student_NV: Tensor,
    log_teacher_NV: Tensor | None,
    draft_N: Tensor,
    uniform_N2: Tensor,
) -> Decision:
    """`decide` where all prefixes have one policy."""
    target = policy.target(log_student_NV, log_teacher_NV)
    token_N, accepted_N = accept_or_replace(target, log_student_NV, draft_N, *uniform_N2.unbind(-1))
    return Decision(token_N, accepted_N, target.teacher_weight, target.kl_student, target.kl_teacher)


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
