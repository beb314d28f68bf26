"""The layers of a cache of slots, and of the caches that prompts are read into.

Left out: states (`trb.sampling.states`), which some layers keep beside keys or in place of them, and the reader that
all this belongs to (`trb.sampling.cache`).

Shape suffixes: S slots, R rows in use, Q tokens read at once, L cached positions, H key heads, D head size, U unique
prompts.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionAndFullAttentionLayer

from trb.sampling.attention import attention_dtype
from trb.sampling.states import StateLayer, States, library_layers

__all__ = ["Plan", "SlotCache", "SlotLayer", "prompt_cache", "slot_layer"]


class SlotCache(Cache):
    """The library's view of the slots in one read: how far each row has come, as a tensor where it expects a number.

    The library hands that on to whoever makes the mask, which is `at_own_positions`.
    """

    def __init__(self, layers: list[Any], first_R: Tensor) -> None:
        super().__init__(layers=[*layers])
        self._first_R = first_R

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self._first_R


class Plan:
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


def prompt_cache(model: PreTrainedModel) -> Cache:
    """The library's cache for whole prompts, with all keys, also those that a window hides by now."""
    cache, library = DynamicCache(), library_layers(model)
    if library is None:
        cache.layer_class_to_replicate = _PromptLayer
        return cache
    cache.layer_class_to_replicate = None
    for layer in library:
        if isinstance(layer, CacheLayerMixin):
            states = getattr(layer, "number_of_states", None)
            layer = _PromptLayer() if states is None else LinearAttentionAndFullAttentionLayer(states)
        cache.layers.append(layer)
    return cache


def slot_layer(library: Any, number: int, plan: Plan, states: States) -> Any:
    """What takes the place of a layer of the library's cache."""
    keys, count = isinstance(library, CacheLayerMixin), getattr(library, "number_of_states", None)
    if count is None:
        return SlotLayer(plan, states.slots) if keys else library
    layer = _SlotStateLayer(plan, states, count) if keys else StateLayer(states, count)
    return states.add(number, layer)


class _PromptLayer(DynamicLayer):
    """The library's layer, with states in the dtype that attention takes them in: what slots are made for."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        dtype = attention_dtype(key_states)
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[S, capacity, H, D]`: the heads last, so that a token is one contiguous write."""

    def __init__(self, plan: Plan, slots: int) -> None:
        super().__init__()
        self._plan = plan
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._empty(states) for states in (key_states, value_states))
        self.is_initialized = True

    def _empty(self, states_RHQD: Tensor) -> Tensor:
        # Zeros, not garbage: masked positions have weight zero, and zero times NaN would still be NaN.
        shape = (self._slots, self._plan.capacity, states_RHQD.shape[1], states_RHQD.shape[3])
        return states_RHQD.new_zeros(shape, dtype=attention_dtype(states_RHQD))

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

    def put(self, theirs: Any, source: Tensor, slots: Tensor, length: int) -> None:
        """Keys and values of prompts of that length, from the library's own layer."""
        assert isinstance(theirs, CacheLayerMixin) and theirs.keys is not None and theirs.values is not None
        if not self.is_initialized:
            self.lazy_initialization(theirs.keys, theirs.values)
        for buffer, states_UHLD in ((self.keys, theirs.keys), (self.values, theirs.values)):
            assert buffer is not None
            buffer[slots, :length] = states_UHLD[source].transpose(1, 2).to(buffer.dtype)

    def move(self, source: int | Tensor, target: int | Tensor, length: int) -> None:
        for buffer in SlotLayer.buffers(self):
            buffer[target, :length] = buffer[source, :length]

    def buffers(self) -> list[Tensor]:
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

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


class _SlotStateLayer(StateLayer, SlotLayer):  # type: ignore[override]  # the library's two bases clash in properties
    """A layer with both: attention beside a state."""

    lazy_initialization = SlotLayer.lazy_initialization  # type: ignore[assignment]

    def __init__(self, plan: Plan, states: States, number_of_states: int) -> None:
        SlotLayer.__init__(self, plan, states.slots)
        StateLayer.__init__(self, states, number_of_states)

    def put(self, theirs: Any, source: Tensor, slots: Tensor, length: int) -> None:
        SlotLayer.put(self, theirs, source, slots, length)
        StateLayer.put(self, theirs, source, slots, length)

    def move(self, source: int | Tensor, target: int | Tensor, length: int) -> None:
        SlotLayer.move(self, source, target, length)
        StateLayer.move(self, source, target, length)

    def buffers(self) -> list[Tensor]:
        return SlotLayer.buffers(self) + StateLayer.buffers(self)

    def grow(self) -> None:
        SlotLayer.grow(self)
