"""A policy, a loss and a schedule with a memory, as somebody outside the package would add them; and their method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trb.blend.laws import DenseLaw
from trb.losses.chunked import RowLoss
from trb.losses.terms import Rows
from trb.policies import POLICIES, Target
from trb.schedule import Constant, Schedule
from trb.training.methods import BEHAVIORS, METHODS, TARGETS, Half, Method, Scheduled


@dataclass(frozen=True)
class MixturePolicy:  # draws a token from the teacher with some probability, else from the student
    share: float
    needs_teacher: ClassVar[bool] = True

    def target(self, student: Tensor, teacher: Tensor | None) -> Target:
        law = ((1 - self.share) * student.exp() + self.share * teacher.exp()).log()
        kls = [(law.exp() * (law - other)).nan_to_num(0.0).sum(-1) for other in (student, teacher)]
        return Target(DenseLaw(law), None, torch.full_like(kls[0], self.share), *kls)


class ForwardKL(RowLoss):
    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        loss = (rows.teacher * (rows.log_teacher - rows.log_student)).nan_to_num(0.0).sum(-1)
        return loss, rows.student - rows.teacher, torch.ones_like(loss)


class Fading(Schedule):  # by as much as the student is still away from the teacher
    remembers = True
    now = 0.8

    def value(self, step: int) -> float:
        return self.now

    def observe(self, step: int, statistics: Mapping[str, float]) -> None:
        gap = statistics.get("reverse_kl")  # left out where it was not finite
        if gap is not None:
            self.now *= gap / (1 + gap)

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.now = state["now"]


ENTRIES: tuple[tuple[dict, str, Any], ...] = (
    (POLICIES, "MixturePolicy", MixturePolicy),
    (BEHAVIORS, "mixture", Half("student or teacher", lambda args, length: Scheduled(MixturePolicy, Fading()))),
    (TARGETS, "forward_kl", Half("forward KL", lambda args, length: Scheduled(lambda _: ForwardKL(), Constant(0)))),
    (METHODS, "imitation", Method("mixture", "forward_kl", "Imitation", "mixed rollouts, forward KL")),
)
