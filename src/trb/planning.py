"""How much memory, traffic and time a step of distillation takes, before anything is run.

Everything follows from the shapes of the two models (on the meta device, without weights), from what a step does, from
how processes share the work, and from a machine (`trb.machines`). Nothing here measures, and nothing is added for
comfort: collectives are counted as if nothing hid them, ranks as if they were equally long at work, and rows as if the
longest completions came last. `docs/scaling.md` derives the formulas and compares them with runs.

Left out: pipeline and sequence parallelism, offloading, quantised weights, data loading, rewards, logging, evaluation
and checkpoints. Sizes are bytes, times seconds, of one optimizer step, on the rank that has most to do.

A round drafts `k` tokens for each row, reads them in one teacher pass and yields `y = 1 + a + ... + a^(k-1)` tokens of
it at a continuation rate `a`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from trb.choices import did_you_mean
from trb.loading import DTYPES, memory_estimate
from trb.losses import default_chunk_tokens
from trb.machines import Machine
from trb.modeling import length_groups
from trb.sampling.blocks import CANDIDATES

__all__ = [
    "ENGINES",
    "STRATEGIES",
    "Layout",
    "Pair",
    "Plan",
    "Shape",
    "Transfer",
    "Work",
    "continuation_rate",
    "make_plan",
    "pass_seconds",
    "tokens_per_round",
    "transfer_seconds",
]

STRATEGIES = ("ddp", "fsdp", "zero3")
ENGINES = ("in-process", "vllm")

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# AdamW reads a weight, its gradient and two moments and writes all but the gradient; clipping reads the gradient again.
_OPTIMIZER_TOUCHES = 8
# DistributedDataParallel's default, in bytes.
_BUCKET = 25e6


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal LM that decide what a pass costs; parameters are counted once, however often tied.

    Attributes:
        parameters: all of them.
        trained: those that require a gradient.
        layers: how many.
        layer: parameters of the largest one.
        root: parameters outside the layers: embeddings, last norm, output head.
        dense: parameters of the layers that every token is multiplied with.
        experts: parameters of the layers of which a token meets only `expert_share`.
        expert_share: experts a token is sent to over experts there are; 1 without experts.
        hidden: hidden size H.
        query: query heads times their size.
        cached: numbers that a token leaves in the key-value cache, all layers together.
        vocabulary: rows of the output head V.
    """

    parameters: int
    trained: int
    layers: int
    layer: int
    root: int
    dense: int
    experts: int
    expert_share: float
    hidden: int
    query: int
    cached: int
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        config = model.config.get_text_config()
        in_layers: dict[int, int] = {}
        experts = 0
        for name, parameter in model.named_parameters():
            found = _LAYER.search(name)
            if found:
                in_layers[int(found[1])] = in_layers.get(int(found[1]), 0) + parameter.numel()
                experts += parameter.numel() if ".experts." in name else 0
        if not in_layers:
            raise ValueError(
                f"cannot plan for {type(model).__name__}: none of its parameters belongs to a numbered layer"
            )
        total = sum(parameter.numel() for parameter in model.parameters())
        cache = memory_estimate(model, batch=1, sequence_length=1, training=False)["kv_cache"]
        return cls(
            parameters=total,
            trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            layers=len(in_layers),
            layer=max(in_layers.values()),
            root=total - sum(in_layers.values()),
            dense=sum(in_layers.values()) - experts,
            experts=experts,
            expert_share=_expert_share(config) if experts else 1.0,
            hidden=config.hidden_size,
            query=_query_width(config),
            cached=cache // torch.float32.itemsize,
            vocabulary=config.vocab_size,
        )

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.hidden * self.vocabulary

    def multiplied(self, *, head: bool) -> float:
        """Parameters that a token is multiplied with."""
        return self.dense + self.experts * self.expert_share + head * self.head

    def read(self, tokens: float, *, head: bool) -> float:
        """Parameters that a pass over so many tokens reads, tokens choosing experts independently."""
        met = 1 - (1 - self.expert_share) ** tokens if self.experts else 1.0
        return self.dense + self.experts * met + head * self.head


def _expert_share(config: Any) -> float:
    chosen = getattr(config, "num_experts_per_tok", None)
    there = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return chosen / there if chosen and there else 1.0


def _query_width(config: Any) -> int:
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


