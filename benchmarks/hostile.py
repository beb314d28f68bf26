"""Attacks every input that somebody else may have written, and reports which attempts were refused.

    python benchmarks/hostile.py --json benchmarks/results/hostile.json

An attempt succeeds if its code runs (it would leave a file called canary), if it reads, writes or removes something
outside of the folder it came in, opens a connection, hangs, or is taken for an ordinary input. It is refused if the
package says no in an error of its own, or gives a wrong answer no point. `tests/security/test_security.py` runs the
same attempts, all but the slow ones.

Left out on purpose: denial of service by honest size, such as a model larger than memory (see SECURITY.md).
"""

import argparse
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SECONDS = 120  # for one attempt on a busy machine, processes that have to import torch included


class SucceededError(Exception):
    """The attempt did what it should not have been able to do."""


@dataclass(frozen=True)
class Case:
    """One attempt: it returns how it was refused, in a few words, or raises."""

    area: str
    name: str
    attempt: Callable[[Path], str]
    slow: bool = False


CASES: list[Case] = []


def case(
    area: str, *, slow: bool = False, quick: tuple[str, ...] = (), **variants: Any
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register a function as an attempt, or as one per entry of `variants`, whose values it gets.

    Slow attempts take seconds each; `quick` are those of the variants that the tests make all the same.
    """

    def register(function: Callable[..., str]) -> Callable[..., str]:
        name = function.__name__.replace("_", " ")
        for label, value in variants.items():
            attempt = lambda folder, value=value: function(folder, value)  # noqa: E731
            CASES.append(Case(area, f"{name}: {label.replace('_', ' ')}", attempt, slow and label not in quick))
        if not variants:
            CASES.append(Case(area, name, function, slow))
        return function

    return register


def run(one: Case, folder: Path) -> str:
    """Make one attempt in an empty folder; returns how it was refused. Raises SucceededError if it was not."""
    canary(folder).unlink(missing_ok=True)
    with within(SECONDS):
        how = one.attempt(folder)
    if canary(folder).exists():
        raise SucceededError("its code ran")
    return how


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise SucceededError if the block takes longer, as far as Python gets to act."""

    def late(*_: Any) -> None:
        raise SucceededError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(call: Callable[[], Any]) -> str:
    """The error that a call ends with, which must be one that the package explains."""
    try:
        result = call()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    raise SucceededError(f"it was accepted: {result!r:.200}")


def canary(folder: Path) -> Path:
    return folder / "canary"


class Bomb:
    """Pickles to a call that leaves the canary."""

    def __init__(self, folder: Path) -> None:
        self.code = f"open({str(canary(folder))!r}, 'w').close()"

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


# ---- models ----


def model_copy(folder: Path) -> Path:
    from trb import zoo

    return Path(shutil.copytree(zoo.path("student"), folder / "model"))


def load(path: Path) -> str:
    from trb.models.loading import load_model

    return refused(lambda: load_model(str(path)))


def edit_json(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**record, **changes}))


@case("models")
def weights_as_a_pickle(folder: Path) -> str:
    import torch

    model = model_copy(folder)
    (model / "model.safetensors").unlink()
    torch.save(Bomb(folder), model / "pytorch_model.bin")
    return load(model)


@case("models")
def an_index_that_names_a_pickle(folder: Path) -> str:
    import torch

    model = model_copy(folder)
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    torch.save(Bomb(folder), model / "evil.bin")
    edit_json(model / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": "evil.bin"})
    return load(model)


@case("models", parent="../outside.safetensors", absolute="/etc/outside.safetensors")
def an_index_that_leads_out(folder: Path, shard: str) -> str:
    model = model_copy(folder)
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    shutil.copy(folder / "outside.safetensors", model / "decoy.safetensors")
    edit_json(model / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": shard})
    return load(model)


@case("models")
def a_link_that_leads_out(folder: Path) -> str:
    model = model_copy(folder)
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    (model / "model.safetensors").symlink_to(folder / "outside.safetensors")
    return load(model)


@case(
    "models",
    template="additional_chat_templates/tool_use.jinja",
    folder="additional_chat_templates",
    pipe="chat_template.jinja",
)
def an_entry_that_is_no_file_of_its_own(folder: Path, name: str) -> str:
    from trb.models.loading import load_model, load_tokenizer

    (folder / "secrets").mkdir()
    (folder / "secrets" / "tool_use.jinja").write_text("secret")
    model = model_copy(folder)
    (model / name).parent.mkdir(exist_ok=True)
    if name.startswith("chat"):
        (model / name).unlink()
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to(folder / "secrets" / ("tool_use.jinja" if name.endswith(".jinja") else ""))
    with watched(folder) as seen, within(20):
        how = refused(lambda: load_tokenizer(str(model))) + refused(lambda: load_model(str(model)))
    if seen:
        raise SucceededError(f"it was followed: {seen}")
    return how


@case("models", student="student", teacher="teacher")
def a_model_that_a_trainer_is_given_by_name(folder: Path, role: str) -> str:
    """TRL and transformers would open it, and load what an adapter_config.json beside it names."""
    from datasets import Dataset

    from trb import TRBConfig, TRBTrainer, zoo

    model = model_copy(folder)
    edit_json(model / "adapter_config.json", base_model_name_or_path="owner/name", peft_type="LORA")
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
    student, tokenizer = zoo.load("student")
    given = {"student": student, "teacher": student, role: str(model)}
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1"}]}] * 4)
    arguments = TRBConfig(output_dir=str(folder / "run"), report_to="none")
    return refused(lambda: TRBTrainer(given["student"], given["teacher"], arguments, data, processing_class=tokenizer))


@case("models", model="config.json", tokenizer="tokenizer_config.json")
def python_code_beside_it(folder: Path, name: str) -> str:
    from trb.models.loading import load_model, load_tokenizer

    model = model_copy(folder)
    (model / "evil.py").write_text(Bomb(folder).code)
    if name == "config.json":
        auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        edit_json(model / name, auto_map=auto, model_type="evil", architectures=["Model"])
        return refused(lambda: load_model(str(model)))
    edit_json(model / name, auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]}, tokenizer_class="Fast")
    tokenizer = load_tokenizer(str(model))  # transformers takes a class of its own instead
    return f"read as {type(tokenizer).__module__}.{type(tokenizer).__name__}"


