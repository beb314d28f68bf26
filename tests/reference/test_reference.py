"""The oracles against cases done by hand and 50-digit arithmetic."""

import math

import mpmath
import numpy as np
import pytest

from reference import blend, losses, policies, sequences, statistics
from reference.distributions import entropy, kl, log_normalise, shared_events
from reference.philox import philox4x32


def mpmath_weight(student: list[float], teacher: list[float], budget: float) -> mpmath.mpf:
    """Largest feasible weight in 50 digits, by bisection on unnormalised logits."""
    with mpmath.workdps(50):
        s, t, eps = [mpmath.mpf(x) for x in student], [mpmath.mpf(x) for x in teacher], mpmath.mpf(budget)
        log_s = [x - mpmath.log(mpmath.fsum(mpmath.exp(y) for y in s)) for x in s]
        log_t = [x - mpmath.log(mpmath.fsum(mpmath.exp(y) for y in t)) for x in t]

        def cost(weight: mpmath.mpf) -> mpmath.mpf:
            mixed = [mpmath.exp((1 - weight) * a + weight * b) for a, b in zip(log_s, log_t, strict=True)]
            total = mpmath.fsum(mixed)
            return mpmath.fsum(m / total * (mpmath.log(m / total) - a) for m, a in zip(mixed, log_s, strict=True))

        if cost(mpmath.mpf(1)) <= eps:
            return mpmath.mpf(1)
        low, high = mpmath.mpf(0), mpmath.mpf(1)
        for _ in range(120):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) <= eps else (low, middle)
        return low


@pytest.mark.parametrize("budget", [1e-6, 1e-3, 0.05, 1.0, 20.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e4])
def test_largest_weight_agrees_with_50_digit_arithmetic(scale: float, budget: float) -> None:
    rng = np.random.default_rng(0)
    for size in (2, 5):
        student, teacher = rng.normal(size=(2, size)) * scale
        exact = float(mpmath_weight(student.tolist(), teacher.tolist(), budget))
        found = float(blend.largest_weight(log_normalise(student), log_normalise(teacher), budget))
        # float64 resolves a KL of `budget` to about 1e-15, so the weight to 1e-15 / budget relative.
        assert found == pytest.approx(exact, rel=1e-8, abs=1e-12)


def test_blend_optimum_beats_every_feasible_distribution_of_a_dense_simplex() -> None:
    """The path is the argmin of KL(mu || teacher): checked over the whole simplex of three events."""
    log_s, log_t = np.log([0.7, 0.2, 0.1]), np.log([0.1, 0.3, 0.6])
    grid = [(a, b) for a in np.arange(0.005, 1, 0.005) for b in np.arange(0.005, 1 - a - 1e-9, 0.005)]
    simplex = np.log([[a, b, 1 - a - b] for a, b in grid])
    for budget in (0.01, 0.1, 0.5):
        feasible = simplex[kl(simplex, log_s) <= budget]
        best = kl(feasible, log_t).min()
        ours = float(kl(blend.behavior(log_s, log_t, budget), log_t))
        assert ours <= best
        assert best - ours < 0.03  # the grid comes close, so the bound is not vacuous


