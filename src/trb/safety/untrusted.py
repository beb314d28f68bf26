"""What every reader of other people's files shares: printable text, bounded parsers, safe paths and pickles.

Paths stay inside their folder, and pickles are looked into without opening them.

Functions refuse with a ValueError that says what is wrong; none of them executes, downloads or follows anything.
`SECURITY.md` says which inputs are trusted and which are not.

Left out on purpose: what a file has to contain (the modules that read it know), and the sizes of files.
"""

import json
import math
import os
import pickle
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trb.errors import InputError

if TYPE_CHECKING:
    import yaml

__all__ = [
    "check_checkpoint",
    "check_text",
    "check_weight_index",
    "foreign_directory",
    "lora_options",
    "parse_json",
    "parse_yaml",
    "printable",
    "read_object",
    "require_inside",
]

# ---- terminals ----


def printable(text: str, *, lines: bool = True) -> str:
    """`text` with "?" for every character that a terminal obeys instead of showing.

    Those are escape sequences, carriage returns and other control characters, changes of the writing direction, and
    lone surrogates. Line ends stay unless `lines` is false.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else "?" for c in text)


def check_text(text: str, what: str) -> None:
    """Refuse what JSON and YAML can write and no encoding holds; raises InputError, which begins with `what`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds half a surrogate pair, {text[error.start]!r} at character {error.start + 1}, which is no "
            "text; remove it, or write the character itself"
        ) from error


# ---- parsers ----

MAX_YAML_NODES = 100_000  # values in one document, every use of an alias counted again


def parse_json(text: str | bytes) -> Any:
    """`json.loads` whose every refusal is a ValueError: also of nesting deeper than the interpreter's stack."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file for anything else, OSError if it cannot be read."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a value of type {type(value).__name__}; it must hold a JSON object")
    return value


def parse_yaml(text: str, loader: "type[yaml.SafeLoader] | None" = None) -> Any:
    """One YAML document, read safely and bounded.

    Aliases let a few lines stand for billions of values (each list holding the one before it ten times), which is
    harmless until something prints or copies them: documents of more than MAX_YAML_NODES values are refused.

    Raises yaml.YAMLError for what is no YAML or names types of Python, and ValueError for documents that are too large,
    nested too deeply or hold themselves.
    """
    import yaml

    if loader is not None and not issubclass(loader, yaml.SafeLoader):
        raise TypeError(f"{loader.__name__} is no safe loader")
    reader = (loader or yaml.SafeLoader)(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MAX_YAML_NODES:
            raise InputError(f"it stands for more than {MAX_YAML_NODES:,} values, aliases written out")
        return reader.construct_document(node)
    except RecursionError as error:
        raise InputError("it is nested too deeply, or holds itself") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # PyYAML on tags such as !!bool 7
        raise InputError(f"a tag does not fit its value ({error!r})") from error
    finally:
        reader.dispose()


def _expanded(node: "yaml.Node", known: dict[int, int]) -> int:
    """How many nodes a document has when every alias is written out. A node that holds itself never ends."""
    if id(node) not in known:
        children = node.value if isinstance(node.value, list) else []
        flat = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        known[id(node)] = 1 + sum(_expanded(child, known) for child in flat)
    return known[id(node)]


# ---- paths ----


def require_inside(path: Path, folder: Path, *, also: Path | None = None) -> Path:
    """`path`, unless links or ".." take it out of `folder` (and out of `also`). Raises ValueError naming where to."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is a link that leads nowhere: {error}") from error
    if not any(target.is_relative_to(root.resolve()) for root in (folder, also) if root is not None):
        raise InputError(f"{path} leads out of {folder}, to {target}: copy what it names into the folder")
    return path


def foreign_directory(directory: Path, *, also: Path | None = None) -> None:
    """Refuse a directory that somebody else may have filled, before anything opens a file in it.

    At any depth, links must stay inside (or in `also`: the hub's cache links its files), and everything else must be a
    file or a folder: a pipe would be read for ever, a device could answer anything.

    Raises ValueError naming the entry.
    """
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = require_inside(Path(folder, name), directory, also=also)
            if not (path.is_file() or path.is_dir()):
                raise InputError(f"{path} is neither a file nor a folder: remove it")


def check_weight_index(directory: Path) -> None:
    """Refuse an index that sends a reader of `directory`'s weights elsewhere, or to a pickle. Raises ValueError."""
    for index in sorted(directory.glob("*.index.json")):
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index} maps no weights to files: save the model again")
        for shard in dict.fromkeys(map(str, shards.values())):
            if not shard.endswith(".safetensors") or shard != os.path.basename(shard) or "\\" in shard:
                raise InputError(f"{index} names {printable(shard)!r:.200}: weights are *.safetensors files beside it")


