"""What is refused leaves its directory as it was, and the corrected command runs there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_recipes import SMALL_FILE, pool_of_this_process

from trb import zoo
from trb.cli import main
from trb.studies import probe, run, scores, sweep

METHODS = "methods: {opd: {}, trb: {initial_kl_budget: 0.3}}\n"
STUDY = """\
name: small
seeds: {select: [9], test: 1}
configurations: 1
resamples: 100
recipe: {max_steps: 1, prompts_per_step: 2, num_generations: 2, per_device_train_batch_size: 4, train_limit: 8,
  max_prompt_length: 32, max_completion_length: 16, gradient_checkpointing: false, save_strategy: no}
settings:
  chains:
    recipe: {student: zoo:student, teacher: zoo:teacher, train_data: zoo:chains}
    dev: {data: zoo:chains, limit: 4, seed: 1}
    test: {data: zoo:chains, limit: 5, seed: 2}
methods:
  opd: [{}]
"""
PROBE = ["--problems=2", "--samples=1", "--excerpts=1", "--budgets", "0.1", "--truncations", "4", "--skd-top-k", "3"]
PROBE += ["--max-new-tokens=8"]


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "open_pool", pool_of_this_process)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, a study and data; and models that are only found out when they are sampled from."""
    root = tmp_path_factory.mktemp("material")
    (root / "small.yaml").write_text(SMALL_FILE)
    (root / "several.yaml").write_text(SMALL_FILE + METHODS)
    (root / "study.yaml").write_text(STUDY)
    (root / "overlap.yaml").write_text(STUDY.replace("limit: 5, seed: 2", "limit: 5, seed: 1"))
    (root / "nowhere.yaml").write_text(STUDY.replace("teacher: zoo:teacher", f"teacher: {root}/nowhere"))
    (root / "nan.yaml").write_text(STUDY.replace("student: zoo:student", f"student: {root}/student"))
    (root / "good.jsonl").write_text(json.dumps({"prompt": "1+1+1+1", "answer": "4"}) + "\n")
    (root / "unanswered.jsonl").write_text(json.dumps({"prompt": "1+1+1+1", "answer": ""}) + "\n")
    (root / "long.jsonl").write_text(json.dumps({"prompt": "+".join(["1"] * 300), "answer": "300"}) + "\n")
    for role in zoo.NAMES:
        model, tokenizer = zoo.load(role)
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(torch.nan)
        model.save_pretrained(root / role)
        tokenizer.save_pretrained(root / role)
    return root


def contents(directory: Path) -> dict[str, bytes | None] | None:
    """Everything in a directory, or None if there is none."""
    if not directory.exists():
        return None
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def of(command: str, config: str, **options: Any) -> list[str]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [command, "--config", f"{{material}}/{config}.yaml", *given]


EVAL = ["eval", "--model", "zoo:student", "--limit=2", "--max-new-tokens=8", "--data"]
NAN = "not finite|NaN|nan"

# The command that is refused, a word of what it says, and the command that is right.
REFUSED: dict[str, tuple[list[str], str, list[str]]] = {
    "train, unknown key": (of("train", "small", learing_rate=1), "learning_rate", of("train", "small")),
    "train, value": (of("train", "small", max_steps=2.5), "whole number", of("train", "small")),
    "train, no such reporter": (
        *(of("train", "small", report_to="tensorbord"), "report_to='tensorbord' is unknown; choose one of azure_ml"),
        of("train", "small", report_to="none"),
    ),
    "train, a schedule without its options": (
        *(of("train", "small", lr_scheduler_type="cosine_with_min_lr"), "min_lr_rate"),
        of("train", "small", lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs="{{min_lr_rate: 0.1}}"),
    ),
    "train, a hub that cannot be reached": (
        *(of("train", "small", push_to_hub="true"), "Cannot reach", of("train", "small")),
    ),
    "train, no such model": (of("train", "small", teacher="{material}/nowhere"), "no model", of("train", "small")),
    "train, no such data": (of("train", "small", train_data="x.jsonl"), "no file", of("train", "small")),
    "train, prompts too long": (of("train", "small", max_prompt_length=5), "limit of 5", of("train", "small")),
    "train, too few prompts": (of("train", "small", train_limit=1), "fewer", of("train", "small")),
    "train, no room": (of("train", "small", max_completion_length=510), "512 positions", of("train", "small")),
    "train, no room in evaluation": (
        *(of("train", "small", eval_max_new_tokens=510), "512 positions", of("train", "small")),
    ),
    "train, no room for one of two sets": (
        of("train", "small", eval_data="[zoo:chains, '{material}/long.jsonl']", eval_max_new_tokens=200),
        "512 positions",
        of("train", "small"),
    ),
    "train, problem without an answer": (
        of("train", "small", eval_data="{material}/unanswered.jsonl"),
        "without answers a report needs two",
        of("train", "small"),
    ),
    "train, student of NaN": (of("train", "small", student="{material}/student"), NAN, of("train", "small")),
    "train, no such checkpoint": (
        of("train", "small", resume_from_checkpoint="nowhere"),
        "no such directory",
        of("train", "small"),
    ),
    "compare, no room in evaluation": (
        *(of("compare", "several", eval_max_new_tokens=510), "512 positions", of("compare", "several")),
    ),
    "compare, teacher of NaN": (of("compare", "several", teacher="{material}/teacher"), NAN, of("compare", "several")),
    "compare, no such checkpoint": (
        [*of("compare", "several"), "--methods.trb.resume_from_checkpoint=nowhere"],
        "no such directory",
        of("compare", "several"),
    ),
    "sweep, same problems": (of("sweep", "overlap", workers=1), "problems are test problems", of("sweep", "study")),
    "sweep, no such model": (of("sweep", "nowhere", workers=1), "no model", of("sweep", "study")),
    "sweep, student of NaN": (of("sweep", "nan", workers=1), NAN, of("sweep", "study")),
    "probe, no such model": (
        [*of("probe", "small", model="{material}/nowhere"), *PROBE],
        "no model",
        [*of("probe", "small"), *PROBE],
    ),
    "probe, student of NaN": (
        [*of("probe", "small", model="{material}/student"), *PROBE],
        NAN,
        [*of("probe", "small"), *PROBE],
    ),
    "probe, value": ([*of("probe", "small"), *PROBE, "--problems=0"], "at least", [*of("probe", "small"), *PROBE]),
    "eval, no such model": (
        ["eval", "--model={material}/nowhere", "--data", "zoo:chains"],
        "no model",
        [*EVAL, "zoo:chains"],
    ),
    "eval, problem without an answer": (
        [*EVAL, "zoo:chains", "{material}/unanswered.jsonl"],
        "can be scored",
        [*EVAL, "zoo:chains"],
    ),
    "eval, model of NaN": (
        [*EVAL, "zoo:chains", "--model={material}/student"],
        NAN,
        [*EVAL, "zoo:chains"],
    ),
}
# A directory left as it was is the same whatever was refused there: each right command is tried after one refusal.
TRIED_AFTER = {str(right): name for name, (_, _, right) in REFUSED.items()}

