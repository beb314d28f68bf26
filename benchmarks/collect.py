"""Turn a run, comparison or study directory into one JSON file to commit: provenance, configuration, results, curves.

    python benchmarks/collect.py runs/quickstart benchmarks/results/quickstart.json
    python benchmarks/collect.py runs/zoo-study benchmarks/results/study.json

Rollouts and checkpoints stay behind: the file is for figures and for the numbers in the docs. Of a study it keeps
study.json, how long the runs took, and which test problems each solved, so that its intervals can be computed again.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from trb.safety.files import write_text

FILES = ("metrics.jsonl", "held_out.jsonl", "evals.jsonl")


def collect(directory: Path) -> dict[str, Any]:
    """Everything to keep of `directory`; FileNotFoundError if it holds no run. A run cut short has no results."""
    if (directory / "study.json").exists():
        return collect_study(directory)
    finished = (directory / "results.json").exists()
    results = read_json(directory / "results.json") if finished else {}
    provenance = results.pop("provenance", None) or read_json(directory / "provenance.json")
    record: dict[str, Any] = {"finished": finished, "results": results, "provenance": provenance}
    runs = [path.parent for path in sorted(directory.glob("*/metrics.jsonl"))]
    if runs:
        record["runs"] = {run.name: read_run(run) for run in runs}
    else:
        record |= read_run(directory)
    return record


def collect_study(directory: Path) -> dict[str, Any]:
    study = read_json(directory / "study.json")
    seconds = [json.loads(path.read_text(encoding="utf-8")) for path in directory.rglob("seconds.json")]
    study["timing"] = {"runs": len(seconds), "hours_of_one_worker": round(sum(seconds) / 3600, 2)}
    commits = {read_json(path).get("commit") for path in directory.rglob("seed-*/provenance.json")}
    study["provenance"]["commits_of_the_runs"] = sorted(filter(None, commits))
    study["models"] = weights(yaml.safe_load((directory / "study.yaml").read_text(encoding="utf-8")))
    study["outcomes"] = {
        "format": "per suite, one hexadecimal number whose bits are the test problems in order, 1 for solved; where "
        "nothing is solved, the share of every conversation in the mean over tokens",
        **{name: outcomes(directory / name / "test") for name in study["settings"]},
    }
    return study


def weights(study: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the weights of every local model: whether somebody who trains them again has the same."""
    found = {}
    for setting in study["settings"].values():
        for role in ("student", "teacher"):
            for path in sorted(Path(setting["recipe"][role]).glob("*.safetensors")):
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def outcomes(runs: Path) -> dict[str, Any]:
    """Method -> seed -> suite -> solved problems, only for one completion a problem; or the shares in the score."""
    found: dict[str, Any] = {}
    for path in sorted(runs.glob("*/seed-*/test.json")):
        suites = read_json(path)["suites"]
        packed = {name: packed_outcomes(suite) for name, suite in suites.items()}
        found.setdefault(path.parent.parent.name, {})[path.parent.name] = packed
    return found


def packed_outcomes(suite: dict[str, Any]) -> Any:
    if "values" in suite:
        return [rounded(value) for value in suite["values"]]
    return f"{int(''.join(map(str, suite['correct'])), 2):x}"


def unpacked_outcomes(packed: str, problems: int) -> list[int]:
    """Which problems were solved, in order, of the number that `packed_outcomes` makes of them."""
    return [int(bit) for bit in f"{int(packed, 16):0{problems}b}"]


def read_run(directory: Path) -> dict[str, Any]:
    run: dict[str, Any] = {"config": yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))}
    for name in FILES:
        path = directory / name
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            run[path.stem] = [{key: rounded(value) for key, value in row.items()} for row in rows]
    return run


def rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: is {path.parent} a run directory?")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="a finished run or comparison")
    parser.add_argument("output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    record = collect(arguments.directory)
    text = json.dumps(record, indent=1, sort_keys="settings" not in record)  # a study's methods have an order
    write_text(arguments.output, text + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
