"""Checkpoints made to run code, in every file that some library unpickles on resume."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_helpers import RECIPE, Bomb, checkpoint, each, edit_json, refused, shards, slow
from torch.distributed.checkpoint.metadata import MetadataIndex

from trb.safety.untrusted import check_checkpoint
from trb.studies.recipe import make_recipe
from trb.studies.run import train
from trb.training.checkpoints import seal


def check_refused(path: Path) -> None:
    refused(lambda: check_checkpoint(path))


@each(
    "name",
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
def test_a_pickle_that_runs_code(folder: Path, name: str) -> None:
    path = checkpoint(folder)
    (path / name).parent.mkdir(exist_ok=True)
    torch.save({"state": Bomb(folder)}, path / name)
    check_refused(path)


def test_an_adapter_that_the_run_did_not_have(folder: Path) -> None:
    """transformers loads every folder with one on resume, whatever its kind."""
    path = checkpoint(folder)
    (path / "other").mkdir()
    shutil.copy(path / "model.safetensors", path / "other" / "adapter_model.safetensors")
    edit_json(path / "other" / "adapter_config.json", peft_type="XLORA", adapters={"0": "owner/name"})
    check_refused(path)


@each("zipped", old_format=False, not_zipped=None)
def test_a_pickle_in_disguise(folder: Path, zipped: bool | None) -> None:
    path = checkpoint(folder)
    if zipped is None:
        (path / "optimizer.pt").write_bytes(pickle.dumps(Bomb(folder)))
    else:
        torch.save(Bomb(folder), path / "optimizer.pt", _use_new_zipfile_serialization=zipped)
    check_refused(path)


@each(
    "content",
    plain=b"cbuiltins\nexec\n(S'%s'\ntR.",
    dotted=b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R.",
    extension=b"\x80\x02\x82\x01.",
    nothing=b"",
)
def test_metadata_of_shards(folder: Path, content: bytes) -> None:
    path = checkpoint(folder)
    (path / "pytorch_model_fsdp_0").mkdir()
    code = Bomb(folder).code.replace("'", "\\'").encode()
    (path / "pytorch_model_fsdp_0" / ".metadata").write_bytes(content.replace(b"%s", code))
    check_refused(path)


def edit_shards(path: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@each("how", record="record", of_a_process="process", elsewhere="../elsewhere.distcp", named="weights.json")
def test_a_record_of_shards(folder: Path, how: str) -> None:
    """torch's planner reads what is no tensor with weights_only=False."""
    path = shards(folder, {"lr": Bomb(folder), "weight": torch.ones(2)})
    shard = path / "__0_0.distcp"
    if how == "process":
        (path / ".metadata").rename(path / "__0.metadata")
    elif how != "record":
        shard.rename(path / how)
        edit_shards(
            path, lambda metadata: [setattr(each, "relative_path", how) for each in metadata.storage_data.values()]
        )
    check_refused(path.parent)


@each("how", kinds="kinds", transformed="transformed", length="length", classes="classes")
def test_metadata_of_shards_that_is_odd(folder: Path, how: str) -> None:
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
    check_refused(path.parent)
    assert MetadataIndex.__hash__ is not MetadataIndex, "it changed a class"


@each("how", link="link", index="index")
def test_leading_out(folder: Path, how: str) -> None:
    path = checkpoint(folder)
    if how == "link":
        (folder / "outside").write_text("{}")
        (path / "extra.json").symlink_to(folder / "outside")
    else:
        edit_json(path / "model.safetensors.index.json", weight_map={"lm_head.weight": "../../outside.safetensors"})
    check_refused(path)


@slow
@each("name", optimizer="optimizer.pt", generators="rng_state.pth")
def test_resuming_a_run(folder: Path, name: str) -> None:
    recipe = make_recipe({**RECIPE, "max_steps": 2})
    directory = folder / "run"
    train(recipe, directory)
    (directory / "results.json").unlink()
    shutil.rmtree(directory / "checkpoint-2")  # as if it had been killed after the first step
    torch.save({"state": Bomb(folder)}, directory / "checkpoint-1" / name)
    seal(directory / "checkpoint-1")
    assert "would call builtins.exec" in refused(lambda: train(recipe, directory))
