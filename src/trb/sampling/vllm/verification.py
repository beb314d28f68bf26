"""Blended requests inside a serving engine: their drafts, the decision on them, and the record of each completion.

The engine (vLLM, see `trb.sampling.vllm.plugin`) runs the student as its draft model and the teacher as its target
model and keeps their caches; what happens to the logits is decided here, by the rule and the random numbers of the
in-process samplers. A request carries its policy, its stop ids and its place in the random stream, so that one batch
may mix budgets, and a completion depends on neither its batch nor on when its drafts were made, dropped or made again.

A draft belongs to the prefix it was made at. What the engine schedules of it may be all, part or something else (an
engine pads and cuts); positions are decided as long as the scheduled tokens are the drafted ones, and one more: the
engine's logits after the last of them are the teacher's there, and the student has spoken there too if it drafted
further.

Left out on purpose: anything of vLLM, so that all of this runs without it.

Shape suffixes: B rows of the engine's batch, G rows of one group (same events, same temperature), N live rows, K
drafted positions, L logits of the step, T longest completion, V head rows.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trb.errors import InputError, OperationError
from trb.policies import POLICIES, BehaviorPolicy
from trb.sampling.draw import decide_alike, inverse_cdf
from trb.sampling.rollout import RolloutStats
from trb.sampling.uniforms import MAX_ROLLOUTS, as_int64, uniforms
from trb.vocab import SharedVocabulary, checked_temperature

__all__ = ["BlendRequest", "BlendRow", "BlendState", "Proposal"]

_COLUMNS = tuple(RolloutStats.__dataclass_fields__)
# Finished records that nobody fetched, kept before the oldest is dropped: a client that went away must not fill memory.
_KEPT_RECORDS = 1 << 16

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class BlendRequest:
    """What one completion is drawn from. It travels as text, which passes through any of an engine's channels.

    Attributes:
        name: files the completion's record; unique among the requests of an engine.
        policy: of a class in `trb.policies.POLICIES`.
        vocabulary: the events both models share.
        temperature: divides both models' logits, before stop ids are folded into one.
        max_new_tokens: the longest completion, stop token included.
        seed, prompt_key, rollout_index: the completion's place in the random stream, as in `trb.sampling.sample`.
    """

    name: str
    policy: BehaviorPolicy
    vocabulary: SharedVocabulary
    temperature: float
    max_new_tokens: int
    seed: int
    prompt_key: int
    rollout_index: int

    def to_text(self) -> str:
        """Raises ValueError for a policy that the engine could not make again from text."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        policy: Any = self.policy
        own = type(policy)
        if POLICIES.get(own.__name__) is not own:
            raise InputError(
                f"{own.__module__}.{own.__qualname__} cannot be sampled inside vLLM, which knows "
                f"{', '.join(POLICIES)}: sample it in this process (engine=None; in training vllm_blended=False), or "
                "add it to trb.policies.POLICIES, in every process of the engine"
            )
        values["policy"] = {"name": own.__name__, **dataclasses.asdict(policy)}
        values["vocabulary"] = dataclasses.asdict(self.vocabulary)
        return json.dumps(values)

    @classmethod
    def from_text(cls, text: str) -> "BlendRequest":
        """Raises ValueError for text that describes no request."""
        try:
            values = json.loads(text)
            policy = dict(values["policy"])
            name = policy.pop("name")
            for item, value in policy.items():
                if isinstance(value, int) and value.bit_length() > 63:  # torch takes none
                    raise InputError(f"a blended request's {item} cannot be {value!r:.100}")
            values["temperature"] = checked_temperature(values["temperature"])
            if not isinstance(name, str) or name not in POLICIES:
                raise InputError(
                    f"not a blended request: its policy is {name!r:.100}, and this engine knows "
                    f"{', '.join(POLICIES)}; write it with BlendRequest.to_text"
                )
            values["policy"] = POLICIES[name](**policy)
            vocabulary = values["vocabulary"]
            values["vocabulary"] = SharedVocabulary(**{**vocabulary, "folded_ids": tuple(vocabulary["folded_ids"])})
            request = cls(**values)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"not a blended request: {error!r:.300} in {text:.200}; write it with BlendRequest.to_text"
            ) from error
        request._check()
        return request

    def _check(self) -> None:
        """Raises ValueError for what a worker would fail on: an engine does not outlive an error there."""
        pair = self.vocabulary
        wholes = {
            "max_new_tokens": (self.max_new_tokens, 1, 1 << 31),
            "seed": (self.seed, None, None),
            "prompt_key": (self.prompt_key, 0, 1 << 64),
            "rollout_index": (self.rollout_index, 0, MAX_ROLLOUTS),
            "vocabulary.size": (pair.size, 1, 1 << 31),
            "teacher_top_k": (getattr(self.policy, "teacher_top_k", 1), 1, 1 << 31),
        }
        for name, (value, low, end) in wholes.items():
            if type(value) is not int or (low is not None and value < low) or (end is not None and value >= end):
                raise InputError(f"a blended request's {name} cannot be {value!r:.100}")
        for stop in (pair.stop_id, *pair.folded_ids):
            if type(stop) is not int or not 0 <= stop < pair.size:
                raise InputError(f"a blended request's stop id cannot be {stop!r:.100} among {pair.size} events")
        if len({*pair.stop_ids}) < len(pair.stop_ids):  # folding an id into itself leaves nothing of it
            raise InputError(f"a blended request's stop ids cannot be {pair.stop_ids!r:.100}, as one is there twice")
        if not isinstance(self.name, str):
            raise InputError(f"a blended request's name cannot be {self.name!r:.100}")

    @property
    def events(self) -> Hashable:
        """Requests of equal value here can be drafted together."""
        return self.vocabulary, self.temperature


