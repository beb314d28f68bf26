"""Kills, starves, corrupts and wears out training runs, and compares what is left with runs that nobody touched.

    python benchmarks/torture.py --out benchmarks/results/torture.json     under half an hour on two cores
    python benchmarks/torture.py --quick                                   the short version of `make test`

Runs are those of `trb train` on the embedded pair: 8 steps over nearly three epochs, with gradient accumulation,
evaluations, held-out prompts, checkpoints of which two are kept, and averages over more steps than lie between two
checkpoints. They happen in children forked from this process, which has imported everything once; SIGKILL is a real
one, sent by the child to itself right before a chosen file operation, or by this process at a random moment.

"Differences" counts files of a run that was tortured and finished whose contents are not those of the undisturbed run:
metrics, evaluations, rollouts, results and the final model, and the last checkpoint's weights, optimizer, scheduler and
random state, bit for bit; also files that exist in one of the two only. Clock readings are left out.
"""

import argparse
import ctypes
import gc
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table

from trb import cli
from trb.records import CARD
from trb.safety.files import write_json
from trb.studies import provenance
from trb.tasks.grading import Verifier
from trb.training import checkpoints
from trb.training.trainer import TRBTrainer

HERE = Path(__file__).parent
RECIPE: dict[str, Any] = {
    "student": "zoo:student",
    "teacher": "zoo:teacher",
    "train_data": "zoo:chains",
    "train_limit": 8,
    "held_out_prompts": 2,
    "held_out_every": 4,
    "max_prompt_length": 32,
    "max_steps": 8,
    "prompts_per_step": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "initial_kl_budget": 0.3,
    "blend_warmup_steps": 5,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 3,
    "eval_data": "zoo:chains",
    "eval_limit": 3,
    "eval_every": 3,
    "report_to": "none",
}
RECORDS = ("metrics.jsonl", "evals.jsonl", "held_out.jsonl", "rollouts.jsonl")
# Clock readings of the trainer: no two runs share them.
CLOCKS = {"step_time", "runtime", "samples_per_second", "steps_per_second", "train_seconds", "provenance"}
# Of a checkpoint; training_args.bin and trainer_state.json hold the directory's name and clock readings.
STATE = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# File operations that Python reports; those of C++ and Rust libraries lie between them.
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
# More than this in 1,000 steps is a leak.
MOST_GROWTH = {"memory_mb": 5.0, "file_handles": 0.5, "threads": 0.5, "children": 0.5}
PATIENCE_S = 300.0  # a run takes seconds; one that hangs is a failure


# ---- runs in children ----


@dataclass
class Ended:
    """How a child ended: its exit code, negative for a signal, and what it wrote to its standard error."""

    code: int
    log: str


def start(work: Callable[[], int | None], log: Path) -> int:
    """Do `work` in a child, its output in `log`; returns the child's id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, log: Path) -> Ended:
    """Wait for a child; one that takes longer than PATIENCE_S is killed, and counts as such."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else "")
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Ended(-int(signal.SIGALRM), "it hung")


