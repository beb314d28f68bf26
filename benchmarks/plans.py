"""The plans of docs/scaling.md: the paper's pairs on one node, a large pair on several, and one GPU that was run.

    python benchmarks/plans.py              into benchmarks/results/plans.json, and the tables of docs/scaling.md
    python benchmarks/plans.py --check      fail if either would change

Nothing is run: `trb.planning` works from the shapes in benchmarks/shapes (the published configurations) and from the
figures of `trb.planning.machines`. The recipes give the protocol. The last section predicts what gpu.json measured.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pages
import torch
from pages import table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trb.planning import Layout, Pair, Plan, Work, find_machine, make_plan, run_seconds
from trb.safety.files import write_text
from trb.schedule import kl_budget
from trb.studies.provenance import describe
from trb.studies.recipe import load_recipe

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "plans.json"
CHECK = ROOT / "benchmarks" / "results" / "plan_check.json"
GPU_RUN = ROOT / "benchmarks" / "results" / "gpu.json"
PAGE = ROOT / "docs" / "scaling.md"
STEPS, WARMUP = 400, 25
PAIRS = {
    "1.7B <- 8B": ("qwen3-1.7b", "qwen3-8b", "qwen3-1.7b-from-8b"),
    "0.6B <- 4B": ("qwen3-0.6b", "qwen3-4b", "qwen3-0.6b-from-4b"),
    "70B <- 405B": ("llama-70b", "llama-405b", "qwen3-1.7b-from-8b"),
}
# Completions shorter than the longest: what the protocol allows is not what a base model writes.
MEAN_COMPLETION = 2048


@cache
def shape(name: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(ROOT / "benchmarks" / "shapes" / name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def pair_and_work(name: str) -> tuple[Pair, Work]:
    student, teacher, recipe_name = PAIRS[name]
    recipe = load_recipe(recipe_name)
    run, args = recipe.run, recipe.training_config("unused")
    work = Work(
        rollouts=(run.prompts_per_step or 0) * args.num_generations,
        generations=args.num_generations,
        prompt=run.max_prompt_length,
        completion=int(args.max_completion_length or 0),
        micro_batch=args.per_device_train_batch_size,
        rows=args.rollout_batch_size,
        kl_budget=args.initial_kl_budget,
        checkpointing=bool(args.gradient_checkpointing),
    )
    return Pair(shape(student), shape(teacher)), work


# (pair, label, layout, changes to the protocol's work)
LAYOUTS: tuple[tuple[str, str, Layout, dict[str, Any]], ...] = tuple(
    (pair, label, layout, {"mean_completion": MEAN_COMPLETION, **changes})
    for pair in ("1.7B <- 8B", "0.6B <- 4B")
    for label, layout, changes in (
        ("DDP, in process, rows of the recipe", Layout(8), {}),
        ("the same, passes launched eagerly", Layout(8, eager_sampling=True), {}),
        ("FSDP2, in process, rows of the recipe", Layout(8, "fsdp"), {}),
        ("FSDP2, in process, as many rows as fit", Layout(8, "fsdp"), {"rows": "fit"}),
        ("ZeRO-3, in process, rows of the recipe", Layout(8, "zero3"), {}),
        ("FSDP2, vLLM on the same eight", Layout(8, "fsdp", "vllm"), {}),
        ("FSDP2 on four, vLLM on four", Layout(8, "fsdp", "vllm", engine_accelerators=4), {}),
    )
) + tuple(
    ("70B <- 405B", label, layout, {"mean_completion": MEAN_COMPLETION, **changes})
    for label, layout, changes in (
        ("FSDP2 on 64, in process", Layout(64, "fsdp", teacher_sharded=True), {"micro_batch": 1, "rows": 1}),
        ("FSDP2 on 64, vLLM on 64", Layout(128, "fsdp", "vllm", 64, teacher_sharded=True), {"micro_batch": 1}),
        ("FSDP2 on 256, vLLM on 64", Layout(320, "fsdp", "vllm", 64, teacher_sharded=True), {"micro_batch": 1}),
    )
)


def plan_of(pair_name: str, layout: Layout, changes: dict[str, Any]) -> tuple[Plan, Work, float]:
    """The plan, its work, and the hours of the protocol's 400 steps, the first 25 of them blended."""
    pair, work = pair_and_work(pair_name)
    machine = find_machine("h100")
    if changes.get("rows") == "fit":
        changes = changes | {"rows": int(make_plan(pair, work, layout, machine).numbers["rows_that_fit"])}
    work = replace(work, **changes)
    budgets = [kl_budget(step, work.kl_budget, WARMUP, "linear") for step in range(STEPS)]

    def make(budget: float) -> Plan:
        return make_plan(pair, replace(work, kl_budget=budget), layout, machine)

    return make(work.kl_budget), work, run_seconds(make, budgets) / 3600


