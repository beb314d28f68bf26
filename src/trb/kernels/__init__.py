"""What is computed in C: the blend and the reverse KL of one row of logits at a time, and the library they make."""

from trb.kernels.building import available, library, scratch, spread

__all__ = ["available", "library", "scratch", "spread"]
