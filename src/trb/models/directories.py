"""Directories with models that others wrote: what must be there, what is refused, and how failures are explained.

Left out: opening them (`trb.models.loading`), and what any foreign file has in common (`trb.safety.untrusted`).
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from trb import zoo
from trb.errors import FileError, InputError, MissingFileError, PackageError, did_you_mean
from trb.models.packaged import SMOLLM2, smollm2_directory
from trb.records import CHECKPOINT_PREFIX
from trb.safety.untrusted import check_weight_index, foreign_directory, printable

__all__ = [
    "BUILT_IN",
    "TOKENIZER_FILES",
    "check_config",
    "check_directory",
    "explained",
    "is_adapter",
    "local_directory",
    "snapshot_of",
    "token_ids_only",
]

BUILT_IN = (*(f"zoo:{name}" for name in zoo.MODELS), SMOLLM2)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

_LONGEST_CAUSE = 300


def local_directory(spec: str) -> Path | None:
    """Where a spec that needs no hub is stored; None for a hub id."""
    if spec in BUILT_IN:
        return smollm2_directory() if spec == SMOLLM2 else zoo.path(spec.removeprefix("zoo:"))
    path = Path(spec).expanduser()
    if path.is_dir():
        check_directory(path)
        return path
    if path.exists():
        raise InputError(f"{spec!r} is a file: name its directory, which must also hold config.json")
    # A hub id has at most one slash, so anything deeper can only be a directory that is not there.
    if spec.startswith((".", "/", "~")) or spec.count(os.sep) > 1:
        raise MissingFileError(f"no model at {spec!r}{_nearest_path(path)}")
    if not _HUB_ID.fullmatch(spec):
        hint = did_you_mean(spec, BUILT_IN)
        choices = f"{', '.join(BUILT_IN)}, a directory, or a hub id (owner/name)"
        raise InputError(f"cannot read the model spec {spec!r}: use one of {choices}{hint}")
    return None


def snapshot_of(spec: str, revision: str | None = None) -> Path | None:
    """The folder of a hub id, named by its commit, as far as the cache has it."""
    try:
        found = try_to_load_from_cache(spec, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_directory(path: Path) -> None:
    """Say what is wrong with a directory that holds no model, before a loader says it less clearly, and refuse one
    whose links or indices lead elsewhere. The hub's cache links its files, and may."""
    foreign_directory(path, also=Path(HF_HUB_CACHE))
    if not (path / "config.json").is_file() and not is_adapter(path):
        checkpoints = sorted(path.glob(f"{CHECKPOINT_PREFIX}*"), key=lambda p: (len(p.name), p.name))
        if checkpoints:
            raise MissingFileError(f"{path} holds checkpoints, not a model: name one, such as {checkpoints[-1]}")
        files = (file for deep in ("*", "*/*") for file in path.glob(f"{deep}/*config.json"))
        there = {str(file.parent) for file in files if file.name in ("config.json", "adapter_config.json")}
        models = sorted(place for place in there if CHECKPOINT_PREFIX not in place)
        if models:  # a run has its model in a folder, and a comparison has several runs
            raise MissingFileError(f"{path} holds no model itself: name one in it, {', '.join(models[:4])}")
        raise MissingFileError(f"{path} holds no model: it has neither config.json nor adapter_config.json")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        found = f"only pickled weights, {', '.join(pickled)}" if pickled else "no weights at all"
        remedy = "save the model again with model.save_pretrained"
        raise MissingFileError(f"{path} has no *.safetensors file ({found}): {remedy}")
    if (path / "adapter_config.json").is_file() and not (path / "adapter_model.safetensors").is_file():
        raise MissingFileError(f"{path} has no adapter_model.safetensors: only adapters saved as such are read")
    check_weight_index(path)


