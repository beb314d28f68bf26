"""The reverse KL on the student's top-k: values, gradients, and every known way to get it wrong.

Values and gradients are held to a float64 reference whose gradients are finite differences. Each trap is a
test in which the right loss passes an assertion and the wrong one, written beside it, fails that assertion.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import losses as reference
from reference.distributions import entropy, kl, log_normalise, shared_events
from torch import Tensor, nn

from trb.losses import chunked_reverse_kl, topk_reverse_kl, veto_target
from trb.losses.chunked import chunked_cross_entropy
from trb.vocab import SharedVocabulary, align

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]
B, T, V = 3, 5, 9


def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def ragged_mask() -> Tensor:
    """A prompt of one token in every row, completions of 4, 2 and 1 tokens, then padding."""
    return torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]])


def gradient(loss: Loss, student: Tensor, teacher: Tensor, mask: Tensor, k: int) -> np.ndarray:
    leaf = student.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf, teacher, mask, k), leaf)
    return result.numpy()


def token_gradient(loss: Loss, student: Tensor, teacher: Tensor, k: int) -> np.ndarray:
    """Gradient at a single prefix."""
    return gradient(loss, student[None], teacher[None], torch.ones(1), k)[0]


# --- value and gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4, V - 1, V, V + 7, 0])
def test_value_and_gradient_are_those_of_the_definition(k: int) -> None:
    student, teacher, mask = logits(0, B, T, V), logits(1, B, T, V), ragged_mask()
    value = topk_reverse_kl(student, teacher, mask, k)
    assert value.shape == ()
    assert float(value) == pytest.approx(reference.reverse_kl(student, teacher, mask, k), rel=1e-10)
    objective = reference.mean_objective(student, teacher, mask, k)
    numeric = reference.central_difference(objective, student)
    ours = gradient(topk_reverse_kl, student, teacher, mask, k)
    assert ours == pytest.approx(numeric, abs=1e-9)
    assert np.abs(numeric).max() > 1e-2


@pytest.mark.parametrize("k", [1, 3, V])
def test_gradient_is_the_weighted_sum_of_score_functions(k: int) -> None:
    """sum over S of w (lS - lT) grad log pi, w = p / Z_S: the form in which the method states it."""
    for seed in range(5):
        student, teacher = logits(2 * seed, V), logits(2 * seed + 1, V)
        expected = reference.score_gradient(student, teacher, k)
        assert token_gradient(topk_reverse_kl, student, teacher, k) == pytest.approx(expected, abs=1e-12)


def test_the_full_vocabulary_gives_the_reverse_kl() -> None:
    student, teacher, mask = logits(0, B, T, V), logits(1, B, T, V), ragged_mask()
    tokenwise = kl(log_normalise(student), log_normalise(teacher))
    expected = tokenwise[mask.numpy() == 1].mean()
    for value in (
        topk_reverse_kl(student, teacher, mask, k=V),
        topk_reverse_kl(student, teacher, mask, k=0),
        topk_reverse_kl(student, teacher, mask),  # 16 > V
    ):
        assert float(value) == pytest.approx(float(expected), rel=1e-12)
    backwards = kl(log_normalise(teacher), log_normalise(student))[mask.numpy() == 1].mean()
    assert abs(float(expected) - float(backwards)) > 0.1  # the other direction would have failed


def test_default_support_is_sixteen() -> None:
    student, teacher, mask = logits(0, 2, 3, 40), logits(1, 2, 3, 40), torch.ones(2, 3)
    assert float(topk_reverse_kl(student, teacher, mask)) == float(topk_reverse_kl(student, teacher, mask, k=16))
    assert float(topk_reverse_kl(student, teacher, mask)) != float(topk_reverse_kl(student, teacher, mask, k=17))


def test_gradcheck_over_the_full_vocabulary() -> None:
    student, teacher, mask = logits(0, 2, 3, 5).requires_grad_(), logits(1, 2, 3, 5), torch.ones(2, 3)
    assert torch.autograd.gradcheck(lambda x: topk_reverse_kl(x, teacher, mask, k=0), (student,))
    assert torch.autograd.gradcheck(lambda x: topk_reverse_kl(x.softmax(-1), teacher, mask, k=5), (student,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_logits(dtype: torch.dtype) -> None:
    """Computed in float32 whatever the logits: as exact as they are, not as bf16 arithmetic is."""
    student, teacher = logits(0, B, T, V).to(dtype), logits(1, B, T, V).to(dtype)
    value = topk_reverse_kl(student, teacher, ragged_mask(), 4)
    assert value.dtype == torch.float32
    expected = reference.reverse_kl(student.double(), teacher.double(), ragged_mask(), 4)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    leaf = student.clone().requires_grad_()
    topk_reverse_kl(leaf, teacher, ragged_mask(), 4).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    exact = gradient(topk_reverse_kl, student.double(), teacher.double(), ragged_mask(), 4)
    assert leaf.grad.double().numpy() == pytest.approx(exact, abs=1e-6, rel=2 * torch.finfo(dtype).eps)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(0, B, T, V).requires_grad_(), logits(1, B, T, V).requires_grad_()
    topk_reverse_kl(student, teacher, ragged_mask(), 4).backward()
    assert student.grad is not None
    assert teacher.grad is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0.01, 30.0))
def test_property_every_prefix_costs_at_least_nothing(seed: int, k: int, scale: float) -> None:
    student, teacher = logits(seed, 2, V, scale=scale)
    value = topk_reverse_kl(student[None], teacher[None], torch.ones(1), k)
    assert value >= -1e-12
    shifted = topk_reverse_kl(student[None] + 7.0, teacher[None] - 3.0, torch.ones(1), k)
    assert float(shifted) == pytest.approx(float(value), rel=1e-9, abs=1e-12)


def test_impossible_tokens() -> None:
    """Tokens impossible for the student, or for both (folded stop ids), leave everything finite."""
    student, teacher = logits(0, 4, V), logits(1, 4, V)
    student[:, [2, 5]], teacher[:, [5]] = -math.inf, -math.inf
    for k in (1, V - 2, V - 1, 0):
        value = topk_reverse_kl(student, teacher, torch.ones(4), k)
        grad = gradient(topk_reverse_kl, student, teacher, torch.ones(4), k)
        assert np.isfinite(grad).all()
        assert (grad[:, [2, 5]] == 0).all()
        if k in (1, 0):
            assert float(value) == pytest.approx(reference.reverse_kl(student, teacher, torch.ones(4), k), rel=1e-9)


@pytest.mark.parametrize("unlikely", [-math.inf, -2000.0])
@pytest.mark.parametrize("k", [1, 3, V - 2, V, 0])
@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_what_the_student_never_draws_costs_nothing_where_the_teacher_forbids_it(
    unlikely: float, k: int, strength: float
) -> None:
    """Also where it is e^log π that underflows: plain and chunked, against the teacher and against Veto's target."""
    student, teacher, mask = logits(0, B, T, V), logits(1, B, T, V), ragged_mask()
    student[..., [2, 5]], teacher[..., 5] = unlikely, -math.inf
    target = reference.veto_target(student, teacher, strength) if strength else teacher.numpy()
    expected = reference.reverse_kl(student, target, mask, k)
    with np.errstate(invalid="ignore"):
        numeric = reference.central_difference(reference.mean_objective(student, target, mask, k), student)
    numeric[..., [2, 5]] = 0.0  # the difference of two infinities, where the logit is one
    plain = student.clone().requires_grad_()
    in_chunks = student.clone().requires_grad_()
    values = (
        topk_reverse_kl(plain, veto_target(plain, teacher, strength), mask, k),
        chunked_reverse_kl(
            in_chunks, teacher, nn.Identity(), nn.Identity(), torch.zeros(B, T, dtype=torch.long), mask,
            k=k, veto_strength=strength, chunk_tokens=3,
        )[0],
    )  # fmt: skip
    for value, leaf in zip(values, (plain, in_chunks), strict=True):
        assert float(value.detach()) == pytest.approx(expected, rel=1e-9)
        (found,) = torch.autograd.grad(value, leaf)
        assert found.numpy() == pytest.approx(numeric, abs=1e-9)
        assert found.abs().max() > 1e-2


