"""What a plan is made from: the shapes of two models, what a step does, and how processes share it."""

import math
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from trb.errors import InputError, did_you_mean, named
from trb.models.memory import bytes_of, cache_entries, query_width
from trb.models.quantization import QUANTIZATIONS
from trb.schedule import completion_budget
from trb.training.methods import Behavior, needs_teacher

__all__ = [
    "ENGINES",
    "STRATEGIES",
    "Layout",
    "Pair",
    "Shape",
    "Work",
    "columns_decided",
    "continuation_rate",
    "micro_batches",
    "rollouts_of_a_rank",
    "step_budget",
]

STRATEGIES = ("ddp", "fsdp", "zero3")
ENGINES = ("in-process", "vllm")

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal LM that decide what a pass costs; parameters are counted once, however often tied.

    Attributes:
        parameters: all of them.
        trained: those that require a gradient.
        tensors: into how many tensors they are divided.
        layers: how many.
        layer: parameters of the largest one.
        root: parameters outside the layers: embeddings, last norm, output head.
        dense: parameters of the layers that every token is multiplied with.
        experts: parameters of the layers of which a token meets only `expert_share`.
        expert_share: experts a token is sent to over experts there are; 1 without experts.
        hidden: hidden size H.
        query: query heads times their size.
        cached: numbers that a token leaves in the key-value cache, all layers together.
        key_heads: key heads of a layer; more accelerators than that cannot divide the cache further.
        vocabulary: rows of the output head V.
    """

    parameters: int
    trained: int
    tensors: int
    layers: int
    layer: int
    root: int
    dense: int
    experts: int
    expert_share: float
    hidden: int
    query: int
    cached: int
    key_heads: int
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
            raise InputError(
                f"cannot plan for {type(model).__name__}: none of its parameters belongs to a numbered layer"
            )
        total = sum(parameter.numel() for parameter in model.parameters())
        return cls(
            parameters=total,
            trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            tensors=sum(1 for _ in model.parameters()),
            layers=len(in_layers),
            layer=max(in_layers.values()),
            root=total - sum(in_layers.values()),
            dense=sum(in_layers.values()) - experts,
            experts=experts,
            expert_share=_expert_share(config) if experts else 1.0,
            hidden=config.hidden_size,
            query=query_width(config),
            cached=cache_entries(model),
            key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
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


@dataclass(frozen=True)
class Pair:
    """The two models, weights not needed, and the precisions they are kept and used in.

    Attributes:
        student: a causal LM; parameters that require no gradient are not trained.
        teacher: the same, frozen; parameters that are also the student's are counted once.
        student_dtype: of the student's own weights, a name of `trb.models.memory.DTYPES`.
        teacher_dtype: of the teacher's.
        compute_dtype: of the forward pass under autocast; None for the student's own.
        replica_dtype: of the copy that a sharded student is sampled from in process; None for that of the forward pass.
        teacher_quantization: of the weights in the teacher's layers, a name of `trb.models.quantization.QUANTIZATIONS`.
        others: bytes of the weights of further teachers, which stay beside the teacher's.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    student_dtype: str = "float32"
    teacher_dtype: str = "bfloat16"
    compute_dtype: str | None = "bfloat16"
    replica_dtype: str | None = None
    teacher_quantization: str | None = None
    others: float = 0.0

    @property
    def master_bytes(self) -> int:
        return bytes_of(self.student_dtype, self.student)

    @property
    def compute_bytes(self) -> int:
        return self.master_bytes if self.compute_dtype is None else bytes_of(self.compute_dtype, self.student)

    @property
    def mixed(self) -> bool:
        return self.compute_bytes != self.master_bytes

    @property
    def teacher_bytes(self) -> int:
        """Of a number that the teacher computes, and of a weight that is not quantised."""
        return bytes_of(self.teacher_dtype, self.teacher)

    @property
    def teacher_weight_bytes(self) -> float:
        """Of one of the teacher's weights, on the average."""
        if self.teacher_quantization is None:
            return self.teacher_bytes
        shape = Shape.of(self.teacher)
        quantised = QUANTIZATIONS[self.teacher_quantization].bytes * (shape.parameters - shape.root)
        return (quantised + self.teacher_bytes * shape.root) / shape.parameters

    @property
    def replica_bytes(self) -> int:
        return self.compute_bytes if self.replica_dtype is None else bytes_of(self.replica_dtype, self.student)


