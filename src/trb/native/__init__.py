"""What is computed in C: the blend and the reverse KL of one row of logits at a time, and the library they make."""

from trb.native.library import available, kernels, scratch, spread

__all__ = ["available", "kernels", "scratch", "spread"]
