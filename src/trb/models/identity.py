"""What tells a model from another one that lies at the same place: a hash of its files, or its commit on the hub.

Left out: models in memory, whose weights a checkpoint compares (`trb.training.resume`).
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from trb import zoo
from trb.models.adapters import adapter_base
from trb.models.bases import digest_of
from trb.models.packaged import SMOLLM2
from trb.models.sharing import adapter_directory, is_shared

__all__ = ["fingerprint", "fingerprints"]


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
        return _commit(spec, revision)
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


def _commit(spec: str, revision: str | None) -> str | None:
    """The commit of a hub id, as far as the cache has it."""
    try:
        found = try_to_load_from_cache(spec, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None
