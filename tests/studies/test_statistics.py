"""Estimates over seeds and problems: coverage on tables with known components, and oracles from the definitions.

Every random test has a fixed seed; its false-alarm rate, over seeds, is stated where it is not zero.
"""

import json
import math
import tracemalloc
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from trb.studies.power import power, seeds_needed
from trb.studies.resampling import variance_components
from trb.studies.statistics import (
    Estimate,
    area_under_curve,
    auroc,
    auroc_estimate,
    band,
    combined_p_value,
    expected_standard_error,
    holm,
    mean_estimate,
    paired_difference,
    steps_to_target,
)


def outcomes(rng, seeds, problems, difference, seed_spread, problem_spread):
    """Right or wrong answers of two methods on shared problems; the true mean difference is known exactly.

    A linear model of the probability: half of the difference is added to one method and taken from the other. The seed
    effects are normal with deviation `seed_spread`, the problem effects uniform with deviation `problem_spread`.
    """
    difficulty = rng.uniform(0.25, 0.75, problems)
    effect = difference + rng.normal(size=(seeds, 1)) * seed_spread
    effect = effect + rng.uniform(-1, 1, problems) * problem_spread * math.sqrt(3)
    first, second = difficulty + effect / 2, difficulty - effect / 2
    assert min(first.min(), second.min()) >= 0 and max(first.max(), second.max()) <= 1
    return rng.random((seeds, problems)) < first, rng.random((seeds, problems)) < second


def assert_share(hits: int, trials: int, low: float, high: float) -> None:
    """The true share lies in [low, high]; false-alarm rate at most 1e-4."""
    assert stats.binom.ppf(5e-5, trials, low) <= hits <= stats.binom.ppf(1 - 5e-5, trials, high)


@pytest.mark.parametrize(
    ("seeds", "problems", "seed_spread", "problem_spread"),
    [
        (20, 256, 0.03, 0.08),
        # Residual only: an interval that counts it twice or three times would cover 99% or more.
        (20, 256, 0.0, 0.0),
        # Hardly anything but the seeds, or but the problems.
        (4, 512, 0.06, 0.0),
        (20, 40, 0.0, 0.14),
        (2, 128, 0.03, 0.05),
        (1, 128, 0.0, 0.08),
    ],
)
def test_interval_covers_the_true_difference_as_often_as_it_says(seeds, problems, seed_spread, problem_spread) -> None:
    """Nominal 95%, accepted between 93.5% and 96.5%; and 5% false findings, accepted between 3.5% and 6.5%."""
    trials, covered, found = 600, 0, 0
    rng = np.random.default_rng(1)
    for trial in range(trials):
        first, second = outcomes(rng, seeds, problems, 0.03, seed_spread, problem_spread)
        low, high = paired_difference(first, second, resamples=300, seed=trial).interval
        covered += low <= 0.03 <= high
        first, second = outcomes(rng, seeds, problems, 0.0, seed_spread, problem_spread)
        found += paired_difference(first, second, resamples=300, seed=trial).p_value <= 0.05
    assert_share(covered, trials, 0.935, 0.965)
    assert_share(found, trials, 0.035, 0.065)


@pytest.mark.parametrize("problems", [2, 3])
def test_intervals_of_few_problems_cover_no_less_than_they_say(problems: int) -> None:
    """At least 94%, of other problems and other seeds alike; false-alarm rate 1e-4."""
    trials, covered = 2000, 0
    rng = np.random.default_rng(2)
    for trial in range(trials):
        scores = rng.normal(size=problems) + rng.normal(size=(20, problems))
        low, high = paired_difference(scores, np.zeros_like(scores), resamples=300, seed=trial).interval
        covered += low <= 0 <= high
    assert covered >= stats.binom.ppf(1e-4, trials, 0.94)


def test_effects_of_few_problems_are_not_shrunk() -> None:
    """The estimate that they would be shrunk by is cut at zero, and where problems are few it often is."""
    scores = np.random.default_rng(3).normal(size=(20, 10))
    for problems, unshrunk in ((9, True), (10, False)):
        table = scores[:, :problems]
        whole = math.hypot(stats.sem(table.mean(axis=1)), stats.sem(table.mean(axis=0)))
        assert (mean_estimate(table).standard_error == pytest.approx(whole)) == unshrunk


