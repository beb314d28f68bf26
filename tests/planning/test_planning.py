"""The cost model held to real models, real collectives and numbers worked out by hand."""

import itertools
import json
import math
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from trb.blend import solve
from trb.models.modeling import completion_hidden_states
from trb.planning import (
    MACHINES,
    Figure,
    Layout,
    Machine,
    Pair,
    Plan,
    Shape,
    Work,
    find_machine,
    make_plan,
    run_seconds,
)
from trb.planning.inputs import columns_decided, continuation_rate
from trb.planning.machines import KINDS
from trb.planning.plan import pass_seconds
from trb.planning.traffic import Transfer, sampling_transfers, transfer_seconds, update_transfers
from trb.sampling.blocks import tokens_per_round

ROOT = Path(__file__).parents[2]
H100 = MACHINES["h100"]
RANKS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def tiny(layers: int = 3, **changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(Qwen3Config(**{**SIZES, "num_hidden_layers": layers, **changes})).eval()


@cache
def published(name: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(ROOT / "benchmarks" / "shapes" / name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def qwen() -> Pair:
    return Pair(published("qwen3-1.7b"), published("qwen3-8b"))


PROTOCOL = Work(
    rollouts=256, generations=4, prompt=1024, completion=7168, micro_batch=4, rows=8, kl_budget=0.01, checkpointing=True
)


# ---- collectives: counted while torch makes them ----


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """This process as the first of four whose collectives move nothing."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def loss_of(model: PreTrainedModel, rows: int) -> torch.Tensor:
    """What the trainer's loss reads of the student: hidden states by length group, and the head."""
    ids = torch.arange(rows * 12).reshape(rows, 12) % 64
    mask = torch.ones_like(ids)
    completion = mask.clone()
    completion[:, :4] = 0
    return model.lm_head(completion_hidden_states(model, ids, mask, completion)).float().logsumexp(-1).sum()


def through(wrapper: torch.nn.Module, model: PreTrainedModel, rows: int) -> None:
    """One micro-batch through a wrapper whose forward does something else, as TRL's redirection does."""
    with mock.patch.object(model, "forward", lambda: loss_of(model, rows)):
        wrapper().backward()


# What FSDP2 calls, in newer and older releases of torch.
GATHER, SCATTER = (
    ("all_gather_single", "reduce_scatter_single")
    if hasattr(dist, "all_gather_single")
    else ("all_gather_into_tensor", "reduce_scatter_tensor")
)


def counted(name: str, seen: Counter[str]) -> Any:
    """Counts the calls of a collective and the bytes of the whole tensor, the larger of input and output."""
    real = getattr(dist, name)

    def count(*arguments: Any, **options: Any) -> Any:
        tensors = [each for each in (*arguments, *options.values()) if isinstance(each, torch.Tensor)]
        seen[name] += max(each.nbytes for each in tensors)
        seen[f"{name} calls"] += 1
        return real(*arguments, **options)

    return mock.patch.object(dist, name, count)


def planned_bytes(pair: Pair, work: Work, layout: Layout, kind: str) -> tuple[float, float]:
    """(bytes of the whole tensors, calls) of every collective of a kind in one update."""
    shapes = Shape.of(pair.student), Shape.of(pair.teacher)
    found = [each for each in update_transfers(*shapes, pair, work, layout) if each.kind == kind]
    return sum(each.payload * each.count for each in found), sum(each.count * each.calls for each in found)


@pytest.mark.parametrize(("rows", "batches"), [(1, 1), (4, 1), (1, 3), (2, 2), (3, 2), (8, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_fsdp_moves_what_the_plan_says(fake_ranks: None, rows: int, batches: int, tied: bool) -> None:
    student = tiny(tie_word_embeddings=tied)
    work = Work(rollouts=RANKS * rows * batches, generations=1, prompt=4, completion=8, micro_batch=rows)
    pair = Pair(tiny(tie_word_embeddings=tied), tiny())
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in student.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(student, mesh=mesh, mp_policy=precision)
    seen: Counter[str] = Counter()
    with counted(GATHER, seen), counted(SCATTER, seen):
        for batch in range(batches):
            student.set_requires_gradient_sync(batch == batches - 1)  # type: ignore[operator]
            through(student, student, rows)
    layout = Layout(RANKS, "fsdp")
    assert (seen[GATHER], seen[f"{GATHER} calls"]) == planned_bytes(pair, work, layout, "all-gather")
    assert (seen[SCATTER], seen[f"{SCATTER} calls"]) == planned_bytes(pair, work, layout, "reduce-scatter")


def test_fsdp_keeps_what_the_plan_says(fake_ranks: None) -> None:
    student = tiny()
    work = Work(rollouts=RANKS * 4, generations=1, prompt=4, completion=8, micro_batch=2)
    plan = make_plan(Pair(tiny(), tiny()), work, Layout(RANKS, "fsdp"), H100)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (RANKS,))
    modules = [*student.model.layers, student]
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    student.set_requires_gradient_sync(False)  # type: ignore[operator]
    through(student, student, 2)
    # The first micro-batch's gradients wait on every rank, whole and in bf16.
    groups = [module._get_fsdp_state()._fsdp_param_group for module in modules]  # type: ignore[union-attr,operator]
    waiting = sum(each._unsharded_param.grad.nbytes for group in groups for each in group.fsdp_params)
    assert plan.memory["update"]["unsharded gradients"] == waiting
    student.set_requires_gradient_sync(True)  # type: ignore[operator]
    through(student, student, 2)
    optimizer = torch.optim.AdamW(student.parameters(), foreach=False)
    optimizer.step()
    local = [parameter.to_local() for parameter in student.parameters()]  # type: ignore[operator]
    assert plan.memory["update"]["student's weights"] == sum(each.nbytes for each in local)
    assert plan.memory["update"]["gradients"] == sum(
        parameter.grad.to_local().nbytes
        for parameter in student.parameters()  # type: ignore[union-attr,operator]
    )
    moments = [state[name].to_local() for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.memory["update"]["optimizer's moments"] == sum(each.nbytes for each in moments)


def test_ddp_reduces_what_the_plan_says(fake_ranks: None) -> None:
    student = tiny()
    work = Work(rollouts=RANKS * 2, generations=1, prompt=4, completion=8, micro_batch=2)
    wrapped = DistributedDataParallel(student)
    reduced: list[int] = []

    def hook(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.buffer().nbytes)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    with mock.patch.object(student, "forward", lambda: loss_of(student, 2)):
        wrapped().backward()
    pair = Pair(tiny(), tiny())
    assert sum(reduced) == planned_bytes(pair, work, Layout(RANKS), "all-reduce")[0]
    plan = make_plan(pair, work, Layout(RANKS), H100)
    # Gradients have their own storage beside the buckets they travel in, which outlive them.
    assert plan.memory["update"]["buckets of gradients"] == sum(reduced)
    assert plan.memory["sampling"]["buckets of gradients"] == sum(reduced)
    assert "gradients" not in plan.memory["sampling"]
    assert plan.memory["update"]["gradients"] == sum(parameter.grad.nbytes for parameter in student.parameters())
    assert "buckets of gradients" not in make_plan(pair, work, Layout(1), H100).memory["update"]


def ring(kind: str, ranks: int) -> int:
    """Chunks (of `ranks` in the whole tensor) that each rank receives, found by passing them round a ring."""
    received = [0] * ranks
    if kind in ("reduce-scatter", "all-reduce"):
        # sums[r][c]: which ranks' numbers are in rank r's partial sum of chunk c
        sums = [[{rank} for _ in range(ranks)] for rank in range(ranks)]
        for step in range(ranks - 1):
            moves = [((rank + 1) % ranks, (rank - step) % ranks, rank) for rank in range(ranks)]
            for target, chunk, source in moves:
                sums[target][chunk] = sums[target][chunk] | sums[source][chunk]
                received[target] += 1
        assert all(any(len(sums[rank][chunk]) == ranks for rank in range(ranks)) for chunk in range(ranks))
    if kind in ("all-gather", "all-reduce"):
        held = [{rank} for rank in range(ranks)]
        while any(len(each) < ranks for each in held):
            moves = [((rank + 1) % ranks, max(held[rank] - held[(rank + 1) % ranks])) for rank in range(ranks)]
            for target, chunk in moves:
                held[target].add(chunk)
                received[target] += 1
    assert len(set(received)) == 1
    return received[0]


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce"])
def test_received_bytes_are_those_of_a_ring(kind: str, ranks: int) -> None:
    assert Transfer("x", kind, payload=ranks, count=1).received(ranks) == pytest.approx(ring(kind, ranks))


def test_a_single_rank_receives_nothing() -> None:
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "broadcast"):
        assert Transfer("x", kind, payload=1e9, count=3).received(1) == 0
        assert transfer_seconds(Transfer("x", kind, payload=1e9, count=3), 1, H100) == 0


def machine(**changes: float) -> Machine:
    """Round numbers: 1 GB/s, 1 TFLOP/s, 100 MB/s links and 10 MB/s adapters, and nothing else unless asked for."""
    zero = dict.fromkeys(("reserved", "collective", "layer", "eager_layer", "eager_slot_layer"), 0.0)
    zero |= dict.fromkeys(("draw", "draw_entry", "column", "solve_entry", "loss_entry"), 0.0)
    sizes = {"per_node": 8, "memory": 1e12, "bandwidth": 1e9, "flops": 1e12, "link": 1e8, "network": 1e7}
    shares = dict.fromkeys(("bandwidth_share", "flops_share", "narrow_share", "link_share"), 1.0)
    values = zero | sizes | shares | changes
    return Machine("round", "cuda", **{name: Figure(value, "assumed", "a test") for name, value in values.items()})


def test_transfer_times_by_hand() -> None:
    gather = Transfer("x", "all-gather", payload=8e6, count=2, calls=5)
    # 7/8 of 8 MB twice at 100 MB/s, and ten calls of a millisecond
    assert transfer_seconds(gather, 8, machine(collective=1e-3)) == pytest.approx(0.14 + 0.01)
    # Two nodes: half of 8 MB enters each, twice, through eight adapters of 10 MB/s; the links need 0.15 s.
    assert transfer_seconds(gather, 16, machine()) == pytest.approx(0.15)
    assert transfer_seconds(gather, 16, machine(network=5e6)) == pytest.approx(0.2)
    assert transfer_seconds(gather, 16, machine(network=5e6, link_share=0.5)) == pytest.approx(0.4)


def test_the_student_travels_to_where_it_samples_once_a_step() -> None:
    pair = Pair(tiny(), tiny())
    weights = sum(parameter.numel() for parameter in tiny().parameters())
    shape = Shape.of(pair.student)
    assert sampling_transfers(shape, pair, Layout(8)) == []
    whole = Pair(tiny(), tiny(), replica_dtype="float32")
    for kept, layout, size in (
        (pair, Layout(8, "fsdp"), 2 * weights),
        (whole, Layout(8, "fsdp"), 4 * weights),
        (pair, Layout(8, "zero3"), 2 * weights),
        (pair, Layout(8, "ddp", "vllm"), 2 * weights),
    ):
        (found,) = sampling_transfers(shape, kept, layout)
        assert found.payload * found.count == size


# ---- shapes: held to the models ----


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-0.6b", 0.596),
        ("qwen3-1.7b", 1.721),
        ("qwen3-4b", 4.022),
        ("qwen3-8b", 8.191),
        ("llama-70b", 70.554),
        ("llama-405b", 405.853),
    ],
)
def test_the_shapes_on_file_have_the_published_sizes(name: str, billions: float) -> None:
    assert Shape.of(published(name)).parameters / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_shape_counts_what_the_model_has(tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    shape = Shape.of(model)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert shape.dense == layers and shape.layers == 3 and shape.layer * 3 == layers
    assert shape.root == (1 if tied else 2) * 64 * 32 + 32
    assert shape.parameters == shape.trained == sum(parameter.numel() for parameter in model.parameters())
    cache = model(torch.arange(5)[None], use_cache=True).past_key_values
    assert 5 * shape.cached == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def operations(model: PreTrainedModel, length: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(torch.arange(length)[None] % 64)
    return counter.get_total_flops()


def test_operations_are_those_torch_counts() -> None:
    model = tiny(attn_implementation="eager")
    shape = Shape.of(model)
    # Torch counts every pair of positions, a causal kernel half of them: the quadratic part is taken from differences.
    first, second, third = (operations(model, length) for length in (16, 32, 48))
    quadratic = (third - 2 * second + first) / 2 / 16**2
    linear = (second - first) / 16 - quadratic * 48
    small = sum(parameter.numel() for name, parameter in model.model.layers.named_parameters() if "norm" in name)
    # Norms and rotations are no products; rotary embeddings are one, of size head_dim / 2 per position.
    assert linear == pytest.approx(2 * (shape.multiplied(head=False) - small), rel=1e-3)
    whole = Work(rollouts=1, generations=1, prompt=100, completion=100, micro_batch=1, kl_budget=0.0)
    plan = make_plan(Pair(model, model), whole, Layout(1), machine())
    expected = 3 * (linear * 200 + quadratic / 2 * 200**2) / 1e12
    assert plan.plain["student's forward and backward"] == pytest.approx(expected, rel=0.02)


def test_experts_are_read_as_they_are_met() -> None:
    sizes = {**SIZES, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes))
    shape = Shape.of(model)
    inside = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert shape.experts == inside > 0 and shape.expert_share == 1 / 4
    assert shape.dense + shape.experts + shape.root == shape.parameters
    assert shape.read(1, head=False) == shape.multiplied(head=False) == shape.dense + inside / 4
    assert shape.read(1000, head=False) == pytest.approx(shape.dense + inside)
    # Two tokens that choose 2 of 8 at random: an expert is missed by both with probability (3/4)^2.
    assert shape.read(2, head=False) == pytest.approx(shape.dense + inside * 7 / 16)


def test_a_pass_by_hand() -> None:
    shape = replace(
        Shape.of(tiny()),
        layers=2,
        dense=1000,
        experts=0,
        hidden=10,
        vocabulary=100,
        query=10,
        cached=40,
        parameters=2000,
    )
    # Reads 2 bytes of 1000 + 1000 weights and of 3 x 50 x 40 cached numbers: 16 kB. Multiplies 3 tokens by 2000
    # weights and with 50 positions: 3 x (4000 + 4 x 10 x 2 x 50) = 24,000 operations.
    host = machine(bandwidth=1e6, flops=1e6, layer=0.5)
    found = pass_seconds(shape, host, tokens=3, rows=3, context=50, element=2)
    assert found == pytest.approx(2 * 0.5 + 0.016 + 0.024)
    slow = machine(bandwidth=1e6, flops=1e6, layer=0.5, eager_slot_layer=3.0)
    assert pass_seconds(shape, slow, tokens=3, rows=3, context=50, element=2, eager=True) == 6.0
    # Half the reading and multiplying each, as there are two key heads, and four all-reduces of 3 x 10 numbers of 2
    # bytes at 100 MB/s.
    shared = pass_seconds(shape, host, tokens=3, rows=3, context=50, element=2, ways=2)
    assert shared == pytest.approx(1.0 + 0.008 + 0.012 + 4 * 60 / 1e8)
    # Of four, each reads a quarter of the weights and still half of the cache.
    more = pass_seconds(shape, host, tokens=3, rows=3, context=50, element=2, ways=4)
    assert more == pytest.approx(1.0 + 0.001 + 0.006 + 0.006 + 4 * 90 / 1e8)


# ---- rounds ----


@pytest.mark.parametrize(("block", "rate"), [(1, 0.3), (3, 0.8), (5, 0.95), (4, 0.0), (4, 1.0)])
def test_tokens_and_columns_of_a_round_by_enumeration(block: int, rate: float) -> None:
    # Every way two rows can keep or lose their drafts; the first lost one is replaced, and ends the row's round.
    tokens = columns = 0.0
    for outcome in itertools.product([True, False], repeat=2 * block):
        probability = math.prod(rate if kept else 1 - rate for kept in outcome)
        ended = [
            next((i + 1 for i, kept in enumerate(row) if not kept), block) for row in (outcome[::2], outcome[1::2])
        ]
        tokens += probability * ended[0]
        columns += probability * max(ended)
    assert tokens_per_round(block, rate) == pytest.approx(tokens)
    assert columns_decided(block, rate, 2) == pytest.approx(columns)


@pytest.mark.parametrize("budget", [0.0, 0.001, 0.02, 0.05, 0.5, 3.0])
def test_drafts_are_kept_at_least_at_the_rate_of_the_bound(budget: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(400, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    behavior = solve(student, teacher, budget).log_probs.exp()
    kept = torch.minimum(behavior, student.softmax(-1)).sum(-1)
    assert (kept >= continuation_rate(budget) - 1e-6).all()


def lanes(lengths: list[int], slots: int) -> int:
    """Steps until every row is done, a finished row's slot going to the next."""
    ends = [0] * slots
    for length in lengths:
        first = ends.index(min(ends))
        ends[first] += length
    return max(ends)


def drafted_steps(work: Work) -> float:
    """Student passes of a step that drafts one token a pass, from the seconds they take."""
    pair = Pair(tiny(), tiny(), compute_dtype=None)
    plan = make_plan(pair, work, Layout(1), machine(bandwidth=1e30, flops=1e30, draw=0.5))
    return plan.plain["drafting"]


@pytest.mark.parametrize(("rows", "slots"), [(8, 8), (8, 2), (32, 8)])
def test_equal_rows_take_the_steps_of_a_simulation(rows: int, slots: int) -> None:
    work = Work(rollouts=rows, generations=1, prompt=4, completion=30, micro_batch=2, rows=slots, kl_budget=0.0)
    assert drafted_steps(work) == pytest.approx(lanes([30] * rows, slots))


def test_uneven_rows_take_about_the_steps_of_a_simulation() -> None:
    generator = torch.Generator().manual_seed(2)
    for slots in (4, 16):
        lengths = torch.randint(10, 101, (64,), generator=generator).tolist()
        work = Work(
            rollouts=64,
            generations=1,
            prompt=4,
            completion=max(lengths),
            mean_completion=sum(lengths) / 64,
            micro_batch=2,
            rows=slots,
            kl_budget=0.0,
        )
        assert 0.95 < drafted_steps(work) / lanes(lengths, slots) < 1.25


# ---- plans ----


def test_memory_of_one_process_is_what_its_tensors_take() -> None:
    student, teacher = tiny(), tiny(5)
    work = Work(rollouts=4, generations=2, prompt=4, completion=8, micro_batch=4, kl_budget=0.1)
    pair = Pair(student, teacher, teacher_dtype="float32", compute_dtype=None)
    plan = make_plan(pair, work, Layout(1), H100)
    optimizer = torch.optim.AdamW(student.parameters())
    loss_of(student, 4).backward()
    optimizer.step()
    update = plan.memory["update"]
    assert update["student's weights"] == sum(parameter.nbytes for parameter in student.parameters())
    assert update["gradients"] == sum(parameter.grad.nbytes for parameter in student.parameters())
    assert update["optimizer's moments"] == sum(
        state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    )
    assert update["teacher's weights"] == sum(parameter.nbytes for parameter in teacher.parameters())
    cached = 0
    for model in (student, teacher):
        cache = model(torch.zeros(4, 12, dtype=torch.long), use_cache=True).past_key_values
        cached += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan.memory["sampling"]["caches"] == cached
    assert update["teacher's hidden states"] == torch.empty(4, 8, 32).nbytes
    # The loss holds the student's, the teacher's and a gradient for a chunk, a round two heads for every draft.
    vocabulary, block = student.config.vocab_size, int(plan.numbers["block_size"])
    assert update["logits of the loss"] == torch.empty(3, 4 * 12, vocabulary).nbytes
    assert plan.memory["sampling"]["logits of a round"] == torch.empty(2, 4, block, vocabulary).nbytes
    chunked = make_plan(pair, replace(work, loss_chunk=5), Layout(1), H100)
    assert chunked.memory["update"]["logits of the loss"] == torch.empty(3, 5, vocabulary).nbytes
    assert plan.peak == max(sum(parts.values()) for parts in plan.memory.values())


def test_a_longer_prompt_of_the_teachers_takes_its_cache_and_its_time_alone() -> None:
    student, teacher = tiny(), tiny(5)
    work = Work(rollouts=4, generations=2, prompt=4, completion=8, micro_batch=4, kl_budget=0.1, block_size=2)
    pair = Pair(student, teacher, teacher_dtype="float32", compute_dtype=None)
    same, equal, longer = (
        make_plan(pair, replace(work, teacher_prompt=tokens), Layout(1), H100) for tokens in (None, 4, 20)
    )
    assert same == equal
    cache = teacher(torch.zeros(4, 16, dtype=torch.long), use_cache=True).past_key_values
    more = longer.memory["sampling"]["caches"] - same.memory["sampling"]["caches"]
    assert more == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    at_scale = (replace(PROTOCOL, teacher_prompt=tokens) for tokens in (None, 8 * PROTOCOL.prompt))
    same, longer = (make_plan(qwen(), work, Layout(8), H100) for work in at_scale)
    for part in ("reading prompts", "teacher's block passes"):
        assert longer.warmup[part] > same.warmup[part]
    assert longer.plain["teacher's wide pass"] > same.plain["teacher's wide pass"]
    for part in ("reading prompts", "drafting", "student's forward and backward"):
        assert longer.plain[part] == same.plain[part]


def test_mixed_precision_keeps_master_weights_and_casts() -> None:
    plan = make_plan(qwen(), PROTOCOL, Layout(8), H100)
    billion = 1.720574976
    update = {name: size / 1e9 for name, size in plan.memory["update"].items()}
    assert update["student's weights"] == pytest.approx(4 * billion)
    assert update["optimizer's moments"] == pytest.approx(8 * billion)
    assert update["weights cast for the pass"] == pytest.approx(2 * billion)
    assert update["teacher's weights"] == pytest.approx(2 * 8.19073536)


def test_zero3_divides_sixteen_bytes_a_parameter() -> None:
    plan = make_plan(qwen(), PROTOCOL, Layout(8, "zero3"), H100)
    divided = ("student's weights", "master weights", "optimizer's moments", "gradients")
    assert sum(plan.memory["update"][name] for name in divided) == pytest.approx(16 * 1.720574976e9 / 8)
    assert plan.memory["sampling"]["sampling replica"] == 2 * 1720574976
    whole = make_plan(replace(qwen(), replica_dtype="float32"), PROTOCOL, Layout(8, "zero3"), H100)
    assert whole.memory["sampling"]["sampling replica"] == 4 * 1720574976


def test_only_trained_parameters_have_gradients_and_travel() -> None:
    student = tiny()
    student.requires_grad_(False)
    student.lm_head.requires_grad_(True)
    work = Work(rollouts=8, generations=1, prompt=4, completion=8, micro_batch=2)
    plan = make_plan(Pair(student, tiny()), work, Layout(2), H100)
    assert plan.memory["update"]["gradients"] == student.lm_head.weight.nbytes == plan.traffic["gradients"]


def total(plan: Plan) -> float:
    return sum(plan.warmup.values())


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_more_ranks_never_take_more_memory_each(strategy: str) -> None:
    peaks = [make_plan(qwen(), PROTOCOL, Layout(ranks, strategy), H100).peak for ranks in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.2 * peaks[-1]


@pytest.mark.parametrize(
    ("changes", "grows"),
    [
        ({"completion": 3584}, False),
        ({"rollouts": 512}, True),
        ({"kl_budget": 0.05}, True),
        ({"acceptance": 0.99}, False),
        ({"rows": 16}, False),
        ({"checkpointing": False}, False),
        ({"mean_completion": 2000.0}, False),
    ],
)
def test_time_moves_the_right_way(changes: dict[str, Any], grows: bool) -> None:
    before, after = (make_plan(qwen(), work, Layout(8), H100) for work in (PROTOCOL, replace(PROTOCOL, **changes)))
    assert (total(after) > total(before)) is grows


def test_the_chosen_block_is_the_fastest_there_is() -> None:
    chosen = make_plan(qwen(), PROTOCOL, Layout(8), H100)
    for block in range(1, 17):
        assert total(make_plan(qwen(), replace(PROTOCOL, block_size=block), Layout(8), H100)) >= total(chosen) - 1e-9


def test_checkpointing_trades_activations_for_time() -> None:
    kept, again = (
        make_plan(qwen(), replace(PROTOCOL, checkpointing=flag), Layout(8, "fsdp"), H100) for flag in (False, True)
    )
    assert again.memory["update"]["activations"] < kept.memory["update"]["activations"] / 5
    ratio = again.plain["student's forward and backward"] / kept.plain["student's forward and backward"]
    assert ratio == pytest.approx(4 / 3)


def test_a_blended_step_reuses_the_teachers_hidden_states_only_in_process() -> None:
    ours, served = (make_plan(qwen(), PROTOCOL, Layout(8, engine=engine), H100) for engine in ("in-process", "vllm"))
    assert ours.warmup["teacher's wide pass"] == 0 < ours.plain["teacher's wide pass"]
    assert served.warmup["teacher's wide pass"] == ours.plain["teacher's wide pass"]
    assert "teacher's hidden states" not in served.memory["update"]


def test_an_engine_fills_its_memory_with_rows() -> None:
    layout = Layout(8, "fsdp", "vllm", engine_accelerators=4)
    plan = make_plan(qwen(), PROTOCOL, layout, H100)
    # Four accelerators train, four sample 64 rows each, as many at once as find room for caches of whole sequences.
    assert plan.numbers["tensor_parallel"] == 1
    row = 8192 * 2 * 2 * 128 * 8 * (28 + 36)  # tokens, keys and values, bytes, head size, heads, layers
    paged = make_plan(qwen(), replace(PROTOCOL, mean_completion=3072.0), layout, H100)
    free = 74e9 - 2 * (1720574976 + 8190735360)
    assert plan.numbers["rows_that_fit"] == pytest.approx(free / row, rel=0.02)
    # Pages are as long as the rows are: half as long, twice as many.
    assert paged.numbers["rows_that_fit"] == pytest.approx(2 * free / row, rel=0.04)
    assert sum(plan.memory["engine"].values()) <= 74e9
    assert not plan.problems


def test_a_teacher_too_large_for_one_accelerator_is_shared() -> None:
    pair = Pair(published("llama-70b"), published("llama-405b"))
    work = replace(PROTOCOL, micro_batch=1)
    alone = make_plan(pair, work, Layout(64, "fsdp"), H100)
    assert any("sampling needs" in problem and "--engine vllm" in problem for problem in alone.problems)
    layout = Layout(128, "fsdp", "vllm", engine_accelerators=64, teacher_sharded=True)
    served = make_plan(pair, work, layout, H100)
    weights = 2 * (70553706496 + 405853388800)
    assert served.numbers["tensor_parallel"] == 32 and weights / 16 > 0.7 * H100.usable > weights / 32
    assert [problem for problem in served.problems if problem.startswith("engine")] == []
    # The gradients that wait for the last micro-batch take more than the accelerator has.
    assert any("until a rank has one micro-batch" in problem for problem in served.problems)


def test_a_sharded_teacher_is_whole_while_it_samples_in_process() -> None:
    layout = Layout(8, "fsdp", teacher_sharded=True)
    whole, head = 2 * 8190735360, 2 * 151936 * 4096
    sizes = {
        budget: make_plan(qwen(), replace(PROTOCOL, kl_budget=budget), layout, H100).memory["update"][
            "teacher's weights"
        ]
        for budget in (0.01, 0.0)
    }
    assert sizes == {0.01: whole, 0.0: head + (whole - head) / 8}
    blended = make_plan(qwen(), PROTOCOL, layout, H100)
    apart = make_plan(qwen(), PROTOCOL, Layout(8, "fsdp"), H100)
    # 8 micro-batches of 4 passes; seven eighths of all but the head come from elsewhere, at 360 GB/s.
    moved = 32 * 7 / 8 * (whole - head)
    assert blended.traffic["teacher for its pass"] == moved
    assert total(blended) == pytest.approx(total(apart))
    slower = sum(blended.plain.values()) - sum(apart.plain.values())
    assert slower == pytest.approx(moved / 360e9 + 32 * 37 * 30e-6)


def test_completions_that_do_not_divide_are_a_problem() -> None:
    plan = make_plan(qwen(), PROTOCOL, Layout(6), H100)
    assert any("256 completions do not divide over 6 ranks" in problem for problem in plan.problems)


def test_a_run_adds_up_its_steps() -> None:
    calls: list[float] = []

    def make(budget: float) -> Plan:
        calls.append(budget)
        return Plan(warmup={"a": 1 + budget, "b": 1.0}, plain={"a": 0.25, "b": 0.25})

    assert run_seconds(make, [2.0, 1.0, 0.0, 0.0, 0.0]) == 4 + 3 + 3 * 0.5
    assert calls == [2.0, 1.0, 0.0]  # equal budgets are planned once


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Layout(0), "at least 1 accelerator"),
        (lambda: Layout(2, "fsdp2"), "unknown strategy 'fsdp2'.*did you mean 'fsdp'"),
        (lambda: Layout(2, engine="sglang"), "unknown engine"),
        (lambda: Layout(2, engine="vllm", engine_accelerators=2), "leave none to train on"),
        (lambda: Layout(2, engine_accelerators=1), "are vLLM's"),
        (lambda: Layout(2, engine="vllm", tensor_parallel=4), "tensor_parallel=4 is out of range"),
        (lambda: replace(PROTOCOL, rollouts=0), "rollouts must be at least 1"),
        (lambda: replace(PROTOCOL, mean_completion=8000.0), "mean_completion must lie"),
        (lambda: replace(PROTOCOL, mean_completion=math.nan), "mean_completion must lie"),
        (lambda: replace(PROTOCOL, kl_budget=-1.0), "kl_budget must be at least 0"),
        (lambda: replace(PROTOCOL, acceptance=1.5), r"acceptance must lie in \[0, 1\]"),
    ],
)
def test_impossible_inputs_are_refused(make: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


# ---- machines ----


@pytest.mark.parametrize("name", MACHINES)
def test_every_figure_says_where_it_comes_from(name: str) -> None:
    for field, figure in MACHINES[name].figures().items():
        assert figure.kind in KINDS and figure.source, field
        for path in [word.strip(":,;") for word in figure.source.split() if word.startswith("benchmarks/")]:
            assert (ROOT / path).is_file(), path
        assert figure.kind != "measured" or "benchmarks/results/" in figure.source, field


def test_the_measured_figures_of_the_h100_follow_from_their_file() -> None:
    sections = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())["sections"]
    names = ("time_solver", "time_draw", "time_step", "time_decoding", "time_sampling")
    solver, drawing, step, decoding, sampling = (sections[name]["numbers"] for name in names)
    copy = 1e9 * solver["copy"]["gb_per_s"]
    found = {"bandwidth_share": copy / 3.35e12}
    # One-token passes of 8 and 64 rows, on a line: what is left of no rows is the weights and the layers.
    small, large = (1e-3 * decoding[f"slots, graphs, batch {rows}"]["milliseconds"] for rows in (8, 64))
    found["layer"] = (small - 8 * (large - small) / 56 - 2 * 1720574976 / copy) / 28
    eager = [1e-3 * decoding[f"eager, static cache, batch {rows}"]["milliseconds"] / 28 for rows in (8, 64)]
    found["eager_layer"] = sum(eager) / 2
    # 8 sequences of 512 tokens: two operations a weight of the layers, and the causal half of the attention.
    student, teacher = 1720574976 - 151936 * 2048, 8190735360 - 2 * 151936 * 4096
    forward = 8 * 512 * (2 * student + 2 * 512 * 2048 * 28)
    taught = 8 * 512 * (2 * teacher + 2 * 512 * 4096 * 36)
    parts = step["losses and gradients"]
    spent = parts["teacher_forward_s"] + parts["student_forward_s"] + parts["backward_s"]
    rate = (3 * forward + taught) / spent
    found["flops_share"] = rate / 989.4e12
    tokens = 8 * 448
    products = 2 * tokens * 151936 * (3 * 2048 + 4096)
    found["loss_entry"] = (parts["loss_forward_s"] - products / rate) / (tokens * 151936)
    draws = [1e-3 * drawing[f"{rows} rows, V=151936"]["inverse_cdf_ms"] for rows in (8, 64, 512)]
    found["draw"] = sum(draws) / 3
    found["draw_entry"] = (draws[2] - draws[0]) / 504 / 151936
    alone = sampling["student, batch 8, speculative"]
    # 64 tokens a row and a pass for the prompts; two draws for each token.
    found["eager_slot_layer"] = (alone["seconds"] - 64 * 2 * found["draw"]) / 65 / 28
    solves = [1e-3 * solver[f"fused solve, {rows} rows, V=151936"]["milliseconds"] for rows in (8, 512)]
    found["solve_entry"] = (solves[1] - solves[0]) / 504 / 151936
    found["column"] = solves[0] - 8 * 151936 * found["solve_entry"] + found["draw"]
    for name, value in found.items():
        assert getattr(H100, name).value == pytest.approx(value, rel=0.02), name
    measured = {name for name, figure in H100.figures().items() if figure.kind == "measured"}
    assert measured == set(found)


def test_the_cpu_is_the_one_that_was_fitted() -> None:
    fitted = json.loads((ROOT / "benchmarks/results/plan_check.json").read_text())["machine"]
    for name, figure in MACHINES["cpu"].figures().items():
        assert figure.value == pytest.approx(fitted[name]["value"], rel=0.005), name
        assert figure.kind == fitted[name]["kind"], name


def test_a_machine_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "b200.json"
    file.write_text(json.dumps({"like": "h100", "memory": {"value": 192e9, "kind": "data sheet", "source": "a sheet"}}))
    found = find_machine(str(file))
    assert (found.name, found.memory.value, found.flops) == ("b200", 192e9, H100.flops)
    whole = {name: figure._asdict() for name, figure in H100.figures().items()} | {"name": "again", "device": "cpu"}
    file.write_text(json.dumps(whole))
    again = find_machine(str(file))
    assert again.figures() == H100.figures() and (again.name, again.device) == ("again", "cpu")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"like": "h200"}', "like is 'h200'; choose one of .*; did you mean 'h100'"),
        ('{"like": "h100", "memori": {}}', "unknown field 'memori'; did you mean 'memory'"),
        ('{"memory": {"value": 1, "kind": "assumed", "source": "x"}}', "leaves per_node, .* open"),
        ('{"like": "h100", "memory": 80}', "memory must be an object"),
        ('{"like": "h100", "memory": {"value": "much", "kind": "assumed", "source": "x"}}', "memory must be an object"),
        ('{"like": "h100", "memory": {"value": 1, "kind": "guessed", "source": "x"}}', "kind of memory is 'guessed'"),
        ('{"like": "h100", "memory": {"value": 0, "kind": "assumed", "source": "x"}}', "memory is 0"),
        ('{"like": "h100", "layer": {"value": NaN, "kind": "assumed", "source": "x"}}', "layer is nan"),
        ('{"like": "h100", "device": "tpu"}', "device is 'tpu'"),
    ],
)
def test_a_machine_file_that_says_something_else_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        find_machine(str(file))


def test_an_unknown_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown machine 'h10'.*did you mean 'h100'"):
        find_machine("h10")
    with pytest.raises(FileNotFoundError, match="no machine file"):
        find_machine(str(tmp_path / "none.json"))


# ---- what is on file ----


def test_the_page_shows_the_plans_on_file_and_they_are_still_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    plans = runpy.run_path(str(ROOT / "benchmarks" / "plans.py"))
    report = json.loads(plans["OUTPUT"].read_text())
    page = plans["PAGE"].read_text(encoding="utf-8")
    assert plans["filled"](page, report) == page, "run python benchmarks/plans.py"
    kept = {(plan["pair"], plan["label"]): plan for plan in report["plans"]}
    layouts = {(pair, label): (layout, changes) for pair, label, layout, changes in plans["LAYOUTS"]}
    assert kept.keys() == layouts.keys()
    for pair, label in (
        ("1.7B <- 8B", "DDP, in process, rows of the recipe"),
        ("0.6B <- 4B", "FSDP2 on four, vLLM on four"),
        ("70B <- 405B", "FSDP2 on 256, vLLM on 64"),
    ):
        layout, changes = layouts[pair, label]
        models, work = plans["pair_and_work"](pair)
        fresh = plans["rounded"](make_plan(models, replace(work, **changes), layout, H100).as_dict())
        assert {name: kept[pair, label][name] for name in fresh} == fresh, "run python benchmarks/plans.py"


def test_the_check_on_file_predicted_bytes_exactly_and_times_roughly() -> None:
    report = json.loads((ROOT / "benchmarks/results/plan_check.json").read_text())
    assert len(report["results"]) == 4
    for run in report["results"].values():
        sizes = {name: row["ratio"] for name, row in run["bytes"].items()}
        for name in ("student's weights", "gradients", "optimizer's moments", "teacher's weights"):
            assert sizes[name] == pytest.approx(1, abs=0.005), name
        for row in run["traffic"].values():
            assert row["ratio"] == 1
        assert 0.6 < run["seconds"]["step, processor seconds"]["ratio"] < 1.6
