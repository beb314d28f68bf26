"""`trb doctor --plan`: memory, traffic and time of a step on machines that need not be at hand.

Asks `trb.planning` and prints its answer, with the assumptions. Left out: anything measured here and now.
"""

import argparse
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trb.cli.display import new_console, printable
from trb.errors import InputError, calls

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trb.planning import Layout, Machine, Pair, Plan, Shape, Work
    from trb.studies.keys import RunConfig
    from trb.studies.recipe import Recipe
    from trb.training.config import TRBConfig


# What the fields of a layout are called here, where messages name them.
OPTIONS = {"engine_accelerators": "--engine-gpus", "engine": "--engine", "tensor_parallel": "--tensor-parallel"}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("planning", "predict memory, traffic and time of a step; nothing is run")
    add = group.add_argument
    add("--plan", action="store_true", help="plan for the recipe of --config, or for a pair with the protocol's sizes")
    add("--machine", default="h100", metavar="NAME", help="h100, a100, cpu or a JSON file (default: h100)")
    add("--gpus", type=int, metavar="N", help="accelerators of a node (default: all it has)")
    add("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    add("--strategy", default="ddp", help="how the student is trained: ddp, fsdp or zero3 (default: ddp)")
    add("--engine", default="in-process", help="what samples: in-process or vllm (default: in-process)")
    add("--engine-gpus", type=int, default=0, metavar="N", help="accelerators of vLLM's own (default: 0, all shared)")
    add("--tensor-parallel", type=int, metavar="N", help="accelerators per copy of vLLM's models (default: fewest)")
    add("--shard-teacher", action="store_true", help="ranks share the loss's teacher instead of each holding it")
    add("--eager-sampling", action="store_true", help="sampling launches kernel by kernel, not by CUDA graphs")
    add("--mean-completion", type=float, metavar="N", help="mean tokens of a completion (default: the longest)")
    add("--acceptance", type=float, metavar="A", help="rate at which drafts are kept (default: the budget's bound)")
    add("--json", action="store_true", help="print the plan as JSON")


def run_plan(recipe: "Recipe", arguments: argparse.Namespace) -> int:
    """Print the plan of a recipe; 1 if it does not fit."""
    from trb.cli.outline import outlined_pairs
    from trb.planning import Layout, Shape, find_machine, make_plan

    machine, args = find_machine(arguments.machine), recipe.training_config("unused")
    with calls(OPTIONS):
        layout = Layout(
            accelerators=_accelerators(arguments, machine),
            strategy=arguments.strategy,
            engine=arguments.engine,
            engine_accelerators=arguments.engine_gpus,
            tensor_parallel=arguments.tensor_parallel,
            teacher_sharded=arguments.shard_teacher or args.teacher_sharded,
            eager_sampling=arguments.eager_sampling,
        )
    pair = pair_of_all(recipe.run, args, outlined_pairs(recipe.run, weights=False))
    work = work_of(
        recipe.run,
        args,
        layout.ranks,
        mean_completion=arguments.mean_completion,
        acceptance=arguments.acceptance,
    )
    plan = make_plan(pair, work, layout, machine)
    run = _whole_run(recipe, args, pair, work, layout, machine)
    if arguments.json:
        print(json.dumps(_report(recipe, pair, work, layout, machine, plan, run), indent=1))
    else:
        _print(recipe, Shape.of(pair.student), Shape.of(pair.teacher), work, layout, machine, plan, run)
    return 1 if plan.problems else 0


def _accelerators(arguments: argparse.Namespace, machine: "Machine") -> int:
    per_node = int(machine.per_node.value)
    gpus = per_node if arguments.gpus is None else arguments.gpus
    if not 1 <= gpus <= per_node:
        raise InputError(f"--gpus={gpus} is out of range: a node of {machine.name} has {per_node}; see --nodes")
    if arguments.nodes < 1:
        raise InputError(f"--nodes must be at least 1, got {arguments.nodes}")
    if arguments.nodes > 1 and gpus != per_node:
        raise InputError(f"with several nodes all {per_node} accelerators of each are used: drop --gpus={gpus}")
    return gpus * arguments.nodes


def pair_of(run: "RunConfig", args: "TRBConfig", student: "PreTrainedModel", teacher: "PreTrainedModel") -> "Pair":
    """What a plan needs to know of the models of a recipe, whose weights may be missing."""
    from trb.planning import Pair

    if run.lora_rank:
        student.requires_grad_(False)
    dtypes = run.student_dtype, run.teacher_dtype, args.autocast_dtype
    replica = None if args.replica_dtype == "auto" else args.replica_dtype
    return Pair(student, teacher, *dtypes, replica, run.teacher_quantization)


def pair_of_all(
    run: "RunConfig", args: "TRBConfig", pairs: "Mapping[str | None, tuple[PreTrainedModel, PreTrainedModel]]"
) -> "Pair":
    """The student with the largest of its teachers, beside which the others lie, unless they wait in main memory."""
    from dataclasses import replace

    from trb.models.sharing import own_weights

    def size(pair: "Pair") -> float:
        own = sum(weight.numel() for _, weight in own_weights(pair.teacher, pair.student))
        return pair.teacher_weight_bytes * own

    every = [pair_of(each, args, *pairs[name]) for name, each in run.pairs().items()]
    largest = max(every, key=size)
    others = 0.0 if args.teacher_offload else sum(size(pair) for pair in every if pair is not largest)
    return replace(largest, others=others)


def work_of(
    run: "RunConfig",
    args: "TRBConfig",
    ranks: int,
    *,
    mean_completion: float | None = None,
    acceptance: float | None = None,
) -> "Work":
    """What a step of a recipe does, trained on by so many processes."""
    from trb.studies.material import longest_teacher_prompt

    taught = longest_teacher_prompt(run, args)
    return step_of(run, args, ranks, taught, mean_completion=mean_completion, acceptance=acceptance)


def step_of(
    run: "RunConfig",
    args: "TRBConfig",
    ranks: int,
    taught: int | None,
    *,
    mean_completion: float | None = None,
    acceptance: float | None = None,
) -> "Work":
    """`work_of` without a look into the data: `taught` is what `longest_teacher_prompt` finds there."""
    from trb.planning import Work, step_budget
    from trb.training.methods import behavior_of

    batch = args.per_device_train_batch_size
    if run.prompts_per_step is None:
        rollouts = batch * args.gradient_accumulation_steps * ranks
    else:
        rollouts = run.prompts_per_step * args.num_generations
    completion = int(args.max_completion_length or 0)
    return Work(
        rollouts=rollouts,
        generations=args.num_generations,
        prompt=run.max_prompt_length,
        teacher_prompt=taught,
        completion=completion,
        mean_completion=mean_completion,
        micro_batch=batch,
        rows=args.rollout_batch_size,
        kl_budget=step_budget(behavior_of(args), 0, completion if mean_completion is None else mean_completion),
        acceptance=acceptance,
        block_size=args.block_size,
        checkpointing=bool(args.gradient_checkpointing),
        loss_chunk=args.loss_chunk_tokens,
    )


def _whole_run(
    recipe: "Recipe", args: "TRBConfig", pair: "Pair", work: "Work", layout: "Layout", machine: "Machine"
) -> dict[str, float] | None:
    """Steps and hours of the run; None where the recipe does not say how many steps it has."""
    from dataclasses import replace

    from trb.planning import make_plan, run_seconds, step_budget
    from trb.training.methods import behavior_of

    prompts = work.rollouts // work.generations
    if args.max_steps > 0:
        steps = args.max_steps
    elif recipe.run.train_limit:
        steps = math.ceil(recipe.run.train_limit * args.num_train_epochs / prompts)
    else:
        return None
    behavior = behavior_of(args, lambda: steps)
    budgets = [step_budget(behavior, step, work.mean) for step in range(steps)]
    seconds = run_seconds(
        lambda budget: make_plan(pair, replace(work, kl_budget=budget), layout, machine),
        budgets,
    )
    blended = sum(budget > 0 for budget in budgets)
    return {"steps": steps, "blended_steps": blended, "hours": seconds / 3600}


def _report(
    recipe: "Recipe",
    pair: "Pair",
    work: "Work",
    layout: "Layout",
    machine: "Machine",
    plan: "Plan",
    run: dict[str, float] | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    from trb.planning import Shape
    from trb.safety.files import finite
    from trb.studies.provenance import describe

    return {
        "provenance": describe(),
        "student": {"name": recipe.run.student, **asdict(Shape.of(pair.student))},
        "teacher": {"name": recipe.run.taught_by, **asdict(Shape.of(pair.teacher))},
        "work": finite(asdict(work)),
        "layout": asdict(layout),
        "machine": {name: figure._asdict() for name, figure in machine.figures().items()},
        **plan.as_dict(),
        "peak": plan.peak,
        "usable": machine.usable,
        "run": run,
    }


# ---- tables ----


def _print(
    recipe: "Recipe",
    student: "Shape",
    teacher: "Shape",
    work: "Work",
    layout: "Layout",
    machine: "Machine",
    plan: "Plan",
    run: dict[str, float] | None,
) -> None:
    console = new_console()

    def say(text: str, style: str | None = None) -> None:
        console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)

    say(
        f"{recipe.run.student} ({student.parameters / 1e9:.2f} B) <- {recipe.run.taught_by} "
        f"({teacher.parameters / 1e9:.2f} B), {layout.accelerators} x {machine.name}, {layout.strategy}, "
        f"{layout.engine}{', engine on ' + str(layout.engine_accelerators) if layout.engine_accelerators else ''}"
    )
    say(
        f"{work.rollouts} completions of {work.mean:.0f} tokens (at most {work.completion}) after prompts of "
        f"{work.prompt}, {work.micro_batch} to a micro-batch"
    )
    console.print(_memory_table(plan, machine))
    console.print(_column_table("traffic received by a rank", "GB a step", plan.traffic, 1e9))
    console.print(_time_table(plan, work))
    numbers = plan.numbers
    if work.kl_budget > 0:
        how, bound = _bounded_by(recipe.training_config("unused"), work)
        say(
            f"blended{how}: blocks of {numbers['block_size']:.0f}, drafts kept at "
            f"{numbers['continuation_rate']:.3f}{bound if work.acceptance is None else ''}, "
            f"{numbers['tokens_per_round']:.2f} tokens a round"
        )
    say(
        f"rows in flight: {numbers['rows_in_flight']:.0f} on each of the models' copies; memory would hold "
        f"{numbers['rows_that_fit']:.0f}"
    )
    if run is not None:
        say(
            f"the run: {run['steps']:.0f} steps, {run['blended_steps']:.0f} of them blended: {run['hours']:.1f} hours, "
            "without evaluation"
        )
    for kind, verb in (("measured", "measured"), ("assumed", "assumed, not measured")):
        for name, figure in machine.figures().items():
            if figure.kind == kind:
                say(f"{verb}: {name} = {figure.value:.4g} ({figure.source})", "dim")
    for problem in plan.problems:
        say(f"fail  {problem}", "bold red")


def _bounded_by(args: "TRBConfig", work: "Work") -> tuple[str, str]:
    """What the first step's rollouts are held to, and what that makes of the rate at which drafts are kept."""
    from trb.schedule import completion_budget
    from trb.training.methods import behavior_of

    if math.isinf(work.kl_budget):
        return "" if work.acceptance is not None else ", no bound is known", " (the worst; see --acceptance)"
    held = completion_budget(behavior_of(args).schedule)
    of_all = "" if held is None else f" {held.target:g} nats a completion, on the average"
    return f" at{of_all} ε = {work.kl_budget:.3g}", " (the bound)"


def _memory_table(plan: "Plan", machine: "Machine") -> Any:
    from rich.table import Table

    table = Table(title="memory of an accelerator", title_justify="left", caption_justify="left")
    table.add_column("GB", no_wrap=True)
    for phase in plan.memory:
        table.add_column(phase, justify="right")
    for name in dict.fromkeys(name for parts in plan.memory.values() for name in parts):
        sizes = [parts.get(name) for parts in plan.memory.values()]
        table.add_row(name, *("" if size is None else f"{size / 1e9:.2f}" for size in sizes))
    totals = [sum(parts.values()) for parts in plan.memory.values()]
    table.add_section()
    table.add_row(f"total, of {machine.usable / 1e9:.0f}", *(f"{total / 1e9:.2f}" for total in totals))
    return table


def _column_table(title: str, heading: str, values: dict[str, float], unit: float) -> Any:
    from rich.table import Table

    table = Table("", title=title, title_justify="left")
    table.add_column(heading, justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value / unit:.2f}")
    table.add_section()
    table.add_row("total", f"{sum(values.values()) / unit:.2f}")
    return table


def _time_table(plan: "Plan", work: "Work") -> Any:
    from rich.table import Table

    columns = {"blended": plan.warmup, "student's rollouts": plan.plain}
    if work.kl_budget == 0:
        del columns["blended"]
    table = Table("", title="seconds of a step", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for name in plan.plain:
        table.add_row(name, *(f"{parts[name]:.2f}" for parts in columns.values()))
    table.add_section()
    table.add_row("total", *(f"{sum(parts.values()):.2f}" for parts in columns.values()))
    return table
