"""What a run may well be told and can hardly be meant: settings that make a student learn little, or nothing.

Nothing here is refused. Left out: what cannot work at all (`trb.studies.material`, `trb.training.prompts`), and memory.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trb.models.modeling import position_limit
from trb.studies.keys import RunConfig
from trb.tasks.prompts import render
from trb.training.config import TRBConfig
from trb.training.methods import knobs_of, pair_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Doubt", "of_models", "of_prompts", "of_settings", "steps_of", "warn"]

logger = logging.getLogger(__name__)

# Knobs that say after how many steps a method is plain distillation.
_WARM_UPS = (
    *("blend_warmup_steps", "temperature_warmup_steps", "horizon_steps", "prefix_steps", "sft_warmup_steps"),
    "veto_steps",
)

# The rates of the recipes by the student's parameters: 0.2 million, 100 million, and the paper's.
_RATES = ((10e6, 3e-4), (500e6, 1e-4), (math.inf, 1e-5))
_LORA_TIMES = 10.0  # adapters are trained at about ten times the rate of whole weights
_TOO_MANY_TIMES = 10.0


class Doubt(NamedTuple):
    """A setting that is probably not meant."""

    subject: str
    text: str
    remedy: str


def warn(doubts: Iterable[Doubt]) -> None:
    for doubt in doubts:
        logger.warning("%s: %s. %s", *doubt)


def steps_of(args: TRBConfig, prompts: int) -> int:
    """Optimizer steps of a run with so many prompts."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return int(max(1, prompts // max(1, batch // args.num_generations)) * args.num_train_epochs)


def of_settings(args: TRBConfig, steps: int | None) -> Iterator[Doubt]:
    """Of a method's knobs; `steps` are the run's, if they are known."""
    read = knobs_of([args])
    for name in _WARM_UPS:
        value = getattr(args, name)
        if name in read and steps is not None and value is not None and value > steps:
            yield Doubt(
                name,
                f"{value} steps, and the run has {steps}: it ends before the warm-up does, and rollouts or loss are "
                "never plain distillation's",
                f"Lower {name}, or train longer",
            )
    if "initial_kl_budget" in read and args.initial_kl_budget == math.inf:
        yield Doubt(
            "initial_kl_budget",
            "infinite, so every rollout of the warm-up is the teacher's own, and not the student's",
            f"Set a budget in nats per token, such as 0.01 (behavior: {pair_of(args)[0]})",
        )


def of_models(
    run: RunConfig,
    args: TRBConfig,
    student: "PreTrainedModel",
    teacher: "PreTrainedModel",
    *,
    same: bool | None = None,
) -> Iterator[Doubt]:
    """Of a pair; the models may be without weights if `same` says whether theirs are equal."""
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (student, teacher)]
    if sizes[0] > sizes[1]:
        yield Doubt(
            "sizes",
            f"the student has {_millions(sizes[0])} parameters, more than the teacher's {_millions(sizes[1])}",
            "Exchange student and teacher if they were swapped",
        )
    if _same_weights(student, teacher) if same is None else same:
        yield Doubt("weights", "student and teacher are the same model, so the loss is 0", "Choose another teacher")
    longest = run.max_prompt_length + int(args.max_completion_length or 0)
    for role, model in (("student", student), ("teacher", teacher)):
        limit = position_limit(model)
        if limit is not None and longest > limit:
            yield Doubt(
                "lengths",
                f"prompts of up to {run.max_prompt_length} tokens and completions of up to "
                f"{args.max_completion_length} do not fit the {limit} positions of the {role}",
                "Lower max_prompt_length or max_completion_length",
            )
            break
    rate = next(rate for most, rate in _RATES if sizes[0] <= most) * (_LORA_TIMES if run.lora_rank else 1.0)
    if args.learning_rate > _TOO_MANY_TIMES * rate * (1 + 1e-9):
        yield Doubt(
            "learning_rate",
            f"{args.learning_rate:g}, more than {_TOO_MANY_TIMES:g} times the {rate:g} that is known to be safe for a "
            f"student of {_millions(sizes[0])} parameters",
            f"Lower learning_rate, to {rate:g} for instance",
        )


def of_prompts(
    prompts: "Dataset", tokenizer: "PreTrainedTokenizerBase", **chat_template_kwargs: Any
) -> Iterator[Doubt]:
    """Of what the tokenizer makes of the prompts."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:  # some tokenizers have one id for all they need
        return
    rows = [row for row, ids in enumerate(render(tokenizer, prompts, **chat_template_kwargs)) if unknown in ids]
    if rows:
        yield Doubt(
            "prompts",
            f"{len(rows)} of {len(prompts)} have characters that the tokenizer does not know, the first in row "
            f"{rows[0] + 1}: the models read {tokenizer.unk_token} in their place",
            "Check that the data fits the models",
        )


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _same_weights(student: "PreTrainedModel", teacher: "PreTrainedModel") -> bool:
    own, others = dict(student.named_parameters()), dict(teacher.named_parameters())
    if own.keys() != others.keys():
        return False
    return all(_equal(weight, others[name]) for name, weight in own.items())


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two weights agree but for what another dtype rounds off."""
    if first.shape != second.shape or first.is_meta or second.is_meta:
        return False
    low = min(first.dtype, second.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(first.detach().to(low), second.detach().to(first.device, low))
