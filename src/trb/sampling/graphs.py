"""CUDA graphs of a model's passes, captured once per shape and replayed.

A pass of a few tokens is a thousand small kernels, and launching them one by one from Python takes several times as
long as running them.

A pass is captured per shape, the second time the shape occurs, and replayed from then on. Shapes are few: rows are
rounded up to a bucket, the attended length to a multiple of 256. `Replays` holds one model's graphs; a `SlotReader`
owns them, and leaves them with its buffers to the next reader of the same model (`take`, `leave`), because training
samples once per step and capturing takes as long as several passes. Replays read the weights where they lie, so an
optimizer that updates them in place needs nothing; weights that moved, or another configuration, make a new start.

Used on CUDA wherever it is safe and never elsewhere. Not captured: sharded, offloaded, compiled or hooked models
(`obstacle`), models that ask the GPU for a value on the way (found out before the first capture, because a capture
that fails half-way is hard on the process), and passes so wide that launching is not what they wait for. Those run as
they always did. The environment variable TRB_CUDA_GRAPHS=0 turns graphs off.

Shape suffixes: R rows; B their bucket.
"""

import gc
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from trb.models.modeling import is_compiled
from trb.safety.untrusted import printable

__all__ = ["Replays", "attended", "bucket", "leave", "new_replays", "obstacle", "take", "wanted"]

logger = logging.get_logger(__name__)

Outputs = tuple[Tensor, ...]

LENGTH_STEP = 256
# A pass over more tokens keeps the GPU busy for longer than it takes to launch.
MOST_TOKENS = 1024
MOST_GRAPHS = 32
# Shares of the device's memory: for the results of one model's graphs, and for what a model's reader leaves behind.
_RESULT_SHARE = 1 / 32
_LEFT_SHARE = 1 / 16
MOST_MODELS = 2
_SAID: set[type[Exception]] = set()  # errors that were warned of


def bucket(rows: int) -> int:
    """The number of rows a graph is captured for: a power of two, or three quarters of one, and at least 8.

    A pass over 8 rows takes as long as one over a single row, which reads the same weights.
    """
    power = max(8, 1 << (rows - 1).bit_length())
    return power * 3 // 4 if power > 16 and rows <= power * 3 // 4 else power