# ---- adapters ----

_PLAIN_NAME = re.compile(r"[\w.-]+")  # as a regular expression, it takes time linear in what it is compared with
_INITIALS = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d+)?")


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_name(value: Any) -> bool:
    return type(value) is str and _PLAIN_NAME.fullmatch(value) is not None


def _are_names(value: Any) -> bool:
    return all(map(_is_name, value)) if isinstance(value, list) else _is_name(value)


def _are_layers(value: Any) -> bool:
    return all(type(layer) is int for layer in (value if isinstance(value, list) else [value]))


def _are_numbers_of_names(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(k.removeprefix("^")) and _is_number(v) for k, v in value.items())


# What PEFT is told, and what it may be told. Names of modules are regular expressions to PEFT.
_LORA: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), (_is_number, "a number")),
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying", "inference_mode"),
        (_is_flag, "true or false"),
    ),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"),
        (_are_names, "plain names of modules"),
    ),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (_are_numbers_of_names, "numbers by plain names of modules")),
    "layers_to_transform": (_are_layers, "numbers of layers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "task_type": (lambda value: value == "CAUSAL_LM", "CAUSAL_LM"),
    "peft_type": (lambda value: value == "LORA", "LORA"),
    "base_model_name_or_path": (lambda value: type(value) is str, "text"),
    "revision": (lambda value: type(value) is str, "text"),
    "init_lora_weights": (
        lambda value: _is_flag(value) or (type(value) is str and _INITIALS.fullmatch(value) is not None),
        "true, false, gaussian, orthogonal, olora or pissa",
    ),
}
_NOT_PASSED_ON = ("auto_mapping", "peft_version", "inference_mode", "peft_type")
_OFF = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # what PEFT writes where these are not in use


def lora_options(path: Path) -> dict[str, Any]:
    """What an adapter_config.json says, as keyword arguments of `peft.LoraConfig`.

    PEFT takes more from such a file than is safe: adapters of the hub, modules to import, files of torch.save, and
    regular expressions that never end. What is here are options of LoRA with values of the right kind; PEFT does not
    see the file. Options that are switched off (null, false, empty) may have any name.

    Raises ValueError naming the file, the option and the reason, OSError if it cannot be read.
    """
    options = {}
    for key, value in read_object(path).items():
        if value is None or key in _NOT_PASSED_ON[:2]:
            continue
        allowed, kind = _LORA.get(key, (None, ""))
        shown = f"{printable(key)} = {printable(reprlib.repr(value))}"
        if allowed is None:
            if value in (False, [], {}, _OFF.get(key)):
                continue
            raise InputError(
                f"{path} sets {shown}, which is not read: only plain LoRA is. Load the adapter with PEFT where you "
                "trust it, merge it (merge_and_unload) and save the whole model"
            )
        if not allowed(value):
            raise InputError(f"{path} sets {shown}; it must be {kind}")
        if key not in _NOT_PASSED_ON:
            options[key] = value
    return options


# ---- pickles ----

_TRUST = "TRB_TRUST_CHECKPOINTS"
# Whole names: a pickle's name may have dots, and "torch.distributed.checkpoint.metadata.os.system" is one.
_RECORDS = ("ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata", "Metadata", "MetadataIndex")
# Python before 3.11.4 writes a member of an enumeration as getattr of its class: of these, and by a member's name.
_GETATTR = "builtins.getattr"
_ENUMERATIONS = {"torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"}
_SHARDING = {
    *_ENUMERATIONS,
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (*_RECORDS, "TensorProperties", "StorageMeta")),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.Size",
    "collections.OrderedDict",
    "builtins.set",
    "pathlib.PosixPath",
}


def check_checkpoint(directory: Path) -> None:
    """Refuse to continue from a checkpoint that could run code, or that holds weights as pickles.

    The states of the optimizer, the scheduler and the generators are pickles, by the libraries' choice. transformers
    reads them with `weights_only=True`; here they are looked into without being opened, so that a hostile one is
    refused by name before anything is loaded. Of a sharded checkpoint torch reads .metadata, and every record in the
    shards that is no tensor, as any pickle: .metadata may name what torch itself writes there and records of the
    *.distcp files beside it, and every such record must pass `torch.load(weights_only=True)`.
    TRB_TRUST_CHECKPOINTS=1 turns the check off, for checkpoints of your own that hold more (DeepSpeed's do).

    Raises ValueError naming the file and what it would call.
    """
    if os.environ.get(_TRUST) == "1":
        return
    foreign_directory(directory)
    check_weight_index(directory)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _check_file(path, directory)


