"""How sampling grows with the length of completions, the rows at once and the vocabulary, beside what physics allows.

    python benchmarks/growth.py                  every point that is missing, into benchmarks/results/growth.json
    python benchmarks/growth.py --only rows      those whose names have all of these words; --again: measured anew
    python benchmarks/growth.py --smoke          tiny sizes: does it run? (the numbers mean nothing)

The student alone and the blend at ε = 0.02, in float32, every completion of the same length. Lengths and rows are of
SmolLM2-135M and its copy cut to 8 layers, as it was cut; vocabularies are of small random models, of which little but
the head grows. Times are processor seconds of the sampler's rounds, which leave out the reading of prompts.

The floor of a model's passes is the larger of two times: reading its weights once a pass at the rate of a copy, and
multiplying every token that was drawn by them once at the rate of a large matrix product. Both rates are measured
before every point, so that what else the machine does meets them too. Keys, values, logits and dropped drafts are not
in it.

Left out: alternatives (`bench.py`), whole steps (`conditions.py`), GPUs (`gpu.py`), tables (`performance.py`).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from pair import NEVER_ID, prompts, smollm2_pair
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trb.models.memory import cache_entries
from trb.policies import BehaviorPolicy, StudentPolicy, TrustRegionPolicy
from trb.safety.files import write_json
from trb.sampling import sample
from trb.sampling.speculative import _Sampler
from trb.studies.provenance import describe

OUTPUT = Path(__file__).parent / "results" / "growth.json"
BUDGET = 0.02
CONTENDERS: dict[str, BehaviorPolicy] = {"student alone": StudentPolicy(), "blend": TrustRegionPolicy(BUDGET)}
LENGTHS = (64, 128, 256, 512, 1024, 2048)
ROWS = (1, 4, 16, 64, 256)
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)


class Point(NamedTuple):
    """What is sampled: `marks` are the lengths up to which rates are taken, each from half of it on."""

    sweep: str
    contender: str
    rows: int
    marks: tuple[int, ...]
    vocabulary: int | None = None

    @property
    def name(self) -> str:
        value = {"length": max(self.marks), "rows": self.rows, "vocabulary": self.vocabulary}[self.sweep]
        return f"{self.sweep} {value}, {self.contender}"


def points(smoke: bool) -> list[Point]:
    if smoke:
        sweeps = [("length", 2, (4, 8), None), ("rows", 2, (4,), None), ("vocabulary", 2, (4,), 512)]
    else:
        sweeps = [
            *(("vocabulary", 8, (32,), vocabulary) for vocabulary in VOCABULARIES),
            *(("rows", rows, (32,), None) for rows in ROWS),
            ("length", 1, LENGTHS, None),
        ]
    return [
        Point(sweep, contender, rows, marks, vocabulary)
        for sweep, rows, marks, vocabulary in sweeps
        for contender in CONTENDERS
    ]


# ---- the models ----


@cache
def smollm2() -> tuple[PreTrainedModel, PreTrainedModel, Any]:
    student, teacher, tokenizer = smollm2_pair(heal=False)
    return student.eval(), teacher.float().eval(), tokenizer


def small_model(vocabulary: int, layers: int, seed: int) -> PreTrainedModel:
    """Random weights, wide enough apart that the budget binds at every token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def models_and_rows(point: Point) -> tuple[PreTrainedModel, PreTrainedModel, list[list[int]]]:
    """Student, teacher, and prompts all different."""
    if point.vocabulary is None:
        student, teacher, tokenizer = smollm2()
        return student, teacher, prompts(tokenizer, point.rows, 1, seed=31)
    rows = [[2 + 7 * row + place for place in range(16)] for row in range(point.rows)]
    return small_model(point.vocabulary, 2, 1), small_model(point.vocabulary, 4, 2), rows


def weights(model: PreTrainedModel) -> int:
    """Numbers that a pass multiplies by: all weights, but for embeddings that are not the head too."""
    apart = model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    return model.num_parameters() - (model.get_input_embeddings().weight.numel() if apart else 0)


# ---- what a point takes ----


class Moment(NamedTuple):
    """Where a sampler stands after a round: `slots` are bytes of keys and values of all models."""

    cpu: float
    wall: float
    drawn: int
    student_calls: int
    teacher_calls: int
    slots: int


