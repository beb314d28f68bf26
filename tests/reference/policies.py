"""One-step laws of the behavior policies: (student probabilities, teacher probabilities) -> probabilities.

`p_student` and `p_teacher` are `[..., V]` and already on shared events; each row has the law of its own.
"""

from collections.abc import Callable

import numpy as np

from . import blend
from .distributions import Array

Law = Callable[[Array, Array], Array]


def _log(p: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(p)


def student() -> Law:
    return lambda p_student, p_teacher: p_student


def teacher() -> Law:
    return lambda p_student, p_teacher: p_teacher


def temperature(value: float) -> Law:
    def law(p_student: Array, p_teacher: Array) -> Array:
        powered = p_student ** (1.0 / value)
        return powered / powered.sum(-1, keepdims=True)

    return law


def trust_region(budget: float) -> Law:
    return lambda p_student, p_teacher: np.exp(blend.behavior(_log(p_student), _log(p_teacher), budget))


def geometric(weight: float) -> Law:
    """Products of powers, normalised; 0^0 is 1."""

    def law(p_student: Array, p_teacher: Array) -> Array:
        product = np.power(p_student, 1 - weight) * np.power(p_teacher, weight)
        return product / product.sum(-1, keepdims=True)

    return law


def skd(top_k: int, teacher_temperature: float) -> Law:
    """Sum over the student's draft: one in the teacher's top-k, and possible, stays; any other the teacher replaces."""

    def law(p_student: Array, p_teacher: Array) -> Array:
        kept = set(np.argsort(-p_teacher, kind="stable")[:top_k].tolist())
        powered = p_teacher ** (1.0 / teacher_temperature)
        replacement = powered / powered.sum()
        total = np.zeros_like(p_student)
        for draft, probability in enumerate(p_student):
            if draft in kept and p_teacher[draft] > 0:
                total[draft] += probability
            else:
                total += probability * replacement
        return total

    return np.vectorize(law, signature="(v),(v)->(v)")