def _nearest_path(path: Path) -> str:
    """A hint that names the directory most like the first missing part of a path."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    siblings = [str(p) for p in missing.parent.iterdir() if p.is_dir()]
    return did_you_mean(str(missing), siblings) or f"; {missing.parent} has no directory {missing.name!r}"


@contextlib.contextmanager
def explained(source: Path | str, what: str) -> Iterator[None]:
    """Say which files are meant, whatever a library raised about them: its parsers raise anything on damaged ones."""
    try:
        yield
    except (MemoryError, PermissionError, torch.OutOfMemoryError):
        raise  # these say what is wrong; PermissionError names the file
    except ImportError as error:
        raise PackageError(f"the {what} of {source} needs a package: {error}") from error
    except (OSError, HFValidationError, SafetensorError) as error:
        raise _unavailable(source, what, error) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the {what} of {source} comes with Python code: set student_trust_remote_code or "
                "teacher_trust_remote_code (trb eval: --trust-remote-code) if you have read it and trust it"
            ) from error
        raise InputError(f"the {what} of {source} cannot be used: {error}") from error
    except Exception as error:
        raise _unavailable(source, what, error) from error


def _unavailable(source: Path | str, what: str, error: Exception) -> FileError:
    """Whose message keeps the cause: a thread that cannot be started is no damage, and many other things are not."""
    cause = printable(f"{type(error).__name__}: {' '.join(str(error).split())}", lines=False)[:_LONGEST_CAUSE]
    if isinstance(source, Path):
        return FileError(
            f"cannot read the {what} in {source} ({cause}); if its files are incomplete or damaged, save it again"
        )
    nearby = [str(p) for p in Path(source).parent.glob("*") if p.is_dir()]
    hint = did_you_mean(source, [*BUILT_IN, *nearby])
    if is_offline_mode():
        remedy = hint or "; download it once with `hf download`, or unset HF_HUB_OFFLINE"
        return FileError(
            f"the {what} of {source!r} is not in the hub cache and HF_HUB_OFFLINE is set, and there is no directory "
            f"{source!r} here{remedy} ({cause})"
        )
    return FileError(f"no directory {source!r} here, and the hub did not provide its {what}{hint} ({cause})")


def check_config(source: Path | str, *, trust_remote_code: bool = False, revision: str | None = None) -> None:
    """Refuse a configuration that names a kernel of the hub, unless remote code is trusted: a kernel is code.

    transformers downloads and imports what `attn_implementation` and `experts_implementation` name as owner/name, from
    config.json too. Raises ValueError, and OSError where there is no configuration to read.
    """
    if trust_remote_code:
        return
    with explained(source, "configuration"):
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        kernels = [name for name in _implementations(config) if "/" in name]
    if kernels:
        raise InputError(
            f"the configuration of {source} names the kernel {printable(kernels[0])!r}, which is code from the hub: "
            "remove it there, or set student_trust_remote_code or teacher_trust_remote_code if you trust it"
        )


def _implementations(config: Any, named: bool = False) -> Iterator[str]:
    """Every text under a key such as attn_implementation, at any depth."""
    if isinstance(config, str) and named:
        yield config
    elif isinstance(config, dict):
        for key, value in config.items():
            yield from _implementations(value, named or "_implementation" in str(key))
    elif isinstance(config, list):
        for value in config:
            yield from _implementations(value, named)


def token_ids_only(model: PreTrainedModel) -> GenerationConfig:
    """The model's special token ids without its sampling defaults.

    Published models ship temperature, top-k and top-p, and `generate` applies them to every call that does
    not say otherwise: the samples would no longer be the student's own.
    """
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        shipped = getattr(model.generation_config, name, None)
        ids[name] = getattr(model.config, name, None) if shipped is None else shipped
    return GenerationConfig(**ids)


def is_adapter(directory: Path) -> bool:
    """Whether it holds an adapter and no whole model; the configuration of its base may lie beside it."""
    weights = {path.name for path in directory.glob("*.safetensors")}
    return (directory / "adapter_config.json").is_file() and weights <= {"adapter_model.safetensors"}
