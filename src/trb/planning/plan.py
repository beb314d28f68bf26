"""Memory, traffic and time of one step, put together from the inputs, the transfers and the machine."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trb.losses.chunked import default_chunk_tokens
from trb.models.memory import activation_entries
from trb.models.modeling import length_groups
from trb.models.sharing import own_weights
from trb.planning.inputs import (
    Layout,
    Pair,
    Shape,
    Work,
    columns_decided,
    micro_batches,
    rollouts_of_a_rank,
)
from trb.planning.machines import Machine
from trb.planning.traffic import Transfer, sampling_transfers, transfer_seconds, update_transfers
from trb.sampling.blocks import CANDIDATES, tokens_per_round

__all__ = ["Plan", "make_plan", "pass_seconds", "run_seconds"]

# AdamW reads a weight, its gradient and two moments and writes all but the gradient; clipping reads the gradient again.
_OPTIMIZER_TOUCHES = 8
_LOGIT_BYTES = 4  # whatever the models compute in


def pass_seconds(
    shape: Shape,
    machine: Machine,
    *,
    tokens: float,
    rows: float,
    context: float,
    element: float,
    ways: int = 1,
    eager: bool = False,
) -> float:
    """One sampling pass over `tokens` new tokens of `rows` rows with `context` cached tokens each.

    A fixed time per layer, the weights and the caches read once at the reached bandwidth, and the products at the
    reached rate, added up. `ways` accelerators share the pass, with two all-reduces a layer. `eager` launches every
    kernel from Python, which takes its own time while the accelerator works.
    """
    reads = element * shape.read(tokens, head=True) / ways
    reads += element * rows * context * shape.cached / min(ways, shape.key_heads)
    operations = tokens * (2 * shape.multiplied(head=True) + 4 * shape.query * shape.layers * context)
    seconds = shape.layers * machine.layer.value
    seconds += reads / machine.reached_bandwidth
    seconds += operations / ways / (machine.reached_flops * machine.narrow_share.value)
    if ways > 1:
        exchanged = Transfer("tensor parallel", "all-reduce", element * tokens * shape.hidden, 2 * shape.layers)
        seconds += transfer_seconds(exchanged, ways, machine)
    return max(seconds, shape.layers * machine.eager_slot_layer.value) if eager else seconds


@dataclass
class Plan:
    """What one step takes, per rank.

    Attributes:
        memory: bytes by component in each phase: "sampling", "update" and, for vLLM on its own accelerators, "engine".
        traffic: bytes received by a rank, by what moves.
        warmup: seconds of a step whose rollouts are blended, by part.
        plain: seconds of a step whose rollouts are the student's, by part.
        numbers: block size, acceptance, tokens per round, rows in flight, and what else explains the times.
        problems: what does not fit, and what to do about it.
    """

    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)
    warmup: dict[str, float] = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """Bytes of the phase that takes most, on one accelerator."""
        return max(sum(parts.values()) for parts in self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(pair: Pair, work: Work, layout: Layout, machine: Machine) -> Plan:
    """Memory, traffic and time of one optimizer step. Raises ValueError for models whose layers cannot be told."""
    return _Planner(pair, work, layout, machine).plan()


class _Planner:
    def __init__(self, pair: Pair, work: Work, layout: Layout, machine: Machine) -> None:
        self.pair, self.work, self.layout, self.machine = pair, work, layout, machine
        self.student, self.teacher = Shape.of(pair.student), Shape.of(pair.teacher)
        self.teacher_bytes, self.teacher_weight_bytes = pair.teacher_bytes, pair.teacher_weight_bytes
        # Fewer than all where the teacher stands on the student's weights.
        self.teacher_own = sum(weight.numel() for _, weight in own_weights(pair.teacher, pair.student))
        self.local = rollouts_of_a_rank(work, layout)
        self.length = work.prompt + work.completion
        self.vocabulary = min(self.student.vocabulary, self.teacher.vocabulary)
        self.engine = layout.engine == "vllm"
        self.ways = self._tensor_parallel() if self.engine else 1
        self.rows = self._rows()

    def plan(self) -> Plan:
        block = self.work.block_size or self._fastest_block()
        plan = Plan(memory=self._memory(block))
        before = sampling_transfers(self.student, self.pair, self.layout)
        during = update_transfers(self.student, self.teacher, self.pair, self.work, self.layout)
        ranks = self.layout.ranks
        for transfer in [*before, *during]:
            plan.traffic[transfer.name] = transfer.received(
                self.layout.accelerators if transfer.kind == "broadcast" else ranks
            )
        plan.warmup = self._sampling(block) | self._update(before, during, taught=not self.engine)
        plan.plain = self._student_sampling() | self._update(before, during, taught=False)
        steps, rows = self._lanes()
        plan.numbers = {
            "block_size": block,
            "continuation_rate": self.work.rate,
            "tokens_per_round": tokens_per_round(block, self.work.rate),
            "rows_in_flight": rows,
            "rows_that_fit": self._rows_that_fit(block),
            "rounds": steps / tokens_per_round(block, self.work.rate),
            "tensor_parallel": self.ways,
            "micro_batches": micro_batches(self.work, self.layout),
        }
        plan.problems = self._problems(plan)
        return plan

    # ---- memory ----

    def _memory(self, block: int) -> dict[str, dict[str, float]]:
        resident = self._resident()
        separate = bool(self.layout.engine_accelerators)
        sampling = self._engine_memory(block) if self.engine else self._sampling_memory(block)
        found = {"update": resident | self._update_memory()}
        if separate:
            return found | {"engine": sampling}
        if self.engine:  # weights stay when training takes its turn; the caches are counted with the sampling
            kept = {name: size for name, size in sampling.items() if name.startswith("engine's")}
            return {"sampling": resident | sampling, "update": found["update"] | kept}
        return {"sampling": resident | sampling, **found}

    def _resident(self) -> dict[str, float]:
        """What stays on a rank between the phases."""
        student, ranks, pair = self.student, self.layout.ranks, self.pair
        found: dict[str, float] = {}
        if self.layout.strategy == "ddp":
            found["student's weights"] = pair.master_bytes * student.parameters
            found["optimizer's moments"] = 2 * pair.master_bytes * student.trained
            if ranks > 1:  # allocated once, and kept while gradients come and go
                found["buckets of gradients"] = pair.master_bytes * student.trained
        elif self.layout.strategy == "fsdp":
            found["student's weights"] = pair.master_bytes * student.parameters / ranks
            found["optimizer's moments"] = 2 * pair.master_bytes * student.trained / ranks
        else:
            found["student's weights"] = pair.compute_bytes * student.parameters / ranks
            found["master weights"] = 4 * student.trained / ranks
            found["optimizer's moments"] = 8 * student.trained / ranks
        if self.layout.sharded and not self.engine:
            found["sampling replica"] = pair.replica_bytes * student.parameters
        divided = self.teacher.parameters - self.teacher.head if self._teacher_divided() else 0
        found["teacher's weights"] = self.teacher_weight_bytes * (self.teacher_own - divided + divided / ranks)
        if self.pair.others:
            found["other teachers' weights"] = self.pair.others
        return found

    @property
    def _shared(self) -> bool:
        return self.teacher_own < self.teacher.parameters

    def _teacher_divided(self) -> bool:
        return not self._shared and self.layout.teacher_sharded and (self.engine or self.work.kl_budget == 0)

    def _sampling_memory(self, block: int) -> dict[str, float]:
        """What sampling in process adds."""
        found = {"caches": self._cache_bytes_per_row() * self.rows}
        if self.pair.mixed and not self.layout.sharded:
            found["weights cast for the pass"] = self.pair.compute_bytes * self.student.parameters
        found["logits of a round"] = self._logit_bytes_per_row(block) * self.rows
        found["teacher's hidden states"] = self._kept_hidden()
        return found

    def _kept_hidden(self) -> float:
        """The teacher's hidden states of a warm-up step's completions, from sampling to the loss."""
        return self.local * self.work.mean * self.teacher.hidden * self.teacher_bytes

    def _cache_bytes_per_row(self) -> float:
        """Of both models, on one accelerator. A slot is as long as the longest row, an engine's pages as long as the
        mean one; a key head is not divided."""
        completion = math.ceil(self.work.mean) if self.engine else self.work.completion
        own = (self.work.prompt + completion) * self.student.cached * self.pair.compute_bytes
        taught = (self._prompt(self.teacher) + completion) * self.teacher.cached * self.teacher_bytes
        return own / min(self.ways, self.student.key_heads) + taught / min(self.ways, self.teacher.key_heads)

    def _logit_bytes_per_row(self, block: int) -> float:
        return block * (self.student.vocabulary + self.teacher.vocabulary) * _LOGIT_BYTES

    def _engine_memory(self, block: int) -> dict[str, float]:
        """What vLLM takes of one accelerator."""
        return self._engine_weights() | {
            "caches": self._cache_bytes_per_row() * self.rows,
            "logits of a round": self._logit_bytes_per_row(block) * self.rows,
        }

    def _engine_weights(self) -> dict[str, float]:
        return {
            "engine's student": self.pair.compute_bytes * self.student.parameters / self.ways,
            "engine's teacher": self.teacher_weight_bytes * self.teacher.parameters / self.ways,
        }

    def _update_memory(self) -> dict[str, float]:
        """What the update adds at its peak: the end of the last forward pass, with the gradients of those before."""
        student, pair, ranks = self.student, self.pair, self.layout.ranks
        accumulated = micro_batches(self.work, self.layout) > 1
        found: dict[str, float] = {}
        if self.layout.strategy == "ddp":
            found["gradients"] = pair.master_bytes * student.trained
            if pair.mixed:
                found["weights cast for the pass"] = pair.compute_bytes * student.parameters
        else:
            element = pair.master_bytes if self.layout.strategy == "fsdp" else pair.compute_bytes
            found["gradients"] = element * student.trained / ranks
            if self.layout.strategy == "fsdp" and accumulated:
                found["unsharded gradients"] = pair.compute_bytes * student.trained
            found["gathered layers"] = pair.compute_bytes * (student.root + 2 * student.layer)
        found["activations"] = self._activations()
        found["logits of the loss"] = self._loss_logits()
        if self._teacher_divided():
            outside = self.teacher.root - self.teacher.head
            found["gathered teacher"] = self.teacher_weight_bytes * (outside + 2 * self.teacher.layer)
        if not self.engine:
            found["teacher's hidden states"] = self._kept_hidden()
        return found

    def _activations(self) -> float:
        """Of one micro-batch; with checkpointing each layer keeps its input, and one layer at a time the rest."""
        entries: float = activation_entries(self.pair.student)
        if self.work.checkpointing:
            entries = entries / self.student.layers + self.student.layers * self.student.hidden
        return self._micro_batch_tokens() * entries * self.pair.compute_bytes

    def _loss_logits(self) -> float:
        """The student's, the teacher's and a gradient, for one chunk of tokens."""
        chunk = self.work.loss_chunk or default_chunk_tokens(self.vocabulary, self.machine.device)
        return 3 * min(chunk, self._micro_batch_tokens()) * self.student.vocabulary * _LOGIT_BYTES

    def _micro_batch_tokens(self) -> int:
        return min(self.work.micro_batch, self.local) * self.length

    # ---- rows in flight ----

    def _tensor_parallel(self) -> int:
        """As given, or the fewest accelerators, a power of two, that hold the engine's weights in 0.7 of their room."""
        if self.layout.tensor_parallel is not None:
            return self.layout.tensor_parallel
        free = self.machine.usable
        if not self.layout.engine_accelerators:
            free -= sum(self._resident().values())
        weights = (
            self.pair.compute_bytes * self.student.parameters + self.teacher_weight_bytes * self.teacher.parameters
        )
        ways = 1
        while ways * 2 <= self.layout.sampling_ranks and weights / ways > 0.7 * free:
            ways *= 2
        return ways

    def _copies(self) -> float:
        """Copies of the models that sample side by side."""
        return max(1, self.layout.sampling_ranks // self.ways) if self.engine else self.layout.ranks

    def _rollouts_of_a_copy(self) -> int:
        return math.ceil(self.work.rollouts / self._copies())

    def _rows(self) -> int:
        """Rows in flight on one copy: as asked for, or, in an engine, as many as its caches hold."""
        there = self._rollouts_of_a_copy()
        if not self.engine:
            return min(self.work.rows or there, there)
        return max(1, min(there, math.floor(self._rows_that_fit(self.work.block_size or max(CANDIDATES)))))

    def _rows_that_fit(self, block: int) -> float:
        """Rows whose caches and logits find room beside what else sampling needs; 0 if nothing does."""
        fixed = dict(self._engine_weights() if self.engine else {})
        if not self.layout.engine_accelerators:
            fixed |= self._resident()
            if not self.engine and self.pair.mixed and not self.layout.sharded:
                fixed["weights cast for the pass"] = self.pair.compute_bytes * self.student.parameters
        if not self.engine:
            fixed["teacher's hidden states"] = self._kept_hidden()
        free = self.machine.usable - sum(fixed.values())
        return max(0.0, free / (self._cache_bytes_per_row() + self._logit_bytes_per_row(block)))

    def _lanes(self) -> tuple[float, float]:
        """Tokens in the longest lane of a copy, and rows in flight on average.

        A finished row's place goes to the next prompt, so the lanes share the tokens evenly, and at the end the longest
        completion may run on alone.
        """
        tokens = self._rollouts_of_a_copy() * self.work.mean
        steps = tokens / self.rows + (self.work.completion - self.work.mean) * (1 - 1 / self.rows)
        return steps, tokens / steps

    # ---- time ----

    def _fastest_block(self) -> int:
        if self.work.kl_budget == 0 and self.work.acceptance is None:
            return 1
        feasible = [size for size in CANDIDATES if size <= self.work.completion]
        return min(feasible, key=lambda size: sum(self._sampling(size).values()))

    def _sampling(self, block: int) -> dict[str, float]:
        """Seconds of blended sampling, by part."""
        steps, rows = self._lanes()
        rate, decided = self.work.rate, tokens_per_round(block, self.work.rate)
        rounds, columns = steps / decided, columns_decided(block, rate, rows)
        entries = rows * self.vocabulary
        # The engine decides all positions of a round at once.
        deciding = (1 if self.engine else columns) * self.machine.column.value
        return {
            "reading prompts": self._prefill(self.student) + self._prefill(self.teacher),
            "drafting": rounds * block * (self._pass(self.student, rows, rows) + self._draw(entries)),
            "teacher's block passes": rounds * self._pass(self.teacher, rows * block, rows),
            "deciding": rounds * (deciding + decided * entries * self.machine.solve_entry.value),
        }

    def _student_sampling(self) -> dict[str, float]:
        """The same parts of a step after the warm-up: one student pass and two draws a token."""
        steps, rows = self._lanes()
        drawing = 2 * self._draw(rows * self.vocabulary)
        return {
            "reading prompts": self._prefill(self.student),
            "drafting": steps * (self._pass(self.student, rows, rows) + drawing),
            "teacher's block passes": 0.0,
            "deciding": 0.0,
        }

    def _draw(self, entries: float) -> float:
        return self.machine.draw.value + entries * self.machine.draw_entry.value

    def _pass(self, shape: Shape, tokens: float, rows: float) -> float:
        element = self.pair.compute_bytes if shape is self.student else self.teacher_weight_bytes
        return pass_seconds(
            shape,
            self.machine,
            tokens=tokens,
            rows=rows,
            context=self._prompt(shape) + self.work.mean / 2,
            element=element,
            ways=self.ways,
            eager=self.layout.eager_sampling,
        )

    def _prefill(self, shape: Shape) -> float:
        prompts = math.ceil(self._rollouts_of_a_copy() / self.work.generations)
        operations = prompts * self._forward_operations(shape, self._prompt(shape))
        return operations / self.ways / self.machine.reached_flops

    def _prompt(self, shape: Shape) -> int:
        """Tokens of what a model reads before the completion."""
        own = None if shape is self.student else self.work.teacher_prompt
        return self.work.prompt if own is None else own

    def _forward_operations(self, shape: Shape, length: float) -> float:
        """Of one sequence through the layers; causal attention sees half of the pairs."""
        return 2 * shape.multiplied(head=False) * length + 2 * shape.query * shape.layers * length**2

    def _update(self, before: list[Transfer], during: list[Transfer], *, taught: bool) -> dict[str, float]:
        """Seconds of the update, by part; `taught` when the sampler kept the teacher's hidden states for the loss."""
        student, machine, local = self.student, self.machine, self.local
        length, tokens = self.work.prompt + self.work.mean, local * self.work.mean
        passes = micro_batches(self.work, self.layout) * length_groups(min(self.work.micro_batch, local))
        rounds = 4 if self.work.checkpointing else 3  # the backward pass multiplies twice
        products = 2 * tokens * (3 * student.head + self.teacher.head) / machine.reached_flops
        read = self._prompt(self.teacher) + self.work.mean
        teacher = 0.0 if taught else self._wide(self.teacher, read, passes, 1)
        touched = _OPTIMIZER_TOUCHES * self.pair.master_bytes * student.trained
        ranks = self.layout.ranks
        everywhere = self.layout.accelerators
        if taught:
            during = [transfer for transfer in during if transfer.name != "teacher for its pass"]
        return {
            "teacher's wide pass": teacher,
            "student's forward and backward": self._wide(student, length, passes, rounds),
            "loss": products + tokens * self.vocabulary * machine.loss_entry.value,
            "optimizer": touched / (ranks if self.layout.sharded else 1) / machine.reached_bandwidth,
            "communication, sampling": sum(
                transfer_seconds(each, everywhere if each.kind == "broadcast" else ranks, machine) for each in before
            ),
            "communication, update": sum(transfer_seconds(each, ranks, machine) for each in during),
        }

    def _wide(self, shape: Shape, length: float, passes: int, rounds: int) -> float:
        """Passes over whole sequences, bound by their products or by launching their kernels."""
        operations = rounds * self.local * self._forward_operations(shape, length)
        launching = rounds * passes * shape.layers * self.machine.eager_layer.value
        return max(operations / self.machine.reached_flops, launching)

    # ---- what does not fit ----

    def _problems(self, plan: Plan) -> list[str]:
        found = []
        if self._shared and (self.layout.sharded or self.engine):
            what = "vLLM has" if self.engine else "sharding divides"
            found.append(
                f"the teacher stands on the student's weights, which {what} in a way of its own: leave them where they "
                "are (--strategy ddp, --engine in-process), or give the teacher weights of its own"
            )
        for phase, parts in plan.memory.items():
            needed = sum(parts.values())
            if needed > self.machine.usable:
                largest = sorted(parts, key=lambda name: -parts[name])[:2]
                found.append(
                    f"{phase} needs {needed / 1e9:.0f} GB of the {self.machine.usable / 1e9:.0f} GB that tensors can "
                    f"have on an accelerator, most for {' and '.join(largest)}: {self._remedy(largest[0])}"
                )
        if self.work.rollouts % self.layout.ranks:
            found.append(
                f"{self.work.rollouts} completions do not divide over {self.layout.ranks} ranks: change "
                "prompts_per_step, num_generations or the number of accelerators"
            )
        return found

    def _remedy(self, component: str) -> str:
        more = "use more accelerators"
        sharding = more if self.layout.sharded else "shard it (--strategy fsdp), or use lora_rank"
        serving = "serve it (--engine vllm) with --tensor-parallel" if not self.engine else "raise --tensor-parallel"
        remedies: dict[str, str] = {
            "caches": "lower rollout_batch_size",
            "logits of the loss": "lower loss_chunk_tokens",
            "logits of a round": "lower rollout_batch_size",
            "activations": "lower per_device_train_batch_size, or set gradient_checkpointing",
            "teacher's weights": "shard the loss's teacher (--shard-teacher)" if self.engine else serving,
            "engine's teacher": serving,
            "engine's student": serving,
            "sampling replica": serving,
            "unsharded gradients": f"{more} or a larger per_device_train_batch_size, until a rank has one micro-batch",
            "teacher's hidden states": more,
        }
        return remedies.get(component, sharding)


def run_seconds(make: Callable[[float], Plan], budgets: Sequence[float]) -> float:
    """Seconds of a run whose step k has the budget `budgets[k]`; `make` gives the plan of a budget."""
    known: dict[float, float] = {}
    for budget in budgets:
        if budget not in known:
            plan = make(budget)
            known[budget] = sum((plan.warmup if budget > 0 else plan.plain).values())
    return sum(known[budget] for budget in budgets)