RIGHT = {
    "train": of("train", "small"),
    "compare": of("compare", "several"),
    "probe": [*of("probe", "small"), *PROBE],
    "eval": [*EVAL, "zoo:chains"],
}


def started(command: list[str], material: Path, directory: Path) -> list[str]:
    filled = [word.format(material=material) for word in command]
    return [*filled, f"--output-dir={directory}", "--quiet"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_command_leaves_its_directory_as_it_was(
    name: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, complaint, right = REFUSED[name]
    directory = tmp_path / "above" / "run"
    for _ in range(2):  # where there is none, and where somebody keeps notes
        before = contents(tmp_path)
        assert main(started(wrong, material, directory)) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert any(word in said for word in complaint.split("|")), said
        assert contents(tmp_path) == before
        if wrong[0] == "sweep":
            break  # which wants a directory of its own
        (directory / "notes").mkdir(parents=True, exist_ok=True)
        (directory / "notes" / "mine.txt").write_text("of the second attempt")
    if TRIED_AFTER[str(right)] == name:
        assert main(started(right, material, directory)) == 0
        if wrong[0] != "sweep":
            assert (directory / "notes" / "mine.txt").exists()


@pytest.mark.parametrize("command", ["train", "compare", "probe", "eval"])
def test_what_is_refused_removes_nothing_of_an_earlier_one(command: str, material: Path, tmp_path: Path) -> None:
    """Also where it asks to."""
    directory = tmp_path / "run"
    assert main(started(RIGHT[command], material, directory)) == 0
    before = contents(directory)
    tried = 0
    for wrong, _, _ in REFUSED.values():
        # Only its first completions show what is wrong with such a model, and by then there is room for them.
        late = command != "eval" and any(word.endswith(("/student", "/teacher")) for word in wrong)
        if wrong[0] == command and not late:
            overwrite = [] if command == "eval" else ["--overwrite"]
            assert main([*started(wrong, material, directory), *overwrite]) == 2
            assert contents(directory) == before, wrong
            tried += 1
    assert tried >= 2


class Killed(BaseException):
    """What nothing catches."""


PLACES: dict[str, tuple[Any, str]] = {
    "train": (run, "_take_steps"),
    "compare": (scores, "evaluate_suites"),
    "probe": (probe, "continuation_probe"),
}


@pytest.mark.parametrize("command", PLACES)
def test_a_directory_without_a_step_is_nobodys(
    command: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was killed before it had done anything leaves its files, and another configuration takes their place."""
    right = RIGHT[command]

    def killed(*args: Any, **kwargs: Any) -> None:
        raise Killed

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[command], killed)
        with pytest.raises(Killed):
            main([*started(right, material, directory), "--seed=7"])
    assert contents(directory)
    assert main(started(right, material, directory)) == 0
    settings = {"train": "config.yaml", "compare": "recipe.yaml", "probe": "parts/settings.json"}[command]
    found = re.search(r"^\W*seed\W+(\d+)", (directory / settings).read_text(), re.M)
    assert found and found[1] == "42"


def test_files_of_others_are_not_taken_for_a_start(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe of one's own may lie in the directory that the results are to go to."""
    for command, config, name in (("train", "small", "config.yaml"), ("compare", "several", "recipe.yaml")):
        directory = tmp_path / command
        directory.mkdir()
        (directory / name).write_text((material / f"{config}.yaml").read_text())
        before = contents(directory)
        assert main(started(of(command, config), material, directory)) == 2
        assert "another output directory" in capsys.readouterr().err
        assert contents(directory) == before
