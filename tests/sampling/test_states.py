"""Models that keep states read in blocks: a rejected draft leaves no trace in a convolution, a scan or a delta rule.

One type of each way of keeping states: convolutions alone (LFM2), a recurrence that begins from a given state
(Qwen3.5), a scan that does not (Jamba), and a state beside the keys of the same layer (Falcon-H1); the reader alone is
also tried with modules called token by token (Zamba). All types are held to their plain passes in
tests/models/test_models.py; here samplers are compared with lockstep, and the reader with plain passes.
"""

import math
from functools import cache
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from tiny_models import TOLERANCE, VOCABULARY, build, found_way, plain_logits
from transformers import PreTrainedModel

from trb.models.modeling import OutputHead
from trb.policies import BehaviorPolicy, SKDPolicy, StudentPolicy, TrustRegionPolicy
from trb.sampling import Rollout, sample, states
from trb.sampling.attention import attention_through_slots
from trb.sampling.blocks import BlockChooser
from trb.sampling.cache import SlotReader, supports_slots
from trb.sampling.reading import sampling_mode

TYPES = ("lfm2", "qwen3_5", "jamba", "falcon_h1")
PROMPTS = [[7], [4, 9, 2], [3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1], [11, 3, 8], [7], [9, 9]]
TOKENS = 10
STOP = 5
each_type = pytest.mark.parametrize("model_type", TYPES)


@cache
def model_of(name: str, seed: int) -> PreTrainedModel:
    return tiny_llama(VOCABULARY, seed=seed) if name == "llama" else build(name, seed=seed)


def draw(student: PreTrainedModel, teacher: PreTrainedModel | None, policy: BehaviorPolicy, **options: Any) -> Rollout:
    arguments: dict[str, Any] = {"max_new_tokens": TOKENS, "eos_token_id": STOP, "seed": 3, **options}
    return sample(student, teacher, PROMPTS, policy, **arguments)


def way(model: PreTrainedModel) -> str:
    return found_way(model).name


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "pair"), [*((name, "both") for name in TYPES), ("qwen3_5", "student"), ("qwen3_5", "teacher")]
)
def test_tokens_are_those_of_the_lockstep_sampler(model_type: str, pair: str) -> None:
    """Rows that keep different numbers of drafts, that stop early and are followed by others, blocks of all sizes."""
    student = model_of("llama" if pair == "teacher" else model_type, 1)
    teacher = model_of("llama" if pair == "student" else model_type, 2)
    assert way(student) == way(teacher) == "slots"
    rejected, lengths = set(), set()
    for budget, layout in ((0.02, {"block_size": 8}), (0.5, {"block_size": 3, "max_rows": 2}), (math.inf, {})):
        expected = draw(student, teacher, TrustRegionPolicy(budget), method="lockstep")
        ours = draw(student, teacher, TrustRegionPolicy(budget), **{"block_size": 2, **layout})
        assert ours.completions == expected.completions, budget
        rejected |= {len(row) - sum(row) for row in expected.stats.accepted}
        lengths |= {*map(len, expected.completions)}
    assert len(rejected) > 3 < len(lengths)


@each_type
def test_a_student_alone_is_sampled_through_slots(model_type: str) -> None:
    student = model_of(model_type, 1)
    expected = draw(student, None, StudentPolicy(), method="lockstep")
    assert way(student) == "slots"
    for policy in (StudentPolicy(), TrustRegionPolicy(0.0)):
        assert draw(student, model_of("llama", 2), policy, max_rows=3).completions == expected.completions


@pytest.mark.parametrize("block_size", ["planned", "measured"])
def test_chosen_blocks_change_nothing(block_size: str) -> None:
    student, teacher = model_of("qwen3_5", 1), model_of("qwen3_5", 2)
    expected = draw(student, teacher, SKDPolicy(2, 0.6), method="lockstep")
    assert draw(student, teacher, SKDPolicy(2, 0.6), block_size=block_size).completions == expected.completions