def test_level_of_the_interval() -> None:
    """Nominal 80%, accepted between 78% and 82%; false-alarm rate 1e-4."""
    trials, covered = 600, 0
    rng = np.random.default_rng(2)
    for trial in range(trials):
        first, second = outcomes(rng, 6, 64, 0.03, 0.03, 0.08)
        low, high = paired_difference(first, second, resamples=300, seed=trial, level=0.8).interval
        covered += low <= 0.03 <= high
    assert_share(covered, trials, 0.78, 0.82)


def test_mean_of_suites_covers_its_truth() -> None:
    """Two suites of unequal size, variance and rate; nominal 95%, accepted 93% to 97%; false-alarm rate 1e-4."""
    trials, covered = 600, 0
    rng = np.random.default_rng(3)
    suites = np.repeat([7, 3], [150, 30])
    for trial in range(trials):
        rates = np.concatenate([rng.beta(4, 1, 150), rng.beta(0.5, 1.5, 30)])
        scores = rng.random((3, 180)) < rates
        low, high = mean_estimate(scores, strata_P=suites, resamples=300, seed=trial, bounds=(0, 1)).interval
        covered += low <= (0.8 + 0.25) / 2 <= high
    assert_share(covered, trials, 0.93, 0.97)


def test_one_score_per_seed_is_the_t_interval_and_the_t_test() -> None:
    """Normal scores of 20 seeds; 100,000 resamples leave an error near 1%, accepted 6%."""
    first = np.random.default_rng(4).normal(0.4, 1.0, (20, 1))
    estimate = paired_difference(first, np.zeros((20, 1)), resamples=100_000)
    test = stats.ttest_1samp(first[:, 0], 0.0)
    expected = test.confidence_interval(0.95)
    width = expected.high - expected.low
    assert estimate.interval == pytest.approx((expected.low, expected.high), abs=0.03 * width)
    assert estimate.p_value == pytest.approx(test.pvalue, rel=0.1)
    assert estimate.standard_error == pytest.approx(stats.sem(first[:, 0]), rel=1e-12)


def test_one_seed_resamples_problems_only() -> None:
    values = np.random.default_rng(5).normal(0.1, 1.0, (1, 400))
    estimate = paired_difference(values, np.zeros((1, 400)), resamples=20_000)
    half = stats.norm.ppf(0.975) * stats.sem(values[0])
    assert estimate.standard_error == pytest.approx(stats.sem(values[0]), rel=1e-12)
    assert estimate.interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)
    assert (estimate.seeds, estimate.problems, estimate.effect_size) == (1, 400, None)


def test_standard_error_of_a_full_study_and_its_memory() -> None:
    """20 seeds x 4,096 problems: true components give the true standard error, and resampling stays under 200 MB.

    The seeds' share, with 19 degrees of freedom, moves the estimate by 16%; accepted is a factor of 2.
    """
    first, second = outcomes(np.random.default_rng(6), 20, 4096, 0.02, 0.01, 0.05)
    tracemalloc.start()
    estimate = paired_difference(first, second)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The residual of a difference of two coin flips: the mean of p (1 - p), twice, is a little under 0.46.
    truth = math.sqrt(0.01**2 / 20 + 0.05**2 / 4096 + 0.455 / (20 * 4096))
    assert truth / 2 < estimate.standard_error < 2 * truth
    assert estimate.interval[1] - estimate.interval[0] == pytest.approx(4.1 * estimate.standard_error, rel=0.1)
    assert peak < 200 * 2**20


def test_suites_count_equally_whatever_their_size() -> None:
    first = np.array([[1.0, 1.0, 1.0, 1.0, 0.0, 0.5], [0.0, 1.0, 0.0, 1.0, 0.5, 0.0]])
    second = np.zeros_like(first)
    suites = ["a", "a", "a", "a", "b", "b"]
    assert paired_difference(first, second, strata_P=suites).value == pytest.approx((0.75 + 0.25) / 2)
    assert mean_estimate(first).value == pytest.approx((6 + 1) / 12)


def test_suites_standard_error_is_that_of_an_average_of_independent_suites() -> None:
    values = np.random.default_rng(7).normal(size=(1, 50)) * np.repeat([1.0, 5.0], [40, 10])
    suites = np.repeat([0, 1], [40, 10])
    estimate = mean_estimate(values, strata_P=suites)
    expected = math.hypot(stats.sem(values[0, :40]), stats.sem(values[0, 40:])) / 2
    assert estimate.standard_error == pytest.approx(expected, rel=1e-12)


