"""Engines on tiny pairs for the tests that need vLLM; everything here runs on a CPU, in float32."""

import os
from pathlib import Path
from typing import Any

# Before vLLM is imported: quiet, offline, and no usage reports.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from conftest import NO_SPECIAL_IDS, STUDENT_EOS, STUDENT_ROWS, TEACHER_EOS, TEACHER_ROWS, TinyPair, random_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trb.sampling.vllm import BlendEngine

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


def vllm_student(seed: int = 41, rows: int = STUDENT_ROWS) -> PreTrainedModel:
    return random_model(LlamaForCausalLM, LlamaConfig(vocab_size=rows, **SHAPE), seed, SPREAD).float()


def vllm_teacher(seed: int = 69, rows: int = TEACHER_ROWS) -> PreTrainedModel:
    return random_model(Qwen3ForCausalLM, Qwen3Config(vocab_size=rows, **SHAPE), seed, SPREAD).float()


def make_pair() -> TinyPair:
    """As `conftest.tiny_pair`: two architectures, different stop ids, heads padded to different sizes."""
    return TinyPair(vllm_student(), vllm_teacher(), STUDENT_EOS, TEACHER_EOS, STUDENT_ROWS)


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
