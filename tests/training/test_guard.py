"""Losses and gradients that are not finite: never applied, counted, recorded; the end of a run when they persist."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_in_two_processes
from tiny_runs import TINY, Kill, Snapshots, build, logged, losses, weights

from trb import zoo
from trb.losses import ReverseKL
from trb.losses.chunked import RowLoss
from trb.training import checkpoints
from trb.training.guard import NonFiniteError, StepGuard
from trb.training.trainer import TRBTrainer


def poison(monkeypatch: pytest.MonkeyPatch, what: str, steps: set[int], part: int = 1) -> None:
    """Break micro-batch `part` of the steps given (from 1): its loss, only its gradient, or one row's divergence."""
    plain = TRBTrainer._compute_loss
    seen = {"micro_batches": 0}

    def broken(self: TRBTrainer, student: Any, inputs: Any, count: Any) -> Any:
        number, seen["micro_batches"] = seen["micro_batches"], seen["micro_batches"] + 1
        if number // 2 + 1 not in steps or number % 2 != part:
            return plain(self, student, inputs, count)
        if what == "row":
            with monkeypatch.context() as patch:
                patch.setattr(ReverseKL, "__call__", one_bad_token)
                return plain(self, student, inputs, count)
        loss, *rest = plain(self, student, inputs, count)
        if what == "gradient":
            zero = sum(parameter.sum() for parameter in self.model.parameters()) * 0
            return loss + torch.sqrt(zero.abs()), *rest  # 0, with the derivative 0/0
        return loss * {"nan": math.nan, "-inf": -math.inf}[what], *rest

    monkeypatch.setattr(TRBTrainer, "_compute_loss", broken)


def one_bad_token(loss_of: ReverseKL, batch: Any) -> Any:
    loss, metrics = RowLoss.__call__(loss_of, batch)
    metrics.reverse_kl[0] = math.nan  # the first token of the micro-batch's first row
    return loss * math.nan, metrics


@pytest.mark.parametrize(
    ("what", "named", "part"),
    [("nan", ["loss", "gradient"], 0), ("-inf", ["loss", "gradient"], 1), ("gradient", ["gradient"], 0)],
    ids=["a loss of nan", "a loss of -inf", "a gradient of nan"],
)
def test_a_step_that_is_not_finite_changes_nothing_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, named: list[str], part: int
) -> None:
    poison(monkeypatch, what, {2}, part)
    seen = Snapshots()
    trainer = build(tmp_path, callbacks=[seen], **TINY)
    trainer.train()
    first, second, third, _ = seen.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(one, other) for one, other in zip(*seen.moments[:2], strict=True))
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert seen.rates == pytest.approx([3e-4 * (1 - step / 4) for step in (1, 2, 3, 4)])  # the schedule goes on
    assert logged(trainer, "skipped_steps") == [0, 1, 1, 1]

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [False, True, False, False]
    assert all(math.isfinite(line["trb/reverse_kl"]) for line in lines)
    (saved,) = (tmp_path / "skipped").iterdir()
    assert saved.name == "step-000002.jsonl"
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["micro_batch"] for row in rows] == [0, 0, 1, 1]
    for row in rows:
        assert row["non_finite"] == named
        assert row["step"] == 2
        assert len(row["reverse_kl"]) == len(row["completion_ids"]) > 0
        assert trainer.processing_class.decode(row["prompt_ids"]) == row["prompt"]
        assert trainer.processing_class.decode(row["completion_ids"]) == row["completion"]