def test_a_teacher_with_prompts_of_its_own_is_read_at_its_own_positions() -> None:
    student, teacher = model_of("lfm2", 1), model_of("jamba", 2)
    other = [[4, *prompt[:row], 6] for row, prompt in enumerate(PROMPTS)]
    options: dict[str, Any] = {"teacher_prompts": other, "begun": [[], [3, 4], [], [8], [], [1], []]}
    expected = draw(student, teacher, TrustRegionPolicy(0.2), method="lockstep", **options)
    assert len(set(map(len, expected.completions))) > 1
    ours = draw(student, teacher, TrustRegionPolicy(0.2), block_size=4, max_rows=3, **options)
    assert ours.completions == expected.completions


@each_type
def test_teacher_states_kept_for_the_loss_are_those_of_a_plain_pass(model_type: str) -> None:
    student, teacher = model_of("llama", 1), model_of(model_type, 2)
    rollout = draw(student, teacher, TrustRegionPolicy(0.2), block_size=4, keep_teacher_hidden=True)
    head = OutputHead.of(teacher)
    assert rollout.teacher_hidden is not None
    for prompt, completion, hidden in zip(PROMPTS, rollout.completions, rollout.teacher_hidden, strict=True):
        own = plain_logits(teacher, prompt + completion)[len(prompt) - 1 : -1]
        assert (head(hidden) - own).abs().max() <= TOLERANCE * own.abs().max()


# --- the reader ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*TYPES, "zamba"])
def test_rows_go_back_to_positions_of_their_own(model_type: str) -> None:
    """Drafts dropped in rows by different counts, a row moved, a slot given to another prompt, buffers grown."""
    model = model_of(model_type, 1)
    reader = SlotReader(model, slots=3, depth=4)
    rows = [[1, 2, 3], [4], [5, 6, 7, 1, 2]]
    with torch.no_grad(), sampling_mode(model), attention_through_slots(model):
        reader.admit([row[:-1] for row in rows], [0, 1, 2])
        blocks = [[row[-1], 9, 8, 7] for row in rows]
        reader.read(torch.tensor(blocks), positions([2, 0, 4], 4), longest=8)
        # The first row keeps its nine, the second nothing, the third nine, eight and seven.
        reader.move(2, 0, 8)
        reader.admit([[2, 2]], [2])
        kept = [[5, 6, 7, 1, 2, 9, 8, 7], [4], [2, 2]]
        for step in range(70):  # past the room that buffers start with
            new = [[(7 * step + row) % VOCABULARY] for row in range(3)]
            longest = max(map(len, kept)) + 1
            logits = reader.read(torch.tensor(new), positions([*map(len, kept)], 1), longest)
            kept = [row + token for row, token in zip(kept, new, strict=True)]
    for row, given in zip(kept, logits, strict=True):
        own = plain_logits(model, row)[-1]
        assert (given[-1] - own).abs().max() <= 10 * TOLERANCE * own.abs().max()


def positions(first: list[int], count: int) -> torch.Tensor:
    return torch.tensor(first)[:, None] + torch.arange(count)


def test_only_what_may_be_taken_back_is_kept() -> None:
    model = model_of("qwen3_5", 1)
    sizes = {}
    for depth in (1, 5):
        reader = SlotReader(model, slots=2, depth=depth)
        with torch.no_grad(), sampling_mode(model), attention_through_slots(model):
            reader.admit([[1, 2], [3, 4]], [0, 1])
        assert reader._state.states is not None
        layers = reader._state.states.layers.values()
        sizes[depth] = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
        with pytest.raises(ValueError, match=f"a read of {depth + 1} tokens, and states of {depth} are kept"):
            reader.read(torch.ones(2, depth + 1, dtype=torch.long), positions([2, 2], depth + 1), depth + 3)
    assert sizes[5] == 5 * sizes[1] > 0