def test_refusals() -> None:
    x, mask = torch.zeros(2, 3, 5), torch.ones(2, 3)
    with pytest.raises(ValueError, match="-1"):
        topk_reverse_kl(x, x, mask, k=-1)
    for k in (2.5, None, "3"):
        with pytest.raises(ValueError, match=f"^k must be a whole number, got {k!r}"):
            topk_reverse_kl(x, x, mask, k=k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"5.*6|align"):
        topk_reverse_kl(x, torch.zeros(2, 3, 6), mask)
    with pytest.raises(ValueError, match="mask"):
        topk_reverse_kl(x, x, torch.ones(2, 4))


# --- known ways to get it wrong -----------------------------------------------------------------


def log_pair(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    chosen = mask != 0
    return torch.log_softmax(student[chosen], -1), torch.log_softmax(teacher[chosen], -1)


def on_support(student: Tensor, teacher: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    log_p, log_q = log_pair(student, teacher, mask)
    ids = log_p.topk(k, -1).indices
    return log_p.gather(-1, ids), log_q.gather(-1, ids)


def naive(student: Tensor, teacher: Tensor, mask: Tensor, k: int) -> Tensor:
    """sum over S of p log(p / q), differentiated as it stands."""
    log_p, log_q = on_support(student, teacher, mask, k)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) / log_p.exp().sum(-1).detach()).mean()


