"""`TRBTrainer` held to plain torch, to TRL, and to itself under another batch layout or a restart."""

import dataclasses
import inspect
import json
import logging
import math
import os
import re
import runpy
import typing
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from tiny_runs import NEWER_OPTIONS, Completions, Kill, build, config, dropping_student, logged, losses, weights
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer, TrlParser
from trl.trainer.utils import RepeatSampler

from trb import TRBConfig, TRBTrainer, zoo
from trb.errors import InputError, OperationError
from trb.losses import TokenMetrics, topk_reverse_kl
from trb.models.loading import load_model
from trb.policies import SKDPolicy, StudentPolicy, TeacherPolicy, TemperaturePolicy, TrustRegionPolicy
from trb.sampling import sample
from trb.training import config as config_module
from trb.training import logged as logged_module
from trb.training import numbers, taught
from trb.training.methods import every_knob, target_of
from trb.training.ranks import Ranks
from trb.vocab import align

ROOT = Path(__file__).parents[2]


# ---- the seams of TRL that the trainer stands on ----


def test_trl_still_has_the_seams_that_are_overridden() -> None:
    expected = {
        "_tokenize_prompts": ["self", "prompts"],
        "_generate": ["self", "prompts"],
        "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
        "_tool_call_loop": [
            *("self", "prompts", "prompt_ids", "completion_ids", "completions", "images", "multimodal_fields")
        ],
        "_get_train_sampler": ["self", "dataset"],
        "_set_signature_columns_if_needed": ["self"],
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
        "_get_grad_norm": ["self", "model", "grad_norm"],
        "_run_epoch": [
            *("self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
            *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
            "steps_trained_in_current_epoch",
        ],
        "_maybe_log_save_evaluate": [
            *("self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
            "learning_rate",
        ],
        "_evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
        "_finalize_training": ["self", "trial", "num_train_samples", "start_time"],
        "_get_output_dir": ["self", "trial"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_save_rng_state": ["self", "output_dir"],
        "_load_rng_state": ["self", "checkpoint"],
        "_push_from_checkpoint": ["self", "checkpoint_folder"],
        "log": ["self", "logs", "start_time"],
        "evaluation_loop": [
            *("self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix")
        ],
        "save_model": ["self", "output_dir", "_internal_call"],
        "_save": ["self", "output_dir", "state_dict"],
        "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
        "_load_best_model": ["self"],
        "_load_callback_state": ["self"],
        "autocast_smart_context_manager": ["self", "cache_enabled"],
        "_send_telemetry": ["self"],
        "hyperparameter_search": [
            *("self", "hp_space", "compute_objective", "n_trials", "direction", "backend", "hp_name", "kwargs")
        ],
        "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(DistillationTrainer, name)).parameters) == parameters, name
    assert inspect.signature(DistillationTrainer.__init__).parameters["teacher_model"].default is None
    ours = [owner for owner in TRBTrainer.__mro__ if owner.__module__.startswith("trb.")]
    functions = {name for owner in ours for name, value in vars(owner).items() if inspect.isfunction(value)}
    assert {name for name in functions if hasattr(DistillationTrainer, name)} == {"__init__", *expected}
    options = {"data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"}
    assert options <= inspect.signature(RepeatSampler.__init__).parameters.keys()


# ---- the events that end a completion ----


class Served:
    """Stands in for TRL's vLLM: every completion is a few tokens and then the stop id that the engine came to first."""

    def __init__(self, stop: int) -> None:
        self.generation_kwargs: dict[str, Any] = {}
        self.stop = stop

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: list[list[int]], **options: Any) -> tuple:
        return prompts, [[*range(10, 13 + row % 3), self.stop] for row in range(len(prompts))], None, None


@pytest.mark.parametrize("ends_with", zoo.NAMES)
def test_plain_rollouts_of_an_engine_end_with_any_stop_id_and_count_as_the_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_with: str
) -> None:
    stops = [zoo.load(name)[0].generation_config.eos_token_id for name in zoo.NAMES]
    served = Served(stops[zoo.NAMES.index(ends_with)])

    def with_engine(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **options)
        self.use_vllm, self.vllm_generation, self._last_loaded_step = True, served, -1

    construct = DistillationTrainer.__init__
    monkeypatch.setattr(DistillationTrainer, "__init__", with_engine)
    trainer = build(tmp_path, method="opd", max_steps=1)
    assert served.generation_kwargs == {"ignore_eos": True, "stop_token_ids": stops}
    seen = Completions()
    seen.watch(trainer)
    trainer.train()
    assert seen.per_step == [[[*range(10, 13 + row % 3), stops[0]] for row in range(8)]]
    assert logged(trainer, "stop_rate") == [1.0]
    assert [row["completions/clipped_ratio"] for row in trainer.state.log_history if "loss" in row] == [0.0]
    assert -30 < logged(trainer, "teacher_log_prob")[0] < 0


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_plain_rollouts_of_an_engine_are_of_rows_that_the_pair_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Of a wider head of the student's the rest is left out; what an engine draws of it all the same is named."""
    student, _ = zoo.load("student")
    student.resize_token_embeddings(96, mean_resizing=False)
    served = Served(95)

    def with_engine(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **options)
        self.use_vllm, self.vllm_generation, self._last_loaded_step = True, served, -1

    construct = DistillationTrainer.__init__
    monkeypatch.setattr(DistillationTrainer, "__init__", with_engine)
    trainer = build(tmp_path, student=student, method="opd", max_steps=1, vllm_mode=mode)
    assert trainer.vocabulary.size == 80
    lowest = {"colocate": -math.inf, "server": -100.0}[mode]
    assert served.generation_kwargs["logit_bias"] == dict.fromkeys(range(80, 96), lowest)
    with pytest.raises(OperationError, match=r"vLLM drew token id 95, and the pair shares 80 rows"):
        trainer.train()
    student.resize_token_embeddings(80 + 1025, mean_resizing=False)
    with pytest.raises(InputError, match="1025 rows more than") if mode == "server" else nullcontext():
        build(tmp_path, student=student, method="opd", max_steps=1, vllm_mode=mode)


def test_the_loss_reads_a_stop_id_of_the_teacher_as_the_stop_event(tmp_path: Path) -> None:
    """Rows of another origin, as they came: neither the loss nor what is logged depends on which stop id they have."""
    trainer = build(tmp_path)
    inputs = trainer._prepare_inputs([trainer.train_dataset[0]] * 8)
    inputs.pop("rollout_row")  # of the sampler's own rows
    emitted, folded = trainer.vocabulary.stop_ids
    assert (inputs["completion_ids"] == emitted).any()
    found = []
    for stop in (emitted, folded):
        ids = inputs["completion_ids"].masked_fill(inputs["completion_ids"] == emitted, stop)
        loss, *_ = trainer._compute_loss(trainer.model, {**inputs, "completion_ids": ids}, None)
        found.append((loss.item(), trainer._sums["train"].take(Ranks())["teacher_log_prob"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_the_saved_student_says_with_what_its_completions_end(tmp_path: Path, adapted: bool) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapted else None
    student = zoo.load("student")[0]
    trainer = build(tmp_path / "run", student=student, peft_config=lora)
    trainer.save_model(str(tmp_path / "saved"))
    stops = [zoo.load(name)[0].generation_config.eos_token_id for name in zoo.NAMES]
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == stops
    assert (tmp_path / "saved" / "adapter_config.json").exists() == adapted
    assert load_model(str(tmp_path / "saved")).generation_config.eos_token_id == stops


# ---- the method ----


def test_trainer_takes_the_same_first_steps_as_the_minimal_loop(tmp_path: Path) -> None:
    loop = runpy.run_path(str(ROOT / "examples" / "minimal_loop.py"))
    trainer = build(tmp_path)
    seen = Completions()
    seen.watch(trainer)
    trainer.train()

    order = list(trainer._get_train_sampler())
    student, tokenizer = zoo.load("student")
    settings = loop["Settings"](initial_kl_budget=0.5, blend_warmup_steps=4, max_new_tokens=24, seed=trainer.args.seed)
    run = loop["Distillation"](student, zoo.load("teacher")[0], settings)
    for step in range(2):
        rows = [trainer.train_dataset[i]["prompt"] for i in order[step * 8 : (step + 1) * 8]]
        prompts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False) for row in rows]
        result = run.step(prompts, step)
        assert result["completions"] == seen.per_step[step]
        assert logged(trainer, "kl_budget")[step] == pytest.approx(result["budget"])
    for (name, ours), theirs in zip(weights(trainer).items(), student.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3, msg=name)


def test_loss_is_the_mean_over_completion_tokens_of_unpadded_rows_at_the_sampling_temperature(
    tmp_path: Path,
) -> None:
    # Catches slicing by the widest prompt, prompts in the loss, an off-by-one at the first completion token, an
    # erased stop token (this student pads with its end-of-sequence id), and a loss at another temperature.
    trainer = build(tmp_path, temperature=0.7)
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)])
    loss, _, count = trainer._compute_loss(trainer.model, inputs, None)

    student, teacher = zoo.load("student")[0], zoo.load("teacher")[0]
    stop = student.generation_config.eos_token_id
    total, tokens, stops = 0.0, 0, 0
    for row in range(8):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
        ids = torch.tensor([prompt + completion])
        pair = align(
            student(input_ids=ids).logits / 0.7,
            teacher(input_ids=ids).logits / 0.7,
            stop,
            teacher.generation_config.eos_token_id,
        )
        predicting = [logits[0, len(prompt) - 1 : -1] for logits in pair]
        mask = torch.ones(len(completion))
        total += topk_reverse_kl(*predicting, mask).item() * len(completion)
        tokens += len(completion)
        stops += completion[-1] == stop
        assert stop not in completion[:-1]
    assert stops > 0
    assert trainer.processing_class.pad_token_id == stop
    assert count.item() == tokens
    assert loss.item() == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("method", ["trb", "skd"])