def test_problems_are_shrunk_within_their_suite() -> None:
    """Suites that differ only in their level have no problem component, and then the seeds' part is everything."""
    rng = np.random.default_rng(8)
    seeds = rng.normal(size=(6, 1))
    values = seeds + np.repeat([0.0, 100.0], [5, 5])
    estimate = mean_estimate(values, strata_P=np.repeat([0, 1], [5, 5]))
    assert estimate.standard_error == pytest.approx(stats.sem(seeds[:, 0]), rel=1e-9)
    assert mean_estimate(values).standard_error > 10


def test_swapping_the_methods_mirrors_the_estimate() -> None:
    rng = np.random.default_rng(9)
    a, b = rng.random((5, 40)), rng.random((5, 40))
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert other.value == -one.value
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]), rel=1e-12)
    assert (other.p_value, other.effect_size) == (one.p_value, pytest.approx(-one.effect_size))


def test_pairing_by_problem_removes_their_difficulty() -> None:
    rng = np.random.default_rng(10)
    difficulty = rng.normal(size=60) * 10
    a, b = rng.normal(size=(4, 60)) + difficulty, rng.normal(size=(4, 60)) + difficulty
    paired = paired_difference(a, b).standard_error
    shuffled = paired_difference(a, b[:, rng.permutation(60)]).standard_error
    assert paired < 0.5 and shuffled > 1


def test_p_value_is_never_zero_and_one_without_any_difference() -> None:
    ones = np.ones((3, 4))
    certain = paired_difference(ones, np.zeros((3, 4)), resamples=999)
    assert certain.p_value == pytest.approx(1 / 1000)
    assert (certain.interval, certain.effect_size) == ((1.0, 1.0), None)
    assert paired_difference(ones, ones).p_value == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 7, 10]), st.integers(-1, 1), st.sampled_from([1, 40]))
def test_rounding_errors_are_no_difference(seed: int, parts: int, shift: int, most: int) -> None:
    """Scores in thirds and the like, summed in another order: in fractions every seed has the very same difference."""
    rng = np.random.default_rng(seed)
    seeds, problems = int(rng.integers(3, 6)), int(rng.integers(3, 12))
    counts = rng.integers(0, most + 1, problems)
    first = np.stack([rng.permutation(counts) + shift for _ in range(seeds)]) / parts
    second = np.stack([rng.permutation(counts) for _ in range(seeds)]) / parts
    # As a score over all problems, and as the area under a curve: one number for each seed.
    for a, b in ((first, second), (first.mean(axis=1)[:, None], second.mean(axis=1)[:, None])):
        found = paired_difference(a, b, resamples=200)
        assert found.effect_size is None
        assert math.isclose(found.value, shift / parts, rel_tol=1e-12)
        if shift == 0:
            assert found.value == 0 and found.p_value == 1.0
        elif b.shape[1] == 1:
            assert found.interval == (found.value, found.value) and found.standard_error == 0


def test_interval_and_p_value_agree() -> None:
    """Zero is inside the interval of level 1 - p, just: slightly wider includes it, slightly narrower does not.

    Exact for a symmetric resampling law; 10,000 resamples leave a few percent of p.
    """
    rng = np.random.default_rng(11)
    a, b = rng.normal(0.1, 1.0, (5, 200)), np.zeros((5, 200))
    p_value = paired_difference(a, b).p_value
    assert p_value is not None and 0.001 < p_value < 0.2
    wide = paired_difference(a, b, level=1 - 0.8 * p_value).interval
    narrow = paired_difference(a, b, level=1 - 1.2 * p_value).interval
    assert wide[0] < 0 < narrow[0]


def test_effect_size_is_unbiased() -> None:
    """Hedges' correction: the mean over 4,000 studies of 4 seeds is the true 0.8; false-alarm rate 1e-4."""
    rng = np.random.default_rng(12)
    sizes = [
        paired_difference(rng.normal(0.8, 1.0, (4, 1)), np.zeros((4, 1)), resamples=100).effect_size
        for _ in range(4000)
    ]
    assert abs(np.mean(sizes) - 0.8) < 3.9 * np.std(sizes) / math.sqrt(4000)


