"""Behaviors: the policy that the rollouts of each optimizer step are drawn from, and how its budget falls.

Left out: the policies (`trb.policies`), the schedules (`trb.schedule`), and what the loss does meanwhile
(`trb.training.targets`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from trb.schedule import Budget, Constant, FirstSteps, GapBudget, Ramp, Schedule, SequenceBudget
from trb.training.halves import Behavior, BudgetSchedule, Half, Scheduled

if TYPE_CHECKING:
    from trb.policies import BehaviorPolicy

__all__ = [
    "BEHAVIORS",
    "BLEND_WARMUP_STEPS",
    "BUDGET_SCHEDULES",
    "DEFAULT_BUDGET",
    "FALLING",
    "HELD",
    "budget_schedule_of",
    "sequence_budget_of",
]

DEFAULT_BUDGET = 0.01  # the paper's choice, nats per token
BLEND_WARMUP_STEPS = 25  # and its K
_UNKNOWN = 1 << 40  # steps, of a training that has not begun

# Nats of a completion: of what holds them to the end, and of what falls, which begins nearly at the teacher and is over
# after the first of so many equal parts of the training. Chosen on seeds that no result is reported of
# (docs/experiments.md, 29 November 2026).
HELD, FALLING, _FALLING_PARTS = 1.0, 16.0, 5

Length: TypeAlias = Callable[[], int]


def _falling(kind: str) -> Callable[[Any, Length], Schedule]:
    return lambda args, length: Budget(_initial_budget(args), args.blend_warmup_steps, kind)


def _initial_budget(args: Any) -> float:
    return DEFAULT_BUDGET if args.initial_kl_budget is None else float(args.initial_kl_budget)


def budget_schedule_of(args: Any) -> str:
    """The name of a configuration's schedule; where it has none, of one that needs nothing, or else of the paper's."""
    if args.budget_schedule is not None:
        return str(args.budget_schedule)
    return "sequence-linear" if args.initial_kl_budget is None and args.blend_warmup_steps is None else "linear"


def sequence_budget_of(args: Any, default: float = HELD) -> float:
    """B of a configuration, nats per completion."""
    return default if args.sequence_kl_budget is None else float(args.sequence_kl_budget)


def _sequence(args: Any, length: Length, target: float | None = None) -> SequenceBudget:
    target = sequence_budget_of(args) if target is None else target
    # Were every token to spend it, the first step would still keep to the target.
    return SequenceBudget(target, start=target / args.max_completion_length, highest=target)


def _falling_sequence(args: Any, length: Length) -> Schedule:
    def steps() -> int:
        # Before training begins its length is not known; the first step has all of the budget whatever it is.
        return math.ceil((length() or _UNKNOWN) / _FALLING_PARTS)

    held = _sequence(args, length, sequence_budget_of(args, FALLING))
    return replace(held, left=Ramp(1.0, 0.0, None, steps))


def _gap(args: Any, length: Length) -> Schedule:
    base = _sequence(args, length) if args.initial_kl_budget is None else Constant(_initial_budget(args))
    return GapBudget(base)


BUDGET_SCHEDULES: dict[str, BudgetSchedule] = {
    "linear": BudgetSchedule(
        "to 0 at blend_warmup_steps (paper)", _falling("linear"), ("initial_kl_budget", "blend_warmup_steps")
    ),
    "cosine": BudgetSchedule(
        "the same along a cosine", _falling("cosine"), ("initial_kl_budget", "blend_warmup_steps")
    ),
    "constant": BudgetSchedule("never", lambda args, length: Constant(_initial_budget(args)), ("initial_kl_budget",)),
    "sequence": BudgetSchedule("holds sequence_kl_budget nats per completion", _sequence, ("sequence_kl_budget",)),
    "sequence-linear": BudgetSchedule(
        "from sequence_kl_budget nats per completion to 0 after a fifth of the training",
        _falling_sequence,
        ("sequence_kl_budget",),
    ),
    "gap": BudgetSchedule(
        "with the reverse KL, from initial_kl_budget or else sequence_kl_budget, and ends by itself",
        _gap,
        ("initial_kl_budget", "sequence_kl_budget"),
        share=0.75,
    ),
}
"""How the budget of `trust_region` falls; one from outside may join."""


def _share(args: Any, default: float = 1.0) -> Schedule:
    return Constant(default if args.behavior_share is None else float(args.behavior_share))


def _student(args: Any, length: Length) -> Behavior:
    from trb.policies import StudentPolicy

    return Scheduled(lambda _: StudentPolicy(), Constant(0.0))


def _trust_region(args: Any, length: Length) -> Behavior:
    from trb.policies import TrustRegionPolicy

    kind = BUDGET_SCHEDULES[args.budget_schedule]
    return Scheduled(TrustRegionPolicy, kind.build(args, length), _share(args, kind.share))


def _fixed_budget(args: Any, length: Length) -> Behavior:
    from trb.policies import TrustRegionPolicy

    return Scheduled(TrustRegionPolicy, Constant(_initial_budget(args)), _share(args))


def _annealed_share(args: Any, length: Length) -> Behavior:
    from trb.policies import TrustRegionPolicy

    share = Ramp(1.0, 0.0, args.blend_warmup_steps)
    return Scheduled(TrustRegionPolicy, FirstSteps(args.blend_warmup_steps, _initial_budget(args)), share)


def _geometric(args: Any, length: Length) -> Behavior:
    from trb.policies import GeometricPolicy

    if args.teacher_weight is not None:
        return Scheduled(GeometricPolicy, Constant(float(args.teacher_weight)), _share(args))
    # The start is small where nothing is known of the pair: divergence grows like its square.
    schedule = SequenceBudget(sequence_budget_of(args), 0.05, highest=1.0, power=2)
    return Scheduled(GeometricPolicy, schedule, _share(args))


def _skd(args: Any, length: Length) -> Behavior:
    from trb.policies import SKDPolicy

    temperature = Constant(args.skd_teacher_temperature)
    return Scheduled(lambda tau: SKDPolicy(args.skd_teacher_top_k, tau), temperature, _share(args))


def _temperature(args: Any, length: Length) -> Behavior:
    from trb.policies import TemperaturePolicy

    return Scheduled(TemperaturePolicy, Ramp(args.initial_temperature, 1.0, args.temperature_warmup_steps))


def _short_first(args: Any, length: Length) -> Behavior:
    from trb.policies import StudentPolicy

    horizon = Ramp(args.initial_horizon, args.max_completion_length, args.horizon_steps)
    return Scheduled(lambda _: StudentPolicy(), Constant(0.0), horizon=horizon)


def _teacher_prefix(args: Any, length: Length) -> Behavior:
    from trb.policies import StudentPolicy

    prefix = Ramp(args.initial_prefix_share, 0.0, args.prefix_steps)
    return Scheduled(lambda _: StudentPolicy(), Constant(0.0), prefix=prefix)


def _teacher_first(args: Any, length: Length) -> Behavior:
    from trb.policies import StudentPolicy, TeacherPolicy

    return Scheduled(lambda first: TeacherPolicy() if first else StudentPolicy(), FirstSteps(args.sft_warmup_steps))


BEHAVIORS: dict[str, Half[BehaviorPolicy]] = {
    "student": Half("the student itself", _student),
    "trust_region": Half(
        "the policy closest to the teacher within a KL budget that shrinks to 0",
        _trust_region,
        ("behavior_share",),
        choice="budget_schedule",
        kinds=BUDGET_SCHEDULES,
    ),
    "fixed_budget": Half("the same with a budget that stays", _fixed_budget, ("initial_kl_budget", "behavior_share")),
    "annealed_share": Half(
        "a share of the rollouts, falling from 1 to 0, with a budget that stays; the student for the others",
        _annealed_share,
        ("initial_kl_budget", "blend_warmup_steps"),
    ),
    "geometric": Half(
        "student^(1-weight) teacher^weight, by default with the weight that spends sequence_kl_budget",
        _geometric,
        ("teacher_weight", "sequence_kl_budget", "behavior_share"),
    ),
    "skd": Half(
        "the student; a token outside the teacher's top k is replaced by a teacher sample",
        _skd,
        ("skd_teacher_top_k", "skd_teacher_temperature", "behavior_share"),
    ),
    "temperature": Half(
        "the student at a temperature that rises to 1",
        _temperature,
        ("initial_temperature", "temperature_warmup_steps"),
    ),
    "short_first": Half(
        "the student; completions are cut at a length that grows to max_completion_length",
        _short_first,
        ("initial_horizon", "horizon_steps"),
    ),
    "teacher_prefix": Half(
        "the student, from the first share of a teacher's completion on; the share falls to 0",
        _teacher_prefix,
        ("initial_prefix_share", "prefix_steps"),
    ),
    "teacher_first": Half("the teacher in the first steps, then the student", _teacher_first, ("sft_warmup_steps",)),
}
