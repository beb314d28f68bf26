"""Targets beside Veto: values and gradients by definition, and that layout, chunks and precision change neither.

The reference is float64 with gradients by finite differences (`reference.losses`); the weights of importance-weighted
distillation are also held to TRL's.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import losses as reference
from reference.distributions import entropy, kl, log_normalise
from torch import Tensor, nn

from trb.losses import (
    EntropyAware,
    Loss,
    PrefixWeighted,
    ReliableRegion,
    ReverseKL,
    Supervised,
    TokenBatch,
    TokenImportance,
    Veto,
)
from trb.losses.terms import Rows, TokenMetrics
from trb.vocab import SharedVocabulary, align

V = 9
LENGTHS = [4, 1, 0, 5]
N = sum(LENGTHS)
LOSSES: dict[str, Loss] = {
    "eopd": EntropyAware(4, 1.2, 3),
    "tip": TokenImportance(4, 0.5),
    "tropd": ReliableRegion(4, 3),
    "iw": PrefixWeighted(4, 0.7),
}


def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def batch_of(student: Tensor, teacher: Tensor, **changes: Any) -> TokenBatch:
    """The logits themselves as hidden states, in sequences of `LENGTHS`."""
    values: dict[str, Any] = {"tokens": torch.arange(len(student)) * 5 % student.shape[-1]}
    values["lengths"] = torch.tensor(LENGTHS) if len(student) == N else None
    return TokenBatch(student, teacher, nn.Identity(), nn.Identity(), **{**values, **changes})


def found(loss: Loss, batch: TokenBatch) -> tuple[float, np.ndarray]:
    leaf = batch.student_hidden.detach().clone().requires_grad_()
    value, _ = loss(replace(batch, student_hidden=leaf))
    (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient.double().numpy()


def seen(batch: TokenBatch) -> TokenMetrics:
    with torch.no_grad():
        return ReverseKL(4)(batch)[1]


def defined(tokenwise: Sequence[Callable[[np.ndarray], float]], at: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over tokens of losses by the logits there, and its gradient."""

    def mean(x: np.ndarray) -> float:
        return sum(f(row) for f, row in zip(tokenwise, x, strict=True)) / len(x)

    return mean(at), reference.central_difference(mean, at)


