"""A recipe and a study that take seconds, and a pool that runs a study's jobs in this process."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trb.studies import jobs, workers
from trb.studies.study import Setting, Study

SMALL: dict[str, Any] = {
    "student": "zoo:student",
    "teacher": "zoo:teacher",
    "train_data": "zoo:chains",
    "train_limit": 40,
    "max_prompt_length": 32,
    "max_steps": 6,
    "prompts_per_step": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "initial_kl_budget": 0.3,
    "blend_warmup_steps": 4,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "eval_data": "zoo:chains",
    "eval_limit": 4,
    "eval_every": 2,
}

SMALL_FILE = """\
student: zoo:student
teacher: zoo:teacher
train_data: zoo:chains
train_limit: 40
max_prompt_length: 32
max_steps: 2
prompts_per_step: 2
num_generations: 2
per_device_train_batch_size: 4
max_completion_length: 8
gradient_checkpointing: false
save_strategy: no
logging_steps: 1
eval_data: zoo:chains
eval_limit: 4
"""

STUDY = {
    "name": "sweep-test",
    "seeds": {"select": [100], "test": 1},
    "configurations": 2,
    "resamples": 100,
    "recipe": {
        "max_steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_prompt_length": 64,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "train_limit": 16,
    },
    "settings": {
        "chains": {
            "recipe": {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains"},
            "dev": {"data": "zoo:chains", "limit": 4, "seed": 1},
            "test": {"data": ["zoo:chains?operands=3", "zoo:chains?operands=5"], "limit": 3, "seed": 2},
        }
    },
    "methods": {"opd": [{}], "trb": {"initial_kl_budget": [0.1, 0.5], "blend_warmup_steps": 2}},
}


def study_of(setting: Setting) -> Study:
    """A study of one setting, "s"."""
    seeds = {"select": [9], "test": 1}
    return Study(name="x", seeds=seeds, configurations=1, settings={"s": setting}, methods={"opd": [{}]})


@contextmanager
def pool_of_this_process(directory: Path, *rest: Any) -> Iterator[Any]:
    """Takes the place of `trb.studies.sweep.open_pool`: processes take longer to start than such runs."""
    *_, keep_models = rest
    jobs._study_in.cache_clear()
    yield SimpleNamespace(map=partial(_one_by_one, str(directory), keep_models))


def _one_by_one(directory: str, keep_models: bool, missing: list[Any]) -> Iterator[tuple[Any, float]]:
    for job in missing:
        try:
            seconds = jobs.do_job(directory, keep_models, job)
        except Exception as error:
            arrived = pickle.loads(pickle.dumps(error))  # as it would come from another process
            workers._explain(job, arrived)
            raise arrived from error
        yield job, seconds


def watched(made: Any, seen: set[str]) -> Any:
    """The same object, which notes what is read of it."""
    kind = type(made)

    def read(self: Any, name: str) -> Any:
        seen.add(name)
        return kind.__getattribute__(self, name)

    made.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read})
    return made
