"""LoRA adapters in directories: which model each stands on, and what of its configuration is read.

Only known options of LoRA are passed on, and weights only from safetensors. Left out: making adapters for training
(PEFT's work, asked for by `trb.studies.material`), and kinds other than LoRA, which are refused.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel

from trb.errors import InputError, named
from trb.models.bases import base_of, remember_merged
from trb.models.directories import check_directory, explained, is_adapter, token_ids_only
from trb.models.modeling import check_adapter
from trb.safety.untrusted import lora_options, read_object

__all__ = ["adapter_base", "adapter_config", "attach_adapter"]

_PREFIX = "base_model.model."  # of the names of weights in an adapter's file
_INNER = ".base_layer"  # where a parameter, and no module, has the adapter
_OTHER_SIZE = re.compile(r"size mismatch for (\S+?): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)")


def adapter_base(spec: str) -> tuple[str, str | None] | None:
    """Spec and revision of the model that the adapter in a directory stands on; None for any other spec.

    Raises ValueError for an adapter that cannot be used, and what `load_model` does for files that are missing.
    """
    directory = Path(spec).expanduser()
    if not directory.is_dir() or not is_adapter(directory):
        return None
    check_directory(directory)
    adapter = adapter_config(directory)
    return adapter["base_model_name_or_path"], adapter.get("revision")


def adapter_config(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    config = _read_adapter_config(path)
    # An adapter may stand on another one, but not on itself.
    seen, base = {directory.resolve()}, Path(config["base_model_name_or_path"])
    while base.is_dir() and is_adapter(base):
        if base.resolve() in seen:
            raise InputError(f"{path} names a base that stands on the adapter itself: name a whole model")
        seen.add(base.resolve())
        check_directory(base)
        base = Path(_read_adapter_config(base / "adapter_config.json")["base_model_name_or_path"])
    return config


def _read_adapter_config(path: Path) -> dict[str, Any]:
    config = read_object(path)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise InputError(f"{path} does not name its base_model_name_or_path: add it there")
    try:
        check_adapter(config)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return lora_options(path) | {"base_model_name_or_path": base_of(path.parent, base, config.get("revision"))}


def attach_adapter(base: PreTrainedModel, directory: Path, *, merge: bool = False) -> PreTrainedModel:
    """A `peft.PeftModel` around `base`, with the adapter of a directory in place, in eval mode and in base's dtype.

    `merge` adds the adapter to the weights and returns `base` itself. Raises ValueError for an adapter that does not
    fit, naming what does not, and OSError for one that is damaged or lacks some of its weights.
    """
    from peft import LoraConfig, PeftModel

    options = adapter_config(directory)
    if "layers_to_transform" not in options:
        _check_adapter_depth(directory, base)
    with explained(directory, "adapter"), _fitting(directory, base), warnings.catch_warnings():
        _check_places(directory, base)
        # Left alone, missing weights are drawn at random or are zero, and the adapter does less than it should.
        warnings.filterwarnings("error", message=".*Found missing adapter keys")
        # With a configuration at hand PEFT reads none.
        adapted: Any = PeftModel.from_pretrained(
            base, directory, config=LoraConfig(**options), autocast_adapter_dtype=False
        )
        if (directory / "generation_config.json").is_file():  # what ends a completion may be the adapter's own
            base.generation_config = GenerationConfig.from_pretrained(directory)
            base.generation_config = token_ids_only(base)
    if not merge:
        return adapted.eval()
    remember_merged(base, directory)
    # PEFT froze what a merged model may want to train.
    return adapted.merge_and_unload().requires_grad_(True).eval()


def _check_adapter_depth(directory: Path, base: PreTrainedModel) -> None:
    """Refuse an adapter of a pruned model on its unpruned base: the names match, the layers do not."""
    depth = base.config.get_text_config().num_hidden_layers
    with safe_open(directory / "adapter_model.safetensors", "pt") as weights:
        found = [re.search(r"\.(?:layers|h)\.(\d+)\.", key) for key in weights.keys()]  # noqa: SIM118
    trained = max((int(match[1]) + 1 for match in found if match), default=depth)
    if trained != depth:
        keep, name = named("keep_layers"), base.name_or_path or "in memory"
        raise InputError(
            f"the adapter in {directory} was trained on {trained} layers and its base, {name}, has "
            f"{depth}: if that is another model, name the right one as base_model_name_or_path in "
            f"adapter_config.json; if it was pruned, pass {keep}={trained} (or drop {keep}) so that they agree"
        )


def _check_places(directory: Path, base: PreTrainedModel) -> None:
    """Refuse an adapter with weights for modules that its base does not have: PEFT would leave them out."""
    there = {name for name, _ in base.named_modules()}
    with safe_open(directory / "adapter_model.safetensors", "pt") as weights:
        places = [key.removeprefix(_PREFIX).partition(".lora_") for key in weights.keys()]  # noqa: SIM118
    missing = next((place for place, part, _ in places if part and place.removesuffix(_INNER) not in there), None)
    if missing is not None:
        raise InputError(f"{_misfit(directory, base)}: it has weights for {missing}, and the model no such module")


@contextmanager
def _fitting(directory: Path, base: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        sizes = _OTHER_SIZE.search(str(error))
        if sizes is None:
            raise
        name, its, ours = sizes.groups()
        raise InputError(
            f"{_misfit(directory, base)}: {name.removeprefix(_PREFIX)} is [{its}] there, and would be [{ours}] here"
        ) from error


def _misfit(directory: Path, base: PreTrainedModel) -> str:
    """What `explained` says of an adapter goes before it."""
    own = _read_adapter_config(directory / "adapter_config.json")["base_model_name_or_path"]
    model = base.name_or_path or f"a {type(base).__name__} in memory"
    return f"made for {own}, it does not fit {model}"
