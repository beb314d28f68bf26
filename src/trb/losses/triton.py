"""The reverse KL on a GPU as one fused kernel: loss, metrics and gradient of a chunk, from both models' logits.

One program does one row. A first sweep over the vocabulary finds both normalisers, both entropies, the divergence and
the student's likeliest tokens; a second writes the gradient by the student's logits, in their dtype, over the
student's logits if the caller wishes. In bf16 that is ten bytes a vocabulary entry for the whole vocabulary (both
models read twice, the gradient written once) and eight for a top-k support, whose gradient needs the teacher at k
tokens only.

The top k come out of the first sweep: each lane of a block keeps the three largest logits it meets and where the first
two stand. The k largest of those are the row's, unless some lane met three of them; that is seen from the third, has a
chance of about k^3 / (6 lanes^2) (with 4,096 lanes 4e-5 at k = 16, 3e-3 at 64) and costs such a row k sweeps more.
By comparison `torch.topk` selects by radix, in several sweeps, and knows nothing of folded stop ids. Among equal logits
the smaller token comes first, so that the support is the same in every run.

The matrix products stay with cuBLAS, a chunk of tokens at a time (`trb.losses.chunked`), which bounds memory as a fused
projection would. Written out, a token's logits cost about 18 V bytes of traffic: two products write them (4 V), this
kernel moves 10 V, two products read the gradient (4 V); 5 ps per vocabulary entry at an H100's 3.35 TB/s. The products
of a 1.7B student (H = 2,048) and an 8B teacher (4,096) are 20,480 V operations, 21 ps at its 989 TFLOP/s, and a fused
kernel would have to do 12,288 V of them twice, since the gradient needs the normalisers: 12 ps to save 5.

`trb.losses.terms` remains the semantics of record. Left out on purpose: rows whose loss is infinite or not a number,
which come back with a loss of NaN and their gradient unwritten, for `trb.losses.chunked` to do again; supports of more
than 64 tokens that are not the whole vocabulary; float64; and losses other than the reverse KL. Logits below -1e30
count as impossible.

Importing this module without Triton works; `available` is then False, as it is where the kernel, tried once on a few
rows, fails or gives other losses.

Shape suffixes: C tokens of one chunk, V rows of a head.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trb.errors import OperationError
from trb.losses.terms import Chunk, Rows, reverse_kl_terms
from trb.losses.triton_kernel import reverse_kl_kernel, triton
from trb.safety.untrusted import printable
from trb.vocab import SharedVocabulary

__all__ = ["available", "reverse_kl_chunk"]

logger = logging.getLogger(__name__)

_DTYPES = torch.float32, torch.bfloat16, torch.float16
_MOST_SUPPORT, _MOST_STOPS = 64, 64
_METRICS = 6
_LARGEST_BLOCK = 4096
_LANES_PER_THREAD = 4
# Decided when the kernel is decorated, so setting the variable later changes nothing.
_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def available(logits_CV: Tensor, taught_CV: Tensor, k: int, size: int, stop_ids: int) -> bool:
    """Whether `reverse_kl_chunk` can do these logits, with a support of `k` tokens of `size` and so many stop ids."""
    if triton is None or not all(x_CV.dtype in _DTYPES for x_CV in (logits_CV, taught_CV)):
        return False
    if (k > _MOST_SUPPORT and k < size) or stop_ids > _MOST_STOPS:
        return False
    if _INTERPRETED or not logits_CV.is_cuda:
        return _INTERPRETED
    dtypes, support, block = (logits_CV.dtype, taught_CV.dtype), k if k < size else 0, _block(size)
    return _works(logits_CV.device, *dtypes, support, block, folded=stop_ids > 1)


def _block(size: int) -> int:
    return int(min(_LARGEST_BLOCK, triton.next_power_of_2(size)))


@functools.cache
@torch.no_grad()
def _works(
    device: torch.device, dtype: torch.dtype, taught_dtype: torch.dtype, k: int, block: int, *, folded: bool
) -> bool:
    """Whether the kernel, as it is compiled there, gives the losses and gradients of `terms`; says once if not."""
    place_CV = torch.arange(300, device=device) * 7 + torch.arange(3, device=device)[:, None]
    # Steps of 0.14 stay apart in bfloat16 up to 32: of equal logits any may be in the support.
    logits_CV, taught_CV = (0.14 * (place_CV % 300) - 21).to(dtype), (0.14 * (place_CV % 211)).to(taught_dtype)
    events = SharedVocabulary(300, 5, (17, 290) if folded else ())
    alone_V = ~torch.isin(torch.arange(300, device=device), torch.tensor(events.stop_ids, device=device))
    rows = Rows.of(events.log_probs(logits_CV), events.log_probs(taught_CV))
    loss_C, gradient_CV, _ = reverse_kl_terms(rows.log_student, rows.log_teacher, rows.student, rows.teacher, k)
    found_CV, token_C = torch.empty_like(logits_CV), torch.zeros(3, dtype=torch.long, device=device)
    options: dict[str, Any] = {"k": k, "temperature": 1.0, "size": 300, "stop_ids": events.stop_ids, "block": block}
    weight_C = torch.full((3,), 2.0, device=device)
    try:
        found_C, _ = reverse_kl_chunk(Chunk(logits_CV, taught_CV, token_C, weight_C, found_CV), **options)
        right = torch.allclose(found_C, 2 * loss_C, rtol=1e-3) and torch.allclose(
            found_CV[:, alone_V].float(), 2 * gradient_CV[:, alone_V], rtol=2 * torch.finfo(dtype).eps, atol=1e-4
        )
        reason = "its losses are others"
    except Exception as error:  # whatever compilers and drivers do: torch does the same
        right, reason = False, printable(f"{type(error).__name__}: {error}", lines=False)
    if not right:
        logger.warning("computing the loss with torch operations, as the fused kernel does not work here: %s", reason)
    return right


@torch.no_grad()
def reverse_kl_chunk(
    chunk: Chunk,
    *,
    k: int,
    temperature: float,
    size: int,
    stop_ids: Sequence[int],
    block: int | None = None,
    warps: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """As `trb.losses.native.reverse_kl_chunk`, on a GPU.

    Args:
        chunk: logits in float32, bfloat16 or float16, with any row stride; the gradient may be the student's logits
            themselves.
        k: support size, at most 64, or 0 for the whole vocabulary.
        temperature: divides both models' logits.
        size: the first so many head rows are shared.
        stop_ids: ids that are one event, the one that stands for it first.
        block: tokens read at once, a power of two; chosen from `size` by default.
        warps: warps of a program; chosen from `block` by default.

    Returns:
        The losses and metrics.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if triton is None:
        raise OperationError("the fused loss needs Triton, which is not installed; use trb.losses.chunked")
    logits_CV, taught_CV = (x_CV if x_CV.stride(1) == 1 else x_CV.contiguous() for x_CV in chunk[:2])
    token_C, weight_C, gradient_CV = chunk[2:]
    rows, support = len(token_C), k if k < size else 0
    padded_support = max(2, triton.next_power_of_2(support))
    block = max(block or _block(size), padded_support // 2)
    number_MC = torch.empty(1 + _METRICS, rows, dtype=torch.float32, device=logits_CV.device)
    if rows:
        with torch.cuda.device_of(logits_CV):
            reverse_kl_kernel[(rows,)](
                logits_CV,
                taught_CV,
                token_C.contiguous(),
                None if weight_C is None else weight_C.contiguous(),
                number_MC,
                gradient_CV,
                logits_CV.stride(0),
                taught_CV.stride(0),
                0 if gradient_CV is None else gradient_CV.stride(0),
                size,
                logits_CV.shape[1],
                rows,
                1 / temperature,
                STOPS=tuple(stop_ids) if len(stop_ids) > 1 else (),
                K=support,
                PADDED_K=padded_support,
                BLOCK=block,
                enable_fp_fusion=True,
                num_warps=warps or max(1, min(32, block // (32 * _LANES_PER_THREAD))),
            )
    loss_C, *metrics = number_MC.unbind(0)
    return loss_C, metrics