@pytest.mark.parametrize("loss_top_k", [16, 0])
def test_the_samplers_teacher_pass_serves_the_loss(
    tmp_path: Path, method: str, loss_top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the teacher samples, the loss runs it no second time, and loss and gradient are the recomputed ones."""
    trainer = build(
        tmp_path,
        method=method,
        loss_top_k=loss_top_k,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        veto_strength=0.0,
    )
    read: list[Any] = []
    plain = taught.shared_hidden_states

    def counted(model: Any, *arguments: Any) -> Any:
        read.append(model)
        return plain(model, *arguments)

    monkeypatch.setattr(taught, "shared_hidden_states", counted)
    rows = [trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)]
    found: dict[bool, list[Any]] = {}
    for reused in (True, False):
        trainer._step, trainer._buffered_inputs = 0, None
        torch.manual_seed(0)  # the parent shuffles rows between the accumulation steps
        trainer._prepare_inputs(rows)
        if not reused:
            trainer._rollout.teacher_hidden = None
        read.clear()
        found[reused] = []
        for inputs in trainer._buffered_inputs:
            loss, _, _ = trainer._compute_loss(trainer.model, inputs, None)
            gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
            found[reused].append([loss.detach(), *gradients])
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        assert sum(model is teacher for model in read) == (0 if reused else 2)
    for ours, theirs in zip(found[True], found[False], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert found[True][0][0] != found[True][1][0]


def test_completions_are_those_of_the_public_sampler(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9]]
    drawn = trainer._generate_single_turn(prompts, None, {})
    assert drawn[0] != drawn[1]  # two rollouts of one prompt
    student, teacher = zoo.load("student")[0], zoo.load("teacher")[0]
    from trb.sampling import prompt_key, stream_seed

    for row, (prompt, index) in enumerate(zip(prompts, (0, 1, 0), strict=True)):
        alone = sample(
            student,
            teacher,
            [prompt],
            TrustRegionPolicy(0.5),
            max_new_tokens=24,
            eos_token_id=student.generation_config.eos_token_id,
            teacher_eos_token_id=teacher.generation_config.eos_token_id,
            seed=stream_seed(trainer.args.seed, "train", 0),
            prompt_keys=[prompt_key(prompt)],
            rollout_index=[index],
        )
        assert alone.completions == [drawn[row]]


def test_a_rendered_prompt_keeps_its_one_bos_token(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_completion_length=2)
    tokenizer = trainer.processing_class
    bos = tokenizer.bos_token = tokenizer.eos_token
    template = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    plain, rendered = ({"prompt": text, "answer": ""} for text in ("1+2", f"{bos}1+2"))
    inputs = trainer._prepare_inputs([plain, rendered] * 4)
    assert inputs["prompt_mask"].all()
    assert len({tuple(row) for row in inputs["prompt_ids"].tolist()}) == 1
    assert (inputs["prompt_ids"] == tokenizer.bos_token_id).sum() == 8


@pytest.mark.parametrize("positions", [512, 0], ids=["limited", "unlimited"])
@pytest.mark.parametrize("column", ["prompt", "teacher_prompt"])
def test_a_prompt_that_a_tokenizer_makes_nothing_of_is_named(tmp_path: Path, positions: int, column: str) -> None:
    """It would end the run at the step that draws it, which names no row of the data."""
    models = {name: zoo.load(name)[0] for name in zoo.NAMES}
    for model in models.values():
        model.config.max_position_embeddings = positions
    rows = [{"prompt": "1+2", "teacher_prompt": "1+2"} for _ in range(8)]
    rows[3][column] = "  "
    trainer = build(tmp_path, **models, train_rows=rows, max_completion_length=2)
    trainer.processing_class.backend_tokenizer.normalizer = Strip()
    whose = "" if column == "prompt" else "the teacher's prompt of "
    with pytest.raises(InputError, match=rf"^{whose}train_dataset\[3\] has no tokens.*1 of 8 rows"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_budget_falls_every_optimizer_step_and_the_teacher_leaves_the_sampler(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        max_steps=5,
        blend_warmup_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    trainer.train()
    assert logged(trainer, "kl_budget") == pytest.approx([0.5, 1 / 3, 1 / 6, 0, 0], abs=1e-4)
    assert [calls > 0 for calls in logged(trainer, "teacher_calls")] == [True, True, True, False, False]
    assert logged(trainer, "teacher_weight")[3:] == [0, 0]
    assert logged(trainer, "kl_student")[3:] == [0, 0]
    for name in (
        "kl_teacher",
        "teacher_log_prob",
        "teacher_entropy",
        "completion_length",
        "stop_rate",
        "reverse_kl",
    ):
        assert all(value is not None for value in logged(trainer, name)), name
    within = zip(
        logged(trainer, "sequence_kl")[:3],
        [row["trb/sequence_kl_bound"] for row in trainer.state.log_history if "trb/sequence_kl_bound" in row],
        strict=True,
    )
    assert all(0 < spent <= bound for spent, bound in within)


def test_each_prompt_is_rolled_out_num_generations_times(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_generations=2)
    order = list(trainer._get_train_sampler())[:8]
    assert order[0::2] == order[1::2]
    assert len(set(order)) == 4


@pytest.mark.parametrize(
    ("method", "at_start", "at_end"),
    [
        ("opd", StudentPolicy(), StudentPolicy()),
        *((name, StudentPolicy(), StudentPolicy()) for name in ("veto", "eopd", "tip", "tropd", "iw")),
        ("trb", TrustRegionPolicy(0.5), TrustRegionPolicy(0.0)),
        ("fixed", TrustRegionPolicy(0.5), TrustRegionPolicy(0.5)),
        ("skd", SKDPolicy(25, 0.6), SKDPolicy(25, 0.6)),
        ("temperature", TemperaturePolicy(0.9), TemperaturePolicy(1.0)),
        ("sft", TeacherPolicy(), StudentPolicy()),
    ],
)
def test_each_method_samples_from_its_policy_and_trains(
    tmp_path: Path, method: str, at_start: object, at_end: object
) -> None:
    short = {"max_steps": 2, "max_completion_length": 6}
    trainer = build(tmp_path, method=method, temperature_warmup_steps=1, sft_warmup_steps=1, **short)
    assert trainer.behavior.at(0) == at_start
    assert trainer.behavior.at(1000) == at_end
    before = weights(trainer)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_trb_with_budget_zero_is_plain_distillation_bit_for_bit(tmp_path: Path) -> None:
    plain = build(tmp_path / "opd", method="opd")
    plain.train()
    blended = build(tmp_path / "trb", method="trb", initial_kl_budget=0.0)
    blended.train()
    assert losses(plain) == losses(blended)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(blended).values(), strict=True))


def test_veto_changes_the_target_and_its_strength_falls_to_zero(tmp_path: Path) -> None:
    trainer = build(tmp_path, method="veto", veto_strength=0.8, max_steps=2)
    trainer.state.max_steps = 2  # what train() finds
    assert [trainer.target.at(step).strength for step in (0, 1, 2)] == pytest.approx([0.8, 0.4, 0.0])
    inputs = trainer._prepare_inputs([trainer.train_dataset[0]] * 8)
    with_veto, *_ = trainer._compute_loss(trainer.model, inputs, None)
    trainer.target = target_of(TRBConfig(str(tmp_path / "plain"), method="opd"))
    without, *_ = trainer._compute_loss(trainer.model, inputs, None)
    assert with_veto.item() < without.item()  # a target nearer the student


def test_the_divergence_of_another_law_than_the_students_is_not_the_students(tmp_path: Path) -> None:
    """At another temperature no teacher takes part in sampling: KL(behavior || teacher) is unknown, and not logged."""
    trainer = build(tmp_path, method="temperature", max_steps=3, temperature_warmup_steps=2, initial_temperature=0.5)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert ["trb/kl_teacher" in row for row in rows] == [False, False, True]
    assert rows[2]["trb/kl_teacher"] == rows[2]["trb/reverse_kl"]
    assert trainer.evaluate(Dataset.from_list(zoo.problems(4, seed=1, split="test")))["eval_trb/kl_teacher"] > 0


def test_supervised_warm_up_is_trls_sft_loss_on_teacher_completions(tmp_path: Path) -> None:
    trainer = build(tmp_path / "sft", method="sft", sft_warmup_steps=5)
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)])
    ours, *_ = trainer._compute_loss(trainer.model, inputs, None)

    rows = []
    for row in range(8):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
        ids = prompt + completion
        rows.append({"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * len(completion)})
    student, tokenizer = zoo.load("student")
    arguments = SFTConfig(
        str(tmp_path / "trl"), per_device_train_batch_size=8, bf16=False, gradient_checkpointing=False,
        report_to=[], dataloader_pin_memory=False, max_length=None, completion_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": False},
    )  # fmt: skip
    reference = SFTTrainer(student, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(reference.get_train_dataloader()))
    theirs = reference.compute_loss(reference.model, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def test_supervised_warm_up_trains_what_wraps_the_head(tmp_path: Path) -> None:
    """LoRA on the output head is in the loss, and gets its gradient."""
    student, _ = zoo.load("student")
    student.config.tie_word_embeddings = False  # PEFT warns of adapters on tied layers
    student = inject_adapter_in_model(LoraConfig(r=4, target_modules=["lm_head"]), student)
    adapter = {name: value for name, value in student.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(0)
    for value in adapter.values():
        torch.nn.init.normal_(value, std=0.5, generator=generator)
    trainer = build(tmp_path, student=student, method="sft", sft_warmup_steps=5)
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)])
    ours, *_ = trainer._compute_loss(trainer.model, inputs, None)

    total, tokens = torch.zeros(()), 0
    for row in range(8):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
        read = student(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(read, completion, reduction="sum")
        tokens += len(completion)
    assert ours.item() == pytest.approx(total.item() / tokens, rel=1e-4)
    learnt = [value for value in adapter.values() if value.requires_grad]
    assert len(learnt) == 2
    for one, other in zip(torch.autograd.grad(ours, learnt), torch.autograd.grad(total / tokens, learnt), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        assert other.abs().max() > 1e-3


def test_a_support_that_misses_most_of_the_student_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("trb"), "propagate", True)
    caplog.set_level(logging.WARNING)
    build(tmp_path / "sharp", max_steps=1).train()
    assert "loss_top_k" not in caplog.text
    student, _ = zoo.load("student")
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach() * 0.01)  # nearly uniform
    flat = build(tmp_path / "flat", student=student, max_steps=1, loss_top_k=4)
    flat.train()
    assert logged(flat, "support_mass")[0] < 0.2
    assert "set loss_top_k=0" in caplog.text.lower()


# ---- invariants of the loop ----


@pytest.mark.parametrize("loss", ["reverse_kl", "eopd", "tip", "tropd", "iw"])
def test_one_batch_of_eight_equals_eight_accumulated_batches_of_one(tmp_path: Path, loss: str) -> None:
    settings = {"loss": loss, "eopd_entropy": 0.2}
    whole = build(tmp_path / "whole", per_device_train_batch_size=8, gradient_accumulation_steps=1, **settings)
    whole.train()
    parts = build(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    parts.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=2e-4)
    for (name, one), other in zip(weights(whole).items(), weights(parts).values(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3, msg=name)


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "blend_warmup_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = build(tmp_path / "straight", **settings)
    straight.train()
    killed = build(tmp_path / "killed", callbacks=[Kill(5)], **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = build(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(resumed).values(), strict=True))

    def recorded(name: str, directory: str) -> list[tuple[int, Any]]:
        lines = (tmp_path / directory / name).read_text().splitlines()
        return [(row["step"], row.get("loss", row.get("completion"))) for row in map(json.loads, lines)]

    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert recorded(name, "killed") == recorded(name, "straight")


@pytest.mark.parametrize("killed_after", [5, 6], ids=["inside the second epoch", "where the second epoch begins"])
def test_a_run_resumed_in_a_later_epoch_has_that_epochs_prompts_and_averages(tmp_path: Path, killed_after: int) -> None:
    # 16 prompts, 4 a step: 4 steps an epoch. Averages are over 3 steps, checkpoints come every 4 or 5: inside a window.
    settings = {
        "train_rows": zoo.problems(16, seed=0, split="train"),
        "max_steps": 10,
        "num_generations": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "logging_steps": 3,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": killed_after - 1 if killed_after == 6 else 4,
    }
    straight, resumed = Completions(), Completions()
    whole = build(tmp_path / "straight", **settings)
    straight.watch(whole)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", callbacks=[Kill(killed_after)], **settings).train()
    rest = build(tmp_path / "killed", **settings)
    resumed.watch(rest)
    rest.train(resume_from_checkpoint=True)
    assert 0 < len(resumed.per_step) < len(straight.per_step) == 10
    assert straight.per_step[-len(resumed.per_step) :] == resumed.per_step
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "killed")
    ]
    for one, other in zip(*lines, strict=True):
        assert {key: one[key] for key in one if key != "step_time"} == {
            key: other[key] for key in other if key != "step_time"
        }
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(rest).values(), strict=True))


def test_only_adapters_change_under_lora(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = build(tmp_path, peft_config=adapter)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(before[name], value)}
    assert changed
    assert all("lora_" in name for name in changed)


def test_bf16_and_gradient_checkpointing_train_and_keep_the_sampler_cached(tmp_path: Path) -> None:
    trainer = build(tmp_path, bf16=True, gradient_checkpointing=True, method="opd")
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    # One pass for the prompts and one per drawn token, none longer: the KV cache was in use.
    longest = max(row["completions/max_length"] for row in trainer.state.log_history if "loss" in row)
    assert max(logged(trainer, "student_calls")) <= longest + 1


def test_transformers_own_parser_takes_the_configuration() -> None:
    """As scripts of TRL do: `TrlParser((TRBConfig,))`."""
    args, *_ = TrlParser((TRBConfig,)).parse_args_and_config(
        ["--output_dir", "unused", "--tools", "calculator", "--budget_schedule", "gap", "--report_to", "none"]
    )
    assert (args.tools, args.budget_schedule) == (["calculator"], "gap")


@pytest.mark.parametrize("method", ["opd", "trb"])
def test_mixed_precision_is_that_of_every_pass(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither loss nor sampler goes through the forward that Accelerate wraps; and they must agree."""
    monkeypatch.setenv("TRB_CHECK_READING", "0")  # whose passes are in float32, too
    trainer = build(tmp_path, bf16=True, method=method, max_steps=1)
    seen: dict[str, set[tuple[torch.dtype, bool]]] = {"student": set(), "teacher": set()}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):

        def record(_module: Any, _inputs: Any, output: torch.Tensor, name: str = name) -> None:
            seen[name].add((output.dtype, torch.is_grad_enabled()))

        trainer.accelerator.unwrap_model(model).model.layers[0].mlp.down_proj.register_forward_hook(record)
    trainer.train()
    assert seen["student"] == {(torch.bfloat16, True), (torch.bfloat16, False)}
    assert seen["teacher"] == {(torch.bfloat16, False)}
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


