"""What the comparison of ways to read a model costs in a quickstart of 50 steps, in processor seconds of one process.

    python benchmarks/reading_cost.py        writes benchmarks/results/reading_cost.json

Both methods of the recipe are trained and evaluated as `trb compare` does, once; the functions that compare
(`trb.sampling.reading`, `OutputHead.check`) are timed as they are called.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from trb.cli import main as trb_command
from trb.models import modeling
from trb.safety.files import write_json
from trb.sampling import reading
from trb.studies.provenance import describe

ROOT = Path(__file__).parents[1]
STEPS = 50


class Clock:
    """Processor seconds spent inside some functions, calls inside calls counted once."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._inside = 0.0, 0, False

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            self._inside, start = True, time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.process_time() - start
                self.calls += 1
                self._inside = False

        return call


def main() -> int:
    provenance, clock = describe(), Clock()
    reading._first_exact = clock.timed(reading._first_exact)  # type: ignore[assignment]
    modeling.OutputHead.check = clock.timed(modeling.OutputHead.check)  # type: ignore[method-assign,assignment]
    with tempfile.TemporaryDirectory() as directory:
        start = time.process_time()
        output = str(Path(directory) / "run")
        code = trb_command(["compare", "--config", "quickstart", "--output-dir", output, "--max-steps", str(STEPS)])
        whole = time.process_time() - start
    share = clock.seconds / whole
    print(f"{clock.calls} comparisons: {clock.seconds:.2f} of {whole:.1f} processor seconds, {share:.2%}")
    record: dict[str, Any] = {"provenance": provenance, "steps": STEPS, "comparisons": clock.calls}
    record |= {"processor_seconds": whole, "comparing": clock.seconds, "share": share}
    write_json(ROOT / "benchmarks" / "results" / "reading_cost.json", record)
    return code or int(share > 0.02)


if __name__ == "__main__":
    sys.exit(main())
