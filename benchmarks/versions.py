"""Run the suite with the oldest or the newest versions that pyproject.toml allows, and keep what came of it.

    make test-oldest    .venv-oldest, resolved to the lowest version of every direct dependency
    make test-newest    .venv-newest, resolved to the highest

Writes benchmarks/results/versions.json: per end the versions, how many tests passed, and where it ran. The declared
ranges are held to that file (tests/test_versions.py). `--again TEST ...` runs tests that failed there once more, after
they were mended, and counts them as passed if every one of them passes: the file names them, and the commit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement

from trb.safety.files import write_text
from trb.studies.provenance import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
EXTRAS = ("test", "tasks", "ray")  # what the suite needs beside the package's own dependencies


def declared() -> list[Requirement]:
    """The direct dependencies that the suite runs with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = project["dependencies"] + [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    return [Requirement(text) for text in texts]


def counts(report: Path) -> dict[str, int]:
    """What a JUnit file says: passed, failed (errors included), skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    tests, failures, errors, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}


def run(tests: list[str]) -> dict[str, Any]:
    """The suite, or some of its tests, in this environment: the counts, the versions, and where."""
    found: dict[str, Any] = {"packages": {item.name: metadata.version(item.name) for item in declared()}}
    found["provenance"] = describe()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=ROOT)
        return found | counts(report)


def amended(first: dict[str, Any], again: dict[str, Any], tests: list[str]) -> dict[str, Any]:
    """A record of the suite whose failed tests were run once more, all of them and with the same versions."""
    assert again["packages"] == first["packages"], "other versions than those of the run"
    assert (again["passed"], again["failed"]) == (first["failed"], 0), f"{first['failed']} failed, and now: {again}"
    passed = first["passed"] + again["passed"]
    return first | {"passed": passed, "failed": 0, "again": {"tests": tests, "provenance": again["provenance"]}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("end", choices=("oldest", "newest"))
    parser.add_argument("--again", nargs="+", default=[], metavar="TEST", help="tests that failed in the run on file")
    arguments = parser.parse_args()
    found = run(arguments.again)
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if arguments.again:
        found = amended(record[arguments.end], found, arguments.again)
    record[arguments.end] = found
    write_text(RESULTS, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return min(found["failed"], 1)


if __name__ == "__main__":
    sys.exit(main())
