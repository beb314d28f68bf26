"""Processor time of what precedes the work: `trb`, every --help, and a training run of one step.

    python benchmarks/start_time.py --json benchmarks/results/start_time.json              this checkout
    python benchmarks/start_time.py --against ../older --rounds 5                          paired with another one

User and system time of whole processes, medians; the runs of two checkouts alternate. What --help may import is a test
(tests/cli/test_cli.py).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("", "train", "compare", "eval", "sweep", "probe", "report", "doctor")
RECIPE = """{student: "zoo:student", teacher: "zoo:teacher", train_data: "zoo:chains", train_limit: 16, max_steps: 1,
prompts_per_step: 4, num_generations: 2, per_device_train_batch_size: 8, max_completion_length: 8,
max_prompt_length: 64, gradient_checkpointing: false, save_strategy: no, method: trb}"""


def processor_seconds(source: Path, arguments: Sequence[str]) -> float:
    """User and system time of one `trb ARGUMENTS` from the checkout `source`."""
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "trb", *arguments], env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode and arguments:  # `trb` alone prints its help and says by its code that something is missing
        raise SystemExit(f"trb {' '.join(arguments)}: {done.stderr[-2000:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def one_step(source: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(RECIPE)
        return processor_seconds(source, ["train", "--config", str(recipe), "--output-dir", f"{folder}/run"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, to pair the training runs with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    helps = {"trb": [processor_seconds(ROOT, []) for _ in range(args.rounds)]}
    for command in COMMANDS:
        arguments = [command, "--help"] if command else ["--help"]
        helps[" ".join(["trb", *arguments])] = [processor_seconds(ROOT, arguments) for _ in range(args.rounds)]
    sources = [ROOT, *([args.against.resolve()] if args.against else [])]
    steps = [[one_step(source) for source in sources] for _ in range(args.rounds)]
    own, *other = (statistics.median(column) for column in zip(*steps, strict=True))
    record: dict[str, object] = {
        "unit": "processor seconds, median of the rounds",
        "rounds": args.rounds,
        "help": {name: round(statistics.median(values), 2) for name, values in helps.items()},
        "one training step": round(own, 2),
    }
    if other:
        ratio = statistics.median(first / second for first, second in steps)
        record |= {"the other checkout's": round(other[0], 2), "paired ratio": round(ratio, 3)}
    text = json.dumps(record, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