def renormalised(student: Tensor, teacher: Tensor, mask: Tensor, k: int) -> Tensor:
    """KL between the two models conditioned on the support."""
    log_p, log_q = (torch.log_softmax(x, -1) for x in on_support(student, teacher, mask, k))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def clamped(student: Tensor, teacher: Tensor, mask: Tensor, k: int) -> Tensor:
    """The truncated KL, kept from going negative."""
    log_p, log_q = on_support(student, teacher, mask, k)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).mean()


def expected_advantage(student: Tensor, teacher: Tensor, mask: Tensor, k: int) -> Tensor:
    """E over the sampled token of sg[top-k KL] log pi(token); the expectation is taken exactly."""
    log_p, _ = log_pair(student, teacher, mask)
    advantage = renormalised(student, teacher, mask, k).detach()
    return (log_p.exp().detach() * advantage * log_p).sum(-1).mean()


def teacher_support(student: Tensor, teacher: Tensor, mask: Tensor, k: int) -> Tensor:
    """The right terms on the teacher's top-k."""
    log_p, log_q = log_pair(student, teacher, mask)
    ids = log_q.topk(k, -1).indices
    log_p, log_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    terms = log_p.exp() * (log_p - log_q) - log_p.exp() + log_q.exp()
    return (terms.sum(-1) / log_p.exp().sum(-1).detach()).mean()


def support_mass_slope(loss: Loss, student: Tensor, teacher: Tensor, k: int) -> float:
    """Rate at which a gradient-descent step changes the student's probability of its own top-k."""
    step = -torch.tensor(token_gradient(loss, student, teacher, k))
    leaf = student.clone().requires_grad_()
    mass = torch.softmax(leaf, -1).topk(k, -1).values.sum()
    (slope,) = torch.autograd.grad(mass, leaf)
    return float(slope @ step)


def test_trap_naive_gradient_pushes_mass_out_of_the_support() -> None:
    """A student equal to its teacher must be left alone; the naive gradient drains its support."""
    student = logits(3, V)

    def leaves_a_perfect_student_alone(loss: Loss) -> bool:
        return bool(np.abs(token_gradient(loss, student, student.clone(), 4)).max() < 1e-12)

    assert leaves_a_perfect_student_alone(topk_reverse_kl)
    assert not leaves_a_perfect_student_alone(naive)
    assert support_mass_slope(naive, student, student.clone(), 4) < -1e-3


def test_trap_renormalising_both_sides_ignores_the_support_mass() -> None:
    """The teacher agrees within the support but puts more mass on it: that mass must be learned."""
    student = logits(4, V, scale=0.5)
    teacher = student.clone()
    teacher[student.topk(4).indices] += 1.5

    def learns_the_support_mass(loss: Loss) -> bool:
        return support_mass_slope(loss, student, teacher, 4) > 1e-2

    assert learns_the_support_mass(topk_reverse_kl)
    assert not learns_the_support_mass(renormalised)
    assert abs(support_mass_slope(renormalised, student, teacher, 4)) < 1e-12


def test_trap_detached_advantage_has_no_expected_gradient() -> None:
    student, teacher = logits(5, V), logits(6, V)

    def teaches_something(loss: Loss) -> bool:
        return bool(np.abs(token_gradient(loss, student, teacher, V)).max() > 1e-2)

    assert teaches_something(topk_reverse_kl)
    assert not teaches_something(expected_advantage)
    assert np.abs(token_gradient(expected_advantage, student, teacher, V)).max() < 1e-12


