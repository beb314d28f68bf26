"""Several teachers: whose each row is, what is drawn and learnt from it, what is refused, and where the weights are."""

from collections.abc import Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import Completions, Kill, config, logged, losses, weights
from torch import nn
from transformers import TrainerCallback

from trb import TRBTrainer, zoo
from trb.errors import InputError
from trb.losses import topk_reverse_kl
from trb.training import teachers as module
from trb.training.resume import ChangedRunError

SHORT = {"max_completion_length": 8, "num_generations": 2, "per_device_train_batch_size": 4}
NAMES = ("chains", "told")
SPECS = {"chains": "teacher", "told": "told"}
PASSED_ON = ("callbacks", "eval_dataset", "peft_config", "processing_class", "teacher_processing_class")


def rows(count: int = 16, **columns: Any) -> list[dict[str, Any]]:
    """Problems, of two in three of which the second teacher is to teach."""
    found = zoo.problems(count, seed=0, split="train")
    return [{**row, "subject": NAMES[bool(number % 3)], **columns} for number, row in enumerate(found)]


def build(directory: Path, *, data: Sequence[dict[str, Any]] | None = None, **changes: Any) -> TRBTrainer:
    """A trainer with the embedded pair's teacher and another model of its tokenizer, of another size."""
    passed_on = {name: changes.pop(name) for name in PASSED_ON if name in changes}
    models = changes.pop("teachers", None) or {name: zoo.load(spec)[0] for name, spec in SPECS.items()}
    student, tokenizer = zoo.load("student")
    options = {"teacher_column": "subject", **SHORT, **changes}
    trainer = TRBTrainer(
        student,
        models,
        config(directory, **options),
        train_dataset=Dataset.from_list([*(data or rows())]),
        **{"processing_class": tokenizer, **passed_on},
    )
    trainer.model.train()
    return trainer


def whose(trainer: TRBTrainer, prompt: list[int], data: Sequence[dict[str, Any]]) -> str:
    text = trainer.processing_class.decode(prompt)
    return next(row["subject"] for row in data if f"\n{row['prompt'][0]['content']}<" in text)


def real(inputs: dict[str, Any], name: str, row: int) -> list[int]:
    return inputs[f"{name}_ids"][row][inputs[f"{name}_mask"][row].bool()].tolist()


# ---- what is drawn ----

BEHAVIORS: dict[str, dict[str, Any]] = {
    "trb": {"initial_kl_budget": 9.0},
    "blocks": {"initial_kl_budget": 0.3, "block_size": 3, "rollout_batch_size": 2},
    "lockstep": {"initial_kl_budget": 0.3, "sampler": "lockstep"},
    "share": {"behavior_share": 0.5},
    "prefix": {"method": "prefix"},
}


@pytest.mark.parametrize("name", BEHAVIORS)
def test_rows_are_drawn_as_they_are_where_all_have_their_teacher(tmp_path: Path, name: str) -> None:
    """Also where teachers read prompts of their own."""
    told = [{"role": "user", "content": "1+2"}]
    data = [{**row, "teacher_prompt": [*row["prompt"], *told]} for row in rows()]
    drawn = {}
    for which in ("mixed", *NAMES):
        own = data if which == "mixed" else [{**row, "subject": which} for row in data]
        trainer = build(tmp_path / which, data=own, **BEHAVIORS[name])
        seen = Completions()
        seen.watch(trainer)
        trainer._prepare_inputs([own[index] for index in (0, 0, 1, 1, 3, 3, 5, 5)])
        (drawn[which],) = seen.per_step
    assert drawn["mixed"] == [drawn[data[index]["subject"]][row] for row, index in enumerate((0, 0, 1, 1, 3, 3, 5, 5))]
    assert drawn["mixed"] not in (drawn["chains"], drawn["told"])


# ---- what is learnt ----


