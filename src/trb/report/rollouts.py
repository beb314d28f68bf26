"""Chooses the rollouts that go into the page, and cuts them to a bounded size.

A page stays small however long the run was: at most MAX_ROLLOUTS rows over all runs and MAX_TOKENS tokens
each. Whole steps are kept, spread evenly from the first to the last, and what was cut is reported in words.
Files are streamed twice (steps first, then the chosen rows), never held in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trb.report.reading import ReportError, Run, finite, number, records, step_of

MAX_ROLLOUTS = 200
MAX_TOKENS = 400
MAX_TEXT_CHARACTERS = 2000
MAX_TOKEN_CHARACTERS = 60
PER_TOKEN = ("teacher_weight", "kl_student", "accepted")


@dataclass(frozen=True)
class Rollouts:
    """Rows ready for JSON, and notes on what was left out."""

    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def collect(runs: Sequence[Run]) -> Rollouts:
    """The page's share of every run's rollouts.jsonl. Raises ReportError for a malformed line."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    total = 0
    share = MAX_ROLLOUTS // max(1, len(runs))
    for run in runs:
        if not run.rollouts.is_file():
            continue
        steps = [step_of(record, where) for where, record in records(run.rollouts, notes)]
        total += len(steps)
        rows += _chosen_rows(run, set(choose(steps, share)))
    if len(rows) < total:
        notes.append(f"Rollouts: {len(rows)} of {total:,} are shown, whole steps spread over the run.")
    cut = sum((row["length"] or 0) > MAX_TOKENS for row in rows)
    if cut:
        notes.append(f"Rollouts: {cut} completions are longer than {MAX_TOKENS} tokens and cut there.")
    if any(row["prompt_cut"] for row in rows):
        notes.append(f"Rollouts: prompts are cut after {MAX_TEXT_CHARACTERS:,} characters.")
    return Rollouts(tuple(rows), tuple(notes))


def choose(steps: Sequence[int], limit: int) -> list[int]:
    """Positions in `steps` to keep, at most `limit`: all rows of as many evenly spread steps as fit."""
    counts = Counter(steps)
    distinct = sorted(counts)
    for wanted in range(min(len(distinct), limit), 0, -1):
        kept = _spread(distinct, wanted)
        if sum(counts[step] for step in kept) <= limit:
            return [index for index, step in enumerate(steps) if step in kept]
    # A single step with more rows than fit: its first ones.
    return [index for index, step in enumerate(steps) if step == distinct[-1]][:limit] if distinct else []


def _spread(values: Sequence[int], count: int) -> set[int]:
    if count == 1:
        return {values[-1]}
    return {values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)}


def _chosen_rows(run: Run, positions: set[int]) -> list[dict[str, Any]]:
    lines = enumerate(records(run.rollouts, []))
    return [_row(run.name, record, where) for index, (where, record) in lines if index in positions]


def _row(method: str, record: dict[str, Any], where: str) -> dict[str, Any]:
    prompt, completion = _string(record, "prompt", where), _string(record, "completion", where)
    tokens = record.get("tokens")
    if not isinstance(tokens, list | None):
        raise ReportError(f"{where}: tokens is {tokens!r:.80}, expected a list of strings.")
    pieces = [_clip(completion, MAX_TEXT_CHARACTERS)]  # of a run that kept no tokens
    if tokens is not None:
        pieces = [_clip(str(token), MAX_TOKEN_CHARACTERS) for token in tokens[:MAX_TOKENS]]
    row: dict[str, Any] = {
        "method": method,
        "step": step_of(record, where),
        "reward": number(record, "reward", where),
        "prompt": prompt[:MAX_TEXT_CHARACTERS],
        "prompt_cut": len(prompt) > MAX_TEXT_CHARACTERS,
        "length": None if tokens is None else len(tokens),
        "tokens": pieces,
    }
    return row | {key: _per_token(record, key, where) for key in PER_TOKEN if record.get(key)}


def _per_token(record: dict[str, Any], key: str, where: str) -> list[float | None]:
    values = record[key]
    if not isinstance(values, list):
        raise ReportError(f"{where}: {key} is {values!r:.80}, expected a list with one number per token.")
    numbers = (float(v) if isinstance(v, bool) else finite(v, f"{where}: {key}") for v in values[:MAX_TOKENS])
    return [None if v is None else float(f"{v:.4g}") for v in numbers]


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ReportError(f"{where}: {key} is {value!r:.80}, expected text.")
    return value or ""


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
