"""Training with a teacher on the student's own weights: step for step what two models with nothing in common do."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_runs import Completions, Snapshots, build, config, logged, losses, weights
from torch import Tensor
from transformers import PreTrainedModel

from trb import TRBTrainer, zoo
from trb.models.modeling import without_adapters
from trb.models.sharing import own_weights, shared_teacher
from trb.training.arguments import check_arguments
from trb.training.pair import loaded_teacher

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TEACHERS = ["base", "adapter"]
RUN: dict[str, Any] = {
    "max_steps": 3,
    "blend_warmup_steps": 2,  # the last step reads the teacher in the update
    "max_completion_length": 8,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "initial_kl_budget": 0.3,
    "weight_decay": 0.1,
}


def adapted(seed: int, *, moved: float = 0.1) -> PeftModel:
    """The embedded student with an adapter of that seed, which changes what it says."""
    torch.manual_seed(seed)
    model = get_peft_model(zoo.load("student")[0], LoraConfig(**LORA))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=moved)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    adapted(2).save_pretrained(directory, save_embedding_layers=False)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "zoo:student"}))
    return directory


def spec(teacher: str, folder: Path) -> str:
    return "base" if teacher == "base" else f"adapter:{folder}"


def apart(teacher: str, folder: Path) -> PreTrainedModel | str:
    """The same teacher in tensors of its own. (Making an adapter draws random numbers, and rows are shuffled after.)"""
    return zoo.load("student")[0] if teacher == "base" else str(folder)


def trained(directory: Path, teacher: Any, **changes: Any) -> tuple[TRBTrainer, Snapshots, Completions]:
    snapshots, completions = Snapshots(), Completions()
    trainer = build(directory, student=adapted(1), teacher=teacher, callbacks=[snapshots], **{**RUN, **changes})
    completions.watch(trainer)
    trainer.train()
    return trainer, snapshots, completions


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_run_is_bit_for_bit_that_of_two_separate_models(teacher: str, folder: Path, tmp_path: Path) -> None:
    """Rollouts, losses, gradients (in the optimizer's moments) and weights, blended and plain, with checkpointing."""
    ours, steps, drawn = trained(tmp_path / "shared", spec(teacher, folder))
    theirs, expected, others = trained(tmp_path / "apart", apart(teacher, folder))
    assert drawn.per_step == others.per_step and len(drawn.per_step) == 3
    assert losses(ours) == losses(theirs) and min(losses(ours)) > 0
    for name in ("teacher_weight", "kl_teacher", "reverse_kl", "teacher_entropy"):
        assert logged(ours, name) == logged(theirs, name), name
    for one, other in zip(steps.moments, expected.moments, strict=True):
        assert equal(one, other)
    for one, other in zip(steps.weights, expected.weights, strict=True):
        assert one.keys() == other.keys() and equal([*one.values()], [*other.values()])
    assert not equal([*steps.weights[0].values()], [*steps.weights[-1].values()])


@pytest.mark.parametrize("teacher", TEACHERS)
def test_nothing_but_the_students_adapter_is_trained_or_saved(teacher: str, folder: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, student=adapted(1), teacher=spec(teacher, folder), **RUN)
    taught = trainer.accelerator.unwrap_model(trainer.teacher_model)
    before, kept = weights(trainer), copy.deepcopy(taught.state_dict())
    trainer.train()
    assert all(torch.equal(kept[name], value) for name, value in taught.state_dict().items())
    changed = {name for name, value in weights(trainer).items() if not torch.equal(before[name], value)}
    adapter = {name for name in before if "lora_" in name}
    assert changed <= adapter and len(changed) == len(adapter)
    plain = zoo.load("student")[0].state_dict()
    base = shared_teacher(trainer.model).state_dict()
    assert plain.keys() == base.keys() and all(torch.equal(base[name], value) for name, value in plain.items())
    held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for name, weight in trainer.model.named_parameters() if "lora_" in name}
    assert bool(list(own_weights(taught, trainer.model))) == (teacher == "adapter")
    trainer.save_model(str(tmp_path / "model"))
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert len(saved) == len(adapter) and not (tmp_path / "model" / "model.safetensors").exists()
    assert "on the student's own weights" in trainer.model_card()


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(teacher: str, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole, _, _ = trained(tmp_path / "whole", spec(teacher, folder), **options)
    resumed = build(tmp_path / "rest", student=adapted(1), teacher=spec(teacher, folder), **RUN, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    one, other = weights(whole), weights(resumed)
    assert one.keys() == other.keys() and equal([*one.values()], [*other.values()])
    assert losses(resumed) == losses(whole)
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-1").glob("*.safetensors")}
    assert files == {"adapter_model.safetensors"}


def test_dropout_of_the_adapter_is_the_students_alone(tmp_path: Path) -> None:
    """The student is in training mode when the update reads the teacher."""
    lora = LoraConfig(**{**LORA, "lora_dropout": 0.5})
    trainer = build(tmp_path, peft_config=lora, teacher="base", disable_dropout=False, **RUN)
    taught, ids = trainer.accelerator.unwrap_model(trainer.teacher_model), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
        own = [trainer.model(input_ids=ids).logits for _ in range(2)]
        assert not torch.equal(*own)
        assert torch.equal(taught(input_ids=ids).logits, zoo.load("student")[0](input_ids=ids).logits)


def test_half_precision_reads_the_same_teacher(tmp_path: Path) -> None:
    """Accelerate wraps the student's passes in autocast, and then the teacher's."""
    ours, _, drawn = trained(tmp_path / "shared", "base", bf16=True)
    theirs, _, others = trained(tmp_path / "apart", apart("base", tmp_path), bf16=True)
    assert drawn.per_step == others.per_step and losses(ours) == losses(theirs)
    # A student that has been trained is wrapped: what is read beside it is its base all the same.
    again, ids = shared_teacher(without_adapters(ours.model)), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, zoo.load("student")[0](input_ids=ids).logits)


# ---- refused ----

MOVED = "the teacher stands on the student's weights, and training would move "


def test_a_student_without_an_adapter_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for student in ("zoo:student", zoo.load("student")[0]):
        for name in ("base", "adapter:nowhere"):
            with pytest.raises(ValueError, match=f"{MOVED}all of them: train an adapter .lora_rank"):
                TRBTrainer(student, name, config(tmp_path))
    student = zoo.load("student")[0]
    for teacher in (student, shared_teacher(student)):
        with pytest.raises(ValueError, match=f"{MOVED}all of them"):
            TRBTrainer(student, teacher, config(tmp_path))


def test_a_base_of_which_something_is_trained_is_refused(tmp_path: Path) -> None:
    student = adapted(1)
    norm = without_adapters(student).model.norm.weight
    norm.requires_grad_(True)
    with pytest.raises(ValueError, match=rf"{MOVED}1 of them, such as model\.norm\.weight"):
        build(tmp_path, student=student, teacher="base")
    assert norm.requires_grad


def test_an_adapter_that_takes_a_part_of_its_base_is_refused_when_the_trainer_puts_it_on(tmp_path: Path) -> None:
    lora = LoraConfig(**LORA, init_lora_weights="olora")
    students = [zoo.load("student")[0] for _ in range(2)]
    for student, teacher in zip(students, ("base", shared_teacher(students[1])), strict=True):
        with pytest.raises(ValueError, match="the student's adapter cannot share its base with a teacher: init_lora"):
            build(tmp_path, student=student, teacher=teacher, peft_config=lora)


def test_options_of_a_teacher_that_is_not_loaded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_model_revision='main' does nothing for a teacher_model that is"):
        TRBTrainer(adapted(1), "base", config(tmp_path, teacher_model_revision="main"))


@pytest.mark.parametrize("name", ["deepspeed_plugin", "fsdp_plugin"])
def test_sharding_is_refused(name: str, tmp_path: Path) -> None:
    state = SimpleNamespace(**{"deepspeed_plugin": None, "fsdp_plugin": None, name: object()})
    with pytest.raises(ValueError, match=r"which FSDP and DeepSpeed divide or move: launch with accelerate/ddp, or"):
        loaded_teacher("base", config(tmp_path), adapted(1).requires_grad_(False), SimpleNamespace(state=state))  # type: ignore[arg-type]


def test_vllm_is_refused(tmp_path: Path) -> None:
    args = config(tmp_path)
    args.use_vllm = True  # where it is installed
    nothing = dict.fromkeys(("train_dataset", "eval_dataset", "processing_class", "teacher_processing_class"))
    student = adapted(1)
    for teacher in ("base", shared_teacher(student)):
        with pytest.raises(ValueError, match=r"at every step, which rounds them: set use_vllm=False, or give"):
            check_arguments(args, model=student, teacher_model=teacher, reward_fn=None, others={}, **nothing)
