"""What an evaluation measures: pass@1 where answers can be checked, else the reverse KL to the teacher.

Whoever compares, ranks, draws or words scores asks the measure which way is better, in which unit, and where it ends.
A score has the key of its measure and no other's. Its interval is over distinct problems. Left out: measuring
(`trb.tasks.evaluation`), and the files (`trb.records`).

Shape suffixes: U units (prompts or conversations).
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from trb.safety.fields import Count, Interval, Known, Number, Options, Text
from trb.safety.typed_files import Schema

__all__ = [
    "MEASURES",
    "OUTCOMES",
    "PASS_AT_1",
    "PER_TOKEN",
    "REVERSE_KL",
    "Measure",
    "Outcomes",
    "RunScore",
    "Score",
    "Scored",
    "Scores",
    "WholeScore",
    "decimals",
    "measure_of",
    "pass_at_1_interval",
    "shares_by_unit",
    "token_mean_shares",
    "totals_by_unit",
]

OUTCOMES = ("correct", "same_as", "values")
"""What a score has beside it where it is kept by problem (`Outcomes`)."""

_Z_95 = 1.959963984540054  # two-sided 95% quantile of the standard normal

PER_TOKEN = ("student_entropy", "teacher_log_prob")
"""What a score without a verifier says beside its measure: means over tokens, in nats."""


@dataclass(frozen=True)
class Measure:
    """A quantity that models are scored by."""

    key: str
    """Of a score."""
    title: str
    heading: str
    """Of a column of plain text."""
    phrase: str
    """What follows a number in a sentence."""
    differences: str
    """What differences are "in"."""
    unit: str
    """What follows a difference in a sentence."""
    higher_is_better: bool
    format: Literal["percent", "number"]
    difference_format: Literal["points", "change"]
    bounds: tuple[float, float]
    caption: str
    gained: str
    """Of a column: on how many problems one model did better than another."""
    lost: str

    @property
    def sign(self) -> int:
        """1, or -1 where less is better."""
        return 1 if self.higher_is_better else -1

    @property
    def scale(self) -> int:
        """What numbers are shown times: a share in percent."""
        return 100 if self.format == "percent" else 1

    @property
    def in_units(self) -> str:
        """What axes and columns of scores count."""
        return f"{self.title}, percent" if self.format == "percent" else f"{self.title}, nats per token"

    @property
    def superlative(self) -> str:
        return "highest" if self.higher_is_better else "lowest"

    def best(self, values: Iterable[float | None]) -> float | None:
        """The best of the values that are known."""
        return max((value for value in values if value is not None), key=lambda v: self.sign * v, default=None)


PASS_AT_1 = Measure(
    key="pass_at_1",
    title="pass@1",
    heading="pass@1 %",
    phrase="pass@1",
    differences="points of pass@1",
    unit="points",
    higher_is_better=True,
    format="percent",
    difference_format="points",
    bounds=(0.0, 1.0),
    caption="Share of samples that are right",
    gained="More right",
    lost="Fewer right",
)
REVERSE_KL = Measure(
    key="reverse_kl",
    title="held-out reverse KL",
    heading="KL",
    phrase="nats of held-out reverse KL per token",
    differences="nats of held-out reverse KL per token, where less is better",
    unit="nats per token",
    higher_is_better=False,
    format="number",
    difference_format="change",
    bounds=(0.0, float("inf")),
    caption="KL(student ‖ teacher) on the student's own completions of held-out prompts, nats per token",
    gained="Closer",
    lost="Farther",
)
MEASURES = {measure.key: measure for measure in (PASS_AT_1, REVERSE_KL)}


def decimals(value: float, digits: int, sign: str = "") -> str:
    """A number with so many decimals, for `sign` "+" with a plus; what rounds to zero has no sign."""
    text = f"{value:{sign}z,.{digits}f}"
    return text if text.strip("+0.") else text.lstrip("+")


def measure_of(score: Mapping[str, Any]) -> Measure:
    """What a score measures."""
    return REVERSE_KL if REVERSE_KL.key in score else PASS_AT_1


def totals_by_unit(records: Iterable[Mapping[str, Any]], name: str) -> tuple[list[str], list[float], list[int]]:
    """Of the prompts of an evaluation, each once, or the conversations whose turns they are: names, sums of a number
    over the tokens of all completions, and how many tokens there are."""
    totals: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for record in records:
        unit = record.get("conversation") or record.get("prompt_hash") or f"#{record['problem']}"
        totals[unit] = totals.get(unit, 0.0) + record[name]
        tokens[unit] = tokens.get(unit, 0) + sum(record["lengths"])
    return [*totals], [*totals.values()], [*tokens.values()]


def token_mean_shares(totals_U: ArrayLike, tokens_U: ArrayLike) -> NDArray[np.float64]:
    """`[U]` values whose mean is the mean over tokens: the ratio of two means, linearised (Cochran, 1977, ch. 6)."""
    totals, tokens = np.asarray(totals_U, dtype=np.float64), np.asarray(tokens_U, dtype=np.float64)
    value = totals.sum() / tokens.sum()
    return value + (totals - value * tokens) / tokens.mean()


def shares_by_unit(values_P: ArrayLike, units_P: Sequence[Hashable]) -> NDArray[np.float64]:
    """`[U]` values with the mean of `values_P`, one for each distinct problem: copies of one are not independent.

    Where every problem is another, they are the values as they stand.
    """
    values, places = np.asarray(values_P, dtype=np.float64), {unit: u for u, unit in enumerate(dict.fromkeys(units_P))}
    if len(places) == len(values):
        return values
    units = [places[unit] for unit in units_P]
    return token_mean_shares(np.bincount(units, values), np.bincount(units))


def pass_at_1_interval(
    correct: Sequence[float], n: int, problems: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """95% interval of pass@1 from the number of correct completions, of `n`, of each problem.

    The n completions of one problem are not independent trials, so the unit is the problem, and where some are there
    several times (`problems` says which each is) the distinct one. With
    p = mean(c_i / n) over N problems and SE^2 = sum((c_i / n - p)^2) / (N (N - 1)), the effective sample size
    n* = p (1 - p) / SE^2 is what makes a binomial as uncertain as p is; the interval is Wilson's (1927) for
    n* trials: (p + z^2/2n* -+ z sqrt(p (1 - p) / n* + z^2 / 4n*^2)) / (1 + z^2/n*). Where all problems have
    the same rate SE says nothing and n* = N; and n* never exceeds the N n completions. The method is that of
    clustered surveys (Korn and Graubard, 1998; Dean and Pagano, 2015).

    It speaks about problems like these, not about these problems only. Its coverage is close to 95% from about
    30 problems on, and falls short (to about 90%) with 30 problems of which very few are ever solved.
    """
    if problems is not None:
        correct = shares_by_unit(correct, problems).tolist()
    size, p = len(correct), math.fsum(correct) / (len(correct) * n)
    squares = math.fsum((count / n - p) ** 2 for count in correct)
    effective = float(size)
    if squares > 0:
        effective = min(p * (1 - p) * size * (size - 1) / squares, float(size * n))
    shrink = 1 + _Z_95**2 / effective
    centre = (p + _Z_95**2 / (2 * effective)) / shrink
    half_width = _Z_95 * math.sqrt(p * (1 - p) / effective + (_Z_95 / (2 * effective)) ** 2) / shrink
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


# ---- scores as files have them ----


class Scored(Schema):
    """A mean of one measure, and its interval."""

    pass_at_1: Number = None
    reverse_kl: Number = None
    interval: Interval = None

    @property
    def measure(self) -> Measure:
        return REVERSE_KL if self.reverse_kl is not None else PASS_AT_1

    @property
    def value(self) -> float | None:
        found: float | None = getattr(self, self.measure.key)
        return found


def _or_names(value: Any, read: Callable[[Any], Any]) -> Any:
    return value if isinstance(value, list) else read(value)


class Score(Scored):
    """A model's score on a problem set, or the mean over several (under `suites`)."""

    name: Text = ""
    n_problems: Number = None
    n_samples: Number = None
    mean_length: Number = None
    stop_rate: Number = None
    student_entropy: Number = None
    teacher_log_prob: Number = None
    step: Count | None = None
    suites: Annotated[dict[str, "Score"] | None, WrapValidator(_or_names)] = None


