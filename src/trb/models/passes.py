"""Passes of a model's own: what its forward pass takes and is told, and the logits of whole rows, which are its law.

Every other way of reading a model is held to `plain_logits`. Left out: hidden states and the head apart
(`trb.models.modeling`), and caches (`trb.sampling`).

Shape suffixes: R rows, T tokens, V head rows.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["accepts", "cache_name", "plain_logits", "switched_off", "whole_pass"]


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Whether the forward pass of a model takes an argument of that name; asked of the class, which nothing wraps."""
    return name in _arguments(type(model).forward)


def cache_name(model: PreTrainedModel) -> str | None:
    """What the forward pass of a model calls its keys and values; None where it takes none."""
    # transformers 5.24 renamed `past_key_values`. XLM's `cache` is a dictionary of its own, and was one before.
    arguments = _arguments(type(model).forward)
    if "cache" in arguments and "dict" not in str(arguments["cache"].annotation):
        return "cache"
    return "past_key_values" if "past_key_values" in arguments else None


@cache
def _arguments(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Of a forward pass: asked at every token, where a model is read by whole passes."""
    return inspect.signature(forward).parameters


def switched_off(model: nn.Module, *names: str) -> dict[str, bool]:
    """The options of those names, off, as far as the forward pass of a model takes them."""
    return {name: False for name in names if accepts(cast(PreTrainedModel, model), name)}


def plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """`[T, V]` logits of one row in one pass of the model's own, without cache, padding or any help of ours.

    In the dtype that its head computed them in: some families widen them afterwards, and so does Accelerate around a
    model that it trains in mixed precision. They would pass for more exact than they are.
    """
    with _output_dtypes(model.get_output_embeddings()) as dtypes:
        logits = whole_pass(model, [tokens])[0]
    return logits.to(max([logits.dtype, *dtypes], key=lambda dtype: torch.finfo(dtype).eps))


def whole_pass(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[R, T, V]` logits of rows of T tokens, without cache or padding."""
    ids_RT = torch.tensor(list(map(list, rows)), device=model.device)
    options: dict[str, Any] = switched_off(model, "use_cache", "output_router_logits")
    if accepts(model, "lengths"):  # without a mask XLM takes the token that pads for padding in a prompt, too
        options["attention_mask"] = torch.ones_like(ids_RT)
    return cast(Tensor, model(input_ids=ids_RT, **options).logits)


@contextmanager
def _output_dtypes(head: nn.Module | None) -> Iterator[list[torch.dtype]]:
    """Receives the dtype of what the head returns inside the block."""
    seen: list[torch.dtype] = []
    if head is None:
        yield seen
        return
    handle = head.register_forward_hook(lambda _module, _arguments, output: seen.append(output.dtype))
    try:
        yield seen
    finally:
        handle.remove()
