"""Whether to blend: numbers of an untrained pair, and what settings with such numbers gained.

The gain is foretold by the cosine of what the student learns on its own rollouts and on the teacher's
(`trb.studies.transfer`), by a straight line through the pairs of a map of settings on which training was run
(docs/experiments.md; benchmarks/map_advice.py, which chose that number among eleven, writes the table beside this
module). Those settings were built for the purpose: a line through them says in which direction to look,
and its error on pairs it has not seen is said with every advice.

Left out: measuring anything after the first step.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trb.measures import decimals
from trb.policies import BehaviorPolicy, StudentPolicy, TeacherPolicy, TrustRegionPolicy
from trb.studies.diagnostics import budget_curve
from trb.studies.subject import Subject
from trb.studies.transfer import gradient_transfer

__all__ = ["TABLE", "Advice", "advise", "outlook"]

TABLE = Path(__file__).with_name("advice.json")

_NOISY = 0.3  # agreement of the teacher's two gradients below which the transfer says little


def outlook(subject: Subject, *, sequence_kl_budget: float, loss_top_k: int = 0) -> dict[str, Any]:
    """What decides whether blending is worth it, of models as they are.

    Args:
        subject: models and problems; with a student whose parameters take gradients.
        sequence_kl_budget: B, nats per completion; spread evenly over the student's mean length it gives the budget per
            token of `blend`.
        loss_top_k: support of the loss.

    Returns:
        `sequence_kl_budget`, `kl_budget`; `student` and `blend`: points of `trb.studies.diagnostics.budget_curve`;
        `teacher_reward`; `transfer`, of `trb.studies.transfer.gradient_transfer`.
    """
    lengths = subject.rollouts(StudentPolicy()).lengths
    kl_budget = sequence_kl_budget * len(lengths) / sum(lengths)
    student, blend = budget_curve(subject, budgets=(0.0, kl_budget))
    rewards = subject.rollouts(TeacherPolicy()).rewards
    policies: dict[str, BehaviorPolicy] = {"student": StudentPolicy(), "blend": TrustRegionPolicy(kl_budget)}
    return {
        "sequence_kl_budget": sequence_kl_budget,
        "kl_budget": kl_budget,
        "student": student,
        "blend": blend,
        "teacher_reward": sum(rewards) / len(rewards),
        "transfer": gradient_transfer(subject, policies=policies, loss_top_k=loss_top_k),
    }


@dataclass(frozen=True)
class Advice:
    """What an outlook comes to.

    Attributes:
        blend: whether a gain is foretold that is larger than the error of foretelling.
        gain: foretold, in points of pass@1; NaN where noise is all there is.
        error: mean absolute error of the line on pairs of the map that it had not seen, in the same points.
        sentences: the same in words, with the numbers behind it.
    """

    blend: bool
    gain: float
    error: float
    sentences: tuple[str, ...]


_NOTHING_TO_LEARN = (
    "On the teacher's rollouts the loss has no gradient: student and teacher agree there.",
    "Advice: there is nothing to distil, blended or not; probe another teacher.",
)


def advise(found: Mapping[str, Any], table: Mapping[str, Any] | None = None) -> Advice:
    """The advice for an `outlook`; `table` is by default the one beside this module."""
    table = json.loads(TABLE.read_text(encoding="utf-8")) if table is None else table
    if found["transfer"]["agreement"] is None:
        return Advice(False, 0.0, 100 * table["line"]["error"], _NOTHING_TO_LEARN)
    line, cosine = table["line"], found["transfer"]["policies"]["student"]["cosine"]
    error = 100 * line["error"]
    gain = math.nan if cosine is None else 100 * (line["intercept"] + line["slope"] * cosine)
    sentences = [
        *_transfer_sentences(found),
        *_foretold(cosine, table, gain, error),
        *_cost_sentences(found),
        _verdict(gain, error),
    ]
    return Advice(gain > error, gain, error, tuple(sentences))


def _transfer_sentences(found: Mapping[str, Any]) -> list[str]:
    student, blend = (found["transfer"]["policies"][name] for name in ("student", "blend"))
    sentences = [
        f"A step on the student's own rollouts lowers the loss on the teacher's prefixes by {student['transfer']:z.2f} "
        f"of what a step on those would (blended: {blend['transfer']:z.2f}), and goes in a direction whose cosine with "
        f"theirs is {_shown(student['cosine'])} (blended: {_shown(blend['cosine'])})."
    ]
    if found["transfer"]["agreement"] < _NOISY:
        sentences.append(
            f"The teacher's gradients from two halves of the problems agree by {found['transfer']['agreement']:z.2f} "
            "only: these numbers are mostly noise, probe more problems."
        )
    return sentences


def _shown(cosine: float | None) -> str:
    return "not to be told from noise" if cosine is None else f"{cosine:z.2f}"


def _foretold(cosine: float | None, table: Mapping[str, Any], gain: float, error: float) -> list[str]:
    if cosine is None:
        return []
    known = [point["cosine"] for point in table["points"]]
    sentences = [
        f"On {len(known)} pairs of a setting built to study this, such a cosine went with {decimals(gain, 1, '+')} "
        f"points of pass@1 for blending (off by {error:.1f} on a pair left out)."
    ]
    if not min(known) <= cosine <= max(known):
        sentences.append(f"Those pairs had cosines from {min(known):z.2f} to {max(known):z.2f}: this is outside.")
    return sentences


def _cost_sentences(found: Mapping[str, Any]) -> list[str]:
    student, blend = found["student"], found["blend"]
    kept = blend["accept_rate"]["value"]
    return [
        f"At {found['sequence_kl_budget']:g} nats a completion ({found['kl_budget']:.2g} a token) "
        f"{100 * kept:.0f}% of the student's drafts are kept, so the teacher reads {_tokens_kept(kept)} at a time.",
        f"Blended rollouts there: teacher's log-probability {student['teacher_log_prob']['value']:z.2f} -> "
        f"{blend['teacher_log_prob']['value']:z.2f} nats a token, solved {100 * student['reward']['value']:.1f}% -> "
        f"{100 * blend['reward']['value']:.1f}% (teacher {100 * found['teacher_reward']:.1f}%).",
    ]


def _tokens_kept(accept_rate: float) -> str:
    return "whole blocks" if accept_rate >= 1 else f"about {1 / (1 - accept_rate):.0f} tokens"


def _verdict(gain: float, error: float) -> str:
    if math.isnan(gain):
        return "Advice: none can be given before more problems are probed."
    if gain > error:
        return (
            "Advice: try blending beside plain distillation (method: trb, which sets its budget itself unless one is "
            "given)."
        )
    return "Advice: no gain from blending is foretold; plain distillation (method: opd) does as well for less."
