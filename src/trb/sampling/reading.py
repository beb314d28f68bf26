"""Which ways of reading a model token by token are exact for it: found out once, by comparing.

Samplers read models through caches of their own making or padding, and what a family of models does with positions,
windows, recurrent states or the length of a batch decides whether that changes its law. So before a model is first
sampled, a short ragged batch is read both ways, rows past a window, a row that stops early and one that takes its place
included, and compared with plain forward passes of the model itself, in the precision and on the device of the run. A
way that disagrees is passed over with a warning; a model for which none agrees is refused by name.

Windows are checked on the masks too, those too long to pass through on them alone: the functions that the model asks
for while it is read, evaluated around the window's edge, must be those that it asks for in a plain pass.

The environment variable TRB_CHECK_READING=0 switches the comparison off; each model is then trusted to be what it says.

Shape suffixes: R rows, T positions of a row, V head rows.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import logging

from trb.models.comparison import Trial, trials_of
from trb.models.modeling import (
    UnsupportedModelError,
    check_causal,
    evaluation_mode,
    is_compiled,
    position_limit,
    probe_rows,
    windows,
)
from trb.models.passes import plain_logits
from trb.sampling.attention import attention_through_slots, exact_masks, masks_by, slot_attentions
from trb.sampling.cache import SlotReader, supports_slots
from trb.sampling.readers import GroupedReader, PaddedReader, Reader, WholeReader

__all__ = ["Way", "sampling_mode", "way_of"]

logger = logging.get_logger(__name__)

_TOKENS = 6
# Options of families that count a token's place in the cache, padding included, and do something else from one on that
# no short row reaches: scaled queries (Llama 4), a choice among blocks of keys (MiniMax M3).
_COUNT_PADDING = ("attn_temperature_tuning", "index_topk_blocks")


@dataclass(frozen=True)
class Way:
    """How a model is read: through slots, or by one of the readers of `trb.sampling.readers`."""

    name: str
    attention: str | None = None
    """Of slots: the attention implementation."""
    reader: Callable[..., Reader] | None = None
    because: str = field(default="", compare=False)
    """Why no faster way is exact for the model; empty where it is the first that was tried."""

    @property
    def in_slots(self) -> bool:
        return self.reader is None


PADDED = Way("lockstep", reader=PaddedReader)
GROUPED = Way("lockstep without padding", reader=GroupedReader)
WHOLE = Way("whole passes", reader=WholeReader)

_FOUND: WeakKeyDictionary[nn.Module, dict[Any, Way]] = WeakKeyDictionary()


def way_of(model: PreTrainedModel, *, slots: bool = True) -> Way:
    """The first way of reading that agrees with the model's own plain passes; compared once per model, attention
    implementation, device and precision.

    Args:
        model: a causal LM without wrappers, in `sampling_mode`; autocast as it will be sampled under.
        slots: whether slots may be used.

    Raises:
        UnsupportedModelError: none agrees, or the model is no causal LM.
    """
    found = _FOUND.setdefault(model, {})
    key = slots, model.config._attn_implementation, str(model.device), model.dtype, _autocast(model)
    if key not in found:
        with torch.no_grad():
            found[key] = _first_exact(model, slots)
    return found[key]


def _autocast(model: PreTrainedModel) -> torch.dtype | None:
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _candidates(model: PreTrainedModel, slots: bool) -> list[Way]:
    if any(getattr(model.config.get_text_config(), name, None) for name in _COUNT_PADDING):
        return [GROUPED, WHOLE]
    in_slots = slots and supports_slots(model)
    return [
        *(Way("slots", attention=name) for name in (slot_attentions(model) if in_slots else [])),
        PADDED,
        GROUPED,
        WHOLE,
    ]


def _first_exact(model: PreTrainedModel, slots: bool) -> Way:
    candidates = _candidates(model, slots)
    if os.environ.get("TRB_CHECK_READING") == "0":
        return candidates[0]
    check_causal(model)
    rows, reasons = probe_rows(model, _TOKENS), list[str]()
    with trials_of(model) as trials:
        own = [_own(trial, rows) for trial in trials]
        for way in candidates:
            reason = next(filter(None, (_fault(*tried, way, rows) for tried in zip(trials, own, strict=True))), None)
            if reason is None:
                if slots and not way.in_slots and not reasons:
                    reasons = ["it keeps a state in a way of its own, or counts places in its cache"]
                if reasons:
                    _warn(model, way, reasons)
                return replace(way, because="; ".join(reasons))
            reasons.append(f"{way.name}: {reason}")
    raise UnsupportedModelError(
        model, f"no way of reading it token by token gives its own logits ({'; '.join(reasons)})"
    )


def _warn(model: PreTrainedModel, way: Way, reasons: Sequence[str]) -> None:
    kinds = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or []))
    layers = f" (layers: {', '.join(map(str, kinds))})" if kinds else ""
    how = "through slots with other attention" if way.in_slots else f"by {way.name}"
    logger.warning_once(
        f"{type(model).__name__}{layers} is sampled {how}, which is slower: {'; '.join(reasons)}. Completions are exact"
    )


def _own(trial: Trial, rows: list[list[int]]) -> list[Tensor]:
    with trial.precision():
        return [plain_logits(trial.model, row)[-_TOKENS - 1 : -1] for row in rows]


def _fault(trial: Trial, own: list[Tensor], way: Way, rows: list[list[int]]) -> str | None:
    """What is wrong with a way of reading; None if nothing is."""
    model = trial.model
    try:
        with trial.precision():
            if way.reader is None:
                with attention_through_slots(model, attention=way.attention):
                    ours, fault = _through_slots(model, rows), _mask_fault(model, rows)
                if fault is not None:
                    return fault
            else:
                ours = _by_reader(way.reader(model), rows)
    except UnsupportedModelError:
        raise
    # Whatever a family's code may raise when it is read in a way that it was not written for.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120] or 'no message'}"
    gap = trial.gap(ours, [logits[: len(each)] for each, logits in zip(ours, own, strict=False)])
    return None if gap is None else f"logits are off by {gap:.2g} of their spread"


def _by_reader(reader: Reader, rows: list[list[int]]) -> list[Tensor]:
    """`[T, V]` logits of the last tokens of each row, the middle row leaving early."""
    found: list[list[Tensor]] = [[] for _ in rows]
    device, staying = reader.model.device, list(range(len(rows)))
    logits_RV = reader.read_prompts([row[:-_TOKENS] for row in rows])
    for step in range(_TOKENS):
        if step == _TOKENS // 2:
            kept = torch.tensor([place for place, row in enumerate(staying) if row != 1], device=device)
            reader.keep(kept)
            logits_RV, staying = logits_RV[kept], [row for row in staying if row != 1]
        for place, row in enumerate(staying):
            found[row].append(logits_RV[place])
        if step + 1 < _TOKENS:
            logits_RV = reader.read_tokens(torch.tensor([rows[row][step - _TOKENS] for row in staying], device=device))
    return [torch.stack(each) for each in found]


def _through_slots(model: PreTrainedModel, rows: list[list[int]]) -> list[Tensor]:
    """`[T, V]` logits of the last tokens of each row: blocks of several widths, a token that is taken back, a short row
    that stops, the long one moved to its slot, and a third in the place that is left."""
    reader, found = SlotReader(model, 2, replay=False, depth=4), [list[Tensor]() for _ in rows[:3]]
    start = [len(row) - _TOKENS - 1 for row in rows]

    def read(places: Sequence[tuple[int, int]], width: int, kept: int) -> None:
        """Read `width` tokens of each (row, tokens read before), the last so many of them not the row's own."""
        first = [start[row] + before for row, before in places]
        ids = [
            rows[row][at : at + kept] + rows[row][:1] * (width - kept)
            for (row, _), at in zip(places, first, strict=True)
        ]
        position_RQ = torch.tensor(first)[:, None] + torch.arange(width)
        logits_RQV = reader.read(torch.tensor(ids), position_RQ.to(model.device), max(first) + width)
        for place, (row, _) in enumerate(places):
            found[row].extend(logits_RQV[place, :kept])

    long, short, late = range(3)
    reader.admit([rows[row][: start[row]] for row in (short, long)], [0, 1])
    read([(short, 0), (long, 0)], width=3, kept=2)
    read([(short, 2), (long, 2)], width=2, kept=2)
    reader.move(1, 0, start[long] + 4)
    reader.admit([rows[late][: start[late]]], [1])
    read([(long, 4), (late, 0)], width=1, kept=1)
    read([(long, 5), (late, 1)], width=1, kept=1)
    reader.move(1, 0, start[late] + 2)
    read([(late, 2)], width=4, kept=4)
    return [torch.stack(each) for each in found]


