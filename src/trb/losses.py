"""The distillation losses: reverse KL(student || teacher) on the student's top-k or over the full vocabulary, and
against Veto's target; plain on logits, and from hidden states in chunks that never hold `[B, T, V]`.

At one prefix, S is the set of the student's k most likely tokens, p and q the student's and the teacher's
probabilities normalised over the *full* vocabulary, and Z_S = Σ_S p. The loss is

    (1 / sg[Z_S]) · Σ_S [ p log(p/q) - p + q ]

whose gradient is Σ_S w (log p - log q) ∇ log p with w = p / Z_S held fixed (paper, section 5). Every term is
non-negative, and with S the whole vocabulary it is exactly the reverse KL. The plain Σ_S p log(p/q) has another
gradient: it adds ∇Z_S and pushes mass out of S.

Each loss is a small object, the counterpart of a policy: what it matches at one step. Which step has which is decided
in `trb.training.methods`. The supervised loss of SFT warm-up is one of them. Nothing here samples, and no gradient
reaches the teacher.

Shape suffixes: N tokens, K support, V vocabulary, H hidden size, C tokens of one chunk, R rows of a chunk.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trb.vocab import SharedVocabulary, log_probs

__all__ = [
    "Loss",
    "ReverseKL",
    "RowLoss",
    "Rows",
    "Supervised",
    "TokenBatch",
    "TokenMetrics",
    "Veto",
    "chunked_cross_entropy",
    "chunked_reverse_kl",
    "default_chunk_tokens",
    "topk_reverse_kl",
    "veto_target",
]

# What a chunk's logits may take, in vocabulary entries. Each chunk adds a gradient of the whole head, so it must be
# wide for that to be cheap; memory grows with it.
_CHUNK_ELEMENTS_CPU = 1 << 25
_CHUNK_ELEMENTS = 1 << 27
# What the arithmetic between the matrix products works on at once: 4 MB of float32.
_ROW_ELEMENTS_CPU = 1 << 20
_UNKNOWN_SIZE = 1 << 17
# Below any log-probability that matters, above minus infinity.
_LOWEST_LOG_PROB = -1e30


class Head(Protocol):
    """An output head: `torch.nn.Linear`, or `trb.models.modeling.OutputHead`."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """`[..., H]` to `[..., V]` logits."""

    def parameters(self) -> Iterable[Tensor]:
        """The tensors the logits depend on besides the hidden states."""


def topk_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int = 16) -> Tensor:
    """Token mean of the reverse KL on the student's top-k (paper, section 5).

    Args:
        student_logits: `[..., V]`, over the same events as the teacher's.
        teacher_logits: `[..., V]`.
        mask: `[...]`, non-zero on completion tokens, the first stop token included.
        k: size of the support; 0 or at least V for the full vocabulary.

    Returns:
        A scalar in nats; 0 with a zero gradient if the mask is empty. Infinite if the teacher gives probability
        zero to a token in the support.

    Raises:
        ValueError: k < 0, or shapes that differ.
    """
    _check_shapes(student_logits, teacher_logits, mask)
    _check_k(k)
    chosen = mask.reshape(-1) != 0
    student_NV = student_logits.reshape(-1, student_logits.shape[-1])[chosen]
    teacher_NV = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])[chosen]
    rows = Rows.of(log_probs(student_NV.detach()), log_probs(teacher_NV))
    loss_N, gradient_NV, _ = ReverseKL(k).terms(rows)
    return _WithGradient.apply(student_NV, loss_N, gradient_NV).sum() / max(1, student_NV.shape[0])


def veto_target(student_logits: Tensor, teacher_logits: Tensor, strength: float) -> Tensor:
    """`[..., V]` log-probabilities of Veto's target, softmax(log πT + b · sg[log πS]) (paper, section 6).

    Args:
        student_logits: `[..., V]`; no gradient flows through the target.
        teacher_logits: `[..., V]`.
        strength: b ≥ 0; 0 gives the teacher.

    Raises:
        ValueError: a negative or NaN strength.
    """
    if not strength >= 0:
        raise ValueError(f"Veto strength must be at least 0, got {strength}")
    log_teacher = log_probs(teacher_logits.detach())
    if strength == 0:
        return log_teacher
    log_student = log_probs(student_logits.detach())
    return log_probs(log_teacher + strength * log_student)


@dataclass(frozen=True)
class TokenMetrics:
    """What a loss pass saw at the N unmasked tokens, detached, in the order of the mask; nats.

    Attributes:
        reverse_kl: full-vocabulary KL(student || teacher).
        student_entropy: entropy of the student's distribution.
        teacher_entropy: entropy of the teacher's.
        teacher_log_prob: log πT of the token itself.
        support_mass: student probability of the loss's support; far below 1, the truncated loss is a poor guide.
    """

    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    teacher_log_prob: Tensor
    support_mass: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """The N completion tokens of a batch, as losses see them.

    Attributes:
        student_hidden: `[N, H_student]`, gradients flow.
        teacher_hidden: `[N, H_teacher]`.
        student_head: maps hidden states to `[..., V_student]` logits; its parameters receive gradients.
        teacher_head: the same for the teacher; receives none.
        tokens: `[N]` ids that the positions predict; any stop id of `vocabulary` counts as the stop event.
        vocabulary: the events that both models share; None if the heads give them already.
        temperature: divides both models' logits, before stop ids are folded into one; must be the sampler's.
        normaliser: divides the sum over tokens; by default N.
        chunk_tokens: tokens projected to the vocabulary at once; by default as many as the device handles best.
    """

    student_hidden: Tensor
    teacher_hidden: Tensor
    student_head: Head
    teacher_head: Head
    tokens: Tensor
    vocabulary: SharedVocabulary | None = None
    temperature: float = 1.0
    normaliser: float | Tensor | None = None
    chunk_tokens: int | None = None


class Loss(Protocol):
    """What is minimised at the completion tokens of a step."""

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, TokenMetrics]:
        """The scalar loss, and what was seen at each token."""


@dataclass(frozen=True)
class Rows:
    """Both laws at R prefixes, `[R, V]`, normalised over the shared events; a loss may overwrite the probabilities."""

    log_student: Tensor
    log_teacher: Tensor
    student: Tensor
    teacher: Tensor
    token: Tensor | None = None

    @classmethod
    def of(cls, log_student: Tensor, log_teacher: Tensor, token: Tensor | None = None) -> "Rows":
        return cls(log_student, log_teacher, log_student.exp(), log_teacher.exp(), token)


class RowLoss(ABC):
    """A loss that is a sum over prefixes, computed from both laws there a few rows at a time."""

    @abstractmethod
    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """`[R]` losses, their `[R, V]` gradients by the student's logits, `[R]` student probability of the support."""

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, TokenMetrics]:
        if not len(batch.tokens):
            empty_N = batch.student_hidden.new_zeros(0, dtype=_wide(batch.student_hidden))
            metrics = TokenMetrics(*[empty_N] * len(fields(TokenMetrics)))
            return _no_loss(batch.student_hidden, batch.student_head), metrics
        hidden, learnt = batch.student_hidden, _learnt(batch.student_head)
        if not torch.is_grad_enabled():  # an autograd function would find the gradients all the same
            hidden, learnt = hidden.detach(), []
        total, *seen = _ChunkedLoss.apply(_Chunks(batch, self), hidden, *learnt)
        return total / (len(batch.tokens) if batch.normaliser is None else batch.normaliser), TokenMetrics(*seen)


