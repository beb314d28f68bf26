"""What of vLLM's rollouts can be told without vLLM: how processes share an engine, and what an engine is asked for.

The rest is in test_vllm_trainer.
"""

import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from torch import nn
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from trb.errors import InputError
from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import EngineOptions, Rollout, RolloutStats
from trb.sampling.vllm import check_runner, sampling_parameters, shared_rows_parameters, stopping_parameters
from trb.sampling.vllm.plugin import REQUEST_KEY
from trb.sampling.vllm.verification import BlendRequest
from trb.training.ranks import Ranks
from trb.training.vllm import SharedEngine
from trb.vocab import SharedVocabulary

# Prompts, keys and rollout indices of four processes, which need not have equally many.
PARTS = [
    ([[1], [2]], [10, 20], [0, 0]),
    ([[3]], [30], [1]),
    ([[4], [5], [6]], [40, 50, 60], [0, 0, 2]),
    ([[7], [8]], [70, 80], [0, 1]),
]


def with_policies(part: Any) -> tuple[Any, ...]:
    prompts, keys, rollouts = part
    return prompts, [TrustRegionPolicy(key) for key in keys], keys, rollouts


@dataclass(frozen=True)
class Launch(Ranks):
    """Four processes, of which this one alone is real."""

    def gather(self, item: Any) -> list[Any]:
        assert item == with_policies(PARTS[self.index])
        return [with_policies(part) for part in PARTS]


@dataclass
class Recorder:
    """Completes each prompt with its key and its rollout index."""

    asked: list[Any] = field(default_factory=list)

    def sample(self, prompts: Any, policies: Any, **options: Any) -> Rollout:
        self.asked.append(prompts)
        assert policies == [TrustRegionPolicy(key) for key in options["prompt_keys"]]
        completions = [list(pair) for pair in zip(options["prompt_keys"], options["rollout_index"], strict=True)]
        numbers = [[float(row)] for row in range(len(prompts))]
        stats = RolloutStats(*(numbers for _ in range(4)))
        return Rollout(prompts, completions, [row % 2 == 0 for row in range(len(prompts))], stats, 5, 6)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("index", range(4))
def test_processes_that_share_an_engine_ask_for_all_their_rows_and_keep_their_own(index: int, size: int) -> None:
    recorder = Recorder()
    prompts, keys, rollouts = PARTS[index]
    policies = [TrustRegionPolicy(key) for key in keys]
    options: EngineOptions = {
        "vocabulary": SharedVocabulary(9, 0, ()),
        "max_new_tokens": 2,
        "temperature": 1.0,
        "seed": 0,
        "prompt_keys": keys,
        "rollout_index": rollouts,
    }
    found = SharedEngine(recorder, Launch(index, 4), size).sample(prompts, policies, **options)
    together = range(index // size * size, index // size * size + size)
    assert recorder.asked == [[prompt for rank in together for prompt in PARTS[rank][0]]]
    assert found.prompts == prompts
    assert found.completions == [list(pair) for pair in zip(keys, rollouts, strict=True)]
    before = sum(len(PARTS[rank][0]) for rank in together if rank < index)
    places = range(before, before + len(prompts))
    assert found.stopped == [place % 2 == 0 for place in places]
    for column in ("teacher_weight", "kl_student", "kl_teacher", "accepted"):
        assert getattr(found.stats, column) == [[float(place)] for place in places]
    assert (found.teacher_calls, found.student_calls) == (5, 6)


# ---- the events that end a completion ----

PAIR = SharedVocabulary(9, 2, (0, 5))


def test_a_blended_request_ends_with_the_events_it_was_drawn_from() -> None:
    request = BlendRequest("row", StudentPolicy(), PAIR, 1.0, 7, 0, 0, 0)
    parameters = sampling_parameters(request)
    assert (parameters["stop_token_ids"], parameters["ignore_eos"]) == ([2, 0, 5], True)
    assert BlendRequest.from_text(parameters["extra_args"][REQUEST_KEY]).vocabulary == PAIR


def trls_generation(mode: str) -> VLLMGeneration:
    """TRL's vLLM as a trainer leaves it, without an engine."""
    generation = object.__new__(VLLMGeneration)
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    vars(generation).update(
        settings,
        mode=mode,
        model=nn.Identity(),
        accelerator=Accelerator(cpu=True),
        max_completion_length=7,
        logprobs=None,
        structured_outputs_regex=None,
        enable_sleep_mode=False,
        tensor_parallel_size=1,
        generation_kwargs=stopping_parameters(PAIR),
    )
    return generation


def test_trls_engine_in_this_process_ends_completions_with_every_stop_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def complete(prompts: list, sampling_params: dict[str, Any], use_tqdm: bool) -> list:
        asked.append(sampling_params)
        completion = SimpleNamespace(token_ids=[7, 5], logprobs=None)
        return [SimpleNamespace(prompt_token_ids=row["prompt_token_ids"], outputs=[completion]) for row in prompts]

    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    generation = trls_generation("colocate")
    generation.llm = SimpleNamespace(generate=complete)
    _, completions, *_ = generation.generate([[1], [3, 4]], None, 1)
    assert completions == [[7, 5], [7, 5]]
    assert (asked[0]["stop_token_ids"], asked[0]["ignore_eos"], asked[0]["max_tokens"]) == ([2, 0, 5], True, 7)


def test_trls_server_is_asked_to_end_completions_with_every_stop_id() -> None:
    posted: list[dict[str, Any]] = []

    def answer(url: str, json: dict[str, Any]) -> dict[str, Any]:
        posted.append(json)
        return {"choices": [{"prompt_token_ids": row, "token_ids": [7, 5], "logprobs": None} for row in json["prompt"]]}

    client = object.__new__(VLLMClient)
    vars(client).update(base_url="http://localhost", model="student", _post=answer)
    generation = trls_generation("server")
    generation.vllm_client = client
    _, completions, *_ = generation.generate([[1], [3, 4]], None, 1)
    assert completions == [[7, 5], [7, 5]]
    assert (posted[0]["stop_token_ids"], posted[0]["ignore_eos"], posted[0]["max_tokens"]) == ([2, 0, 5], True, 7)


def test_a_head_too_wide_for_the_second_runner_is_left_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would end the engine amid a request. A server's runner is not ours to choose."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")  # so that what follows is undone
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    few, many = (shared_rows_parameters(PAIR, PAIR.size + left_out, served=False) for left_out in (1024, 1025))
    check_runner({})
    check_runner(few)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ
    check_runner(many)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    check_runner(few)
    with pytest.raises(ValueError, match=r"1025 rows more than the pair shares.*set VLLM_USE_V2_MODEL_RUNNER=0"):
        check_runner(many)
    assert shared_rows_parameters(PAIR, PAIR.size, served=False) == {}
    assert len(shared_rows_parameters(PAIR, PAIR.size + 1024, served=True)["logit_bias"]) == 1024
    remedies = r'1025 rows more .*at most 1024 out.*resize_token_embeddings.*vllm_mode="colocate"'
    with pytest.raises(InputError, match=remedies):
        shared_rows_parameters(PAIR, PAIR.size + 1025, served=True)
