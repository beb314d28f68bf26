"""Whole optimizer steps beside TRL's trainers, under every condition that changes what limits them.

    python benchmarks/conditions.py                       all sixteen, into benchmarks/results/conditions.json
    python benchmarks/conditions.py --quick               two of them, where least is saved, in some minutes, into
                                                          build/conditions-quick.json
    python benchmarks/conditions.py --only float32 fixed  those whose names have all of these words
    python benchmarks/conditions.py --smoke               tiny sizes: does it run? (the numbers mean nothing)

A condition is a dtype, whether completions stop by themselves, the length of prompts, and the longest completion.
Contenders take turns, each with one training of a few steps over the same rows; a ratio is that of one step, and what
is reported is the median of them, of processor time and of wall time. The first step does not count: it also checks
models and fills caches, once in a run. A condition that is done is not measured again (`--again` does), so that an
interrupted run goes on.

With bf16 each trainer computes in what it makes of `bf16=True` over float32 weights: TRL's loss stays in float32
(docs/performance.md, "A whole step").

Left out: sampling and the solve alone (`bench.py`), GPUs (`gpu.py`), and the page's tables (`performance.py`).
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from bench import clone, gkd_trainer, our_trainer, ratios, spread, step_options, trl_trainer
from pair import NEVER, questions, smollm2_pair
from transformers import PreTrainedTokenizerBase, TrainerCallback

from trb.losses.chunked import RowLoss
from trb.safety.files import write_json
from trb.sampling.cache import SlotReader
from trb.sampling.speculative import _Sampler
from trb.studies.provenance import describe

OUTPUT = Path(__file__).parent / "results" / "conditions.json"
QUICK_OUTPUT = Path(__file__).parents[1] / "build" / "conditions-quick.json"
ROLLOUTS = 4
FILLER = "The clerk writes down every number that the customer says, and reads it back before going on. "
BUDGETS = (0.02, 0.005)
OURS: dict[str, dict[str, Any]] = {
    "plain": {"method": "opd"},
    **{f"warm-up {budget:g}": {"method": "fixed", "initial_kl_budget": budget} for budget in BUDGETS},
}
CONTENDERS = (*OURS, "TRL distillation", "TRL GKD")
RATIOS = {
    "plain / TRL": ("plain", "TRL distillation"),
    "warm-up 0.02 / TRL": ("warm-up 0.02", "TRL distillation"),
    "warm-up 0.005 / TRL": ("warm-up 0.005", "TRL distillation"),
    "plain / GKD": ("plain", "TRL GKD"),
    "warm-up 0.02 / plain": ("warm-up 0.02", "plain"),
    "warm-up 0.005 / plain": ("warm-up 0.005", "plain"),
    "annealed / plain": ("annealed", "plain"),
}
# A budget that falls from 0.02 to 0, by trapezoids through what was measured; below 0.005 it costs as much as there.
ANNEALED = {"warm-up 0.02": 0.375, "warm-up 0.005": 0.625}


class Condition(NamedTuple):
    """What a step is measured under; `prompt` and `tokens` are lengths in tokens."""

    dtype: str
    lengths: str
    prompt: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.dtype}, {self.lengths} lengths, prompts of {self.prompt}, {self.tokens} tokens"

    @property
    def rows(self) -> int:
        # TRL's GKD holds about a dozen tensors of all logits: 16 rows of long prompts take 22 GB.
        return 16 if self.prompt + self.tokens <= 128 else 8


SHORT = 32  # about what the questions have
CHOICES = ("float32", "bf16"), ("fixed", "natural"), (SHORT, 512), (64, 256)
ALL = [Condition(*choice) for choice in itertools.product(*CHOICES)]
QUICK = [Condition(dtype, "fixed", SHORT, 64) for dtype in ("float32", "bf16")]
SMOKE = [Condition("float32", "fixed", SHORT, 8)]


# ---- where the time of a step goes ----


class Parts(TrainerCallback):
    """Processor and wall seconds of the parts of each optimizer step; what a part calls counts for the callee alone."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []
        self._open: list[str] = []
        self._seconds: dict[str, list[float]] = {}
        self._since = (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._seconds = defaultdict(lambda: [0.0, 0.0])
        self._open, self._since = ["rest"], _clocks()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._charge()
        self._open = []
        self.steps.append({name: (cpu, wall) for name, (cpu, wall) in self._seconds.items()})

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._enter("optimizer")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._leave()

    def _enter(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def _leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        now = _clocks()
        if self._open:
            for index in (0, 1):
                self._seconds[self._open[-1]][index] += now[index] - self._since[index]
        self._since = now

    def counted(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time charged to a part: by name, or by what its arguments say."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            self._enter(name if isinstance(name, str) else name(*arguments))
            try:
                return function(*arguments, **options)
            finally:
                self._leave()

        return run

    def watch(self, trainer: Any) -> None:
        """Count the parts that all trainers have, and those of ours that belong to the object."""
        trainer.add_callback(self)
        trainer.model.generate = self.counted("sampling", trainer.model.generate)
        trainer.compute_loss = self.counted("forward and loss", trainer.compute_loss)
        trainer.accelerator.backward = self.counted("backward", trainer.accelerator.backward)
        if hasattr(trainer, "_teacher_hidden"):
            trainer._generate_single_turn = self.counted("sampling", trainer._generate_single_turn)
            trainer._teacher_hidden = self.counted("teacher", trainer._teacher_hidden)

    @contextlib.contextmanager
    def inside(self, teacher: torch.nn.Module) -> Iterator[None]:
        """Count the parts of sampling and of the loss, which belong to classes."""

        def reader(read_by: SlotReader, *_: Any) -> str:
            return "teacher" if read_by.model is teacher else "draft"

        with (
            mock.patch.object(SlotReader, "read", self.counted(reader, SlotReader.read)),
            mock.patch.object(SlotReader, "admit", self.counted(reader, SlotReader.admit)),
            mock.patch.object(_Sampler, "_verify", self.counted("decide", _Sampler._verify)),
            mock.patch.object(RowLoss, "__call__", self.counted("loss", RowLoss.__call__)),
        ):
            yield


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


# ---- a condition ----


def measure(condition: Condition, repeats: int, *, heal: bool = True) -> dict[str, Any]:
    """Seconds of a step of every contender, where they go, and the ratios.

    A student that is not healed never stops by itself, which changes nothing where none can.
    """
    student, teacher, tokenizer = smollm2_pair(heal=heal)
    teacher = teacher.to(torch.float32 if condition.dtype == "float32" else torch.bfloat16)
    if condition.lengths == "fixed":
        tokenizer.eos_token = NEVER
        for model in (student, teacher):
            model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    # New prompts in each step, the same for all contenders.
    prompts = (1 + repeats) * condition.rows // ROLLOUTS
    rows = lengthened(questions(prompts, seed=21), tokenizer, condition.prompt)
    seconds: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for name in CONTENDERS:
        seconds[name] = later_steps(name, condition, student, teacher, tokenizer, rows, repeats)
        print(f"  {name}: {', '.join(f'{total(step)[0]:.1f}' for step in seconds[name])} processor seconds", flush=True)
    return summary(seconds) | condition._asdict() | {"rows": condition.rows, "repeats": repeats}


def later_steps(
    name: str,
    condition: Condition,
    student: Any,
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    repeats: int,
) -> list[dict[str, tuple[float, float]]]:
    """(processor, wall) seconds of the parts of a contender's steps after the first."""
    parts = Parts()
    with tempfile.TemporaryDirectory() as directory:
        shared = step_options(directory, condition.rows, 1 + repeats, bf16=condition.dtype == "bf16")
        model = clone(student)
        if name in OURS:
            trainer = our_trainer(model, teacher, tokenizer, rows, condition.tokens, shared, OURS[name])
        elif name == "TRL distillation":
            trainer = trl_trainer(model, teacher, tokenizer, rows, condition.tokens, shared)
        else:
            trainer = gkd_trainer(model, teacher, tokenizer, rows, condition.tokens, shared)
        parts.watch(trainer)
        with parts.inside(teacher):
            trainer.train()
    del trainer, model
    gc.collect()
    return parts.steps[1:]


def lengthened(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[dict[str, Any]]:
    """The questions, after as much filler as makes their prompts nearly so long."""
    if tokens <= SHORT:
        return rows

    def length(text: str) -> int:
        chat = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))

    found = []
    for row in rows:
        text = row["prompt"][0]["content"]
        while length(FILLER + text) <= tokens:
            text = FILLER + text
        found.append({"prompt": [{"role": "user", "content": text}]})
    return found


# ---- what it comes to ----


def total(step: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """(processor, wall) seconds of a whole step."""
    return sum(cpu for cpu, _ in step.values()), sum(wall for _, wall in step.values())


def summary(seconds: dict[str, list[dict[str, tuple[float, float]]]]) -> dict[str, Any]:
    """Medians of the ratios of whole steps, by processor time and by the clock, and each part's share of its step."""
    found: dict[str, Any] = {"ratios": {}, "wall_ratios": {}, "seconds": {}, "parts": {}}
    for index, kind in enumerate(("ratios", "wall_ratios")):
        table = {name: [total(step)[index] for step in steps] for name, steps in seconds.items()}
        blended = [[weight * value for value in table[name]] for name, weight in ANNEALED.items()]
        table["annealed"] = [sum(values) for values in zip(*blended, strict=True)]
        found[kind] = {label: ratios(table, *pair) for label, pair in RATIOS.items()}
        if not index:
            found["seconds"] = {name: spread(values) for name, values in table.items()}
    for name, steps in seconds.items():
        shares = {part for step in steps for part in step}
        found["parts"][name] = {
            part: round(statistics.median(step.get(part, (0.0, 0.0))[0] / total(step)[0] for step in steps), 3)
            for part in sorted(shares)
        }
    return found


def worst(conditions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each ratio the smallest and the largest median over the conditions, and which condition has the largest."""
    found = {}
    for label in RATIOS:
        medians = {name: cell["ratios"][label]["median"] for name, cell in conditions.items()}
        highest = max(medians, key=lambda name: medians[name])
        found[label] = {"best": min(medians.values()), "worst": medians[highest], "where": highest}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="time whole optimizer steps beside TRL's trainers, under every condition",
        epilog="a condition that is done is kept; --again measures it anew",
    )
    parser.add_argument("--quick", action="store_true", help="two conditions, one step of each contender")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="those whose names have all of these")
    parser.add_argument("--again", action="store_true", help="measure what is done already, too")
    parser.add_argument("--repeats", type=int, help="steps of every contender that count (2; with --quick 1)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    short = options.quick or options.smoke
    output, repeats = options.output or (QUICK_OUTPUT if short else OUTPUT), options.repeats or (1 if short else 2)
    chosen = SMOKE if options.smoke else QUICK if options.quick else ALL
    chosen = [condition for condition in chosen if all(word in condition.name for word in options.only)]
    record = json.loads(output.read_text()) if output.exists() else {"conditions": {}, "provenance": {}}
    for number, condition in enumerate(chosen, 1):
        if condition.name in record["conditions"] and not options.again:
            continue
        print(f"{number} of {len(chosen)}: {condition.name}", flush=True)
        start = time.perf_counter()
        cell = measure(condition, repeats, heal=not short)
        record["conditions"][condition.name] = cell | {"seconds_taken": round(time.perf_counter() - start)}
        record["provenance"][condition.name] = describe() | {"threads": torch.get_num_threads()} | instructions()
        record["worst"] = worst(record["conditions"])
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, record)
    print(json.dumps(record.get("worst", {}), indent=1))


def instructions() -> dict[str, Any]:
    """What of the processor's instruction sets is used."""
    named = {name: os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    return {"instructions": torch.backends.cpu.get_cpu_capability()} | named


if __name__ == "__main__":
    sys.exit(main())
