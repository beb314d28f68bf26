"""Chooses the rollouts that go into the page, and cuts them to a bounded size.

A page stays small however long the run was: MAX_ROLLOUTS rows over all runs, MAX_PAGE_TOKENS tokens over all rows, and
alternatives for MAX_ALTERNATIVES of those. Whole steps are kept, the same ones in every run so that rollouts of two
methods meet, spread evenly from the first to the last; what was cut is reported in words. Files are streamed twice
(steps first, then the chosen rows), never held in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trb.records import MEASURED, ROLLOUTS, Rollout
from trb.report.reading import Run, checked, records
from trb.safety.fields import known

MAX_ROLLOUTS = 200
MAX_TOKENS = 400
MAX_PAGE_TOKENS = 80_000
MAX_ALTERNATIVES = 24_000
MAX_TEXT_CHARACTERS = 2000
MAX_TOKEN_CHARACTERS = 60
COLUMNS = ("teacher_weight", "kl_student", "kl_teacher", "accepted", "student_log_prob", "teacher_log_prob")
# The order of the laws in a row's alternatives on the page.
LAWS = ("student", "teacher", "behavior")


@dataclass(frozen=True)
class Rollouts:
    """Rows ready for JSON, the texts their alternatives point into, and notes on what was left out."""

    rows: tuple[dict[str, Any], ...]
    texts: tuple[str, ...]
    notes: tuple[str, ...]


def collect(groups: Sequence[Sequence[Run]], *, by_policy: bool = False) -> Rollouts:
    """The page's share of every run's rollouts.jsonl; rows say with `group` which entry of `groups` they are of.

    With `by_policy`, rows are named by the policy they say they are of, not by their run: a probe's excerpts.

    Rollouts of two methods belong together where step, `match` (prompt_key, or the prompt's text where a run recorded
    none) and rollout_index agree. Raises ReportError for a malformed line.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    texts: dict[str, int] = {}
    total = 0
    for group, runs in enumerate(groups):
        present = [run for run in runs if run.rollouts.is_file()]
        read = {run.name: _steps_of(run, notes) for run in present}
        steps = {name: [step for step, _ in found] for name, found in read.items()}
        share = MAX_ROLLOUTS // max(1, len(runs))
        # A run scores its rollouts now and then: those steps show everything.
        scored = [[step for step, complete in found if complete] for found in read.values()]
        kept = kept_steps(scored if any(scored) else steps.values(), share)
        for run in present:
            total += len(steps[run.name])
            positions = [index for index, step in enumerate(steps[run.name]) if step in kept]
            rows += [{**row, "group": group} for row in _chosen_rows(run, set(positions[:share]), texts, by_policy)]
    _cut(rows, notes)
    if len(rows) < total:
        which = " of those scored by both models" if any(row.get("teacher_log_prob") for row in rows) else ""
        notes.insert(0, f"Rollouts: {len(rows):,} of {total:,} are shown, whole steps{which} spread over the run.")
    return Rollouts(tuple(rows), tuple(texts), tuple(notes))


def _steps_of(run: Run, notes: list[str]) -> list[tuple[int, bool]]:
    """Each row's step, and whether it was scored by both models."""
    return [
        (checked(MEASURED, row, where).step, bool(row.get("teacher_log_prob")))
        for where, row in records(ROLLOUTS, run.rollouts, notes)
    ]


def kept_steps(steps_of_runs: Iterable[Sequence[int]], limit: int) -> set[int]:
    """As many evenly spread steps as fit with all of their rows: at most `limit` rows in any one run.

    A single step with more rows than fit is kept all the same; its first rows are shown.
    """
    counts: Counter[int] = Counter()
    for steps in steps_of_runs:
        counts |= Counter(steps)
    distinct = sorted(counts)
    for wanted in range(min(len(distinct), limit), 0, -1):
        kept = _spread(distinct, wanted)
        if sum(counts[step] for step in kept) <= limit:
            return kept
    return set(distinct[-1:])


def _spread(values: Sequence[int], count: int) -> set[int]:
    if count == 1:
        return {values[-1]}
    return {values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)}


