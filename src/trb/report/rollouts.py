"""Chooses the rollouts that go into the page, and cuts them to a bounded size.

A page stays small however long the run was: MAX_ROLLOUTS rows over all runs, MAX_PAGE_TOKENS tokens over all rows, and
alternatives for MAX_ALTERNATIVES of those. Whole steps are kept, the same ones in every run so that rollouts of two
methods meet, spread evenly from the first to the last; what was cut is reported in words. Files are streamed twice
(steps first, then the chosen rows), never held in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trb.records import ROLLOUTS
from trb.report.reading import ReportError, Run, finite, number, records, step_of

MAX_ROLLOUTS = 200
MAX_TOKENS = 400
MAX_PAGE_TOKENS = 80_000
MAX_ALTERNATIVES = 24_000
MAX_TEXT_CHARACTERS = 2000
MAX_TOKEN_CHARACTERS = 60
PER_TOKEN = ("teacher_weight", "kl_student", "kl_teacher", "accepted", "student_log_prob", "teacher_log_prob")
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
        (step_of(row, where), bool(row.get("teacher_log_prob")))
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
            method = (by_policy and _string(record, "policy", where)) or run.name
            row = _row(method, record, where, texts)
            place = (row["method"], row["step"], row["match"])
            # A run that did not record which rollout of its prompt this is wrote them in order.
            row.setdefault("rollout_index", seen[place])
            seen[place] += 1
            rows.append(row)
    return rows


def _row(method: str, record: dict[str, Any], where: str, texts: dict[str, int]) -> dict[str, Any]:
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
        "match": _string(record, "prompt_key", where) or prompt[:MAX_TEXT_CHARACTERS],
        "length": None if tokens is None else len(tokens),
        "tokens": pieces,
    }
    index = number(record, "rollout_index", where)
    row |= {} if index is None else {"rollout_index": int(index)}
    row |= {key: _per_token(record, key, where) for key in PER_TOKEN if record.get(key)}
    return row | ({"alternatives": _alternatives(record, where, texts)} if record.get("alternatives") else {})


def _per_token(record: dict[str, Any], key: str, where: str) -> list[float | None]:
    values = record[key]
    if not isinstance(values, list):
        raise ReportError(f"{where}: {key} is {values!r:.80}, expected a list with one number per token.")
    numbers = (float(v) if isinstance(v, bool) else finite(v, f"{where}: {key}") for v in values[:MAX_TOKENS])
    return [None if v is None else float(f"{v:.4g}") for v in numbers]


def _alternatives(record: dict[str, Any], where: str, texts: dict[str, int]) -> list[list[list[float]] | None]:
    """Per token and law of LAWS, text numbers and probabilities in turn: the same few texts occur again and again."""
    values = record["alternatives"]
    if not isinstance(values, list):
        raise ReportError(f"{where}: alternatives is {values!r:.80}, expected a list with one object per token.")
    found: list[list[list[float]] | None] = []
    for laws in values[:MAX_TOKENS]:
        if not isinstance(laws, Mapping | None):
            raise ReportError(f"{where}: alternatives holds {laws!r:.80}, expected an object or null.")
        found.append(None if laws is None else [_flat(laws.get(law), where, texts) for law in LAWS])
    return found


def _flat(pairs: Any, where: str, texts: dict[str, int]) -> list[float]:
    flat: list[float] = []
    if not isinstance(pairs, list | None):
        raise ReportError(f"{where}: alternatives holds {pairs!r:.80}, expected [text, probability] pairs.")
    for pair in pairs or ():
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ReportError(f"{where}: alternatives holds {pair!r:.80}, expected [text, probability].")
        chance = finite(pair[1], f"{where}: alternatives") or 0.0
        text = _clip(pair[0], MAX_TOKEN_CHARACTERS)
        flat += [texts.setdefault(text, len(texts)), float(f"{chance:.3g}")]
    return flat


def _cut(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Cut the rows' tokens and alternatives to what a page may hold, and say so."""
    most = fitting([len(row["tokens"]) for row in rows], MAX_PAGE_TOKENS)
    if cut := [row for row in rows if (row["length"] or 0) > min(most, MAX_TOKENS)]:
        limit = max(len(row["tokens"][:most]) for row in cut)
        notes.append(f"Rollouts: {len(cut)} completions are longer than {limit} tokens and cut there.")
    for row in rows:
        row |= {key: row[key][:most] for key in ("tokens", *PER_TOKEN, "alternatives") if key in row}
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


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ReportError(f"{where}: {key} is {value!r:.80}, expected text.")
    return value or ""


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
