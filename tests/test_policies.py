"""Each policy's one-step law against its definition, and the part of it that a student draft may keep."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import blend
from reference import policies as laws
from reference.distributions import kl
from reference.policies import Law
from torch import Tensor

from trb.blend import solve
from trb.policies import (
    BehaviorPolicy,
    GeometricPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    TemperaturePolicy,
    TrustRegionPolicy,
)

CASES: dict[str, tuple[BehaviorPolicy, Law]] = {
    "student": (StudentPolicy(), laws.student()),
    "teacher": (TeacherPolicy(), laws.teacher()),
    "temperature 0.8": (TemperaturePolicy(0.8), laws.temperature(0.8)),
    "temperature 1": (TemperaturePolicy(1.0), laws.student()),
    "temperature 1.7": (TemperaturePolicy(1.7), laws.temperature(1.7)),
    "budget 0": (TrustRegionPolicy(0.0), laws.student()),
    "budget 0.001": (TrustRegionPolicy(0.001), laws.trust_region(0.001)),
    "budget 0.05": (TrustRegionPolicy(0.05), laws.trust_region(0.05)),
    "budget 0.5": (TrustRegionPolicy(0.5), laws.trust_region(0.5)),
    "budget inf": (TrustRegionPolicy(math.inf), laws.teacher()),
    "weight 0": (GeometricPolicy(0.0), laws.student()),
    "weight 0.2": (GeometricPolicy(0.2), laws.geometric(0.2)),
    "weight 0.9": (GeometricPolicy(0.9), laws.geometric(0.9)),
    "weight 1": (GeometricPolicy(1.0), laws.teacher()),
    "skd 1": (SKDPolicy(1, 1.0), laws.skd(1, 1.0)),
    "skd 3, cool": (SKDPolicy(3, 0.2), laws.skd(3, 0.2)),
    "skd 5": (SKDPolicy(5, 0.6), laws.skd(5, 0.6)),
    "skd everything": (SKDPolicy(12, 0.6), laws.student()),
}
ROWS, SIZE = 40, 12


def log_probs(seed: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    logits = scale * torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log_softmax(logits, -1).to(dtype)


def expected_law(law: Law, student: Tensor, teacher: Tensor) -> np.ndarray:
    pairs = zip(student.double().exp().numpy(), teacher.double().exp().numpy(), strict=True)
    return np.stack([law(p_student, p_teacher) for p_student, p_teacher in pairs])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_law_is_the_definition(name: str, dtype: torch.dtype) -> None:
    policy, law = CASES[name]
    student, teacher = log_probs(0, dtype), log_probs(1, dtype)
    mu = policy.target(student, teacher).log_probs
    assert mu.shape == (ROWS, SIZE)
    # The blend is solved to 1e-3 of its budget, which moves a probability by less than 1e-3 of itself.
    relative = 2e-3 if "budget" in name else 1e-5
    expected = expected_law(law, student, teacher)
    assert mu.double().exp().numpy() == pytest.approx(expected, abs=1e-6, rel=relative)
    assert mu.double().logsumexp(-1).numpy() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_draft_kept_with_overlap_then_replaced_by_the_residual_has_the_law(name: str) -> None:
    """overlap <= min(student, mu): acceptance and residual are probabilities, and they add up."""
    policy, law = CASES[name]
    student, teacher = log_probs(2), log_probs(3)
    target = policy.target(student, teacher)
    mu, p = target.log_probs.exp().numpy(), student.exp().numpy()
    overlap = np.minimum(mu, p) if target.overlap is None else target.overlap.numpy()
    assert overlap.shape == mu.shape
    assert (overlap >= 0).all()
    assert (overlap <= p + 1e-15).all()
    assert (overlap <= mu + 1e-15).all()
    kept = p * (overlap / p)
    missing = 1 - kept.sum(-1, keepdims=True)
    residual = np.clip(mu - overlap, 0, None)
    mass = residual.sum(-1, keepdims=True)
    drawn = kept + np.where(mass > 0, missing * residual / np.where(mass > 0, mass, 1), 0.0)
    assert drawn == pytest.approx(expected_law(law, student, teacher), abs=1e-9, rel=2e-3)


def test_skd_keeps_exactly_the_drafts_in_the_teachers_top_k() -> None:
    """Its overlap is smaller than min(student, mu): a draft outside the top-k is always replaced."""
    student, teacher = log_probs(4), log_probs(5)
    target = SKDPolicy(3, 0.6).target(student, teacher)
    kept = np.zeros((ROWS, SIZE))
    for row, ids in enumerate(np.argsort(-teacher.numpy(), -1)[:, :3]):
        kept[row, ids] = student.exp().numpy()[row, ids]
    assert target.overlap is not None
    assert target.overlap.numpy() == pytest.approx(kept)
    assert target.teacher_weight.numpy() == pytest.approx(1 - kept.sum(-1))


@pytest.mark.parametrize("name", CASES)
def test_costs_are_the_divergences_of_the_law(name: str) -> None:
    policy, _ = CASES[name]
    student, teacher = log_probs(6), log_probs(7)
    target = policy.target(student, teacher)
    mu = target.log_probs.numpy()
    assert target.kl_student.shape == target.teacher_weight.shape == (ROWS,)
    assert target.kl_student.numpy() == pytest.approx(kl(mu, student.numpy()), abs=1e-9, rel=1e-3)
    if target.kl_teacher is not None:
        assert target.kl_teacher.numpy() == pytest.approx(kl(mu, teacher.numpy()), abs=1e-9, rel=1e-3)
    else:
        assert not policy.needs_teacher
    assert ((target.teacher_weight >= 0) & (target.teacher_weight <= 1)).all()


def test_teacher_weight_at_the_ends() -> None:
    student, teacher = log_probs(8), log_probs(9)
    for policy, weight in (
        (StudentPolicy(), 0.0),
        (TemperaturePolicy(0.8), 0.0),
        (TrustRegionPolicy(0.0), 0.0),
        (TrustRegionPolicy(math.inf), 1.0),
        (GeometricPolicy(0.4), 0.4),
        (GeometricPolicy(1.0), 1.0),
        (TeacherPolicy(), 1.0),
    ):
        assert (policy.target(student, teacher).teacher_weight == weight).all()


@pytest.mark.parametrize("policy", [StudentPolicy(), TrustRegionPolicy(0.0), GeometricPolicy(0.0)], ids=str)
def test_student_sampling_is_the_student_to_the_last_bit(policy: BehaviorPolicy) -> None:
    student = log_probs(10, torch.float32)
    assert torch.equal(policy.target(student, log_probs(11, torch.float32)).log_probs, student)
    assert torch.equal(policy.target(student, None).log_probs, student)


def test_who_needs_a_teacher() -> None:
    needy: list[BehaviorPolicy] = [TrustRegionPolicy(1e-6), TrustRegionPolicy(math.inf)]
    needy += [GeometricPolicy(1e-3), SKDPolicy(5, 1.0), TeacherPolicy()]
    alone: list[BehaviorPolicy] = [StudentPolicy(), TemperaturePolicy(0.9)]
    alone += [TrustRegionPolicy(0.0), TrustRegionPolicy(0), GeometricPolicy(0.0)]
    assert all(policy.needs_teacher for policy in needy)
    assert not any(policy.needs_teacher for policy in alone)
    student = log_probs(12)
    for policy in alone:
        assert policy.target(student, None).kl_teacher is None
    for policy in needy:
        with pytest.raises(ValueError, match="teacher"):
            policy.target(student, None)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("skd")])
def test_impossible_tokens(name: str) -> None:
    """-inf for either model gives no NaN, and no token outside the student's support unless the law says so."""
    policy, law = CASES[name]
    student, teacher = log_probs(13), log_probs(14)
    student[:, 1], teacher[:, 2], student[:, 3], teacher[:, 3] = (-math.inf,) * 4
    student, teacher = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    target = policy.target(student, teacher)
    assert not target.log_probs.isnan().any()
    assert target.log_probs.exp().numpy() == pytest.approx(expected_law(law, student, teacher), abs=1e-9, rel=2e-3)
    for scalar in (target.kl_student, target.teacher_weight):
        assert not scalar.isnan().any()