@dataclass(frozen=True)
class ReverseKL(RowLoss):
    """Reverse KL to the teacher on the student's `top_k` tokens; 0 for the full vocabulary (paper, section 5)."""

    top_k: int = 16

    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        return _reverse_kl_terms(rows.log_student, rows.log_teacher, rows.student, rows.teacher, self.top_k)


@dataclass(frozen=True)
class Veto(RowLoss):
    """The same to Veto's target of strength b ≥ 0 (`veto_target`; paper, section 6)."""

    top_k: int = 16
    strength: float = 0.0

    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        if not self.strength:
            return ReverseKL(self.top_k).terms(rows)
        target_RV = veto_target(rows.log_student, rows.log_teacher, self.strength)
        return _reverse_kl_terms(rows.log_student, target_RV, rows.student, target_RV.exp(), self.top_k)


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy of the completion itself, for SFT warm-up; the metrics are those of a reverse KL on `top_k`.

    Through the head as it is: neither temperature nor shared events, which are the sampler's, come into it.
    """

    top_k: int = 16

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, TokenMetrics]:
        with torch.no_grad():
            _, metrics = ReverseKL(self.top_k)(batch)
        loss = chunked_cross_entropy(
            batch.student_hidden,
            batch.student_head,
            batch.tokens,
            normaliser=batch.normaliser,
            chunk_tokens=batch.chunk_tokens,
        )
        return loss, metrics


def chunked_reverse_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Head,
    teacher_head: Head,
    tokens: Tensor,
    mask: Tensor,
    *,
    k: int = 16,
    vocabulary: SharedVocabulary | None = None,
    temperature: float = 1.0,
    veto_strength: float = 0.0,
    normaliser: float | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, TokenMetrics]:
    """The top-k reverse KL from hidden states, a chunk of tokens at a time; masked positions cost nothing.

    The gradient of a chunk is taken while its logits are at hand (it has a closed form), so that peak memory is one
    chunk's logits rather than T · V and nothing is projected twice. The loss can be differentiated once.

    Args:
        student_hidden: `[..., H_student]`, gradients flow.
        teacher_hidden: `[..., H_teacher]`.
        student_head: maps hidden states to `[..., V_student]` logits; its parameters receive gradients.
        teacher_head: the same for the teacher; receives none.
        tokens: `[...]` ids that the positions predict; any stop id of `vocabulary` counts as the stop event.
        mask: `[...]`, non-zero on completion tokens.
        k: support size, 0 for the full vocabulary.
        vocabulary: the events that both models share; None if the heads give them already.
        temperature: divides both models' logits, before stop ids are folded into one; must be the sampler's.
        veto_strength: b of Veto's target, 0 for the teacher itself.
        normaliser: divides the sum over tokens; by default the number of unmasked tokens.
        chunk_tokens: tokens projected to the vocabulary at once; by default as many as the device handles best.

    Returns:
        The scalar loss and the metrics at the unmasked tokens.
    """
    _check_k(k)
    chosen = (mask.reshape(-1) != 0).nonzero().squeeze(-1)
    batch = TokenBatch(
        student_hidden.reshape(-1, student_hidden.shape[-1])[chosen],
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])[chosen],
        student_head,
        teacher_head,
        tokens.reshape(-1)[chosen],
        vocabulary,
        temperature,
        normaliser,
        chunk_tokens,
    )
    return Veto(k, veto_strength)(batch)


def chunked_cross_entropy(
    student_hidden: Tensor,
    student_head: Head,
    tokens: Tensor,
    *,
    normaliser: float | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The supervised loss, -log π(token), from hidden states: a chunk of tokens at a time, as `chunked_reverse_kl`.

    Args:
        student_hidden: `[N, H]`, gradients flow.
        student_head: maps hidden states to `[..., V]` logits; its parameters receive gradients.
        tokens: `[N]` ids that the positions predict.
        normaliser: divides the sum over tokens; by default their number.
        chunk_tokens: tokens projected to the vocabulary at once; by default as many as the device handles best.
    """
    if not len(tokens):
        return _no_loss(student_hidden, student_head)
    width = chunk_tokens or default_chunk_tokens(_UNKNOWN_SIZE, student_hidden.device.type)
    chunks = _SupervisedChunks(student_head, tokens, width)
    (total,) = _ChunkedLoss.apply(chunks, student_hidden, *_learnt(student_head))
    return total / (len(tokens) if normaliser is None else normaliser)