@case("models", plain="attn_implementation", private="_attn_implementation")
def a_kernel_from_the_hub(folder: Path, key: str) -> str:
    model = model_copy(folder)
    edit_json(model / "config.json", **{key: "kernels-community/evil"})
    return load(model)


@case(
    "models",
    text=b"not json",
    nesting=b"[" * 200_000,
    list=b"[]",
    types=b'{"model_type": "qwen3", "hidden_size": "big", "num_hidden_layers": []}',
)
def a_damaged_configuration(folder: Path, content: bytes) -> str:
    model = model_copy(folder)
    (model / "config.json").write_bytes(content)
    return load(model)


@case("models", empty=b"", length=b"\xff" * 16, header=b"\x02\0\0\0\0\0\0\0{]")
def damaged_weights(folder: Path, content: bytes) -> str:
    model = model_copy(folder)
    (model / "model.safetensors").write_bytes(content)
    return load(model)


@case("models", text=b"\0\1\2", type=b'{"model": {"type": "evil"}}', nesting=b'{"a":' * 100_000)
def a_damaged_tokenizer(folder: Path, content: bytes) -> str:
    from trb.models.loading import load_tokenizer

    model = model_copy(folder)
    (model / "tokenizer.json").write_bytes(content)
    return refused(lambda: load_tokenizer(str(model)))


def adapter(folder: Path, **config: Any) -> Path:
    path = folder / "adapter"
    path.mkdir()
    base = {"base_model_name_or_path": "zoo:student", "peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}
    (path / "adapter_config.json").write_text(json.dumps({**base, **config}))
    return path


@case("models")
def an_adapter_as_a_pickle_beside_a_decoy(folder: Path) -> str:
    import torch

    path = adapter(folder, layers_to_transform=[0])
    shutil.copy(model_copy(folder) / "model.safetensors", path / "decoy.safetensors")
    torch.save(Bomb(folder), path / "adapter_model.bin")
    return load(path)


@case("models")
def an_adapter_that_stands_on_itself(folder: Path) -> str:
    path = adapter(folder, base_model_name_or_path=str(folder / "adapter"))
    shutil.copy(model_copy(folder) / "model.safetensors", path / "adapter_model.safetensors")
    return load(path)


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


@case("models", **{name.replace(" ", "_"): options for name, options in ADAPTERS.items()})
def an_adapter_with(folder: Path, options: dict[str, Any]) -> str:
    path = adapter(folder, **options)
    shutil.copy(model_copy(folder) / "model.safetensors", path / "adapter_model.safetensors")
    with within(20):
        why = load(path)
    if "adapter_config.json" not in why:
        raise SucceededError(f"it got as far as {why}")
    return why


@case("models")
def an_adapter_beside_a_whole_model(folder: Path) -> str:
    """transformers loads what its configuration names."""
    path = adapter(folder, base_model_name_or_path="owner/name")
    model = model_copy(folder)
    shutil.copy(path / "adapter_config.json", model)
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
    return load(model)


# ---- chat templates ----

TEMPLATES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__['__builtins__']['exec']('0') }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('true') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attr": "{{ messages|attr('__class__') }}{{ (messages|attr('__class__')).__mro__ }}",
    "namespace": "{{ namespace.__init__.__globals__['__builtins__']['exec']('0') }}",
}


def try_template(folder: Path, template: str) -> str:
    from trb.models.loading import load_tokenizer

    model = model_copy(folder)
    (model / "chat_template.jinja").write_text(template)
    return refused(lambda: load_tokenizer(str(model)))


@case("chat templates", slow=True, quick=("cycler",), **TEMPLATES)
def out_of_the_sandbox(folder: Path, template: str) -> str:
    from jinja2.exceptions import TemplateError

    from trb.models.loading import load_tokenizer
    from trb.tasks.prompts import render

    model = model_copy(folder)
    code = Bomb(folder).code
    (model / "chat_template.jinja").write_text(template.replace("'0'", repr(code)))
    try:
        tokenizer = load_tokenizer(str(model))
        rendered = render(tokenizer, [{"prompt": [{"role": "user", "content": "x"}]}])
    except (ValueError, TemplateError) as error:
        return f"{type(error).__name__}: {error}"
    if "class '" in tokenizer.decode(rendered[0]):
        raise SucceededError("it reached Python's classes")
    return "rendered as nothing"


@case("chat templates", slow=True)
def loops_without_end(folder: Path) -> str:
    return try_template(folder, ENDLESS)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@case("chat templates", recipe="recipe", trainer="trainer", options="options", render="render")
def a_template_from_elsewhere(folder: Path, how: str) -> str:
    """Every way for a template to come in that is no model's directory."""
    from datasets import Dataset

    from trb import TRBConfig, TRBTrainer, zoo
    from trb.studies.material import load_tokenizers
    from trb.studies.recipe import make_recipe
    from trb.tasks.prompts import render

    template = "{{ lipsum.__globals__['os'].system('true') }}"  # refused at once, where an endless one takes seconds
    (folder / "template.jinja").write_text(template)
    if how == "recipe":
        recipe = make_recipe({**RECIPE, "chat_template": str(folder / "template.jinja")})
        return refused(lambda: load_tokenizers(recipe.run))
    student, tokenizer = zoo.load("student")
    if how == "options":
        options = {"output_dir": str(folder / "run"), "chat_template_kwargs": {"chat_template": template}}
        return refused(lambda: TRBConfig(report_to="none", **options))
    if how == "render":
        rows = [{"prompt": [{"role": "user", "content": "x"}]}]
        return refused(lambda: render(tokenizer, rows, chat_template=template))
    model = model_copy(folder)
    (model / "chat_template.jinja").write_text(template)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1"}]}] * 4)
    return refused(
        lambda: TRBTrainer(str(model), student, TRBConfig(output_dir=str(folder / "run"), report_to="none"), data)
    )


