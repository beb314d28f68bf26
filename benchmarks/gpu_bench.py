"""What the sections of `gpu.py` share: sizes, the clock, time limits, and a pair of models with random weights."""

import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trb.blend import triton as blend_triton

KL_BUDGET = 0.02


@dataclass(frozen=True)
class Shapes:
    """How large everything is. Lengths are in tokens.

    Attributes:
        student: Qwen3 configuration of the student.
        teacher: Qwen3 configuration of the teacher.
        vocabularies: sizes at which the solver is checked; the last is the one that is timed.
        rows: prefixes solved at once, for the timings.
        batches: completions sampled at once.
        block_sizes: draft lengths of the speculative sampler, besides its default.
        prompt: longest prompt.
        new_tokens: length of sampled completions.
        step_batch: sequences of the distillation step.
        step_completion: completion length of the distillation step.
        loss_tokens: completion tokens of the loss alone.
        training_rows: sequences of a forward pass of whole optimizer steps.
        training_passes: how many of those make a step.
        training_prompt: length of their prompts.
        training_completion: length of their completions.
        long_batches: completions of that length sampled at once.
        repeat_s: time spent repeating each measurement.
    """

    student: dict[str, Any]
    teacher: dict[str, Any]
    vocabularies: tuple[int, ...] = (32_000, 49_152, 151_936)
    rows: tuple[int, ...] = (8, 64, 512)
    batches: tuple[int, ...] = (8, 64)
    block_sizes: tuple[int, ...] = (4, 8)
    prompt: int = 64
    new_tokens: int = 64
    step_batch: int = 8
    step_completion: int = 448
    loss_tokens: tuple[int, ...] = (1024, 4096, 16_384)
    training_rows: int = 4
    training_passes: int = 8
    training_prompt: int = 256
    training_completion: int = 512
    long_batches: tuple[int, ...] = (64, 256)
    repeat_s: float = 0.4


def qwen3(hidden: int, layers: int, feed_forward: int, heads: int, key_value_heads: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": feed_forward}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": 128}
    return shape | {"vocab_size": 151_936, "max_position_embeddings": 4096} | more


QWEN3_0_6B = qwen3(1024, 28, 3072, 16, 8, tie_word_embeddings=True)
QWEN3_1_7B = qwen3(2048, 28, 6144, 16, 8, tie_word_embeddings=True)
QWEN3_8B = qwen3(4096, 36, 12_288, 32, 8, tie_word_embeddings=False)
# A wide initialisation keeps the miniature pair as far apart as the others.
MINIATURE = qwen3(32, 2, 64, 2, 1, vocab_size=211, initializer_range=0.3)

FULL = Shapes(QWEN3_1_7B, QWEN3_8B)
SMALL = Shapes(QWEN3_0_6B, QWEN3_1_7B, rows=(8, 64), batches=(8, 32), step_batch=2, long_batches=(64,))
SMOKE = Shapes(
    MINIATURE,
    MINIATURE | {"hidden_size": 48},
    vocabularies=(37, 211),
    rows=(2, 3),
    batches=(2,),
    block_sizes=(3,),
    prompt=6,
    new_tokens=5,
    step_batch=2,
    step_completion=6,
    loss_tokens=(5,),
    training_rows=1,
    training_passes=2,
    training_prompt=6,
    training_completion=5,
    long_batches=(2,),
    repeat_s=0.02,
)


# --- sections, their limits, and the clock ------------------------------------------------------------


class OutOfTime(BaseException):
    """A section reached its limit. Like KeyboardInterrupt, so that no library takes it for an error of its own."""


