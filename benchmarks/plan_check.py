"""How well `trb.planning` predicts: constants fitted on one pair, then the memory and time of steps of another.

    python benchmarks/plan_check.py              everything, into benchmarks/results/plan_check.json (about ten minutes)
    python benchmarks/plan_check.py --smoke      tiny sizes: does it run? (the numbers mean nothing)

Pairs have random weights and never trained; what they compute costs what any weights cost. The small pair gives the
machine's constants, from its parts timed alone: sampling passes, draws, decisions, whole forward and backward passes,
the loss, and all-reduces between two processes. The large pair is then trained by `TRBTrainer` for a few steps in one
process and in two (torchrun, gloo, DDP), once with blended rollouts and once with the student's, and every component of
memory and every part of a step is compared with the plan.

One thread per process. Parts that compute are timed in processor seconds, which neighbours on a shared machine disturb
less than the clock; communication and whole steps by the clock. A part's figure is the median over steps of the slower
rank.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from trb import TRBConfig, TRBTrainer, zoo
from trb.losses import chunked_reverse_kl
from trb.models.modeling import OutputHead, completion_hidden_states
from trb.planning import Figure, Layout, Machine, Pair, Plan, Shape, Work, make_plan
from trb.policies import TrustRegionPolicy
from trb.safety.files import write_text
from trb.sampling import speculative
from trb.sampling.attention import attention_through_slots
from trb.sampling.cache import SlotReader
from trb.sampling.draw import accept_or_replace, inverse_cdf
from trb.studies.provenance import describe
from trb.vocab import log_probs

OUTPUT = Path(__file__).parent / "results" / "plan_check.json"
SOURCE = "benchmarks/results/plan_check.json"
KL_BUDGET = 0.02
BLOCK = 4
SMALL: dict[str, Any] = {
    "vocabulary": 4096,
    "student": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768},
    "teacher": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1152},
}
LARGE: dict[str, Any] = {
    "vocabulary": 8192,
    "student": {"hidden_size": 320, "num_hidden_layers": 8, "intermediate_size": 960},
    "teacher": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1536},
}
TINY: dict[str, Any] = {
    "vocabulary": 96,
    "student": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64},
    "teacher": {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 96},
}
# Steps of the check; the first warms caches and is dropped. Sixteen completions a step, whatever the processes.
STEPS, ROLLOUTS, MICRO_BATCH, COMPLETION = 4, 16, 4, 48


def model(shape: dict[str, Any], vocabulary: int, seed: int, sharpness: float) -> PreTrainedModel:
    """A model of random weights; `sharpness` scales its head, so that a pair disagrees enough to bind the budget."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **shape,
        vocab_size=vocabulary,
        num_attention_heads=shape["hidden_size"] // 32,
        num_key_value_heads=shape["hidden_size"] // 64,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    made = Qwen3ForCausalLM(config).eval()
    made.lm_head.weight.data.mul_(sharpness)
    made.generation_config.eos_token_id = made.generation_config.pad_token_id = 0
    return made


def pair(sizes: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedModel]:
    return model(sizes["student"], sizes["vocabulary"], 0, 2.0), model(sizes["teacher"], sizes["vocabulary"], 1, 3.0)


# ---- the constants, from the small pair ----


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median processor seconds of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def fit(rows: list[list[float]], times: list[float]) -> list[float]:
    """Non-negative coefficients that explain the times with the least relative error."""
    weights = 1 / np.array(times)
    design, target = np.array(rows) * weights[:, None], np.ones(len(times))
    active = list(range(design.shape[1]))
    while True:
        found = np.linalg.lstsq(design[:, active], target, rcond=None)[0]
        if (found >= 0).all():
            break
        active.remove(active[int(found.argmin())])
    solution = np.zeros(design.shape[1])
    solution[active] = found
    return solution.tolist()


