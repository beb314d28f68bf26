"""Budgets over steps: the paper's line, its alternatives, and what is refused."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trb.schedule import kl_budget, ramp


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.02), (1, 0.0192), (5, 0.016), (24, 0.0008), (25, 0.0), (26, 0.0), (10**9, 0.0)],
)
def test_linear_schedule_of_the_paper(step: int, expected: float) -> None:
    assert kl_budget(step, 0.02, 25) == pytest.approx(expected, rel=1e-12, abs=0.0)
    assert kl_budget(step, 0.02, 25, kind="linear") == kl_budget(step, 0.02, 25)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_after_the_warm_up_the_budget_is_exactly_zero(kind: str) -> None:
    for steps in (0, 1, 15, 50):
        assert [kl_budget(step, 0.05, steps, kind=kind) for step in range(steps, steps + 3)] == [
            0.0,
            0.0,
            0.0,
        ]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_no_warm_up_means_no_budget_at_any_step(kind: str) -> None:
    assert kl_budget(0, 0.05, 0, kind=kind) == 0.0


def test_cosine_is_half_a_period() -> None:
    """By values of the cosine that are known without it: at 0, 1/6, 1/4, 1/3, 1/2, 2/3 and all of the half period."""
    found = [kl_budget(step, 1.0, 12, kind="cosine") for step in (0, 2, 3, 4, 6, 8, 12)]
    assert found == pytest.approx([1.0, (2 + 3**0.5) / 4, (2 + 2**0.5) / 4, 0.75, 0.5, 0.25, 0.0], abs=1e-15)


def test_constant_ignores_the_horizon() -> None:
    for steps in (0, 15, 1000):
        assert [kl_budget(step, 0.005, steps, kind="constant") for step in (0, 14, 15, 10**6)] == [0.005] * 4


def test_infinite_budget_is_allowed_and_still_ends() -> None:
    assert kl_budget(3, math.inf, 10) == math.inf
    assert kl_budget(10, math.inf, 10) == 0.0
    assert kl_budget(10, math.inf, 10, kind="constant") == math.inf


@settings(derandomize=True, deadline=None)
@given(st.floats(0, 100), st.integers(0, 200), st.sampled_from(["linear", "cosine", "constant"]))
def test_budgets_start_at_the_initial_one_and_never_grow(initial: float, steps: int, kind: str) -> None:
    budgets = [kl_budget(step, initial, steps, kind=kind) for step in range(steps + 2)]
    assert all(isinstance(budget, float) and 0 <= budget <= initial for budget in budgets)
    assert all(later <= earlier for earlier, later in pairwise(budgets))
    if steps > 0:
        assert budgets[0] == initial


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, -0.01, 25), "-0.01"),
        ((0, math.nan, 25), "nan"),
        ((0, 0.02, -3), "-3"),
        ((-7, 0.02, 25), "-7"),
        ((0, -0.01, 25, "constant"), "-0.01"),
        ((-7, 0.02, 25, "constant"), "-7"),
    ],
)
def test_bad_numbers_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kl_budget(*arguments)


@pytest.mark.parametrize(
    ("given_kind", "nearest"), [("liner", "linear"), ("cosin", "cosine"), ("constantt", "constant")]
)
def test_unknown_kind_names_the_value_and_the_nearest_valid_one(given_kind: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"'{given_kind}'.*mean '{nearest}'"):
        kl_budget(0, 0.02, 25, kind=given_kind)
    with pytest.raises(ValueError, match=r"'zzz'.*linear.*cosine.*constant"):
        kl_budget(0, 0.02, 25, kind="zzz")


def test_ramp_of_the_baselines() -> None:
    assert [ramp(step, 0.8, 1.0, 4) for step in range(6)] == pytest.approx([0.8, 0.85, 0.9, 0.95, 1.0, 1.0])
    assert [ramp(step, 0.6, 0.0, 3) for step in range(5)] == pytest.approx([0.6, 0.4, 0.2, 0.0, 0.0])
    assert ramp(0, 0.8, 1.0, 0) == 1.0
    with pytest.raises(ValueError, match="-2"):
        ramp(-2, 0.8, 1.0, 4)
