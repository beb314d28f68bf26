"""What an evaluation has measured is its own: under its name, and nothing of it is left for the next."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_runs import build, logged
from transformers import TrainerCallback

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
