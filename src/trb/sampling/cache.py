"""One model reading many rows that advance independently: a KV cache of slots, written at each row's own position.

A slot holds the keys and values of one row. Every read names the position of each of its tokens, so that rows of
different lengths share a batch without padding, taking tokens back is only a smaller position, and a finished row's
slot goes to the next prompt. Buffers are written in place and grow by half, never by concatenation. On CUDA, reads
are replayed as graphs where they can be (`graphs`).

Masks are the library's own: the model chooses a mask function for each of its layers, and here it is evaluated at the
positions of each row rather than at those of a rectangular batch. Works with any Hugging Face causal LM built on the
standard cache, mask and attention interfaces; `trb.sampling.reading` finds out, by comparing, which those are.
Recurrent layers keep a state that cannot be taken back: `supports_slots` tells them apart beforehand. Grouped-query
models attend through `grouped_attention`, because the library's own path copies every key and value once per query
head when a mask is given.

Shape suffixes: S slots, R rows in use, Q tokens read at once, L cached positions, H key heads, G query heads per key
head, D head size, U unique prompts, V head rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from trb.models.modeling import accepts, cache_name, decoder, position_limit, rope_switch, switched_off
from trb.sampling import graphs
from trb.sampling.attention import attention_dtype

__all__ = ["SlotReader", "supports_slots"]

# Layers whose cache is something else than keys and values.
_STATEFUL_LAYERS = ("linear", "mamba", "conv", "recurrent", "hybrid", "rwkv", "moe_mamba")

# Buffers start with room for the prompts and this many tokens, and grow by half when full.
FIRST_ROOM = 64


def supports_slots(model: PreTrainedModel) -> bool:
    """Whether, as far as the model says, every layer keeps only keys and values, each a function of its own prefix."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or []
    stateful = any(name in str(kind) for kind in layer_types for name in _STATEFUL_LAYERS)
    return not getattr(model, "_is_stateful", False) and not stateful and cache_name(model) is not None


