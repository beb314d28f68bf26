"""Run by torchrun from test_vllm_trainer.py: blended rollouts inside vLLM, trained with by several processes.

    torchrun --nproc-per-node 2 tests/vllm_worker.py STUDENT DIRECTORY SCENARIO...

A scenario trains twice from the same student, once in process and once with an engine in every process. Each process
writes what it found as DIRECTORY/SCENARIO-RANK.json.
"""

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from vllm_helpers import INSIDE, shut_down  # first: its settings come before vLLM is imported

# isort: split
import torch
from distributed_worker import FSDP2, launched_on_cpu
from tiny_runs import Completions, build, losses
from transformers import AutoModelForCausalLM

WARMUP = 3
SCENARIOS: dict[str, Any] = {
    "ddp": (nullcontext, {"ddp_find_unused_parameters": False, "max_steps": WARMUP + 1}, {}),
    "tensor-parallel": (nullcontext, {"ddp_find_unused_parameters": False}, {"vllm_tensor_parallel_size": 2}),
    "fsdp2": (partial(launched_on_cpu, FSDP2), {}, {}),
}


def train(directory: Path, student: str, **changes: Any) -> dict[str, Any]:
    """A run, blended but for steps beyond the warm-up: what this process drew, and the losses of all."""
    trainer = build(
        directory,
        student=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, local_files_only=True),
        **{
            "max_steps": WARMUP,
            "blend_warmup_steps": WARMUP,
            "initial_kl_budget": 0.3,
            "learning_rate": 1e-3,
            **changes,
        },
    )
    drawn = Completions()
    drawn.watch(trainer)
    trainer.train()
    if trainer.use_vllm:
        shut_down(trainer)
    found = {"wrapper": type(trainer.model_wrapped).__name__, "processes": trainer.accelerator.num_processes}
    return {**found, "drawn": drawn.per_step, "losses": losses(trainer)}


def main() -> None:
    student, directory, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    for name in names:
        context, changes, inside = SCENARIOS[name]
        with context():
            found = {
                "in_process": train(directory / f"{name}-in-process", student, **changes),
                "in_vllm": train(directory / f"{name}-in-vllm", student, **INSIDE, **inside, **changes),
            }
        (directory / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
