"""Exact sampling from behavior policies: `sample` takes two models and prompts and returns a `Rollout`.

Every sampler draws from the same law, with the same randomness; `method` chooses how the work is laid out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from trb.choices import did_you_mean
from trb.modeling import without_adapters
from trb.policies import BehaviorPolicy
from trb.sampling.cache import supports_slots
from trb.sampling.lockstep import sample_lockstep
from trb.sampling.rollout import EngineOptions, Rollout, RolloutStats
from trb.sampling.speculative import sample_speculative
from trb.sampling.uniforms import MAX_ROLLOUTS, prompt_key, stream_seed
from trb.vocab import SharedVocabulary, head_rows

__all__ = [
    "BLOCK_SIZES",
    "METHODS",
    "Engine",
    "EngineOptions",
    "Rollout",
    "RolloutStats",
    "prompt_key",
    "sample",
    "stream_seed",
]

logger = logging.get_logger(__name__)

METHODS = {"speculative": sample_speculative, "lockstep": sample_lockstep}
BLOCK_SIZES = ("measured", "planned")


class Engine(Protocol):
    """Samples in place of the models given to `sample`, which it holds copies of; see `trb.sampling.vllm`."""

    def sample(
        self, prompts: Sequence[Sequence[int]], policy: BehaviorPolicy, **options: Unpack[EngineOptions]
    ) -> Rollout:
        """One completion per prompt, from the policy's law; the arguments are those of `trb.sampling.sample`."""


def sample(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prompts: Sequence[Sequence[int]],
    policy: BehaviorPolicy,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    teacher_eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    method: str = "speculative",
    block_size: int | str = "measured",
    prompt_keys: Sequence[int] | None = None,
    rollout_index: Sequence[int] | None = None,
    vocab_size: int | None = None,
    max_rows: int | None = None,
    keep_teacher_hidden: bool = False,
    engine: Engine | None = None,
) -> Rollout:
    """Draw one completion per prompt, exactly from the policy's law at every prefix.

    A row's completion is a function of (models, policy, seed, prompt, prompt key, rollout index) alone: not of the
    other rows, of `max_rows`, or of earlier calls (up to floating-point rounding of batched matrix products).

    Args:
        student: any Hugging Face causal LM; drafts every token.
        teacher: the same, with the student's tokenizer; may be None when `policy.needs_teacher` is False.
        prompts: token ids of each row, not padded, not empty.
        policy: one of `trb.policies`.
        max_new_tokens: the longest completion, stop token included.
        eos_token_id: the id, or ids, that end a completion; the first is the one emitted.
        teacher_eos_token_id: the teacher's stop ids; None means the student's.
        temperature: divides both models' logits, after stop ids are folded into one.
        seed: 64-bit seed of the call's random stream.
        method: `"speculative"`, blocks drafted by the student and read by the teacher in one pass; or `"lockstep"`,
            both models token by token, the reference. Models with recurrent layers are sampled in lockstep.
        block_size: speculative only: tokens drafted before the teacher reads them. `"measured"` adapts it to acceptance
            and to the clock, `"planned"` to acceptance and the models' shapes, which repeats from run to run.
        prompt_keys: unsigned 64-bit key of each row's prompt; by default the row's index.
        rollout_index: which rollout of its prompt each row is, in [0, 2**24); by default 0.
        vocab_size: sample from the first so many head rows only; by default all rows the given models share.
        max_rows: rows in flight at once, to bound memory; by default all. The speculative sampler gives the place of
            a finished row to the next prompt.
        keep_teacher_hidden: speculative only: return `Rollout.teacher_hidden`, with which the loss needs no second
            teacher pass.
        engine: a serving engine that samples instead, such as `trb.sampling.vllm.BlendEngine`, with the weights it was
            last given; the models say what to check. How it lays the work out (`method`, `block_size`, `max_rows`) is
            its own affair, it returns no hidden states, and it counts no passes.

    Raises:
        ValueError: names the offending argument: an empty prompt, an id outside the heads, a missing teacher, keys
            of another length than the prompts, prompts too long for the model, an unknown method.
    """
    rows = [list(map(int, prompt)) for prompt in prompts]
    keys = list(range(len(rows))) if prompt_keys is None else list(prompt_keys)
    index = [0] * len(rows) if rollout_index is None else list(rollout_index)
    student = without_adapters(student)
    models = [student] if teacher is None else [student, teacher]
    sizes = [head_rows(model) for model in models] + ([] if vocab_size is None else [vocab_size])
    vocabulary = SharedVocabulary.of(sizes, eos_token_id, teacher_eos_token_id)
    _check_options(policy, len(models), max_new_tokens, temperature, method, max_rows)
    _check_block_size(block_size)
    _check_rows(rows, keys, index, vocabulary.size)
    _check_positions(models, rows, max_new_tokens)

    if not rows:
        return Rollout()
    shared: EngineOptions = {
        "vocabulary": vocabulary,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "prompt_keys": keys,
        "rollout_index": index,
    }
    if engine is not None:
        return engine.sample(rows, policy, **shared)
    options: dict[str, Any] = {**shared, "max_rows": max_rows}
    if method == "speculative" and _in_slots(models):
        options |= {"block_size": block_size, "keep_teacher_hidden": keep_teacher_hidden}
        sampler: Callable[..., Rollout] = sample_speculative
    else:
        sampler = sample_lockstep
    with torch.no_grad(), _evaluation_mode(*models):
        return sampler(student, teacher, rows, policy, **options)


