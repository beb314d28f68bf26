"""A resumed run compares itself with its checkpoint: every option is classified, and every change is named."""

import copy
import dataclasses
import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_runs import NEWER_OPTIONS, Kill, build, config, dropping_student, logged, losses, weights
from transformers import EarlyStoppingCallback, TrainerCallback, get_scheduler
from trl.trainer import distillation_trainer

from trb import TRBConfig, zoo
from trb.records import RUN
from trb.schedule import Ramp
from trb.training import checkpoints, methods, resume
from trb.training.methods import every_knob, knobs_of
from trb.training.ranks import Ranks
from trb.training.resume import ChangedRunError, spread
from trb.training.trainer import TRBTrainer

TINY: dict[str, Any] = {"max_completion_length": 4, "per_device_train_batch_size": 4, "num_generations": 2}
SAVED = TINY | {"save_strategy": "steps", "save_steps": 1}
ROWS = zoo.problems(64, seed=0, split="train")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run's first step."""
    directory = tmp_path_factory.mktemp("saved")
    build(directory, **SAVED, max_steps=1).train()
    return directory / "checkpoint-1"


def resumed(saved: Path, directory: Path, *, accept: bool = False, **changes: Any) -> TRBTrainer:
    trainer = build(directory, **{**TINY, "max_steps": 2, **changes})
    trainer.train(resume_from_checkpoint=str(saved), accept_changes=accept)
    return trainer


# ---- the table of options ----

# Options that are compared as they stand: this says that each was thought of.
_COMPARED = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor average_tokens_across_devices
    neftune_noise_alpha auto_find_batch_size bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_liger_kernel
    liger_kernel_config eval_strategy eval_steps eval_delay load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip seed data_seed accelerator_config
    parallelism_config dataloader_drop_last dataloader_in_order remove_unused_columns ddp_broadcast_buffers fsdp
    fsdp_config deepspeed model_init_kwargs trust_remote_code teacher_model_revision teacher_model_init_kwargs
    disable_dropout max_completion_length shuffle_dataset temperature top_p top_k min_p generation_kwargs
    chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl
    vllm_structured_outputs_regex vllm_max_model_length vllm_tensor_parallel_size vllm_blended beta method
    behavior loss num_generations initial_kl_budget blend_warmup_steps budget_schedule skd_teacher_top_k
    sequence_kl_budget behavior_share teacher_weight initial_horizon horizon_steps
    initial_prefix_share prefix_steps
    skd_teacher_temperature initial_temperature temperature_warmup_steps sft_warmup_steps veto_strength veto_steps
    eopd_entropy forward_top_k tip_share iw_gamma loss_top_k replica_dtype per_device_train_batch_size
    gradient_accumulation_steps teacher_system_prompt teacher_prompt_template max_tool_calling_iterations
    tool_max_characters tools teacher_column torch_compile torch_compile_backend
    torch_compile_mode"""
COMPARED = _COMPARED.split()


def test_every_option_is_classified_once() -> None:
    """A new option, of ours or of a library, must be thought of: does it change results?"""
    lists = [*resume.FREE, *resume.LENGTH, *COMPARED]
    assert len(lists) == len(set(lists))
    assert set(lists) == {item.name for item in dataclasses.fields(TRBConfig)} | NEWER_OPTIONS
    assert set(resume.LAYOUT) - {"world_size"} <= set(COMPARED)


def test_an_option_that_is_in_no_list_is_compared(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class MyConfig(TRBConfig):
        my_option: int = 1

    one, other = (described(MyConfig(str(tmp_path), bf16=False, report_to=[], my_option=value)) for value in (1, 2))
    assert [str(found) for found in resume.differences(one, other, length=True)] == ["my_option: 1 -> 2"]


def described(args: TRBConfig, **changes: Any) -> dict[str, Any]:
    student, tokenizer = zoo.load("student")
    whole: dict[str, Any] = {
        "world_size": 1,
        "train_dataset": Dataset.from_list(ROWS),
        "tokenizer": tokenizer,
        "vocabulary": resume.SharedVocabulary(4, 1, (2,)),
        "student": student,
        "teachers": {None: zoo.load("teacher")[0]},
    }
    return resume.describe(args, **{**whole, **changes})


def keys_of(one: dict[str, Any], other: dict[str, Any], *, length: bool = True) -> list[str]:
    return [difference.key for difference in resume.differences(one, other, length=length)]


def test_free_options_change_nothing_that_is_kept_and_each_other_one_is_found(tmp_path: Path) -> None:
    args = config(tmp_path)
    before = described(args)
    assert keys_of(before, before) == []
    unread = every_knob() - knobs_of([args])
    assert "veto_strength" in unread
    for item in dataclasses.fields(TRBConfig):
        other = copy.copy(args)
        setattr(other, item.name, "something else" if item.name in resume.FREE else 7.25)
        now = before | {
            key.name: resume.plain(getattr(other, key.name))
            for key in dataclasses.fields(TRBConfig)
            if key.name not in resume.FREE
        }
        expected = [] if item.name in resume.FREE else [item.name]
        if item.name == "num_train_epochs" or item.name in unread:  # max_steps wins; knobs of other methods do nothing
            expected = []
        assert keys_of(before, now) == expected, item.name


@pytest.mark.parametrize(
    ("changes", "matters"),
    [
        ({"lr_scheduler_type": "constant"}, False),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.1}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, True),
        ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 5}, False),
        ({"lr_scheduler_type": "linear"}, True),
        ({"lr_scheduler_type": "cosine"}, True),
        ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}, True),
        ({"method": "veto"}, True),
        ({"method": "veto", "veto_steps": 5}, False),
        ({"method": "horizon"}, False),
        ({"method": "prefix"}, False),
    ],
)
def test_the_length_matters_where_a_schedule_depends_on_it(
    tmp_path: Path, changes: dict[str, Any], matters: bool
) -> None:
    """Held to transformers' own schedules: the rate of step 3 in a run of 10 steps and in one of 1,000."""
    args = config(tmp_path, **changes)
    assert resume.length_matters(args) == matters
    if args.method != "veto" and args.lr_scheduler_type != "warmup_stable_decay":
        rates = []
        for steps in (10, 1000):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
            for _ in range(3):
                optimizer.step()
                schedule.step()
            rates.append(schedule.get_last_lr())
        assert (rates[0] != rates[1]) == matters