def test_effect_size_needs_three_seeds_with_spread() -> None:
    rng = np.random.default_rng(13)
    for seeds in (1, 2):
        assert paired_difference(rng.random((seeds, 9)), rng.random((seeds, 9))).effect_size is None
    assert paired_difference(rng.random((3, 9)), rng.random((3, 9))).effect_size is not None


def test_the_same_seed_gives_the_same_estimate_and_another_one_not() -> None:
    scores = np.random.default_rng(14).random((3, 30))
    assert mean_estimate(scores, seed=5) == mean_estimate(scores, seed=5)
    assert mean_estimate(scores, seed=5).interval != mean_estimate(scores, seed=6).interval


def test_bounds_cut_the_interval_of_a_low_pass_rate() -> None:
    scores = np.zeros((2, 30))
    scores[0, 0] = 1
    assert mean_estimate(scores).interval[0] < 0
    estimate = mean_estimate(scores, bounds=(0, 1))
    assert estimate.interval == (0.0, mean_estimate(scores).interval[1])
    assert (estimate.p_value, estimate.effect_size) == (None, None)


def test_estimate_as_json() -> None:
    estimate = paired_difference(np.eye(3), np.zeros((3, 3)))
    assert isinstance(estimate, Estimate)
    assert json.loads(json.dumps(estimate.to_dict(), allow_nan=False)) == {
        "value": estimate.value,
        "interval": list(estimate.interval),
        "standard_error": estimate.standard_error,
        "p_value": estimate.p_value,
        "effect_size": None,
        "seeds": 3,
        "problems": 3,
    }


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_variance_components_are_the_u_statistics(seeds: int, problems: int, seed: int) -> None:
    """Averages over pairs: products and squares whose expectation is a component, whatever the distribution."""
    d = np.random.default_rng(seed).exponential(size=(seeds, problems))
    rows, columns = list(permutations(range(seeds), 2)), list(permutations(range(problems), 2))
    expected = {
        "seed": np.mean([(d[s, p] - d[t, p]) * (d[s, q] - d[t, q]) / 2 for s, t in rows for p, q in columns]),
        "problem": np.mean([(d[s, p] - d[s, q]) * (d[t, p] - d[t, q]) / 2 for s, t in rows for p, q in columns]),
        "residual": np.mean([(d[s, p] - d[t, p] - d[s, q] + d[t, q]) ** 2 / 4 for s, t in rows for p, q in columns]),
    }
    assert variance_components(d) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_expected_standard_error_is_that_of_simulated_means() -> None:
    """2,000 means; their deviation is known to 1.6%, accepted 6.2% (false-alarm rate 1e-4)."""
    rng = np.random.default_rng(15)
    means = [
        float((rng.normal(0, 2, (3, 1)) + rng.normal(0, 3, 8) + rng.normal(0, 4, (3, 8))).mean()) for _ in range(2000)
    ]
    components = {"seed": 4.0, "problem": 9.0, "residual": 16.0}
    assert expected_standard_error(components, 3, 8) == pytest.approx(np.std(means), rel=0.062)
    assert expected_standard_error({"seed": -1.0, "problem": 0.0, "residual": 8.0}, 1, 2) == pytest.approx(2.0)