@pytest.mark.parametrize(("method", "offload"), [("trb", True), ("opd", False)])
def test_the_loss_is_the_token_mean_over_rows_each_with_its_own_teacher(
    tmp_path: Path, method: str, offload: bool
) -> None:
    """With states that the sampler kept and without; row by row in plain passes, without padding."""
    data = rows()
    trainer = build(
        tmp_path, data=data, method=method, gradient_accumulation_steps=2, teacher_offload=offload, temperature=0.7
    )
    trainer._prepare_inputs([data[index] for index in (0, 0, 1, 1, 3, 3, 5, 5)])
    assert (trainer._rollout.teacher_hidden is not None) == (method == "trb")
    models = {name: zoo.load(spec)[0] for name, spec in SPECS.items()}
    student, vocabulary = zoo.load("student")[0], trainer.vocabulary
    seen: list[str] = []
    for inputs in trainer._buffered_inputs:
        loss, _, count = trainer._compute_loss(trainer.model, inputs, None)
        total = 0.0
        for row in range(4):
            prompt, completion = real(inputs, "prompt", row), real(inputs, "completion", row)
            seen.append(whose(trainer, prompt, data))
            logits = []
            for model in (student, models[seen[-1]]):
                whole = model(input_ids=torch.tensor([prompt + completion])).logits[0]
                logits.append(vocabulary.log_probs(whole[len(prompt) - 1 : -1], 0.7))
            mask = torch.ones(len(completion))
            total += topk_reverse_kl(logits[0], logits[1], mask).item() * len(completion)
        assert loss.item() == pytest.approx(total / count.item(), rel=1e-4)
    assert sorted(seen) == ["chains"] * 4 + ["told"] * 4


def test_gradients_are_those_of_both_parts(tmp_path: Path) -> None:
    data = rows()
    found = {}
    for which, picked in (("mixed", (0, 0, 1, 1)), ("chains", (0, 0)), ("told", (1, 1))):
        trainer = build(tmp_path / which, data=data, method="opd", per_device_train_batch_size=len(picked))
        inputs = trainer._prepare_inputs([data[index] for index in picked])
        loss, _, count = trainer._compute_loss(trainer.model, inputs, None)
        (loss * count).backward()
        found[which] = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    for name, gradient in found["mixed"].items():
        assert torch.allclose(gradient, found["chains"][name] + found["told"][name], rtol=1e-3, atol=1e-4)


def test_each_teacher_has_numbers_of_its_own(tmp_path: Path) -> None:
    held_out = Dataset.from_list([*rows(6)])
    trainer = build(tmp_path, eval_dataset=held_out, max_steps=2, recorded_scores_every=1, remove_unused_columns=True)
    trainer.train()
    shares = [logged(trainer, f"teacher_share/{name}") for name in NAMES]
    assert [sum(pair) for pair in zip(*shares, strict=True)] == [1.0, 1.0]
    both = [row for row in trainer.state.log_history if all(f"trb/teacher_reverse_kl/{name}" in row for name in NAMES)]
    assert both and all(0 < row[f"trb/teacher_accept_rate/{name}"] <= 1 for row in both for name in NAMES)
    low, high = sorted(both[0][f"trb/teacher_reverse_kl/{name}"] for name in NAMES)
    assert low < both[0]["trb/reverse_kl"] < high
    measured = trainer.evaluate()
    assert all(measured[f"eval_trb/teacher_reverse_kl/{name}"] > 0 for name in NAMES)
    card = trainer.model_card()
    assert "| teacher chains | zoo:teacher" in card and "| teacher told | zoo:told" in card