def test_dropout_is_off_while_training(tmp_path: Path) -> None:
    student = dropping_student()
    noisy = torch.nn.Dropout(0.9)
    layer = student.model.layers[0]
    layer.mlp = torch.nn.Sequential(layer.mlp, noisy)
    build(tmp_path, student=student)
    assert noisy.p == 0
    assert TRBConfig(str(tmp_path), bf16=False).disable_dropout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_a_student_without_dropout(tmp_path: Path, checkpointing: bool) -> None:
    """Also where the backward pass computes layers again. What is saved has the student's own number."""
    plain, _ = zoo.load("student")
    options: dict[str, Any] = {"max_steps": 1, "gradient_checkpointing": checkpointing, "method": "opd"}
    options |= {"optim": "sgd", "learning_rate": 1.0}  # weights then move as far as their gradients reach
    expected, found = (
        build(tmp_path / name, student=student, **options)
        for name, student in (("plain", plain), ("dropping", dropping_student()))
    )
    expected.train()
    found.train()
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    for name, weight in weights(found).items():  # by rounding alone: attention without a half of its keys is far off
        torch.testing.assert_close(weight, weights(expected)[name], rtol=0, atol=1e-4)
    found.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["attention_dropout"] == 0.5
    assert found.model.model.layers[0].self_attn.attention_dropout == 0.5


