"""How large a difference so many seeds can find, and how many seeds a difference takes.

For whoever designs a study: nothing in the package calls it. Left out: planning for other problems
(`trb.studies.statistics.expected_standard_error`).
"""

import math

from scipy import special

from trb.errors import InputError
from trb.studies.resampling import check_share

__all__ = ["power", "seeds_needed"]


def power(difference: float, spread: float, seeds: int, level: float = 0.95) -> float:
    """Probability that a two-sided paired t test over `seeds` finds a true `difference`, at error rate 1 - level.

    Exact for normal differences (noncentral t). It speaks about the problems at hand: for other problems plan with
    `expected_standard_error`.

    Args:
        difference: true mean difference, in the unit of the scores.
        spread: standard deviation of one seed's difference (its mean over the problems), > 0.
        seeds: number of pairs, ≥ 2.
        level: 1 - the probability of a false alarm, in (0, 1).

    Raises:
        ValueError: an argument out of range.
    """
    return _power(difference, spread, seeds, level)


def _power(difference: float, spread: float, seeds: int, level: float) -> float:
    if not math.isfinite(difference):
        raise InputError(f"difference must be finite, got {difference}")
    if not 0 < spread < math.inf:
        raise InputError(f"spread must be a positive standard deviation, got {spread}")
    if seeds < 2:
        raise InputError(f"seeds must be at least 2 for a t test, got {seeds}")
    check_share("level", level)
    from scipy import stats  # half a second that nothing else here needs

    shift, critical = difference / spread * math.sqrt(seeds), special.stdtrit(seeds - 1, (1 + level) / 2)
    # Both tails as upper ones: nct.cdf has no number for far lower tails.
    return min(1.0, sum(float(stats.nct.sf(critical, seeds - 1, way)) for way in (shift, -shift)))


def seeds_needed(difference: float, spread: float, power: float = 0.8, level: float = 0.95) -> int:
    """The fewest seeds, at least 2, with which `power()` is at least `power`; arguments as there.

    Raises:
        ValueError: a difference of zero (no number suffices), or an argument out of range.
    """
    check_share("power", power)
    if difference == 0:
        raise InputError("difference must not be 0: no number of seeds finds it; pass the smallest one that matters")
    high = 2
    while _power(difference, spread, high, level) < power:
        high *= 2
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        if _power(difference, spread, middle, level) < power:
            low = middle + 1
        else:
            high = middle
    return high
