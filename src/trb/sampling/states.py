"""Recurrent and convolution states of rows that advance independently, one kept for every position to go back to.

A layer of linear attention, of a state space or of a convolution holds a state that each token overwrites, so that a
rejected draft cannot be taken back by a smaller position alone. Here the state after each of the last `depth` tokens
of a row is kept, at its position modulo `depth`: a read begins with the states before its first tokens, wherever these
lie, and leaves those after each of its tokens.

Within a pass of several tokens convolutions hand over every window. What carries a recurrent state further tells no
more than the last one, so it is called token by token: where a family has a function for it that function alone, where
not the module around it, projections included. All other layers read the block at once. Left out: keys and values
(`layers`), and whether a model read so is exact (`trb.sampling.reading` compares).

Shape suffixes: S slots, R rows in use, Q tokens read at once, N `depth` x S.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

__all__ = ["StateLayer", "States", "library_layers", "recurrent_mixers"]

_KINDS = ("conv_states", "recurrent_states")
# What families call the state that a recurrence over several tokens begins from.
_INITIAL = {"initial_state", "initial_states"}
# Selective scans begin from zero, but update a state by single tokens.
_SCAN, _UPDATE = "mamba_selective_scan", "mamba_selective_state_update"
# Layers of the library's cache whose contents can be kept in slots; `DummyLayer` (5.24) holds nothing.
_KNOWN = {
    *("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"),
    *("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
}

_MIXERS: WeakKeyDictionary[nn.Module, list[tuple[str, int]]] = WeakKeyDictionary()


def library_layers(model: PreTrainedModel) -> list[Any] | None:
    """The layers of the library's cache for a model that keeps states, as new; None for other models, and where one of
    the layers is of a kind that slots do not know."""
    try:
        layers = DynamicCache(config=model.config).layers
    # Whatever a configuration without such layers may lack.
    except Exception:
        return None
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return None
    return layers if all(type(layer).__name__ in _KNOWN for layer in layers) else None


class StateLayer(LinearAttentionCacheLayerMixin):
    """The states of one layer; what the library works on in a read are copies of those before it."""

    def __init__(self, states: "States", number_of_states: int) -> None:
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states)
        self.has_previous_state = dict.fromkeys(range(number_of_states), True)
        self.by_token = False
        """Whether the read of a block comes here token by token."""
        self._states = states
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._told: dict[tuple[str, int], int] = {}

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("states are laid out by the first prompt")

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """The state with what is new behind it; in a read of several tokens the windows up to each are kept."""
        before = self.conv_states[state_idx]
        assert before is not None
        whole, size, width = torch.cat([before, conv_states], dim=-1), before.shape[-1], conv_states.shape[-1]
        self.conv_states[state_idx] = whole[..., -size:]
        if not self.by_token and width == self._states.width > 1:
            self._states.latest = self
            for place in range(width):
                self._tell(("conv_states", state_idx), whole[..., place + 1 : place + 1 + size], place)
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        before = self.recurrent_states[state_idx]
        assert before is not None
        self.recurrent_states[state_idx] = recurrent_states.to(before.dtype)
        return recurrent_states

    def begin(self) -> None:
        """Take up the states before the read."""
        for (kind, index), kept in self._kept.items():
            getattr(self, kind)[index] = self._states.before(kept)
            self._told[kind, index] = 0

    def keep(self, place: int) -> None:
        """Keep the states after that token of the read."""
        for kind, index in self._kept:
            self._tell((kind, index), getattr(self, kind)[index], place)

    def keep_recurrent(self, state: Tensor, place: int) -> None:
        """Keep that state after that token of the read."""
        self._tell(("recurrent_states", 0), state, place)

    def _tell(self, key: tuple[str, int], state: Tensor, place: int) -> None:
        self._states.write(self._kept[key], state, place)
        self._told[key] = place + 1

    def check(self) -> None:
        """Raise where a state after some token of the read was not to be had."""
        if any(self._told[key] != self._states.width for key in self._kept):
            raise RuntimeError("it does not tell its states after each token of a block")

    def put(self, theirs: Any, source: Tensor, slots: Tensor, length: int) -> None:
        """The states after prompts of that length, from the library's own layer."""
        for kind in _KINDS:
            for index, state in getattr(theirs, kind).items():
                if state is None:
                    continue
                depth, key = self._states.depth, (kind, index)
                if key not in self._kept:
                    self._kept[key] = state.new_zeros(depth, self._states.slots, *state.shape[1:])
                self._kept[key][length % depth, slots] = state[source].to(self._kept[key].dtype)

    def empty(self, slots: Tensor) -> None:
        """Rows of which nothing has been read."""
        for kept in self._kept.values():
            kept[0, slots] = 0

    def move(self, source: int | Tensor, target: int | Tensor, length: int) -> None:
        for kept in self._kept.values():
            kept[:, target] = kept[:, source]

    @property
    def is_laid_out(self) -> bool:
        return bool(self._kept)

    def buffers(self) -> list[Tensor]:
        return [*self._kept.values()]

    def grow(self) -> None:
        """States do not lengthen with the row."""


