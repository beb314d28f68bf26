"""Blended sampling inside vLLM: the same completions as in process, and the exact law, whatever the engine does.

Equality is token for token: in float32 both samplers see the same numbers up to rounding, and share their noise. (A
completion would differ where a uniform falls within rounding, some 1e-6, of a boundary: seeds are fixed, so the tests
pass or fail for good.) The chi-square tests need no such agreement: had their seeds been drawn at random, a correct
sampler would fail this file with probability below 5e-4 (`LEVEL` times fewer than 30 tests).
"""

import os
import socket
import subprocess
import time
import urllib.request
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import torch
from conftest import TinyPair
from exact_laws import POLICIES
from reference.statistics import goodness_of_fit
from test_sampling_exactness import HORIZON, LEVEL, PROMPTS, exact_law
from vllm import SamplingParams
from vllm_helpers import lease, make_pair, make_wide_pair, release, save_pair, start

from trb.policies import (
    BehaviorPolicy,
    GeometricPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    TemperaturePolicy,
    TrustRegionPolicy,
)
from trb.sampling import Rollout, sample
from trb.sampling.vllm import SERVER_ENVIRONMENT, BlendEngine, ServedEngine, sampling_parameters, serve_command
from trb.sampling.vllm.verification import BlendRequest
from trb.vocab import SharedVocabulary

# What vLLM and the torch it drives deprecate on being imported and started is theirs to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # vLLM's client of a separate process leaves its sockets to the garbage collector, which may come in any later test.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <function Context.__del__"),
]

ALL_POLICIES = [
    StudentPolicy(),
    TemperaturePolicy(0.8),
    TrustRegionPolicy(0.0),
    TrustRegionPolicy(0.02),
    TrustRegionPolicy(0.5),
    TrustRegionPolicy(float("inf")),
    GeometricPolicy(0.3),
    SKDPolicy(2, 0.6),
    TeacherPolicy(),
]


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    return make_pair()