def calibrate(sizes: dict[str, Any], repeats: int) -> tuple[Machine, dict[str, Any]]:
    """The machine as one process meets it, and the timings behind it."""
    student, teacher = pair(sizes)
    timings: dict[str, Any] = {}
    layer, byte, product = calibrate_passes((student, teacher), repeats, timings)
    wide = calibrate_wide((student, teacher), repeats, timings)
    draw, draw_entry, column, solve_entry = calibrate_decisions(sizes["vocabulary"], repeats, timings)
    loss_entry = calibrate_loss((student, teacher), wide, repeats, timings)
    timings["narrow passes, seconds per product"] = product
    link, collective = calibrate_link(timings)

    def measured(value: float, what: str) -> Figure:
        return Figure(float(f"{value:.3g}"), "measured", f"{SOURCE}: {what}, one thread")

    whole = Figure(1.0, "measured", f"{SOURCE}: the rates are those reached, not peaks")
    nothing = Figure(0.0, "assumed", "a process takes what it allocates")
    machine = Machine(
        name="cpu",
        device="cpu",
        per_node=Figure(2, "measured", f"{SOURCE}: two processes on two cores"),
        memory=Figure(torch_memory(), "measured", f"{SOURCE}: half of the machine's memory"),
        reserved=nothing,
        bandwidth=measured(1 / byte if byte else 1e12, "reading weights in sampling passes"),
        bandwidth_share=whole,
        flops=measured(1 / wide, "forward and backward passes"),
        flops_share=whole,
        narrow_share=measured(min(1.0, wide / product) if product else 1.0, "sampling passes over forward passes"),
        link=measured(link, "all-reduce by gloo"),
        network=measured(link, "no network here: as inside the machine"),
        link_share=whole,
        collective=measured(collective, "all-reduce by gloo"),
        layer=measured(layer, "sampling passes"),
        eager_layer=measured(layer, "sampling passes"),
        eager_slot_layer=measured(layer, "sampling passes"),
        draw=measured(draw, "inverse CDF"),
        draw_entry=measured(draw_entry, "inverse CDF"),
        column=measured(column, "solve and draw"),
        solve_entry=measured(solve_entry, "solve and draw"),
        loss_entry=measured(loss_entry, "loss less its matrix products"),
    )
    return machine, timings


def torch_memory() -> float:
    import psutil

    return psutil.virtual_memory().total / 2


def calibrate_passes(models: tuple[PreTrainedModel, ...], repeats: int, timings: dict[str, Any]) -> list[float]:
    """Seconds per layer, per byte read and per operation of sampling passes, over widths and both models."""
    rows, times = [], []
    for number, each in enumerate(models):
        shape = Shape.of(each)
        for width, block in ((1, 1), (2, 1), (4, 1), (8, 1), (4, 4), (8, 4), (16, 4)):
            context, tokens = 32, width * block
            reader = SlotReader(each, width)
            ids = torch.randint(0, shape.vocabulary, (width, block))
            position = torch.full((width, block), context) + torch.arange(block)
            read = partial(reader.read, ids, position, context + block)
            with attention_through_slots(each), torch.no_grad():
                reader.admit([list(range(context))] * width, range(width))
                spent = seconds(read, repeats)
            rows.append(
                [
                    shape.layers,
                    4 * (shape.read(tokens, head=True) + width * context * shape.cached),
                    tokens * (2 * shape.multiplied(head=True) + 4 * shape.query * shape.layers * context),
                ]
            )
            times.append(spent)
            timings[f"pass, model {number}, {width} rows x {block}"] = spent
    found = fit(rows, times)
    timings["pass, worst misfit"] = float(np.abs(np.array(rows) @ found / np.array(times) - 1).max())
    return found


def calibrate_wide(models: tuple[PreTrainedModel, ...], repeats: int, timings: dict[str, Any]) -> float:
    """Seconds per operation of whole sequences, forward and backward."""
    spent = operations = 0.0
    for number, each in enumerate(models):
        shape, length, batch = Shape.of(each), 80, 4
        ids = torch.randint(0, shape.vocabulary, (batch, length))
        mask = torch.ones_like(ids)
        each.requires_grad_(True)

        def step(each: PreTrainedModel = each, ids: Tensor = ids, mask: Tensor = mask) -> None:
            completion_hidden_states(
                each, ids, mask, mask.clone().index_fill_(1, torch.tensor([0]), 0)
            ).sum().backward()
            each.zero_grad()

        found = seconds(step, repeats)
        timings[f"forward and backward, model {number}"] = found
        forward = 2 * shape.multiplied(head=False) * length + 2 * shape.query * shape.layers * length**2
        spent, operations = spent + found, operations + 3 * batch * forward
    return spent / operations


