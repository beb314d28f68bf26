"""On-policy distillation of language models with trust-region behavior blending.

The package root re-exports the trainer lazily: importing `trb.blend` or `trb.losses` alone must not
pay for TRL, and importing anything here must not touch the network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["TRBConfig", "TRBTrainer", "__version__"]

if TYPE_CHECKING:
    from trb.training.config import TRBConfig
    from trb.training.trainer import TRBTrainer


_HOMES = {"TRBConfig": "trb.training.config", "TRBTrainer": "trb.training.trainer"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
