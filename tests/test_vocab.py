"""Shared events: stop probability is moved, never lost or split; different tokenizers are refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyPair, tiny_llama
from reference.distributions import log_normalise, shared_events
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trb.blend import solve
from trb.policies import SKDPolicy, TemperaturePolicy
from trb.vocab import SharedVocabulary, align, check_heads, check_same_tokenizer, head_rows, log_probs, stop_token_ids

Eos = int | list[int]


def probabilities(logits: Tensor) -> np.ndarray:
    return torch.softmax(logits.double(), -1).numpy()


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("student_eos", "teacher_eos"),
    [
        (0, 0),
        (0, 4),
        (5, 1),
        ([3, 1], 4),
        (2, [2, 4]),
        ([1, 1], [1]),
        ([4, 2], [2, 5, 0]),
        (0, [1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(6, 6), (6, 9), (8, 6)])
def test_both_models_on_the_shared_events(
    student_rows: int, teacher_rows: int, student_eos: Eos, teacher_eos: Eos
) -> None:
    student, teacher = random_logits(3, 2, student_rows), random_logits(3, 2, teacher_rows, seed=1)
    expected = shared_events(student.numpy(), teacher.numpy(), student_eos, teacher_eos)
    for ours, theirs in zip(align(student, teacher, student_eos, teacher_eos), expected, strict=True):
        assert ours.shape == (3, 2, 6)
        assert probabilities(ours) == pytest.approx(theirs, abs=1e-6)
        assert ((ours == -math.inf).numpy() == (theirs == 0)).all()


def test_one_stop_id_for_both_leaves_the_logits_alone() -> None:
    student, teacher = random_logits(4, 6), random_logits(4, 6, seed=1)
    aligned = align(student, teacher, 3, 3)
    assert torch.equal(aligned[0], student)
    assert torch.equal(aligned[1], teacher)


def test_inputs_are_not_modified() -> None:
    student, teacher = random_logits(4, 6), random_logits(4, 7, seed=1)
    before = student.clone(), teacher.clone()
    for eos in ((0, 4), (3, 3)):
        for aligned in align(student, teacher, *eos):
            aligned.zero_()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    student, teacher = random_logits(4, 6).to(dtype), random_logits(4, 6, seed=1).to(dtype)
    for ours, theirs in zip(
        align(student, teacher, 0, 4), shared_events(student.double(), teacher.double(), 0, 4), strict=True
    ):
        assert ours.dtype == dtype
        assert probabilities(ours) == pytest.approx(theirs, abs=2 * torch.finfo(dtype).eps)


def test_stop_ids_may_be_impossible() -> None:
    student, teacher = random_logits(2, 5), random_logits(2, 5, seed=1)
    student[0, 0], teacher[0, 3] = -math.inf, -math.inf
    student[1, [0, 3]] = -math.inf
    aligned = align(student, teacher, 0, 3)
    expected = shared_events(student.numpy(), teacher.numpy(), 0, 3)
    for ours, theirs in zip(aligned, expected, strict=True):
        assert probabilities(ours) == pytest.approx(theirs, abs=1e-6)


def test_gradients_reach_every_stop_id() -> None:
    """The stop event's gradient splits over its ids in proportion to their probability."""
    student = random_logits(1, 6).double().requires_grad_()
    aligned, _ = align(student, random_logits(1, 6, seed=1), 0, 4)
    torch.log_softmax(aligned, -1)[0, 0].backward()
    p = probabilities(student.detach())[0]
    stop = p[0] + p[4]
    expected = -p
    expected[[0, 4]] += p[[0, 4]] / stop
    assert student.grad is not None
    assert student.grad[0].numpy() == pytest.approx(expected)


def test_gradients_stay_finite_when_every_stop_id_is_impossible() -> None:
    student = random_logits(1, 6)
    student[0, [0, 4]] = -math.inf
    student.requires_grad_()
    aligned, _ = align(student, random_logits(1, 6, seed=1), 0, 4)
    torch.log_softmax(aligned, -1)[0, 1].backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_without_alignment_the_blend_splits_the_stop_event() -> None:
    """Why this module exists: two models that agree on stopping, under two ids, do not blend to stopping."""
    student, teacher = torch.zeros(3), torch.zeros(3)
    student[0], teacher[1] = 5.0, 5.0
    budget = 0.5
    naive = solve(student, teacher, budget).log_probs.exp()
    blended = solve(*align(student, teacher, 0, 1), budget).log_probs.exp()
    sure = float(torch.softmax(student, -1)[:2].sum())
    assert float(blended[0]) == pytest.approx(sure, abs=1e-6)
    assert float(naive[0]) < 0.95


@pytest.mark.parametrize(
    ("student_eos", "teacher_eos", "named"), [(6, 0, "6"), (0, [1, 7], "7"), (-1, 0, "-1"), (0, -100, "-100")]
)
def test_stop_ids_outside_the_shared_rows_are_refused(student_eos: Eos, teacher_eos: Eos, named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}\b.*6"):
        align(torch.zeros(2, 6), torch.zeros(2, 8), student_eos, teacher_eos)