def plans() -> list[dict[str, Any]]:
    found = []
    for pair_name, label, layout, changes in LAYOUTS:
        plan, work, hours = plan_of(pair_name, layout, changes)
        entry = {"pair": pair_name, "label": label, "layout": asdict(layout), "work": asdict(work)}
        found.append(entry | plan.as_dict() | {"peak": plan.peak, "hours": hours})
    return rounded(found)


def against_the_gpu_run() -> list[dict[str, Any]]:
    """Sampling in gpu.json, passes replayed as graphs, beside the plan's."""
    report = json.loads(GPU_RUN.read_text())
    numbers, shapes = report["sections"]["time_sampling"]["numbers"], report["shapes"]
    pair = Pair(shape("qwen3-1.7b"), shape("qwen3-8b"), student_dtype="bfloat16", compute_dtype=None)
    found = []
    for batch in shapes["batches"]:
        for block in (*shapes["block_sizes"], None):
            name = f"trust region, batch {batch}, speculative, blocks of {block}, graphs"
            measured = numbers[name if block else f"student, batch {batch}, speculative, graphs"]
            work = Work(
                rollouts=batch,
                generations=1,
                prompt=shapes["prompt"],
                completion=shapes["new_tokens"],
                micro_batch=batch,
                kl_budget=0.02 if block else 0.0,
                acceptance=measured["acceptance"],
                block_size=block or 1,
            )
            plan = make_plan(pair, work, Layout(1), find_machine("h100"))
            parts = plan.warmup if block else plan.plain
            names = ("reading prompts", "drafting", "teacher's block passes", "deciding")
            seconds = sum(parts[name] for name in names)
            passes = plan.numbers["rounds"] * (block or 1) / shapes["new_tokens"]
            found.append(
                {
                    "batch": batch,
                    "block": block or "student alone",
                    "predicted_s": seconds,
                    "measured_s": measured["seconds"],
                    "ratio": seconds / measured["seconds"],
                    "predicted_student_passes_per_token": passes,
                    "measured_student_passes_per_token": measured["student_passes_per_token"],
                }
            )
    return rounded(found)


