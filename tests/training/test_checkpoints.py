"""Checkpoints: every way to damage one is recognised, and no order of saving and removing loses the last good one."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_runs import Kill, build, config
from trl import DistillationTrainer

from trb import zoo
from trb.training import checkpoints
from trb.training.checkpoints import CheckpointError
from trb.training.trainer import TRBTrainer

FILES = {"trainer_state.json": b'{"global_step": 2}', "model.safetensors": bytes(range(200)), "shards/0.bin": b"abc"}


def write(directory: Path, step: int, *, checksums: bool = True) -> Path:
    """A sealed checkpoint in its place, written as the trainer does."""
    folder = directory / checkpoints.PARTIAL / f"checkpoint-{step}"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    checkpoints.seal(folder, checksums=checksums)
    checkpoints.publish(directory, folder.name)
    return directory / folder.name


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_published_checkpoint_is_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 2)
    checkpoints.verify(checkpoint)
    assert names(tmp_path) == {"checkpoint-2"}
    assert checkpoints.latest(tmp_path) == checkpoint


@pytest.mark.parametrize("name", ["checksums.json", *FILES])
def test_every_bit_that_flips_is_recognised_or_harmless(tmp_path: Path, name: str) -> None:
    checkpoint = write(tmp_path, 2)
    path, content = checkpoint / name, (checkpoint / name).read_bytes()
    unnoticed = []
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            checkpoints.verify(checkpoint)
        except CheckpointError as error:
            assert str(checkpoint) in str(error)
            assert name in str(error) or name == "checksums.json"
        else:
            unnoticed.append(position)
    if name != "checksums.json":
        assert unnoticed == []
    for position in unnoticed:  # white space between the values: what is read stays the same
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        assert json.loads(damaged) == json.loads(content)


@pytest.mark.parametrize("name", ["checksums.json", *FILES])
def test_every_truncation_is_recognised(tmp_path: Path, name: str) -> None:
    checkpoint = write(tmp_path, 2)
    path, content = checkpoint / name, (checkpoint / name).read_bytes()
    end = content.rstrip(b"\n") if name == "checksums.json" else content  # JSON needs no line end
    for length in range(len(end)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"is damaged|no complete checkpoint"):
            checkpoints.verify(checkpoint)


def test_sizes_alone_find_what_is_cut_off_and_not_what_is_changed(tmp_path: Path) -> None:
    path = write(tmp_path, 2, checksums=False) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    checkpoints.verify(path.parent)
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 199 bytes instead of 200"):
        checkpoints.verify(path.parent)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors cannot be read \(No such file"),
        (lambda folder: shutil.rmtree(folder / "shards"), "shards/0.bin cannot be read"),
        (lambda folder: replace_by_folder(folder / "model.safetensors"), r"model\.safetensors is not a file"),
        (lambda folder: (folder / "checksums.json").unlink(), r"another trainer \(it has neither checksums\.json nor"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), r"checksums\.json cannot be read"),
        (lambda folder: replace_by_folder(folder / "checksums.json"), r"checksums\.json cannot be read"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    checkpoint = write(tmp_path, 2)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.verify(checkpoint)


def test_checksums_that_name_files_elsewhere_are_refused(tmp_path: Path) -> None:
    for name in ("/dev/zero", "../../secret"):
        checkpoint = write(tmp_path, 2)
        files = {"trainer_state.json": {"bytes": 18}, name: {"bytes": 0, "sha256": "0"}}
        content = {"files": files, "sha256": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()}
        (checkpoint / "checksums.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"checksums\.json cannot be read"):
            checkpoints.verify(checkpoint)


def test_a_folder_without_a_trainer_state_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"weights")
    checkpoints.seal(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoints.verify(tmp_path / "checkpoint-2")


def test_damaged_ones_are_passed_over_with_a_message(tmp_path: Path) -> None:
    for step in (2, 4, 10):  # by number, not by name
        write(tmp_path, step)
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "checkpoint-notes").mkdir()
    heard: list[str] = []
    assert checkpoints.latest(tmp_path, warn=heard.append) == tmp_path / "checkpoint-4"
    (message,) = heard
    assert "checkpoint-10 is damaged: model.safetensors has 4 bytes" in message
    assert message.endswith("it is passed over")
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "checksums.json").unlink()
    assert checkpoints.latest(tmp_path, warn=None) is None
    assert checkpoints.latest(tmp_path / "nowhere") is None


def test_names_in_checksums_are_logged_as_plain_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Anybody can seal a checkpoint."""
    folder = write(tmp_path, 2)
    (folder / "\x1b[2Jowned").write_text("more")
    checkpoints.seal(folder)
    (folder / "\x1b[2Jowned").unlink()
    assert checkpoints.latest(tmp_path) is None
    (message,) = caplog.messages
    assert "?[2Jowned cannot be read" in message and message.isprintable()


