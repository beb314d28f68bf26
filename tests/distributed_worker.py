"""Small training runs that `test_distributed.py` makes in one process and, through this file's `main`, in several.

    python tests/distributed_worker.py RANK COUNT DIRECTORY SCENARIO...

The processes meet through a file, so that no port can be taken by somebody else. Accelerate leaves FSDP
and DeepSpeed to accelerators (GPUs); to run them here, `launched_on_cpu` tells its state otherwise. Everything after
that, from the wrapping of the layers to the collectives, is what runs on GPUs, with gloo in place of NCCL.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, DistributedType
from datasets import Dataset
from tiny_runs import losses
from torch import Tensor
from torch.distributed.tensor import DTensor
from toy_method import ENTRIES

from trb import TRBConfig, TRBTrainer, zoo
from trb.policies import StudentPolicy
from trb.sampling import sample
from trb.tasks.evaluation import evaluate
from trb.training.ranks import Ranks
from trb.training.sharding import loaded_whole

GLOBAL_BATCH = 8
SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 3e-4,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "max_completion_length": 12,
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


ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}


@contextmanager
def launched_on_cpu(variables: dict[str, str]) -> Iterator[None]:
    """Within the block a launch on CPUs is set up as `accelerate launch`, with these variables, sets one up on GPUs."""
    plain = AcceleratorState.__init__

    def sharded(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if kwargs.get("deepspeed_plugin") is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
            self._mixed_precision = "no"
            self.deepspeed_plugins = kwargs["deepspeed_plugin"]
            self.deepspeed_plugins.set_mixed_precision("no")
            self.deepspeed_plugins.select(_from_accelerator_state=True)

    os.environ.update(variables)
    AcceleratorState.__init__ = sharded
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain
        for name in variables:
            del os.environ[name]


def told(row: dict[str, Any]) -> dict[str, Any]:
    """With a prompt for the teacher, of another length in each row: the answer, and now and then the problem."""
    problem, answer = row["prompt"][0]["content"], row["answer"]
    content = f"{problem} is {answer}" if len(answer) > 1 else answer
    return {**row, "teacher_prompt": [{"role": "user", "content": content}]}


def build(directory: Path, count: int, *, privileged: bool = False, **changes: Any) -> TRBTrainer:
    """A trainer whose global batch is the same for any number of processes, in float64; its teacher may be told."""
    with_prompts = told if privileged else dict
    held_out = zoo.problems(5, seed=1, split="test")
    held_out[3] = held_out[4] = held_out[0]  # a prompt's repetitions are counted over batches and processes
    rows = GLOBAL_BATCH // count // SETTINGS["gradient_accumulation_steps"]
    args = TRBConfig(str(directory), **{**SETTINGS, "per_device_train_batch_size": rows, **changes})
    with loaded_whole(args):
        student, tokenizer = zoo.load("student")
        teacher, teacher_tokenizer = zoo.load("teacher")
    return TRBTrainer(
        student.double(),
        teacher.double(),
        args,
        train_dataset=Dataset.from_list([*map(with_prompts, zoo.problems(64, seed=0, split="train"))]),
        eval_dataset=Dataset.from_list([*map(with_prompts, held_out)]),
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
        reward_fn=ExactAnswers().score,
    )


def train(directory: Path, count: int, **changes: Any) -> dict[str, Any]:
    """A training run from start to end: what was drawn, logged and learnt, and measurements of the trained student."""
    trainer = build(directory, count, privileged=True, **changes)
    drawn: list[list[list[int]]] = []
    generate = trainer._generate_single_turn

    def watched(*args: Any, **kwargs: Any) -> list[list[int]]:
        drawn.append(generate(*args, **kwargs))
        return drawn[-1]

    trainer._generate_single_turn = watched  # type: ignore[method-assign]
    gathered = count_refreshes(trainer)
    trainer.train()
    found = {
        "drawn": drawn,
        "logs": [row for row in trainer.state.log_history if "loss" in row],
        "weights": {name: value.cpu() for name, value in whole_weights(trainer).items()},
        "wrapper": type(trainer.model_wrapped).__name__,
        "held_out": trainer.evaluate(),
        "evaluation": measure(trainer, directory / "problems.jsonl"),
        "alone": sample_alone(trainer),
    }
    return found | {"refreshes": gathered} | shards_of(trainer)


def whole_weights(trainer: TRBTrainer) -> dict[str, Tensor]:
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # DeepSpeed: on the first process only


def count_refreshes(trainer: TRBTrainer) -> list[int]:
    """Filled with the step of every time the student's weights are gathered."""
    steps: list[int] = []
    replica = trainer._student_replica
    if replica is not None:
        refresh = replica.refresh

        def counted(original: Any) -> None:
            if replica._stale:
                steps.append(trainer.state.global_step)
            refresh(original)

        replica.refresh = counted  # type: ignore[method-assign]
    return steps


