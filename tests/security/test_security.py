"""What the attempts of test_hostile_*.py leave open: that one that succeeds is noticed, and that honest files pass.

Every check has to let through what transformers, torch, datasets and PyYAML write themselves.
"""

import ast
import json
import logging
import os
import pickle
import random
import re
import shutil
import socket
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from datasets import Dataset, DatasetDict, Features, Image, Value
from hostile_helpers import Bomb, canary, checkpoint, guarded, model_copy, refused, shards, within
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from small_recipes import STUDY
from tiny_runs import build
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from trb import zoo
from trb.models import directories, loading
from trb.models.loading import load_model, load_tokenizer
from trb.safety import confinement
from trb.safety.templates import check_chat_template
from trb.safety.untrusted import check_checkpoint, check_weight_index, parse_json, parse_yaml, printable, require_inside
from trb.studies import workers
from trb.studies.study import Study
from trb.tasks.grading import Verifier
from trb.tasks.prompts import load_prompts

ROOT = Path(__file__).resolve().parents[2]


# ---- the net itself ----


def code_that_runs(folder: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(folder)))


def input_that_is_accepted(folder: Path) -> None:
    refused(lambda: load_tokenizer(zoo.path("student")))


def a_name_that_the_hub_is_asked_for(folder: Path) -> None:
    refused(lambda: load_model("owner/no-such-model"))


def a_loop(folder: Path) -> None:
    with within(0.1):
        while True:
            pass


@pytest.mark.parametrize(
    ("attempt", "why"),
    [
        (code_that_runs, "its code ran"),
        (input_that_is_accepted, "it was accepted"),
        (a_name_that_the_hub_is_asked_for, "it opened a connection: socket.getaddrinfo .*huggingface.co"),
        (a_loop, "still running after 0.1 s"),
    ],
)
def test_an_attempt_that_succeeds_is_noticed(
    attempt: Callable[[Path], None], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=why), guarded(tmp_path):
        attempt(tmp_path)


def test_attempts_are_refused_for_nothing_else(tmp_path: Path) -> None:
    """What they are made of is accepted."""
    load_model(str(model_copy(tmp_path)))
    check_checkpoint(checkpoint(tmp_path / "whole"))
    check_checkpoint(shards(tmp_path / "sharded", {"lr": 0.1, "weight": torch.ones(2)}).parent)


def test_attempts_are_counted(pytester: pytest.Pytester) -> None:
    """Also one whose code is noticed after the test, when its folder is looked into."""
    attempts = """
import pickle
from hostile_helpers import Bomb, each
@each("text", one_text=1, other=2)
def test_a_text(folder, text): assert text == 1
def test_a_bomb(folder): pickle.loads(pickle.dumps(Bomb(folder)))
"""
    pytester.makepyfile(test_hostile_inputs=attempts, test_other="def test_other(): pass")
    pytester.runpytest_inprocess("-p", "hostile_helpers", "--attempts-json", "attempts.json")
    result = json.loads((pytester.path / "attempts.json").read_text())
    assert (result["tried"], result["refused"]) == (3, 1)
    assert [(case["area"], case["name"], case["refused"]) for case in result["cases"]] == [
        ("inputs", "a bomb", False),
        ("inputs", "a text: one text", True),
        ("inputs", "a text: other", False),
    ]
    assert result["provenance"].keys() >= {"command", "commit", "versions", "machine"}


def test_the_count_in_the_documents_is_of_these_attempts() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "hostile.json").read_text())
    counted = {(case["area"], case["name"].partition(":")[0]) for case in result["cases"]}
    written = {
        (path.stem.removeprefix("test_hostile_").replace("_", " "), name.replace("_", " "))
        for path in Path(__file__).parent.glob("test_hostile_*.py")
        for name in re.findall(r"^def test_(\w+)\(", path.read_text(), re.M)
    }
    assert counted == written, "run `make hostile`"
    assert f"{result['refused']} of {result['tried']}" in (ROOT / "SECURITY.md").read_text()
    assert f"| {result['refused']} / {result['tried']} |" in (ROOT / "docs" / "robustness.md").read_text()


# ---- the network ----