def closed_testing(p_values: dict[str, float]) -> dict[str, float]:
    """The definition behind Holm: a hypothesis falls when every family containing it falls to Bonferroni."""
    names = list(p_values)
    families = [family for size in range(1, len(names) + 1) for family in combinations(names, size)]
    local = {family: min(1.0, len(family) * min(p_values[name] for name in family)) for family in families}
    return {name: max(local[family] for family in families if name in family) for name in names}


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3), st.sampled_from([0.0, 0.01, 0.02, 0.04, 0.3, 1.0]) | st.floats(0, 1), max_size=6
    )
)
def test_holm_is_closed_testing(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    assert adjusted == pytest.approx(closed_testing(p_values), rel=1e-12)


def pairs_won(scores, labels) -> float:
    positive = [score for score, label in zip(scores, labels, strict=True) if label]
    negative = [score for score, label in zip(scores, labels, strict=True) if not label]
    return float(np.mean([(p > n) + (p == n) / 2 for p in positive for n in negative]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=20))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, labels = zip(*rows, strict=True)
    if len(set(labels)) == 2:
        assert auroc(scores, labels) == pytest.approx(pairs_won(scores, labels), abs=1e-12)


def test_auroc_ranks_infinite_scores() -> None:
    assert auroc([-math.inf, 0.0, -math.inf, math.inf], [0, 1, 1, 1]) == pytest.approx(2.5 / 3)


def test_auroc_interval_is_the_cluster_bootstrap() -> None:
    """Against a plain loop with its own random numbers; quantiles of 4,000 and 10,000 resamples, accepted 0.012."""
    rng = np.random.default_rng(16)
    labels = rng.random(90) < 0.4
    # Rounded, so that there are ties.
    scores = np.round(labels * 0.7 + rng.normal(size=90) + np.repeat(rng.normal(size=30), 3), 1)
    groups = np.repeat(np.arange(30), 3) * 10
    estimate = auroc_estimate(scores, labels, groups)
    resampled = []
    for _ in range(4000):
        rows = np.concatenate([np.arange(3) + 3 * g for g in rng.integers(30, size=30)])
        positive, negative = scores[rows][labels[rows]], scores[rows][~labels[rows]]
        resampled.append(np.mean(np.sign(np.subtract.outer(positive, negative))) / 2 + 0.5)
    assert estimate.value == pytest.approx(pairs_won(scores, labels), abs=1e-12)
    assert estimate.interval == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.012)
    assert estimate.standard_error == pytest.approx(np.std(resampled), rel=0.06)
    assert (estimate.seeds, estimate.problems, estimate.p_value, estimate.effect_size) == (1, 30, None, None)


def test_auroc_interval_covers_the_truth_only_when_rollouts_of_a_prompt_stay_together() -> None:
    """Scores and labels of a prompt are strongly dependent. Nominal 95%, accepted 91% to 96% with prompts as groups;
    with rows as groups it must be significantly below 91% (it is near 74%). False-alarm rate 1e-4.
    """
    rng = np.random.default_rng(17)

    def draw(prompts):
        shared = rng.normal(size=(prompts, 1))
        labels = 2 * shared + rng.normal(size=(prompts, 8)) > 0
        return (2 * shared + rng.normal(size=(prompts, 8))).ravel(), labels.ravel()

    truth = auroc(*draw(200_000))
    groups, trials, covered, covered_by_rows = np.repeat(np.arange(60), 8), 300, 0, 0
    for trial in range(trials):
        scores, labels = draw(60)
        low, high = auroc_estimate(scores, labels, groups, resamples=200, seed=trial).interval
        covered += low <= truth <= high
        low, high = auroc_estimate(scores, labels, resamples=200, seed=trial).interval
        covered_by_rows += low <= truth <= high
    assert_share(covered, trials, 0.91, 0.96)
    assert covered_by_rows < stats.binom.ppf(1e-4, trials, 0.91)


def test_auroc_leaves_out_resamples_with_one_class() -> None:
    """Two groups, one per class: half of the resamples hold one class only, and all others give the same number."""
    estimate = auroc_estimate([1.0, 2.0, 2.0, 3.0], [0, 0, 1, 1], ["a", "a", "b", "b"])
    assert (estimate.value, estimate.interval, estimate.standard_error) == (0.875, (0.875, 0.875), 0.0)


def test_band_is_the_t_interval_of_every_point() -> None:
    values = np.random.default_rng(18).normal(size=(5, 3))
    mean, low, high = band(values, level=0.9)
    for k in range(3):
        expected = stats.t.interval(0.9, 4, loc=values[:, k].mean(), scale=stats.sem(values[:, k]))
        assert (low[k], high[k]) == pytest.approx(expected, rel=1e-9)
        assert mean[k] == pytest.approx(values[:, k].mean())


def test_band_of_one_seed_has_no_width() -> None:
    for line in band([[0.1, 0.2]]):
        assert line.tolist() == [0.1, 0.2]


