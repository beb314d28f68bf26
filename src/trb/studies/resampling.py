"""Tables of scores, resampled over seeds and problems at once: what the estimates are made of.

Pure functions of numpy arrays, and the checks of their arguments. Left out: what the estimates are called and mean
(`trb.studies.statistics`).

Shape suffixes: S seeds, P problems, N effects of one axis, R resamples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trb.errors import InputError

__all__ = [
    "Floats",
    "check_resampling",
    "check_share",
    "chunks_of",
    "columns_of",
    "curve_of",
    "labelled_rows",
    "quantiles_of",
    "summarise",
    "table_of",
    "variance_components",
]

Floats = NDArray[np.float64]

MIN_RESAMPLES = 100

# Of the largest score: a mean of so little is what rounding leaves of zero, and so is a spread. One answer in a million
# problems is far more.
_ROUNDING = 1e-12

# Below so many problems the estimate of their component is too rough to shrink by: cut at zero, it left intervals that
# covered 88% (2 problems) to 93.5% (8) in simulation. Unshrunk ones are wider by 5% to 70%, and cover 95% and more.
_SHRUNK_FROM = 10

# Numbers held at once while resampling: 32 MB per array of int64 or float64.
_CHUNK = 2**22


def variance_components(differences_SP: ArrayLike) -> dict[str, float]:
    """Unbiased estimates of the variances `seed`, `problem` and `residual` of a crossed table, in squared score units.

    Two-way analysis of variance without replication (Searle, Casella and McCulloch, 1992, "Variance Components"). An
    estimate of `seed` or `problem` may be negative: the truth is then near zero.

    Raises:
        ValueError: fewer than two seeds or problems, or non-finite values.
    """
    table = table_of("differences_SP", differences_SP)
    seeds, problems = table.shape
    if min(seeds, problems) < 2:
        raise InputError(f"differences_SP has shape {table.shape}; components need at least 2 seeds and 2 problems")
    means_S, means_P = table.mean(axis=1), table.mean(axis=0)
    leftover = table - means_S[:, None] - means_P + table.mean()
    residual = float(np.square(leftover).sum()) / ((seeds - 1) * (problems - 1))
    return {
        "seed": float(means_S.var(ddof=1)) - residual / problems,
        "problem": float(means_P.var(ddof=1)) - residual / seeds,
        "residual": residual,
    }


@dataclass(frozen=True)
class _Summary:
    """What `mean_estimate` and `paired_difference` share. Deviations: resampled means around zero."""

    value: float
    interval: tuple[float, float]
    standard_error: float
    spread: float
    """Standard deviation over seeds; 0 for one."""
    deviations_R: Floats


def summarise(
    table: Floats, columns: list[NDArray[np.intp]], resamples: int, seed: int, level: float, largest: float
) -> _Summary:
    """The crossed estimate of one table; `columns` holds the problems of each suite, `largest` the size of the scores
    that it was computed from."""
    check_resampling(resamples, level)
    if table.size == 1:
        raise InputError("one seed and one problem show no spread; an interval needs at least 2 of either")
    rng = np.random.default_rng(seed)
    means_S = np.mean([table[:, members].mean(axis=1) for members in columns], axis=0)
    noise = _ROUNDING * largest
    effects = [means_S, *(_problem_effects(table[:, members]) / len(columns) for members in columns)]
    effects = [np.zeros_like(part) if np.ptp(part) <= noise else part for part in effects]
    variance, deviations = 0.0, np.zeros(resamples)
    for part in effects:
        if part.size > 1:
            variance += float(part.var(ddof=1)) / part.size
            deviations += _resampled_means(part, resamples, rng)
    value = float(means_S.mean())
    value = 0.0 if abs(value) <= noise else value
    low, high = quantiles_of(deviations, level)
    spread = float(effects[0].std(ddof=1)) if means_S.size > 1 else 0.0
    return _Summary(value, (value + low, value + high), math.sqrt(variance), spread, deviations)


def _problem_effects(table: Floats) -> Floats:
    """[P] the problems' means, shrunk so that their variance estimates the problem component alone.

    With one seed the residual cannot be told apart, and belongs in the interval: there is no seeds' part to carry it.
    Those of few problems stay as they are.
    """
    means_P = table.mean(axis=0)
    if table.shape[0] == 1 or table.shape[1] < _SHRUNK_FROM:
        return means_P
    variance = float(means_P.var(ddof=1))
    if variance == 0:
        return means_P
    return means_P * math.sqrt(max(0.0, variance_components(table)["problem"]) / variance)


def _resampled_means(effects_N: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """[R] bootstrap deviations of the mean of N ≥ 2 effects, with the spread of a t law with N - 1 degrees.

    sqrt(N / (N - 1)) makes the bootstrap variance unbiased and sqrt((N - 1) / chi^2) turns normal into t.
    """
    size = effects_N.size
    centred = effects_N - effects_N.mean()
    parts = [centred[rng.integers(size, size=(count, size))].mean(axis=1) for count in chunks_of(resamples, size)]
    return np.concatenate(parts) * np.sqrt(size / rng.chisquare(size - 1, resamples))


def quantiles_of(values_R: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def chunks_of(resamples: int, width: int) -> list[int]:
    """Resamples split so that an array of a part's resamples x `width` stays below `_CHUNK` numbers."""
    rows = max(1, _CHUNK // width)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


def table_of(name: str, values: ArrayLike) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise InputError(f"{name} must be a matrix with a row per seed, at least 1 by 1; got shape {table.shape}")
    _check_finite(name, table)
    return table


def columns_of(strata_P: ArrayLike | None, problems: int) -> list[NDArray[np.intp]]:
    """The problems of each suite; one suite of all problems without strata."""
    if strata_P is None:
        return [np.arange(problems)]
    strata = np.asarray(strata_P)
    if strata.shape != (problems,):
        raise InputError(f"strata_P has shape {strata.shape} for {problems} problems; give one suite per problem")
    labels, counts = np.unique(strata, return_counts=True)
    if problems > 1 and counts.min() == 1:
        raise InputError(
            f"strata_P has a single problem of suite {labels[counts.argmin()].item()!r}, which shows no spread; "
            "give every suite at least 2 problems or leave it out"
        )
    return [np.flatnonzero(strata == label) for label in labels]


def curve_of(steps: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    steps_K, curves = np.asarray(steps, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if steps_K.ndim != 1 or not steps_K.size:
        raise InputError(f"steps must be a list of at least one step, got shape {steps_K.shape}")
    if curves.shape[-1:] != steps_K.shape:
        raise InputError(f"scores has shape {curves.shape} for {steps_K.size} steps; the last axis must be the steps")
    _check_finite("steps", steps_K)
    _check_finite("scores", curves)
    late = np.flatnonzero(np.diff(steps_K) <= 0)
    if late.size:
        k = int(late[0])
        raise InputError(
            f"steps must increase, but steps[{k + 1}] = {steps_K[k + 1]:g} follows {steps_K[k]:g}; sort them"
        )
    return steps_K, curves


def labelled_rows(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    scores_N, labels_N = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores_N.ndim != 1 or scores_N.shape != labels_N.shape:
        raise InputError(f"scores has shape {scores_N.shape} and labels {labels_N.shape}; give one of each per row")
    missing = np.flatnonzero(np.isnan(scores_N))
    if missing.size:
        raise InputError(f"scores[{missing[0]}] is nan; drop rows without a score")
    other = labels_N[~np.isin(labels_N, (0, 1))]
    if other.size:
        raise InputError(f"labels must be 0 or 1, got {other[0].item()!r}; threshold them first")
    positive = labels_N.astype(bool)
    for kind, count in (("positive", int(positive.sum())), ("negative", int((~positive).sum()))):
        if not count:
            raise InputError(f"labels has no {kind} row of {positive.size}; AUROC needs both classes, sample more rows")
    return scores_N, positive


def _check_finite(name: str, values: Floats) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = ", ".join(map(str, bad[0]))
        raise InputError(
            f"{name}[{where}] is {values[tuple(bad[0])]}; every entry must be finite, drop what is missing"
        )


def check_resampling(resamples: int, level: float) -> None:
    if resamples < MIN_RESAMPLES:
        raise InputError(f"resamples must be at least {MIN_RESAMPLES}, got {resamples}; 10000 is the default")
    check_share("level", level)


def check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name} must lie between 0 and 1, got {value}; 95% is 0.95")