class ExactAnswers:
    """A grader without a worker process."""

    def score(self, texts: list[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(str(row["answer"]) in text) for text, row in zip(texts, rows, strict=True)]


def measure(trainer: TRBTrainer, path: Path, **changes: Any) -> dict[str, Any]:
    """pass@1 over seven problems, four completions at a time: with two processes, a full round and a ragged one."""
    options: dict[str, Any] = {"n": 2, "max_new_tokens": 24, "max_rows": 4, "verifier": ExactAnswers(), **changes}
    problems = zoo.problems(7, seed=2, split="test")
    ranks = Ranks.of_launch()
    student, tokenizer = trainer.sampling_student(), trainer.processing_class
    result = evaluate(student, tokenizer, problems, results_path=path, ranks=ranks, progress=False, **options)
    return {**result.to_dict(), "correct": result.correct}


def sample_alone(trainer: TRBTrainer) -> list[list[int]]:
    """What the last process samples while the others have no row to sample: a pass that needed them would hang."""
    ranks, student = Ranks.of_launch(), trainer.sampling_student()
    completions: list[list[int]] = []
    if ranks.index == ranks.count - 1:
        stop = trainer.vocabulary.stop_ids
        prompts = [[5, 6, 7], [8, 9]]
        completions = sample(
            student, None, prompts, StudentPolicy(), max_new_tokens=16, eos_token_id=stop, seed=3
        ).completions
    trainer.accelerator.wait_for_everyone()
    return completions


def shards_of(trainer: TRBTrainer) -> dict[str, Any]:
    """How much of the student and the teacher this process holds at the end, in weights."""
    held = {}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        sizes = [_sizes(value) for value in model.parameters()]
        held[f"{name}_held"], held[f"{name}_weights"] = (sum(column) for column in zip(*sizes, strict=True))
    return held


def _sizes(parameter: Any) -> tuple[int, int]:
    """Elements of a parameter here, and in all."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel(), parameter.ds_numel
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel(), parameter.numel()


def resume_evaluation(directory: Path, count: int) -> dict[str, Any]:
    """An evaluation that was killed after three of seven problems, gone on with; then one that must be refused."""
    trainer = build(directory, count)
    path = directory / "problems.jsonl"
    straight = measure(trainer, path)
    trainer.accelerator.wait_for_everyone()
    if Ranks.of_launch().is_first:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    resumed = measure(trainer, path)
    refusal = ""
    try:
        measure(trainer, path, n=3)
    except ValueError as error:
        refusal = str(error)
    return {"straight": straight, "resumed": resumed, "refusal": refusal}


def remember(directory: Path, count: int) -> dict[str, Any]:
    """A schedule with a memory: the value of each step, as this process has it."""
    for table, name, entry in ENTRIES:
        table[name] = entry
    try:
        trainer = build(directory, count, method="imitation")
        trainer.train()
    finally:
        for table, name, _ in ENTRIES:
            del table[name]
    shares = [row["trb/teacher_weight"] for row in trainer.state.log_history if "loss" in row]
    return {"shares": shares, "state": trainer.behavior.schedule.state_dict()["now"]}


SELF_SETTING: dict[str, dict[str, Any]] = {
    # Of each prompt's eight rollouts the first process has the four blended ones, the second the student's.
    "gap": {
        **{"budget_schedule": "gap", "initial_kl_budget": None},
        **{"behavior_share": 0.5, "num_generations": 8},
    },
    "geometric": {"method": "geometric", "sequence_kl_budget": 0.5},
    "sequence": {"budget_schedule": "sequence", "sequence_kl_budget": 0.5, "initial_kl_budget": None},
    # The default, with a length that is read from the data: a prompt a step, 11 of the 64, and a fifth of it, which is
    # 3 steps, is blended.
    "sequence-linear": {
        **{"sequence_kl_budget": 0.5, "initial_kl_budget": None, "blend_warmup_steps": None},
        **{"max_steps": -1, "num_train_epochs": 11 / 64, "gradient_accumulation_steps": 1},
    },
}


def set_itself(directory: Path, count: int, **settings: Any) -> dict[str, Any]:
    """A warm-up that sets itself: what is logged of each step, and what is remembered at the end."""
    trainer = build(directory, count, **settings)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    names = {name for row in logs for name in row if name.startswith("trb/") and not name.endswith("_calls")}
    return {
        "logs": [{name: row[name] for name in sorted(names) if name in row} for row in logs],
        "state": trainer.behavior.schedule.state_dict(),
    }


def have_two_teachers(directory: Path, count: int, **settings: Any) -> dict[str, Any]:
    """Two teachers, of which a process may have the rows of one alone: what was drawn, logged and learnt."""
    rows = GLOBAL_BATCH // count // SETTINGS["gradient_accumulation_steps"]
    changes = {"per_device_train_batch_size": rows, "teacher_column": "subject", **settings}
    args = TRBConfig(str(directory), **{**SETTINGS, **changes})
    student, tokenizer = zoo.load("student")
    teachers = {name: zoo.load(name)[0].double() for name in ("teacher", "told")}
    trainer = TRBTrainer(
        student.double(),
        teachers,
        args,
        train_dataset=Dataset.from_list([*map(_routed, zoo.problems(64, seed=0, split="train"))]),
        eval_dataset=Dataset.from_list([*map(_routed, zoo.problems(5, seed=1, split="test"))]),
        processing_class=tokenizer,
    )
    drawn: list[list[list[int]]] = []
    generate = trainer._generate_single_turn

    def watched(*args: Any, **kwargs: Any) -> list[list[int]]:
        whose.append({*trainer._taught_by})
        drawn.append(generate(*args, **kwargs))
        return drawn[-1]

    whose: list[set[int]] = []
    trainer._generate_single_turn = watched  # type: ignore[method-assign]
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    weights = {name: value.cpu() for name, value in whole_weights(trainer).items()}
    return {"drawn": drawn, "whose": whose, "logs": logs, "weights": weights, "held_out": trainer.evaluate()}


def _routed(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "subject": "told" if "+" in row["prompt"][0]["content"][:3] else "teacher"}


def call_tools(directory: Path, count: int) -> dict[str, Any]:
    """Completions with tools, of which some take more turns than others; then the losses of two steps."""
    import test_tools  # of tests/training, which only pytest has on its path before `main`

    drawing, training = (
        test_tools.caller(directory / name, per_device_train_batch_size=GLOBAL_BATCH // count, max_steps=2)
        for name in ("drawn", "trained")
    )
    own = 4 // count
    drawing.train_dataset = drawing.train_dataset.select(range(own * Ranks.of_launch().index, 4))
    training.train()
    drawn = [completion for _, completion, _ in test_tools.whole_rows(test_tools.batch(drawing, prompts=own))]
    return {"drawn": drawn, "losses": losses(training)}


SCENARIOS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ddp": (nullcontext, train, {"ddp_find_unused_parameters": False}),
    # Recomputed activations gather each layer's weights once more, in the backward pass.
    "fsdp2": (partial(launched_on_cpu, FSDP2), train, {"teacher_sharded": True, "gradient_checkpointing": True}),
    "teachers": (partial(launched_on_cpu, FSDP2), have_two_teachers, {}),
    "evaluation": (nullcontext, resume_evaluation, {}),
    "schedule": (nullcontext, remember, {}),
    "tools": (nullcontext, call_tools, {}),
    **{name: (nullcontext, set_itself, settings) for name, settings in SELF_SETTING.items()},
    # Last: transformers remembers DeepSpeed for the rest of the process.
    "zero3": (partial(launched_on_cpu, ZERO3), train, {"teacher_sharded": True}),
}


def main() -> None:
    rank, count, directory, names = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    sys.path.insert(0, str(Path(__file__).parent / "training"))
    os.environ["DS_ACCELERATOR"] = "cpu"
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
