"""What of `trb.vllm_rollouts` can be told without vLLM: how processes share an engine. Else see test_vllm_trainer."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from trb.policies import StudentPolicy
from trb.ranks import Ranks
from trb.sampling import EngineOptions, Rollout, RolloutStats
from trb.vllm_rollouts import SharedEngine
from trb.vocab import SharedVocabulary

# Prompts, keys and rollout indices of four processes, which need not have equally many.
PARTS = [
    ([[1], [2]], [10, 20], [0, 0]),
    ([[3]], [30], [1]),
    ([[4], [5], [6]], [40, 50, 60], [0, 0, 2]),
    ([[7], [8]], [70, 80], [0, 1]),
]


@dataclass(frozen=True)
class Launch(Ranks):
    """Four processes, of which this one alone is real."""

    def gather(self, item: Any) -> list[Any]:
        assert item == PARTS[self.index]
        return PARTS


@dataclass
class Recorder:
    """Completes each prompt with its key and its rollout index."""

    asked: list[Any] = field(default_factory=list)

    def sample(self, prompts: Any, policy: Any, **options: Any) -> Rollout:
        self.asked.append(prompts)
        completions = [list(pair) for pair in zip(options["prompt_keys"], options["rollout_index"], strict=True)]
        numbers = [[float(row)] for row in range(len(prompts))]
        stats = RolloutStats(*(numbers for _ in range(4)))
        return Rollout(prompts, completions, [row % 2 == 0 for row in range(len(prompts))], stats, 5, 6)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("index", range(4))
def test_processes_that_share_an_engine_ask_for_all_their_rows_and_keep_their_own(index: int, size: int) -> None:
    recorder = Recorder()
    prompts, keys, rollouts = PARTS[index]
    options: EngineOptions = {
        "vocabulary": SharedVocabulary(9, 0, ()),
        "max_new_tokens": 2,
        "temperature": 1.0,
        "seed": 0,
        "prompt_keys": keys,
        "rollout_index": rollouts,
    }
    found = SharedEngine(recorder, Launch(index, 4), size).sample(prompts, StudentPolicy(), **options)
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
