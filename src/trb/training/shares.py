"""Which rollouts of a step are drawn from its behavior policy where that is a share of them, and not from the student.

Left out: the share itself (`trb.training.methods`), and what the two kinds are compared for (`trb.schedule.GapBudget`).
"""

from collections.abc import Sequence

import torch

from trb.sampling.uniforms import as_int64, uniforms

__all__ = ["blended_rows"]


def blended_rows(
    share: float, *, generations: int, keys: Sequence[int], rollout_index: Sequence[int], seed: int
) -> list[bool]:
    """Whether each row is drawn from the behavior policy: of each prompt's rollouts the first, `share` of them.

    Where `share * generations` is no whole number, a prompt has one more or one fewer, by chance, so that the mean over
    prompts is the share. A function of the row's prompt and index alone, as its random numbers are.

    Args:
        share: in [0, 1].
        generations: rollouts of each prompt.
        keys: of each row's prompt.
        rollout_index: which rollout of its prompt each row is.
        seed: of the step.
    """
    keys_R = as_int64(keys, torch.device("cpu"))
    zero_R = torch.zeros_like(keys_R)
    offsets = uniforms(seed, keys_R, zero_R, zero_R)[:, 0].tolist()
    places = zip(rollout_index, offsets, strict=True)
    return [(index % generations + offset) / generations < share for index, offset in places]