def moments(point: Point) -> tuple[list[Moment], dict[str, Any]]:
    """Every round of a call, the first entry before it, and what the models weigh."""
    student, teacher, rows = models_and_rows(point)
    seen: list[Moment] = []
    play, drawn = _Sampler._round, 0

    def now(sampler: _Sampler) -> Moment:
        second = sampler.teacher
        held = sum(reader._state.bytes for reader in sampler._readers)
        calls = sampler.student.calls, 0 if second is None else second.calls
        return Moment(time.process_time(), time.perf_counter(), drawn, *calls, held)

    def watched(sampler: _Sampler, flying: list[Any]) -> list[int]:
        nonlocal drawn
        if not seen:
            seen.append(now(sampler))
        before = sum(len(row.completion) for row in flying)
        members = list(flying)
        finished = play(sampler, flying)
        drawn += sum(len(row.completion) for row in members) - before
        seen.append(now(sampler))
        return finished

    policy = CONTENDERS[point.contender]
    options: dict[str, Any] = {"eos_token_id": NEVER_ID, "seed": 1}
    sample(student, teacher, rows[:1], policy, max_new_tokens=2, **options)  # the first call compares ways of reading
    with mock.patch.object(_Sampler, "_round", watched):
        rollout = sample(student, teacher, rows, policy, max_new_tokens=max(point.marks), **options)
    if {*map(len, rollout.completions)} != {max(point.marks)}:
        raise RuntimeError(f"a completion of {point.name} ended before its time")
    blended = policy.needs_teacher
    entries = [cache_entries(model) for model in ([student, teacher] if blended else [student])]
    return seen, {
        "student_weights": weights(student),
        "teacher_weights": weights(teacher) if blended else 0,
        "vocabulary": student.config.vocab_size,
        "head_bytes": 4 * student.get_output_embeddings().weight.numel(),
        "bytes_per_position": 4 * sum(entries),
        "longest_prompt": max(map(len, rows)),
    }


def measure(point: Point) -> dict[str, Any]:
    """Rates of the machine, and of the point a window for each of its marks."""
    rates = {"copy_bytes_per_second": copy_rate(), "flops_per_second": product_rate()}
    seen, sizes = moments(point)
    found = [window(point, mark, seen, sizes) for mark in point.marks]
    return point._asdict() | sizes | rates | {"windows": found}


def window(point: Point, mark: int, seen: list[Moment], sizes: dict[str, Any]) -> dict[str, Any]:
    """Processor and wall seconds from the round at which rows are half of `mark` long on the average to that at which
    they are all of it, and the passes between; a single mark is taken from the beginning."""
    first = 0 if len(point.marks) == 1 else mark // 2
    start, end = (next(moment for moment in seen if moment.drawn >= length * point.rows) for length in (first, mark))
    return {
        "tokens": mark,
        "drawn": end.drawn - start.drawn,
        "seconds": end.cpu - start.cpu,
        "wall_seconds": end.wall - start.wall,
        "student_passes": end.student_calls - start.student_calls,
        "teacher_passes": end.teacher_calls - start.teacher_calls,
        "slot_bytes_per_row": end.slots / point.rows,
        "needed_bytes_per_row": sizes["bytes_per_position"] * (sizes["longest_prompt"] + mark),
    }


def floor_seconds(point: dict[str, Any], window: dict[str, Any]) -> float:
    """What the passes of a window of a measured point take at the least, in float32."""
    seconds = 0.0
    for model in ("student", "teacher"):
        numbers = point[f"{model}_weights"]
        read = 4 * numbers * window[f"{model}_passes"] / point["copy_bytes_per_second"]
        products = 2 * numbers * window["drawn"] / point["flops_per_second"]
        seconds += max(read, products)
    return seconds


def best(function: Callable[[], Any], times: int = 3) -> float:
    """The fewest processor seconds of a few calls."""

    def seconds() -> Iterator[float]:
        for _ in range(times):
            start = time.process_time()
            function()
            yield time.process_time() - start

    function()
    return min(seconds())


def copy_rate() -> float:
    """Bytes per second of a copy that no cache holds: those read and those written."""
    source, target = torch.zeros(2, 1 << 26)
    return 2 * source.nbytes / best(lambda: target.copy_(source))


def product_rate() -> float:
    """Floating-point operations per second of a square matrix product in float32."""
    width = 1024
    matrix = torch.rand(width, width)
    return 2 * width**3 / best(lambda: matrix @ matrix)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="points whose names have all of these")
    parser.add_argument("--again", action="store_true", help="measure what is done already, too")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--busy", action="store_true", help="note that the machine does other work meanwhile")
    options = parser.parse_args()
    record = json.loads(options.output.read_text()) if options.output.exists() else {"points": {}, "provenance": {}}
    record |= {"kl_budget": BUDGET, "dtype": "float32"}
    for point in points(options.smoke):
        done = point.name in record["points"] and not options.again
        if done or not all(word in point.name for word in options.only):
            continue
        with torch.inference_mode():
            record["points"][point.name] = found = measure(point)
        threads = {"threads": torch.get_num_threads(), "busy": options.busy}
        record["provenance"][point.name] = describe() | threads
        for entry in record["points"].values():
            for one in entry["windows"]:
                one["floor_seconds"] = floor_seconds(entry, one)
        write_json(options.output, record)
        last = found["windows"][-1]
        print(f"{point.name}: {last['drawn'] / last['seconds']:.0f} tokens per processor second", flush=True)


if __name__ == "__main__":
    sys.exit(main())