@dataclass(frozen=True)
class Pair:
    """The two models, weights not needed, and the precisions they are kept and used in.

    Attributes:
        student: a causal LM; parameters that require no gradient are not trained.
        teacher: the same, frozen.
        student_dtype: of the student's own weights, a name of `trb.loading.DTYPES`.
        teacher_dtype: of the teacher's.
        compute_dtype: of the forward pass under autocast; None for the student's own.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    student_dtype: str = "float32"
    teacher_dtype: str = "bfloat16"
    compute_dtype: str | None = "bfloat16"

    @property
    def master_bytes(self) -> int:
        return _bytes_of(self.student_dtype, self.student)

    @property
    def compute_bytes(self) -> int:
        return self.master_bytes if self.compute_dtype is None else _bytes_of(self.compute_dtype, self.student)

    @property
    def mixed(self) -> bool:
        return self.compute_bytes != self.master_bytes

    @property
    def forward_dtype(self) -> str:
        return self.student_dtype if self.compute_dtype is None else self.compute_dtype


def _bytes_of(dtype: str, model: PreTrainedModel) -> int:
    chosen = DTYPES[dtype]
    return (chosen if isinstance(chosen, torch.dtype) else model.dtype).itemsize


@dataclass(frozen=True)
class Work:
    """What one optimizer step does, all ranks together.

    Attributes:
        rollouts: completions of a step.
        generations: of them, how many belong to one prompt.
        prompt: tokens of a prompt.
        completion: tokens of the longest completion.
        mean_completion: tokens of the mean one; None when all are as long as the longest.
        micro_batch: completions that a rank puts through one forward and backward pass.
        rows: completions that a rank samples at once, in process; None for all it has.
        kl_budget: ε, nats per token.
        acceptance: rate at which a row goes on to its next draft; None for the bound that the budget gives.
        block_size: tokens drafted before the teacher reads them; None for the fastest.
        checkpointing: whether the backward pass computes activations again.
        loss_chunk: tokens whose logits the loss holds at once; None for the package's choice.
    """

    rollouts: int
    generations: int
    prompt: int
    completion: int
    micro_batch: int
    mean_completion: float | None = None
    rows: int | None = None
    kl_budget: float = 0.01
    acceptance: float | None = None
    block_size: int | None = None
    checkpointing: bool = False
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("rollouts", "generations", "prompt", "completion", "micro_batch", "rows", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < self.mean <= self.completion:
            raise ValueError(
                f"mean_completion must lie above 0 and at most at completion={self.completion}, got {self.mean}"
            )
        if not self.kl_budget >= 0:
            raise ValueError(f"kl_budget must be at least 0, got {self.kl_budget}")
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance must lie in [0, 1], got {self.acceptance}")

    @property
    def mean(self) -> float:
        return float(self.completion if self.mean_completion is None else self.mean_completion)

    @property
    def rate(self) -> float:
        return continuation_rate(self.kl_budget) if self.acceptance is None else self.acceptance


@dataclass(frozen=True)
class Layout:
    """How processes share the work.

    Attributes:
        accelerators: all of them, one process each.
        strategy: of the student's training: ddp, fsdp (FSDP2) or zero3 (DeepSpeed).
        engine: what samples: in-process, or vllm.
        engine_accelerators: how many of them belong to vLLM alone; 0 where it shares all of them with training.
        tensor_parallel: accelerators that share one copy of the engine's models; None for the fewest that hold it.
        teacher_sharded: whether ranks share the teacher of the loss instead of each holding it.
    """

    accelerators: int = 1
    strategy: str = "ddp"
    engine: str = "in-process"
    engine_accelerators: int = 0
    tensor_parallel: int | None = None
    teacher_sharded: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (("strategy", self.strategy, STRATEGIES), ("engine", self.engine, ENGINES)):
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}{hint}")
        if self.accelerators < 1:
            raise ValueError(f"a plan needs at least 1 accelerator, got {self.accelerators}")
        if not 0 <= self.engine_accelerators < self.accelerators:
            raise ValueError(
                f"engine_accelerators={self.engine_accelerators} of {self.accelerators} leave none to train on"
            )
        if self.engine_accelerators and self.engine != "vllm":
            raise ValueError("engine_accelerators are vLLM's: choose engine='vllm', or set them to 0")
        if self.tensor_parallel is not None and not 1 <= self.tensor_parallel <= self.sampling_ranks:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} is out of range: {self.sampling_ranks} accelerators sample"
            )

    @property
    def ranks(self) -> int:
        """Processes that train."""
        return self.accelerators - self.engine_accelerators

    @property
    def sampling_ranks(self) -> int:
        return self.engine_accelerators or self.accelerators

    @property
    def sharded(self) -> bool:
        return self.strategy != "ddp"


# ---- acceptance and rounds ----


def continuation_rate(kl_budget: float) -> float:
    """The least rate at which drafts are kept at that budget: 1 - sqrt(ε/2), by Pinsker's inequality (0 at least)."""
    return max(0.0, 1 - math.sqrt(kl_budget / 2))


