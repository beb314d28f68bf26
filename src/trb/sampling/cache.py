"""One model reading many rows that advance independently: a KV cache of slots, written at each row's own position.

A slot holds the keys and values of one row. Every read names the position of each of its tokens, so that rows of
different lengths share a batch without padding, taking tokens back is only a smaller position, and a finished row's
slot goes to the next prompt. Buffers are written in place and grow by half, never by concatenation. On CUDA, reads
are replayed as graphs where they can be (`graphs`).

Masks are the library's own: the model chooses a mask function for each of its layers, and here it is evaluated at the
positions of each row rather than at those of a rectangular batch. Works with any Hugging Face causal LM built on the
standard cache, mask and attention interfaces; `trb.sampling.reading` finds out, by comparing, which those are.
Layers of linear attention, of convolutions and of state spaces hold no keys: `states` keeps what they need, and
`supports_slots` tells apart beforehand what keeps a state in a way of its own. Grouped-query models attend through
`grouped_attention`, because the library's own path copies every key and value once per query head when a mask is given.

Shape suffixes: R rows in use, Q tokens read at once, L cached positions, U unique prompts, V head rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from trb.models.modeling import decoder, position_limit, rope_switch
from trb.models.passes import accepts, cache_name, switched_off
from trb.models.prefixes import keeps_states
from trb.sampling import graphs
from trb.sampling.layers import Plan, SlotCache, SlotLayer, prompt_cache, slot_layer
from trb.sampling.states import StateLayer, States, library_layers, recurrent_mixers

__all__ = ["SlotReader", "supports_slots"]

# Buffers start with room for the prompts and this many tokens, and grow by half when full.
FIRST_ROOM = 64


def supports_slots(model: PreTrainedModel) -> bool:
    """Whether, as far as the model says, every layer keeps only keys and values, each a function of its own prefix, or
    states that the library's own cache holds for it."""
    if library_layers(model) is not None:
        # Prompts are not padded to the length at which factors change.
        return cache_name(model) is not None and rope_switch(model) is None
    return not keeps_states(model) and cache_name(model) is not None


class SlotReader:
    """Feeds tokens to one model at explicit positions and returns its logits there.

    Args:
        model: a causal LM without wrappers.
        slots: rows in flight at most.
        keep_hidden: keep what the output head reads.
        end: positions from here on are drafted past a row's limit and dropped later; the model is not told of them.
        beyond_switch: every row is longer than the length at which the model changes its factors (`rope_switch`).
        replay: on CUDA, replay passes as graphs.
        depth: of a model that keeps states: a read may begin at so many positions, the end of the last read included,
            and is no longer. Others may be read from any position before it.

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
        depth: int = 1,
    ) -> None:
        self.model = model
        self.calls = 0
        self.hidden: Tensor | None = None
        self._keep_hidden = keep_hidden
        limits = (position_limit(model), end)
        self._limit = min([limit for limit in limits if limit is not None], default=None)
        switch = rope_switch(model)
        self._shortest_pass = switch + 1 if switch is not None and beyond_switch else 0
        self._options: dict[str, Any] = switched_off(model, "output_router_logits")
        self._takes_positions = accepts(model, "position_ids")
        self._cache_name = cache_name(model) or "past_key_values"
        states = None if library_layers(model) is None else self._new_states(slots, depth, replay)
        self._state = _State.of(model, slots, states) if replay else _State.new(model, slots, None, states)

    def admit(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Read prompts into slots; equal prompts are read once, and where a model keeps states, which padding would
        reach, those of one length together. An empty prompt leaves its slot empty."""
        self._leave_empty([slot for prompt, slot in zip(prompts, slots, strict=True) if not prompt])
        owners: dict[tuple[int, ...], list[int]] = {}
        for prompt, slot in zip(prompts, slots, strict=True):
            if prompt:
                owners.setdefault(tuple(prompt), []).append(slot)
        if not owners:
            return
        for group in [owners] if self._state.states is None else _of_equal_length(owners):
            self._read_prompts(group)

    def _read_prompts(self, owners: dict[tuple[int, ...], list[int]]) -> None:
        """Read prompts into the slots that each goes to."""
        device, longest = self.model.device, max(self._shortest_pass, *map(len, owners))
        # On the right of a causal model padding changes nothing before it; what it writes is overwritten in time.
        ids_UL = torch.zeros(len(owners), longest, dtype=torch.long)
        for row, prompt in enumerate(owners):
            ids_UL[row, : len(prompt)] = torch.tensor(prompt)
        cache = self._read_anew(ids_UL)
        self.calls += 1
        source = torch.tensor([row for row, owned in enumerate(owners.values()) for _ in owned], device=device)
        target = torch.tensor([slot for owned in owners.values() for slot in owned], device=device)
        self._state.reserve(longest)
        # Layers that read another layer's keys keep none, and the library's cache then ends before them.
        for ours, theirs in zip(self._state.layers_of(len(cache.layers)), cache.layers, strict=False):
            if isinstance(ours, SlotLayer | StateLayer):
                ours.put(theirs, source, target, longest)
        if self._state.states is not None and not self._state.states.are_laid_out:
            raise RuntimeError("it keeps its states elsewhere than in the library's cache")

    def _read_anew(self, ids_UL: Tensor, cache: Cache | None = None) -> Cache:
        """The library's cache after a pass over whole prompts."""
        cache = prompt_cache(self.model) if cache is None else cache
        # The model's own pass where that need not project the prompt to the vocabulary: the decoder inside it does not
        # know the precision that a trainer wraps around the whole.
        whole = accepts(self.model, "logits_to_keep")
        reads: Any = self.model if whole else decoder(self.model)
        reads(
            input_ids=ids_UL.to(self.model.device),
            attention_mask=torch.ones_like(ids_UL).to(self.model.device),
            use_cache=True,
            **{self._cache_name: cache},
            **({"logits_to_keep": 1} if whole else {}),
            **self._options,
        )
        return cache

    def _new_states(self, slots: int, depth: int, replay: bool) -> States:
        one = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            mixers = recurrent_mixers(self.model, lambda cache: self._read_anew(one, cache))
        # A pass that fails as a graph is run anew, and must find the states that it began with.
        again = replay and graphs.wanted(self.model)
        return States(slots, depth + int(again), [(self.model.get_submodule(name), at) for name, at in mixers])

    def _leave_empty(self, slots: list[int]) -> None:
        """Slots of rows of which nothing is to be read before their first token; only states must be told."""
        states = self._state.states
        if states is None or not slots:
            return
        if not states.are_laid_out:
            cache = self._read_anew(torch.zeros(1, 1, dtype=torch.long))
            self.calls += 1
            nowhere = torch.zeros(0, dtype=torch.long, device=self.model.device)
            for number, layer in states.layers.items():
                StateLayer.put(layer, cache.layers[number], nowhere, nowhere, 0)
        for layer in states.layers.values():
            layer.empty(torch.tensor(slots, device=self.model.device))

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
            self._cache_name: SlotCache(self._all_layers(), position_RQ[:, 0]),
            "use_cache": True,
            **self._options,
        }
        if self._takes_positions:
            # Drafts past a row's limit are dropped later, but a learned position must exist to be looked up.
            inputs["position_ids"] = position_RQ if self._limit is None else position_RQ.clamp_max(self._limit - 1)
        with self._captured_hidden() as hidden, self._state.during(position_RQ):
            logits_RQV = self.model(**inputs).logits
        assert logits_RQV.shape[:2] == ids_RQ.shape
        return (*hidden, logits_RQV) if finish is None else (*hidden, *finish(logits_RQV, *beside_R))

    def move(self, source: int | Sequence[int], target: int | Sequence[int], length: int) -> None:
        """Copy the first `length` positions of one slot over another, or of several at once over as many others."""
        one, other = (
            slots if isinstance(slots, int) else torch.tensor(slots, device=self.model.device)
            for slots in (source, target)
        )
        for layer in self._state.own_layers:
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

    def _all_layers(self) -> list[Any]:
        return self._state.layers_of(self.model.config.get_text_config().num_hidden_layers)