def calibrate_decisions(vocabulary: int, repeats: int, timings: dict[str, Any]) -> list[float]:
    """Seconds of a draw and of a decision: fixed, and per row and vocabulary entry."""
    draw_rows, draw_times, rows, times = [], [], [], []
    for count in (1, 4, 16):
        for size in (vocabulary // 4, vocabulary):
            student = 2 * torch.randn(count, size)
            teacher = student + torch.randn(count, size)
            uniform = torch.rand(count, dtype=torch.float64)

            def draw(student: Tensor = student, uniform: Tensor = uniform) -> Tensor:
                return inverse_cdf(log_probs(student).exp(), uniform)

            def decide(student: Tensor = student, teacher: Tensor = teacher, uniform: Tensor = uniform) -> None:
                own = log_probs(student)
                target = TrustRegionPolicy(KL_BUDGET).target(own, log_probs(teacher))
                accept_or_replace(target, own, student.argmax(-1), uniform, uniform)

            entries = count * size
            draw_rows.append([1.0, entries])
            draw_times.append(seconds(draw, 4 * repeats))
            rows.append([1.0, entries])
            times.append(seconds(decide, 4 * repeats))
            timings[f"draw, {count} x {size}"], timings[f"decide, {count} x {size}"] = draw_times[-1], times[-1]
    return [*fit(draw_rows, draw_times), *fit(rows, times)]


def calibrate_loss(
    models: tuple[PreTrainedModel, ...], per_operation: float, repeats: int, timings: dict[str, Any]
) -> float:
    """Seconds of the loss per token and vocabulary entry, its matrix products taken off."""
    student, teacher = models
    tokens = 256
    heads = OutputHead.of(student), OutputHead.of(teacher)
    shapes = Shape.of(student), Shape.of(teacher)
    hidden = torch.randn(tokens, shapes[0].hidden, requires_grad=True)
    seen = torch.randn(tokens, shapes[1].hidden)
    ids = torch.zeros(tokens, dtype=torch.long)

    def step() -> None:
        loss, _ = chunked_reverse_kl(hidden, seen, *heads, ids, torch.ones_like(ids))
        loss.backward()

    timings["loss"] = seconds(step, repeats)
    products = 2 * tokens * (3 * shapes[0].head + shapes[1].head) * per_operation
    return max(0.0, timings["loss"] - products) / (tokens * shapes[0].vocabulary)


def calibrate_link(timings: dict[str, Any]) -> tuple[float, float]:
    """Bytes a second that a rank receives in an all-reduce, and the seconds of an empty one."""
    for name, value in launch(2, ["--link"])[0].items():
        timings[f"all-reduce, {name} bytes"] = value
    sizes = [int(key.split()[1]) for key in timings if key.startswith("all-reduce, ")]
    times = [timings[f"all-reduce, {size} bytes"] for size in sizes]
    fixed, per_byte = fit([[1.0, size] for size in sizes], times)
    return 1 / per_byte, fixed


def time_link() -> dict[str, float]:
    found = {}
    for size in (1 << 12, 1 << 20, 1 << 24):
        tensor, times = torch.zeros(size // 4), []
        for _ in range(9):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - start)
        found[str(size)] = statistics.median(times)
    return found


# ---- the run of the large pair ----


class Clock:
    """Processor and wall seconds by part, a list per step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start, wall = time.process_time(), time.perf_counter()
        yield
        self.now[name] += time.process_time() - start
        self.now[f"{name}, wall"] += time.perf_counter() - wall

    def wrap(self, name: str, owner: Any, attribute: str) -> None:
        function = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        setattr(owner, attribute, timed)


class Watcher(TrainerCallback):
    """Steps by the clock, and the bytes of gradients and moments where they exist."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.bytes = clock, {}
        self.trainer: Any = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock.now = defaultdict(float)
        self.start = time.process_time(), time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        parameters = list(self.trainer.model.parameters())
        self.bytes["student's weights"] = sum(each.nbytes for each in parameters)
        self.bytes["gradients"] = sum(each.grad.nbytes for each in parameters if each.grad is not None)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.now["step"] = time.process_time() - self.start[0]
        self.clock.now["step, wall"] = time.perf_counter() - self.start[1]
        self.clock.steps.append(dict(self.clock.now))
        state = self.trainer.optimizer.state_dict()["state"]
        self.bytes["optimizer's moments"] = sum(
            value.nbytes for entry in state.values() for value in entry.values() if isinstance(value, Tensor)
        )


def train(sizes: dict[str, Any], budget: float, steps: int) -> dict[str, Any]:
    """A few steps of the trainer in this process (one of one or two): seconds by part of each, bytes by component."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    before = resident("VmRSS")
    student, teacher = pair(sizes)
    tokenizer = zoo.load("student")[1]
    local = ROLLOUTS // processes
    with tempfile.TemporaryDirectory() as directory:
        args = TRBConfig(
            output_dir=directory,
            method="fixed" if budget else "opd",
            initial_kl_budget=budget or 0.01,
            block_size=BLOCK,
            max_steps=steps,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=local // MICRO_BATCH,
            max_completion_length=COMPLETION,
            bf16=False,
            gradient_checkpointing=False,
            recorded_rollouts=0,
            recorded_scores_every=0,
            learning_rate=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            ddp_backend="gloo" if processes > 1 else None,
        )
        clock = Clock()
        watcher = Watcher(clock)
        trainer = TRBTrainer(
            student,
            teacher,
            args,
            train_dataset=Dataset.from_list(zoo.problems(64, seed=0)),
            processing_class=tokenizer,
            callbacks=[watcher],
        )
        watcher.trainer = trainer
        found = observe(trainer, clock, watcher)
        trainer.train()
    return {
        "steps": clock.steps[1:],
        "bytes": watcher.bytes,
        "peak growth": resident("VmHWM") - before,
        "teacher's weights": sum(each.nbytes for each in teacher.parameters()),
        **found,
    }


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at its peak (Linux; getrusage's peak is inherited)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def observe(trainer: TRBTrainer, clock: Clock, watcher: Watcher) -> dict[str, Any]:
    """Put clocks around the parts of a step, and counters on what is kept and sent. The result fills as steps go by."""
    found: dict[str, Any] = {}
    sampler = speculative._Sampler
    read = SlotReader.read

    def read_timed(reader: SlotReader, *arguments: Any) -> Any:
        name = (
            "drafting" if reader.model is trainer.accelerator.unwrap_model(trainer.model) else "teacher's block passes"
        )
        with clock.part(name):
            return read(reader, *arguments)

    SlotReader.read = read_timed  # type: ignore[method-assign]
    clock.wrap("reading prompts", SlotReader, "admit")
    clock.wrap("deciding", sampler, "_verify")
    clock.wrap("drawing", speculative, "inverse_cdf")
    clock.wrap("sampling", trainer, "_generate_single_turn")
    clock.wrap("optimizer", torch.optim.AdamW, "step")
    compute = trainer._compute_loss

    def loss(*arguments: Any, **options: Any) -> Any:
        kept: dict[int, int] = {}
        alive: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        with clock.part("forward and loss"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = compute(*arguments, **options)
        for parameter in [*trainer.model.parameters(), *trainer.teacher_model.parameters()]:
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        watcher.bytes["activations"] = max(watcher.bytes.get("activations", 0), sum(kept.values()))
        rollout = trainer._rollout
        if rollout is not None:
            found["mean completion"] = statistics.mean(map(len, rollout.completions))
            found["prompt"] = statistics.mean(map(len, rollout.prompts))
            found["acceptance"] = sum(map(sum, rollout.stats.accepted)) / sum(map(len, rollout.completions))
            found["teacher calls"], found["student calls"] = rollout.teacher_calls, rollout.student_calls
            if rollout.teacher_hidden is not None:
                watcher.bytes["teacher's hidden states"] = sum(each.nbytes for each in rollout.teacher_hidden)
        return result

    trainer._compute_loss = loss  # type: ignore[method-assign]
    clock.wrap("teacher's wide pass", trainer, "_teacher_hidden")
    clock.wrap("backward", trainer.accelerator, "backward")
    rolled = sampler.rollout

    def rollout(self: Any, *arguments: Any) -> Any:
        layers = [layer for reader in self._readers for layer in reader._layers]
        watcher.bytes["caches"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return rolled(self, *arguments)

    sampler.rollout = rollout  # type: ignore[method-assign]
    prepare = trainer.accelerator.prepare_model

    def prepared(*arguments: Any, **options: Any) -> Any:
        wrapped = prepare(*arguments, **options)
        if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, counted)
        return wrapped

    def counted(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        found["reduced bytes"] = found.get("reduced bytes", 0) + bucket.buffer().nbytes
        found["reductions"] = found.get("reductions", 0) + bucket.is_last()
        with clock.part("communication"):
            dist.all_reduce(bucket.buffer())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer().div_(dist.get_world_size()))
        return future

    trainer.accelerator.prepare_model = prepared  # type: ignore[method-assign]
    return found


def launch(processes: int, arguments: list[str]) -> list[dict[str, Any]]:
    """This script in other processes; what each rank reports."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        if processes == 1:
            command = [sys.executable]
        command += [__file__, *arguments, "--report", directory]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment, timeout=900, stdout=subprocess.DEVNULL)
        return [json.loads(path.read_text()) for path in sorted(Path(directory).glob("*.json"))]