def _mask_fault(model: PreTrainedModel, rows: list[list[int]]) -> str | None:
    """What is wrong with the masks of single tokens at the edges of windows; None if nothing is.

    Of windows that no row reaches nothing else is known, and in half precision a few keys too many among hundreds make
    less difference than rounding.
    """
    limit = position_limit(model) or math.inf
    reachable = [window for window in windows(model) if window < limit]
    far = [window for window in reachable if window >= max(map(len, rows)) - _TOKENS]
    if not reachable:
        return None
    with _recorded_masks(model) as own:
        plain_logits(model, rows[-1])
    reader = SlotReader(model, 1, replay=False)
    reader.admit([[]], [0])
    with _recorded_masks(model) as ours:
        reader.read(torch.tensor([rows[-1][:1]]), torch.zeros(1, 1, dtype=torch.long, device=model.device), 1)
    unseen = f"its masks cannot be seen, and windows of {far} tokens are too long to try" if far else None
    if not own or len(own) != len(ours) or any(map(_looks_up, [*own, *ours])):
        return unseen
    shown = False
    for position in sorted({at for window in reachable for at in (window - 1, window, 2 * window + 1)}):
        keys = torch.arange(position + 1, device=model.device)
        zero = torch.zeros_like(keys[:1])
        for theirs, mine in zip(own, ours, strict=True):
            expected = theirs(zero, zero, zero + position, keys).expand(len(keys))
            if not torch.equal(_seen_from(model, position, mine), expected):
                return f"its mask differs at position {position}"
            shown |= position > max(reachable) and not bool(expected.all())
    # Layer types say which windows are switched off.
    if far and not shown and getattr(model.config.get_text_config(), "layer_types", None) is None:
        return f"no mask shows its windows of {far} tokens, which are too long to try"
    return None