@dataclass
class Bench:
    """What a section needs: the machine, the sizes, and a place for its numbers.

    Attributes:
        device: where everything runs.
        shapes: the sizes.
        smoke: a rehearsal, on any device.
        compiled: time compiled decoding as well.
        numbers: what the current section has measured so far.
        failures: checks of the current section that failed, in words.
        models: student and teacher, built by the first section that asks for them.
    """

    device: torch.device
    shapes: Shapes
    smoke: bool
    compiled: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    models: tuple[Qwen3ForCausalLM, Qwen3ForCausalLM] | None = None

    @property
    def fused(self) -> bool:
        return blend_triton.available(torch.empty(0, device=self.device))

    def log(self, name: str, **numbers: Any) -> None:
        self.numbers[name] = numbers
        shown = "  ".join(f"{key} {readable(value)}" for key, value in numbers.items())
        print(f"  {name:<44} {shown}", flush=True)

    def expect(self, condition: bool, complaint: str) -> None:
        if not condition:
            self.failures.append(complaint)
            print(f"  FAILED: {complaint}", flush=True)

    def seconds(self, function: Callable[..., object], *arguments: Any, **options: Any) -> float:
        """Median time of one call among many in a row, so that launching one overlaps with running another."""

        def run(calls: int) -> None:
            for _ in range(calls):
                function(*arguments, **options)

        run(2)
        calls = max(1, min(100, int(0.05 * self.shapes.repeat_s / self.once(run, 1)[0])))
        times: list[float] = []
        while len(times) < 3 or sum(times) < self.shapes.repeat_s:
            times.append(self.once(run, calls)[0])
        return statistics.median(times) / calls

    def once(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
        """Time of one call, and what it returned."""
        elapsed = self.stopwatch()
        result = function(*arguments, **options)
        return elapsed(), result

    def stopwatch(self) -> Callable[[], float]:
        """Starts; what it returns says how long ago that was, once the device has done its work."""
        self.synchronize()
        start = time.perf_counter()

        def elapsed() -> float:
            self.synchronize()
            return time.perf_counter() - start

        return elapsed

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def peak_memory(self) -> Iterator[dict[str, float | None]]:
        """Fills in `memory_gb`, the most that tensors took up inside the block."""
        found: dict[str, float | None] = {"memory_gb": None}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        if self.device.type == "cuda":
            found["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9


def readable(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_section(bench: Bench, section: Callable[[Bench], None], limit_s: float) -> dict[str, Any]:
    """The section's numbers, how long it took and how it ended."""
    print(f"\n{section.__name__}: {(section.__doc__ or '').splitlines()[0]}", flush=True)
    bench.numbers, bench.failures = {}, []
    start = time.perf_counter()
    outcome: dict[str, Any] = {"cut": False, "error": None}

    def out_of_time(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    # A second alarm follows, in case a library swallows the first.
    signal.setitimer(signal.ITIMER_REAL, max(limit_s, 0.001), 5)
    try:
        section(bench)
    except OutOfTime:
        outcome["cut"] = True
        print(f"  cut after {limit_s:.0f} s", flush=True)
    except Exception as error:
        traceback.print_exc()
        outcome["error"] = f"{type(error).__name__}: {error}"[:2000]
        bench.failures.append(f"{section.__name__} broke: {type(error).__name__}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    outcome |= {"failures": bench.failures, "numbers": bench.numbers}
    return {"seconds": time.perf_counter() - start, "limit_seconds": limit_s, **outcome}


# --- the models ------------------------------------------------------------


def build(bench: Bench, shape: dict[str, Any], seed: int, dtype: torch.dtype | None = None) -> Qwen3ForCausalLM:
    """A model with random weights, made where it will run; by default in what is fast there."""
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.float32 if bench.device.type == "cpu" else torch.bfloat16))
    try:
        with torch.device(bench.device):
            model = Qwen3ForCausalLM(Qwen3Config(**shape, pad_token_id=None, bos_token_id=None, eos_token_id=None))
    finally:
        torch.set_default_dtype(previous)
    return model.eval().requires_grad_(False)


def models_of(bench: Bench) -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    if bench.models is None:
        bench.models = build(bench, bench.shapes.student, seed=0), build(bench, bench.shapes.teacher, seed=1)
    return bench.models


def prompts_of(bench: Bench, batch: int, longest: int | None = None) -> list[list[int]]:
    """Random prompts of different lengths, so that padding costs what it does in training."""
    longest = longest or bench.shapes.prompt
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(longest // 2, longest + 1, (batch,), generator=generator)
    end = bench.shapes.student["vocab_size"] - 1
    return [torch.randint(end, (length,), generator=generator).tolist() for length in lengths.tolist()]


@contextmanager
def with_graphs(on: bool) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"TRB_CUDA_GRAPHS": "1" if on else "0"}):
        yield


def copy_bandwidth(bench: Bench) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    source = torch.zeros(1 << (20 if bench.smoke else 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / bench.seconds(target.copy_, source)
