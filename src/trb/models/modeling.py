"""What the loss needs of a Hugging Face causal LM: its last hidden states and its output head, apart.

Logits of every completion token at once, `[B, T, V]`, are the largest tensor of a distillation step. Keeping the
head as a function of hidden states lets the loss project a chunk of tokens at a time. Architectures that transform
logits after the projection (scaling, soft-capping) do so in their own ways, so `OutputHead.check` compares both with
the model's own logits once, before training starts, and refuses by name a model whose law at a prefix depends on
anything but the prefix. How models are read token by token is the affair of `trb.sampling`.

Shape suffixes: B sequences, R rows of one group, L padded length, T kept positions, N completion tokens, H hidden
size, V head rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trb.errors import InputError
from trb.models.comparison import Trial, trials_of
from trb.models.in_place import hold_weights
from trb.models.passes import plain_logits, switched_off
from trb.models.quantization import mixes_rows

__all__ = [
    "OutputHead",
    "UnsupportedModelError",
    "check_adapter",
    "check_causal",
    "completion_hidden_states",
    "decoder",
    "evaluation_mode",
    "has_adapters",
    "is_compiled",
    "length_groups",
    "position_limit",
    "probe_rows",
    "rope_switch",
    "row_order",
    "windows",
    "without_adapters",
]

# Rows are read in groups of similar length. The number of groups depends on the batch size alone: under sharding every
# rank must run the model equally often.
_LENGTH_GROUPS = 4

# Kinds of PEFT adapters, in its own names.
_IN_PLACE = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "IA3", "OFT", "HRA", "MISS")
_VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")


def length_groups(rows: int) -> int:
    """Passes in which `completion_hidden_states` reads so many rows."""
    return math.ceil(rows / math.ceil(rows / _LENGTH_GROUPS))


# Lengths up to which the checks pass rows through the models themselves; longer windows are checked on their masks.
_LONGEST_PROBE = 1100
# A model that looks ahead does so at any length.
_CAUSAL_PROBE = 32


_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # the last two of MPT, of Whisper


class UnsupportedModelError(InputError):
    """A model whose completions could not be sampled, or trained on, exactly; names the model type and the reason."""

    def __init__(self, model: nn.Module, reason: str) -> None:
        inner = without_adapters(model)
        super().__init__(f"{inner.config.model_type} ({type(inner).__name__}) is not supported: {reason}")


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside torch.compile's and PEFT's wrappers (adapters stay in place), or the model itself.

    Wrappers hide the signature of the model's forward pass, and with it whether positions can be given.

    Raises:
        ValueError: adapters that do not stay in place (`check_adapter`).
    """
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return model  # type: ignore[return-value]
    for config in model.peft_config.values():  # type: ignore[operator]
        check_adapter(config)
    return model.get_base_model()  # type: ignore[operator]