@pytest.mark.parametrize("half", ["BEHAVIORS", "TARGETS"])
@pytest.mark.parametrize("name", ["schedule", "share", "horizon", "prefix"])
def test_the_length_matters_whichever_schedule_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str, name: str
) -> None:
    """Of behaviors and losses from outside, too."""
    args = config(tmp_path, method="opd")
    assert not resume.length_matters(args)
    table, key = getattr(methods, half), {"BEHAVIORS": "student", "TARGETS": "reverse_kl"}[half]
    plain = table[key]
    falling = Ramp(1.0, 0.0, None, lambda: 10)
    changed = dataclasses.replace(
        plain, build=lambda args, length: dataclasses.replace(plain.build(args, length), **{name: falling})
    )
    monkeypatch.setitem(table, key, changed)
    assert resume.length_matters(args)


@pytest.mark.parametrize(
    ("layout", "same"),
    [((4, 2, 1), True), ((2, 2, 2), True), ((8, 1, 1), True), ((4, 1, 1), False), ((4, 2, 2), False)],
)
def test_another_layout_of_the_same_step_is_the_same_run(
    tmp_path: Path, layout: tuple[int, int, int], same: bool
) -> None:
    rows, accumulation, processes = layout
    before = described(config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2))
    args = config(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)
    assert (keys_of(before, described(args, world_size=processes)) == []) == same
    apart = before | {"average_tokens_across_devices": False}  # of an older version: each process weighed its own
    assert "average_tokens_across_devices" in keys_of(apart, described(args, world_size=processes))


# ---- data and models ----


def changed_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, *rest = copy.deepcopy(rows)
    first["prompt"][-1]["content"] += " "
    return [first, *rest]


def changed_answer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows[:-1], rows[-1] | {"answer": "another"}]


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda rows: rows[:-1], {"rows", "prompts", "answers"}),
        (lambda rows: rows[::-1], {"prompts", "answers"}),
        (changed_prompt, {"prompts"}),
        (changed_answer, {"answers"}),
        (lambda rows: [row | {"note": "of no use"} for row in rows], set()),
        (lambda rows: [row | {"teacher_prompt": "1"} for row in rows], {"teacher_prompts"}),
        (lambda rows: [row | {"privileged_context": "1"} for row in rows], {"privileged_contexts"}),
    ],
)
def test_prompts_and_answers_are_compared_in_their_order(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], keys: set[str]
) -> None:
    args = config(tmp_path)
    before = described(args)
    for rows in (Dataset.from_list(change(ROWS)), change(ROWS)):  # a dataset, and any other sequence
        found = keys_of(before, described(args, train_dataset=rows))
        assert set(found) == {f"train_dataset.{key}" for key in keys}