def tokens_per_round(block: int, rate: float) -> float:
    """y: tokens of a row that a round of `block` drafts yields."""
    return sum(rate**drafted for drafted in range(block))


def columns_decided(block: int, rate: float, rows: float) -> float:
    """Positions of a round that some row of `rows` still needs decided."""
    return sum(1 - (1 - rate**drafted) ** rows for drafted in range(block))


def pass_seconds(
    shape: Shape,
    machine: Machine,
    *,
    tokens: float,
    rows: float,
    context: float,
    element: int,
    ways: int = 1,
) -> float:
    """One sampling pass over `tokens` new tokens of `rows` rows with `context` cached tokens each.

    A fixed time per layer, the weights and the caches read once at the reached bandwidth, and the products at the
    reached rate, added up. `ways` accelerators share the pass, with two all-reduces a layer.
    """
    reads = element * (shape.read(tokens, head=True) + rows * context * shape.cached)
    operations = tokens * (2 * shape.multiplied(head=True) + 4 * shape.query * shape.layers * context)
    seconds = shape.layers * machine.layer.value
    seconds += reads / ways / machine.reached_bandwidth
    seconds += operations / ways / (machine.reached_flops * machine.narrow_share.value)
    if ways > 1:
        exchanged = Transfer("tensor parallel", "all-reduce", element * tokens * shape.hidden, 2 * shape.layers)
        seconds += transfer_seconds(exchanged, ways, machine)
    return seconds


# ---- traffic ----


@dataclass(frozen=True)
class Transfer:
    """Collectives of one step that move the same thing.

    Attributes:
        name: what moves.
        kind: all-gather, reduce-scatter, all-reduce or broadcast.
        payload: bytes of the whole tensor, in one of them.
        count: how many.
        calls: into how many calls each is split, for their latency.
    """

    name: str
    kind: str
    payload: float
    count: float
    calls: float = 1

    def received(self, ranks: int) -> float:
        """Bytes that one rank receives, by the ring algorithms."""
        rounds = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "broadcast": 1}[self.kind]
        whole = 1.0 if self.kind == "broadcast" and ranks > 1 else (ranks - 1) / ranks
        return self.count * rounds * whole * self.payload


def transfer_seconds(transfer: Transfer, ranks: int, machine: Machine) -> float:
    """The slower of two: what a rank receives over its link, and what a node receives over all its adapters."""
    if ranks == 1:
        return 0.0
    per_node = machine.per_node.value
    nodes = math.ceil(ranks / per_node)
    across = transfer.received(nodes) / (per_node * machine.network.value) if nodes > 1 else 0.0
    within = transfer.received(ranks) / machine.link.value if per_node > 1 else 0.0
    moving = max(across, within) / machine.link_share.value
    return moving + transfer.count * transfer.calls * machine.collective.value


def update_transfers(student: Shape, teacher: Shape, pair: Pair, work: Work, layout: Layout) -> list[Transfer]:
    """What the update of one step moves; the teacher's part belongs to steps that read it in the update."""
    batches = micro_batches(work, layout)
    # A layer is gathered for the forward pass of each length group and again for its backward pass.
    passes = batches * length_groups(min(work.micro_batch, rollouts_of_a_rank(work, layout)))
    layers = student.parameters - student.root
    element, trained = pair.compute_bytes, student.trained
    found = []
    if layout.strategy == "ddp":
        gradient = pair.master_bytes * trained
        found.append(Transfer("gradients", "all-reduce", gradient, 1, math.ceil(gradient / _BUCKET)))
    elif layout.strategy == "fsdp":
        found.append(Transfer("layers for the passes", "all-gather", element * layers, 2 * passes, student.layers))
        found.append(Transfer("embeddings and head", "all-gather", element * student.root, batches))
        # The gradients of earlier micro-batches stay whole on every rank. They leave when the first length group of the
        # last micro-batch is done, and its own gradients when the last one is.
        last = 2 if batches > 1 and passes > batches else 1
        share = trained / student.parameters
        found.append(Transfer("gradients of layers", "reduce-scatter", element * layers * share, last, student.layers))
        found.append(Transfer("gradients of the rest", "reduce-scatter", element * student.root * share, 1))
    else:
        found.append(Transfer("layers for the passes", "all-gather", element * layers, 2 * passes, student.layers))
        found.append(Transfer("embeddings and head", "all-gather", element * student.root, 2 * batches))
        found.append(Transfer("gradients", "reduce-scatter", element * trained, batches, student.layers + 1))
    if layout.teacher_sharded:
        whole = _bytes_of(pair.teacher_dtype, pair.teacher) * teacher.parameters
        found.append(Transfer("teacher for its pass", "all-gather", whole, passes, teacher.layers + 1))
    return found


