"""Run by torchrun from test_guard.py: a number that is not finite on one process only, checkpoints, and a resume.

Writes what each process found as result-RANK.json into the directory named on the command line.
"""

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_runs import TINY, Kill, Snapshots, build, logged, losses, weights

from trb.training.trainer import TRBTrainer

RANK = int(os.environ["RANK"])
SETTINGS = {**TINY, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


def lose_on_one_process() -> None:
    """Step 2's loss is infinite on process 1, its gradient finite everywhere: only an exchange tells process 0."""
    plain = TRBTrainer._compute_loss

    def broken(self: TRBTrainer, *arguments: Any) -> Any:
        loss, *rest = plain(self, *arguments)
        return (loss + math.inf if RANK == 1 and self.state.global_step == 1 else loss), *rest

    TRBTrainer._compute_loss = broken  # type: ignore[method-assign]


def main(directory: Path) -> None:
    lose_on_one_process()
    seen = Snapshots()
    straight = build(directory / "straight", callbacks=[seen], **SETTINGS)
    straight.train()
    killed = build(directory / "killed", callbacks=[Kill(3)], **SETTINGS)
    with contextlib.suppress(KeyboardInterrupt):
        killed.train()
    resumed = build(directory / "killed", **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    both = zip(weights(straight).values(), weights(resumed).values(), strict=True)
    result = {
        "skipped": logged(straight, "skipped_steps"),
        "unchanged": [
            all(torch.equal(before[name], after[name]) for name in before)
            for before, after in zip(seen.weights, seen.weights[1:], strict=False)
        ],
        "same_losses": losses(straight)[2:] == losses(resumed)[2:],
        "same_weights": all(torch.equal(one, other) for one, other in both),
        "sum_of_weights": sum(value.double().sum().item() for value in weights(straight).values()),
    }
    (directory / f"result-{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
