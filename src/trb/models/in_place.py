"""Weights that a family changes when it is read: RWKV's, halved in evaluation to keep its states within float16.

Its first pass in evaluation mode divides the weights of layers beyond `rescale_every` by powers of two, in place, and
its next pass in training mode multiplies them again. Whoever saves, copies or shares them in between has another model.
Without, the law is the same, but for what float16 cannot hold.

Left out: the refusal itself, and whatever else is refused of a model (`trb.models.modeling`).
"""

from copy import copy
from typing import Any

import torch
from torch import nn

__all__ = ["hold_weights"]


def hold_weights(model: nn.Module) -> str | None:
    """Have a model leave its weights as they are, for good; why it cannot, or None.

    The layers then read `rescale_every=0` in a configuration of their own; what is saved keeps the model's. What an
    earlier pass has divided is multiplied again, by powers of two.
    """
    part: Any
    for part in model.modules():
        if "layers_are_rescaled" in vars(part) and getattr(part.config, "rescale_every", 0) > 0:
            if reason := _cannot_hold(part):
                return reason
            if part.layers_are_rescaled:
                mode, part.training = part.training, True
                part._rescale_layers()
                part.training = mode
            part.config = copy(part.config)
            part.config.rescale_every = 0
    return None


def _cannot_hold(part: Any) -> str | None:
    every, weight = part.config.rescale_every, part.blocks[0].attention.output.weight
    if len(part.blocks) <= every:  # no weight is divided
        return None
    if weight.dtype == torch.float16:
        return (
            f"in float16 it rescales its weights in place (rescale_every={every}), which would be saved and shared so; "
            "load it in bfloat16 or float32"
        )
    if part.layers_are_rescaled and not weight.is_floating_point():
        return "an earlier pass has rescaled its quantised weights in place; load it anew"
    return None
