"""The generators that everything in a process draws from: where they are, and back to there.

Of Python, numpy and torch, on the CPU and on accelerators. Left out: draws that are functions of a seed and a place
(`trb.sampling.uniforms`), which need none of them.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["generators_kept", "generators_now"]


def generators_now() -> Callable[[], None]:
    """What puts the global generators back to where they are now."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    put_back_devices = _devices_now()

    def put_back() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        put_back_devices()

    return put_back


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn or seeded within the block, the global generators are after it where they were before."""
    put_back = generators_now()
    try:
        yield
    finally:
        put_back()


def _devices_now() -> Callable[[], None]:
    if not torch.accelerator.is_available():
        return lambda: None
    module = torch.get_device_module()
    # Those with one device alone, as MPS, have no functions for all of them.
    every = "_all" if hasattr(module, "get_rng_state_all") else ""
    states = getattr(module, f"get_rng_state{every}")()
    return lambda: getattr(module, f"set_rng_state{every}")(states)