def test_a_student_that_never_stops_is_refused() -> None:
    with pytest.raises(ValueError, match="end-of-sequence"):
        align(torch.zeros(2, 6), torch.zeros(2, 6), [], 0)


def test_shared_vocabulary_of_several_heads() -> None:
    shared = SharedVocabulary.of([8, 6, 7], [2, 5], 1)
    assert (shared.size, shared.stop_id) == (6, 2)
    assert shared.stop_ids == [2, 5, 1]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("teacher_eos", [2, 1, [1, 5, 3]], ids=str)
def test_each_models_own_law_at_the_temperature_is_folded(
    teacher_eos: Eos, dtype: torch.dtype, temperature: float
) -> None:
    shared, logits = SharedVocabulary.of([6, 8], 2, teacher_eos), random_logits(50, 8).to(dtype)
    given = logits.double().numpy()[:, :6]
    expected = shared_events(given, given, 2, teacher_eos, temperature)[0]
    # The logits are at most 8 / 0.2 = 40 after division, so their rounding is at most 20 eps in a log-probability.
    wide = dtype if dtype == torch.float64 else torch.float32
    found = shared.log_probs(logits, temperature)
    assert found.dtype == wide
    assert found.exp().double().numpy() == pytest.approx(expected, abs=40 * torch.finfo(wide).eps)
    assert ((found == -math.inf).numpy() == (expected == 0)).all()
    # Logits at temperature 1 stay in their dtype.
    kept = dtype if temperature == 1.0 else wide
    for_gradients = shared.event_logits(logits, temperature)
    assert for_gradients.dtype == kept
    assert probabilities(for_gradients) == pytest.approx(expected, abs=40 * torch.finfo(kept).eps)
    assert torch.equal(logits.double(), torch.from_numpy(random_logits(50, 8).to(dtype).double().numpy()))


def test_a_cold_model_does_not_stop_on_what_it_finds_unlikely() -> None:
    """Merged first, two ids that together outweigh the likeliest token would stop a row that almost never stops."""
    shared, logits = SharedVocabulary.of([4], 0, 1), torch.tensor([0.3, 0.3, 0.4, 0.0]).log()
    assert shared.log_probs(logits, 0.01)[0] < -20
    assert float(shared.log_probs(logits, 0.01)[2]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_gradients_at_a_temperature_are_those_of_the_definition(temperature: float) -> None:
    """d log p_stop / d z_i = (p_i / p_stop [i stops] - p_i) / T, with p the law over ids at T."""
    logits = random_logits(1, 7).double().requires_grad_()
    shared = SharedVocabulary.of([6, 7], 0, [4, 3])
    torch.log_softmax(shared.event_logits(logits, temperature), -1)[0, 0].backward()
    p = probabilities(logits.detach()[:, :6] / temperature)[0]
    expected = -p
    expected[[0, 3, 4]] += p[[0, 3, 4]] / p[[0, 3, 4]].sum()
    assert logits.grad is not None
    assert logits.grad[0].numpy() == pytest.approx([*expected / temperature, 0.0], abs=1e-12)


def test_tokens_are_events() -> None:
    shared = SharedVocabulary.of([9], [2, 5], 7)
    tokens = torch.arange(9)
    assert [shared.event_of(token) for token in range(9)] == [0, 1, 2, 3, 4, 2, 6, 2, 8]
    assert shared.events(tokens.view(3, 3)).flatten().tolist() == [0, 1, 2, 3, 4, 2, 6, 2, 8]
    assert tokens.tolist() == list(range(9)), "the ids themselves are needed: they are what models read"


# --- tokenizers, heads, stop ids ----------------------------------------------------------------


def tokenizer(words: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), **special)


def test_equal_tokenizers_pass_and_so_do_extra_special_tokens() -> None:
    plain = tokenizer({"a": 0, "b": 1, "c": 2})
    check_same_tokenizer(plain, tokenizer({"a": 0, "b": 1, "c": 2}))
    check_same_tokenizer(plain, tokenizer({"a": 0, "b": 1, "c": 2}, eos_token="<end>"))
    check_same_tokenizer(tokenizer({"a": 0, "b": 1, "c": 2}, pad_token="<pad>"), plain)


def test_a_token_with_two_ids_is_named() -> None:
    with pytest.raises(ValueError, match=r"'b'.*1.*2|'c'.*2.*1"):
        check_same_tokenizer(tokenizer({"a": 0, "b": 1, "c": 2}), tokenizer({"a": 0, "b": 2, "c": 1}))


def test_a_token_the_teacher_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="'c'"):
        check_same_tokenizer(tokenizer({"a": 0, "b": 1, "c": 2}), tokenizer({"a": 0, "b": 1, "d": 2}))


