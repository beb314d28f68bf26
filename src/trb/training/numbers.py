"""What the numbers of a configuration must be: each is refused by its own name, before anything reads it.

Ours, and those of TRL and transformers, which compare some without looking at their type, hand others to torch, and
leave the rest for whatever meets them first. Left out: numbers of which only one value is supported
(`trb.training.config`), and how recipes read the types of their keys (`trb.studies.keys`).
"""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

from trb.errors import InputError, real, shown
from trb.sampling.uniforms import SEED_BOUNDS, SEEDS
from trb.vocab import TEMPERATURES

__all__ = ["check_numbers"]


class _Kind(NamedTuple):
    """Of some numbers: what they must be, in words and as a test, and whether only whole ones will do."""

    words: str
    fits: Callable[[float], bool]
    names: str
    whole: bool = False


def _is_interval(value: float) -> bool:
    """Every so many steps, or a share of all of them."""
    return 0 < value < 1 or (1 <= value < math.inf and value == math.floor(value))


_LARGEST = 2**63  # from where torch takes no integer

# What None switched off in transformers 4, whose annotation did not say so, and the number that still does.
_OFF = {"max_grad_norm": 0.0}

# What TRL reads of a number that is text.
_TEXTS = {"pad_to_multiple_of": ("auto", "none", "null")}

# What a version of the libraries does not have is not looked at.
_KINDS = (
    _Kind(
        "at least 1",
        lambda value: value >= 1,
        """num_generations initial_horizon max_completion_length loss_chunk_tokens block_size rollout_batch_size
        max_skipped_steps max_tool_calling_iterations tool_max_characters skd_teacher_top_k
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps torch_empty_cache_steps
        dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout vllm_max_model_length vllm_tensor_parallel_size
        pad_to_multiple_of""",
        whole=True,
    ),
    _Kind(
        "at least 0",
        lambda value: value >= 0,
        """loss_top_k forward_top_k recorded_rollouts recorded_alternatives recorded_scores_every
        blend_warmup_steps temperature_warmup_steps sft_warmup_steps horizon_steps prefix_steps veto_steps
        dataloader_num_workers num_completions_to_print""",
        whole=True,
    ),
    _Kind("at least 0, where 0 keeps all", lambda value: value >= -1, "save_total_limit", True),  # -1 as 0, to them
    _Kind("at least 1, or -1 for num_train_epochs", lambda value: value >= 1 or value == -1, "max_steps", True),
    # Python looks for integers of other kinds by trying one after the other.
    _Kind(f"in {SEED_BOUNDS}", lambda value: int(value) in SEEDS, "seed", whole=True),
    _Kind("a port, from 1 to 65535", lambda value: 1 <= value <= 65535, "vllm_server_port vllm_group_port", True),
    _Kind("a non-negative number of nats", lambda value: value >= 0, "initial_kl_budget eopd_entropy"),
    _Kind("at least 0", lambda value: value >= 0, "iw_gamma max_grad_norm eval_delay"),
    _Kind(
        "at least 0 and finite",
        lambda value: 0 <= value < math.inf,
        "learning_rate weight_decay adam_epsilon warmup_steps veto_strength",
    ),
    _Kind("at least 0 and below 1", lambda value: 0 <= value < 1, "adam_beta1 adam_beta2"),
    _Kind(
        "positive and finite",
        lambda value: 0 < value < math.inf,
        "sequence_kl_budget num_train_epochs vllm_request_timeout vllm_server_timeout",
    ),
    _Kind(
        f"positive and finite ({TEMPERATURES[0]:g} to {TEMPERATURES[1]:g})",
        lambda value: TEMPERATURES[0] <= value <= TEMPERATURES[1],
        "temperature initial_temperature skd_teacher_temperature",
    ),
    _Kind("a positive number of seconds", lambda value: 0 < value < math.inf, "tool_timeout"),
    _Kind(
        "a positive number of steps, or a share of all below 1",
        _is_interval,
        "logging_steps",
    ),
    _Kind(
        "a number of steps, or a share of all below 1",
        lambda value: value == 0 or _is_interval(value),  # 0 is never, or at every logged step
        "eval_steps save_steps",
    ),
    _Kind("in [0, 1]", lambda value: 0 <= value <= 1, "behavior_share initial_prefix_share teacher_weight"),
    _Kind("above 0 and at most 1", lambda value: 0 < value <= 1, "tip_share vllm_gpu_memory_utilization"),
)


def _may_be_none(kind: type) -> set[str]:
    """Asked of the annotations: parsers of command lines take None out of the types of fields."""
    written: dict[str, Any] = {}
    for part in reversed(kind.__mro__):
        written |= vars(part).get("__annotations__", {})
    return {name for name, what in written.items() if any(word in str(what) for word in ("None", "Optional"))}


def check_numbers(args: Any) -> None:
    """Refuse what is no number, or none that its option can have; None becomes the number that it stands for.

    Raises:
        InputError: names the option, what it must be, and what it is.
    """
    optional = _may_be_none(type(args))
    for kind in _KINDS:
        for name in kind.names.split():
            value: Any = getattr(args, name, None)
            if value is None and name in _OFF:
                setattr(args, name, _OFF[name])
                continue
            if value is None and (name in optional or not hasattr(args, name)):
                continue
            if isinstance(value, str) and name in _TEXTS:
                if value.lower() in _TEXTS[name]:
                    continue
                value = int(value) if value.isdecimal() else value
            # Python counts booleans as numbers, and whoever gives one for a number meant something else.
            number = isinstance(value, Integral if kind.whole else Real) and not isinstance(value, bool)
            if number:
                real(name, value)  # no integer that is compared here, and that whatever reads it chokes on
            if not number or not kind.fits(value):
                what = "" if number else "a whole number, and " if kind.whole else "a number, and "
                raise InputError(f"{name} must be {what}{kind.words}, got {shown(value)}")
            if isinstance(value, int) and abs(value) >= _LARGEST:
                setattr(args, name, real(name, value))