def test_local_things_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody set HF_HUB_OFFLINE, and even where asking would have been cheap."""

    def connect(*arguments: Any) -> None:
        raise AssertionError(f"tried to reach {arguments[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: connect(None, *arguments))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert not huggingface_hub.is_offline_mode()
    model = shutil.copytree(zoo.path("student"), tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "folder" / "train.jsonl")
    for spec in ("zoo:teacher", str(model)):
        assert load_model(spec).num_parameters() > 0
        assert len(load_tokenizer(spec)) > 0
    for spec in ("zoo:chains", tmp_path / "data.jsonl", tmp_path / "folder"):
        assert len(load_prompts(spec, limit=1)) == 1
    with pytest.raises(OSError, match="the hub did not provide"):  # a hub name, and nothing else, asks
        load_model("owner/no-such-model")


def test_ray_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    ray = ModuleType("ray")
    ray.init = lambda **_: seen.append(os.environ.get("RAY_USAGE_STATS_ENABLED"))  # type: ignore[attr-defined]
    ray.shutdown = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    study = Study.model_validate(STUDY)
    with workers.open_pool(tmp_path, study, None, "local", 0.0, False):
        assert seen == ["0"]


# ---- checkpoints ----


def write_checkpoint(path: Path) -> Path:
    """What transformers writes into one: see Trainer._save_checkpoint."""
    path.mkdir()
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save(scheduler.state_dict(), path / "scheduler.pt")
    generators = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(generators, path / "rng_state.pth")
    (path / "training_args.bin").write_bytes(pickle.dumps(Bomb(path)))  # which nobody reads
    (path / "trainer_state.json").write_text("{}")
    return path


def test_a_checkpoint_of_transformers_passes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint-1")
    check_checkpoint(path)
    assert not canary(path).exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_of_torch_passes(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as sharded

    layer = torch.nn.Linear(2, 2).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    sharded.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "shards")
    assert (tmp_path / "shards" / ".metadata").is_file()
    check_checkpoint(tmp_path)


class AttributeOf:
    """Pickled as Python 3.11.2, Debian 12's, pickles a member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize(
    ("owner", "name", "complaint"),
    [
        (_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT", None),
        (_MEM_FORMAT_ENCODING, "__init__", "damaged"),
        (_MEM_FORMAT_ENCODING, "mro", "damaged"),
        (Metadata, "__init__", "would call builtins.getattr"),
        (torch.Size, "count", "would call builtins.getattr"),
        (AttributeOf(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"), "value", "would call builtins.getattr"),
    ],
    ids=["a member", "a method of members", "a method", "of a record", "of a size", "of a member"],
)
def test_of_an_enumeration_a_member_may_be_named(tmp_path: Path, owner: Any, name: str, complaint: str | None) -> None:
    """However a version of Python spells it; no other attribute, and none of anything else."""
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    metadata.planner_data = AttributeOf(owner, name)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    if complaint is None:
        check_checkpoint(tmp_path)
    else:
        with pytest.raises(ValueError, match=complaint):
            check_checkpoint(tmp_path)


def test_a_checkpoint_is_looked_into_before_any_library_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's loader is called before the trainer's own."""
    monkeypatch.setattr(transformers.Trainer, "train", lambda *_, **__: pytest.fail("it was handed on"))
    path = write_checkpoint(tmp_path / "checkpoint-1")
    (path / "global_step1").mkdir()
    torch.save(Bomb(path), path / "global_step1" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt would call builtins.exec"):
        build(tmp_path / "run").train(resume_from_checkpoint=str(path), verify=False)


def test_the_best_model_is_looked_into_too(tmp_path: Path) -> None:
    """Which one that is stands in the trainer_state.json of the checkpoint."""
    trainer = build(tmp_path / "run")
    path = write_checkpoint(tmp_path / "elsewhere")
    torch.save(Bomb(path), path / "pytorch_model.bin")
    trainer.state.best_model_checkpoint = str(path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds weights as a pickle"):
        trainer._load_best_model()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_attempts_on_shards_are_real(tmp_path: Path) -> None:
    """Were it not refused, torch would run it, and under weights_only=True it would not have to."""
    from torch.distributed import checkpoint as sharded

    path = shards(tmp_path, {"lr": Bomb(tmp_path)})
    with pytest.raises(ValueError, match=r"__0_0.distcp holds a record that could run code .*TRB_TRUST_CHECKPOINTS=1"):
        check_checkpoint(path)
    assert not canary(tmp_path).exists()
    sharded.load({"lr": 0.0}, checkpoint_id=path)
    assert canary(tmp_path).exists()


def test_the_owner_may_turn_the_check_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "checkpoint-1")
    torch.save(Bomb(path), path / "states.pt")
    with pytest.raises(ValueError, match=r"states.pt would call builtins.exec .* TRB_TRUST_CHECKPOINTS=1"):
        check_checkpoint(path)
    monkeypatch.setenv("TRB_TRUST_CHECKPOINTS", "1")
    check_checkpoint(path)


def test_an_index_of_transformers_passes(tmp_path: Path) -> None:
    model = load_model("zoo:student")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    check_weight_index(tmp_path)
    load_tokenizer("zoo:student").save_pretrained(tmp_path)
    weights = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


# ---- links ----


def test_the_hub_s_cache_may_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snapshots are links to blobs beside them."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    shutil.copytree(zoo.path("student"), blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    with pytest.raises(ValueError, match="leads out of"):
        load_model(str(snapshot))
    monkeypatch.setattr(directories, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_model(str(snapshot)).num_parameters() > 0


def test_links_inside_a_folder_and_to_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("x")
    (folder / "b").symlink_to("a")
    assert require_inside(folder / "b", folder) == folder / "b"
    assert require_inside(folder / ".." / "folder" / "a", folder)
    (tmp_path / "other").symlink_to(folder)
    assert require_inside(tmp_path / "other" / "a", tmp_path / "other")  # the folder itself may be a link
    (folder / "loop").symlink_to("loop")
    (folder / "up").symlink_to("..")
    for name in ("up", "../x", "up/folder2"):
        with pytest.raises(ValueError, match="leads out of"):
            require_inside(folder / name, folder)


# ---- data ----


def test_a_card_that_stays_at_home_is_honoured(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: b*.jsonl\n---\nA card.\n")
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    assert [row["prompt"][0]["content"] for row in load_prompts(tmp_path)] == ["b"]


def test_a_card_s_configurations_and_splits_are_honoured(tmp_path: Path) -> None:
    configs = """configs:
- config_name: other
  data_files: [{split: train, path: a.jsonl}]
- config_name: mine
  default: true
  data_dir: sub
"""
    (tmp_path / "README.md").write_text(f"---\n{configs}---\n")
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "sub/train.jsonl", "sub/test-0.jsonl", "sub/test-1.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": f"{name} {row}"}) + "\n" for row in range(2)))

    def read(**options: Any) -> list[str]:
        return [row["prompt"][0]["content"] for row in load_prompts(tmp_path, **options)]

    assert read() == ["sub/train.jsonl 0", "sub/train.jsonl 1"]
    tests = [f"sub/test-{file}.jsonl {row}" for file in range(2) for row in range(2)]
    assert read(split="test") == tests
    assert set(read(split="test", limit=3)) < set(tests)
    with pytest.raises(ValueError, match=r"no split 'validation', only \['test', 'train'\]"):
        read(split="validation")
    (tmp_path / "README.md").write_text(f"---\n{configs.replace('default: true', 'extra: 1')}---\n")
    with pytest.raises(ValueError, match=r"configurations \['other', 'mine'\]"):
        read()


def test_only_the_columns_that_are_used_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{number}"}], "picture": "x", "answer": number} for number in "ab"]
    asked = []
    read = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda self, columns: asked.append(columns) or read(self, columns=columns)
    )
    for number, row in enumerate(rows):
        Dataset.from_list([row]).to_parquet(str(tmp_path / f"train-0000{number}-of-00002.parquet"))
    assert [row["answer"] for row in load_prompts(tmp_path)] == ["a", "b"]
    assert [row["prompt"] for row in load_prompts(tmp_path)] == [row["prompt"] for row in rows]
    assert asked == [["prompt", "answer"]] * 4


def test_pictures_of_a_data_set_on_the_hub_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"prompt": Value("string"), "picture": Image()})
    rows = [{"prompt": "x", "picture": {"path": str(tmp_path / "none.png"), "bytes": None}}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_list(rows, features=features))
    assert load_prompts("owner/name")[0]["prompt"] == [{"role": "user", "content": "x"}]


def test_saved_datasets_pass(tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": "x"}] * 4).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert len(load_prompts(tmp_path / "saved")) == 4
    splits = DatasetDict({name: Dataset.from_list([{"prompt": name}]) for name in ("train", "test")})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert load_prompts(tmp_path / "splits", split="test")[0]["prompt"][0]["content"] == "test"
    with pytest.raises(ValueError, match=r"no split 'x', only \['test', 'train'\]"):
        load_prompts(tmp_path / "splits", split="x")


def test_long_numbers_and_strange_text_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "a\0b\x1b[31m\u202e", "answer": 10**400}, {"prompt": "𝕏", "answer": 0.5}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_prompts(tmp_path / "data.jsonl").to_list()
    assert [row["prompt"][0]["content"] for row in read] == [row["prompt"] for row in rows]
    assert [row["answer"] for row in read] == ["1" + "0" * 400, "0.5"]


# ---- who opens what ----

# What reads other people's files by itself, and where it may be called: behind `foreign_directory`, `check_model`,
# `check_checkpoint` or, for templates, in `take_template`. Whatever is added here needs its check first.
OPENERS = {
    "from_pretrained": {
        "models.loading.load_tokenizer", "models.loading._load_weights", "models.adapters.attach_adapter",
        "models.packaged._convert_gguf", "cli.outline.outline", "training.vllm._check_shape", "zoo.load",
    },
    "create_model_from_path": {"training.pair.load_teacher"},
    "get_config_dict": {"models.directories.check_config"},
    "load_dataset": {"tasks.sources._from_hub"},
    "load_from_disk": set(),
    "load_adapter": set(),
    "load_dataset_builder": set(),
    "torch.load": {"safety.untrusted._check_record"},
    "pickle.load": set(),
    "pickle.loads": set(),
    "foreign_directory": {
        "models.directories.check_directory", "tasks.sources._from_folder", "safety.untrusted.check_checkpoint",
        "cli.outline.outline",
    },
    "check_chat_template": {"models.loading.take_template", "tasks.prompts.render"},
    "chat_template =": {
        "models.loading.take_template", "safety.templates._rendering_problem", "zoo.tokenizer._wrapped",
        "cli.draft.draft",  # the key of a recipe, a template that ships with the package
        "tools.chats.ToolChat", "zoo.tokenizer.calling_tokenizer",  # TRL's own, and one of the package
    },
}  # fmt: skip


def opened() -> dict[str, set[str]]:
    """Where the package calls one of OPENERS, or sets a chat template, as module.function."""
    found: dict[str, set[str]] = {name: set() for name in OPENERS}

    def visit(node: ast.AST, place: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and place.count(":") == 0:
            place = f"{place}:{node.name}"
        names = []
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            names = [name for name in OPENERS if text == name or text.endswith(f".{name}")]
            names += ["chat_template ="] * any(keyword.arg == "chat_template" for keyword in node.keywords)
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = ["chat_template ="] * any(ast.unparse(target).endswith(".chat_template") for target in targets)
        for name in names:
            found[name].add(place.replace(":", "."))
        for child in ast.iter_child_nodes(node):
            visit(child, place)

    package = ROOT / "src" / "trb"
    for path in package.rglob("*.py"):
        module = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        visit(ast.parse(path.read_text()), module)
    return found


def test_one_function_opens_foreign_directories_and_one_takes_templates() -> None:
    assert opened() == OPENERS


# ---- chat templates ----

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% generation %}{% endgeneration %}{{ strftime_now('%d %b') }}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('none, please') }}{% endif %}x"


@pytest.mark.parametrize("template", [None, {"default": CHATML, "tools": NO_SYSTEM}], ids=["none", "ordinary"])
def test_ordinary_templates_pass(template: Any) -> None:
    check_chat_template(template, "here")


def test_our_own_templates_are_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tried(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(loading, "check_chat_template", tried)
    load_tokenizer("zoo:student")
    load_tokenizer(str(shutil.copytree(zoo.path("teacher"), tmp_path / "model")))


# ---- parsers ----


def test_anchors_and_merges_are_read() -> None:
    text = "base: &b {x: 1, y: [1, 2]}\nother: {<<: *b, y: 3}\nlist: [*b, *b]\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None


def test_only_safe_loaders_are_taken() -> None:
    with pytest.raises(TypeError, match="FullLoader is no safe loader"):
        parse_yaml("a: 1", yaml.FullLoader)  # type: ignore[arg-type]


def test_json_errors_keep_their_place() -> None:
    with pytest.raises(json.JSONDecodeError, match="line 2 column 1"):
        parse_json("{\n]")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


# ---- terminals ----


def test_ordinary_text_is_printed_as_it_is() -> None:
    text = "Grüße, 你好, 🙂, naïve `[bold]` \\x1b %s\nsecond line"
    assert printable(text) == text
    assert printable(text, lines=False) == text.replace("\n", "?")


# ---- graders ----


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("[['_', 'Q'], [1, -2.5]]", [["_", "Q"], [1, -2.5]]),
        ("(0x1f + 2) * 3 // 4", 24),
        ("{'a': 1, 2: (3,)}", {"a": 1, 2: (3,)}),
    ],
)
def test_literals_and_arithmetic_are_evaluated(expression: str, value: Any) -> None:
    assert confinement.arithmetic(expression) == value


def test_sympy_reads_what_it_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from sympy.parsing import sympy_parser

    texts = [
        "3*x**2 - sin(y)/2",
        "sqrt(8) + cbrt(27)",
        "5!",
        "Integer(3) + Rational(1, 2)",
        "log(x, 2)",
        "pi + E",
        "(1, 2)",
    ]
    before = [sympy_parser.parse_expr(text) for text in texts]
    unevaluated = sympy_parser.parse_expr("1 + 2", evaluate=False)
    monkeypatch.setattr(sympy_parser, "eval_expr", sympy_parser.eval_expr)  # put back at the end
    confinement.tame_sympy()
    assert [sympy_parser.parse_expr(text) for text in texts] == before
    assert str(sympy_parser.parse_expr("1 + 2", evaluate=False)) == str(unevaluated)
    with pytest.raises(ValueError, match=r"uses '.*', which answers may not"):
        sympy_parser.parse_expr("__import__('os')")
    with pytest.raises(ValueError, match=r"uses '.*', which answers may not"):
        sympy_parser.parse_expr("x.__class__", evaluate=False)


def test_a_system_without_limits_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The module `resource` is missing on Windows; time is limited there all the same."""
    (tmp_path / "resource.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)  # the grader looks for modules where this process does
    with caplog.at_level(logging.WARNING), Verifier(timeout_s=20) as verifier:
        assert verifier.score([r"\boxed{x+1}"], [{"answer": "1+x"}]) == [1.0]
    assert "cannot limit the memory" in caplog.text


def test_the_limits_are_set_where_there_are_some(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("resource")
    with caplog.at_level(logging.WARNING), Verifier(timeout_s=20) as verifier:
        assert verifier.score([r"\boxed{x+1}"], [{"answer": "1+x"}]) == [1.0]
    assert not caplog.text


# ---- dependencies ----


def locked() -> dict[str, list[str]]:
    """`name==version` -> the hashes of its files, as requirements.lock has them."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line.startswith("    --hash=sha256:"):
            found[name].append(line.removeprefix("    --hash=sha256:").removesuffix(" \\"))
        elif line and not line.startswith("#"):
            name = line.removesuffix(" \\")
            found[name] = []
    return found


def test_the_lock_holds_every_dependency_in_the_tested_version() -> None:
    lock = {Requirement(line).name: Requirement(line) for line in locked()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    assert {item.name for item in needed} - lock.keys() == {"torch"}
    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    tested = {canonicalize_name(item.name): str(item.specifier) for item in pins}
    for name, item in lock.items():
        assert str(item.specifier).startswith("=="), f"{name} is not pinned"
        assert str(item.specifier) == tested.get(name, str(item.specifier)), f"{name} differs from constraints.txt"
    for item in needed:
        if item.name != "torch":
            version = str(lock[item.name].specifier).removeprefix("==")
            assert item.specifier.contains(version), f"{item.name} {version} is outside of pyproject.toml's range"


def test_the_lock_hashes_every_file() -> None:
    for line, hashes in locked().items():
        assert hashes, f"{line} has no hash"
        assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes), f"{line} has a hash that is none"
