"""Whether to blend: numbers of an untrained pair, and what settings with such numbers gained.

The gain is foretold by the cosine of what the student learns on its own rollouts and on the teacher's
(`trb.studies.transfer`), by a straight line through the pairs of a map of settings on which training was run
(docs/experiments.md; benchmarks/map_advice.py, which chose that number among eleven, writes the table beside this
module). Those settings were built for the purpose: a line through them says in which direction to look,
and its error on pairs it has not seen is said with every advice. It is not read beyond the pairs it goes through, nor
believed where it says more than the teacher is better by, or a loss, of which the pairs had none.

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

_WHOLE = 0.999  # mean teacher weight from which on a budget per token binds hardly anywhere
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
        gain: foretold, in points of pass@1, at least 0 and at most what can be gained; NaN where noise is all there is.
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
    error, cosine = 100 * table["line"]["error"], found["transfer"]["policies"]["student"]["cosine"]
    told = cosine is not None and found["transfer"]["agreement"] >= _NOISY
    gain, foretold = _foretold(cosine, table, found, error) if told else (math.nan, [])
    sentences = [*_transfer_sentences(found), *foretold, *_cost_sentences(found), _verdict(gain, error)]
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
            "only: these numbers are mostly noise."
        )
    return sentences


def _shown(cosine: float | None) -> str:
    return "not to be told from noise" if cosine is None else f"{cosine:z.2f}"


def _foretold(
    cosine: float, table: Mapping[str, Any], found: Mapping[str, Any], error: float
) -> tuple[float, list[str]]:
    """The gain that the line foretells within what is possible, in points, and how it comes about in words."""
    line, known = table["line"], [point["cosine"] for point in table["points"]]
    lowest, highest = min(known), max(known)
    at = min(max(cosine, lowest), highest)
    said = 100 * (line["intercept"] + line["slope"] * at)
    sentences = [
        f"A line through the map's {len(known)} pairs, of a setting built to study this, says {_points(said)} points "
        f"of pass@1 for blending at a cosine of {at:z.2f} (off by {error:.1f} on a pair left out)."
    ]
    if at != cosine:
        sentences.append(
            f"Those pairs had cosines from {lowest:z.2f} to {highest:z.2f}, and this is outside: the line is read at "
            f"{at:z.2f}."
        )
    most, of = _possible(found)
    if said > most:
        sentences.append(f"At most {most:.1f} points can be gained here ({of}): {_points(most)} is taken.")
    elif said < 0:
        worst = 100 * max(0.0, -min(point["gain"] for point in table["points"]))
        sentences.append(f"On none of those pairs blending lost more than {worst:.1f} points: 0.0 is taken.")
    return min(max(said, 0.0), most), sentences


def _points(value: float) -> str:
    return decimals(value, 1, "+")


def _possible(found: Mapping[str, Any]) -> tuple[float, str]:
    """By how many points the teacher, or where nobody scored it a perfect student, is better; and of which scores."""
    student, teacher = found["student"]["reward"]["value"], _teacher_score(found)
    of = f"student {100 * student:.1f}%"
    if teacher is None:
        return 100 * (1 - student), of
    return max(0.0, 100 * (teacher - student)), f"{of}, teacher {100 * teacher:.1f}%"


def _teacher_score(found: Mapping[str, Any]) -> float | None:
    score = found["teacher_reward"]
    return None if score is None or math.isnan(score) else float(score)


def _cost_sentences(found: Mapping[str, Any]) -> list[str]:
    student, blend, teacher = found["student"], found["blend"], _teacher_score(found)
    kept = blend["accept_rate"]["value"]
    taught = "" if teacher is None else f" (teacher {100 * teacher:.1f}%)"
    whole = blend["teacher_weight"]["value"] >= _WHOLE
    binds = ": the budget hardly binds, and blended rollouts are as good as the teacher's own" if whole else ""
    return [
        f"At {found['sequence_kl_budget']:g} nats a completion ({found['kl_budget']:.2g} a token) a blended one spends "
        f"{blend['sequence_kl']['value']:.2f} on average{binds}.",
        f"There {100 * kept:.0f}% of the student's drafts are kept, so the teacher reads {_tokens_kept(kept)} at a "
        f"time; trb doctor --plan --acceptance {kept:.2f} predicts what a step costs.",
        f"Blended rollouts there: teacher's log-probability {student['teacher_log_prob']['value']:z.2f} -> "
        f"{blend['teacher_log_prob']['value']:z.2f} nats a token, solved {100 * student['reward']['value']:.1f}% -> "
        f"{100 * blend['reward']['value']:.1f}%{taught}.",
    ]


def _tokens_kept(accept_rate: float) -> str:
    if accept_rate >= 1:
        return "whole blocks"
    tokens = round(1 / (1 - accept_rate))
    return f"about {tokens} token{'s' if tokens > 1 else ''}"


def _verdict(gain: float, error: float) -> str:
    if math.isnan(gain):
        return "Advice: none can be given from so few problems; more with --problems N."
    if gain > error:
        return (
            "Advice: try blending beside plain distillation (method: trb, which sets its budget itself unless one is "
            "given)."
        )
    return (
        "Advice: no gain from blending is foretold that is larger than that error; plain distillation (method: opd) "
        "costs less."
    )