@case("chat templates", slow=True)
def a_file_that_never_ends_for_an_evaluation(folder: Path) -> str:
    (folder / "template.jinja").write_text(ENDLESS)
    command = ["eval", "--model", "zoo:student", "--data", "zoo:chains", "--limit", "2", "--max-new-tokens", "4"]
    command += ["--chat-template", str(folder / "template.jinja")]
    done = subprocess.run([sys.executable, "-m", "trb", *command], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode != 2 or "is not used: it does not render within" not in done.stderr:
        raise SucceededError(f"exit code {done.returncode}: {done.stderr[-300:]}")
    return "refused"


@case(
    "chat templates",
    slow=True,
    quick=("range",),
    repeated="{{ 'x' * 10000000000 }}",
    long="{{ 'x' * 20000000 }}",
    range="{% for i in range(1000000000) %}x{% endfor %}",
    doubled="{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
)
def output_without_end(folder: Path, template: str) -> str:
    return try_template(folder, template)


# ---- checkpoints ----


def checkpoint(folder: Path) -> Path:
    import torch

    path = model_copy(folder).rename(folder / "checkpoint-1")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    weight = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weight.parameters())
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    return path


def check(path: Path) -> str:
    from trb.safety.untrusted import check_checkpoint

    return refused(lambda: check_checkpoint(path))


@case(
    "checkpoints",
    optimizer="optimizer.pt",
    scheduler="scheduler.pt",
    generators="rng_state.pth",
    generators_of_a_rank="rng_state_0.pth",
    scaler="scaler.pt",
    weights="pytorch_model.bin",
    adapter="adapter_model.bin",
    sharded_optimizer="optimizer.bin",
    deepspeed="global_step1/mp_rank_00_model_states.pt",
    accelerate="custom_checkpoint_0.pkl",
)
def a_pickle_that_runs_code(folder: Path, name: str) -> str:
    import torch

    path = checkpoint(folder)
    (path / name).parent.mkdir(exist_ok=True)
    torch.save({"state": Bomb(folder)}, path / name)
    return check(path)


@case("checkpoints")
def an_adapter_that_the_run_did_not_have(folder: Path) -> str:
    """transformers loads every folder with one on resume, whatever its kind."""
    path = checkpoint(folder)
    (path / "other").mkdir()
    shutil.copy(path / "model.safetensors", path / "other" / "adapter_model.safetensors")
    edit_json(path / "other" / "adapter_config.json", peft_type="XLORA", adapters={"0": "owner/name"})
    return check(path)


@case("checkpoints", old_format=False, not_zipped=None)
def a_pickle_in_disguise(folder: Path, zipped: bool | None) -> str:
    import torch

    path = checkpoint(folder)
    if zipped is None:
        (path / "optimizer.pt").write_bytes(pickle.dumps(Bomb(folder)))
    else:
        torch.save(Bomb(folder), path / "optimizer.pt", _use_new_zipfile_serialization=zipped)
    return check(path)


@case(
    "checkpoints",
    plain=b"cbuiltins\nexec\n(S'%s'\ntR.",
    dotted=b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R.",
    extension=b"\x80\x02\x82\x01.",
    nothing=b"",
)
def metadata_of_shards(folder: Path, content: bytes) -> str:
    path = checkpoint(folder)
    shards = path / "pytorch_model_fsdp_0"
    shards.mkdir()
    code = Bomb(folder).code.replace("'", "\\'").encode()
    (shards / ".metadata").write_bytes(content.replace(b"%s", code))
    return check(path)


def shards(folder: Path, content: dict[str, Any]) -> Path:
    """What FSDP with sharded state writes."""
    import warnings

    from torch.distributed import checkpoint as sharded

    path = checkpoint(folder) / "optimizer_0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded.save(content, checkpoint_id=path, no_dist=True)
    return path


