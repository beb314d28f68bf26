"""Run by torchrun from tests/training/test_tools.py: what each of two processes draws with tools, and learns.

Writes the completions of its rows, by their number in the step, and the losses of two steps as result-RANK.json into
the directory named.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "training"))

from test_tools import batch, caller, whole_rows
from tiny_runs import losses

RANK = int(os.environ["RANK"])


def main(directory: Path) -> None:
    trainer = caller(directory / "two")
    data = trainer.train_dataset.select(range(2 * RANK, 2 * RANK + 2))
    trainer.train_dataset = data
    found = whole_rows(batch(trainer))
    numbered = {RANK * len(found) + place: completion for place, (_, completion, _) in enumerate(found)}
    trained = caller(directory / "trained", max_steps=2)
    trained.train()
    result = {"completions": numbered, "losses": losses(trained)}
    (directory / f"result-{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