@pytest.mark.parametrize("name", CASES)
def test_a_token_whose_probability_underflows_costs_nothing(name: str) -> None:
    """Its logarithm is finite and the other model's is not: 0 log(0 / 0) = 0."""
    policy, law = CASES[name]
    pair = [log_probs(13), log_probs(14)]
    for student, teacher in (pair, pair[::-1]):
        student, teacher = student.clone(), teacher.clone()
        student[:, 1], teacher[:, 1] = -2000.0, -math.inf
        target = policy.target(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
        mu = expected_law(law, torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
        with np.errstate(divide="ignore"):
            kl_student, kl_teacher = (
                kl(np.log(mu), torch.log_softmax(side, -1).numpy()) for side in (student, teacher)
            )
        # A thousandth of a budget of 0.5 may be left unused, and what it buys on the teacher's side with it.
        slack = 1e-3 * 0.5 if "budget" in name else 1e-9
        assert target.kl_student.numpy() == pytest.approx(kl_student, abs=slack)
        assert target.kl_teacher is not None
        assert target.kl_teacher.numpy() == pytest.approx(kl_teacher, abs=slack, rel=1e-3)


def test_models_that_share_no_token_leave_the_path_at_the_student() -> None:
    student = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]).log()
    teacher = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.0, 0.0]]).log()
    target = GeometricPolicy(0.5).target(student, teacher)
    assert target.log_probs.exp().tolist() == [[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    assert target.teacher_weight.tolist() == [0.0, 0.5]
    assert target.kl_student.tolist() == [0.0, pytest.approx(math.log(2))]


def test_one_weight_for_all_prefixes_spends_a_common_budget_best() -> None:
    """Of divisions of the same Σ KL(μ || student) over prefixes, none is nearer to the teacher in total: not the even
    one, and not those drawn at random. What a division comes to is bisected from definitions."""
    student, teacher = log_probs(17), log_probs(18)
    geometric = GeometricPolicy(0.35).target(student, teacher)
    assert geometric.kl_teacher is not None
    spent, left = geometric.kl_student.sum().item(), geometric.kl_teacher.sum().item()

    def divided(budgets: np.ndarray) -> tuple[float, float]:
        laws = blend.behavior(student, teacher, budgets)
        return kl(laws, student.numpy()).sum(), kl(laws, teacher.numpy()).sum()

    generator = np.random.default_rng(0)
    drawn = [generator.dirichlet([concentration] * ROWS) for concentration in (0.3, 3.0, 300.0) for _ in range(20)]
    for shares in (np.full(ROWS, 1 / ROWS), *drawn):
        other_spent, other_left = divided(shares * spent)
        assert other_spent <= spent * (1 + 1e-12)
        assert other_left > left
    same_spent, same_left = divided(geometric.kl_student.numpy())
    assert (same_spent, same_left) == pytest.approx((spent, left), rel=1e-9)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_skd_with_impossible_tokens(temperature: float) -> None:
    student, teacher = log_probs(15), log_probs(16)
    student[:, 1], teacher[:, 2] = -math.inf, -math.inf
    student, teacher = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    target = SKDPolicy(4, temperature).target(student, teacher)
    expected = expected_law(laws.skd(4, temperature), student, teacher)
    assert target.log_probs.exp().numpy() == pytest.approx(expected, abs=1e-12, rel=1e-9)
    assert not target.kl_student.isnan().any()


@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_skd_keeps_nothing_that_the_teacher_forbids(top_k: int) -> None:
    """Also where fewer than K tokens are possible for the teacher, and K are its likeliest all the same."""
    student = torch.full((1, 5), 0.2, dtype=torch.float64).log()
    teacher = torch.tensor([[0.0, -math.inf, -math.inf, 0.0, -math.inf]], dtype=torch.float64).log_softmax(-1)
    target = SKDPolicy(top_k, 1.0).target(student, teacher)
    assert target.log_probs.exp()[0].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5, 0.0])
    assert target.overlap is not None and target.overlap[0].tolist() == pytest.approx([0.2, 0.0, 0.0, 0.2, 0.0])
    assert target.teacher_weight.item() == pytest.approx(0.6)
    assert target.kl_teacher is not None and target.kl_teacher.item() == pytest.approx(0.0, abs=1e-12)
    expected = expected_law(laws.skd(top_k, 1.0), student, teacher)
    assert target.log_probs.exp().numpy() == pytest.approx(expected)