@pytest.mark.parametrize("method", ["trb", "opd"])
def test_a_prompt_on_which_the_student_breaks_is_survived_and_named(tmp_path: Path, method: str) -> None:
    """Logits of NaN reach the sampler first, as they do where bf16 overflows: it must not fall over them."""
    student, tokenizer = zoo.load("student")
    rows = zoo.problems(16, seed=0, split="train")
    bad = tokenizer.convert_tokens_to_ids("z")  # no prompt has it
    rows[5]["prompt"][-1]["content"] += "z"

    def breaks(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == bad)[..., None], math.nan)

    student.get_input_embeddings().register_forward_hook(breaks)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = build(tmp_path, student=student, method=method, train_rows=rows, **TINY)
    trainer.train()
    skipped = logged(trainer, "skipped_steps")[-1]
    assert 0 < skipped < 4
    saved = sorted((tmp_path / "skipped").iterdir())
    assert len(saved) == skipped
    for path in saved:
        guilty = [json.loads(line) for line in path.read_text().splitlines()]
        assert 0 < len(guilty) <= 4
        assert all(bad in row["prompt_ids"] + row["completion_ids"] for row in guilty)
    after = weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_where_rows_can_be_told_apart_only_the_bad_ones_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "row", {1}, part=1)
    build(tmp_path, **{**TINY, "max_steps": 1}).train()
    (row,) = map(json.loads, (tmp_path / "skipped" / "step-000001.jsonl").read_text().splitlines())
    assert row["micro_batch"] == 1
    assert row["reverse_kl"][0] is None
    assert all(math.isfinite(value) for value in row["reverse_kl"][1:])


def test_the_logged_loss_is_the_mean_over_the_steps_that_were_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a learning rate of 0 the steps do not depend on each other, so that those of a run without a skip are known.
    one_by_one = build(tmp_path / "plain", **{**TINY, "learning_rate": 0.0})
    one_by_one.train()
    separate = [row["loss"] for row in one_by_one.state.log_history if "loss" in row]
    poison(monkeypatch, "nan", {2})
    together = build(
        tmp_path / "skipping", **{**TINY, "learning_rate": 0.0, "logging_steps": 4, "logging_first_step": True}
    )
    together.train()
    first, mean = [row["loss"] for row in together.state.log_history if "loss" in row]  # of step 1, and of 2 to 4
    assert first == pytest.approx(separate[0], rel=1e-5)
    assert mean == pytest.approx((separate[2] + separate[3]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("steps", "limit", "ends_at"),
    [({2, 3}, 2, 3), ({1, 3}, 2, None), ({1}, 1, 1)],
)
def test_too_many_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: set[int], limit: int, ends_at: int | None
) -> None:
    poison(monkeypatch, "nan", steps)
    settings = {**TINY, "save_strategy": "steps", "save_steps": 1, "max_skipped_steps": limit}
    trainer = build(tmp_path, **settings)
    if ends_at is None:
        trainer.train()
        assert logged(trainer, "skipped_steps")[-1] == len(steps)
        return
    with pytest.raises(NonFiniteError, match=rf"step {ends_at}: loss and gradient not finite") as caught:
        trainer.train()
    last = tmp_path / f"checkpoint-{ends_at - 1}"
    assert (str(last) if ends_at > 1 else "There is no checkpoint yet") in str(caught.value)
    assert str(tmp_path / "skipped" / f"step-{ends_at:06d}.jsonl") in str(caught.value)
    assert trainer.state.global_step == ends_at - 1
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_the_count_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**TINY, "save_strategy": "steps", "save_steps": 1, "max_skipped_steps": 3}
    settings["lr_scheduler_type"] = "constant"  # so that a longer run is the same run
    with monkeypatch.context() as patch:
        poison(patch, "nan", {1, 2})
        build(tmp_path, **{**settings, "max_steps": 2}).train()
    with monkeypatch.context() as patch:
        poison(patch, "nan", {1})  # the third of the run
        resumed = build(tmp_path, **settings)
        with pytest.raises(NonFiniteError, match="max_skipped_steps=3 steps in a row"):
            resumed.train(resume_from_checkpoint=True)


