"""Numbers that change from one optimizer step to the next: KL budgets, and the ramps of the paper's baselines.

A `Schedule` is asked for its value at a step. Those here are functions of the step; one with a memory is shown each
step's statistics afterwards (`observe`) and travels with the checkpoint (`state_dict`, `load_state_dict`), so that a
resumed run goes on with the same values. What it is shown was reduced over all processes before, so that all hold
the same one. Which policy or loss a value stands for is decided in `trb.training.methods`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trb.errors import InputError, did_you_mean

__all__ = ["KINDS", "Budget", "Constant", "FirstSteps", "Ramp", "Schedule", "kl_budget", "ramp"]

KINDS = ("linear", "cosine", "constant")


class Schedule(ABC):
    """A number for each optimizer step, counted from 0. Subclasses without a memory give `value` and no more.

    Attributes:
        remembers: whether `observe` wants to be called; only then are a step's statistics reduced.
        follows_length: whether values depend on how many steps the training has.
    """

    remembers: ClassVar[bool] = False
    follows_length: bool = False

    @abstractmethod
    def value(self, step: int) -> float:
        """The number of optimizer step `step`; asked any number of times, also for steps to come."""

    def observe(self, step: int, statistics: Mapping[str, float]) -> None:  # noqa: B027 (most have no memory)
        """Step `step` is done; its averages over all processes, under the names of the log without `trb/`."""

    def state_dict(self) -> dict[str, Any]:
        """What must be kept with a checkpoint, as JSON types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from what `state_dict` gave."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The same number at every step."""

    number: float

    def value(self, step: int) -> float:
        return self.number


@dataclass(frozen=True)
class Budget(Schedule):
    """`kl_budget` as a schedule; raises what it raises."""

    initial_kl_budget: float
    blend_warmup_steps: int
    kind: str = "linear"

    def __post_init__(self) -> None:
        if not self.initial_kl_budget >= 0:
            raise InputError(f"initial_kl_budget must be a non-negative number of nats, got {self.initial_kl_budget}")
        if self.blend_warmup_steps < 0:
            raise InputError(f"blend_warmup_steps must be at least 0, got {self.blend_warmup_steps}")
        if self.kind not in KINDS:
            hint = did_you_mean(str(self.kind), KINDS)
            raise InputError(f"unknown budget schedule {self.kind!r}; choose one of {', '.join(KINDS)}{hint}")

    def value(self, step: int) -> float:
        remaining = 1 - _progress(step, self.blend_warmup_steps)
        if self.kind == "constant":
            return float(self.initial_kl_budget)
        if remaining <= 0:
            return 0.0
        share = remaining if self.kind == "linear" else (1 - math.cos(math.pi * remaining)) / 2
        return float(self.initial_kl_budget) * share


@dataclass(frozen=True)
class Ramp(Schedule):
    """Linear from `start` at step 0 to `end` at step `steps`; at the end of training if `steps` is None.

    `length` gives the number of training steps, which is known only once training begins.
    """

    start: float
    end: float
    steps: int | None
    length: Callable[[], int] = lambda: 0

    @property
    def follows_length(self) -> bool:  # type: ignore[override]
        return self.steps is None

    def value(self, step: int) -> float:
        return ramp(step, self.start, self.end, self.length() if self.steps is None else self.steps)


@dataclass(frozen=True)
class FirstSteps(Schedule):
    """1 in the first `steps` steps, then 0."""

    steps: int

    def value(self, step: int) -> float:
        return float(step < self.steps)


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
    return Budget(initial_kl_budget, blend_warmup_steps, kind).value(step)


def ramp(step: int, start: float, end: float, steps: int) -> float:
    """Linear from `start` at step 0 to `end` at step `steps` and after; used by temperature warm-up and Veto."""
    return start + (end - start) * _progress(step, steps)


def _progress(step: int, steps: int) -> float:
    if step < 0:
        raise InputError(f"step must be at least 0, got {step}")
    if steps < 0:
        raise InputError(f"the number of warm-up steps must be at least 0, got {steps}")
    return 1.0 if step >= steps else step / steps
