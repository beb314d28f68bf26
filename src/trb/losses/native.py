"""The reverse KL on CPUs in C: loss, gradient and metrics of a chunk in three sweeps that stay in cache.

`trb.losses.terms` remains the semantics of record. A row's result depends on that row alone, to the last bit. Built,
and given threads, by `trb.kernels`.

Left out on purpose: rows whose loss is infinite or not a number, which come back with a loss of NaN and their gradient
unwritten, for `trb.losses.chunked` to do again; supports above 1,024 tokens that are not the whole vocabulary; dtypes
other than float32 and bfloat16; and losses other than the reverse KL.

Shape suffixes: C tokens of one chunk, V rows of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trb import kernels
from trb.errors import InputError
from trb.losses.terms import Chunk

__all__ = ["available", "reverse_kl_chunk"]

_DTYPES = torch.float32, torch.bfloat16
_MOST_SUPPORT, _MOST_STOPS = 1024, 64
_NUMBERS = 7


def available(logits_CV: Tensor, taught_CV: Tensor, k: int, size: int, stop_ids: int) -> bool:
    """Whether `reverse_kl_chunk` can do these logits, with a support of `k` tokens of `size` and so many stop ids."""
    readable = all(x_CV.device.type == "cpu" and x_CV.dtype in _DTYPES for x_CV in (logits_CV, taught_CV))
    return readable and (k <= _MOST_SUPPORT or k >= size) and stop_ids <= _MOST_STOPS and kernels.available()


@torch.no_grad()
def reverse_kl_chunk(
    chunk: Chunk, *, k: int, temperature: float, size: int, stop_ids: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Reverse KL on the student's top `k` tokens, as `trb.losses.terms.reverse_kl_terms`, from both models' logits.

    Args:
        chunk: logits in float32 or bfloat16, events below `size`.
        k: support size, 0 for the whole vocabulary.
        temperature: divides both models' logits.
        size: the first so many head rows are shared.
        stop_ids: ids that are one event, the one that stands for it first.

    Returns:
        `[C]` losses in float32, NaN where a row is left to tensors, and the `[C]` values of
        `trb.losses.terms.TokenMetrics` in its order.

    Raises:
        RuntimeError: the library is not available.
        ValueError: a head with fewer rows than `size`, a stop id beyond it, or a gradient unlike the logits.
    """
    library = kernels.library(otherwise="trb.losses.chunked")
    _check(chunk, size, stop_ids)
    logits_CV, taught_CV = (x_CV if x_CV.stride(1) == 1 else x_CV.contiguous() for x_CV in chunk[:2])
    # Of no stop ids any one token is an event of its own.
    token_C, stop_S = chunk.token.long().contiguous(), torch.tensor([*stop_ids] or [0], dtype=torch.int64)
    weight_C = None if chunk.weight is None else chunk.weight.float().contiguous()
    gradient_CV = chunk.gradient
    number_CM = torch.empty(len(token_C), _NUMBERS)

    def sweep(start: int, end: int) -> None:
        library.reverse_kl_rows(
            logits_CV.data_ptr(),
            taught_CV.data_ptr(),
            logits_CV.dtype == torch.bfloat16,
            taught_CV.dtype == torch.bfloat16,
            logits_CV.stride(0),
            taught_CV.stride(0),
            0 if gradient_CV is None else gradient_CV.stride(0),
            logits_CV.shape[1],
            size,
            start,
            end,
            k if 0 < k < size else 0,
            temperature,
            stop_S.data_ptr(),
            len(stop_S),
            token_C.data_ptr(),
            None if weight_C is None else weight_C.data_ptr(),
            number_CM.data_ptr(),
            None if gradient_CV is None else gradient_CV.data_ptr(),
            kernels.scratch(2 * size).data_ptr(),
        )

    kernels.spread(sweep, len(token_C), size)
    loss_C, *metrics = number_CM.unbind(1)
    return loss_C, metrics


def _check(chunk: Chunk, size: int, stop_ids: Sequence[int]) -> None:
    """What lies outside would be read and written all the same."""
    shapes = tuple(chunk.student.shape), tuple(chunk.teacher.shape)
    if any(len(shape) != 2 for shape in shapes) or not 0 < size <= min(width for _, width in shapes):
        raise InputError(f"{size} events of heads with shapes {shapes[0]} and {shapes[1]}")
    if not all(0 <= token_id < size for token_id in stop_ids):
        raise InputError(f"stop ids {list(stop_ids)} of {size} events")
    rows = len(chunk.token)
    lengths = [len(x) for x in (chunk.student, chunk.teacher, chunk.weight) if x is not None]
    if any(length != rows for length in lengths):
        raise InputError(f"{rows} tokens, but {lengths} rows of logits and weights")
    gradient = chunk.gradient
    if gradient is None:
        return
    alike = gradient.shape == chunk.student.shape and gradient.dtype == chunk.student.dtype
    if not alike or gradient.stride(1) != 1:
        raise InputError(
            f"a gradient of shape {tuple(gradient.shape)}, {gradient.dtype} and strides {gradient.stride()} "
            f"for logits of shape {shapes[0]} and {chunk.student.dtype}"
        )
