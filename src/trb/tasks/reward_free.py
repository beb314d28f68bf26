"""What is said of a model where nothing can check its answers: how far its own completions are from the teacher.

On the student's own completions of held-out prompts, per token: KL(student || teacher) at each prefix, the student's
entropy and the teacher's log-probability. Intervals are over prompts, or over conversations where several prompts are
turns of one, which are not independent. Left out: sampling, and keeping results (`trb.tasks.evaluation`).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scipy import special

from trb.errors import InputError, named
from trb.measures import PER_TOKEN, REVERSE_KL, token_mean_shares, totals_by_unit
from trb.policies import StudentPolicy
from trb.sampling.scoring import score_completions
from trb.tasks.conversations import conversation_of
from trb.tasks.grading import can_be_scored
from trb.vocab import SharedVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TOTALS", "Judge", "check_units", "is_reward_free", "token_mean", "token_totals"]

TOTALS = (REVERSE_KL.key, *PER_TOKEN)
_COLUMNS = dict(zip(TOTALS, ("kl_teacher", *PER_TOKEN), strict=True))  # of TokenScores under the student's own law


@dataclass(frozen=True)
class Judge:
    """The teacher that completions are read by, where no verifier can check them."""

    teacher: "PreTrainedModel"
    vocabulary: SharedVocabulary
    problems: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
    """By problem set, the rows with the prompts that the teacher reads; None for the student's."""


def is_reward_free(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no completion of any row can be scored. Raises ValueError for an unknown verifier."""
    return not any(can_be_scored(row) for row in rows)


def token_totals(
    model: "PreTrainedModel",
    judge: Judge,
    prompts: Sequence[Sequence[int]],
    taught: Sequence[Sequence[int]] | None,
    completions: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_rows: int | None,
) -> list[dict[str, float]]:
    """The sums over each completion's tokens of what a reward-free report says, in nats.

    `taught` are the prompts as the teacher reads them; None for the same.
    """
    scores = score_completions(
        model,
        judge.teacher,
        prompts,
        completions,
        policy=StudentPolicy(),
        vocabulary=judge.vocabulary,
        teacher_prompts=taught,
        temperature=temperature,
        max_rows=max_rows,
    )
    columns = {name: [math.fsum(row) for row in getattr(scores, column)] for name, column in _COLUMNS.items()}
    return [{name: columns[name][row] for name in TOTALS} for row in range(len(completions))]


def check_units(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises ValueError for problems without answers that are all of one conversation, or the same."""
    if len({conversation_of(row) or json.dumps(row["prompt"]) for row in rows}) < 2:
        raise InputError(
            f"{name} has problems of one conversation alone, or one prompt several times, and without answers a report "
            f"needs two for its interval; raise {named('limit')}, or add another"
        )


def token_mean(
    records: Iterable[Mapping[str, Any]], name: str = REVERSE_KL.key
) -> tuple[float, tuple[float, float], list[float]]:
    """Mean over tokens of one of the sums of an evaluation's records, its 95% interval, and each unit's share of it.

    The interval is Student's, of the linearised ratio over units. Raises ValueError for fewer than two units.
    """
    _, totals, tokens = totals_by_unit(records, name)
    if not all(map(math.isfinite, totals)):
        raise InputError(
            "the teacher gives probability zero to what the model may write: the reverse KL is infinite; choose a "
            "teacher whose head masks no token"
        )
    count = len(totals)
    if count < 2:
        raise InputError(
            f"a report without a verifier needs two prompts, of two conversations, for its interval, got {count}"
        )
    shares = token_mean_shares(totals, tokens)
    value = float(shares.mean())
    half_width = float(special.stdtrit(count - 1, 0.975) * shares.std(ddof=1) / math.sqrt(count))
    low, high = REVERSE_KL.bounds if name == REVERSE_KL.key else (-math.inf, math.inf)
    return value, (max(low, value - half_width), min(high, value + half_width)), shares.tolist()
