"""Adapters that stay in place: a PEFT wrapper, and a directory with an adapter, say what the merged model says."""

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STUDENT_EOS, STUDENT_ROWS, TEACHER_EOS, TEACHER_ROWS, random_model, tiny_gpt2, tiny_llama
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from tiny_runs import build
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trb import zoo
from trb.cli import main
from trb.models.loading import load_model, load_tokenizer
from trb.models.modeling import OutputHead, completion_hidden_states, without_adapters
from trb.policies import TeacherPolicy, TrustRegionPolicy
from trb.safety.untrusted import lora_options
from trb.sampling import sample
from trb.sampling.scoring import score_completions
from trb.studies.probe import probe
from trb.studies.recipe import make_recipe
from trb.training.vllm import _teacher_checkpoint
from trb.vocab import SharedVocabulary, head_rows

ATTENTION = {"tiny_llama": ["q_proj", "v_proj", "down_proj"], "tiny_gpt2": ["c_attn", "c_proj"]}
PROMPTS = [[1, 2, 3], [5], [2, 5, 1, 3, 2]]
COMPLETIONS = [[1, 5], [2, 3, 1, STUDENT_EOS], [3]]

TARGETS: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
IN_PLACE = [
    LoraConfig(r=2, **TARGETS),
    LoraConfig(r=2, use_dora=True, **TARGETS),
    LoraConfig(r=2, **{**TARGETS, "target_modules": ["q_proj", "lm_head"]}),
    LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    AdaLoraConfig(init_r=2, target_r=2, total_step=10, **TARGETS),
    LoHaConfig(r=2, **TARGETS),
    LoKrConfig(r=2, **TARGETS),
    VeraConfig(r=2, **TARGETS),
    IA3Config(feedforward_modules=[], **TARGETS),
    OFTConfig(oft_block_size=4, **TARGETS),
    HRAConfig(r=2, **TARGETS),
    MissConfig(r=2, **TARGETS),
]
LOST = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "RANDLORA": RandLoraConfig(r=2, **TARGETS),
    "activated LoRA": LoraConfig(r=2, alora_invocation_tokens=[1], **TARGETS),
}


