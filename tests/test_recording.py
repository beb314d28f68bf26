"""Files of a run: what is written, and what a resumed run drops."""

import json
from pathlib import Path

from trb.recording import append_jsonl, drop_after_step


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_numbers_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": 1, "loss": float("nan"), "nested": [float("inf"), {"x": 1.5}]}])
    assert read(path) == [{"step": 1, "loss": None, "nested": [None, {"x": 1.5}]}]


def test_lines_after_the_checkpoint_are_dropped_and_so_is_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": step} for step in range(1, 6)])
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    drop_after_step(path, 3)
    assert [row["step"] for row in read(path)] == [1, 2, 3]
    append_jsonl(path, [{"step": 4}])
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4]


def test_a_missing_file_is_left_missing(tmp_path: Path) -> None:
    drop_after_step(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_text_with_line_separators_and_lone_surrogates_survives(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    texts = ["a\u2028b", "\x85", "\ud800", "plain"]
    append_jsonl(path, [{"step": 1, "completion": text} for text in texts])
    drop_after_step(path, 1)
    assert [row["completion"] for row in read(path)] == texts
