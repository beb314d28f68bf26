"""Teachers that do not fit: weights that are quantised while a model is loaded.

A quantised teacher is another teacher: its law is that of its quantised weights, and rollouts and loss are exact with
respect to it. Left out: students, which train (quantise theirs with `quantization_config` under LoRA), checkpoints that
were saved quantised (transformers loads them by itself), and how good a quantised model is.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from trb.errors import InputError, PackageError, did_you_mean

__all__ = ["QUANTIZATIONS", "Quantization", "mixes_rows", "quantization_config"]


class Quantization(NamedTuple):
    """A way to quantise: the package that does it, the bytes of a weight in a layer, and its configuration."""

    package: str
    bytes: float
    make: Callable[[torch.dtype], Any]


def _torchao_int8(compute: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bnb_8bit(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    # See `mixes_rows`.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def _bnb_4bit(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


QUANTIZATIONS = {
    "torchao-int8": Quantization("torchao", 1.0, _torchao_int8),
    "bnb-8bit": Quantization("bitsandbytes", 1.0, _bnb_8bit),
    "bnb-4bit": Quantization("bitsandbytes", 0.5, _bnb_4bit),
}
"""Quantizations by the name that `teacher_quantization` takes. Embeddings and head stay as they are."""


def check_quantization(name: str) -> Quantization:
    """The quantization of a name. Raises ValueError for an unknown one, PackageError where its package is missing."""
    if name not in QUANTIZATIONS:
        hint = did_you_mean(name, QUANTIZATIONS)
        raise InputError(f"unknown quantization {name!r}; choose one of {', '.join(QUANTIZATIONS)}{hint}")
    found = QUANTIZATIONS[name]
    if find_spec(found.package) is None:
        raise PackageError(f"quantization {name} needs {found.package}: pip install {found.package}")
    return found


def quantization_config(name: str, compute: object) -> Any:
    """What `from_pretrained(quantization_config=)` takes; errors as in `check_quantization`.

    `compute` is the dtype of products; "auto", for the model's own, is taken as bfloat16 where that matters.
    """
    found = check_quantization(name)
    return found.make(compute if isinstance(compute, torch.dtype) else torch.bfloat16)


def mixes_rows(config: Any) -> str | None:
    """Why a row's logits depend on the rows beside it, by a model's configuration; None where they do not.

    bitsandbytes computes the columns in which any row of a batch has an outlier otherwise than the rest.
    """
    found = getattr(config, "quantization_config", None)
    options = found if isinstance(found, Mapping) else vars(found) if found is not None else {}
    eight = options.get("load_in_8bit") or options.get("_load_in_8bit")
    if not eight or not options.get("llm_int8_threshold", 6.0):
        return None
    return (
        "its quantisation treats outliers of a whole batch alike, so that a completion would depend on the rows beside "
        "it; load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
    )