def test_a_save_that_was_cut_off_is_no_checkpoint_and_goes_with_the_next(tmp_path: Path) -> None:
    write(tmp_path, 2)
    torn = tmp_path / checkpoints.PARTIAL / "checkpoint-4"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"ha")
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-2"
    write(tmp_path, 4)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    checkpoints.verify(tmp_path / "checkpoint-4")


def test_a_checkpoint_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    damaged = write(tmp_path, 2)
    (damaged / "model.safetensors").unlink()
    (damaged / "left-over").write_bytes(b"of the damaged one")
    write(tmp_path, 2)
    checkpoints.verify(damaged)
    assert not (damaged / "left-over").exists()
    assert names(tmp_path) == {"checkpoint-2"}


@pytest.mark.parametrize(
    ("steps", "newest", "limit", "protected", "kept"),
    [
        ((2, 4, 6), 6, 2, None, {4, 6}),
        ((2, 4, 6), 6, 1, None, {6}),
        ((2, 4, 6), 6, None, None, {2, 4, 6}),
        ((2, 4, 6), 6, 0, None, {2, 4, 6}),
        ((2, 4, 6), 6, 5, None, {2, 4, 6}),
        ((2, 4, 6, 8), 4, 1, None, {4}),  # 6 and 8 were damaged: the only good one stays
        ((2, 4, 6, 8), 4, 2, None, {2, 4}),
        ((2, 4, 6, 8), 4, 3, None, {2, 4, 8}),
        ((2, 4, 6), 6, 1, 2, {2, 6}),
        ((8, 10), 10, 1, None, {10}),
    ],
)
def test_the_newest_good_one_is_never_removed(
    tmp_path: Path, steps: tuple[int, ...], newest: int, limit: int | None, protected: int | None, kept: set[int]
) -> None:
    for step in steps:
        write(tmp_path, step)
    best = None if protected is None else str(tmp_path / f"checkpoint-{protected}")
    checkpoints.prune(tmp_path, newest, limit, [best, None])
    assert checkpoints.numbered(tmp_path).keys() == kept


# ---- the trainer's own ----


