"""The speculative sampler against the lockstep one, and the parts only it has: slots, block sizes, kept hidden states.

That its samples have the exact law is shown in test_sampling_exactness.py, where every test runs for both samplers.
"""

import math
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from conftest import NO_SPECIAL_IDS, TinyPair, random_model, tiny_llama, tiny_qwen3
from scipy.stats import chi2_contingency
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trb import zoo
from trb.policies import (
    BehaviorPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    TemperaturePolicy,
    TrustRegionPolicy,
)
from trb.sampling import Rollout, sample
from trb.sampling.attention import attention_through_slots, grouped_attention
from trb.sampling.cache import SlotReader, supports_slots

PROMPTS = [[1], [2, 3, 1], [3, 5, 2, 2, 1], [5], [3, 3], [1, 2, 3, 5, 1, 2, 3]] * 3
POLICIES = [
    StudentPolicy(),
    TemperaturePolicy(0.8),
    TrustRegionPolicy(0.02),
    TrustRegionPolicy(0.5),
    TrustRegionPolicy(math.inf),
    SKDPolicy(2, 0.6),
    TeacherPolicy(),
]


def draw(pair: TinyPair, policy: BehaviorPolicy, **options: Any) -> Rollout:
    arguments: dict[str, Any] = {
        "max_new_tokens": 16,
        "eos_token_id": pair.student_eos,
        "teacher_eos_token_id": pair.teacher_eos,
        "seed": 5,
        "prompt_keys": [7 * row for row in range(len(PROMPTS))],
    }
    return sample(pair.student, pair.teacher, PROMPTS, policy, **{**arguments, **options})


@cache
def lockstep(pair: TinyPair, policy: BehaviorPolicy) -> Rollout:
    return draw(pair, policy, method="lockstep")


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "block_size"),
    [
        *((policy, block_size) for policy in POLICIES for block_size in (3, "planned")),
        *((policy, size) for policy in (TrustRegionPolicy(0.5), SKDPolicy(2, 0.6)) for size in (1, 8, 16, "measured")),
    ],
    ids=repr,
)
def test_tokens_are_those_of_the_lockstep_sampler(
    tiny_pair: TinyPair, policy: BehaviorPolicy, block_size: int | str
) -> None:
    expected = lockstep(tiny_pair, policy)
    ours = draw(tiny_pair, policy, block_size=block_size)
    assert ours.completions == expected.completions
    assert ours.stopped == expected.stopped
    assert ours.prompts == expected.prompts
    for field in ("teacher_weight", "kl_student", "kl_teacher", "accepted"):
        pairs = zip(getattr(ours.stats, field), getattr(expected.stats, field), strict=True)
        assert all(one == pytest.approx(other, rel=1e-5, abs=1e-6) for one, other in pairs)
    assert sum(ours.stopped) > 1
    assert max(map(len, ours.completions)) > 8


@pytest.mark.parametrize(
    ("policy", "max_rows"), [*((policy, 5) for policy in POLICIES), (TrustRegionPolicy(0.5), 1)], ids=repr
)
def test_refilled_slots_change_nothing(tiny_pair: TinyPair, policy: BehaviorPolicy, max_rows: int) -> None:
    expected = lockstep(tiny_pair, policy)
    assert draw(tiny_pair, policy, block_size=4, max_rows=max_rows).completions == expected.completions


def test_a_freed_slot_goes_to_the_next_prompt(tiny_pair: TinyPair) -> None:
    """Continuous batching: fewer passes than batches that wait for their longest row."""
    policy = StudentPolicy()
    refilled = draw(tiny_pair, policy, max_rows=6)
    batches = draw(tiny_pair, policy, method="lockstep", max_rows=6)
    assert refilled.completions == batches.completions
    decoding = refilled.student_calls - sum(1 for _ in PROMPTS) // 6
    tokens = sum(map(len, refilled.completions))
    assert decoding < batches.student_calls
    assert tokens / 6 <= refilled.student_calls


@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_tokens_agree_in_float32_on_the_embedded_pair(budget: float) -> None:
    student, tokenizer = zoo.load("student")
    teacher, _ = zoo.load("teacher")
    rows = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in zoo.problems(12, seed=3, split="train")
    ]
    options: dict[str, Any] = {
        "max_new_tokens": 40,
        "eos_token_id": student.generation_config.eos_token_id,
        "teacher_eos_token_id": teacher.generation_config.eos_token_id,
        "seed": 9,
    }
    policy = TrustRegionPolicy(budget)
    expected = sample(student, teacher, rows, policy, method="lockstep", **options)
    for block_size in (1, 4, 9):
        ours = sample(student, teacher, rows, policy, block_size=block_size, max_rows=5, **options)
        assert ours.completions == expected.completions
    assert ours.teacher_calls < expected.teacher_calls


