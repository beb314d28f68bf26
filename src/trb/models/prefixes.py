"""Hidden states at completion tokens, with each prompt read once for all of its completions.

A causal model's keys and values at a prompt are the same whatever follows, gradients included: what the completions
send back adds up. G completions of T tokens after a prompt of P cost P + GT tokens a pass instead of G(P + T). Where
that saves too little, or cannot be done exactly, rows are read whole (`trb.models.modeling.completion_hidden_states`).

Left out: models that keep states instead of keys (their caches are written in place), dropout and jitter (rows would
share their draws), gradient checkpointing (which has no cache), compiled layers (which would be compiled for every
length), sharded models (every process must run one equally often), and on accelerators whatever takes more passes than
whole rows do: what a launch costs there has not been weighed.

Shape suffixes: B sequences, L padded length, U prompts of one length, R rows of one group, T tokens of completions, N
completion tokens, H hidden size.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trb.models.comparison import Trial, trials_of
from trb.models.draws import draws
from trb.models.modeling import (
    completion_hidden_states,
    decoder,
    evaluation_mode,
    is_compiled,
    length_groups,
    probe_rows,
    rope_switch,
    row_order,
    without_adapters,
)
from trb.models.passes import accepts, cache_name
from trb.models.rows import padded

__all__ = ["keeps_states", "shared_hidden_states"]

logger = logging.getLogger(__name__)

# Layers whose cache is something else than keys and values.
_STATEFUL_LAYERS = ("linear", "mamba", "conv", "recurrent", "hybrid", "rwkv")

# Read so if at most this share of the work is left, and a pass has so many tokens: short ones wait for the weights.
_WORTHWHILE = 0.95
_TOKENS_PER_PASS = 64
# Products with weights of a token and layer, in multiples of what attention to one other token takes: 12 H^2 to 2 H.
_TOKEN_OVER_PAIR = 6
# Queries times keys of one pass at most: completions after a prompt are read with a mask, of that size.
_MOST_PAIRS = 1 << 27


def shared_hidden_states(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, completion_BL: Tensor) -> Tensor:
    """`trb.models.modeling.completion_hidden_states`, which see, of a model that is whole on this process."""
    inner = without_adapters(model)
    if _may_share(inner):
        rows = _rows(ids_BL, mask_BL, completion_BL)
        groups = list(_groups(rows, math.ceil(len(ids_BL) / length_groups(len(ids_BL)))))
        width = getattr(inner.config.get_text_config(), "hidden_size", 1)
        if rows and _pays(rows, groups, width, ids_BL.device.type) and _agrees(inner):
            found_NH = torch.cat([states for group in groups for states in _read(inner, group, ids_BL.device)])
            emitted = [row.place for group in groups for part in group.parts for row in part]
            rest = sorted(set(range(len(ids_BL))) - set(emitted))
            order_B = torch.tensor(emitted + rest, device=ids_BL.device)
            return found_NH[row_order(order_B, (completion_BL != 0).sum(-1))]
    return completion_hidden_states(model, ids_BL, mask_BL, completion_BL)


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether, as far as its configuration says, some layer keeps something else than keys and values."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or []
    stateful = any(name in str(kind) for kind in layer_types for name in _STATEFUL_LAYERS)
    return stateful or bool(getattr(model, "_is_stateful", False))


@dataclass(frozen=True)
class _Row:
    """A sequence with completion tokens: what of it is read, and which of the states predict its completion."""

    place: int
    prompt: tuple[int, ...]
    rest: list[int]
    predicts: list[bool]


@dataclass(frozen=True)
class _Group:
    """Prompts of one length, by place, and their rows in parts that are read together, those of one prompt in a run."""

    prompts: dict[tuple[int, ...], int]
    parts: list[list[_Row]]


def _rows(ids_BL: Tensor, mask_BL: Tensor, completion_BL: Tensor) -> list[_Row]:
    found = []
    columns = zip(ids_BL.tolist(), mask_BL.tolist(), (completion_BL != 0).tolist(), strict=True)
    for place, (ids, mask, completion) in enumerate(columns):
        if True in completion:
            start, first = mask.index(1), completion.index(True)
            end = len(completion) - completion[::-1].index(True)
            # The last token predicts none of the completion; the prompt's last one predicts its first.
            found.append(_Row(place, tuple(ids[start:first]), ids[first : end - 1], completion[first:end]))
    return found


def _groups(rows: list[_Row], at_once: int) -> Iterator[_Group]:
    by_length: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        by_length[len(row.prompt)].append(row)
    for _, mine in sorted(by_length.items()):
        mine.sort(key=lambda row: len(row.rest))
        parts = [mine[start : start + at_once] for start in range(0, len(mine), at_once)]
        prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(row.prompt for row in mine))}
        yield _Group(prompts, [sorted(part, key=lambda row: prompts[row.prompt]) for part in parts])


def _pays(rows: list[_Row], groups: list[_Group], width: int, device: str) -> bool:
    """Whether it saves enough. Attention in whole rows is causal; after a prompt the masked half is computed too."""
    lengths = [len(row.prompt) + len(row.rest) + 1 for row in rows]
    whole = _work(sum(lengths), sum(length**2 for length in lengths) / 2, width)
    prompts = [len(prompt) for group in groups for prompt in group.prompts]
    rest = [_rectangle(part) for group in groups for part in group.parts]
    tokens = sum(prompts) + sum(count for count, _ in rest)
    pairs = sum(length**2 for length in prompts) / 2 + sum(pairs for _, pairs in rest)
    passes = sum(1 + len(group.parts) for group in groups)
    few = passes * _TOKENS_PER_PASS <= tokens if device == "cpu" else passes <= length_groups(len(rows))
    small = max(pairs for _, pairs in rest) <= _MOST_PAIRS
    return few and small and _work(tokens, pairs, width) <= _WORTHWHILE * whole


def _work(tokens: int, pairs: float, width: int) -> float:
    return _TOKEN_OVER_PAIR * width * tokens + pairs


def _rectangle(part: list[_Row]) -> tuple[int, int]:
    """Tokens of a pass over the completions of rows, and queries times keys in it."""
    longest = max(len(row.rest) for row in part)
    tokens = len(part) * longest
    return tokens, tokens * (len(part[0].prompt) + longest)


def _read(model: PreTrainedModel, group: _Group, device: torch.device) -> Iterator[Tensor]:
    """`[N, H]` states of the rows of each part."""
    base = cast(PreTrainedModel, decoder(model))
    ids_UL = torch.tensor(list(group.prompts), device=device)
    prompts = DynamicCache()
    last_UH = _pass(base, ids_UL, prompts, ids_UL.shape[1])[:, -1]
    for part in group.parts:
        places = [group.prompts[row.prompt] for row in part]
        longest = max(len(row.rest) for row in part)
        # Put together from views, whose gradients add up in one order on every device.
        states_RTH = torch.stack([last_UH[place] for place in places])[:, None]
        if longest:
            rest_RT = torch.zeros(len(part), longest, dtype=torch.long)
            for index, row in enumerate(part):
                rest_RT[index, : len(row.rest)] = torch.tensor(row.rest, dtype=torch.long)
            cache = _for_rows(prompts, places)
            rest_RTH = _pass(base, rest_RT.to(device), cache, ids_UL.shape[1] + longest)
            states_RTH = torch.cat([states_RTH, rest_RTH], dim=1)
        predicts_RT = torch.zeros(states_RTH.shape[:2], dtype=torch.bool)
        for index, row in enumerate(part):
            predicts_RT[index, : len(row.predicts)] = torch.tensor(row.predicts)
        yield states_RTH[predicts_RT.to(device)]


def _pass(base: PreTrainedModel, ids_RL: Tensor, cache: DynamicCache, attended: int) -> Tensor:
    mask = torch.ones(len(ids_RL), attended, dtype=torch.long, device=ids_RL.device)
    options: dict[str, Any] = {"use_cache": True, cast(str, cache_name(base)): cache}
    return cast(Tensor, base(input_ids=ids_RL, attention_mask=mask, **options).last_hidden_state)


def _for_rows(prompts: DynamicCache, places: list[int]) -> DynamicCache:
    """A cache that holds, for each row, the keys and values of its prompt."""
    runs = [(place, len(list(run))) for place, run in groupby(places)]
    cache = DynamicCache()
    for number, layer in enumerate(prompts.layers):
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            keys, values = (
                torch.cat([each[place : place + 1].expand(count, -1, -1, -1) for place, count in runs])
                for each in (layer.keys, layer.values)
            )
            cache.update(keys, values, number)
    return cache


# ---- which models may be read so ----


def _may_share(model: PreTrainedModel) -> bool:
    base = decoder(model)
    if not isinstance(base, PreTrainedModel) or cache_name(base) is None or not accepts(base, "use_cache"):
        return False
    if keeps_states(model) or rope_switch(model) is not None:
        return False
    if is_compiled(model):
        return False
    return not model.training or not (_checkpoints(base) or draws(model))


def _checkpoints(base: PreTrainedModel) -> bool:
    if any(type(module).__name__ == "CheckpointWrapper" for module in base.modules()):
        return True
    # transformers 5.24 renamed it.
    new, old = "is_activation_checkpointing", "is_gradient_checkpointing"
    return bool(getattr(base, new if hasattr(type(base), new) else old))


_AGREES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _agrees(model: PreTrainedModel) -> bool:
    """Whether a few short rows get the states that they have when they are read whole; once per model and process."""
    if model not in _AGREES:
        try:
            with torch.no_grad(), evaluation_mode(model), trials_of(model) as trials:
                _AGREES[model] = all(map(_compare, trials))
        except Exception as error:  # some families cannot go on from a cache that the library makes unasked
            logger.info("reading prompts once per completion: %s: %s", type(error).__name__, error)
            _AGREES[model] = False
    return _AGREES[model]


def _compare(trial: Trial) -> bool:
    after, model = 3, trial.model
    rows = [[*row[:-after], *end] for row in probe_rows(model, after + 1) for end in (row[-after:], row[-after:][::-1])]
    batch = padded([row[:-after] for row in rows], [row[-after:] for row in rows], model.device)
    found: dict[int, Tensor] = {}
    with trial.precision():
        for group in _groups(_rows(*batch), len(rows)):
            for part, states_NH in zip(group.parts, _read(model, group, model.device), strict=True):
                found.update(zip((row.place for row in part), states_NH.split(after), strict=True))
        whole = completion_hidden_states(model, *batch).split(after)
    return trial.gap([found[place] for place in range(len(rows))], list(whole)) is None
