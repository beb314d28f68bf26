"""Writing files at once: what is there stays until the whole replacement is."""

import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import held_by_another

from trb.safety.files import cache_directory, exclusive, finite, write_json, write_text


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.txt"
    write_text(path, "first")
    write_text(path, "zweiter µ\n")
    assert path.read_bytes() == "zweiter µ\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "old")

    def full(handle: int) -> None:
        os.truncate(handle, 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
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


# ---- holding a folder ----


def test_a_held_folder_says_who_holds_it_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as holder:
        named = rf"in use by process {holder} on {socket.gethostname()}, since 20\d\d-"
        with pytest.raises(BlockingIOError, match=named), exclusive(tmp_path):
            pass
        assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == holder
    assert (tmp_path / ".lock").exists()  # killed, it could not remove it
    with exclusive(tmp_path), exclusive(tmp_path):  # whoever holds it may hold it again
        assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"pid": "x"}', b"[" * 100_000])
def test_a_holder_whose_note_is_damaged_holds_all_the_same(tmp_path: Path, content: bytes) -> None:
    with held_by_another(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(BlockingIOError, match="in use by another process"), exclusive(tmp_path):
            pass


def test_what_is_part_of_a_held_comparison_is_held_too(tmp_path: Path) -> None:
    run = tmp_path / "setting" / "opd"
    run.mkdir(parents=True)
    with held_by_another(tmp_path):
        with exclusive(run):  # a folder of anything
            pass
        (tmp_path / "study.yaml").write_text("")
        with pytest.raises(BlockingIOError, match=rf"{tmp_path} is in use by process"), exclusive(run):
            pass
        with exclusive(run, inside=True):
            pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError, match="lock"), exclusive(folder):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_lock_that_is_no_file_is_an_error_and_not_a_folder_that_nobody_holds(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(OSError, match="Invalid argument"), exclusive(tmp_path):
        pass


def test_a_killed_holder_lets_go_though_its_children_live(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from trb.safety.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n"
        "    if not os.fork(): print(os.getpid(), flush=True)\n"  # the child itself: it has let go by then
        "    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            holder.kill()
            holder.wait()
            with exclusive(tmp_path):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_whoever_waits_gets_in_when_the_holder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    with held_by_another(tmp_path) as holder:

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            os.kill(holder, signal.SIGKILL)

        monkeypatch.setattr(time, "sleep", sleep)
        with exclusive(tmp_path, wait=True):
            assert waits and json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_where_nothing_can_be_locked_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="error") if number == errno.EIO else nullcontext():
        with exclusive(tmp_path):
            entered = True
        assert entered
        assert list(tmp_path.iterdir()) == []


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loss of power leaves the name and no contents."""
    flushed: list[int] = []
    flush, replace = os.fsync, Path.replace

    def noted(handle: int) -> None:
        flushed.append(os.fstat(handle).st_ino)
        flush(handle)

    def checked(self: Path, target: Path) -> Path:
        assert self.stat().st_ino in flushed
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", checked)
    write_text(tmp_path / "config.yaml", "a: 1\n")
    assert tmp_path.stat().st_ino == flushed[-1]
