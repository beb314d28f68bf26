"""Numbers that change from one optimizer step to the next: KL budgets, and the ramps of the paper's baselines.

A `Schedule` is asked for its value at a step. Those here are functions of the step; one with a memory is shown each
step's statistics afterwards (`observe`) and travels with the checkpoint (`state_dict`, `load_state_dict`), so that a
resumed run goes on with the same values. What it is shown was reduced over all processes before, so that all hold
the same one. Which policy or loss a value stands for is decided in `trb.training.methods`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trb.errors import InputError, did_you_mean, real

__all__ = [
    "KINDS",
    "Budget",
    "Constant",
    "FirstSteps",
    "GapBudget",
    "Ramp",
    "Schedule",
    "SequenceBudget",
    "completion_budget",
    "kl_budget",
    "ramp",
]

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

    def last(self) -> float:
        """The value when all that is to happen has happened, however long the training."""
        return self.value(1 << 40)

    def readings(self) -> dict[str, float]:
        """What a memory holds, by the names under which it is logged."""
        return {}

    def observe(self, step: int, statistics: Mapping[str, float]) -> None:  # noqa: B027 (most have no memory)
        """Step `step` is done; its averages over all processes, under the names of the log without `trb/`."""

    @property
    def memory(self) -> str:
        """What `state_dict` is a state of: only a schedule of which this is the same can go on from it."""
        return type(self).__name__

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
        if not real("initial_kl_budget", self.initial_kl_budget) >= 0:
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
    """`number` in the first `steps` steps, then 0."""

    steps: int
    number: float = 1.0

    def value(self, step: int) -> float:
        return float(self.number) if step < self.steps else 0.0


# How much of what a completion cost before is forgotten at each step, and over how many steps a debt is paid.
_FORGET, _REPAY_STEPS = 0.5, 5
# A step's spending is at most expected to grow so much: the first estimates are made far from where they are used.
_GROWTH = 8.0


@dataclass
class SequenceBudget(Schedule):
    """Holds Σ_t KL(μ_t || student) at `target` nats per completion on average, however long completions are.

    What a completion costs at a value v is taken to be c · v^power, c a running mean of what was seen; what was spent
    too much or too little before is made good over the next steps. This is the dual ascent of docs/theory.md in the
    variable that the sampler reads. Observes `sequence_kl`: of blended completions, nats.

    A target that falls is followed with a lag, as what a completion costs is taken from the steps before; and where a
    pair has less between its models than the target asks for, what could not be spent is owed, and spent later on, up
    to twice the target at a step. That this be forgotten was tried and taken back (docs/experiments.md).

    Attributes:
        target: B, nats per completion, > 0 and finite.
        start: the value of the first step, before anything is known.
        highest: no value is above it.
        power: 1 where v is a budget per token; 2 where it is a teacher weight.
        left: of the target, at each step; in [0, 1], never rising.
    """

    target: float
    start: float
    highest: float
    power: int = 1
    left: Schedule = field(default_factory=lambda: Constant(1.0))
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < real("sequence_kl_budget", self.target) < math.inf:
            raise InputError(f"sequence_kl_budget must be positive and finite, in nats, got {self.target}")
        self._value, self._cost, self._owed = min(self.start, self.highest), math.nan, 0.0

    @property
    def follows_length(self) -> bool:  # type: ignore[override]
        return self.left.follows_length

    def value(self, step: int) -> float:
        return self._value if self.left.value(step) > 0 else 0.0

    def last(self) -> float:
        return self._value if self.left.last() > 0 else 0.0

    def observe(self, step: int, statistics: Mapping[str, float]) -> None:
        spent = statistics.get("sequence_kl")
        target = self.target * self.left.value(step + 1)
        if spent is None or not self._value or not target:
            return
        cost = spent / self._value**self.power
        self._owed += self.target * self.left.value(step) - spent
        self._cost = cost if math.isnan(self._cost) else self._cost + _FORGET * (cost - self._cost)
        aim = min(max(target + self._owed / _REPAY_STEPS, target / 2), 2 * target)
        largest = min(self.highest, self._value * _GROWTH ** (1 / self.power))
        wanted = (aim / self._cost) ** (1 / self.power) if self._cost > 0 else math.inf
        self._value = min(wanted, largest)
        # Where even the highest value does not spend the target, nothing is owed that could ever be paid.
        if self._value == self.highest:
            self._owed = min(self._owed, self.target)

    @property
    def memory(self) -> str:
        return f"{super().memory} of degree {self.power}"

    def state_dict(self) -> dict[str, Any]:
        cost = None if math.isnan(self._cost) else self._cost
        return {"value": self._value, "cost": cost, "owed": self._owed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._value, self._owed = min(state["value"], self.highest), state["owed"]  # which may be lower by now
        self._cost = math.nan if state["cost"] is None else state["cost"]


# Of the gap that was there at the start: how much of a step's is mixed in, and where blending ends.
_GAP_WEIGHT, _GAP_END = 0.2, 0.03
# Steps before the comparison of blended rollouts with the student's own may end the warm-up.
_COMPARED_STEPS = 10


class _Advantage:
    """By how much a number is larger for blended rollouts, over the last steps, and how sure that is."""

    def __init__(self) -> None:
        self.mean, self.square, self.steps = 0.0, 0.0, 0

    def add(self, difference: float) -> None:
        self.steps += 1
        weight = max(_GAP_WEIGHT, 1 / self.steps)
        self.mean += weight * (difference - self.mean)
        self.square += weight * (difference**2 - self.square)

    @property
    def is_there(self) -> bool:
        """Larger by more than the standard error of an exponential mean."""
        error = math.sqrt(max(0.0, self.square - self.mean**2) * _GAP_WEIGHT / (2 - _GAP_WEIGHT))
        return self.mean > error


class GapBudget(Schedule):
    """A budget that shrinks with the gap it is there to bridge, and ends by itself.

    ε_k = ε0 · min(1, D_k / D_0), with D the reverse KL per token that the loss measures, smoothed. It ends for good
    when D has fallen to 3% of D_0; or when, after ten steps, blended rollouts are no better than the student's own
    ones of the same prompts, in the teacher's log-probability per token and in reward, by more than the standard error.
    Observes `reverse_kl`, and where there are both kinds of rollouts `teacher_log_prob_blended` and `_student`, and
    `reward_blended` and `_student`.

    Args:
        base: the budget ε0; a `SequenceBudget` is told what would have been spent without the shrinking.
    """

    remembers: ClassVar[bool] = True
    _COMPARED = ("teacher_log_prob", "reward")

    def __init__(self, base: Schedule) -> None:
        self.base = base
        self._first: float | None = None
        self._gap = 0.0
        self._ended = False
        self._advantages = {name: _Advantage() for name in self._COMPARED}

    @property
    def _left(self) -> float:
        """Of the gap at the start, at most 1."""
        if self._first is None:
            return 1.0
        return min(1.0, self._gap / self._first) if self._first > 0 else 0.0

    def value(self, step: int) -> float:
        return 0.0 if self._ended else self.base.value(step) * self._left

    def last(self) -> float:
        return 0.0

    def readings(self) -> dict[str, float]:
        return {"gap": self._left}

    def observe(self, step: int, statistics: Mapping[str, float]) -> None:
        if self._ended or "reverse_kl" not in statistics:
            return
        spent = statistics.get("sequence_kl")
        shown = statistics if spent is None else {**statistics, "sequence_kl": spent / self._left}
        self.base.observe(step, shown)
        gap = statistics["reverse_kl"]
        if self._first is None:
            self._first = self._gap = gap
        self._gap += _GAP_WEIGHT * (gap - self._gap)
        for name, advantage in self._advantages.items():
            pair = [statistics.get(f"{name}_{kind}") for kind in ("blended", "student")]
            if pair[0] is not None and pair[1] is not None:
                advantage.add(pair[0] - pair[1])
        self._ended = self._left < _GAP_END or self._no_better()

    def _no_better(self) -> bool:
        known = [advantage for advantage in self._advantages.values() if advantage.steps >= _COMPARED_STEPS]
        return bool(known) and not any(advantage.is_there for advantage in known)

    @property
    def memory(self) -> str:
        return f"{super().memory} over {self.base.memory}"

    def state_dict(self) -> dict[str, Any]:
        advantages = {name: dict(vars(advantage)) for name, advantage in self._advantages.items()}
        own = {"first": self._first, "gap": self._gap, "ended": self._ended, "advantages": advantages}
        return {**own, "base": self.base.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first, self._gap, self._ended = state["first"], state["gap"], state["ended"]
        for name, values in state["advantages"].items():
            vars(self._advantages[name]).update(values)
        self.base.load_state_dict(state["base"])


def completion_budget(schedule: Schedule) -> SequenceBudget | None:
    """The schedule that holds completions to a number of nats: this one, or the one beneath a `GapBudget`."""
    inner = schedule.base if isinstance(schedule, GapBudget) else schedule
    return inner if isinstance(inner, SequenceBudget) else None


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
