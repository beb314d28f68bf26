"""One model reading many rows that advance independently: a KV cache of slots, written at each row's own position.

A slot holds the keys and values of one row. Every read names the position of each of its tokens, so that rows of
different lengths share a batch without padding, taking tokens back is only a smaller position, and a finished row's
slot goes to the next prompt. Buffers are written in place and grow by half, never by concatenation.

Works with any Hugging Face causal LM built on the standard cache and attention interfaces (full and sliding-window
attention). Recurrent layers keep a state that cannot be taken back: `supports_slots` tells them apart. Grouped-query
models attend through `grouped_attention`, because the library's own path copies every key and value once per query
head when a mask is given.

Shape suffixes: S slots, R rows in use, Q tokens read at once, L cached positions, H key heads, G query heads per key
head, D head size, U unique prompts, V head rows.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["SlotReader", "attention_through_slots", "supports_slots"]

_ATTENTION = "trb_grouped_sdpa"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Buffers start with room for the prompts and this many tokens, and grow by half when full.
_FIRST_ROOM = 64


def supports_slots(model: PreTrainedModel) -> bool:
    """Whether every layer of the model keeps only keys and values, each a function of its own position's prefix."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not getattr(model, "_is_stateful", False) and layer_types <= _LAYER_TYPES


class SlotReader:
    """Feeds tokens to one model at explicit positions and returns its logits there.

    Attributes:
        calls: forward passes so far, prompts included.
        hidden: `[R, Q, hidden size]` input of the output head in the last `read`, when `keep_hidden`.
    """

    def __init__(self, model: PreTrainedModel, slots: int, *, keep_hidden: bool = False) -> None:
        self.model = model
        self.calls = 0
        self.hidden: Tensor | None = None
        self._slots = slots
        self._keep_hidden = keep_hidden
        self._parameters = inspect.signature(model.forward).parameters
        self._plan = _Plan()
        self._layers: list[_SlotLayer] = []
        config = model.config.get_text_config()
        self._windows = _windows(config)
        self._limit = getattr(config, "max_position_embeddings", None)

    def admit(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Read prompts into slots; equal prompts are read once. An empty prompt leaves its slot empty."""
        owners: dict[tuple[int, ...], list[int]] = {}
        for prompt, slot in zip(prompts, slots, strict=True):
            if prompt:
                owners.setdefault(tuple(prompt), []).append(slot)
        if not owners:
            return
        device, longest = self.model.device, max(map(len, owners))
        # On the right of a causal model padding changes nothing before it; what it writes is overwritten in time.
        ids_UL = torch.zeros(len(owners), longest, dtype=torch.long)
        for row, prompt in enumerate(owners):
            ids_UL[row, : len(prompt)] = torch.tensor(prompt)
        cache = DynamicCache()
        self.model.base_model(
            input_ids=ids_UL.to(device),
            attention_mask=torch.ones_like(ids_UL).to(device),
            past_key_values=cache,
            use_cache=True,
        )
        self.calls += 1
        source = torch.tensor([row for row, owned in enumerate(owners.values()) for _ in owned], device=device)
        target = torch.tensor([slot for owned in owners.values() for slot in owned], device=device)
        self._reserve(longest)
        for ours, theirs in zip(self._layers_of(len(cache.layers)), cache.layers, strict=True):
            assert isinstance(theirs, CacheLayerMixin) and theirs.keys is not None and theirs.values is not None
            ours.put(theirs.keys[source], theirs.values[source], target)

    def read(self, ids_RQ: Tensor, position_RQ: Tensor, longest: int) -> Tensor:
        """`[R, Q, V]` logits after each of the tokens, read into the first R slots.

        Args:
            ids_RQ: token ids.
            position_RQ: their positions, consecutive in each row; earlier positions must have been read.
            longest: one more than the largest position (known to the caller without a device synchronisation).
        """
        self._reserve(longest)
        rows, device = len(ids_RQ), self.model.device
        ids_RQ, position_RQ = ids_RQ.to(device), position_RQ.to(device)
        self._plan.aim(position_RQ, longest)
        inputs: dict[str, Any] = {
            "input_ids": ids_RQ,
            "attention_mask": self._masks(position_RQ, longest),
            "past_key_values": self._cache(),
            "use_cache": True,
        }
        if "position_ids" in self._parameters:
            # Drafts past a row's limit are dropped later, but a learned position must exist to be looked up.
            inputs["position_ids"] = position_RQ if self._limit is None else position_RQ.clamp_max(self._limit - 1)
        with self._captured_hidden():
            logits_RQV = self.model(**inputs).logits
        self.calls += 1
        assert logits_RQV.shape[:2] == (rows, ids_RQ.shape[1])
        return logits_RQV

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another."""
        for layer in self._layers:
            layer.move(source, target, length)

    @contextmanager
    def _captured_hidden(self) -> Iterator[None]:
        if not self._keep_hidden:
            yield
            return

        def capture(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.hidden = arguments[0]

        handle = self.model.get_output_embeddings().register_forward_pre_hook(capture)
        try:
            yield
        finally:
            handle.remove()

    def _masks(self, position_RQ: Tensor, longest: int) -> Tensor | dict[str, Tensor]:
        cached_L = torch.arange(longest, device=position_RQ.device)
        visible_RQL = cached_L <= position_RQ[..., None]
        full = _additive(visible_RQL, self.model.dtype)
        if self._windows is None:
            return full
        masks = {"full_attention": full}
        if self._windows:
            near_RQL = visible_RQL & (cached_L > position_RQ[..., None] - self._windows)
            masks["sliding_attention"] = _additive(near_RQL, self.model.dtype)
        return masks

    def _layers_of(self, count: int) -> list["_SlotLayer"]:
        if not self._layers:
            self._layers = [_SlotLayer(self._plan, self._slots) for _ in range(count)]
        return self._layers

    def _cache(self) -> Cache:
        return Cache(layers=[*self._layers_of(self.model.config.get_text_config().num_hidden_layers)])

    def _reserve(self, positions: int) -> None:
        if positions > self._plan.capacity:
            grown = max(positions, self._plan.capacity + self._plan.capacity // 2)
            self._plan.capacity = grown if self._plan.capacity else positions + _FIRST_ROOM
            for layer in self._layers:
                layer.grow()


def _windows(config: Any) -> int | None:
    """The sliding window of a model that takes one mask per layer type; 0 without a window; None for one mask."""
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        return None
    return (getattr(config, "sliding_window", None) or 0) if "sliding_attention" in layer_types else 0


def _additive(visible_RQL: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible_RQL.shape, dtype=dtype, device=visible_RQL.device)
    return mask.masked_fill_(~visible_RQL, torch.finfo(dtype).min)[:, None]


class _Plan:
    """Where the tokens of one read go; shared by all layers of a reader."""

    def __init__(self) -> None:
        self.capacity = 0
        self.rows = 0
        self.longest = 0
        self.index_N = torch.empty(0, dtype=torch.long)

    def aim(self, position_RQ: Tensor, longest: int) -> None:
        self.rows, self.longest = len(position_RQ), longest
        first_R1 = torch.arange(self.rows, device=position_RQ.device)[:, None] * self.capacity
        self.index_N = (first_R1 + position_RQ).reshape(-1)


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[S, capacity, H, D]`: the heads last, so that a token is one contiguous write."""

    def __init__(self, plan: _Plan, slots: int) -> None:
        super().__init__()
        self._plan = plan
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._empty(states) for states in (key_states, value_states))
        self.is_initialized = True

    def _empty(self, states_RHQD: Tensor) -> Tensor:
        # Zeros, not garbage: masked positions have weight zero, and zero times NaN would still be NaN.
        shape = (self._slots, self._plan.capacity, states_RHQD.shape[1], states_RHQD.shape[3])
        return states_RHQD.new_zeros(shape, dtype=_attention_dtype(states_RHQD))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[R, H, Q, D]` states at the plan's positions; the first `longest` positions of the rows in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Tensor | None, states_RHQD: Tensor) -> Tensor:
        assert buffer is not None
        tokens_NHD = states_RHQD.transpose(1, 2).reshape(-1, *buffer.shape[2:])
        buffer.view(-1, *buffer.shape[2:]).index_copy_(0, self._plan.index_N, tokens_NHD.to(buffer.dtype))
        return buffer[: self._plan.rows, : self._plan.longest].transpose(1, 2)

    def put(self, keys_RHLD: Tensor, values_RHLD: Tensor, slots: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys_RHLD, values_RHLD)
        length = keys_RHLD.shape[2]
        for buffer, states in ((self.keys, keys_RHLD), (self.values, values_RHLD)):
            assert buffer is not None
            buffer[slots, :length] = states.transpose(1, 2).to(buffer.dtype)

    def move(self, source: int, target: int, length: int) -> None:
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[target, :length] = buffer[source, :length]

    def grow(self) -> None:
        if self.is_initialized:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, buffer: Tensor | None) -> Tensor:
        assert buffer is not None
        wider = buffer.new_zeros(buffer.shape[0], self._plan.capacity, *buffer.shape[2:])
        wider[:, : buffer.shape[1]] = buffer
        return wider

    # The masks are ours, so the library never asks for sizes; these are what it would need.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._plan.longest, 0

    def get_seq_length(self) -> int:
        return self._plan.longest

    def get_max_length(self) -> int:
        return -1


def _attention_dtype(states: Tensor) -> torch.dtype:
    """The dtype attention will compute in: under autocast, wider keys would be cast again at every read."""
    kind = states.device.type
    if torch.is_autocast_enabled(kind) and states.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return states.dtype


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention in which the query heads of a key head are folded into the query length.

    Equal to repeating keys and values for every query head, without the copies. Anything but a plain masked
    grouped-query call goes to the library's own function.
    """
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    plain = not any(kwargs.get(name) is not None for name in ("position_bias", "s_aux", "cache"))
    if attention_mask is None or groups == 1 or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * length, size),
        key,
        value,
        attn_mask=attention_mask.to(query.dtype).repeat(1, 1, groups, 1),
        scale=kwargs.get("scaling"),
    )
    return output.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, grouped_attention)
# For prompts, whose masks the library makes.
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@contextmanager
def attention_through_slots(*models: PreTrainedModel) -> Iterator[None]:
    """Within the block the models attend through `grouped_attention`; `eager` models keep their own, which takes the
    same masks."""
    changed: list[tuple[Callable[[str], None], str]] = []
    try:
        for model in models:
            before = model.config._attn_implementation
            if before != "eager":
                model.set_attn_implementation(_ATTENTION)
                changed.append((model.set_attn_implementation, before))
        yield
    finally:
        for restore, before in changed:
            restore(before)