def test_blend_on_two_events_by_hand() -> None:
    log_s, log_t = np.log([0.5, 0.5]), np.log([0.9, 0.1])
    assert np.exp(blend.path(log_s, log_t, 0.5)) == pytest.approx([0.75, 0.25])  # sqrt(9) : sqrt(1)
    assert float(blend.path_cost(log_s, log_t, 0.5)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_blend_with_different_supports() -> None:
    with np.errstate(divide="ignore"):
        log_s, log_t = np.log([0.5, 0.25, 0.25, 0.0]), np.log([0.6, 0.2, 0.0, 0.2])
    cost = float(blend.entry_cost(log_s, log_t))
    assert cost == pytest.approx(-math.log(0.75))
    assert float(blend.largest_weight(log_s, log_t, cost * 0.99)) == 0.0
    assert float(blend.largest_weight(log_s, log_t, cost + 0.02)) == 1.0
    assert np.exp(blend.behavior(log_s, log_t, 5.0)) == pytest.approx([0.75, 0.25, 0.0, 0.0])
    assert np.exp(blend.behavior(log_s, log_t, math.inf)) == pytest.approx([0.6, 0.2, 0.0, 0.2])
    assert np.exp(blend.behavior(log_s, log_t, 0.1)) == pytest.approx([0.5, 0.25, 0.25, 0.0])


def test_entropy_and_kl_by_hand() -> None:
    assert float(entropy(np.log([0.5, 0.5]))) == pytest.approx(math.log(2))
    assert float(kl(np.log([0.5, 0.5]), np.log([0.25, 0.75]))) == pytest.approx(0.5 * math.log(4 / 3))
    assert float(kl([-math.inf, 0.0], np.log([0.25, 0.75]))) == pytest.approx(math.log(4 / 3))
    assert float(kl(np.log([0.5, 0.5]), [-math.inf, 0.0])) == math.inf


def test_shared_events_by_hand() -> None:
    student = np.log([0.1, 0.2, 0.3, 0.4])
    teacher = np.log([0.25, 0.25, 0.2, 0.1, 0.2])
    s, t = shared_events(student, teacher, 1, [3, 1])
    assert s == pytest.approx([0.1, 0.6, 0.3, 0.0])
    assert t == pytest.approx(np.array([0.25, 0.35, 0.2, 0.0]) / 0.8)


def test_score_gradient_is_the_finite_difference_of_the_objective() -> None:
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 7)) * 2
    for k in (1, 3, 7):
        objective = losses.mean_objective(student[None], teacher[None], np.ones(1), k)
        numeric = losses.central_difference(objective, student[None])[0]
        assert numeric == pytest.approx(losses.score_gradient(student, teacher, k), abs=1e-9)


def test_full_support_objective_is_the_reverse_kl() -> None:
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(size=(2, 4, 7))
    expected = kl(log_normalise(student), log_normalise(teacher)).mean()
    assert losses.reverse_kl(student, teacher, np.ones(4), 7) == pytest.approx(float(expected))


def test_policy_laws_are_distributions_and_skd_by_hand() -> None:
    s, t = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.6, 0.3])
    for law in (
        policies.student(),
        policies.teacher(),
        policies.temperature(0.8),
        policies.trust_region(0.02),
        policies.skd(2, 0.5),
    ):
        assert law(s, t).sum() == pytest.approx(1.0)
    squared = np.array([0.01, 0.36, 0.09]) / 0.46
    assert policies.skd(2, 0.5)(s, t) == pytest.approx(np.array([0.0, 0.3, 0.2]) + 0.5 * squared)


def test_enumeration_is_a_law_and_stops_at_the_stop_event() -> None:
    def coin(prefix: tuple[int, ...]) -> np.ndarray:
        return np.array([0.25, 0.75]) if len(prefix) % 2 == 0 else np.array([0.5, 0.5])

    law = sequences.enumerate_completions(coin, coin, policies.student(), max_new_tokens=3, stop=0)
    assert law == pytest.approx({(0,): 0.25, (1, 0): 0.375, (1, 1, 0): 0.375 * 0.25, (1, 1, 1): 0.375 * 0.75})


def test_goodness_of_fit_accepts_its_own_law_and_rejects_a_near_one() -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(50))
    law = dict(enumerate(p.tolist()))
    values = [statistics.goodness_of_fit(rng.choice(50, size=2000, p=p).tolist(), law) for _ in range(200)]
    assert np.mean(np.array(values) < 0.05) < 0.12  # 0.05 expected, standard error 0.015
    assert 0.4 < np.mean(values) < 0.6
    tilted = p * np.exp(0.2 * rng.normal(size=50))
    drawn = rng.choice(50, size=20_000, p=tilted / tilted.sum()).tolist()
    assert statistics.goodness_of_fit(drawn, law) < 1e-12
    assert statistics.goodness_of_fit([*drawn, 50], law) == 0.0


def test_philox_known_answers_of_random123() -> None:
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox4x32((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )
