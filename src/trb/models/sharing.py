"""A teacher on the student's own weights: the model under its adapter, bare (`base`) or with another (`adapter:DIR`).

It is a second tree of modules over the same tensors. Nothing is copied, and no adapter is switched: the student's never
is in the teacher's tree, and mode, dropout, hooks and attention are each tree's own. A pass that is computed again for
the student's gradient meets the student's adapter, whatever the teacher has read in between. What makes this exact is
that the shared weights stay as they are, so adapters that change them are refused by name.

Left out: refusals that take a run to know (`trb.training.pair`), and adapters that are no teachers on shared weights
(`trb.models.adapters`).
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from trb.errors import InputError, MissingFileError
from trb.models.adapters import adapter_config, attach_adapter
from trb.models.directories import check_directory, is_adapter
from trb.models.in_place import hold_weights
from trb.models.modeling import UnsupportedModelError, has_adapters, without_adapters

__all__ = [
    "ADAPTER",
    "BASE",
    "adapter_directory",
    "check_base_kept",
    "is_shared",
    "own_weights",
    "shared_teacher",
    "shares_weights",
]

BASE, ADAPTER = "base", "adapter:"

# Of `init_lora_weights`: what leaves the base as it is.
_KEEPS_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
_CHANGES_THE_BASE = ("layer_replication", "kasa_config")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_shared(spec: Any) -> bool:
    """Whether a spec names a teacher on the student's own weights."""
    return isinstance(spec, str) and (spec == BASE or spec.startswith(ADAPTER))


def adapter_directory(spec: str) -> Path | None:
    """The DIR of `adapter:DIR`; None for any other spec.

    Raises ValueError, or FileNotFoundError, where no LoRA adapter lies there.
    """
    if not spec.startswith(ADAPTER):
        return None
    name = spec.removeprefix(ADAPTER)
    directory = Path(name).expanduser()
    if not name or not directory.is_dir():
        raise MissingFileError(f"no adapter at {name!r} ({spec!r}): name a directory with an adapter_config.json")
    check_directory(directory)
    if not is_adapter(directory):
        raise InputError(f"{name!r} is a whole model and no adapter: leave out {ADAPTER!r}, or name an adapter")
    return directory


def shared_teacher(student: nn.Module, spec: str = BASE) -> PreTrainedModel:
    """The teacher that `spec` names, on the weights of `student`, in eval mode.

    Args:
        student: a causal LM with adapters, or one that is yet to get them: what it is now is then the base.
        spec: `"base"`, or `"adapter:DIR"` with the directory of a LoRA adapter that stands on the same base.

    Raises:
        ValueError: an adapter of either that changes the weights under it, or one that does not fit them, or a model
            that changes its own (`trb.models.in_place`).
        OSError: an adapter that is missing or damaged.
    """
    directory = adapter_directory(spec)
    if directory is None and spec != BASE:
        raise InputError(f"{spec!r} names no teacher on the student's weights: {BASE!r}, or {ADAPTER + 'DIR'!r}")
    check_base_kept(student)
    inner = without_adapters(student)
    if reason := hold_weights(inner):  # two trees would each change the same weights
        raise UnsupportedModelError(inner, reason)
    teacher = _second_tree(inner)
    if directory is not None:
        options = adapter_config(directory)
        _check_kept(options, f"the adapter in {directory}", f"name it without {ADAPTER!r}, as a model of its own")
        learning = [weight for weight in inner.parameters() if weight.requires_grad]
        teacher = attach_adapter(teacher, directory)
        for weight in learning:
            weight.requires_grad_(True)  # PEFT has frozen what is under the teacher's adapter
    return teacher.eval()


def check_base_kept(student: nn.Module) -> None:
    """Refuse a student whose adapter changes the weights under it, or is merged into them. Raises ValueError."""
    inner = without_adapters(student)
    for config in {**(getattr(inner, "peft_config", None) or {}), **getattr(student, "peft_config", {})}.values():
        _check_kept(vars(config), "the student's adapter", "train another kind of adapter, or name the base model")
    if any(getattr(module, "merged_adapters", None) for module in inner.modules()):
        raise InputError("the student's adapter is merged into its base, which is then no teacher: unmerge_adapter")


def own_weights(teacher: nn.Module, student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of `teacher`, by name, that are not also the student's."""
    theirs = set(map(id, student.parameters()))
    return ((name, weight) for name, weight in teacher.named_parameters() if id(weight) not in theirs)


def shares_weights(teacher: nn.Module, student: nn.Module) -> bool:
    """Whether a parameter of one is a parameter of the other."""
    return not {*map(id, teacher.parameters())}.isdisjoint(map(id, student.parameters()))


def _second_tree(model: PreTrainedModel) -> PreTrainedModel:
    """The modules of `model` once more, over the same tensors, each adapter left out."""
    # To a deep copy these stand for copies made already.
    there: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for hooks in (getattr(module, name) for module in model.modules() for name in _HOOKS):
        there[id(hooks)] = OrderedDict(hooks)  # a hook may belong to anything, which is not to be copied with it
    twin = copy.deepcopy(model, there)
    if hasattr(twin, "_original_forward"):  # Accelerate has put a function in place, which calls the student's
        del twin._original_forward, twin.forward
    if has_adapters(twin):
        _strip(twin)
        twin.__dict__.pop("peft_config", None)
        twin._hf_peft_config_loaded = False
    return twin


def _strip(module: nn.Module) -> None:
    """Put the layers that adapters stand beside in their place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, child in list(module.named_children()):
        if isinstance(child, BaseTunerLayer):
            setattr(module, name, child.get_base_layer())
        elif isinstance(child, AuxiliaryTrainingWrapper):  # what is saved whole, and tokens trained one by one
            setattr(module, name, cast(nn.Module, child.original_module))
        else:
            _strip(child)


def _check_kept(options: Mapping[str, Any], whose: str, remedy: str) -> None:
    """Refuse an adapter that stands on other weights than those it was put on."""
    start, bias = options.get("init_lora_weights", True), options.get("bias", "none")
    if start not in _KEEPS_THE_BASE:
        change = f"init_lora_weights={start!r} takes a part of the base's weights away"
    elif bias != "none":
        change = f"bias={bias!r} trains biases of the base"
    elif changing := [name for name in _CHANGES_THE_BASE if options.get(name)]:
        change = f"{changing[0]} changes layers of the base"
    else:
        return
    raise InputError(f"{whose} cannot share its base with a teacher: {change}. To have both, {remedy}")
