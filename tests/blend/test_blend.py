"""`trb.blend.solve` against a float64 oracle that bisects on the definitions.

The bar is the one users are promised: the KL to the student, recomputed in float64 from what is returned,
never exceeds the budget by more than 1e-6 nats, and comes within 1e-3 relative of it whenever the teacher
weight is interior. It is checked from `teacher_weight`, from `log_probs` and from `kl_student`. The only
concession to float32 is that `log_probs` are normalised once more before their KL is measured, because a
rounded normaliser shifts a KL by its own error; that error has a check of its own.
"""

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import blend as oracle
from reference.distributions import Array, kl, log_normalise
from torch import Tensor

from trb.blend import solve, weigh
from trb.blend.laws import BlendResult

ABSOLUTE_SLACK = 1e-6
RELATIVE_GAP = 1e-3
BUDGETS = (1e-6, 1e-5, 1e-4, 1e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 20.0, 50.0)

Pair = tuple[Array, Array]
Family = Callable[[np.random.Generator, int, int], Pair]


def as_numpy(x: Tensor) -> Array:
    return x.detach().double().numpy()


# --- row families: (generator, rows, vocabulary) -> student and teacher logits in float64 ---


def independent(scale: float) -> Family:
    def family(rng: np.random.Generator, n: int, v: int) -> Pair:
        return scale * rng.normal(size=(n, v)), scale * rng.normal(size=(n, v))

    return family


def perturbed(noise: float, scale: float = 3.0) -> Family:
    def family(rng: np.random.Generator, n: int, v: int) -> Pair:
        student = scale * rng.normal(size=(n, v))
        return student, student + noise * rng.normal(size=(n, v))

    return family


def peaked(margin: float) -> Family:
    """Both models almost sure, of tokens that may differ."""

    def family(rng: np.random.Generator, n: int, v: int) -> Pair:
        pair = rng.normal(size=(2, n, v))
        for side in pair:
            side[np.arange(n), rng.integers(v, size=n)] += margin
        return pair[0], pair[1]

    return family


def masked(fill: float, share: float, *sides: int) -> Family:
    """Random tokens impossible for the given sides (0 student, 1 teacher); each keeps at least one."""

    def family(rng: np.random.Generator, n: int, v: int) -> Pair:
        pair = 2.0 * rng.normal(size=(2, n, v))
        for side in sides:
            banned = rng.random((n, v)) < share
            banned[np.arange(n), rng.integers(v, size=n)] = False
            pair[side][banned] = fill
        return pair[0], pair[1]

    return family


def one_hot(*sides: int) -> Family:
    return masked(-np.inf, 1.0, *sides)


def offset(rng: np.random.Generator, n: int, v: int) -> Pair:
    """Logits far from zero, as some heads produce them."""
    student, teacher = rng.normal(size=(2, n, v))
    return student + 1e4, teacher - 1e4


def two_spikes(rng: np.random.Generator, n: int, v: int) -> Pair:
    """The largest log-ratios that logits of size 1e4 allow: the path turns over at one weight."""
    student, teacher = np.full((n, v), -1e4), np.full((n, v), -1e4)
    student[:, 0] = 1e4
    teacher[:, -1] = 1e4
    return student, teacher


