"""The training objective one token at a time, with gradients by central differences.

Logits are the free variables. What the method holds constant (the support, the student mass on it, the
teacher) is computed once at the point of evaluation and passed in explicitly, so a finite difference sees
what autograd should.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from .distributions import Array, entropy, log_normalise


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


# ---- relatives of the method: the loss of each token as a function of its logits, constants frozen at `at` ----

Objective = Callable[[Array], float]


def reverse_objective(at: Array, teacher_logits: Array, k: int) -> Objective:
    ids = support(at, k)
    mass = float(np.exp(log_normalise(at))[ids].sum())
    return lambda logits: token_objective(logits, teacher_logits, ids, mass)


def forward_objective(teacher_logits: Array, k: int) -> Objective:
    """Sum over the teacher's k likeliest ids of q log(q / p) - q + p."""
    log_q = log_normalise(teacher_logits)
    ids = support(teacher_logits, k)

    def objective(logits: Array) -> float:
        log_p, total = log_normalise(logits), 0.0
        for i in ids:
            q = np.exp(log_q[i])
            total += (q * (log_q[i] - log_p[i]) if q > 0 else 0.0) - q + np.exp(log_p[i])
        return float(total)

    return objective


def entropy_aware_objective(at: Array, teacher_logits: Array, k: int, threshold: float, forward_k: int) -> Objective:
    reverse, forward = reverse_objective(at, teacher_logits, k), forward_objective(teacher_logits, forward_k)
    unsure = float(entropy(log_normalise(teacher_logits))) > threshold
    return lambda logits: reverse(logits) + (forward(logits) if unsure else 0.0)


def reliability(at: Array, teacher_logits: Array, token: int) -> float:
    """The chance that a draw of `token` from the student is kept as the teacher's."""
    p, q = np.exp(log_normalise(at)), np.exp(log_normalise(teacher_logits))
    return 1.0 if q[token] >= p[token] else float(q[token] / p[token])


def important(entropies: list[float], divergences: list[float], share: float) -> list[int]:
    """The positions of one completion that are kept, in order; share * length need not be whole."""

    def scaled(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [0.0 if low == high else (value - low) / (high - low) for value in values]

    h, d = scaled(entropies), scaled(divergences)
    score = [1 - (1 - h[t]) * (1 - d[t]) for t in range(len(h))]  # 1 at both maxima, to the bit
    ranked = sorted(range(len(score)), key=lambda t: (-score[t], t))
    count = next(n for n in range(1, len(score) + 1) if n >= share * len(score) - 1e-9)
    return sorted(ranked[:count])


def prefix_weights(gaps: list[float], gamma: float) -> list[float]:
    """1 + gamma * (1 - what lies before the token of the sum of |log q - log p| over the completion)."""
    total = sum(map(abs, gaps))
    return [1 + gamma * (1 - (sum(map(abs, gaps[:t])) / total if total else 0.0)) for t in range(len(gaps))]
