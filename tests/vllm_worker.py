"""Run by torchrun from test_vllm_trainer.py: training with blended rollouts inside vLLM, in several processes.

    torchrun --nproc-per-node 2 tests/vllm_worker.py STUDENT DIRECTORY SCENARIO...

Every scenario trains once with the engine and once without. Writes what each process found as SCENARIO-RANK.json.
"""

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import vllm_helpers  # noqa: F401  (its settings come before vLLM is imported)

# isort: split
import torch
from distributed_worker import FSDP2, launched_on_cpu, whole_weights
from test_trainer import losses
from transformers import AutoModelForCausalLM

from trb import TRBTrainer
from trb.sampling.vllm import BlendEngine

STEPS = 3
VLLM = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.2, "vllm_max_model_length": 64}
SCENARIOS: dict[str, Any] = {
    "ddp": (nullcontext, {"ddp_find_unused_parameters": False}),
    "fsdp2": (partial(launched_on_cpu, FSDP2), {}),
}


def train(directory: Path, student_path: str, **changes: Any) -> tuple[TRBTrainer, list[list[list[int]]]]:
    """A run whose every step is blended, and what this process drew in it."""
    from test_trainer import build

    student = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32, local_files_only=True)
    trainer = build(
        directory,
        student=student,
        max_steps=STEPS,
        blend_warmup_steps=STEPS,
        initial_kl_budget=0.3,
        seed=3,
        learning_rate=3e-3,
        **changes,
    )
    drawn: list[list[list[int]]] = []
    generate = trainer._generate_single_turn

    def watched(*args: Any, **kwargs: Any) -> list[list[int]]:
        drawn.append(generate(*args, **kwargs))
        return drawn[-1]

    trainer._generate_single_turn = watched  # type: ignore[method-assign]
    trainer.train()
    return trainer, drawn


def compare(directory: Path, student_path: str, **changes: Any) -> dict[str, Any]:
    beside, expected = train(directory / "beside", student_path, **changes)
    reference = whole_weights(beside)
    inside, drawn = train(directory / "inside", student_path, **VLLM, **changes)
    updates = 0
    weights = whole_weights(inside)
    return {
        "wrapper": type(inside.model_wrapped).__name__,
        "processes": inside.accelerator.num_processes,
        "same_completions": drawn == expected,
        "steps": len(drawn),
        "losses": losses(inside),
        "expected_losses": losses(beside),
        "drawn": drawn,
        "difference": max((float((weights[n] - reference[n]).abs().max()) for n in reference), default=0.0),
    }


def main() -> None:
    student, directory, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    rank = int(os.environ["RANK"])
    for name in names:
        context, changes = SCENARIOS[name]
        with context():
            found = compare(directory / name, student, **changes)
        (directory / f"{name}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
