"""LoRA adapters in directories: which model each stands on, and what of its configuration is read.

Only known options of LoRA are passed on, and weights only from safetensors. Of adapters that are made for training,
which is PEFT's work, it is checked that the model has the places they name. Left out: kinds other than LoRA in
directories, which are refused.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from trb.errors import InputError, did_you_mean, named
from trb.models.bases import base_of, remember_merged
from trb.models.directories import check_directory, explained, is_adapter, token_ids_only
from trb.models.modeling import check_adapter, without_adapters
from trb.safety.untrusted import lora_options, read_object

__all__ = ["adapter_base", "adapter_config", "attach_adapter", "check_targets"]

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


# ---- adapters that are yet to be put on a model ----


def check_targets(options: Mapping[str, Any], student: nn.Module) -> None:
    """Refuse an adapter for places that the student does not have: PEFT would leave them out, where it finds others.

    Args:
        options: of PEFT, by name; those that say where the adapter acts are read.
        student: with that adapter, or before it gets it.

    Raises:
        ValueError: names the option and the place.
    """
    inner = without_adapters(student)
    modules = [name.replace(_INNER, "") for name, _ in inner.named_modules(remove_duplicate=False)]
    weights = [name.replace(_INNER, "") for name, _ in inner.named_parameters(remove_duplicate=False)]
    for option in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        kind, there = ("parameter", weights) if option == "target_parameters" else ("module", modules)
        places, where = options.get(option) or (), f"peft_config.{option}"
        for place in [places] if isinstance(places, str) else sorted(places):
            if place == "all-linear" or any(_is_at(place, name, where, pattern=place is places) for name in there):
                continue
            named_so = there if kind == "parameter" else [name.rpartition(".")[0] for name in weights]
            ends = {name.rpartition(".")[2] for name in named_so}
            every = " (all-linear is every linear one)" if option == "target_modules" else ""
            raise InputError(
                f"{named(where)} has {place!r}, and the student has no such {kind}{did_you_mean(place, ends)}; it has "
                f"{', '.join(sorted(ends))}{every}"
            )
    _check_head_kept(options.get("target_modules"), inner, options)
    depth, layers = inner.config.get_text_config().num_hidden_layers, options.get("layers_to_transform")
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if layer not in range(depth):
            raise InputError(
                f"peft_config.layers_to_transform has {layer}, and the student has layers 0 to {depth - 1}"
            )


def _check_head_kept(places: Any, inner: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Refuse an adapter on the head, which TRL's trainer takes none on; with exclusions it sees what they leave."""
    where = "peft_config.target_modules"
    name = next((name for name, module in inner.named_modules() if module is inner.get_output_embeddings()), None)
    if name is None or not places or places == "all-linear" or options.get("exclude_modules"):
        return
    pattern = isinstance(places, str)
    for place in [places] if pattern else places:
        if _is_at(place, name, where, pattern=pattern):
            raise InputError(
                f"{named(where)} has {place!r}, and no adapter is trained on the head, {name}: leave it out"
            )


def _is_at(place: str, name: str, where: str, *, pattern: bool) -> bool:
    """Whether PEFT takes a place for that name: a pattern for all of it, or an end of it."""
    if not pattern:
        return name.endswith(place) if where.endswith("modules_to_save") else f".{name}".endswith(f".{place}")
    try:
        return re.fullmatch(place, name) is not None
    except re.error as error:
        raise InputError(
            f"{named(where)} has {place!r}, which is no regular expression ({error}): name modules"
        ) from error