def cornered(rng: np.random.Generator, n: int, v: int) -> Pair:
    """The student's only tokens are ones the teacher thinks next to impossible: conditioning it is delicate."""
    student, teacher = rng.normal(size=(2, n, v))
    half = max(1, v // 2)
    student[:, half:] = -np.inf
    teacher[:, :half] -= rng.uniform(5.0, 60.0, size=(n, 1))
    return student, teacher


LOWEST = -1e300  # stands for the most negative number of whatever dtype the row is cast to

FAMILIES: dict[str, Family] = {
    "flat": independent(0.1),
    "ordinary": independent(1.0),
    "spread": independent(3.0),
    "sharp": independent(10.0),
    "logits_1e3": independent(1e3),
    "logits_1e4": independent(1e4),
    "two_spikes": two_spikes,
    "offset": offset,
    "equal": perturbed(0.0),
    "near_equal_1e-6": perturbed(1e-6),
    "near_equal_1e-4": perturbed(1e-4),
    "near_equal_1e-2": perturbed(1e-2),
    "close": perturbed(0.3),
    "peaked_10": peaked(10.0),
    "peaked_30": peaked(30.0),
    "peaked_80": peaked(80.0),
    "inf_student": masked(-np.inf, 0.4, 0),
    "inf_teacher": masked(-np.inf, 0.4, 1),
    "inf_teacher_few": masked(-np.inf, 0.05, 1),
    "inf_both": masked(-np.inf, 0.4, 0, 1),
    "lowest_student": masked(LOWEST, 0.4, 0),
    "lowest_teacher": masked(LOWEST, 0.4, 1),
    "lowest_both": masked(LOWEST, 0.4, 0, 1),
    "cornered_student": cornered,
    "one_hot_student": one_hot(0),
    "one_hot_teacher": one_hot(1),
    "one_hot_both": one_hot(0, 1),
}
SIZES = (2, 3, 5, 8, 17, 40, 128)
ROWS = 60  # 27 families x 7 sizes x 60 rows = 11,340 rows for each dtype


def cast(logits: Array, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`; masks written as `LOWEST` become the most negative number of that dtype."""
    lowest = torch.tensor(logits == LOWEST)
    return torch.tensor(logits).to(dtype).masked_fill(lowest, torch.finfo(dtype).min)


@cache
def solved(name: str, dtype: torch.dtype) -> list[tuple[Array, Array, Array, BlendResult]]:
    """(oracle's student and teacher log-probs, budgets, result) for each vocabulary size of a family."""
    cases = []
    for size in SIZES:
        rng = np.random.default_rng([sum(name.encode()), size])
        student, teacher = (cast(x, dtype) for x in FAMILIES[name](rng, ROWS, size))
        budget = rng.choice(np.array([0.0, math.inf, *BUDGETS]), size=ROWS)
        result = solve(student, teacher, torch.tensor(budget))
        cases.append((log_normalise(as_numpy(student)), log_normalise(as_numpy(teacher)), budget, result))
    return cases


def worst(excess: Array) -> str:
    return f"worst row {int(excess.argmax())} by {float(excess.max()):.3e}"


def assert_within_promise(log_s: Array, log_t: Array, budget: Array, result: BlendResult) -> None:
    """Every promise of the docstring, judged in float64 from the returned numbers."""
    weight = as_numpy(result.teacher_weight)
    log_mu = as_numpy(result.log_probs)
    budget = np.broadcast_to(budget, weight.shape)
    assert ((weight >= 0) & (weight <= 1)).all()
    assert not np.isnan(log_mu).any()
    for scalar in (result.kl_student, result.kl_teacher):
        assert not scalar.isnan().any()
        assert (scalar >= 0).all()

    finite = np.isfinite(budget)
    bounded = np.where(finite, budget, 0.0)
    costs = {
        "teacher_weight": oracle.path_cost(log_s, log_t, weight),
        "log_probs": kl(log_normalise(log_mu), log_s),
        "kl_student": as_numpy(result.kl_student),
    }
    interior = (weight > 0) & (weight < 1) & finite
    for source, cost in costs.items():
        excess = np.where(finite, cost - bounded, 0.0)
        assert (excess <= ABSOLUTE_SLACK).all(), f"budget exceeded, from {source}: {worst(excess)}"
        gap = np.where(interior, (bounded - cost) / np.maximum(bounded, 1e-300), 0.0)
        assert (gap <= RELATIVE_GAP).all(), f"budget left unused, from {source}: {worst(gap)}"

    # A weight of 0 needs a reason: no budget, or one that does not pay for entering the common support.
    unaffordable = oracle.entry_cost(log_s, log_t) >= budget * (1 - RELATIVE_GAP) - ABSOLUTE_SLACK
    idle = weight == 0
    assert (~idle | (budget == 0) | unaffordable).all()
    assert (idle | (budget > 0)).all()
    assert (weight[~finite] == 1).all()


def rounding_of(log_s: Array, log_t: Array, weight: Array, dtype: torch.dtype) -> Array:
    """What `[N, V]` log-probabilities of the path may be off by, whatever the processor.

    log student + weight (log teacher - log student) - normaliser: eight operations, from two differences from the
    maxima on, round numbers as large as their summands. The normaliser is a sum of blocks of 256 terms in at least four
    lanes.
    """
    size_s, size_t = (np.where(np.isfinite(side), np.abs(side), 0.0) for side in (log_s, log_t))
    summands = size_s + weight[..., None] * (size_s + size_t)
    return torch.finfo(dtype).eps / 2 * (8 * (1 + summands) + 256 / 4)


def assert_log_probs_follow_the_weight(log_s: Array, log_t: Array, budget: Array, result: BlendResult) -> None:
    log_mu = as_numpy(result.log_probs)
    weight = as_numpy(result.teacher_weight)
    expected = oracle.law_of(log_s, log_t, weight, budget)
    assert (np.exp(log_mu[expected == -np.inf]) == 0).all()
    rounding = rounding_of(log_s, log_t, weight, result.log_probs.dtype)
    total = np.log(np.exp(log_mu).sum(-1))
    assert (np.abs(total) <= (np.exp(expected) * rounding).sum(-1)).all(), worst(np.abs(total))
    visible = expected > -80.0
    error = np.abs(np.where(visible, log_mu, 0.0) - np.where(visible, expected, 0.0))
    assert (error <= rounding)[visible].all(), worst(error.max(-1))
    finite = np.isfinite(budget)
    for name, other in (("kl_student", log_s), ("kl_teacher", log_t)):
        recomputed = kl(expected, other)[finite]
        reported = as_numpy(getattr(result, name))[finite]
        both_infinite = np.isposinf(recomputed) & np.isposinf(reported)
        with np.errstate(invalid="ignore"):
            error = np.where(both_infinite, 0.0, np.abs(recomputed - reported))
        assert (error <= 1e-6 + 1e-3 * np.where(both_infinite, 0.0, recomputed)).all(), (name, worst(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_budget_is_kept_and_used(family: str, dtype: torch.dtype) -> None:
    for log_s, log_t, budget, result in solved(family, dtype):
        assert_within_promise(log_s, log_t, budget, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_reported_kls_are_those_of_the_weight(family: str, dtype: torch.dtype) -> None:
    for log_s, log_t, budget, result in solved(family, dtype):
        assert_log_probs_follow_the_weight(log_s, log_t, budget, result)


@pytest.mark.parametrize("family", ["ordinary", "spread", "close", "inf_both", "inf_teacher_few"])
def test_teacher_weight_is_the_largest_feasible_one(family: str) -> None:
    for log_s, log_t, budget, result in solved(family, torch.float32):
        exact = oracle.largest_weight(log_s, log_t, budget)
        # A KL within 1e-3 of the budget pins the weight, because the KL grows with it; not where entering the
        # common support costs most of the budget already.
        plain = oracle.entry_cost(log_s, log_t) < 0.5 * budget
        weight = as_numpy(result.teacher_weight)
        assert plain.sum() > 10
        assert weight[plain] == pytest.approx(exact[plain], rel=2 * RELATIVE_GAP)


def test_number_of_passes() -> None:
    """At most six sweeps over the vocabulary for the median row, also among the rows that need a root."""
    results = [case for name in FAMILIES for case in solved(name, torch.float32)]
    passes = np.concatenate([r.passes.numpy() for *_, r in results])
    weight = np.concatenate([as_numpy(r.teacher_weight) for *_, r in results])
    interior = passes[(weight > 0) & (weight < 1)]
    assert len(passes) >= 10_000
    assert len(interior) >= 2_000
    assert passes.min() >= 1
    assert np.median(passes) <= 6
    assert np.median(interior) <= 6
    assert passes.max() <= 100  # a bracketed method at its worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1_000, 32_000, 151_936])
def test_large_vocabularies(size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(size)
    budget = np.array([1e-6, 1e-3, 0.02, 0.5, 50.0, 0.0])
    student = 3.0 * rng.normal(size=(len(budget), size))
    teacher = student + rng.normal(size=student.shape)
    student[:, : size // 100] = -np.inf
    teacher[:, -(size // 100) :] = torch.finfo(dtype).min
    # The last hundredth is impossible for the teacher: let the smallest budgets pay for that too.
    student[:3, -(size // 100) :] -= 40.0
    student_logits, teacher_logits = torch.tensor(student).to(dtype), torch.tensor(teacher).to(dtype)
    log_s, log_t = log_normalise(as_numpy(student_logits)), log_normalise(as_numpy(teacher_logits))
    result = solve(student_logits, teacher_logits, torch.tensor(budget))
    assert ((result.teacher_weight > 0) & (result.teacher_weight < 1)).sum() >= 3
    assert_within_promise(log_s, log_t, budget, result)
    assert_log_probs_follow_the_weight(log_s, log_t, budget, result)


def after_one_likely_token(size: int, rows: int) -> Tensor:
    """One token that takes nearly everything, and a long tail: added up in order, the tail is rounded away."""
    logits = 0.01 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    logits[:, 0] += 17.0
    return logits.float()


@pytest.mark.parametrize("budget", [0.0, 1e-3, 0.02, math.inf])
@pytest.mark.parametrize("differ", [False, True])
def test_a_long_tail_after_one_likely_token(budget: float, differ: bool) -> None:
    size = 151_936
    student = after_one_likely_token(size, 2)
    teacher = student + 0.5 * torch.randn(2, size, generator=torch.Generator().manual_seed(1))
    if differ:
        teacher[:, 0] = -math.inf  # all but the tail is lost to the blend
    log_s, log_t = log_normalise(as_numpy(student)), log_normalise(as_numpy(teacher))
    for budget_here in (budget, budget + 6.0):  # 6 nats pay for leaving the likely token
        result = solve(student, teacher, budget_here)
        assert_within_promise(log_s, log_t, np.array(budget_here), result)
        assert_log_probs_follow_the_weight(log_s, log_t, np.array(budget_here), result)


# --- special budgets, shapes, errors ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_budget_zero_is_the_student(dtype: torch.dtype, masked: bool) -> None:
    student, teacher = (3 * torch.randn(2, 50, 33, generator=torch.Generator().manual_seed(0))).to(dtype)
    if masked:
        student[:, 3], teacher[:, 5] = -math.inf, -math.inf
    result = solve(student, teacher, 0.0)
    assert_is(result, student)
    assert (result.teacher_weight == 0).all()
    assert (result.kl_student == 0).all()


def assert_is(result: BlendResult, logits: Tensor) -> None:
    """log μ is that of the logits, within the rounding of its own dtype."""
    exact = torch.log_softmax(logits.double(), -1)
    roundoff = torch.finfo(result.log_probs.dtype).eps / 2
    # Half a unit in the last place of the logit, of its normaliser and of their difference; the sum of a few terms.
    torch.testing.assert_close(result.log_probs.double(), exact, rtol=4 * roundoff, atol=8 * roundoff)


def test_equal_distributions_blend_to_themselves() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for budget in (0.0, 1e-6, 1.0, math.inf):
        result = solve(logits, logits.clone(), budget)
        assert torch.allclose(result.log_probs, torch.log_softmax(logits, -1), atol=1e-6)
        assert (result.kl_student.abs() <= 1e-9).all()
        assert (result.kl_teacher.abs() <= 1e-9).all()


def test_infinite_and_sufficient_budgets_are_the_teacher() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 20, 9, generator=generator)
    enough = torch.tensor(kl(log_normalise(as_numpy(teacher)), log_normalise(as_numpy(student)))) * 1.01
    for budget in (math.inf, 1e9, enough):
        result = solve(student, teacher, budget)
        assert_is(result, teacher)
        assert (result.teacher_weight == 1).all()
        assert (result.kl_teacher.abs() <= 1e-9).all()


def test_infinite_budget_reaches_events_impossible_for_the_student() -> None:
    student = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]])
    teacher = torch.tensor([[0.0, 0.0, 0.0], [-math.inf, 0.0, 0.0]])
    result = solve(student, teacher, math.inf)
    assert_is(result, teacher)
    assert (result.teacher_weight == 1).all()


def test_supports_that_differ() -> None:
    student = torch.log(torch.tensor([0.5, 0.25, 0.25, 0.0]))
    teacher = torch.log(torch.tensor([0.6, 0.2, 0.0, 0.2]))
    cost = -math.log(0.75)
    too_little = solve(student, teacher, 0.99 * cost)
    assert too_little.teacher_weight == 0
    assert_is(too_little, student)
    plenty = solve(student, teacher, 5.0)
    assert plenty.log_probs.exp().tolist() == pytest.approx([0.75, 0.25, 0.0, 0.0], abs=1e-6)
    between = solve(student, teacher, cost + 0.005)
    assert 0 < float(between.teacher_weight) < 1
    assert between.log_probs.exp()[2:].tolist() == [0.0, 0.0]


def test_disjoint_supports_leave_the_student_alone() -> None:
    student, teacher = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    for budget in (0.0, 0.05, 1e6):
        result = solve(student, teacher, budget)
        assert result.teacher_weight == 0
        assert result.log_probs.exp().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_most_negative_number_is_a_mask(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    student[:, 0], teacher[:, 1], student[:, 2], teacher[:, 2] = (-math.inf,) * 4
    lowest = torch.finfo(dtype).min
    budget = torch.linspace(0.01, 1.5, 30)
    with_inf = solve(student, teacher, budget)
    with_lowest = solve(student.clamp(min=lowest), teacher.clamp(min=lowest), budget)
    assert torch.equal(with_inf.teacher_weight, with_lowest.teacher_weight)
    assert torch.equal(with_inf.log_probs.exp(), with_lowest.log_probs.exp())


def test_leading_shapes_and_budget_broadcasting() -> None:
    student, teacher = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(3))
    per_row = torch.tensor([[1e-3], [0.02], [0.3]])
    broadcast = solve(student, teacher, per_row)
    assert broadcast.log_probs.shape == (3, 4, 7)
    for field in ("teacher_weight", "kl_student", "kl_teacher", "passes"):
        assert getattr(broadcast, field).shape == (3, 4)
    for i in range(3):
        for j in range(4):
            alone = solve(student[i, j], teacher[i, j], float(per_row[i]))
            assert alone.log_probs.shape == (7,)
            assert alone.teacher_weight.shape == ()
            assert float(alone.teacher_weight) == pytest.approx(float(broadcast.teacher_weight[i, j]), rel=1e-4)
    full = solve(student, teacher, per_row.expand(3, 4))
    assert torch.equal(full.log_probs, broadcast.log_probs)


def test_no_rows_and_dtypes() -> None:
    empty = solve(torch.zeros(0, 5), torch.zeros(0, 5), 0.1)
    assert empty.log_probs.shape == (0, 5)
    assert empty.teacher_weight.shape == (0,)
    row = torch.randn(5, generator=torch.Generator().manual_seed(4))
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert solve(row.to(dtype), row.flip(0).to(dtype), 0.01).log_probs.dtype == expected


def test_inputs_are_left_alone() -> None:
    student, teacher = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(5))
    before = student.clone(), teacher.clone()
    for budget in (0.0, 0.05, math.inf):
        solve(student, teacher, budget).log_probs.zero_()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("budget", [-0.25, math.nan, torch.tensor([0.1, -0.25]), torch.tensor([math.nan, 0.1])])
def test_bad_budgets_are_named(budget: float | Tensor) -> None:
    logits = torch.zeros(2, 3)
    name = "nan" if math.isnan(float(torch.as_tensor(budget).sum())) else "-0.25"
    with pytest.raises(ValueError, match=name):
        solve(logits, logits, budget)


@pytest.mark.parametrize("shape", [(5,), (3, 2), (1, 2, 3), (2, 1, 3)])
@pytest.mark.parametrize("find", [solve, weigh])
def test_budgets_of_another_shape_are_refused(shape: tuple[int, ...], find: Any) -> None:
    logits = torch.zeros(2, 3, 4) if find is solve else torch.zeros(6, 4)
    message = (
        rf"kl_budget of shape {re.escape(str(shape))} does not broadcast to {re.escape(str((*logits.shape[:-1],)))}"
    )
    with pytest.raises(ValueError, match=message):
        find(logits, logits, torch.ones(shape))


def test_budgets_that_broadcast_are_those_of_each_prefix() -> None:
    student, teacher = torch.randn(2, 2, 3, 6).unbind()
    for shape in ((), (1,), (3,), (2, 1), (1, 3), (2, 3)):
        budget = torch.rand(shape)
        whole = solve(student, teacher, budget.expand(2, 3).contiguous())
        assert torch.equal(solve(student, teacher, budget).log_probs, whole.log_probs)


def test_mismatched_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="5"):
        solve(torch.zeros(2, 5), torch.zeros(2, 6), 0.1)


# --- properties ------------------------------------------------------------

# Logits on a grid of 1/64 so that a shift by an integer is exact in float32.
GRID_LOGIT = st.integers(-1500, 1500).map(lambda n: n / 64)
RARELY_MASKED = st.one_of(GRID_LOGIT, GRID_LOGIT, GRID_LOGIT, st.just(-math.inf))
BUDGET = st.floats(-6, 1.5).map(lambda x: 10.0**x)
COMMON = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def rows(draw: st.DrawFn, logit: st.SearchStrategy[float] = GRID_LOGIT) -> tuple[Tensor, Tensor]:
    size = draw(st.integers(2, 9))
    sides = [draw(st.lists(logit, min_size=size, max_size=size)) for _ in range(2)]
    for side in sides:  # a distribution needs one possible event
        if all(x == -math.inf for x in side):
            side[draw(st.integers(0, size - 1))] = 0.0
    return torch.tensor(sides[0]), torch.tensor(sides[1])


@COMMON
@given(rows(RARELY_MASKED), BUDGET)
def test_property_budget_is_kept_and_used(pair: tuple[Tensor, Tensor], budget: float) -> None:
    result = solve(*pair, budget)
    log_s, log_t = (log_normalise(as_numpy(x)) for x in pair)
    assert_within_promise(log_s[None], log_t[None], np.array([budget]), batched(result))


def batched(result: BlendResult) -> BlendResult:
    fields = ("log_probs", "teacher_weight", "kl_student", "kl_teacher", "passes")
    return BlendResult(*(getattr(result, name)[None] for name in fields))


@COMMON
@given(rows(RARELY_MASKED), BUDGET, st.floats(1.002, 100.0))
def test_property_monotone_in_the_budget(pair: tuple[Tensor, Tensor], budget: float, factor: float) -> None:
    """Two budgets that differ by more than the promised accuracy order the weights and both divergences."""
    larger_budget = budget * factor + 2 * ABSOLUTE_SLACK
    smaller, larger = solve(*pair, budget), solve(*pair, larger_budget)
    assert larger.teacher_weight >= smaller.teacher_weight
    assert larger.kl_student >= smaller.kl_student - ABSOLUTE_SLACK
    if smaller.teacher_weight > 0 or torch.isfinite(smaller.kl_teacher):
        assert larger.kl_teacher <= smaller.kl_teacher + ABSOLUTE_SLACK


@COMMON
@given(rows(RARELY_MASKED), BUDGET, st.integers(-2000, 2000), st.integers(-2000, 2000))
def test_property_logit_shifts_change_nothing(
    pair: tuple[Tensor, Tensor], budget: float, shift_s: int, shift_t: int
) -> None:
    plain = solve(*pair, budget)
    shifted = solve(pair[0] + shift_s, pair[1] + shift_t, budget)
    assert float(shifted.teacher_weight) == pytest.approx(float(plain.teacher_weight), rel=1e-6)
    assert torch.allclose(shifted.log_probs.exp(), plain.log_probs.exp(), atol=1e-6)


@COMMON
@given(rows(RARELY_MASKED), BUDGET, st.randoms(use_true_random=False))
def test_property_relabelling_tokens_relabels_the_blend(
    pair: tuple[Tensor, Tensor], budget: float, random: Random
) -> None:
    order = list(range(len(pair[0])))
    random.shuffle(order)
    plain = solve(*pair, budget)
    relabelled = solve(pair[0][order], pair[1][order], budget)
    assert float(relabelled.teacher_weight) == pytest.approx(float(plain.teacher_weight), rel=1e-3)
    assert torch.allclose(relabelled.log_probs.exp(), plain.log_probs.exp()[order], atol=1e-3)
    assert abs(float(relabelled.kl_student - plain.kl_student)) <= RELATIVE_GAP * budget + ABSOLUTE_SLACK


@COMMON
@given(st.lists(BUDGET, min_size=2, max_size=6), st.integers(0, 2**31), st.integers(2, 40))
def test_property_a_row_does_not_depend_on_its_batch(budgets: list[float], seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1e-3, 1.0, 30.0, 1e4])[torch.randint(4, (len(budgets), 1), generator=generator)]
    student, teacher = scale * torch.randn(2, len(budgets), size, generator=generator)
    together = solve(student, teacher, torch.tensor(budgets, dtype=torch.float64))
    for i, budget in enumerate(budgets):
        alone = solve(student[i : i + 1], teacher[i : i + 1], budget)
        assert alone.passes[0] == together.passes[i]
        assert float(alone.teacher_weight) == pytest.approx(float(together.teacher_weight[i]), rel=1e-9)
        assert torch.allclose(alone.log_probs[0].exp(), together.log_probs[i].exp(), atol=1e-7)


@COMMON
@given(rows(), BUDGET)
def test_property_drafts_are_accepted_as_often_as_pinsker_promises(pair: tuple[Tensor, Tensor], budget: float) -> None:
    mu = as_numpy(solve(*pair, budget).log_probs.exp())
    student = np.exp(log_normalise(as_numpy(pair[0])))
    assert np.minimum(mu, student).sum() >= 1 - math.sqrt((budget + ABSOLUTE_SLACK) / 2) - 1e-6


# --- facts about the optimum ------------------------------------------------------------


def test_no_feasible_distribution_is_closer_to_the_teacher() -> None:
    student, teacher = torch.tensor([1.2, 0.1, -0.7]), torch.tensor([-1.0, 0.3, 0.8])
    log_s, log_t = log_normalise(as_numpy(student)), log_normalise(as_numpy(teacher))
    simplex = np.log(np.random.default_rng(0).dirichlet(np.ones(3), size=200_000))
    for budget in (0.01, 0.1, 0.4):
        result = solve(student, teacher, budget)
        feasible = simplex[kl(simplex, log_s) <= float(result.kl_student)]
        assert len(feasible) > 100
        assert float(result.kl_teacher) <= kl(feasible, log_t).min() + ABSOLUTE_SLACK


def test_small_budgets_follow_the_square_root_law() -> None:
    """weight ~ sqrt(2 eps / Var_S[log piT - log piS]) and gain in teacher closeness ~ sqrt(2 eps Var)."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 20, 30))
    log_s, log_t = log_normalise(student), log_normalise(teacher)
    p, ratio = np.exp(log_s), log_t - log_s
    mean = (p * ratio).sum(-1, keepdims=True)
    variance = (p * (ratio - mean) ** 2).sum(-1)
    budget = 1e-6
    result = solve(torch.tensor(student), torch.tensor(teacher), budget)
    assert as_numpy(result.teacher_weight) == pytest.approx(np.sqrt(2 * budget / variance), rel=0.01)
    gain = kl(log_s, log_t) - as_numpy(result.kl_teacher)
    assert gain == pytest.approx(np.sqrt(2 * budget * variance), rel=0.01)


def corrupted(result: BlendResult) -> Iterator[tuple[str, BlendResult]]:
    """Results wrong by little more than the promise allows."""
    yield (
        "weight too large",
        BlendResult(
            result.log_probs,
            result.teacher_weight * 1.002,
            result.kl_student,
            result.kl_teacher,
            result.passes,
        ),
    )
    yield (
        "weight too small",
        BlendResult(
            result.log_probs,
            result.teacher_weight * 0.998,
            result.kl_student,
            result.kl_teacher,
            result.passes,
        ),
    )
    tilted = torch.log_softmax(result.log_probs + 0.002 * torch.arange(result.log_probs.shape[-1]), -1)
    yield (
        "log_probs tilted",
        BlendResult(tilted, result.teacher_weight, result.kl_student, result.kl_teacher, result.passes),
    )


def test_these_checks_can_fail() -> None:
    student, teacher = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(6))
    log_s, log_t = log_normalise(as_numpy(student)), log_normalise(as_numpy(teacher))
    budget = np.array([0.05])
    result = solve(student, teacher, 0.05)
    assert_within_promise(log_s, log_t, budget, result)
    for name, wrong in corrupted(result):
        with pytest.raises(AssertionError, match="budget"):
            assert_within_promise(log_s, log_t, budget, wrong)
        assert name


# --- logits near the ends of their dtype ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12, 1e20, 1e31, 1e38, 3e38])
def test_logits_of_any_finite_size_give_a_law_within_the_budget(scale: float, dtype: torch.dtype) -> None:
    """No law of such a pair can be told from its neighbours in float64, but one that keeps the promise can be given."""
    rng = np.random.default_rng(7)
    base = rng.uniform(-1, 1, size=(2, 12, 50))
    student, teacher = cast(scale * base[0], dtype), cast(scale * base[1], dtype)
    log_s, log_t = log_normalise(as_numpy(student)), log_normalise(as_numpy(teacher))
    for budget in (1e-3, 0.02, 5.0):
        result = solve(student, teacher, budget)
        law = as_numpy(result.log_probs)
        assert np.exp(law).sum(-1) == pytest.approx(1, abs=1e-5)
        assert (kl(log_normalise(law), log_s) <= budget + ABSOLUTE_SLACK).all()
        assert (as_numpy(result.kl_student) <= budget).all()
        to_teacher = kl(log_normalise(law), log_t)
        assert (to_teacher <= kl(log_s, log_t) * (1 + 1e-6)).all()
        known = np.isfinite(to_teacher)  # the oracle takes log-probabilities below -1e30 for -inf
        assert as_numpy(result.kl_teacher)[known] == pytest.approx(to_teacher[known], rel=1e-3, abs=1e-6)
        weighed = weigh(student, teacher, budget).law
        everywhere = torch.arange(len(student))
        assert torch.equal(weighed.rows(everywhere), result.log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0.0, 100.0, -5e3, 1e6, -1e20, 1e38])
def test_a_law_that_is_left_unwritten_survives_any_shift_of_the_logits(shift: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(8)
    student, teacher = (cast(rng.normal(size=(6, 300)) + shift, dtype) for _ in range(2))
    law = weigh(student, teacher, 0.02).law
    everywhere = torch.arange(6)
    rows = as_numpy(law.rows(everywhere))
    expected = as_numpy(solve(student.double(), teacher.double(), 0.02).log_probs)
    assert np.exp(rows).sum(-1) == pytest.approx(1, abs=1e-3)
    assert rows == pytest.approx(expected, abs=2e-2 if shift else 1e-3)
    token = torch.full((6,), 17)
    assert as_numpy(law.at(token)) == pytest.approx(rows[:, 17], abs=1e-3)
