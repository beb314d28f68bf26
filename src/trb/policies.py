"""Behavior policies: from which law each completion token is drawn.

A policy turns the student's and the teacher's log-probabilities at N prefixes into a `Target`: the law μ, and how
much of it a student draft may keep. The sampler drafts x from the student, keeps it with probability
`overlap(x) / student(x)`, and otherwise draws from the normalised `μ - overlap`; for any `overlap ≤ min(student, μ)`
that is an exact draw from μ. One policy object serves every sampler.

Which policy a step's rollouts have is decided in `trb.training.methods`, drawing from it in `sampling`. A policy of
one's own is a frozen dataclass with the members of `BehaviorPolicy`; under its name in `POLICIES` it reaches serving
engines.

Shape suffixes: N prefixes, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from trb.blend import weigh
from trb.blend.laws import DenseLaw, Law, kl, log_softmax
from trb.errors import InputError, named, real, whole
from trb.vocab import checked_temperature

__all__ = [
    "POLICIES",
    "BehaviorPolicy",
    "GeometricPolicy",
    "SKDPolicy",
    "StudentPolicy",
    "Target",
    "TeacherPolicy",
    "TemperaturePolicy",
    "TrustRegionPolicy",
    "samples_student",
]


@dataclass(frozen=True)
class Target:
    """The behavior law at N prefixes and what it costs.

    Attributes:
        law: log μ, read at single tokens or whole rows; samplers need few of them.
        overlap: `[N, V]` probability that a token is drafted from the student *and* kept; None for the largest
            possible, `min(student, μ)`.
        teacher_weight: `[N]` share of the teacher: β for the blend; for SKD the probability of a replacement.
        kl_student: `[N]` KL(μ || student), nats.
        kl_teacher: `[N]` KL(μ || teacher), nats; None where no teacher takes part.
    """

    law: Law
    overlap: Tensor | None
    teacher_weight: Tensor
    kl_student: Tensor
    kl_teacher: Tensor | None

    @property
    def log_probs(self) -> Tensor:
        """`[N, V]` log μ."""
        return self.law.rows(torch.arange(len(self.teacher_weight), device=self.teacher_weight.device))


class BehaviorPolicy(Protocol):
    """What a sampler needs of a policy."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the law depends on the teacher at all."""

    def target(self, student_log_probs: Tensor, teacher_log_probs: Tensor | None) -> Target:
        """The law at N prefixes from `[N, V]` log-probabilities over shared events."""


@dataclass(frozen=True)
class StudentPolicy:
    """Plain on-policy sampling: μ is the student."""

    needs_teacher: ClassVar[bool] = False

    def target(self, student_log_probs: Tensor, teacher_log_probs: Tensor | None = None) -> Target:
        zero_N = student_log_probs.new_zeros(student_log_probs.shape[0])
        kl_teacher_N = None if teacher_log_probs is None else kl(student_log_probs, teacher_log_probs)
        return Target(DenseLaw(student_log_probs), None, zero_N, zero_N, kl_teacher_N)


@dataclass(frozen=True)
class TemperaturePolicy:
    """The student at another temperature (paper, section 6: temperature warm-up). 1 is the student itself.

    It acts on shared events, where stopping is one event however many stop ids share its probability: p_stop^(1/T), not
    the sum of the ids' own powers, which the student's log-probabilities no longer tell apart.
    """

    temperature: float
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", checked_temperature(self.temperature))

    def target(self, student_log_probs: Tensor, teacher_log_probs: Tensor | None = None) -> Target:
        if self.temperature == 1:
            return StudentPolicy().target(student_log_probs, teacher_log_probs)
        law_NV = log_softmax(student_log_probs / self.temperature, student_log_probs.dtype)
        kl_teacher_N = None if teacher_log_probs is None else kl(law_NV, teacher_log_probs)
        weight_N = law_NV.new_zeros(law_NV.shape[0])
        return Target(DenseLaw(law_NV), None, weight_N, kl(law_NV, student_log_probs), kl_teacher_N)


@dataclass(frozen=True)
class TrustRegionPolicy:
    """The policy closest to the teacher with KL(μ || student) ≤ `kl_budget` at every prefix (paper, section 2)."""

    kl_budget: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "kl_budget", real("kl_budget", self.kl_budget))
        if not self.kl_budget >= 0:
            raise InputError(f"{named('kl_budget')} must be a non-negative number of nats, got {self.kl_budget}")

    @property
    def needs_teacher(self) -> bool:
        return self.kl_budget > 0

    def target(self, student_log_probs: Tensor, teacher_log_probs: Tensor | None) -> Target:
        if not self.needs_teacher:
            return StudentPolicy().target(student_log_probs, teacher_log_probs)
        blend = weigh(student_log_probs, _present(teacher_log_probs, self), self.kl_budget)
        return Target(blend.law, None, blend.teacher_weight, blend.kl_student, blend.kl_teacher)


