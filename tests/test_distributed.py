"""Two processes hold to one: the same completions, losses and weights, with whole and with sharded weights.

One launch of two processes over gloo makes every run (`distributed_worker`); the reference is made here, by one process
with the same global batch, in float64. Sums over the batch are grouped differently in the two, which changes their last
bits and nothing else.
"""

import math
import subprocess
import sys
from typing import Any

import distributed_worker as worker
import pytest
import torch

COUNT = 2
STUCK_SECONDS = 420  # far beyond what the runs take on a busy machine: only a deadlock meets it
# Per process rather than per batch, so that they say how the work was shared.
PER_PROCESS = {"student_calls", "teacher_calls"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of the two processes found, by scenario."""
    directory = tmp_path_factory.mktemp("pair")
    script = [sys.executable, worker.__file__]
    arguments = [str(COUNT), str(directory), *worker.SCENARIOS]
    logs = [(directory / f"{rank}.log").open("w+b") for rank in range(COUNT)]
    processes = [
        subprocess.Popen([*script, str(rank), *arguments], stdout=log, stderr=log) for rank, log in enumerate(logs)
    ]
    try:
        for process, log in zip(processes, logs, strict=True):
            status = process.wait(timeout=STUCK_SECONDS)
            log.seek(0)
            assert status == 0, log.read().decode()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return {
        name: [torch.load(directory / f"{name}-{rank}.pt", weights_only=False) for rank in range(COUNT)]
        for name in worker.SCENARIOS
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker.train(tmp_path_factory.mktemp("one"), 1)


TRAININGS = pytest.mark.parametrize("name", ["ddp", "fsdp2"])


@TRAININGS
def test_two_processes_draw_what_one_draws(name: str, pair: Any, one: Any) -> None:
    assert len(one["drawn"]) == 3 + 3  # a batch for each step, then the held-out prompts two at a time
    for step in range(3):
        together = [row for process in pair[name] for row in process["drawn"][step]]
        assert together == one["drawn"][step]


@TRAININGS
def test_two_processes_log_what_one_logs(name: str, pair: Any, one: Any) -> None:
    def compared(row: dict[str, Any]) -> dict[str, float]:
        return {key: row[key] for key in row if key.startswith("trb/") and key.removeprefix("trb/") not in PER_PROCESS}

    assert {"trb/reverse_kl", "trb/sequence_kl", "trb/accept_rate", "trb/support_mass"} <= compared(
        one["logs"][0]
    ).keys()
    for process in pair[name]:
        for ours, theirs in zip(process["logs"], one["logs"], strict=True):
            assert compared(ours) == pytest.approx(compared(theirs), rel=1e-9)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)  # transformers adds it up in float32


@TRAININGS
def test_two_processes_learn_what_one_learns(name: str, pair: Any, one: Any) -> None:
    weights = pair[name][0]["weights"]
    assert weights.keys() == one["weights"].keys()
    for key, value in one["weights"].items():
        torch.testing.assert_close(weights[key], value, atol=1e-9, rtol=1e-7, msg=key)


@TRAININGS
def test_rows_that_fill_up_an_evaluation_are_not_counted(name: str, pair: Any, one: Any) -> None:
    # Five prompts, two at a time: the second process's last batch holds no prompt of its own.
    expected = {
        key: value
        for key, value in one["held_out"].items()
        if key == "eval_loss" or (key.startswith("eval_trb/") and key.removeprefix("eval_trb/") not in PER_PROCESS)
    }
    assert len(expected) > 5
    for process in pair[name]:
        assert {key: process["held_out"][key] for key in expected} == pytest.approx(expected, rel=1e-9)


@TRAININGS
def test_shared_problems_score_as_they_do_in_one_process(name: str, pair: Any, one: Any) -> None:
    assert 0 < sum(one["evaluation"]["correct"]) < 14
    for process in pair[name]:
        assert process["evaluation"] == one["evaluation"]


@TRAININGS
def test_a_process_samples_while_the_others_have_nothing_to_sample(name: str, pair: Any, one: Any) -> None:
    assert [process["alone"] for process in pair[name]] == [[], one["alone"]]
    assert len(one["alone"]) == 2


def test_fsdp2_shards_the_student_and_after_its_warm_up_the_teacher(pair: Any) -> None:
    for process in pair["fsdp2"]:
        assert process["wrapper"].startswith("FSDP")
        assert process["student_held"] < 0.6 * process["student_weights"]
        assert process["teacher_held"] < 0.7 * process["teacher_weights"]  # the head stays whole
    assert pair["ddp"][0]["wrapper"] == "DistributedDataParallel"
    assert all(process["student_held"] == process["student_weights"] for process in pair["ddp"])


def test_the_students_weights_are_gathered_once_a_step(pair: Any) -> None:
    # Three steps of two accumulated batches each, and once for all that is measured afterwards.
    assert [process["refreshes"] for process in pair["fsdp2"]] == [3, 3]
    assert [process["refreshes"] for process in pair["ddp"]] == [0, 0]


def test_a_killed_evaluation_goes_on_alike_everywhere_and_is_refused_alike(pair: Any) -> None:
    for process in pair["evaluation"]:
        assert process["resumed"] == process["straight"]
        assert math.isfinite(process["straight"]["pass_at_1"])
        assert "n is 2 there and 3 here" in process["refusal"]