def adapted(base: PreTrainedModel, config: PeftConfig, spread: float = 0.5) -> PeftModel:
    """A wrapper whose adapter changes what the model says, by much."""
    generator = torch.Generator().manual_seed(7)
    model = get_peft_model(base, copy.deepcopy(config), autocast_adapter_dtype=False).to(base.dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.requires_grad_(False)


def merged(model: PeftModel) -> PreTrainedModel:
    return copy.deepcopy(model).merge_and_unload().eval()


def teacher(kind: str, spread: float = 0.5) -> PeftModel:
    base = {"tiny_llama": tiny_llama, "tiny_gpt2": tiny_gpt2}[kind](TEACHER_ROWS, seed=5)
    return adapted(base, lora(kind), spread)


def lora(kind: str) -> LoraConfig:
    fan_in_fan_out = kind == "tiny_gpt2"
    return LoraConfig(r=2, target_modules=ATTENTION[kind], fan_in_fan_out=fan_in_fan_out, task_type="CAUSAL_LM")


def zoo_teacher(kind: str) -> PeftModel:
    """A teacher with LoRA for the zoo's tokenizer, with rotary or with learned positions."""
    own, _ = zoo.load("teacher")
    if kind == "tiny_llama":
        return adapted(own, lora(kind))
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    ids = {name: getattr(own.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    base = random_model(GPT2LMHeadModel, GPT2Config(vocab_size=head_rows(own), **sizes, **ids), seed=3, spread=0.35)
    base.float().generation_config.eos_token_id = own.generation_config.eos_token_id
    return adapted(base, lora(kind))


def save(model: PeftModel, base: str, directory: Path) -> str:
    model.save_pretrained(directory, save_embedding_layers=False)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    return str(directory)


# ---- in place ----


@pytest.mark.parametrize("config", IN_PLACE, ids=lambda config: config.peft_type.value)
def test_every_kind_that_is_let_through_acts_without_its_wrapper(config: PeftConfig) -> None:
    model = adapted(tiny_llama(TEACHER_ROWS, seed=5), config)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits  # the wrapper's own pass
        hidden = completion_hidden_states(model, ids, torch.ones_like(ids), torch.tensor([[0, 1, 1, 1, 1]]))
        plain = tiny_llama(TEACHER_ROWS, seed=5)(input_ids=ids).logits
        assert torch.allclose(without_adapters(model)(input_ids=ids).logits, expected, atol=1e-12)
        assert torch.allclose(OutputHead.check(model)(hidden), expected[0, :-1], atol=1e-12)
        assert torch.allclose(merged(model)(input_ids=ids).logits, expected, atol=1e-9)
    assert not torch.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ATTENTION)
def test_scores_under_a_teacher_with_an_adapter_are_the_merged_teachers(kind: str) -> None:
    student, model = tiny_llama(STUDENT_ROWS, seed=41), teacher(kind)
    vocabulary = SharedVocabulary.of((STUDENT_ROWS, TEACHER_ROWS), STUDENT_EOS, TEACHER_EOS)
    scores = [
        score_completions(
            student, one, PROMPTS, COMPLETIONS, policy=TrustRegionPolicy(0.2), vocabulary=vocabulary, top=2
        )
        for one in (model, merged(model), teacher(kind, spread=0.0))
    ]
    for name in ("teacher_log_prob", "behavior_log_prob", "kl_student", "kl_teacher", "teacher_weight"):
        ours, theirs, without = (torch.tensor(list(chain.from_iterable(getattr(score, name)))) for score in scores)
        assert torch.allclose(ours, theirs, atol=1e-6), name
        assert not torch.allclose(ours, without, atol=1e-2), name


@pytest.mark.parametrize("method", ["lockstep", "speculative"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_samples_with_a_teacher_with_an_adapter_are_the_merged_teachers(kind: str, method: str) -> None:
    """Prompts of several lengths: a wrapper hides whether its model takes positions."""
    student, model = tiny_llama(STUDENT_ROWS, seed=41), teacher(kind)
    prompts = PROMPTS * 4
    drawn = [
        sample(
            student,
            one,
            prompts,
            policy,
            max_new_tokens=8,
            eos_token_id=STUDENT_EOS,
            teacher_eos_token_id=TEACHER_EOS,
            method=method,
            block_size=3,
            seed=2,
        ).completions
        for policy in (TrustRegionPolicy(0.3), TeacherPolicy())
        for one in (model, merged(model), teacher(kind, spread=0.0))
    ]
    assert drawn[0] == drawn[1] and drawn[3] == drawn[4]
    assert drawn[3] != drawn[5]


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("method", ["trb", "opd"])
def test_the_loss_under_a_teacher_with_an_adapter_is_the_merged_teachers(
    tmp_path: Path, kind: str, method: str
) -> None:
    model = zoo_teacher(kind)
    losses = []
    for one in (model, merged(model)):
        trainer = build(tmp_path, teacher=one, method=method, max_completion_length=8, initial_kl_budget=0.1)
        inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)])
        losses.append(trainer._compute_loss(trainer.model, inputs, None)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- directories ----


def test_a_directory_with_an_adapter_is_a_teacher_and_is_not_merged(tmp_path: Path) -> None:
    model = zoo_teacher("tiny_llama")
    directory = save(model, "zoo:teacher", tmp_path / "adapter")
    trainer = build(tmp_path / "run", teacher=directory, max_completion_length=8)
    loaded = trainer.accelerator.unwrap_model(trainer.teacher_model)
    assert isinstance(loaded, PeftModel)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    usual = build(tmp_path / "run", teacher=merged(model), max_completion_length=8)
    rows = [trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)]
    ours, theirs = (one._compute_loss(one.model, one._prepare_inputs(rows), None)[0].item() for one in (trainer, usual))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_configuration_of_its_base_may_lie_beside_an_adapter(tmp_path: Path) -> None:
    directory = save(zoo_teacher("tiny_llama"), "zoo:teacher", tmp_path / "adapter")
    expected = load_model(directory)
    zoo.load("teacher")[0].config.save_pretrained(directory)
    model = load_model(directory)
    assert isinstance(model, PeftModel)
    assert {name: value.tolist() for name, value in model.state_dict().items() if "lora_" in name} == {
        name: value.tolist() for name, value in expected.state_dict().items() if "lora_" in name
    }


def test_an_adapter_that_stands_on_an_adapter_merges_the_lower_one(tmp_path: Path) -> None:
    first = zoo_teacher("tiny_llama")
    lower = save(first, "zoo:teacher", tmp_path / "lower")
    second = adapted(merged(first), LoraConfig(r=1, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    directory = save(second, lower, tmp_path / "upper")
    ids = torch.tensor([[3, 4, 5]])
    trainer = build(tmp_path / "run", teacher=directory, max_completion_length=8)
    with torch.no_grad():
        expected = second(input_ids=ids).logits
        for model in (load_model(directory), load_model(directory, merge_adapter=True), trainer.teacher_model):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    assert load_tokenizer(directory).get_vocab() == zoo.load("teacher")[1].get_vocab()


def test_an_adapter_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = save(zoo_teacher("tiny_llama"), "zoo:teacher", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, path)
    with pytest.raises(OSError, match=r"cannot read the adapter in .*incomplete or damaged"):
        load_model(directory)


RECIPE: dict[str, Any] = {
    "student": "zoo:student", "train_data": "zoo:chains", "train_limit": 16, "max_steps": 1, "num_generations": 2,
    "per_device_train_batch_size": 4, "max_completion_length": 8, "eval_data": "zoo:chains", "eval_limit": 4,
    "logging_steps": 1, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip


def test_the_probe_reads_an_adapter_as_the_merged_teacher(tmp_path: Path) -> None:
    model = zoo_teacher("tiny_llama")
    whole = tmp_path / "merged"
    merged(model).save_pretrained(whole)
    zoo.load("teacher")[1].save_pretrained(whole)
    found = []
    for place, spec in (("a", save(model, "zoo:teacher", tmp_path / "adapter")), ("b", str(whole))):
        recipe = make_recipe(RECIPE | {"teacher": spec})
        options: dict[str, Any] = {"problems": 2, "samples": 2, "budgets": [0.1], "truncations": [2], "excerpts": 0}
        found.append(probe(recipe, tmp_path / place, **options))
    ours, theirs = (json.loads(json.dumps(one, default=str)) for one in found)
    for one in (ours, theirs):
        for key in ("teacher", "settings", "provenance", "recipe"):
            one.pop(key, None)
    assert_alike(ours, theirs)


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if not ("seconds" in key or "time" in key):
                assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_alike(left, right, f"{where}[{index}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4), where
    else:
        assert one == other, where


def test_a_run_trains_from_an_adapter_that_teaches_and_a_merged_one_that_learns(tmp_path: Path) -> None:
    """And `trb eval` and `trb doctor` take it."""
    from trb.studies.run import train

    own, _ = zoo.load("student")
    learner = adapted(own, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), spread=0.1)
    student = save(learner, "zoo:student", tmp_path / "student")
    spec = save(zoo_teacher("tiny_llama"), "zoo:teacher", tmp_path / "teacher")
    train(make_recipe(RECIPE | {"student": student, "teacher": spec, "eval_data": []}), tmp_path / "run")
    trained = load_model(str(tmp_path / "run" / "model"))
    assert not isinstance(trained, PeftModel)
    evaluation = ["eval", "--model", spec, "--data", "zoo:chains", "--limit", "2", "--max-new-tokens", "8", "--quiet"]
    assert main(evaluation) == 0
    assert main(["doctor", "--student", student, "--teacher", spec]) == 0


@pytest.mark.parametrize("how", ["beside its base", "in its weights", "on another adapter"])
def test_vllm_gets_the_merged_teacher_and_not_its_base(tmp_path: Path, how: str) -> None:
    adapter = zoo_teacher("tiny_llama")
    spec = save(adapter, "zoo:teacher", tmp_path / "adapter")
    if how == "on another adapter":
        second = adapted(load_model(spec, merge_adapter=True), lora("tiny_llama"), spread=0.3)
        spec = save(second, spec, tmp_path / "second")
    model = load_model(spec, merge_adapter=how == "in its weights")
    kept = {name for name in model.state_dict() if "lora_" in name}
    assert isinstance(model, PeftModel) == bool(kept) == (how != "in its weights")
    base = load_model(model.name_or_path)  # as an engine would be started from it
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), _teacher_checkpoint(model, several=False) as directory:
        given = load_model(directory)(input_ids=ids).logits
        assert torch.allclose(given, model(input_ids=ids).logits, atol=1e-4)
        assert not torch.allclose(given, base(input_ids=ids).logits, atol=0.1)
        assert kept == {name for name in model.state_dict() if "lora_" in name}
    with (
        pytest.raises(ValueError, match="teacher has adapters, so several processes"),
        _teacher_checkpoint(model, several=True),
    ):
        pass


@pytest.mark.parametrize("how", ["merged by PEFT", "trained"])
def test_vllm_gets_weights_as_they_are_and_not_as_they_were_read(tmp_path: Path, how: str) -> None:
    base = tiny_llama(TEACHER_ROWS, seed=1).float()
    base.save_pretrained(tmp_path / "base")
    loaded = load_model(str(tmp_path / "base"))
    with _teacher_checkpoint(loaded, several=True) as directory:
        assert directory == str(tmp_path / "base")
    if how == "trained":
        model = loaded
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
    else:
        model = adapted(loaded, lora("tiny_llama"), spread=0.3).merge_and_unload()
        assert model.name_or_path == str(tmp_path / "base")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), _teacher_checkpoint(model, several=False) as directory:
        given = load_model(directory)(input_ids=ids).logits
        assert torch.allclose(given, model(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(given, base(input_ids=ids).logits, atol=0.1)
    with (
        pytest.raises(ValueError, match=f"teacher has other weights than {tmp_path / 'base'}, so several processes"),
        _teacher_checkpoint(model, several=True),
    ):
        pass


def test_vllm_gets_the_revision_of_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two commits in the cache of a hub, `main` is the second, and the teacher was read from the first."""
    cache = tmp_path / "models--org--model"
    commits = {"first": "1" * 40, "main": "2" * 40}
    for seed, (name, commit) in enumerate(commits.items()):
        tiny_llama(TEACHER_ROWS, seed=seed).save_pretrained(cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(commit)
    for module in ("huggingface_hub.constants", "trb.models.identity"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
    for revision, commit in commits.items():
        teacher = LlamaForCausalLM.from_pretrained(
            "org/model", revision=revision, cache_dir=tmp_path, local_files_only=True
        )
        with _teacher_checkpoint(teacher, several=True) as directory:
            assert directory == str(cache / "snapshots" / commit)


# ---- refused ----


def lost(name: str) -> PeftModel:
    return get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=None, bos_token_id=None,
        eos_token_id=None)), copy.deepcopy(LOST[name])).eval()  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_adapters_that_would_be_lost_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model, student = lost(name), tiny_llama(STUDENT_ROWS, seed=41)
    message = f"adapters of the kind {name} are not supported: "
    vocabulary = SharedVocabulary.of((STUDENT_ROWS, 8), STUDENT_EOS)
    options: dict[str, Any] = {"policy": TeacherPolicy(), "vocabulary": vocabulary}
    with pytest.raises(ValueError, match=message):
        score_completions(student, model, PROMPTS, COMPLETIONS, **options)
    with pytest.raises(ValueError, match=message):
        sample(student, model, PROMPTS, TeacherPolicy(), max_new_tokens=2, eos_token_id=STUDENT_EOS)
    with pytest.raises(ValueError, match=message):
        sample(model, None, PROMPTS, TeacherPolicy(), max_new_tokens=2, eos_token_id=STUDENT_EOS)
    directory = save(model, "zoo:teacher", tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        load_model(directory)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, teacher=directory)


def test_the_trainer_refuses_a_teacher_with_virtual_tokens(tmp_path: Path) -> None:
    own, _ = zoo.load("teacher")
    with pytest.raises(ValueError, match="kind PROMPT_TUNING are not supported: it puts virtual tokens"):
        build(tmp_path, teacher=get_peft_model(own, copy.deepcopy(LOST["PROMPT_TUNING"])))


def test_a_directory_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    directory = save(zoo_teacher("tiny_llama"), "zoo:teacher", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "XLORA"}))
    with pytest.raises(ValueError, match=r"kind XLORA are not supported: only adapters that replace single layers are"):
        load_model(directory)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": "all-linear"},
    {"use_rslora": True, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 3}},
    {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"init_lora_weights": "olora", "exclude_modules": ["o_proj"], "bias": "all"}],
    ids=["plain", "dora", "all", "patterns", "saved", "layers", "odd"])  # fmt: skip
def test_what_peft_writes_of_lora_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    own, _ = zoo.load("teacher")
    model = adapted(own, LoraConfig(**{**TARGETS, "r": 2, **options}))
    directory = save(model, "zoo:teacher", tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.allclose(load_model(directory)(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_every_option_of_lora_that_is_off_is_let_through(tmp_path: Path) -> None:
    written = {name: value for name, value in LoraConfig(r=2, **TARGETS).to_dict().items() if name != "runtime_config"}
    path = tmp_path / "adapter_config.json"
    text = json.dumps(written | {"of_a_later_version": None, "target_modules": ["q_proj"], "peft_type": "LORA"})
    path.write_text(text)
    config = LoraConfig(**lora_options(path))
    expected = LoraConfig(r=2, **{**TARGETS, "target_modules": ["q_proj"]})
    assert {k: v for k, v in vars(config).items() if k != "runtime_config"} == {
        k: v for k, v in vars(expected).items() if k != "runtime_config"
    }
