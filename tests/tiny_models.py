"""A tiny random model of every causal-LM type of transformers, and what its own plain forward pass says.

A configuration is derived from the type's own class: every field whose name stands in `TINY` gets the value written
there, lists with one entry per layer shrink to their distinct entries and the first again (so that each kind of layer
appears and is followed by another, which reads what it wrote), and special ids go. What the names do not decide stands
in `_EXCEPTIONS`, each entry with its reason.

Shape suffixes: T tokens of one row, V head rows.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trb.sampling.reading import Way, sampling_mode, way_of

__all__ = [
    "MODEL_TYPES",
    "TOLERANCE",
    "VARIANTS",
    "VOCABULARY",
    "WINDOW",
    "NotRunnableError",
    "build",
    "is_causal",
    "plain_logits",
    "tiny_config",
]

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 24
WINDOW = 4
# Of logits of one row, relative to the largest: the library computes norms, rotations and router weights in float32
# whatever the model's dtype, sums of 32 numbers (the width), and each of some 32 tokens may add its own rounding.
TOLERANCE = torch.finfo(torch.float32).eps * 32 * 32

# The values by the field's name, in every configuration that has such a field.
TINY: dict[str, Any] = {
    name: value
    for value, names in (
        (
            VOCABULARY,
            "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size audio_vocab_size",
        ),
        (VOCABULARY, "encoder_hash_byte_group_vocab unpadded_vocab_size"),
        (128, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
        (128, "max_source_positions model_max_length rel_extent"),
        # Widths: heads of 8, two query heads to a key head.
        (32, "hidden_size d_model n_embd emb_dim dim_model embedding_dim embedding_size input_embedding_size"),
        (32, "output_embedding_size word_embed_proj_dim attention_hidden_size lru_width backbone_hidden_size"),
        (32, "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size d_inner dff dim_ff n_inner"),
        (32, "encoder_ffn_dim decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size feed_forward_size"),
        (32, "shared_intermediate_size dense_intermediate_size prefix_dense_intermediate_size expert_ffn_hidden_size"),
        (32, "moe_shared_expert_intermediate_size router_hidden_size hidden_size_global pronunciation_embed_dim"),
        (32, "shape_embed_dim"),
        (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
        (4, "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
        (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups indexer_kv_heads"),
        (8, "head_dim global_head_dim swa_head_dim attention_head_dim attention_head_size kv_channels dim_head d_head"),
        (8, "qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank rotary_dim index_head_dim d_rel"),
        (16, "qk_head_dim o_lora_rank"),
        (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers"),
        (2, "num_decoder_layers num_blocks num_layers_per_stack"),
        # Windows: shorter than the prompts of the tests.
        (WINDOW, "sliding_window attention_window_size window_size attention_chunk_size sliding_window_size"),
        (WINDOW, "keep_window_size local_attn_chunk_length lsh_attn_chunk_length swa_window_size"),
        (2 * WINDOW, "local_attention"),
        (True, "use_sliding_window"),
        (1, "max_window_layers"),
        (2, "sliding_window_pattern _sliding_window_pattern global_attn_every_n_layers no_rope_layer_interval"),
        (4, "index_topk index_topk_blocks index_block_size indexer_budget floor_scale"),
        (2, "index_n_heads index_local_blocks"),
        # Experts.
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group topk_group"),
        (1, "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers"),
        (1, "moe_layer_start_index zero_expert_num moe_num_shared_experts"),
        # States of recurrent layers; chunks shorter than the prompts.
        (4, "chunk_size mamba_chunk_size block_size"),
        (8, "state_size ssm_state_size mamba_d_state mamba_dt_rank time_step_rank"),
        (8, "mamba_d_head mamba_head_dim mamba_headdim linear_head_dim linear_key_head_dim linear_value_head_dim"),
        (8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
        (64, "mamba_d_ssm"),
        (2, "n_groups mamba_n_groups mamba_ngroups linear_num_key_heads linear_num_heads"),
        (4, "linear_num_value_heads"),
        # Small parts of single families.
        (8, "hidden_size_per_layer_input laurel_rank gated_norm_rank hc_lowrank adapter_rank"),
        (8, "position_bias_num_buckets num_buckets relative_max_distance prompt_mid_dim"),
        (2, "prompt_length prompt_types segment_types"),
        (1, "num_kv_shared_layers num_mem_blocks num_nextn_predict_layers o_groups"),
        # Towers beside the text model.
        (16, "image_size"),
        (8, "patch_size num_mel_bins"),
        (True, "is_decoder"),
        (False, "is_encoder_decoder use_mamba_kernels tie_word_embeddings"),
        (None, "bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id forced_eos_token_id eod_token_id"),
        (None, "decoder_start_token_id forced_bos_token_id begin_suppress_tokens suppress_tokens"),
    )
    for name in names.split()
}
# Lists with one entry per layer.
_PER_LAYER = re.compile(r"(layer_types|layers_block_type|block_types|indexer_types|attn_layers)$")
_DROPOUT = re.compile(r"(drop(out)?(_p|_prob)?|pdrop|layerdrop|jitter_noise)$")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
# What must keep the values the library gives it: gains, decay rates, step sizes.
_AS_INITIALISED = re.compile(
    r"(norm|ln_|layernorm|A_log|dt_bias|dt_proj|time_decay|time_first|\.D$|rg_lru|igate|fgate)", re.I
)


class NotRunnableError(RuntimeError):
    """The library itself cannot build or run a model of the type here; carries its own error."""


@dataclass(frozen=True)
class _Exception:
    """Values for a configuration, and why the names do not give them."""

    reason: str
    values: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


_ORDINARY = _Exception("nothing special")
_SHARED_KEYS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_GEMMA_4 = _Exception(
    "two layers share the keys of two earlier ones, heads of two sizes, a padding id in place of images",
    _SHARED_KEYS | {"global_head_dim": 16, "pad_token_id": 0},
)
_GEMMA_4_ASSISTANT = _Exception(
    "a text model whose layers all read another model's keys",
    {
        "text_config": {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
        | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}
    },
)
_INDEXED = _Exception("tied scores of an indexer with few heads let the kernel choose the keys", {"index_n_heads": 16})
_COUNTS_FROM_PADDING = _Exception("positions are counted from the padding id", {"pad_token_id": 0})
_EXCEPTIONS: dict[str, _Exception] = {
    **dict.fromkeys(
        (
            "camembert",
            "data2vec-text",
            "roberta",
            "roberta-prelayernorm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "prophetnet",
        ),
        _COUNTS_FROM_PADDING,
    ),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"), _INDEXED),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA_4),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _GEMMA_4_ASSISTANT),
    "bamba": _Exception(
        "attention layers by index, none by default", {"attn_layer_indices": [1], "num_hidden_layers": 3}
    ),
    "cohere_compass_text": _Exception(
        "sections of the rotary dimensions",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
                for kind in ("sliding_attention", "full_attention")
            },
        },
    ),
    "cpmant": _Exception(
        "prompt ids lie behind the vocabulary, a token is of segment 2",
        {"prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    ),
    "dbrx": _Exception(
        "parts that its own class does not name",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek_v4": _Exception(
        "tied scores of an indexer with few heads; compressed blocks shorter than the prompts",
        {
            "index_n_heads": 16,
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        },
    ),
    "gemma3n_text": _Exception(
        "two layers share the keys of two earlier ones",
        _SHARED_KEYS | {"activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0], "intermediate_size": [32] * 4},
    ),
    "gpt_neo": _Exception(
        "layers in groups", {"attention_types": [[["local", "global", "local"], 1]], "num_layers": 3}
    ),
    "granitemoehybrid": _Exception(
        "no attention by default",
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3},
    ),
    "jamba": _Exception("layers by period", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 3}),
    **dict.fromkeys(
        ("lfm2", "lfm2_moe"),
        _Exception(
            "no layer types, or no convolution, by default",
            {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
        ),
    ),
    "mamba2": _Exception("twice the hidden size in heads of 8", {"num_heads": 8}),
    "minimax_m3_vl_text": _Exception(
        "full attention alone by default", {"layer_types": ["minimax_m3_sparse", "full_attention"]}
    ),
    "qwen4_exp_text": _Exception(
        "sparse attention is all or nothing",
        {
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
    ),
    "reformer": _Exception(
        "positions in two factors, hashes that repeat, an id to fill chunks with",
        {
            "axial_pos_shape": [8, 16],
            "axial_pos_embds_dim": [16, 16],
            "hash_seed": 0,
            "num_buckets": 4,
            "pad_token_id": 0,
        },
    ),
    "xglm": _Exception("its mask cannot be filled in float64", dtype=torch.float32),
    "xlm": _Exception("an encoder by default", {"pad_token_id": 0, "causal": True}),
    "xlnet": _Exception("bidirectional by default", {"attn_type": "uni"}),
    "xlstm": _Exception("bfloat16 inside by default", {"autocast_kernel_dtype": "float32"}),
    "xmod": _Exception("positions from the padding id, an adapter", {"pad_token_id": 0, "default_language": "en_XX"}),
    "zamba": _Exception(
        "one block shared by two layers, attention over twice the hidden size",
        {
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_hidden_layers": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
    "zaya": _Exception("one expert a token", {"num_experts_per_tok": 1}),
}

# Further configurations of a type, under names of their own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 12,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.0, 1.0, 1.0],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
                "original_max_position_embeddings": 12,
                "factor": 128 / 12,
            },
        },
    ),
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The smallest configuration of a type (or of a variant) in which every kind of its layers appears."""
    model_type, values = VARIANTS.get(model_type, (model_type, {}))
    return _tiny(CONFIG_MAPPING[model_type], values)


