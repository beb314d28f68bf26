"""What a run may well be told and can hardly be meant: settings that make a student learn little, or nothing.

Nothing here is refused. Left out: what cannot work at all (`trb.training.arguments`, `trb.training.prompts`), and
memory.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trb.errors import named
from trb.models.chats import Messages, first_difference, rendered_text
from trb.models.modeling import position_limit
from trb.training.behaviors import BEHAVIORS, BLEND_WARMUP_STEPS
from trb.training.config import TRBConfig
from trb.training.methods import every_knob, knobs_of, owners_of, pair_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "STUDENT_TEMPLATE",
    "TEACHER_TEMPLATE",
    "Doubt",
    "longest_completion",
    "of_chats",
    "of_lengths",
    "of_pair",
    "of_rate",
    "of_rendered",
    "of_settings",
    "of_unknown",
    "of_unread",
    "of_unused",
    "safe_rate",
    "steps_of",
    "trains_adapters",
    "unknown_id",
    "warn",
]

logger = logging.getLogger(__name__)

# Knobs that say after how many steps a method is plain distillation.
_WARM_UPS = (
    *("blend_warmup_steps", "temperature_warmup_steps", "horizon_steps", "prefix_steps", "sft_warmup_steps"),
    "veto_steps",
)

# The rates of the recipes, for Adam, by the student's parameters: 0.2 million, 100 million, and the paper's.
_RATES = ((10e6, 3e-4), (300e6, 1e-4), (math.inf, 1e-5))
_LORA_TIMES = 10.0  # adapters are trained at about ten times the rate of whole weights
_TOO_MANY_TIMES = 10.0

# A student this much larger than its teacher is; heads padded to other sizes make a smaller difference.
_LARGER_TIMES = 1.1

# Nats a token that no two models differ by: as good as infinite.
_NO_BUDGET = 100.0

# What a configuration has in place of None.
_FILLED_IN: dict[str, tuple[Any, ...]] = {
    "blend_warmup_steps": (BLEND_WARMUP_STEPS,),
    "budget_schedule": ("linear", "sequence-linear"),
}

_ADAPTER = "lora_"  # in the names of PEFT's weights

TEACHER_TEMPLATE = "processing_class.chat_template = teacher_processing_class.chat_template"
STUDENT_TEMPLATE = "teacher_processing_class.chat_template = processing_class.chat_template"


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
    prompts_per_step = max(1, args.completions_per_step // args.num_generations)
    return math.ceil(max(1, prompts // prompts_per_step) * args.num_train_epochs)


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
    budget = args.initial_kl_budget
    if "initial_kl_budget" in read and budget is not None and budget >= _NO_BUDGET:
        size = "infinite" if budget == math.inf else f"{budget:g}, as good as infinite"
        yield Doubt(
            "initial_kl_budget",
            f"{size}, so every rollout of the warm-up is the teacher's own, and not the student's",
            f"Set a budget in nats per token, such as 0.01 (behavior: {pair_of(args)[0]})",
        )


def of_unread(args: TRBConfig) -> Iterator[Doubt]:
    """Of knobs that were set and are read by nothing in use. Recipes refuse these, and methods of a comparison share
    what some of them read."""
    unread, (behavior, loss) = every_knob() - knobs_of([args]), pair_of(args)
    for field in dataclasses.fields(args):
        if field.name not in unread:
            continue
        value = getattr(args, field.name)
        if value == field.default or value in _FILLED_IN.get(field.name, ()):
            continue
        chosen = f"behavior={behavior} with loss={loss}"
        if field.name in BEHAVIORS[behavior].may_read():
            chosen = f"budget_schedule={args.budget_schedule}"
        yield Doubt(
            field.name,
            f"{format(value, 'g') if isinstance(value, int | float) else value}, which {chosen} does not read",
            f"Leave it out, or choose what does: {'; '.join(owners_of(field.name))}",
        )


_ANOTHER = "Choose another teacher, or give it prompts of its own (train_privileged_column, teacher_system_prompt)"


def of_pair(
    student: "PreTrainedModel", teacher: "PreTrainedModel", *, same: bool | None = None, name: str | None = None
) -> Iterator[Doubt]:
    """Of two models that read the same prompts; they may be without weights if `same` says whether theirs are equal.
    `name` is the teacher's, of several."""
    whose = "teacher" if name is None else f"teacher {name!r}"
    sizes = _size(student), _size(teacher)
    if sizes[0] > _LARGER_TIMES * sizes[1] > 0:
        yield Doubt(
            "sizes",
            f"the student has {_millions(sizes[0])} parameters, more than the {whose}'s {_millions(sizes[1])}",
            "Exchange student and teacher if they were swapped",
        )
    if _same_weights(student, teacher) if same is None else same:
        yield Doubt("weights", f"student and {whose} are the same model, so the loss is 0", _ANOTHER)


def longest_completion(args: TRBConfig, eval_max_new_tokens: int | None) -> int:
    """Of training and evaluation, which may have a length of its own."""
    return max(int(args.max_completion_length or 0), eval_max_new_tokens or 0)