def test_a_killed_run_resumes_to_the_same_numbers_and_not_with_other_teachers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = build(tmp_path / "straight", **settings)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", callbacks=[Kill(3)], **settings).train()
    resumed = build(tmp_path / "killed", teacher_offload=True, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(resumed).values(), strict=True))
    other = rows()
    other[3]["subject"] = "told"
    models = {name: zoo.load(spec)[0] for name, spec in SPECS.items()}
    renamed = [{**row, "teacher_id": row["subject"]} for row in rows()]
    three = {**models, "none": zoo.load("student")[0]}
    for changes, complaint in (
        ({"data": other}, r"train_dataset\.teachers"),
        ({"teachers": dict(zip(NAMES, reversed(models.values()), strict=True))}, r"teachers\.chains\.weights"),
        ({"teachers": three}, r"teachers: "),
        ({"data": renamed, "teacher_column": None}, "teacher_column"),
    ):
        with pytest.raises(ChangedRunError, match=complaint):
            build(tmp_path / "killed", **{**settings, **changes}).train(resume_from_checkpoint=True)


def test_teachers_on_the_students_weights_are_those_of_copies(tmp_path: Path) -> None:
    """One of two, which reads the student's base, is what a copy of that base would be."""
    runs = {}
    for name, first in (("base", "base"), ("copy", zoo.load("student")[0])):
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        models = {"chains": first, "told": zoo.load("told")[0]}
        trainer = build(tmp_path / name, teachers=models, peft_config=lora, max_steps=3, learning_rate=1e-2)
        trainer.train()
        runs[name] = losses(trainer)
    assert runs["base"] == pytest.approx(runs["copy"], rel=1e-5)


# ---- where the weights are ----


class Watch(TrainerCallback):
    """Records which modules are brought to the accelerator, and that none is there when the optimizer steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[nn.Module]] = [[]]
        self.inside: list[nn.Module] = []
        plain = module.present

        @contextmanager
        def watched(part: nn.Module, device: torch.device) -> Any:
            with plain(part, device):
                self.inside.append(part)
                self.steps[-1].append(part)
                yield
                assert self.inside.pop() is part

        monkeypatch.setattr(module, "present", watched)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert not self.inside
        self.steps.append([])


@pytest.mark.parametrize("method", ["trb", "opd"])
def test_each_teacher_comes_once_a_step_and_leaves(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it samples, or later while it scores; in the loss its head alone comes. The numbers are the same."""
    runs: dict[bool, list[float]] = {}
    for offload in (True, False):
        watch = Watch(monkeypatch)
        trainer = build(
            tmp_path / str(offload),
            method=method,
            teacher_offload=offload,
            max_steps=2,
            gradient_accumulation_steps=4,
            recorded_scores_every=0,
            callbacks=[watch],
        )
        trainer.train()
        runs[offload] = losses(trainer)
        if offload:
            models = [each.model for each in trainer.teachers]
            heads = [each.head.projection for each in trainer.teachers]
            for brought in watch.steps[:2]:
                whole = [part for part in brought if part in models]
                # Once, and what lies inside that visit; never one teacher while the other is there.
                visits = [part for before, part in pairwise([None, *whole]) if part is not before]
                assert sorted(map(id, visits)) == sorted(map(id, models))
                assert {part for part in brought if part not in models} == set(heads)
        else:
            assert watch.steps == [[], [], []]
    assert runs[True] == pytest.approx(runs[False], rel=1e-5)


# ---- what is refused before a model is loaded ----


def with_row(number: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**row, **(changes if place == number else {})} for place, row in enumerate(rows(8))]