@dataclass
class _State:
    """What a reader keeps on the device, and may leave to the next reader of its model."""

    slots: int
    replays: graphs.Replays | None
    states: States | None = None
    plan: Plan = field(default_factory=Plan)
    layers: list[Any] = field(default_factory=list)

    @classmethod
    def new(cls, model: PreTrainedModel, slots: int, replays: graphs.Replays | None, states: States | None) -> "_State":
        state = cls(slots, replays, states)
        if states is not None:
            library = library_layers(model) or []
            state.layers = [slot_layer(layer, number, state.plan, states) for number, layer in enumerate(library)]
        return state

    @classmethod
    def of(cls, model: PreTrainedModel, slots: int, states: States | None) -> "_State":
        if not graphs.wanted(model):
            return cls.new(model, slots, None, states)
        left: _State | None = graphs.take(model)
        if left is None or left.slots != slots or left.depth != (states.depth if states else 0):
            return cls.new(model, slots, graphs.new_replays(model, slots), states)
        for buffer in left.buffers:
            buffer.zero_()  # as new: what another call left there need not be finite
        return left

    @property
    def depth(self) -> int:
        return self.states.depth if self.states else 0

    @property
    def own_layers(self) -> list[SlotLayer | StateLayer]:
        return [layer for layer in self.layers if isinstance(layer, SlotLayer | StateLayer)]

    def layers_of(self, count: int) -> list[Any]:
        """At least so many layers."""
        self.layers += [SlotLayer(self.plan, self.slots) for _ in range(count - len(self.layers))]
        return self.layers

    def during(self, position_RQ: Tensor) -> AbstractContextManager[None]:
        """A read of tokens at those positions inside the block."""
        return nullcontext() if self.states is None else self.states.during(position_RQ)

    def reserve(self, positions: int) -> None:
        capacity = self.plan.capacity
        if positions <= capacity:
            return
        grown = max(positions, capacity + capacity // 2) if capacity else positions + FIRST_ROOM
        if self.replays is not None:
            grown = graphs.attended(grown - 1)
            self.replays.forget()
        self.plan.capacity = grown
        for layer in self.own_layers:
            layer.grow()

    @property
    def bytes(self) -> int:
        graphs_too = 0 if self.replays is None else self.replays.bytes
        return graphs_too + sum(buffer.nbytes for buffer in self.buffers)

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer for layer in self.own_layers for buffer in layer.buffers()]


def _of_equal_length(owners: dict[tuple[int, ...], list[int]]) -> Iterator[dict[tuple[int, ...], list[int]]]:
    for length in sorted({len(prompt) for prompt in owners}):
        yield {prompt: slots for prompt, slots in owners.items() if len(prompt) == length}
