"""Training methods: which policy the completions of a step are drawn from, and what its loss matches.

Two orthogonal halves. A *behavior* gives the policy of each optimizer step, a *target* its loss; both are an object
from `trb.policies` or `trb.losses` under a schedule. A method is a named pair of them. These tables are the only place
that knows a method: the configuration, the trainer, the planner, the report and the documentation read them, and an
entry added from outside works like ours (docs/extending.md).

Left out: the policies and losses themselves, and schedules (`trb.schedule`). Nothing here needs torch before a behavior
or target is built, so that the report's labels cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from trb.schedule import Budget, Constant, FirstSteps, GapBudget, Ramp, Schedule, SequenceBudget

if TYPE_CHECKING:
    from trb.losses import Loss
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
    "every_knob",
    "halves",
    "kl_budget_of",
    "knobs_of",
    "name_of",
    "owners_of",
    "pair_of",
    "target_of",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Scheduled(Generic[T]):
    """An object for each optimizer step: what `make` makes of the schedule's value there.

    Of a behavior, `share` of each prompt's rollouts are drawn from it, and the others from the student; and completions
    are cut after `horizon` tokens.
    """

    make: Callable[[float], T]
    schedule: Schedule
    share: Schedule = field(default_factory=lambda: Constant(1.0))
    horizon: Schedule = field(default_factory=lambda: Constant(math.inf))

    def at(self, step: int) -> T:
        return self.make(self.schedule.value(step))


Behavior = Scheduled["BehaviorPolicy"]
Target = Scheduled["Loss"]


@dataclass(frozen=True)
class Half(Generic[T]):
    """A behavior or a target by name.

    Attributes:
        text: what it does, in a few words, for `--help`.
        build: from a `TRBConfig`, and a function that gives the number of training steps once training has begun.
        knobs: fields of the configuration that `build` reads, and nothing else does.
        choice: one more, whose value decides in `BUDGET_SCHEDULES` which others are read; None for none.
    """

    text: str
    build: Callable[[Any, Callable[[], int]], Scheduled[T]]
    knobs: tuple[str, ...] = ()
    choice: str | None = None

    def reads(self, args: Any) -> set[str]:
        """The knobs that are read with a configuration's choice."""
        if self.choice is None:
            return {*self.knobs}
        return {*self.knobs, self.choice, *BUDGET_SCHEDULES[getattr(args, self.choice)].knobs}

    def may_read(self) -> set[str]:
        """The knobs that are read with some choice."""
        if self.choice is None:
            return {*self.knobs}
        return {*self.knobs, self.choice, *(knob for kind in BUDGET_SCHEDULES.values() for knob in kind.knobs)}


