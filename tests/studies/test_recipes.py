"""The recipes of the package: each loads, no key of it is ignored, and the paper's values are the paper's."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers.optimization import get_scheduler

from trb import zoo
from trb.safety.templates import PLAIN_TEMPLATE
from trb.studies import material, run, scores
from trb.studies.keys import RunConfig
from trb.studies.recipe import Recipe, load_recipe, make_recipe
from trb.studies.shipped import RECIPES
from trb.studies.study import load_study
from trb.studies.yaml_files import ConfigError
from trb.tasks.evaluation import EvalResult
from trb.tasks.prompts import MATH_SYSTEM_PROMPT
from trb.training.config import TRBConfig
from trb.training.methods import BUDGET_SCHEDULES, METHODS, every_knob

# accelerate/ holds launcher settings and studies/ studies, which are no recipes.
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name not in ("accelerate", "studies"))
STUDIES = sorted((RECIPES / "studies").glob("*.yaml"))
RELATIVES = ("eopd", "tip", "tropd", "iw")  # other papers', which say nothing of a grid
BASELINES = {path.stem: path for path in (RECIPES / "baselines").glob("*.yaml")}


def named(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_recipe_loads_and_says_what_it_is_for(path: Path) -> None:
    recipe = load_recipe(path)
    for variant in (recipe, *(recipe.for_method(name) for name in recipe.run.methods)):
        assert isinstance(variant.training_config("unused"), TRBConfig)
    text = path.read_text()
    head = text[: text.index("\n\n")]
    assert head.startswith("# ")
    assert f"--config {named(path)}" in head
    assert any(word in head for word in ("paper", "arXiv")), "the source of the values"


@pytest.mark.parametrize("path", STUDIES, ids=named)
def test_every_study_loads_and_says_how_to_run_it(path: Path) -> None:
    study = load_study(path)
    text = path.read_text()
    assert f"--config {named(path)}" in text[: text.index("\n\n")]
    if path.stem == "self-setting":
        own = {"sequence", "sequence-linear", "sequence-linear-veto", "gap", "gap-veto", "geometric", "share"}
        own.add("teacher-first")
        assert set(study.methods) == {"opd", "trb", "fixed", "veto"} | own
    elif path.stem in ("code", "dialogue"):  # does the order hold in another domain?
        assert set(study.methods) == {"opd", "trb", "sequence-linear", "veto"}
    else:
        assert set(study.methods) == {"opd", "trb", "fixed", "skd", "temperature", "sft", "veto"}  # the paper's
    assert len(study.seeds.test) >= 20 or "fewer" in text


def test_there_is_a_recipe_for_every_purpose() -> None:
    assert {named(path) for path in FILES} >= {
        "quickstart",
        "smollm2",
        "qwen3-1.7b-from-8b",
        "qwen3-0.6b-from-4b",
        "self-distillation",
        "qwen3-1.7b-self",
        "several-teachers",
    }
    assert BASELINES.keys() == METHODS.keys()
    assert load_recipe("quickstart").run.methods.keys() == {"opd", "trb"}


# ---- the paper's values ----

# Typed from the protocol (paper, section 6), not from the recipes.
PAPER = {
    "train_data": "open-thoughts/OpenThoughts3-1.2M",
    "train_limit": 25600,
    "num_train_epochs": 1.0,
    "max_prompt_length": 1024,
    "max_completion_length": 7168,
    "temperature": 1.0,
    "prompts_per_step": 64,
    "num_generations": 4,
    "loss_top_k": 16,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-5,
    "warmup_steps": 15,
    "bf16": True,
    "method": "trb",
    "budget_schedule": "linear",
    "eval_every": 20,
    "eval_temperature": 1.0,
    "eval_max_new_tokens": 8192,
}
PAIRS = {
    "qwen3-1.7b-from-8b": (
        "Qwen/Qwen3-1.7B-Base",
        "Qwen/Qwen3-8B",
        {"math500": 64, "olympiadbench": 64, "amc": 512, "aime24": 512, "aime25": 512},
    ),
    "qwen3-0.6b-from-4b": (
        "Qwen/Qwen3-0.6B-Base",
        "Qwen/Qwen3-4B",
        {"gsm8k": 32, "math500": 64, "olympiadbench": 64, "amc": 512},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_paper_pairs_have_the_values_of_the_paper(name: str) -> None:
    student, teacher, suites = PAIRS[name]
    recipe = load_recipe(name)
    values = recipe.resolved()
    assert {key: values[key] for key in PAPER} == PAPER
    assert (values["student"], values["teacher"]) == (student, teacher)
    assert values["eval_data"] == list(suites)
    assert values["eval_samples"] == suites
    assert values["eval_limit"] is None
    assert recipe.run.system_message == MATH_SYSTEM_PROMPT
    assert "boxed" in MATH_SYSTEM_PROMPT
    assert values["initial_kl_budget"] in (0.001, 0.005, 0.01, 0.02, 0.05)
    assert values["blend_warmup_steps"] in (15, 25, 50)


@pytest.mark.parametrize("name", PAIRS)
def test_the_paper_pairs_take_256_completions_a_step_on_eight_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert 8 * recipe.training["per_device_train_batch_size"] * recipe.accumulation_steps() == 256


@pytest.mark.parametrize("name", PAIRS)
def test_their_learning_rate_rises_by_a_cosine_in_15_steps_and_stays(name: str) -> None:
    args = load_recipe(name).training_config("unused")
    steps = 25600 // 64
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    quarter_wave = [math.sin(math.pi * step / 30) ** 2 for step in range(15)]  # = (1 - cos(pi step / 15)) / 2
    assert rates[:15] == pytest.approx([1e-5 * height for height in quarter_wave])
    assert rates[15:] == pytest.approx([1e-5] * (steps - 15))


# ---- the baselines ----

KNOBS = {
    "trb": {"initial_kl_budget", "blend_warmup_steps"},
    "opd": set(),
    "fixed": {"initial_kl_budget"},
    "skd": {"skd_teacher_top_k", "skd_teacher_temperature"},
    "temperature": {"initial_temperature", "temperature_warmup_steps"},
    "sft": {"sft_warmup_steps"},
    "veto": {"veto_strength", "veto_steps"},
    "eopd": {"eopd_entropy", "forward_top_k"},
    "tip": {"tip_share"},
    "tropd": {"forward_top_k"},
    "iw": {"iw_gamma"},
}
SWEPT = {
    "trb": ["0.001, 0.005, 0.01, 0.02, 0.05", "15, 25, 50"],
    "opd": [],
    "fixed": ["0.001, 0.005, 0.01, 0.02, 0.05"],
    "skd": ["15, 25, 50", "0.2, 0.6, 1.0"],
    "temperature": ["0.8, 0.9, 0.95", "15, 25"],
    "sft": ["15, 25, 50"],
    "veto": ["0.2, 0.4, 0.6, 0.8"],
    **{name: [] for name in RELATIVES},
}


@pytest.mark.parametrize("name", KNOBS)
def test_a_baseline_differs_from_trb_in_its_knob_only(name: str) -> None:
    recipe, reference = load_recipe(BASELINES[name]), load_recipe(BASELINES["trb"])
    assert recipe.run == reference.run
    given, of_trb = dict(recipe.training), dict(reference.training)
    assert given.pop("method") == name
    of_trb.pop("method")
    different = {key for key in given.keys() | of_trb.keys() if given.get(key) != of_trb.get(key)}
    assert different <= KNOBS[name] | KNOBS["trb"]
    assert KNOBS[name] <= recipe.training.keys()
    assert not (KNOBS["trb"] - KNOBS[name]) & recipe.training.keys(), "a knob of another method would do nothing"
    text = BASELINES[name].read_text()
    assert [grid for grid in SWEPT[name] if grid not in text] == []


# ---- no key is parsed and never forwarded ----


class Spy:
    """Stands in for what a run is built from, and keeps the arguments of every call by the callee's name."""

    def __init__(self) -> None:
        self.calls: dict[str, list[dict[str, Any]]] = {}

    def stand_in(self, name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.setdefault(name, []).append({**dict(enumerate(args)), **kwargs})
            return result(*args, **kwargs)

        return call

    def all(self, name: str, key: Any) -> list[Any]:
        return [call.get(key) for call in self.calls.get(name, [])]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """What a run is made of, with every builder replaced: nothing is loaded, trained or sampled."""
    spy = Spy()
    model, tokenizer = zoo.load("student")
    score = EvalResult("x", 0.5, (0.4, 0.6), 2, 2, 3.0, 1.0)
    rows = Dataset.from_list(zoo.problems(40, seed=0))

    def trainer(**kwargs: Any) -> Any:
        fake = SimpleNamespace(
            args=kwargs["args"],
            sampling_student=lambda: model,
            accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
            eval_dataset=kwargs["eval_dataset"],
            state=SimpleNamespace(global_step=3, max_steps=3, is_world_process_zero=True),
            remove_callback=lambda callback: None,
            check_prompts=lambda: None,
            set_aside_others=lambda checkpoint: None,
        )
        fake.train = lambda **options: [
            kwargs["callbacks"][0].on_step_end(
                fake.args, SimpleNamespace(global_step=step, max_steps=3), SimpleNamespace(should_log=True)
            )
            for step in (1, 2, 3)
        ]
        fake.save_model = lambda path: Path(path).mkdir(parents=True)
        return fake

    for name, result in (
        (
            "load_tokenizer",
            lambda *a, **k: SimpleNamespace(
                chat_template="own",
                get_vocab=tokenizer.get_vocab,
                eos_token_id=tokenizer.eos_token_id,
                unk_token_id=None,
                bos_token=None,
                added_tokens_decoder={},
                apply_chat_template=lambda chat, **_: chat[-1]["content"],
            ),
        ),
        ("load_model", lambda *a, **k: model),
        ("check_same_tokenizer", lambda *a: None),
        ("load_prompts", lambda *a, **k: rows),
        ("load_benchmark", lambda *a, **k: rows),
        ("check_lengths", lambda data, *a, **k: data),
        ("evaluate", lambda *a, **k: score),
        ("check_problems", lambda *a, **k: None),
        ("Verifier", lambda *a, **k: nullcontext(SimpleNamespace(score=None))),
        ("require_packages", lambda *a, **k: None),
        ("TRBTrainer", trainer),
    ):
        for module in (run, material, scores):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, spy.stand_in(name, result))
    return spy


