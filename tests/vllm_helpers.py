"""Engines on tiny pairs for the tests that need vLLM; everything here runs on a CPU, in float32."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

# Before vLLM is imported: quiet, offline, and no usage reports.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

# What vLLM and TRL warn of on being imported is theirs to mend; here they are imported once and for all.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl.trainer.distillation_trainer  # noqa: F401
    import vllm  # noqa: F401

import torch
from conftest import NO_SPECIAL_IDS, STUDENT_EOS, STUDENT_ROWS, TEACHER_EOS, TEACHER_ROWS, TinyPair, random_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trb.sampling.vllm import BlendEngine
from trb.sampling.vllm.plugin import process_group_kept

# vLLM's attention on a CPU takes heads of at least 32.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    **NO_SPECIAL_IDS,
}
SPREAD = 0.2
# A trainer with engines small enough for these tests.
INSIDE = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.2, "vllm_max_model_length": 64}


def vllm_student(seed: int = 41, rows: int = STUDENT_ROWS, **options: Any) -> PreTrainedModel:
    return random_model(LlamaForCausalLM, LlamaConfig(vocab_size=rows, **SHAPE, **options), seed, SPREAD).float()


def vllm_teacher(seed: int = 69, rows: int = TEACHER_ROWS) -> PreTrainedModel:
    return random_model(Qwen3ForCausalLM, Qwen3Config(vocab_size=rows, **SHAPE), seed, SPREAD).float()


def make_pair(seed: int = 41, **options: Any) -> TinyPair:
    """As `conftest.tiny_pair`: two architectures, different stop ids, heads padded to different sizes.

    `seed` is the student's, `options` are further ones of its configuration.
    """
    return TinyPair(vllm_student(seed, **options), vllm_teacher(), STUDENT_EOS, TEACHER_EOS, STUDENT_ROWS)


def make_wide_pair() -> TinyPair:
    """More tokens, so that completions are long before they stop."""
    return TinyPair(vllm_student(rows=100), vllm_teacher(rows=104), STUDENT_EOS, TEACHER_EOS, 100)


def save_pair(pair: TinyPair, folder: Path) -> tuple[str, str]:
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        model.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


_leased: list[tuple[Any, BlendEngine]] = []


def release() -> None:
    """Shut the current engine down, if there is one: a process holds one at a time."""
    while _leased:
        _leased.pop()[1].release()


def shut_down(trainer: Any) -> None:
    """TRL leaves its engine to the end of the process; the next one needs the place."""
    if trainer.vllm_generation._started:
        with process_group_kept(torch.distributed.is_initialized()):
            trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()


def lease(paths: tuple[str, str], **options: Any) -> BlendEngine:
    """The current engine if it was started in this way and still lives; otherwise a new one."""
    key = (paths, sorted(options.items()))
    if not _leased or _leased[0][0] != key or _leased[0][1].llm is None:
        release()
        _leased.append((key, start(paths, **options)))
    return _leased[0][1]


def start(paths: tuple[str, str], **options: Any) -> BlendEngine:
    defaults = {
        "num_speculative_tokens": 3,
        "max_model_len": 128,
        "max_num_seqs": 256,
        "kv_cache_memory_bytes": 32 << 20,
        "dtype": "float32",
        "enforce_eager": True,
    }
    return BlendEngine(*paths, **{**defaults, **options})


def widened(student: PreTrainedModel, head_dim: int = 32) -> PreTrainedModel:
    """The same function with wider attention heads, which vLLM's kernels need; `student` is a Qwen3 model.

    The new components of queries, keys and values are zero, and training keeps them so. Longer vectors change three
    things, which are undone: the mean square in the norms of queries and keys, the scale of attention scores, and the
    rotary frequencies, which LongRoPE's factors say one by one.
    """
    config, old = copy.deepcopy(student.config), student.config.head_dim
    base = config.rope_parameters["rope_theta"]
    half = head_dim // 2
    factors = [base ** (2 * i / old - 2 * i / head_dim) if i < old // 2 else 1.0 for i in range(half)]
    config.head_dim = head_dim
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": config.max_position_embeddings,
        "factor": 1.0,
    }
    model = type(student)(config).to(student.dtype)
    # Component i of a head turns with component i + half of it.
    place = torch.tensor([i if i < old // 2 else half + i - old // 2 for i in range(old)])
    wide = {}
    for name, weight in student.state_dict().items():
        target = torch.zeros_like(model.state_dict()[name])
        if ".q_norm." in name or ".k_norm." in name:
            target[place] = weight * (old / head_dim) ** 0.5 * ((head_dim / old) ** 0.5 if ".q_norm." in name else 1.0)
        elif any(part in name for part in (".q_proj.", ".k_proj.", ".v_proj.")):
            target.view(-1, head_dim, weight.shape[1])[:, place] = weight.view(-1, old, weight.shape[1])
        elif ".o_proj." in name:
            target.view(len(weight), -1, head_dim)[..., place] = weight.view(len(weight), -1, old)
        else:
            target = weight.clone()
        wide[name] = target
    model.load_state_dict(wide)
    model.generation_config = student.generation_config
    return model.eval()
