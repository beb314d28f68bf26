"""Turn a run or comparison directory into one JSON file to commit: provenance, configuration, results and curves.

    python benchmarks/collect.py runs/quickstart benchmarks/results/quickstart.json

Rollouts, checkpoints and per-problem results stay behind: the file is for figures and for the numbers in the docs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

FILES = ("metrics.jsonl", "held_out.jsonl", "evals.jsonl")


def collect(directory: Path) -> dict[str, Any]:
    """Everything to keep of `directory`; FileNotFoundError if it holds no run. A run cut short has no results."""
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
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(collect(arguments.directory), indent=1, sort_keys=True)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
