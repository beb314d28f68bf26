"""The distillation losses: reverse KL to the teacher, its relatives, and SFT warm-up's cross-entropy.

On the student's top-k or over the full vocabulary; plain on logits, and from hidden states in chunks that never hold
`[B, T, V]`.

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

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trb.blend.laws import check_aligned
from trb.errors import InputError
from trb.losses.chunked import Head, RowLoss, TokenBatch, chunked_cross_entropy, default_chunk_tokens
from trb.losses.relatives import EntropyAware, PrefixWeighted, ReliableRegion, TokenImportance
from trb.losses.reverse import ReverseKL, Veto, veto_target
from trb.losses.terms import TOP_K, Rows, TokenMetrics, check_supports, checked_support
from trb.vocab import SharedVocabulary, log_probs

__all__ = [
    "EntropyAware",
    "Loss",
    "PrefixWeighted",
    "ReliableRegion",
    "ReverseKL",
    "RowLoss",
    "Rows",
    "Supervised",
    "TokenBatch",
    "TokenImportance",
    "TokenMetrics",
    "Veto",
    "chunked_cross_entropy",
    "chunked_reverse_kl",
    "default_chunk_tokens",
    "topk_reverse_kl",
    "veto_target",
]


def topk_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int = TOP_K) -> Tensor:
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
    k = checked_support("k", k)
    chosen = mask.reshape(-1) != 0
    student_NV = student_logits.reshape(-1, student_logits.shape[-1])[chosen]
    teacher_NV = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])[chosen]
    rows = Rows.of(log_probs(student_NV.detach()), log_probs(teacher_NV))
    loss_N, gradient_NV, _ = ReverseKL(k).terms(rows)
    return _WithGradient.apply(student_NV, loss_N, gradient_NV).sum() / max(1, student_NV.shape[0])


class Loss(Protocol):
    """What is minimised at the completion tokens of a step."""

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, TokenMetrics]:
        """The scalar loss, and what was seen at each token."""


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy of the completion itself, for SFT warm-up; the metrics are those of a reverse KL on `top_k`.

    Through the head as it is: neither temperature nor shared events, which are the sampler's, come into it.
    """

    top_k: int = TOP_K

    def __post_init__(self) -> None:
        check_supports(self, "top_k")

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
    k: int = TOP_K,
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
    k = checked_support("k", k)
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


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> None:
    check_aligned(student_logits, teacher_logits)
    if mask.shape != student_logits.shape[:-1]:
        raise InputError(f"mask has shape {tuple(mask.shape)}, expected {tuple(student_logits.shape[:-1])}")
