"""Passes replayed as CUDA graphs: the same tokens as without, whatever happens between two passes.

Without a GPU a stand-in captures: what it records is the function itself, and like a graph it has no results before
its first replay, reads its inputs where they lie and writes its results in place. It shows that rows, lengths and
buffers are rounded, padded, grown and handed on correctly. Tests marked `gpu` do the same with real graphs.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyPair, tiny_gpt2, tiny_llama, tiny_qwen3
from tiny_models import build
from torch import Tensor
from transformers import PreTrainedModel

from trb.policies import BehaviorPolicy, SKDPolicy, StudentPolicy, TrustRegionPolicy
from trb.sampling import Rollout, cache, graphs, sample
from trb.sampling.attention import attention_through_slots
from trb.sampling.cache import SlotReader

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PROMPTS = [[1], [2, 3, 1], [3, 5, 2, 2, 1], [5], [3, 3], [1, 2, 3, 5, 1, 2, 3]] * 4
CASES: list[tuple[BehaviorPolicy, dict[str, Any]]] = [
    (StudentPolicy(), {}),
    (StudentPolicy(), {"max_rows": 5}),
    (TrustRegionPolicy(0.02), {"block_size": 3}),
    (TrustRegionPolicy(0.5), {"block_size": 5, "max_rows": 7, "keep_teacher_hidden": True}),
    (TrustRegionPolicy(math.inf), {"block_size": "planned", "temperature": 0.7}),
    (SKDPolicy(2, 0.6), {"block_size": "measured", "max_rows": 9}),
]
each_case = pytest.mark.parametrize(("policy", "options"), CASES, ids=repr)


def draw(student: PreTrainedModel, teacher: PreTrainedModel, policy: BehaviorPolicy, **options: Any) -> Rollout:
    arguments: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": 0, "teacher_eos_token_id": 4, "seed": 5}
    return sample(student, teacher, PROMPTS, policy, **{**arguments, **options})


def assert_same(ours: Rollout, expected: Rollout) -> None:
    assert ours.completions == expected.completions
    assert ours.stopped == expected.stopped
    for name in ("teacher_weight", "kl_student", "kl_teacher", "accepted"):
        pairs = zip(getattr(ours.stats, name), getattr(expected.stats, name), strict=True)
        assert all(one == pytest.approx(other, rel=1e-3, abs=1e-5) for one, other in pairs), name
    if expected.teacher_hidden is not None:
        assert ours.teacher_hidden is not None
        for one, other in zip(ours.teacher_hidden, expected.teacher_hidden, strict=True):
            assert torch.allclose(one, other, atol=1e-4)


# --- a stand-in for the GPU ---------------------------------------------------------------------


class Played:
    """A recorded function. Its results are NaN, or an absurd token, until it is replayed."""

    def __init__(self, function: Callable[[], tuple[Tensor, ...]]) -> None:
        self.function = function
        self.outputs = tuple(torch.full_like(x, math.nan if x.is_floating_point() else 10**9) for x in function())

    def replay(self) -> None:
        for kept, new in zip(self.outputs, self.function(), strict=True):
            kept.copy_(new)


class Recorder:
    """Records without a GPU and keeps count; `refuse` fails as a model does that cannot be captured."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.recorded: list[Played] = []
        self.rehearsals = 0

    def rehearse(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        self.rehearsals += 1
        if self.refuse == "rehearse":
            raise RuntimeError("called a synchronizing CUDA operation")
        return function()

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> Played:
        if self.refuse == "record":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded.append(Played(function))
        return self.recorded[-1]


def test_what_cannot_be_captured_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the numbers in the error, and however many readers there are."""

    class Full(Recorder):
        def rehearse(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            raise MemoryError(f"{next(free)} bytes are free")

    free, said = count(), list[str]()
    monkeypatch.setattr(graphs, "_SAID", set())
    monkeypatch.setattr(graphs.logger, "warning", said.append)
    for _ in range(3):
        replays = graphs.Replays(Full(), 8)
        assert replays.run(lambda x: (x,), "key", [torch.ones(2, 1)], [0.0]) is None
    assert said == ["sampling without CUDA graphs: MemoryError: 0 bytes are free"]


class Bench:
    """Every reader records through stand-ins; `recorders` are those made, one for each state of a reader."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorders: list[Recorder] = []
        self.refuse = ""
        monkeypatch.setattr(graphs, "wanted", lambda model: graphs.obstacle(model) is None)
        monkeypatch.setattr(graphs, "new_replays", self.new_replays)
        self.memory = 1e9
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=self.memory))
        # Graphs of a few positions, so that lengths are rounded and buffers grow within a test.
        monkeypatch.setattr(graphs, "LENGTH_STEP", 4)
        monkeypatch.setattr(cache, "FIRST_ROOM", 2)

    def new_replays(self, model: PreTrainedModel, most_rows: int) -> graphs.Replays:
        self.recorders.append(Recorder(self.refuse))
        return graphs.Replays(self.recorders[-1], most_rows)

    @property
    def recorded(self) -> int:
        return sum(len(recorder.recorded) for recorder in self.recorders)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    graphs._LEFT.clear()
    yield Bench(monkeypatch)
    graphs._LEFT.clear()


