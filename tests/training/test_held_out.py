"""What an evaluation has measured is its own: under its name, and nothing of it is left for the next."""

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_runs import Kill, build, config, dropping_student, logged, weights
from transformers import TrainerCallback, set_seed

from trb import TRBTrainer, zoo

SETTINGS = {"per_device_eval_batch_size": 4, "max_completion_length": 6}


def problems(seed: int) -> Dataset:
    return Dataset.from_list(zoo.problems(4, seed=seed, split="test"))


def measured(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What two evaluations of the same prompts have in common, without the prefix; times differ."""
    names = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items() if name.startswith(f"{prefix}_")}
    return {name: value for name, value in names.items() if "/" in name or name in ("loss", "entropy")}


def test_a_prediction_has_its_metrics_and_leaves_nothing_to_the_next_evaluation(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset=problems(1), **SETTINGS)
    first = trainer.evaluate()
    predicted = trainer.predict(problems(2)).metrics
    assert measured(trainer.evaluate(), "eval") == measured(first, "eval")
    assert measured(predicted, "test") == measured(trainer.evaluate(problems(2)), "eval") != measured(first, "eval")
    assert not any(name.startswith("eval_") for name in predicted)
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 3


def test_an_evaluation_that_was_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, eval_dataset=problems(1), **SETTINGS)
    first = trainer.evaluate()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.callback_handler, "on_prediction_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate(problems(2))
    assert measured(trainer.evaluate(), "eval") == measured(first, "eval")


class Predict(TrainerCallback):
    """Looks at other prompts after each step."""

    trainer: TRBTrainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.predict(problems(2))


def test_a_callback_that_predicts_changes_nothing_that_is_logged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_dataset": problems(1), "eval_strategy": "steps", "eval_steps": 1, **SETTINGS}
    plain = build(tmp_path / "plain", **options)
    plain.train()
    callback = Predict()
    other = callback.trainer = build(tmp_path / "other", callbacks=[callback], **options)
    other.train()
    for name in ("reverse_kl", "completion_length"):
        assert logged(plain, name) == logged(other, name)
    for before, after in zip(plain.state.log_history, other.state.log_history, strict=True):
        assert before.keys() == after.keys()
        assert measured(before, "eval") == pytest.approx(measured(after, "eval"), rel=1e-4)  # up to rounding


def test_numbers_have_the_prefix_of_their_evaluation(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset=problems(1), **SETTINGS)
    named = trainer.evaluate(metric_key_prefix="test")
    assert measured(named, "test") == measured(trainer.evaluate(), "eval")
    assert not any(name.startswith("eval_") for name in named)
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("repeated", [False, True], ids=["other prompts", "prompts that occur twice"])
def test_an_evaluation_does_not_depend_on_its_batches(tmp_path: Path, repeated: bool) -> None:
    """The loss and the entropy are means over tokens, and a prompt's repetitions are counted over all batches."""
    rows = zoo.problems(5, seed=1, split="test")
    rows = [rows[0], rows[1], rows[0], rows[1], rows[0]] if repeated else rows
    found = []
    for size in (1, 2, 5):
        options = SETTINGS | {"per_device_eval_batch_size": size, "max_completion_length": 24}
        trainer = build(tmp_path / str(size), eval_dataset=Dataset.from_list(rows), loss_top_k=0, **options)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_trb/reverse_kl"], rel=1e-4)
        (recorded,) = map(json.loads, (tmp_path / str(size) / "held_out.jsonl").read_text().splitlines())
        assert (recorded["loss"], recorded["entropy"]) == (metrics["eval_loss"], metrics["eval_entropy"])
        again = measured(trainer.evaluate(), "eval")
        assert again == measured(metrics, "eval")
        ours = {name: value for name, value in again.items() if name.startswith("trb/") and "calls" not in name}
        found.append(ours | {name: again[name] for name in ("loss", "entropy")})
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] == pytest.approx(found[2], rel=1e-4)


class Evaluate(TrainerCallback):
    """Evaluates between the micro-batches of a step."""

    trainer: TRBTrainer

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.evaluate()