class SlotReader:
    """Feeds tokens to one model at explicit positions and returns its logits there.

    Args:
        model: a causal LM without wrappers.
        slots: rows in flight at most.
        keep_hidden: keep what the output head reads.
        end: positions from here on are drafted past a row's limit and dropped later; the model is not told of them.
        beyond_switch: every row is longer than the length at which the model changes its factors (`rope_switch`).
        replay: on CUDA, replay passes as graphs.

    Attributes:
        calls: forward passes so far, prompts included.
        hidden: `[R, Q, hidden size]` input of the output head in the last `read`, when `keep_hidden`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        *,
        keep_hidden: bool = False,
        end: int | None = None,
        beyond_switch: bool = False,
        replay: bool = True,
    ) -> None:
        self.model = model
        self.calls = 0
        self.hidden: Tensor | None = None
        self._keep_hidden = keep_hidden
        self._state = _State.of(model, slots) if replay else _State(slots, None)
        limits = (position_limit(model), end)
        self._limit = min([limit for limit in limits if limit is not None], default=None)
        switch = rope_switch(model)
        self._shortest_pass = switch + 1 if switch is not None and beyond_switch else 0
        self._options: dict[str, Any] = switched_off(model, "output_router_logits")
        self._takes_positions = accepts(model, "position_ids")
        self._cache_name = cache_name(model) or "past_key_values"

    def admit(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Read prompts into slots; equal prompts are read once. An empty prompt leaves its slot empty."""
        owners: dict[tuple[int, ...], list[int]] = {}
        for prompt, slot in zip(prompts, slots, strict=True):
            if prompt:
                owners.setdefault(tuple(prompt), []).append(slot)
        if not owners:
            return
        device, longest = self.model.device, max(self._shortest_pass, *map(len, owners))
        # On the right of a causal model padding changes nothing before it; what it writes is overwritten in time.
        ids_UL = torch.zeros(len(owners), longest, dtype=torch.long)
        for row, prompt in enumerate(owners):
            ids_UL[row, : len(prompt)] = torch.tensor(prompt)
        cache = DynamicCache()
        cache.layer_class_to_replicate = _PromptLayer
        # The model's own pass where that need not project the prompt to the vocabulary: the decoder inside it does not
        # know the precision that a trainer wraps around the whole.
        whole = accepts(self.model, "logits_to_keep")
        reads: Any = self.model if whole else decoder(self.model)
        reads(
            input_ids=ids_UL.to(device),
            attention_mask=torch.ones_like(ids_UL).to(device),
            use_cache=True,
            **{self._cache_name: cache},
            **({"logits_to_keep": 1} if whole else {}),
            **self._options,
        )
        self.calls += 1
        source = torch.tensor([row for row, owned in enumerate(owners.values()) for _ in owned], device=device)
        target = torch.tensor([slot for owned in owners.values() for slot in owned], device=device)
        self._state.reserve(longest)
        # Layers that read another layer's keys keep none, and the library's cache then ends before them.
        for ours, theirs in zip(self._state.layers_of(len(cache.layers)), cache.layers, strict=False):
            assert isinstance(theirs, CacheLayerMixin) and theirs.keys is not None and theirs.values is not None
            ours.put(theirs.keys[source], theirs.values[source], target)

    def read(
        self,
        ids_RQ: Tensor,
        position_RQ: Tensor,
        longest: int,
        finish: Callable[..., tuple[Tensor, ...]] | None = None,
        *beside_R: Tensor,
    ) -> Any:
        """`[R, Q, V]` logits after each of the tokens, read into the first R slots; the other slots must be free.

        Args:
            ids_RQ: token ids.
            position_RQ: their positions, consecutive in each row; earlier positions must have been read.
            longest: one more than the largest position (known to the caller without a device synchronisation).
            finish: what to make of the logits in the same pass, row by row; `finish(logits, *beside_R)` is then
                returned. It must be hashable, and equal to another only if it computes the same.
            beside_R: further arguments of `finish`, of R rows each.
        """
        device = self.model.device
        given = tuple(tensor.to(device) for tensor in (ids_RQ, position_RQ, *beside_R))
        found = self._replayed(longest, finish, given)
        if found is None:
            self._state.reserve(longest)
            found = self._pass(longest, finish, *given)
        self.calls += 1
        if self._keep_hidden:
            self.hidden, *found = found
        return found[0] if finish is None else tuple(found)

    @property
    def is_settled(self) -> bool:
        """Whether the last read took as long as such reads will: not one that a graph was made of."""
        return self._state.replays is None or self._state.replays.settled

    def close(self) -> None:
        """No more reads; what can serve the next reader of this model is left to it."""
        if self._state.replays is not None:
            graphs.leave(self.model, self._state, self._state.bytes)

    def _replayed(
        self, longest: int, finish: Callable[..., tuple[Tensor, ...]] | None, given: tuple[Tensor, ...]
    ) -> Sequence[Tensor] | None:
        if self._state.replays is None:
            return None
        length = graphs.attended(longest)
        self._state.reserve(length)
        # Rows that only fill a bucket write where no row in use ever reads.
        padding = (0, self._state.plan.capacity - 1, *(0 for _ in given[2:]))
        key = (length, finish, self._keep_hidden)
        return self._state.replays.run(lambda *tensors: self._pass(length, finish, *tensors), key, given, padding)

    def _pass(
        self,
        longest: int,
        finish: Callable[..., tuple[Tensor, ...]] | None,
        ids_RQ: Tensor,
        position_RQ: Tensor,
        *beside_R: Tensor,
    ) -> tuple[Tensor, ...]:
        """What `read` returns, after the hidden states if those are kept. Depends on device tensors alone."""
        self._state.plan.aim(position_RQ, longest)
        inputs: dict[str, Any] = {
            "input_ids": ids_RQ,
            self._cache_name: _SlotCache(self._all_layers(), position_RQ[:, 0]),
            "use_cache": True,
            **self._options,
        }
        if self._takes_positions:
            # Drafts past a row's limit are dropped later, but a learned position must exist to be looked up.
            inputs["position_ids"] = position_RQ if self._limit is None else position_RQ.clamp_max(self._limit - 1)
        with self._captured_hidden() as hidden:
            logits_RQV = self.model(**inputs).logits
        assert logits_RQV.shape[:2] == ids_RQ.shape
        return (*hidden, logits_RQV) if finish is None else (*hidden, *finish(logits_RQV, *beside_R))

    def move(self, source: int | Sequence[int], target: int | Sequence[int], length: int) -> None:
        """Copy the first `length` positions of one slot over another, or of several at once over as many others."""
        one, other = (
            slots if isinstance(slots, int) else torch.tensor(slots, device=self.model.device)
            for slots in (source, target)
        )
        for layer in self._state.layers:
            if layer.is_initialized:
                layer.move(one, other, length)

    @contextmanager
    def _captured_hidden(self) -> Iterator[list[Tensor]]:
        """Receives the input of the output head inside the block, when `keep_hidden`."""
        hidden: list[Tensor] = []
        if not self._keep_hidden:
            yield hidden
            return

        def capture(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            hidden.append(arguments[0])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(capture)
        try:
            yield hidden
        finally:
            handle.remove()

    def _all_layers(self) -> list["_SlotLayer"]:
        return self._state.layers_of(self.model.config.get_text_config().num_hidden_layers)


class _SlotCache(Cache):
    """The library's view of the slots in one read: how far each row has come, as a tensor where it expects a number.

    The library hands that on to whoever makes the mask, which is `at_own_positions`.
    """

    def __init__(self, layers: list["_SlotLayer"], first_R: Tensor) -> None:
        super().__init__(layers=[*layers])
        self._first_R = first_R

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self._first_R


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


@dataclass
class _State:
    """What a reader keeps on the device, and may leave to the next reader of its model."""

    slots: int
    replays: graphs.Replays | None
    plan: "_Plan" = field(default_factory=_Plan)
    layers: list["_SlotLayer"] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel, slots: int) -> "_State":
        if not graphs.wanted(model):
            return cls(slots, None)
        left: _State | None = graphs.take(model)
        if left is None or left.slots != slots:
            return cls(slots, graphs.new_replays(model, slots))
        for layer in left.layers:
            layer.clear()  # as new: what another call left there need not be finite
        return left

    def layers_of(self, count: int) -> list["_SlotLayer"]:
        """At least so many layers."""
        self.layers += [_SlotLayer(self.plan, self.slots) for _ in range(count - len(self.layers))]
        return self.layers

    def reserve(self, positions: int) -> None:
        capacity = self.plan.capacity
        if positions <= capacity:
            return
        grown = max(positions, capacity + capacity // 2) if capacity else positions + FIRST_ROOM
        if self.replays is not None:
            grown = graphs.attended(grown - 1)
            self.replays.forget()
        self.plan.capacity = grown
        for layer in self.layers:
            layer.grow()

    @property
    def bytes(self) -> int:
        graphs_too = 0 if self.replays is None else self.replays.bytes
        return graphs_too + sum(layer.bytes for layer in self.layers)


class _PromptLayer(DynamicLayer):
    """The library's layer, with states in the dtype that attention takes them in: what slots are made for."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        dtype = attention_dtype(key_states)
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


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

    def put(self, keys_RHLD: Tensor, values_RHLD: Tensor, slots: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys_RHLD, values_RHLD)
        length = keys_RHLD.shape[2]
        for buffer, states in ((self.keys, keys_RHLD), (self.values, values_RHLD)):
            assert buffer is not None
            buffer[slots, :length] = states.transpose(1, 2).to(buffer.dtype)

    def move(self, source: int | Tensor, target: int | Tensor, length: int) -> None:
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[target, :length] = buffer[source, :length]

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self.keys, self.values) if buffer is not None)

    def clear(self) -> None:
        for buffer in (self.keys, self.values):
            if buffer is not None:
                buffer.zero_()

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