@dataclass(frozen=True)
class BudgetSchedule:
    """How a budget changes, by name.

    Attributes:
        text: in a few words, for `--help`.
        build: from a `TRBConfig`.
        knobs: fields of the configuration that `build` reads; besides them, `max_completion_length` alone.
    """

    text: str
    build: Callable[[Any], Schedule]
    knobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A named pair; `label` is its name in reports."""

    behavior: str
    loss: str
    label: str
    text: str


# ---- behaviors: the policy of each step ----

_DEFAULT_BUDGET = 0.01  # the paper's choice, nats per token
_DEFAULT_GAP_SHARE = 0.75


def _falling(kind: str) -> Callable[[Any], Schedule]:
    return lambda args: Budget(_initial_budget(args), args.blend_warmup_steps, kind)


def _initial_budget(args: Any) -> float:
    return _DEFAULT_BUDGET if args.initial_kl_budget is None else float(args.initial_kl_budget)


def _sequence(args: Any) -> Schedule:
    # Were every token to spend it, the first step would still keep to the target.
    start = args.sequence_kl_budget / args.max_completion_length
    return SequenceBudget(args.sequence_kl_budget, start, highest=args.sequence_kl_budget)


def _gap(args: Any) -> Schedule:
    return GapBudget(_sequence(args) if args.initial_kl_budget is None else Constant(_initial_budget(args)))


BUDGET_SCHEDULES: dict[str, BudgetSchedule] = {
    "linear": BudgetSchedule(
        "to 0 at blend_warmup_steps (paper)", _falling("linear"), ("initial_kl_budget", "blend_warmup_steps")
    ),
    "cosine": BudgetSchedule(
        "the same along a cosine", _falling("cosine"), ("initial_kl_budget", "blend_warmup_steps")
    ),
    "constant": BudgetSchedule("never", lambda args: Constant(_initial_budget(args)), ("initial_kl_budget",)),
    "sequence": BudgetSchedule("holds sequence_kl_budget nats per completion", _sequence, ("sequence_kl_budget",)),
    "gap": BudgetSchedule(
        "with the reverse KL, from initial_kl_budget or else sequence_kl_budget, and ends by itself",
        _gap,
        ("initial_kl_budget", "sequence_kl_budget"),
    ),
}
"""How the budget of `trust_region` falls; one from outside may join."""


def _share(args: Any, default: float = 1.0) -> Schedule:
    return Constant(default if args.behavior_share is None else float(args.behavior_share))


def _student(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import StudentPolicy

    return Scheduled(lambda _: StudentPolicy(), Constant(0.0))


def _trust_region(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import TrustRegionPolicy

    schedule = BUDGET_SCHEDULES[args.budget_schedule].build(args)
    share = _share(args, _DEFAULT_GAP_SHARE if isinstance(schedule, GapBudget) else 1.0)
    return Scheduled(TrustRegionPolicy, schedule, share)


def _fixed_budget(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import TrustRegionPolicy

    return Scheduled(TrustRegionPolicy, Constant(_initial_budget(args)), _share(args))


def _annealed_share(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import TrustRegionPolicy

    share = Ramp(1.0, 0.0, args.blend_warmup_steps)
    return Scheduled(TrustRegionPolicy, FirstSteps(args.blend_warmup_steps, _initial_budget(args)), share)


def _geometric(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import GeometricPolicy

    if args.teacher_weight is not None:
        return Scheduled(GeometricPolicy, Constant(float(args.teacher_weight)), _share(args))
    # The start is small where nothing is known of the pair: divergence grows like its square.
    return Scheduled(GeometricPolicy, SequenceBudget(args.sequence_kl_budget, 0.05, highest=1.0, power=2), _share(args))


def _skd(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import SKDPolicy

    temperature = Constant(args.skd_teacher_temperature)
    return Scheduled(lambda tau: SKDPolicy(args.skd_teacher_top_k, tau), temperature, _share(args))


def _temperature(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import TemperaturePolicy

    return Scheduled(TemperaturePolicy, Ramp(args.initial_temperature, 1.0, args.temperature_warmup_steps))


def _short_first(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import StudentPolicy

    horizon = Ramp(args.initial_horizon, args.max_completion_length, args.horizon_steps)
    return Scheduled(lambda _: StudentPolicy(), Constant(0.0), horizon=horizon)


def _teacher_first(args: Any, length: Callable[[], int]) -> Behavior:
    from trb.policies import StudentPolicy, TeacherPolicy

    return Scheduled(lambda first: TeacherPolicy() if first else StudentPolicy(), FirstSteps(args.sft_warmup_steps))


BEHAVIORS: dict[str, Half[BehaviorPolicy]] = {
    "student": Half("the student itself", _student),
    "trust_region": Half(
        "the policy closest to the teacher within a KL budget that shrinks to 0",
        _trust_region,
        ("behavior_share",),
        choice="budget_schedule",
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
    "teacher_first": Half("the teacher in the first steps, then the student", _teacher_first, ("sft_warmup_steps",)),
}


# ---- targets: the loss of each step ----


def _reverse_kl(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import ReverseKL

    return Scheduled(lambda _: ReverseKL(args.loss_top_k), Constant(0.0))


def _veto(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import Veto

    return Scheduled(
        lambda strength: Veto(args.loss_top_k, strength), Ramp(args.veto_strength, 0.0, args.veto_steps, length)
    )


def _supervised_first(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import ReverseKL, Supervised

    return Scheduled(
        lambda first: Supervised(args.loss_top_k) if first else ReverseKL(args.loss_top_k),
        FirstSteps(args.sft_warmup_steps),
    )


def _entropy_aware(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import EntropyAware

    return Scheduled(lambda _: EntropyAware(args.loss_top_k, args.eopd_entropy, args.forward_top_k), Constant(0.0))


def _token_importance(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import TokenImportance

    return Scheduled(lambda _: TokenImportance(args.loss_top_k, args.tip_share), Constant(0.0))


def _reliable_region(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import ReliableRegion

    return Scheduled(lambda _: ReliableRegion(args.loss_top_k, args.forward_top_k), Constant(0.0))


def _prefix_weighted(args: Any, length: Callable[[], int]) -> Target:
    from trb.losses import PrefixWeighted

    return Scheduled(lambda _: PrefixWeighted(args.loss_top_k, args.iw_gamma), Constant(0.0))


TARGETS: dict[str, Half[Loss]] = {
    "reverse_kl": Half("reverse KL to the teacher", _reverse_kl, ("loss_top_k",)),
    "veto": Half(
        "reverse KL to softmax(log teacher + strength * log student), strength falling to 0",
        _veto,
        ("loss_top_k", "veto_strength", "veto_steps"),
    ),
    "supervised_first": Half(
        "cross-entropy of the completions in the first steps, then reverse KL",
        _supervised_first,
        ("loss_top_k", "sft_warmup_steps"),
    ),
    "eopd": Half(
        "reverse KL, plus forward KL where the teacher's entropy is high",
        _entropy_aware,
        ("loss_top_k", "eopd_entropy", "forward_top_k"),
    ),
    "tip": Half(
        "reverse KL at the share of each completion's tokens that matter most",
        _token_importance,
        ("loss_top_k", "tip_share"),
    ),
    "tropd": Half(
        "reverse KL as far as the teacher would keep the token, forward KL as far as not",
        _reliable_region,
        ("loss_top_k", "forward_top_k"),
    ),
    "iw": Half(
        "reverse KL that counts less the more the completion has gone astray",
        _prefix_weighted,
        ("loss_top_k", "iw_gamma"),
    ),
}


# ---- methods: named pairs (those of the paper, section 6, and relatives) ----

METHODS: dict[str, Method] = {
    "trb": Method(
        *("trust_region", "reverse_kl", "TRB"),
        "trust-region behavior blending: the budget shrinks from initial_kl_budget to 0",
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
    "veto": Method(
        *("student", "veto", "Veto"),
        "the loss matches softmax(log teacher + strength * log student), strength falling to 0",
    ),
    "eopd": Method(
        *("student", "eopd", "EOPD"), "reverse KL, plus forward KL at tokens where the teacher's entropy is high"
    ),
    "tip": Method(*("student", "tip", "TIP"), "reverse KL at the share of tokens that matter most"),
    "tropd": Method(
        *("student", "tropd", "TrOPD"),
        "reverse KL as far as the teacher would keep the token, forward KL as far as not",
    ),
    "iw": Method(*("student", "iw", "IW-OPD"), "reverse KL that counts less the more the completion has gone astray"),
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


def kl_budget_of(policy: BehaviorPolicy) -> float:
    """ε of a policy, nats per token; 0 for one without a budget."""
    return float(getattr(policy, "kl_budget", 0.0))


CHOICES = ("method", "behavior", "loss", "budget_schedule")
"""The options that decide which knobs are read."""


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
    kinds: tuple[tuple[str, Mapping[str, Half]], ...] = (("behavior", BEHAVIORS), ("loss", TARGETS))
    owners = [f"{kind}: {name}" for kind, table in kinds for name, half in table.items() if knob in half.knobs]
    if any(half.choice == knob for half in halves()):
        owners += [f"behavior: {name}" for name, half in BEHAVIORS.items() if half.choice == knob]
    return owners + [f"budget_schedule: {name}" for name, kind in BUDGET_SCHEDULES.items() if knob in kind.knobs]
