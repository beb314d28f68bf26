"""The training objective one token at a time, with gradients by central differences.

Logits are the free variables. What the method holds constant (the support, the student mass on it, the
teacher) is computed once at the point of evaluation and passed in explicitly, so a finite difference sees
what autograd should.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from .distributions import Array, log_normalise


def support(student_logits: ArrayLike, k: int) -> list[int]:
    """The ids of the k largest student logits; everything when k is 0 or at least the vocabulary size."""
    logits = np.asarray(student_logits, np.float64)
    size = len(logits) if k == 0 else min(k, len(logits))
    return np.argsort(-logits, kind="stable")[:size].tolist()


def token_objective(logits: Array, teacher_logits: ArrayLike, ids: list[int], mass: float) -> float:
    """(1 / mass) * sum over ids of p log(p / q) - p + q; p, q are normalised over the whole vocabulary."""
    log_p, log_q = log_normalise(logits), log_normalise(teacher_logits)
    total = 0.0
    for i in ids:
        p, q = np.exp(log_p[i]), np.exp(log_q[i])
        total += (p * (log_p[i] - log_q[i]) if p > 0 else 0.0) - p + q
    return total / mass


def mean_objective(
    student_logits: ArrayLike, teacher_logits: ArrayLike, mask: ArrayLike, k: int
) -> Callable[[Array], float]:
    """The token mean as a function of the student's logits, constants frozen at `student_logits`."""
    base = np.asarray(student_logits, np.float64)
    teacher_logits = np.asarray(teacher_logits, np.float64)
    positions = [index for index, keep in np.ndenumerate(np.asarray(mask)) if keep]
    frozen = {}
    for index in positions:
        ids = support(base[index], k)
        frozen[index] = (ids, float(np.exp(log_normalise(base[index]))[ids].sum()))

    def objective(logits: Array) -> float:
        if not positions:
            return 0.0
        values = [token_objective(logits[i], teacher_logits[i], *frozen[i]) for i in positions]
        return sum(values) / len(positions)

    return objective


def reverse_kl(student_logits: ArrayLike, teacher_logits: ArrayLike, mask: ArrayLike, k: int) -> float:
    """Value of the loss at `student_logits`."""
    objective = mean_objective(student_logits, teacher_logits, mask, k)
    return objective(np.asarray(student_logits, np.float64))


def central_difference(function: Callable[[Array], float], at: ArrayLike, step: float = 1e-5) -> Array:
    """Gradient of a scalar function, one coordinate at a time; error about step^2 + 1e-16 / step."""
    at = np.asarray(at, np.float64)
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def score_gradient(student_logits: ArrayLike, teacher_logits: ArrayLike, k: int) -> Array:
    """sum over the support of w (log p - log q) grad log p at one prefix: the gradient as it is stated."""
    log_p, log_q = log_normalise(student_logits), log_normalise(teacher_logits)
    p = np.exp(log_p)
    ids = support(student_logits, k)
    mass = p[ids].sum()
    gradient = np.zeros_like(p)
    for i in ids:
        grad_log_p = -p
        grad_log_p[i] += 1.0
        gradient += p[i] / mass * (log_p[i] - log_q[i]) * grad_log_p
    return gradient


def veto_target(student_logits: ArrayLike, teacher_logits: ArrayLike, strength: float) -> Array:
    """Log of teacher * student^strength, normalised."""
    return log_normalise(log_normalise(teacher_logits) + strength * log_normalise(student_logits))
