"""Whole copies of sharded models, so that sampling waits for nobody.

FSDP2 and ZeRO-3 keep a shard of each weight on each process and gather a layer's weights for every pass: all processes
must then make the same passes at the same time. Samplers make as many passes as their own rows need. They therefore
read a `Replica`, a plain copy of the model whose weights are gathered from the shards once per optimizer step, one
parameter at a time. Its price is one copy of the model per process, in the dtype it is sampled in.

Left out on purpose: FSDP1 (its flat parameters have no names to gather by), quantised weights, and models that were
sharded while they were loaded, each refused by `check_sharding` or `Replica`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from trb.errors import InputError

__all__ = [
    "ExpireOnUpdate",
    "Replica",
    "check_sharding",
    "leave_outputs_alone",
    "loaded_whole",
    "shard_in_place",
    "shards_parameters",
]

# What wrappers of a layer add to the names of the parameters inside it.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def shards_parameters(accelerator: Accelerator) -> bool:
    """Whether training will leave each process with shards of the weights only (FSDP or ZeRO-3)."""
    deepspeed, fsdp = accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None)
    return fsdp is not None or (deepspeed is not None and deepspeed.zero_stage == 3)


def check_sharding(accelerator: Accelerator, *models: nn.Module) -> None:
    """Refuse what cannot be sampled from under sharding.

    Raises:
        ValueError: FSDP1, or a launch or a model that is not whole on every process before training starts.
    """
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise InputError(
            f"fsdp_version={fsdp.fsdp_version} is not supported: set fsdp_version: 2 in the Accelerate configuration "
            "(as in accelerate/fsdp2.yaml of trb/recipes)"
        )
    if fsdp is not None and fsdp.cpu_ram_efficient_loading and accelerator.num_processes > 1:
        raise InputError(
            "fsdp_cpu_ram_efficient_loading=True loads weights on the first process only, and the teacher of every "
            "other would be empty: set fsdp_cpu_ram_efficient_loading: false in the Accelerate configuration"
        )
    for model in models:
        partitioned = next((name for name, value in model.named_parameters() if _is_sharded(value)), None)
        if partitioned is not None:
            raise InputError(
                f"{type(model).__name__} was sharded while it was loaded ({partitioned} is not whole): pass a model "
                "that was loaded within trb.training.sharding.loaded_whole(args), and without a device mesh"
            )


@contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """Within the block models are loaded whole, also in a launch with ZeRO-3, where transformers would shard them at
    once (whatever Accelerate's zero3_init_flag says)."""
    config = getattr(args.deepspeed_plugin, "dschf", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


class Replica:
    """A plain copy of a model, brought up to date from its sharded original.

    Args:
        model: the original, before it is sharded. It is read for its structure only.
        device: where the copy lives.
        dtype: of the copy's weights; None keeps each weight's own.

    Raises:
        ValueError: quantised weights.
    """

    def __init__(self, model: nn.Module, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                raise InputError(
                    f"{name} is quantised ({parameter.dtype}), and a quantised model cannot be copied out of its "
                    "shards for sampling: train without FSDP and ZeRO-3, or without quantisation"
                )
        # To a deep copy these stand for copies made already: weights are never held a third time, ties survive.
        stand_ins: dict[int, Any] = {
            id(parameter): nn.Parameter(
                torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=device), requires_grad=False
            )
            for parameter in model.parameters()
        }
        self.module = copy.deepcopy(model, stand_ins).eval()
        for buffers in (module._buffers for module in self.module.modules()):
            buffers.update({name: None if value is None else value.to(device) for name, value in buffers.items()})
        self._own = dict(self.module.named_parameters())
        self._complete = False
        self._stale = True

    def expire(self) -> None:
        """The original has changed, or may have: the next `refresh` reads it."""
        self._stale = True

    def refresh(self, original: nn.Module) -> None:
        """Bring the copy up to date, if the original has changed since; collective when it does anything.

        The first time every weight is read, later those that are trained.
        """
        if not self._stale:
            return
        with torch.no_grad():
            for name, parameter in original.named_parameters():
                if parameter.requires_grad or not self._complete:
                    own = self._own[_plain_name(name)]
                    with _whole(parameter, own.dtype) as value:
                        own.copy_(value)
        self._complete, self._stale = True, False


def leave_outputs_alone(accelerator: Accelerator) -> None:
    """Have FSDP2 leave what a pass returns in its own dtype: under bf16 it would round the loss to three digits."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.mixed_precision_policy is not None:
        fsdp.mixed_precision_policy = replace(fsdp.mixed_precision_policy, output_dtype=None)


class ExpireOnUpdate(TrainerCallback):
    """Marks a replica as out of date whenever the weights of its original may have changed."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._replica.expire()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._replica.expire()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._replica.expire()


def shard_in_place(model: PreTrainedModel, *, whole: nn.Module, accelerator: Accelerator) -> PreTrainedModel:
    """Shard a model that is not trained over the processes, a layer at a time; collective.

    Args:
        model: the model, whole on every process; it is changed, and returned.
        whole: a part of it whose weights stay as they are.
        accelerator: an accelerator set up for FSDP2.
    """
    config, mesh = accelerator.parallelism_config, accelerator.torch_device_mesh
    options: dict[str, Any] = {
        "mesh": None if mesh is None else mesh[tuple(config.fsdp_dim_names)],
        "reshard_after_forward": True,
        "ignored_params": set(whole.parameters()),
    }
    layers = set(model._no_split_modules or ())
    for module in [module for module in model.modules() if type(module).__name__ in layers]:
        fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def _is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@contextmanager
def _whole(parameter: nn.Parameter, dtype: torch.dtype) -> Iterator[Tensor]:
    """The whole of a parameter, however it is sharded."""
    if isinstance(parameter, DTensor):
        # Cast first: a shard in half precision is half as much to send.
        yield cast(DTensor, parameter.detach().to(dtype)).full_tensor()
        return
    with _gathered_by_deepspeed(parameter) if hasattr(parameter, "ds_id") else nullcontext():
        yield parameter.detach()


def _gathered_by_deepspeed(parameter: nn.Parameter) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
