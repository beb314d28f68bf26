"""Exact sampling from behavior policies: `sample` takes two models and prompts and returns a `Rollout`.

Every sampler draws from the same law, with the same randomness; `method` chooses how the work is laid out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import index
from typing import Any, Protocol, TypeAlias, Unpack, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trb.errors import InputError, did_you_mean, shown, whole
from trb.models.modeling import position_limit, rope_switch, without_adapters
from trb.policies import BehaviorPolicy
from trb.sampling.lockstep import sample_lockstep
from trb.sampling.reading import Way, sampling_mode, way_of
from trb.sampling.rollout import EngineOptions, NonFiniteLogitsError, Rollout, RolloutStats
from trb.sampling.speculative import sample_speculative
from trb.sampling.uniforms import MAX_ROLLOUTS, prompt_key, stream_seed
from trb.vocab import SharedVocabulary, checked_temperature, head_rows

__all__ = [
    "BLOCK_SIZES",
    "SAMPLERS",
    "Engine",
    "EngineOptions",
    "NonFiniteLogitsError",
    "Rollout",
    "RolloutStats",
    "Sampler",
    "prompt_key",
    "sample",
    "stream_seed",
]

_ROW_OPTIONS = ("policies", "prompt_keys", "rollout_index", "row_numbers")
BLOCK_SIZES = ("measured", "planned")


@dataclass(frozen=True)
class Sampler:
    """How rollouts are computed, which changes nothing about their law or their randomness.

    Attributes:
        run: with the arguments of `trb.sampling.lockstep.sample_lockstep`; one that reads models in slots, with those
            of `trb.sampling.speculative.sample_speculative`.
        in_slots: whether it reads models through slots (`trb.sampling.cache`). Models that cannot be read so are left
            to `lockstep`.
    """

    run: Callable[..., Rollout]
    in_slots: bool


SAMPLERS: dict[str, Sampler] = {
    "speculative": Sampler(sample_speculative, in_slots=True),
    "lockstep": Sampler(sample_lockstep, in_slots=False),
}
"""Samplers by the name that `sample(method=)` takes."""


class Engine(Protocol):
    """Samples in place of the models given to `sample`, which it holds copies of; see `trb.sampling.vllm`."""

    def sample(
        self, prompts: Sequence[Sequence[int]], policies: Sequence[BehaviorPolicy], **options: Unpack[EngineOptions]
    ) -> Rollout:
        """One completion per prompt, from the law of its policy; arguments as in `trb.sampling.sample`, checked."""


def sample(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prompts: Sequence[Sequence[int]],
    policy: BehaviorPolicy | Sequence[BehaviorPolicy],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    teacher_eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    method: str = "speculative",
    block_size: int | str | None = "measured",
    teacher_prompts: Sequence[Sequence[int]] | None = None,
    prompt_keys: Sequence[int] | None = None,
    rollout_index: Sequence[int] | None = None,
    begun: Sequence[Sequence[int]] | None = None,
    vocab_size: int | None = None,
    max_rows: int | None = None,
    keep_teacher_hidden: bool = False,
    allow_non_finite: bool = False,
    engine: Engine | None = None,
) -> Rollout:
    """Draw one completion per prompt, exactly from the policy's law at every prefix.

    A row's completion is a function of (models, policy, seed, prompts, prompt key, rollout index) alone: not of the
    other rows, of `max_rows`, or of earlier calls (up to floating-point rounding of batched matrix products).

    Args:
        student: any Hugging Face causal LM, or a PEFT wrapper around one; drafts every token.
        teacher: the same, with the student's tokenizer; may be None when no policy needs it.
        prompts: token ids of each row, not padded, not empty.
        policy: one of `trb.policies`, or one for each row.
        max_new_tokens: the longest completion, stop token included.
        eos_token_id: the id, or ids, that end a completion; the first is the one emitted.
        teacher_eos_token_id: the teacher's stop ids; None means the student's.
        temperature: divides both models' logits, before stop ids are folded into one.
        seed: 64-bit seed of the call's random stream.
        method: a name in `SAMPLERS`: `"speculative"`, blocks drafted by the student and read by the teacher in one
            pass; or `"lockstep"`, both models token by token, the reference. Before a model is first sampled, each
            way of reading it is compared with its own plain passes (`trb.sampling.reading`): one that is not exact
            for it, such as blocks for states of its own, is replaced by the next slower one, with a warning.
        block_size: speculative only: tokens drafted before the teacher reads them. `"measured"` adapts it to acceptance
            and to the clock, `"planned"` (or None) to acceptance and the models' shapes, which repeats from run to
            run.
        teacher_prompts: token ids of each row that the teacher reads in place of the student's prompt, before the
            completion that they share; None for the same prompts.
        prompt_keys: unsigned 64-bit key of each row's prompt; by default the row's index.
        rollout_index: which rollout of its prompt each row is, in [0, 2**24); by default 0.
        begun: the first tokens of each row's completion, where there are some: given, and not drawn. They count among
            `max_new_tokens`, of which at least one must be left; what is returned is what comes after them. They are
            read as a prompt is: a stop id among them, with which an earlier turn of a chat ends, ends nothing.
        vocab_size: sample from the first so many head rows only; by default all rows the given models share.
        max_rows: rows in flight at once, to bound memory; by default all. The speculative sampler gives the place of
            a finished row to the next prompt.
        keep_teacher_hidden: speculative only: return `Rollout.teacher_hidden`, with which the loss needs no second
            teacher pass.
        allow_non_finite: go on with any token where a model's logits are NaN or infinite. For training, where the loss
            is NaN at the same prefix and the step is skipped; what is sampled there means nothing.
        engine: a serving engine that samples instead, such as `trb.sampling.vllm.BlendEngine`, with the weights it was
            last given; the models say what to check. How it lays the work out (`method`, `block_size`, `max_rows`) is
            its own affair, it returns no hidden states, it counts no passes, and it does not look for NaN.

    Raises:
        ValueError: names the offending argument: an empty prompt, an id outside the heads, a missing teacher, keys
            of another length than the prompts, prompts too long for the model, an unknown method, a value of
            another kind.
        UnsupportedModelError: a model that cannot be sampled exactly; names the model type and the reason.
        NonFiniteLogitsError: a model's logits at a prefix make no law; names the model, the row and the position.
    """
    models = [without_adapters(model) for model in ([student] if teacher is None else [student, teacher])]
    sizes = [head_rows(model) for model in models] + ([] if vocab_size is None else [whole("vocab_size", vocab_size)])
    rows = _token_ids("prompts", prompts)
    shared: EngineOptions = {
        "vocabulary": SharedVocabulary.of(sizes, eos_token_id, teacher_eos_token_id),
        "max_new_tokens": _positive("max_new_tokens", max_new_tokens),
        "temperature": checked_temperature(temperature),
        "seed": whole("seed", seed),
        "prompt_keys": _column("prompt_keys", prompt_keys, range(len(rows)), 1 << 64),
        "rollout_index": _column("rollout_index", rollout_index, [0] * len(rows), MAX_ROLLOUTS),
    }
    policies = _policies_of(policy, len(rows), len(models))
    sampler = _sampler_of(method)
    slot_options = {"block_size": _block_size(block_size), "keep_teacher_hidden": keep_teacher_hidden}
    max_rows = None if max_rows is None else _positive("max_rows", max_rows)
    there = _begun(begun, len(rows), shared["max_new_tokens"], engine)
    both = _prompts_of(rows, teacher_prompts, teacher, engine)
    both = _checked_rows(models, both, there, shared["max_new_tokens"], shared["vocabulary"].size)

    if not rows:
        return Rollout()
    if engine is not None:
        return engine.sample(both[0], policies, **shared)
    read = models if any(policy.needs_teacher for policy in policies) else models[:1]
    with torch.no_grad(), sampling_mode(*models):
        ways = _ways(read, slots=sampler.in_slots)
        run = (sampler if ways[0].in_slots == sampler.in_slots else SAMPLERS["lockstep"]).run
        options = {**shared, "policies": policies, "row_numbers": [*range(len(rows))], "max_rows": max_rows}
        options["allow_non_finite"] = allow_non_finite
        sampling = _Sampling(models, run, ways, [*map(len, there)], options, slot_options)
        return _in_stretches(sampling, read, [both[0], both[-1]][: len(read)], shared["max_new_tokens"])


def _ways(models: list[PreTrainedModel], slots: bool) -> list[Way]:
    """How to read each model; through slots all of them or none."""
    ways = [way_of(model, slots=slots) for model in models]
    if len({way.in_slots for way in ways}) > 1:
        ways = [way_of(model, slots=False) for model in models]
    return ways


_Rows: TypeAlias = Sequence[Sequence[list[int]]]
"""Prompts of each row, with what was drawn of its completion: the student's, and the teacher's where it is read."""


@dataclass(frozen=True)
class _Sampling:
    """One call of `sample`, less the rows of each model; of each completion, `begun` tokens are given."""

    models: Sequence[PreTrainedModel]
    run: Callable[..., Rollout]
    ways: Sequence[Way]
    begun: list[int]
    options: dict[str, Any]
    slot_options: dict[str, Any]

    def __call__(
        self, rows: _Rows, ends: Sequence[int | None], beyond_switch: Sequence[bool], **columns: Any
    ) -> Rollout:
        if self.ways[0].in_slots:
            attentions = [way.attention for way in self.ways]
            how = {"attentions": attentions, "ends": ends, "beyond_switch": beyond_switch, **self.slot_options}
        else:
            read = [partial(cast(Any, way.reader), end=end) for way, end in zip(self.ways, ends, strict=True)]
            how = {"readers": read}
        student, teacher = self.models[0], self.models[1] if len(self.models) > 1 else None
        options = {**self.options, **columns, **how}
        return self.run(student, teacher, rows[0], teacher_prompts=rows[-1], **options)


def _in_stretches(
    sampling: _Sampling,
    models: list[PreTrainedModel],
    prompts: _Rows,
    max_new_tokens: int,
) -> Rollout:
    """Rows in batches, none of which crosses a length at which one of the models changes its factors (LongRoPE): a pass
    over one row that is longer would change every row of its batch, and what a cache holds of the row itself. A row
    that reaches the length is read anew, with the other factors, and goes on where it was.
    """
    switches = [rope_switch(model) for model in models]
    begun = sampling.begun
    left = [max_new_tokens - given for given in begun]
    longest = [max(map(len, own)) + max(left) - 1 for own in prompts]
    if all(switch is None or length <= switch for switch, length in zip(switches, longest, strict=True)):
        return sampling(prompts, switches, [False] * len(models), drawn=begun, max_new_tokens=left)
    return _across(switches, sampling, prompts, max_new_tokens)


def _across(switches: Sequence[int | None], sampling: _Sampling, prompts: _Rows, max_new_tokens: int) -> Rollout:
    """`_in_stretches` where rows may come to be longer than a model's switch: first those that no model has beyond its
    own, then those that one has, then those that all have. Each model counts its own prompt."""
    count = len(prompts[0])
    whole = Rollout([*prompts[0]], [[] for _ in range(count)], [False] * count, RolloutStats.empty(count))
    hidden: list[list[Tensor]] = [[] for _ in range(count)]
    begun = sampling.begun

    def room(row: int) -> list[float]:
        """How many tokens each model may draw of a row, before it is beyond that model's switch; below 1 if it is."""
        length = len(whole.completions[row])
        return [
            math.inf if switch is None else switch - len(own[row]) - length + 1
            for switch, own in zip(switches, prompts, strict=True)
        ]

    for beyond in product((False, True), repeat=len(prompts)):
        rows = [
            row
            for row, completion in enumerate(whole.completions)
            if not whole.stopped[row]
            and begun[row] + len(completion) < max_new_tokens
            and tuple(tokens < 1 for tokens in room(row)) == beyond
        ]
        if not rows:
            continue
        drawn = [begun[row] + len(whole.completions[row]) for row in rows]
        left = [
            int(min([max_new_tokens - before, *(tokens for tokens in room(row) if tokens >= 1)]))
            for row, before in zip(rows, drawn, strict=True)
        ]
        columns = {name: [sampling.options[name][row] for row in rows] for name in _ROW_OPTIONS}
        so_far = [[own[row] + whole.completions[row] for row in rows] for own in prompts]
        ends = [None if past else switch for switch, past in zip(switches, beyond, strict=True)]
        part = sampling(so_far, ends, beyond, drawn=drawn, max_new_tokens=left, **columns)
        whole.continue_rows(rows, part)
        for row, states in zip(rows, part.teacher_hidden or [], strict=bool(part.teacher_hidden)):
            hidden[row].append(states)
    if any(hidden):
        whole.teacher_hidden = [torch.cat(states) for states in hidden]
    return whole


