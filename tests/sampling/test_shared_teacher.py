"""Samples whose teacher stands on the student's weights: the law, and the tokens, of two models with nothing in common.

What is compared with is made from copies that share no tensor: adapters are added to the weights of one, and were never
put on the other. They are read by plain whole passes, and from there numpy blends and Python draws.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_qwen3
from peft import LoraConfig, PeftModel, get_peft_model
from reference import policies as laws
from reference.distributions import Array, shared_events
from reference.philox import philox4x32
from reference.policies import Law
from reference.sequences import Completion, enumerate_completions
from reference.statistics import goodness_of_fit
from transformers import PreTrainedModel

from trb.models.sharing import shared_teacher
from trb.policies import BehaviorPolicy, TeacherPolicy, TrustRegionPolicy
from trb.sampling import sample
from trb.sampling.scoring import score_completions
from trb.vocab import SharedVocabulary

ROWS, STOP, HORIZON, N, SEED = 6, 0, 4, 2_000, 12
LEVEL = 1.2e-5
PROMPTS = ((1,), (2, 3, 1), (3, 5, 2, 2, 1))
KINDS = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gpt2": tiny_gpt2}
TARGETS = {"llama": ["q_proj", "down_proj"], "qwen3": ["v_proj", "lm_head"], "gpt2": ["c_attn", "c_proj"]}
POLICIES: dict[str, tuple[BehaviorPolicy, Law]] = {
    "budget 0.3": (TrustRegionPolicy(0.3), laws.trust_region(0.3)),
    "teacher": (TeacherPolicy(), laws.teacher()),
}
METHODS = ["lockstep", "speculative"]
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"method": "lockstep"},
    {"method": "speculative", "block_size": 3, "max_rows": 5, "keep_teacher_hidden": True},
    {"method": "speculative", "block_size": 1},
)


def adapted(kind: str, seed: int) -> PeftModel:
    """A base that is the same for every seed, with an adapter of that seed, which changes what it says by much."""
    lora = LoraConfig(r=2, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM")
    model = get_peft_model(KINDS[kind](ROWS, seed=5), lora, autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def alone(kind: str, seed: int | None) -> PreTrainedModel:
    """A model in tensors of its own: the base, with the adapter of a seed in its weights."""
    return KINDS[kind](ROWS, seed=5) if seed is None else adapted(kind, seed).merge_and_unload()


@cache
def pair(kind: str, teacher: str, directory: Path | None = None) -> tuple[PeftModel, PreTrainedModel]:
    student = adapted(kind, 1)
    if teacher == "base":
        return student, shared_teacher(student)
    assert directory is not None
    adapted(kind, 2).save_pretrained(directory, save_embedding_layers=False)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "tiny"}))
    return student, shared_teacher(student, f"adapter:{directory}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


SEEDS = {"base": None, "adapter": 2}
each_teacher = pytest.mark.parametrize("teacher", SEEDS)


def pair_of(kind: str, teacher: str, folder: Path) -> tuple[PeftModel, PreTrainedModel]:
    return pair(kind, teacher, None if teacher == "base" else folder / kind)


@cache
def apart(kind: str, teacher: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return alone(kind, 1), alone(kind, SEEDS[teacher])


@cache
def both(kind: str, teacher: str, tokens: tuple[int, ...]) -> tuple[Array, Array]:
    """Probabilities of the next event, of the two models that have nothing in common."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        student, taught = (model(input_ids=ids).logits[0, -1].double().numpy() for model in apart(kind, teacher))
    return shared_events(student, taught, STOP, STOP)


def drawn(models: tuple[Any, Any], policy: BehaviorPolicy, n: int, **options: Any) -> list[list[int]]:
    return sample(
        *models,
        [list(prompt) for _ in range(n) for prompt in PROMPTS],
        policy,
        max_new_tokens=HORIZON,
        eos_token_id=STOP,
        seed=SEED,
        prompt_keys=[7, 8, 9] * n,
        rollout_index=[index for index in range(n) for _ in PROMPTS],
        **options,
    ).completions


# ---- the law ----


@pytest.mark.parametrize("method", METHODS)
@each_teacher
def test_completions_have_the_exact_law_of_two_separate_models(teacher: str, method: str, folder: Path) -> None:
    found = drawn(pair_of("llama", teacher, folder), POLICIES["budget 0.3"][0], N, method=method)
    for place, prompt in enumerate(PROMPTS):
        assert goodness_of_fit([tuple(row) for row in found[place :: len(PROMPTS)]], law_of(teacher, prompt)) > LEVEL


@cache
def law_of(teacher: str, prompt: tuple[int, ...]) -> dict[Completion, float]:
    return enumerate_completions(
        lambda prefix: both("llama", teacher, prompt + prefix)[0],
        lambda prefix: both("llama", teacher, prompt + prefix)[1],
        POLICIES["budget 0.3"][1],
        max_new_tokens=HORIZON,
        stop=STOP,
    )


# ---- the tokens ----


def uniform(key: int, index: int, position: int, purpose: int) -> float:
    high, low, _, _ = philox4x32((position, index | purpose << 24, key, 0), (SEED, 0))
    return ((high << 21) | (low >> 11)) * 2.0**-53


def first_above(weights: Array, level: float) -> int:
    return int(np.searchsorted(np.cumsum(weights), level * weights.sum(), side="right"))


def oracle(kind: str, teacher: str, law: Law, prompt: tuple[int, ...], key: int, index: int) -> list[int]:
    """One completion: for each token a whole pass of either model, a draft, and what takes its place."""
    tokens: list[int] = []
    while len(tokens) < HORIZON and STOP not in tokens:
        student, taught = both(kind, teacher, prompt + tuple(tokens))
        draft, accept, rest = (uniform(key, index, len(tokens), purpose) for purpose in range(3))
        behavior, token = law(student, taught), first_above(student, draft)
        if accept >= behavior[token] / student[token]:
            token = first_above(np.clip(behavior - student, 0.0, None), rest)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@each_teacher
def test_tokens_are_those_of_an_oracle_that_reads_separate_models(teacher: str, kind: str, folder: Path) -> None:
    """Token by token and in blocks, with rows that wait for a slot, of a student that is in training."""
    student, taught = pair_of(kind, teacher, folder)
    student.train()
    for policy, law in POLICIES.values():
        expected = [
            oracle(kind, teacher, law, prompt, 7 + place, index)
            for index in range(8)
            for place, prompt in enumerate(PROMPTS)
        ]
        assert len(set(map(tuple, expected))) >= 6
        for options in LAYOUTS:
            assert drawn((student, taught), policy, 8, **options) == expected, (policy, options)
    assert student.training and not taught.training


@each_teacher
def test_scores_are_those_of_separate_models(teacher: str, folder: Path) -> None:
    completions = [[1, 5], [2, 3, 1, STOP], [3]]
    vocabulary = SharedVocabulary.of((ROWS, ROWS), STOP)
    ours, theirs = (
        score_completions(*models, PROMPTS, completions, policy=TrustRegionPolicy(0.3), vocabulary=vocabulary, top=2)
        for models in (pair_of("qwen3", teacher, folder), apart("qwen3", teacher))
    )
    for name in ("student_log_prob", "teacher_log_prob", "behavior_log_prob", "kl_student", "kl_teacher"):
        one, other = (torch.tensor([value for row in getattr(each, name) for value in row]) for each in (ours, theirs))
        assert torch.allclose(one, other, atol=1e-9), name
    assert not torch.allclose(*(torch.tensor(getattr(ours, f"{who}_log_prob")[1]) for who in ("student", "teacher")))
