"""The embedded pair: a tiny student and teacher that ship inside the package, and tasks for pairs like it.

They make every command runnable in seconds, offline and on one core, and they reproduce the awkward parts
of real pairs: the two models stop with different ids, their output heads are padded to different sizes, and
the student pads with its own end-of-sequence token. Sampling and training live elsewhere, except for the
script that made the pair: `python -m trb.zoo.train`.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trb.errors import InputError, did_you_mean
from trb.zoo.chains import Chains
from trb.zoo.clock import Clock
from trb.zoo.dialogue import Dialogue
from trb.zoo.programs import Programs
from trb.zoo.staged import Staged
from trb.zoo.sums import Sums
from trb.zoo.tasks import Task

__all__ = ["MODELS", "NAMES", "TASKS", "load", "path", "problems"]

NAMES = ("student", "teacher")
MODELS = (*NAMES, "told", "caller-student", "caller-teacher")
"""What ships: the pair, a student that makes use of a worked solution in its prompt, to teach itself, and a pair that
calls a calculator."""
TASKS: dict[str, Task] = {task.name: task for task in (Chains(), Clock(), Staged(), Programs(), Sums(), Dialogue())}

_WEIGHTS = Path(__file__).parent / "weights"


def path(name: str) -> Path:
    """Directory of a shipped model and its tokenizer. Raises ValueError for a name that is not in MODELS."""
    if name not in MODELS:
        raise InputError(
            f"unknown zoo model {name!r}; choose one of {', '.join(MODELS)}{did_you_mean(str(name), MODELS)}"
        )
    return _WEIGHTS / name


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A shipped model in float32 and eval mode, with its own tokenizer; never touches the network.

    Raises ValueError for a name that is not in MODELS.
    """
    directory = path(name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def problems(n: int, *, seed: int, split: str = "train", operands: int = 4) -> list[dict]:
    """`n` different chains of `operands` digits: the task of the shipped pair, trained on chains of 2 to 8 operands.

    See `trb.zoo.tasks.Task.problems`.
    """
    return TASKS["chains"].problems(n, seed=seed, split=split, size=operands)
