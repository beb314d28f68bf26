"""Run by torchrun from tests/training/test_tools.py: what each of two processes draws of one step with tools.

Writes the completions of its rows, by their number in the step, as result-RANK.json into the directory named.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "training"))

from test_tools import batch, caller, whole_rows

RANK = int(os.environ["RANK"])


def main(directory: Path) -> None:
    trainer = caller(directory / "two")
    data = trainer.train_dataset.select(range(2 * RANK, 2 * RANK + 2))
    trainer.train_dataset = data
    found = whole_rows(batch(trainer))
    numbered = {RANK * len(found) + place: completion for place, (_, completion, _) in enumerate(found)}
    (directory / f"result-{RANK}.json").write_text(json.dumps(numbered))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
