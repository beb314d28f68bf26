"""Prompts and their completions as the padded tensors that a pass over whole rows takes.

Left out: the passes (`trb.models.modeling`), and a training batch, which TRL lays out.

Shape suffixes: B rows, L padded length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["padded"]


def padded(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, L]` ids, mask of what is no padding, and mask of completion tokens; the padding is on the right.

    Raises:
        ValueError: not as many completions as prompts.
    """
    lengths = [(len(prompt), len(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
    ids_BL, mask_BL, completion_BL = torch.zeros(3, len(lengths), max(map(sum, lengths)), dtype=torch.long).unbind(0)
    for row, (start, length) in enumerate(lengths):
        ids_BL[row, : start + length] = torch.tensor([*prompts[row], *completions[row]])
        mask_BL[row, : start + length] = 1
        completion_BL[row, start : start + length] = 1
    return ids_BL.to(device), mask_BL.to(device), completion_BL.to(device)