def trained(directory: Path, **changes: Any) -> TRBTrainer:
    settings = {"max_completion_length": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    return build(directory, **{**settings, **changes})


def test_the_trainer_resumes_from_the_last_whole_checkpoint_and_refuses_a_damaged_one_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, max_steps=3, save_total_limit=2).train()
    assert checkpoints.numbered(tmp_path).keys() == {2, 3}
    optimizer = tmp_path / "checkpoint-3" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"the contents of optimizer\.pt differ"):
        trained(tmp_path, max_steps=4).train(resume_from_checkpoint=str(optimizer.parent))
    resumed = trained(tmp_path, max_steps=4, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert "optimizer.pt differ" in caplog.text
    assert resumed.state.global_step == 4
    assert checkpoints.numbered(tmp_path).keys() == {4}
    checkpoints.verify(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint to resume from; to start anew, call train\(\)"):
        trained(tmp_path / "empty", max_steps=1).train(resume_from_checkpoint=True)


def planted(checkpoint: Path) -> None:
    """A weight of 7, and the checksum of before."""
    weights = load_file(checkpoint / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = 7.0
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil",
    [
        planted,
        lambda checkpoint: (checkpoint / "checksums.json").unlink(),
        lambda checkpoint: (checkpoint / "trainer_state.json").write_bytes(b""),
    ],
    ids=["changed", "no checksums, as other trainers save", "emptied"],
)
def test_a_checkpoint_that_is_passed_over_is_not_resumed_from_after_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    trained(tmp_path, max_steps=1).train()
    spoil(tmp_path / "checkpoint-1")
    resumed = trained(tmp_path, max_steps=2)
    before = {name: weight.clone() for name, weight in resumed.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"no whole checkpoint to resume from \(not whole: checkpoint-1\)"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-1" in caplog.text
    assert resumed.state.global_step == 0
    assert all(torch.equal(before[name], weight) for name, weight in resumed.model.state_dict().items())
    resumed.train()  # told to start anew
    assert resumed.state.global_step == 2


def of_another_trainer(checkpoint: Path) -> Path:
    """As TRL's own trainer leaves one."""
    for name in ("checksums.json", "trb_run.json", "trb_state_0.json", "trb_records.json"):
        (checkpoint / name).unlink(missing_ok=True)
    return checkpoint


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_named_and_is_no_checkpoint_is_said_as_it_is(tmp_path: Path, verify: bool) -> None:
    run, empty = tmp_path / "run", tmp_path / "empty"
    trained(run, max_steps=1).train()
    empty.mkdir()
    (run / "file").touch()
    named = {
        run / "checkpoint-7": rf"checkpoint-7 does not exist, .* beside it is {run}/checkpoint-1$",
        tmp_path
        / "nowhere": r"nowhere does not exist, .*: name a checkpoint of a run, one of its folders checkpoint-N$",
        run: rf"run is the directory of a run, .*: name one of its checkpoints, such as {run}/checkpoint-1$",
        run / "file": rf"file is a file, .* beside it is {run}/checkpoint-1$",
    }
    resumed = trained(tmp_path / "other", max_steps=1)
    for path, message in named.items():
        with pytest.raises(CheckpointError, match=message):
            resumed.train(resume_from_checkpoint=str(path), verify=verify)
    of_another_trainer(run / "checkpoint-1")
    message = (
        r"directory of a run, .* \(of another trainer, whose weights alone can be used, as the model: checkpoint-1\)$"
    )
    with pytest.raises(CheckpointError, match=message):
        resumed.train(resume_from_checkpoint=str(run), verify=verify)
    assert resumed.state.global_step == 0


def test_of_another_trainers_checkpoint_the_weights_alone_are_used(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=1).train()
    theirs = of_another_trainer(tmp_path / "checkpoint-1")
    resumed = trained(tmp_path, max_steps=2)
    with pytest.raises(
        CheckpointError, match=r"written by another trainer .*: start from its weights, with this path as"
    ):
        resumed.train(resume_from_checkpoint=str(theirs))
    with pytest.raises(CheckpointError, match=r"no whole .*of another trainer.*: checkpoint-1\); to start anew"):
        resumed.train(resume_from_checkpoint=True)
    rows = Dataset.from_list(zoo.problems(8, seed=0))
    args = config(tmp_path / "next", max_steps=1, max_completion_length=4)
    trainer = TRBTrainer(str(theirs), "zoo:teacher", args, train_dataset=rows)
    assert all(torch.equal(trainer.model.state_dict()[name], found) for name, found in weights_of(theirs).items())
    trainer.train()


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_the_configuration_may_name_the_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=1).train()
    named = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
    resumed = trained(tmp_path / "next", max_steps=2, **named)
    assert resumed.train().global_step == 2
    assert [row["step"] for row in resumed.state.log_history if "loss" in row] == [1, 2]
    assert len((tmp_path / "next" / "metrics.jsonl").read_text().splitlines()) == 1
    anew = trained(tmp_path / "anew", max_steps=2, **named)
    anew.train(resume_from_checkpoint=False)
    assert len((tmp_path / "anew" / "metrics.jsonl").read_text().splitlines()) == 2


def earlier(directory: Path) -> list[str]:
    """The checkpoints that were set aside, as far as they are whole."""
    found = sorted(directory.glob("_earlier/*/checkpoint-*"))
    for path in found:
        checkpoints.verify(path)
    return [str(path.relative_to(directory / "_earlier")) for path in found]


def test_a_resume_goes_on_from_no_checkpoint_of_an_earlier_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose steps are higher; and none of them is lost."""
    trainer = trained(tmp_path, max_steps=4, save_steps=2, learning_rate=1e-2)
    trainer.train()
    first = weights_of(tmp_path / "checkpoint-4")
    kill = Kill(3)
    trainer.add_callback(kill)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(kill)
    assert checkpoints.numbered(tmp_path).keys() == {2}
    assert earlier(tmp_path) == ["1/checkpoint-2", "1/checkpoint-4"]
    assert f"checkpoint-2, checkpoint-4 moved to {tmp_path}/_earlier/1" in caplog.text
    trainer.train(resume_from_checkpoint=True)
    second = weights_of(tmp_path / "checkpoint-4")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    trainer.add_callback(Kill(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert earlier(tmp_path)[2:] == ["2/checkpoint-2", "2/checkpoint-4"]
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        trained(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_a_resume_from_an_earlier_step_leaves_no_later_checkpoint_of_its_name(tmp_path: Path, elsewhere: bool) -> None:
    """Of a run that goes on from `checkpoint-1`, here, those before are its own; of one that comes from elsewhere,
    none; what is damaged no resume takes, and another trainer's neither."""
    trained(tmp_path / "run", max_steps=4).train()
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    of_another_trainer(tmp_path / "run" / "checkpoint-3")
    named = tmp_path / "run" / "checkpoint-1"
    if elsewhere:
        named = shutil.copytree(named, tmp_path / "copy" / "checkpoint-1")
    cut = trained(tmp_path / "run", max_steps=4, save_steps=3, callbacks=[Kill(2)])
    with pytest.raises(KeyboardInterrupt):
        cut.train(resume_from_checkpoint=str(named))
    assert earlier(tmp_path / "run") == ["1/checkpoint-1"] * elsewhere + ["1/checkpoint-2"]
    assert checkpoints.numbered(tmp_path / "run").keys() == {3, 4} | ({1} if not elsewhere else set())


def test_the_best_checkpoint_is_verified_before_it_is_loaded(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=1)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    planted(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors differ"):
        trainer._load_best_model()


def test_the_best_checkpoint_keeps_its_name_and_is_kept(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path,
        eval_dataset=Dataset.from_list(zoo.problems(4, seed=1, split="test")),
        max_steps=3,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the untrained student's loss is the greatest
        learning_rate=1e-3,
        max_completion_length=8,
    )
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(tmp_path / best)
    assert {best, "checkpoint-3"} == {path.name for path in checkpoints.numbered(tmp_path).values()}
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / best)


@pytest.mark.parametrize("take_away", [shutil.move, shutil.copytree])
def test_the_best_checkpoint_moves_with_its_run(tmp_path: Path, take_away: Any) -> None:
    def part(directory: Path, steps: int) -> TRBTrainer:
        return trained(
            directory,
            eval_dataset=Dataset.from_list(zoo.problems(4, seed=1, split="test")),
            max_steps=steps,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # the untrained student's loss is the greatest
            learning_rate=1e-3,
            max_completion_length=8,
        )

    before, after = tmp_path / "before", tmp_path / "after"
    part(before, 2).train()
    take_away(before, after)
    there = {path: path.stat().st_mtime_ns for path in before.rglob("*")}
    resumed = part(after, 4)
    resumed.train(resume_from_checkpoint=True)
    best = after / f"checkpoint-{resumed.state.best_global_step}"
    assert resumed.state.best_model_checkpoint == str(best)
    assert {best, after / "checkpoint-4"} == set(checkpoints.numbered(after).values())
    state = json.loads((after / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert there == {path: path.stat().st_mtime_ns for path in before.rglob("*")}


def test_what_is_pushed_is_the_checkpoint_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[str, bool]] = []

    def push(self: Any, folder: str) -> None:
        pushed.append((folder, os.path.exists(folder)))

    monkeypatch.setattr(DistillationTrainer, "_push_from_checkpoint", push)
    trainer = trained(tmp_path, max_steps=1)
    trainer.args.push_to_hub = True
    trainer._tr_loss, trainer._globalstep_last_logged = torch.zeros(()), 0
    trainer.create_optimizer_and_scheduler(1)
    trainer._total_loss_scalar = 0.0
    monkeypatch.setattr(DistillationTrainer, "create_model_card", lambda *args, **kwargs: None)
    trainer._save_checkpoint(trainer.model, None)
    assert pushed == [(str(tmp_path / "checkpoint-0"), True)]