# One value for every field of RunConfig that is not its default, and where it must be seen.
PROBES: dict[str, tuple[Any, Callable[[Spy, Path], Any]]] = {
    "student": ("my/student", lambda spy, _: spy.all("load_model", 0)[0]),
    "teacher": ("my/teacher", lambda spy, _: spy.all("load_model", 0)[1]),
    "student_revision": ("r1", lambda spy, _: {*spy.all("load_model", "revision")[:1], *revisions(spy)[:1]}),
    "teacher_revision": ("r2", lambda spy, _: {*spy.all("load_model", "revision")[1:], *revisions(spy)[1:]}),
    "student_keep_layers": (2, lambda spy, _: spy.all("load_model", "keep_layers")[0]),
    "student_dtype": ("bfloat16", lambda spy, _: spy.all("load_model", "dtype")[0]),
    "teacher_dtype": ("float16", lambda spy, _: spy.all("load_model", "dtype")[1]),
    "teacher_quantization": ("bnb-4bit", lambda spy, _: spy.all("load_model", "quantization")[1]),
    "student_trust_remote_code": (True, lambda spy, _: {*trusted(spy, 0)}),
    "teacher_trust_remote_code": (True, lambda spy, _: {*trusted(spy, 1)}),
    "chat_template": ("plain", lambda spy, _: spy.all("TRBTrainer", "processing_class")[0].chat_template),
    "lora_rank": (3, lambda spy, _: lora(spy).r),
    "lora_alpha": (7, lambda spy, _: lora(spy).lora_alpha),
    "lora_target_modules": (["q_proj"], lambda spy, _: lora(spy).target_modules),
    "train_data": ("my.jsonl", lambda spy, _: spy.all("load_prompts", 0)[0]),
    "train_split": ("s1", lambda spy, _: spy.all("load_prompts", "split")[0]),
    "train_revision": ("r3", lambda spy, _: spy.all("load_prompts", "revision")[0]),
    "train_limit": (17, lambda spy, _: spy.all("load_prompts", "limit")[0]),
    "train_seed": (5, lambda spy, _: spy.all("load_prompts", "seed")[0]),
    "train_prompt_column": ("p", lambda spy, _: spy.all("load_prompts", "prompt_column")[0]),
    "train_answer_column": ("a", lambda spy, _: spy.all("load_prompts", "answer_column")[0]),
    "train_privileged_column": ("w", lambda spy, _: spy.all("load_prompts", "privileged_column")[0]),
    "train_assistant_turns": ("all", lambda spy, _: spy.all("load_prompts", "assistant_turns")[0]),
    "system_prompt": ("Think.", lambda spy, _: {*spy.all("load_prompts", "system_prompt")}),
    "max_prompt_length": (99, lambda spy, _: spy.all("check_lengths", 2)[0]),
    "overlong_prompts": ("drop", lambda spy, _: spy.all("check_lengths", 3)[0]),
    "prompts_per_step": (6, lambda spy, _: spy.all("TRBTrainer", "args")[0].gradient_accumulation_steps),
    "held_out_prompts": (4, lambda spy, _: len(spy.all("TRBTrainer", "eval_dataset")[0])),
    "held_out_every": (2, lambda spy, _: spy.all("TRBTrainer", "args")[0].eval_steps),
    "reward_timeout_s": (1.5, lambda spy, _: spy.all("Verifier", 0)[0]),
    "eval_data": (["zoo:chains", "gsm8k=f.jsonl"], lambda spy, _: list(dict.fromkeys(spy.all("evaluate", "name")))),
    "eval_split": ("s2", lambda spy, _: spy.all("load_prompts", "split")[1]),
    "eval_limit": (11, lambda spy, _: spy.all("load_prompts", "limit")[1]),
    "eval_prompt_column": ("ep", lambda spy, _: spy.all("load_prompts", "prompt_column")[1]),
    "eval_answer_column": ("ea", lambda spy, _: spy.all("load_prompts", "answer_column")[1]),
    "eval_privileged_column": ("ew", lambda spy, _: spy.all("load_prompts", "privileged_column")[1]),
    "eval_assistant_turns": ("last", lambda spy, _: spy.all("load_prompts", "assistant_turns")[1]),
    "eval_samples": (3, lambda spy, _: {*spy.all("evaluate", "n")}),
    "eval_max_new_tokens": (21, lambda spy, _: {*spy.all("evaluate", "max_new_tokens")}),
    "eval_temperature": (0.7, lambda spy, _: {*spy.all("evaluate", "temperature")}),
    "eval_every": (2, lambda spy, _: len(spy.calls["evaluate"]) // 2),  # steps 0, 2, 3; two problem sets
    "eval_seed": (9, lambda spy, _: {*spy.all("evaluate", "seed"), spy.all("load_prompts", "seed")[1]}),
    "eval_max_rows": (13, lambda spy, _: {*spy.all("evaluate", "max_rows")}),
    "save_final_model": (False, lambda _, directory: (directory / "model").exists()),
    "teachers": ({}, lambda *_: {}),  # in place of teacher: tests/studies/test_recipes_of_teachers.py
    "methods": ({}, lambda *_: {}),  # what compare reads: tests/studies/test_experiments.py
}
SEEN = {
    "student_revision": {"r1"},
    "teacher_revision": {"r2"},
    "student_trust_remote_code": {True},
    "teacher_trust_remote_code": {True},
    "chat_template": PLAIN_TEMPLATE,
    "lora_target_modules": {"q_proj"},
    "system_prompt": {"Think."},
    "prompts_per_step": 3,
    "eval_samples": {3},
    "eval_max_new_tokens": {21},
    "eval_temperature": {0.7},
    "eval_every": 3,
    "eval_seed": {9},
    "eval_max_rows": {13},
}


def revisions(spy: Spy) -> list[Any]:
    return spy.all("load_tokenizer", "revision")


def trusted(spy: Spy, which: int) -> list[Any]:
    return [spy.all(name, "trust_remote_code")[which] for name in ("load_tokenizer", "load_model")]


def lora(spy: Spy) -> Any:
    return spy.all("TRBTrainer", "peft_config")[0]


def test_every_field_of_a_run_reaches_what_it_is_for(spied: Spy, tmp_path: Path) -> None:
    assert PROBES.keys() == {field.name for field in dataclasses.fields(RunConfig)}
    values = {key: value for key, (value, _) in PROBES.items()}
    defaults = RunConfig("", "", "")
    assert [key for key in values if values[key] != {} and getattr(defaults, key) == values[key]] == []
    recipe = make_recipe({**values, "per_device_train_batch_size": 8, "gradient_checkpointing": False})
    run.train(recipe, tmp_path)
    assert spied.all("load_benchmark", 0) == ["gsm8k"]
    assert spied.all("load_benchmark", 1) == ["f.jsonl"]
    for key, (value, probe) in PROBES.items():
        assert probe(spied, tmp_path) == SEEN.get(key, value), key


def test_every_key_of_training_reaches_the_trainer_as_given() -> None:
    given = {
        "method": "skd",
        "skd_teacher_top_k": 3,
        "num_generations": 2,
        "loss_top_k": 5,
        "sampler": "lockstep",
        "recorded_rollouts": 1,
        "adam_beta2": 0.95,
        "warmup_steps": 4,
        "seed": 11,
    }
    recipe: Recipe = make_recipe({"student": "a", "teacher": "b", "train_data": "c", **given})
    args = recipe.training_config("somewhere")
    assert {key: getattr(args, key) for key in given} == given
    assert args.output_dir == "somewhere"


@pytest.mark.parametrize("path", [path for path in FILES if not load_recipe(path).run.methods], ids=named)
def test_another_method_takes_away_what_the_file_sets_for_its_own(path: Path) -> None:
    for method in METHODS:
        recipe = load_recipe(path, {"method": method})
        assert recipe.training["method"] == method and isinstance(recipe.training_config("unused"), TRBConfig)
        gone = load_recipe(path).training.keys() - recipe.training.keys()
        assert gone <= every_knob()
    for schedule in BUDGET_SCHEDULES:
        assert load_recipe(path, {"method": "trb", "budget_schedule": schedule}).training["budget_schedule"] == schedule
    with pytest.raises(ConfigError, match="initial_kl_budget would do nothing"):
        load_recipe(path, {"method": "opd", "initial_kl_budget": 0.5})
