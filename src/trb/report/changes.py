"""The problems that training changed: which the student got right before and wrong after, and the reverse.

Two tables, each of the `MAX_PROBLEMS` largest changes, and the completions behind them as rows of the rollout viewer.
With several samples per problem, "right" is the share of right answers. Texts are read for the problems that are shown
and no others, and `MAX_CHARACTERS` of them go into the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from trb.measures import PASS_AT_1
from trb.records import Problem
from trb.report.outcomes import Outcomes, read_problems, same_problems
from trb.report.rollouts import MAX_TEXT_CHARACTERS, clip
from trb.report.style import label, visible

MAX_PROBLEMS = 100
MAX_CHARACTERS = 400_000
MAX_EXCERPT = 140
STUDENT = "student"

Place = tuple[int, int]
"""A problem set, and a problem in it."""


@dataclass(frozen=True)
class Cell:
    """How many answers of a model were right, and whether that is more or fewer than before training; `linked` ones
    have their completion in the viewer, as that of model `number`: an attribute cannot hold every name."""

    number: int
    text: str
    change: str
    linked: bool = False


@dataclass(frozen=True)
class Row:
    """One problem, with a cell for the student before training and for each method; `match` is what its completions
    are called in the viewer."""

    match: str
    name: str
    excerpt: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Problems that changed alike, `total` of them in all; `columns` are the methods."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    total: int


@dataclass(frozen=True)
class Changes:
    """The tables that have rows, the viewer's rows, and what was left out in words."""

    tables: tuple[Table, ...] = ()
    rollouts: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def collect(outcomes: Mapping[str, Outcomes], group: int) -> Changes:
    """The changes from the student before training to every method that answered the same problems; the viewer's rows
    are of its group `group`. Raises ReportError for a malformed file."""
    before = outcomes.get(STUDENT, ())
    after = {name: one for name, one in outcomes.items() if name != STUDENT and same_problems(one, before)}
    # Without a verifier nothing is right or wrong.
    if not before or not after or any(suite.measure is not PASS_AT_1 for suite in before):
        return Changes()
    fell, rose = _largest(before, after, -1), _largest(before, after, 1)
    shown = [fell[:MAX_PROBLEMS], rose[:MAX_PROBLEMS]]
    # In turn, so that neither table takes all the room.
    order = list(dict.fromkeys(place for pair in zip_longest(*shown) for place in pair if place is not None))
    everyone = {STUDENT: before, **after}
    texts = {name: _texts(suites, set(order)) for name, suites in everyone.items()}
    rows = _viewer_rows(order, everyone, texts, group)
    linked = {(row["match"], row["model"]) for row in rows}
    single = all(count == 1 for suites in everyone.values() for suite in suites for count in suite.samples)
    titles = (
        ("Right before, wrong after", "Wrong before, right after")
        if single
        else ("Right less often after than before", "Right more often after than before")
    )
    columns = tuple(label(name) for name in after)
    tables = [
        Table(title, columns, tuple(_row(place, everyone, texts, linked) for place in places), len(found))
        for title, places, found in zip(titles, shown, (fell, rose), strict=True)
    ]
    kept, seen = len({_match(place) for name in texts for place in texts[name]}), len({match for match, _ in linked})
    notes = [f"Problems: the completions of {seen:,} of {kept:,} are in the viewer."] if seen < kept else []
    return Changes(tuple(table for table in tables if table.rows), tuple(rows), tuple(notes))


def _largest(before: Outcomes, after: Mapping[str, Outcomes], sign: int) -> list[Place]:
    """The problems where some method fell (-1) or rose (1): first where all of them together did most."""
    totals: dict[Place, float] = {}
    for suites in after.values():
        for number, (start, end) in enumerate(zip(before, suites, strict=True)):
            for problem, (old, new) in enumerate(zip(start.rates, end.rates, strict=True)):
                if sign * (new - old) > 0:
                    totals[number, problem] = totals.get((number, problem), 0.0) + abs(new - old)
    return sorted(totals, key=lambda place: (-totals[place], place))


def _texts(suites: Outcomes, wanted: set[Place]) -> dict[Place, Problem]:
    """What was kept of the wanted problems' completions."""
    found: dict[Place, Problem] = {}
    for number, suite in enumerate(suites):
        if any(place[0] == number for place in wanted):
            problems = (one for one in read_problems(suite.path, []) if one.settings is None)
            found |= {
                (number, place): problem
                for place, problem in enumerate(problems)
                if (number, place) in wanted and problem.completions
            }
    return found


def _viewer_rows(
    order: Sequence[Place],
    everyone: Mapping[str, Outcomes],
    texts: Mapping[str, Mapping[Place, Problem]],
    group: int,
) -> list[dict[str, Any]]:
    """The first completion of every model to each problem, as long as there is room."""
    rows: list[dict[str, Any]] = []
    room = MAX_CHARACTERS
    for place in order:
        found = [
            _viewer_row(name, place, suites, texts[name][place]) | {"model": number, "group": group}
            for number, (name, suites) in enumerate(everyone.items())
            if place in texts[name]
        ]
        room -= sum(len(row["prompt"]) + len(row["tokens"][0]) for row in found)
        if room < 0:
            break
        rows += found
    return rows


def _viewer_row(name: str, place: Place, suites: Outcomes, problem: Problem) -> dict[str, Any]:
    completion = (problem.completions or [""])[0]
    return {
        "method": name,
        "step": 0,
        "match": _match(place),
        "rollout_index": 0,
        "name": _name(place, suites),
        "moment": "before training" if name == STUDENT else "after training",
        "prompt": problem.question[:MAX_TEXT_CHARACTERS],
        "prompt_cut": len(problem.question) > MAX_TEXT_CHARACTERS,
        "tokens": [clip(completion, MAX_TEXT_CHARACTERS)],
        "cut": len(completion) > MAX_TEXT_CHARACTERS,
        "length": problem.lengths[0] if problem.lengths else None,
        "reward": float(problem.right[0]) if problem.right else None,
    }


def _row(
    place: Place,
    everyone: Mapping[str, Outcomes],
    texts: Mapping[str, Mapping[Place, Problem]],
    linked: set[tuple[str, int]],
) -> Row:
    question = next((found[place].question for found in texts.values() if place in found), "")
    cells = tuple(
        _cell(number, place, suites, everyone[STUDENT], linked) for number, suites in enumerate(everyone.values())
    )
    excerpt = visible(" ".join(question[: 2 * MAX_EXCERPT].split()))
    return Row(_match(place), _name(place, everyone[STUDENT]), clip(excerpt, MAX_EXCERPT), cells)


def _cell(number: int, place: Place, suites: Outcomes, before: Outcomes, linked: set[tuple[str, int]]) -> Cell:
    suite, problem = place
    change = suites[suite].rates[problem] - before[suite].rates[problem]
    right, count = suites[suite].correct[problem], suites[suite].samples[problem]
    text = ("right" if right else "wrong") if count == 1 else f"{right:,} of {count:,}"
    kind = "fell" if change < 0 else "rose" if change > 0 else "same"
    return Cell(number, text, kind, (_match(place), number) in linked)


def _name(place: Place, suites: Outcomes) -> str:
    """ "problem 12", or of which set where there are several."""
    number, problem = place
    return f"problem {problem + 1}" + (f" of {suites[number].name}" if len(suites) > 1 else "")


def _match(place: Place) -> str:
    return "{}.{}".format(*place)