def sampling_transfers(student: Shape, pair: Pair, layout: Layout) -> list[Transfer]:
    """What moves before rollouts: the student to where it samples."""
    if layout.engine == "vllm":
        return [Transfer("student to the engine", "broadcast", pair.compute_bytes * student.parameters, 1)]
    if not layout.sharded:
        return []
    element = pair.compute_bytes if layout.strategy == "zero3" else pair.master_bytes
    return [Transfer("student to its replica", "all-gather", element * student.parameters, 1, student.layers)]


def rollouts_of_a_rank(work: Work, layout: Layout) -> int:
    """Completions of the rank that trains on most."""
    return math.ceil(work.rollouts / layout.ranks)


def micro_batches(work: Work, layout: Layout) -> int:
    return math.ceil(rollouts_of_a_rank(work, layout) / work.micro_batch)


# ---- the plan ----


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
        self.teacher_bytes = _bytes_of(pair.teacher_dtype, pair.teacher)
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
        elif self.layout.strategy == "fsdp":
            found["student's weights"] = pair.master_bytes * student.parameters / ranks
            found["optimizer's moments"] = 2 * pair.master_bytes * student.trained / ranks
        else:
            found["student's weights"] = pair.compute_bytes * student.parameters / ranks
            found["master weights"] = 4 * student.trained / ranks
            found["optimizer's moments"] = 8 * student.trained / ranks
        if self.layout.sharded and not self.engine:
            found["sampling replica"] = pair.compute_bytes * student.parameters
        shared = ranks if self.layout.teacher_sharded else 1
        found["teacher's weights"] = self.teacher_bytes * self.teacher.parameters / shared
        return found

    def _sampling_memory(self, block: int) -> dict[str, float]:
        """What sampling in process adds."""
        found = {"caches": self._cache_bytes_per_row() * self.rows}
        if self.pair.mixed and not self.layout.sharded:
            found["weights cast for the pass"] = self.pair.compute_bytes * self.student.parameters
        found["logits"] = self._logit_bytes_per_row(block) * self.rows
        found["teacher's hidden states"] = self._kept_hidden()
        return found

    def _kept_hidden(self) -> float:
        """The teacher's hidden states of a warm-up step's completions, from sampling to the loss."""
        return self.local * self.work.mean * self.teacher.hidden * self.teacher_bytes

    def _cache_bytes_per_row(self) -> float:
        sizes: dict[str, Any] = {"batch": 1, "sequence_length": self.length, "training": False}
        own = memory_estimate(self.pair.student, dtype=self.pair.forward_dtype, **sizes)["kv_cache"]
        return own + memory_estimate(self.pair.teacher, dtype=self.pair.teacher_dtype, **sizes)["kv_cache"]

    def _logit_bytes_per_row(self, block: int) -> float:
        sizes: dict[str, Any] = {"batch": block, "sequence_length": 1, "training": False}
        models = (self.pair.student, self.pair.teacher)
        return sum(memory_estimate(model, **sizes)["logits"] for model in models)

    def _engine_memory(self, block: int) -> dict[str, float]:
        """What vLLM takes of one accelerator."""
        return self._engine_weights() | {
            "caches": self._cache_bytes_per_row() * self.rows / self.ways,
            "logits": self._logit_bytes_per_row(block) * self.rows,
        }

    def _engine_weights(self) -> dict[str, float]:
        return {
            "engine's student": self.pair.compute_bytes * self.student.parameters / self.ways,
            "engine's teacher": self.teacher_bytes * self.teacher.parameters / self.ways,
        }

    def _update_memory(self) -> dict[str, float]:
        """What the update adds at its peak: the end of the last forward pass, with the gradients of those before."""
        student, pair, ranks = self.student, self.pair, self.layout.ranks
        accumulated = micro_batches(self.work, self.layout) > 1
        found: dict[str, float] = {}
        if self.layout.strategy == "ddp":
            found["gradients"] = pair.master_bytes * student.trained
            if ranks > 1:
                found["buckets of gradients"] = pair.master_bytes * student.trained
            if pair.mixed:
                found["weights cast for the pass"] = pair.compute_bytes * student.parameters
        else:
            element = pair.master_bytes if self.layout.strategy == "fsdp" else pair.compute_bytes
            found["gradients"] = element * student.trained / ranks
            if self.layout.strategy == "fsdp" and accumulated:
                found["unsharded gradients"] = pair.compute_bytes * student.trained
            found["gathered layers"] = pair.compute_bytes * (student.root + 2 * student.layer)
        found["activations"] = self._activations()
        found["logits"] = self._loss_logits()
        if self.layout.teacher_sharded:
            found["gathered teacher"] = self.teacher_bytes * (self.teacher.root + 2 * self.teacher.layer)
        if not self.engine:
            found["teacher's hidden states"] = self._kept_hidden()
        return found

    def _activations(self) -> float:
        """As `memory_estimate` has it; with checkpointing each layer keeps its input, and one layer the rest."""
        batch = min(self.work.micro_batch, self.local)
        sizes: dict[str, Any] = {"batch": batch, "sequence_length": self.length, "dtype": self.pair.forward_dtype}
        whole = memory_estimate(self.pair.student, training=True, **sizes)["activations"]
        if not self.work.checkpointing:
            return whole
        inputs = self.student.layers * batch * self.length * self.student.hidden * self.pair.compute_bytes
        return whole / self.student.layers + inputs

    def _loss_logits(self) -> float:
        chunk = self.work.loss_chunk or default_chunk_tokens(self.vocabulary, self.machine.device)
        batch = min(self.work.micro_batch, self.local)
        return memory_estimate(
            self.pair.student, batch=batch, sequence_length=self.length, training=True, logits_chunk=chunk
        )["logits"]

    # ---- rows in flight ----

    def _tensor_parallel(self) -> int:
        """As given, or the fewest accelerators, a power of two, that hold the engine's weights in 0.7 of their room."""
        if self.layout.tensor_parallel is not None:
            return self.layout.tensor_parallel
        free = self.machine.usable
        if not self.layout.engine_accelerators:
            free -= sum(self._resident().values())
        weights = self.pair.compute_bytes * self.student.parameters + self.teacher_bytes * self.teacher.parameters
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
        return max(0.0, free / (self._cache_bytes_per_row() / self.ways + self._logit_bytes_per_row(block)))

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
        element = self.pair.compute_bytes if shape is self.student else self.teacher_bytes
        return pass_seconds(
            shape,
            self.machine,
            tokens=tokens,
            rows=rows,
            context=self.work.prompt + self.work.mean / 2,
            element=element,
            ways=self.ways,
        )

    def _prefill(self, shape: Shape) -> float:
        prompts = math.ceil(self._rollouts_of_a_copy() / self.work.generations)
        operations = prompts * self._forward_operations(shape, self.work.prompt)
        return operations / self.ways / self.machine.reached_flops

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
        teacher = 0.0 if taught else self._wide(self.teacher, length, passes, 1)
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
        for phase, parts in plan.memory.items():
            needed = sum(parts.values())
            if needed > self.machine.usable:
                largest = sorted(parts, key=lambda name: -parts[name])[:2]
                found.append(
                    f"{phase} needs {needed / 1e9:.0f} GB of the {self.machine.usable / 1e9:.0f} GB that tensors can "
                    f"have on an accelerator, most for {' and '.join(largest)}: {self._remedy(largest[0], phase)}"
                )
        if self.layout.teacher_sharded and not self.engine:
            found.append(
                "a sharded teacher cannot take part in sampling, which reads it at other times on every rank: it must "
                "be whole during the warm-up, or served by an engine (--engine vllm)"
            )
        if self.work.rollouts % self.layout.ranks:
            found.append(
                f"{self.work.rollouts} completions do not divide over {self.layout.ranks} ranks: change "
                "prompts_per_step, num_generations or the number of accelerators"
            )
        return found

    def _remedy(self, component: str, phase: str) -> str:
        more = "use more accelerators"
        sharding = more if self.layout.sharded else "shard it (--strategy fsdp), or use lora_rank"
        serving = "serve it (--engine vllm) with --tensor-parallel" if not self.engine else "raise --tensor-parallel"
        remedies: dict[str, str] = {
            "caches": "lower rollout_batch_size",
            "logits": "lower loss_chunk_tokens" if phase == "update" else "lower rollout_batch_size",
            "activations": "lower per_device_train_batch_size, or set gradient_checkpointing",
            "teacher's weights": "shard the loss's teacher (--shard-teacher)" if self.engine else serving,
            "engine's teacher": serving,
            "engine's student": serving,
            "sampling replica": serving,
            "unsharded gradients": "raise per_device_train_batch_size until a step is one micro-batch",
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
