"""Kills a sweep at random moments, starts it again each time, and compares its end with an undisturbed one.

    python benchmarks/kill_sweep.py --kills 10 --out benchmarks/results/kill_sweep.json
    python benchmarks/kill_sweep.py --kills 20 --signals kill terminate interrupt terminal
    python benchmarks/kill_sweep.py --kills 20 --signals kill terminate interrupt terminal --launch

Signals go to the main process alone, as from an out-of-memory killer, but for Ctrl-C in a terminal: its workers must
end by themselves. What is compared is the whole of study.json but its provenance, and the rollouts and metrics of every
run. With --launch it is a training run in two processes that torchrun has started, and its model and results.
"""

import argparse
import contextlib
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

from trb.safety.files import write_json
from trb.studies import provenance

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
TRAINING = {
    **STUDY["recipe"],
    **STUDY["settings"]["chains"]["recipe"],
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "eval_data": "zoo:chains",
    "eval_limit": 4,
    "report_to": "none",
}
SIGNALS = ("kill", "terminate", "interrupt", "terminal")
# A worker that is still importing looks for its parent once it is done with that: seconds, on a busy machine.
ENDS_WITHIN_S = 60.0
COMPARED = ("evals.jsonl", "metrics.jsonl", "rollouts.jsonl", "test.json")
# Clock readings of the trainer: no two runs share them.
TIMINGS = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_seconds")


def start(study: Path, directory: Path, workers: int, launch: bool = False) -> subprocess.Popen:
    """The sweep, or the launch of two processes, as a user starts it: in a session of its own, Ctrl-C switched on."""
    command = ["-m", "trb", "train" if launch else "sweep", "--config", str(study), "--output-dir", str(directory)]
    if launch:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    else:
        command += ["--workers", str(workers)]
    log = (directory.parent / f"{directory.name}.log").open("a")
    return subprocess.Popen(
        [sys.executable, *command, "--quiet"],
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def disturb(process: subprocess.Popen, how: str, rng: random.Random) -> tuple[int, float]:
    """Send a signal, Ctrl-C twice; how many of the descendants stayed, and how long the last of the others took to end.

    What does not end within its time is killed, and counts as one that stayed.
    """
    family = psutil.Process(process.pid).children(recursive=True)
    send = os.killpg if how == "terminal" else os.kill
    number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}.get(how, signal.SIGINT)
    send(process.pid, number)
    if number == signal.SIGINT:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.choice((0.01, 0.1, 0.5)))
        if process.returncode is None:
            send(process.pid, number)
    began, stayed = time.monotonic(), 0
    try:
        process.wait(timeout=ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        stayed = 1
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=ENDS_WITHIN_S)
    for survivor in alive:
        survivor.kill()
    return stayed + len(alive), time.monotonic() - began


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait():
        raise SystemExit(f"the sweep failed; the end of {log}:\n{log.read_text()[-3000:]}")


def timed(study: Path, directory: Path, workers: int, launch: bool) -> float:
    began = time.monotonic()
    finish(start(study, directory, workers, launch), directory.parent / f"{directory.name}.log")
    return time.monotonic() - began


def outcome(directory: Path, results: str = "study.json") -> dict[str, str]:
    """A digest of the results without their provenance, of models, and of records, without clock readings."""
    study = json.loads((directory / results).read_text())
    del study["provenance"]
    for score in study.values():
        if isinstance(score, dict):
            score.pop("train_seconds", None)
    found = {results: json.dumps(study)}
    for path in sorted(directory.rglob("*.safetensors")):
        found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
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


def run(
    kills: int, seed: int, workers: int, signals: list[str], launch: bool, folder: Path, console: Console
) -> dict[str, Any]:
    """The undisturbed sweep, the disturbed one, and whether they agree."""
    study = folder / "study.yaml"
    study.write_text(yaml.safe_dump(TRAINING if launch else STUDY, sort_keys=False))
    seconds, idle = (timed(study, folder / "undisturbed", workers, launch) for _ in range(2))
    console.print(f"undisturbed: {seconds:.0f} s; again, with nothing left to do: {idle:.0f} s")
    rng, disturbed, moments, orphans, slowest = random.Random(seed), folder / "disturbed", [], 0, 0.0
    met = dict.fromkeys(signals, 0)
    for index in range(kills):
        process = start(study, disturbed, workers, launch)
        # Anywhere from its first imports on, and early enough that work is left for the next kill.
        moment, how = rng.uniform(0.1 * idle, idle + 1.5 * (seconds - idle) / kills), signals[index % len(signals)]
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            stayed, took = disturb(process, how, rng)
            orphans, slowest = orphans + stayed, max(slowest, took)
            moments.append(round(moment, 1))
            met[how] += 1
            console.print(f"{how} after {moment:.1f} s: exit code {process.returncode}, all gone after {took:.1f} s")
    finish(start(study, disturbed, workers, launch), folder / "disturbed.log")
    results = "results.json" if launch else "study.json"
    first, second = outcome(folder / "undisturbed", results), outcome(disturbed, results)
    differing = sorted(name for name in first | second if first.get(name) != second.get(name))
    return {
        "kills": {"tried": kills, "met_a_running_sweep": len(moments), "seconds_after_start": moments, "signals": met},
        "launch_of_two_processes": launch,
        "processes_left_behind": orphans,
        "seconds_until_the_last_worker_ended": round(slowest, 1),
        # torchrun and Python, while it imports, write theirs
        "tracebacks_shown": None if launch else (folder / "disturbed.log").read_text().count("Traceback"),
        "files_compared": len(first),
        "files_differing": differing,
        f"{results.replace('.', '_')}_identical": first[results] == second[results],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="how often (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at once (default: 2)")
    parser.add_argument(
        "--signals", nargs="+", choices=SIGNALS, default=["kill"], help="sent in turn; Ctrl-C is sent twice"
    )
    parser.add_argument("--launch", action="store_true", help="train with two processes of torchrun instead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        how = (arguments.kills, arguments.seed, arguments.workers, arguments.signals, arguments.launch)
        result = run(*how, Path(folder), Console(stderr=True))
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, {**result, "provenance": provenance.describe()})
    return 1 if result["files_differing"] or result["processes_left_behind"] or result["tracebacks_shown"] else 0


if __name__ == "__main__":
    sys.exit(main())