def test_learned_positions_at_the_models_limit(gpt2_pair: TinyPair) -> None:
    """Drafts past the last position are dropped, not looked up."""
    options: dict[str, Any] = {"max_new_tokens": 25}  # 7 + 25 = 32 positions
    longest = []
    for policy in (TrustRegionPolicy(0.5), SKDPolicy(2, 0.6), TrustRegionPolicy(0.02)):
        expected = draw(gpt2_pair, policy, method="lockstep", **options)
        assert draw(gpt2_pair, policy, block_size=7, **options).completions == expected.completions
        longest.append(max(len(c) for prompt, c in zip(PROMPTS, expected.completions, strict=True) if len(prompt) == 7))
    assert max(longest) > 18  # a block then reaches past the end


def windowed(rows: int, seed: int) -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="eager",
        **NO_SPECIAL_IDS,
    )
    return random_model(Gemma2ForCausalLM, config, seed, 0.35)


def test_sliding_windows() -> None:
    pair = TinyPair(student=windowed(6, 1), teacher=windowed(8, 2))
    for policy in (StudentPolicy(), TrustRegionPolicy(0.3)):
        expected = draw(pair, policy, method="lockstep", max_new_tokens=24)
        assert draw(pair, policy, block_size=5, max_new_tokens=24).completions == expected.completions
        assert max(map(len, expected.completions)) > 12  # long enough for the window to matter


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_grouped_queries_under_either_attention(implementation: str) -> None:
    models = []
    for seed in (3, 4):
        config = LlamaConfig(
            vocab_size=6,
            hidden_size=48,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            attn_implementation=implementation,
            **NO_SPECIAL_IDS,
        )
        models.append(random_model(LlamaForCausalLM, config, seed, 0.35))
    pair = TinyPair(*models, teacher_eos=0)
    expected = draw(pair, TrustRegionPolicy(0.3), method="lockstep")
    assert draw(pair, TrustRegionPolicy(0.3), block_size=4).completions == expected.completions


def test_two_samplers_one_law(tiny_pair: TinyPair) -> None:
    """20,000 completions of each, with different seeds: homogeneity by chi-square, false-alarm rate 1e-4.

    Chances that are off by 15% add 20,000 * 0.15^2 / 2 = 225 to a statistic that stays below 125 otherwise.
    """
    counts = []
    for method, seed in (("lockstep", 100), ("speculative", 200)):
        out = sample(
            tiny_pair.student,
            tiny_pair.teacher,
            [[2, 3, 1]] * 20_000,
            TrustRegionPolicy(0.1),
            max_new_tokens=3,
            eos_token_id=tiny_pair.student_eos,
            teacher_eos_token_id=tiny_pair.teacher_eos,
            seed=seed,
            method=method,
            rollout_index=list(range(20_000)),
            prompt_keys=[1] * 20_000,
            max_rows=10_000,
            **({"block_size": 3} if method == "speculative" else {}),
        )
        counts.append(Counter(map(tuple, out.completions)))
    outcomes = [outcome for outcome in counts[0] | counts[1] if counts[0][outcome] + counts[1][outcome] >= 20]
    assert len(outcomes) > 40
    table = [[count[outcome] for outcome in outcomes] for count in counts]
    assert chi2_contingency(table).pvalue > 1e-4
    shifted = [table[0], [round(n * (1.15 if i % 2 else 0.85)) for i, n in enumerate(table[1])]]
    assert chi2_contingency(shifted).pvalue < 1e-4


# --- slots --------------------------------------------------------------------------------------


