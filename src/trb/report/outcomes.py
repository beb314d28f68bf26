"""Results per problem: which model got which problem right, and the paired differences between two models.

Read from evaluations/ of a run or a comparison, for the scores that the summary shows and no others: results whose mean
is another than the score beside them belong to another evaluation and are left out. A pair of models is compared over
the same problems (`trb.studies.statistics.paired_difference`, with one training run each), which resolves differences
that two separate intervals do not. Texts stay on disk (`trb.report.changes` reads those that it shows).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from trb.measures import (
    PASS_AT_1,
    REVERSE_KL,
    Measure,
    RunScore,
    Score,
    shares_by_unit,
    token_mean_shares,
    totals_by_unit,
)
from trb.records import EVALUATIONS, PROBLEMS, Problem, named_step
from trb.report.reading import REFERENCES, ReportError, Run, Source, checked, own, records
from trb.studies.statistics import holm, paired_difference

Verdict = Literal["above", "below", "unresolved"]

LEVEL = 0.05
# With fewer, not even changes that all go one way are told from chance: a sign test of 5 has p = 2 / 2^5 > 0.05. The
# resamples of so few know too little to say so themselves.
FEWEST_CHANGES = 6
# Numbers drawn for one difference: 10,000 resamples of 2,000 problems, fewer of more.
_DRAWS, _MOST_RESAMPLES, _FEWEST_RESAMPLES = 20_000_000, 10_000, 1_000


@dataclass(frozen=True)
class Suite:
    """A model's answers to one problem set: of problem i, `correct[i]` of `samples[i]` were right. Where nothing says
    so, `shares` are those of each prompt, or conversation, in the mean over tokens, and `means` its own; `problems` are
    these then."""

    name: str
    path: Path
    problems: tuple[str, ...]
    samples: tuple[int, ...]
    correct: tuple[int, ...]
    shares: tuple[float, ...] = ()
    means: tuple[float, ...] = ()

    @property
    def measure(self) -> Measure:
        return REVERSE_KL if self.shares else PASS_AT_1

    @cached_property
    def rates(self) -> list[float]:
        """What its score is the mean of."""
        return [*self.shares] or self.own

    @cached_property
    def own(self) -> list[float]:
        """How the model did on each problem. A share also holds the mean of them all, and moves with the others."""
        return [*self.means] or [right / count for right, count in zip(self.correct, self.samples, strict=True)]


Outcomes: TypeAlias = tuple[Suite, ...]
"""Of one model, problem set by problem set."""


@dataclass(frozen=True)
class Paired:
    """First minus second in their measure on the same problems. On `gained` problems the first did better, on `lost`
    ones worse; `p_holm` is corrected for the comparisons it was made with."""

    first: str
    second: str
    estimate: float
    interval: tuple[float, float]
    p_value: float
    problems: int
    gained: int
    lost: int
    p_holm: float = 1.0
    measure: Measure = PASS_AT_1

    @property
    def verdict(self) -> Verdict:
        low, high = self.interval
        if low <= 0 <= high or self.p_holm > LEVEL or self.gained + self.lost < FEWEST_CHANGES:
            return "unresolved"
        return "above" if self.estimate > 0 else "below"


def read_outcomes(source: Source, notes: list[str]) -> dict[str, Outcomes]:
    """The results per problem behind the scores of the student before training and of every method.

    A model without any, with those of another evaluation, or with a file that is damaged (`notes` name it, and its
    line) is left out: the rest of a page does not depend on them. Raises ReportError for a link to somewhere else.
    """
    # A comparison measures the student once for all.
    starts = [source.directory / EVALUATIONS / "student", *(_steps(run).get(0) for run in source.runs)]
    folders = {run.name: _scored_step(run, source.scores.get(run.name)) for run in source.runs}
    folders["student"] = next((path for path in starts if path and path.is_dir()), None)
    found: dict[str, Outcomes] = {}
    for name, folder in folders.items():
        score = source.scores.get(name)
        if folder is None or score is None or score.value is None:
            continue
        found[name] = _matching(_read_folder(folder, notes), score)
        if not found[name]:
            notes.append(f"{name}: the results per problem are not those of its score, and are left out.")
    return {name: suites for name, suites in found.items() if suites}


@dataclass(frozen=True)
class Comparisons:
    """The differences that a page shows: every method minus the student before training, and the best method minus
    every other. Each of the two is corrected for its own number."""

    to_student: tuple[Paired, ...] = ()
    of_best: tuple[Paired, ...] = ()

    def find(self, first: str, second: str) -> Paired | None:
        pairs = (*self.to_student, *self.of_best)
        return next((one for one in pairs if (one.first, one.second) == (first, second)), None)


def comparisons(source: Source, outcomes: Mapping[str, Outcomes]) -> Comparisons:
    """The comparisons that the results per problem allow."""
    best, *others = by_score(source) or [""]
    return Comparisons(
        to_student=tuple(paired(outcomes, [(name, "student") for name in source.scores if name not in REFERENCES])),
        of_best=tuple(paired(outcomes, [(best, other) for other in others])),
    )


def by_score(source: Source) -> list[str]:
    """The methods with a score, the best first."""
    scored = {
        name: score.measure.sign * score.value
        for name, score in source.scores.items()
        if name not in REFERENCES and score.value is not None
    }
    return sorted(scored, key=lambda name: -scored[name])


def paired(outcomes: Mapping[str, Outcomes], pairs: Iterable[tuple[str, str]]) -> list[Paired]:
    """The differences of (first, second) that can be paired, corrected for their number."""
    found = [one for first, second in pairs if (one := _difference(outcomes, first, second))]
    corrected = holm({str(place): one.p_value for place, one in enumerate(found)})
    return [replace(one, p_holm=p) for one, p in zip(found, corrected.values(), strict=True)]


def same_problems(first: Outcomes, second: Outcomes) -> bool:
    return [(suite.name, suite.problems) for suite in first] == [(suite.name, suite.problems) for suite in second]


def _difference(outcomes: Mapping[str, Outcomes], first: str, second: str) -> Paired | None:
    a, b = outcomes.get(first), outcomes.get(second)
    if a is None or b is None or not same_problems(a, b) or min(len({*suite.problems}) for suite in a) < 2:
        return None
    rates, others = (
        [rate for suite in suites for rate in shares_by_unit(suite.rates, suite.problems)] for suites in (a, b)
    )
    strata = [place for place, suite in enumerate(a) for _ in {*suite.problems}]
    resamples = max(_FEWEST_RESAMPLES, min(_MOST_RESAMPLES, _DRAWS // len(rates)))
    found = paired_difference([rates], [others], strata_P=strata, resamples=resamples)
    measure = a[0].measure
    changes: dict[tuple[str, str], float] = {}
    for mine, other in zip(a, b, strict=True):
        for problem, x, y in zip(mine.problems, mine.own, other.own, strict=True):
            changes[mine.name, problem] = changes.get((mine.name, problem), 0.0) + measure.sign * (x - y)
    return Paired(
        first,
        second,
        found.value,
        found.interval,
        1.0 if found.p_value is None else found.p_value,
        len(rates),
        gained=sum(change > 0 for change in changes.values()),
        lost=sum(change < 0 for change in changes.values()),
        measure=measure,
    )


def _steps(run: Run) -> dict[int | None, Path]:
    """The steps that a run was evaluated at."""
    return {named_step(path): path for path in (run.directory / EVALUATIONS).glob("step-*") if path.is_dir()}


def _scored_step(run: Run, score: Score | None) -> Path | None:
    """Where the results behind a trained student's score are: of its step, or else of the last."""
    steps = _steps(run)
    step = score.steps if isinstance(score, RunScore) else None
    if step is None and score is not None:
        step = score.step
    last = max((step for step in steps if step is not None), default=None)
    return steps.get(last if step is None else int(step))


