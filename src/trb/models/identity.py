"""What tells a model from another one that lies at the same place: a hash of its files, or its commit on the hub.

Also where a model in memory can be read again, if it is still what was read there. Left out: whether a run goes on with
the same weights (`trb.training.resume`).
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from trb import zoo
from trb.models.adapters import adapter_base
from trb.models.bases import digest_of
from trb.models.directories import snapshot_of
from trb.models.packaged import SMOLLM2
from trb.models.sharing import adapter_directory, is_shared

__all__ = ["checkpoint_of", "fingerprint", "fingerprints"]


def fingerprint(spec: str, revision: str | None = None) -> str | None:
    """What changes with the model that a spec names; None where that is not known here.

    Of files above 1 MiB, 256 evenly spaced blocks are read: a change of single numbers between them is missed. A model
    that is gone, or not downloaded yet, is not known, nor is one that changes with the version of its package. Raises
    ValueError for an adapter that cannot be used.
    """
    if is_shared(spec):
        directory = adapter_directory(spec)
        return None if directory is None else fingerprint(str(directory))
    path = zoo.path(spec.removeprefix("zoo:")) if spec.startswith("zoo:") else Path(spec).expanduser()
    if spec == SMOLLM2 or not path.is_dir():
        snapshot = snapshot_of(spec, revision)
        return None if snapshot is None else snapshot.name
    own = digest_of(path)
    base = adapter_base(spec)
    return own if base is None else f"{own} on {fingerprint(*base)}"


def fingerprints(models: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """`fingerprint` of models that are known here, given by spec and revision, by spec."""
    found: dict[str, str] = {}
    for spec, revision in models:
        with suppress(ValueError):  # whoever loads it says what is wrong with it
            if (own := fingerprint(spec, revision)) is not None:
                found[spec] = own
    return found


def checkpoint_of(model: PreTrainedModel) -> str | None:
    """What another process may load to have the same model: the directory it was read from, or its name where that is
    not known here; None where it has no name, or its weights are others by now (merged, pruned, trained).

    A model does not know its revision, which is found by its weights. The first rows of the tensors are compared that a
    checkpoint has as they are in memory; what transformers lays out anew, or is quantised, is not.
    """
    name = model.name_or_path
    if not name:
        return None
    path, main = Path(name).expanduser(), snapshot_of(name)
    folders = [path] if path.is_dir() else _snapshots(name)
    answers = {str(folder): _holds(folder, model) for folder in sorted(folders, key=lambda folder: folder != main)}
    if all(answer is None for answer in answers.values()):
        return str(path) if path.is_dir() else name
    return next((folder for folder, answer in answers.items() if answer), None)


def _holds(directory: Path, model: PreTrainedModel) -> bool | None:
    """Whether a checkpoint has the weights of a model; None where it has none that could be compared."""
    weights, compared = dict(model.named_parameters(remove_duplicate=False)), False
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as saved:
            for key in weights.keys() & set(saved.keys()):
                here, there = weights[key], saved.get_slice(key)
                whole = type(here.data) is Tensor and not here.is_meta and here.is_floating_point()
                if not whole or not 1 <= here.dim() <= 2 or list(here.shape) != there.get_shape():
                    continue
                row, compared = there[:1], True
                if row.is_floating_point() and not row.to(here.dtype).equal(here[:1].detach().cpu()):
                    return False
    return compared or None


def _snapshots(spec: str) -> list[Path]:
    """The folders of a hub id's commits in the cache."""
    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=spec, repo_type="model") / "snapshots"
    return sorted(folder.iterdir()) if folder.is_dir() else []
