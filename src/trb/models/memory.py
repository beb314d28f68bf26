"""What a token takes in the memory of a model, counted from its configuration and not measured.

Left out: what a training step takes, on which machine, and whether it fits (`trb.planning`).
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from trb.errors import InputError, did_you_mean
from trb.models.modeling import without_adapters

__all__ = ["DTYPES", "activation_entries", "bytes_of", "cache_entries", "check_dtype", "query_width"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(
            f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}{did_you_mean(str(dtype), DTYPES)}"
        )


def bytes_of(dtype: str, model: PreTrainedModel) -> int:
    """Of one number of that dtype, a name of `DTYPES`; auto is the model's own."""
    chosen = DTYPES[dtype]
    return (chosen if isinstance(chosen, torch.dtype) else model.dtype).itemsize


def cache_entries(model: PreTrainedModel) -> int:
    """Numbers that one token leaves in the key-value cache: 2 L K for L layers with key (= value) width K.

    An upper bound where layers slide over a window.
    """
    config = _text_config(model)
    return 2 * config.num_hidden_layers * _key_width(config)


def activation_entries(model: PreTrainedModel) -> int:
    """Numbers that one token leaves for the backward pass, right within a factor of two.

    L (6H + 2Q + 2K + 4F) for hidden size H, query width Q and MLP width F of one layer, with fused attention and
    without gradient checkpointing.
    """
    config = _text_config(model)
    hidden = config.hidden_size
    mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    layer = 6 * hidden + 2 * query_width(config) + 2 * _key_width(config) + 4 * mlp
    return config.num_hidden_layers * layer


def query_width(config: Any) -> int:
    """Query heads times their size."""
    return config.num_attention_heads * _head_size(config)


def _key_width(config: Any) -> int:
    return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * _head_size(config)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _text_config(model: PreTrainedModel) -> Any:
    return without_adapters(model).config.get_text_config()
