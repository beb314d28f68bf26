"""How the KL budget shrinks over optimizer steps, and the other warm-up ramps of the paper's baselines.

Pure functions of the step: a resumed run computes the same value. Left out: schedules driven by training signals.
"""

import math

from trb.choices import did_you_mean

__all__ = ["KINDS", "kl_budget", "ramp"]

KINDS = ("linear", "cosine", "constant")


def kl_budget(step: int, initial_kl_budget: float, blend_warmup_steps: int, kind: str = "linear") -> float:
    """The budget ε_k of optimizer step `step`, counted from 0 (paper, section 3).

    Args:
        step: optimizer steps already taken, ≥ 0.
        initial_kl_budget: ε0, nats per token, ≥ 0.
        blend_warmup_steps: K, ≥ 0; the budget is 0 from step K on. Ignored by `"constant"`.
        kind: `"linear"` (the paper's, ε0 (1 - k/K)), `"cosine"`, or `"constant"` (fixed-ε blending).

    Raises:
        ValueError: a negative or NaN budget, a negative K or step, or an unknown kind.
    """
    if not initial_kl_budget >= 0:
        raise ValueError(f"initial_kl_budget must be a non-negative number of nats, got {initial_kl_budget}")
    if blend_warmup_steps < 0:
        raise ValueError(f"blend_warmup_steps must be at least 0, got {blend_warmup_steps}")
    if kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS)
        raise ValueError(f"unknown budget schedule {kind!r}; choose one of {', '.join(KINDS)}{hint}")
    remaining = 1 - _progress(step, blend_warmup_steps)
    if kind == "constant":
        return float(initial_kl_budget)
    if remaining <= 0:
        return 0.0
    share = remaining if kind == "linear" else (1 - math.cos(math.pi * remaining)) / 2
    return float(initial_kl_budget) * share


def ramp(step: int, start: float, end: float, steps: int) -> float:
    """Linear from `start` at step 0 to `end` at step `steps` and after; used by temperature warm-up and Veto."""
    return start + (end - start) * _progress(step, steps)


def _progress(step: int, steps: int) -> float:
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if steps < 0:
        raise ValueError(f"the number of warm-up steps must be at least 0, got {steps}")
    return 1.0 if step >= steps else step / steps
