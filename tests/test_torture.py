"""The torture of `make torture`, in its short version: what it finds, and that it would find something."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "torture.py"


@pytest.fixture(scope="module")
def torture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torture", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["torture"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads what Linux says of a process")
def test_killed_runs_damaged_checkpoints_and_faults_are_survived(tmp_path: Path) -> None:
    out = tmp_path / "torture.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["kills"]["tried"] == result["kills"]["survived"] == 3
    assert result["kills"]["missed"] == 0
    assert result["checkpoints"]["recognised"] == result["checkpoints"]["made"] >= 40
    assert result["checkpoints"]["resumed"] == 1
    assert result["differences_after_resume"] == 0
    assert result["matrix"]["cells"] == 12
    assert result["matrix"]["wrong"] == []
    assert result["faults"]["handled"] == result["faults"]["injected"] == 1
    assert result["growth"]["samples"]


def run_directory(folder: Path, torture: ModuleType) -> Path:
    """What `outcome` reads, made up."""
    for name in torture.RECORDS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"step": 1, "loss": 0.5, "step_time": 3.0}\n')
    (folder / "results.json").write_text('{"trb": {"pass_at_1": 0.5, "train_seconds": 9.1}, "provenance": {"a": 1}}')
    last = folder / f"checkpoint-{torture.RECIPE['max_steps']}"
    for path in (folder / "model" / "model.safetensors", *(last / name for name in torture.STATE)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"tensors")
    (last / "trb_state_0.json").write_text('{"loss": 1.0, "metrics": {"step_time": [1.0]}}')
    return folder


def clocks(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "step_time": 4.0}\n')


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (clocks, []),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.25}\n'), ["metrics.jsonl"]),
        (lambda folder: (folder / "rollouts.jsonl").write_text(""), ["rollouts.jsonl"]),
        (lambda folder: (folder / "checkpoint-8" / "optimizer.pt").write_bytes(b"t"), ["checkpoint-8/optimizer.pt"]),
        (lambda folder: (folder / ".left.12.partial").write_text(""), [".left.12.partial"]),
        (lambda folder: (folder / "model" / "model.safetensors").write_bytes(b"x"), ["model/model.safetensors"]),
    ],
)
def test_the_comparison_sees_everything_but_clocks(
    tmp_path: Path, torture: ModuleType, change: Any, differing: list[str]
) -> None:
    first = torture.outcome(run_directory(tmp_path / "first", torture))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    change(tmp_path / "second")
    second = torture.outcome(tmp_path / "second")
    assert sorted(name for name in first | second if first.get(name) != second.get(name)) == differing


def test_a_leak_is_a_slope(torture: ModuleType) -> None:
    samples = [{"step": step, "memory_mb": 100 + 0.02 * step, "threads": 3} for step in range(0, 2000, 50)]
    assert torture.slope(samples, "memory_mb") == pytest.approx(0.02)
    assert torture.slope(samples, "threads") == 0
    held = {"tried": 1, "survived": 1}
    result = {
        "kills": held,
        "checkpoints": {"made": 1, "recognised": 1, "unrecognised": []},
        "matrix": {"wrong": []},
        "faults": {"cases": {"one": "handled"}},
        "differences_after_resume": 0,
        "growth": {"steps": 2000, "per_1000_steps": {"memory_mb": 1.0, "file_handles": 0, "threads": 0, "children": 0}},
    }
    assert torture.failures(result) == []
    for path, value, complaint in (
        (("kills", "survived"), 0, "did not end as the undisturbed one"),
        (("checkpoints", "recognised"), 0, "damage was not recognised"),
        (("matrix", "wrong"), ["report with a file emptied: silent loss"], "silent loss"),
        (("faults", "cases"), {"one": "not handled: x"}, "one: not handled"),
        (("growth", "per_1000_steps"), {**dict.fromkeys(torture.MOST_GROWTH, 0), "memory_mb": 20.0}, "memory_mb"),
    ):
        broken = {**result, path[0]: {**result[path[0]], path[1]: value}}
        (found,) = torture.failures(broken)
        assert complaint in found