def times(weight: float, objective: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    return lambda x: weight * objective(x) if weight else 0.0


def plus(one: Callable[[np.ndarray], float], other: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    return lambda x: one(x) + other(x)


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("teacher", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", [*LOSSES.values(), ReverseKL(4), ReverseKL(0), EntropyAware(0, 0.5, 0)], ids=repr)
def test_a_teacher_may_be_wider_or_narrower_than_its_student(
    loss: Loss, student: torch.dtype, teacher: torch.dtype
) -> None:
    """Against both in float64, from the rounded logits; the gradient comes back in the student's precision."""
    one, other = logits(1, N, V).to(student), logits(2, N, V).to(teacher)
    value, gradient = found(loss, batch_of(one, other))
    exact, slope = found(loss, batch_of(one.double(), other.double()))
    assert value == pytest.approx(exact, rel=1e-5)
    step = torch.finfo(student).eps * np.abs(slope).max() + 1e-6
    assert np.abs(gradient - slope).max() <= step


def per_sequence(values: Sequence[float]) -> list[list[float]]:
    ends = np.cumsum(LENGTHS)
    return [list(values[end - length : end]) for end, length in zip(ends, LENGTHS, strict=True)]


# ---- by definition ----


@pytest.mark.parametrize("k", [1, 3, V - 1, V + 4, 0])
@pytest.mark.parametrize("forward_k", [1, 4, V, 0])
def test_entropy_aware_is_the_definition(k: int, forward_k: int) -> None:
    student, teacher = logits(0, N, V), logits(1, N, V, scale=1.5)
    entropies = entropy(log_normalise(teacher))
    threshold = float(np.median(entropies))
    parts = [
        reference.entropy_aware_objective(p.numpy(), q.numpy(), k, threshold, forward_k)
        for p, q in zip(student, teacher, strict=True)
    ]
    value, gradient = found(EntropyAware(k, threshold, forward_k), batch_of(student, teacher))
    expected, numeric = defined(parts, student.numpy())
    assert value == pytest.approx(expected, rel=1e-9)
    assert gradient == pytest.approx(numeric, abs=1e-9)
    always, never = (found(EntropyAware(k, tau, forward_k), batch_of(student, teacher))[0] for tau in (0.0, 9.0))
    assert never < value < always
    assert never == found(ReverseKL(k), batch_of(student, teacher))[0]


@pytest.mark.parametrize("k", [1, 3, V, 0])
@pytest.mark.parametrize("forward_k", [1, 4, V, 0])
def test_reliable_region_is_the_definition(k: int, forward_k: int) -> None:
    student, teacher = logits(2, N, V), logits(3, N, V)
    batch = batch_of(student, teacher)
    parts, shares = [], []
    for p, q, x in zip(student.numpy(), teacher.numpy(), batch.tokens.tolist(), strict=True):
        m = reference.reliability(p, q, x)
        shares.append(m)
        reverse, forward = reference.reverse_objective(p, q, k), reference.forward_objective(q, forward_k)
        parts.append(plus(times(m, reverse), times(1 - m, forward)))
    assert 1.0 in shares and min(shares) < 0.5
    value, gradient = found(ReliableRegion(k, forward_k), batch)
    expected, numeric = defined(parts, student.numpy())
    assert value == pytest.approx(expected, rel=1e-9)
    assert gradient == pytest.approx(numeric, abs=1e-9)


def test_the_reliable_region_is_the_mean_over_all_draws() -> None:
    """Every token x the student may draw, and both values of M: Σ_x p(x) Σ_M P(M | x) of the drawn loss's gradient."""
    student, teacher = logits(4, 1, V), logits(5, 1, V)
    p, q = np.exp(log_normalise(student))[0], np.exp(log_normalise(teacher))[0]
    drawn = {
        1: found(ReverseKL(4), batch_of(student, teacher))[1],
        0: reference.central_difference(reference.forward_objective(teacher[0].numpy(), 3), student[0].numpy())[None],
    }
    by_draws, ours = np.zeros((1, V)), np.zeros((1, V))
    for x in range(V):
        kept = min(1.0, q[x] / p[x])
        by_draws += p[x] * sum(chance * drawn[m] for m, chance in ((1, kept), (0, 1 - kept)))
        ours += p[x] * found(ReliableRegion(4, 3), batch_of(student, teacher, tokens=torch.tensor([x])))[1]
    assert ours == pytest.approx(by_draws, abs=1e-9)
    assert np.abs(drawn[1] - drawn[0]).max() > 1e-2


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.5, 0.8])
def test_important_tokens_are_the_definition(share: float) -> None:
    student, teacher = logits(6, N, V), logits(7, N, V)
    log_p, log_q = log_normalise(student), log_normalise(teacher)
    entropies, divergences = per_sequence(entropy(log_p)), per_sequence(kl(log_p, log_q))
    weights, chosen, start = np.zeros(N), [], 0
    for h, d in zip(entropies, divergences, strict=True):
        kept = reference.important(h, d, share) if h else []
        weights[[start + t for t in kept]] = len(h) / max(1, len(kept))
        chosen.append(kept)
        start += len(h)
    assert weights.sum() == pytest.approx(N)
    assert [len(kept) for kept in chosen] == [math.ceil(round(share * length, 9)) for length in LENGTHS]
    parts = [
        times(w, reference.reverse_objective(p.numpy(), q.numpy(), 4))
        for w, p, q in zip(weights, student, teacher, strict=True)
    ]
    value, gradient = found(TokenImportance(4, share), batch_of(student, teacher))
    expected, numeric = defined(parts, student.numpy())
    assert value == pytest.approx(expected, rel=1e-9)
    assert gradient == pytest.approx(numeric, abs=1e-9)
    assert ((gradient != 0).any(-1) == (weights > 0)).all()


def test_a_share_of_all_tokens_and_no_weighting_are_the_reverse_kl() -> None:
    batch = batch_of(logits(0, N, V), logits(1, N, V))
    expected = found(ReverseKL(4), batch)
    for loss in (TokenImportance(4, 1.0), PrefixWeighted(4, 0.0)):
        value, gradient = found(loss, batch)
        assert value == pytest.approx(expected[0], rel=1e-14)
        assert gradient == pytest.approx(expected[1], rel=1e-14)
    trusted = batch_of(batch.student_hidden, batch.teacher_hidden)
    gap = log_normalise(trusted.teacher_hidden) - log_normalise(trusted.student_hidden)
    trusted = replace(trusted, tokens=torch.tensor(gap.argmax(-1)))  # tokens that the teacher likes better
    assert found(ReliableRegion(4, 3), trusted)[0] == expected[0]


def test_of_tokens_that_matter_alike_the_earlier_are_kept() -> None:
    student, teacher = logits(0, 1, V).repeat(6, 1), logits(1, 1, V).repeat(6, 1)
    _, gradient = found(TokenImportance(0, 0.5), batch_of(student, teacher))
    assert (gradient != 0).any(-1).tolist() == [True] * 3 + [False] * 3


def test_a_share_of_a_whole_number_of_tokens_is_that_number() -> None:
    """0.07 * 100 is 7.000000000000001 in floating point."""
    for length, share, count in ((100, 0.07, 7), (30, 0.1, 3), (3, 0.7, 3), (11, 1e-6, 1), (1, 0.5, 1), (7, 1.0, 7)):
        batch = batch_of(logits(0, length, V), logits(1, length, V))
        kept, weights = TokenImportance(4, share).kept(batch, seen(batch))
        assert len(kept) == count
        assert float(weights.sum()) == pytest.approx(length)


def test_prefix_weights_are_the_definition() -> None:
    student, teacher = logits(8, N, V), logits(9, N, V)
    batch = batch_of(student, teacher)
    rows = np.arange(N), batch.tokens.numpy()
    gaps = per_sequence(log_normalise(teacher)[rows] - log_normalise(student)[rows])
    weights = [w for sequence in gaps for w in reference.prefix_weights(sequence, 0.7)]
    assert weights[0] == weights[4] == weights[5] == 1.7
    assert 1 < min(weights) < 1.4
    parts = [
        times(w, reference.reverse_objective(p.numpy(), q.numpy(), 4))
        for w, p, q in zip(weights, student, teacher, strict=True)
    ]
    value, gradient = found(PrefixWeighted(4, 0.7), batch)
    expected, numeric = defined(parts, student.numpy())
    assert value == pytest.approx(expected, rel=1e-9)
    assert gradient == pytest.approx(numeric, abs=1e-9)
    as_one = found(PrefixWeighted(4, 0.7), replace(batch, lengths=None))[0]
    assert as_one != pytest.approx(value, rel=1e-3)


def test_prefix_weights_are_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's are read off the gradient of its loss by the logit of each completion token: -w a (1 - p) / N."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    student, teacher = logits(10, N, V, scale=1.0), logits(11, N, V, scale=1.0)
    batch = batch_of(student, teacher)
    width = max(LENGTHS)
    rows = [(b, t) for b, length in enumerate(LENGTHS) for t in range(length)]
    at = tuple(torch.tensor(index) for index in zip(*rows, strict=True))
    padded = torch.zeros(len(LENGTHS), width, V, dtype=torch.float64).index_put(at, student).requires_grad_()
    tokens = torch.zeros(len(LENGTHS), width, dtype=torch.long).index_put(at, batch.tokens)
    labels = torch.full_like(tokens, -100).index_put(at, batch.tokens)
    of_token = torch.log_softmax(teacher, -1).gather(-1, batch.tokens[:, None]).squeeze(-1)
    log_teacher = torch.zeros(len(LENGTHS), width, dtype=torch.float64).index_put(at, of_token)
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=0.7,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    value = trl.IWOPDTrainer._compute_iw_opd_loss(trainer, padded, tokens, labels, log_teacher)
    (gradient,) = torch.autograd.grad(value, padded)
    log_student = torch.log_softmax(student, -1).gather(-1, batch.tokens[:, None]).squeeze(-1)
    own = gradient[at].gather(-1, batch.tokens[:, None]).squeeze(-1)
    theirs = -N * own / ((of_token - log_student) * (1 - log_student.exp()))
    ours = PrefixWeighted(4, 0.7).weights(batch, seen(batch))
    assert ours.numpy() == pytest.approx(theirs.numpy(), rel=1e-9)
    assert trainer._metrics["train"]["iw_opd/min_weight"] == [pytest.approx(float(ours.min()))]


# ---- what all have in common ----


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_two_equal_laws_have_nothing_to_learn(name: str, dtype: torch.dtype) -> None:
    laws = logits(0, N, V).to(dtype)
    for loss in (LOSSES[name], EntropyAware(0, 0.0, 0), EntropyAware(1, 0.0, 1)):
        value, gradient = found(loss, batch_of(laws, laws.clone()))
        assert value == pytest.approx(0.0, abs=1e-6)
        assert np.abs(gradient).max() <= (1e-6 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6), st.integers(0, V + 2), st.floats(0.01, 30.0), st.sets(st.integers(0, V - 1), max_size=V - 1)
)
def test_property_never_below_nothing_and_gradients_sum_to_nothing(
    name: str, seed: int, k: int, scale: float, impossible: set[int]
) -> None:
    """Also with tokens that neither law allows (folded stop ids), whatever the completion holds."""
    student, teacher = logits(seed, N, V, scale=scale), logits(seed + 1, N, V, scale=scale)
    student[:, [*impossible]] = teacher[:, [*impossible]] = -math.inf
    loss = replace(LOSSES[name], top_k=k)  # type: ignore[type-var]
    if name in ("eopd", "tropd"):
        loss = replace(loss, forward_top_k=(3 * k) % (V + 2))
    allowed = [token for token in range(V) if token not in impossible]
    batch = batch_of(student, teacher, tokens=torch.tensor([allowed[n % len(allowed)] for n in range(N)]))
    value, gradient = found(loss, batch)
    if k < V - len(impossible):  # beyond, the support holds what no law allows
        assert value >= -1e-9
        assert np.isfinite(gradient).all()
    assert np.abs(np.nan_to_num(gradient).sum(-1)).max() < 1e-9
    assert (gradient[:, [*impossible]] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [1, 3, V, 0])