class Thing:
    """What JSON has no words for."""


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        (date(2026, 1, 1), date(2026, 1, 2)),
        (b"8", b"9"),
        (Decimal("0.1"), Decimal("0.10")),
        (np.array([1, 2]), np.array([1, 3])),
        ({"value": [b"8"]}, {"value": [b"9"]}),
        (8, 9),
    ],
    ids=str,
)
def test_answers_of_every_kind_are_compared(tmp_path: Path, answer: Any, other: Any) -> None:
    args = config(tmp_path)
    before, same, now = (
        described(args, train_dataset=[{"prompt": "1", "answer": value} for value in (copy.deepcopy(each), Thing())])
        for each in (answer, answer, other)
    )
    assert keys_of(before, same) == []
    assert keys_of(before, now) == ["train_dataset.answers"]


def test_a_run_on_answers_that_are_no_text_is_trained(tmp_path: Path) -> None:
    rows = [row | {"answer": date(2026, 1, 1)} for row in ROWS]
    trainer = build(tmp_path, **TINY, max_steps=1, train_rows=rows, reward_fn=lambda texts, rows: [0.0] * len(texts))
    trainer.train()
    assert len(losses(trainer)) == 1


def test_a_large_dataset_is_sampled_with_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = config(tmp_path)
    monkeypatch.setattr(resume, "SAMPLED_ROWS", 5)
    assert spread(1000, 5) == [0, 249, 499, 749, 999]
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    rows = [{"prompt": str(index), "answer": ""} for index in range(1000)]
    before = described(args, train_dataset=rows)
    for index in (0, 499, 999):
        other = [*rows[:index], {"prompt": "x", "answer": ""}, *rows[index + 1 :]]
        assert keys_of(before, described(args, train_dataset=other)) == ["train_dataset.prompts"]
    assert "train_dataset.rows" in keys_of(before, described(args, train_dataset=rows[:-1]))


def test_models_are_compared_by_shape_weights_and_adapters(tmp_path: Path) -> None:
    args, before = config(tmp_path), described(config(tmp_path))
    teacher, _ = zoo.load("teacher")
    with torch.no_grad():
        teacher.lm_head.weight.neg_()
    assert keys_of(before, described(args, teachers={None: teacher})) == ["teacher.weights"]
    assert "teacher.dtype" in keys_of(before, described(args, teachers={None: zoo.load("teacher")[0].bfloat16()}))
    student, _ = zoo.load("student")
    with torch.no_grad():
        student.lm_head.weight.neg_()
    assert keys_of(before, described(args, student=student)) == []  # the checkpoint brings these weights

    def adapted(alpha: int, sign: float = 1.0) -> Any:
        base, _ = zoo.load("student")
        with torch.no_grad():
            base.lm_head.weight.mul_(sign)
        adapters = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return get_peft_model(base, adapters)

    with_adapters = described(args, student=adapted(4))
    assert "student.adapters" in keys_of(before, with_adapters)
    assert keys_of(with_adapters, described(args, student=adapted(4))) == []  # however they were initialised
    assert keys_of(with_adapters, described(args, student=adapted(8))) == ["student.adapters"]
    assert keys_of(with_adapters, described(args, student=adapted(4, -1.0))) == ["student.frozen_weights"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64])
def test_few_numbers_of_any_tensor_tell_it_from_another(dtype: torch.dtype) -> None:
    one = torch.arange(6000).remainder(100).to(dtype).reshape(20, 300)
    for tensor in (one, one.t(), one[:, ::2], one[0], one[0, 0], one[:0]):
        before = resume._numbers(tensor)
        assert before == resume._numbers(tensor.clone())
        assert tensor.numel() == 0 or before != resume._numbers(tensor + 1)
    assert resume._numbers(one) != resume._numbers(one.reshape(300, 20))
    assert resume._numbers(torch.empty(3, 4, device="meta")) == b"(3, 4)"


