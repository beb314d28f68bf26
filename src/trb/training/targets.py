"""Targets: what the loss of each optimizer step matches.

Left out: the losses (`trb.losses`), and where the rollouts come from (`trb.training.behaviors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trb.schedule import Constant, FirstSteps, Ramp
from trb.training.halves import Half, Scheduled, Target

if TYPE_CHECKING:
    from trb.losses import Loss

__all__ = ["TARGETS"]


def _reverse_kl(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import ReverseKL

    return Scheduled(lambda _: ReverseKL(args.loss_top_k), Constant(0.0))


def _veto(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import Veto

    return Scheduled(
        lambda strength: Veto(args.loss_top_k, strength), Ramp(args.veto_strength, 0.0, args.veto_steps, length)
    )


def _supervised_first(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import ReverseKL, Supervised

    return Scheduled(
        lambda first: Supervised(args.loss_top_k) if first else ReverseKL(args.loss_top_k),
        FirstSteps(args.sft_warmup_steps),
    )


def _entropy_aware(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import EntropyAware

    return Scheduled(lambda _: EntropyAware(args.loss_top_k, args.eopd_entropy, args.forward_top_k), Constant(0.0))


def _token_importance(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import TokenImportance

    return Scheduled(lambda _: TokenImportance(args.loss_top_k, args.tip_share), Constant(0.0))


def _reliable_region(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import ReliableRegion

    return Scheduled(lambda _: ReliableRegion(args.loss_top_k, args.forward_top_k), Constant(0.0))


def _prefix_weighted(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import PrefixWeighted

    return Scheduled(lambda _: PrefixWeighted(args.loss_top_k, args.iw_gamma), Constant(0.0))


TARGETS: dict[str, Half[Loss]] = {
    "reverse_kl": Half("reverse KL to the teacher", _reverse_kl, ("loss_top_k",)),
    "veto": Half(
        "reverse KL to softmax(log teacher + strength * log student), strength falling to 0",
        _veto,
        ("loss_top_k", "veto_strength", "veto_steps"),
    ),
    "supervised_first": Half(
        "cross-entropy of the completions in the first steps, then reverse KL",
        _supervised_first,
        ("loss_top_k", "sft_warmup_steps"),
    ),
    "eopd": Half(
        "reverse KL, plus forward KL where the teacher's entropy is high",
        _entropy_aware,
        ("loss_top_k", "eopd_entropy", "forward_top_k"),
    ),
    "tip": Half(
        "reverse KL at the share of each completion's tokens that matter most",
        _token_importance,
        ("loss_top_k", "tip_share"),
    ),
    "tropd": Half(
        "reverse KL as far as the teacher would keep the token, forward KL as far as not",
        _reliable_region,
        ("loss_top_k", "forward_top_k"),
    ),
    "iw": Half(
        "reverse KL that counts less the more the completion has gone astray",
        _prefix_weighted,
        ("loss_top_k", "iw_gamma"),
    ),
}