@pytest.mark.parametrize("seeds", [2, 3, 5, 20, 300])
def test_power_is_the_probability_of_a_large_t(seeds: int) -> None:
    """P(|Z + shift| > critical s) = E[Phi(shift - critical s) + Phi(-shift - critical s)], integrated over s."""
    spread = stats.chi(seeds - 1, scale=1 / math.sqrt(seeds - 1))
    for effect in (0.0, -0.3, 1.0, 3.0, 11.0, 80.0):
        for level in (0.8, 0.95, 0.99):
            critical, shift = stats.t.ppf((1 + level) / 2, seeds - 1), effect * math.sqrt(seeds)

            def tails(s: float, critical: float = critical, shift: float = shift) -> float:
                return stats.norm.cdf(shift - critical * s) + stats.norm.cdf(-shift - critical * s)

            # Most of what differs from 0 and 1 lies around shift / critical.
            ends = np.unique(np.clip([0, *(abs(shift) / critical + np.array([-9, -1, 0, 1, 9]) / critical), 9], 0, 9))
            parts = pairwise(ends)
            expected = math.fsum(integrate.quad(lambda s, t=tails: t(s) * spread.pdf(s), *part)[0] for part in parts)
            assert power(effect * 0.02, 0.02, seeds, level) == pytest.approx(expected, abs=1e-8)


def test_power_is_the_share_of_simulated_tests_that_find_the_difference() -> None:
    """20,000 t tests; false-alarm rate 1e-4."""
    samples = np.random.default_rng(19).normal(0.5, 0.8, (20_000, 6))
    found = int((stats.ttest_1samp(samples, 0.0, axis=1).pvalue <= 0.05).sum())
    expected = power(0.5, 0.8, 6)
    assert_share(found, 20_000, expected, expected)


@pytest.mark.parametrize(("difference", "spread"), [(0.02, 0.02), (-0.01, 0.03), (0.5, 0.01), (0.004, 0.05)])
def test_seeds_needed_is_the_first_that_suffices(difference: float, spread: float) -> None:
    seeds = seeds_needed(difference, spread, power=0.9)
    assert power(difference, spread, seeds) >= 0.9
    assert seeds == 2 or power(difference, spread, seeds - 1) < 0.9


def test_area_under_curve() -> None:
    assert area_under_curve([0, 10, 40], [0.0, 1.0, 0.0]) == pytest.approx(0.5)
    assert area_under_curve([5, 10], [0.25, 0.25]) == 0.25
    # Unevenly spaced points on a straight line: the mean is the value half-way.
    steps = np.array([2.0, 3.0, 7.0, 12.0])
    curves = np.multiply.outer(np.arange(6.0).reshape(2, 3), steps)
    assert area_under_curve(steps, curves) == pytest.approx(np.arange(6.0).reshape(2, 3) * 7)


def test_steps_to_target() -> None:
    steps, scores = [0, 10, 20, 30], [0.1, 0.3, 0.2, 0.6]
    assert steps_to_target(steps, scores, 0.05) == 0
    assert steps_to_target(steps, scores, 0.1) == 0
    assert steps_to_target(steps, scores, 0.3) == 10
    # The first crossing counts, though the curve falls back below.
    assert steps_to_target(steps, scores, 0.25) == pytest.approx(7.5)
    assert steps_to_target(steps, scores, 0.4) == pytest.approx(25)
    assert steps_to_target(steps, scores, 0.61) is None