def attended(longest: int) -> int:
    """The attended length a graph is captured for. It exceeds `longest`: one position is left over for scratch."""
    return (longest // LENGTH_STEP + 1) * LENGTH_STEP


# --- which models -------------------------------------------------------------------------------


def obstacle(model: PreTrainedModel) -> str | None:
    """Why passes of the model cannot be captured; None if nothing speaks against it."""
    tensors = [*model.parameters(), *model.buffers()]
    if {tensor.device for tensor in tensors} != {model.device}:
        return "its weights lie on several devices"
    if any(hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh") for tensor in tensors):
        return "its weights are sharded"
    if is_compiled(model):
        return "it is compiled"
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            return "its weights are offloaded"
        if type(module).__name__ == "FullyShardedDataParallel":
            return "its weights are sharded"
        if not all(map(_idle, [*module._forward_hooks.values(), *module._forward_pre_hooks.values()])):
            return "it has forward hooks"
    return None


def _idle(hook: Callable[..., Any]) -> bool:
    """The library's own recorders stay on a model that was once asked for its hidden states, and do nothing after."""
    return getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing")


def _may_outlive_the_call(model: PreTrainedModel) -> bool:
    # Autocast keeps its casts of the weights for as long as the caller's context lasts, and adapters are switched on
    # and off by attributes: a graph that outlived either would compute something else.
    adapted = any(type(module).__module__.startswith("peft.") for module in model.modules())
    return not (adapted or torch.is_autocast_enabled(model.device.type))


def _fingerprint(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a captured pass depends on besides its inputs: where the weights lie, and how they are used."""
    weights = [*model.named_parameters(), *model.named_buffers()]
    where = tuple((name, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in weights)
    # By its address: the function itself would keep the model alive.
    forward = id(model.__dict__.get("forward"))
    how = model.config.to_json_string(use_diff=False), model.config._attn_implementation, forward
    return where, how, torch.is_autocast_enabled(model.device.type)


# --- capturing and replaying --------------------------------------------------------------------


class Recorded(Protocol):
    """A captured function: `replay` runs it on its inputs' storage and writes `outputs` in place."""

    outputs: Outputs

    def replay(self) -> None: ...


class Recorder(Protocol):
    """How functions are captured. Tests bring their own, which needs no GPU."""

    def rehearse(self, function: Callable[[], Outputs]) -> Outputs:
        """Run it as it is, and raise if it could not be captured."""

    def record(self, function: Callable[[], Outputs]) -> Recorded:
        """Capture it, without results yet."""


@dataclass
class _CudaRecorded:
    graph: torch.cuda.CUDAGraph
    outputs: Outputs

    def replay(self) -> None:
        self.graph.replay()


_ABANDONED: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """Captures on a stream of its own, with one memory pool for all graphs of a model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            # A stream's matrix workspace is made on first use, and must not lie in the pool of some graph.
            for dtype in (torch.float32, torch.bfloat16):
                torch.zeros(16, 16, dtype=dtype, device=device) @ torch.zeros(16, 16, dtype=dtype, device=device)
        # A pool that no graph refers to is closed for good: this one outlives the others.
        self._keeper, _ = self._capture(lambda: (torch.zeros(1, device=device),))

    def rehearse(self, function: Callable[[], Outputs]) -> Outputs:
        with _synchronising_is_an_error():
            return function()

    def record(self, function: Callable[[], Outputs]) -> Recorded:
        return _CudaRecorded(*self._capture(function))

    def _capture(self, function: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), _no_garbage_collection():
            # Other threads may go on allocating.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = function()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        return graph, outputs

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a capture that failed leaves behind: the allocator's and the random generator's capture modes.

        Its memory pool stays marked as in use and this recorder is done for; others are not touched.
        """
        _ABANDONED.append(graph)  # the allocator of host memory may ask it yet which stream it was captured from
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        with suppress(RuntimeError):
            generator = torch.cuda.default_generators[self._device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _synchronising_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: str | int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Freeing another graph in the middle of a capture would break it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Shape:
    """One shape of pass: where its inputs go, and its graph once there is one."""

    def __init__(self, tensors: Sequence[Tensor], rows: int) -> None:
        self.inputs = tuple(tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in tensors)
        self.recorded: Recorded | None = None
        self.rehearsed = False

    def fill(self, tensors: Sequence[Tensor], padding: Sequence[float]) -> None:
        for target_B, given_R, fill in zip(self.inputs, tensors, padding, strict=True):
            target_B[: len(given_R)].copy_(given_R)
            target_B[len(given_R) :].fill_(fill)

    @property
    def bytes(self) -> int:
        return 0 if self.recorded is None else sum(output.nbytes for output in self.recorded.outputs)


class Replays:
    """The captured passes of one model.

    Args:
        recorder: how to capture.
        most_rows: no pass has more.
        memory: of the device, bytes.

    Attributes:
        settled: whether the last `run` took as long as those to come will: False where a graph was in the making.
    """

    def __init__(self, recorder: Recorder, most_rows: int, memory: float = math.inf) -> None:
        self.settled = True
        self._recorder = recorder
        self._most_rows = most_rows
        self._most_bytes = _RESULT_SHARE * memory
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._refused = False

    def run(
        self, function: Callable[..., Outputs], key: Hashable, tensors: Sequence[Tensor], padding: Sequence[float]
    ) -> Outputs | None:
        """`function(*tensors)` by graph, or None where that cannot be had and the caller must run it.

        The function is run on more rows than given and must treat each by itself. New tensors are returned.

        Args:
            function: of tensors of R rows each; returns the same.
            key: what the function depends on besides the tensors.
            tensors: its arguments, at least one row each.
            padding: what to fill missing rows with, for each tensor.
        """
        rows = len(tensors[0])
        padded = min(bucket(rows), self._most_rows)
        self.settled = True
        if self._refused or padded * tensors[0][0].numel() > MOST_TOKENS:
            return None
        shape = self._shape((key, padded, *((x.shape[1:], x.dtype) for x in tensors)), tensors, padded)
        shape.fill(tensors, padding)
        try:
            return tuple(output_B[:rows].clone() for output_B in self._run(shape, partial(function, *shape.inputs)))
        # Whatever a library may raise here, the same pass without a graph is the answer to it.
        except Exception as error:
            if type(error) not in _SAID:  # `warning_once` goes by the text, which may say how much memory is free
                _SAID.add(type(error))
                logger.warning(f"sampling without CUDA graphs: {type(error).__name__}: {printable(str(error))[:300]}")
            self._refused = True
            self.forget()
            return None

    def forget(self) -> None:
        """Drop every graph: the memory they point to is about to move."""
        self._shapes.clear()

    @property
    def bytes(self) -> int:
        """Of device memory that the results of the graphs take up."""
        return sum(shape.bytes for shape in self._shapes.values())

    def _shape(self, key: Hashable, tensors: Sequence[Tensor], padded: int) -> _Shape:
        if key not in self._shapes:
            self._shapes[key] = _Shape(tensors, padded)
        self._shapes.move_to_end(key)
        while len(self._shapes) > 1 and (len(self._shapes) > MOST_GRAPHS or self.bytes > self._most_bytes):
            self._shapes.popitem(last=False)
        return self._shapes[key]

    def _run(self, shape: _Shape, function: Callable[[], Outputs]) -> Outputs:
        if shape.recorded is None:
            self.settled = False
            if not shape.rehearsed:
                shape.rehearsed = True
                return self._recorder.rehearse(function)
            shape.recorded = self._recorder.record(function)
        shape.recorded.replay()
        return shape.recorded.outputs


def wanted(model: PreTrainedModel) -> bool:
    """Whether the model's passes are to be captured."""
    if model.device.type != "cuda" or os.environ.get("TRB_CUDA_GRAPHS") == "0":
        return False
    reason = obstacle(model)
    if reason is not None:
        logger.info(f"sampling {type(model).__name__} without CUDA graphs: {reason}")
    return reason is None


def new_replays(model: PreTrainedModel, most_rows: int) -> Replays:
    """A place for the graphs of a model on a GPU."""
    return Replays(CudaRecorder(model.device), most_rows, _memory(model))


def _memory(model: PreTrainedModel) -> float:
    return torch.cuda.get_device_properties(model.device).total_memory


# --- from one reader to the next ----------------------------------------------------------------

_LEFT: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Any]] = WeakKeyDictionary()


def leave(model: PreTrainedModel, state: Any, size: int) -> None:
    """Keep a reader's state (`size` bytes on the device) for the next one, if that is safe and it is small enough."""
    if size > _LEFT_SHARE * _memory(model) or not _may_outlive_the_call(model):
        return
    _LEFT[model] = _fingerprint(model), state
    while len(_LEFT) > MOST_MODELS:
        del _LEFT[next(iter(_LEFT))]


def take(model: PreTrainedModel) -> Any:
    """What the last reader of this model left, or None; its weights and configuration must be what they were."""
    left = _LEFT.pop(model, None)
    return left[1] if left is not None and left[0] == _fingerprint(model) else None
