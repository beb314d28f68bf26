"""Trainers on the embedded pair, a few steps long, and what they leave to compare."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from trb import TRBConfig, TRBTrainer, zoo

# Options that the oldest transformers allowed (below 5.23) does not have.
NEWER_OPTIONS = {"activation_checkpointing", "activation_checkpointing_kwargs"}
PASSED_ON = ("reward_fn", "peft_config", "callbacks", "eval_dataset")


def config(directory: Path, **changes: Any) -> TRBConfig:
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "max_completion_length": 24,
        "initial_kl_budget": 0.5,
        "blend_warmup_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return TRBConfig(**{**settings, **changes})


def build(directory: Path, *, student: Any = None, teacher: Any = None, **changes: Any) -> TRBTrainer:
    passed_on = {name: changes.pop(name) for name in PASSED_ON if name in changes}
    rows = changes.pop("train_rows", None) or zoo.problems(64, seed=0, split="train")
    dataset = changes.pop("train_dataset", None) or Dataset.from_list(rows)
    own_student, tokenizer = zoo.load("student")
    own_teacher, teacher_tokenizer = zoo.load("teacher")
    trainer = TRBTrainer(
        own_student if student is None else student,
        own_teacher if teacher is None else teacher,
        config(directory, **changes),
        train_dataset=dataset,
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
        **passed_on,
    )
    trainer.model.train()  # as `train` does; some tests below call single steps of it
    return trainer


def dropping_student(rate: float = 0.5) -> Any:
    """The embedded student, with dropout on its attention as its family draws it."""
    student, _ = zoo.load("student")
    student.config.attention_dropout = rate
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = rate
    return student


def losses(trainer: TRBTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def logged(trainer: TRBTrainer, name: str) -> list[float]:
    return [row[f"trb/{name}"] for row in trainer.state.log_history if "loss" in row]


def weights(trainer: TRBTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


class Completions(TrainerCallback):
    """Collects what the trainer sampled, in sampling order."""

    def __init__(self) -> None:
        self.per_step: list[list[list[int]]] = []

    def watch(self, trainer: TRBTrainer) -> None:
        generate = trainer._generate_single_turn

        def recorded(*args: Any, **kwargs: Any) -> list[list[int]]:
            completions = generate(*args, **kwargs)
            self.per_step.append([list(ids) for ids in completions])
            return completions

        trainer._generate_single_turn = recorded  # type: ignore[method-assign]


TINY = {
    "max_completion_length": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 1,
    "max_steps": 4,
    "weight_decay": 0.1,  # would show if the optimizer took a step with gradients of zero
    "lr_scheduler_type": "linear",
}


class Snapshots(TrainerCallback):
    """Weights, the optimizer's state and the learning rate after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.moments: list[list[torch.Tensor]] = []
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in kwargs["model"].named_parameters()})
        states = kwargs["optimizer"].state_dict()["state"].values()
        self.moments.append([value.clone() for entry in states for value in entry.values()])
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])


class Kill(TrainerCallback):
    """Stops a training after a step, or amid the one after it, as Ctrl-C would."""

    def __init__(self, step: int, *, amid_next: bool = False) -> None:
        self.step, self.amid_next = step, amid_next

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.amid_next:
            raise KeyboardInterrupt

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.amid_next:
            raise KeyboardInterrupt
