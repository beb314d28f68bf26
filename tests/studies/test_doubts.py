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


# Options, and what is said of each of them; only by the doctor where the run is refused.
DOUBTS: dict[str, list[str]] = {
    "--blend-warmup-steps 3 --train-data {root}/strange.jsonl --learning-rate 4e-3 --initial-kl-budget 1e6": [
        "blend_warmup_steps: 3 steps, and the run has 2",
        "1 of 3 have characters that the tokenizer does not know, the first in row 2",
        "0.004, more than 10 times the 0.0003",
        "initial_kl_budget: 1e+06, as good as infinite",
    ],
    "--method horizon --horizon-steps 3 --train-data {root}/chats.jsonl --student {root}/a --teacher {root}/b": [
        "horizon_steps: 3 steps, and the run has 2",
        "1 of 3 are whole chats, rendered already, the first in row 3",
        "student and teacher are the same model",
    ],
    "--student zoo:teacher --teacher zoo:student --initial-kl-budget .inf --blend-warmup-steps 2": [
        "the student has 0.6",
        "initial_kl_budget: infinite",
    ],
    "--teacher {root}/chatty --blend-warmup-steps 2": [
        "student and teacher write one conversation differently: '<|im_start|>",
        "chat_template: teacher writes the teacher's way, which the student then has to learn; chat_template: student",
    ],
    "--max-prompt-length 510 --blend-warmup-steps 1": [
        "completions of up to 8 do not fit the 512 positions of the student"
    ],
}
# Options that nothing is said of, each as far as it may go.
NO_DOUBTS = [
    "--blend-warmup-steps 2 --initial-kl-budget 50 --learning-rate 2e-3 --student {root}/a --teacher {root}/c",
    "--method horizon --horizon-steps 2 --max-prompt-length 504",
    "--teacher {root}/chatty --chat-template student --blend-warmup-steps 2",
    "--teacher {root}/chatty --chat-template teacher --blend-warmup-steps 2",
]
BASE = ["--config={root}/small.yaml", "--eval-data=[]"]


def doctor_says(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    main(["doctor", *words])
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("warn", "fail"))]


@pytest.mark.parametrize("options", DOUBTS)
def test_a_doubt_is_said_once_and_by_the_doctor(
    options: str, material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(root=material) for word in (*BASE, *options.split())]
    if "510" not in options:
        assert main(["train", *words, f"--output-dir={tmp_path}", "--save-final-model=false", "--quiet"]) == 0
        said = [record.message for record in caplog.records if record.name == "trb.training.doubts"]
        assert [sum(text in message for message in said) for text in DOUBTS[options]] == [1] * len(DOUBTS[options])
    lines = doctor_says(words, capsys)
    start = "fail" if "510" in options else "warn"
    for text in DOUBTS[options]:
        assert any(line.startswith(start) and text in line for line in lines), lines


@pytest.mark.parametrize("options", NO_DOUBTS)
def test_nothing_is_said_of_what_is_right(
    options: str, material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(root=material) for word in (*BASE, *options.split())]
    assert main(["train", *words, f"--output-dir={tmp_path}", "--save-final-model=false", "--quiet"]) == 0
    assert not [record.message for record in caplog.records if record.name == "trb.training.doubts"]
    lines = doctor_says(words, capsys)  # of the machine it may say something
    assert not [line for line in lines if any(text in line for texts in DOUBTS.values() for text in texts)]


def test_prompts_that_fit_though_longer_ones_would_not(
    material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["train", "--config", str(material / "small.yaml"), "--max-prompt-length=510", "--blend-warmup-steps=2"]
    assert main([*words, "--eval-data=[]", "--output-dir", str(tmp_path / "run"), "--quiet"]) == 0
    [said] = [record.message for record in caplog.records if record.name == "trb.training.doubts"]
    assert said == (
        "lengths: prompts of up to 510 tokens and completions of up to 8 do not fit the 512 positions of the student. "
        "Lower max_prompt_length, max_completion_length or eval_max_new_tokens"
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


def test_a_file_that_is_trained_and_scored_on(material: Path) -> None:
    from trb.studies.material import data_doubts
    from trb.studies.recipe import make_recipe

    def doubted(data: str, *scored: str) -> list[str]:
        values = {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": data, "eval_data": [*scored]}
        return [doubt.text for doubt in data_doubts(make_recipe(values).run)]

    file, other = str(material / "strange.jsonl"), str(material / "chats.jsonl")
    (said,) = doubted(file, other, str(material / "a" / ".." / "strange.jsonl"))
    assert "strange.jsonl is also what is trained on" in said
    assert doubted(file, other) == doubted("zoo:chains", "zoo:chains") == []