def test_trap_clamping_a_truncated_kl_silences_it() -> None:
    """Where the teacher likes the support better than the student does, the truncated sum is negative."""
    student = logits(7, V, scale=0.5)
    teacher = student.clone()
    teacher[student.topk(3).indices] += 1.0
    assert float(naive(student[None], teacher[None], torch.ones(1), 3)) < 0
    expected = reference.score_gradient(student, teacher, 3)

    def has_the_gradient(loss: Loss) -> bool:
        return bool(np.allclose(token_gradient(loss, student, teacher, 3), expected, atol=1e-12))

    assert np.abs(expected).max() > 1e-2
    assert has_the_gradient(topk_reverse_kl)
    assert not has_the_gradient(clamped)
    assert (token_gradient(clamped, student, teacher, 3) == 0).all()


def test_trap_a_support_of_one_token() -> None:
    """k = 1: the log-ratio is that of the full vocabulary; renormalised it would be log(1 / 1) = 0."""
    student, teacher = logits(8, V), logits(9, V)

    def learns_from_one_token(loss: Loss) -> bool:
        return bool(np.abs(token_gradient(loss, student, teacher, 1)).max() > 1e-2)

    assert learns_from_one_token(topk_reverse_kl)
    assert not learns_from_one_token(renormalised)
    top = int(student.argmax())
    log_p, log_q = log_normalise(student), log_normalise(teacher)
    expected = (log_p[top] - log_q[top]) * (np.eye(V)[top] - np.exp(log_p))
    assert token_gradient(topk_reverse_kl, student, teacher, 1) == pytest.approx(expected)


def test_trap_support_of_the_wrong_model() -> None:
    student, teacher = logits(10, V), logits(11, V)
    expected = reference.score_gradient(student, teacher, 3)

    def is_on_the_students_support(loss: Loss) -> bool:
        return bool(np.allclose(token_gradient(loss, student, teacher, 3), expected, atol=1e-12))

    assert is_on_the_students_support(topk_reverse_kl)
    assert not is_on_the_students_support(teacher_support)


# --- masks --------------------------------------------------------------------------------------


def test_masked_positions_have_no_say() -> None:
    """Prompt and padding may hold anything, NaN included, and get a gradient of exactly zero."""
    student, teacher, mask = logits(0, B, T, V), logits(1, B, T, V), ragged_mask()
    value, grad = (
        topk_reverse_kl(student, teacher, mask, 4),
        gradient(topk_reverse_kl, student, teacher, mask, 4),
    )
    for garbage in (1e30, math.inf, math.nan):
        dirty_student, dirty_teacher = student.clone(), teacher.clone()
        dirty_student[mask == 0], dirty_teacher[mask == 0] = garbage, garbage
        assert torch.equal(topk_reverse_kl(dirty_student, dirty_teacher, mask, 4), value)
        dirty = gradient(topk_reverse_kl, dirty_student, dirty_teacher, mask, 4)
        assert (dirty == grad).all()
        assert (dirty[mask.numpy() == 0] == 0).all()


def test_trap_token_mean_not_mean_of_rows() -> None:
    """Every unmasked token weighs the same, the last one of the longest row too."""
    student, teacher, mask = logits(0, B, T, V), logits(1, B, T, V), ragged_mask()
    chosen = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]
    single = {at: float(topk_reverse_kl(student[at][None], teacher[at][None], torch.ones(1), 4)) for at in chosen}
    token_mean = sum(single.values()) / len(single)
    row_means = [np.mean([value for (b, _), value in single.items() if b == row]) for row in range(B)]
    assert float(topk_reverse_kl(student, teacher, mask, 4)) == pytest.approx(token_mean, rel=1e-12)
    assert float(np.mean(row_means)) != pytest.approx(token_mean, rel=1e-2)
    without_last = mask.clone()
    without_last[0, 4] = 0
    assert float(topk_reverse_kl(student, teacher, without_last, 4)) != pytest.approx(token_mean, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32], ids=str)
def test_mask_dtypes(dtype: torch.dtype) -> None:
    student, teacher = logits(0, B, T, V), logits(1, B, T, V)
    expected = topk_reverse_kl(student, teacher, ragged_mask(), 4)
    assert torch.equal(topk_reverse_kl(student, teacher, ragged_mask().to(dtype), 4), expected)


