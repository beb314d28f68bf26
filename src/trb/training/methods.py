"""Training methods: which policy the completions of a step are drawn from, and what its loss matches.

Two orthogonal halves. A *behavior* gives the policy of each optimizer step, a *target* its loss; both are an object
from `trb.policies` or `trb.losses` under a schedule. A method is a named pair of them. These tables are the only place
that knows a method: the configuration, the trainer, the planner, the report and the documentation read them, and an
entry added from outside works like ours (docs/extending.md).

Left out: the policies and losses themselves, and schedules (`trb.schedule`). Nothing here needs torch before a behavior
or target is built, so that the report's labels cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trb.errors import InputError, did_you_mean
from trb.training.behaviors import BEHAVIORS, BUDGET_SCHEDULES
from trb.training.halves import Behavior, BudgetSchedule, Half, Scheduled, Target
from trb.training.targets import TARGETS

if TYPE_CHECKING:
    from trb.policies import BehaviorPolicy

__all__ = [
    "BEHAVIORS",
    "BUDGET_SCHEDULES",
    "CHOICES",
    "METHODS",
    "TARGETS",
    "Behavior",
    "BudgetSchedule",
    "Half",
    "Method",
    "Scheduled",
    "Target",
    "behavior_of",
    "check_choice",
    "check_choices",
    "every_knob",
    "halves",
    "kl_budget_of",
    "knobs_of",
    "name_of",
    "needs_teacher",
    "owners_of",
    "pair_of",
    "target_of",
]


@dataclass(frozen=True)
class Method:
    """A named pair; `label` is its name in reports."""

    behavior: str
    loss: str
    label: str
    text: str


# ---- methods: named pairs (those of the paper, section 6, and relatives) ----

METHODS: dict[str, Method] = {
    "trb": Method(
        *("trust_region", "reverse_kl", "TRB"),
        "trust-region behavior blending: the budget shrinks to 0, by itself or from initial_kl_budget",
    ),
    "opd": Method("student", "reverse_kl", "OPD", "plain on-policy distillation: student rollouts throughout"),
    "fixed": Method(
        *("fixed_budget", "reverse_kl", "Fixed\N{NO-BREAK SPACE}ε"),
        "fixed-budget blending: initial_kl_budget, never annealed",
    ),
    "skd": Method(
        *("skd", "reverse_kl", "SKD"), "a student token outside the teacher's top-k is replaced by a teacher sample"
    ),
    "temperature": Method(
        "temperature", "reverse_kl", "Temperature", "student rollouts at a temperature that rises to 1"
    ),
    "sft": Method(
        *("teacher_first", "supervised_first", "SFT warm-up"),
        "the first updates are supervised on teacher completions of the same prompts",
    ),
    "veto": Method("student", "veto", "Veto", TARGETS["veto"].text),
    "eopd": Method(
        *("student", "eopd", "EOPD"), "reverse KL, plus forward KL at tokens where the teacher's entropy is high"
    ),
    "tip": Method(*("student", "tip", "TIP"), "reverse KL at the share of tokens that matter most"),
    "tropd": Method("student", "tropd", "TrOPD", TARGETS["tropd"].text),
    "iw": Method("student", "iw", "IW-OPD", TARGETS["iw"].text),
    "share": Method(
        *("annealed_share", "reverse_kl", "Annealed share"),
        "a share of the rollouts is blended with initial_kl_budget, falling from 1 to 0",
    ),
    "geometric": Method(
        *("geometric", "reverse_kl", "Geometric"),
        "the same teacher weight at every prefix, such that a completion spends sequence_kl_budget",
    ),
    "horizon": Method(
        *("short_first", "reverse_kl", "Short horizon"),
        "student rollouts, cut at a length that grows from initial_horizon to max_completion_length",
    ),
    "prefix": Method(
        *("teacher_prefix", "reverse_kl", "Teacher prefix"),
        "the student goes on from the first share of a teacher's completion, falling from initial_prefix_share to 0",
    ),
}


# ---- of a configuration ----


def pair_of(args: Any) -> tuple[str, str]:
    """The names of the behavior and the target that a `TRBConfig` asks for: its method's, or those given instead."""
    method = METHODS[args.method]
    return args.behavior or method.behavior, args.loss or method.loss


def name_of(args: Any) -> str:
    """What to call a run: its method, or its pair where that is another."""
    method, (behavior, loss) = METHODS[args.method], pair_of(args)
    return args.method if (method.behavior, method.loss) == (behavior, loss) else f"{behavior}+{loss}"


def behavior_of(args: Any, length: Callable[[], int] = lambda: 0) -> Behavior:
    """The behavior that a `TRBConfig` asks for; `length` gives the number of training steps."""
    return BEHAVIORS[pair_of(args)[0]].build(args, length)


def target_of(args: Any, length: Callable[[], int] = lambda: 0) -> Target:
    """The target that a `TRBConfig` asks for."""
    return TARGETS[pair_of(args)[1]].build(args, length)


def needs_teacher(behavior: Behavior, step: int) -> bool:
    """Whether the teacher takes part in the rollouts of a step."""
    return behavior.at(step).needs_teacher or behavior.prefix.value(step) > 0


def kl_budget_of(policy: BehaviorPolicy) -> float:
    """ε of a policy, nats per token; 0 for one without a budget."""
    return float(getattr(policy, "kl_budget", 0.0))


CHOICES = ("method", "behavior", "loss", "budget_schedule")
"""The options that decide which knobs are read."""


def check_choices(args: Any) -> None:
    """Raises InputError for a method, behavior, loss or schedule that there is not."""
    tables: tuple[Mapping[str, Any], ...] = (METHODS, BEHAVIORS, TARGETS, BUDGET_SCHEDULES)
    for name, table in zip(CHOICES, tables, strict=True):
        if name == "method" or getattr(args, name) is not None:
            check_choice(name, getattr(args, name), table)


def check_choice(name: str, value: Any, choices: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises InputError unless `value` of the option `name` is one of `choices`."""
    if value not in choices:
        close = did_you_mean(str(value), choices)
        raise InputError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}{close}")


def knobs_of(configurations: Iterable[Any]) -> set[str]:
    """The knobs that some configurations read, together; of each, only `CHOICES` are looked at."""
    found: set[str] = set()
    for args in configurations:
        behavior, loss = pair_of(args)
        found |= BEHAVIORS[behavior].reads(args) | TARGETS[loss].reads(args)
    return found


def halves() -> list[Half[Any]]:
    """All behaviors and targets."""
    return [*BEHAVIORS.values(), *TARGETS.values()]


def every_knob() -> set[str]:
    """The knobs of all behaviors and targets."""
    return {knob for half in halves() for knob in half.may_read()}


def owners_of(knob: str) -> list[str]:
    """Whose knob it is, in words; nobody's if it is no knob."""
    tables: tuple[Mapping[str, Half[Any]], ...] = (BEHAVIORS, TARGETS)
    behaviors, losses = (
        [name for name, half in table.items() if knob in (*half.knobs, half.choice)] for table in tables
    )
    methods = [name for name, method in METHODS.items() if method.behavior in behaviors or method.loss in losses]
    owners = [f"method: {', '.join(methods)}"] if methods else []
    owners += [*(f"behavior: {name}" for name in behaviors), *(f"loss: {name}" for name in losses)]
    return owners + [f"budget_schedule: {name}" for name, kind in BUDGET_SCHEDULES.items() if knob in kind.knobs]
