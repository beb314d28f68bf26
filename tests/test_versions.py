"""The declared ranges are those that were run, and the README says so."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from versions import amended, counts, declared  # noqa: E402

HEADER = "| versions | torch | transformers | TRL | PEFT | datasets | numpy | suite |"
SHOWN = ("torch", "transformers", "trl", "peft", "datasets", "numpy")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "versions.json").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    items = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in items}


def public(version: str) -> str:
    """Without the build: 2.13.0+cpu is 2.13.0."""
    return Version(version).public


def test_every_run_on_file_passed(record: dict[str, Any]) -> None:
    for end, run in record.items():
        assert run["failed"] == 0 and run["passed"] > 3000, end


@pytest.mark.parametrize("item", declared(), ids=lambda item: item.name)
def test_the_lower_end_of_each_range_is_what_the_oldest_run_had(item: Requirement, record: dict[str, Any]) -> None:
    lowest = [bound.version for bound in item.specifier if bound.operator in (">=", "==")]
    assert [Version(version) for version in lowest] == [Version(public(record["oldest"]["packages"][item.name]))]


@pytest.mark.parametrize("item", declared(), ids=lambda item: item.name)
def test_the_newest_and_the_pinned_version_lie_in_the_range(item: Requirement, record: dict[str, Any]) -> None:
    newest = public(record["newest"]["packages"][item.name])
    assert item.specifier.contains(newest)
    pinned = pins().get(canonicalize_name(item.name), newest)
    assert item.specifier.contains(pinned) and Version(pinned) <= Version(newest)


def test_a_report_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>')
    assert counts(report) == {"passed": 3, "failed": 3, "skipped": 3}


def test_failed_tests_are_made_good_only_by_all_of_them_with_the_same_versions() -> None:
    first = {"passed": 10, "failed": 2, "skipped": 1, "packages": {"torch": "2"}, "provenance": {"commit": "a"}}
    again = {"passed": 2, "failed": 0, "skipped": 0, "packages": {"torch": "2"}, "provenance": {"commit": "b"}}
    mended = amended(first, again, ["x", "y"])
    assert (mended["passed"], mended["failed"], mended["skipped"]) == (12, 0, 1)
    assert mended["again"] == {"tests": ["x", "y"], "provenance": {"commit": "b"}}
    for change in ({"passed": 1}, {"failed": 1}, {"packages": {"torch": "3"}}):
        with pytest.raises(AssertionError):
            amended(first, again | change, ["x", "y"])


def test_the_table_of_the_readme_is_that_of_the_runs(record: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [f"| pinned | {' | '.join(pins()[name] for name in SHOWN)} | at every change |"]
    for end in ("oldest", "newest"):
        run = record[end]
        versions = " | ".join(public(run["packages"][name]) for name in SHOWN)
        result = f"{run['passed']:,} passed, {run['skipped']} skipped, {run['provenance']['time'][:10]}"
        rows.append(f"| {end} | {versions} | {result} |")
    assert readme.split(f"{HEADER}\n|---|---|---|---|---|---|---|---|\n", 1)[1].split("\n\n", 1)[0] == "\n".join(rows)
