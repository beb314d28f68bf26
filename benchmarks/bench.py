"""How fast sampling and the solve are, and what the loss takes, beside their alternatives, on this machine.

    python benchmarks/bench.py                      everything, into benchmarks/results/cpu.json (about half an hour)
    python benchmarks/bench.py --sections solve     one section; the others of an existing file are kept
    python benchmarks/bench.py --smoke              tiny sizes: does it run? (the numbers mean nothing)

Contenders take turns within every repetition, and every figure is the median of the ratios of one repetition, with
the smallest and the largest: on a shared machine an absolute time says little. Sections: solve, memory, sampling, cost
model. What the contenders are is said in each section's function. `performance.py` writes the tables.

Left out: whole steps (`conditions.py`) and growth with lengths, rows and vocabularies (`growth.py`).
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from pair import STOP, prompts, smollm2_pair
from transformers import PreTrainedModel
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from trb import TRBConfig, TRBTrainer, kernels, zoo
from trb.blend import solve
from trb.losses import chunked_reverse_kl
from trb.policies import BehaviorPolicy, StudentPolicy, TrustRegionPolicy
from trb.safety.files import write_text
from trb.sampling import sample
from trb.sampling.blocks import BlockChooser
from trb.sampling.cache import SlotReader
from trb.sampling.draw import inverse_cdf
from trb.sampling.speculative import _Sampler
from trb.studies.provenance import describe

OUTPUT = Path(__file__).parent / "results" / "cpu.json"
HEADLINE_BUDGET = 0.02


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest, to four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def ratios(table: dict[str, list[float]], numerator: str, denominator: str) -> dict[str, float]:
    """Spread of numerator / denominator, repetition by repetition."""
    return spread([a / b for a, b in zip(table[numerator], table[denominator], strict=True)])


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


# ---- (a) sampling ----


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of student-only, lockstep and speculative sampling, over budgets and batches.

    Lockstep is this package's reference sampler on the library's own cache. "block 1" is the speculative sampler that
    drafts one token at a time, which separates the gain of the cache from that of drafting.
    """
    student, teacher, tokenizer = smollm2_pair()
    student = student.to(torch.bfloat16).eval()
    rows = prompts(tokenizer, 16, 4, seed=11)
    tokens = 8 if options.smoke else 64
    budgets = (0.02,) if options.smoke else (0.05, 0.02, 0.005, 0.001)
    batches = (2,) if options.smoke else (1, 2, 8, 32)
    cells = []
    for batch in batches:
        for budget in budgets:
            cells.append(
                race_samplers(student, teacher, rows[:batch], budget, STOP, tokens, options.repeats)
                | {"pair": "smollm2", "stop": "natural"}
            )
            print(json.dumps(cells[-1]), flush=True)
    # Token 1 never ends a chat turn of this family and is next to impossible: every completion has the same length.
    fixed = race_samplers(
        student, teacher, rows[: batches[-1] if options.smoke else 8], 0.02, 1, tokens, options.repeats
    )
    cells.append(fixed | {"pair": "smollm2", "stop": "fixed length"})
    small_student, small_tokenizer = zoo.load("student")
    small_teacher, _ = zoo.load("teacher")
    problems = zoo.problems(32, seed=1, split="train")
    chats = [
        small_tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in problems
    ]
    stop = small_student.generation_config.eos_token_id
    for batch in batches:
        cell = race_samplers(
            small_student,
            small_teacher,
            chats[:batch],
            0.5,
            stop,
            48,
            options.repeats,
            teacher_stop=small_teacher.generation_config.eos_token_id,
        )
        cells.append(cell | {"pair": "zoo", "stop": "natural"})
    return {"cells": cells, "max_new_tokens": tokens}


