"""Products of few rows on CPUs: weights are laid out once per call as oneDNN wants them, then used many times.

A pass that drafts one token for each of a few rows is all products of few rows with large matrices. torch lays a matrix
out anew in every such product, or reads it badly: laid out beforehand, the same product takes half the time and less
(4 to 32 rows, float32 and bfloat16). What `torch.compile` does with frozen weights, without compiling.

Left out: models whose matrices fit into caches anyway (the embedded pair), dtypes that oneDNN does not take natively,
layers that are not plain `nn.Linear` or whose forward pass something has replaced, calls too short to be worth the
layout, and copies that would take more than a share of the machine's memory (all of it, not what is free: a run that is
resumed must multiply as it did before). Where a trial product goes wrong, nothing is packed.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psutil
import torch
from torch import Tensor, nn

__all__ = ["packed_products"]

# Bytes of a model's matrices from which they are read from memory in every pass.
_LARGE = 1 << 26
# What all copies may take of the machine's memory.
_SHARE = 0.1
# Laying a matrix out takes as long as some of the products that it saves half of.
_FEWEST_TOKENS = 16


@contextmanager
def packed_products(*models: nn.Module, tokens: int) -> Iterator[None]:
    """Within the block the models' linear layers multiply with packed copies of their weights, which must not change.

    Args:
        models: as they are read, without gradients; autocast is that of the caller.
        tokens: how many tokens are drawn for a row at most.
    """
    layers = {id(layer): layer for model in models for layer in _layers(model)} if tokens >= _FEWEST_TOKENS else {}
    if sum(map(_bytes, layers.values())) > _SHARE * psutil.virtual_memory().total:
        layers = {}
    with ExitStack() as stack:
        for layer in layers.values():
            vars(layer)["forward"] = _packed(layer)
            stack.callback(delattr, layer, "forward")
        yield


def _layers(model: nn.Module) -> list[nn.Linear]:
    found = [module for module in model.modules() if type(module) is nn.Linear and _packable(module)]
    return found if sum(map(_bytes, found)) >= _LARGE else []


def _packable(layer: nn.Linear) -> bool:
    on_cpu = layer.weight.device.type == "cpu" and type(layer.weight) is nn.Parameter
    return on_cpu and "forward" not in vars(layer) and _works(layer.weight.dtype, _dtype(layer))


def _dtype(layer: nn.Linear) -> torch.dtype:
    """What the layer multiplies in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype


def _bytes(layer: nn.Linear) -> int:
    return layer.weight.numel() * _dtype(layer).itemsize


def _packed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    dtype = _dtype(layer)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype).contiguous(), None)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def product(states: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(states.to(dtype), weight, bias, "none", [], "")
        return found

    return product


@functools.cache
@torch.no_grad()
def _works(dtype: torch.dtype, product_dtype: torch.dtype) -> bool:
    """Whether this torch and processor multiply so, rightly: the operators are not torch's public ones."""
    if product_dtype not in (torch.float32, torch.bfloat16) or dtype not in (torch.float32, torch.bfloat16):
        return False
    if product_dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # Without the numbers of its own, which would be drawn: a resumed process would go on with others.
    layer = nn.utils.skip_init(nn.Linear, 96, 160, dtype=product_dtype)
    layer.weight.copy_(torch.arange(96 * 160.0).sin().reshape(160, 96))
    layer.bias.copy_(torch.arange(160.0).cos())
    states = torch.arange(3 * 96.0).cos().reshape(3, 1, 96).to(product_dtype)
    try:
        with torch.autocast("cpu", enabled=False):
            found, expected = _packed(layer)(states), layer(states)
    except (RuntimeError, AttributeError, NotImplementedError):  # a build without oneDNN, or another signature
        return False
    # A sum of 96 products of at most 1: rounded in the result, and in float32 on the way.
    return torch.allclose(found.float(), expected.float(), atol=96 * torch.finfo(product_dtype).eps)
