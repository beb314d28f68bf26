"""Writing files at once: what is there stays until the whole replacement is."""

import json
import math
from pathlib import Path

import pytest

from trb.files import cache_directory, finite, write_json, write_text


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.txt"
    write_text(path, "first")
    write_text(path, "zweiter µ\n")
    assert path.read_bytes() == "zweiter µ\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "old")

    def torn(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_infinities(tmp_path: Path) -> None:
    value = {"a": [1.5, math.inf, (math.nan, "x")], "b": {"c": -math.inf, "d": True}}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "value.json", value)
    write_json(tmp_path / "value.json", finite(value))
    assert json.loads((tmp_path / "value.json").read_text()) == {
        "a": [1.5, None, [None, "x"]],
        "b": {"c": None, "d": True},
    }


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRB_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.setenv("TRB_CACHE", "")
    assert cache_directory() == Path.home() / ".cache" / "trb"


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRB_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(FileNotFoundError, match=r"'~nobody-of-this-name/cache': set TRB_CACHE"):
        cache_directory()
