"""The distillation losses: reverse KL(student || teacher) on the student's top-k, over the full vocabulary, and
against Veto's target; plus the chunked forms that never hold `[B, T, V]`.

At one prefix, S is the set of the student's k most likely tokens, p and q the student's and the teacher's
probabilities normalised over the *full* vocabulary, and Z_S = Σ_S p. The loss is

    (1 / sg[Z_S]) · Σ_S [ p log(p/q) - p + q ]

whose gradient is Σ_S w (log p - log q) ∇ log p with w = p / Z_S held fixed (paper, section 5). Every term is
non-negative, and with S the whole vocabulary it is exactly the reverse KL. The plain Σ_S p log(p/q) has another
gradient: it adds ∇Z_S and pushes mass out of S.

Nothing here samples, and no gradient reaches the teacher. Other directions and divergences, and the supervised loss
of SFT warm-up, are left to TRL.

Shape suffixes: N tokens, K support, V vocabulary, H hidden size, C tokens of one chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trb.vocab import SharedVocabulary, log_probs

__all__ = [
    "TokenMetrics",
    "chunked_reverse_kl",
    "full_reverse_kl",
    "topk_reverse_kl",
    "veto_target",
]

Head = Callable[[Tensor], Tensor]


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
    chosen = mask.reshape(-1) != 0
    student_NV = student_logits.reshape(-1, student_logits.shape[-1])[chosen]
    teacher_NV = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])[chosen]
    log_student_NV, log_teacher_NV = log_probs(student_NV), log_probs(teacher_NV)
    loss_N, _ = _reverse_kl_terms(log_student_NV, log_teacher_NV, k)
    return loss_N.sum() / max(1, student_NV.shape[0])


def full_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """Token mean of KL(student || teacher) over the whole vocabulary; arguments as in `topk_reverse_kl`."""
    return topk_reverse_kl(student_logits, teacher_logits, mask, k=0)


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
    return torch.log_softmax(log_teacher + strength * log_student, dim=-1)


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
    chunk_tokens: int = 1024,
) -> tuple[Tensor, TokenMetrics]:
    """The top-k reverse KL from hidden states, a chunk of tokens at a time; masked positions cost nothing.

    Each chunk's logits are recomputed in the backward pass, so peak memory is two chunks' logits, not T · V.

    Args:
        student_hidden: `[..., H_student]`, gradients flow.
        teacher_hidden: `[..., H_teacher]`.
        student_head: maps hidden states to `[..., V_student]` logits.
        teacher_head: the same for the teacher.
        tokens: `[...]` ids that the positions predict.
        mask: `[...]`, non-zero on completion tokens.
        k: support size, 0 for the full vocabulary.
        vocabulary: folds both models' logits onto shared events; None if they are already shared.
        temperature: divides both models' logits; must be the sampler's.
        veto_strength: b of Veto's target, 0 for the teacher itself.
        normaliser: divides the sum over tokens; by default the number of unmasked tokens.
        chunk_tokens: tokens projected to the vocabulary at once.

    Returns:
        The scalar loss and the metrics at the unmasked tokens.
    """
    chosen = (mask.reshape(-1) != 0).nonzero().squeeze(-1)
    student_NH = student_hidden.reshape(-1, student_hidden.shape[-1])[chosen]
    teacher_NH = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])[chosen]
    token_N = tokens.reshape(-1)[chosen]

    def chunk_loss(student_CH: Tensor, teacher_CH: Tensor, token_C: Tensor) -> tuple[Tensor, ...]:
        log_student_CV = _project(student_head, student_CH, vocabulary, temperature)
        with torch.no_grad():
            log_teacher_CV = _project(teacher_head, teacher_CH, vocabulary, temperature)
            target_CV = veto_target(log_student_CV, log_teacher_CV, veto_strength)
        loss_C, support_mass_C = _reverse_kl_terms(log_student_CV, target_CV, k)
        loss = loss_C.sum()
        # Last, because recomputation in the backward pass stops once the loss's own tensors are back.
        with torch.no_grad():
            return loss, *_token_metrics(log_student_CV, log_teacher_CV, token_C), support_mass_C

    if not chosen.numel():
        empty_N = student_NH.new_zeros(0)
        return student_hidden.sum() * 0.0, TokenMetrics(*[empty_N] * len(fields(TokenMetrics)))
    losses, metrics = [], []
    for start in range(0, chosen.numel(), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        loss, *seen = checkpoint(chunk_loss, student_NH[part], teacher_NH[part], token_N[part], use_reentrant=False)
        losses.append(loss)
        metrics.append(seen)
    total = torch.stack(losses).sum() / (chosen.numel() if normaliser is None else normaliser)
    return total, TokenMetrics(*(torch.cat(values) for values in zip(*metrics, strict=True)))


def _project(head: Head, hidden_CH: Tensor, vocabulary: SharedVocabulary | None, temperature: float) -> Tensor:
    logits_CV = head(hidden_CH)
    if vocabulary is not None:
        logits_CV = vocabulary.fold(logits_CV)
    return log_probs(logits_CV, temperature)


def _reverse_kl_terms(log_student_NV: Tensor, log_target_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`[N]` loss and support mass per token, from log-probabilities normalised over the full vocabulary."""
    if k < 0:
        raise ValueError(f"k must be at least 0 (0 means the full vocabulary), got {k}")
    if 0 < k < log_student_NV.shape[-1]:
        support_NK = log_student_NV.detach().topk(k, dim=-1).indices
        log_student_NV = log_student_NV.gather(-1, support_NK)
        log_target_NV = log_target_NV.gather(-1, support_NK)
    student_NK, target_NK = log_student_NV.exp(), log_target_NV.exp()
    # A token the student cannot draw contributes only the target's mass; log 0 - log 0 must not reach the product.
    possible_NK = student_NK > 0
    log_ratio_NK = torch.where(possible_NK, log_student_NV, 0.0) - torch.where(possible_NK, log_target_NV, 0.0)
    support_mass_N = student_NK.detach().sum(-1)
    return (student_NK * log_ratio_NK - student_NK + target_NK).sum(-1) / support_mass_N, support_mass_N


def _token_metrics(log_student_CV: Tensor, log_teacher_CV: Tensor, token_C: Tensor) -> tuple[Tensor, ...]:
    student_CV = log_student_CV.exp()
    finite_student_CV = log_student_CV.masked_fill(student_CV == 0, 0.0)
    student_entropy_C = -(student_CV * finite_student_CV).sum(-1)
    cross_CV = student_CV * log_teacher_CV.masked_fill(student_CV == 0, 0.0)
    teacher_CV = log_teacher_CV.exp()
    teacher_entropy_C = -(teacher_CV * log_teacher_CV.masked_fill(teacher_CV == 0, 0.0)).sum(-1)
    reverse_kl_C = (-student_entropy_C - cross_CV.sum(-1)).clamp_min(0)
    token_log_prob_C = log_teacher_CV.gather(-1, token_C[:, None]).squeeze(-1)
    return reverse_kl_C, student_entropy_C, teacher_entropy_C, token_log_prob_C


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape, {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}: align them first with trb.vocab.align"
        )
    if mask.shape != student_logits.shape[:-1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(student_logits.shape[:-1])}")
