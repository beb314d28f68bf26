"""Models, adapters and tokenizers made to run code, to lead out of their folder, or to hang."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hostile_helpers import Bomb, each, edit_json, model_copy, refused, watched, within

from trb import TRBConfig, TRBTrainer, zoo
from trb.models.loading import load_model, load_tokenizer


def load_refused(path: Path) -> str:
    return refused(lambda: load_model(str(path)))


def test_weights_as_a_pickle(folder: Path) -> None:
    model = model_copy(folder)
    (model / "model.safetensors").unlink()
    torch.save(Bomb(folder), model / "pytorch_model.bin")
    load_refused(model)


def test_an_index_that_names_a_pickle(folder: Path) -> None:
    model = model_copy(folder)
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    torch.save(Bomb(folder), model / "evil.bin")
    edit_json(model / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": "evil.bin"})
    load_refused(model)


@each("shard", parent="../outside.safetensors", absolute="/etc/outside.safetensors")
def test_an_index_that_leads_out(folder: Path, shard: str) -> None:
    model = model_copy(folder)
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    shutil.copy(folder / "outside.safetensors", model / "decoy.safetensors")
    edit_json(model / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": shard})
    load_refused(model)


def test_a_link_that_leads_out(folder: Path) -> None:
    model = model_copy(folder)
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    (model / "model.safetensors").symlink_to(folder / "outside.safetensors")
    load_refused(model)


@each(
    "name",
    template="additional_chat_templates/tool_use.jinja",
    folder="additional_chat_templates",
    pipe="chat_template.jinja",
)
def test_an_entry_that_is_no_file_of_its_own(folder: Path, name: str) -> None:
    (folder / "secrets").mkdir()
    (folder / "secrets" / "tool_use.jinja").write_text("secret")
    model = model_copy(folder)
    (model / name).parent.mkdir(exist_ok=True)
    if name.startswith("chat"):
        (model / name).unlink()
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to(folder / "secrets" / ("tool_use.jinja" if name.endswith(".jinja") else ""))
    with watched(folder / "secrets") as seen, within(20):
        refused(lambda: load_tokenizer(str(model)))
        refused(lambda: load_model(str(model)))
    assert not seen, f"it was followed: {seen}"


@each("role", student="student", teacher="teacher")
def test_a_model_that_a_trainer_is_given_by_name(folder: Path, role: str) -> None:
    """TRL and transformers would open it, and load what an adapter_config.json beside it names."""
    model = model_copy(folder)
    edit_json(model / "adapter_config.json", base_model_name_or_path="owner/name", peft_type="LORA")
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
    student, tokenizer = zoo.load("student")
    given = {"student": student, "teacher": student, role: str(model)}
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1"}]}] * 4)
    arguments = TRBConfig(output_dir=str(folder / "run"), report_to="none")
    refused(lambda: TRBTrainer(given["student"], given["teacher"], arguments, data, processing_class=tokenizer))


@each("name", model="config.json", tokenizer="tokenizer_config.json")
def test_python_code_beside_it(folder: Path, name: str) -> None:
    model = model_copy(folder)
    (model / "evil.py").write_text(Bomb(folder).code)
    if name == "config.json":
        auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        edit_json(model / name, auto_map=auto, model_type="evil", architectures=["Model"])
        load_refused(model)
    else:
        edit_json(model / name, auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]}, tokenizer_class="Fast")
        load_tokenizer(str(model))  # transformers takes a class of its own instead


@each("key", plain="attn_implementation", private="_attn_implementation")
def test_a_kernel_from_the_hub(folder: Path, key: str) -> None:
    model = model_copy(folder)
    edit_json(model / "config.json", **{key: "kernels-community/evil"})
    load_refused(model)


@each(
    "content",
    text=b"not json",
    nesting=b"[" * 200_000,
    list=b"[]",
    types=b'{"model_type": "qwen3", "hidden_size": "big", "num_hidden_layers": []}',
)
def test_a_damaged_configuration(folder: Path, content: bytes) -> None:
    model = model_copy(folder)
    (model / "config.json").write_bytes(content)
    load_refused(model)


@each("content", empty=b"", length=b"\xff" * 16, header=b"\x02\0\0\0\0\0\0\0{]")
def test_damaged_weights(folder: Path, content: bytes) -> None:
    model = model_copy(folder)
    (model / "model.safetensors").write_bytes(content)
    load_refused(model)


@each("content", text=b"\0\1\2", type=b'{"model": {"type": "evil"}}', nesting=b'{"a":' * 100_000)
def test_a_damaged_tokenizer(folder: Path, content: bytes) -> None:
    model = model_copy(folder)
    (model / "tokenizer.json").write_bytes(content)
    refused(lambda: load_tokenizer(str(model)))


def adapter(folder: Path, **config: Any) -> Path:
    path = folder / "adapter"
    path.mkdir()
    base = {"base_model_name_or_path": "zoo:student", "peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}
    (path / "adapter_config.json").write_text(json.dumps({**base, **config}))
    return path


def test_an_adapter_as_a_pickle_beside_a_decoy(folder: Path) -> None:
    path = adapter(folder, layers_to_transform=[0])
    shutil.copy(model_copy(folder) / "model.safetensors", path / "decoy.safetensors")
    torch.save(Bomb(folder), path / "adapter_model.bin")
    load_refused(path)


def test_an_adapter_that_stands_on_itself(folder: Path) -> None:
    path = adapter(folder, base_model_name_or_path=str(folder / "adapter"))
    shutil.copy(model_copy(folder) / "model.safetensors", path / "adapter_model.safetensors")
    load_refused(path)


HANGS = r"([\w.]+)*!"  # exponential in the length of a name

ADAPTERS: dict[str, dict[str, Any]] = {
    "megatron": {"megatron_config": {"hidden_size": 1}, "megatron_core": "megatron.evil"},
    "another kind": {"peft_type": "XLORA", "adapters": {"0": "owner/name"}, "hidden_size": 1},
    "virtual tokens": {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "owner/name"},
    "another kind in place": {"peft_type": "LOHA"},
    "no kind": {"peft_type": ["LORA"]},
    "targets": {"target_modules": HANGS},
    "listed targets": {"target_modules": [["q_proj"], {"a": 1}]},
    "exclusions": {"exclude_modules": HANGS},
    "ranks": {"rank_pattern": {HANGS: 4}},
    "scales": {"alpha_pattern": {HANGS: 4}},
    "layers": {"layers_to_transform": [0], "layers_pattern": HANGS},
    "initial weights": {"init_lora_weights": "corda", "corda_config": {"cache_file": "/etc/passwd"}},
    "quantised": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "arrow": {"arrow_config": {"top_k": 1}},
    "replication": {"layer_replication": [[0, 10**9]]},
    "unknown option": {"something_new": "owner/name"},
    "task": {"task_type": "SEQ_CLS"},
    "infinite": {"lora_alpha": float("inf")},
}


@each("options", **ADAPTERS)
def test_an_adapter_with(folder: Path, options: dict[str, Any]) -> None:
    path = adapter(folder, **options)
    shutil.copy(model_copy(folder) / "model.safetensors", path / "adapter_model.safetensors")
    with within(20):
        assert "adapter_config.json" in load_refused(path)


def test_an_adapter_beside_a_whole_model(folder: Path) -> None:
    """transformers loads what its configuration names."""
    path = adapter(folder, base_model_name_or_path="owner/name")
    model = model_copy(folder)
    shutil.copy(path / "adapter_config.json", model)
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
    load_refused(model)