TABLE = np.zeros((3, 4))
HOLE = [[0.0, 1.0], [math.nan, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_estimate([0.1, 0.2]), r"scores_SP must be a matrix .* got shape \(2,\)"),
        (lambda: mean_estimate(np.zeros((0, 3))), r"scores_SP must be a matrix .* got shape \(0, 3\)"),
        (lambda: mean_estimate(HOLE), r"scores_SP\[1, 0\] is nan"),
        (lambda: mean_estimate([[1.0]]), "one seed and one problem"),
        (lambda: mean_estimate(TABLE, resamples=99), "resamples must be at least 100, got 99"),
        (lambda: mean_estimate(TABLE, level=95), "level must lie between 0 and 1, got 95"),
        (lambda: mean_estimate(TABLE, strata_P=[0, 1]), r"strata_P has shape \(2,\) for 4 problems"),
        (lambda: mean_estimate(TABLE, strata_P=[0, 0, 0, 8]), "strata_P has a single problem of suite 8"),
        (lambda: mean_estimate(TABLE + 2, bounds=(0, 1)), r"values from 2.0 to 2.0, outside bounds \(0, 1\)"),
        (lambda: paired_difference(TABLE, TABLE[:2]), r"first_SP has shape \(3, 4\) and second_SP \(2, 4\)"),
        (lambda: paired_difference(np.zeros((2, 2)), HOLE), r"second_SP\[1, 0\] is nan"),
        (lambda: variance_components(TABLE[:1]), r"differences_SP has shape \(1, 4\)"),
        (lambda: expected_standard_error({"seed": 1.0}, 2, 2), "components lacks problem, residual"),
        (
            lambda: expected_standard_error({"seed": 1.0, "problem": 1.0, "residual": 1.0}, 0, 2),
            "seeds must be at least 1, got 0",
        ),
        (lambda: holm({"a": 0.1, "b": 1.5}), r"p_values\['b'\] must be in \[0, 1\], got 1.5"),
        (lambda: holm({"a": math.nan}), r"p_values\['a'\] .* got nan"),
        (lambda: area_under_curve([1], [0.5]), "steps has 1 value"),
        (lambda: area_under_curve([], []), r"steps must be a list .* got shape \(0,\)"),
        (lambda: area_under_curve([1, 2], [0.5]), r"scores has shape \(1,\) for 2 steps"),
        (lambda: area_under_curve([1, 3, 3], [0.5] * 3), r"steps\[2\] = 3 follows 3"),
        (lambda: area_under_curve([1, 3], [0.5, math.inf]), r"scores\[1\] is inf"),
        (lambda: steps_to_target([1, 2], TABLE[:, :2], 0.5), r"one curve, got shape \(3, 2\)"),
        (lambda: steps_to_target([1, 2], [0, 1], math.nan), "target must be a finite score, got nan"),
        (lambda: auroc([1.0, 2.0], [1, 1]), "no negative row of 2"),
        (lambda: auroc([1.0, 2.0], [False, False]), "no positive row of 2"),
        (lambda: auroc([1.0, math.nan], [0, 1]), r"scores\[1\] is nan"),
        (lambda: auroc([1.0, 2.0], [0, 0.5]), "labels must be 0 or 1, got 0.5"),
        (lambda: auroc([1.0, 2.0], [0]), r"scores has shape \(2,\) and labels \(1,\)"),
        (lambda: auroc_estimate([1.0, 2.0], [0, 1], [0]), r"groups has shape \(1,\) for 2 scores"),
        (lambda: auroc_estimate([1.0, 2.0], [0, 1], ["a", "a"]), "groups has only 'a'"),
        (lambda: band([0.1, 0.2]), "values_SK must be a matrix"),
        (lambda: band(TABLE, level=0.0), "level must lie between 0 and 1, got 0.0"),
        (lambda: power(math.nan, 1.0, 5), "difference must be finite, got nan"),
        (lambda: power(0.1, 0.0, 5), "spread must be a positive standard deviation, got 0.0"),
        (lambda: power(0.1, 1.0, 1), "seeds must be at least 2 for a t test, got 1"),
        (lambda: seeds_needed(0.0, 1.0), "difference must not be 0"),
        (lambda: seeds_needed(0.1, 1.0, power=1.0), "power must lie between 0 and 1, got 1.0"),
    ],
)
def test_refusals_name_the_argument_and_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seeds", [(5, 5), (3, 20), (2, 40)])
def test_the_p_value_of_a_mean_of_two_settings_is_that_of_welch(seeds: tuple[int, int]) -> None:
    """The mean of two estimates is a difference with one sign turned, which Welch's test is about."""
    rng = np.random.default_rng(7)
    first, second = (rng.normal(0.3, spread, count) for spread, count in zip((1.0, 0.2), seeds, strict=True))
    parts = [(sample.mean(), stats.sem(sample), len(sample) - 1) for sample in (first, second)]
    assert combined_p_value(parts) == pytest.approx(stats.ttest_ind(first, -second, equal_var=False).pvalue, rel=1e-6)


def test_a_p_value_of_known_errors_is_normal() -> None:
    assert combined_p_value([(0.5, 0.3, 0), (0.1, 0.4, 0)]) == pytest.approx(2 * stats.norm.sf(0.6 / 0.5))
    assert combined_p_value([(0.0, 0.0, 4)]) == 1.0 and combined_p_value([(0.1, 0.0, 4)]) == 0.0