def touches(directory: Path, event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event changes something below a directory."""
    if event not in OPERATIONS or not isinstance(arguments[0], str | os.PathLike):
        return False
    if event == "open" and not (set(str(arguments[1])) & set("wax+")):
        return False
    return str(directory) in os.path.abspath(arguments[0])


@dataclass
class Lab:
    """A folder with the recipe, and the runs made from it."""

    folder: Path
    console: Console
    recipe: Path = field(init=False)
    undisturbed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    operations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe = self.folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(RECIPE))

    def command(self, directory: Path) -> list[str]:
        return ["train", "--config", str(self.recipe), "--output-dir", str(directory), "--quiet"]

    def begin(self, directory: Path, before: Callable[[], None] = lambda: None) -> int:
        """Start `trb train` in a child, after `before` has prepared the child."""

        def work() -> int:
            before()
            return cli.main(self.command(directory))

        return start(work, directory.parent / f"{directory.name}.log")

    def run(self, directory: Path, before: Callable[[], None] = lambda: None) -> Ended:
        log = directory.parent / f"{directory.name}.log"
        log.unlink(missing_ok=True)
        return wait(self.begin(directory, before), log)

    def differences(self, directory: Path) -> list[str]:
        """Finish a run and compare it with the undisturbed one."""
        ended = self.run(directory)
        if ended.code:
            self.console.print(ended.log[-3000:], markup=False)
            return [f"exit code {ended.code}"]
        found = outcome(directory)
        return sorted(name for name in found | self.undisturbed if found.get(name) != self.undisturbed.get(name))


def outcome(directory: Path) -> dict[str, str]:
    """A digest of everything a run leaves that must not depend on its history; an empty one for mere existence."""
    found = {str(path.relative_to(directory)): "" for path in sorted(directory.rglob("*")) if path.is_file()}
    for name in RECORDS:
        lines = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        found[name] = digest(json.dumps(without_clocks(lines)).encode())
    found["results.json"] = digest(
        json.dumps(without_clocks(json.loads((directory / "results.json").read_text()))).encode()
    )
    last = directory / f"checkpoint-{RECIPE['max_steps']}"
    for path in (*(directory / "model").iterdir(), *(last / name for name in STATE)):
        content = path.read_bytes()
        if path.name == CARD.name:  # the card is named after the run's directory
            content = content.replace(directory.name.encode(), b"")
        found[str(path.relative_to(directory))] = digest(content)
    progress = without_clocks(json.loads((last / "trb_state_0.json").read_text()))
    found[f"{last.name}/trb_state_0.json"] = digest(json.dumps(progress).encode())
    return found


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def measure(lab: Lab) -> None:
    """The undisturbed run, its file operations, how long it takes, and whether a second one is the same."""

    def counting() -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if touches(directory, event, arguments):
                os.write(record, f"{event} {os.path.relpath(arguments[0], directory)}\n".encode())

        record = os.open(lab.folder / "operations", os.O_WRONLY | os.O_CREAT)
        sys.addaudithook(hook)

    directory = lab.folder / "undisturbed"
    ended = lab.run(directory, counting)
    if ended.code:
        raise SystemExit(f"the undisturbed run failed:\n{ended.log[-3000:]}")
    lab.undisturbed = outcome(directory)
    lab.operations = (lab.folder / "operations").read_text().splitlines()
    began = time.monotonic()
    differing = lab.differences(lab.folder / "again")
    if differing:
        raise SystemExit(f"two undisturbed runs differ in {', '.join(differing)}: this machine does not repeat itself")
    lab.seconds = time.monotonic() - began


# ---- kills ----


def kill_before(directory: Path, number: int) -> Callable[[], None]:
    """Have a child kill itself right before its `number`-th file operation in a directory."""

    def prepare() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if touches(directory, event, arguments):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return prepare


def kill_inside_save(number: int) -> Callable[[], None]:
    """Have a child kill itself with its `number`-th tensor file half written."""

    def prepare() -> None:
        seen, save = 0, torch.save

        def torn(value: Any, path: Any, *rest: Any, **options: Any) -> None:
            nonlocal seen
            seen += 1
            save(value, path, *rest, **options)
            if seen == number:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = torn

    return prepare


def kills(lab: Lab, rng: random.Random, operations: list[int], saves: list[int], moments: int) -> dict[str, Any]:
    """Runs killed once or twice and then finished."""
    result: dict[str, Any] = {"tried": 0, "survived": 0, "missed": 0, "differences": [], "file_operations": {}}
    plans: list[tuple[str, Callable[[Path], Callable[[], None]] | None]] = [
        (f"before file operation {number}: {lab.operations[number - 1]}", lambda path, n=number: kill_before(path, n))
        for number in operations
    ]
    plans += [(f"inside save {number}", lambda path, n=number: kill_inside_save(n)) for number in saves]
    plans += [("at a random moment", None)] * moments
    for index, (what, plan) in enumerate(plans):
        directory = lab.folder / f"killed-{index}"
        died = [killed(lab, directory, rng, plan)]
        if moments and rng.random() < 0.3:  # and the resumed run once more
            died.append(killed(lab, directory, rng, None))
        result["missed"] += died.count(False)
        result["tried"] += died.count(True)
        differing = lab.differences(directory)
        if differing:
            result["differences"].append({"killed": what, "files": differing})
        else:
            result["survived"] += died.count(True)
        lab.console.print(f"killed {what}: {differing or 'the same end'}", markup=False)
        shutil.rmtree(directory)
    result["file_operations"] = {"in_a_run": len(lab.operations), "killed_before": len(operations)}
    return result


def killed(lab: Lab, directory: Path, rng: random.Random, plan: Callable[[Path], Callable[[], None]] | None) -> bool:
    """Start a run and kill it; False if it was done before."""
    if plan is not None:
        return lab.run(directory, plan(directory)).code == -signal.SIGKILL
    child = lab.begin(directory)
    time.sleep(rng.uniform(0, lab.seconds))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


# ---- damaged checkpoints ----


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "one bit flipped": flip,
    "cut in half": lambda path, rng: os.truncate(path, path.stat().st_size // 2),
    "removed": lambda path, rng: path.unlink(),
    "zeros": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)) and None,
}


def corruption(lab: Lab, rng: random.Random, resumed: int) -> dict[str, Any]:
    """Every file of a checkpoint, damaged in every way: recognised by name, and `resumed` of them resumed from."""
    base = lab.folder / "with-checkpoints"
    # Right before the last checkpoint gets its name: 4 and 6 are there.
    rename = max(n for n, line in enumerate(lab.operations, 1) if line.startswith("os.rename checkpoint.partial"))
    assert lab.run(base, kill_before(base, rename)).code == -signal.SIGKILL
    result: dict[str, Any] = {"made": 0, "recognised": 0, "resumed": 0, "unrecognised": [], "differences": []}
    files = sorted(path.name for path in (base / "checkpoint-6").iterdir())
    cases = [(name, damage) for name in files for damage in DAMAGES]
    chosen = set(rng.sample(range(len(cases)), min(resumed, len(cases))))
    for index, (name, damage) in enumerate(cases):
        directory = lab.folder / f"damaged-{index}"
        shutil.copytree(base, directory)
        DAMAGES[damage](directory / "checkpoint-6" / name, rng)
        heard: list[str] = []
        found = checkpoints.latest(directory, warn=heard.append)
        recognised = found == directory / "checkpoint-4" and len(heard) == 1 and name in heard[0]
        if name == "checksums.json" and found == directory / "checkpoint-6":
            recognised = True  # a bit of its white space: what it says is the same
        result["made"] += 1
        result["recognised"] += recognised
        if not recognised:
            result["unrecognised"].append(f"{name}: {damage}")
        if index in chosen:
            result["resumed"] += 1
            differing = lab.differences(directory)
            if differing:
                result["differences"].append({"damaged": f"{name}: {damage}", "files": differing})
            lab.console.print(f"checkpoint with {name}, {damage}: {differing or 'the same end'}", markup=False)
        shutil.rmtree(directory)
    shutil.rmtree(base)
    return result


# ---- the matrix: every file x every damage x every command ----


def emptied(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def halved(path: Path, rng: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def unreadable(path: Path, rng: random.Random) -> None:
    path.chmod(0)


FILE_DAMAGES = (emptied, halved, flip, replaced, unreadable)
GOOD = ("same result", "named error", "rebuilt", "named")


def without_privileges() -> None:
    """Have a child obey the modes of files, also one of root: without the capabilities to override them."""
    if os.geteuid() == 0:
        words = (ctypes.c_uint32 * 6)(0xFFFFFFFF, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        expect(libc.capget(header, words) == 0, "capabilities cannot be read")
        words[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of those in effect
        expect(libc.capset(header, words) == 0, "capabilities cannot be given up")


@dataclass
class Subject:
    """A directory that is damaged, the commands that are tried on it, and what they do to an undamaged copy."""

    name: str
    origin: Path
    commands: dict[str, list[str]]
    expected: dict[str, Any] = field(default_factory=dict)


def subjects(lab: Lab) -> list[Subject]:
    """A finished run, one killed before its last checkpoint, and a finished comparison of two short runs."""
    run, stopped, compared = (lab.folder / "matrix" / name for name in ("finished", "unfinished", "comparison"))
    shutil.copytree(lab.folder / "undisturbed", run)
    rename = max(n for n, line in enumerate(lab.operations, 1) if line.startswith("os.rename checkpoint.partial"))
    expect(lab.run(stopped, kill_before(stopped, rename)).code == -signal.SIGKILL, "it was not killed")
    recipe = lab.folder / "comparison.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "max_steps": 2, "methods": {"opd": {}, "trb": {}}}))
    here = str(lab.folder / "cell" / "run")
    compare = ["compare", "--config", str(recipe), "--output-dir", here, "--quiet"]
    first = [str(compared) if word == here else word for word in compare]
    log = lab.folder / "comparison.log"
    made = wait(start(lambda: cli.main(first), log), log)
    expect(made.code == 0, "the comparison failed", made)
    train, report = lab.command(Path(here)), ["report", here]
    data = ["--data", "zoo:chains", "--limit", "2", "--max-new-tokens", "8", "--quiet"]
    score = ["eval", "--model", here, *data, "--output-dir", str(lab.folder / "cell" / "scores")]
    return [
        Subject("finished run", run, {"train": train, "report": report, "eval": score}),
        Subject("unfinished run", stopped, {"train": train, "report": report}),
        Subject("comparison", compared, {"compare": compare, "report": report}),
    ]


def attempt(lab: Lab, subject: Subject, command: str, damage: Callable[[Path], None]) -> tuple[Ended, Any]:
    """Run a command on a damaged copy; how it ended, and what it left: the results that must not be lost."""
    cell = lab.folder / "cell"
    shutil.rmtree(cell, ignore_errors=True)
    shutil.copytree(subject.origin, cell / "run")
    damage(cell / "run")

    def work() -> int:
        without_privileges()
        return cli.main(subject.commands[command])

    ended = wait(start(work, cell / "log"), cell / "log")
    left: Any = None
    if ended.code == 0:
        if command == "report":
            left = (cell / "run" / "report.html").read_text()
        elif command == "eval":
            left = without_clocks(json.loads((cell / "scores" / "results.json").read_text()))
        else:
            left = remaining(cell / "run")
    return ended, left


def remaining(directory: Path) -> dict[str, Any]:
    """Records, results and models of a run or a comparison, without clocks; what cannot be read is left out."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if not path.is_file() or ".damaged" in name or name.partition("/")[0].startswith("checkpoint-"):
            continue
        try:
            if path.suffix == ".jsonl" and "evaluations" not in name:
                found[name] = without_clocks([json.loads(line) for line in path.read_text().splitlines()])
            elif path.name == "results.json":
                found[name] = without_clocks(json.loads(path.read_text()))
            elif path.parent.name == "model":
                found[name] = digest(path.read_bytes())
        except (OSError, ValueError):
            found[name] = "cannot be read"
    return found


def verdict(subject: Subject, command: str, name: str, ended: Ended, left: Any) -> str:
    """What became of a cell: one of GOOD, or a word for what must not be."""
    expected = subject.expected[command]
    pages = (left, expected) if isinstance(left, str) else ("", "")  # a page names its files anyway, but not as often
    folder, file = Path(name).parts[0], Path(name).name
    words = {file, Path(name).stem} | ({folder} if folder.startswith(("model", "checkpoint-")) else set())
    named = any(word in ended.log or pages[0].count(word) > pages[1].count(word) for word in words)
    if "Traceback" in ended.log or ended.code not in (0, 2):
        return "traceback"
    if ended.code == 2:
        return "named error" if named else "error that names nothing"
    if left == expected:
        return "rebuilt" if "damaged" in ended.log else "same result"
    return "named" if named else "silent loss"


def matrix(lab: Lab, rng: random.Random, sample: int | None) -> dict[str, Any]:
    """Every file with every damage under every command, or a sample of these cells."""
    tried = subjects(lab)
    cells = []
    for subject in tried:
        for command in subject.commands:
            ended, subject.expected[command] = attempt(lab, subject, command, lambda run: None)
            expect(ended.code == 0, f"{command} fails on an undamaged {subject.name}", ended)
        folders = sorted(path.name for path in subject.origin.glob("checkpoint-*"))
        for path in sorted(path for path in subject.origin.rglob("*") if path.is_file() and path.stat().st_size):
            name = str(path.relative_to(subject.origin))
            deep = subject.name == "comparison" and name.partition("/")[0] in ("opd", "trb")  # a run, as the others
            old = name.partition("/")[0] in (*folders[:-1], checkpoints.PARTIAL)
            if name != "report.html" and not old and not deep:
                cells += [(subject, command, name, damage) for damage in FILE_DAMAGES for command in subject.commands]
    if sample is not None:
        cells = rng.sample(cells, sample)
    result: dict[str, Any] = {"cells": 0, "verdicts": {}, "wrong": []}
    for subject, command, name, damage in cells:
        ended, left = attempt(lab, subject, command, lambda run, n=name, d=damage: d(run / n, rng))
        found = verdict(subject, command, name, ended, left)
        result["cells"] += 1
        result["verdicts"][found] = result["verdicts"].get(found, 0) + 1
        if found not in GOOD:
            case = f"{subject.name}: {command} with {name} {damage.__name__}: {found}"
            result["wrong"].append(case)
            lab.console.print(case, ended.log[-1000:], markup=False)
    return result


# ---- faults ----

Fault = Callable[[Lab, Path, random.Random], None]
FAULTS: dict[str, Fault] = {}
QUICK = ("Ctrl-C",)


def fault(name: str) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[name] = function
        return function

    return register


def expect(condition: bool, what: str, ended: Ended | None = None) -> None:
    if not condition:
        raise AssertionError(what + (f"; exit code {ended.code}, log: {ended.log[-1500:]}" if ended else ""))


def breaking_loss(steps: set[int], factor: float) -> Callable[[], None]:
    """Multiply the loss of some optimizer steps (from 1)."""

    def prepare() -> None:
        plain = TRBTrainer._compute_loss

        def broken(self: TRBTrainer, *arguments: Any) -> Any:
            loss, *rest = plain(self, *arguments)
            bad = self.model.training and self.state.global_step + 1 in steps
            return (loss * factor if bad else loss), *rest

        TRBTrainer._compute_loss = broken  # type: ignore[method-assign]

    return prepare


@fault("loss of nan, once")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    ended = lab.run(directory, breaking_loss({3}, float("nan")))
    expect(ended.code == 0, "the run did not go on", ended)
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    expect(last["trb/skipped_steps"] == 1, f"skipped_steps is {last['trb/skipped_steps']}")
    rows = [json.loads(line) for line in (directory / "skipped" / "step-000003.jsonl").read_text().splitlines()]
    expect(len(rows) == 4 and all(row["prompt"] for row in rows), "the prompts were not saved")
    check_finite(directory)


@fault("loss of inf, once")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    ended = lab.run(directory, breaking_loss({4}, float("inf")))
    expect(ended.code == 0 and (directory / "skipped" / "step-000004.jsonl").exists(), "not skipped", ended)
    check_finite(directory)


@fault("loss of nan from step 5 on")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    recipe = yaml.safe_load(lab.recipe.read_text()) | {"max_skipped_steps": 3}
    strict = directory.parent / "strict.yaml"
    strict.write_text(yaml.safe_dump(recipe))

    def work() -> int:
        breaking_loss(set(range(5, 99)), float("nan"))()
        return cli.main(["train", "--config", str(strict), "--output-dir", str(directory), "--quiet"])

    log = directory.parent / f"{directory.name}.log"
    ended = wait(start(work, log), log)
    expect(ended.code == 2 and "checkpoint-6" in ended.log, "no message that names the checkpoint", ended)
    expect(checkpoints.latest(directory, warn=None) == directory / "checkpoint-6", "the checkpoint is not intact")


def check_finite(directory: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(directory / "model" / "model.safetensors")
    expect(all(bool(value.isfinite().all()) for value in weights.values()), "the weights are not finite")


@fault("Ctrl-C")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    # After the run has begun to train, so that there is something to interrupt, and before it ends.
    child = lab.begin(directory)
    log = directory.parent / f"{directory.name}.log"
    deadline = time.monotonic() + PATIENCE_S
    while not (directory / "rollouts.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, lab.seconds / 8))
    family = psutil.Process(child).children(recursive=True)
    os.kill(child, signal.SIGINT)
    ended = wait(child, log)
    expect(ended.code == 130 and "Run the same command again" in ended.log, "not told how to go on", ended)
    _, alive = psutil.wait_procs(family, timeout=30)
    expect(not alive, f"{len(alive)} processes stayed")
    expect(not lab.differences(directory), "the resumed run differs")


@fault("a logging service that fails")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    def prepare() -> None:
        from transformers import TrainerCallback
        from transformers.integrations import integration_utils

        class Dead(TrainerCallback):
            def on_log(self, *arguments: Any, **options: Any) -> None:
                raise ConnectionError("no route to host")

        integration_utils.INTEGRATION_TO_CALLBACK["swanlab"] = Dead
        plain = TRBTrainer.__init__

        def with_service(self: TRBTrainer, *arguments: Any, **options: Any) -> None:
            options["args"].report_to = ["swanlab"]
            plain(self, *arguments, **options)

        TRBTrainer.__init__ = with_service  # type: ignore[method-assign]

    ended = lab.run(directory, prepare)
    expect(ended.code == 0 and "no route to host" in ended.log, "no warning", ended)
    expect(not lab.differences(directory), "the run differs")


@fault("a checker that hangs, then crashes")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    with Verifier(0.5) as verifier:
        rows = [{"answer": "7"}, {"answer": "7"}]
        hard = r"\boxed{9^{9^{9^{9}}}}"
        scores = verifier.score([hard, r"\boxed{14/2}"], rows)
        expect(scores[1] == 1.0 and verifier.timeouts + verifier.crashes >= 1, f"{scores}")
        assert verifier._worker is not None
        os.kill(verifier._worker._process.pid, signal.SIGKILL)
        verifier._worker._process.wait()
        expect(verifier.score([r"\boxed{21/3}"], rows[:1]) == [1.0], "no new worker after a crash")


@fault("a grader that fails after it has worked")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    def prepare() -> None:
        plain, calls = TRBTrainer._rewards, [0]

        def failing(self: TRBTrainer, *arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == 3:
                self.reward_fn = broken
            return plain(self, *arguments)

        def broken(*arguments: Any) -> list[float]:
            raise RuntimeError("the answer-checking worker did not start")

        TRBTrainer._rewards = failing  # type: ignore[method-assign]

    ended = lab.run(directory, prepare)
    expect(ended.code == 0 and "no rewards, as their function failed" in ended.log, "the run did not go on", ended)


@fault("a tokenizer without a pad token")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    from transformers import AutoTokenizer

    from trb import zoo

    model, log = directory.parent / f"{directory.name}-model", directory.parent / f"{directory.name}.log"

    def save() -> None:
        student, tokenizer = zoo.load("student")
        student.save_pretrained(model)
        tokenizer.save_pretrained(model)

    # In a child: loading starts threads, and nothing but fresh processes may be forked into runs.
    prepared = wait(start(save, log), log)
    expect(prepared.code == 0, "the model was not saved", prepared)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    expect(AutoTokenizer.from_pretrained(model).pad_token is None, "it has one")
    recipe = yaml.safe_load(lab.recipe.read_text()) | {"student": str(model)}
    other = directory.parent / "no-pad.yaml"
    other.write_text(yaml.safe_dump(recipe))
    ended = wait(
        start(
            lambda: cli.main(["train", "--config", str(other), "--output-dir", str(directory), "--quiet"]),
            log,
        ),
        log,
    )
    expect(ended.code == 0, "it does not train", ended)
    ours, theirs = ((path / "rollouts.jsonl").read_text() for path in (directory, lab.folder / "undisturbed"))
    expect(without_ids(ours) == without_ids(theirs), "the rollouts differ")


def without_ids(text: str) -> list[list[Any]]:
    return [[row["step"], row["prompt"], row["completion"]] for row in map(json.loads, text.splitlines())]


@fault("two runs in one directory")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    first = lab.begin(directory)
    log, second_log = directory.parent / f"{directory.name}.log", directory.parent / "second.log"
    while not (directory / "config.yaml").exists():
        time.sleep(0.01)
    second = wait(start(lambda: cli.main(lab.command(directory)), second_log), second_log)
    expect(second.code == 2 and "another run is writing" in second.log, "the second was let in", second)
    expect(wait(first, log).code == 0, "the first was disturbed")
    expect(not lab.differences(directory), "the run differs")


@fault("a directory that cannot be written")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    log = directory.parent / f"{directory.name}.log"
    ended = wait(start(lambda: cli.main(lab.command(Path("/proc/nowhere/run"))), log), log)
    expect(ended.code == 2 and "choose another --output-dir" in ended.log, "no remedy was named", ended)


@contextmanager
def small_disk(lab: Lab, name: str) -> Iterator[Path]:
    """A directory that a child will mount a small disk on, in a name space of its own."""
    point = lab.folder / name
    point.mkdir()
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(point)], capture_output=True)
    if probe.returncode:
        raise NotImplementedError(f"this machine mounts no disks for its users: {probe.stderr.decode().strip()}")
    yield point


@fault("a disk that fills up in a checkpoint")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    """On a real file system: room for the first checkpoints, then none; then room again, and the same command."""
    with small_disk(lab, "full-disk") as point:
        run = point / "run"
        train = " ".join([sys.executable, "-m", "trb", *lab.command(run)])
        size = sum(path.stat().st_size for path in (lab.folder / "undisturbed" / "checkpoint-8").iterdir())
        # Two checkpoints and a half. The check of free space before training asks for less than two.
        script = f"""
            mount -t tmpfs -o size={int(2.5 * size)} none {point}
            {train}; echo "first: $?"; ls {run}
            mount -o remount,size=200m {point}
            {train}; echo "second: $?"
            cp -r {run} {directory}
        """
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            ["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, timeout=600, env=environment
        )
    log = done.stdout + done.stderr
    expect("first: 2" in log and "is full" in log and "continue from checkpoint-" in log, f"first: {log[-2000:]}")
    expect("checkpoint.partial" not in log, "half a checkpoint stayed")
    expect("second: 0" in log, f"second: {log[-2000:]}")
    expect(not lab.differences(directory), "the resumed run differs")


@fault("a worker of a sweep that dies")
def _(lab: Lab, directory: Path, rng: random.Random) -> None:
    spec = importlib.util.spec_from_file_location("kill_sweep", HERE / "kill_sweep.py")
    assert spec is not None and spec.loader is not None
    kill_sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill_sweep)
    study = lab.folder / "study.yaml"
    study.write_text(yaml.safe_dump(kill_sweep.STUDY, sort_keys=False))
    process = kill_sweep.start(study, directory, 1)
    while not list(directory.glob("chains/select/*/*/*/config.yaml")):
        expect(process.poll() is None, "the sweep ended early")
        time.sleep(0.05)
    for worker in psutil.Process(process.pid).children():
        if "spawn_main" in " ".join(worker.cmdline()):
            worker.kill()
    log = directory.parent / f"{directory.name}.log"
    code = process.wait(timeout=PATIENCE_S)
    expect(code == 2 and "a worker process died" in log.read_text(), f"exit code {code}: {log.read_text()[-1000:]}")
    kill_sweep.finish(kill_sweep.start(study, directory, 2), log)
    expect((directory / "study.json").exists(), "the second start did not finish")


def faults(lab: Lab, rng: random.Random, names: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"injected": 0, "handled": 0, "cases": {}}
    for index, name in enumerate(names):
        try:
            FAULTS[name](lab, lab.folder / f"fault-{index}", rng)
            verdict = "handled"
        except NotImplementedError as error:
            result["cases"][name] = f"not injected: {error}"
            lab.console.print(f"{name}: not injected ({error})", markup=False)
            continue
        except Exception as error:
            verdict = f"not handled: {error}"
        result["injected"] += 1
        result["handled"] += verdict == "handled"
        result["cases"][name] = verdict
        lab.console.print(f"{name}: {verdict}", markup=False)
    return result


# ---- wear ----


def growth(lab: Lab, steps: int) -> dict[str, Any]:
    """A long run with everything on; memory, file handles and threads of its processes as its steps go by."""
    recipe = {
        **RECIPE,
        "train_limit": 400,
        "max_steps": steps,
        "prompts_per_step": 1,
        "num_generations": 1,
        "per_device_train_batch_size": 1,
        "max_completion_length": 4,
        "logging_steps": max(1, steps // 200),
        "save_steps": max(1, steps // 20),
        "eval_every": max(1, steps // 10),
        "held_out_every": max(1, steps // 20),
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-6,
    }
    path, directory = lab.folder / "long.yaml", lab.folder / "long"
    path.write_text(yaml.safe_dump(recipe))
    log = lab.folder / "long.log"
    child = start(lambda: cli.main(["train", "--config", str(path), "--output-dir", str(directory), "--quiet"]), log)
    process, samples = psutil.Process(child), []
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        step = steps_done(directory)
        if step is not None and (not samples or step > samples[-1]["step"]):
            with process.oneshot():
                if process.status() != psutil.STATUS_ZOMBIE:
                    samples.append(
                        {
                            "step": step,
                            "memory_mb": round(process.memory_info().rss / 1e6, 2),
                            "file_handles": process.num_fds(),
                            "threads": process.num_threads(),
                            "children": len(process.children(recursive=True)),
                        }
                    )
        time.sleep(0.2)
    if not (directory / "results.json").exists():
        raise SystemExit(f"the long run failed:\n{log.read_text()[-3000:]}")
    # The first quarter fills caches (compiled patterns, allocators, the checker's worker) once.
    settled = [sample for sample in samples if sample["step"] >= steps // 4]
    names = ("memory_mb", "file_handles", "threads", "children")
    return {
        "steps": steps,
        "per_1000_steps": {name: round(1000 * slope(settled, name), 3) for name in names},
        "samples": samples[:: max(1, len(samples) // 60)],
    }


def steps_done(directory: Path) -> int | None:
    try:
        return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):  # not there yet, or its last line is being written
        return None


def slope(samples: list[dict[str, Any]], name: str) -> float:
    """Least squares: how much a quantity grows per step."""
    steps, values = [sample["step"] for sample in samples], [sample[name] for sample in samples]
    mean, level = sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((step - mean) ** 2 for step in steps)
    return sum((step - mean) * (value - level) for step, value in zip(steps, values, strict=True)) / max(spread, 1e-9)


# ---- all of it ----


def torture(lab: Lab, seed: int, quick: bool, kill_count: int, steps: int) -> dict[str, Any]:
    """Everything, in the order of the table."""
    rng, began = random.Random(seed), time.monotonic()
    measure(lab)
    total = len(lab.operations)
    lab.console.print(f"undisturbed: {lab.seconds:.1f} s, {total} file operations")
    renames = [n for n, line in enumerate(lab.operations, 1) if line.startswith("os.rename checkpoint.partial")]
    if quick:
        chosen, saves, moments = [renames[1], rng.randrange(1, total)], [5], 0  # 3 tensor files a checkpoint
    else:
        chosen = sorted({round(1 + index * (total - 1) / max(1, kill_count - 1)) for index in range(kill_count)})
        saves, moments = list(range(1, 13, 2)), max(1, kill_count // 4)
    result: dict[str, Any] = {"quick": quick, "seed": seed}
    result["kills"] = kills(lab, rng, chosen, saves, moments)
    result["checkpoints"] = corruption(lab, rng, 1 if quick else 6)
    result["matrix"] = matrix(lab, rng, 12 if quick else None)
    result["faults"] = faults(lab, rng, list(QUICK) if quick else list(FAULTS))
    result["growth"] = growth(lab, steps)
    result["differences_after_resume"] = sum(len(result[part]["differences"]) for part in ("kills", "checkpoints"))
    result["seconds"] = round(time.monotonic() - began)
    return result


def failures(result: dict[str, Any]) -> list[str]:
    """What must not be: empty when everything held."""
    found = []
    if result["kills"]["survived"] < result["kills"]["tried"] or result["differences_after_resume"]:
        found.append("a killed run did not end as the undisturbed one")
    if result["checkpoints"]["recognised"] < result["checkpoints"]["made"]:
        found.append(f"damage was not recognised: {', '.join(result['checkpoints']['unrecognised'])}")
    found += result["matrix"]["wrong"]
    found += [f"{name}: {verdict}" for name, verdict in result["faults"]["cases"].items() if "not handled" in verdict]
    growing = [name for name, most in MOST_GROWTH.items() if result["growth"]["per_1000_steps"][name] > most]
    if growing and result["growth"]["steps"] >= 1000:  # over less, one handle that is open now and then is a slope
        found.append(f"growing with the steps: {', '.join(growing)}")
    return found


def print_table(result: dict[str, Any], console: Console) -> None:
    kills, damaged, faulty = result["kills"], result["checkpoints"], result["faults"]
    growing = result["growth"]["per_1000_steps"]
    table = Table("", "", title="torture", title_justify="left")
    for name, value in (
        ("kills survived / tried", f"{kills['survived']} / {kills['tried']}"),
        ("faults handled / injected", f"{faulty['handled']} / {faulty['injected']}"),
        ("files x damages x commands", ", ".join(f"{n} {word}" for word, n in result["matrix"]["verdicts"].items())),
        ("damaged checkpoints recognised / made", f"{damaged['recognised']} / {damaged['made']}"),
        ("differences after a resume", str(result["differences_after_resume"])),
        ("memory growth per 1,000 steps", f"{growing['memory_mb']:+.2f} MB over {result['growth']['steps']:,} steps"),
        ("file handles, threads per 1,000 steps", f"{growing['file_handles']:+.2f}, {growing['threads']:+.2f}"),
    ):
        table.add_row(name, value)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each, in half a minute")
    parser.add_argument(
        "--kills", type=int, default=40, metavar="N", help="file operations killed before (default: 40)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of the long run (default: 2000, with --quick 20)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # results repeat bit for bit with one thread, and children are forked from one
    gc.collect()
    gc.freeze()  # so that collections in the children neither go through what was imported nor copy it
    console = Console(stderr=True)
    steps = arguments.steps or (20 if arguments.quick else 2000)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), console)
        result = torture(lab, arguments.seed, arguments.quick, arguments.kills, steps)
    print_table(result, Console())
    if arguments.out:
        write_json(arguments.out, {**result, "provenance": provenance.describe()})
    wrong = failures(result)
    for line in wrong:
        console.print(line, style="red", markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
