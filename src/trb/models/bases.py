"""Where the model lies that an adapter stands on: found from any folder, and told from another one at that place.

What is saved names a directory in full (`name_base`). Others name it as seen from where they were trained, and projects
are moved, so that a few folders around an adapter are searched before the current one is (`base_of`). Left out: loading
it (`trb.models.loading`).
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from trb.models.directories import BUILT_IN, TOKENIZER_FILES, snapshot_of
from trb.models.modeling import without_adapters
from trb.records import CONFIG, PROVENANCE, paths_begin
from trb.safety.files import write_text
from trb.safety.untrusted import parse_yaml, printable, read_object

__all__ = ["base_of", "digest_of", "is_merged", "name_base", "remember_merged", "warn_of_other_base"]

logger = logging.getLogger(__name__)

_READ = (*TOKENIZER_FILES, "*.safetensors", "*.json", "*.jinja")
_AROUND = 4  # of an adapter without a recipe beside it: its own folder and three more, as in project/runs/name/model
_BLOCK, _BLOCKS = 1 << 12, 1 << 8  # bytes, and how many of them are read of a large file
_MERGED = "_trb_merged_adapter"  # the name of such a model stays that of its base, from which engines are started


def base_of(adapter: Path, name: str, revision: str | None = None) -> str:
    """The base that the adapter in a directory names, as whoever reads it finds it; `name` itself where that is not
    known to be another place.

    A relative path is looked for in the adapter's folder and those around it, the nearest first, as far as where the
    relative paths of its run's recipe begin, or three folders; and only then in the current directory, where anything
    may lie. What the hub's cache has under that name is the hub's, where no such directory is known to hold the base.
    A directory that is not there any more is that of the run's recipe, if the files are the same.
    """
    path = os.path.expanduser(name)
    if name in BUILT_IN or revision is not None or (os.path.isdir(path) and os.path.isabs(path)):
        return name
    expected = _expected(adapter)
    if os.path.isabs(path):
        student = _students_place(adapter)
        return student if student and _is_model(student) and digest_of(Path(student)) == expected else name
    there = [place for folder in _folders(adapter) if _is_model(place := os.path.join(folder, path))]
    there += [os.path.abspath(path)] if _is_model(path) else []
    known = (place for place in there if expected is not None and digest_of(Path(place)) == expected)
    return next(known, name if not there or snapshot_of(name) else there[0])


def _folders(adapter: Path) -> list[Path]:
    around = [adapter.resolve(), *adapter.resolve().parents]
    begin = paths_begin(_recipe(adapter)[1])
    if begin is None:
        return around[:_AROUND]
    first = (adapter.resolve().parent / begin).resolve()
    return around[: around.index(first) + 1] if first in around else [*around[:2], first]


def warn_of_other_base(adapter: Path, base: str) -> None:
    """Say so where the adapter of a run is read on another base than that of its training, as far as is known."""
    expected = _expected(adapter)
    if expected is not None and os.path.isdir(base) and digest_of(Path(base)) != expected:
        logger.warning(
            "%s was trained on another model than the one in %s, whose files are others: it will say something else. "
            "Put the right one there, or name its directory as base_model_name_or_path in adapter_config.json",
            *(adapter, printable(base)),
        )


def name_base(adapter: Path, model: nn.Module) -> None:
    """Have the adapter of a model, saved in a directory, name a base that lies in one by its full path, and a base that
    is merged from an adapter by that adapter's."""
    path = adapter / "adapter_config.json"
    inner: Any = without_adapters(model)
    name = getattr(inner, _MERGED, inner.name_or_path)
    if name and path.is_file() and os.path.isdir(place := os.path.expanduser(name)):
        # In the file alone: PEFT asks the hub about a base that is no whole model before it saves.
        config = read_object(path) | {"base_model_name_or_path": os.path.realpath(place)}
        write_text(path, f"{json.dumps(config, indent=2)}\n")


def remember_merged(model: nn.Module, adapter: Path) -> None:
    """Note that an adapter is in the weights of a model."""
    setattr(model, _MERGED, str(adapter.resolve()))


def is_merged(model: nn.Module) -> bool:
    return hasattr(model, _MERGED)


def digest_of(directory: Path) -> str:
    """A hash of the files of a model; of those above 1 MiB, of 256 evenly spaced blocks."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _READ for file in directory.glob(pattern) if file.is_file()}):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        _add(digest, file)
    return digest.hexdigest()[:16]


def _add(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    step = max(_BLOCK, (size - _BLOCK) // (_BLOCKS - 1))  # so that the last block is read
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(_BLOCK))


def _is_model(place: str) -> bool:
    return any(os.path.isfile(os.path.join(place, name)) for name in ("config.json", "adapter_config.json"))


# ---- what the run of an adapter says ----


def _recipe(adapter: Path) -> tuple[dict[str, Any], str]:
    """The recipe of the run that has left an adapter, empty without one, and its text."""
    try:
        text = (adapter.parent / CONFIG).read_text(encoding="utf-8")
        recipe = parse_yaml(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}, ""
    return (recipe, text) if isinstance(recipe, dict) else ({}, "")


def _expected(adapter: Path) -> str | None:
    """`digest_of` the base that an adapter of a run was trained on; None where that is not known."""
    recipe, _ = _recipe(adapter)
    try:
        student = PROVENANCE.read(adapter.parent / PROVENANCE)["models"][recipe["student"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # As `trb.models.identity` has it: of an adapter, its own and then that of what it stands on.
    own, _, under = str(student).partition(" on ")
    return own if recipe.get("lora_rank") else under.partition(" on ")[0] or None


def _students_place(adapter: Path) -> str | None:
    """Where the student of an adapter's run lies now, if the run has been moved together with it."""
    recipe, text = _recipe(adapter)
    begin, student = paths_begin(text), recipe.get("student")
    if begin is None or not isinstance(student, str):
        return None
    return os.path.realpath(os.path.join(adapter.resolve().parent, begin, os.path.expanduser(student)))
