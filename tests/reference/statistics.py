"""Pearson's chi-square test of samples against an exactly known law."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from scipy.stats import chi2

MIN_EXPECTED = 10.0
Value = TypeVar("Value", bound=Hashable)


def goodness_of_fit(samples: Iterable[Value], law: Mapping[Value, float]) -> float:
    """p-value of the samples under the law; 0 if any sample is impossible under it.

    Cells expected fewer than `MIN_EXPECTED` times are pooled, as the chi-square approximation needs.
    """
    counts = Counter(samples)
    if any(law.get(value, 0.0) == 0.0 for value in counts):
        return 0.0
    n = sum(counts.values())
    statistic, cells, pooled_expected, pooled_observed = 0.0, 0, 0.0, 0
    for value, probability in law.items():
        expected, observed = n * probability, counts.get(value, 0)
        if expected < MIN_EXPECTED:
            pooled_expected += expected
            pooled_observed += observed
        else:
            statistic += (observed - expected) ** 2 / expected
            cells += 1
    if pooled_expected > 0:
        # A pool too thin to be a cell of its own would break the approximation: it is added conservatively.
        statistic += (pooled_observed - pooled_expected) ** 2 / max(pooled_expected, MIN_EXPECTED)
        cells += 1
    return float(chi2.sf(statistic, cells - 1))