@dataclass(frozen=True)
class GeometricPolicy:
    """μ ∝ student^(1-β) · teacher^β with the same β = `teacher_weight` in [0, 1] at every prefix.

    Trust-region blending moves along the same path and spends the same divergence at every prefix. One β for all spends
    it where the teacher gains most by it: for prefixes that are given, it is the minimum of Σ KL(μ || teacher) under a
    budget for Σ KL(μ || student) (docs/theory.md). μ lives on the tokens that both models allow, and is the student
    where there are none.
    """

    teacher_weight: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher_weight", real("teacher_weight", self.teacher_weight))
        if not 0 <= self.teacher_weight <= 1:
            raise InputError(f"teacher_weight must lie in [0, 1], got {self.teacher_weight}")

    @property
    def needs_teacher(self) -> bool:
        return self.teacher_weight > 0

    def target(self, student_log_probs: Tensor, teacher_log_probs: Tensor | None) -> Target:
        if not self.needs_teacher:
            return StudentPolicy().target(student_log_probs, teacher_log_probs)
        teacher_NV = _present(teacher_log_probs, self)
        if self.teacher_weight == 1:
            return TeacherPolicy().target(student_log_probs, teacher_NV)
        mixed_NV = torch.lerp(student_log_probs, teacher_NV.to(student_log_probs.dtype), self.teacher_weight)
        mixed_NV.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        apart_N = (mixed_NV == -math.inf).all(-1)
        law_NV = log_softmax(mixed_NV, mixed_NV.dtype)
        law_NV[apart_N] = student_log_probs[apart_N]
        weight_N = torch.full_like(law_NV[:, 0], self.teacher_weight).masked_fill_(apart_N, 0.0)
        return Target(
            DenseLaw(law_NV),
            None,
            weight_N,
            kl(law_NV, student_log_probs),
            kl(law_NV, teacher_NV),
        )


@dataclass(frozen=True)
class SKDPolicy:
    """Interleaved teacher injection (paper, section 6: SKD).

    A student token outside the teacher's `teacher_top_k`, or impossible for it, is replaced by a teacher sample at
    `teacher_temperature`. Both act on shared events: stopping counts once among the top k, and is tempered as one event
    (see `TemperaturePolicy`).
    """

    teacher_top_k: int
    teacher_temperature: float
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher_top_k", whole("teacher_top_k", self.teacher_top_k))
        if not real("teacher_top_k", self.teacher_top_k) >= 1:
            raise InputError(f"{named('teacher_top_k')} must be at least 1, got {self.teacher_top_k}")
        tempered = checked_temperature(self.teacher_temperature, "teacher_temperature")
        object.__setattr__(self, "teacher_temperature", tempered)

    def target(self, student_log_probs: Tensor, teacher_log_probs: Tensor | None) -> Target:
        teacher_NV = _present(teacher_log_probs, self)
        trusted_NV = torch.zeros_like(teacher_NV, dtype=torch.bool)
        top = teacher_NV.topk(min(self.teacher_top_k, teacher_NV.shape[-1]), dim=-1).indices
        trusted_NV.scatter_(-1, top, True)
        trusted_NV &= teacher_NV > -math.inf  # of a teacher for which fewer are possible
        student_NV = student_log_probs.exp()
        kept_NV = student_NV.masked_fill(~trusted_NV, 0.0)
        replaced_N = student_NV.masked_fill(trusted_NV, 0.0).sum(-1)
        replacement_NV = log_softmax(teacher_NV / self.teacher_temperature, teacher_NV.dtype).exp()
        law_NV = (kept_NV + replaced_N[:, None] * replacement_NV).log()
        return Target(
            DenseLaw(law_NV),
            kept_NV,
            replaced_N,
            kl(law_NV, student_log_probs),
            kl(law_NV, teacher_NV),
        )


@dataclass(frozen=True)
class TeacherPolicy:
    """Teacher completions (SFT warm-up, and the far end of the blend): μ is the teacher."""

    needs_teacher: ClassVar[bool] = True

    def target(self, student_log_probs: Tensor, teacher_log_probs: Tensor | None) -> Target:
        teacher_NV = _present(teacher_log_probs, self)
        one_N = teacher_NV.new_ones(teacher_NV.shape[0])
        return Target(DenseLaw(teacher_NV), None, one_N, kl(teacher_NV, student_log_probs), torch.zeros_like(one_N))


def _present(teacher_log_probs: Tensor | None, policy: object) -> Tensor:
    if teacher_log_probs is None:
        raise InputError(f"{policy!r} needs teacher log-probabilities, got None")
    return teacher_log_probs


POLICIES: dict[str, type] = {
    policy.__name__: policy
    for policy in (StudentPolicy, TemperaturePolicy, TrustRegionPolicy, GeometricPolicy, SKDPolicy, TeacherPolicy)
}
"""Policies by the name that travels in requests to a serving engine; add one's own in each of its processes."""

# What policies are at the end of their warm-up.
_STUDENT_LAWS = (StudentPolicy(), TrustRegionPolicy(0.0), GeometricPolicy(0.0), TemperaturePolicy(1.0))


def samples_student(policy: BehaviorPolicy) -> bool:
    """Whether the law is the student's own, so that any engine with its weights can sample from it."""
    return policy in _STUDENT_LAWS
