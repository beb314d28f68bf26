"""One event space for two models: end-of-sequence canonicalisation, padded heads, and the same-tokenizer check.

A student and a teacher of one family often stop with different token ids and carry heads padded to different
sizes. Everything downstream (blend, losses, sampling) needs the two distributions over the same events.
Models with different tokenizers are refused: cross-tokenizer distillation is another problem.

Shape suffixes: V vocabulary (shared rows).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trb.blend.laws import log_softmax
from trb.errors import InputError, named, real

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "TEMPERATURES",
    "SharedVocabulary",
    "align",
    "check_heads",
    "check_same_tokenizer",
    "checked_temperature",
    "head_rows",
    "log_probs",
    "stop_token_ids",
    "wide",
]


# Divided by such a temperature, logits and log-probabilities stay finite in float32, and -inf stays what it is.
TEMPERATURES = (1e-30, 1e30)


def checked_temperature(temperature: float, argument: str = "temperature") -> float:
    """A temperature as a float within `TEMPERATURES`. Raises ValueError naming the argument for anything else."""
    low, high = TEMPERATURES
    found = real(argument, temperature)
    if not low <= found <= high:
        raise InputError(f"{named(argument)} must be positive and finite ({low:g} to {high:g}), got {found}")
    return found


@dataclass(frozen=True)
class SharedVocabulary:
    """The events that two models share, and those of them that end a completion; built once per pair.

    Attributes:
        size: the first so many head rows are shared.
        stop_id: the event "stop", the id that is emitted: the student's first.
        folded_ids: every other stop id of either model. Their probability is that of `stop_id`, and a token that is
            one of them counts as it.
    """

    size: int
    stop_id: int
    folded_ids: tuple[int, ...]

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        student_eos: int | Sequence[int],
        teacher_eos: int | Sequence[int] | None = None,
    ) -> "SharedVocabulary":
        """The shared events of models with heads of `sizes` rows.

        Raises:
            ValueError: no end-of-sequence id, or one that lies outside the shared rows.
        """
        student_ids = _as_ids(student_eos)
        if not student_ids:
            raise InputError("the student needs at least one end-of-sequence id; pass eos_token_id=")
        size = min(sizes)
        every_id = dict.fromkeys([*student_ids, *_as_ids(teacher_eos)])
        for token_id in every_id:
            if not 0 <= token_id < size:
                raise InputError(
                    f"end-of-sequence id {token_id} lies outside the {size} head rows that the models share "
                    f"(heads: {', '.join(map(str, sizes))} rows)"
                )
        return cls(size, student_ids[0], tuple(token_id for token_id in every_id if token_id != student_ids[0]))

    @classmethod
    def of_pair(
        cls,
        student: "PreTrainedModel",
        teacher: "PreTrainedModel",
        student_tokenizer: "PreTrainedTokenizerBase",
        teacher_tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> "SharedVocabulary":
        """The shared events of a loaded pair: what rollouts, loss, evaluation and serving engines all go by.

        Each model stops with what `stop_token_ids` says of it. The models come without adapter wrappers.

        Raises:
            ValueError: a head without rows for ids in use, a model without an end-of-sequence id, or one that lies
                outside the shared rows.
        """
        rows = head_rows(student), head_rows(teacher)
        check_heads(*rows, max(student_tokenizer.get_vocab().values()) + 1)
        return cls.of(rows, stop_token_ids(student, student_tokenizer), stop_token_ids(teacher, teacher_tokenizer))

    @property
    def stop_ids(self) -> list[int]:
        """Every id that means stop, the one to emit first."""
        return [self.stop_id, *self.folded_ids]

    def log_probs(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """`[..., V]` log-probabilities of the shared events, from `[..., rows]` logits of one model.

        The model's own law at the temperature is folded: temperature first, then the sum over stop ids. In float64 for
        float64 logits and in float32 for all others. Gradients go through `event_logits`.
        """
        found = log_probs(logits[..., : self.size], temperature)
        self._fold_(found)
        return found

    def event_logits(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """`[..., V]` logits of the law of `log_probs`, through which gradients reach the `[..., rows]` logits.

        A new tensor. At temperature 1 the dtype is kept; at others it is that of `log_probs`.
        """
        shared = logits[..., : self.size]
        shared = shared.clone() if temperature == 1.0 else _tempered(shared, temperature)
        self._fold_(shared)
        return shared

    def _fold_(self, scores: Tensor) -> None:
        """Move the probability of every stop id to the emitted one, in place."""
        if self.folded_ids:
            # One column at a time: a list of ids would travel to the device, and wait for it, in every call.
            stops = torch.stack([scores[..., token_id] for token_id in self.stop_ids], dim=-1)
            scores[..., self.stop_id] = _log_sum_exp(stops).to(scores.dtype)
            for token_id in self.folded_ids:
                scores[..., token_id] = -math.inf

    def event_of(self, token: int) -> int:
        """The event that a token id is: any stop id is `stop_id`."""
        return self.stop_id if token in self.folded_ids else token

    def events(self, tokens: Tensor) -> Tensor:
        """`event_of` of every entry of a tensor of token ids."""
        for token_id in self.folded_ids:
            tokens = tokens.masked_fill(tokens == token_id, self.stop_id)
        return tokens


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`[..., V]` log-probabilities at a temperature, in float64 for float64 logits and in float32 for all others."""
    if temperature != 1.0:
        logits = _tempered(logits, temperature)
    return log_softmax(logits, wide(logits))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(wide(logits)) / float(temperature)  # torch takes no integer beyond 64 bits


