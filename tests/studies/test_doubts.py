"""What is probably not meant is warned about once, where a run starts, and by the doctor."""

import json
from pathlib import Path

import pytest
import torch
from small_recipes import SMALL_FILE

from trb import zoo
from trb.cli import main


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doubts")
    (root / "small.yaml").write_text(SMALL_FILE)
    rows = ["1+1+1+1", "1+1+1+é", "2+2+2+2"]
    (root / "strange.jsonl").write_text("".join(json.dumps({"prompt": row, "answer": "4"}) + "\n" for row in rows))
    model, tokenizer = zoo.load("student")
    for name in ("a", "b", "c"):
        if name == "c":  # another model of the same shapes
            with torch.no_grad():
                model.lm_head.weight[3, 3] += 1.0
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    model, tokenizer = zoo.load("teacher")
    tokenizer.chat_template = "{{ messages[-1]['content'] }}="
    model.save_pretrained(root / "chatty")
    tokenizer.save_pretrained(root / "chatty")
    chat = "<|im_start|>user\n1+1+1+1<|im_end|>\n<|im_start|>assistant\n"
    (root / "chats.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in (rows[0], rows[2], chat)))
    return root


# Options, what is said of them, and options that nothing is said of.
DOUBTS: dict[str, tuple[str, str, str]] = {
    "K beyond the end": (
        "--blend-warmup-steps 3",
        "blend_warmup_steps: 3 steps, and the run has 2",
        "--blend-warmup-steps 2",
    ),
    "another warm-up": (
        "--method horizon --horizon-steps 3",
        "horizon_steps: 3 steps, and the run has 2",
        "--method horizon --horizon-steps 2",
    ),
    "swapped": ("--student zoo:teacher --teacher zoo:student", "the student has 0.6", "--blend-warmup-steps 2"),
    "lengths": (
        "--max-prompt-length 510 --blend-warmup-steps 1",
        "do not fit the 512 positions",
        "--max-prompt-length 504 --blend-warmup-steps 1",
    ),
    "unknown characters": (
        "--train-data {root}/strange.jsonl",
        "1 of 3 have characters that the tokenizer does not know, the first in row 2",
        "--blend-warmup-steps 2",
    ),
    "chats rendered already": (
        "--train-data {root}/chats.jsonl",
        "1 of 3 are whole chats, rendered already, the first in row 3",
        "--blend-warmup-steps 2",
    ),
    "two templates": (
        "--teacher {root}/chatty",
        "student and teacher write one conversation differently: '<|im_start|>",
        "--teacher {root}/chatty --chat-template student",
    ),
    "two templates, one of them chosen": (
        "--teacher {root}/chatty",
        "chat_template: teacher writes the teacher's way, which the student then has to learn; chat_template: student",
        "--teacher {root}/chatty --chat-template teacher",
    ),
    "infinite budget": ("--initial-kl-budget .inf", "initial_kl_budget: infinite", "--initial-kl-budget 5"),
    "a budget that nothing spends": (
        "--initial-kl-budget 1e6",
        "initial_kl_budget: 1e+06, as good as infinite",
        "--initial-kl-budget 50",
    ),
    "same weights": (
        "--student {root}/a --teacher {root}/b",
        "student and teacher are the same model",
        "--student {root}/a --teacher {root}/c",
    ),
    "learning rate": ("--learning-rate 4e-3", "0.004, more than 10 times the 0.0003", "--learning-rate 2e-3"),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubt_is_said_once_and_by_the_doctor(
    name: str, material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, text, right = (words.format(root=material) for words in DOUBTS[name])
    base = ["--config", str(material / "small.yaml")]
    if "--method" not in wrong:
        base.append("--blend-warmup-steps=2")
    run = ["--output-dir", str(tmp_path / "run"), "--eval-data=[]", "--save-final-model=false", "--quiet"]
    if name != "lengths":
        assert main(["train", *base, *wrong.split(), *run]) == 0
        assert [record.message for record in caplog.records if text in record.message] != []
        assert sum(text in record.message for record in caplog.records) == 1
        caplog.clear()
        assert main(["train", *base, *right.split(), *run, "--overwrite"]) == 0
        assert not [record.message for record in caplog.records if record.name == "trb.training.doubts"]
        said = "warn"
    else:
        said, text = "fail", "and the student has 512 positions"
    capsys.readouterr()
    for words, there in ((wrong, True), (right, False)):
        main(["doctor", *base, *words.split(), "--eval-data=[]"])
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith(said) and text in line for line in lines) == there, lines


def test_prompts_that_fit_though_longer_ones_would_not(
    material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["train", "--config", str(material / "small.yaml"), "--max-prompt-length=510", "--blend-warmup-steps=2"]
    assert main([*words, "--eval-data=[]", "--output-dir", str(tmp_path / "run"), "--quiet"]) == 0
    [said] = [record.message for record in caplog.records if record.name == "trb.training.doubts"]
    assert said == (
        "lengths: prompts of up to 510 tokens and completions of up to 8 do not fit the 512 positions of the student. "
        "Lower max_prompt_length or max_completion_length"
    )


def test_too_few_prompts(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run is refused, so the doctor fails it."""
    words = ["--config", str(material / "small.yaml"), "--train-limit=1"]
    assert main(["train", *words, "--output-dir", str(tmp_path / "run")]) == 2
    assert "fewer than the 2 of one optimizer step" in capsys.readouterr().err
    assert main(["doctor", *words]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert "fewer than the 2 of one optimizer step" in line


def test_a_comparison_doubts_its_pair_once(material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "several.yaml").write_text(SMALL_FILE + "methods: {opd: {}, trb: {blend_warmup_steps: 3}}\n")
    words = ["compare", "--config", str(tmp_path / "several.yaml"), "--max-steps=1", "--learning-rate=4e-3", "--quiet"]
    assert main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    said = [record.message.split(":")[0] for record in caplog.records if record.name == "trb.training.doubts"]
    assert said == ["learning_rate", "blend_warmup_steps"]