@pytest.fixture
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_llama(6, seed=41), tiny_qwen3(8, seed=69)


@each_case
def test_tokens_are_those_of_plain_passes(
    tiny_pair: TinyPair, policy: BehaviorPolicy, options: Any, monkeypatch: Any
) -> None:
    expected = draw(tiny_pair.student, tiny_pair.teacher, policy, **options)
    graphs._LEFT.clear()
    bench = Bench(monkeypatch)
    for _ in range(2):
        assert_same(draw(tiny_pair.student, tiny_pair.teacher, policy, **options), expected)
        assert bench.recorded > 0
    graphs._LEFT.clear()
    assert len({len(completion) for completion in expected.completions}) > 4


def test_learned_positions_at_the_models_limit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding rows sit at the last position of a buffer, which is beyond what the model knows."""
    student, teacher = tiny_gpt2(6, seed=25), tiny_gpt2(8, seed=46)
    ours = draw(student, teacher, TrustRegionPolicy(0.5), max_new_tokens=25, block_size=4)
    assert bench.recorded > 0
    monkeypatch.undo()
    assert_same(ours, draw(student, teacher, TrustRegionPolicy(0.5), max_new_tokens=25, block_size=4))


@pytest.mark.parametrize("refuse", ["rehearse", "record"])
def test_a_model_that_cannot_be_captured_is_sampled_all_the_same(
    bench: Bench, pair: tuple[PreTrainedModel, PreTrainedModel], refuse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.refuse = refuse
    ours = [draw(*pair, TrustRegionPolicy(0.5), block_size=3, keep_teacher_hidden=True) for _ in range(2)]
    assert bench.recorded == 0
    # Found out once: the second call takes over what the first one learnt.
    assert len(bench.recorders) == 2
    if refuse == "rehearse":
        assert [recorder.rehearsals for recorder in bench.recorders] == [1, 1]
    monkeypatch.undo()
    for one in ours:
        assert_same(one, draw(*pair, TrustRegionPolicy(0.5), block_size=3, keep_teacher_hidden=True))


@pytest.mark.parametrize(("model_type", "refuse"), [("qwen3_5", ""), ("qwen3_5", "record"), ("jamba", "rehearse")])
def test_states_are_those_before_a_pass_however_often_it_is_run(
    bench: Bench, model_type: str, refuse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in runs a pass twice when it captures it, as one is that fails half-way and is then run without."""
    student, teacher = (build(model_type, seed=seed) for seed in (1, 2))
    bench.refuse = refuse
    cases: list[tuple[BehaviorPolicy, dict[str, Any]]] = [
        (StudentPolicy(), {"max_new_tokens": 4}),
        (TrustRegionPolicy(0.5), {"max_new_tokens": 6, "block_size": 3, "max_rows": 9}),
    ]
    ours = [draw(student, teacher, policy, **options) for policy, options in cases for _ in range(2)]
    assert (bench.recorded > 0) == (not refuse)
    monkeypatch.undo()
    for place, (policy, options) in enumerate(cases):
        expected = draw(student, teacher, policy, **options)
        for one in ours[2 * place : 2 * place + 2]:
            assert_same(one, expected)


# --- from one call to the next ------------------------------------------------------------------


