"""Texts made to command a terminal: in errors, in tables, in the traceback of a bug."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

from hostile_helpers import SECONDS, each, slow
from rich.console import Console

from trb.cli import main
from trb.cli.display import score_table, study_table

ESCAPES = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://example.com\x1b\\x\x1b]8;;\x1b\\",
    "carriage return": "good\rbad",
    "direction": "\u202ednab\u2066",
    "c1": "\x9b31m",
    "backspace": "a\x08\x08b",
}


def not_plain(text: str) -> list[str]:
    return [character for character in text if not (character.isprintable() or character == "\n")]


@each("text", **ESCAPES)
def test_an_error_about(folder: Path, text: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({text: text}))
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        code = main(["train", "--config", str(path)])
        code = code and main(["report", str(folder / text.replace("/", "_"))])
    assert not_plain(output.getvalue()) == []
    assert code == 2
    assert output.getvalue()


@each("text", **ESCAPES)
def test_a_table_with(folder: Path, text: str) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=False, width=200)
    markup = f"[bold]{text}[/bold][link=http://example.com]"
    score = {"pass_at_1": 0.5, "interval": [0.4, 0.6], "seeds": 1, "problems": 2, "difference_to_opd": None}
    console.print(score_table({"student": score, markup: score}))
    console.print(study_table({"title": markup, "methods": {markup: score}, "student": score, "teacher": score}))
    assert not_plain(output.getvalue()) == []
    assert output.getvalue().count("[bold]") == 3, "it was read as markup"


@slow
def test_a_traceback_about_a_file(folder: Path) -> None:
    """A bug of ours must not print what a file holds as it is: forced here by an error from outside the package."""
    code = (
        "import sys; sys.argv = ['trb', 'report', '.']\n"
        "import trb.cli, trb.report\n"
        "def broken(*_): raise KeyError(chr(27)) from RuntimeError(chr(27) + '[31m' + chr(8238))\n"
        "trb.report.write_report = broken\n"
        "import warnings, logging; logging.getLogger('x').warning('hello')\n"
        "sys.exit(trb.cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=SECONDS)
    assert not_plain(done.stderr) == []
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