def _tiny(kind: type[PretrainedConfig], special: dict[str, Any]) -> PretrainedConfig:
    default = kind()
    parts = {}
    for name, part in getattr(kind, "sub_configs", {}).items():
        part = type(getattr(default, name)) if part is AutoConfig else part
        if dataclasses.is_dataclass(part):
            parts[name] = _tiny(part, {})
    fields = {one.name: one for one in dataclasses.fields(kind)}
    values = {name: _allowed(fields[name], value) for name, value in TINY.items() if name in fields}
    values |= {name: type(one.default)() for name, one in fields.items() if _DROPOUT.search(name)}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no groups
    values |= _layer_lists(default, values) | parts
    exceptions = _EXCEPTIONS.get(kind.model_type, _ORDINARY)
    return kind(**(values | exceptions.values | special))


def _allowed(one: dataclasses.Field, value: Any) -> Any:
    """The value, or 0 for a special id that cannot be missing."""
    return 0 if value is None and type(None) not in typing.get_args(one.type) else value


def _layer_lists(default: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    lists = {}
    for name in [one.name for one in dataclasses.fields(default)]:
        entries = getattr(default, name, None) if _PER_LAYER.search(name) else None
        if isinstance(entries, list | tuple):
            lists[name] = list(dict.fromkeys(entries))
    if lists.get("layer_types") == ["full_attention"] and "sliding_window" in values:
        lists["layer_types"].append("sliding_attention")
    lists = {name: kinds for name, kinds in lists.items() if len(kinds) > 1}
    if not lists:
        return {}
    count = max(map(len, lists.values())) + 1
    lists = {name: (entries * count)[:count] for name, entries in lists.items()}
    return lists | {name: count for name in _LAYER_COUNTS if name in values}


def build(model_type: str, seed: int = 0, spread: float = 0.35) -> PreTrainedModel:
    """A tiny causal LM of the type with random weights: float64, evaluation mode, no gradients; same weights each call.

    Raises:
        NotRunnableError: the library cannot build such a model, or run it on a few tokens, on this machine.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tiny_config(model_type)
            dtype = _EXCEPTIONS.get(config.model_type, _ORDINARY).dtype
            # The library's other ways of reading experts know no float64.
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
            model = model.to(dtype).eval().requires_grad_(False)
            _randomise(model, seed, spread)
            _sharpen(model)
    except Exception as error:
        raise NotRunnableError(f"{model_type}: {type(error).__name__}: {error}") from error
    return model


def _randomise(model: nn.Module, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not _AS_INITIALISED.search(name) and (parameter.ndim > 1 or name.endswith(("bias", "sinks"))):
            torch.nn.init.normal_(parameter, std=spread, generator=generator)


def _sharpen(model: PreTrainedModel) -> None:
    """Scale the head until next-token laws are neither uniform nor one-hot, whatever scales or caps the logits."""
    tokens = [1 + place % (VOCABULARY - 1) for place in range(12)]
    for _ in range(6):
        deviation = float(plain_logits(model, tokens).std(-1).mean())
        if not math.isfinite(deviation) or 1.2 <= deviation <= 3.0:
            return
        head = model.get_output_embeddings()
        if head is not None:
            head.weight.mul_(min(8.0, max(0.125, 2.0 / max(deviation, 1e-6))))


def found_way(model: PreTrainedModel) -> Way:
    """How the model is read when it is sampled."""
    with sampling_mode(model):
        return way_of(model)


def plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """`[T, V]` logits after each token of one row: one whole pass, no cache, no padding, no mask."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def is_causal(model: PreTrainedModel, tokens: Sequence[int]) -> bool:
    """Whether no logits depend on later tokens: those of every prefix are those of the whole row."""
    whole_TV = plain_logits(model, tokens)
    tolerance = TOLERANCE * float(whole_TV.abs().max().clamp_min(1.0))
    return all(
        bool((plain_logits(model, tokens[:length])[-1] - whole_TV[length - 1]).abs().max() <= tolerance)
        for length in range(1, len(tokens))
    )