def test_graphs_serve_the_next_call_and_see_new_weights(
    bench: Bench, pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def both() -> tuple[Rollout, int]:
        before = bench.recorded
        return draw(*pair, TrustRegionPolicy(0.5), block_size=3), bench.recorded - before

    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1000)  # so short a length step makes many shapes
    for _ in range(3):  # the first call grows the buffers, the others capture what had occurred once
        both()
    found, new = both()
    assert new == 0
    rollouts = [found]
    with torch.no_grad():
        pair[0].lm_head.weight.mul_(-1)  # in place, as optimizers do
    rollouts.append(both()[0])
    assert len(bench.recorders) == 2
    pair[0].lm_head.weight.data = -2 * pair[0].lm_head.weight.data
    rollouts.append(both()[0])
    assert len(bench.recorders) == 3  # the student's graphs are new, the teacher's are not
    assert len({str(rollout.completions) for rollout in rollouts}) == 3
    monkeypatch.undo()
    assert_same(rollouts[2], draw(*pair, TrustRegionPolicy(0.5), block_size=3))
    with torch.no_grad():
        pair[0].lm_head.weight.mul_(0.5)
    assert_same(rollouts[0], draw(*pair, TrustRegionPolicy(0.5), block_size=3))


def test_what_a_broken_call_left_in_the_buffers_harms_no_other(
    bench: Bench, pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that diverged fill the cache with NaN; once they are restored in place nothing of it is left."""
    policy, weight = StudentPolicy(), pair[0].model.layers[0].self_attn.v_proj.weight
    kept = weight.clone()
    draw(*pair, policy)
    reader = SlotReader(pair[0], len(PROMPTS))
    for layer in reader._state.layers:
        layer.keys.fill_(math.nan)
        layer.values.fill_(math.nan)
    reader.close()
    with torch.no_grad():
        weight.copy_(kept)
    ours = draw(*pair, policy)
    assert len(bench.recorders) == 1
    monkeypatch.undo()
    assert_same(ours, draw(*pair, policy))


def test_another_setting_takes_no_graph_of_the_last_one(
    bench: Bench, pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants: list[dict[str, Any]] = [{}, {"temperature": 0.5}, {"teacher_eos_token_id": 3}, {"eos_token_id": 2}, {}]
    ours = [draw(*pair, TrustRegionPolicy(0.5), block_size=2, **options) for options in variants]
    monkeypatch.undo()
    for options, rollout in zip(variants, ours, strict=True):
        assert_same(rollout, draw(*pair, TrustRegionPolicy(0.5), block_size=2, **options))


def test_nothing_is_left_where_a_graph_could_go_stale(bench: Bench) -> None:
    model = tiny_llama(6, seed=1)

    def left() -> bool:
        draw(model, model, StudentPolicy())
        return model in graphs._LEFT

    assert left()
    with torch.autocast("cpu", torch.bfloat16):
        assert not left()
    assert left()
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    draw(adapted, None, StudentPolicy())
    assert model not in graphs._LEFT
    adapted.unload()


def test_too_much_memory_is_not_left(bench: Bench) -> None:
    model = tiny_llama(6, seed=1)
    bench.memory = 1e4
    draw(model, model, StudentPolicy())
    assert not graphs._LEFT


def test_models_are_kept_by_nothing_but_themselves(bench: Bench) -> None:
    models = [tiny_llama(6, seed=seed) for seed in range(4)]
    for model in models:
        reader = SlotReader(model, 2)
        reader.close()
    assert len(graphs._LEFT) == graphs.MOST_MODELS
    assert list(graphs._LEFT) == models[-graphs.MOST_MODELS :]
    alive = weakref.ref(models[-1])
    del model, models, reader
    gc.collect()
    assert alive() is None
    assert not graphs._LEFT


# --- which models -------------------------------------------------------------------------------


def test_hooked_sharded_and_compiled_models_are_left_alone() -> None:
    assert graphs.obstacle(tiny_llama(6, seed=1)) is None
    for name, spoil in {
        "hooks": lambda model: model.model.register_forward_hook(lambda *_: None),
        "hook": lambda model: model.lm_head.register_forward_pre_hook(lambda *_: None),
        "compiled": lambda model: model.model.compile(backend="eager"),
        "is compiled": lambda model: setattr(model, "model", torch.compile(model.model, backend="eager")),
        "offloaded": lambda model: setattr(model.model.layers[0], "_hf_hook", object()),
        "sharded": lambda model: setattr(model.lm_head.weight, "ds_id", 3),
        "several devices": lambda model: setattr(model, "lm_head", model.lm_head.to("meta")),
    }.items():
        model = tiny_llama(6, seed=1)
        spoil(model)
        reason = graphs.obstacle(model)
        assert reason is not None
        assert name in reason


def test_recorders_of_the_library_do_not_count_as_hooks() -> None:
    model = tiny_llama(6, seed=1)
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert graphs.obstacle(model) is None


def test_no_graphs_on_a_cpu() -> None:
    model = tiny_llama(6, seed=1)
    assert not graphs.wanted(model)
    assert SlotReader(model, 3)._state.replays is None


# --- shapes -------------------------------------------------------------------------------------


def test_buckets_waste_little_and_are_few() -> None:
    sizes = [graphs.bucket(rows) for rows in range(1, 513)]
    assert sizes == sorted(sizes)
    assert [graphs.bucket(size) for size in sizes] == sizes
    assert len(set(sizes)) == 12
    for rows, size in enumerate(sizes, start=1):
        assert rows <= size
        assert size <= max(16, 1.5 * rows)


def test_one_position_is_left_for_scratch() -> None:
    for longest in (1, 255, 256, 257, 511, 512):
        length = graphs.attended(longest)
        assert longest < length <= longest + graphs.LENGTH_STEP
        assert length % graphs.LENGTH_STEP == 0


def double(values: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * values, more + 1


def test_a_shape_is_rehearsed_then_recorded_then_replayed() -> None:
    recorder = Recorder()
    replays = graphs.Replays(recorder, 64)
    for turn, rows in enumerate((5, 7, 8, 6)):  # one bucket
        values = torch.arange(2.0 * rows).view(rows, 2) + turn
        found = replays.run(double, "key", (values, values[:, :1]), (0, -1))
        assert found is not None
        assert torch.equal(found[0], 2 * values)
        assert torch.equal(found[1], values[:, :1] + 1)
        assert replays.settled == (turn >= 2)
    assert (recorder.rehearsals, len(recorder.recorded)) == (1, 1)
    assert replays.run(double, "another", (values, values[:, :1]), (0, -1)) is not None
    assert recorder.rehearsals == 2


def test_results_are_not_overwritten_by_the_next_replay() -> None:
    replays = graphs.Replays(Recorder(), 64)
    results = [replays.run(double, 0, (torch.full((2, 1), value),) * 2, (0, 0)) for value in range(5)]
    assert [found[0].tolist() for found in results if found] == [[[2 * value]] * 2 for value in range(5)]


def test_wide_passes_are_not_captured() -> None:
    replays = graphs.Replays(Recorder(), 1024)
    wide = torch.zeros(graphs.MOST_TOKENS // 8 + 1, 8)
    assert replays.run(double, 0, (wide, wide), (0, 0)) is None
    assert replays.settled


def test_graphs_are_dropped_by_number_and_by_size() -> None:
    recorder = Recorder()
    replays = graphs.Replays(recorder, 4, memory=32 * 100)  # a hundred bytes of results
    value = torch.ones(4, 1)  # results of 32 bytes
    for key in (*"aabbccdd", *"dcba"):
        assert replays.run(double, key, (value, value), (0, 0)) is not None
        assert replays.bytes <= 100 + 32
    # Four shapes do not fit: the oldest had to be made again.
    assert len(recorder.recorded) == 4
    assert recorder.rehearsals > 4
    many = graphs.Replays(Recorder(), 4)
    for key in range(3 * graphs.MOST_GRAPHS):
        many.run(double, key, (value, value), (0, 0))
    assert len(many._shapes) == graphs.MOST_GRAPHS


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs captured during a test."""
    made: list[Any] = []
    record = graphs.CudaRecorder.record

    def recording(self: graphs.CudaRecorder, function: Any) -> Any:
        made.append(record(self, function))
        return made[-1]

    monkeypatch.setattr(graphs.CudaRecorder, "record", recording)
    graphs._LEFT.clear()
    yield made
    graphs._LEFT.clear()


def on_gpu(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_llama(6, seed=41).to("cuda", dtype), tiny_qwen3(8, seed=69).to("cuda", dtype)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_case
def test_tokens_are_those_of_plain_passes_on_a_gpu(
    policy: BehaviorPolicy, options: Any, dtype: torch.dtype, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = on_gpu(dtype)

    def without() -> Rollout:
        with monkeypatch.context() as patch:
            patch.setenv("TRB_CUDA_GRAPHS", "0")
            return draw(*pair, policy, **options)

    def check() -> int:
        before = len(recorded)
        ours = draw(*pair, policy, **options)
        new = len(recorded) - before
        assert_same(ours, without())
        return new

    assert check() > 0
    check()
    check()  # captures what had occurred once
    assert check() == 0 or options.get("block_size") == "measured"
    with torch.no_grad():
        pair[0].lm_head.weight.mul_(-1)
    check()
    pair[0].lm_head.weight.data = -2 * pair[0].lm_head.weight.data
    assert check() > 0


@pytest.mark.gpu
@needs_gpu
def test_long_completions_grow_the_buffers_on_a_gpu(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_llama(400, seed=41).to("cuda")  # so many tokens that few of them stop
    student.config.max_position_embeddings = 4096
    options: dict[str, Any] = {"max_new_tokens": 300, "eos_token_id": 399}
    ours = draw(student, student, StudentPolicy(), **options)
    assert len(recorded) > 1
    monkeypatch.setenv("TRB_CUDA_GRAPHS", "0")
    assert_same(ours, draw(student, student, StudentPolicy(), **options))
    assert max(map(len, ours.completions)) > 260


@pytest.mark.gpu
@needs_gpu
def test_a_pass_that_asks_the_gpu_for_a_value_is_found_out_on_a_gpu(recorded: list[Any]) -> None:
    student, teacher = on_gpu(torch.float64)
    expected = draw(student, teacher, StudentPolicy())
    forward, asked = student.model.rotary_emb.forward, []

    def asking(hidden: Tensor, position_ids: Tensor) -> Any:
        asked.append(int(position_ids.max()))
        return forward(hidden, position_ids)

    before = len(recorded)
    student.model.rotary_emb.forward = asking
    graphs._LEFT.clear()
    assert draw(student, teacher, StudentPolicy()).completions == expected.completions
    assert len(recorded) == before
    assert len(asked) > 10


def ask(value: Tensor) -> tuple[Tensor]:
    return (value * int(value.sum()),)


def fail(value: Tensor) -> tuple[Tensor]:
    raise ZeroDivisionError


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # a capture that fails at once has recorded nothing
@pytest.mark.parametrize(("function", "error"), [(fail, ZeroDivisionError), (ask, RuntimeError)])
def test_a_capture_that_fails_leaves_the_process_in_order_on_a_gpu(
    function: Callable[[Tensor], Any], error: type[Exception]
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    value = torch.ones(1000, device=device)
    with pytest.raises(error):
        graphs.CudaRecorder(device).record(partial(function, value))
    assert torch.nn.functional.dropout(value, 0.5).sum() > 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1 << 42, device=device)
    torch.cuda.empty_cache()
    played = graphs.CudaRecorder(device).record(lambda: (value + 1,))
    played.replay()
    assert torch.equal(played.outputs[0], value + 1)


@pytest.mark.gpu
@needs_gpu
def test_autocast_with_float32_weights_on_a_gpu(recorded: list[Any]) -> None:
    """As the trainer samples: the casts of the weights live in the caller's context, and graphs die with it."""
    student, teacher = on_gpu(torch.float32)
    student.requires_grad_(True)
    lengths = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            out = draw(student, teacher, TrustRegionPolicy(0.1), block_size=3)
        lengths.append(out.completions)
        assert student not in graphs._LEFT
        torch.empty(1 << 24, device="cuda").fill_(math.nan)  # what was freed is written over
    assert lengths[0] == lengths[1] == lengths[2]
    assert len(recorded) > 3


def test_readers_read_the_first_slots_whatever_lies_in_the_others(bench: Bench) -> None:
    """Padding rows write to the scratch position of free slots alone."""
    model = tiny_qwen3(8, seed=5)
    reader = SlotReader(model, slots=8)
    rows = [[1, 2, 3], [4], [5, 6, 7, 1, 2], [3, 3]]
    at = torch.tensor([[2], [0], [4], [1]])
    with torch.no_grad(), attention_through_slots(model):
        reader.admit([row[:-1] for row in rows], [0, 1, 2, 3])
        for _ in range(4):
            reader.read(torch.tensor([[3], [4], [2]]), at[:3], longest=5)
        logits = reader.read(torch.tensor([[3], [4], [2], [3]]), at, longest=5)
        for slot, row in enumerate(rows):
            assert torch.allclose(logits[slot], model(torch.tensor([row])).logits[0, -1:], atol=1e-10)