@pytest.fixture(scope="module")
def paths(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(pair, tmp_path_factory.mktemp("pair"))


@pytest.fixture
def engine(paths: tuple[str, str]) -> BlendEngine:
    """The same one for all tests that need nothing special of it."""
    return lease(paths)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    release()


def draw(
    pair: TinyPair, policy: BehaviorPolicy | list[BehaviorPolicy], prompts: list[list[int]], **options: Any
) -> Rollout:
    arguments = {
        "max_new_tokens": 5,
        "eos_token_id": pair.student_eos,
        "teacher_eos_token_id": pair.teacher_eos,
        "seed": 7,
    }
    return sample(pair.student, pair.teacher, prompts, policy, **{**arguments, **options})


def ragged(rows: int) -> list[list[int]]:
    return [list(PROMPTS[row % len(PROMPTS)]) for row in range(rows)]


def assert_same(found: Rollout, expected: Rollout) -> None:
    assert found.completions == expected.completions
    assert found.stopped == expected.stopped
    for name in ("teacher_weight", "kl_student", "kl_teacher", "accepted"):
        ours, theirs = (getattr(rollout.stats, name) for rollout in (found, expected))
        assert [len(row) for row in ours] == [len(row) for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            assert row == pytest.approx(other, rel=2e-3, abs=1e-5)


# --- the same completions -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ALL_POLICIES, ids=str)
def test_completions_and_their_record_are_those_of_the_in_process_sampler(
    pair: TinyPair, engine: BlendEngine, policy: BehaviorPolicy
) -> None:
    prompts = ragged(96)
    expected = draw(pair, policy, prompts)
    assert_same(draw(pair, policy, prompts, engine=engine), expected)
    assert len(set(map(len, expected.completions))) > 2
    assert any(expected.stopped)


def test_neither_the_batch_nor_what_is_cached_matters(pair: TinyPair, engine: BlendEngine) -> None:
    policy, prompts = TrustRegionPolicy(0.3), ragged(12)
    whole = draw(pair, policy, prompts, engine=engine)
    for row in (0, 5, 11):
        alone = draw(pair, policy, [prompts[row]], prompt_keys=[row], engine=engine)
        assert alone.completions == [whole.completions[row]]


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_comes_before_stop_ids_are_merged(pair: TinyPair, engine: BlendEngine, temperature: float) -> None:
    policy, prompts = TrustRegionPolicy(0.3), ragged(24)
    expected = draw(pair, policy, prompts, temperature=temperature)
    assert_same(draw(pair, policy, prompts, temperature=temperature, engine=engine), expected)


def test_fewer_rows_than_the_heads_have(pair: TinyPair, engine: BlendEngine) -> None:
    policy, prompts = TrustRegionPolicy(0.3), [[1], [2, 3, 1]] * 10
    expected = draw(pair, policy, prompts, vocab_size=5)
    found = draw(pair, policy, prompts, vocab_size=5, engine=engine)
    assert_same(found, expected)
    assert max(map(max, found.completions)) < 5


# --- the law ------------------------------------------------------------------------------------


def assert_exact_laws(pair: TinyPair, engine: BlendEngine | ServedEngine, names: Sequence[str], n: int) -> None:
    """One batch of these policies in turn, n rows of each ragged prompt: each row has the law of its own policy."""
    rows = [(name, prompt) for _ in range(n) for name in names for prompt in range(len(PROMPTS))]
    policies = [POLICIES[name][0] for name, _ in rows]
    prompts = [list(PROMPTS[prompt]) for _, prompt in rows]
    completions = draw(pair, policies, prompts, seed=11, max_new_tokens=HORIZON, engine=engine).completions
    for name in names:
        for prompt, tokens in enumerate(PROMPTS):
            law = exact_law(pair, tokens, POLICIES[name][1])
            samples = [tuple(done) for row, done in zip(rows, completions, strict=True) if row == (name, prompt)]
            assert len(samples) == n
            assert goodness_of_fit(samples, law) > LEVEL
            # Power: the law of another policy is rejected.
            other = "budget 0.5" if name != "budget 0.5" else "student"
            assert goodness_of_fit(samples, exact_law(pair, tokens, POLICIES[other][1])) < LEVEL


def test_a_batch_of_mixed_policies_has_the_exact_law_of_each(pair: TinyPair, engine: BlendEngine) -> None:
    """The student, as in a share of the rollouts, beside budgets, one teacher weight and SKD, from ragged prompts that
    share the prefix cache."""
    assert_exact_laws(pair, engine, ["student", "budget 0.02", "budget 0.5", "weight 0.3", "skd"], n=1000)


# --- whatever the engine does -------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_pair() -> TinyPair:
    return make_wide_pair()


@pytest.fixture(scope="module")
def wide_paths(wide_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(wide_pair, tmp_path_factory.mktemp("wide"))


def long_prompts(rows: int, longest: int = 60) -> list[list[int]]:
    """Of lengths 1 to `longest`, no two alike."""
    return [[(5 + row * 7 + 3 * place) % 90 + 5 for place in range(1 + row * 13 % longest)] for row in range(rows)]


@pytest.mark.parametrize("block", [1, 2, 4, 5, 6, 7, 8])
def test_block_sizes_up_to_the_longest_length(wide_pair: TinyPair, wide_paths: tuple[str, str], block: int) -> None:
    """The engine is as short as can be: the longest prompt, its completion and the drafts end at `max_model_len`."""
    policy, prompts, length = TrustRegionPolicy(0.1), long_prompts(24, longest=40), 20
    expected = draw(wide_pair, policy, prompts, max_new_tokens=length)
    assert not all(expected.stopped)
    shortest = max(map(len, prompts)) + length + 2 * block
    with lease(wide_paths, num_speculative_tokens=block, max_model_len=shortest) as engine:
        found = draw(wide_pair, policy, prompts, max_new_tokens=length, engine=engine)
        assert_same(found, expected)
        with pytest.raises(ValueError, match=f"max_new_tokens={length + 1} .*max_model_len={shortest}.*stops drafting"):
            draw(wide_pair, policy, prompts, max_new_tokens=length + 1, engine=engine)
        counters = engine.counters()
    assert counters["drafts_made_first"] == len(prompts)
    assert counters.get("drafts_made_later", 0) == 0
    decided = counters["decided"]
    assert decided == sum(map(len, expected.completions))
    # A block is drafted at once and read at once: longer blocks take fewer steps.
    assert (counters["steps"] < length) == (block > 1)


def test_a_cache_too_small_for_all_preempts_and_changes_nothing(
    wide_pair: TinyPair, wide_paths: tuple[str, str]
) -> None:
    """Preempted rows lose their place in both caches, read everything again in pieces, and go on where they were."""
    policy, prompts, length = TrustRegionPolicy(0.1), long_prompts(12), 60
    expected = draw(wide_pair, policy, prompts, max_new_tokens=length)
    options: dict[str, Any] = {"block_size": 32, "num_gpu_blocks_override": 9, "max_num_batched_tokens": 64}
    with lease(wide_paths, max_num_seqs=12, **options) as engine:
        preempted = Counter()
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        original = scheduler._preempt_request

        def counting(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted["requests"] += 1
            return original(request, *args, **kwargs)

        scheduler._preempt_request = counting
        found = draw(wide_pair, policy, prompts, max_new_tokens=length, engine=engine)
        counters = engine.counters()
    assert preempted["requests"] > 0
    assert_same(found, expected)
    assert counters["decided"] == sum(map(len, expected.completions))


def test_cached_prefixes_hold_the_keys_of_both_models(wide_pair: TinyPair, wide_paths: tuple[str, str]) -> None:
    """The second call finds whole blocks of its prompts cached, or all but the last token, which vLLM pads."""
    policy = TrustRegionPolicy(0.1)
    prompts = [[7 + place % 80 for place in range(length)] for length in (33, 64, 65, 96)]
    expected = draw(wide_pair, policy, prompts, max_new_tokens=10)
    with lease(wide_paths, block_size=32, enable_prefix_caching=True) as engine:
        for _ in range(2):
            assert_same(draw(wide_pair, policy, prompts, max_new_tokens=10, engine=engine), expected)
        cached = engine.llm.generate(
            [{"prompt_token_ids": prompts[-1]}], [_parameters(wide_pair, policy, 10)], use_tqdm=False
        )[0].num_cached_tokens
    assert cached >= 64


def _parameters(pair: TinyPair, policy: BehaviorPolicy, length: int, row: int = 0) -> SamplingParams:
    vocabulary = SharedVocabulary.of((pair.rows,), pair.student_eos, pair.teacher_eos)
    request = BlendRequest(f"single {row}", policy, vocabulary, 1.0, length, 7, row, 0)
    return SamplingParams(**sampling_parameters(request))


def test_requests_that_arrive_at_different_times(pair: TinyPair, engine: BlendEngine) -> None:
    policy, prompts = TrustRegionPolicy(0.3), ragged(12)
    expected = draw(pair, policy, prompts)
    core, found = engine.llm.llm_engine, {}
    waiting = list(enumerate(prompts))
    while waiting or core.has_unfinished_requests():
        if waiting:
            row, prompt = waiting.pop(0)
            core.add_request(f"row {row}", {"prompt_token_ids": prompt}, _parameters(pair, policy, 5, row))
        for output in core.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
    assert [found[f"row {row}"] for row in range(len(prompts))] == expected.completions


def test_an_engine_in_a_process_of_its_own(pair: TinyPair, paths: tuple[str, str]) -> None:
    """The plugin is loaded there as well, records come back, and new weights get there through a file."""
    policy, prompts = TrustRegionPolicy(0.3), ragged(24)
    other = make_pair(seed=42)
    with lease(paths, separate_process=True) as engine:
        assert_same(draw(pair, policy, prompts, engine=engine), draw(pair, policy, prompts))
        engine.update_student(other.student.named_parameters())
        assert_same(draw(other, policy, prompts, engine=engine), draw(other, policy, prompts))


# --- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture
def server(paths: tuple[str, str]) -> Iterator[ServedEngine]:
    """The same engine behind vLLM's own server, in another process, on a free port of this machine."""
    release()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*serve_command(*paths, 3), "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "64", "--kv-cache-memory-bytes", str(32 << 20)]
    process = subprocess.Popen(command, env=os.environ | SERVER_ENVIRONMENT)
    try:
        for _ in range(1200):  # on a busy machine it has taken five minutes
            assert process.poll() is None, "the server ended instead of starting"
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        yield ServedEngine(f"http://127.0.0.1:{port}/", paths[1])
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_a_server_samples_the_same_completions(pair: TinyPair, server: ServedEngine, tmp_path: Path) -> None:
    """Records come back, policies that are mixed in a batch keep to their laws, a plain request harms nobody, and new
    weights are read from a file."""
    policy, prompts = TrustRegionPolicy(0.3), ragged(24)
    expected = draw(pair, policy, prompts)
    assert_same(draw(pair, policy, prompts, engine=server), expected)
    # Every row is a request of its own, which brings its policy along. 500 rows taken for another's are found with
    # probability 0.98, the two that are nearest to each other.
    assert_exact_laws(pair, server, ["student", "weight 0.3", "budget 0.5"], n=500)
    first = server.counters()["drafts_made_first"]
    with pytest.raises(RuntimeError, match="/v1/completions answered"):
        server._post("/v1/completions", {"model": server._model, "prompt": [1], "max_tokens": 2})
    other = make_pair(seed=42)
    other.student.save_pretrained(tmp_path)
    server.update_student(str(tmp_path / "model.safetensors"))
    assert_same(draw(other, policy, prompts, engine=server), draw(other, policy, prompts))
    assert server.counters()["drafts_made_first"] == first + len(prompts)


# --- weights ------------------------------------------------------------------------------------


def assert_follows(engine: BlendEngine, pairs: Sequence[TinyPair]) -> None:
    """The engine is given each pair's student and then samples what that pair samples in process."""
    policy, prompts = TrustRegionPolicy(0.02), ragged(48)
    expected = [draw(pair, policy, prompts) for pair in pairs]
    assert len({str(rollout.completions) for rollout in expected}) == len({id(pair) for pair in pairs})
    for pair, rollout in zip(pairs, expected, strict=True):
        engine.update_student(pair.student.named_parameters())
        assert_same(draw(pair, policy, prompts, engine=engine), rollout)


def test_samples_follow_the_students_weights(pair: TinyPair, engine: BlendEngine) -> None:
    assert_follows(engine, [make_pair(seed=42), pair])


def test_a_head_tied_to_the_embeddings_follows_too(tmp_path: Path) -> None:
    """On a CPU vLLM computes with packed copies of weights, and a reload leaves a tied head's as it was."""
    first, second = (make_pair(seed=seed, tie_word_embeddings=True) for seed in (41, 42))
    with lease(save_pair(first, tmp_path)) as engine:
        assert_follows(engine, [second, first])


@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_whose_student_brings_its_weights_later(tied: bool, tmp_path: Path) -> None:
    """A configuration is enough to start; sampling waits for the weights."""
    pair = make_pair(tie_word_embeddings=tied)
    _, teacher = save_pair(pair, tmp_path)
    pair.student.config.save_pretrained(tmp_path / "shape")
    with lease((str(tmp_path / "shape"), teacher), weights_follow=True) as engine:
        with pytest.raises(RuntimeError, match="call update_student before sampling"):
            draw(pair, TrustRegionPolicy(0.02), ragged(2), engine=engine)
        assert_follows(engine, [pair])


# --- what is refused ----------------------------------------------------------------------------


def test_a_request_that_is_not_blended_is_refused(engine: BlendEngine) -> None:
    with pytest.raises(ValueError, match="samples blended requests only"):
        engine.llm.generate([{"prompt_token_ids": [1]}], [SamplingParams(max_tokens=2)], use_tqdm=False)


def test_a_request_over_more_events_than_the_heads_have_is_refused(pair: TinyPair, engine: BlendEngine) -> None:
    request = BlendRequest("wide", StudentPolicy(), SharedVocabulary(7, 0, ()), 1.0, 4, 7, 0, 0)
    with pytest.raises(ValueError, match=r"7 events.*8 \(teacher\) and 6 \(student\)"):
        engine.llm.generate(
            [{"prompt_token_ids": [1]}], [SamplingParams(**sampling_parameters(request))], use_tqdm=False
        )
    parameters = SamplingParams(**{**sampling_parameters(request), "max_tokens": 3})
    with pytest.raises(ValueError, match="max_tokens=3 differs"):
        engine.llm.generate([{"prompt_token_ids": [1]}], [parameters], use_tqdm=False)


def test_the_callers_generators_are_left_alone_and_memory_comes_back(pair: TinyPair, paths: tuple[str, str]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    release()
    engine = start(paths)
    assert torch.equal(torch.get_rng_state(), before)
    runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    held = [weakref.ref(runner.model), weakref.ref(runner.drafter.model), *map(weakref.ref, runner.kv_caches)]
    assert all(reference() is not None for reference in held)
    del runner
    engine.release()
    engine.release()
    assert [reference() for reference in held] == [None] * len(held)
    with pytest.raises(RuntimeError, match="was released"):
        draw(pair, StudentPolicy(), [[1]], engine=engine)


def test_a_trainers_process_group_outlives_the_engine(paths: tuple[str, str], tmp_path: Path) -> None:
    """By itself vLLM would destroy it on its way out, and with it the training of several processes."""
    release()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        start(paths).release()
        assert torch.distributed.is_initialized()
        one = torch.ones(1)
        torch.distributed.all_reduce(one)
        assert one.item() == 1.0
    finally:
        torch.distributed.destroy_process_group()
    engine = start(paths)  # without one before, none is left after
    assert torch.distributed.is_initialized()
    engine.release()
    assert not torch.distributed.is_initialized()