def test_rows_read_at_their_own_positions_as_in_a_full_pass() -> None:
    """Ragged prompts, a slot moved, positions taken back: logits are those of a plain pass over the row."""
    model = tiny_qwen3(8, seed=5)
    reader = SlotReader(model, slots=3, keep_hidden=True)
    rows = [[1, 2, 3], [4], [5, 6, 7, 1, 2]]
    with torch.no_grad(), attention_through_slots(model):
        reader.admit([row[:-1] for row in rows], [0, 1, 2])
        reader.read(torch.tensor([[3, 7], [4, 7], [2, 7]]), positions([2, 0, 4], 2), longest=6)
        # The sevens are taken back and another token read in their place.
        reader.move(2, 0, 5)
        logits = reader.read(torch.tensor([[5, 6], [3, 2]]), positions([5, 1], 2), longest=7)
        for slot, row in enumerate([[5, 6, 7, 1, 2, 5, 6], [4, 3, 2]]):
            whole = model(torch.tensor([row]), output_hidden_states=True)
            assert torch.allclose(logits[slot], whole.logits[0, -2:], atol=1e-10)
            assert reader.hidden is not None
            assert torch.allclose(reader.hidden[slot], whole.hidden_states[-1][0, -2:], atol=1e-10)
    assert reader.calls == 3


def positions(first: list[int], count: int) -> Tensor:
    return torch.tensor(first)[:, None] + torch.arange(count)


def test_equal_prompts_are_read_once() -> None:
    model = tiny_llama(6, seed=1)
    seen: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda _module, _arguments, options: seen.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    reader = SlotReader(model, slots=8)
    with torch.no_grad(), attention_through_slots(model):
        reader.admit([[1, 2, 3]] * 4 + [[2, 2]] * 3 + [[]], list(range(8)))
    assert seen == [(2, 3)]


class Allocations(TorchDispatchMode):
    """Elements of every tensor made, views and in-place results not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        known = {value.untyped_storage().data_ptr() for value in arguments if isinstance(value, Tensor)}
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.elements += value.numel()
        return result


def test_nothing_read_before_is_allocated_again() -> None:
    """Per cached position a read may make mask entries, but no key, value or logit."""
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        **NO_SPECIAL_IDS,
    )
    model = random_model(LlamaForCausalLM, config, 1, 0.3)
    reader = SlotReader(model, slots=2)
    made = []
    with torch.no_grad(), attention_through_slots(model):
        reader.admit([[1] * 1500, [2] * 1500], [0, 1])
        for first in (100, 1100):
            with Allocations() as allocations:
                reader.read(torch.tensor([[1], [2]]), positions([first, first], 1), longest=first + 1)
            made.append(allocations.elements)
    per_position = (made[1] - made[0]) / 1000
    keys_and_values = 2 * 2 * 16 * 3  # rows x (keys, values) x head size x layers, of one key head
    assert per_position < keys_and_values / 2
    # The mask itself: two rows, in a few dtypes and once per query group and layer.
    assert per_position <= 2 * (4 + 2 * 3 * 4)


def test_keys_are_kept_in_the_dtype_attention_computes_in() -> None:
    model = tiny_llama(6, seed=1).float()
    for autocast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        reader = SlotReader(model, slots=1)
        with torch.no_grad(), attention_through_slots(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            reader.admit([[1, 2]], [0])
            reader.read(torch.tensor([[3]]), positions([2], 1), longest=3)
        assert {layer.keys.dtype for layer in reader._all_layers()} == {dtype}


@pytest.mark.parametrize("length", [1, 3])
def test_grouped_attention_is_attention_with_repeated_keys(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, length, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, 1, length, 5, dtype=torch.float64)
    mask[0, :, :, 3:] = -1e300
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_models_own_attention_comes_back(tiny_pair: TinyPair) -> None:
    before = tiny_pair.student.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), attention_through_slots(tiny_pair.student):
        assert tiny_pair.student.config._attn_implementation != before
        raise RuntimeError("stop")
    assert tiny_pair.student.config._attn_implementation == before


def test_layers_with_a_state_are_told_apart_beforehand(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert supports_slots(tiny_pair.student)
    monkeypatch.setattr(tiny_pair.student.config, "layer_types", ["full_attention", "recurrent"], raising=False)
    assert not supports_slots(tiny_pair.student)
    monkeypatch.setattr(type(tiny_pair.teacher), "_is_stateful", True)
    assert not supports_slots(tiny_pair.teacher)


def test_text_for_prompts_is_refused_with_what_is_read() -> None:
    from trb.errors import InputError

    student, teacher = zoo.load("student")[0], zoo.load("teacher")[0]
    with pytest.raises(InputError, match="prompts are text, and sampling reads token ids"):
        sample(student, teacher, ["1 + 1"], TrustRegionPolicy(0.1), max_new_tokens=2, eos_token_id=0)  # type: ignore[list-item]