def test_what_the_student_never_draws(name: str, k: int) -> None:
    """Where both forbid it, it changes nothing; one law that is a single token is a limit like any other."""
    student, teacher = logits(0, N, V), logits(1, N, V)
    loss = replace(LOSSES[name], top_k=k)  # type: ignore[type-var]
    wider = torch.full((N, V + 2), -math.inf, dtype=torch.float64)
    tokens = torch.arange(N) % V
    both = wider.clone(), wider.clone()
    both[0][:, :V], both[1][:, :V] = student, teacher
    value, gradient = found(loss, batch_of(*both, tokens=tokens))
    expected = found(loss, batch_of(student, teacher, tokens=tokens))
    assert value == pytest.approx(expected[0], rel=1e-12)
    assert gradient[:, :V] == pytest.approx(expected[1], rel=1e-9, abs=1e-14)
    one_hot = torch.full_like(student, -math.inf)
    one_hot[torch.arange(N), tokens] = 0.0
    value, gradient = found(loss, batch_of(one_hot, teacher, tokens=tokens))
    assert np.isfinite(gradient).all()
    value, gradient = found(loss, batch_of(one_hot, one_hot.clone(), tokens=tokens))
    assert value == 0
    assert (gradient == 0).all()


def test_where_the_teacher_forbids_the_token_only_the_forward_kl_is_left() -> None:
    """The reverse KL is infinite there; 0 times infinity must not be NaN."""
    student, teacher = logits(0, 3, V), logits(1, 3, V)
    token = torch.tensor([int(student[0].argmax()), 1, 2])
    teacher[0, token[0]] = -math.inf
    assert math.isinf(found(ReverseKL(4), batch_of(student[:1], teacher[:1]))[0])
    value, gradient = found(ReliableRegion(4, 3), batch_of(student[:1], teacher[:1], tokens=token[:1]))
    objective = reference.forward_objective(teacher[0].numpy(), 3)
    assert value == pytest.approx(objective(student[0].numpy()), rel=1e-9)
    assert gradient[0] == pytest.approx(reference.central_difference(objective, student[0].numpy()), abs=1e-9)
    batch = batch_of(student, teacher, tokens=token)
    assert PrefixWeighted(4, 0.5).weights(batch, seen(batch)).tolist() == [1.5, 1.0, 1.0]