def _matching(suites: Sequence[Suite], score: Score) -> Outcomes:
    """Those of the suites that a score is of: all of them, or the one of its name; none if the numbers disagree."""
    for chosen in (suites, [suite for suite in suites if suite.name == score.name]):
        means = [math.fsum(suite.rates) / len(suite.rates) for suite in chosen]
        if means and math.isclose(math.fsum(means) / len(means), score.value or 0.0, abs_tol=1e-6):
            return tuple(sorted(chosen, key=lambda suite: suite.name))
    return ()


def _read_folder(folder: Path, notes: list[str]) -> list[Suite]:
    paths = sorted(folder.glob("*.jsonl"))
    for path in (folder.parent, folder, *paths):
        own(path)
    try:
        return [suite for path in paths if (suite := _read_suite(path, notes))]
    except ReportError as error:
        notes.append(str(error))
        return []


def _read_suite(path: Path, notes: list[str]) -> Suite | None:
    """The results of one file; None for an evaluation that has not got to its end."""
    name, size = "", None
    found: list[Problem] = []
    for problem in read_problems(path, notes):
        if problem.settings is not None:
            name, size = str(problem.settings.get("name", "")), problem.settings.get("n_problems")
        else:
            found.append(problem)
    if not found or len(found) != size:
        return None
    hashes = tuple(one.prompt_hash or f"#{one.problem}" for one in found)
    samples = tuple(one.n for one in found)
    if all(one.reverse_kl is None for one in found):
        return Suite(name, path, hashes, samples, tuple(one.correct for one in found))
    known = [one.model_dump() for one in found if one.reverse_kl is not None and one.lengths]
    if len(known) < len(found):
        return None
    units, totals, tokens = totals_by_unit(known, REVERSE_KL.key)
    if not all(tokens):
        return None
    means = tuple(total / count for total, count in zip(totals, tokens, strict=True))
    return Suite(name, path, tuple(units), samples, (), tuple(token_mean_shares(totals, tokens).tolist()), means)


def read_problems(path: Path, notes: list[str]) -> Iterable[Problem]:
    """The lines of a file of results: its settings, then one problem after the other."""
    for where, record in records(PROBLEMS, path, notes):
        problem: Problem = checked(PROBLEMS, record, where)
        if problem.settings is None and not 0 <= problem.correct <= problem.n != 0:
            count = f"{problem.correct} of {problem.n}"
            raise ReportError(f"{where}: {count} answers are right, which cannot be. Repair or remove that line.")
        yield problem
