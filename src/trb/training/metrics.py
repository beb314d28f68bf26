"""Averages of a training run: what a step's processes and micro-batches add up to, and the schedules that look at it.

Left out: what is measured (the trainer's affair), and where it is written (`trb.training.recording`, and transformers'
loggers).
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trb.errors import InputError
from trb.schedule import Schedule
from trb.training.ranks import Ranks

__all__ = ["Observers", "Sums"]

logger = logging.getLogger(__name__)


class Sums:
    """Totals and counts by name, since they were last taken."""

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}

    def add(self, name: str, total: float | Tensor, count: int) -> None:
        pair = torch.stack([torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (total, count)])
        if not pair.isfinite().all():
            return  # of a step that is skipped: it would leave nothing of the others' average
        self._pairs[name] = self._pairs.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    def take(self, ranks: Ranks) -> dict[str, float]:
        """Averages over all processes, token means weighted by tokens; then everything starts anew. Collective."""
        pairs, self._pairs = self._pairs, {}
        totals: dict[str, Tensor] = {}
        for found in ranks.gather(pairs):
            for name, pair in found.items():
                totals[name] = totals.get(name, 0) + pair
        return {name: float(total / count) for name, (total, count) in sorted(totals.items()) if count}

    def state_dict(self) -> dict[str, list[float]]:
        return {name: pair.tolist() for name, pair in self._pairs.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self._pairs = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in state.items()}


class Observers:
    """The schedules of a run that remember: they are shown each step's averages, the same on every process."""

    def __init__(self, schedules: Mapping[str, Schedule]) -> None:
        self._schedules = {name: schedule for name, schedule in schedules.items() if schedule.remembers}
        self._sums, self._first = Sums(), self.state_dict()

    def forget_step(self) -> None:
        """What was added since the last step, which is no part of one."""
        self._sums = Sums()

    def reset(self) -> None:
        """To before the first step."""
        self.forget_step()
        self.load_state_dict(self._first)

    def add(self, name: str, total: float | Tensor, count: int) -> None:
        if self._schedules:
            self._sums.add(name, total, count)

    def end_step(self, step: int, ranks: Ranks) -> None:
        """Show what was added since the last step; collective, unless nobody remembers."""
        if self._schedules:
            averages = self._sums.take(ranks)
            for schedule in {id(schedule): schedule for schedule in self._schedules.values()}.values():
                schedule.observe(step, averages)

    def state_dict(self) -> dict[str, Any]:
        return {name: schedule.state_dict() for name, schedule in self._schedules.items()}

    def memories(self) -> dict[str, str]:
        """Of what kind each state is."""
        return {name: schedule.memory for name, schedule in self._schedules.items()}

    def load_state_dict(
        self, states: Mapping[str, Any], memories: Mapping[str, str] | None = None, *, accept_changes: bool = False
    ) -> None:
        """Go on from states, of the kinds `memories`; one that is not named there is taken for the schedule's own.

        Raises ValueError for a schedule of which there is no state; `accept_changes` lets it begin anew.
        """
        for name, schedule in self._schedules.items():
            if name in states and (memories or {}).get(name, schedule.memory) == schedule.memory:
                schedule.load_state_dict(states[name])
                continue
            missing = f"the checkpoint holds no state of the {name}'s {schedule.memory}"
            if not accept_changes:
                raise InputError(
                    f"{missing}: it was written by another trainer, under another schedule or method (set it as it "
                    "was, such as budget_schedule=linear) or with save_only_model, which keeps none; else go on with "
                    "accept_changes=True (trb train --accept-changes), which begins it anew, or start over"
                )
            logger.warning(f"{missing}, which begins anew")