def wide(logits: Tensor) -> torch.dtype:
    """The dtype that is computed in: float64 for float64, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def align(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_eos: int | Sequence[int],
    teacher_eos: int | Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Put both models on shared events (paper, section 4); returns new `[..., V]` tensors.

    Heads are cut to the rows both have. In each model the probability of *every* stop id of either model moves to
    the student's first one (so none is lost), and the other stop ids become `-inf`.

    Events come after temperature: what is shared is each model's own law at T, so divide logits by T before they come
    here. Afterwards, a stop event of ids with probabilities p1 and p2 would get (p1 + p2)^(1/T).

    Args:
        student_logits: `[..., V_student]`.
        teacher_logits: `[..., V_teacher]`.
        student_eos: the student's end-of-sequence id, or ids with the one to emit first.
        teacher_eos: the teacher's end-of-sequence id or ids.

    Raises:
        ValueError: an end-of-sequence id lies outside the shared rows.
    """
    shared = SharedVocabulary.of((student_logits.shape[-1], teacher_logits.shape[-1]), student_eos, teacher_eos)
    return shared.event_logits(student_logits), shared.event_logits(teacher_logits)


def check_same_tokenizer(
    student_tokenizer: "PreTrainedTokenizerBase", teacher_tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Refuse a pair whose tokenizers disagree on any token that both know, or on the student's ordinary tokens.

    Special tokens that only one side added are allowed: their rows exist in both heads or are cut.

    Raises:
        ValueError: names a token and the two ids.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    remedy = "trb needs one tokenizer for both models; choose a teacher of the student's family"
    for token, student_id in student.items():
        teacher_id = teacher.get(token)
        if teacher_id is not None and teacher_id != student_id:
            raise InputError(
                f"different tokenizers: token {token!r} is id {student_id} for the student and {teacher_id} for the "
                f"teacher. {remedy}"
            )
    added = student_tokenizer.get_added_vocab()
    missing = [token for token in student if token not in teacher and token not in added]
    if missing:
        raise InputError(
            f"different tokenizers: {len(missing)} of the student's tokens are unknown to the teacher, such as "
            f"{missing[0]!r} (id {student[missing[0]]}). {remedy}"
        )


def check_heads(student_rows: int, teacher_rows: int, used_ids: int) -> None:
    """Refuse a head that lacks rows for ids the student's tokenizer uses (`used_ids` = highest id + 1).

    Raises:
        ValueError: names the smaller head and the ids it lacks.
    """
    for owner, rows in (("teacher", teacher_rows), ("student", student_rows)):
        if rows < used_ids:
            raise InputError(
                f"the {owner}'s head has {rows} rows but the tokenizer uses ids up to {used_ids - 1}: ids "
                f"{rows}..{used_ids - 1} would have no {owner} probability. Use a {owner} with at least {used_ids} rows"
            )


def head_rows(model: "PreTrainedModel") -> int:
    """Rows of the model's output head (its logits' last dimension)."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[0]
    # A method in layers that torch quantises; they say themselves how many rows they have.
    rows = getattr(head, "out_features", None)
    return rows if isinstance(rows, int) else model.config.get_text_config().vocab_size


def stop_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[int]:
    """Every id that ends a completion of `model`, the one to emit first.

    The generation config's (or else the config's), then the tokenizer's end-of-sequence token where given.

    Raises:
        ValueError: nothing names a stop id.
    """
    generation = getattr(model, "generation_config", None)
    ids = _as_ids(getattr(generation, "eos_token_id", None)) or _as_ids(model.config.get_text_config().eos_token_id)
    if tokenizer is not None:
        ids = list(dict.fromkeys([*ids, *_as_ids(tokenizer.eos_token_id)]))
    if not ids:
        raise InputError("no end-of-sequence id in the model's generation config, its config or the tokenizer")
    return ids


def _as_ids(eos: int | Sequence[int] | None) -> list[int]:
    if eos is None:
        return []
    plain = eos.tolist() if hasattr(eos, "tolist") else eos  # numpy's and torch's integers
    return [plain] if isinstance(plain, int) else list(map(int, plain))


def _log_sum_exp(logits: Tensor) -> Tensor:
    """`logsumexp` whose gradient is 0, not NaN, where every entry is -inf."""
    dead = logits.isneginf().all(-1)
    return logits.double().masked_fill(dead[..., None], 0.0).logsumexp(-1).masked_fill(dead, -math.inf)