def _check_file(path: Path, directory: Path) -> None:
    if path.name == "training_args.bin":  # written by transformers, read by nobody
        return
    if path.name == "adapter_config.json" and path.parent != directory:  # of adapters that the run itself did not have
        lora_options(path)
    if path.suffix == ".bin" and path.name.startswith(("pytorch_model", "adapter_model")) and "fsdp" not in path.name:
        raise InputError(f"{path} holds weights as a pickle: only *.safetensors are read")
    if path.name.endswith(".metadata"):  # of one process, __0.metadata
        called = [name for name in _named_in_pickle(path) if not _is_sharding(name)]
        if not called:
            _check_shards(path)
    elif path.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle"):
        called = _unsafe_in_torch_file(path)
    else:
        return
    if called:
        raise InputError(
            f"{path} would call {printable(called[0])} when it is read, so it is not. If you wrote this checkpoint "
            f"yourself and nobody else could change it, set {_TRUST}=1"
        )


def _unsafe_in_torch_file(path: Path) -> list[str]:
    """What a file of torch.save names beyond tensors, plain values and the states of numpy's generators."""
    from torch.serialization import get_unsafe_globals_in_checkpoint
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():
            return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # its parser was not written for hostile files, and raises whatever happens
        raise InputError(f"{path} is no file of torch.save that can be looked into ({error}): not read") from error


class _Named(type):
    @property
    def __setstate__(cls) -> None:
        raise pickle.UnpicklingError("it changes what it names")


class _Inert(metaclass=_Named):
    """Stands for whatever a pickle names, and does nothing whatever is done with it."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    __call__ = __setitem__ = __setstate__ = append = extend = add = update = _ignore


class _NameReader(pickle.Unpickler):
    """Runs a pickle with every name in it replaced by something inert, and notes the names."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole == _GETATTR:
            return self._member
        self.names.add(whole)
        return type(whole, (_Inert,), {})

    def _member(self, kind: Any, name: Any, *_: Any) -> Any:
        if getattr(kind, "__name__", None) not in _ENUMERATIONS or type(name) is not str:
            self.names.add(_GETATTR)
        return _Inert()

    def persistent_load(self, _: Any) -> None:
        return None


def _named_in_pickle(path: Path) -> list[str]:
    with path.open("rb") as file:
        reader = _NameReader(file)
        try:
            reader.load()
        except Exception as error:  # the machine of pickle raises almost anything on damaged input
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): not read") from error
    return sorted(reader.names)


class _ShardingReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == _GETATTR:
            return lambda kind, member: kind[member]  # of an enumeration; any other attribute is none of its members
        if not _is_sharding(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _check_shards(path: Path) -> None:
    """Refuse a .metadata, all of whose names are torch's own, for what it has torch read: other files, or pickles."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    with path.open("rb") as file:
        try:
            metadata = _ShardingReader(file).load()
            kinds, records = metadata.state_dict_metadata, metadata.storage_data
            # Whole types: instances can have attributes of their own in place of methods.
            if type(kinds) is not dict or type(records) is not dict:
                raise pickle.UnpicklingError("it lists no records")
        except Exception as error:
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): not read") from error
    for index, record in records.items():
        name = getattr(index, "fqn", None) if type(index) is MetadataIndex else None
        _check_record(path, record, is_tensor=type(name) is str and type(kinds.get(name)) is TensorStorageMetadata)


def _check_record(path: Path, record: Any, *, is_tensor: bool) -> None:
    import torch
    from torch.distributed.checkpoint.utils import _create_file_view

    name = getattr(record, "relative_path", None)
    if type(name) is not str or name != os.path.basename(name) or "\\" in name or not name.endswith(".distcp"):
        raise InputError(f"{path} names {printable(str(name))!r:.200}: shards are *.distcp files beside it")
    if transforms := getattr(record, "transform_descriptors", None):
        raise InputError(
            f"{path} asks for {printable(str(transforms))!r:.200}, which is not supported: save it without"
        )
    if is_tensor:  # torch reads these with weights_only=True itself
        return
    with (path.parent / name).open("rb") as file:
        try:
            view: Any = _create_file_view(file, record.offset, record.length)
            torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever damaged bytes make the reader raise
            why = printable(str(error).partition("\n")[0])
            raise InputError(
                f"{path.parent / name} holds a record that could run code when it is read, or is damaged ({why:.300}). "
                f"If you wrote this checkpoint yourself and nobody else could change it, set {_TRUST}=1"
            ) from error


def _is_sharding(name: str) -> bool:
    """Whether torch.distributed.checkpoint writes this name into .metadata itself."""
    import torch

    is_dtype = name.startswith("torch.") and isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
    return is_dtype or name in _SHARDING