@dataclass(frozen=True)
class Work:
    """What one optimizer step does, all ranks together.

    Attributes:
        rollouts: completions of a step.
        generations: of them, how many belong to one prompt.
        prompt: tokens of a prompt.
        teacher_prompt: of the prompt that the teacher reads in its place; None for the same.
        completion: tokens of the longest completion.
        mean_completion: tokens of the mean one; None when all are as long as the longest.
        micro_batch: completions that a rank puts through one forward and backward pass.
        rows: completions that a rank samples at once, in process; None for all it has.
        kl_budget: ε, nats per token (of a budget for completions, their average); 0 for rollouts of the student alone,
            infinite where the teacher takes part and nothing bounds what is drafted in vain.
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
    teacher_prompt: int | None = None

    def __post_init__(self) -> None:
        sizes = ("rollouts", "generations", "prompt", "completion", "micro_batch", "rows", "block_size")
        for name in (*sizes, "teacher_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 < self.mean <= self.completion:
            raise InputError(
                f"mean_completion must lie above 0 and at most at completion={self.completion}, got {self.mean}"
            )
        if not self.kl_budget >= 0:
            raise InputError(f"kl_budget must be at least 0, got {self.kl_budget}")
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise InputError(f"acceptance must lie in [0, 1], got {self.acceptance}")

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
        teacher_sharded: whether ranks share the teacher of the loss, but for its head, instead of each holding it. In
            process they can do so only once it has left the sampler, which reads it at other times on every rank.
        eager_sampling: whether sampling passes launch every kernel from Python, instead of replaying a graph of them.
    """

    accelerators: int = 1
    strategy: str = "ddp"
    engine: str = "in-process"
    engine_accelerators: int = 0
    tensor_parallel: int | None = None
    teacher_sharded: bool = False
    eager_sampling: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (("strategy", self.strategy, STRATEGIES), ("engine", self.engine, ENGINES)):
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}{hint}")
        if self.accelerators < 1:
            raise InputError(f"a plan needs at least 1 accelerator, got {self.accelerators}")
        if not 0 <= self.engine_accelerators < self.accelerators:
            raise InputError(
                f"{named('engine_accelerators')}={self.engine_accelerators} of {self.accelerators} leave none to train "
                "on"
            )
        if self.engine_accelerators and self.engine != "vllm":
            raise InputError(
                f"{named('engine_accelerators')} are vLLM's: choose {named('engine')} vllm, or set them to 0"
            )
        if self.tensor_parallel is not None and not 1 <= self.tensor_parallel <= self.sampling_ranks:
            raise InputError(
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


def rollouts_of_a_rank(work: Work, layout: Layout) -> int:
    """Completions of the rank that trains on most."""
    return math.ceil(work.rollouts / layout.ranks)


def micro_batches(work: Work, layout: Layout) -> int:
    return math.ceil(rollouts_of_a_rank(work, layout) / work.micro_batch)


def step_budget(behavior: Behavior, step: int, mean: float) -> float:
    """`Work.kl_budget` of a step whose completions have `mean` tokens.

    Of a budget for completions it is what is left of it, over their tokens: a step may have several times the ε of the
    one before, so the first one's bounds nothing; but what is spent on a token is this much on the average, and as the
    root of `continuation_rate` is concave, drafts are on the average kept at least at its rate.
    """
    if not needs_teacher(behavior, step):
        return 0.0
    if (held := completion_budget(behavior.schedule)) is not None:
        return held.target * held.left.value(step) / mean
    return float(getattr(behavior.at(step), "kl_budget", math.inf))


def continuation_rate(kl_budget: float) -> float:
    """The least rate at which drafts are kept at that budget: 1 - sqrt(ε/2), by Pinsker's inequality (0 at least)."""
    return max(0.0, 1 - math.sqrt(kl_budget / 2))


def columns_decided(block: int, rate: float, rows: float) -> float:
    """Positions of a round that some row of `rows` still needs decided."""
    return sum(1 - (1 - rate**drafted) ** rows for drafted in range(block))
