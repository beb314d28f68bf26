"""Telling whether two ways of computing a model's logits are the same way, but for rounding.

What a family does with positions, masks, caches or padding does not depend on the precision of its weights; whether a
mistake there can be seen does. In half precision rounding alone may send a token to another expert, and a comparison
that forgives this forgives as large a mistake. So a model in half precision is compared twice: itself, leniently, since
its own kernels run there, and a copy of it in float32, where a mistake stands out.

Left out: what is compared (`trb.models.modeling`, `trb.models.prefixes`, `trb.sampling.reading`).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

__all__ = ["Trial", "disagreement", "tolerance", "trials_of"]

logger = logging.get_logger(__name__)

_FULL = (torch.float32, torch.float64)
# Of a copy in float32 of a model that will run in half precision: above the 0.002 that Nemotron-H and Zamba2 lose to
# their states even in float64, below the 0.008 that bfloat16 rounds one number by, and far below a wrong mask.
_STRUCTURE = 5e-3
# Of the memory that is free, what a copy may take: it is gone again before anything else is allocated.
_SHARE_OF_MEMORY = 0.5
# Tokens of a row that must agree in half precision: routing may send the others to other experts. Without a copy in
# float32 nothing else tells a mistake from that, and fewer are forgiven.
_HALF, _MOST = 0.5, 0.75


@dataclass(frozen=True)
class Trial:
    """A model to compare on, and how far two ways of computing its logits may be apart."""

    model: PreTrainedModel
    allowed: float | None = None
    """None for what its precision rounds to (`tolerance`)."""
    share: float = _HALF
    plain: bool = False
    """Whether it is read without the autocast around it."""

    def precision(self) -> AbstractContextManager[Any]:
        """What to read it in."""
        return _autocast_off(self.model) if self.plain else nullcontext()

    def gap(self, ours: Sequence[Tensor], own: Sequence[Tensor]) -> float | None:
        """`disagreement`, where it is more than rounding explains; None where it is not."""
        gap = disagreement(ours, own, self.share)
        return None if gap <= (tolerance(own[0]) if self.allowed is None else self.allowed) else gap


@contextmanager
def _autocast_off(model: PreTrainedModel) -> Iterator[None]:
    """Around the model, and in the wrapper of Accelerate's that would enter it again."""
    wrapped, original = (vars(model).get(name) for name in ("forward", "_original_forward"))
    if wrapped is not None and original is not None:
        model.forward = original
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


@contextmanager
def trials_of(model: PreTrainedModel) -> Iterator[list[Trial]]:
    """The model, and what shows its structure where its own precision hides it: without autocast, or as a copy in
    float32 that is gone after the block."""
    kind = model.device.type
    if all(weight.dtype in _FULL for weight in model.parameters() if weight.is_floating_point()):
        yield [Trial(model), *([Trial(model, _STRUCTURE, plain=True)] if torch.is_autocast_enabled(kind) else [])]
        return
    precise = _in_float32(model)
    if precise is None:
        yield [Trial(model, share=_MOST)]
        return
    trials = [Trial(model), Trial(precise, _STRUCTURE, plain=True)]
    del precise
    try:
        yield trials
    finally:
        trials.clear()  # the caller's list, which would keep the copy for as long as its function runs
        if kind == "cuda":
            torch.cuda.empty_cache()  # an engine beside us measures what is free


def _in_float32(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy with float32 in place of less; None for weights that cannot be copied so, or where memory is short."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(_is_elsewhere(tensor) for tensor in tensors) or getattr(model, "hf_quantizer", None) is not None:
        return None
    if sum(tensor.numel() * 4 for tensor in tensors) > _SHARE_OF_MEMORY * _free_memory(model.device):
        logger.info("%s is checked in its own precision: a copy in float32 does not fit", type(model).__name__)
        return None
    # To a deep copy these stand for copies made already: no weight is held a third time, and ties survive.
    stand_ins: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().float(), requires_grad=False)
        for weight in model.parameters()
        if weight.is_floating_point()
    }
    try:
        precise = copy.deepcopy(model, stand_ins)
    except Exception as error:  # whatever a family, or a wrapper around it, holds that cannot be copied
        logger.info("%s is checked in its own precision: %s", type(model).__name__, error)
        return None
    for module in precise.modules():
        # Accelerate's wrapper is no method, so that it still leads to the original.
        vars(module).pop("forward", None)
        config: Any = getattr(module, "config", None)
        if getattr(config, "dtype", None) is not None:
            config.dtype = torch.float32  # some families cast to it
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
    return precise


def _is_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor has no values here, or some of them: on no device yet, sharded by FSDP2 or by ZeRO-3."""
    return tensor.is_meta or hasattr(tensor, "_local_tensor") or hasattr(tensor, "ds_id")


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def disagreement(ours: Sequence[Tensor], own: Sequence[Tensor], share: float = _HALF) -> float:
    """How far `[T, V]` logits of several rows are from the model's own, relative to the spread of these.

    Where the model's own are float32 or float64 the largest difference at any token. In less, rounding alone may send a
    token to another expert: of the mean square at each token, what the best `share` of a row's tokens reach, and the
    worst row. Logits that are not finite where the model's own are count as infinitely far.
    """
    worst = 0.0
    for one, other in zip(ours, own, strict=True):
        possible = other.isfinite()
        if not one[possible].isfinite().all():
            return math.inf
        gap, size = (x.double().masked_fill(~possible, 0.0) for x in (one - other, other - _centre(other, possible)))
        if other.dtype in _FULL:
            worst = max(worst, (gap.abs().max() / size.abs().max().clamp_min(1e-3)).item())
        else:
            gap_T = (gap.pow(2).mean(-1) / size.pow(2).mean(-1).clamp_min(1e-12)).sqrt()
            worst = max(worst, gap_T.sort().values[math.ceil(share * len(gap_T)) - 1].item())
    return worst


def _centre(logits: Tensor, possible: Tensor) -> Tensor:
    total = logits.masked_fill(~possible, 0.0).sum(-1, keepdim=True)
    return total / possible.sum(-1, keepdim=True).clamp_min(1)


def tolerance(logits: Tensor) -> float:
    """Of `disagreement`, for two ways to compute the same logits: rounding adds up over layers and keys, and attention
    in float64 may still take its softmax in float32. A wrong mask or position is off by a share of order one."""
    if logits.dtype == torch.float32 and logits.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return 2e-2  # ten bits of each factor
    if logits.dtype in _FULL:
        return 1e-5 if logits.dtype == torch.float64 else 3e-4
    return 0.25