def test_a_token_of_infinite_or_unknown_divergence_is_kept() -> None:
    """So that a step with one is seen to be one; beside NaN, the others are chosen by what is known of them."""
    for seed, bad in ((seed, bad) for seed in range(20) for bad in (-math.inf, math.nan)):
        student, teacher = logits(2 * seed, 6, V), logits(2 * seed + 1, 6, V)
        broken = teacher.clone()
        broken[4, int(student[4].argmax())] = bad
        batch = batch_of(student, broken)
        kept, _ = TokenImportance(4, 0.5).kept(batch, seen(batch))
        assert 4 in kept.tolist()
        assert not math.isfinite(found(TokenImportance(4, 0.5), batch)[0])
        divergences = kl(log_normalise(student), log_normalise(teacher)).tolist()
        divergences[4] = max(divergences[:4] + divergences[5:])  # as far as it goes
        expected = reference.important(entropy(log_normalise(student)).tolist(), divergences, 0.5)
        assert kept.tolist() == expected or bad == -math.inf


def test_two_models_that_agree_are_weighed_alike() -> None:
    laws = logits(0, N, V)
    batch = batch_of(laws, laws.clone())
    assert PrefixWeighted(4, 0.5).weights(batch, seen(batch)).tolist() == [1.5] * N


@pytest.mark.parametrize("name", LOSSES)
def test_ties_are_broken_somehow(name: str) -> None:
    """Uniform laws: which tokens are a top-k is anybody's choice, that nothing is to be learnt is not."""
    student, teacher = torch.zeros(N, V, dtype=torch.float64), torch.zeros(N, V, dtype=torch.float64)
    value, gradient = found(LOSSES[name], batch_of(student, teacher))
    assert value == pytest.approx(0.0, abs=1e-15)
    assert np.abs(gradient).max() < 1e-15


