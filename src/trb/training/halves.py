"""What behaviors and targets are: an object for each optimizer step, and the options that it is built from.

Left out: which there are (`trb.training.behaviors`, `trb.training.targets`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from trb.schedule import Constant, Schedule

if TYPE_CHECKING:
    from trb.losses import Loss
    from trb.policies import BehaviorPolicy

__all__ = ["Behavior", "BudgetSchedule", "Half", "Scheduled", "Target"]

T = TypeVar("T")


@dataclass(frozen=True)
class Scheduled(Generic[T]):
    """An object for each optimizer step: what `make` makes of the schedule's value there.

    Of a behavior, `share` of each prompt's rollouts are drawn from it, and the others from the student; completions are
    cut after `horizon` tokens; and they begin with the first `prefix` of a completion of the teacher.
    """

    make: Callable[[float], T]
    schedule: Schedule
    share: Schedule = field(default_factory=lambda: Constant(1.0))
    horizon: Schedule = field(default_factory=lambda: Constant(math.inf))
    prefix: Schedule = field(default_factory=lambda: Constant(0.0))

    def at(self, step: int) -> T:
        return self.make(self.schedule.value(step))

    def schedules(self) -> Iterator[Schedule]:
        """All of them."""
        return (value for value in vars(self).values() if isinstance(value, Schedule))


Behavior: TypeAlias = "Scheduled[BehaviorPolicy]"
Target: TypeAlias = "Scheduled[Loss]"


@dataclass(frozen=True)
class BudgetSchedule:
    """How a budget changes, by name.

    Attributes:
        text: in a few words, for `--help`.
        build: from a `TRBConfig`, and a function that gives the number of training steps once training has begun.
        knobs: fields of the configuration that `build` reads; besides them, `max_completion_length` alone.
        share: of the rollouts are drawn from the policy unless `behavior_share` says otherwise: below 1 for a schedule
            that compares them with the student's.
    """

    text: str
    build: Callable[[Any, Callable[[], int]], Schedule]
    knobs: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Half(Generic[T]):
    """A behavior or a target by name.

    Attributes:
        text: what it does, in a few words, for `--help`.
        build: from a `TRBConfig`, and a function that gives the number of training steps once training has begun.
        knobs: fields of the configuration that do something only where such a half is chosen. `build` may also read
            what every run has (`max_completion_length`).
        choice: one more, whose value decides which others are read; None for none.
        kinds: what that one may be.
    """

    text: str
    build: Callable[[Any, Callable[[], int]], Scheduled[T]]
    knobs: tuple[str, ...] = ()
    choice: str | None = None
    kinds: Mapping[str, BudgetSchedule] = field(default_factory=dict)

    def reads(self, args: Any) -> set[str]:
        """The knobs that are read with a configuration's choice."""
        if self.choice is None:
            return {*self.knobs}
        return {*self.knobs, self.choice, *self.kinds[getattr(args, self.choice)].knobs}

    def may_read(self) -> set[str]:
        """The knobs that are read with some choice."""
        own = () if self.choice is None else (self.choice,)
        return {*self.knobs, *own, *(knob for kind in self.kinds.values() for knob in kind.knobs)}