def test_heads_must_cover_the_tokenizer() -> None:
    check_heads(152_064, 151_936, 151_669)
    with pytest.raises(ValueError, match=r"teacher.*\b5\b"):
        check_heads(8, 5, 6)
    with pytest.raises(ValueError, match=r"student.*\b5\b"):
        check_heads(5, 8, 6)


def test_a_pair_stops_with_every_id_of_either_model_or_tokenizer(tiny_pair: TinyPair) -> None:
    student, teacher = tiny_llama(6, seed=1), tiny_llama(8, seed=2)
    words = {letter: token for token, letter in enumerate("abcdef")}
    student_tokenizer, teacher_tokenizer = tokenizer(words, eos_token="d"), tokenizer(words, eos_token="e")
    student.generation_config = GenerationConfig(eos_token_id=[2, 1])
    teacher.generation_config = GenerationConfig(eos_token_id=[1, 5])
    shared = SharedVocabulary.of_pair(student, teacher, student_tokenizer, teacher_tokenizer)
    assert (shared.size, shared.stop_ids) == (6, [2, 1, 3, 5, 4])
    assert SharedVocabulary.of_pair(student, teacher, student_tokenizer).stop_ids == [2, 1, 3, 5]
    # A student that says so itself, as a saved one does, makes the same pair again.
    student.generation_config.eos_token_id = shared.stop_ids
    assert SharedVocabulary.of_pair(student, teacher, student_tokenizer, teacher_tokenizer) == shared
    with pytest.raises(ValueError, match=r"teacher's head has 5 rows .* up to 5"):
        SharedVocabulary.of_pair(student, tiny_llama(5, seed=3), student_tokenizer)
    with pytest.raises(ValueError, match="no end-of-sequence id"):
        SharedVocabulary.of_pair(student, tiny_pair.teacher, student_tokenizer)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor")
def test_head_rows_of_a_model_that_torch_has_quantised() -> None:
    """The weight of its layers is a method. The head is padded beyond what the configuration says."""
    model = tiny_llama(8, seed=1).float()
    model.config.vocab_size = 6
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.get_output_embeddings().weight, Tensor)
    assert head_rows(quantised) == 8
    quantised.set_output_embeddings(torch.nn.Identity())
    assert head_rows(quantised) == 6


def test_head_rows_and_stop_ids_of_a_model(tiny_pair: TinyPair) -> None:
    model = tiny_pair.teacher
    assert head_rows(model) == 8
    with pytest.raises(ValueError, match="end-of-sequence"):
        stop_token_ids(model)
    words = tokenizer({"a": 0, "b": 1, "c": 2, "<end>": 3}, eos_token="<end>")
    assert stop_token_ids(model, words) == [3]
    original = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=[5, 2])
        assert stop_token_ids(model) == [5, 2]
        assert stop_token_ids(model, words) == [5, 2, 3]
    finally:
        model.generation_config = original


# ---- log-probabilities ----


def after_one_likely_token(size: int, rows: int) -> Tensor:
    """One token that takes nearly everything, and a long tail: added up in order, the tail is rounded away."""
    logits = 0.01 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    logits[:, 0] += 17.0
    return logits.float()


@pytest.mark.parametrize("size", [256, 257, 151_936])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_log_probabilities_are_as_exact_as_their_dtype(size: int, shape: tuple[int, ...]) -> None:
    logits = after_one_likely_token(size, math.prod(shape)).reshape(*shape, size)
    exact = log_normalise(logits.numpy())
    # Log-probabilities near -17, and a sum of blocks of 256 terms in at least four lanes.
    tolerance = torch.finfo(torch.float32).eps / 2 * (4 * 18 + 256 / 4)
    assert np.abs(log_probs(logits).double().numpy() - exact).max() <= tolerance
    learnt = logits.clone().requires_grad_()
    log_probs(learnt)[..., 5].sum().backward()
    expected = -np.exp(exact)
    expected[..., 5] += 1
    assert learnt.grad is not None
    assert np.abs(learnt.grad.double().numpy() - expected).max() <= tolerance


def test_the_laws_of_policies_sum_to_one_over_a_long_tail() -> None:
    student, teacher = log_probs(after_one_likely_token(151_936, 1)), log_probs(after_one_likely_token(151_936, 1))
    for policy in (TemperaturePolicy(0.9), SKDPolicy(25, 0.6)):
        total = policy.target(student, teacher).log_probs.double().exp().sum(-1).log()
        assert float(total) == pytest.approx(0.0, abs=torch.finfo(torch.float32).eps / 2 * (4 * 18 + 256 / 4))


@pytest.mark.parametrize("stops", [2, np.int64(2), torch.tensor(2), [2], np.array([2]), (torch.tensor(2),)], ids=repr)
def test_stop_ids_may_be_integers_of_any_kind(stops: Any) -> None:
    assert SharedVocabulary.of([5, 4], stops, stops).stop_ids == [2]