# ---- from hidden states ----


def problem(dtype: torch.dtype = torch.float64, **changes: Any) -> TokenBatch:
    torch.manual_seed(0)
    heads = nn.Linear(6, V).to(dtype), nn.Linear(4, V + 2).to(dtype)
    for head in heads:
        nn.init.normal_(head.weight)
    student, teacher = (
        logits(seed, N, width, scale=1.0).to(dtype).requires_grad_() for seed, width in ((0, 6), (1, 4))
    )
    values: dict[str, Any] = {
        "tokens": torch.arange(N) % V,
        "vocabulary": SharedVocabulary.of([V, V + 2], 2, [5, 7]),
        "lengths": torch.tensor(LENGTHS),
    }
    return TokenBatch(student, teacher, *heads, **{**values, **changes})


def gradients(value: Tensor, batch: TokenBatch) -> list[np.ndarray]:
    learnt = [batch.student_hidden, *batch.student_head.parameters()]
    return [x.double().numpy() for x in torch.autograd.grad(value, learnt)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_heads_temperature_and_stop_ids(name: str, temperature: float) -> None:
    """As on materialised logits, tempered, then folded to shared events."""
    loss, batch = LOSSES[name], problem(temperature=temperature)
    student, teacher = align(
        batch.student_head(batch.student_hidden) / temperature,
        batch.teacher_head(batch.teacher_hidden) / temperature,
        2,
        [5, 7],
    )
    assert batch.vocabulary is not None
    plain, _ = loss(batch_of(student, teacher.detach(), tokens=batch.vocabulary.events(batch.tokens)))
    expected = gradients(plain, batch)
    for chunk_tokens in (1, 2, 3, 1024):
        value, metrics = loss(replace(batch, chunk_tokens=chunk_tokens))
        assert float(value.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
        for one, other in zip(gradients(value, batch), expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9, abs=1e-14)
            assert np.abs(other).max() > 1e-3
        assert {len(column) for column in vars(metrics).values()} == {N}
        reverse = ReverseKL(4)(batch)[1]
        assert torch.allclose(metrics.reverse_kl, reverse.reverse_kl)
        assert torch.allclose(metrics.support_mass, reverse.support_mass)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(name: str) -> None:
    """However completions are laid out over micro-batches: all at once, or one at a time."""
    loss, batch = LOSSES[name], problem()
    whole, _ = loss(batch)
    parts, start = [], 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        part = replace(
            batch,
            student_hidden=batch.student_hidden[rows],
            teacher_hidden=batch.teacher_hidden[rows],
            tokens=batch.tokens[rows],
            lengths=torch.tensor([length]),
            normaliser=torch.tensor(float(N)),
        )
        parts.append(loss(part)[0])
        start += length
    total = torch.stack(parts).sum()
    assert float(total.detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
    for one, other in zip(gradients(total, batch), gradients(whole, batch), strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_logits(name: str) -> None:
    student, teacher = logits(0, N, V).bfloat16(), logits(1, N, V).bfloat16()
    value, gradient = found(LOSSES[name], batch_of(student, teacher))
    expected, exact = found(LOSSES[name], batch_of(student.double(), teacher.double()))
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradient == pytest.approx(exact, abs=1e-6, rel=2 * torch.finfo(torch.bfloat16).eps)
    loss, _ = LOSSES[name](batch_of(student, teacher))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(("name", "projected"), [("eopd", N), ("tropd", N), ("tip", N + 6), ("iw", 2 * N)])
def test_no_more_than_a_chunk_is_ever_projected(name: str, projected: int) -> None:
    batch = problem(chunk_tokens=3)
    seen: dict[nn.Module, list[int]] = {}
    for head in (batch.student_head, batch.teacher_head):
        head.register_forward_hook(lambda head, inputs, _: seen.setdefault(head, []).append(len(inputs[0])))
    LOSSES[name](batch)
    assert [sum(counts) for counts in seen.values()] == [projected] * 2
    assert max(max(counts) for counts in seen.values()) <= 3


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens_cost_nothing_and_take_part_in_the_backward_pass(name: str) -> None:
    for lengths in (torch.tensor([0, 0]), None):
        batch = problem()
        head = batch.student_head
        assert isinstance(head, nn.Linear)
        hidden = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
        empty = replace(
            batch,
            student_hidden=hidden,
            teacher_hidden=batch.teacher_hidden[:0],
            tokens=batch.tokens[:0],
            lengths=lengths,
            normaliser=5.0,
        )
        value, metrics = LOSSES[name](empty)
        value.backward()
        assert value == 0
        assert head.weight.grad is not None and (head.weight.grad == 0).all()
        assert metrics.reverse_kl.shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient_and_none_is_sought_without_need(name: str) -> None:
    batch = problem()
    LOSSES[name](batch)[0].backward()
    assert batch.teacher_hidden.grad is None
    with torch.no_grad():
        assert not LOSSES[name](batch)[0].requires_grad


def test_refusals() -> None:
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"^share must be .*{share}"):
            TokenImportance(4, share)
    for make in (ReverseKL, Veto, Supervised, *map(type, LOSSES.values())):
        with pytest.raises(ValueError, match=r"^top_k must be at least 0 \(0 means the full vocabulary\), got -5"):
            make(-5)
        with pytest.raises(ValueError, match=r"^top_k must be a whole number, got 2\.5"):
            make(2.5)
    for make in (EntropyAware, ReliableRegion):
        with pytest.raises(ValueError, match=r"^forward_top_k must be at least 0 .*, got -1"):
            make(forward_top_k=-1)
    for make, name in ((EntropyAware, "threshold"), (PrefixWeighted, "gamma"), (Veto, "strength")):
        for value in (-3, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be at least 0, got {float(value)}"):
                make(**{name: value})
    law = torch.zeros(1, V)
    with pytest.raises(ValueError, match="tokens of the completions"):
        ReliableRegion().terms(Rows.of(law, law))