WITHOUT = [{name: row[name] for name in ("prompt", "answer")} for row in rows(8)]
NOWHERE = dict.fromkeys(NAMES, "nowhere/at-all")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": with_row(3, subject="tolt")}, r"train_dataset\[3\] has 'tolt' .*chains, told; did you mean 'told'\?"),
    ({"data": with_row(2, subject=None)}, r"train_dataset\[2\] has nothing in its column 'subject'"),
    ({"data": with_row(2, subject="")}, r"train_dataset\[2\] has nothing in its column 'subject'"),
    ({"data": WITHOUT}, "train_dataset has no column 'subject', which says who teaches a row"),
    ({"teacher_column": "subjekt"}, "no column 'subjekt'.*did you mean 'subject'"),
    ({"teacher_column": None}, "train_dataset has no column 'teacher_id'"),
    ({"teacher_column": ""}, "teacher_column is empty"),
    ({"eval_dataset": Dataset.from_list(with_row(1, subject="x"))}, r"eval_dataset\[1\] has 'x'"),
    ({"teachers": {"": "zoo:teacher"}}, "teacher called ''"),
    ({"teachers": {1: "zoo:teacher"}}, "teacher called 1"),
    ({"teacher_sharded": True}, "set teacher_offload"),
    ({"teacher_sharded": True, "teacher_offload": True}, "two places for the teacher"),
    ({"teacher_model_revision": "main"}, "is for one teacher, and there are chains, told"),
    ({"teacher_model_name_or_path": "zoo:teacher"}, "are two teachers"),
    ({"use_vllm": True, "vllm_mode": "colocate"}, "vLLM blends with one: set vllm_blended=False"),
    ({"teacher_processing_class": {"tolt": None}}, "tokenizer for 'tolt'.*did you mean 'told'"),
    ({"teacher_processing_class": {"told": 3}}, "teacher_processing_class is a int and no tokenizer"),
    ({"teachers": {**NOWHERE, "chains": "base"}}, "teacher 'chains': the teacher stands on the student's weights"),
]


@pytest.mark.parametrize(("changes", "complaint"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_routed_is_refused_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        build(tmp_path, **{"teachers": NOWHERE, **changes})


def test_a_teacher_of_another_tokenizer_is_named(tmp_path: Path) -> None:
    _, tokenizer = zoo.load("teacher")
    _, other = zoo.load("told")
    other.add_tokens(["more"])
    strange = zoo.load("told")[1]
    strange.backend_tokenizer.model = type(strange.backend_tokenizer.model)(
        {token: len(strange) - 1 - place for token, place in strange.get_vocab().items()}, unk_token="<unk>"
    )
    tokenizers = {"chains": tokenizer, "told": strange}
    with pytest.raises(InputError, match="teacher 'told': different tokenizers"):
        build(tmp_path, teacher_processing_class=tokenizers)
    small = zoo.load("told")[0]
    small.resize_token_embeddings(40)
    with pytest.raises(InputError, match="teacher 'told': the teacher's head has 40 rows"):
        build(tmp_path, teachers={"chains": zoo.load("teacher")[0], "told": small})
    build(tmp_path, teacher_processing_class={"chains": tokenizer, "told": other})  # tokens that only it knows


def test_one_teacher_takes_no_routes(tmp_path: Path) -> None:
    for changes, complaint in (
        ({"teachers": zoo.load("teacher")[0]}, "teacher_column='subject' chooses between teachers"),
        ({"teachers": "base", "teacher_column": None, "teacher_offload": True}, "stands on the student's weights"),
        ({"teachers": zoo.load("teacher")[0], "teacher_column": None, "teacher_processing_class": {}}, "one teacher"),
    ):
        with pytest.raises(InputError, match=complaint):
            build(tmp_path, **changes)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="teacher_offload=True does nothing"):
        build(tmp_path, teachers="base", teacher_column=None, teacher_offload=True, peft_config=lora)


def test_prompts_are_measured_against_their_own_teacher_and_idle_teachers_are_doubted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = rows(8)
    data[3] = {**data[3], "prompt": [{"role": "user", "content": "1+" * 40 + "1"}]}
    short = {"chains": zoo.load("teacher")[0], "told": zoo.load("told")[0]}
    short["told"].config.max_position_embeddings = 64
    build(tmp_path, teachers=short, data=data).check_prompts()
    data[3]["subject"] = "told"
    with pytest.raises(InputError, match=r"train_dataset\[3\] has .* positions of the teacher 'told'"):
        build(tmp_path, teachers=short, data=data).check_prompts()
    idle = [{**row, "subject": "chains"} for row in rows(8)]
    build(tmp_path, data=idle).check_prompts()
    assert "no row of train_dataset is of teacher 'told'" in caplog.text