def loss_of_its_own(trainer: TRBTrainer) -> float:
    """What a subclass with a step of its own asks for: `compute_loss` in training mode, outside `training_step`."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    inputs = trainer._prepare_inputs(batch)
    torch.manual_seed(0)
    return trainer.compute_loss(trainer.model, inputs).item()


def test_a_loss_outside_a_step_is_that_of_a_student_without_dropout(tmp_path: Path) -> None:
    plain, dropping, drawn = (
        loss_of_its_own(build(tmp_path / name, student=student, method="opd", **options))
        for name, student, options in (
            ("plain", None, {}),
            ("dropping", dropping_student(), {}),
            ("drawn", dropping_student(), {"disable_dropout": False}),
        )
    )
    assert dropping == pytest.approx(plain, rel=1e-4) != pytest.approx(drawn, rel=1e-4)


def test_dropout_is_drawn_where_it_is_asked_for(tmp_path: Path) -> None:
    trainer = build(tmp_path / "drawn", student=dropping_student(), disable_dropout=False, max_steps=1)
    off = build(tmp_path / "off", student=dropping_student(), max_steps=1)
    trainer.train()
    off.train()
    assert losses(trainer) != losses(off)


class Hidden(torch.nn.Module):
    """Draws by a number that nobody can find."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(states, 0.3, self.training)


