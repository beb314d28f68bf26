"""Distributions over the last axis, held as float64 log-probabilities.

`-inf` is an impossible event. Masks written with the lowest finite number of a dtype mean the same thing,
so logits below `MASK_THRESHOLD` are read as impossible.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MASK_THRESHOLD = -1e30


def log_normalise(scores: ArrayLike) -> Array:
    """Log-probabilities proportional to exp(scores) over the last axis."""
    scores = np.asarray(scores, dtype=np.float64)
    scores = np.where(scores < MASK_THRESHOLD, -np.inf, scores)
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(log_p: ArrayLike, log_q: ArrayLike) -> Array:
    """KL(p || q) = sum over the support of p of p log(p / q); infinite where p has mass and q has none."""
    log_p, log_q = np.broadcast_arrays(np.asarray(log_p, np.float64), np.asarray(log_q, np.float64))
    p = np.exp(log_p)
    inside = p > 0
    ratio = np.zeros_like(p)
    ratio[inside] = log_p[inside] - log_q[inside]
    return (p * ratio).sum(-1)


def entropy(log_p: ArrayLike) -> Array:
    """Shannon entropy in nats."""
    p = np.exp(np.asarray(log_p, np.float64))
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1)


def shared_events(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    student_eos: int | Sequence[int],
    teacher_eos: int | Sequence[int],
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Both models' probabilities (not logarithms) of the events they share, indexed by student token id.

    Each model is first conditioned on the rows both heads have, then tempered as a law over token ids. An id in
    either model's set of stop ids is the same event, "stop": its probability at the temperature sits on the
    student's first stop id, and the other ids of the set have probability 0.
    """
    first = student_eos if isinstance(student_eos, int) else student_eos[0]
    stops = {*np.atleast_1d(student_eos).tolist(), *np.atleast_1d(teacher_eos).tolist()}
    student_logits, teacher_logits = np.asarray(student_logits), np.asarray(teacher_logits)
    rows = min(student_logits.shape[-1], teacher_logits.shape[-1])

    def merged(logits: Array) -> Array:
        p = np.exp(log_normalise(logits[..., :rows])) ** (1.0 / temperature)
        p /= p.sum(-1, keepdims=True)
        total = sum(p[..., i] for i in stops)
        for i in stops:
            p[..., i] = 0.0
        p[..., first] = total
        return p

    return merged(student_logits), merged(teacher_logits)