def _token_ids(name: str, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    try:
        if any(isinstance(row, str) for row in rows):
            raise InputError(f"{name} are text, and sampling reads token ids: give each as a tokenizer encodes it")
        return [list(map(index, row)) for row in rows]
    except TypeError as error:
        raise InputError(f"{name} must be lists of token ids, one for each row, got {shown(rows)}") from error


def _prompts_of(
    prompts: list[list[int]],
    teacher_prompts: Sequence[Sequence[int]] | None,
    teacher: PreTrainedModel | None,
    engine: Engine | None,
) -> list[list[list[int]]]:
    """The prompts, and the teacher's where it has its own."""
    if teacher_prompts is None:
        return [prompts]
    if engine is not None:
        raise InputError(
            "teacher_prompts: an engine's two models read one prompt; sample in this process (engine=None)"
        )
    if teacher is None:
        raise InputError("teacher_prompts are given and no teacher reads them, got teacher=None")
    taught = _token_ids("teacher_prompts", teacher_prompts)
    if len(taught) != len(prompts):
        raise InputError(f"teacher_prompts has {len(taught)} entries for {len(prompts)} prompts")
    return [prompts, taught]


def _begun(
    begun: Sequence[Sequence[int]] | None, rows: int, max_new_tokens: int, engine: Engine | None
) -> list[list[int]]:
    if begun is None:
        return [[] for _ in range(rows)]
    if engine is not None:
        raise InputError("begun: an engine draws whole completions; sample in this process (engine=None)")
    given = _token_ids("begun", begun)
    if len(given) != rows:
        raise InputError(f"begun has {len(given)} entries for {rows} prompts")
    for row, ids in enumerate(given):
        if len(ids) >= max_new_tokens:
            raise InputError(f"begun: row {row} has {len(ids)} tokens, and max_new_tokens={max_new_tokens} leaves none")
    return given


def _policies_of(policy: BehaviorPolicy | Sequence[BehaviorPolicy], rows: int, models: int) -> Sequence[BehaviorPolicy]:
    of_each = isinstance(policy, Sequence) and not isinstance(policy, str)
    policies = cast(Sequence[BehaviorPolicy], policy if of_each else [policy] * rows)
    if len(policies) != rows:
        raise InputError(f"policy has {len(policies)} entries for {rows} prompts")
    for each in policies if of_each else [cast(BehaviorPolicy, policy)]:
        if isinstance(each, type) or not hasattr(each, "needs_teacher"):
            raise InputError(
                "policy must be an object of trb.policies, such as TrustRegionPolicy(0.01), or one for each prompt, "
                f"got {shown(each)}"
            )
        if each.needs_teacher and models < 2:
            raise InputError(f"{each!r} needs a teacher, got teacher=None")
    return policies


def _sampler_of(method: str) -> Sampler:
    if method not in SAMPLERS:
        hint = did_you_mean(str(method), [*SAMPLERS])
        raise InputError(f"unknown sampling method {method!r}; choose one of {', '.join(SAMPLERS)}{hint}")
    return SAMPLERS[method]


def _positive(name: str, value: int) -> int:
    found = whole(name, value)
    if found < 1:
        raise InputError(f"{name} must be at least 1, got {shown(found)}")
    return found


def _block_size(value: int | str | None) -> int | str:
    if value is None:
        return "planned"
    if not isinstance(value, str):
        return _positive("block_size", value)
    if value not in BLOCK_SIZES:
        hint = did_you_mean(value, BLOCK_SIZES)
        raise InputError(f"block_size must be a number or one of {', '.join(BLOCK_SIZES)}, got {value!r}{hint}")
    return value


def _column(name: str, values: Sequence[int] | None, default: Sequence[int], end: int) -> list[int]:
    if values is None:
        return list(default)
    try:
        found = list(map(index, values))
    except TypeError as error:
        raise InputError(f"{name} must hold whole numbers, got {shown(values)}") from error
    if len(found) != len(default):
        raise InputError(f"{name} has {len(found)} entries for {len(default)} prompts")
    outside = [value for value in found if not 0 <= value < end]
    if outside:
        raise InputError(f"{name} must lie in [0, {end}), got {outside[0]}")
    return found


def _checked_rows(
    models: list[PreTrainedModel],
    prompts: list[list[list[int]]],
    begun: list[list[int]],
    max_new_tokens: int,
    vocabulary_size: int,
) -> list[list[list[int]]]:
    """The prompts, and the teacher's own where it has its own, each with what is given of its completion."""
    names = ("prompt", "teacher prompt")[: len(prompts)]
    for model, own, name in zip(models, (prompts[0], prompts[-1]), (names[0], names[-1]), strict=False):
        _check_positions(model, own, max_new_tokens, name)
    found = [[row + ids for row, ids in zip(own, begun, strict=True)] for own in prompts]
    for own, name in zip(found, names, strict=True):
        _check_rows(own, vocabulary_size, name)
    return found


def _check_rows(prompts: list[list[int]], vocabulary_size: int, name: str) -> None:
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"{name} {row} is empty; a prompt needs at least one token")
        outside = [token for token in prompt if not 0 <= token < vocabulary_size]
        if outside:
            raise InputError(
                f"{name} {row} contains token id {outside[0]}, outside the {vocabulary_size} shared head rows"
            )


def _check_positions(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, name: str) -> None:
    limit, longest = position_limit(model), max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(
            f"a {name} of {longest} tokens plus max_new_tokens={max_new_tokens} exceeds the {limit} positions of "
            f"{type(model).__name__}; shorten the prompts or lower max_new_tokens"
        )