def test_policies_are_values() -> None:
    assert TrustRegionPolicy(0.02) == TrustRegionPolicy(0.02) != TrustRegionPolicy(0.03)
    assert SKDPolicy(teacher_top_k=25, teacher_temperature=0.6) == SKDPolicy(25, 0.6)
    assert len({StudentPolicy(), StudentPolicy(), TeacherPolicy(), TemperaturePolicy(temperature=0.8)}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrustRegionPolicy(0.02).kl_budget = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TemperaturePolicy(0.0), r"0\.0"),
        (lambda: TemperaturePolicy(-0.5), r"-0\.5"),
        (lambda: TemperaturePolicy(math.nan), "nan"),
        (lambda: TemperaturePolicy(math.inf), "inf"),
        (lambda: TrustRegionPolicy(-0.02), r"-0\.02"),
        (lambda: TrustRegionPolicy(math.nan), "nan"),
        (lambda: GeometricPolicy(-0.1), r"-0\.1"),
        (lambda: GeometricPolicy(1.5), r"1\.5"),
        (lambda: GeometricPolicy(math.nan), "nan"),
        (lambda: SKDPolicy(0, 1.0), r"\b0\b"),
        (lambda: SKDPolicy(-4, 1.0), "-4"),
        (lambda: SKDPolicy(5, 0.0), r"0\.0"),
        (lambda: SKDPolicy(5, -0.6), r"-0\.6"),
        (lambda: SKDPolicy(5, math.nan), "nan"),
        (lambda: TemperaturePolicy(1e-40), r"temperature must .*1e-40"),
        (lambda: TemperaturePolicy(10**5000), r"temperature must .*an integer of 16,610 bits"),
        (lambda: TrustRegionPolicy(10**400), r"kl_budget must .*an integer of 1,329 bits"),
        (lambda: TrustRegionPolicy("1"), r"kl_budget must .*'1'"),  # type: ignore[arg-type]
        (lambda: GeometricPolicy(-(10**400)), r"teacher_weight must .*an integer of 1,329 bits"),
        (lambda: SKDPolicy(2.5, 1.0), r"teacher_top_k must be a whole number, got 2\.5"),  # type: ignore[arg-type]
        (lambda: TrustRegionPolicy(None), "kl_budget must be a number, got None"),  # type: ignore[arg-type]
        (lambda: SKDPolicy(10**400, 1.0), r"teacher_top_k must .*an integer of 1,329 bits"),
        (lambda: SKDPolicy(5, 10**400), r"teacher_temperature must .*an integer of 1,329 bits"),
        (lambda: SKDPolicy(5, 10**300), r"teacher_temperature must .*1e\+300"),
    ],
)
def test_bad_parameters_are_named(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_numbers_are_floats_that_torch_takes() -> None:
    """An integer beyond 64 bits is a number to Python alone."""
    student, teacher = log_probs(0, torch.float32), log_probs(1, torch.float32)
    for policy in (TrustRegionPolicy(10**300), TemperaturePolicy(10**30), SKDPolicy(10**300, 10**30)):
        target = policy.target(student, teacher)
        assert target.log_probs.isfinite().all() and target.kl_student.isfinite().all()
    student[:, 3] = -math.inf  # as a stop id that is folded into another
    assert not TemperaturePolicy(1e30).target(student).log_probs.isnan().any()
    assert solve(student, teacher, 10**300).teacher_weight.isfinite().all()