def test_a_student_that_goes_on_drawing_is_refused_by_name(tmp_path: Path) -> None:
    student, _ = zoo.load("student")
    layer = student.model.layers[0]
    layer.mlp = torch.nn.Sequential(layer.mlp, Hidden())
    with pytest.raises(InputError, match=r"qwen3 .*training mode .*disable_dropout=False"):
        build(tmp_path, student=student)
    build(tmp_path, student=student, disable_dropout=False)


def test_the_teacher_is_evaluated_without_its_dropout(tmp_path: Path) -> None:
    """It comes as its owner left it, here as it was trained."""
    teacher, _ = zoo.load("teacher")
    for layer in teacher.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.5))
    teacher.train()
    trainer = build(tmp_path, teacher=teacher, method="opd")
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)])
    found = [trainer._compute_loss(trainer.model, inputs, None)[0].item() for _ in range(2)]
    assert found[0] == found[1]
    plain = build(tmp_path / "plain", method="opd")
    assert plain._compute_loss(plain.model, inputs, None)[0].item() == pytest.approx(found[0], rel=1e-5)
    trainer.train()  # rollouts, recorded scores and the loss leave it so
    assert not any(module.training for module in teacher.modules())


def test_rewards_are_logged_and_never_trained_on(tmp_path: Path) -> None:
    calls = []

    def reward(texts: list[str], rows: Any) -> list[float]:
        calls.append((len(texts), [row["answer"] for row in rows]))
        return [1.0, 0.0, float("nan"), 0.5] * (len(texts) // 4)  # nan: a row without an answer

    with_reward = build(tmp_path / "a", reward_fn=reward)
    with_reward.train()
    without = build(tmp_path / "b")
    without.train()
    assert logged(with_reward, "reward") == [0.5, 0.5]
    assert calls[0][0] == len(calls[0][1]) == 8
    assert losses(with_reward) == losses(without)


@pytest.mark.parametrize("method", ["trb", "temperature", "sft"])
def test_vllm_takes_over_once_rollouts_are_the_students_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    trainer = build(tmp_path, method=method, blend_warmup_steps=1, temperature_warmup_steps=1, sft_warmup_steps=1)
    trainer.use_vllm = True
    handed_over = []
    monkeypatch.setattr(
        DistillationTrainer,
        "_generate_single_turn",
        lambda self, ids, *rest: handed_over.append(ids) or [[1]] * len(ids),
    )
    trainer._generate_single_turn([[5, 6]], None, {})
    assert not handed_over
    trainer.state.global_step = 1
    assert trainer._generate_single_turn([[5, 6]], None, {}) == [[1]]
    assert handed_over == [[[5, 6]]]


def test_evaluation_reports_the_loss_on_student_rollouts(tmp_path: Path) -> None:
    trainer = build(tmp_path, per_device_eval_batch_size=4)
    result = trainer.evaluate(Dataset.from_list(zoo.problems(4, seed=1, split="test")))
    assert result["eval_loss"] > 0
    assert result["eval_trb/teacher_calls"] == 0
    (line,) = (tmp_path / "held_out.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(result["eval_loss"])
    assert json.loads(line)["trb/teacher_log_prob"] < 0


def test_several_evaluation_sets_are_recorded_by_name(tmp_path: Path) -> None:
    """As transformers takes them, a dict; each is logged by itself, with numbers of the same names."""
    sets = {name: Dataset.from_list(zoo.problems(4, seed=seed, split="test")) for name, seed in (("a", 1), ("b_c", 2))}
    options: dict[str, Any] = {"eval_dataset": sets, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = build(tmp_path, per_device_eval_batch_size=4, **options)
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [(row["step"], row["set"]) for row in records] == [(1, "a"), (1, "b_c"), (2, "a"), (2, "b_c")]
    for row in records:
        (theirs,) = (
            entry[f"eval_{row['set']}_loss"]
            for entry in trainer.state.log_history
            if entry["step"] == row["step"] and f"eval_{row['set']}_loss" in entry
        )
        assert row["loss"] == pytest.approx(theirs) and row["trb/teacher_log_prob"] < 0


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_kl_budget": -0.1}, "-0.1"),
        ({"initial_kl_budget": float("nan")}, "nan"),
        ({"blend_warmup_steps": -1}, "-1"),
        ({"method": "tbr"}, "tbr"),
        ({"budget_schedule": "square"}, "square"),
        ({"sampler": "fast"}, "fast"),
        ({"max_completion_length": None}, "max_completion_length"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"num_generations": 0}, "num_generations"),
        ({"loss_top_k": -1}, "loss_top_k"),
        ({"skd_teacher_top_k": 0}, "teacher_top_k"),
        ({"initial_temperature": 0.0}, "initial_temperature must be positive and finite .*, got 0.0"),
        ({"initial_temperature": 1e31}, "initial_temperature must be positive and finite .*, got 1e.31"),
        (
            {"initial_kl_budget": -0.5, "budget_schedule": "gap"},
            "initial_kl_budget must be a non-negative number of nats, got -0.5",
        ),
        ({"veto_steps": -3}, "veto_steps must be at least 0, got -3"),
    ],
)
def test_a_bad_option_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


