"""The two models of a training run: loaded where they are not, refused where they cannot be trained or learnt from.

Left out: whether a model can be sampled exactly (`trb.sampling.reading`), whether it fits (`trb.planning`), and what a
teacher on the student's weights is (`trb.models.sharing`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from trb.errors import InputError, did_you_mean
from trb.models.adapters import adapter_base, attach_adapter, check_targets
from trb.models.directories import TOKENIZER_FILES
from trb.models.loading import check_model, load_tokenizer, resolve
from trb.models.modeling import has_adapters, without_adapters
from trb.models.residence import check_movable
from trb.models.sharing import (
    adapter_directory,
    check_base_kept,
    is_shared,
    own_weights,
    shared_teacher,
    shares_weights,
)
from trb.training.config import TRBConfig
from trb.training.routes import Named, by_name, named_in_errors, value_for
from trb.vocab import check_same_tokenizer

__all__ = ["check_router_loss", "check_trained", "checked_student", "loaded_teachers", "teacher_tokenizers"]


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
    if args.teacher_offload or args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
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


def teacher_tokenizers(models: Any, tokenizers: Any, args: TRBConfig, student: PreTrainedTokenizerBase) -> Named:
    """`teacher_tokenizer` of each teacher, by name, compared with the student's; both may be mappings of names.

    Raises:
        ValueError: a tokenizer that is another one, of several teachers with the name; a tokenizer of nobody.
    """
    named = by_name(models)
    for name in tokenizers if isinstance(tokenizers, Mapping) else ():
        if name not in named:
            raise InputError(
                f"teacher_processing_class has a tokenizer for {name!r}, and the teachers are "
                f"{', '.join(map(str, named))}{did_you_mean(str(name), map(str, named))}"
            )
    found: Named = {}
    for name, model in named.items():
        with named_in_errors(name):
            found[name] = teacher_tokenizer(model, value_for(name, tokenizers), args)
            if found[name] is not None:
                check_same_tokenizer(student, found[name])
    return found


def loaded_teachers(models: Any, args: TRBConfig, student: nn.Module, accelerator: Accelerator) -> Named:
    """`loaded_teacher` of each teacher, by name.

    Raises:
        ValueError: as there, of several teachers with the name; teachers that are to be moved and have no weights of
            their own, or such as cannot be.
    """
    found: Named = {}
    for name, model in by_name(models).items():
        with named_in_errors(name):
            found[name] = loaded_teacher(model, args, student, accelerator)
            if args.teacher_offload and not shares_weights(found[name], student):
                check_movable(found[name])
    if args.teacher_offload and all(shares_weights(model, student) for model in found.values()):
        raise InputError(
            "teacher_offload=True does nothing for a teacher on the student's weights, which stay where they are: "
            "leave it out"
        )
    return found


def teacher_tokenizer(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: TRBConfig
) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer, loaded here where it was left out and `model` is a name; None where neither tells."""
    if tokenizer is not None or not isinstance(model, str):
        return tokenizer
    if is_shared(model):
        directory = adapter_directory(model)
        saved = directory is not None and any((directory / name).is_file() for name in TOKENIZER_FILES)
        return load_tokenizer(str(directory), trust_remote_code=args.trust_remote_code) if saved else None
    return load_tokenizer(
        model,
        trust_remote_code=args.trust_remote_code,
        revision=None if adapter_base(model) else args.teacher_model_revision,
    )


def loaded_teacher(
    model: str | PreTrainedModel, args: TRBConfig, student: nn.Module, accelerator: Accelerator
) -> PreTrainedModel:
    """The teacher, loaded here where `model` is a name, or put on the weights of the student that is to be trained.

    Raises:
        ValueError: a teacher with weights of the student's that will change, or will not stay where they are.
    """
    if isinstance(model, str):
        shared = is_shared(model)
        model = shared_teacher(student, model) if shared else load_teacher(model, args, args.teacher_model_revision)
    if shares_weights(model, student):
        _check_shared(model, student, accelerator)
        # The weights went there with the student, and what the tree has of its own did not.
        model.to(without_adapters(student).device)  # type: ignore[arg-type]
    return model


def _check_shared(teacher: nn.Module, student: nn.Module, accelerator: Accelerator) -> None:
    check_base_kept(student)
    own = {name for name, _ in own_weights(teacher, student)}
    trained = [name for name, weight in teacher.named_parameters() if weight.requires_grad and name not in own]
    if trained:
        raise InputError(
            f"the teacher stands on the student's weights, and training would move {len(trained)} of them, such as "
            f"{trained[0]}: train an adapter (lora_rank in recipes, peft_config in Python), or give the teacher "
            "weights of its own"
        )
    state = accelerator.state
    if state.deepspeed_plugin is not None or getattr(state, "fsdp_plugin", None) is not None:
        raise InputError(
            "the teacher stands on the student's weights, which FSDP and DeepSpeed divide or move: launch with "
            "accelerate/ddp, or name the base model as the teacher, with weights of its own"
        )


def check_router_loss(student: nn.Module) -> None:
    """Refuse a router loss that the library would add to its own loss, and this trainer to none."""
    config = without_adapters(student).config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if getattr(config, "output_router_logits", False) and coefficient:
        raise InputError(
            f"{config.model_type}: output_router_logits=True asks for a router loss (router_aux_loss_coef="
            f"{coefficient}), which TRBTrainer does not train on; set model.config.output_router_logits=False"
        )


def check_trained(student: nn.Module, adapter: Any = None) -> None:
    """Refuse a student of which no weight is trained: every step would be taken, and would change nothing; or not those
    that the configuration of its adapter names."""
    if adapter is not None:
        check_targets(vars(adapter), student)
    weights = list(student.parameters())
    if any(weight.requires_grad for weight in weights):
        return
    remedy = "call student.requires_grad_(True)"
    if has_adapters(student):  # whose weights PEFT freezes unless asked, and so do we
        remedy = (
            "load its adapter with peft.PeftModel.from_pretrained(base, directory, is_trainable=True), or call "
            "student.set_adapter(student.active_adapter)"
        )
    raise InputError(f"none of the student's {len(weights)} parameters is trained (requires_grad is False): {remedy}")