# ---- the comparison ----


def compare(plan: Plan, blended: bool, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted, measured and their ratio, for memory, traffic and time."""
    predicted = plan.warmup if blended else plan.plain

    def part(*names: str) -> float:
        totals = [[sum(step.get(name, 0.0) for name in names) for step in rank["steps"]] for rank in ranks]
        return statistics.median(max(column) for column in zip(*totals, strict=True))

    communication = part("communication") if len(ranks) > 1 else 0.0
    times = {
        "reading prompts": (predicted["reading prompts"], part("reading prompts")),
        "drafting": (predicted["drafting"], part("drafting", "drawing")),
        "teacher's block passes": (predicted["teacher's block passes"], part("teacher's block passes")),
        # A step of student rollouts has its decisions, one draw a token, in its drafting.
        "deciding": (predicted["deciding"], part("deciding") if blended else 0.0),
        "teacher's wide pass": (predicted["teacher's wide pass"], part("teacher's wide pass") if not blended else 0.0),
        "student's passes and loss": (
            predicted["student's forward and backward"] + predicted["loss"],
            part("forward and loss", "backward") - communication - (0.0 if blended else part("teacher's wide pass")),
        ),
        "optimizer": (predicted["optimizer"], part("optimizer")),
        "step, processor seconds": (
            sum(value for name, value in predicted.items() if not name.startswith("communication")),
            part("step") - communication,
        ),
        "step, wall seconds": (sum(predicted.values()), part("step, wall")),
    }
    if len(ranks) > 1:
        times["communication, wall seconds"] = (predicted["communication, update"], part("communication, wall"))
    everything = plan.memory["sampling"] | plan.memory["update"]
    measured = ranks[0]["bytes"] | {"teacher's weights": ranks[0]["teacher's weights"]}
    memory = {name: (everything[name], size) for name, size in measured.items()}
    if not blended:
        del memory["caches"]  # planned for the step that takes more, whose sampling reads both models
    memory["peak of the process"] = (plan.peak, max(rank["peak growth"] for rank in ranks))
    traffic = {}
    if len(ranks) > 1:
        # What a rank hands to the all-reduce; by the ring it receives 2 (n - 1) / n of it, here as much.
        traffic["gradients"] = (plan.traffic["gradients"], ranks[0]["reduced bytes"] / ranks[0]["reductions"])
    return {name: table(values) for name, values in (("seconds", times), ("bytes", memory), ("traffic", traffic))}


def table(values: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    rows = {}
    for name, (predicted, measured) in values.items():
        if predicted or measured:
            row = {"predicted": predicted, "measured": measured}
            rows[name] = {key: float(f"{value:.4g}") for key, value in row.items()}
            if measured:
                rows[name]["ratio"] = float(f"{predicted / measured:.3g}")
    return rows


def check(sizes: dict[str, Any], name: str, machine: Machine, steps: int) -> dict[str, Any]:
    student, teacher = pair(sizes)
    planned = Pair(student, teacher, teacher_dtype="float32", compute_dtype=None)
    results = {}
    for processes in (1, 2):
        for budget in (KL_BUDGET, 0.0):
            ranks = launch(processes, ["--train", name, "--budget", str(budget), "--steps", str(steps)])
            first = ranks[0]
            work = Work(
                rollouts=ROLLOUTS,
                generations=4,
                prompt=round(first["prompt"]),
                completion=COMPLETION,
                mean_completion=first["mean completion"],
                micro_batch=MICRO_BATCH,
                kl_budget=budget,
                block_size=BLOCK if budget else 1,
            )
            plan = make_plan(planned, work, Layout(processes), machine)
            label = f"{processes} process{'es' if processes > 1 else ''}, {'blended' if budget else 'student'}"
            results[label] = compare(plan, budget > 0, ranks) | {
                "acceptance": {"predicted": work.rate, "measured": first["acceptance"]},
                "rounds": {"predicted": plan.numbers["rounds"], "measured": first["teacher calls"] - 1}
                if budget
                else {},
                "mean_completion": first["mean completion"],
            }
            print(label, json.dumps(results[label], indent=1), flush=True)
            gc.collect()
    return results


def headline(results: dict[str, Any]) -> dict[str, Any]:
    """The extreme ratios of predicted to measured over the four runs."""
    found = {}
    for kind in ("seconds", "bytes", "traffic"):
        for name in {name for run in results.values() for name in run[kind]}:
            ratios = [run[kind][name]["ratio"] for run in results.values() if "ratio" in run[kind].get(name, {})]
            found[f"{kind}: {name}"] = {"least": min(ratios), "most": max(ratios)}
    return dict(sorted(found.items()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny sizes, to see that it runs; writes no file unless --output")
    add("--output", type=Path, help="the JSON file (benchmarks/results/plan_check.json)")
    add("--train", choices=("large", "tiny"), help=argparse.SUPPRESS)
    add("--link", action="store_true", help=argparse.SUPPRESS)
    add("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    add("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    add("--report", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    if options.report:
        if options.link:
            dist.init_process_group("gloo")
            found = time_link()
            dist.destroy_process_group()
        else:
            found = train({"large": LARGE, "tiny": TINY}[options.train], options.budget, options.steps)
        (options.report / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
        return
    start, provenance = time.perf_counter(), describe()
    machine, timings = calibrate(TINY if options.smoke else SMALL, 3 if options.smoke else 15)
    results = check(*((TINY, "tiny") if options.smoke else (LARGE, "large")), machine, 2 if options.smoke else STEPS)
    output = options.output or (None if options.smoke else OUTPUT)
    if output:
        report = {
            "provenance": provenance,
            "threads": 1,
            "sizes": {"fitted on": SMALL, "predicted": LARGE},
            "work": {"rollouts": ROLLOUTS, "micro_batch": MICRO_BATCH, "completion": COMPLETION, "steps": STEPS - 1},
            "kl_budget": KL_BUDGET,
            "machine": {name: figure._asdict() for name, figure in machine.figures().items()},
            "timings": timings,
            "results": results,
            "headline": headline(results),
            "seconds_taken": round(time.perf_counter() - start),
        }
        write_text(output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