def _in_slots(models: list[PreTrainedModel]) -> bool:
    for model in models:
        if not supports_slots(model):
            logger.warning_once(
                f"{type(model).__name__} keeps a recurrent state that cannot be taken back: sampling in lockstep"
            )
            return False
    return True


def _check_options(
    policy: BehaviorPolicy, models: int, max_new_tokens: int, temperature: float, method: str, max_rows: int | None
) -> None:
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise ValueError(f"unknown sampling method {method!r}; choose one of {', '.join(METHODS)}{hint}")
    if policy.needs_teacher and models < 2:
        raise ValueError(f"{policy!r} needs a teacher, got teacher=None")
    for name, value in (("max_new_tokens", max_new_tokens), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_block_size(block_size: int | str) -> None:
    if isinstance(block_size, str):
        if block_size not in BLOCK_SIZES:
            hint = did_you_mean(block_size, BLOCK_SIZES)
            raise ValueError(
                f"block_size must be a number or one of {', '.join(BLOCK_SIZES)}, got {block_size!r}{hint}"
            )
    elif block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")


def _check_rows(prompts: list[list[int]], keys: list[int], index: list[int], vocabulary_size: int) -> None:
    for name, values, end in (("prompt_keys", keys, 1 << 64), ("rollout_index", index, MAX_ROLLOUTS)):
        if len(values) != len(prompts):
            raise ValueError(f"{name} has {len(values)} entries for {len(prompts)} prompts")
        outside = [value for value in values if not 0 <= value < end]
        if outside:
            raise ValueError(f"{name} must lie in [0, {end}), got {outside[0]}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; a prompt needs at least one token")
        outside = [token for token in prompt if not 0 <= token < vocabulary_size]
        if outside:
            raise ValueError(
                f"prompt {row} contains token id {outside[0]}, outside the {vocabulary_size} shared head rows"
            )


def _check_positions(models: list[PreTrainedModel], prompts: list[list[int]], max_new_tokens: int) -> None:
    longest = max(map(len, prompts), default=0)
    for model in models:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens plus max_new_tokens={max_new_tokens} exceeds the {limit} positions of "
                f"{type(model).__name__}; shorten the prompts or lower max_new_tokens"
            )


@contextmanager
def _evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Dropout off (and gradient checkpointing, which would drop the KV cache) while sampling; restored after."""
    with ExitStack() as stack:
        for model in models:
            stack.callback(model.train, model.training)
            model.eval()
        yield
