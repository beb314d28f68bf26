"""Shared test environment: one thread, no network, and models whose every completion can be enumerated."""

import os

# Before torch is imported: one thread makes results repeatable and leaves the other cores to other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

torch.set_num_threads(1)

STUDENT_ROWS = 6
TEACHER_ROWS = 8
STUDENT_EOS = 0
TEACHER_EOS = 4


@dataclass(frozen=True)
class TinyPair:
    """A student and a teacher with different stop ids and heads padded to different sizes."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    student_eos: int = STUDENT_EOS
    teacher_eos: int = TEACHER_EOS
    rows: int = STUDENT_ROWS


def tiny_llama(rows: int, seed: int, *, hidden: int = 16, spread: float = 0.6) -> LlamaForCausalLM:
    """A one-layer Llama, random but far from uniform, in float64."""
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=spread,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.double().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_pair() -> TinyPair:
    return TinyPair(student=tiny_llama(STUDENT_ROWS, seed=11), teacher=tiny_llama(TEACHER_ROWS, seed=12))
