"""Attention and masks of rows that stand at positions of their own.

Masks are the library's own functions, evaluated at the positions of each row; attention folds the query heads of a key
head into the query length instead of copying keys and values. Left out: the cache that is attended to
(`trb.sampling.cache`), and whether a model read so is exact (`trb.sampling.reading` compares).

Shape suffixes: R rows, Q tokens read at once, L cached positions.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

__all__ = [
    "attention_dtype",
    "attention_through_slots",
    "exact_masks",
    "masks_by",
    "slot_attentions",
]

GROUPED = "trb_grouped_sdpa"


def at_own_positions(first_R: Tensor, mask_function: Callable[..., Tensor], **arguments: Any) -> Tensor:
    """`[R, 1, Q, L]`, True where a token of a row may look: the library's mask function at the row's own positions."""

    def at_row(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(row, head, first_R[row] + query, key)

    whole = {"q_offset": 0, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return cast(Tensor, sdpa_mask(**{**arguments, **whole, "mask_function": at_row}))


def _grouped_mask(*, q_offset: Any = 0, **arguments: Any) -> Tensor | None:
    """Additive in reads through slots, one for all layers that share it; as the library makes it for prompts."""
    if _is_per_row(q_offset):
        return _additive(at_own_positions(q_offset, **arguments), arguments["dtype"])
    return sdpa_mask(q_offset=q_offset, **arguments)


def _eager_mask(*, q_offset: Any = 0, dtype: torch.dtype = torch.float32, **arguments: Any) -> Tensor | None:
    """As the library's, with two differences: reads through slots, and what hides a key in float64.

    Eager attention takes its softmax in float32, where float64's lowest number is minus infinity: a padding token that
    sees nothing then becomes NaN, and a NaN times weight zero reaches the tokens that do not see it.
    """
    if _is_per_row(q_offset):
        return _additive(at_own_positions(q_offset, **arguments), dtype)
    mask = eager_mask(q_offset=q_offset, dtype=dtype, **arguments)
    return mask if mask is None or dtype != torch.float64 else mask.clamp_min(torch.finfo(torch.float32).min)


def _is_per_row(q_offset: Any) -> bool:
    return isinstance(q_offset, Tensor) and q_offset.dim() == 1


def _additive(visible_R1QL: Tensor, dtype: torch.dtype) -> Tensor:
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    mask = torch.zeros(visible_R1QL.shape, dtype=dtype, device=visible_R1QL.device)
    return mask.masked_fill_(~visible_R1QL, lowest)


def attention_dtype(states: Tensor) -> torch.dtype:
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
    # A whole prompt past a window has a mask too; repeating its keys costs less than repeating that.
    whole = length == key.shape[2] > 1
    if attention_mask is None or groups == 1 or whole or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask.dtype != torch.bool:  # what is added to the scores; True and False are not
        attention_mask = attention_mask.to(query.dtype)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * length, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=kwargs.get("scaling"),
    )
    return output.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)

AttentionMaskInterface.register(GROUPED, _grouped_mask)


def slot_attentions(model: PreTrainedModel) -> list[str]:
    """Ways of attending to try through slots, the likeliest first; `reading` tries each before it is used.

    Implementations that take no mask per row (Flash Attention, flex) are replaced: by ours, or by the model's own eager
    one, which alone knows about soft-capped scores and attention sinks.
    """
    before = model.config._attn_implementation
    if before in ("eager", "sdpa", None) or not model._can_set_attn_implementation():
        return ["eager" if before == "eager" else GROUPED]
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return ["eager", GROUPED] if capped or not model._supports_sdpa else [GROUPED, "eager"]


@contextmanager
def attention_through_slots(*models: PreTrainedModel, attention: str | None = None) -> Iterator[None]:
    """Within the block the models attend in a way that takes masks per row: `attention`, or the first of
    `slot_attentions`."""
    with ExitStack() as stack:
        stack.enter_context(exact_masks())
        for model in models:
            chosen = attention or slot_attentions(model)[0]
            if chosen != model.config._attn_implementation and model._can_set_attn_implementation():
                stack.enter_context(_attending(model, chosen))
        yield


@contextmanager
def _attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    # Set back directly: asking for an implementation again may look for its kernels on the network again.
    before = {id(part.config): (part.config, part.config._attn_implementation) for part in parts}
    try:
        model.set_attn_implementation(_of_what_is_read(model, implementation))
        yield
    finally:
        for config, name in before.values():
            config._attn_implementation_internal = name


def _of_what_is_read(model: PreTrainedModel, implementation: str) -> dict[str, str]:
    """The implementation for the model and its text part, as the library takes it: towers for images and sounds, which
    may not have it, keep their own."""
    text = model.config.get_text_config()
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    return {"": implementation} | {name: implementation for name, part in parts.items() if _holds(part, text)}


def _holds(config: Any, wanted: Any) -> bool:
    """Whether a configuration is the one that is wanted, or has it among its parts."""
    return config is wanted or any(
        _holds(getattr(config, name, None), wanted) for name in getattr(config, "sub_configs", ())
    )


@contextmanager
def exact_masks() -> Iterator[None]:
    """Within the block `eager` models can be read through slots, and in float64 with padding."""
    with masks_by("eager", _eager_mask):
        yield


@contextmanager
def masks_by(attention: str, make: Callable[..., Any]) -> Iterator[None]:
    """Within the block the library lets `make` make the masks of one attention implementation."""
    local = ALL_MASK_ATTENTION_FUNCTIONS._local_mapping
    before = local.get(attention)
    local[attention] = make
    try:
        yield
    finally:
        del local[attention]
        if before is not None:
            local[attention] = before