def rounded(value: Any) -> Any:
    """Numbers to six digits, so that a file does not change with the last bit."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


# ---- the tables of the page ----


def seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def layouts_table(report: dict[str, Any], pair: str) -> str:
    rows = []
    for plan in report["plans"]:
        if plan["pair"] != pair:
            continue
        sampling = plan["memory"].get("sampling") or plan["memory"]["engine"]
        memory = [sum(parts.values()) / 1e9 for parts in (sampling, plan["memory"]["update"])]
        times = [sum(plan[kind].values()) for kind in ("warmup", "plain")]
        fits = not any("needs" in problem for problem in plan["problems"])
        rows.append(
            [
                plan["label"],
                " / ".join(f"{size:.0f}" for size in memory),
                f"{sum(plan['traffic'].values()) / 1e9:,.0f}",
                f"{plan['numbers']['rows_in_flight']:.0f}",
                f"{plan['numbers']['block_size']:.0f}",
                *(seconds(value) if fits else "-" for value in times),
                f"{plan['hours']:.1f}" if fits else "does not fit",
            ]
        )
    headings = (
        "layout",
        "GB: sampling / update",
        "GB received",
        "rows",
        "block",
        "blended, s",
        "plain, s",
        "hours",
    )
    return table(headings, rows)


def parts_table(report: dict[str, Any], label: str) -> str:
    plan = next(each for each in report["plans"] if each["pair"] == "1.7B <- 8B" and each["label"] == label)
    rows = [[name, seconds(plan["warmup"][name]), seconds(plan["plain"][name])] for name in plan["plain"]]
    total = ["total", *(seconds(sum(plan[kind].values())) for kind in ("warmup", "plain"))]
    return table(("part", "blended step, s", "plain step, s"), [*rows, total])


def memory_table(report: dict[str, Any]) -> str:
    labels = {
        "DDP": "DDP, in process, rows of the recipe",
        "FSDP2": "FSDP2, in process, rows of the recipe",
        "ZeRO-3": "ZeRO-3, in process, rows of the recipe",
    }
    plans_of_pair = {each["label"]: each["memory"] for each in report["plans"] if each["pair"] == "1.7B <- 8B"}
    found = {name: plans_of_pair[label] for name, label in labels.items()}
    every = dict.fromkeys(part for memory in found.values() for phase in memory.values() for part in phase)
    rows = []
    for part in every:
        sizes = [memory["update"].get(part, memory["sampling"].get(part)) for memory in found.values()]
        phases = [phase for phase in ("sampling", "update") if any(part in memory[phase] for memory in found.values())]
        shown = ("" if size is None else f"{size / 1e9:.2f}" for size in sizes)
        rows.append([part, "both" if len(phases) == 2 else phases[0], *shown])
    return table(("GB on each of 8 GPUs", "phase", *found), rows)


def problems_list(report: dict[str, Any]) -> str:
    return "\n".join(
        f"- {plan['label']}: {problem}."
        for plan in report["plans"]
        if plan["pair"] == "70B <- 405B"
        for problem in plan["problems"]
    )


def gpu_table(report: dict[str, Any]) -> str:
    rows = [
        [
            str(row["batch"]),
            str(row["block"]),
            f"{row['predicted_s']:.2f}",
            f"{row['measured_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['predicted_student_passes_per_token']:.2f}",
            f"{row['measured_student_passes_per_token']:.2f}",
        ]
        for row in report["against the GPU run"]
    ]
    passes = ("student passes per token, predicted", "measured")
    return table(("batch", "block", "predicted, s", "measured, s", "predicted / measured", *passes), rows)


def figures_table(report: dict[str, Any]) -> str:
    return table(
        ("figure", "H100", "kind", "source"),
        ([name, f"{each['value']:.4g}", each["kind"], each["source"]] for name, each in report["machine"].items()),
    )


def check_table(kind: str) -> Callable[[dict[str, Any]], str]:
    """Predicted, measured and their ratio in plan_check.json, a column for each of its four runs."""

    def tabulate(_: dict[str, Any]) -> str:
        results = json.loads(CHECK.read_text())["results"]
        unit, form = (1e6, ".1f") if kind != "seconds" else (1.0, ".3f")
        rows = []
        for name in dict.fromkeys(name for run in results.values() for name in run[kind]):
            cells = []
            for run in results.values():
                found = run[kind].get(name)
                if found is None or "ratio" not in found:
                    cells.append("")
                    continue
                pair = f"{found['predicted'] / unit:{form}} / {found['measured'] / unit:{form}}"
                cells.append(f"{pair} = {found['ratio']:.2f}")
            rows.append([name, *cells])
        return table((f"{'MB' if unit > 1 else 's'}: predicted / measured", *results), rows)

    return tabulate


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "memory": memory_table,
    "parts": lambda report: parts_table(report, "FSDP2, in process, as many rows as fit"),
    "1.7B": lambda report: layouts_table(report, "1.7B <- 8B"),
    "0.6B": lambda report: layouts_table(report, "0.6B <- 4B"),
    "70B": lambda report: layouts_table(report, "70B <- 405B"),
    "70B problems": problems_list,
    "gpu": gpu_table,
    "figures": figures_table,
    "check seconds": check_table("seconds"),
    "check bytes": check_table("bytes"),
}


def filled(page: str, report: dict[str, Any]) -> str:
    """The page with every table between its markers."""
    return pages.filled(page, {name: partial(make, report) for name, make in TABLES.items()})


def make_report() -> dict[str, Any]:
    return {
        "provenance": describe(),
        "steps": STEPS,
        "blended_steps": WARMUP,
        "machine": {name: figure._asdict() for name, figure in find_machine("h100").figures().items()},
        "plans": plans(),
        "against the GPU run": against_the_gpu_run(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file or the page would change")
    options = parser.parse_args()
    report, page = make_report(), PAGE.read_text(encoding="utf-8")
    if options.check:
        before = json.loads(OUTPUT.read_text())
        stale = [name for name in report if name != "provenance" and report[name] != before[name]]
        stale += [] if filled(page, before) == page else ["docs/scaling.md"]
        print(f"out of date: {', '.join(stale)}; run python benchmarks/plans.py" if stale else "up to date")
        return 1 if stale else 0
    write_text(OUTPUT, json.dumps(report, indent=1) + "\n")
    write_text(PAGE, filled(page, report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