class WholeScore(Score):
    """A score that others can be computed from: every number is there, unless nothing was measured."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not self.model_fields_set & MEASURES.keys():
            raise PydanticCustomError("kind", "expected {keys}", {"keys": " or ".join(MEASURES)})
        numbers = [self.n_problems, self.n_samples, self.mean_length, self.stop_rate, *(self.interval or [None])]
        if self.measure is REVERSE_KL:
            numbers += [getattr(self, name) for name in PER_TOKEN]
        missing = self.interval is not None if self.value is None else None in numbers
        if missing:
            raise PydanticCustomError("kind", "expected a score with all of its numbers")
        return self


Scores = list[WholeScore]
"""Of problem sets; of several teachers none, where no set says whose its rows are."""


class RunScore(Score):
    """The score of a trained student."""

    steps: Number = None
    train_seconds: Number = None
    held_out: Options = None


class Outcomes(WholeScore):
    """A score, and what it is the mean of: how many answers to each problem were right, or a number for each prompt.
    Where `correct` has problems several times, `same_as` has the place of the first copy of each."""

    correct: list[Count] = Field(default_factory=list)
    same_as: list[Count] = Field(default_factory=list)
    values: list[Known] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_outcomes(self) -> Self:
        name = "values" if self.measure is REVERSE_KL else "correct"
        if name not in self.model_fields_set:
            raise PydanticCustomError("kind", "expected {name} beside the score", {"name": name})
        if self.same_as and len(self.same_as) != len(self.correct):
            raise PydanticCustomError("kind", "expected the first copy of each problem, or of none")
        return self