@pytest.mark.parametrize("k", [0, 4])
def test_an_empty_mask_costs_nothing(k: int) -> None:
    student = logits(0, B, T, V).requires_grad_()
    value = topk_reverse_kl(student, logits(1, B, T, V), torch.zeros(B, T), k)
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


# --- Veto ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.2, 0.8, 1.0, 3.0])
def test_veto_target_is_the_definition(strength: float) -> None:
    student, teacher = logits(0, B, T, V), logits(1, B, T, V)
    target = veto_target(student, teacher, strength)
    assert target.numpy() == pytest.approx(reference.veto_target(student, teacher, strength), abs=1e-12)


def test_veto_target_is_a_constant_and_zero_strength_is_the_teacher() -> None:
    student, teacher = logits(0, B, T, V).requires_grad_(), logits(1, B, T, V).requires_grad_()
    assert not veto_target(student, teacher, 0.4).requires_grad
    assert torch.equal(veto_target(student, teacher, 0.0), torch.log_softmax(teacher.detach(), -1))


def test_veto_target_with_impossible_tokens() -> None:
    student, teacher = logits(0, 4, V), logits(1, 4, V)
    student[:, 2], teacher[:, 3], student[:, 5], teacher[:, 5] = (-math.inf,) * 4
    target = veto_target(student, teacher, 0.4)
    assert (target[:, [2, 3, 5]] == -math.inf).all()
    assert target.exp().sum(-1).numpy() == pytest.approx(1.0)
    plain = veto_target(student, teacher, 0.0)
    assert plain.numpy() == pytest.approx(log_normalise(teacher))


@pytest.mark.parametrize("strength", [-0.3, math.nan])
def test_bad_veto_strength_is_named(strength: float) -> None:
    with pytest.raises(ValueError, match=str(strength)):
        veto_target(torch.zeros(1, 3), torch.zeros(1, 3), strength)


# --- chunked over tokens, from hidden states ----------------------------------------------------

H_STUDENT, H_TEACHER, ROWS_STUDENT, ROWS_TEACHER = 6, 4, 9, 11


def chunk_problem(dtype: torch.dtype = torch.float64) -> dict:
    torch.manual_seed(0)
    heads = nn.Linear(H_STUDENT, ROWS_STUDENT), nn.Linear(H_TEACHER, ROWS_TEACHER)
    for head in heads:
        nn.init.normal_(head.weight)
    return {
        "student_hidden": logits(0, B, T, H_STUDENT, scale=1.0).to(dtype).requires_grad_(),
        "teacher_hidden": logits(1, B, T, H_TEACHER, scale=1.0).to(dtype).requires_grad_(),
        "student_head": heads[0].to(dtype),
        "teacher_head": heads[1].to(dtype),
        "tokens": torch.arange(B * T).reshape(B, T) % ROWS_STUDENT,
        "mask": ragged_mask(),
        "vocabulary": SharedVocabulary.of([ROWS_STUDENT, ROWS_TEACHER], 2, [5, 7]),
    }


def learnable(problem: dict) -> list[Tensor]:
    return [problem["student_hidden"], *problem["student_head"].parameters()]


def event_logits(problem: dict, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Both models' log-probabilities on shared events, from the reference alone."""
    with torch.no_grad():
        student = problem["student_head"](problem["student_hidden"])
        teacher = problem["teacher_head"](problem["teacher_hidden"])
    with np.errstate(divide="ignore"):
        p, q = shared_events(student.numpy(), teacher.numpy(), 2, [5, 7], temperature)
        return np.log(p), np.log(q)


def plain_loss(problem: dict, k: int, temperature: float, veto_strength: float) -> Tensor:
    """The unchunked loss on materialised logits; they are tempered, then stop ids are folded, as in sampling."""
    student, teacher = align(
        problem["student_head"](problem["student_hidden"]) / temperature,
        problem["teacher_head"](problem["teacher_hidden"]) / temperature,
        2,
        [5, 7],
    )
    target = veto_target(student, teacher, veto_strength)
    return topk_reverse_kl(student, target, problem["mask"], k)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 7, 1024])
