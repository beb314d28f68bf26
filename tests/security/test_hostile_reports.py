"""Run directories made to show other people's files, to write to them, or to run scripts in a reader's browser."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hostile_helpers import ALIASES, each, refused
from report_helpers import page_of, write_outcomes

from trb.report import write_report
from trb.report.tables import write_tables

OUTCOMES = {"student": {"zoo": [1, 0, 1, 0]}, "trb": {"zoo": [0, 1, 1, 0]}}


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


@each("part", file="zoo.jsonl", step="step-000000", all="evaluations")
def test_a_link_to_the_results_of_another(folder: Path, part: str) -> None:
    """Of one file, of a step, or of all evaluations: what a reader may read elsewhere must not be in the page."""
    secret, run_path = (write_outcomes(run_directory(folder / name), OUTCOMES) for name in ("secret", "run"))
    here = next(run_path.rglob(part) if part != "zoo.jsonl" else run_path.rglob("step-000000/zoo.jsonl"))
    target = secret / here.relative_to(run_path)
    shutil.rmtree(here) if here.is_dir() else here.unlink()
    here.symlink_to(target)
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


@each(
    "text",
    script="</script><script>alert(1)</script>",
    image="<img src=x onerror=alert(1)>",
    quote="\"'><svg/onload=x>",
    script_link="javascript:alert(1)",
    direction="\u202e\u2066\u0000\u001b[31m",
)
def test_markup_in_the_problems_that_changed(folder: Path, text: str) -> None:
    """In questions, completions, names of problem sets, methods and prompt hashes."""
    run_path = write_outcomes(run_directory(folder / "run"), OUTCOMES)
    results = json.loads((run_path / "results.json").read_text())
    (run_path / "results.json").write_text(json.dumps({"student": results["student"], text: results["trb"]}))
    for path in run_path.rglob("zoo.jsonl"):
        header, *rows = map(json.loads, path.read_text().splitlines())
        header["settings"]["name"] = text
        put = {"question": text, "completions": [text], "prompt_hash": text}
        path.write_text("".join(json.dumps(row) + "\n" for row in (header, *(row | put for row in rows))))
    page = page_of(run_path)
    assert len([a for a in page.all("a") if "data-match" in a]) == 4
    assert {a["href"] for a in page.all("a")} <= {f"#{a['id']}" for _, a in page.tags if "id" in a}
    assert len(page.all("script")) == 2 and not page.all("img")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    shown = "".join(page.text_of["table"])
    assert not set("\u202e\u2066\u0000\u001b") & set(shown) and text[:3].strip("\u202e\u2066\u0000") in shown
    assert {row["tokens"][0] for row in page.data["rollouts"]} == {text}  # as data, for the script to show as text


@each("change", none={"n": 0, "correct": 0}, more={"correct": 10**9}, huge={"n": 10**400}, text={"correct": "1"})
def test_numbers_of_answers_that_cannot_be(folder: Path, change: dict[str, Any]) -> None:
    run_path = write_outcomes(run_directory(folder / "run"), OUTCOMES)
    path = run_path / "evaluations" / "step-000100" / "zoo.jsonl"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(json.loads(second) | change), *rest, ""]))
    page = page_of(run_path)
    assert any("zoo.jsonl, line 2: " in text for text in page.text_of["li"])
    assert not [a for a in page.all("section") if a.get("id") in ("differences", "problems")]


def test_a_formula_in_a_table(folder: Path) -> None:
    score = {"pass_at_1": 0.5, "interval": [0.4, 0.6]}
    write_tables({"=HYPERLINK(0)": score, "@x": score, "+1": score, "\t=1": score}, folder)
    cells = [line.split(",")[0].strip('"') for line in (folder / "scores.csv").read_text().splitlines()]
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+", "-", "\t"))]
