"""Losses from hidden states, a chunk of tokens at a time: no `[B, T, V]` is ever held.

Loss and gradients come from one sweep: each chunk is projected, scored and differentiated while its logits are there,
and the backward pass only scales what was found. Left out: which loss that is at a single prefix (`trb.losses.terms`
and the objects of `trb.losses`), and the models below the head (`trb.models.modeling`).

Shape suffixes: N tokens, V vocabulary, H hidden size, C tokens of one chunk, R rows of a chunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trb.losses import native as losses_native
from trb.losses import triton as losses_triton
from trb.losses.terms import Chunk, Rows, TokenMetrics, token_metrics
from trb.vocab import SharedVocabulary, log_probs, wide

__all__ = ["Head", "RowLoss", "TokenBatch", "chunked_cross_entropy", "default_chunk_tokens"]

# What a chunk's logits may take, in vocabulary entries. Each chunk adds a gradient of the whole head, so it must be
# wide for that to be cheap; memory grows with it.
_CHUNK_ELEMENTS_CPU = 1 << 25

_CHUNK_ELEMENTS = 1 << 27

# What the arithmetic between the matrix products works on at once: 4 MB of float32.
_ROW_ELEMENTS_CPU = 1 << 20

_UNKNOWN_SIZE = 1 << 17


class Head(Protocol):
    """An output head: `torch.nn.Linear`, or `trb.models.modeling.OutputHead`."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """`[..., H]` to `[..., V]` logits."""

    def parameters(self) -> Iterable[Tensor]:
        """The tensors the logits depend on besides the hidden states."""


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
        lengths: `[S]` how many of the tokens belong to each sequence, in order; None if they are one sequence.
        weights: `[N]` factors of the tokens' losses in the sum; None for 1.
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
    lengths: Tensor | None = None
    weights: Tensor | None = None

    def by_sequence(self, values_N: Tensor) -> tuple[Tensor, ...]:
        """`[N]` values cut into those of each sequence."""
        return values_N.split(len(values_N) if self.lengths is None else self.lengths.tolist())


class RowLoss(ABC):
    """A loss that is a sum over prefixes, computed from both laws there a few rows at a time."""

    @abstractmethod
    def terms(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """`[R]` losses, their `[R, V]` gradients by the student's logits, `[R]` student probability of the support."""

    def reverse_kl_on(self) -> int | None:
        """The support's size (0: the whole vocabulary) if this is the plain reverse KL, which compiled kernels know."""
        return None

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, TokenMetrics]:
        if not len(batch.tokens):
            empty_N = batch.student_hidden.new_zeros(0, dtype=wide(batch.student_hidden))
            metrics = TokenMetrics(*[empty_N] * len(fields(TokenMetrics)))
            return _no_loss(batch.student_hidden, batch.student_head), metrics
        hidden, learnt = batch.student_hidden, _learnt(batch.student_head)
        if not torch.is_grad_enabled():  # an autograd function would find the gradients all the same
            hidden, learnt = hidden.detach(), []
        total, *seen = _ChunkedLoss.apply(_Chunks(batch, self), hidden, *learnt)
        return total / (len(batch.tokens) if batch.normaliser is None else batch.normaliser), TokenMetrics(*seen)


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
    return (student_hidden.sum() + reached.sum()).to(wide(student_hidden)) * 0.0