class States:
    """Where the states of one read lie; shared by all layers of a reader.

    Args:
        slots: rows in flight at most.
        depth: positions that a read may begin at, the end of the last one included; no read is longer.
        mixers: the modules that carry a recurrent state further, and the numbers of their layers.
    """

    def __init__(self, slots: int, depth: int, mixers: Sequence[tuple[nn.Module, int]]) -> None:
        self.slots, self.depth = slots, depth
        self._mixers = mixers
        self.width = 0
        self.layers: dict[int, StateLayer] = {}
        self.latest: StateLayer | None = None
        """Whose convolution a read of several tokens has come to: its recurrence is next."""
        self._rows = 0

    def add(self, number: int, layer: StateLayer) -> StateLayer:
        self.layers[number] = layer
        layer.by_token = any(number == other and _recurrence(mixer) is None for mixer, other in self._mixers)
        return layer

    @property
    def are_laid_out(self) -> bool:
        return all(layer.is_laid_out for layer in self.layers.values())

    @contextmanager
    def during(self, position_RQ: Tensor) -> Iterator[None]:
        """A read of tokens at those positions inside the block."""
        self._rows, self.width = position_RQ.shape
        if self.width > self.depth:
            raise ValueError(f"a read of {self.width} tokens, and states of {self.depth} are kept")
        slot_R1 = torch.arange(self._rows, device=position_RQ.device)[:, None]
        self._before_R = (position_RQ[:, :1] % self.depth * self.slots + slot_R1).squeeze(-1)
        self._after_RQ = (position_RQ + 1) % self.depth * self.slots + slot_R1
        for layer in self.layers.values():
            layer.begin()
        if self.width == 1:
            yield
            for layer in self.layers.values():
                layer.keep(0)
            return
        with ExitStack() as stack:
            for mixer, number in self._mixers:
                if _recurrence(mixer) is None:
                    stack.enter_context(self._token_by_token(mixer, self.layers[number]))
            for family in {family for mixer, _ in self._mixers if (family := _recurrence(mixer))}:
                stack.enter_context(self._step_by_step(sys.modules[family]))
            yield
        for layer in self.layers.values():
            layer.check()

    def before(self, kept: Tensor) -> Tensor:
        if self.depth == 1:  # nothing is ever taken back: the library may work on what is kept
            return kept[0, : self._rows]
        return kept.flatten(0, 1).index_select(0, self._before_R)

    def write(self, kept: Tensor, states: Tensor, place: int) -> None:
        if self.depth > 1:
            kept.view(-1, *kept.shape[2:]).index_copy_(0, self._after_RQ[:, place], states.to(kept.dtype))
        elif states.data_ptr() != kept.data_ptr():
            kept[0, : self._rows] = states

    @contextmanager
    def _token_by_token(self, mixer: nn.Module, layer: StateLayer) -> Iterator[None]:
        own, replaced = mixer.forward, mixer.__dict__.get("forward")
        mixer.forward = partial(self._looped, own, layer)
        try:
            yield
        finally:
            if replaced is None:
                del mixer.forward
            else:
                mixer.forward = replaced

    def _looped(self, forward: Callable[..., Any], layer: StateLayer, *args: Any, **kwargs: Any) -> Any:
        found = []
        for place in range(self.width):
            at = partial(self._at, place)
            found.append(forward(*map(at, args), **{name: at(value) for name, value in kwargs.items()}))
            layer.keep(place)
        if isinstance(found[0], Tensor):
            return torch.cat(found, dim=1)
        return (torch.cat([each[0] for each in found], dim=1), *found[-1][1:])

    @contextmanager
    def _step_by_step(self, family: ModuleType) -> Iterator[None]:
        """Inside the block a family's recurrence over several tokens keeps the state after each of them."""
        name, single = _recurrence_of(family.__name__) or ("", None)
        own = getattr(family, name)
        setattr(family, name, partial(self._scanned if name == _SCAN else self._stepped, single or own))
        try:
            yield
        finally:
            setattr(family, name, own)

    def _stepped(self, single: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A recurrence that begins from a given state and returns the last one."""
        initial = next(name for name in _INITIAL if name in kwargs)
        layer, state, found = self.latest, kwargs[initial], []
        assert layer is not None
        if "chunk_size" in inspect.signature(single).parameters:  # up to which tokens are padded
            kwargs["chunk_size"] = 1
        for place in range(self.width):
            at = partial(self._at, place)
            output, state = single(
                *map(at, args), **{key: at(value) for key, value in kwargs.items()} | {initial: state}
            )
            found.append(output)
            layer.keep_recurrent(state, place)
        return torch.cat(found, dim=1), state

    def _scanned(
        self,
        update: Callable[..., Tensor],
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """A selective scan, which begins from zero, by the library's update of single tokens."""
        layer, found = self.latest, []
        assert layer is not None
        state = layer.recurrent_states[0]
        assert state is not None
        for place in range(self.width):
            inputs = (part[..., place] for part in (hidden_states, dt))
            gate = None if z is None else z[..., place]
            options: dict[str, Any] = {"z": gate, "dt_bias": delta_bias, "dt_softplus": delta_softplus}
            found.append(update(state, *inputs, A, B[..., place], C[..., place], D, **options))
            layer.keep_recurrent(state, place)
        return torch.stack(found, dim=-1), state

    def _at(self, place: int, value: Any) -> Any:
        """That token's part of an argument."""
        if isinstance(value, tuple):
            return tuple(self._at(place, part) for part in value)
        if isinstance(value, Tensor) and value.shape[:2] == (self._rows, self.width):
            return value[:, place : place + 1]
        return value


def recurrent_mixers(model: PreTrainedModel, read: Callable[[Cache], Any]) -> list[tuple[str, int]]:
    """The modules that carry a recurrent state further, by name, each with the number of its layer in the cache.

    Families name them differently, so they are found by watching one token go through the model, once.

    Args:
        model: a causal LM without wrappers.
        read: read one token into that cache.
    """
    if model in _MIXERS:
        return _MIXERS[model]
    inside, found = list[str](), dict[tuple[str, int], None]()
    watched = DynamicCache(config=model.config)
    own = watched.update_recurrent_state

    def update(recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        found[inside[-1], layer_idx] = None
        return own(recurrent_states, layer_idx, *args, **kwargs)

    def leave(*_: Any) -> None:
        inside.pop()

    watched.update_recurrent_state = update  # type: ignore[method-assign]
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = partial(_enter, inside, name)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        read(watched)
    _MIXERS[model] = list(found)
    return _MIXERS[model]


@cache
def _recurrence_of(family: str) -> tuple[str, Callable[..., Any] | None] | None:
    """The name of the function of a family's module that takes states over several tokens, and the one that takes them
    over single tokens if that is another; None where there is no such function."""
    functions = {name: value for name, value in vars(sys.modules[family]).items() if inspect.isfunction(value)}
    if _SCAN in functions and _UPDATE in functions:
        return _SCAN, functions[_UPDATE]
    begun = {name: takes for name, takes in functions.items() if _INITIAL & {*inspect.signature(takes).parameters}}
    chunked = [name for name in begun if "chunk" in name]
    return (chunked[0], next((begun[name] for name in begun if "recurrent" in name), None)) if chunked else None


def _recurrence(mixer: nn.Module) -> str | None:
    """The module of a mixer's family, if a function there takes its states over several tokens."""
    family = type(mixer).__module__
    # Zamba scans head by head.
    return family if _recurrence_of(family) is not None and not hasattr(mixer, "n_mamba_heads") else None


def _enter(inside: list[str], name: str, *_: Any) -> None:
    inside.append(name)
