"""Block-wise sampling from a behavior policy: the default sampler.

A round drafts a block of tokens with the student, reads the block with the teacher in one pass, and decides position
by position against μ: a draft x is kept with probability overlap(x) / student(x), the first that is not is replaced
by a draw from the rest of μ, and what was drafted after it is dropped (docs/method.md). There is no bonus token:
after the last draft the student has not spoken yet. Each position owns its random numbers, so the tokens are those of
the lockstep sampler, whatever the block size, the batch or the order of the rows.

Rows advance independently in slots of a KV cache; a finished row's slot goes to the next waiting prompt. A policy
that needs no teacher is sampled by the same loop with blocks of one.

Shape suffixes: S slots, R rows in flight, K block, T longest completion, V shared vocabulary.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trb.policies import BehaviorPolicy
from trb.sampling.attention import attention_through_slots
from trb.sampling.blocks import CANDIDATES, BlockChooser, MeasuredCosts, PlannedCosts, synchronize
from trb.sampling.cache import SlotReader
from trb.sampling.draw import Decision, decide, distinct, inverse_cdf
from trb.sampling.packing import packed_products
from trb.sampling.rollout import NonFiniteLogitsError, Rollout, RolloutStats, without_law
from trb.sampling.states import library_layers
from trb.sampling.uniforms import as_int64, uniforms
from trb.vocab import SharedVocabulary

__all__ = ["sample_speculative"]

# Waiting prompts are admitted once this share of the slots is free: one wide prompt pass instead of several narrow.
_ADMIT_SHARE = 0.125
_COLUMNS = tuple(RolloutStats.__dataclass_fields__)
# On an accelerator several columns of a block are decided at once, up to this many elements of a `[N, V]` tensor.
_VERIFY_ELEMENTS = 1 << 27
# A model that keeps states keeps one for every token of a block: no longer blocks are chosen for it, unless asked for.
_STATES = 8
# A block size is kept for this share of its speed, where passes are captured by shape.
_TOLERANCE = 0.05


@dataclass
class _Row:
    """One prompt on its way: the caches hold every token but the newest. `first` tokens of its completion were drawn
    before, and are part of the prompt; at most `limit` are drawn here. `policy` is a place in the sampler's list. The
    teacher, whose prompt may be another, has `ahead` tokens more in its cache, and its newest is `heard`."""

    number: int
    policy: int
    key: int
    index: int
    cached: int
    newest: int
    ahead: int
    heard: int
    first: int
    limit: int
    completion: list[int] = field(default_factory=list)
    stats: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})
    hidden: list[Tensor] = field(default_factory=list)


def sample_speculative(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[BehaviorPolicy],
    *,
    teacher_prompts: Sequence[Sequence[int]],
    vocabulary: SharedVocabulary,
    max_new_tokens: Sequence[int],
    drawn: Sequence[int],
    temperature: float,
    seed: int,
    prompt_keys: Sequence[int],
    rollout_index: Sequence[int],
    row_numbers: Sequence[int],
    max_rows: int | None,
    block_size: int | str,
    keep_teacher_hidden: bool,
    allow_non_finite: bool,
    attentions: Sequence[str | None],
    ends: Sequence[int | None],
    beyond_switch: Sequence[bool],
) -> Rollout:
    """Sample one completion per prompt; arguments as in `trb.sampling.sample`, already validated, but for these.

    Args:
        policies: of each row.
        teacher_prompts: of each row.
        max_new_tokens: of each row.
        drawn: tokens of each row's completion that its prompts already hold.
        row_numbers: what errors call each row.
        attentions: how the student, and the teacher, attend through slots.
        ends: of each model: no row reaches this position (see `SlotReader`).
        beyond_switch: of each model: every row is longer than its `rope_switch`.
    """
    different, which = distinct(policies)
    columns = zip(prompts, teacher_prompts, which, prompt_keys, rollout_index, drawn, max_new_tokens, strict=True)
    rows = [
        _Row(number, policy, key, index, len(own) - 1, own[-1], len(taught) - len(own), taught[-1], first, limit)
        for number, (own, taught, policy, key, index, first, limit) in enumerate(columns)
    ]
    slots = max(1, min(max_rows or len(rows), len(rows)))
    taught = teacher if any(policy.needs_teacher for policy in different) else None
    limits: list[Any] = [{"end": end, "beyond_switch": beyond} for end, beyond in zip(ends, beyond_switch, strict=True)]
    chooser = _chooser(student, taught, vocabulary, block_size)
    # Of every block at least one token is kept.
    depth = min(chooser.largest, max(max_new_tokens))
    sampler = _Sampler(
        SlotReader(student, slots, depth=depth, **limits[0]),
        None
        if taught is None
        else SlotReader(taught, slots, depth=depth, keep_hidden=keep_teacher_hidden, **limits[-1]),
        different,
        vocabulary,
        max(max_new_tokens),
        temperature,
        seed,
        chooser,
        None if allow_non_finite else row_numbers,
    )
    with ExitStack() as stack:
        stack.callback(sampler.close)
        models = [student] if taught is None else [student, taught]
        for model, attention in zip(models, attentions, strict=False):
            stack.enter_context(attention_through_slots(model, attention=attention))
        stack.enter_context(packed_products(*models, tokens=max(max_new_tokens)))
        sampler.run([prompts, teacher_prompts], rows, slots)
    return sampler.rollout(prompts, rows)


def _chooser(
    student: PreTrainedModel, teacher: PreTrainedModel | None, vocabulary: SharedVocabulary, block_size: int | str
) -> BlockChooser:
    if teacher is None:
        return BlockChooser(PlannedCosts(student, student, vocabulary.size), fixed=1)
    planned = PlannedCosts(student, teacher, vocabulary.size)
    tolerance = _TOLERANCE if student.device.type == "cuda" else 0.0
    stateful = any(library_layers(model) is not None for model in (student, teacher))
    largest = _STATES if stateful else CANDIDATES[-1]
    if block_size == "measured":
        return BlockChooser(MeasuredCosts(planned), tolerance=tolerance, largest=largest)
    fixed = None if block_size == "planned" else int(block_size)
    return BlockChooser(planned, fixed=fixed, tolerance=tolerance, largest=largest)


@dataclass(frozen=True)
class _Drafting:
    """The student's law from its logits, and a token drawn from it: read and drawn in one pass."""

    vocabulary: SharedVocabulary
    temperature: float

    def __call__(self, logits_R1V: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
        log_student_RV = self.vocabulary.log_probs(logits_R1V[:, 0], self.temperature)
        return inverse_cdf(log_student_RV.exp(), uniform_R), log_student_RV


@dataclass
class _Sampler:
    student: SlotReader
    teacher: SlotReader | None
    policies: Sequence[BehaviorPolicy]
    vocabulary: SharedVocabulary
    max_new_tokens: int
    temperature: float
    seed: int
    chooser: BlockChooser
    watched: Sequence[int] | None  # what errors call each row; None: prefixes without a law are no errors

    @property
    def _readers(self) -> list[SlotReader]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    @property
    def _device(self) -> torch.device:
        return self.student.model.device

    def run(self, prompts: Sequence[Sequence[Sequence[int]]], rows: list[_Row], slots: int) -> None:
        """Sample every row to its end, from the prompts of each model; row `i` of those in flight sits in slot `i`."""
        waiting, flying = deque(rows), list[_Row]()
        self._uniform_ST3 = torch.empty(slots, self.max_new_tokens, 3, dtype=torch.float64, device=self._device)
        while waiting or flying:
            free = slots - len(flying)
            if waiting and (not flying or free >= max(1, _ADMIT_SHARE * slots)):
                self._admit(prompts, flying, [waiting.popleft() for _ in range(min(free, len(waiting)))])
            self._leave(flying, self._round(flying))

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _admit(self, prompts: Sequence[Sequence[Sequence[int]]], flying: list[_Row], rows: list[_Row]) -> None:
        slots = range(len(flying), len(flying) + len(rows))
        flying.extend(rows)
        self._uniform_ST3[slots.start : slots.stop] = self._own_uniforms(rows)
        for reader, own in zip(self._readers, prompts, strict=False):
            reader.admit([own[row.number][:-1] for row in rows], slots)

    def _leave(self, flying: list[_Row], finished: list[int]) -> None:
        """The last rows in flight take the slots of those that finished, so that those in use stay the first ones."""
        staying = len(flying) - len(finished)
        free = [slot for slot in finished if slot < staying]
        moved = sorted(set(range(staying, len(flying))) - set(finished))
        for source, target in zip(moved, free, strict=True):
            flying[target] = flying[source]
        del flying[staying:]
        if moved:
            self._uniform_ST3[free] = self._uniform_ST3[moved]
            self.student.move(moved, free, max(flying[slot].cached for slot in free))
            if self.teacher is not None:
                self.teacher.move(moved, free, max(flying[slot].cached + flying[slot].ahead for slot in free))

    def _round(self, flying: list[_Row]) -> list[int]:
        """Draft, read and decide one block; the slots of the rows that finished."""
        remaining = max(row.limit - len(row.completion) for row in flying)
        block = self.chooser.choose(len(flying), remaining)
        rows = [
            (row.newest, row.cached, len(row.completion), row.limit, row.policy, row.heard, row.ahead) for row in flying
        ]
        newest_R, cached_R, drawn_R, limit_R, which_R, heard_R, more_R = torch.tensor(rows).to(self._device).unbind(-1)
        ahead_K = torch.arange(block, device=self._device)
        # A row near its limit drafts tokens that will be dropped; any random number does for them.
        place_RK1 = (drawn_R[:, None] + ahead_K).clamp_max(self.max_new_tokens - 1)[..., None]
        uniform_RK3 = self._uniform_ST3[: len(flying)].gather(1, place_RK1.expand(-1, -1, 3))
        position_RK = cached_R[:, None] + ahead_K
        longest = max(row.cached for row in flying) + block
        read_RK, log_student_K = self._draft(newest_R, uniform_RK3[..., 0], position_RK, longest)
        logits_RKV = None
        if self.teacher is not None:
            heard_RK = torch.cat([heard_R[:, None], read_RK[:, 1:-1]], dim=1)
            longest = max(row.cached + row.ahead for row in flying) + block
            with self._timed("teacher", len(flying) * block, self.teacher):
                logits_RKV = self.teacher.read(heard_RK, position_RK + more_R[:, None], longest)
        left_R2 = torch.stack([limit_R - drawn_R, which_R], dim=-1)
        return self._settle(flying, self._verify(left_R2, read_RK[:, 1:], log_student_K, logits_RKV, uniform_RK3))

    def _own_uniforms(self, rows: list[_Row]) -> Tensor:
        """`[rows, max_new_tokens, 3]` random numbers of whole completions: computed once, not in every round."""
        shape = (len(rows), self.max_new_tokens)
        keys_R1 = as_int64([row.key for row in rows], self._device)[:, None]
        index_R1 = torch.tensor([row.index for row in rows], device=self._device)[:, None]
        first_R1 = torch.tensor([row.first for row in rows], device=self._device)[:, None]
        position_RT = first_R1 + torch.arange(self.max_new_tokens, device=self._device)
        words = [word.expand(shape).reshape(-1) for word in (keys_R1, index_R1, position_RT)]
        return uniforms(self.seed, *words).view(*shape, 3)

    def _draft(
        self, newest_R: Tensor, uniform_RK: Tensor, position_RK: Tensor, longest: int
    ) -> tuple[Tensor, list[Tensor]]:
        """`[R, 1 + K]` newest tokens and drafts, and the student's log-probabilities at each drafted position."""
        read, log_student_K = [newest_R], []
        drafting = _Drafting(self.vocabulary, self.temperature)
        for drafted in range(position_RK.shape[1]):
            position_R1 = position_RK[:, drafted : drafted + 1]
            with self._timed("student", len(newest_R), self.student):
                token_R, log_student_RV = self.student.read(
                    read[-1][:, None], position_R1, longest, drafting, uniform_RK[:, drafted]
                )
            read.append(token_R)
            log_student_K.append(log_student_RV)
        return torch.stack(read, dim=1), log_student_K

    def _verify(
        self,
        left_R2: Tensor,
        draft_RK: Tensor,
        log_student_K: list[Tensor],
        logits_RKV: Tensor | None,
        uniform_RK3: Tensor,
    ) -> Tensor:
        """`[2 + columns, R, K]`: the token, or -1 where none was decided, its stats, and `without_law` where watched.

        Columns are decided in turn, so that nothing is solved after a row's first replaced draft or its end; on an
        accelerator many at once, where solving what is then dropped costs less than asking which rows are left.
        `left_R2` holds how many tokens each row may still have, and its policy.
        """
        left_R, which_R = left_R2.unbind(-1)
        rows, block = draft_RK.shape
        seen = torch.full((rows, block, 2 + len(_COLUMNS)), -1.0, dtype=torch.float64, device=self._device)
        live = torch.arange(rows, device=self._device)
        synchronize(self._device)
        start, verified = time.perf_counter(), 0
        for columns in self._column_groups(rows, block):
            log_student_NV = _stacked(log_student_K[columns.start : columns.stop], live)
            row_N, column_N = self._places(live, columns)
            log_teacher_NV = None
            if logits_RKV is not None:
                place = row_N.to(logits_RKV.device), column_N.to(logits_RKV.device)
                log_teacher_NV = self.vocabulary.log_probs(logits_RKV[place].to(self._device), self.temperature)
            drafted_N, uniform_N2 = draft_RK[row_N, column_N], uniform_RK3[row_N, column_N, 1:]
            decision = decide(self.policies, which_R[row_N], log_student_NV, log_teacher_NV, drafted_N, uniform_N2)
            token_N = decision.token
            goes_on_N = decision.accepted & (token_N != self.vocabulary.stop_id) & (column_N + 1 < left_R[row_N])
            going_KR = goes_on_N.view(len(columns), -1)
            if len(columns) > 1:
                going_KR = going_KR.cumprod(0).bool()
                reached_N = torch.cat([torch.ones_like(going_KR[:1]), going_KR[:-1]]).view(-1)
                token_N = torch.where(reached_N, token_N, -1)
            numbers = [token_N.double(), *_numbers(decision)]
            if self.watched is None:
                numbers.append(torch.zeros_like(numbers[0]))
            else:
                numbers.append(without_law(log_student_NV, log_teacher_NV, self.vocabulary.stop_id))
            seen[row_N, column_N] = torch.stack(numbers, dim=-1)
            verified += len(row_N)
            if columns.stop == block:
                break
            live = live[going_KR[-1]]
            if not len(live):
                break
        self._observe("verify", verified, start)
        return seen.movedim(-1, 0)

    def _places(self, live: Tensor, columns: range) -> tuple[Tensor, Tensor]:
        """Rows and columns `[N]` of the live rows of every column, one column after the other."""
        if len(columns) == 1:
            return live, torch.full_like(live, columns.start)
        column_K = torch.arange(columns.start, columns.stop, device=self._device)
        return live.repeat(len(columns)), column_K.repeat_interleave(len(live))

    def _column_groups(self, rows: int, block: int) -> list[range]:
        together = 1 if self._device.type == "cpu" else max(1, _VERIFY_ELEMENTS // (rows * self.vocabulary.size))
        return [range(first, min(first + together, block)) for first in range(0, block, together)]

    def _settle(self, flying: list[_Row], seen: Tensor) -> list[int]:
        """Give each row its decided tokens; the slots of the rows that finished."""
        tokens, *columns, verdicts = seen.tolist()
        verified = continued = 0
        finished, taken = [], []
        for slot, row in enumerate(flying):
            new = [int(token) for token in tokens[slot] if token >= 0]
            self._require_laws(row, verdicts[slot][: len(new)])
            row.completion.extend(new)
            for name, column in zip(_COLUMNS, columns, strict=True):
                row.stats[name].extend(column[slot][: len(new)])
            row.cached += len(new)
            row.newest = row.heard = new[-1]
            verified += len(new)
            ended = new[-1] == self.vocabulary.stop_id or len(row.completion) == row.limit
            if ended:
                finished.append(slot)
            # Every token but the newest was followed by the next draft; the newest is if it was a draft itself.
            continued += len(new) - (ended or not row.stats["accepted"][-1])
            taken.append(len(new))
        if self.teacher is not None and self.teacher.hidden is not None:
            for row, hidden in zip(flying, _firsts(self.teacher.hidden, taken), strict=True):
                row.hidden.append(hidden)
        self.chooser.observe(verified, continued)
        return finished

    def _require_laws(self, row: _Row, verdicts: Sequence[float]) -> None:
        """Raises NonFiniteLogitsError where a new token of a row was drawn without a law."""
        if self.watched is not None and any(verdicts):
            ahead = next(place for place, verdict in enumerate(verdicts) if verdict)
            position = row.first + len(row.completion) + ahead
            raise NonFiniteLogitsError.of(verdicts[ahead], self.watched[row.number], position)

    @contextmanager
    def _timed(self, part: str, tokens: int, reader: SlotReader) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if reader.is_settled:
            self._observe(part, tokens, start)

    def _observe(self, part: str, tokens: int, start: float) -> None:
        if isinstance(self.chooser.costs, MeasuredCosts):
            synchronize(self._device)
            self.chooser.costs.observe(part, tokens, time.perf_counter() - start)

    def rollout(self, prompts: Sequence[Sequence[int]], rows: list[_Row]) -> Rollout:
        stats = RolloutStats(**{name: [row.stats[name] for row in rows] for name in _COLUMNS})
        if self.teacher is None:
            stats.kl_teacher = [[] for _ in rows]
        stop = self.vocabulary.stop_id
        return Rollout(
            prompts=list(map(list, prompts)),
            completions=[row.completion for row in rows],
            stopped=[row.completion[-1] == stop for row in rows],
            stats=stats,
            teacher_calls=0 if self.teacher is None else self.teacher.calls,
            student_calls=self.student.calls,
            teacher_hidden=[torch.cat(row.hidden) for row in rows] if rows and rows[0].hidden else None,
        )


def _numbers(decision: Decision) -> list[Tensor]:
    """The columns of `RolloutStats`, `[N]` float64 each; -1 for one that the policy does not have."""
    missing_N = torch.full_like(decision.accepted, -1.0, dtype=torch.float64)
    columns = [getattr(decision, name) for name in _COLUMNS]
    return [missing_N if column is None else column.double() for column in columns]


def _stacked(log_student_K: list[Tensor], live: Tensor) -> Tensor:
    """`[N, V]` the live rows of each column, one column after the other; nothing is copied that need not be."""
    parts = [column if len(column) == len(live) else column[live] for column in log_student_K]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _firsts(values_RKH: Tensor, count_R: list[int]) -> tuple[Tensor, ...]:
    """The first so many of each row, in storage of their own."""
    row_N = [row for row, count in enumerate(count_R) for _ in range(count)]
    column_N = [column for count in count_R for column in range(count)]
    place = torch.tensor([row_N, column_N], device=values_RKH.device)
    return values_RKH[place[0], place[1]].split(count_R)
