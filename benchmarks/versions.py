"""Run the suite with the oldest or the newest versions that pyproject.toml allows, and keep what came of it.

    make test-oldest    .venv-oldest, resolved to the lowest version of every direct dependency
    make test-newest    .venv-newest, resolved to the highest

Writes benchmarks/results/versions.json: per end the versions, how many tests passed, and where it ran. The declared
ranges are held to that file (tests/test_versions.py). Arguments after the end's name go to pytest; nothing is kept of
such a run.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("end", choices=("oldest", "newest"))
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        origin = describe()
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", f"--junitxml={report}", *rest]
        code = subprocess.run(command, cwd=ROOT).returncode
        if rest or not report.exists():
            return code
        found: dict[str, Any] = counts(report)
    found["packages"] = {item.name: metadata.version(item.name) for item in declared()}
    found["provenance"] = origin
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    text = json.dumps(record | {arguments.end: found}, indent=1, sort_keys=True)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
