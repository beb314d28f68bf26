"""Kills a sweep at random moments, starts it again each time, and compares its end with an undisturbed one.

    python benchmarks/kill_sweep.py --kills 10 --out benchmarks/results/kill_sweep.json

SIGKILL goes to the main process alone, as from an out-of-memory killer: its workers must end by themselves. What is
compared is the whole of study.json but its provenance, and the rollouts and metrics of every run.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console

from trb import provenance

STUDY: dict[str, Any] = {
    "name": "kill-sweep",
    "seeds": {"select": [100], "test": 2},
    "configurations": 2,
    "resamples": 200,
    "recipe": {
        "max_steps": 3,
        "prompts_per_step": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_prompt_length": 64,
        "max_completion_length": 32,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "train_limit": 16,
        "eval_every": 2,
    },
    "settings": {
        "chains": {
            "recipe": {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains"},
            "dev": {"data": "zoo:chains", "limit": 16, "seed": 1},
            "test": {"data": ["zoo:chains?operands=3", "zoo:chains?operands=5"], "limit": 12, "seed": 2},
        }
    },
    "methods": {"opd": [{}], "trb": {"initial_kl_budget": [0.1, 0.5], "blend_warmup_steps": 2}},
}
# A worker that is still importing looks for its parent once it is done with that: seconds, on a busy machine.
ENDS_WITHIN_S = 60.0
COMPARED = ("evals.jsonl", "metrics.jsonl", "rollouts.jsonl", "test.json")
# Clock readings of the trainer: no two runs share them.
TIMINGS = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def start(study: Path, directory: Path, workers: int) -> subprocess.Popen:
    """The sweep as a user starts it, in a session of its own."""
    command = [sys.executable, "-m", "trb", "sweep", "--config", str(study), "--output-dir", str(directory)]
    log = (directory.parent / f"{directory.name}.log").open("a")
    return subprocess.Popen(
        [*command, "--workers", str(workers), "--quiet"], stdout=log, stderr=log, start_new_session=True
    )


def kill(process: subprocess.Popen) -> tuple[int, float]:
    """SIGKILL the main process; how many of its descendants stayed, and how long the last of the others took to end."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout=ENDS_WITHIN_S)
    for survivor in alive:
        survivor.kill()
    return len(alive), time.monotonic() - began


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait():
        raise SystemExit(f"the sweep failed; the end of {log}:\n{log.read_text()[-3000:]}")


def timed(study: Path, directory: Path, workers: int) -> float:
    began = time.monotonic()
    finish(start(study, directory, workers), directory.parent / f"{directory.name}.log")
    return time.monotonic() - began


def outcome(directory: Path) -> dict[str, str]:
    """A digest of study.json without its provenance, and of every run's records without clock readings."""
    study = json.loads((directory / "study.json").read_text())
    del study["provenance"]
    found = {"study.json": json.dumps(study)}
    for name in COMPARED:
        for path in sorted(directory.rglob(name)):
            records = (
                [json.loads(line) for line in path.read_text().splitlines()] if name[-1] == "l" else path.read_text()
            )
            for record in records if isinstance(records, list) else ():
                for timing in TIMINGS:
                    record.pop(timing, None)
            found[str(path.relative_to(directory))] = json.dumps(records)
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items()}


def run(kills: int, seed: int, workers: int, folder: Path, console: Console) -> dict[str, Any]:
    """The undisturbed sweep, the disturbed one, and whether they agree."""
    study = folder / "study.yaml"
    study.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    seconds, idle = (timed(study, folder / "undisturbed", workers) for _ in range(2))
    console.print(f"undisturbed: {seconds:.0f} s; again, with nothing left to do: {idle:.0f} s")
    rng, disturbed, moments, orphans, slowest = random.Random(seed), folder / "disturbed", [], 0, 0.0
    for _ in range(kills):
        process = start(study, disturbed, workers)
        # Anywhere from its first imports on, and early enough that work is left for the next kill.
        moment = rng.uniform(0.1 * idle, idle + 1.5 * (seconds - idle) / kills)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            stayed, took = kill(process)
            orphans, slowest = orphans + stayed, max(slowest, took)
            moments.append(round(moment, 1))
            console.print(f"killed after {moment:.1f} s")
    finish(start(study, disturbed, workers), folder / "disturbed.log")
    first, second = outcome(folder / "undisturbed"), outcome(disturbed)
    differing = sorted(name for name in first | second if first.get(name) != second.get(name))
    return {
        "kills": {"tried": kills, "met_a_running_sweep": len(moments), "seconds_after_start": moments},
        "processes_left_behind": orphans,
        "seconds_until_the_last_worker_ended": round(slowest, 1),
        "files_compared": len(first),
        "files_differing": differing,
        "study_json_identical": first["study.json"] == second["study.json"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="how often (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at once (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.kills, arguments.seed, arguments.workers, Path(folder), Console(stderr=True))
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps({**result, "provenance": provenance.describe()}, indent=2) + "\n")
    return 1 if result["files_differing"] or result["processes_left_behind"] else 0


if __name__ == "__main__":
    sys.exit(main())