@pytest.mark.parametrize(
    ("k", "temperature", "veto_strength"),
    [(4, 1.0, 0.0), (0, 1.0, 0.0), (1, 1.0, 0.5), (4, 0.7, 0.0), (3, 1.3, 0.3)],
)
def test_chunks_change_neither_value_nor_gradients(
    chunk_tokens: int, k: int, temperature: float, veto_strength: float
) -> None:
    problem = chunk_problem()
    value, _ = chunked_reverse_kl(
        **problem, k=k, temperature=temperature, veto_strength=veto_strength, chunk_tokens=chunk_tokens
    )
    expected = plain_loss(problem, k, temperature, veto_strength)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    ours = torch.autograd.grad(value, learnable(problem))
    theirs = torch.autograd.grad(expected, learnable(problem))
    for one, other in zip(ours, theirs, strict=True):
        assert one.numpy() == pytest.approx(other.numpy(), rel=1e-9, abs=1e-14)
        assert other.abs().max() > 1e-3


def test_chunked_value_is_the_definition() -> None:
    for temperature in (1.0, 0.6):
        problem = chunk_problem()
        value, _ = chunked_reverse_kl(**problem, k=4, temperature=temperature, chunk_tokens=3)
        student, teacher = event_logits(problem, temperature)
        expected = reference.reverse_kl(student, teacher, problem["mask"], 4)
        assert float(value.detach()) == pytest.approx(expected, rel=1e-10)


def test_trap_the_loss_at_another_temperature_than_the_sampler() -> None:
    problem = chunk_problem()
    values = [float(chunked_reverse_kl(**problem, temperature=t)[0].detach()) for t in (1.0, 0.7)]
    assert values[0] != pytest.approx(values[1], rel=1e-2)


def test_gradcheck_of_the_chunked_loss() -> None:
    problem = chunk_problem()
    weight, bias = problem["student_head"].weight, problem["student_head"].bias

    def loss(hidden: Tensor, w: Tensor, b: Tensor) -> Tensor:
        class Head:
            def __call__(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, w, b)

            def parameters(self) -> list[Tensor]:
                return [w, b]

        pieces = {**problem, "student_hidden": hidden, "student_head": Head()}
        return chunked_reverse_kl(**pieces, k=0, chunk_tokens=3)[0]

    assert torch.autograd.gradcheck(loss, (problem["student_hidden"], weight, bias))