def check_adapter(config: Any) -> None:
    """Refuse an adapter that is lost where the model inside its wrapper is called.

    Samplers and losses call that model. It holds adapters that replace single layers by layers of the same inputs
    and outputs, as LoRA does; virtual tokens, and what is switched on by the tokens of a prompt, are the wrapper's.

    Args:
        config: a `peft.PeftConfig`, or what stands in an adapter_config.json, as a mapping.

    Raises:
        ValueError: names the kind of adapter and the reason.
    """
    options = config if isinstance(config, Mapping) else vars(config)
    kind = str(getattr(options.get("peft_type"), "value", options.get("peft_type")))
    if kind in _VIRTUAL_TOKENS:
        why = "it puts virtual tokens before the prompt (Prompt-learning), not into the model that is sampled from"
    elif kind not in _IN_PLACE:
        why = f"only adapters that replace single layers are ({', '.join(_IN_PLACE)})"
    elif options.get("alora_invocation_tokens"):
        kind, why = "activated LoRA", "its adapter begins to act at a place inside the prompt"
    else:
        return
    raise InputError(f"adapters of the kind {kind} are not supported: {why}. Use a LoRA adapter, or a whole model")


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of the model are replaced by an adapter's, inside a PEFT wrapper or without one."""
    return hasattr(model, "get_base_model") or any(hasattr(module, "base_layer") for module in model.modules())


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` made the model or a part of it from another module, or compiled one of them in place."""
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in model.modules()
    )


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Dropout off (and gradient checkpointing, which would drop a cache) within the block; restored after, each part as
    it was: some may be kept in evaluation mode while the rest is trained. Models that would not keep their weights
    (`trb.models.in_place`) are made to, or refused."""
    for model in models:
        if reason := hold_weights(model):
            raise UnsupportedModelError(model, reason)
    before = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM that gives its last hidden states."""
    base = model.base_model
    # The text halves of some families for images inherit the name of a base that only the whole has.
    return cast(nn.Module, model.model) if base is model else base


def position_limit(model: nn.Module) -> int | None:
    """How many positions the model has, or None: families without a limit name none, or one below 1."""
    config = without_adapters(model).config.get_text_config()
    limits = [getattr(config, name, None) for name in _POSITIONS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def rope_switch(model: PreTrainedModel) -> int | None:
    """The length beyond which a whole pass rotates *every* position by other factors (LongRoPE), or None."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    found = [
        int(each.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        for each in (parameters, *(value for value in parameters.values() if isinstance(value, dict)))
        if each.get("rope_type") == "longrope"
    ]
    return min(found, default=None)


def probe_rows(model: PreTrainedModel, tokens_after: int) -> list[list[int]]:
    """Four rows to compare ways of reading on, each over `tokens_after` long: the first past every window that a
    pass of affordable length reaches, the last two equally long and full of what families may take for something else
    than text: padding, and where a sequence begins and ends."""
    config = model.config.get_text_config()
    limits = [limit for limit in (position_limit(model), rope_switch(model)) if limit]
    most = min([_LONGEST_PROBE, *limits])
    if most <= tokens_after:
        raise UnsupportedModelError(model, f"it has {most} positions, and {tokens_after + 1} are needed to try it")
    window = max([size for size in windows(model) if size + tokens_after + 3 <= most], default=4)
    lengths = [min(most, first + tokens_after) for first in (window + 3, 1, 4, 4)]
    named = [token for name in _SPECIAL for token in _ids(config, name) if 0 <= token < config.vocab_size]
    ordinary = [token for token in range(min(config.vocab_size, 997)) if token not in named] or [0]
    # Multiples of a prime visit all residues: neighbours differ, and nothing repeats within a window.
    step = next(p for p in (7919, 104729) if len(ordinary) == 1 or p % len(ordinary))
    rows = [[ordinary[(row * 31 + i * step) % len(ordinary)] for i in range(n)] for row, n in enumerate(lengths)]
    for place, row in enumerate(rows[2:] if named else []):
        row[1::2] = [named[(place + i) % len(named)] for i in range(len(row) // 2)]
    return rows


def _ids(config: Any, name: str) -> list[int]:
    value = getattr(config, name, None)
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def windows(model: PreTrainedModel) -> list[int]:
    """Every size by which attention may be local, whatever the family calls it; some may be switched off."""
    config = model.config.get_text_config()
    names = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "sliding_window_size")
    values = [getattr(config, name, None) for name in names]
    return [size for size in values if isinstance(size, int) and size > 0]


def completion_hidden_states(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, completion_BL: Tensor) -> Tensor:
    """`[N, H]` hidden states that predict the N completion tokens, row by row.

    Rows are cut to their real tokens, sorted by length and read in groups, padded on the right: a causal model's real
    tokens never see that padding, so attention needs no mask. Where the length of a pass changes the model (LongRoPE),
    tokens up to that length and those beyond it are read in passes of their own, as they were sampled.

    Args:
        model: a causal LM, or a PEFT wrapper around one.
        ids_BL: token ids; each row's real tokens are contiguous.
        mask_BL: non-zero on real tokens.
        completion_BL: non-zero on completion tokens, each with a real token before it.
    """
    inner = without_adapters(model)
    length_B, start_B = mask_BL.sum(-1), mask_BL.argmax(-1)
    switch = rope_switch(inner)
    if switch is None:
        return _hidden_states_that_predict(inner, ids_BL, start_B, length_B, completion_BL)
    place_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) - start_B[:, None]
    before_BL, after_BL = (completion_BL * near for near in (place_BL <= switch, place_BL > switch))
    # Rows that do not reach beyond are read for company: every process makes equally many passes.
    parts = [
        _hidden_states_that_predict(
            inner, ids_BL, start_B, length_B.clamp_max(switch + 1), before_BL, pass_length=switch
        ),
        _hidden_states_that_predict(inner, ids_BL, start_B, length_B, after_BL),
    ]
    place = [(part_BL != 0)[completion_BL != 0] for part_BL in (before_BL, after_BL)]
    found_NH = torch.zeros(len(place[0]), parts[0].shape[-1], dtype=parts[0].dtype, device=parts[0].device)
    for part_NH, chosen_N in zip(parts, place, strict=True):
        found_NH = found_NH.index_put((chosen_N.nonzero().squeeze(-1),), part_NH)
    return found_NH


def _hidden_states_that_predict(
    inner: PreTrainedModel,
    ids_BL: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    completion_BL: Tensor,
    pass_length: int | None = None,
) -> Tensor:
    """`completion_hidden_states` of rows cut to `length_B` real tokens, in passes of at most `pass_length`."""
    base = decoder(inner)
    options: dict[str, Any] = switched_off(base, "use_cache")
    order_B = length_B.argsort()
    longest_B = length_B[order_B].tolist()
    found = []
    for rows in torch.arange(len(longest_B)).chunk(_LENGTH_GROUPS):
        chosen_R, longest = order_B[rows.to(order_B.device)], longest_B[rows[-1]]
        column_L = torch.arange(longest, device=ids_BL.device)
        place_RL = (start_B[chosen_R, None] + column_L).clamp_max(ids_BL.shape[1] - 1)
        ids_RL = ids_BL[chosen_R].gather(-1, place_RL)
        read_RL = ids_RL if pass_length is None else ids_RL[:, :pass_length]
        output = base(input_ids=read_RL, attention_mask=torch.ones_like(read_RL), **options)
        real_RL = column_L < length_B[chosen_R, None]
        predicts_RL = (completion_BL[chosen_R].gather(-1, place_RL) != 0) & real_RL
        states_RLH = output.last_hidden_state[:, : max(1, longest - 1)]
        found.append(states_RLH[predicts_RL[:, 1:]] if longest > 1 else states_RLH[:, :0].flatten(0, 1))
    return torch.cat(found)[row_order(order_B, (completion_BL != 0).sum(-1))]


def row_order(order_B: Tensor, count_B: Tensor) -> Tensor:
    """Where each row's entries lie in a list that holds the rows in another order, one after the other."""
    sorted_count_B = count_B[order_B]
    first_B = torch.empty_like(count_B)
    first_B[order_B] = sorted_count_B.cumsum(0) - sorted_count_B
    before_B = count_B.cumsum(0) - count_B
    total = int(count_B.sum())
    shift_N = (first_B - before_B).repeat_interleave(count_B, output_size=total)
    return torch.arange(total, device=count_B.device) + shift_N


@dataclass(frozen=True)
class OutputHead:
    """A model's map from hidden states to logits: projection, then scaling, then soft-capping.

    Attributes:
        projection: the output embedding module.
        scale: multiplies the projected logits.
        soft_cap: `c` in `c · tanh(logits / c)`, or None.
    """

    projection: nn.Module
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "OutputHead":
        inner = without_adapters(model)
        config = inner.config.get_text_config()
        return cls(
            inner.get_output_embeddings(),
            _logit_scale(config),
            _soft_cap(config),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[..., H]` to `[..., V]`."""
        # Past the module's hooks: FSDP2's would take the loss's inner gradients for the model's backward pass, and free
        # weights that the true one still needs.
        logits = self.projection.forward(self._narrowed(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits

    def _narrowed(self, hidden: Tensor) -> Tensor:
        """In the dtype of half-precision weights: families whose residuals stay in float32 round them for the head."""
        dtype = getattr(getattr(self.projection, "weight", None), "dtype", None)
        return (
            hidden.to(dtype) if hidden.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16) else hidden
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.projection.parameters()

    @classmethod
    def checked(cls, model: nn.Module) -> "OutputHead":
        """The head, after the comparison of `check`, once per model and process."""
        if without_adapters(model) in _KNOWN:
            return cls.of(model)
        return cls.check(model)

    @classmethod
    def check(cls, model: nn.Module) -> "OutputHead":
        """The head, after comparing it, and hidden states read in padded groups, with the model's own logits of a few
        short rows, one row and one pass at a time.

        Raises:
            UnsupportedModelError: the model is no causal LM, or computes its logits in a way that is not known here.
        """
        check_causal(model)
        with _probing(model, "hidden states and output head cannot be read apart") as inner, trials_of(inner) as trials:
            gap = next((gap for trial in trials if (gap := _head_gap(trial)) is not None), None)
        if gap is not None:
            raise UnsupportedModelError(
                model,
                f"hidden states and output head, as the loss reads them, give other logits than the model itself "
                f"(off by {gap:.2g} of their spread)",
            )
        _KNOWN.add(inner)
        return cls.of(model)


_KNOWN: WeakSet[nn.Module] = WeakSet()


def _head_gap(trial: Trial) -> float | None:
    """How far logits by hidden states and head are from the model's own; None where it is rounding."""
    rows = probe_rows(trial.model, 3)
    with trial.precision():
        own = [plain_logits(trial.model, row)[:-1] for row in rows]
        # Twice as many rows, half of them a token shorter: groups of more than one, and of unequal lengths.
        rows, own = [*rows, *(row[:-1] for row in rows)], [*own, *(logits[:-1] for logits in own)]
        ours = OutputHead.of(trial.model)(_probe_hidden_states(trial.model, rows))
    return trial.gap(ours.split([len(row) - 1 for row in rows]), own)