KNOBS = sorted(every_knob() - {"budget_schedule"})


@pytest.mark.parametrize("name", [*KNOBS, "temperature", "learning_rate", "max_steps", "seed"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_that_no_float_holds_is_refused_by_its_name(tmp_path: Path, name: str, sign: int) -> None:
    with pytest.raises(InputError, match=f"^{name} must be a number below 1e308, got an integer of 16,610 bits"):
        config(tmp_path, **{name: sign * 10**5000})


@pytest.mark.parametrize("value", [-1, -0.5, 0, math.nan, math.inf])
@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_that_is_refused_is_called_by_its_name(tmp_path: Path, name: str, value: float) -> None:
    """Whatever the parts that read it call it; and nothing that is no number of its kind passes."""
    options: dict[str, Any] = {"budget_schedule": "gap"} if name == "initial_kl_budget" else {}
    fits = value >= 0 and not (name.endswith(("_steps", "_top_k", "_horizon")) and value == math.inf)
    try:
        config(tmp_path, **options, **{name: value})
    except ValueError as error:
        assert re.search(rf"\b{name}\b.* got {re.escape(str(value))}\b", str(error)), error
    else:
        assert fits


def numeric() -> list[str]:
    """Every option that is a number, of whichever library, but for those that are refused whatever they are."""
    hints = typing.get_type_hints(TRBConfig)
    kinds = {name: {*typing.get_args(hint)} or {hint} for name, hint in hints.items()}
    found = [item.name for item in dataclasses.fields(TRBConfig) if kinds[item.name] & {int, float}]
    return sorted(set(found) - set(REFUSED) - {"local_rank"})  # which nothing reads


def test_every_number_is_looked_at() -> None:
    looked_at = {name for kind in numbers._KINDS for name in kind.names.split()}
    assert looked_at - NEWER_OPTIONS == set(numeric())


@pytest.mark.parametrize("value", [-1, 0, 2.5, math.nan, math.inf, "x", True, None, [1]], ids=str)
def test_no_number_of_any_library_passes_that_is_none_of_its_kind(tmp_path: Path, value: Any) -> None:
    """All options are tried with each value, and are refused by name or are what they can be."""
    hints = typing.get_type_hints(TRBConfig)
    for name in numeric():
        kinds = {*typing.get_args(hints[name])} or {hints[name]}
        try:
            config(tmp_path, **{name: value})
        except InputError as error:
            assert re.search(rf"\b{name}\b.*{re.escape(str(value))}", str(error)), error
        else:
            whole = float not in kinds
            assert isinstance(value, int | float) or value is None, (name, value)
            assert not isinstance(value, bool) and not (whole and isinstance(value, float)), (name, value)
            assert value is None or not math.isnan(value), name
            assert value is not None or type(None) in kinds or name == "max_grad_norm", name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be at least 0 and finite, got -1.0"),
        ({"adam_beta1": 2.0}, "adam_beta1 must be at least 0 and below 1, got 2.0"),
        (
            {"initial_kl_budget": "0.1"},
            "initial_kl_budget must be a number, and a non-negative number of nats, got '0.1'",
        ),
        ({"blend_warmup_steps": 2.5}, "blend_warmup_steps must be a whole number, and at least 0, got 2.5"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        (
            {"logging_steps": 2.5},
            "logging_steps must be a positive number of steps, or a share of all below 1, got 2.5",
        ),
        ({"pad_to_multiple_of": "x"}, "pad_to_multiple_of must be a whole number, and at least 1, got 'x'"),
    ],
)
def test_a_number_that_a_library_would_refuse_late_or_namelessly_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"save_steps": 0.5, "logging_steps": 0.1, "eval_steps": 2.0, "warmup_steps": 0.1}, {}),
        ({"save_total_limit": -1, "max_steps": -1, "save_steps": 0}, {}),
        ({"pad_to_multiple_of": "8"}, {"pad_to_multiple_of": 8}),
        ({"pad_to_multiple_of": "none"}, {"pad_to_multiple_of": None}),
        ({"learning_rate": np.float32(1e-3), "seed": np.int64(3), "max_steps": np.int64(4)}, {}),
        ({"initial_kl_budget": math.inf, "max_grad_norm": math.inf}, {}),
    ],
)
def test_numbers_that_the_libraries_take_are_taken(
    tmp_path: Path, changes: dict[str, Any], kept: dict[str, Any]
) -> None:
    """And kept as they are, unless a library reads them out of text."""
    args = config(tmp_path, **changes)
    assert {name: getattr(args, name) for name in changes} == changes | kept