def of_lengths(
    args: TRBConfig,
    student: "PreTrainedModel",
    teacher: "PreTrainedModel",
    max_prompt_length: int,
    eval_max_new_tokens: int | None,
    taught: int | None = None,
) -> Iterator[Doubt]:
    """Of the longest prompts that are let through, whatever the data has; `taught` is the length of the teacher's own
    longest one, where that is another and known."""
    completion = longest_completion(args, eval_max_new_tokens)
    for role, model, prompt in (
        ("student", student, max_prompt_length),
        ("teacher", teacher, taught or max_prompt_length),
    ):
        limit = position_limit(model)
        if limit is not None and prompt + completion > limit:
            yield Doubt(
                "lengths",
                f"prompts of up to {prompt} tokens and completions of up to {completion} do not fit the {limit} "
                f"positions of the {role}",
                "Lower max_prompt_length, max_completion_length or eval_max_new_tokens",
            )
            return


def of_rate(args: TRBConfig, student: "PreTrainedModel", *, adapters: bool) -> Iterator[Doubt]:
    """Of the learning rate; nothing is known of optimizers other than Adam and its relatives."""
    size = _size(student)
    if "adam" not in args.optim or not size:
        return
    rate = safe_rate(size, adapters=adapters)
    if args.learning_rate > _TOO_MANY_TIMES * rate * (1 + 1e-9):
        yield Doubt(
            "learning_rate",
            f"{args.learning_rate:g}, more than {_TOO_MANY_TIMES:g} times the {rate:g} that is known to be safe for a "
            f"student of {_millions(size)} parameters",
            f"Lower learning_rate, to {rate:g} for instance",
        )


def safe_rate(size: int, *, adapters: bool = False) -> float:
    """The learning rate of the recipes for a student of about so many parameters, all of them trained or adapters."""
    return next(rate for most, rate in _RATES if size < most) * (_LORA_TIMES if adapters else 1.0)


def unknown_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id that stands for what a tokenizer cannot read; None where it has none, or one id for all it needs."""
    unknown = tokenizer.unk_token_id
    return None if unknown == tokenizer.eos_token_id else unknown


def of_chats(
    student: "PreTrainedTokenizerBase",
    teacher: "PreTrainedTokenizerBase",
    conversations: Iterable[Messages],
    options: Mapping[str, Any],
) -> Iterator[Doubt]:
    """Of two chat templates, on some conversations; `options` are the templates' keyword arguments."""
    found = first_difference(student, teacher, conversations, **options)
    if found is not None:
        yield Doubt(
            "chat template",
            f"student and teacher write one conversation differently: {found.student!r} and {found.teacher!r}. Both "
            "are given the student's way, which the teacher may never have seen",
            f"{named(TEACHER_TEMPLATE)} writes the teacher's way, which the student then has to learn; "
            f"{named(STUDENT_TEMPLATE)} goes on as it is",
        )


def of_rendered(prompts: Sequence[Messages], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Doubt]:
    """Of prompts that are chats rendered already."""
    rows = [row for row, chat in enumerate(prompts) if rendered_text(tokenizer, chat) is not None]
    if rows:
        yield Doubt(
            "prompts",
            f"{len(rows)} of {len(prompts)} are whole chats, rendered already, the first in row {rows[0] + 1}: no chat "
            "template is applied to them",
            "Give them as messages with role and content to have them rendered",
        )


def of_unused(names: Iterable[str], data: str) -> Iterator[Doubt]:
    """Of teachers, of which `names` have no row in the data."""
    for name in names:
        yield Doubt(
            "teachers",
            f"no row of {data} is of teacher {name!r}, which teaches nothing",
            "Leave it out, or add its rows",
        )


def of_unknown(rows: Sequence[int], count: int, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Doubt]:
    """Of `count` prompts, of which `rows` (from 0) have `unknown_id` in them."""
    if rows:
        yield Doubt(
            "prompts",
            f"{len(rows)} of {count} have characters that the tokenizer does not know, the first in row "
            f"{rows[0] + 1}: the models read {tokenizer.unk_token} in their place",
            "Check that the data fits the models",
        )


def trains_adapters(model: torch.nn.Module) -> bool:
    """Whether adapters are trained, and not the weights they are beside."""
    return any(_ADAPTER in name and weight.requires_grad for name, weight in model.named_parameters())


def _size(model: "PreTrainedModel") -> int:
    """Parameters, adapters apart; 4-bit weights, which are stored two in a byte, count as what they stand for."""
    adapters = sum(weight.numel() for name, weight in model.named_parameters() if _ADAPTER in name)
    return model.num_parameters() - adapters


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _same_weights(student: "PreTrainedModel", teacher: "PreTrainedModel") -> bool:
    own, others = _weights(student), _weights(teacher)
    return bool(own) and own.keys() == others.keys() and all(_equal(own[name], others[name]) for name in own)


def _weights(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """Weights by name, without adapters that change nothing yet; empty where some do."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        if _ADAPTER not in name:
            found[name.replace(".base_layer.", ".")] = weight
        elif "lora_B" in name and (weight.is_meta or bool(weight.detach().any())):
            return {}
    return found


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two weights agree but for what another dtype rounds off."""
    if first.shape != second.shape or first.is_meta or second.is_meta or not first.numel():
        return False
    if not (first.is_floating_point() and second.is_floating_point()):  # quantized, each in its own way
        return first.dtype == second.dtype and torch.equal(first.detach(), second.detach().to(first.device))
    low = min(first.dtype, second.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(first.detach().to(low), second.detach().to(first.device, low))