@pytest.mark.parametrize("changes", [{"method": "opd"}, {"behavior_share": 0.5}, {"teacher_offload": True}], ids=str)
def test_an_evaluation_amid_a_step_leaves_its_rollouts(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Of several teachers, the rest of the step was scored against those of the evaluation's rows."""
    rows = [
        {**row, "teacher_id": "ab"[number % 2]} for number, row in enumerate(zoo.problems(32, seed=0, split="train"))
    ]
    held_out = Dataset.from_list([{**row, "teacher_id": "a"} for row in zoo.problems(4, seed=1, split="test")])
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    options |= SETTINGS | {"initial_kl_budget": None, "blend_warmup_steps": None, "num_generations": 2} | changes
    logs = []
    for callback in (None, Evaluate()):
        (student, tokenizer), (teacher, _), (other, _) = zoo.load("student"), zoo.load("teacher"), zoo.load("student")
        with torch.no_grad():
            other.lm_head.weight.mul_(0.5)
        trainer = TRBTrainer(
            student,
            {"a": teacher, "b": other},
            config(tmp_path, **options),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[] if callback is None else [callback],
        )
        if callback is not None:
            callback.trainer = trainer
        trainer.train()
        steps = [row for row in trainer.state.log_history if "loss" in row]
        logs.append([{name: row[name] for name in row if name == "loss" or "trb/" in name} for row in steps])
    assert len(logs[0]) == 2 and logs[0][0] == logs[1][0]
    assert logs[0][1] == pytest.approx(logs[1][1], rel=1e-4)  # the evaluation's batches draw from torch's own stream


def test_the_best_model_may_be_that_of_one_of_several_sets(tmp_path: Path) -> None:
    sets: dict[str, Any] = {"eval_dataset": {"a": problems(1), "b": problems(2)}, "eval_strategy": "steps"}
    best = {"metric_for_best_model": "eval_a_trb/reverse_kl", "greater_is_better": False, "save_strategy": "best"}
    trainer = build(tmp_path, eval_steps=1, **sets, **best, **SETTINGS)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    of = {name: [row["trb/reverse_kl"] for row in rows if row["set"] == name] for name in ("a", "b")}
    assert trainer.state.best_metric == pytest.approx(min(of["a"]))
    assert of["a"] != of["b"]
    assert not any("a_" in name for row in rows for name in row)


def steps_on_record(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("on_start", [False, True])
def test_each_evaluation_of_a_training_is_on_record_once(tmp_path: Path, on_start: bool) -> None:
    """Of a fresh one, nothing of the run before; of a resumed one, what one that was not resumed has."""
    options: dict[str, Any] = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": on_start}
    options |= {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4, **SETTINGS}
    (tmp_path / "held_out.jsonl").write_text('{"step": 0, "loss": 7.0}\n{"step": 2, "loss": 7.0}\n')  # another run's
    trainer = build(tmp_path, eval_dataset=problems(1), callbacks=[Kill(3, amid_next=False)], **options)
    first = trainer.evaluate()["eval_loss"]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps_on_record(tmp_path) == [0, 2]
    build(tmp_path, eval_dataset=problems(1), **options | {"save_steps": 1}).train()
    assert steps_on_record(tmp_path) == [0] * on_start + [2, 4]
    resumed = build(tmp_path, eval_dataset=problems(1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps_on_record(tmp_path) == [0] * on_start + [2, 4]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steps_on_record(tmp_path) == [0] * on_start + [2, 4]
    if on_start:
        assert json.loads((tmp_path / "held_out.jsonl").read_text().splitlines()[0])["loss"] == first


class Look(TrainerCallback):
    """Evaluates amid a step, and predicts at its end."""

    trainer: TRBTrainer

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.evaluate()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.predict(problems(2))


def drawing_reward(texts: list[str], rows: Any) -> list[float]:
    """As graders of others do: from the generators that everything in a process draws from."""
    return [random.random() + float(np.random.rand()) + torch.rand(()).item() for _ in texts]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_trained_does_not_depend_on_what_is_evaluated(tmp_path: Path, workers: int) -> None:
    """With a student that drops, and a grader that draws."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 3}
    options |= {"disable_dropout": False, "dataloader_num_workers": workers, "eval_dataset": problems(1), **SETTINGS}
    options |= {"dataloader_persistent_workers": bool(workers), "reward_fn": drawing_reward}

    def trained(name: str, callbacks: list[TrainerCallback], **changes: Any) -> dict[str, torch.Tensor]:
        set_seed(5)
        trainer = build(tmp_path / name, student=dropping_student(), callbacks=callbacks, **options | changes)
        for each in callbacks:
            cast(Look, each).trainer = trainer
        trainer.train()
        return weights(trainer)

    steps = {"eval_strategy": "steps", "eval_on_start": True}
    expected = trained("never", [])
    others = {
        "at each step": trained("each", [], eval_steps=1, **steps),
        "two sets": trained("two", [], eval_steps=2, **steps | {"eval_dataset": {"a": problems(1), "b": problems(2)}}),
        "by a callback": trained("callback", [Look()]),
    }
    for name, its in others.items():
        assert all(torch.equal(its[weight], value) for weight, value in expected.items()), name
