"""Rollouts that are not all the student's: a share that is blended, and teacher prefixes that it goes on from.

Left out: the shares themselves (`trb.training.methods`), and what the two kinds of rollouts are compared for
(`trb.schedule.GapBudget`).
"""

import math
from collections.abc import Callable, Sequence

import torch

from trb.policies import StudentPolicy, TeacherPolicy
from trb.sampling import Rollout
from trb.sampling.uniforms import as_int64, stream_seed, uniforms

__all__ = ["blended_rows", "from_teacher_prefixes", "teacher_tokens"]


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


def from_teacher_prefixes(
    draw: Callable[..., Rollout],
    prompts: Sequence[Sequence[int]],
    share: float,
    *,
    keys: Sequence[int],
    rollout_index: Sequence[int],
    seed: int,
    teacher_prompts: Sequence[Sequence[int]] | None = None,
) -> Rollout:
    """Completions that begin with the first `share` of a teacher's completion and go on with the student's tokens.

    The teacher's are drawn with random numbers of their own: how much of one is kept depends on its length, which must
    not tell what the student draws next.

    Args:
        draw: `trb.sampling.sample` with the models and its options.
        prompts: of each row.
        share: in [0, 1]; of the tokens of the teacher's completion, rounded up.
        keys: of each row's prompt.
        rollout_index: which rollout of its prompt each row is.
        seed: of the step.
        teacher_prompts: of each row, where the teacher reads others.
    """
    columns = {"prompt_keys": list(keys), "rollout_index": list(rollout_index)}
    apart = stream_seed(seed, "prefix")
    rollout = draw(prompts, TeacherPolicy(), seed=apart, teacher_prompts=teacher_prompts, **columns)
    kept = [math.ceil(share * len(completion)) for completion in rollout.completions]
    rows = [row for row, completion in enumerate(rollout.completions) if kept[row] < len(completion)]
    rollout.cut(kept)
    rest = draw(
        [prompts[row] for row in rows],
        StudentPolicy(),
        seed=seed,
        begun=[rollout.completions[row] for row in rows],
        **{name: [values[row] for row in rows] for name, values in columns.items()},
    )
    rollout.continue_rows(rows, rest)
    # Of the student's part the teacher has read nothing; a mean over the rows that have no such part is none of all.
    rollout.teacher_hidden = None
    rollout.stats.kl_teacher = [[] for _ in rollout.completions]
    return rollout


def teacher_tokens(rollout: Rollout) -> list[int]:
    """How many tokens of each completion of `from_teacher_prefixes` are the teacher's: it has all the weight there."""
    return [sum(weight == 1 for weight in row) for row in rollout.stats.teacher_weight]
