"""Triton's kernels without a GPU: interpreted, and compiled for one.

The interpreter has a process of its own: it replaces Triton's language when Triton is first imported.
"""

import functools
import io
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

__all__ = ["close_interpreter", "compiled", "interpreted"]


def interpreted(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a module's function returns there; arguments and results are what `torch.save` can pack."""
    packed = _process().submit(_run, function, _pack((arguments, options))).result()
    return torch.load(io.BytesIO(packed))


def close_interpreter() -> None:
    if _process.cache_info().currsize:
        _process().shutdown()
        _process.cache_clear()


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], cache: Path) -> dict[str, Any]:
    """What the compiler makes of a kernel for an H100, which need not be there; arguments are int32 but for `types`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache)
        options = {"num_warps": 32, "enable_fp_fusion": True}
        return dict(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm)


@functools.cache
def _process() -> ProcessPoolExecutor:
    process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process.submit(os.getpid).result()
    return process


def _run(function: Callable[..., Any], packed: bytes) -> bytes:
    arguments, options = torch.load(io.BytesIO(packed))
    with np.errstate(all="ignore"):  # overflow and NaN are silent on a GPU
        return _pack(function(*arguments, **options))


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
