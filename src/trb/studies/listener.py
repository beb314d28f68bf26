"""Who wants to know how far a run is: what a display overrides, and silence for everybody else.

Left out: showing anything (`trb.cli.display`), and anything a result could depend on.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["Listener"]


class Listener:
    """Hears what an experiment is doing. This one is silent; a display overrides what it needs."""

    def plan(self, runs: Mapping[str, int]) -> None:
        """The runs to come, by name, with the optimizer steps of each."""

    def stage(self, text: str) -> None:
        """What happens from now on, in a few words."""

    def run(self, name: str, done: int, steps: int) -> None:
        """A run begins to train, at step `done` of `steps`."""

    def step(self, step: int, logs: Mapping[str, Any]) -> None:
        """An optimizer step has been taken; `logs` holds the latest metrics."""

    def finished(self, name: str) -> None:
        """A run is complete."""

    def kept(self, name: str) -> None:
        """A run was complete before, and nothing is done for it."""
        self.finished(name)
