"""Small training runs that `test_distributed.py` makes in one process and, through this file's `main`, in several.

    python tests/distributed_worker.py RANK COUNT DIRECTORY SCENARIO...

The processes meet through a file, so that no port can be taken by somebody else. Accelerate leaves FSDP to
accelerators (GPUs); to run it here, `fsdp2_on_cpu` tells its state otherwise. Everything after that, from the wrapping
of the layers to the collectives, is what runs on GPUs, with gloo in place of NCCL.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, DistributedType
from datasets import Dataset

from trb import TRBConfig, TRBTrainer, zoo

GLOBAL_BATCH = 8
SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-4,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "max_completion_length": 24,
    "initial_kl_budget": 0.5,
    "blend_warmup_steps": 2,  # the last step's rollouts are the student's own
    "logging_steps": 1,
    "recorded_scores_every": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@contextmanager
def fsdp2_on_cpu() -> Iterator[None]:
    """Within the block a launch on CPUs is set up as `accelerate launch` sets up FSDP2 on GPUs."""
    plain = AcceleratorState.__init__

    def as_fsdp(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]

    os.environ.update(FSDP2)
    AcceleratorState.__init__ = as_fsdp
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain
        for name in FSDP2:
            del os.environ[name]


def build(directory: Path, count: int, **changes: Any) -> TRBTrainer:
    """A trainer whose global batch is the same for any number of processes, in float64."""
    rows = GLOBAL_BATCH // count // SETTINGS["gradient_accumulation_steps"]
    student, tokenizer = zoo.load("student")
    teacher, teacher_tokenizer = zoo.load("teacher")
    settings = {**SETTINGS, "per_device_train_batch_size": rows, **changes}
    return TRBTrainer(
        student.double(),
        teacher.double(),
        TRBConfig(str(directory), **settings),
        train_dataset=Dataset.from_list(zoo.problems(64, seed=0, split="train")),
        eval_dataset=Dataset.from_list(zoo.problems(5, seed=1, split="test")),
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )


def train(directory: Path, count: int, **changes: Any) -> dict[str, Any]:
    trainer = build(directory, count, **changes)
    drawn: list[list[list[int]]] = []
    generate = trainer._generate_single_turn

    def watched(*args: Any, **kwargs: Any) -> list[list[int]]:
        drawn.append(generate(*args, **kwargs))
        return drawn[-1]

    trainer._generate_single_turn = watched  # type: ignore[method-assign]
    trainer.train()
    return {
        "completions": drawn,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "logs": trainer.state.log_history,
        "weights": {k: v.cpu() for k, v in trainer.accelerator.get_state_dict(trainer.model_wrapped).items()},
        "wrapper": type(trainer.model_wrapped).__name__,
    }


SCENARIOS = {"ddp": (nullcontext, train, {}), "fsdp2": (fsdp2_on_cpu, train, {})}


def main() -> None:
    rank, count, directory, names = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory / 'meeting-point'}", rank=int(rank), world_size=int(count)
    )
    for name in names:
        context, scenario, changes = SCENARIOS[name]
        with context():
            torch.save(scenario(directory / name, int(count), **changes), directory / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