def test_the_loss_of_a_training_is_that_of_the_steps_that_were_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that is resumed after a step was skipped, and before another is; of none it is unknown."""
    settings = {**TINY, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 2}
    plain = build(tmp_path / "plain", **settings)
    plain.train()
    expected = (losses(plain)[0] + losses(plain)[2]) / 2
    with monkeypatch.context() as patch:
        poison(patch, "nan", {2, 4})
        found = build(tmp_path / "whole", **settings).train()
    assert found.training_loss == found.metrics["train_loss"] == pytest.approx(expected, rel=1e-5)
    with monkeypatch.context() as patch:
        poison(patch, "nan", {2})
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "cut", callbacks=[Kill(2, amid_next=True)], **settings).train()
    with monkeypatch.context() as patch:
        poison(patch, "nan", {2})  # the fourth of the run
        rest = build(tmp_path / "cut", **settings).train(resume_from_checkpoint=True)
    assert rest.training_loss == found.training_loss
    with monkeypatch.context() as patch:
        poison(patch, "nan", {1, 2, 3, 4})
        assert math.isnan(build(tmp_path / "none", **settings).train().training_loss)


def test_a_second_training_counts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**TINY, "learning_rate": 0.0, "logging_steps": 4, "max_skipped_steps": 2}
    plain = build(tmp_path / "plain", **settings)
    expected = plain.train().training_loss
    trainer = build(tmp_path / "again", **settings)
    with monkeypatch.context() as patch:
        poison(patch, "nan", {1, 2})
        with pytest.raises(NonFiniteError):
            trainer.train()
    with monkeypatch.context() as patch:
        poison(patch, "nan", {1})  # the first in a row, and not the second
        trainer.train()
    assert logged(trainer, "skipped_steps")[-1] == 1
    found = trainer.train().training_loss
    assert found == losses(trainer)[-1] == pytest.approx(expected, rel=1e-6)
    assert logged(trainer, "skipped_steps")[-1] == 0


class TwoProcesses:
    """What `judge` needs of an accelerator, seen from one of two processes; the other reports `elsewhere`."""

    device = torch.device("cpu")

    def __init__(self, elsewhere: list[float]) -> None:
        self.elsewhere, self.exchanges = torch.tensor(elsewhere), 0

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.exchanges += 1
        return tensor + self.elsewhere


@pytest.mark.parametrize(
    ("losses_here", "norm", "elsewhere", "found"),
    [
        ([1.0, 2.0], 0.5, [0.0, 0.0], []),
        ([1.0, math.nan, 2.0], 0.5, [0.0, 0.0], ["loss"]),
        ([math.inf, -math.inf], 0.5, [0.0, 0.0], ["loss"]),
        ([1.0], math.inf, [0.0, 1.0], ["gradient"]),
        ([1.0], 0.5, [1.0, 0.0], ["loss"]),  # only the other process saw it
        ([math.nan], math.nan, [0.0, 0.0], ["loss", "gradient"]),
        ([1.0], None, [0.0, 0.0], []),
        ([], 0.5, [0.0, 0.0], []),
    ],
)
def test_the_verdict_is_shared_in_one_exchange(
    tmp_path: Path, losses_here: list[float], norm: float | None, elsewhere: list[float], found: list[str]
) -> None:
    guard, processes = StepGuard(tmp_path), TwoProcesses(elsewhere)
    for loss in losses_here:
        guard.add_loss(torch.tensor(loss))
    assert guard.judge(processes, None if norm is None else torch.tensor(norm)) == found  # type: ignore[arg-type]
    assert processes.exchanges == 1


@pytest.mark.torture
def test_two_processes_decide_alike_and_resume_alike(tmp_path: Path) -> None:
    run_in_two_processes("two_processes.py", tmp_path, timeout=600)
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["skipped"] == [0, 1, 1, 1]
        assert found["unchanged"] == [True, False, False]  # from step 1 to 2, 2 to 3, 3 to 4
        assert found["same_losses"] and found["same_weights"]
    assert first["sum_of_weights"] == second["sum_of_weights"]
    rows = [json.loads(line) for line in (tmp_path / "straight/skipped/step-000002.jsonl").read_text().splitlines()]
    assert [row["process"] for row in rows] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(row["non_finite"] == ["loss"] for row in rows)
    (last,) = (tmp_path / "straight").glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth", "trb_state_0.json", "trb_state_1.json"} <= {
        path.name for path in last.iterdir()
    }
    checkpoints.verify(last)
    assert not list(tmp_path.glob("*/*.partial"))


def test_limits_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_skipped_steps must be at least 1, got 0"):
        build(tmp_path, max_skipped_steps=0)