def _learnt(head: Head) -> list[Tensor]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


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
        self.weight_N = batch.weights
        self.token_N = batch.tokens if batch.vocabulary is None else batch.vocabulary.events(batch.tokens)
        size = _UNKNOWN_SIZE if batch.vocabulary is None else batch.vocabulary.size
        self.chunk_tokens = batch.chunk_tokens or default_chunk_tokens(size, self.teacher_NH.device.type)

    def __iter__(self) -> Iterator[slice]:
        return _parts(len(self.token_N), self.chunk_tokens)

    def terms(self, logits_CV: Tensor, part: slice, gradient_CV: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Summed loss of a chunk and its metrics; fills the gradient by the logits."""
        weight_C = None if self.weight_N is None else self.weight_N[part]
        taught_CV = self.teacher_head(self.teacher_NH[part])
        chunk = Chunk(logits_CV, taught_CV, self.token_N[part], weight_C, gradient_CV)
        found = self._compiled(chunk)
        if found is None:
            return self._eager(chunk)
        loss_C, metrics = found
        left = loss_C.isnan().nonzero().squeeze(-1)
        if not len(left):
            return loss_C.sum(), metrics
        rest = chunk.rows(left)
        again, values = self._eager(rest)
        for metric_C, value_L in zip(metrics, values, strict=True):
            metric_C[left] = value_L
        if gradient_CV is not None and rest.gradient is not None:
            gradient_CV[left] = rest.gradient
        return loss_C.nansum() + again, metrics

    def _compiled(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]] | None:
        """`[C]` losses of a compiled kernel, NaN in rows that it leaves to tensors, and metrics; None without one."""
        k, vocabulary = self.loss.reverse_kl_on(), self.vocabulary
        widths = {chunk.student.shape[1], chunk.teacher.shape[1]}
        size, stop_ids = (min(widths), []) if vocabulary is None else (vocabulary.size, vocabulary.stop_ids)
        # Heads and ids that do not fit are an error, which tensors raise.
        fits = size <= min(widths) and all(0 <= token_id < size for token_id in stop_ids)
        if k is None or not fits or (vocabulary is None and len(widths) > 1):
            return None
        for kernel in (losses_native, losses_triton):
            if kernel.available(chunk.student, chunk.teacher, k, size, len(stop_ids)):
                return kernel.reverse_kl_chunk(chunk, k=k, temperature=self.temperature, size=size, stop_ids=stop_ids)
        return None

    def _eager(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """`terms` in torch, a few rows at a time: on a CPU their temporaries stay in cache."""
        step = len(chunk.token)
        if chunk.student.device.type == "cpu":
            step = max(1, _ROW_ELEMENTS_CPU // chunk.student.shape[-1])
        losses, metrics = [], []
        for part in _parts(len(chunk.token), step):
            loss, *seen = self._row_terms(chunk.rows(part))
            losses.append(loss)
            metrics.append(seen)
        return torch.stack(losses).sum(), [torch.cat(values) for values in zip(*metrics, strict=True)]

    def _row_terms(self, chunk: Chunk) -> tuple[Tensor, ...]:
        """Summed loss of a few rows, and their metrics; fills the gradient."""
        rows = Rows.of(self._log_probs(chunk.student), self._log_probs(chunk.teacher), chunk.token)
        metrics = token_metrics(rows.log_student, rows.log_teacher, rows.student, rows.teacher, chunk.token)
        loss_R, gradient_RV, mass_R = self.loss.terms(rows)
        if chunk.weight is not None:
            loss_R, gradient_RV = loss_R * chunk.weight, gradient_RV * chunk.weight[:, None]
        if chunk.gradient is not None:
            chunk.gradient.copy_(self._gradient_by_logits(gradient_RV, chunk.student))
        return loss_R.sum(), *metrics, mass_R

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


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one sweep over the chunks; the backward pass only scales what the forward pass found."""

    @staticmethod
    def forward(
        ctx: Any, chunks: _Chunks | _SupervisedChunks, student_NH: Tensor, *learnt: Tensor
    ) -> tuple[Tensor, ...]:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=wide(student_NH), device=student_NH.device)
        hidden_gradient_NH = torch.zeros_like(student_NH) if wanted else None
        sums: list[Tensor] = []
        metrics = []
        for part in chunks:
            with torch.set_grad_enabled(wanted):
                student_CH = student_NH[part].detach().requires_grad_(wanted)
                logits_CV = chunks.student_head(student_CH)
            gradient_CV = torch.empty_like(logits_CV, memory_format=torch.contiguous_format) if wanted else None
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
