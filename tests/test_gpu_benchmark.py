"""`benchmarks/gpu.py`: every section runs in miniature on a CPU, and a run goes on where an earlier one stopped."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402

SECTIONS = [section.__name__ for section, _ in gpu.SECTIONS]
NOW: dict[str, Any] = {"commit": "b", "dirty": False, "time": "noon", "device": "H100", "size": "full"}
DONE: dict[str, Any] = {"commit": "b", "dirty": False, "cut": False, "error": None, "failures": []}


# The oldest transformers that is allowed knows no other name.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_every_section_runs_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--device", "cpu", "--output", str(output)])
    assert gpu.main() == 0
    record = json.loads(output.read_text())
    assert list(record["sections"]) == SECTIONS
    for name, section in record["sections"].items():
        assert section["numbers"], name
        assert not any("error" in numbers for numbers in section["numbers"].values()), name
    contenders = {"plain", "warm-up 0.02", "TRL"}
    assert set(record["sections"]["time_training"]["numbers"]) == contenders
    losses = record["sections"]["time_loss"]["numbers"]
    ours, theirs = (losses[f"{who}, whole vocabulary, 5 tokens"]["loss"] for who in ("trb, eager", "TRL"))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("section", "record", "done"),
    [
        ({}, {}, True),
        ({"commit": "a"}, {}, False),
        ({"cut": True}, {}, False),
        ({"error": "broke"}, {}, False),
        ({"failures": ["wrong"]}, {}, False),
        ({"dirty": True}, {}, False),
        ({}, {"dirty": True}, False),
        ({"commit": None}, {"commit": None}, False),
    ],
)
def test_only_what_this_commit_finished_is_skipped(section: dict[str, Any], record: dict[str, Any], done: bool) -> None:
    assert gpu.is_done(NOW | record | {"sections": {"time_loss": DONE | section}}, "time_loss") is done
    assert not gpu.is_done(NOW | record | {"sections": {}}, "time_loss")


def test_sections_of_other_commits_stay_with_their_commit(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert gpu.earlier_sections(output, NOW) == {}
    output.write_text(json.dumps(NOW | {"commit": "a", "sections": {"old": {"cut": False}, "new": DONE}}))
    found = gpu.earlier_sections(output, NOW)
    assert {name: section["commit"] for name, section in found.items()} == {"old": "a", "new": "b"}
    for other in ({"device": "A100"}, {"size": "small"}):
        assert gpu.earlier_sections(output, NOW | other) == {}
