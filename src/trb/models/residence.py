"""Frozen weights that live in main memory, and are on an accelerator only while they are read.

They are copied there and never back: nobody changes them. Left out: when that is (`trb.training.teachers`), and weights
that are trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from trb.errors import InputError

__all__ = ["check_movable", "present"]


@contextmanager
def present(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the module's weights and buffers are on `device`; then it has its own again, the very tensors.

    What is there already stays, so that on one device nothing happens.
    """
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    there: dict[int, Tensor] = {}  # tied weights stay tied
    try:
        for part in module.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.device != device:
                        kept.append((table, name, tensor))
                        if id(tensor) not in there:
                            there[id(tensor)] = _copy(tensor, device)
                        table[name] = there[id(tensor)]
        yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def check_movable(module: nn.Module) -> None:
    """Refuse weights that cannot come and go. Raises ValueError."""
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        packed = tensor.dim() > 1 and not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        if type(tensor) not in (Tensor, nn.Parameter) or packed:
            raise InputError(
                f"{name} is quantised or sharded, and such weights do not go from device to device: set "
                "teacher_offload=False, or load the teacher whole"
            )
