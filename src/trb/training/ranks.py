"""Which process of a launch this is, and the two exchanges between processes that the library makes for itself.

Python objects only: what is exchanged here is small and rare (records of an evaluation, decisions). Tensors of
training stay with TRL, Accelerate and torch, and so does starting the processes; that none outlives the one that
started it is seen to here. Both exchanges are collective: every process must come to them in the same order.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

__all__ = ["Ranks", "end_with"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those of one launch; by default there is no other.

    Attributes:
        index: number of this process, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of_launch(cls) -> "Ranks":
        """The processes of `torch.distributed`, where it has been initialised."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def gather(self, item: Any) -> list[Any]:
        """Every process's `item`, in order of the processes; the same list everywhere."""
        if self.count == 1:
            return [item]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, item)
        return found

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on the first process, everywhere; only there is it called.

        What it raises is raised everywhere, so that no process waits for one that has failed.
        """
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def end_with(parent: int) -> None:
    """End this process when `parent`, which started it, has ended, however it was that it did."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