def test_no_longer_blocks_are_chosen_than_states_are_kept() -> None:
    class Free:
        """Drafts cost nothing, so that longer blocks are better."""

        def student(self, rows: int) -> float:
            return 0.0

        def teacher(self, tokens: int) -> float:
            return 1.0

        def verify(self, tokens: int) -> float:
            return 0.0

    assert BlockChooser(Free()).choose(4, 100) == 16
    assert BlockChooser(Free(), largest=8).choose(4, 100) == 8
    assert BlockChooser(Free(), fixed=12, largest=8).choose(4, 100) == 12


# --- what goes wrong ----------------------------------------------------------------------------


@each_type
def test_states_that_are_not_taken_back_are_found_and_passed_over(
    model_type: str, warnings_seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that goes on from the newest state, whatever was dropped."""
    model = build(model_type, seed=1)
    newest: dict[int, torch.Tensor] = {}
    write, before = states.States.write, states.States.before

    def remember(self: states.States, kept: torch.Tensor, state: torch.Tensor, place: int) -> None:
        newest[kept.data_ptr()] = state.clone()
        write(self, kept, state, place)

    def go_on(self: states.States, kept: torch.Tensor) -> torch.Tensor:
        own = before(self, kept)
        last = newest.get(kept.data_ptr())
        return own if last is None or last.shape != own.shape else last.to(own.dtype)

    monkeypatch.setattr(states.States, "write", remember)
    monkeypatch.setattr(states.States, "before", go_on)
    assert way(model).startswith("lockstep")
    assert "slots: logits are off by" in warnings_seen[0]


@pytest.mark.parametrize("model_type", ["qwen3_5", "jamba", "lfm2"])
def test_states_that_are_not_told_after_each_token_are_an_error_and_no_silent_loss(
    model_type: str, warnings_seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a change of the library would do that keeps the samplers from its states."""
    monkeypatch.setattr(states.StateLayer, "keep_recurrent", lambda *_: None)
    if model_type == "lfm2":
        monkeypatch.setattr(states.StateLayer, "update_conv_state", lambda self, new, *_, **__: new)
    assert way(build(model_type, seed=1)) == "lockstep"
    assert "it does not tell its states after each token of a block" in warnings_seen[0]


def test_layers_that_only_the_library_can_keep_are_told_apart_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert supports_slots(model_of("lfm2", 1))
    assert not supports_slots(build("qwen4_exp"))  # keys of an indexer
    assert not supports_slots(build("rwkv"))  # a cache of its own
    longrope = build("lfm2")
    longrope.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 12}
    assert not supports_slots(longrope)  # prompts would be padded to its length


def test_a_mixer_is_as_it_was_after_a_pass_that_fails() -> None:
    for model_type in ("qwen3_5", "jamba", "zamba"):
        model = build(model_type, seed=1)
        reader = SlotReader(model, slots=1, depth=2)
        family = __import__(type(model).__module__, fromlist=["*"])
        functions = {name: value for name, value in vars(family).items() if callable(value)}

        def stop(*_: Any) -> None:
            raise RuntimeError("stop")

        handle = model.lm_head.register_forward_pre_hook(stop)
        with torch.no_grad(), attention_through_slots(model), pytest.raises(RuntimeError, match="stop"):
            reader.admit([[]], [0])
        handle.remove()
        with torch.no_grad(), attention_through_slots(model):
            reader.admit([[]], [0])
            handle = model.lm_head.register_forward_pre_hook(stop)
            with pytest.raises(RuntimeError, match="stop"):
                reader.read(torch.tensor([[1, 2]]), positions([0], 2), 2)
            handle.remove()
        assert functions == {name: value for name, value in vars(family).items() if callable(value)}
        assert not any("forward" in vars(module) for module in model.modules())


def test_states_that_lie_elsewhere_are_an_error_even_where_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """RecurrentGemma has its states in its modules: a slot would hold none, and go back to nothing."""
    monkeypatch.setenv("TRB_CHECK_READING", "0")
    model = build("recurrent_gemma")
    # transformers 5.16 has no cache for it at all.
    with pytest.raises((RuntimeError, AttributeError), match=r"states elsewhere|past_key_values"):
        sample(model, None, PROMPTS, StudentPolicy(), max_new_tokens=4, eos_token_id=STOP, seed=0)