def test_chunked_in_float32_is_chunk_independent() -> None:
    problem = chunk_problem(torch.float32)
    whole, _ = chunked_reverse_kl(**problem, k=4)
    expected = torch.autograd.grad(whole, learnable(problem))
    for chunk_tokens in (1, 2, 5):
        value, _ = chunked_reverse_kl(**problem, k=4, chunk_tokens=chunk_tokens)
        assert float(value.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
        for one, other in zip(torch.autograd.grad(value, learnable(problem)), expected, strict=True):
            assert one.numpy() == pytest.approx(other.numpy(), rel=1e-4, abs=1e-7)


def test_the_teacher_of_the_chunked_loss_gets_no_gradient() -> None:
    problem = chunk_problem()
    chunked_reverse_kl(**problem, chunk_tokens=2)[0].backward()
    assert problem["teacher_hidden"].grad is None
    assert all(parameter.grad is None for parameter in problem["teacher_head"].parameters())
    assert (problem["student_hidden"].grad[problem["mask"] == 0] == 0).all()


def test_masked_positions_are_never_projected() -> None:
    problem = chunk_problem()
    seen: list[int] = []
    for side in ("student_head", "teacher_head"):
        problem[side].register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    with torch.no_grad():
        problem["student_hidden"][problem["mask"] == 0] = math.nan
        value, _ = chunked_reverse_kl(**problem, chunk_tokens=3)
    assert value.isfinite()
    assert sum(seen) == 2 * int(problem["mask"].sum())
    assert max(seen) <= 3


@pytest.mark.parametrize("veto_strength", [0.0, 0.5])
def test_metrics_are_those_of_the_two_models(veto_strength: float) -> None:
    problem = chunk_problem()
    problem["tokens"][problem["mask"] == 0] = -100
    _, metrics = chunked_reverse_kl(**problem, k=2, chunk_tokens=3, veto_strength=veto_strength)
    chosen = problem["mask"].numpy() == 1
    student, teacher = (x[chosen] for x in event_logits(problem))
    tokens = problem["tokens"].numpy()[chosen]
    assert {5, 7} & set(tokens), "tokens that mean stop, under ids that have no probability of their own"
    tokens = np.where(np.isin(tokens, [5, 7]), 2, tokens)
    expected = {
        "reverse_kl": kl(student, teacher),
        "student_entropy": entropy(student),
        "teacher_entropy": entropy(teacher),
        "student_log_prob": student[np.arange(len(tokens)), tokens],
        "teacher_log_prob": teacher[np.arange(len(tokens)), tokens],
    }
    for name, value in expected.items():
        metric = getattr(metrics, name)
        assert not metric.requires_grad
        assert np.isfinite(value).all()
        assert metric.double().numpy() == pytest.approx(value, rel=1e-6), name


def test_the_normaliser_makes_micro_batches_add_up() -> None:
    """1 x 3 rows = 3 x 1 row, although the rows have different numbers of tokens."""
    problem = chunk_problem()
    whole, _ = chunked_reverse_kl(**problem)
    expected = torch.autograd.grad(whole, learnable(problem))
    total = int(problem["mask"].sum())
    for normaliser in (total, float(total), torch.tensor(float(total))):
        parts = []
        for row in range(B):
            sliced = {
                name: problem[name][row : row + 1] for name in ("student_hidden", "teacher_hidden", "tokens", "mask")
            }
            parts.append(chunked_reverse_kl(**{**problem, **sliced}, normaliser=normaliser)[0])
        total_loss = torch.stack(parts).sum()
        assert float(total_loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
        grads = torch.autograd.grad(total_loss, learnable(problem))
        for one, other in zip(grads, expected, strict=True):
            assert one.numpy() == pytest.approx(other.numpy(), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("normaliser", [None, 12.0])
def test_an_empty_mask_of_the_chunked_loss_costs_nothing(normaliser: float | None) -> None:
    """A rank whose completions are all masked must still take part in the backward pass."""
    problem = chunk_problem()
    problem["mask"] = torch.zeros(B, T)
    value, metrics = chunked_reverse_kl(**problem, normaliser=normaliser)
    value.backward()
    assert value == 0
    assert (problem["student_hidden"].grad == 0).all()
    assert all((parameter.grad == 0).all() for parameter in problem["student_head"].parameters())
    assert metrics.reverse_kl.shape == (0,)


def test_with_and_without_tokens_a_half_precision_loss_has_one_dtype() -> None:
    """Processes gather these values, and one of them may have no token."""
    problem = chunk_problem()
    for name in ("student_hidden", "teacher_hidden"):
        problem[name] = problem[name].detach().bfloat16().requires_grad_()
    problem["student_head"].bfloat16()
    problem["teacher_head"].bfloat16()
    found = []
    for mask in (torch.ones(B, T), torch.zeros(B, T)):
        value, metrics = chunked_reverse_kl(**{**problem, "mask": mask})
        found.append([value.dtype, *(column.dtype for column in vars(metrics).values())])
    assert found == [[torch.float32] * 7] * 2


def test_without_a_vocabulary_the_heads_are_already_shared() -> None:
    problem = chunk_problem()
    problem["teacher_head"] = nn.Linear(H_TEACHER, ROWS_STUDENT).double()
    problem["vocabulary"] = None
    value, _ = chunked_reverse_kl(**problem, k=4)
    student = problem["student_head"](problem["student_hidden"])
    teacher = problem["teacher_head"](problem["teacher_hidden"])
    expected = topk_reverse_kl(student, teacher, problem["mask"], 4)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


# --- the supervised loss ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
@pytest.mark.parametrize("normaliser", [None, 3.0, torch.tensor(5.0)])
def test_the_supervised_loss_is_the_cross_entropy(chunk_tokens: int | None, normaliser: float | Tensor | None) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(6, V), nn.Tanh()).double()  # more than a projection
    hidden, tokens = logits(0, 7, 6).requires_grad_(), torch.tensor([0, 8, 3, 3, 1, 5, 8])
    value = chunked_cross_entropy(hidden, head, tokens, normaliser=normaliser, chunk_tokens=chunk_tokens)
    total = nn.functional.cross_entropy(head(hidden), tokens, reduction="sum")
    expected = total / (7 if normaliser is None else normaliser)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    leaves = [hidden, *head.parameters()]
    for one, other in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert one.numpy() == pytest.approx(other.numpy(), rel=1e-9, abs=1e-14)
        assert other.abs().max() > 1e-3


def test_a_supervised_loss_over_no_tokens_takes_part_in_the_backward_pass() -> None:
    head = nn.Linear(6, V)
    hidden = torch.zeros(0, 6, requires_grad=True)
    value = chunked_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value == 0
    assert all((parameter.grad == 0).all() for parameter in head.parameters())