def test_an_option_that_may_be_none_trains_as_none(tmp_path: Path) -> None:
    """Whatever the annotations say: a run of one step with all of them, and gradients that nothing clips."""
    defaults = config(tmp_path)
    off: dict[str, Any] = {}
    for name in numeric():
        try:
            config(tmp_path, **{name: None})
        except InputError:
            continue
        if getattr(defaults, name) is not None:
            off[name] = None
    assert "max_grad_norm" in off
    clipped = {"max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 1, "max_completion_length": 4}
    trainers = []
    for options in (off, off | {"max_grad_norm": math.inf}):
        trainers.append(build(tmp_path, **clipped, **options))
        trainers[-1].train()
    assert losses(trainers[0]) == losses(trainers[1])
    both = zip(weights(trainers[0]).values(), weights(trainers[1]).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


def test_a_thin_support_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured: `warning_once` goes by the text."""
    said: list[str] = []
    monkeypatch.setattr(logged_module.logger, "warning_once", said.append)
    trainer = build(tmp_path)
    for share in (0.6, 0.3, 0.31, 0.4):
        trainer._add_token_metrics(TokenMetrics(*(torch.full((4,), share) for _ in dataclasses.fields(TokenMetrics))))
    assert len(said) == 3 and len(set(said)) == 1
    assert "hold less than 50% of its probability" in said[0]


# Every option of the installed TRL and transformers, by what it does to the sampled law and to the loss.
REFUSED = {
    "auto_find_batch_size": True,
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "beta": 0.5,
    "cache_implementation": "static",
    "data_seed": 3,
    "dataloader_in_order": False,
    "ds3_gather_for_generation": False,
    "enable_jit_checkpoint": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "generation_kwargs": {"num_beams": 2},
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "lengths",
    "min_p": 0.1,
    "neftune_noise_alpha": 5.0,
    "repetition_penalty": 1.1,
    "top_k": 50,
    "top_p": 0.9,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "train_sampling_strategy": "group_by_length",
    "vllm_structured_outputs_regex": "[0-9]+",
}
# Of these the law or the loss follows: prompts and their order, lengths, weights as they were loaded, arithmetic.
HONOURED = """
    bf16 bf16_full_eval chat_template_kwargs disable_dropout fp16 fp16_full_eval full_determinism
    gradient_accumulation_steps max_completion_length max_tool_calling_iterations model_init_kwargs num_train_epochs
    max_steps
    per_device_eval_batch_size per_device_train_batch_size seed shuffle_dataset teacher_model_init_kwargs
    teacher_model_name_or_path teacher_model_revision temperature tf32 trust_remote_code
    use_liger_kernel liger_kernel_config vllm_max_model_length ignore_data_skip
"""
# The optimizer's step from a gradient that is the same.
OPTIMISER = """
    adam_beta1 adam_beta2 adam_epsilon learning_rate lr_scheduler_kwargs lr_scheduler_type max_grad_norm optim
    optim_args optim_target_modules warmup_steps weight_decay
"""
# Where and how it is computed, logged and saved; or read by scripts, and by nothing here.
HARMLESS = """
    activation_checkpointing activation_checkpointing_kwargs
    accelerator_config dataloader_drop_last dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval
    do_predict do_train eval_delay eval_on_start eval_steps eval_strategy fsdp fsdp_config
    gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token include_num_input_tokens_seen load_best_model_at_end
    local_rank log_completions log_level log_level_replica log_on_each_node log_unique_prompts logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy metric_for_best_model num_completions_to_print output_dir
    pad_to_multiple_of parallelism_config prediction_loss_only project push_to_hub remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model
    save_steps save_strategy save_total_limit skip_memory_metrics
    torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id use_cache use_cpu use_vllm
    vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_mode vllm_model_impl
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_tensor_parallel_size
"""


@pytest.mark.parametrize("value", [True, False])
def test_recomputing_activations_goes_by_either_name_without_a_warning(tmp_path: Path, value: bool) -> None:
    with warnings.catch_warnings(action="error"):
        args = config(tmp_path, gradient_checkpointing=value)
        assert args.gradient_checkpointing is value
        assert getattr(args, "activation_checkpointing", value) is value
        if {item.name for item in dataclasses.fields(TRBConfig)} >= NEWER_OPTIONS:
            newer = config(tmp_path, gradient_checkpointing=not value, activation_checkpointing=value)
            assert newer.gradient_checkpointing is newer.activation_checkpointing is value


def test_every_option_of_the_libraries_is_classified() -> None:
    """A new one must be looked at: does it change the law or the loss, and does this trainer do what it says?"""
    groups = [[*REFUSED], HONOURED.split(), OPTIMISER.split(), HARMLESS.split()]
    classified = [name for group in groups for name in group]
    assert len(classified) == len(set(classified))
    assert set(classified) == {item.name for item in dataclasses.fields(DistillationConfig)} | NEWER_OPTIONS
    assert set(REFUSED) == set(config_module._UNSUPPORTED)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_changes_the_law_or_the_loss_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=.* is not supported .*; leave it at"):
        config(tmp_path, **{name: REFUSED[name]})


@pytest.mark.parametrize(
    "changes", [{"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {"teacher_model_revision": "v2"}]
)
def test_how_to_load_a_teacher_that_is_loaded_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*loaded already"):
        build(tmp_path, **changes)


def mixture(**changes: Any) -> MixtralForCausalLM:
    rows = zoo.load("student")[0].config.vocab_size
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 1, "bos_token_id": None}
    return MixtralForCausalLM(MixtralConfig(vocab_size=rows, **sizes, **experts, **changes))


def test_a_router_loss_is_refused_by_name_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mixtral: .*router_aux_loss_coef=0\.02.*output_router_logits=False"):
        build(tmp_path, student=mixture(output_router_logits=True, router_aux_loss_coef=0.02))
    build(tmp_path, student=mixture(output_router_logits=False, router_aux_loss_coef=0.02))
    build(tmp_path, student=mixture(output_router_logits=True, router_aux_loss_coef=0.0))


def test_a_batch_that_rollouts_do_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_generations=3"):
        build(tmp_path, num_generations=3)


def test_a_teacher_without_rows_for_ids_in_use_is_refused(tmp_path: Path) -> None:
    teacher, _ = zoo.load("teacher")
    teacher.resize_token_embeddings(12)
    with pytest.raises(ValueError, match="teacher's head has 12 rows"):
        build(tmp_path, teacher=teacher)


def test_a_tokenizer_without_a_pad_token_trains_alike(tmp_path: Path) -> None:
    student, tokenizer = zoo.load("student")
    teacher, other = zoo.load("teacher")
    tokenizer.pad_token = other.pad_token = None
    trainer = TRBTrainer(
        student,
        teacher,
        config(tmp_path / "without", max_completion_length=8),
        train_dataset=Dataset.from_list(zoo.problems(64, seed=0, split="train")),
        processing_class=tokenizer,
        teacher_processing_class=other,
    )
    trainer.train()
    usual = build(tmp_path / "with", max_completion_length=8)
    usual.train()
    assert losses(trainer) == losses(usual)


def test_a_grader_that_fails_costs_its_rewards_once_it_has_worked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def reward(texts: list[str], rows: Any) -> list[float]:
        calls.append(len(texts))
        if len(calls) == 2:
            raise RuntimeError("the answer-checking worker did not start")
        return [0.25] * len(texts)

    trainer = build(tmp_path / "later", reward_fn=reward, max_steps=3, max_completion_length=4)
    trainer.train()
    assert [row.get("trb/reward") for row in trainer.state.log_history if "loss" in row] == [0.25, None, 0.25]
    assert "no rewards, as their function failed: RuntimeError('the answer-checking worker" in caplog.text

    def broken(texts: list[str], rows: Any) -> list[float]:
        raise RuntimeError("misspelt")

    with pytest.raises(RuntimeError, match="misspelt"):
        build(tmp_path / "at once", reward_fn=broken, max_steps=1, max_completion_length=4).train()


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, tuple], ids=["array", "tensor", "tuple"])
def test_rewards_may_be_what_functions_of_arrays_give(tmp_path: Path, kind: Any) -> None:
    rewards = kind([1.0, 0.0, 0.5, 0.5])
    trainer = build(tmp_path, reward_fn=lambda texts, rows: rewards, per_device_train_batch_size=4, max_steps=1)
    trainer.train()
    assert logged(trainer, "reward") == [0.5]
    first, *_ = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert json.loads(first)["reward"] == 1.0


def test_a_completion_that_no_reward_is_known_of_may_have_none(tmp_path: Path) -> None:
    trainer = build(tmp_path, reward_fn=lambda texts, rows: [1.0, *[None] * 7], max_steps=1)  # type: ignore[list-item]
    trainer.train()
    assert logged(trainer, "reward") == [1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "1 rewards for 8 completions"),
        (None, "reward_fn gave None"),
        (0.5, "reward_fn gave 0.5"),
        (["good"] * 8, "reward_fn gave .*'good'"),
    ],
)
def test_rewards_that_are_none_are_the_functions_fault(
    tmp_path: Path, given: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At first they end the run; of a function that has worked they cost its numbers."""
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "at once", reward_fn=lambda texts, rows: given, max_steps=1).train()
    answers = iter([[0.25] * 8, given])
    trainer = build(tmp_path / "later", reward_fn=lambda texts, rows: next(answers), max_steps=2)
    trainer.train()
    assert [row.get("trb/reward") for row in trainer.state.log_history if "loss" in row] == [0.25, None]
    assert re.search(f"no rewards, as their function failed: .*{message}", caplog.text)


class DeadService(TensorBoardCallback):
    """A logging service that is up while the run starts, and then not."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append("begin")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.calls.append("log")
        raise ConnectionError("no route to host")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append("end")


def test_a_logging_service_that_fails_is_left_alone_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = DeadService()
    trainer = build(tmp_path / "dead", callbacks=[service], max_steps=5, max_completion_length=4)
    trainer.train()
    assert service.calls == ["begin", "log", "log", "log"]
    assert caplog.text.count("DeadService failed in on_log") == 3
    assert caplog.text.count("is left alone from now on") == 1
    assert trainer.state.global_step == 5
    usual = build(tmp_path / "usual", max_steps=5, max_completion_length=4)
    usual.train()
    assert losses(trainer) == losses(usual)
    assert len((tmp_path / "dead" / "metrics.jsonl").read_text().splitlines()) == 5


def test_other_callbacks_still_end_a_run_when_they_fail(tmp_path: Path) -> None:
    class Mine(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(tmp_path, callbacks=[Mine()], max_steps=1, max_completion_length=4).train()


def test_different_tokenizers_are_refused(tmp_path: Path) -> None:
    student, tokenizer = zoo.load("student")
    teacher, other = zoo.load("teacher")
    moved = other.get_vocab()
    first, second = sorted(moved, key=moved.get)[-2:]  # type: ignore[arg-type]
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(ValueError, match="different tokenizers"):
        TRBTrainer(
            student,
            teacher,
            config(tmp_path),
            train_dataset=Dataset.from_list(zoo.problems(8, seed=0, split="train")),
            processing_class=tokenizer,
            teacher_processing_class=swapped,
        )


def test_nothing_is_sent_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: sent.append(args))
    build(tmp_path)
    assert not sent
    assert os.environ["HF_HUB_OFFLINE"] == "1"
