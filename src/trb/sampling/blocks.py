"""How many tokens to draft before the teacher reads them: chosen from acceptance and from the cost of the passes.

A round drafts k tokens with k student passes, reads them in one teacher pass and yields, at a continuation rate a,
1 + a + ... + a^(k-1) tokens. Passes cost `fixed + per_token · tokens`; the rate is measured as rounds go by. The
choice affects speed alone: samplers draw the same completions for every block size (up to floating-point rounding).

Left out: a block size per row, and acceptance that depends on the position within the block.
"""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["CANDIDATES", "BlockChooser", "Costs", "MeasuredCosts", "PlannedCosts", "synchronize", "tokens_per_round"]

CANDIDATES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
# Continuation rate assumed before anything was measured, and how many positions that assumption counts for.
_PRIOR_RATE = 0.85
_PRIOR_POSITIONS = 16.0
# A pass over m tokens costs about as much as reading the weights plus m multiplications by them; these are the m at
# which the two are equal, and the cost of verifying one vocabulary entry in the same unit (parameters).
_BALANCE_CPU, _BALANCE = 40.0, 256.0
_VERIFY_PER_ENTRY = 500.0
# Share of what was measured before that a new measurement leaves standing.
_MEMORY = 0.9
# A timing counts as at most this many times the one expected.
_LONGEST = 1.5


def tokens_per_round(block: int, rate: float) -> float:
    """Tokens of a row that a round of `block` drafts yields."""
    return sum(rate**drafted for drafted in range(block))


class Costs(Protocol):
    """What a round takes, in any unit."""

    def student(self, rows: int) -> float:
        """One draft pass: one token of each row."""

    def teacher(self, tokens: int) -> float:
        """One teacher pass over so many tokens."""

    def verify(self, tokens: int) -> float:
        """Solving and deciding at so many positions."""


class BlockChooser:
    """Picks the block size of each round.

    Args:
        costs: of the two models.
        fixed: always this block size; None to choose.
        tolerance: the last choice stands while none is better by more than this share. Where a graph is captured for
            every block size, changing it for little costs more than it gains.
        largest: of the sizes to choose from.
    """

    def __init__(
        self, costs: Costs, fixed: int | None = None, tolerance: float = 0.0, largest: int = CANDIDATES[-1]
    ) -> None:
        self.costs = costs
        self.largest = largest if fixed is None else fixed
        self._fixed = fixed
        self._tolerance = tolerance
        self._last: int | None = None
        self._continued = _PRIOR_RATE * _PRIOR_POSITIONS
        self._verified = _PRIOR_POSITIONS

    @property
    def rate(self) -> float:
        """Share of verified positions after which the row went on with its next draft."""
        return self._continued / self._verified

    def observe(self, verified: int, continued: int) -> None:
        self._verified += verified
        self._continued += continued

    def choose(self, rows: int, longest_remaining: int) -> int:
        """The block size that yields most tokens per unit of cost for `rows` rows, at most `longest_remaining`."""
        if self._fixed is not None:
            return min(self._fixed, longest_remaining)
        feasible = [size for size in CANDIDATES if size <= min(longest_remaining, self.largest)]
        speed = {size: tokens_per_round(size, self.rate) / self._cost(size, rows) for size in feasible}
        best = max(feasible, key=speed.__getitem__)
        if self._last not in speed or speed[best] > (1 + self._tolerance) * speed[self._last]:
            self._last = best
        return self._last

    def _cost(self, size: int, rows: int) -> float:
        verified = max(1, round(rows * tokens_per_round(size, self.rate)))
        return size * self.costs.student(rows) + self.costs.teacher(rows * size) + self.costs.verify(verified)


class PlannedCosts:
    """Costs from the models' shapes: the same on every machine and in every run, so that a run can be repeated."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, vocabulary: int) -> None:
        self._student, self._teacher = _parameters_read(student), _parameters_read(teacher)
        self._vocabulary = vocabulary
        self._balance = _BALANCE_CPU if student.device.type == "cpu" else _BALANCE

    def student(self, rows: int) -> float:
        return self._student * (self._balance + rows)

    def teacher(self, tokens: int) -> float:
        return self._teacher * (self._balance + tokens)

    def verify(self, tokens: int) -> float:
        return _VERIFY_PER_ENTRY * self._vocabulary * tokens


def _parameters_read(model: PreTrainedModel) -> float:
    """Parameters a decoding step multiplies with: all but an input embedding of its own."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    return float(total if head is None or head is embedding else total - cast(Tensor, embedding).numel())


class MeasuredCosts:
    """Costs from the clock, starting from the shape of the planned ones; adapts to what else the machine does."""

    def __init__(self, planned: PlannedCosts) -> None:
        self._planned = planned
        self._lines: dict[str, _Line] = {}
        self._seen: set[str] = set()

    def student(self, rows: int) -> float:
        return self._cost("student", rows)

    def teacher(self, tokens: int) -> float:
        return self._cost("teacher", tokens)

    def verify(self, tokens: int) -> float:
        return self._cost("verify", tokens)

    def observe(self, part: str, tokens: int, seconds: float) -> None:
        """One timing of `part` ("student", "teacher" or "verify") over `tokens` tokens."""
        if part not in self._seen:
            self._seen.add(part)  # the first pass warms caches and tells little
            return
        if part not in self._lines:
            plan = getattr(self._planned, part)
            scale = seconds / plan(tokens)
            self._lines[part] = _Line()
            for size in (1, max(2, tokens), 4 * max(2, tokens)):
                self._lines[part].add(size, scale * plan(size))
        # Whatever else the machine does makes passes longer, never shorter.
        self._lines[part].add(tokens, min(seconds, _LONGEST * self._lines[part].at(tokens)))

    def _cost(self, part: str, tokens: int) -> float:
        if part in self._lines:
            return self._lines[part].at(tokens)
        known = next(iter(self._lines.items()), None)
        scale = 1.0 if known is None else known[1].at(1) / getattr(self._planned, known[0])(1)
        return scale * getattr(self._planned, part)(tokens)


@dataclass
class _Line:
    """A weighted least-squares line that forgets."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, _MEMORY * getattr(self, name) + value)

    def at(self, x: float) -> float:
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 1e-9 * mean_x**2 else 0.0
        # More tokens never cost less, and a pass never costs less than nothing.
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return mean_y + slope * (x - mean_x)


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator, so that the clock measures work and not its submission."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