def race_samplers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: list[list[int]],
    budget: float,
    stop: int,
    tokens: int,
    repeats: int,
    teacher_stop: int | None = None,
) -> dict[str, Any]:
    contenders: dict[str, tuple[str, BehaviorPolicy, dict[str, Any]]] = {
        "student": ("speculative", StudentPolicy(), {}),
        "lockstep": ("lockstep", TrustRegionPolicy(budget), {}),
        "speculative": ("speculative", TrustRegionPolicy(budget), {}),
        "planned": ("speculative", TrustRegionPolicy(budget), {"block_size": "planned"}),
        "block 1": ("speculative", TrustRegionPolicy(budget), {"block_size": 1}),
    }
    speed: dict[str, list[float]] = {name: [] for name in contenders}
    last: dict[str, Any] = {}
    for repeat in range(repeats + 1):
        for name, (method, policy, extra) in contenders.items():
            seconds, rollout = timed(
                lambda method=method, policy=policy, extra=extra, repeat=repeat: sample(
                    student,
                    teacher,
                    rows,
                    policy,
                    max_new_tokens=tokens,
                    eos_token_id=stop,
                    teacher_eos_token_id=teacher_stop,
                    seed=repeat,
                    method=method,
                    **extra,
                )
            )
            drawn = sum(map(len, rollout.completions))
            if repeat:  # the first round warms caches and is not counted
                speed[name].append(drawn / seconds)
            last[name] = rollout
    rollout = last["speculative"]
    drawn = sum(map(len, rollout.completions))
    return {
        "batch": len(rows),
        "kl_budget": budget,
        "tokens_per_second": {name: spread(values) for name, values in speed.items()},
        "speculative_over_lockstep": ratios(speed, "speculative", "lockstep"),
        "planned_over_lockstep": ratios(speed, "planned", "lockstep"),
        "block_1_over_lockstep": ratios(speed, "block 1", "lockstep"),
        "speculative_over_student": ratios(speed, "speculative", "student"),
        "accept_rate": sum(map(sum, rollout.stats.accepted)) / drawn,
        "mean_length": drawn / len(rows),
        # Passes while a row is in flight, for each of its tokens: rows of a batch share a pass.
        "teacher_passes_per_token": rollout.teacher_calls / max(map(len, rollout.completions)),
    }


# ---- the cost model ----


