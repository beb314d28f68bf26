"""Run directories made to show other people's files, to write to them, or to run scripts in a reader's browser."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hostile_helpers import ALIASES, each, refused

from trb.report import write_report
from trb.report.tables import write_tables


def run_directory(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("method: trb\n")
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return path


@each("name", metrics="metrics.jsonl", rollouts="rollouts.jsonl", results="results.json", config="config.yaml")
def test_a_link_to_another_file(folder: Path, name: str) -> None:
    secret = folder / "secret"
    secret.write_text('{"step": 1, "prompt": "secret", "completion": "secret"}\n')
    run_path = run_directory(folder / "run")
    (run_path / name).unlink(missing_ok=True)
    (run_path / name).symlink_to(secret)
    refused(lambda: write_report(run_path))


def test_a_link_to_another_run(folder: Path) -> None:
    secret = run_directory(folder / "secret")
    run_directory(folder / "runs" / "opd")
    (folder / "runs" / "trb").symlink_to(secret)
    refused(lambda: write_report(folder / "runs"))


def test_a_page_written_through_a_link(folder: Path) -> None:
    victim = folder / "victim"
    victim.write_text("mine")
    run_path = run_directory(folder / "run")
    (run_path / "report.html").symlink_to(victim)
    write_report(run_path)
    assert victim.read_text() == "mine"


@each("text", bomb=ALIASES, nesting="[" * 5_000, itself="&a [*a]")
def test_a_configuration_in_a_run(folder: Path, text: str) -> None:
    run_path = run_directory(folder / "run")
    (run_path / "config.yaml").write_text(text)
    refused(lambda: write_report(run_path))


@each(
    "text",
    script="</script><script>alert(1)</script>",
    image="<img src=x onerror=alert(1)>",
    quote="\"'><svg/onload=x>",
)
def test_markup_in_every_text(folder: Path, text: str) -> None:
    run_path = run_directory(folder / "run")
    (run_path / "config.yaml").write_text(json.dumps({"method": text, text: text}))
    rollout = {"step": 1, "prompt": text, "completion": text, "tokens": [text], "reward": 1.0}
    (run_path / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n")
    score = {"pass_at_1": 0.5, "interval": [0.4, 0.6], "name": text}
    (run_path / "results.json").write_text(json.dumps({text: score, "provenance": {"command": text, text: text}}))
    found: list[tuple[str, Any]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            found.append((tag, attrs))

    Reader().feed(write_report(run_path).read_text())
    scripts = sum(tag == "script" for tag, _ in found)
    handlers = [name for _, attributes in found for name, _ in attributes if name.startswith("on")]
    assert (scripts, handlers) == (2, [])
    assert not any(tag == "img" for tag, _ in found)


def test_a_formula_in_a_table(folder: Path) -> None:
    score = {"pass_at_1": 0.5, "interval": [0.4, 0.6]}
    write_tables({"=HYPERLINK(0)": score, "@x": score, "+1": score, "\t=1": score}, folder)
    cells = [line.split(",")[0].strip('"') for line in (folder / "scores.csv").read_text().splitlines()]
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+", "-", "\t"))]