def _no_loss(student_hidden: Tensor, student_head: Head) -> Tensor:
    """Zero, with a zero gradient, in the dtype of a loss over tokens: what processes add up must have one.

    The head takes part all the same: sharded weights are gathered by all processes or none, gradients averaged.
    """
    reached = student_head(student_hidden.reshape(-1, student_hidden.shape[-1])[:0])
    return (student_hidden.sum() + reached.sum()).to(_wide(student_hidden)) * 0.0


def _learnt(head: Head) -> list[Tensor]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def default_chunk_tokens(vocabulary: int, device_type: str) -> int:
    """Tokens whose logits over `vocabulary` entries the device handles best at once."""
    elements = _CHUNK_ELEMENTS_CPU if device_type == "cpu" else _CHUNK_ELEMENTS
    return max(16, elements // vocabulary)


class _Chunks:
    """The loss of a chunk of tokens, given the student's logits; what all chunks have in common."""

    def __init__(self, batch: TokenBatch, loss: RowLoss) -> None:
        self.student_head, self.teacher_head = batch.student_head, batch.teacher_head
        self.teacher_NH = batch.teacher_hidden.detach()
        self.vocabulary, self.temperature, self.loss = batch.vocabulary, batch.temperature, loss
        self.token_N = batch.tokens if batch.vocabulary is None else batch.vocabulary.events(batch.tokens)
        size = _UNKNOWN_SIZE if batch.vocabulary is None else batch.vocabulary.size
        self.chunk_tokens = batch.chunk_tokens or default_chunk_tokens(size, self.teacher_NH.device.type)

    def __iter__(self) -> Iterator[slice]:
        return _parts(len(self.token_N), self.chunk_tokens)

    def terms(self, logits_CV: Tensor, part: slice, gradient_CV: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Summed loss of a chunk and its metrics; fills the gradient by the logits.

        A few rows at a time: on a CPU their temporaries stay in cache.
        """
        taught_CV = self.teacher_head(self.teacher_NH[part])
        step = len(taught_CV)
        if logits_CV.device.type == "cpu":
            step = max(1, _ROW_ELEMENTS_CPU // logits_CV.shape[-1])
        losses, metrics = [], []
        for first in range(0, len(taught_CV), step):
            rows = slice(first, first + step)
            loss, gradient, seen = self._row_terms(
                logits_CV[rows], taught_CV[rows], self.token_N[part][rows], gradient_CV is not None
            )
            losses.append(loss)
            metrics.append(seen)
            if gradient_CV is not None:
                gradient_CV[rows] = gradient
        return torch.stack(losses).sum(), [torch.cat(values) for values in zip(*metrics, strict=True)]

    def _row_terms(
        self, logits_RV: Tensor, taught_RV: Tensor, token_R: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        rows = Rows.of(self._log_probs(logits_RV), self._log_probs(taught_RV), token_R)
        metrics = _token_metrics(rows.log_student, rows.log_teacher, rows.student, rows.teacher, token_R)
        loss_R, gradient_RV, mass_R = self.loss.terms(rows)
        if wanted:
            gradient_RV = self._gradient_by_logits(gradient_RV, logits_RV)
        return loss_R.sum(), gradient_RV, (*metrics, mass_R)

    def _log_probs(self, logits_RV: Tensor) -> Tensor:
        """Of the shared events, at the temperature."""
        if self.vocabulary is None:
            return log_probs(logits_RV, self.temperature)
        return self.vocabulary.log_probs(logits_RV, self.temperature)

    def _gradient_by_logits(self, gradient_RV: Tensor, logits_RV: Tensor) -> Tensor:
        """From the gradient by the logits of shared events at the temperature."""
        if self.vocabulary is None:
            return gradient_RV if self.temperature == 1.0 else gradient_RV / self.temperature
        raw_RV = logits_RV.detach().requires_grad_()
        with torch.enable_grad():
            events_RV = self.vocabulary.event_logits(raw_RV, self.temperature)
        (found_RV,) = torch.autograd.grad(events_RV, raw_RV, gradient_RV.to(events_RV.dtype))
        return found_RV


@dataclass(frozen=True)
class _SupervisedChunks:
    """As `_Chunks`, for the supervised loss; without metrics."""

    student_head: Head
    token_N: Tensor
    chunk_tokens: int

    def __iter__(self) -> Iterator[slice]:
        return _parts(len(self.token_N), self.chunk_tokens)

    def terms(self, logits_CV: Tensor, part: slice, gradient_CV: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        token_C1 = self.token_N[part, None]
        log_student_CV = log_probs(logits_CV)
        loss = -log_student_CV.gather(-1, token_C1).sum()
        if gradient_CV is not None:
            pull_CV = log_student_CV.exp_()
            gradient_CV.copy_(pull_CV.scatter_add_(-1, token_C1, pull_CV.new_full(token_C1.shape, -1.0)))
        return loss, []


def _parts(tokens: int, width: int) -> Iterator[slice]:
    for start in range(0, tokens, width):
        yield slice(start, min(start + width, tokens))


def _reverse_kl_terms(
    log_student_CV: Tensor, log_target_CV: Tensor, student_CV: Tensor, target_CV: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient by the logits and support mass of each row; overwrites the probabilities."""
    if 0 < k < log_student_CV.shape[-1]:
        return _top_k_terms(log_student_CV, log_target_CV, student_CV, k)
    return _full_terms(log_student_CV, log_target_CV, student_CV, target_CV)


def _top_k_terms(
    log_student_CV: Tensor, log_target_CV: Tensor, student_CV: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient by the logits (w r, scattered, less (Σ w r) p; overwrites `student_CV`), support mass."""
    support_CK = log_student_CV.topk(k, dim=-1).indices
    log_student_CK, log_target_CK = log_student_CV.gather(-1, support_CK), log_target_CV.gather(-1, support_CK)
    loss_C, mass_C = _terms_on_support(log_student_CK, log_target_CK)
    student_CK = log_student_CK.exp()
    ratio_CK = torch.where(student_CK > 0, log_student_CK - log_target_CK, 0.0)
    pull_CK = student_CK / mass_C[:, None] * ratio_CK
    gradient_CV = student_CV.mul_(-pull_CK.sum(-1, keepdim=True)).scatter_add_(-1, support_CK, pull_CK)
    return loss_C, gradient_CV, mass_C


def _full_terms(
    log_student_CV: Tensor, log_target_CV: Tensor, student_CV: Tensor, target_CV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_top_k_terms` with the whole vocabulary as support: the gradient is p (r - KL)."""
    mass_C, target_mass_C = student_CV.sum(-1), target_CV.sum(-1)
    # A token the student cannot draw, or whose probability underflows, contributes only the target's mass: zero times
    # an infinite ratio is NaN. A NaN of the logits stays in the masses.
    weighted_CV = (log_student_CV - log_target_CV).mul_(student_CV)
    weighted_CV.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    divergence_C = weighted_CV.sum(-1)
    gradient_CV = weighted_CV.addcmul_(student_CV, divergence_C[:, None], value=-1).div_(mass_C[:, None])
    return (divergence_C - mass_C + target_mass_C) / mass_C, gradient_CV, mass_C


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one sweep over the chunks; the backward pass only scales what the forward pass found."""

    @staticmethod
    def forward(
        ctx: Any, chunks: _Chunks | _SupervisedChunks, student_NH: Tensor, *learnt: Tensor
    ) -> tuple[Tensor, ...]:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=_wide(student_NH), device=student_NH.device)
        hidden_gradient_NH = torch.zeros_like(student_NH) if wanted else None
        sums: list[Tensor] = []
        metrics = []
        for part in chunks:
            with torch.set_grad_enabled(wanted):
                student_CH = student_NH[part].detach().requires_grad_(wanted)
                logits_CV = chunks.student_head(student_CH)
            gradient_CV = torch.empty_like(logits_CV) if wanted else None
            loss, seen = chunks.terms(logits_CV.detach(), part, gradient_CV)
            total += loss
            metrics.append(seen)
            if hidden_gradient_NH is not None:
                hidden_gradient_NH[part], *found = torch.autograd.grad(logits_CV, [student_CH, *learnt], gradient_CV)
                sums = [s.add_(f) for s, f in zip(sums, found, strict=True)] if sums else found
        if hidden_gradient_NH is not None:
            ctx.save_for_backward(hidden_gradient_NH, *sums)
        columns = [torch.cat(values) for values in zip(*metrics, strict=True)]
        ctx.mark_non_differentiable(*columns)
        return total, *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_metrics: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)


class _WithGradient(torch.autograd.Function):
    """Values of `[N]` rows whose gradient by `[N, V]` logits is known."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, value_N: Tensor, gradient_NV: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_NV.to(logits_NV.dtype))
        return value_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale_N: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * scale_N[:, None].to(gradient_NV.dtype), None, None


def _terms_on_support(log_student_NK: Tensor, log_target_NK: Tensor) -> tuple[Tensor, Tensor]:
    student_NK, target_NK = log_student_NK.exp(), log_target_NK.exp()
    # A token the student cannot draw contributes only the target's mass; log 0 - log 0 must not reach the product.
    possible_NK = student_NK > 0
    log_ratio_NK = torch.where(possible_NK, log_student_NK, 0.0) - torch.where(possible_NK, log_target_NK, 0.0)
    support_mass_N = student_NK.detach().sum(-1)
    return (student_NK * log_ratio_NK - student_NK + target_NK).sum(-1) / support_mass_N, support_mass_N


def _token_metrics(
    log_student_CV: Tensor, log_teacher_CV: Tensor, student_CV: Tensor, teacher_CV: Tensor, token_C: Tensor
) -> tuple[Tensor, ...]:
    token_log_prob_C = log_teacher_CV.gather(-1, token_C[:, None]).squeeze(-1)
    student_entropy_C = _expected_surprise(student_CV, log_student_CV)
    teacher_entropy_C = _expected_surprise(teacher_CV, log_teacher_CV)
    reverse_kl_C = (_expected_surprise(student_CV, log_teacher_CV) - student_entropy_C).clamp_min(0)
    return reverse_kl_C, student_entropy_C, teacher_entropy_C, token_log_prob_C


def _expected_surprise(probs_CV: Tensor, log_probs_CV: Tensor) -> Tensor:
    """`-Σ p log q` with 0 log 0 = 0: clamping is an order cheaper than masking, and what it changes has no weight."""
    return log_probs_CV.clamp_min(_LOWEST_LOG_PROB).mul_(probs_CV).sum(-1).neg_()


def _check_k(k: int) -> None:
    if k < 0:
        raise ValueError(f"k must be at least 0 (0 means the full vocabulary), got {k}")


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape, {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}: align them first with trb.vocab.align"
        )
    if mask.shape != student_logits.shape[:-1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(student_logits.shape[:-1])}")
