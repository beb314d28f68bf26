"""The two models of a training run: loaded where they are not, refused where they cannot be trained or learnt from.

Left out: whether a model can be sampled exactly (`trb.sampling.reading`), and whether it fits (`trb.planning`).
"""

from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from trb.errors import InputError
from trb.models.adapters import adapter_base, attach_adapter
from trb.models.loading import check_model, load_tokenizer, resolve
from trb.models.modeling import has_adapters, without_adapters
from trb.training.config import TRBConfig

__all__ = ["check_router_loss", "checked_student", "loaded_teacher", "teacher_tokenizer"]


def load_teacher(name: str, args: TRBConfig, revision: str | None) -> PreTrainedModel:
    adapted = adapter_base(name)
    if adapted is not None:
        base = load_teacher(str(resolve(adapted[0])), args, adapted[1])
        if has_adapters(base):  # an adapter may stand on another one
            base = cast(Any, base).merge_and_unload()
        return attach_adapter(base, Path(name).expanduser())
    options: dict[str, Any] = dict(cast(dict, args.teacher_model_init_kwargs) or {})
    if revision is not None:
        options.setdefault("revision", revision)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    checked = check_model(name, trust_remote_code=options["trust_remote_code"], revision=options.get("revision"))
    return create_model_from_path(checked, **options)


def checked_student(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: TRBConfig
) -> tuple[str | PreTrainedModel, PreTrainedTokenizerBase]:
    """The student, under the name of what was checked, and its tokenizer, loaded here where it was left out."""
    options: dict[str, Any] = dict(cast(dict, args.model_init_kwargs) or {})
    trust = options.get("trust_remote_code", args.trust_remote_code)
    name, revision = getattr(model, "name_or_path", ""), None
    if isinstance(model, str):
        revision = options.get("revision")
        name = model = check_model(model, trust_remote_code=trust, revision=revision)
    if tokenizer is None:
        if not name:
            raise InputError("the student does not say where it was loaded from: pass its tokenizer, processing_class")
        tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)
        tokenizer.padding_side = tokenizer.truncation_side = "left"  # as TRL would
    return model, tokenizer


def teacher_tokenizer(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: TRBConfig
) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer, loaded here where it was left out and `model` is a name; None where neither tells."""
    if tokenizer is not None or not isinstance(model, str):
        return tokenizer
    return load_tokenizer(
        model,
        trust_remote_code=args.trust_remote_code,
        revision=None if adapter_base(model) else args.teacher_model_revision,
    )


def loaded_teacher(model: str | PreTrainedModel, args: TRBConfig) -> PreTrainedModel:
    """The teacher, loaded here where `model` is a name."""
    return load_teacher(model, args, args.teacher_model_revision) if isinstance(model, str) else model


def check_router_loss(student: nn.Module) -> None:
    """Refuse a router loss that the library would add to its own loss, and this trainer to none."""
    config = without_adapters(student).config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if getattr(config, "output_router_logits", False) and coefficient:
        raise InputError(
            f"{config.model_type}: output_router_logits=True asks for a router loss (router_aux_loss_coef="
            f"{coefficient}), which TRBTrainer does not train on; set model.config.output_router_logits=False"
        )