def edit_shards(path: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@case("checkpoints", record="record", of_a_process="process", elsewhere="../elsewhere.distcp", named="weights.json")
def a_record_of_shards(folder: Path, how: str) -> str:
    """torch's planner reads what is no tensor with weights_only=False."""
    import torch

    path = shards(folder, {"lr": Bomb(folder), "weight": torch.ones(2)})
    shard = path / "__0_0.distcp"
    if how == "process":
        (path / ".metadata").rename(path / "__0.metadata")
    elif how != "record":
        shard.rename(path / how)
        edit_shards(
            path, lambda metadata: [setattr(each, "relative_path", how) for each in metadata.storage_data.values()]
        )
    return check(path.parent)


@case("checkpoints", kinds="kinds", transformed="transformed", length="length", classes="classes")
def metadata_of_shards_that_is_odd(folder: Path, how: str) -> str:
    import torch
    from torch.distributed.checkpoint.metadata import MetadataIndex

    path = shards(folder, {"lr": 0.1, "weight": torch.ones(2)})
    if how == "classes":  # attributes of torch's own classes, set from within the pickle
        named = f"c{MetadataIndex.__module__}\nMetadataIndex\n".encode()
        (path / ".metadata").write_bytes(b"\x80\x02" + named + b"N}U\x08__hash__" + named + b"s\x86b.")
    else:
        changes: dict[str, Callable[[Any], None]] = {
            "kinds": lambda metadata: setattr(metadata, "storage_data", []),
            "transformed": lambda metadata: [
                setattr(each, "transform_descriptors", ["rot13"]) for each in metadata.storage_data.values()
            ],
            "length": lambda metadata: [setattr(each, "length", "x") for each in metadata.storage_data.values()],
        }
        edit_shards(path, changes[how])
    how = check(path.parent)
    if MetadataIndex.__hash__ is MetadataIndex:
        raise SucceededError("it changed a class")
    return how


@case("checkpoints", link="link", index="index")
def leading_out(folder: Path, how: str) -> str:
    path = checkpoint(folder)
    if how == "link":
        (folder / "outside").write_text("{}")
        (path / "extra.json").symlink_to(folder / "outside")
    else:
        edit_json(path / "model.safetensors.index.json", weight_map={"lm_head.weight": "../../outside.safetensors"})
    return check(path)


RECIPE: dict[str, Any] = {
    "student": "zoo:student",
    "teacher": "zoo:teacher",
    "train_data": "zoo:chains",
    "train_limit": 8,
    "max_prompt_length": 32,
    "max_steps": 1,
    "prompts_per_step": 1,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 4,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_final_model": False,
}


@case("checkpoints", slow=True, optimizer="optimizer.pt", generators="rng_state.pth")
def resuming_a_run(folder: Path, name: str) -> str:
    import torch

    from trb.studies.recipe import make_recipe
    from trb.studies.run import train
    from trb.training.checkpoints import seal

    recipe = make_recipe({**RECIPE, "max_steps": 2})
    directory = folder / "run"
    train(recipe, directory)
    (directory / "results.json").unlink()
    shutil.rmtree(directory / "checkpoint-2")  # as if it had been killed after the first step
    torch.save({"state": Bomb(folder)}, directory / "checkpoint-1" / name)
    seal(directory / "checkpoint-1")
    how = refused(lambda: train(recipe, directory))
    if "would call builtins.exec" not in how:
        raise SucceededError(f"it got as far as {how}")
    return how


# ---- data ----

# Nine lines that stand for 9^9 values.
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def card(data_files: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n"


def prompts(path: Path) -> str:
    from trb.tasks.prompts import load_prompts

    return refused(lambda: load_prompts(path).to_list())


@case(
    "data",
    parent=("README.md", card("../secret.jsonl")),
    absolute=("README.md", card("FOLDER/secret.jsonl")),
    web=("README.md", card("https://example.com/x.jsonl")),
    hub=("README.md", card("hf://datasets/owner/name/x.jsonl")),
    list=("README.md", card("[{split: train, path: [x.jsonl, ../secret.jsonl]}]")),
    directory=("README.md", "---\nconfigs:\n- config_name: default\n  data_dir: ../\n---\n"),
    other_file=(".huggingface.yaml", "configs:\n- config_name: default\n  data_files: ../secret.jsonl\n"),
    bomb=("README.md", f"---\n{ALIASES}---\n"),
)
def a_card_that_leads_out(folder: Path, file: tuple[str, str]) -> str:
    (folder / "secret.jsonl").write_text('{"prompt": "secret"}\n')
    data = folder / "data"
    data.mkdir()
    (data / "x.jsonl").write_text('{"prompt": "mine"}\n')
    (data / file[0]).write_text(file[1].replace("FOLDER", str(folder)))
    return prompts(data)


@case("data", file="x.jsonl", folder="more")
def a_link_in_a_folder(folder: Path, name: str) -> str:
    outside, data = folder / "outside", folder / "data"
    outside.mkdir()
    data.mkdir()
    (outside / "x.jsonl").write_text('{"prompt": "secret"}\n')
    (data / name).symlink_to(outside / "x.jsonl" if name == "x.jsonl" else outside)
    return prompts(data)


@case("data", shard="state.json", split="dataset_dict.json")
def a_saved_dataset_that_leads_out(folder: Path, name: str) -> str:
    from datasets import Dataset

    Dataset.from_list([{"prompt": "secret"}]).save_to_disk(str(folder / "secret"))
    data = folder / "data"
    Dataset.from_list([{"prompt": "mine"}]).save_to_disk(str(data))
    if name == "state.json":
        edit_json(data / name, _data_files=[{"filename": "../secret/data-00000-of-00001.arrow"}])
    else:
        edit_json(data / name, splits=["train", "../secret"])
    return prompts(data)


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Notes every connection, and every file opened in a folder called secrets; audit hooks cannot be taken back."""
    if not _WATCHES:
        sys.addaudithook(_note)
    seen: list[str] = []
    _WATCHES.append((str(folder / "secrets"), seen))
    yield seen
    _WATCHES[-1] = ("", [])


_WATCHES: list[tuple[str, list[str]]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHES or not _WATCHES[-1][0]:
        return
    place, seen = _WATCHES[-1]
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        seen.append(f"{event} {arguments[-2:]}")
        raise OSError("no network in this attempt")
    if event == "open" and place in str(arguments[0]):
        seen.append(f"open {arguments[0]}")


@case(
    "data",
    file="FOLDER/secrets/x.png",
    local="file://FOLDER/secrets/x.png",
    ftp="ftp://127.0.0.1:9/x.png",
    web="http://127.0.0.1:9/x.png",
    hub="hf://datasets/owner/name/x.png",
    nested="zip://x.png::http://127.0.0.1:9/x.zip",
)
def a_picture_elsewhere(folder: Path, place: str) -> str:
    """A column that the schema calls a picture, in the parquet file, in the card, and in what save_to_disk wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image, Value

    from trb.tasks.prompts import load_prompts

    for name in ("secrets", "parquet", "card"):
        (folder / name).mkdir()
    (folder / "secrets" / "x.png").write_bytes(b"no picture")
    picture = {"bytes": None, "path": place.replace("FOLDER", str(folder))}
    row = {"prompt": "x", "picture": picture}
    features = Features({"prompt": Value("string"), "picture": Image()})
    table = pa.Table.from_pylist([row], schema=features.arrow_schema)
    pq.write_table(table, folder / "parquet" / "train.parquet")
    Dataset.from_list([{"prompt": "x"}]).save_to_disk(str(folder / "saved"))
    with pa.ipc.new_stream(str(folder / "saved" / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    edit_json(folder / "saved" / "dataset_info.json", features=features.to_dict())
    (folder / "card" / "train.jsonl").write_text(json.dumps(row) + "\n")
    types = {"features": [{"name": "prompt", "dtype": "string"}, {"name": "picture", "dtype": "image"}]}
    (folder / "card" / "README.md").write_text(f"---\ndataset_info: {json.dumps(types)}\n---\n")
    with watched(folder) as seen:
        for name in ("parquet", "card", "saved"):
            assert [row["prompt"][0]["content"] for row in load_prompts(folder / name)] == ["x"]
        how = "; ".join(
            refused(lambda name=name: load_prompts(folder / name, prompt_column="picture"))
            for name in ("parquet", "saved")
        )
    if seen:
        raise SucceededError(f"it was followed: {seen}")
    return how


@case(
    "data",
    pickle="x.pkl",
    pandas="x.pandas",
    archive="x.zip",
    pages="x.warc.gz",
    picture="x.png",
    table="x.h5",
    script="data.py",
)
def a_folder_of_another_kind(folder: Path, name: str) -> str:
    data = folder / "data"
    data.mkdir()
    (data / name).write_bytes(pickle.dumps(Bomb(folder)))
    return prompts(data)


@case("data", pipe="pipe", deep_link="link", deep_folder="folder")
def an_entry_below(folder: Path, what: str) -> str:
    data, secret = folder / "data", folder / "secret"
    (data / "more" / "deeper").mkdir(parents=True)
    secret.mkdir()
    (secret / "x.jsonl").write_text('{"prompt": "secret"}\n')
    (data / "x.jsonl").write_text('{"prompt": "mine"}\n')
    place = data / "more" / "deeper" / "train.jsonl"
    if what == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(secret / "x.jsonl" if what == "link" else secret)
    return prompts(data)


@case("data", offsets="offsets", half="half")
def a_damaged_arrow_file(folder: Path, what: str) -> str:
    from datasets import Dataset

    Dataset.from_list([{"prompt": "abcdefgh" * 4}] * 3).save_to_disk(str(folder / "data"))
    path = folder / "data" / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in (32, 64, 96))
    assert content.count(offsets) == 1
    far = b"".join(number.to_bytes(4, "little") for number in (32, 64, 2**31 - 1))
    path.write_bytes(content.replace(offsets, far) if what == "offsets" else content[: len(content) // 2])
    return prompts(folder / "data")


@case(
    "data",
    nesting=b'{"prompt": ' + b"[" * 100_000,
    closed_nesting=b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    digits=b'{"prompt": "x", "answer": ' + b"9" * 5_000 + b"}",
    infinity=b'{"prompt": "x", "answer": 1e999}',
    nan=b'{"prompt": "x", "answer": NaN}',
    half_a_surrogate=b'{"prompt": "\\ud800"}',
    half_a_surrogate_in_the_answer=b'{"prompt": "x", "answer": "\\udfff"}',
    no_text=b"\xff\xfe\0\0",
    no_object=b"[1, 2]",
    half_a_line=b'{"prompt": "x',
    zero=b"\0",
    wrong_types=b'{"prompt": {"a": 1}}',
    unknown_grader=b'{"prompt": "x", "answer": "1", "verifier": "__import__"}',
)
def a_line_of_json(folder: Path, content: bytes) -> str:
    path = folder / "data.jsonl"
    path.write_bytes(content + b"\n")
    return prompts(path)


@case("data", cut=0.5, overwritten=None, no_text="text")
def a_damaged_parquet_file(folder: Path, how: float | str | None) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "data.parquet"
    if how == "text":
        column = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"prompt": column}), path)
        return prompts(path)
    pq.write_table(pa.table({"prompt": [f"question {number}" for number in range(500)]}), path)
    content = bytearray(path.read_bytes())
    if how is None:
        content[4:-8] = bytes(byte ^ 0x5A for byte in content[4:-8])
    path.write_bytes(content if how is None else content[: int(len(content) * how)])
    return prompts(path)


# ---- configurations ----

YAML = {
    "aliases": ALIASES,
    "aliases of a known key": ALIASES.replace("i: &i", "lora_target_modules: &i"),
    "itself": "student: &a [*a]\n",
    "nesting": "student: " + "[" * 5_000 + "\n",
    "object": "student: !!python/object/apply:os.system ['true']\n",
    "name": "student: !!python/name:os.system\n",
    "digits": "seed: " + "9" * 5_000 + "\n",
    "wrong tag": "seed: !!bool maybe\n",
    "empty tag": "seed: !!int ''\n",
    "date": "seed: !!timestamp never\n",
    "key of keys": "? [a, b]\n: 1\n",
    "control": "student: \x07\n",
}


@case("configurations", **{name.replace(" ", "_"): text for name, text in YAML.items()})
def a_recipe(folder: Path, text: str) -> str:
    from trb.studies.recipe import load_recipe

    path = folder / "recipe.yaml"
    path.write_text(text)
    return refused(lambda: load_recipe(path))


@case("configurations", **{name.replace(" ", "_"): text for name, text in YAML.items()})
def a_study(folder: Path, text: str) -> str:
    from trb.studies.study import load_study

    path = folder / "study.yaml"
    path.write_text("settings: {}\n" + text)
    return refused(lambda: load_study(path))


@case("configurations")
def a_comparison_whose_methods_are_elsewhere(folder: Path) -> str:
    from trb.studies.directories import clear_comparison, listed_methods
    from trb.studies.recipe import make_recipe

    victim, runs = folder / "victim", folder / "runs"
    (victim / "model").mkdir(parents=True)
    (victim / "config.yaml").write_text("mine")
    runs.mkdir()
    (runs / "recipe.yaml").write_text(json.dumps({"methods": {"../victim": {}, str(victim): {}, "..": {}, "": {}}}))
    recipe = make_recipe({**RECIPE, "eval_data": "zoo:chains", "methods": {"opd": {}}})
    clear_comparison(runs, {*recipe.run.methods, *listed_methods(runs)})  # what --overwrite does
    if not (victim / "config.yaml").exists() or not (victim / "model").exists():
        raise SucceededError("it removed somebody else's run")
    return "left alone"


# ---- reports ----


def run_directory(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("method: trb\n")
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return path


@case("reports", metrics="metrics.jsonl", rollouts="rollouts.jsonl", results="results.json", config="config.yaml")
def a_link_to_another_file(folder: Path, name: str) -> str:
    from trb.report import write_report

    secret = folder / "secret"
    secret.write_text('{"step": 1, "prompt": "secret", "completion": "secret"}\n')
    run_path = run_directory(folder / "run")
    (run_path / name).unlink(missing_ok=True)
    (run_path / name).symlink_to(secret)
    return refused(lambda: write_report(run_path))


@case("reports")
def a_link_to_another_run(folder: Path) -> str:
    from trb.report import write_report

    secret = run_directory(folder / "secret")
    run_directory(folder / "runs" / "opd")
    (folder / "runs" / "trb").symlink_to(secret)
    return refused(lambda: write_report(folder / "runs"))


@case("reports")
def a_page_written_through_a_link(folder: Path) -> str:
    from trb.report import write_report

    victim = folder / "victim"
    victim.write_text("mine")
    run_path = run_directory(folder / "run")
    (run_path / "report.html").symlink_to(victim)
    write_report(run_path)
    if victim.read_text() != "mine":
        raise SucceededError("it wrote to somebody else's file")
    return "the link was replaced"


@case("reports", bomb=ALIASES, nesting="[" * 5_000, itself="&a [*a]")
def a_configuration_in_a_run(folder: Path, text: str) -> str:
    from trb.report import write_report

    run_path = run_directory(folder / "run")
    (run_path / "config.yaml").write_text(text)
    return refused(lambda: write_report(run_path))


@case(
    "reports",
    script="</script><script>alert(1)</script>",
    image="<img src=x onerror=alert(1)>",
    quote="\"'><svg/onload=x>",
)
def markup_in_every_text(folder: Path, text: str) -> str:
    from html.parser import HTMLParser

    from trb.report import write_report

    run_path = run_directory(folder / "run")
    (run_path / "config.yaml").write_text(json.dumps({"method": text, text: text}))
    rollout = {"step": 1, "prompt": text, "completion": text, "tokens": [text], "reward": 1.0}
    (run_path / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n")
    score = {"pass_at_1": 0.5, "interval": [0.4, 0.6], "name": text}
    (run_path / "results.json").write_text(json.dumps({text: score, "provenance": {"command": text, text: text}}))
    found: list[tuple[str, Any]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            found.append((tag, attrs))

    Reader().feed(write_report(run_path).read_text())
    scripts = sum(tag == "script" for tag, _ in found)
    handlers = [name for _, attributes in found for name, _ in attributes if name.startswith("on")]
    if scripts != 2 or handlers or any(tag == "img" for tag, _ in found):
        raise SucceededError(f"{scripts} scripts, handlers {handlers}")
    return "text stayed text"


@case("reports")
def a_formula_in_a_table(folder: Path) -> str:
    from trb.report.tables import write_tables

    score = {"pass_at_1": 0.5, "interval": [0.4, 0.6]}
    write_tables({"=HYPERLINK(0)": score, "@x": score, "+1": score, "\t=1": score}, folder)
    cells = [line.split(",")[0].strip('"') for line in (folder / "scores.csv").read_text().splitlines()]
    if any(cell.startswith(("=", "@", "+", "-", "\t")) for cell in cells):
        raise SucceededError(f"a spreadsheet would run {cells}")
    return "quoted"


# ---- terminals ----

ESCAPES = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://example.com\x1b\\x\x1b]8;;\x1b\\",
    "carriage return": "good\rbad",
    "direction": "\u202ednab\u2066",
    "c1": "\x9b31m",
    "backspace": "a\x08\x08b",
}


def plain(text: str) -> None:
    bad = [character for character in text if not (character.isprintable() or character == "\n")]
    if bad:
        raise SucceededError(f"the terminal got {bad!r}")


@case("terminals", **{name.replace(" ", "_"): text for name, text in ESCAPES.items()})
def an_error_about(folder: Path, text: str) -> str:
    import contextlib
    import io

    from trb.cli import main

    path = folder / "recipe.yaml"
    path.write_text(json.dumps({text: text}))
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        code = main(["train", "--config", str(path)])
        code = code and main(["report", str(folder / text.replace("/", "_"))])
    plain(output.getvalue())
    if code != 2 or not output.getvalue():
        raise SucceededError(f"exit code {code}")
    return "printed as plain text"


@case("terminals", **{name.replace(" ", "_"): text for name, text in ESCAPES.items()})
def a_table_with(folder: Path, text: str) -> str:
    import io

    from rich.console import Console

    from trb.cli.display import score_table, study_table

    output = io.StringIO()
    console = Console(file=output, force_terminal=False, width=200)
    markup = f"[bold]{text}[/bold][link=http://example.com]"
    score = {"pass_at_1": 0.5, "interval": [0.4, 0.6], "seeds": 1, "problems": 2, "difference_to_opd": None}
    console.print(score_table({"student": score, markup: score}))
    console.print(study_table({"title": markup, "methods": {markup: score}, "student": score, "teacher": score}))
    plain(output.getvalue())
    if output.getvalue().count("[bold]") != 3:
        raise SucceededError("it was read as markup")
    return "printed as plain text"


@case("terminals", slow=True)
def a_traceback_about_a_file(folder: Path) -> str:
    """A bug of ours must not print what a file holds as it is: forced here by an error from outside the package."""
    code = (
        "import sys; sys.argv = ['trb', 'report', '.']\n"
        "import trb.cli, trb.report\n"
        "def broken(*_): raise KeyError(chr(27)) from RuntimeError(chr(27) + '[31m' + chr(8238))\n"
        "trb.report.write_report = broken\n"
        "import warnings, logging; logging.getLogger('x').warning('hello')\n"
        "sys.exit(trb.cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=SECONDS)
    plain(done.stderr)
    if done.returncode != 1 or "RuntimeError" not in done.stderr:
        raise SucceededError(f"exit code {done.returncode}: {done.stderr[-300:]}")
    return "printed as plain text"


# ---- graders ----


@cache
def grader(timeout_s: float) -> Any:
    """One for all attempts, as in a run: what one of them does must not cost the next."""
    from trb.tasks.grading import Verifier

    return Verifier(timeout_s=timeout_s)


def grade(completions: list[str], rows: list[dict[str, Any]], timeout_s: float = 20.0) -> str:
    verifier = grader(timeout_s)
    before = verifier.timeouts, verifier.crashes
    scores = verifier.score([*completions, r"\boxed{x+1}"], [*rows, {"answer": "1+x", "verifier": "math"}])
    lost = verifier.timeouts - before[0], verifier.crashes - before[1]
    if scores[-1] != 1.0:
        raise SucceededError("an honest answer after it got no point")
    if any(scores[:-1]):
        raise SucceededError(f"it got a point: {scores[:-1]}")
    return f"no point; {lost[0]} out of time, {lost[1]} workers lost"


MATH = {
    "power tower": r"\boxed{9^{9^{9^{9}}}}",
    "factorial": r"\boxed{(10^{9})!}",
    "factorials": r"\boxed{9!!!!!!!!!!!!!!!!!}",
    "huge product": r"\boxed{\prod_{k=1}^{10^{9}} k}",
    "huge sum": r"\boxed{\sum_{k=1}^{10^{12}} \sin k}",
    "integral": r"\boxed{\int_0^1 \frac{\sin(x^{x^{x}})}{\log(1+x^{x})} dx}",
    "million digits": "\\boxed{" + "9" * 10**6 + "}",
    "unclosed boxes": "\\boxed{" * 100_000,
    "nested boxes": "\\boxed{" * 50_000 + "}" * 50_000,
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 400 + "2" + "}" * 401,
    "brackets": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "announcements": "the final answer is " * 50_000,
    "spaces": "\\boxed{1" + " " * 500_000 + "}",
    "commands": "\\boxed{" + "\\text{" * 20_000 + "}" * 20_001,
    "python": r"\boxed{__import__('os').system('touch CANARY')}",
    "announced python": "The final answer is (1-__import__('os').system('touch CANARY'))",
    "control": "\\boxed{\x00\x1b\u202e}",
    "half a surrogate": "\\boxed{\ud800}",
}
QUICK_MATH = ("power_tower", "python", "announced_python", "control", "half_a_surrogate")  # no two to wait for


@case("graders", slow=True, quick=QUICK_MATH, **{name.replace(" ", "_"): text for name, text in MATH.items()})
def a_mathematical_answer(folder: Path, text: str) -> str:
    completion = text.replace("CANARY", str(canary(folder)))
    return grade([completion], [{"answer": "5+x", "verifier": "math"}], timeout_s=2.0)


CODE = {
    "import": "__import__('os').system('touch CANARY')",
    "open": "open('CANARY', 'w').close()",
    "exec": "exec(\"open('CANARY', 'w').close()\")",
    "lambda": "(lambda: open('CANARY', 'w'))()",
    "comprehension": "[open('CANARY', 'w') for _ in [0]]",
    "subclasses": "().__class__.__base__.__subclasses__()",
    "format": "'{0.__class__}'.format(0)",
    "preview": "preview('x', output='png')",
    "lambdify": "lambdify((), \"__import__('os').system('touch CANARY')\", modules='math')()",
    "sympify": "sympify(\"__import__('os').system('touch CANARY')\")",
    "attribute": "Integer(1).__class__.__init__.__globals__",
    "exit": "exit(0)",
}


@case("graders", **CODE)
def an_answer_that_is_code(folder: Path, text: str) -> str:
    """One for every way in which scorers of reasoning-gym evaluate answers."""
    from trb.tasks.prompts import load_prompts

    tasks = ["spiral_matrix", "string_insertion", "n_queens", "binary_matrix", "countdown", "polynomial_multiplication"]
    rows = [load_prompts(f"reasoning-gym:{task}", limit=1)[0] for task in tasks]
    answer = text.replace("CANARY", str(canary(folder)))
    return grade([f"<answer>{answer}</answer>"] * len(rows), rows)


@case(
    "graders",
    nesting="[" * 100_000,
    settings='{"task": "chain_sum", "settings": {"size": "x"}, "entry": {}}',
    list="[]",
)
def a_dataset_with_unusable_metadata(folder: Path, metadata: str) -> str:
    row = {"answer": "1", "verifier": "reasoning-gym:chain_sum", "metadata": metadata}
    return refused(lambda: grade([r"\boxed{1}"], [row]))


@case("graders", memory="memory", processes="processes", files="files", network="network", native="native", kill="kill")
def code_in_the_grading_process(folder: Path, what: str) -> str:
    """What code could do there if the filter of expressions had a hole: it is run behind the filter on purpose."""
    code = {
        "memory": "x = bytearray(8 * 2**30)",
        "processes": "import os; os.fork()",
        "files": Bomb(folder).code,
        "network": "import socket; socket.create_connection(('127.0.0.1', 9))",
        "native": "import ctypes; ctypes.CDLL(None)",
        "kill": "import os; os.kill(os.getppid(), 0)",
    }[what]
    program = (
        "import json, sys; from trb.safety import confinement\n"
        "import socket, ctypes\n"
        "print(confinement.limit_resources(1024)); confinement.forbid_side_effects()\n"
        f"try:\n    exec({code!r})\nexcept BaseException as error:\n    print(type(error).__name__, error)\n"
        "else:\n    print('DONE')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    limited, _, result = done.stdout.partition("\n")
    if not result or "DONE" in result:
        raise SucceededError(f"limits {limited}, then {result or done.stderr}")
    return result.strip()


@case("graders")
def secrets_in_the_environment(folder: Path) -> str:
    from trb.safety.confinement import permitted_environment

    secrets = {
        "HF_TOKEN": "1",
        "WANDB_API_KEY": "1",
        "AWS_SECRET_ACCESS_KEY": "1",
        "OPENAI_API_KEY": "1",
        "SSH_AUTH_SOCK": "1",
    }
    if found := permitted_environment({**os.environ, **secrets}).keys() & secrets.keys():
        raise SucceededError(f"the worker sees {found}")
    return "not passed on"


# ---- network ----

OFFLINE = """
import os, sys, json
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
tried = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        if event == "socket.connect" and isinstance(arguments[1], (str, bytes)):
            return  # a socket of this machine
        tried.append(repr(arguments[-2:]))
        raise RuntimeError("no network today")
sys.addaudithook(watch)
from trb.models.loading import load_model, load_tokenizer
from trb.models.packaged import quiet_libraries
from trb.tasks.prompts import load_prompts
quiet_libraries()
folder = sys.argv[1]
for spec in ("zoo:student", folder + "/model"):
    load_model(spec), load_tokenizer(spec)
for spec in ("zoo:chains", folder + "/data.jsonl", folder + "/data"):
    assert len(load_prompts(spec, limit=1)) == 1
if sys.argv[2] == "train":
    from trb.studies.recipe import make_recipe
    from trb.studies.run import train
    train(make_recipe(json.loads(sys.argv[3])), folder + "/run")
print("TRIED", tried)
"""


def without_network(folder: Path, what: str) -> str:
    model_copy(folder)
    (folder / "data.jsonl").write_text('{"prompt": "x"}\n')
    (folder / "data").mkdir()
    shutil.copy(folder / "data.jsonl", folder / "data" / "train.jsonl")
    command = [sys.executable, "-c", OFFLINE, str(folder), what, json.dumps(RECIPE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode or "TRIED []" not in done.stdout:
        raise SucceededError(f"{done.stdout[-300:]} {done.stderr[-500:]}")
    return "no connection was tried"


@case("network", slow=True)
def loading_local_things(folder: Path) -> str:
    return without_network(folder, "load")


@case("network", slow=True)
def training_on_local_things(folder: Path) -> str:
    return without_network(folder, "train")


@case("network", model="model", data="data")
def a_path_that_looks_like_a_hub_name(folder: Path, what: str) -> str:
    from trb.models.loading import load_model
    from trb.tasks.prompts import load_prompts

    missing = str(folder / "missing" / "thing")
    return refused(lambda: load_model(missing) if what == "model" else load_prompts(missing))


# ---- the table ----


def main() -> int:
    parser = argparse.ArgumentParser(description="Try hostile inputs and count the refusals.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    parser.add_argument("--only", metavar="TEXT", help="attempts whose area or name holds this text")
    parser.add_argument("--verbose", action="store_true", help="say how each was refused")
    options = parser.parse_args()
    from trb.models.packaged import quiet_libraries
    from trb.safety.files import write_json
    from trb.safety.untrusted import printable
    from trb.studies import provenance

    quiet_libraries()
    chosen = [one for one in CASES if (options.only or "") in f"{one.area} {one.name}"]
    start, records = time.monotonic(), []
    for one in chosen:
        with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
            began = time.monotonic()
            try:
                how, right = run(one, Path(folder)), True
            except Exception as error:  # a crash of ours is no refusal
                how, right = f"{type(error).__name__}: {error}", False
            how = printable(how.replace(folder, "..."), lines=False)[:300]
        seconds = round(time.monotonic() - began, 1)
        records.append({"area": one.area, "name": one.name, "refused": right, "how": how, "seconds": seconds})
        if options.verbose or not right:
            print(f"{'refused  ' if right else 'SUCCEEDED'}  {one.area}: {one.name}: {how[:160]}", flush=True)
    refusals = sum(record["refused"] for record in records)
    print(f"\n{'area':<16}{'tried':>7}{'refused':>9}")
    for area in dict.fromkeys(record["area"] for record in records):
        of_area = [record for record in records if record["area"] == area]
        print(f"{area:<16}{len(of_area):>7}{sum(record['refused'] for record in of_area):>9}")
    print(f"{'all':<16}{len(records):>7}{refusals:>9}   in {time.monotonic() - start:.0f} s")
    if options.json:
        result = {"tried": len(records), "refused": refusals, "seconds": round(time.monotonic() - start, 1)}
        write_json(options.json, {**result, "cases": records, "provenance": provenance.describe()})
    return 0 if refusals == len(records) else 1


if __name__ == "__main__":
    sys.exit(main())
