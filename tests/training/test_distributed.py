"""Two processes hold to one: the same completions, losses and weights, with whole and with sharded weights.

One launch of two processes over gloo makes every run (`distributed_worker`); the reference is made here, by one process
with the same global batch, in float64. Sums over the batch are grouped differently in the two, which changes their last
bits and nothing else. ZeRO-3 is tested where DeepSpeed is installed.
"""

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch

# One launch serves all of these tests, so one worker of pytest-xdist must run them (--dist loadgroup).
pytestmark = pytest.mark.xdist_group("distributed")

COUNT = 2
STUCK_SECONDS = 900  # far beyond what the runs take on a busy machine: only a deadlock meets it
# Relative, of what is logged and of weights. DeepSpeed updates a float32 copy of the weights.
ROUNDING = {"ddp": 1e-9, "fsdp2": 1e-9, "zero3": 1e-5}
# Per process rather than per batch, so that they say how the work was shared.
PER_PROCESS = {"student_calls", "teacher_calls"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of the two processes found, by scenario."""
    directory = tmp_path_factory.mktemp("pair")
    script = [sys.executable, worker.__file__]
    scenarios = [name for name in worker.SCENARIOS if name != "zero3" or find_spec("deepspeed")]
    arguments = [str(COUNT), str(directory), *scenarios]
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
        for name in scenarios
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker.train(tmp_path_factory.mktemp("one"), 1)


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
ZERO3 = pytest.param("zero3", marks=needs_deepspeed)
TRAININGS = pytest.mark.parametrize("name", ["ddp", "fsdp2", ZERO3])
SHARDED = pytest.mark.parametrize(
    ("name", "wrapper"), [("fsdp2", "FSDP"), pytest.param("zero3", "DeepSpeed", marks=needs_deepspeed)]
)


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
            assert compared(ours) == pytest.approx(compared(theirs), rel=ROUNDING[name])
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)  # transformers adds it up in float32


@TRAININGS
def test_two_processes_learn_what_one_learns(name: str, pair: Any, one: Any) -> None:
    weights = pair[name][0]["weights"]
    assert weights.keys() == one["weights"].keys()
    for key, value in one["weights"].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(weights[key], value, atol=scale * ROUNDING[name], rtol=0, check_dtype=False, msg=key)


@TRAININGS
def test_rows_that_fill_up_an_evaluation_are_not_counted(name: str, pair: Any, one: Any) -> None:
    # Five prompts, two at a time: the second process's last batch holds no prompt of its own.
    expected = {
        key: value
        for key, value in one["held_out"].items()
        if key in ("eval_loss", "eval_entropy")
        or (key.startswith("eval_trb/") and key.removeprefix("eval_trb/") not in PER_PROCESS)
    }
    assert len(expected) > 5
    for process in pair[name]:
        assert {key: process["held_out"][key] for key in expected} == pytest.approx(expected, rel=ROUNDING[name])


@TRAININGS
def test_shared_problems_score_as_they_do_in_one_process(name: str, pair: Any, one: Any) -> None:
    assert 0 < sum(one["evaluation"]["correct"]) < 14
    for process in pair[name]:
        assert process["evaluation"] == one["evaluation"]


@TRAININGS
def test_a_process_samples_while_the_others_have_nothing_to_sample(name: str, pair: Any, one: Any) -> None:
    assert [process["alone"] for process in pair[name]] == [[], one["alone"]]
    assert len(one["alone"]) == 2


@SHARDED
def test_the_student_is_sharded_and_after_its_warm_up_the_teacher(name: str, wrapper: str, pair: Any) -> None:
    for process in pair[name]:
        assert process["wrapper"].startswith(wrapper)
        assert process["student_held"] < 0.6 * process["student_weights"]
        assert process["teacher_held"] < 0.7 * process["teacher_weights"]  # under FSDP2 the head stays in place, whole


@SHARDED
def test_the_students_weights_are_gathered_once_a_step(name: str, wrapper: str, pair: Any) -> None:
    # Three steps of two accumulated batches each, and once for all that is measured afterwards.
    assert [process["refreshes"] for process in pair[name]] == [[0, 1, 2, 3]] * COUNT


def test_whole_weights_are_sampled_from_as_they_are(pair: Any) -> None:
    for process in pair["ddp"]:
        assert process["wrapper"] == "DistributedDataParallel"
        assert process["student_held"] == process["student_weights"]
        assert process["refreshes"] == []


def test_two_processes_with_several_teachers_are_one(pair: Any, tmp_path: Path) -> None:
    """Sharded students, and now and then a process without a row of one teacher."""
    alone = worker.have_two_teachers(tmp_path, 1)
    for step in range(3):
        assert [row for process in pair["teachers"] for row in process["drawn"][step]] == alone["drawn"][step]
    for process in pair["teachers"]:
        assert {0} in process["whose"] or {1} in process["whose"]
        for ours, theirs in zip(
            [*process["logs"], process["held_out"]], [*alone["logs"], alone["held_out"]], strict=True
        ):
            shared = {
                name: value
                for name, value in theirs.items()
                if "trb/" in name and name.rpartition("trb/")[2] not in PER_PROCESS
            }
            assert {name: ours[name] for name in shared} == pytest.approx(shared, rel=ROUNDING["fsdp2"])
    assert {"trb/teacher_reverse_kl/told", "trb/teacher_share/teacher"} <= alone["logs"][0].keys()
    for key, value in alone["weights"].items():
        scale = value.abs().max().item()
        found = pair["teachers"][0]["weights"][key]
        torch.testing.assert_close(found, value, atol=scale * ROUNDING["fsdp2"], rtol=0, check_dtype=False, msg=key)


def test_a_killed_evaluation_goes_on_alike_everywhere_and_is_refused_alike(pair: Any) -> None:
    for process in pair["evaluation"]:
        assert process["resumed"] == process["straight"]
        assert math.isfinite(process["straight"]["pass_at_1"])
        assert "n is 2 there and 3 here" in process["refusal"]


def test_two_processes_with_tools_draw_and_learn_what_one_does(pair: Any, tmp_path: Path) -> None:
    """Some rows take more turns than others, so that after the first the processes go on alone."""
    alone = worker.call_tools(tmp_path, 1)
    assert [row for process in pair["tools"] for row in process["drawn"]] == alone["drawn"]
    for process in pair["tools"]:
        assert alone["losses"] == pytest.approx(process["losses"], rel=1e-4)


def test_a_schedule_that_remembers_is_the_same_everywhere(pair: Any, tmp_path: Path) -> None:
    first, second = pair["schedule"]
    alone = worker.remember(tmp_path, 1)
    assert first == second
    assert len(set(first["shares"])) == 3
    assert first["state"] == pytest.approx(alone["state"], rel=1e-9)
    assert first["shares"] == pytest.approx(alone["shares"], rel=1e-9)


@pytest.mark.parametrize("name", worker.SELF_SETTING)
def test_a_warm_up_that_sets_itself_is_the_same_everywhere(name: str, pair: Any, tmp_path: Path) -> None:
    first, second = pair[name]
    alone = worker.set_itself(tmp_path, 1, **worker.SELF_SETTING[name])
    assert first == second
    assert {"trb/sequence_kl", "trb/teacher_weight"} <= alone["logs"][0].keys()
    if name == "gap":
        assert {"trb/gap", "trb/share", "trb/teacher_log_prob_student", "trb/reward_blended"} <= alone["logs"][0].keys()
    budgets = [row["trb/kl_budget"] for row in alone["logs"]]
    if name == "sequence":
        assert len({*budgets}) == 3, "nothing was learned from what was spent"
    if name == "sequence-linear":
        assert len({*budgets[:3]}) == 3 and 0.0 not in budgets[:3]
        assert budgets[3:] == [0.0] * 8
    for ours, theirs in zip(first["logs"], alone["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    flat = [
        {
            key: value
            for part in (state, state.get("base", {}), *state.get("advantages", {}).values())
            for key, value in part.items()
            if isinstance(value, float)
        }
        for state in (first["state"], alone["state"])
    ]
    assert flat[0] == pytest.approx(flat[1], rel=1e-9)