def cost_model(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second predicted from parts that were measured apart, against those measured.

    The student's pass and the verification come from blocks of one, the teacher's pass from the line through blocks of
    one and eight, the continuation rate from blocks of one. Blocks of 2 to 6 are then predicted.
    """
    student, teacher, tokenizer = smollm2_pair()
    student = student.to(torch.bfloat16).eval()
    rows = prompts(tokenizer, 8, 4, seed=41)
    tokens = 8 if options.smoke else 48
    cells = []
    for batch in (2,) if options.smoke else (2, 8, 32):
        parts = {block: timed_parts(student, teacher, rows[:batch], tokens, block, options.repeats) for block in (1, 8)}
        one, eight = parts[1], parts[8]
        slope = (eight["teacher"] - one["teacher"]) / (8 - 1)
        for block in (2, 3, 4, 6):
            measured = timed_parts(student, teacher, rows[:batch], tokens, block, options.repeats)
            yielded = sum(one["rate"] ** i for i in range(block))
            teacher_pass = one["teacher"] + slope * (block - 1)
            seconds = block * one["student"] + teacher_pass + yielded * one["verify"]
            cells.append(
                {
                    "batch": batch,
                    "block": block,
                    "continuation_rate": round(one["rate"], 4),
                    "student_pass_ms": round(1e3 * one["student"], 2),
                    "teacher_pass_ms": round(1e3 * teacher_pass, 2),
                    "verify_ms_per_position": round(1e3 * one["verify"], 2),
                    "predicted_tokens_per_round": round(yielded, 3),
                    "measured_tokens_per_round": round(measured["yielded"], 3),
                    "predicted_over_measured_speed": float(f"{yielded / seconds / measured['speed']:.4g}"),
                }
            )
            print(json.dumps(cells[-1]), flush=True)
    return {"cells": cells, "kl_budget": HEADLINE_BUDGET}


def timed_parts(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: list[list[int]], tokens: int, block: int, repeats: int
) -> dict[str, float]:
    """Median seconds of a student pass, a teacher pass and a position's verification, and tokens per row and second.

    All completions have the same length, so that every round has the same number of rows.
    """
    seen: dict[str, list[float]] = {"student": [], "teacher": [], "verify": [], "round": [], "yielded": []}
    verified = continued = 0

    def timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            seconds, result = timed(lambda: function(*arguments, **keywords))
            seen[name].append(seconds)
            return result

        return run

    def reading(reader: SlotReader, *arguments: Any) -> Any:
        seconds, result = timed(lambda: read(reader, *arguments))
        seen["student" if reader.model is student else "teacher"].append(seconds)
        return result

    def observing(chooser: BlockChooser, tested: int, went_on: int) -> None:
        nonlocal verified, continued
        verified, continued = verified + tested, continued + went_on
        seen["yielded"].append(tested / len(rows))
        observe(chooser, tested, went_on)

    read, observe = SlotReader.read, BlockChooser.observe
    with (
        mock.patch.object(SlotReader, "read", reading),
        mock.patch.object(BlockChooser, "observe", observing),
        mock.patch.object(_Sampler, "_verify", timing("verify", _Sampler._verify)),
        mock.patch.object(_Sampler, "_round", timing("round", _Sampler._round)),
    ):
        for repeat in range(repeats):
            sample(
                student,
                teacher,
                rows,
                TrustRegionPolicy(HEADLINE_BUDGET),
                max_new_tokens=tokens,
                eos_token_id=1,
                seed=repeat,
                block_size=block,
            )
    middle = {name: statistics.median(values) for name, values in seen.items()}
    yielded = statistics.mean(seen["yielded"])
    # What a round does besides reading and verifying is the student's draw, for the most part.
    rest = middle["round"] - block * middle["student"] - middle["teacher"] - middle["verify"]
    return {
        "student": middle["student"] + max(0.0, rest) / block,
        "teacher": middle["teacher"],
        "verify": middle["verify"] / yielded,
        "rate": continued / verified,
        "yielded": yielded,
        "speed": yielded / middle["round"],
    }


# ---- the trainers whose whole steps conditions.py times ----


def step_options(directory: str, batch: int, steps: int, *, bf16: bool) -> dict[str, Any]:
    """What every contender's trainer is told."""
    return {
        "output_dir": directory,
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "bf16": bf16,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def clone(model: PreTrainedModel) -> PreTrainedModel:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    return copy


def our_trainer(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    tokens: int,
    shared: dict[str, Any],
    knobs: dict[str, Any],
) -> TRBTrainer:
    args = TRBConfig(**{**shared, "max_completion_length": tokens, "loss_top_k": 0, "shuffle_dataset": False, **knobs})
    dataset = Dataset.from_list(rows)
    return TRBTrainer(model, teacher, args, train_dataset=dataset, processing_class=tokenizer)


def trl_trainer(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    tokens: int,
    shared: dict[str, Any],
) -> DistillationTrainer:
    args = DistillationConfig(
        **shared, max_completion_length=tokens, temperature=1.0, beta=1.0, shuffle_dataset=False, disable_dropout=True
    )
    repeated = Dataset.from_list([row for row in rows for _ in range(4)])
    return DistillationTrainer(model, teacher, args, train_dataset=repeated, processing_class=tokenizer)


def gkd_trainer(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    tokens: int,
    shared: dict[str, Any],
) -> GKDTrainer:
    args = GKDConfig(**shared, max_new_tokens=tokens, temperature=1.0, beta=1.0, lmbda=1.0, max_length=512)
    # GKD wants an answer in the data; with lmbda = 1 it never trains on it.
    answer = [{"role": "assistant", "content": "0"}]
    repeated = Dataset.from_list([{"messages": row["prompt"] + answer} for row in rows for _ in range(4)])
    return GKDTrainer(model, teacher, args, train_dataset=repeated, processing_class=tokenizer)


# ---- (b) the solve and the draw ----


def solves(options: argparse.Namespace) -> dict[str, Any]:
    """`solve` against 30 steps of bisection, two log-softmaxes and the token draw, on bf16 logits like a model's."""
    cells = []
    sizes = ((8, 1000),) if options.smoke else ((32, 32_000), (32, 49_152), (16, 151_936))
    for rows, vocabulary in sizes:
        for budget in (0.05, 0.02, 0.005, 0.001):
            cells.append(race_solvers(*model_like(rows, vocabulary), budget, options.repeats * 5))
            print(json.dumps(cells[-1]), flush=True)
    return {"cells": cells, "native": kernels.available()}


def model_like(rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with a head and a tail: a model's sorted logits fall about linearly in the logarithm of the rank."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    rank = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)]) + 1.0
    student = 12.0 - 1.6 * rank.log() + 0.5 * torch.randn(rows, vocabulary, generator=generator)
    teacher = student + 0.8 * torch.randn(rows, vocabulary, generator=generator)
    return student.bfloat16(), teacher.bfloat16()


def race_solvers(student: torch.Tensor, teacher: torch.Tensor, budget: float, repeats: int) -> dict[str, Any]:
    uniform = torch.rand(len(student), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = torch.softmax(student.float(), -1)
    contenders: dict[str, Callable[[], Any]] = {
        "solve": lambda: solve(student, teacher, budget),
        "eager solve": lambda: eagerly(student, teacher, budget),
        "two log-softmaxes": lambda: [torch.log_softmax(x, -1, dtype=torch.float32) for x in (student, teacher)],
        "draw": lambda: inverse_cdf(probs, uniform),
        "multinomial": lambda: torch.multinomial(probs, 1),
        "bisection": lambda: bisection(student, teacher, budget),
    }
    table: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, function in contenders.items():
            if name == "bisection" and repeat > max(3, repeats // 5):
                table[name].append(table[name][-1])
                continue
            function()  # the contender before it may have given the memory back that this one is about to use
            seconds, _ = timed(function)
            if repeat:
                table[name].append(seconds)
    return {
        "rows": len(student),
        "vocabulary": student.shape[-1],
        "kl_budget": budget,
        "solve_over_bisection_speedup": ratios(table, "bisection", "solve"),
        "solve_over_two_log_softmax": ratios(table, "solve", "two log-softmaxes"),
        "eager_solve_over_two_log_softmax": ratios(table, "eager solve", "two log-softmaxes"),
        "draw_over_solve": ratios(table, "draw", "solve"),
        "multinomial_over_draw": ratios(table, "multinomial", "draw"),
        "median_passes": solve(student, teacher, budget).passes.double().median().item(),
    }


def eagerly(student: torch.Tensor, teacher: torch.Tensor, budget: float) -> Any:
    with mock.patch.object(kernels, "available", return_value=False):
        return solve(student, teacher, budget)


def bisection(student: torch.Tensor, teacher: torch.Tensor, budget: float) -> torch.Tensor:
    """The paper's way, in torch: 30 halvings of the teacher weight."""
    log_student, log_teacher = (torch.log_softmax(x, -1, dtype=torch.float32) for x in (student, teacher))
    low, high = torch.zeros(2, len(student), 1)
    high = high + 1
    for _ in range(30):
        middle = (low + high) / 2
        path = torch.log_softmax((1 - middle) * log_student + middle * log_teacher, dim=-1)
        feasible = (path.exp() * (path - log_student)).sum(-1, keepdim=True) <= budget
        low, high = torch.where(feasible, middle, low), torch.where(feasible, high, middle)
    return torch.log_softmax((1 - low) * log_student + low * log_teacher, dim=-1)


# ---- (c) peak memory of the loss ----


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Growth of the resident peak over one loss and its backward pass, ours and TRL's, in processes of their own."""
    cells = []
    for tokens in (64,) if options.smoke else (1024, 4096, 16384):
        cell: dict[str, Any] = {"tokens": tokens, "vocabulary": 49_152, "hidden_size": 576}
        for name in ("ours", "trl"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                cell[f"{name}_megabytes"] = pool.apply(loss_peak, (name, tokens))
        cell["logits_megabytes"] = tokens * 49_152 * 4 / 1e6
        cells.append(cell)
        print(json.dumps(cell), flush=True)
    return {"cells": cells}


def loss_peak(name: str, tokens: int) -> float:
    """Megabytes by which the peak rose during the loss, beyond weights, hidden states and their gradients."""
    torch.manual_seed(0)
    head, teacher_head = (torch.nn.Linear(576, 49_152, bias=False) for _ in range(2))
    hidden, taught = torch.randn(1, tokens, 576), torch.randn(1, tokens, 576)
    hidden.requires_grad_()
    ids, mask = torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens, dtype=torch.long)
    head.weight.grad, hidden.grad = torch.ones_like(head.weight), torch.ones_like(hidden)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "ours":
        loss, _ = chunked_reverse_kl(hidden, taught, head, teacher_head, ids, mask, k=0)
    else:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        loss, *_ = _chunked_divergence_loss(hidden, taught, head.weight, teacher_head.weight, mask, 1.0)
    loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


# ---- all of it ----

SECTIONS = {
    "solve": solves,
    "memory": memory,
    "sampling": sampling,
    "cost model": cost_model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=3, help="counted repetitions of every contender")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.repeats = 1
    record = json.loads(options.output.read_text()) if options.output.exists() else {"results": {}, "provenance": {}}
    for name in options.sections:
        start = time.perf_counter()
        found = SECTIONS[name](options)
        record["results"][name] = found | {"seconds_taken": round(time.perf_counter() - start)}
        record["provenance"][name] = describe() | {"threads": torch.get_num_threads()}
        write_text(options.output, json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
