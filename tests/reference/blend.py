"""The trust-region blend by brute force: evaluate the geometric path, normalise it, measure its KL, bisect.

Vectorised over rows so that ten thousand of them fit in a test; every quantity is the literal definition.
"""

import numpy as np
from numpy.typing import ArrayLike

from .distributions import Array, kl, log_normalise

GRID = 33
BISECTIONS = 60


def path(log_student: ArrayLike, log_teacher: ArrayLike, weight: ArrayLike) -> Array:
    """Log of student^(1-w) teacher^w, normalised over the shared support; the student itself at w = 0."""
    log_student = np.asarray(log_student, np.float64)
    log_teacher = np.asarray(log_teacher, np.float64)
    weight = np.asarray(weight, np.float64)[..., None]
    common = np.isfinite(log_student) & np.isfinite(log_teacher)
    safe_student = np.where(common, log_student, 0.0)
    safe_teacher = np.where(common, log_teacher, 0.0)
    scores = np.where(common, (1.0 - weight) * safe_student + weight * safe_teacher, -np.inf)
    # A row without any common event has no path: it is only ever asked for at weight 0.
    scores = np.where(common.any(-1, keepdims=True), scores, log_student)
    return np.where(weight == 0.0, log_student, log_normalise(scores))


def entry_cost(log_student: ArrayLike, log_teacher: ArrayLike) -> Array:
    """KL(student given the common support || student): the limit of the path's cost as w -> 0+."""
    inside = np.isfinite(np.asarray(log_teacher))
    mass = np.where(inside, np.exp(np.asarray(log_student, np.float64)), 0.0).sum(-1)
    # When nothing is excluded the mass is 1 by definition; its rounding must not be read as a cost.
    full = (inside | ~np.isfinite(np.asarray(log_student))).all(-1)
    with np.errstate(divide="ignore"):
        return np.where(full, 0.0, -np.log(np.minimum(mass, 1.0)))


def path_cost(log_student: ArrayLike, log_teacher: ArrayLike, weight: ArrayLike) -> Array:
    """KL(path(w) || student)."""
    return kl(path(log_student, log_teacher, weight), log_student)


def largest_weight(log_student: ArrayLike, log_teacher: ArrayLike, budget: ArrayLike) -> Array:
    """max { w in [0, 1] : KL(path(w) || student) <= budget }, without assuming that the KL is monotone.

    The last feasible point of a grid is found first, then the interval above it is bisected, keeping the
    lower end feasible. 0 when the budget is 0, or too small to leave what the teacher calls impossible;
    1 when it is infinite.
    """
    log_student, log_teacher = np.asarray(log_student, np.float64), np.asarray(log_teacher, np.float64)
    budget = np.broadcast_to(np.asarray(budget, np.float64), log_student.shape[:-1])
    low = np.zeros_like(budget)
    for weight in np.linspace(0.0, 1.0, GRID)[1:]:
        feasible = path_cost(log_student, log_teacher, np.full_like(budget, weight)) <= budget
        low = np.where(feasible, weight, low)
    high = np.minimum(low + 1.0 / (GRID - 1), 1.0)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        feasible = path_cost(log_student, log_teacher, middle) <= budget
        low, high = np.where(feasible, middle, low), np.where(feasible, high, middle)
    excluded = (budget == 0.0) | (entry_cost(log_student, log_teacher) > budget)
    return np.where(np.isposinf(budget), 1.0, np.where(excluded, 0.0, low))


def behavior(log_student: ArrayLike, log_teacher: ArrayLike, budget: ArrayLike) -> Array:
    """Log-probabilities of the trust-region behavior policy; exactly the teacher for an infinite budget."""
    return law_of(log_student, log_teacher, largest_weight(log_student, log_teacher, budget), budget)


def law_of(log_student: ArrayLike, log_teacher: ArrayLike, weight: ArrayLike, budget: ArrayLike) -> Array:
    """The behavior policy that a solver which settled on `weight` must return.

    That is the path at `weight`, except that nothing is left to keep an infinite budget from the teacher,
    whatever the student calls impossible.
    """
    unconstrained = np.broadcast_to(np.isposinf(np.asarray(budget, np.float64)), np.shape(weight))
    return np.where(unconstrained[..., None], log_teacher, path(log_student, log_teacher, weight))
