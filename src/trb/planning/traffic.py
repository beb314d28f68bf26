"""What ranks send to each other in a step, and how long it takes.

Bytes are those of the ring algorithms. The counts for FSDP2 are those that torch was seen to make
(tests/planning/test_planning.py); those for ZeRO-3 follow its documentation. Nothing is hidden behind computation here.
"""

import math
from dataclasses import dataclass

from trb.models.modeling import length_groups
from trb.planning.inputs import Layout, Pair, Shape, Work, micro_batches, rollouts_of_a_rank
from trb.planning.machines import Machine

__all__ = ["Transfer", "sampling_transfers", "transfer_seconds", "update_transfers"]

# DistributedDataParallel's default, in bytes.
_BUCKET = 25e6


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
        whole = pair.teacher_weight_bytes * (teacher.parameters - teacher.head)
        found.append(Transfer("teacher for its pass", "all-gather", whole, passes, teacher.layers + 1))
    return found


def sampling_transfers(student: Shape, pair: Pair, layout: Layout) -> list[Transfer]:
    """What moves before rollouts: the student to where it samples."""
    if layout.engine == "vllm":
        return [Transfer("student to the engine", "broadcast", pair.compute_bytes * student.parameters, 1)]
    if not layout.sharded:
        return []
    # Cast before it travels, a parameter at a time; weights that are not trained stay as they were.
    return [Transfer("student to its replica", "all-gather", pair.replica_bytes * student.trained, 1, student.tensors)]
