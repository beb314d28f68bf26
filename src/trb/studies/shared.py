"""Recipes whose teacher stands on the student's weights: what they must say, and what is to be doubted.

Left out: the teacher itself (`trb.models.sharing`), and what a trainer refuses (`trb.training.pair`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trb.errors import named
from trb.models.adapters import adapter_base, adapter_config
from trb.models.loading import resolve
from trb.models.sharing import adapter_directory, is_shared
from trb.studies.yaml_files import ConfigError
from trb.training.doubts import Doubt

if TYPE_CHECKING:
    from trb.studies.keys import RunConfig

__all__ = ["check_shared", "doubts_of_base", "trains_own_adapter"]


def trains_own_adapter(run: "RunConfig") -> bool:
    """Whether the student is an adapter that goes on training as it is, beside a teacher on its base."""
    beside = any(is_shared(pair.teacher) for pair in run.pairs().values())
    return beside and adapter_base(run.student) is not None


def check_shared(run: "RunConfig") -> None:
    """Refuse a teacher on the student's weights where training would move these.

    Raises ValueError, or FileNotFoundError for an adapter that is not there.
    """
    if not is_shared(run.teacher):
        return
    adapter_directory(run.teacher)
    rank = named("lora_rank")
    if trains_own_adapter(run):
        if run.lora_rank:
            raise ConfigError(
                f"{rank} is {run.lora_rank}, and the student is an adapter already, which teacher: {run.teacher} has "
                f"trained as it is: leave {rank} out"
            )
    elif not run.lora_rank:
        raise ConfigError(
            f"teacher is {run.teacher}, on the student's own weights, and {rank} is 0, which trains these: set {rank}, "
            "or name a model of its own as the teacher"
        )


def doubts_of_base(run: "RunConfig") -> Iterator[Doubt]:
    """Of an adapter as the teacher that names another base than the student's: shapes may fit all the same."""
    directory = adapter_directory(run.teacher) if is_shared(run.teacher) else None
    if directory is None:
        return
    base = adapter_config(directory)["base_model_name_or_path"]
    own = adapter_base(run.student)
    ours = run.student if own is None else own[0]
    if _place(base) != _place(ours):
        yield Doubt(
            "teacher",
            f"the adapter in {directory} was made for {base}, and the student is {ours}",
            "Check that these are the same weights",
        )


def _place(spec: str) -> str:
    """A model by where it is, if it is here."""
    try:
        found = resolve(spec)
    except (ValueError, OSError):
        return spec
    return str(found.resolve()) if isinstance(found, Path) else found
