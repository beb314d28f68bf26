"""Signals to a command and to those it starts: it ends soon, quietly, and with everything that it has started.

What the next start makes of it is tested in test_torture.py and test_sweep.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from small_recipes import SMALL_FILE, STUDY

from trb.cli import _interruptible

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
# Far beyond the second or two that it takes, and far below what the runs would take that must not be waited for.
ENDS_WITHIN_S = 60.0


def start(command: list[str], log: Path, surroundings: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """As a terminal does: in a group of its own, and with Ctrl-C switched on."""
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | (surroundings or {}),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def wait_for(sign: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> None:
    while not sign():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)


def ends(process: subprocess.Popen[bytes], disturb: Callable[[], None]) -> int:
    """Its exit code; asserts that nothing that it has started outlives it for long."""
    family = psutil.Process(process.pid).children(recursive=True)
    try:
        disturb()
        code = process.wait(timeout=ENDS_WITHIN_S)
        _, alive = psutil.wait_procs(family, timeout=ENDS_WITHIN_S)
        assert not alive
        return code
    finally:
        for survivor in (process, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "reaches", [pytest.param("the sweep alone", marks=pytest.mark.torture), "all of a terminal's group"]
)
def test_an_interrupted_sweep_does_not_wait_for_its_runs(tmp_path: Path, reaches: str) -> None:
    study, log = tmp_path / "study.yaml", tmp_path / "log"
    study.write_text(yaml.safe_dump({**STUDY, "recipe": {**STUDY["recipe"], "max_steps": 100_000}}))
    directory = tmp_path / "study"
    sweep = start(
        ["-m", "trb", "sweep", "--config", str(study), "--output-dir", str(directory), "--workers", "1", "--quiet"], log
    )
    wait_for(lambda: list(directory.glob("chains/select/*/*/*/metrics.jsonl")), sweep, log)
    send = os.kill if reaches == "the sweep alone" else os.killpg
    assert ends(sweep, lambda: send(sweep.pid, signal.SIGINT)) == 130
    assert log.read_text() == "interrupted. Run the same command again: finished runs are kept.\n"


def test_a_command_ends_with_the_launcher_that_started_it(tmp_path: Path) -> None:
    """A process in the launcher's place, and a command that would take ten minutes."""
    command = (
        "import os, sys, time\nfrom trb import cli\n"
        "def work(*arguments):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "cli.run_report = work\nsys.argv = ['trb', 'report', 'nowhere']\nsys.exit(cli.main())"
    )
    launches = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {command!r}])"
    log = tmp_path / "log"
    launcher = start(["-c", launches], log, {"TORCHELASTIC_RUN_ID": "here"})
    wait_for(lambda: log.read_text().strip().isdecimal(), launcher, log)
    assert [child.pid for child in psutil.Process(launcher.pid).children()] == [int(log.read_text())]
    assert ends(launcher, launcher.kill) == -signal.SIGKILL


@pytest.mark.torture
def test_processes_of_a_launcher_that_was_killed_end(tmp_path: Path) -> None:
    recipe, log = tmp_path / "recipe.yaml", tmp_path / "log"
    recipe.write_text(
        yaml.safe_dump(
            {
                **yaml.safe_load(SMALL_FILE),
                "max_steps": 100_000,
                "per_device_train_batch_size": 2,
                "save_strategy": "no",
            }
        )
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "trb", "train", "--config", str(recipe), "--output-dir", str(tmp_path / "run"), "--quiet"]
    launcher = start([*launch, *train], log)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, launcher, log)
    assert ends(launcher, launcher.kill) == -signal.SIGKILL


@pytest.mark.parametrize(
    "script",
    [
        "with _interruptible(alone=True):\n    try: wait('working')\n    finally: wait('cleaning up')",
        "with _interruptible(alone=True): pass\nwait('done')",
    ],
)
def test_a_second_ctrl_c_ends_what_the_first_one_has_left(script: str, tmp_path: Path) -> None:
    """Quietly, and so does one that comes when the work is done."""
    waits = "import time\nfrom trb.cli import _interruptible\ndef wait(what): print(what, flush=True); time.sleep(60)\n"
    log = tmp_path / "log"
    process = start(["-c", waits + script], log)
    for said in range(1, 3 if "cleaning up" in script else 2):
        wait_for(lambda said=said: len(log.read_text().splitlines()) == said, process, log)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=ENDS_WITHIN_S) == 130
    assert "Traceback" not in log.read_text()


def test_ctrl_c_that_is_switched_off_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _interruptible(alone=True):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
