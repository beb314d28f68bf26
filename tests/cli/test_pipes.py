"""What is left of a command when nobody reads it any more: `trb ... | head` ends without a word."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_recipes import SMALL_FILE

from trb import cli


@pytest.fixture
def broken() -> Iterator[int]:
    """The end of a pipe that has no reader, so that the first thing written there fails."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


LIGHT = ("--help", "--version", "eval --help")
# Each loads torch, transformers and TRL: of the six, one is started here beside the two of the tests below.
HEAVY = ("doctor", "train --help-keys", "sweep --config studies/zoo --plan")
CASES = [pytest.param(words, mode) for words in LIGHT for mode in ("", "1")] + [
    pytest.param(words, mode, marks=[] if (words, mode) == ("doctor", "1") else pytest.mark.torture)
    for words in HEAVY
    for mode in ("", "1")
]


@pytest.mark.parametrize(("words", "unbuffered"), CASES)
def test_a_reader_that_leaves_is_no_error(
    words: str, unbuffered: str, broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command = [sys.executable, "-m", "trb", *words.split()]
    result = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, timeout=120)
    may_keep_it = unbuffered and words in LIGHT  # argparse tells nobody, from some patch of Python 3.11 on
    assert (result.returncode, result.stderr) in {(141, ""), *([(0, "")] if may_keep_it else [])}


def test_more_than_a_buffer_of_text_is_cut_short() -> None:
    """As `| head -1` does: the reader leaves in the middle."""
    command = [sys.executable, "-m", "trb", "train", "--help-keys"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(120) in (0, 141)  # 0 if the pipe had taken all of it
    assert said == ""


def test_progress_that_nobody_reads_ends_a_run_quietly(tmp_path: Path, broken: int) -> None:
    (tmp_path / "small.yaml").write_text(SMALL_FILE)
    command = [sys.executable, "-m", "trb", "train", "--config", "small.yaml"]
    result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=broken, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (141, "")


def test_another_pipe_that_breaks_is_an_error(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom trb import cli\nimport trb.cli.report\n"
        "def broken(*arguments):\n    raise BrokenPipeError(32, 'Broken pipe')\n"
        "cli.run_report = broken\nsys.argv = ['trb', 'report', 'nowhere']\nsys.exit(cli.main())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "BrokenPipeError" in result.stderr


def test_a_process_that_calls_the_command_keeps_its_own_streams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "run_report", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["report", "nowhere"])
