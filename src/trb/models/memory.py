"""What a model takes in memory, counted from its configuration and not measured.

Left out: what a training step takes, on which machine, and whether it fits (`trb.planning`).
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trb.models.modeling import without_adapters

__all__ = ["DTYPES", "check_dtype", "memory_estimate"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")


def memory_estimate(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    *,
    batch: int,
    sequence_length: int,
    training: bool,
    dtype: str = "float32",
    logits_chunk: int = 1024,
) -> dict[str, int]:
    """Bytes a model takes for `batch` sequences of `sequence_length` tokens each, by purpose.

    With P parameters of which R are trained, E bytes an element, L layers, hidden size H, MLP width F, query
    width Q and key (= value) width K of one layer, B sequences of T tokens and vocabulary size V:

    - weights: P E, tied weights counted once
    - gradients: R E when training, else 0; optimizer: 2 R E (the two AdamW moments) when training, else 0
    - kv_cache: 2 L K B T E, an upper bound where layers slide over a window
    - activations, rough: training keeps L B T (6H + 2Q + 2K + 4F) E for the backward pass (fused attention,
      no gradient checkpointing); otherwise one layer at a time works on B T (2H + 3F) E
    - logits: float32; training holds the student's, the teacher's and a gradient for `logits_chunk` tokens,
      generation one row of V for each sequence
    - total: the sum, with only the larger of kv_cache and activations, as sampling and the update take turns

    A model trains the parameters that require a gradient; a config counts as fully trained. Raises ValueError
    for an unknown dtype and for sizes below 1.
    """
    given = {"batch": batch, "sequence_length": sequence_length, "logits_chunk": logits_chunk}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    check_dtype(dtype)
    model = without_adapters(model_or_config) if isinstance(model_or_config, nn.Module) else _on_meta(model_or_config)
    config = model.config.get_text_config()
    element = _element_size(dtype, model.dtype)
    tokens = batch * sequence_length
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if training else 0
    hidden, mlp, query, key = _widths(config)
    saved = config.num_hidden_layers * (6 * hidden + 2 * query + 2 * key + 4 * mlp)
    working = 2 * hidden + 3 * mlp
    logit_rows = 3 * min(logits_chunk, tokens) if training else batch
    sizes = {
        "weights": sum(p.numel() for p in model.parameters()) * element,
        "gradients": trained * element,
        "optimizer": 2 * trained * element,
        "kv_cache": 2 * config.num_hidden_layers * key * tokens * element,
        "activations": (saved if training else working) * tokens * element,
        "logits": logit_rows * config.vocab_size * torch.float32.itemsize,
    }
    return sizes | {"total": sum(sizes.values()) - min(sizes["kv_cache"], sizes["activations"])}


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _element_size(dtype: str, own: torch.dtype) -> int:
    chosen = DTYPES[dtype]
    return (chosen if isinstance(chosen, torch.dtype) else own).itemsize


def _widths(config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """Hidden size, MLP width, query width and key width of one layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return hidden, mlp, heads * head_dim, key_heads * head_dim