def _chosen_rows(run: Run, positions: set[int], texts: dict[str, int], by_policy: bool) -> list[dict[str, Any]]:
    seen: Counter[tuple[str, int, str]] = Counter()
    rows = []
    for index, (where, record) in enumerate(records(ROLLOUTS, run.rollouts, [])):
        if index in positions:
            rollout = checked(ROLLOUTS, record, where)
            row = _row((by_policy and rollout.policy) or run.name, rollout, texts)
            place = (row["method"], row["step"], row["match"])
            # A run that did not record which rollout of its prompt this is wrote them in order.
            row.setdefault("rollout_index", seen[place])
            seen[place] += 1
            rows.append(row)
    return rows


def _row(method: str, rollout: Rollout, texts: dict[str, int]) -> dict[str, Any]:
    prompt, tokens = rollout.prompt, rollout.tokens
    pieces = [clip(rollout.completion, MAX_TEXT_CHARACTERS)]  # of a run that kept no tokens
    if tokens is not None:
        pieces = [clip(token, MAX_TOKEN_CHARACTERS) for token in tokens[:MAX_TOKENS]]
    row: dict[str, Any] = {
        "method": method,
        "step": rollout.step,
        "reward": rollout.reward,
        "prompt": prompt[:MAX_TEXT_CHARACTERS],
        "prompt_cut": len(prompt) > MAX_TEXT_CHARACTERS or len(rollout.teacher_prompt) > MAX_TEXT_CHARACTERS,
        "match": rollout.prompt_key or prompt[:MAX_TEXT_CHARACTERS],
        "length": None if tokens is None else len(tokens),
        "tokens": pieces,
    }
    row |= {"teacher_prompt": rollout.teacher_prompt[:MAX_TEXT_CHARACTERS]} if rollout.teacher_prompt else {}
    row |= {} if rollout.rollout_index is None else {"rollout_index": int(rollout.rollout_index)}
    row |= {key: _per_token(values) for key in COLUMNS if (values := getattr(rollout, key))}
    # Per token and law of LAWS: the same few texts occur again and again.
    alternatives = [
        None if laws is None else [_flat(laws.get(law) or (), texts) for law in LAWS]
        for laws in (rollout.alternatives or ())[:MAX_TOKENS]
    ]
    return row | ({"alternatives": alternatives} if alternatives else {})


def _per_token(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.4g}") for value in values[:MAX_TOKENS]]


def _flat(pairs: Iterable[tuple[str, float | None]], texts: dict[str, int]) -> list[float]:
    """Text numbers and probabilities in turn."""
    flat: list[float] = []
    for text, chance in pairs:
        number = texts.setdefault(clip(text, MAX_TOKEN_CHARACTERS), len(texts))
        flat += [number, float(f"{known(chance) or 0.0:.3g}")]
    return flat


def _cut(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Cut the rows' tokens and alternatives to what a page may hold, and say so."""
    most = fitting([len(row["tokens"]) for row in rows], MAX_PAGE_TOKENS)
    if cut := [row for row in rows if (row["length"] or 0) > min(most, MAX_TOKENS)]:
        limit = max(len(row["tokens"][:most]) for row in cut)
        notes.append(f"Rollouts: {len(cut)} completions are longer than {limit} tokens and cut there.")
    for row in rows:
        row |= {key: row[key][:most] for key in ("tokens", *COLUMNS, "alternatives") if key in row}
    with_alternatives = [row for row in rows if "alternatives" in row]
    most = fitting([len(row["alternatives"]) for row in with_alternatives], MAX_ALTERNATIVES)
    if any(len(row["alternatives"]) > most for row in with_alternatives):
        notes.append(f"Rollouts: alternatives are kept for the first {most} tokens of a completion.")
    for row in with_alternatives:
        row["alternatives"] = row["alternatives"][:most]
    if any(row["prompt_cut"] for row in rows):
        notes.append(f"Rollouts: prompts are cut after {MAX_TEXT_CHARACTERS:,} characters.")


def fitting(lengths: Sequence[int], total: int) -> int:
    """The largest length at which to cut all rows so that they hold at most `total` tokens together."""
    left, rows = total, len(lengths)
    for length in sorted(lengths):
        if length * rows > left:
            return left // rows
        left -= length
        rows -= 1
    return max(lengths, default=0)


def clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