def _probe_hidden_states(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[N, H]` hidden states of every token of the rows but the last, as the loss reads them."""
    width = max(map(len, rows)) + len(rows) - 1
    ids_BL, mask_BL = torch.zeros(2, len(rows), width, dtype=torch.long).unbind(0)
    for row, tokens in enumerate(rows):  # each ends in a column of its own: padding on both sides
        end = width - row
        ids_BL[row, end - len(tokens) : end] = torch.tensor(tokens)
        mask_BL[row, end - len(tokens) : end] = 1
    completion_BL = mask_BL * (mask_BL.cumsum(-1) > 1)
    device = without_adapters(model).device
    return completion_hidden_states(model, ids_BL.to(device), mask_BL.to(device), completion_BL.to(device))


@contextmanager
def _probing(model: nn.Module, failing: str) -> Iterator[PreTrainedModel]:
    """The model in evaluation mode and without gradients; what its own code raises then becomes a refusal by name."""
    try:
        with torch.no_grad(), evaluation_mode(model):
            yield without_adapters(model)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(model, f"{failing}: {type(error).__name__}: {error}") from error


_CAUSAL: WeakSet[nn.Module] = WeakSet()


def check_causal(model: nn.Module) -> None:
    """Refuse a model whose logits at a token are not a function of the tokens up to it; once per model and process.

    Raises:
        UnsupportedModelError: an encoder-decoder, a model that reads ahead, one whose own logits are not finite, or one
            that answers in tuples, which the library itself cannot read for most families.
        ValueError: they are not finite because its weights are not.
    """
    inner = without_adapters(model)
    if inner in _CAUSAL:
        return
    if reason := mixes_rows(inner.config):
        raise UnsupportedModelError(model, reason)
    named_results = [getattr(each, "return_dict", True) for each in (inner.config, inner.config.get_text_config())]
    if not all(named_results):
        raise UnsupportedModelError(
            model,
            f"its configuration has return_dict={next(value for value in named_results if not value)}: set return_dict "
            "to true in its config.json, or model.config.return_dict=True",
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(model, "it is an encoder-decoder; student and teacher must be decoder-only")
    with _probing(model, "a plain pass over token ids fails"), trials_of(inner) as trials:
        (whole, gap), *others = map(_look_ahead, trials)
    if not torch.isfinite(whole.logsumexp(-1)).all():
        if broken := [name for name, weight in inner.named_parameters() if not weight.isfinite().all()]:
            more = f" and {len(broken) - 1} other weights" if len(broken) > 1 else ""
            name = inner.name_or_path or f"a {type(inner).__name__}"
            raise InputError(f"{name} is damaged: NaN or infinity in {broken[0]}{more}, and so in its logits")
        raise UnsupportedModelError(model, "its own logits are not finite, for ordinary tokens")
    gap = next((gap for gap in (gap, *(other for _, other in others)) if gap is not None), None)
    if gap is not None:
        raise UnsupportedModelError(
            model, f"its logits at a token change with the tokens after it (by {gap:.2g} of their spread): not causal"
        )
    _CAUSAL.add(inner)


def _look_ahead(trial: Trial) -> tuple[Tensor, float | None]:
    """`[T, V]` logits of a row, and how far they change with the tokens after them; None where it is rounding."""
    row = probe_rows(trial.model, 6)[0][:_CAUSAL_PROBE]
    with trial.precision():
        whole = plain_logits(trial.model, row)
        parts = [plain_logits(trial.model, row[:length])[-1:] for length in (len(row) - 4, len(row) - 1)]
    return whole, trial.gap(parts, [whole[len(row) - 5 : len(row) - 4], whole[len(row) - 2 : len(row) - 1]])


def _soft_cap(config: object) -> float | None:
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _logit_scale(config: object) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None) or getattr(config, "logits_mup_width_multiplier", None)
    if scaling is None:
        return 1.0
    return float(scaling) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(scaling)