def _looks_up(part: Any) -> bool:
    """Whether a mask function holds numbers of the row it was made for (Gemma 4: where images are): past the row's end
    they would be looked up out of bounds, which on a GPU ends the process."""
    if isinstance(part, Tensor):
        return True
    held = part if isinstance(part, tuple | list) else [cell.cell_contents for cell in _cells(part)]
    return any(map(_looks_up, held))


def _cells(part: Any) -> Sequence[Any]:
    return getattr(part, "__closure__", None) or ()


def _seen_from(model: PreTrainedModel, position: int, mask_function: Callable[..., Tensor]) -> Tensor:
    """`[L]` which keys a token at that position may look at, in the mask that a read through slots is given."""
    made = ALL_MASK_ATTENTION_FUNCTIONS[model.config._attn_implementation](
        mask_function=mask_function,
        batch_size=1,
        q_length=1,
        kv_length=position + 1,
        q_offset=torch.tensor([position], device=model.device),
        dtype=torch.float32,
        device=model.device,
    )
    return made.flatten() == 0


@contextmanager
def _recorded_masks(model: PreTrainedModel) -> Iterator[list[Callable[..., Tensor]]]:
    """The mask functions that the model asks for inside the block."""
    name, seen = model.config._attn_implementation, list[Callable[..., Tensor]]()
    make = ALL_MASK_ATTENTION_FUNCTIONS[name]

    def recording(**arguments: Any) -> Any:
        seen.append(arguments["mask_function"])
        return make(**arguments)

    with masks_by(name, recording):
        yield seen


@contextmanager
def sampling_mode(*models: PreTrainedModel) -> Iterator[None]:
    """`evaluation_mode` while sampling, and masks that leave no NaN; restored after.

    Compiled models are read as they were written: what was compiled for one cache is silently wrong with another.
    """
    with ExitStack() as stack:
        stack.enter_context(exact_masks())
        stack.enter_context(evaluation_mode(*models))
        if any(map(is_compiled, models)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