@dataclass
class _Draft:
    """Tokens a row was drafted from completion position `start` on, and the student's log-probabilities there.

    `block[k]` is `[G, V]`, of the whole group that was drafted together; `place` is this row's line in it.
    """

    start: int
    tokens: list[int]
    block: list[Tensor]
    place: int


@dataclass
class BlendRow:
    """One request on its way."""

    request: BlendRequest
    uniform_T3: np.ndarray
    draft: _Draft | None = None
    tokens: list[int] = field(default_factory=list)
    stats: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})

    @property
    def finished(self) -> bool:
        if not self.tokens:
            return False
        return self.tokens[-1] == self.request.vocabulary.stop_id or len(self.tokens) == self.request.max_new_tokens

    def uniform(self, position: int, purpose: int) -> float:
        # Drafts beyond the last position are never decided; any random number does for them.
        return float(self.uniform_T3[min(position, len(self.uniform_T3) - 1), purpose])

    def drafted_here(self) -> bool:
        """Whether the student's distribution at the next position is known."""
        return self.draft is not None and self.draft.start == len(self.tokens)


class BlendState:
    """The blended requests of one engine worker.

    Attributes:
        rows: by the engine's own request ids.
        records: of finished requests, by name: tokens and per-token numbers, until they are taken.
        counters: how often things happened: `steps`, `decided` positions, `drafts_made_first` (student distributions
            computed for a completion's first token), `drafts_made_later` (for a row that lost its drafts on the way),
            `drafts_not_scheduled` (rows whose drafts the engine padded, cut or dropped, decided as far as they go).
    """

    def __init__(self) -> None:
        self.rows: dict[str, BlendRow] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.counters: Counter[str] = Counter()

    def admit(self, requests: Mapping[str, BlendRequest]) -> None:
        """Start rows for the requests that have none yet."""
        new = {row_id: request for row_id, request in requests.items() if row_id not in self.rows}
        groups = grouped(new, lambda row_id: (new[row_id].seed, new[row_id].max_new_tokens))
        for (seed, length), row_ids in groups.items():
            chosen = [new[row_id] for row_id in row_ids]
            for row_id, request, uniform_T3 in zip(row_ids, chosen, _uniforms(seed, length, chosen), strict=True):
                self.rows[row_id] = BlendRow(request, uniform_T3)

    def keep_only(self, row_ids: Iterable[str]) -> None:
        """Forget the rows of requests that the engine no longer knows."""
        known = set(row_ids)
        for row_id in [row_id for row_id in self.rows if row_id not in known]:
            del self.rows[row_id]

    def take_records(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The records of finished requests, which are then forgotten.

        Raises:
            KeyError: a request is unknown, not finished, or its record was taken before.
        """
        missing = [name for name in names if name not in self.records]
        if missing:
            raise KeyError(f"no record of the blended request {missing[0]!r}: unknown, unfinished or taken before")
        return {name: self.records.pop(name) for name in names}

    def decide(
        self, rows: Sequence[BlendRow], scheduled: Sequence[Sequence[int]], logits_LV: Tensor
    ) -> list[list[int]]:
        """Decide as many positions of each row as its draft reaches.

        Args:
            rows: with a draft at their next position each.
            scheduled: what the engine ran after each row's last token: its draft, part of it, or something else.
            logits_LV: the teacher's, `1 + len(scheduled[row])` lines for each row in turn.

        Returns:
            The new tokens of each row, at least one.
        """
        first, line = [], 0
        for tokens in scheduled:
            first.append(line)
            line += 1 + len(tokens)
        reach = [_reach(row, tokens) for row, tokens in zip(rows, scheduled, strict=True)]
        before = [len(row.tokens) for row in rows]
        self.counters["steps"] += 1
        self.counters["drafts_not_scheduled"] += sum(
            reach[place] < min(len(_draft(row).tokens), row.request.max_new_tokens - before[place])
            for place, row in enumerate(rows)
        )
        alike = grouped(range(len(rows)), lambda place: (rows[place].request.events, rows[place].request.policy))
        for places in alike.values():
            _decide_alike([(rows[place], first[place], reach[place]) for place in places], logits_LV)
        new = [row.tokens[start:] for row, start in zip(rows, before, strict=True)]
        self.counters["decided"] += sum(map(len, new))
        for row in rows:
            if row.finished:
                self._file(row)
        return new

    def _file(self, row: BlendRow) -> None:
        self.records[row.request.name] = {"tokens": row.tokens, **row.stats}
        if len(self.records) > _KEPT_RECORDS:
            del self.records[next(iter(self.records))]


class Proposal:
    """Drafting from the student for a batch, position after position.

    Args:
        rows: of the engine's batch, in its order.
        starts: completion position that each row's first drafted token will have.
        filed: whether the row's draft counts; not for a prompt of which more is to be read.
    """

    def __init__(self, rows: Sequence[BlendRow], starts: Sequence[int], filed: Sequence[bool]) -> None:
        self._rows, self._starts, self._filed = rows, starts, filed
        groups = grouped(range(len(rows)), lambda place: rows[place].request.events)
        self._groups = list(groups.values())
        self._blocks: list[list[Tensor]] = [[] for _ in self._groups]
        self._tokens: list[Tensor] = []

    def step(self, logits_BV: Tensor) -> Tensor:
        """`[B]` drafted tokens from the student's logits."""
        drafted = len(self._tokens)
        token_B = torch.zeros(len(self._rows), dtype=torch.int64, device=logits_BV.device)
        for places, block in zip(self._groups, self._blocks, strict=True):
            request = self._rows[places[0]].request
            every = len(places) == len(self._rows)
            logits_GV = logits_BV if every else logits_BV[places]
            log_student_GV = request.vocabulary.log_probs(logits_GV, request.temperature)
            drawn = [self._rows[place].uniform(self._starts[place] + drafted, 0) for place in places]
            uniform_G = torch.tensor(drawn, dtype=torch.float64, device=logits_BV.device)
            token_B[places] = inverse_cdf(log_student_GV.exp(), uniform_G)
            block.append(log_student_GV)
        self._tokens.append(token_B)
        return token_B

    def file(self) -> None:
        """Give each row its draft."""
        if not self._tokens:
            return
        tokens_BK = torch.stack(self._tokens, dim=1).tolist()
        for places, block in zip(self._groups, self._blocks, strict=True):
            for line, place in enumerate(places):
                if self._filed[place]:
                    self._rows[place].draft = _Draft(self._starts[place], tokens_BK[place], block, line)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by key, in order of first occurrence."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _uniforms(seed: int, length: int, requests: Sequence[BlendRequest]) -> np.ndarray:
    """`[requests, length, 3]` random numbers of whole completions."""
    cpu = torch.device("cpu")
    keys_R1 = as_int64([request.prompt_key for request in requests], cpu)[:, None]
    index_R1 = torch.tensor([request.rollout_index for request in requests])[:, None]
    shape = (len(requests), length)
    words = [word.expand(shape).reshape(-1) for word in (keys_R1, index_R1, torch.arange(length))]
    return uniforms(seed, *words).view(*shape, 3).numpy()


def _draft(row: BlendRow) -> _Draft:
    if row.draft is None or not row.drafted_here():
        raise OperationError(
            f"the blended request {row.request.name!r} has no draft at position {len(row.tokens)}: nothing may be "
            "sampled there"
        )
    return row.draft


def _reach(row: BlendRow, scheduled: Sequence[int]) -> int:
    """How many positions can be decided: the scheduled tokens that are the drafted ones, and the one after them."""
    draft = _draft(row)
    same = 0
    for drafted, given in zip(draft.tokens, scheduled, strict=False):
        if drafted != given:
            break
        same += 1
    return min(same + 1, len(draft.tokens), row.request.max_new_tokens - len(row.tokens))


def _decide_alike(rows: list[tuple[BlendRow, int, int]], logits_LV: Tensor) -> None:
    """Extend rows of one policy on the same events; each comes with its first line of logits and its reach.

    Position by position, so that nothing is solved after a row's first replaced draft or its end.
    """
    request = rows[0][0].request
    column, live = 0, rows
    while live:
        drafts = [_draft_of(row) for row, _, _ in live]
        log_student_NV = _student_lines(drafts, column)
        log_teacher_NV = None
        if request.policy.needs_teacher:
            line_N = torch.tensor([first + column for _, first, _ in live], device=logits_LV.device)
            logits_NV = logits_LV[line_N].to(log_student_NV.device)
            log_teacher_NV = request.vocabulary.log_probs(logits_NV, request.temperature)
        draft_N = torch.tensor([draft.tokens[column] for draft in drafts], device=log_student_NV.device)
        uniform_N2 = torch.tensor(
            [[row.uniform(len(row.tokens), purpose) for purpose in (1, 2)] for row, _, _ in live],
            dtype=torch.float64,
            device=log_student_NV.device,
        )
        decision = decide_alike(request.policy, log_student_NV, log_teacher_NV, draft_N, uniform_N2)
        numbers = {name: getattr(decision, name) for name in _COLUMNS}
        lists = {name: number.tolist() for name, number in numbers.items() if number is not None}
        following = []
        for place, (token, kept) in enumerate(zip(decision.token.tolist(), lists["accepted"], strict=True)):
            row, _, reach = live[place]
            row.tokens.append(token)
            for name, values in lists.items():
                row.stats[name].append(float(values[place]))
            if kept and not row.finished and column + 1 < reach:
                following.append(live[place])
        column, live = column + 1, following


def _draft_of(row: BlendRow) -> _Draft:
    assert row.draft is not None  # `_reach` has asked before
    return row.draft


def _student_lines(drafts: list[_Draft], column: int) -> Tensor:
    """`[N, V]` log-probabilities at one drafted position, copied only where rows were drafted apart or left out."""
    block = drafts[0].block
    if any(draft.block is not block for draft in drafts):
        return torch.stack([draft.block[column][draft.place] for draft in drafts])
    places = [draft.place for draft in drafts]
    if places == list(range(len(block[column]))):
        return block[column]
    return block[column][places]
