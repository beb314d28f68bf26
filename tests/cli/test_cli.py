"""The command line: exit codes, what errors say, and what is shown."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import student_stopping_as_the_teacher
from rich.console import Console
from small_recipes import SMALL_FILE, pool_of_this_process
from toy_method import ENTRIES
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trb import cli, zoo
from trb.cli import main
from trb.planning.shapes import SHAPES
from trb.studies import material, scores, sweep
from trb.studies.shipped import RECIPES
from trb.studies.yaml_files import ConfigError
from trb.tasks.evaluation import longest_prompt
from trb.training.trainer import TRBTrainer


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL_FILE)
    return path


@pytest.fixture
def comparison(recipe: Path) -> Path:
    recipe.write_text(SMALL_FILE + "methods: {opd: {}, trb: {initial_kl_budget: 0.3}}\n")
    return recipe


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What the command says when it exits with 2: one line, no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused_before_anything_is_loaded(
    seed: int, recipe: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", tmp_path / "out", "--quiet"]
    beyond = "it must lie in [0, 2**32)"
    for command in ("train", "probe"):
        text = SMALL_FILE.replace("student: zoo:student", f"seed: {seed}\nstudent: zoo:student")
        (tmp_path / "seeded.yaml").write_text(text)
        said = refused(capsys, command, "--config", tmp_path / "seeded.yaml", *out)
        assert f"seeded.yaml: seed must be in [0, 2**32), got {seed}" in said
    assert f"seed must be in [0, 2**32), got {seed}" in refused(
        capsys, "train", "--config", recipe, f"--seed={seed}", *out
    )
    for key in ("train-seed", "eval-seed"):
        said = refused(capsys, "train", "--config", recipe, f"--{key}={seed}", *out)
        assert f"{key.replace('-', '_')} is {seed}; {beyond}" in said
    said = refused(capsys, "probe", "--config", recipe, f"--seed={seed}", *out)
    assert f"--seed must lie in [0, 2**32), got {seed}" in said
    said = refused(capsys, "eval", "--model=zoo:student", "--data=zoo:chains", f"--seed={seed}", *out)
    assert f"--seed is {seed}; {beyond}" in said
    for old, new in (("select: [9]", f"select: [{seed}]"), ("limit: 5, seed: 2", f"limit: 5, seed: {seed}")):
        (tmp_path / "seeded.yaml").write_text(STUDY.replace(old, new))
        assert f"a seed is {seed}; {beyond}" in refused(capsys, "sweep", "--config", tmp_path / "seeded.yaml", "--plan")
    assert not (tmp_path / "out").exists()


def test_so_many_seeds_are_meant_as_one(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.write_text(STUDY.replace("test: 1", "test: 123456789012"))
    assert "a seed that is meant is a list, [123456789012]" in refused(capsys, "sweep", "--config", study, "--plan")
    study.write_text(STUDY)
    command = ["sweep", "--config", study, "--plan", "--seeds"]
    assert "100000000001 seeds are more than" in refused(capsys, *command, "0-100000000000")
    assert "seeds ends with 5000000000; a seed must lie in" in refused(capsys, *command, "4999999999-5000000000")


# ---- help ----


COMMANDS = ["", "init", "train", "compare", "eval", "sweep", "probe", "report", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*([command] if command else []), "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"trb {command}".strip() in text.partition("examples:")[2]
    assert "%%" not in text


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    """Every command's; and `trb` alone, which says what is missing."""
    commands = [[], ["--help"], *([name, "--help"] for name in COMMANDS[1:])]
    code = (
        "import sys\nfrom trb.cli import main\n"
        f"for arguments in {commands}:\n    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'rich', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 5  # a second, on a machine with nothing else to do


def test_python_m_trb_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "trb", "--version"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "trb 0.1.0\n")


def test_a_name_that_the_terminal_cannot_write_ends_no_command() -> None:
    code = (
        "import sys\nimport trb.report\nfrom trb import cli\n"
        "trb.report.write_report = lambda directory: directory\n"
        "sys.argv = ['trb', 'report', 'a b \\xe9']\nsys.exit(cli.main())"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "a b \\xe9\n", "")