# ---- through the trainer ----


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_rows": zoo.problems(64, seed=9, split="train")}, [r"train_dataset\.prompts: ", r"\.answers: "]),
        ({"method": "opd"}, [r'method: "trb" -> "opd"']),
        ({"num_generations": 4}, ["num_generations: 2 -> 4"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps: 1 -> 2"]),
        ({"seed": 3, "loss_top_k": 4}, ["seed: 42 -> 3", "loss_top_k: 16 -> 4"]),
        ({"lr_scheduler_type": "linear"}, ["max_steps: 1 -> 2", 'lr_scheduler_type: "constant" -> "linear"']),
        ({"initial_kl_budget": float("inf")}, ['initial_kl_budget: 0.5 -> "Infinity"']),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_run_is_refused_by_name_and_goes_on_if_that_is_accepted(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ChangedRunError) as caught:
        resumed(saved, tmp_path, **changes)
    for pattern in named:
        assert re.search(pattern, str(caught.value)), caught.value
    assert str(saved) in str(caught.value) and "accept_changes=True" in str(caught.value)
    caplog.set_level(logging.WARNING)
    trainer = resumed(saved, tmp_path, accept=True, **changes)
    assert trainer.state.global_step == 2
    for pattern in named:
        assert re.search(pattern, caplog.text)


def test_what_the_optimizers_state_keeps_is_said(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    trainer = resumed(saved, tmp_path, accept=True, learning_rate=1.0, weight_decay=0.5)
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(3e-4), 0.0)
    assert "The optimizer's saved state keeps its own learning_rate, weight_decay" in caplog.text


def test_what_changes_no_results_may_change(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Longer (this schedule is constant), in another layout, saved and logged otherwise: to the same weights."""
    straight = build(tmp_path / "straight", **TINY, max_steps=2)
    straight.train()
    caplog.set_level(logging.WARNING)
    trainer = resumed(
        saved,
        tmp_path / "resumed",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        rollout_batch_size=1,
        loss_chunk_tokens=3,
        block_size=2,
        recorded_rollouts=0,
        save_strategy="steps",
        save_steps=2,
    )
    assert "saved -> now" not in caplog.text
    for (name, one), other in zip(weights(straight).items(), weights(trainer).values(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3, msg=name)


def test_an_unchanged_run_resumes_to_the_same_bits(saved: Path, tmp_path: Path) -> None:
    straight = build(tmp_path / "straight", **TINY, max_steps=2)
    straight.train()
    again = resumed(saved, tmp_path / "resumed")
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))


def copied(saved: Path, directory: Path) -> Path:
    return Path(shutil.copytree(saved, directory / saved.name))


def test_the_record_is_sealed_and_an_older_checkpoint_is_continued_with_a_warning(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "method" in json.loads((saved / RUN).read_text())
    damaged = copied(saved, tmp_path)
    (damaged / RUN).write_text("{}")
    with pytest.raises(checkpoints.CheckpointError, match=RUN.name):
        resumed(damaged, tmp_path / "run")
    (damaged / RUN).unlink()
    checkpoints.seal(damaged)
    caplog.set_level(logging.WARNING)
    assert resumed(damaged, tmp_path / "run", method="opd").state.global_step == 2
    assert "does not say which run it is of: its settings and data are not compared" in caplog.text


def test_a_checkpoint_of_weights_alone_says_what_it_is_of(tmp_path: Path) -> None:
    build(tmp_path, **SAVED, max_steps=1, save_only_model=True).train()
    with pytest.raises(ChangedRunError, match='method: "trb" -> "opd"'):
        resumed(tmp_path / "checkpoint-1", tmp_path, method="opd")


def test_a_checkpoint_of_weights_alone_is_gone_on_from_only_if_that_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a new optimizer and the learning rate's first steps, without a word."""
    options = TINY | {"lr_scheduler_type": "linear", "max_steps": 2}
    build(tmp_path, **options, save_strategy="steps", save_steps=1, save_only_model=True).train()
    saved = tmp_path / "checkpoint-1"
    message = "holds no optimizer, no scheduler, no sums since the last log.*save_only_model.*accept_changes=True"
    with pytest.raises(ChangedRunError, match=message):
        build(tmp_path, **options).train(resume_from_checkpoint=str(saved))
    trainer = build(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(saved), accept_changes=True)
    assert trainer.state.global_step == 2
    assert re.search("holds no optimizer, no scheduler, no sums since the last log.*begin anew", caplog.text)


@pytest.mark.parametrize(
    ("files", "deepspeed", "missing"),
    [
        (["optimizer.pt", "scheduler.pt", "trb_state_0.json"], False, []),
        (["optimizer.bin", "scheduler.pt", "trb_state_0.json"], False, []),
        (["optimizer_0/", "scheduler.pt", "trb_state_0.json"], False, []),
        (["global_step3/", "latest", "trb_state_0.json"], True, []),
        (["global_step3/", "latest", "trb_state_0.json"], False, ["optimizer", "scheduler"]),
        (["optimizer.pt", "scheduler.pt", "trb_state_0.json"], True, ["optimizer", "scheduler"]),
        (["optimizer.pt", "trb_state_0.json"], False, ["scheduler"]),
        (["scheduler.pt", "trb_state_1.json"], False, ["optimizer", "sums since the last log"]),
    ],
)
def test_what_a_checkpoint_holds_is_known_by_the_names_of_each_launch(
    files: list[str], deepspeed: bool, missing: list[str], tmp_path: Path
) -> None:
    """One process, FSDP with whole and with sharded states, and DeepSpeed, which keeps both in one folder."""
    for name in files:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert resume.missing_state(tmp_path, deepspeed=deepspeed) == missing


# ---- prompts that cannot be trained on ----


def test_fewer_prompts_than_a_step_needs_are_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, **TINY, gradient_accumulation_steps=2, train_rows=ROWS[:3])
    message = "train_dataset has 3 prompts, fewer than the 4 of one optimizer step: per_device_train_batch_size=4 x 1 "
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not trainer.state.global_step
    build(tmp_path, **TINY, gradient_accumulation_steps=2, train_rows=ROWS[:4], max_steps=1).train()


def long_prompt(words: int) -> dict[str, Any]:
    return ROWS[0] | {"prompt": [{"role": "user", "content": " ".join(["1 + 1"] * words)}]}


def test_a_prompt_that_is_too_long_is_found_before_step_0(tmp_path: Path) -> None:
    student, tokenizer = zoo.load("student")
    limit = student.config.max_position_embeddings
    long = long_prompt(limit)
    length = len(tokenizer.apply_chat_template(long["prompt"], add_generation_prompt=True, return_dict=False))
    rows = [*ROWS[:40], long, *ROWS[40:], long]
    trainer = build(tmp_path, **TINY, train_rows=rows)
    message = (
        rf"train_dataset\[40\] has {length} tokens, and with max_completion_length=4 more exceeds the {limit} "
        r"positions of the (student|teacher) \(\w+ForCausalLM\) \(2 of 66 rows do\)"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("named", [False, True])
def test_a_prompt_for_evaluation_that_is_too_long_is_found_before_step_0(tmp_path: Path, named: bool) -> None:
    rows = Dataset.from_list([*ROWS[:2], long_prompt(2000)])
    trainer = build(tmp_path, **TINY, eval_dataset={"other": rows} if named else rows, eval_strategy="steps")
    where = r"eval_dataset\['other'\]\[2\]" if named else r"eval_dataset\[2\]"
    with pytest.raises(ValueError, match=where):
        trainer.train()


def test_the_longest_prompt_that_fits_is_trained_on(tmp_path: Path) -> None:
    student, tokenizer = zoo.load("student")
    longest = max(
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)) for row in ROWS
    )
    teacher, _ = zoo.load("teacher")
    teacher.config.max_position_embeddings = longest + 4
    build(tmp_path, **TINY, student=student, teacher=teacher, max_steps=1).train()
    teacher.config.max_position_embeddings = longest + 3
    with pytest.raises(ValueError, match=rf"the {longest + 3} positions of the teacher"):
        build(tmp_path, **TINY, student=student, teacher=teacher, max_steps=1).train()


def test_a_trainer_interrupted_amid_a_step_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """In a notebook the same object goes on, with half of a step's batches read and summed."""
    options = SAVED | {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    options |= {"initial_kl_budget": None, "blend_warmup_steps": None}  # the default, which remembers
    whole = build(tmp_path / "whole", **options)
    whole.train()
    kill = Kill(2, amid_next=True)
    cut = build(tmp_path / "cut", callbacks=[kill], **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert cut.state.global_step == 2
    cut.remove_callback(kill)
    cut.train(resume_from_checkpoint=True)
    assert losses(cut) == losses(whole)
    both = zip(weights(cut).values(), weights(whole).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"num_train_epochs": 1}], ids=["amid an epoch", "at its end"])
def test_a_run_whose_steps_are_all_taken_takes_no_other(length: dict[str, Any], tmp_path: Path) -> None:
    """Killed after the last checkpoint was saved, and resumed by hand: transformers would take a third step."""
    options = SAVED | {"max_steps": -1, **length}
    prompts = ROWS[: 4 if "num_train_epochs" in length else 64]
    done = build(tmp_path, train_rows=prompts, **options)
    found = done.train()
    again = build(tmp_path, train_rows=prompts, **options)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == done.state.global_step == 2
    both = zip(weights(again).values(), weights(done).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)
    assert output.training_loss == pytest.approx(found.training_loss, rel=1e-12)
    recorded = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert recorded == [1, 2]


def test_a_checkpoint_without_sums_counts_from_where_it_is(tmp_path: Path) -> None:
    """As another trainer's: of the steps before it nothing is known."""
    options = SAVED | {"max_steps": 4}
    cut = build(tmp_path, callbacks=[Kill(3)], **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    for path in tmp_path.glob("checkpoint-*/trb_state_*.json"):
        path.unlink()
    resumed = build(tmp_path, **options)
    checkpoint = str(tmp_path / "checkpoint-2")
    found = resumed.train(resume_from_checkpoint=checkpoint, verify=False, accept_changes=True).training_loss
    assert found == pytest.approx(sum(losses(resumed)[-2:]) / 2, rel=1e-6)


def test_the_loss_of_a_whole_training_is_that_of_all_its_steps(tmp_path: Path) -> None:
    """Also of one that was resumed, for which transformers divides by the steps since: to the last bit."""
    options = SAVED | {"max_steps": 6, "method": "tropd", "lr_scheduler_type": "linear", "weight_decay": 0.1}
    options |= {"initial_kl_budget": None, "blend_warmup_steps": None, "max_completion_length": 6}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    straight = build(tmp_path / "straight", **options)
    found = straight.train()
    cut = build(tmp_path / "cut", callbacks=[Kill(3)], **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = build(tmp_path / "cut", **options)
    output = resumed.train(resume_from_checkpoint=True)
    assert output.training_loss == output.metrics["train_loss"] == found.training_loss
    assert resumed.state.log_history[-1]["train_loss"] == straight.state.log_history[-1]["train_loss"]


# ---- what callbacks decide ----


STOPPING: dict[str, Any] = SAVED | {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
STOPPING |= {"metric_for_best_model": "loss", "learning_rate": 1e-9, "max_steps": 8}


def stopping(directory: Path, *more: TrainerCallback, patience: int = 3, **changes: Any) -> TRBTrainer:
    stop = EarlyStoppingCallback(patience, early_stopping_threshold=1.0)
    held_out = Dataset.from_list(zoo.problems(2, seed=1, split="test"))
    return build(directory, eval_dataset=held_out, callbacks=[stop, *more], **STOPPING | changes)


@pytest.mark.parametrize("killed_after", [3, 4])
def test_patience_goes_on_where_it_was(killed_after: int, tmp_path: Path) -> None:
    """And a run that had lost it takes no further step."""
    straight = stopping(tmp_path / "straight")
    straight.train()
    assert straight.state.global_step == 4
    if killed_after == 3:
        with pytest.raises(KeyboardInterrupt):
            stopping(tmp_path / "cut", Kill(3)).train()
    else:
        stopping(tmp_path / "cut").train()
    rest = stopping(tmp_path / "cut")
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 4


def test_another_patience_is_taken_only_without_the_old_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopping(tmp_path).train()
    again = stopping(tmp_path, patience=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert "EarlyStoppingCallback goes on as the checkpoint has it" in caplog.text
    anew = stopping(tmp_path, patience=2, restore_callback_states_from_checkpoint=False)
    anew.train(resume_from_checkpoint=True)
    assert anew.state.global_step == 6


def test_each_of_several_callbacks_of_a_class_has_its_own_state_back(tmp_path: Path) -> None:
    """transformers read those of the first save."""
    longer = [EarlyStoppingCallback(5, early_stopping_threshold=1.0) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        stopping(tmp_path, longer[0], Kill(3)).train()
    rest = stopping(tmp_path, longer[1])
    rest.train(resume_from_checkpoint=True)
    found = [each for each in rest.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
    assert [(each.early_stopping_patience, each.early_stopping_patience_counter) for each in found] == [(3, 3), (5, 3)]
    assert rest.state.global_step == 4


def test_a_process_that_was_not_there_counts_skipped_steps_as_the_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would not stop with them where `max_skipped_steps` are reached."""
    with monkeypatch.context() as patch:
        patch.setattr("trb.training.guard.StepGuard.state", lambda self: dict.fromkeys(counts, 2))
        counts = ("skipped", "in_a_row", "taken", "left_out")
        build(tmp_path, **SAVED, max_steps=1).train()
    trainer = build(tmp_path, **TINY, max_steps=2)
    monkeypatch.setattr(trainer, "_progress_file", lambda checkpoint: Path(checkpoint) / "trb_state_1.json")
    first = json.loads((tmp_path / "checkpoint-1" / "trb_state_0.json").read_text())

    class Second(Ranks):
        def from_first(self, make: Callable[[], Any]) -> Any:
            found = make()
            return [first[name] for name in ("schedules", "memories", "guard")] if found == [{}, {}, {}] else found

    monkeypatch.setattr(trainer, "_ranks", Second())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer._guard.skipped == 2 and logged(trainer, "skipped_steps")[-1] == 2


def test_a_callback_with_a_state_may_be_added_on_resume(tmp_path: Path) -> None:
    """transformers looked for its state among those of the checkpoint, at the first save."""
    held_out = Dataset.from_list(zoo.problems(2, seed=1, split="test"))
    build(tmp_path, eval_dataset=held_out, **STOPPING | {"max_steps": 1}).train()
    later = stopping(tmp_path, patience=8, max_steps=2)
    later.train(resume_from_checkpoint=True)
    assert later.state.global_step == 2


class StopEpoch(TrainerCallback):
    """Ends each epoch after some of its micro-batches."""

    def __init__(self, *, amid: bool) -> None:
        self.amid, self.begun = amid, 0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = not self.amid

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = self.amid and self.begun == 2


@pytest.mark.parametrize("amid", [False, True], ids=["after a step", "amid the second"])
def test_an_epoch_after_one_that_was_cut_short_has_its_own_prompts(amid: bool, tmp_path: Path) -> None:
    """Those that it has where nothing is cut short; what was begun of a step is given up."""
    options = TINY | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "train_rows": ROWS[:8]}
    options |= {"max_steps": -1, "num_train_epochs": 3, "method": "opd", "learning_rate": 0.0}
    options |= {"initial_kl_budget": None, "blend_warmup_steps": None}
    drawn: list[list[list[list[int]]]] = []
    trainers = []
    for callbacks in ([], [StopEpoch(amid=amid)]):
        trainer = build(tmp_path, callbacks=callbacks, **options)
        trainers.append(trainer)
        prompts: list[list[list[int]]] = []
        drawn.append(prompts)
        generate = trainer._generate_single_turn
        trainer._generate_single_turn = lambda ids, *rest, generate=generate, prompts=prompts: (  # type: ignore
            prompts.append([list(row) for row in ids]),
            generate(ids, *rest),
        )[1]
        trainer.train()
    whole, cut = drawn
    assert len(whole) == 12
    wanted = [whole[step] for epoch in range(3) for step in range(4 * epoch, 4 * epoch + 1 + amid)]
    assert cut == wanted
    assert trainers[1].state.global_step == 3


class StopAmid(TrainerCallback):
    """Ends the training, or the epoch, amid the step after `step`."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = -1  # the next epoch begins with the same number
            setattr(control, f"should_{self.what}_stop", True)


GIVEN_UP: dict[str, Any] = TINY | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
GIVEN_UP |= {"max_steps": -1, "num_train_epochs": 2, "initial_kl_budget": None, "blend_warmup_steps": None}
GIVEN_UP |= {"train_rows": ROWS[:8], "logging_steps": 3, "max_completion_length": 6}


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of records, without times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: row[key] for key in row if "time" not in key and "per_second" not in key} for row in rows]


@pytest.mark.parametrize("stopped_after", [2, 4, 5], ids=["in an epoch", "where an epoch begins", "in a later epoch"])
def test_a_run_stopped_amid_a_step_resumes_as_one_that_was_not(stopped_after: int, tmp_path: Path) -> None:
    """What was begun is neither in the sums that are saved nor in the records."""
    options = GIVEN_UP | {"save_strategy": "epoch", "include_num_input_tokens_seen": True, "disable_dropout": False}
    whole = build(tmp_path / "whole", student=dropping_student(0.1), **options)
    whole.train()
    stop = StopAmid(stopped_after, "training")
    build(tmp_path / "cut", student=dropping_student(0.1), callbacks=[stop], **options).train()
    assert max(row["step"] for row in lines(tmp_path / "cut" / "rollouts.jsonl")) < stopped_after
    rest = build(tmp_path / "cut", student=dropping_student(0.1), **options)
    rest.train(resume_from_checkpoint=True)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert lines(tmp_path / "cut" / name) == lines(tmp_path / "whole" / name)
    both = zip(weights(rest).values(), weights(whole).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


@pytest.mark.parametrize("what", ["epoch", "training"])
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_step_that_is_given_up_is_in_no_mean(what: str, strategy: str, tmp_path: Path) -> None:
    """With a rate of 0 the steps' losses are those of a run that logs each of them."""
    options = GIVEN_UP | {"learning_rate": 0.0, "method": "opd"}
    single = build(tmp_path / "single", callbacks=[StopAmid(2, what)], **options | {"logging_steps": 1})
    single.train()
    expected = losses(single)
    assert len(expected) == {"epoch": 6, "training": 2}[what]
    one_by_one = build(tmp_path / "whole", **options | {"logging_steps": 1})
    one_by_one.train()
    whole = losses(one_by_one)
    assert expected[:2] == pytest.approx(whole[:2], rel=1e-5)  # later steps draw by their numbers, which are others
    trainer = build(tmp_path / "cut", callbacks=[StopAmid(2, what)], **options | {"logging_strategy": strategy})
    found = trainer.train().training_loss
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    if strategy == "epoch":
        assert losses(trainer)[0] == pytest.approx(sum(expected[:2]) / 2, rel=1e-5)
        assert logged(trainer, "reverse_kl")[0] == pytest.approx(sum(logged(single, "reverse_kl")[:2]) / 2, rel=0.05)
    keys = [(row["step"], row["prompt_key"], row["rollout_index"]) for row in lines(tmp_path / "cut/rollouts.jsonl")]
    assert len(keys) == len(set(keys))


def test_a_step_that_is_given_up_leaves_no_time_and_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one amid which a training was interrupted, of which the next begins anew. The clock goes on by one each
    time it is read, so that steps of equally many micro-batches take equally long."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(distillation_trainer, "time", clock)
    options = GIVEN_UP | {"learning_rate": 0.0, "method": "opd", "log_completions": True, "logging_steps": 1}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    cut = build(tmp_path / "cut", callbacks=[StopAmid(2, "epoch")], **options | {"logging_strategy": "epoch"})
    cut.train()
    killed = build(tmp_path / "killed", callbacks=[Kill(1, amid_next=True)], **options)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            killed.train()
    (took,) = {row["step_time"] for row in whole.state.log_history if "loss" in row}
    for trainer in (cut, killed):
        assert {row["step_time"] for row in trainer.state.log_history if "loss" in row} == {took}
    texts = [
        pandas.read_parquet(tmp_path / name / "completions/completions_00002.parquet") for name in ("whole", "cut")
    ]
    pandas.testing.assert_frame_equal(*texts)


def test_workers_that_persist_resume_to_the_same_bits(tmp_path: Path) -> None:
    """From amid an epoch, where others read what is left of it, and in the epochs after."""
    options = GIVEN_UP | {"num_train_epochs": 3, "train_rows": ROWS[:4], "save_strategy": "steps", "save_steps": 1}
    options |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    for killed_after in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "cut", callbacks=[Kill(killed_after, amid_next=True)], **options).train()
        rest = build(tmp_path / "cut", **options)
        rest.train(resume_from_checkpoint=True)
        both = zip(weights(rest).values(), weights(whole).values(), strict=True)
        assert all(torch.equal(one, other) for one, other in both), killed_after


UNSET: dict[str, Any] = {"initial_kl_budget": None, "blend_warmup_steps": None}
MEMORIES: dict[str, dict[str, Any]] = {
    "sequence": UNSET | {"budget_schedule": "sequence"},
    "the default": UNSET,
    "gap": UNSET | {"budget_schedule": "gap"},
    "gap of a budget": UNSET | {"budget_schedule": "gap", "initial_kl_budget": 0.3},
    "geometric": UNSET | {"method": "geometric"},
    "none": {},
}
# What one has learnt, the other may go on with.
ALIKE = {"sequence", "the default"}


@pytest.mark.parametrize(("before", "now"), [*itertools.permutations(MEMORIES, 2)])
def test_a_schedule_begins_anew_after_another_ones_checkpoint(
    before: str, now: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If changes are accepted; a budget per token, say, is no teacher weight."""
    options = TINY | {"save_strategy": "steps", "save_steps": 1}
    build(tmp_path, **options | MEMORIES[before], max_steps=1).train()
    fresh = build(tmp_path / "fresh", **options | MEMORIES[now], max_steps=2)
    first = fresh.behavior.schedule.state_dict()
    trainer = build(tmp_path, **options | MEMORIES[now], max_steps=2)
    states = []
    observe = trainer.behavior.schedule.observe
    if trainer.behavior.schedule.remembers:
        trainer.behavior.schedule.observe = lambda *seen: (  # type: ignore[method-assign]
            states.append(trainer.behavior.schedule.state_dict()),
            observe(*seen),
        )
    caplog.clear()
    trainer.train(resume_from_checkpoint=True, accept_changes=True)
    assert trainer.state.global_step == 2
    begins_anew = trainer.behavior.schedule.remembers and {before, now} != ALIKE
    assert ("begins anew" in caplog.text) == begins_anew
    if begins_anew:
        assert states == [first]
    elif states:
        assert states != [first]


@pytest.mark.parametrize("schedule", ["sequence", "sequence-linear", "gap"])
def test_a_second_training_begins_with_the_budget_of_the_first(schedule: str, tmp_path: Path) -> None:
    unset = {"initial_kl_budget": None, "blend_warmup_steps": None}
    trainer = build(tmp_path, **TINY | unset, max_steps=4, budget_schedule=schedule, learning_rate=0.0)
    budgets = []
    for _ in range(2):
        trainer.train()
        budgets.append(logged(trainer, "kl_budget"))
    assert budgets[0] == budgets[1] and budgets[0][0] > 0


def test_data_that_knows_rows_by_number_alone_is_trained_on(tmp_path: Path) -> None:
    """What transformers takes: a list, or any map-style data set of torch."""
    trainer = build(tmp_path, **TINY, max_steps=1, train_dataset=ROWS)
    trainer.train()
    assert trainer.state.global_step == 1
