"""Files of a run: what is written, and what a resumed run drops."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import build
from torch import Tensor
from transformers import TrainerCallback

from trb import TRBConfig, TRBTrainer, zoo
from trb.records import METRICS
from trb.sampling import prompt_key
from trb.sampling.scoring import TokenScores
from trb.training.logged import MeasuredTrainer
from trb.training.recording import _Shield, drop_after_step, logged_metrics, read_records, score_record


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_numbers_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    METRICS.append(path, [{"step": 1, "loss": float("nan"), "nested": [float("inf"), {"x": 1.5}]}])
    assert read(path) == [{"step": 1, "loss": None, "nested": [None, {"x": 1.5}]}]


class LoudError(Exception):
    def __repr__(self) -> str:
        return "\x1b]0;owned\x07\x1b[2J" + "finished" * 1000


def test_what_code_of_ones_own_raises_is_logged_as_plain_text_and_not_at_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may quote a completion."""

    class Loud(TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            raise LoudError

    def reward(*_: Any) -> list[float]:
        raise LoudError

    callback = Loud()
    _Shield(callback)
    callback.on_log(None, None, None)
    trainer: Any = SimpleNamespace(reward_fn=reward, _rewards_work=True, state=SimpleNamespace(global_step=3))
    assert math.isnan(MeasuredTrainer._rewards(trainer, ["text"], [{}])[0])
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert "?]0;owned??[2Jfinished" in message and message.isprintable() and len(message) < 400


def test_lines_after_the_checkpoint_are_dropped_and_so_is_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    METRICS.append(path, [{"step": step} for step in range(1, 6)])
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    drop_after_step(path, 3)
    assert [row["step"] for row in read(path)] == [1, 2, 3]
    METRICS.append(path, [{"step": 4}])
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 2, "lo', b"\x00" * 12, b"\xff\xfe{}", b"[1, 2]", b'{"stgp": 2}', b'{"step": "2"}', b"[" * 100_000],
    ids=["torn", "zeros", "no UTF-8", "no object", "no step", "a step that is no number", "deep"],
)
def test_a_damaged_line_in_the_middle_costs_that_line_alone_and_is_kept_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n{"step": 4}\n{"step": 5, "l')
    assert [row["step"] for row in read_records(path)] == [1, 3, 4]
    drop_after_step(path, 3)
    assert [row["step"] for row in read(path)] == [1, 3]
    assert caplog.text.count(f"{path} is damaged: line 2 cannot be read") == 2
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n"
    drop_after_step(path, 3)  # once is enough
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n"


def test_metrics_of_resumed_and_running_runs(tmp_path: Path) -> None:
    """The later record of a repeated step counts; half a last line, missing and null values are passed over."""
    path = tmp_path / "metrics.jsonl"
    rows = [
        '{"step": 1, "x": 9, "y": 1}',
        '{"step": 1, "x": 0.5}',
        '{"step": 2, "x": null}',
        '{"step": 3}',
        '{"step": 4, "',
    ]
    path.write_text("\n".join(rows))
    assert logged_metrics(path, ["x", "y"]) == {"x": {1: 0.5}, "y": {1: 1.0}}
    with pytest.raises(FileNotFoundError):
        logged_metrics(tmp_path / "nowhere.jsonl", ["x"])


@pytest.mark.parametrize("damage", [b"\xff", b'{"step": 2, "lo', b'{"step": 2, "loss": "high"}'])
def test_metrics_that_are_no_record_are_named_by_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1}\n' + damage + b'\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is no metrics record"):
        logged_metrics(path, ["loss"])


def test_a_missing_file_is_left_missing(tmp_path: Path) -> None:
    drop_after_step(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_text_with_line_separators_and_lone_surrogates_survives(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    texts = ["a\u2028b", "\x85", "\ud800", "plain"]
    METRICS.append(path, [{"step": 1, "completion": text} for text in texts])
    drop_after_step(path, 1)
    assert [row["completion"] for row in read(path)] == texts


# ---- scores of recorded rollouts ----


def test_infinite_scores_become_null_and_probabilities_keep_six_digits(tmp_path: Path) -> None:
    scores = TokenScores(
        student_log_prob=[[-1.23456789]], teacher_log_prob=[[-math.inf]], kl_teacher=[[0.5]],
        alternatives=[[{"student": [(7, 0.123456789), (8, 1.23456789e-9)], "teacher": [], "behavior": [(9, 1.0)]}]],
    )  # fmt: skip
    path = tmp_path / "rollouts.jsonl"
    METRICS.append(path, [score_record(scores, 0, "<{}>".format)])
    assert read(path) == [
        {
            "student_log_prob": [-1.23457],
            "teacher_log_prob": [None],
            "kl_teacher": [0.5],
            "alternatives": [
                {"student": [["<7>", 0.123457], ["<8>", 1.23457e-9]], "teacher": [], "behavior": [["<9>", 1.0]]}
            ],
        }
    ]
    bare = TokenScores(student_log_prob=[[0.0]], teacher_log_prob=[[0.0]], kl_teacher=[[0.0]])
    assert "alternatives" not in score_record(bare, 0, str)


def trained(directory: Path, peft_config: Any = None, **changes: Any) -> tuple[TRBTrainer, list[dict]]:
    """A short run on the embedded pair, and what it recorded."""
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 3e-4, "max_completion_length": 24,
        "initial_kl_budget": 0.5, "blend_warmup_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "recorded_scores_every": 1,
        "recorded_rollouts": 6,
    }  # fmt: skip
    student, tokenizer = zoo.load("student")
    teacher, teacher_tokenizer = zoo.load("teacher")
    trainer = TRBTrainer(
        student,
        teacher,
        TRBConfig(str(directory), **{**settings, **changes}),
        train_dataset=Dataset.from_list(zoo.problems(16, seed=0, split="train")),
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, read(directory / "rollouts.jsonl")


def folded(logits: Tensor, rows: int, stop_ids: list[int]) -> list[dict[int, float]]:
    """log-probability by token id at each position, every way to stop counted as the first of `stop_ids`; in float64,
    one number at a time."""
    found = []
    for position in logits.double().tolist():
        weights = {token: math.exp(value) for token, value in enumerate(position[:rows])}
        weights[stop_ids[0]] = math.fsum(weights.pop(token) for token in stop_ids)
        total = math.fsum(weights.values())
        found.append({token: math.log(weight / total) for token, weight in weights.items()})
    return found


def test_recorded_scores_are_the_models_own_numbers(tmp_path: Path) -> None:
    trainer, records = trained(tmp_path, max_steps=1)
    student, tokenizer = zoo.load("student")
    teacher, _ = zoo.load("teacher")
    rows, stop_ids = trainer.vocabulary.size, trainer.vocabulary.stop_ids
    assert len(records) == 6 and len(stop_ids) > 1
    for record in (records[0], records[5]):
        prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer.convert_tokens_to_ids(record["tokens"])
        with torch.no_grad():
            ids = torch.tensor([prompt + completion])
            laws = {
                name: folded(model(ids).logits[0, len(prompt) - 1 : -1], rows, stop_ids)
                for name, model in (("student", student), ("teacher", teacher))
            }
        for name, law in laws.items():
            expected = [position[token] for position, token in zip(law, completion, strict=True)]
            assert record[f"{name}_log_prob"] == pytest.approx(expected, abs=2e-4)
            for position, alternatives in zip(law, record["alternatives"], strict=True):
                best = sorted(position, key=position.__getitem__, reverse=True)[:3]
                assert [text for text, _ in alternatives[name]] == [tokenizer.decode([token]) for token in best]
                chances = [math.exp(position[token]) for token in best]
                assert [chance for _, chance in alternatives[name]] == pytest.approx(chances, abs=1e-4)
        # On the geometric path from student to teacher, by the sampler's own teacher weight.
        for weight, chosen, alternatives in zip(
            record["teacher_weight"],
            zip(laws["student"], laws["teacher"], strict=True),
            record["alternatives"],
            strict=True,
        ):
            path = {t: math.exp((1 - weight) * chosen[0][t] + weight * chosen[1][t]) for t in chosen[0]}
            likeliest = max(path, key=path.__getitem__)
            text, chance = alternatives["behavior"][0]
            assert text == tokenizer.decode([likeliest])
            assert chance == pytest.approx(path[likeliest] / math.fsum(path.values()), abs=2e-3)


def test_the_teachers_tokens_of_a_prefix_are_recorded_under_its_law(tmp_path: Path) -> None:
    """And the student's after them under the student's; which is whose, the sampler's own numbers say."""
    trainer, records = trained(
        tmp_path,
        method="prefix",
        max_steps=1,
        initial_prefix_share=0.5,
        initial_kl_budget=None,
        blend_warmup_steps=None,
    )
    student, tokenizer = zoo.load("student")
    teacher, _ = zoo.load("teacher")
    events = trainer.vocabulary.size, trainer.vocabulary.stop_ids
    for record in records:
        prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer.convert_tokens_to_ids(record["tokens"])
        with torch.no_grad():
            ids = torch.tensor([prompt + completion])
            laws = [folded(model(ids).logits[0, len(prompt) - 1 : -1], *events) for model in (student, teacher)]
        apart = [
            math.fsum(math.exp(own[token]) * (own[token] - theirs[token]) for token in own)
            for own, theirs in zip(*laws, strict=True)
        ]
        taught = [weight == 1 for weight in record["teacher_weight"]]
        assert taught == sorted(taught, reverse=True) and {*taught} == {True, False}
        expected = [0.0 if theirs else value for theirs, value in zip(taught, apart, strict=True)]
        assert record["kl_teacher"] == pytest.approx(expected, abs=2e-3)
        for theirs, alternatives in zip(taught, record["alternatives"], strict=True):
            assert alternatives["behavior"] == alternatives["teacher" if theirs else "student"]
    assert sum(value > 0.1 for value in apart[: sum(taught)]) > 0, "the two laws are told apart nowhere"
    assert "trb/kl_teacher" not in trainer.state.log_history[0]


def test_rollouts_carry_what_matches_them_across_methods(tmp_path: Path) -> None:
    _, blended = trained(tmp_path / "trb", max_steps=1)
    _, plain = trained(tmp_path / "opd", max_steps=1, method="opd")
    tokenizer = zoo.load("student")[1]
    keys = [f"{prompt_key(tokenizer(r['prompt'], add_special_tokens=False)['input_ids']):016x}" for r in blended]
    assert [record["prompt_key"] for record in blended] == [record["prompt_key"] for record in plain] == keys
    assert [record["rollout_index"] for record in blended] == [0, 1, 2, 3, 0, 1]
    assert len(set(keys)) == 2


def test_recording_changes_nothing_in_training(tmp_path: Path) -> None:
    found = {}
    for name, changes in {
        "all": {},
        "none": {"recorded_rollouts": 0},
        "no scores": {"recorded_scores_every": 0},
    }.items():
        torch.manual_seed(0)
        trainer, records = trained(tmp_path / name, max_steps=3, **changes)
        steps = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found[name] = (steps, torch.random.get_rng_state().tolist(), trainer.model.state_dict())
        assert trainer.model.training and not trainer.teacher_model.training
        assert len(records) == (0 if name == "none" else 18)
        assert all(("alternatives" in record) is (name == "all") for record in records)
    losses, state, weights = found["all"]
    for other_losses, other_state, other_weights in (found["none"], found["no scores"]):
        assert losses == other_losses and state == other_state
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_scores_come_every_few_logged_steps_and_alternatives_can_be_left_out(tmp_path: Path) -> None:
    options = {"logging_steps": 2, "recorded_scores_every": 2, "recorded_rollouts": 1, "recorded_alternatives": 0}
    _, records = trained(tmp_path, max_steps=7, max_completion_length=4, **options)
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    assert [record["step"] for record in records if "teacher_log_prob" in record] == [0, 4]
    assert not any("alternatives" in record for record in records)


def test_adapters_and_half_precision_are_scored_too(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer, records = trained(tmp_path, peft_config=lora, bf16=True, gradient_checkpointing=True)
    for record in records:
        assert len(record["alternatives"]) == len(record["tokens"]) == len(record["student_log_prob"])
        assert all(value is not None and value <= 0 for value in record["teacher_log_prob"])
    assert trainer.model.training


def test_completions_that_are_printed_are_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build(tmp_path, log_completions=True, max_steps=1)
    hostile = "4\x1b]0;owned\x1b\\\n\u202e5\x9b2J"
    decode = trainer.processing_class.batch_decode
    monkeypatch.setattr(
        type(trainer.processing_class), "batch_decode", lambda self, ids, **options: [hostile for _ in decode(ids)]
    )
    trainer.train()
    printed = capsys.readouterr().out
    assert "4?]0;owned?" in printed and "?5?2J" in printed
    assert [c for c in printed if not c.isprintable() and c != "\n"] == []
    kept = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert set(kept["completion"]) == {"4?]0;owned?\\\n?5?2J"}


@pytest.mark.parametrize("name", ["recorded_rollouts", "recorded_alternatives", "recorded_scores_every"])
def test_negative_counts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        TRBConfig(str(tmp_path), report_to=[], **{name: -1})