@pytest.mark.parametrize(
    "command",
    [
        "report",
        "eval --data zoo:chains --model",
        "train --config baselines/trb --output-dir",
        "train --config baselines/trb --output-dir x --train-data",
    ],
)
def test_a_name_that_is_too_long_is_said_without_a_traceback(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "n" * 300 + ".jsonl"
    assert main([*command.split(), name]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "too long" in said and name in said and "Traceback" not in said


def test_help_keys_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-keys"]) == 0
    text = capsys.readouterr().out
    assert "  learning_rate  (a number; default 1e-05)" in text
    assert "  student  (text; required)" in text
    assert "  output_dir  (" not in text
    assert "%%" not in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["report"], ["report", "a", "b"], ["eval", "--model", "x"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: trb" in capsys.readouterr().err


# ---- errors that users can cause ----


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--learing-rate", "1"], "unknown key 'learing_rate'; did you mean 'learning_rate'?"),
        (["--max-steps", "2.5"], "max_steps is 2.5; expected a whole number"),
        (["--initial-kl-budget", "-1"], "initial_kl_budget must be a non-negative number of nats, got -1.0"),
        (["--initial-kl-budget", "nan"], "initial_kl_budget is not a number (nan)"),
        (["--blend-warmup-steps", "-5"], "-5"),
        (["--teacher", "{tmp}/nowhere"], "no model at '{tmp}/nowhere'"),
        (["--teacher", "zoo:techer"], "did you mean 'zoo:teacher'?"),
        (["--resume-from-checkpoint", "{tmp}/checkpoint-7"], "'{tmp}/checkpoint-7', and there is no such directory"),
        (["--train-data", "{tmp}/none.jsonl"], "there is no file {tmp}/none.jsonl"),
        (["--train-data", "{tmp}/empty.jsonl"], "empty.jsonl is empty"),
        (["--train-data", "{tmp}/malformed.jsonl"], "line 2 of {tmp}/malformed.jsonl is not valid JSON"),
        (["--max-prompt-length", "5"], "more than the limit of 5"),
        (["--per-device-train-batch-size", "3"], "4 completions, which 3 at once"),
        (["--num-generations", "0"], "num_generations must be at least 1"),
        (["stray"], "unexpected argument 'stray'"),
        (["--output-dir", "{tmp}/small.yaml/x"], "cannot write to"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    recipe: Path, tmp_path: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "malformed.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+\n')
    options = [option.format(tmp=tmp_path) for option in options]
    message = refused(capsys, "train", "--config", recipe, "--output-dir", tmp_path / "run", *options)
    assert complaint.format(tmp=tmp_path) in message
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_missing_recipes(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config is missing" in refused(capsys, "train")
    assert "did you mean 'small.yaml'" in refused(capsys, "train", "--config", tmp_path / "smal.yaml")


@pytest.fixture(scope="module")
def misfits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers that do not fit the zoo's student: another tokenizer, and too few head rows."""
    root = tmp_path_factory.mktemp("misfits")
    other = root / "other"
    shutil.copytree(zoo.path("teacher"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))

    narrow = root / "narrow"
    config = Qwen3Config(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
        num_key_value_heads=1, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        Qwen3ForCausalLM(config).save_pretrained(narrow)
    for path in zoo.path("teacher").iterdir():
        if "token" in path.name or "template" in path.name:
            shutil.copy(path, narrow)
    return root


@pytest.mark.parametrize(
    ("teacher", "complaint"),
    [
        ("other", "different tokenizers: token '"),
        ("narrow", "the teacher's head has 40 rows but the tokenizer uses ids up to 56"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_pairs_that_do_not_fit(
    comparison: Path, misfits: Path, tmp_path: Path, command: str, teacher: str, complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--teacher", misfits / teacher, "--output-dir", tmp_path / "run"]
    method = ["--method", "trb"] if command == "train" else []
    assert complaint in refused(capsys, command, "--config", comparison, *options, *method)


def test_errors_show_no_control_characters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, "train", "--config", tmp_path / "\x1b[31mred.yaml")
    assert "\x1b" not in message
    assert "?[31mred.yaml" in message


def test_the_traceback_is_shown_on_request(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRB_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown key"):
        main(["train", "--config", str(recipe), "--learing-rate", "1"])


@pytest.mark.parametrize("error", [RuntimeError("shape"), ValueError("from below"), KeyError("x")])
def test_bugs_are_not_dressed_up_as_user_errors(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def breaks(*args: Any, **kwargs: Any) -> None:
        raise error  # in this module, which is not part of the package

    monkeypatch.setattr(material, "load_pair", breaks)
    with pytest.raises(type(error)):
        main(["train", "--config", str(recipe), "--output-dir", str(tmp_path / "run")])


def test_a_bug_of_the_package_itself_shows_its_traceback() -> None:
    """Also where Python or a library raises it in one of the package's own lines."""
    code = (
        "import sys\nimport trb.report\nfrom trb import cli\n"
        "trb.report.write_report = eval(\"lambda *a, **k: int('a bug')\", vars(trb.report))\n"
        "sys.argv = ['trb', 'report', '.']\n"
        "sys.exit(cli.main())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert result.stderr.splitlines()[-1].startswith("ValueError: invalid literal for int()")


@pytest.mark.parametrize(
    ("command", "hint"),
    [("train", "continue from the last complete checkpoint"), ("compare", "finished methods are kept")],
)
def test_ctrl_c_says_how_to_go_on(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str,
    hint: str,
) -> None:  # fmt: skip
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(material, "load_pair", interrupted)
    method = ["--method", "trb"] if command == "train" else []
    assert main([command, "--config", str(comparison), "--output-dir", str(tmp_path / "run"), *method]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("interrupted. Run the same command again")
    assert hint in last


def test_a_full_disk_exits_with_2(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fills_up(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(TRBTrainer, "save_model", fills_up)
    message = refused(capsys, "train", "--config", recipe, "--output-dir", tmp_path / "run", "--eval-data", "[]")
    assert f"error: the disk of {tmp_path / 'run'} is full" in message


# ---- commands ----


def test_train(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--config", str(recipe), "--output-dir", str(out), "--seed=3", "--method", "opd"]) == 0
    shown = capsys.readouterr()
    assert "student before" in shown.out
    assert "│ opd " in shown.out
    assert f"report: {out}/report.html" in shown.out
    assert "opd: step 2 of 2  loss " in shown.err
    assert "{" not in shown.out + shown.err, "no raw dictionaries"
    assert "Loading weights" not in shown.err
    assert (out / "report.html").exists()
    assert "seed: 3\n" in (out / "config.yaml").read_text()
    assert "holds another configuration: seed is 3 there and 4 here" in refused(
        capsys, "train", "--config", recipe, "--output-dir", out, "--seed", "4", "--method", "opd"
    )
    place = ["--config", str(recipe), "--output-dir", str(tmp_path / "saved"), "--quiet"]
    saved = ["train", *place, "--save-strategy=steps", "--save-steps=1", "--eval-data=[]"]
    assert main(saved) == 0
    changed = [*saved, "--max-steps=3", "--seed=5"]
    assert "or --accept-changes to go on from its last checkpoint all the same" in refused(capsys, *changed)
    assert main([*changed, "--accept-changes"]) == 0
    assert (
        main(["train", "--config", str(recipe), "--output-dir", str(out), "--max-steps=1", "--overwrite", "--quiet"])
        == 0
    )
    assert capsys.readouterr().err == ""


def test_without_evaluation_the_loss_is_shown(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", "--config", str(recipe), "--output-dir", str(out), "--eval-data=[]", "--held-out-prompts=4"]
    assert main([*command, "--max-steps=5", "--logging-steps=3", "--held-out-every=2", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "pass@1" not in shown and "student before" not in shown
    rows = {cells[2].strip(): cells[3:6] for line in shown.splitlines() if len(cells := line.split("│")) > 5}
    for name, file in (("rollouts", "metrics.jsonl"), ("held-out prompts", "held_out.jsonl")):
        records = [json.loads(line) for line in (out / file).read_text().splitlines()]
        assert [float(cell) for cell in rows[name][:2]] == pytest.approx(
            [records[0]["loss"], records[-1]["loss"]], abs=6e-5
        )
        assert rows[name][2].strip() == "5"
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 3, 5]


@pytest.mark.parametrize("command", ["train", "compare"])
def test_what_is_finished_says_so_and_loads_no_model(
    command: str, comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ["--method=opd"] if command == "train" else []
    words = [command, "--config", str(comparison), "--output-dir", str(tmp_path / "run"), "--max-steps=1", *method]
    assert main(words) == 0
    table = capsys.readouterr().out

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    for owner, name in ((material, "load_model"), (material, "load_tokenizer"), (PreTrainedModel, "from_pretrained")):
        monkeypatch.setattr(owner, name, loaded)
    assert main(words) == 0
    again = capsys.readouterr()
    assert again.out == table
    kept = ["opd"] if command == "train" else ["opd", "trb"]
    assert again.err.splitlines() == [f"{name}: already finished, nothing done" for name in kept]


def test_compare_shows_every_score_and_writes_the_report(
    comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--config", str(comparison), "--max-steps", "1"]) == 0
    out = Path("runs/small")  # after the recipe
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["student before", "opd", "trb", "teacher"]
    results = json.loads((out / "results.json").read_text())
    for row, name in zip(rows, ("student", "opd", "trb", "teacher"), strict=True):
        score = results[name]
        assert float(row[1]) == pytest.approx(100 * score["pass_at_1"], abs=0.051)
        low, high = (float(end) for end in row[2].split(" to "))
        assert (low, high) == pytest.approx([100 * end for end in score["interval"]], abs=0.051)
    gain = 100 * (results["trb"]["pass_at_1"] - results["student"]["pass_at_1"])
    assert float(rows[2][3]) == pytest.approx(gain, abs=0.051)
    assert rows[0][3].strip() == rows[3][3].strip() == ""
    assert (out / "report.html").stat().st_size > 10_000
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"opd", "trb", "evaluations"}


def test_a_method_from_outside_is_trained_by_its_name(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/extending.md says: a script that makes the entries, and calls `main`."""
    for table, name, entry in ENTRIES:
        monkeypatch.setitem(table, name, entry)
    options = ["--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    assert main(["train", "--config", str(recipe), "--method", "imitation", *options]) == 0
    assert "│ imitation " in capsys.readouterr().out
    assert "method: imitation\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_recipe_of_methods_trains_the_one_that_is_chosen(
    comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "compares opd, trb: use `trb compare`, or choose one" in refused(capsys, "train", "--config", comparison)
    assert "compares opd, trb, and veto is none of them: use" in refused(
        capsys, "train", "--config", comparison, "--method", "veto"
    )
    assert "method means nothing" in refused(capsys, "compare", "--config", comparison, "--method", "opd")
    options = ["--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--quiet"]
    assert main(["train", "--config", str(comparison), "--method", "trb", *options]) == 0
    assert "initial_kl_budget: 0.3\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_eval(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores"
    command = ["eval", "--model", "zoo:teacher", "--data", "zoo:chains", "--limit", "8", "--samples", "2"]
    command += ["--max-new-tokens", "40", "--output-dir", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    score = results["zoo:chains"]
    assert (score["n_problems"], score["n_samples"]) == (8, 16)
    assert score["pass_at_1"] > 0.9
    assert f"{100 * score['pass_at_1']:.1f}" in shown.out
    assert results["provenance"]["versions"]
    assert len((out / "evaluations" / "zoo-chains.jsonl").read_text().splitlines()) == 9

    sampled = []
    evaluate = scores.evaluate
    monkeypatch.setattr(
        scores, "evaluate", lambda *a, **k: sampled.append(k["results_path"].exists()) or evaluate(*a, **k)
    )
    assert main([*command, "--resume", "--quiet"]) == 0
    assert main([*command, "--quiet"]) == 0
    assert sampled == [True, False], "results of another model would be taken for this one's without --resume"


def test_eval_goes_on_with_the_same_model_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not with another one, nor with another at the same path, in another precision, or read by another teacher."""
    student, tokenizer = zoo.load("student")
    student.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = ["--data", "zoo:dialogue", "--assistant-turns=last", "--limit=2", "--max-new-tokens=8", "--quiet"]
    command = ["eval", *data, "--output-dir", str(tmp_path / "out"), "--resume"]
    mine = ["--model", str(tmp_path / "model"), "--teacher", "zoo:teacher"]
    assert main([*command, *mine]) == 0
    assert main([*command, *mine]) == 0
    other = refused(capsys, *command, "--model", "zoo:student", "--teacher", "zoo:teacher")
    assert f"--model is '{tmp_path}/model' there and 'zoo:student' here" in other and "another --output-dir" in other
    assert "--dtype is 'float32' there and 'bfloat16' here" in refused(capsys, *command, *mine, "--dtype", "bfloat16")
    assert "--keep-layers is None there and 2 here" in refused(capsys, *command, *mine, "--keep-layers", 2)
    assert "--samples is 1 there and 2 here" in refused(capsys, *command, *mine, "--samples", 2)
    assert "--teacher (files) is" in refused(capsys, *command, *mine[:2], "--teacher", tmp_path / "model")
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1.3)
    student.save_pretrained(tmp_path / "model")
    changed = refused(capsys, *command, *mine)
    assert "--model (files) is" in changed and "--model is" not in changed


def test_eval_goes_on_from_any_folder_with_the_same_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However their paths are written; and where all has been moved."""
    for name in ("student", "teacher"):
        for part in zoo.load(name):
            part.save_pretrained(tmp_path / "here" / name)
    (tmp_path / "here" / "inside").mkdir()
    command = ["eval", "--data", "zoo:dialogue", "--assistant-turns=last", "--limit=2", "--max-new-tokens=8", "--quiet"]
    places = [(tmp_path / "here", ""), (tmp_path / "here" / "inside", "../"), (tmp_path, f"{tmp_path}/here/")]
    for folder, begin in [*places, (tmp_path / "moved", "")]:
        if folder.name == "moved":
            (tmp_path / "here").rename(folder)
        monkeypatch.chdir(folder)
        models = ["--model", f"{begin}student", "--teacher", f"{begin}teacher"]
        assert main([*command, *models, "--output-dir", f"{begin}out", "--resume"]) == 0
    said = refused(capsys, *command, "--model=teacher", "--teacher=teacher", "--output-dir=out", "--resume")
    assert "--model is 'student' there and 'teacher' here; --model (files) is" in said


def test_eval_refuses_options_that_would_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--model", "zoo:student", "--data", "zoo:chains", "--limit=2", "--max-new-tokens=8", "--quiet"]
    assert "--resume goes on with what lies in --output-dir" in refused(capsys, *command, "--resume")
    said = refused(capsys, *command, "--teacher", "zoo:teacher", "--output-dir", tmp_path / "out")
    assert "--teacher zoo:teacher would do nothing" in said and "zoo:chains can be scored" in said
    assert not (tmp_path / "out").exists()


def test_eval_reads_runs_and_averages_suites(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.jsonl").write_text('{"prompt": "1+1+1+1", "answer": "4"}\n{"prompt": "2+2+2+2", "answer": "8"}\n')
    run = tmp_path / "run"
    assert main(["train", "--config", str(recipe), "--output-dir", str(run), "--max-steps=1", "--quiet"]) == 0
    data = ["--data", "zoo:chains", str(tmp_path / "two.jsonl"), "--limit", "2", "--max-new-tokens", "40"]
    capsys.readouterr()
    assert main(["eval", "--model", str(run), *data, "--output-dir", str(tmp_path / "out")]) == 0
    assert "mean" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"] == str(run / "model")
    assert results["mean"]["n_problems"] == 4


def test_eval_keeps_apart_what_differs_in_few_letters_only(tmp_path: Path) -> None:
    """Of names that are not ASCII, or that are long, a file name has only a part; other files keep theirs."""
    (tmp_path / "a").mkdir()
    names = ["a/数.jsonl", "a/字.jsonl", "a-.jsonl", f"{'long' * 40}1.jsonl", f"{'long' * 40}2.jsonl", "plain.jsonl"]
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_text('{"prompt": "1+1+1+1", "answer": "4"}\n')
    command = ["eval", "--model", "zoo:student", "--max-new-tokens=4", "--quiet", "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--data", *map(str, paths)]) == 0
    assert main([*command, "--data", *map(str, paths), "--resume"]) == 0
    files = sorted((tmp_path / "out" / "evaluations").iterdir())
    said = [json.loads(file.read_text().splitlines()[0])["settings"]["name"] for file in files]
    assert sorted(said) == sorted(map(str, paths))
    assert any(file.name.endswith("-plain.jsonl.jsonl") for file in files)


@pytest.mark.parametrize("lora", [[], ["--lora-rank=2", "--lora-target-modules=[q_proj]"]], ids=["whole", "adapter"])
def test_eval_of_a_run_agrees_with_its_training(recipe: Path, tmp_path: Path, lora: list[str]) -> None:
    """The saved student stops as it did in training: with the teacher's id too, which here it prefers to its own."""
    student, run, out = tmp_path / "student", tmp_path / "run", tmp_path / "out"
    student_stopping_as_the_teacher().save_pretrained(student)
    zoo.load("student")[1].save_pretrained(student)
    train = ["train", "--config", str(recipe), "--student", str(student), "--output-dir", str(run), "--quiet", *lora]
    assert main([*train, "--max-steps=1", "--eval-max-new-tokens=48", "--eval-samples=4"]) == 0
    last = json.loads((run / "evals.jsonl").read_text().splitlines()[-1])
    assert last.pop("step") == 1 and last["stop_rate"] > 0.7
    evaluation = ["eval", "--model", str(run), "--data", "zoo:chains", "--limit", "4", "--samples", "4", "--quiet"]
    assert main([*evaluation, "--max-new-tokens", "48", "--output-dir", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())["zoo:chains"]
    if lora:  # merging rounds the weights, and a draw may fall on the other side
        assert found["stop_rate"] == pytest.approx(last["stop_rate"], abs=1 / 16)
    else:
        assert found == last


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "zoo:foo", "--data", "zoo:chains"], "cannot read the model spec 'zoo:foo'"),
        (["--model", "zoo:student", "--data", "zoo:chain"], "unknown task 'zoo:chain'"),
        (["--model", "zoo:student", "--data", "zoo:chains", "--samples", "0"], "--samples is 0"),
        (["--model", "zoo:student", "--data", "zoo:chains", "--dtype", "bf16"], "--dtype is 'bf16'"),
        (["--model", "zoo:student", "--data", "zoo:chains", "--max-new-tokens", "0"], "at least 1"),
        (["--model", "zoo:student", "--data", "zoo:chains", "zoo:chains"], "--data names zoo:chains twice"),
    ],
)
def test_eval_refuses(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint in refused(capsys, "eval", *options, "--quiet")


def test_eval_goes_as_far_as_the_models_positions_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = []
    evaluate = scores.evaluate

    def recorded(*arguments: Any, **options: Any) -> Any:
        lengths.append(options.pop("max_new_tokens"))
        return evaluate(*arguments, **options, max_new_tokens=8)  # the length is what matters here

    monkeypatch.setattr(scores, "evaluate", recorded)
    command = ["eval", "--model", "zoo:student", "--data", "zoo:chains", "--limit", "4", "--quiet"]
    tokenizer, rows = zoo.load("student")[1], zoo.problems(4, seed=0, split="test")
    longest = longest_prompt(tokenizer, rows)
    for more in ([], ["--max-new-tokens", "4000"], ["--max-new-tokens", "16"]):
        assert main([*command, *more]) == 0
    assert lengths == [512 - longest, 512 - longest, 16]
    asked = [record.message for record in caplog.records if "completions are cut" in record.message]
    assert [re.findall(r"\d+", line) for line in asked] == [
        [str(512 - longest), length, "512", str(longest)] for length in ("1024", "4000")
    ]


def test_eval_of_a_run_takes_the_length_of_its_recipe(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    train = ["train", "--config", str(recipe), "--output-dir", str(run), "--max-steps=1", "--quiet"]
    assert main([*train, "--eval-max-new-tokens=11", "--save-strategy=steps", "--save-steps=1"]) == 0
    for spec in (run, run / "model", run / "checkpoint-1"):
        command = ["eval", "--model", str(spec), "--data", "zoo:chains", "--limit", "2", "--output-dir", str(out)]
        assert main(command) == 0
        assert f"completions of up to 11 tokens, as in {run / 'config.yaml'}" in capsys.readouterr().err
        header = json.loads((out / "evaluations" / "zoo-chains.jsonl").read_text().splitlines()[0])
        assert header["settings"]["max_new_tokens"] == 11


STUDY = """\
name: small
seeds: {select: [9], test: 1}
configurations: 2
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
  trb: {initial_kl_budget: [0.1, 0.5]}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_sweep_plans_without_running(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "out"
    assert main(["sweep", "--config", str(study), "--output-dir", str(directory), "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "selection: 3 runs" in shown and "test: 2 runs (1 paired seeds)" in shown
    assert main(["sweep", "--config", str(study), "--seeds", "20-22", "--plan"]) == 0
    assert "test: 6 runs (3 paired seeds)" in capsys.readouterr().out
    assert not directory.exists()


def test_sweep_runs_shows_and_reports(
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sweep, "open_pool", pool_of_this_process)
    directory = tmp_path / "out"
    assert main(["sweep", "--config", str(study), "--output-dir", str(directory), "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert "chains: 1 paired seeds, 5 test problems" in captured.out
    assert "test 2 of 2: chains/test/trb/seed-0" in captured.err
    page = (directory / "report.html").read_text()
    assert "chains" in page and str(directory / "study.json") in captured.out.replace("\n", "")
    command = ["sweep", "--config", str(study), "--output-dir", str(directory), "--keep-models"]
    assert main(command) == 0
    (late,) = [record.getMessage() for record in caplog.records if "--keep-models" in record.getMessage()]
    assert "too late for 2 of 2 runs" in late
    shutil.rmtree(directory / "chains" / "test" / "opd" / "seed-0")
    assert str(directory / "chains" / "test" / "opd" / "seed-0") in late
    assert main(command) == 0
    assert (directory / "chains" / "test" / "opd" / "seed-0" / "model").is_dir()
    assert "too late for 1 of 2 runs" in caplog.records[-1].getMessage()


def test_sweep_refuses(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workers is 0" in refused(capsys, "sweep", "--config", study, "--workers", 0)
    for seeds in ("two", "3-", "-3", "1.5", "3-2-1"):
        assert f"--seeds {seeds} is neither" in refused(capsys, "sweep", "--config", study, f"--seeds={seeds}")
    assert "--seeds 5-4 is an empty range" in refused(capsys, "sweep", "--config", study, "--seeds", "5-4")
    fresh = refused(capsys, "sweep", "--config", study, "--seeds", "0-9")
    assert "seed 9 is used for selection and for the test" in fresh
    study.write_text(STUDY.replace("configurations: 2", "configurations: 5"))
    assert "trb has 2 configurations and `configurations` says 5" in refused(capsys, "sweep", "--config", study)


def test_probe_of_a_recipe_and_of_a_setting(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--problems", "3", "--samples", "2", "--excerpts", "1", "--budgets", "0.1", "--truncations", "4"]
    directory = tmp_path / "probe"
    command = ["probe", "--config", str(study), "--setting", "chains", "--output-dir", str(directory), "--quiet"]
    assert main([*command, *small, "--skd-top-k", "3"]) == 0
    found = json.loads((directory / "probe.json").read_text())
    assert found["provenance"]["versions"]
    assert (directory / "report.html").exists() and (directory / "rollouts.jsonl").exists()
    assert "choose one of its settings with --setting, chains" in refused(capsys, "probe", "--config", study)


def test_probe_of_a_recipe_has_no_settings(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "leave it out" in refused(capsys, "probe", "--config", recipe, "--setting", "chains")
    few = refused(capsys, "probe", "--config", recipe, "--skd-top-k", "0", "--output-dir", tmp_path / "none")
    assert "--skd-top-k must be at least 1, got 0" in few
    spent = refused(capsys, "probe", "--config", recipe, "--kl-budget", "-1", "--output-dir", tmp_path / "none")
    assert "--kl-budget must be a non-negative number of nats, got -1" in spent


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert "not a directory" in refused(capsys, "report", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for unwritable in ("/proc/x", tmp_path / "file", tmp_path / ("long" * 100)):
        said = refused(capsys, "report", tmp_path, "--export", unwritable)
        assert f"cannot write to {unwritable}: " in said and "choose another folder to --export to" in said
    assert "cannot write to /proc/x: " in refused(capsys, "init", "/proc/x/mine.yaml")


# ---- doctor ----


def doctor(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and subject -> (status, text) of every line."""
    code = main(["doctor", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    split = [(line[:4].strip(), *line[5:].split(": ", 1)) for line in lines]
    return code, {subject: (status, text) for status, subject, text in split}


def test_doctor_on_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = doctor(capsys)
    assert code == 0
    assert checks["python"] == ("ok", ".".join(map(str, sys.version_info[:3])))
    assert checks["torch"][1] == metadata.version("torch")
    assert {"transformers", "trl", "cpu", "memory", "disk", "trb"} <= checks.keys()
    assert {status for status, _ in checks.values()} <= {"ok", "warn"}


def test_doctor_on_the_zoo_pair(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = doctor(capsys, "--student", "zoo:student", "--teacher", "zoo:teacher")
    assert code == 0
    assert checks["tokenizer"] == ("ok", "the same for both, 57 tokens")
    assert checks["heads"] == (
        "ok",
        "student 64 rows, teacher 80, tokenizer uses 57: blended and scored on the 64 both have",
    )
    assert checks["end of sequence"][1] == "student stops with 0, teacher with 2; 0 is emitted, 2 folded onto it"
    assert "memory estimate" not in checks

    code, checks = doctor(capsys, "--config", recipe)
    assert code == 0
    assert checks["lengths"] == ("ok", "up to 40 tokens fit both models")
    assert checks["memory estimate"][0] == "ok"

    code, checks = doctor(capsys, "--config", recipe, "--max-completion-length", "500")
    assert code == 1
    assert checks["lengths"][0] == "fail"
    fits = "prompts of up to 32 tokens and completions of up to {} do not fit the 512 positions of the student. Lower"
    assert fits.format(500) in checks["lengths"][1]
    code, checks = doctor(capsys, "--config", recipe, "--eval-max-new-tokens", "490")
    assert (code, checks["lengths"][0]) == (1, "fail")
    assert fits.format(490) in checks["lengths"][1]


@pytest.mark.parametrize(
    ("teacher", "subject", "complaint"),
    [
        ("other", "tokenizer", "different tokenizers"),
        ("narrow", "models", "the teacher's head has 40 rows"),
        ("nowhere", "tokenizer", "no model at"),
    ],
)
def test_doctor_on_pairs_that_do_not_fit(
    misfits: Path, teacher: str, subject: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, checks = doctor(capsys, "--student", "zoo:student", "--teacher", misfits / teacher)
    assert code == 1
    assert checks[subject][0] == "fail"
    assert complaint in checks[subject][1]


def test_doctor_on_too_little_memory(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = (sum(p.numel() for p in zoo.load(name)[0].parameters()) for name in zoo.NAMES)
    resident = 4 * (4 * student + teacher)  # weights, gradients and two moments; weights
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=resident))
    code, checks = doctor(capsys, "--config", recipe)
    assert code == 1
    assert checks["memory estimate"][0] == "fail"
    assert "Lower per_device_train_batch_size" in checks["memory estimate"][1]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * resident))
    assert doctor(capsys, "--config", recipe)[1]["memory estimate"][0] == "ok"


LAUNCHES = RECIPES / "accelerate"


def estimated_parts(estimate: str) -> dict[str, float]:
    """Gigabytes by component."""
    parts = re.search(r"a rough estimate: (.*)\);", estimate)[1].split(", ")  # type: ignore[index]
    return {name: float(size) for name, size in (part.rsplit(" ", 1) for part in parts)}


@pytest.fixture
def wide_pair(recipe: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Options that name a recipe and a pair of half a billion parameters each, without weights."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, max_position_embeddings=64
    )
    config.save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "model.safetensors").touch()  # the doctor reads no weights
    zoo.load("student")[1].save_pretrained(tmp_path / "wide")
    return ("--config", recipe, "--student", tmp_path / "wide", "--teacher", tmp_path / "wide", "--bf16", "true")


@pytest.mark.parametrize(
    ("launch", "strategy", "options"),
    [
        ("ddp", "ddp", ()),
        ("ddp", "ddp", ("--prompts-per-step", "null", "--gradient-accumulation-steps", 2)),
        ("ddp", "ddp", ("--lora-rank", 4)),
        ("fsdp2", "fsdp", ("--gradient-checkpointing", "true")),
        ("fsdp2", "fsdp", ("--method", "opd", "--teacher-sharded", "true", "--replica-dtype", "float32")),
        ("zero3", "zero3", ("--rollout-batch-size", 2)),
    ],
)
def test_doctor_estimates_what_its_plan_says(
    wide_pair: tuple[Any, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    launch: str,
    strategy: str,
    options: tuple[Any, ...],
) -> None:
    here = {"like": "cpu", "per_node": {"value": 8, "kind": "assumed", "source": "this test"}}
    (tmp_path / "here.json").write_text(json.dumps(here))
    planning = ("--machine", tmp_path / "here.json", "--gpus", 8, "--strategy", strategy, "--json")
    main(["doctor", "--plan", *map(str, (*wide_pair, *planning, *options))])
    plan = json.loads(capsys.readouterr().out)
    largest = max(plan["memory"].values(), key=lambda parts: sum(parts.values()))
    found = doctor(capsys, *wide_pair, "--launch", LAUNCHES / f"{launch}.yaml", *options)[1]["memory estimate"][1]
    assert f"about {plan['peak'] / 1e9:.1f} GB on each device" in found
    assert estimated_parts(found) == {name: float(f"{size / 1e9:.1f}") for name, size in largest.items() if size}


def test_doctor_estimates_one_process_of_a_launch(
    wide_pair: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in Qwen3ForCausalLM(Qwen3Config.from_pretrained(tmp_path / "wide")).parameters())

    def estimate(launch: str, *more: str) -> dict[str, float]:
        checks = doctor(capsys, *wide_pair, "--launch", LAUNCHES / f"{launch}.yaml", *more)[1]
        return estimated_parts(checks["memory estimate"][1])

    states = 4 * 4 * count / 1e9  # weights, gradients and two moments, in float32
    trained = ("student's weights", "master weights", "gradients", "optimizer's moments")
    whole = estimate("ddp")
    assert sum(whole[name] for name in trained if name in whole) == pytest.approx(states, abs=0.16)
    assert "sampling replica" not in whole
    for launch in ("fsdp2", "zero3"):
        found = estimate(launch)
        assert sum(found[name] for name in trained if name in found) == pytest.approx(states / 8, abs=0.21)
        assert found["sampling replica"] == pytest.approx(2 * count / 1e9, abs=0.06)
        assert found["teacher's weights"] == pytest.approx(4 * count / 1e9, abs=0.06)
    plain = estimate("fsdp2", "--method", "opd", "--teacher_sharded", "true", "--replica_dtype", "float32")
    assert plain["sampling replica"] == pytest.approx(4 * count / 1e9, abs=0.06)
    assert plain["teacher's weights"] == pytest.approx(4 * count / 8 / 1e9, abs=0.06)


def test_doctor_says_when_it_cannot_tell_the_layers(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=True, **sizes)).save_pretrained(tmp_path / "bert")
    zoo.load("student")[1].save_pretrained(tmp_path / "bert")
    code, checks = doctor(capsys, "--config", recipe, "--teacher", tmp_path / "bert", "--teacher-dtype", "float32")
    assert code == 0
    assert checks["memory estimate"] == (
        "warn",
        "cannot plan for BertLMHeadModel: none of its parameters belongs to a numbered layer",
    )


@pytest.mark.parametrize(
    ("line", "remedy"),
    [("fsdp_version: 1", "fsdp_version: 2"), ("fsdp_version: 2", "fsdp_cpu_ram_efficient_loading: false")],
)
def test_doctor_refuses_launches_that_cannot_be_sampled_in(
    line: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = tmp_path / "launch.yaml"
    launch.write_text(f"distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  {line}\n")
    code, checks = doctor(capsys, "--launch", launch)
    assert code == 1
    assert checks["launch"][0] == "fail"
    assert remedy in checks["launch"][1]


def test_doctor_needs_both_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert "teacher is missing" in refused(capsys, "doctor", "--student", "zoo:student")
    assert "unexpected argument" in refused(capsys, "doctor", "zoo:student")


def test_doctor_names_a_package_outside_its_range(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.metadata

    ranges = ["torch>=2.13", "trl>=99", "no-such-package-xyz>=1", "scipy>=99; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ranges)
    code, checks = doctor(capsys)
    assert code == 1
    assert checks["torch"][0] == "ok"
    assert checks["trl"][0] == "fail"
    assert "supported: >=99. pip install 'trl>=99'" in checks["trl"][1]
    assert checks["no-such-package-xyz"] == ("fail", "missing. pip install 'no-such-package-xyz>=1'")
    assert "scipy" not in checks


def planned(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    assert main(["doctor", "--plan", *map(str, arguments)]) == code
    return capsys.readouterr().out


ZOO_PAIR = ("--student", "zoo:student", "--teacher", "zoo:teacher")


def test_doctor_plans_a_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--config", recipe, "--gpus", 2, "--strategy", "fsdp")
    assert "zoo:student" in text and "2 x h100, fsdp, in-process" in text
    for part in ("sampling replica", "gathered layers", "layers for the passes", "drafting", "the run:"):
        assert part in text
    # Nothing unmeasured passes for measured.
    assert "assumed, not measured: link_share" in text
    assert "measured: bandwidth_share = 0.896 (benchmarks/results/gpu.json" in text


def test_doctor_plan_as_json_says_what_it_was_made_from(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--gpus", 1, "--mean-completion", 64, "--acceptance", 0.97, "--max-completion-length", 128, "--json")
    report = json.loads(planned(capsys, *ZOO_PAIR, *options))
    student = zoo.load("student")[0]
    assert report["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert (report["work"]["completion"], report["work"]["mean_completion"]) == (128, 64)
    assert report["numbers"]["continuation_rate"] == 0.97
    assert report["memory"]["update"]["gradients"] == sum(p.nbytes for p in student.parameters())
    assert report["machine"]["flops"]["kind"] == "data sheet"
    assert report["provenance"]["versions"]["torch"] == metadata.version("torch")
    assert report["run"] is None and report["problems"] == []


def test_doctor_plans_from_shapes_alone_and_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = Path(__file__).parents[2] / "benchmarks" / "shapes"
    pair = ("--student", shapes / "llama-70b", "--teacher", shapes / "llama-405b", "--teacher-dtype", "bfloat16")
    text = planned(capsys, *pair, "--nodes", 2, "--strategy", "zero3", code=1)
    assert "(70.55 B)" in text and "16 x h100, zero3" in text
    assert "sampling needs" in text and "serve it (--engine vllm)" in text


@pytest.mark.parametrize("name", ["quickstart", "qwen3-0.6b-from-4b", "qwen3-1.7b-from-8b"])
def test_doctor_plans_for_recipes_of_the_package_without_the_hub(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--config", name)
    assert {"quickstart": "0.00 B", "qwen3-0.6b-from-4b": "0.60 B", "qwen3-1.7b-from-8b": "1.72 B"}[name] in text


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_of_the_package_are_the_published_ones(name: str) -> None:
    folder = name.split("/")[1].removesuffix("-Base").lower()
    file = Path(__file__).parents[2] / "benchmarks" / "shapes" / folder / "config.json"
    published = json.loads(file.read_text())
    del published["architectures"]
    assert published == SHAPES[name]


@pytest.mark.parametrize(
    ("command", "config", "instead"),
    [
        ("train", "studies/zoo", "trb sweep --config studies/zoo"),
        ("compare", "studies/zoo", "trb sweep --config studies/zoo"),
        ("doctor", "studies/zoo", "trb sweep --config studies/zoo"),
        ("sweep", "quickstart", "trb compare --config quickstart"),
        ("sweep", "baselines/trb", "trb train --config baselines/trb"),
    ],
)
def test_a_study_and_a_recipe_are_told_apart(
    command: str, config: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"run it with `{instead}`" in refused(capsys, command, "--config", config)


def test_doctor_plan_of_plain_distillation_has_no_blended_step(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, *ZOO_PAIR, "--method", "opd", "--gpus", 1)
    assert "blended" not in text and "student's rollouts" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--plan needs a recipe (--config) or a pair"),
        ((*ZOO_PAIR, "--machine", "h10"), "unknown machine 'h10'"),
        ((*ZOO_PAIR, "--gpus", "9"), "--gpus=9 is out of range: a node of h100 has 8"),
        ((*ZOO_PAIR, "--gpus", "4", "--nodes", "2"), "drop --gpus=4"),
        ((*ZOO_PAIR, "--nodes", "0"), "--nodes must be at least 1"),
        ((*ZOO_PAIR, "--strategy", "fsdp1"), "unknown strategy 'fsdp1'"),
        ((*ZOO_PAIR, "--engine-gpus", "2"), "are vLLM's"),
    ],
)
def test_doctor_refuses_impossible_plans(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refused(capsys, "doctor", "--plan", *arguments)


# ---- progress ----


def test_live_progress_shows_numbers_and_only_printable_text(tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("w") as stream:
        console = Console(file=stream, force_terminal=True, width=160, color_system=None)
        with cli.display.live_display(console) as display:
            display.plan({"opd": 4, "trb": 4})
            display.stage("student: \x07 [bold]problems")
            display.progress.refresh()
            display.run("opd", 0, 4)
            display.step(3, {"loss": 0.25, "trb/reward": 0.5, "trb/kl_budget": 0.125})
            display.progress.refresh()
            display.finished("opd")
            display.progress.refresh()
    shown = (tmp_path / "terminal").read_text()
    assert "student: ? [bold]problems" in shown
    assert "opd: training" in shown
    assert "3/4" in shown
    assert "loss 0.250  reward 0.50  budget 0.125" in shown
    assert "methods 0 of 2" in shown
    assert "methods 1 of 2" in shown
    assert "4/8" in shown


def test_debug_shows_the_traceback_of_an_explained_error(tmp_path: Path) -> None:
    arguments = ["train", "--config", str(tmp_path / "none.yaml")]
    assert main(arguments) == 2
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        main([*arguments, "--debug"])


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").mkdir()
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "recipe.yaml" in capsys.readouterr().err


# ---- what a newcomer types ----


def test_a_module_that_adapters_cannot_stand_on_is_refused_with_those_there_are(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", tmp_path / "out", "--quiet", "--lora-rank", "2"]
    said = refused(capsys, "train", "--config", recipe, *out, "--lora-target-modules", "[q_proj, v_prj]")
    assert "lora_target_modules has 'v_prj', and the student has no such module; did you mean 'v_proj'" in said
    said = refused(capsys, "train", "--config", recipe, *out, "--lora-target-modules", "[q_proj, lm_head]")
    assert "lora_target_modules has 'lm_head', and no adapter is trained on the head, lm_head: leave it out" in said


def test_refusals_name_what_was_meant(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for run in ("opd", "trb"):
        (tmp_path / run / "model").mkdir(parents=True)
        (tmp_path / run / "model" / "config.json").write_text("{}")
    said = refused(capsys, "eval", "--model", tmp_path, "--data", "zoo:chains")
    assert f"holds no model itself: name one in it, {tmp_path / 'opd' / 'model'}, {tmp_path / 'trb' / 'model'}" in said
    said = refused(capsys, "probe", "--config", "studies/zoo", "--setting", "clok")
    assert "studies/zoo is a study, and has no setting 'clok'; did you mean 'clock'?: choose one" in said
    said = refused(capsys, "compare", "--config", "quickstart", "--methods", "opd", "trb")
    assert "unexpected argument 'trb'" in said and "--methods.NAME.KEY" in said
    with pytest.raises(SystemExit):
        main(["sweep", "--config", "studies/zoo", "--max-steps", "2"])
    assert "the keys of a study are set in its file" in capsys.readouterr().err


def test_a_file_named_without_its_ending_is_what_is_meant(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.yaml").write_text(SMALL_FILE)
    for name in ("long", "./long"):
        said = refused(capsys, "train", "--config", name)
        assert f"there is no recipe '{name}', and a file long.yaml: write its ending, long.yaml" in said
    Path("long.yaml").unlink()
    assert "did you mean" not in refused(capsys, "train", "--config", "long")
